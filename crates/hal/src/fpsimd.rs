// SPDX-License-Identifier: MIT OR Apache-2.0
//! The FP and SIMD registers. The monitor itself is built without them.

use core::arch::global_asm;

/// `V0` to `V31`, `FPSR`, `FPCR`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct FpState {
    v: [[u64; 2]; 32],
    fpsr: u64,
    fpcr: u64,
}

impl FpState {
    /// What a CPU comes up with, as far as software may rely on it.
    pub const RESET: Self = Self { v: [[0; 2]; 32], fpsr: 0, fpcr: 0 };

    /// Saves the registers. `CPTR_EL3.TFP` must be 0.
    pub fn save(&mut self) {
        // SAFETY: the routine writes the 528 bytes of this structure.
        unsafe { havmsi_fp_save(self) }
    }

    /// Loads the registers. `CPTR_EL3.TFP` must be 0.
    pub fn load(&self) {
        // SAFETY: the routine reads the 528 bytes of this structure; no code
        // of the monitor keeps values in the registers it changes.
        unsafe { havmsi_fp_load(self) }
    }
}

unsafe extern "C" {
    fn havmsi_fp_save(state: *mut FpState);
    fn havmsi_fp_load(state: *const FpState);
}

global_asm!(
    ".arch_extension fp",
    ".arch_extension simd",
    ".macro fp_all op",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
    "\\op q\\n, [x0], #16",
    ".endr",
    ".endm",
    ".global havmsi_fp_save",
    "havmsi_fp_save:",
    "fp_all str",
    "mrs x1, fpsr",
    "mrs x2, fpcr",
    "stp x1, x2, [x0]",
    "ret",
    ".global havmsi_fp_load",
    "havmsi_fp_load:",
    "fp_all ldr",
    "ldp x1, x2, [x0]",
    "msr fpsr, x1",
    "msr fpcr, x2",
    "ret",
    ".purgem fp_all",
);
