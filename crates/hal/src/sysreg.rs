// SPDX-License-Identifier: MIT OR Apache-2.0
//! System registers by their name in the Arm ARM (section D24).
//!
//! Reads are safe: no register listed here has a read with a side effect on
//! the monitor's memory. Writes are safe for registers that act on lower
//! exception levels only; those that govern EL3 itself are `unsafe`.

use core::arch::asm;

/// How the assembler knows a register: by its name, or by its encoding where it
/// is of an extension.
macro_rules! encoding {
    ($name:ident) => {
        stringify!($name)
    };
    ($name:ident $asm:literal) => {
        $asm
    };
}

/// No write.
macro_rules! read_only {
    ($($register:tt)*) => {};
}

macro_rules! lower_level {
    ($($register:tt)*) => {
        /// Changes it; a context synchronisation event makes it effective.
        #[inline(always)]
        pub fn write(value: u64) {
            // SAFETY: the register governs lower exception levels only; what EL3
            // itself reads and writes may come before or after.
            unsafe {
                asm!(concat!("msr ", encoding!($($register)*), ", {}"), in(reg) value,
                     options(nomem, nostack, preserves_flags));
            }
        }
    };
}

macro_rules! el3 {
    ($($register:tt)*) => {
        /// Changes it.
        ///
        /// # Safety
        /// The value must keep EL3's own code, stack and data accessible, and the
        /// normal world out of them.
        #[inline(always)]
        pub unsafe fn write(value: u64) {
            // SAFETY: passed on to the caller.
            unsafe {
                asm!(concat!("msr ", encoding!($($register)*), ", {}"), in(reg) value,
                     options(nostack, preserves_flags));
            }
        }
    };
}

macro_rules! registers {
    ($write:ident: $($name:ident $(= $asm:literal)?),* $(,)?) => { $(
        #[doc = concat!("The register `", stringify!($name), "`.")]
        pub mod $name {
            use super::asm;

            /// Its value.
            #[inline(always)]
            pub fn read() -> u64 {
                let value: u64;
                // SAFETY: reading this register has no side effect on memory.
                unsafe {
                    asm!(concat!("mrs {}, ", encoding!($name $($asm)?)), out(reg) value,
                         options(nomem, nostack, preserves_flags));
                }
                value
            }

            $write!($name $($asm)?);
        }
    )* };
}

registers! { read_only:
    cntpct_el0, elr_el3, esr_el3, far_el3, id_aa64dfr0_el1, id_aa64mmfr0_el1, id_aa64pfr0_el1,
    midr_el1, mpidr_el1, oslsr_el1, tpidr_el3,
    ich_vtr_el2 = "s3_4_c12_c11_1",
}

registers! { lower_level:
    actlr_el1, afsr0_el1, afsr1_el1, amair_el1, cntfrq_el0, cnthctl_el2, cnthp_ctl_el2,
    cntkctl_el1, cntp_ctl_el0, cntv_ctl_el0, cntvoff_el2, contextidr_el1, cpacr_el1, cptr_el2,
    csselr_el1, elr_el1, elr_el2, esr_el1, esr_el2, far_el1, far_el2, hcr_el2, hpfar_el2,
    hstr_el2, mair_el1, mdcr_el2, mdscr_el1, osdlr_el1, oslar_el1, par_el1, sctlr_el1, sctlr_el2,
    sp_el0, sp_el1, spsr_el1, spsr_el2, tcr_el1, tpidr_el0, tpidr_el1, tpidrro_el0, ttbr0_el1,
    ttbr1_el1, vbar_el1, vbar_el2, vmpidr_el2, vpidr_el2, vtcr_el2, vttbr_el2, cptr_el3, mdcr_el3,
    vdisr_el2 = "s3_4_c12_c1_1",
    icc_eoir0_el1 = "s3_0_c12_c8_1",
    icc_igrpen0_el1 = "s3_0_c12_c12_6",
    icc_pmr_el1 = "s3_0_c4_c6_0",
    icc_sgi0r_el1 = "s3_0_c12_c11_7",
    icc_sre_el1 = "s3_0_c12_c12_5",
    icc_sre_el2 = "s3_4_c12_c9_5",
    icc_sre_el3 = "s3_6_c12_c12_5",
    icc_igrpen1_el3 = "s3_6_c12_c12_7",
    ich_hcr_el2 = "s3_4_c12_c11_0",
    ich_vmcr_el2 = "s3_4_c12_c11_7",
}

registers! { el3:
    scr_el3,
    l2ctlr_el1 = "s3_1_c11_c0_2",
}

/// Acknowledges the highest-priority group 0 interrupt (`ICC_IAR0_EL1`);
/// returns its number, 1020 or more for none.
pub fn icc_acknowledge_group0() -> u64 {
    let id: u64;
    // SAFETY: acts on the interrupt controller only.
    unsafe {
        asm!("mrs {0}, s3_0_c12_c8_0", "dsb sy", out(reg) id, options(nostack, preserves_flags));
    }
    id
}

/// Translates `va` by stage 1 of EL1 as a read (`AT S1E1R`); returns `PAR_EL1`
/// and leaves that register as it was.
pub fn translate_el1(va: u64) -> u64 {
    let result: u64;
    // SAFETY: AT reads translation tables of EL1 and changes PAR_EL1 only,
    // which is put back: it is the caller's world's register.
    unsafe {
        asm!("mrs {saved}, par_el1", "at s1e1r, {va}", "isb", "mrs {result}, par_el1",
             "msr par_el1, {saved}",
             saved = out(reg) _, va = in(reg) va, result = out(reg) result,
             options(nostack, preserves_flags));
    }
    result
}
