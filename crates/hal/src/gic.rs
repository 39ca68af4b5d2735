// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interrupt controller with two security states (GICv2: IHI 0048B; GICv3: IHI 0069H).
//!
//! All interrupts are the normal world's (group 1) but one: SGI 15, which
//! wakes a CPU that waits in the monitor, and fetches one out of the normal
//! world. The host enables, routes and prioritises its own through the
//! non-secure view of the same registers.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::barrier;
use crate::mmio::Registers;
use crate::sysreg as reg;

/// The monitor's own software-generated interrupt.
const SGI: u32 = 15;

const GICD_CTLR: usize = 0;
const GICD_TYPER: usize = 4;
const GICD_IGROUPR: usize = 0x80;
const GICD_ITARGETSR: usize = 0x800;
const GICD_SGIR: usize = 0xf00;
const GICD_IGRPMODR: usize = 0xd00;
const GICD_ISENABLER: usize = 0x100;
const GICD_IPRIORITYR: usize = 0x400;

/// GICD_CTLR, secure view with affinity routing: RWP, ARE_NS, ARE_S, EnableGrp0.
const CTLR_RWP: u32 = 1 << 31;
const CTLR_ARE: u32 = 1 << 5 | 1 << 4;
const CTLR_GRP0: u32 = 1;

/// Offset of the SGI and PPI page in a redistributor's frame.
const SGI_BASE: usize = 0x1_0000;
/// Bytes of one redistributor's two frames.
pub const REDISTRIBUTOR_SIZE: usize = 0x2_0000;
/// Redistributor registers (IHI 0069H 12.10).
const GICR_AFFINITY: usize = 0xc;
const GICR_WAKER: usize = 0x14;
const WAKER_PROCESSOR_SLEEP: u32 = 1 << 1;
const WAKER_CHILDREN_ASLEEP: u32 = 1 << 2;

const GICC_CTLR: usize = 0;
const GICC_PMR: usize = 4;
const GICC_IAR: usize = 0xc;
const GICC_EOIR: usize = 0x10;
/// GICC_CTLR, secure view: group 0 as FIQ, nothing bypasses the controller;
/// group 1 (bit 1) is the host's to enable.
const GICC_CTLR_HOST: u32 = 1 << 6 | 1 << 5 | 1 << 3 | 1;

/// ICC_SRE_ELx: system registers on, bypass off, lower levels may see them.
const SRE_ALL: u64 = 0xf;

/// GICv2: the bit of each CPU's interface, by CPU number, once it was here.
static INTERFACES: [AtomicU32; 8] = [const { AtomicU32::new(0) }; 8];

/// The interrupt controller of the machine.
#[derive(Clone, Copy)]
pub struct Gic {
    /// The distributor.
    pub distributor: Registers,
    /// All else.
    pub kind: Kind,
}

/// What each CPU has of it.
#[derive(Clone, Copy)]
pub enum Kind {
    /// GICv2.
    V2 {
        /// The CPU interface, 8 KiB.
        cpu_interface: Registers,
        /// The virtual interface control registers.
        gich: Registers,
    },
    /// GICv3: the redistributors of all CPUs.
    V3(Registers),
}

impl Gic {
    /// 2 or 3.
    pub const fn version(&self) -> u64 {
        if self.gich().is_some() { 2 } else { 3 }
    }

    /// GICv2's virtual interface control registers.
    pub(crate) const fn gich(&self) -> Option<Registers> {
        if let Kind::V2 { gich, .. } = self.kind { Some(gich) } else { None }
    }

    /// Sets the distributor up. Once, by the first CPU.
    pub fn init_distributor(&self) {
        let d = self.distributor;
        let v3 = matches!(self.kind, Kind::V3(_));
        let set = |value| {
            d.write32(GICD_CTLR, value);
            // RWP is GICv3's; a GICv2 reads it as 0.
            while d.read32(GICD_CTLR) & CTLR_RWP != 0 {}
        };
        let routing = if v3 { CTLR_ARE } else { 0 };
        set(0);
        // Affinity routing may be turned on only while all groups are off (12.9.4).
        set(routing);
        // ITLinesNumber + 1 words; word 0 (SGIs, PPIs) is each CPU's own.
        let words = (d.read32(GICD_TYPER) & 31) as usize;
        for word in 1..=words {
            d.write32(GICD_IGROUPR + 4 * word, u32::MAX);
            if v3 {
                d.write32(GICD_IGRPMODR + 4 * word, 0);
            }
        }
        set(routing | CTLR_GRP0);
    }

