// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual CPU interface of GICv3 (IHI 0069, 12.4): list registers, active
//! priorities, VMCR.

use core::arch::asm;

use havmsi_abi::{MAX_LRS, VgicExit};

use crate::sysreg::{
    ich_eisr_el2, ich_elrsr_el2, ich_hcr_el2, ich_misr_el2, ich_vmcr_el2, ich_vtr_el2,
};

/// What a vCPU keeps of the interface between its runs.
#[derive(Clone, Copy, Debug)]
pub struct VgicState {
    vmcr: u64,
    ap0r: [u64; 4],
    ap1r: [u64; 4],
}

impl VgicState {
    /// What a CPU comes up with.
    pub const RESET: Self = Self { vmcr: 0, ap0r: [0; 4], ap1r: [0; 4] };
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
numbered! { read_ap0r, write_ap0r;
    0 = "s3_4_c12_c8_0" 1 = "s3_4_c12_c8_1" 2 = "s3_4_c12_c8_2" 3 = "s3_4_c12_c8_3"
}
numbered! { read_ap1r, write_ap1r;
    0 = "s3_4_c12_c9_0" 1 = "s3_4_c12_c9_1" 2 = "s3_4_c12_c9_2" 3 = "s3_4_c12_c9_3"
}

/// List registers that the CPU has (`ICH_VTR_EL2.ListRegs` + 1).
#[must_use]
pub fn list_registers() -> usize {
    usize::from(ich_vtr_el2::read().to_le_bytes()[0] & 0x1f) + 1
}

/// Active priority registers of each group: 2^(PREbits - 4) for PREbits of 5 to 7.
fn active_priority_registers() -> usize {
    let prebits = (ich_vtr_el2::read() >> 26 & 7) + 1;
    1 << prebits.saturating_sub(5).min(2)
}

/// `ICH_HCR_EL2`: the registers that both groups share (TC), those of group 0
/// and of group 1 (TALL0, TALL1) trap.
const HCR_TRAP_ALL: u64 = 0b111 << 10;

/// Takes the interface away from a guest that has none: it would find what the
/// last one left there.
pub fn close() {
    ich_hcr_el2::write(HCR_TRAP_ALL);
}

/// Undoes [`close`]: the traps concern the host too.
pub fn open() {
    ich_hcr_el2::write(0);
}

/// Loads the interface for a run: checked list registers, the first `used` of
/// `lr`; the others are emptied.
pub fn load(state: &VgicState, hcr: u64, lr: &[u64; MAX_LRS], used: usize) {
    ich_vmcr_el2::write(state.vmcr);
    for n in 0..active_priority_registers() {
        write_ap0r(n, state.ap0r[n]);
        write_ap1r(n, state.ap1r[n]);
    }
    for (n, value) in lr.iter().enumerate().take(list_registers()) {
        write_lr(n, if n < used { *value } else { 0 });
    }
    ich_hcr_el2::write(hcr);
}

/// Takes the interface out after a run and turns it off.
pub fn save(state: &mut VgicState, used: usize) -> VgicExit {
    let mut exit = VgicExit {
        hcr: ich_hcr_el2::read(),
        vmcr: ich_vmcr_el2::read(),
        misr: ich_misr_el2::read(),
        eisr: ich_eisr_el2::read(),
        elrsr: ich_elrsr_el2::read(),
        lr: [0; MAX_LRS],
    };
    ich_hcr_el2::write(0);
    state.vmcr = exit.vmcr;
    for n in 0..active_priority_registers() {
        state.ap0r[n] = read_ap0r(n);
        state.ap1r[n] = read_ap1r(n);
    }
    for (n, value) in exit.lr.iter_mut().enumerate().take(used) {
        *value = read_lr(n);
    }
    exit
}
