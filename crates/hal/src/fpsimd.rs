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
    ".irp n, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30",
    "fp_pair \\op, \\n",
    ".endr",
    ".endm",
    ".macro fp_pair op, n",
    ".set fp_next, \\n + 1",
    ".altmacro",
    "fp_emit \\op, \\n, %fp_next",
    ".noaltmacro",
    ".endm",
    ".macro fp_emit op, n, m",
    "\\op q\\n, q\\m, [x0, #16 * \\n]",
    ".endm",
    ".global havmsi_fp_save",
    "havmsi_fp_save:",
    "fp_all stp",
    "mrs x1, fpsr",
    "mrs x2, fpcr",
    "add x0, x0, #512",
    "stp x1, x2, [x0]",
    "ret",
    ".global havmsi_fp_load",
    "havmsi_fp_load:",
    "fp_all ldp",
    "add x0, x0, #512",
    "ldp x1, x2, [x0]",
    "msr fpsr, x1",
    "msr fpcr, x2",
    "ret",
    ".purgem fp_all",
    ".purgem fp_pair",
    ".purgem fp_emit",
);
