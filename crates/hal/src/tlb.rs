// SPDX-License-Identifier: MIT OR Apache-2.0
//! TLB invalidation of the normal world's translations, from EL3 with
//! `SCR_EL3.NS` = 1 (Arm ARM D8.17).

use core::arch::asm;

use crate::barrier;
use crate::sysreg::{hcr_el2, par_el1, sctlr_el1, tcr_el1, vttbr_el2};
use crate::world::{SCTLR_M, TCR_EPD};

/// Runs `f` with the stage-2 `vttbr` selected, for the TLBI that act on "the
/// current VMID".
///
/// Erratum 1319537 (Cortex-A57; A72: 1319367): a speculative AT may walk with
/// stage 1 of one world and stage 2 of another and leave the result in the
/// TLB. So no stage-1 walk may start while they don't match: both halves are
/// disabled (EPD0, EPD1; which counts with the MMU on only), as KVM's
/// `enter_vmid_context` does.
fn with_vttbr(vttbr: u64, f: impl FnOnce()) {
    let old = vttbr_el2::read();
    if old == vttbr {
        f();
        return;
    }
    let (tcr, sctlr) = (tcr_el1::read(), sctlr_el1::read());
    tcr_el1::write(tcr | TCR_EPD);
    barrier::isb();
    sctlr_el1::write(sctlr | SCTLR_M);
    barrier::isb();
    vttbr_el2::write(vttbr);
    barrier::isb();
    f();
    vttbr_el2::write(old);
    barrier::isb();
    sctlr_el1::write(sctlr);
    barrier::isb();
    tcr_el1::write(tcr);
    barrier::isb();
}

/// Removes all translations under `vttbr` (stage 1, 2, combined) from the TLBs
/// of all CPUs, after entries were changed in memory.
///
/// Also for a single page: TLBI IPAS2E1IS alone would leave combined entries,
/// which are not found by IPA, so that a VMALLE1IS must follow (Arm ARM D8.17.5);
/// the two and their barriers cost more than this one, which spares nothing but
/// what TLBs hold of stage 2 alone.
pub fn invalidate_vmid(vttbr: u64) {
    barrier::dsb_ishst();
    with_vttbr(vttbr, || {
        // SAFETY: removing TLB entries of lower levels changes no memory.
        unsafe { asm!("tlbi vmalls12e1is", "dsb ish", "isb", options(nostack, preserves_flags)) }
    });
}

/// Removes the current VMID's stage-1 and combined translations, and all
/// instruction cache entries, from this CPU: two vCPUs of a VM share a VMID
/// but not necessarily their tables and ASIDs.
pub fn flush_local_vcpu() {
    // SAFETY: removing TLB and instruction cache entries changes no memory.
    unsafe {
        asm!("tlbi vmalle1", "ic iallu", "dsb nsh", "isb", options(nostack, preserves_flags));
    }
}

/// Removes all translations of EL1 and EL0 from this CPU (ALLE1).
pub fn invalidate_local_all() {
    // SAFETY: removing TLB entries of lower levels changes no memory.
    unsafe { asm!("tlbi alle1", "dsb nsh", "isb", options(nostack, preserves_flags)) }
}

/// What stage 1 of EL1 makes of a read of `va` (AT S1E1R): the physical page
/// for the world in `VTTBR_EL2` as an IPA in bytes, or `None` if stage 1
/// doesn't translate it.
pub fn stage1_page(va: u64) -> Option<u64> {
    debug_assert!(hcr_el2::read() & 1 == 1);
    // `PAR_EL1` is the caller's world's: it is put back.
    let saved = par_el1::read();
    // SAFETY: AT reads translation tables of EL1 and changes PAR_EL1 only.
    unsafe { asm!("at s1e1r, {}", "isb", in(reg) va, options(nostack, preserves_flags)) }
    let par = par_el1::read();
    par_el1::write(saved);
    // PAR_EL1: bit 0 F, [51:12] the address.
    (par & 1 == 0).then_some(par & 0x000f_ffff_ffff_f000)
}
