// SPDX-License-Identifier: MIT OR Apache-2.0
//! System registers by their name in the Arm ARM (section D24).
//!
//! Reads are safe: no register listed here has a read with a side effect on
//! the monitor's memory. Writes are safe for registers that act on lower
//! exception levels only; that of the one that governs EL3 itself is `unsafe`.

use core::arch::asm;

/// The bits of a register, each by its name and number.
#[macro_export]
macro_rules! bits {
    ($($name:ident $number:literal),*) => { $(1 << $number)|* };
}

/// No write.
macro_rules! read_only {
    ($name:ident) => {};
}

macro_rules! lower_level {
    ($name:ident) => {
        /// Changes it; a context synchronisation event makes it effective.
        #[inline(always)]
        pub fn write(value: u64) {
            // SAFETY: the register governs lower exception levels only; what EL3
            // itself reads and writes may come before or after.
            unsafe {
                asm!(concat!("msr ", stringify!($name), ", {}"), in(reg) value,
                     options(nomem, nostack, preserves_flags));
            }
        }
    };
}

macro_rules! registers {
    ($write:ident: $($name:ident),* $(,)?) => { $(
        #[doc = concat!("The register `", stringify!($name), "`.")]
        pub mod $name {
            use super::asm;

            /// Its value.
            #[inline(always)]
            pub fn read() -> u64 {
                let value: u64;
                // SAFETY: reading this register has no side effect on memory.
                unsafe {
                    asm!(concat!("mrs {}, ", stringify!($name)), out(reg) value,
                         options(nomem, nostack, preserves_flags));
                }
                value
            }

            $write!($name);
        }
    )* };
}

registers! { read_only:
    cntpct_el0, ctr_el0, dczid_el0, elr_el3, esr_el3, far_el3, icc_iar0_el1, ich_vtr_el2,
    id_aa64dfr0_el1, id_aa64mmfr0_el1, id_aa64pfr0_el1, midr_el1, mpidr_el1, scr_el3, tpidr_el3,
}

registers! { lower_level:
    afsr0_el1, afsr1_el1, amair_el1, cntfrq_el0, cnthctl_el2, cnthp_ctl_el2,
    cntkctl_el1, cntp_ctl_el0, cntv_ctl_el0, cntvoff_el2, contextidr_el1, cpacr_el1, cptr_el2,
    cptr_el3, csselr_el1, dbgclaimclr_el1, dbgclaimset_el1, elr_el1, elr_el2, esr_el1, esr_el2,
    far_el1, far_el2, hcr_el2, hpfar_el2, hstr_el2, icc_eoir0_el1, icc_igrpen0_el1,
    icc_igrpen1_el3, icc_pmr_el1, icc_sgi0r_el1, icc_sre_el1, icc_sre_el2, icc_sre_el3,
    ich_hcr_el2, ich_vmcr_el2, mair_el1, mdcr_el2, mdcr_el3, mdscr_el1, osdlr_el1, oslar_el1,
    par_el1, s3_4_c12_c1_1, sctlr_el1, sctlr_el2, sp_el0, sp_el1, spsr_el1, spsr_el2, tcr_el1,
    tpidr_el0, tpidr_el1, tpidrro_el0, ttbr0_el1, ttbr1_el1, vbar_el1, vbar_el2, vmpidr_el2,
    vpidr_el2, vtcr_el2, vttbr_el2,
}

/// Of an extension (RAS): the assembler knows its encoding only.
pub use s3_4_c12_c1_1 as vdisr_el2;

/// Changes `SCR_EL3`.
///
/// # Safety
/// The value must keep EL3 secure, and give lower levels the normal world only.
#[inline(always)]
pub unsafe fn write_scr_el3(value: u64) {
    // SAFETY: passed on to the caller.
    unsafe { asm!("msr scr_el3, {}", in(reg) value, options(nostack, preserves_flags)) }
}