    /// Sets this CPU's share up, as far as the host can't (its view of
    /// GICR_WAKER and the groups is read-as-zero): on each way into the
    /// monitor from power-off; `cpu` is its number. `SCR_EL3.NS` must be 1.
    pub fn init_cpu(&self, cpu: usize) {
        match self.kind {
            Kind::V2 { cpu_interface, .. } => {
                init_private(self.distributor, 0);
                // Those of the private interrupts hold the reader's own bit; a
                // single CPU has none, and nobody to send to (4.3.12).
                let own = self.distributor.read32(GICD_ITARGETSR) & 0xff;
                INTERFACES[cpu & 7].store(own, Ordering::Release);
                // Not below 0x80: the host could not change it then (3.4 of IHI 0048B).
                cpu_interface.write32(GICC_PMR, 0xff);
                cpu_interface.write32(GICC_CTLR, GICC_CTLR_HOST);
            }
            Kind::V3(redistributors) => {
                let frame = own_redistributor(redistributors);
                let waker = redistributors.read32(frame + GICR_WAKER);
                redistributors.write32(frame + GICR_WAKER, waker & !WAKER_PROCESSOR_SLEEP);
                while redistributors.read32(frame + GICR_WAKER) & WAKER_CHILDREN_ASLEEP != 0 {}
                init_private(redistributors, frame + SGI_BASE);
                redistributors.write32(frame + SGI_BASE + GICD_IGRPMODR, 0);
                // The registers of the lower levels exist once those of the higher do.
                reg::icc_sre_el3::write(SRE_ALL);
                barrier::isb();
                // Without Enable: EL1's own trap, as they would change nothing.
                reg::icc_sre_el2::write(SRE_ALL & !8);
                barrier::isb();
                reg::icc_sre_el1::write(SRE_ALL & !8);
                barrier::isb();
                reg::icc_pmr_el1::write(0xff);
                reg::icc_igrpen1_el3::write(0);
                reg::icc_igrpen0_el1::write(1);
                barrier::isb();
            }
        }
    }

    /// Keeps the normal world's interrupts from this CPU: those still pending
    /// would not let it sleep in the monitor. The host turns them on again.
    pub fn mute_cpu(&self) {
        match self.kind {
            Kind::V2 { cpu_interface, .. } => {
                cpu_interface.write32(GICC_CTLR, GICC_CTLR_HOST);
            }
            Kind::V3(_) => {
                reg::icc_igrpen1_el3::write(0);
                barrier::isb();
            }
        }
    }

    /// Sends the monitor's interrupt to the CPU with this `MPIDR_EL1` and this
    /// number. GICv2: no effect if it was never here.
    pub fn send(&self, mpidr: u64, cpu: usize) {
        barrier::dsb_sy();
        match self.kind {
            Kind::V2 { .. } => {
                // TargetList [23:16]; NSATT = 0: group 0 (4.3.15 of IHI 0048B).
                let interface = INTERFACES[cpu & 7].load(Ordering::Acquire);
                self.distributor.write32(GICD_SGIR, interface << 16 | SGI);
            }
            Kind::V3(_) => {
                let affinity = |level: u32| mpidr >> level & 0xff;
                reg::icc_sgi0r_el1::write(
                    affinity(32) << 48
                        | affinity(16) << 32
                        | u64::from(SGI) << 24
                        | affinity(8) << 16
                        | (affinity(0) >> 4) << 44
                        | 1 << (affinity(0) & 15),
                );
                barrier::isb();
            }
        }
    }

    /// Takes the monitor's interrupt, if it is pending.
    pub fn acknowledge(&self) {
        match self.kind {
            Kind::V2 { cpu_interface, .. } => {
                // A secure read of IAR takes group 0 only, unless AckCtl is set;
                // 1022 and 1023 name none.
                let id = cpu_interface.read32(GICC_IAR);
                if id & 0x3ff < 1020 {
                    cpu_interface.write32(GICC_EOIR, id);
                }
            }
            Kind::V3(_) => {
                let id = reg::icc_iar0_el1::read();
                barrier::dsb_sy();
                if id < 1020 {
                    reg::icc_eoir0_el1::write(id);
                    barrier::isb();
                }
            }
        }
    }
}

/// Where this CPU's is; the search ends where all of them do.
fn own_redistributor(redistributors: Registers) -> usize {
    let mpidr = reg::mpidr_el1::read();
    let affinity = (mpidr >> 32 & 0xff) << 24 | mpidr & 0xff_ffff;
    let mut frame = 0;
    while u64::from(redistributors.read32(frame + GICR_AFFINITY)) != affinity {
        frame += REDISTRIBUTOR_SIZE;
    }
    frame
}

/// Groups, priority and enable of the SGIs and PPIs whose registers start at `at`.
fn init_private(registers: Registers, at: usize) {
    registers.write32(at + GICD_IGROUPR, !(1 << SGI));
    // Highest priority for SGI 15: byte 3 of the word of SGIs 12 to 15.
    let word = at + GICD_IPRIORITYR + 12;
    registers.write32(word, registers.read32(word) & 0x00ff_ffff);
    registers.write32(at + GICD_ISENABLER, 1 << SGI);
}
