// SPDX-License-Identifier: MIT OR Apache-2.0
//! Breakpoints and watchpoints (Arm ARM H1, D2).

use core::arch::asm;

use crate::sysreg::id_aa64dfr0_el1;

/// Kinds of registers, in the order of their `op2` from 4 on.
const KINDS: usize = 4;

/// `DBGBVR<n>`, `DBGBCR<n>`, `DBGWVR<n>`, `DBGWCR<n>`, in this order.
#[derive(Clone, Copy, Debug)]
pub struct DebugState {
    registers: [[u64; 16]; KINDS],
}

macro_rules! registers {
    ($(($kind:literal, $n:literal) = $asm:literal)*) => {
        impl DebugState {
            /// Saves what the CPU has.
            pub fn save(&mut self) {
                let counts = counts();
                $(if $n < counts[$kind] {
                    // SAFETY: reading this register has no side effect.
                    unsafe {
                        asm!(concat!("mrs {}, ", $asm), out(reg) self.registers[$kind][$n],
                             options(nomem, nostack, preserves_flags));
                    }
                })*
            }

            /// Loads what the CPU has; effective after a context synchronisation.
            pub fn load(&self) {
                let counts = counts();
                $(if $n < counts[$kind] {
                    // SAFETY: debug exceptions are for lower exception levels
                    // only: at EL3 PSTATE.D masks them and MDSCR does not route here.
                    unsafe {
                        asm!(concat!("msr ", $asm, ", {}"), in(reg) self.registers[$kind][$n],
                             options(nostack, preserves_flags));
                    }
                })*
            }
        }
    };
}

registers! {
    (0, 0) = "dbgbvr0_el1" (0, 1) = "dbgbvr1_el1"
    (0, 2) = "dbgbvr2_el1" (0, 3) = "dbgbvr3_el1"
    (0, 4) = "dbgbvr4_el1" (0, 5) = "dbgbvr5_el1"
    (0, 6) = "dbgbvr6_el1" (0, 7) = "dbgbvr7_el1"
    (0, 8) = "dbgbvr8_el1" (0, 9) = "dbgbvr9_el1"
    (0, 10) = "dbgbvr10_el1" (0, 11) = "dbgbvr11_el1"
    (0, 12) = "dbgbvr12_el1" (0, 13) = "dbgbvr13_el1"
    (0, 14) = "dbgbvr14_el1" (0, 15) = "dbgbvr15_el1"
    (1, 0) = "dbgbcr0_el1" (1, 1) = "dbgbcr1_el1"
    (1, 2) = "dbgbcr2_el1" (1, 3) = "dbgbcr3_el1"
    (1, 4) = "dbgbcr4_el1" (1, 5) = "dbgbcr5_el1"
    (1, 6) = "dbgbcr6_el1" (1, 7) = "dbgbcr7_el1"
    (1, 8) = "dbgbcr8_el1" (1, 9) = "dbgbcr9_el1"
    (1, 10) = "dbgbcr10_el1" (1, 11) = "dbgbcr11_el1"
    (1, 12) = "dbgbcr12_el1" (1, 13) = "dbgbcr13_el1"
    (1, 14) = "dbgbcr14_el1" (1, 15) = "dbgbcr15_el1"
    (2, 0) = "dbgwvr0_el1" (2, 1) = "dbgwvr1_el1"
    (2, 2) = "dbgwvr2_el1" (2, 3) = "dbgwvr3_el1"
    (2, 4) = "dbgwvr4_el1" (2, 5) = "dbgwvr5_el1"
    (2, 6) = "dbgwvr6_el1" (2, 7) = "dbgwvr7_el1"
    (2, 8) = "dbgwvr8_el1" (2, 9) = "dbgwvr9_el1"
    (2, 10) = "dbgwvr10_el1" (2, 11) = "dbgwvr11_el1"
    (2, 12) = "dbgwvr12_el1" (2, 13) = "dbgwvr13_el1"
    (2, 14) = "dbgwvr14_el1" (2, 15) = "dbgwvr15_el1"
    (3, 0) = "dbgwcr0_el1" (3, 1) = "dbgwcr1_el1"
    (3, 2) = "dbgwcr2_el1" (3, 3) = "dbgwcr3_el1"
    (3, 4) = "dbgwcr4_el1" (3, 5) = "dbgwcr5_el1"
    (3, 6) = "dbgwcr6_el1" (3, 7) = "dbgwcr7_el1"
    (3, 8) = "dbgwcr8_el1" (3, 9) = "dbgwcr9_el1"
    (3, 10) = "dbgwcr10_el1" (3, 11) = "dbgwcr11_el1"
    (3, 12) = "dbgwcr12_el1" (3, 13) = "dbgwcr13_el1"
    (3, 14) = "dbgwcr14_el1" (3, 15) = "dbgwcr15_el1"
}

/// How many of each kind the CPU has: `ID_AA64DFR0_EL1.BRPs`, `.WRPs`, plus 1.
fn counts() -> [usize; KINDS] {
    let features = id_aa64dfr0_el1::read();
    let field = |shift: u32| usize::from((features >> shift).to_le_bytes()[0] & 15) + 1;
    let (breakpoints, watchpoints) = (field(12), field(20));
    [breakpoints, breakpoints, watchpoints, watchpoints]
}

impl DebugState {
    /// All off.
    pub const RESET: Self = Self { registers: [[0; 16]; KINDS] };

    /// The register `op0 = 2, op1 = 0, CRn = 0, CRm = n, op2`, if it is one of
    /// these and the CPU has it.
    #[must_use]
    pub fn register(&mut self, n: usize, op2: usize) -> Option<&mut u64> {
        let kind = op2.checked_sub(4)?;
        if n >= *counts().get(kind)? {
            return None;
        }
        self.registers.get_mut(kind)?.get_mut(n)
    }
}
