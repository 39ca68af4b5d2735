// SPDX-License-Identifier: MIT OR Apache-2.0
//! The registers of EL1 and EL0 that two worlds share, and the switch between
//! them together with their stage-2.

use crate::barrier::isb;
use crate::sysreg::{self, hcr_el2, osdlr_el1, oslar_el1, sctlr_el1, tcr_el1, vttbr_el2};

/// `TCR_EL1.EPD0`, `.EPD1`: no walks.
pub(crate) const TCR_EPD: u64 = 1 << 7 | 1 << 23;
/// `SCTLR_EL1.M`: the MMU is on.
pub(crate) const SCTLR_M: u64 = 1;
/// SCTLR_EL1 at reset of a world: the RES1 bits, MMU and caches off.
const SCTLR_EL1_RESET: u64 = 0x30d0_0800;

macro_rules! registers {
    ($($name:ident),* $(,)?) => {
        /// The registers that a world keeps at EL1 and EL0, but for the general
        /// ones. Those of features that nobody is offered (pointer
        /// authentication, SVE, MPAM, ...) trap to EL3 and need no switching, and
        /// so do ACTLR_EL1 and the OS lock's.
        #[derive(Clone, Copy, Debug)]
        pub struct El1State {
            sctlr_el1: u64,
            tcr_el1: u64,
            $(#[doc = concat!("Its value of `", stringify!($name), "`.")] pub $name: u64,)*
        }

        impl El1State {
            /// Nothing yet: what a static starts as, so that it needs no place
            /// in the image.
            pub const ZERO: Self = Self { sctlr_el1: 0, tcr_el1: 0, $($name: 0,)* };

            /// What a CPU comes up with.
            pub const RESET: Self = Self { sctlr_el1: SCTLR_EL1_RESET, ..Self::ZERO };

            /// Reads all of them.
            pub fn save(&mut self) {
                *self = Self {
                    sctlr_el1: sctlr_el1::read(),
                    tcr_el1: tcr_el1::read(),
                    $($name: sysreg::$name::read(),)*
                };
            }

            fn load_all_but_translation(&self) {
                $(sysreg::$name::write(self.$name);)*
            }
        }
    };
}

registers! {
    afsr0_el1, afsr1_el1, amair_el1, cntkctl_el1, contextidr_el1, cpacr_el1, csselr_el1,
    elr_el1, esr_el1, far_el1, mair_el1, mdscr_el1, par_el1, sp_el0, sp_el1, spsr_el1,
    tpidr_el0, tpidr_el1, tpidrro_el0, ttbr0_el1, ttbr1_el1, vbar_el1,
}

/// The OS lock and its double are open, for all worlds and for good: a closed
/// one (so it comes out of reset) keeps breakpoints from acting.
pub fn open_os_lock() {
    osdlr_el1::write(0);
    oslar_el1::write(0);
}

/// Makes `el1` the current world, with these `VTTBR_EL2` and `HCR_EL2`. The old one
/// must have been saved.
///
/// Errata 1319537 (Cortex-A57), 1319367 (A72), 1165522 (A76): a speculative AT
/// may walk with stage 1 of one world and stage 2 of the other. So stage-1
/// walks are disabled (EPD0, EPD1, which count with the MMU on only) while the
/// two don't match.
pub fn switch_to(el1: &El1State, vttbr: u64, hcr: u64) {
    tcr_el1::write(TCR_EPD);
    isb();
    sctlr_el1::write(el1.sctlr_el1 | SCTLR_M);
    isb();
    el1.load_all_but_translation();
    vttbr_el2::write(vttbr);
    hcr_el2::write(hcr);
    isb();
    sctlr_el1::write(el1.sctlr_el1);
    isb();
    tcr_el1::write(el1.tcr_el1);
    isb();
}
