// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interrupt controller, GICv2 (IHI 0048) or GICv3 (IHI 0069): SGI 0 and the virtual timer.

use core::arch::asm;

use havmsi_operations::{CPU_INTERFACE, DISTRIBUTOR, REDISTRIBUTOR, REDISTRIBUTOR_SIZE};

use super::regs::{load_32, store_32};

/// The number in what was acknowledged: a GICv2 tells the sender too.
pub const ID: u64 = 0x3ff;
/// The virtual timer's interrupt.
pub const TIMER: u64 = 27;
const SGI: u32 = 0;
const BOTH: u32 = 1 << SGI | 1 << TIMER;
const CTLR: u64 = 0;
const SGIR: u64 = 0xf00;
const IGROUPR: u64 = 0x80;
const ISENABLER: u64 = 0x100;
const ALL_PRIORITIES: u32 = 0xf0;

/// A GIC of this version.
#[derive(Clone, Copy)]
pub struct Gic {
    /// 2 or 3.
    pub version: u64,
}

impl Gic {
    /// The distributor, once.
    pub fn set_up(self) {
        // GICv3: affinity routing and group 1.
        store_32(DISTRIBUTOR + CTLR, if self.version == 3 { 1 << 4 | 1 << 1 } else { 1 });
    }

    /// A vCPU's own part.
    pub fn open(self, vcpu: u64) {
        if self.version == 2 {
            store_32(DISTRIBUTOR + ISENABLER, BOTH);
            store_32(CPU_INTERFACE + 4, ALL_PRIORITIES);
            store_32(CPU_INTERFACE + CTLR, 1);
            return;
        }
        const WAKER: u64 = 0x14;
        const PROCESSOR_SLEEP: u32 = 1 << 1;
        const CHILDREN_ASLEEP: u32 = 1 << 2;
        let frame = REDISTRIBUTOR + vcpu * REDISTRIBUTOR_SIZE;
        store_32(frame + WAKER, load_32(frame + WAKER) & !PROCESSOR_SLEEP);
        while load_32(frame + WAKER) & CHILDREN_ASLEEP != 0 {}
        let frame = frame + REDISTRIBUTOR_SIZE / 2;
        store_32(frame + IGROUPR, u32::MAX);
        store_32(frame + ISENABLER, BOTH);
        // SAFETY: ICC_SRE_EL1, ICC_PMR_EL1, ICC_IGRPEN1_EL1: opens the CPU interface.
        unsafe {
            asm!(
                "msr S3_0_C12_C12_5, {}", "isb", "msr S3_0_C4_C6_0, {}", "msr S3_0_C12_C12_7, {}", "isb",
                in(reg) 7_u64, in(reg) u64::from(ALL_PRIORITIES), in(reg) 1_u64, options(nostack),
            );
        }
    }

    /// The SGI to a vCPU.
    #[inline(always)]
    pub fn send(self, vcpu: u32) {
        // SAFETY: what was stored before is seen by who gets the SGI.
        unsafe { asm!("dsb ish", options(nostack)) };
        if self.version == 2 {
            store_32(DISTRIBUTOR + SGIR, 1 << (16 + vcpu) | SGI);
        } else {
            // SAFETY: ICC_SGI1R_EL1: the SGI to a CPU of affinity 0.0.0.
            unsafe {
                asm!("msr S3_0_C12_C11_5, {}", "isb", in(reg) 1_u64 << vcpu, options(nostack))
            };
        }
    }

    /// Takes the interrupt that is pending.
    #[inline(always)]
    pub fn acknowledge(self) -> u64 {
        if self.version == 2 {
            return u64::from(load_32(CPU_INTERFACE + 0xc));
        }
        let id;
        // SAFETY: ICC_IAR1_EL1.
        unsafe { asm!("mrs {}, S3_0_C12_C12_0", "dsb sy", out(reg) id, options(nostack)) };
        id
    }

    /// Ends it.
    #[inline(always)]
    pub fn end(self, id: u64) {
        if self.version == 2 {
            store_32(CPU_INTERFACE + 0x10, u32::try_from(id).unwrap_or(0));
        } else {
            // SAFETY: ICC_EOIR1_EL1.
            unsafe { asm!("msr S3_0_C12_C12_1, {}", "isb", in(reg) id, options(nostack)) };
        }
    }
}
