// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parts of Arm's Juno: its control processor, entropy source, coherent
//! interconnect and system counter. Never run: nobody here has the board.

use core::arch::asm;

use crate::barrier;
use crate::mmio::Registers;

/// Doorbells of the secure channel of the message handling unit: the control
/// processor's to us, ours to it (Juno TRM, DDI 0515).
const FROM_SCP_STAT: usize = 0x200;
const FROM_SCP_CLEAR: usize = 0x210;
const TO_SCP_STAT: usize = 0x300;
const TO_SCP_SET: usize = 0x308;
const SLOT: u32 = 1;
/// In secure SRAM: where the boot ROM sends a CPU that was turned on; the
/// control processor's answers; our commands.
const MAILBOX: usize = 0;
const ANSWER: usize = 0x80;
const COMMAND: usize = 0x180;
/// Commands of SCPI (ARM DUI 0922).
const SET_CSS_POWER_STATE: u32 = 3;
const SYSTEM_POWER_STATE: u32 = 5;

/// What the whole system shall do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum System {
    /// Turn off.
    Off = 0,
    /// Start again.
    Reboot = 1,
}

/// The system control processor, by SCPI over the secure channel.
pub struct Scp {
    /// The message handling unit.
    pub mhu: Registers,
    /// The secure SRAM.
    pub sram: Registers,
}

impl Scp {
    /// Header: command [6:0], bytes of payload [24:16]; a word of status; payload.
    fn send(&self, command: u32, size: u32, payload: u32) {
        while self.mhu.read32(TO_SCP_STAT) & SLOT != 0 {}
        self.sram.write32(COMMAND, command | size << 16);
        self.sram.write32(COMMAND + 4, 0);
        self.sram.write32(COMMAND + 8, payload);
        barrier::dsb_sy();
        self.mhu.write32(TO_SCP_SET, SLOT);
    }

    /// Turns the CPU with this affinity on, and its cluster; the boot ROM
    /// sends it to `entry`. There is no answer.
    pub fn power_on(&self, affinity: u64, entry: u64) {
        let [a, b, c, d, high @ ..] = entry.to_le_bytes();
        self.sram.write32(MAILBOX, u32::from_le_bytes([a, b, c, d]));
        self.sram.write32(MAILBOX + 4, u32::from_le_bytes(high));
        let [cpu, cluster, ..] = affinity.to_le_bytes();
        // CPU [3:0], cluster [7:4]; the states above are 0: all on.
        self.send(SET_CSS_POWER_STATE, 4, u32::from(cpu) | u32::from(cluster) << 4);
    }

    /// Asks for `state`; returns whether it will come.
    pub fn system(&self, state: System) -> bool {
        self.send(SYSTEM_POWER_STATE, 1, state as u32);
        while self.mhu.read32(FROM_SCP_STAT) & SLOT == 0 {}
        barrier::dsb_sy();
        let status = self.sram.read32(ANSWER + 4);
        self.mhu.write32(FROM_SCP_CLEAR, SLOT);
        status == 0
    }
}

const TRNG_STATUS: usize = 0x10;
const TRNG_INTMASK: usize = 0x14;
const TRNG_CONFIG: usize = 0x18;
const TRNG_CONTROL: usize = 0x1c;
/// Reads of its status before it counts as broken.
const TRNG_PATIENCE: u32 = 1 << 20;

/// The entropy source.
pub struct Trng(pub Registers);

impl Trng {
    fn draw(&self) -> Option<[u32; 4]> {
        self.0.write32(TRNG_CONTROL, 1);
        (0..TRNG_PATIENCE).find(|_| self.0.read32(TRNG_STATUS) & 1 != 0)?;
        let words = core::array::from_fn(|i| self.0.read32(4 * i));
        self.0.write32(TRNG_STATUS, 1);
        Some(words)
    }

    /// 256 bits, or `None` if it is stuck.
    pub fn seed(&self) -> Option<[u8; 32]> {
        self.0.write32(TRNG_INTMASK, 0);
        self.0.write32(TRNG_CONFIG, 1);
        let (low, high) = (self.draw()?, self.draw()?);
        let mut seed = [0; 32];
        for (bytes, word) in seed.chunks_exact_mut(4).zip(low.iter().chain(&high)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        (low != high).then_some(seed)
    }
}

const CCI_STATUS: usize = 0xc;

/// The coherent interconnect, CCI-400 (DDI 0470).
pub struct Cci(pub Registers);

impl Cci {
    /// Lets the cluster at the slave interface `port` take part in coherency:
    /// snoops, and TLB maintenance of others.
    pub fn join(&self, port: usize) {
        self.0.write32((port + 1) * 0x1000, 0b11);
        while self.0.read32(CCI_STATUS) & 1 != 0 {}
    }
}

/// The system counter's control frame (Arm ARM I5.7).
pub struct Counter(pub Registers);

impl Counter {
    /// Starts it: CNTCR.EN, first entry of its table of frequencies.
    pub fn start(&self) {
        self.0.write32(0, 1 << 8 | 1);
    }
}

const UART_IBRD: usize = 0x24;
const UART_FBRD: usize = 0x28;
const UART_LCR_H: usize = 0x2c;
const UART_CR: usize = 0x30;
/// 8 bits, FIFOs on.
const LCR_H_8N1: u32 = 0b11 << 5 | 1 << 4;

/// `L2CTLR_EL1` of a Cortex-A57 or A72.
pub fn l2ctlr_el1() -> u64 {
    let value: u64;
    // SAFETY: reading it has no side effect.
    unsafe { asm!("mrs {}, s3_1_c11_c0_2", out(reg) value, options(nomem, nostack)) }
    value
}

/// Changes `L2CTLR_EL1`.
///
/// # Safety
/// The L2's RAMs must be fast enough for `value`.
pub unsafe fn set_l2ctlr_el1(value: u64) {
    // SAFETY: passed on to the caller.
    unsafe { asm!("msr s3_1_c11_c0_2, {}", "isb", in(reg) value, options(nostack)) }
}

/// Sets the line of a UART (PL011), which is off from then on. `divisor` is that of
/// its clock, in 64ths.
pub fn set_line(uart: Registers, divisor: u32) {
    uart.write32(UART_CR, 0);
    uart.write32(UART_IBRD, divisor >> 6);
    uart.write32(UART_FBRD, divisor & 63);
    uart.write32(UART_LCR_H, LCR_H_8N1);
}
