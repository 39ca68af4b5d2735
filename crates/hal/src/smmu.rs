// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arm's `SMMUv3` (IHI 0070), non-secure side: every stream that it has an entry
//! for goes through one stage-2 of the monitor's, all else aborts. No events,
//! no interrupts, no ATS; the command queue is polled.

use havmsi_abi::PAGE_SIZE;
use havmsi_abi::layout::carveout;
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::smmu::{Command, FORGET_ALL, FORGET_STREAMS, SYNC, forget, stream_table_entry};

use crate::mmio::Registers;
use crate::{barrier, phys};

// Registers (6.3).
const IDR0: usize = 0x00;
const IDR1: usize = 0x04;
const IDR5: usize = 0x14;
const CR0: usize = 0x20;
const CR0ACK: usize = 0x24;
const CR1: usize = 0x28;
const CR2: usize = 0x2c;
const GBPA: usize = 0x44;
const STRTAB_BASE: usize = 0x80;
const STRTAB_BASE_CFG: usize = 0x88;
const CMDQ_BASE: usize = 0x90;
const CMDQ_PROD: usize = 0x98;
const CMDQ_CONS: usize = 0x9c;

/// IDR0: stage 2 (S2P), AArch64 tables (TTF), walks coherent with the CPUs'
/// caches (COHACC): table entries are not cleaned to memory.
const IDR0_NEEDED: u32 = 1 | 1 << 3 | 1 << 4;
const IDR0_ATS: u32 = 1 << 10;
/// IDR1: tables or queues at places of the SMMU's choice.
const IDR1_PRESET: u32 = 0b11 << 29;
/// IDR5: 4 KiB granule.
const IDR5_GRAN4K: u32 = 1 << 4;
const SMMUEN: u32 = 1;
const CMDQEN: u32 = 1 << 3;
/// Requests that claim to be translated are checked (6.3.9); RES0 without ATS.
const ATSCHK: u32 = 1 << 4;
/// CR1: tables and queue are read inner shareable, write-back.
const CR1_COHERENT: u32 = 0xd75;
/// CR2: no part in the CPUs' broadcast invalidation.
const CR2_PTM: u32 = 1 << 2;
const GBPA_ABORT: u32 = 1 << 20;
const GBPA_UPDATE: u32 = 1 << 31;
/// Read-allocate hint of a base register.
const READ_ALLOCATE: u64 = 1 << 62;

/// log2 of the streams and of the commands that the tables hold.
const LOG2_STREAMS: u32 = (carveout::SMMU_STREAMS_SIZE / 64).ilog2();
const LOG2_COMMANDS: u32 = (PAGE_SIZE / 16).ilog2();
/// Looks at a register before the SMMU counts as broken.
const PATIENCE: u32 = 10_000_000;

/// The SMMU. One CPU at a time may use it.
#[derive(Clone, Copy)]
pub struct Smmu {
    registers: Registers,
    /// The command queue.
    commands: Pa,
}

impl Smmu {
    /// Takes the SMMU over: from now on all that devices send aborts, until
    /// [`Self::start`].
    pub fn take(registers: Registers) -> Self {
        let smmu = Self { registers, commands: Pa(0) };
        // What happens while it is disabled; it may be to let all pass (6.3.14).
        registers.write32(GBPA, GBPA_UPDATE | GBPA_ABORT);
        smmu.wait(GBPA, GBPA_ABORT);
        smmu.set_cr0(0);
        smmu
    }

    /// Lets devices through their stage-2. All that the SMMU reads lies in the
    /// carve-out, which is zero as yet.
    pub fn start(&mut self, carveout: Pa) {
        let read = |register| self.registers.read32(register);
        let features = read(IDR0) & IDR0_NEEDED == IDR0_NEEDED
            && read(IDR1) & IDR1_PRESET == 0
            && read(IDR5) & IDR5_GRAN4K != 0;
        assert!(features, "the SMMU lacks stage 2, 4 KiB pages or coherent walks");
        self.commands = carveout.offset(carveout::SMMU_COMMANDS);
        let streams = carveout.offset(carveout::SMMU_STREAMS);
        // IDR5.OAS [2:0]; the tables have 48 bits at most.
        let root = carveout.offset(carveout::SMMU_ROOT);
        let entry = stream_table_entry(root, u64::from(read(IDR5) & 7).min(5));
        for (i, word) in (0..carveout::SMMU_STREAMS_SIZE / 8).zip(entry.into_iter().cycle()) {
            phys::write(streams.offset(i * 8), word);
        }
        self.registers.write32(CR1, CR1_COHERENT);
        self.registers.write32(CR2, CR2_PTM);
        self.registers.write64(STRTAB_BASE, READ_ALLOCATE | streams.0);
        self.registers.write32(STRTAB_BASE_CFG, LOG2_STREAMS);
        self.registers
            .write64(CMDQ_BASE, READ_ALLOCATE | self.commands.0 | u64::from(LOG2_COMMANDS));
        self.registers.write32(CMDQ_PROD, 0);
        self.registers.write32(CMDQ_CONS, 0);
        self.set_cr0(CMDQEN);
        self.send(FORGET_STREAMS);
        self.send(FORGET_ALL);
        let ats = read(IDR0) & IDR0_ATS != 0;
        self.set_cr0(CMDQEN | SMMUEN | if ats { ATSCHK } else { 0 });
    }

    /// Removes what it holds for `size` bytes from `ipa` on, and waits until what devices
    /// sent by that has arrived. Of several pages all is removed that it holds: one
    /// command whatever their number.
    pub fn invalidate(&self, ipa: Ipa, size: u64) {
        self.send(if size == PAGE_SIZE { forget(ipa) } else { FORGET_ALL });
    }

    /// Has a command done.
    fn send(&self, command: Command) {
        let mut next = self.registers.read32(CMDQ_PROD);
        for words in [command, SYNC] {
            let slot = u64::from(next % (1 << LOG2_COMMANDS));
            let at = self.commands.offset(slot * 16);
            phys::write(at, words[0]);
            phys::write(at.offset(8), words[1]);
            // One bit more than the index tells a full queue from an empty one (3.5.1).
            next = (next + 1) % (2 << LOG2_COMMANDS);
        }
        // Commands and table entries are in memory before the SMMU hears of them.
        barrier::dsb_sy();
        self.registers.write32(CMDQ_PROD, next);
        self.wait(CMDQ_CONS, next);
        barrier::dsb_sy();
    }

    fn set_cr0(&self, value: u32) {
        self.registers.write32(CR0, value);
        self.wait(CR0ACK, value);
    }

    /// Without the SMMU's word nothing may go on: nobody knows what devices reach.
    fn wait(&self, register: usize, value: u32) {
        let done = (0..PATIENCE).any(|_| self.registers.read32(register) == value);
        assert!(done, "the SMMU does not answer");
    }
}
