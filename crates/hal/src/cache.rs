// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cache maintenance (Arm ARM D7.5, B2.4).

use core::arch::asm;

use crate::barrier;

/// Smallest data cache line of the CPU in bytes (`CTR_EL0.DminLine`).
fn line_size() -> usize {
    let ctr: usize;
    // SAFETY: reading CTR_EL0 has no side effect.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) }
    4 << ((ctr >> 16) & 15)
}

/// Cleans and invalidates to the point of coherency what all caches hold of
/// `size` bytes at the virtual address `at`: a reader or writer with caches
/// off, or one with other attributes, sees memory as it is.
pub fn clean_invalidate(at: usize, size: usize) {
    let line = line_size();
    // Two a turn, of which the last may be one too many.
    for even in (at & !(line - 1)..at + size).step_by(2 * line) {
        for address in [even, even.wrapping_add(line)] {
            // SAFETY: cleaning writes back what was stored; it changes no value.
            unsafe { asm!("dc civac, {}", in(reg) address, options(nostack, preserves_flags)) }
        }
    }
    barrier::dsb_sy();
}

/// Fills a page with zeros, two blocks of `DCZID_EL0.BS` at a time (half a page each
/// at most).
///
/// # Safety
/// The page at the virtual address `at` must be normal memory (DC ZVA faults on a
/// device's) that no Rust object lies in.
pub unsafe fn zero_page(at: usize) {
    let dczid: usize;
    // SAFETY: reading DCZID_EL0 has no side effect.
    unsafe { asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags)) }
    let block = 4 << (dczid & 15);
    for even in (at..at + 4096).step_by(2 * block) {
        for address in [even, even.wrapping_add(block)] {
            // SAFETY: passed on to the caller.
            unsafe { asm!("dc zva, {}", in(reg) address, options(nostack, preserves_flags)) }
        }
    }
}

/// Makes instruction fetches of all CPUs see what memory holds.
pub fn invalidate_icache_all() {
    barrier::dsb_ish();
    // SAFETY: removing instruction cache entries changes no memory.
    unsafe { asm!("ic ialluis", "dsb ish", "isb", options(nostack, preserves_flags)) }
}
