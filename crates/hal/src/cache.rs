// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cache maintenance (Arm ARM D7.5, B2.4).

use core::arch::asm;

use crate::barrier;
use crate::sysreg::{ctr_el0, dczid_el0};

/// Cleans and invalidates to the point of coherency what all caches hold of
/// `size` bytes at the virtual address `at`: a reader or writer with caches
/// off, or one with other attributes, sees memory as it is.
pub fn clean_invalidate(at: usize, size: usize) {
    // The smallest data cache line of the CPU (DminLine).
    let line = 4 << (ctr_el0::read() >> 16 & 15);
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
    let block = 4 << (dczid_el0::read() & 15);
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
