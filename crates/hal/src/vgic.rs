// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual CPU interface of GICv3 (IHI 0069, 12.4) and of GICv2 (IHI 0048B,
//! chapter 5): list registers, active priorities, VMCR.

use core::arch::asm;
use core::iter::repeat;

use havmsi_abi::{Exit, MAX_LRS};
use havmsi_core::addr::low32;

use crate::gic::Gic;
use crate::sysreg::{ich_hcr_el2, ich_vmcr_el2, ich_vtr_el2};

/// What a vCPU keeps of the interface between its runs.
#[derive(Clone, Copy, Debug)]
pub struct VgicState {
    vmcr: u64,
    /// Active priorities: four of group 0, four of group 1. GICv2 has but one.
    apr: [u64; 8],
}

impl VgicState {
    /// What a CPU comes up with.
    pub const RESET: Self = Self { vmcr: 0, apr: [0; 8] };
}

macro_rules! numbered {
    ($read:ident, $write:ident; $($n:literal = $asm:literal)*) => {
        fn $read(n: usize) -> u64 {
            let value: u64;
            match n {
                $($n => {
                    // SAFETY: reading this register has no side effect.
                    unsafe {
                        asm!(concat!("mrs {}, ", $asm), out(reg) value, options(nomem, nostack, preserves_flags));
                    }
                })*
                _ => value = 0,
            }
            value
        }

        fn $write(n: usize, value: u64) {
            match n {
                $($n => {
                    // SAFETY: the register acts on the lower levels' virtual interrupts only.
                    unsafe {
                        asm!(concat!("msr ", $asm, ", {}"), in(reg) value, options(nostack, preserves_flags));
                    }
                })*
                _ => {}
            }
        }
    };
}

numbered! { read_lr, write_lr;
    0 = "s3_4_c12_c12_0" 1 = "s3_4_c12_c12_1" 2 = "s3_4_c12_c12_2" 3 = "s3_4_c12_c12_3"
    4 = "s3_4_c12_c12_4" 5 = "s3_4_c12_c12_5" 6 = "s3_4_c12_c12_6" 7 = "s3_4_c12_c12_7"
    8 = "s3_4_c12_c13_0" 9 = "s3_4_c12_c13_1" 10 = "s3_4_c12_c13_2" 11 = "s3_4_c12_c13_3"
    12 = "s3_4_c12_c13_4" 13 = "s3_4_c12_c13_5" 14 = "s3_4_c12_c13_6" 15 = "s3_4_c12_c13_7"
}
numbered! { read_apr, write_apr;
    0 = "s3_4_c12_c8_0" 1 = "s3_4_c12_c8_1" 2 = "s3_4_c12_c8_2" 3 = "s3_4_c12_c8_3"
    4 = "s3_4_c12_c9_0" 5 = "s3_4_c12_c9_1" 6 = "s3_4_c12_c9_2" 7 = "s3_4_c12_c9_3"
}

/// GICv2 (IHI 0048B, 5.3).
const GICH_HCR: usize = 0;
const GICH_VTR: usize = 4;
const GICH_VMCR: usize = 8;
const GICH_APR: usize = 0xf0;
const GICH_LR: usize = 0x100;

/// A list register as GICv2 has it: HW, group, state, five bits of priority;
/// physical INTID or EOI; virtual INTID and sender.
fn to_gich(lr: u64) -> u32 {
    let top = (lr >> 61 & 1) << 31 | (lr >> 60 & 1) << 30 | (lr >> 62) << 28;
    low32(top | (lr >> 51 & 0x1f) << 23 | (lr >> 32 & 0x3ff) << 10 | lr & 0x1fff)
}

/// And back, as far as it changes: state, and which it is.
fn from_gich(lr: u32) -> u64 {
    u64::from(lr >> 28 & 3) << 62 | u64::from(lr & 0x1fff)
}

/// `ICH_VTR_EL2` or `GICH_VTR`.
#[must_use]
pub fn vtr(gic: &Gic) -> u64 {
    gic.gich().map_or_else(ich_vtr_el2::read, |gich| gich.read32(GICH_VTR).into())
}

/// List registers that the CPU has (ListRegs + 1).
#[must_use]
pub fn list_registers(gic: &Gic) -> usize {
    usize::from(vtr(gic).to_le_bytes()[0] & 0x3f) + 1
}

/// The active priority registers that there are: of each group 2^(PREbits - 5)
/// for PREbits of 5 to 7.
fn active_priority_registers() -> impl Iterator<Item = usize> {
    let prebits = (ich_vtr_el2::read() >> 26 & 7) + 1;
    (0..8).filter(move |n| n % 4 < 1 << prebits.saturating_sub(5).min(2))
}

/// `ICH_HCR_EL2`: the registers that both groups share (TC), those of group 0
/// and of group 1 (TALL0, TALL1) trap.
const HCR_TRAP_ALL: u64 = 0b111 << 10;

/// Takes GICv3's interface away from a guest that has none: it would find what
/// the last one left there. GICv2's is mapped into those that have one.
pub fn close(gic: &Gic) {
    if gic.gich().is_none() {
        ich_hcr_el2::write(HCR_TRAP_ALL);
    }
}

/// Loads the interface for a run: checked list registers, the first `used` of
/// `lr`; the others are emptied.
pub fn load(gic: &Gic, state: &VgicState, hcr: u64, lr: &[u64; MAX_LRS], used: usize) {
    let all = lr.iter().copied().take(used).chain(repeat(0));
    let lrs = all.take(list_registers(gic)).enumerate();
    if let Some(gich) = gic.gich() {
        gich.write32(GICH_VMCR, low32(state.vmcr));
        gich.write32(GICH_APR, low32(state.apr[0]));
        lrs.for_each(|(n, lr)| gich.write32(GICH_LR + 4 * n, to_gich(lr)));
        gich.write32(GICH_HCR, low32(hcr));
        return;
    }
    ich_vmcr_el2::write(state.vmcr);
    active_priority_registers().for_each(|n| write_apr(n, state.apr[n]));
    lrs.for_each(|(n, lr)| write_lr(n, lr));
    ich_hcr_el2::write(hcr);
}

/// Turns the interface off after a run and takes it out, into `exit` what the
/// host gets.
pub fn save(gic: &Gic, state: &mut VgicState, exit: &mut Exit, used: usize) {
    let lrs = exit.lr.iter_mut().enumerate().take(used);
    if let Some(gich) = gic.gich() {
        gich.write32(GICH_HCR, 0);
        state.vmcr = gich.read32(GICH_VMCR).into();
        state.apr[0] = gich.read32(GICH_APR).into();
        lrs.for_each(|(n, lr)| *lr = from_gich(gich.read32(GICH_LR + 4 * n)));
    } else {
        ich_hcr_el2::write(0);
        state.vmcr = ich_vmcr_el2::read();
        active_priority_registers().for_each(|n| state.apr[n] = read_apr(n));
        lrs.for_each(|(n, lr)| *lr = read_lr(n));
    }
    exit.vmcr = state.vmcr;
}
