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
    ($($n:literal)*) => {
        impl DebugState {
            /// Saves what the CPU has.
            pub fn save(&mut self) {
                let [bvr, bcr, wvr, wcr] = &mut self.registers;
                let [breakpoints, _, watchpoints, _] = counts();
                $(if $n < breakpoints {
                    read!(bvr[$n], "dbgbvr", $n);
                    read!(bcr[$n], "dbgbcr", $n);
                })*
                $(if $n < watchpoints {
                    read!(wvr[$n], "dbgwvr", $n);
                    read!(wcr[$n], "dbgwcr", $n);
                })*
            }

            /// Loads what the CPU has; effective after a context synchronisation.
            pub fn load(&self) {
                let [bvr, bcr, wvr, wcr] = &self.registers;
                let [breakpoints, _, watchpoints, _] = counts();
                $(if $n < breakpoints {
                    write!(bvr[$n], "dbgbvr", $n);
                    write!(bcr[$n], "dbgbcr", $n);
                })*
                $(if $n < watchpoints {
                    write!(wvr[$n], "dbgwvr", $n);
                    write!(wcr[$n], "dbgwcr", $n);
                })*
            }
        }
    };
}

macro_rules! read {
    ($value:expr, $kind:literal, $n:literal) => {
        // SAFETY: reading this register has no side effect.
        unsafe {
            asm!(concat!("mrs {}, ", $kind, $n, "_el1"), out(reg) $value,
                 options(nomem, nostack, preserves_flags));
        }
    };
}

macro_rules! write {
    ($value:expr, $kind:literal, $n:literal) => {
        // SAFETY: debug exceptions are for lower exception levels only: at EL3
        // PSTATE.D masks them and MDSCR does not route here.
        unsafe {
            asm!(concat!("msr ", $kind, $n, "_el1, {}"), in(reg) $value,
                 options(nostack, preserves_flags));
        }
    };
}

registers! { 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 }

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
