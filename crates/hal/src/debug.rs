// SPDX-License-Identifier: MIT OR Apache-2.0
//! Breakpoints and watchpoints (Arm ARM H1, D2).

use core::arch::asm;

use crate::barrier::isb;
use crate::sysreg::{dbgclaimclr_el1, dbgclaimset_el1, id_aa64dfr0_el1};

/// `DBGBVR<n>`, `DBGBCR<n>`, `DBGWVR<n>`, `DBGWCR<n>` of the world that does not
/// have them in the CPU, and its claim tags.
#[derive(Clone, Copy, Debug)]
pub struct DebugState {
    breakpoints: [[u64; 2]; 16],
    watchpoints: [[u64; 2]; 16],
    claim: u64,
}

/// Exchanges a register and a value.
macro_rules! swap {
    ($kind:literal, $n:literal, $value:expr) => {
        let old: u64;
        // SAFETY: debug exceptions are for lower exception levels only: at EL3
        // PSTATE.D masks them and MDSCR does not route here.
        unsafe {
            asm!(concat!("mrs {old}, dbg", $kind, $n, "_el1"),
                 concat!("msr dbg", $kind, $n, "_el1, {new}"),
                 old = out(reg) old, new = in(reg) $value, options(nostack, preserves_flags));
        }
        $value = old;
    };
}

macro_rules! swap_all {
    ($state:ident; $($n:literal)*) => {
        let features = id_aa64dfr0_el1::read();
        // ID_AA64DFR0_EL1.BRPs, .WRPs: how many there are, minus 1.
        let (breakpoints, watchpoints) = ((features >> 12 & 15) + 1, (features >> 20 & 15) + 1);
        $(if $n < breakpoints {
            swap!("bvr", $n, $state.breakpoints[$n][0]);
            swap!("bcr", $n, $state.breakpoints[$n][1]);
        })*
        $(if $n < watchpoints {
            swap!("wvr", $n, $state.watchpoints[$n][0]);
            swap!("wcr", $n, $state.watchpoints[$n][1]);
        })*
    };
}

impl DebugState {
    /// All off.
    pub const RESET: Self = Self { breakpoints: [[0; 2]; 16], watchpoints: [[0; 2]; 16], claim: 0 };

    /// Exchanges these values and the CPU's; effective after a context synchronisation.
    pub fn swap(&mut self) {
        swap_all! { self; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 }
        // Tags that mean nothing to the CPU: one register reads and clears them, the
        // other sets them.
        let old = dbgclaimclr_el1::read();
        dbgclaimclr_el1::write(old);
        isb();
        dbgclaimset_el1::write(self.claim);
        self.claim = old;
    }
}
