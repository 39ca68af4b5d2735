// SPDX-License-Identifier: MIT OR Apache-2.0
//! The FP and SIMD registers. The monitor itself is built without them.

use core::arch::asm;

/// Stores or loads `V0` to `V31` from `at` on, which ends behind them.
macro_rules! all {
    ($op:literal) => {
        concat!(
            ".arch_extension fp\n",
            ".arch_extension simd\n",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31\n",
            $op,
            " q\\n, [{at}], #16\n",
            ".endr",
        )
    };
}

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
        // SAFETY: writes the 528 bytes of this structure.
        unsafe {
            asm!(all!("str"), "mrs {a}, fpsr", "mrs {b}, fpcr", "stp {a}, {b}, [{at}]",
                 at = inout(reg) &raw mut *self => _, a = out(reg) _, b = out(reg) _,
                 options(nostack, preserves_flags));
        }
    }

    /// Loads the registers. `CPTR_EL3.TFP` must be 0.
    pub fn load(&self) {
        // SAFETY: reads the 528 bytes of this structure; no code of the monitor
        // keeps values in the registers it changes.
        unsafe {
            asm!(all!("ldr"), "ldp {a}, {b}, [{at}]", "msr fpsr, {a}", "msr fpcr, {b}",
                 at = inout(reg) &raw const *self => _, a = out(reg) _, b = out(reg) _,
                 options(nostack, preserves_flags));
        }
    }
}
