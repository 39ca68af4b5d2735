// SPDX-License-Identifier: MIT OR Apache-2.0
//! The normal world's RAM, through EL3's identity map.
//!
//! The monitor's own image, stacks and records lie in secure RAM; what is
//! reached here are pages of hosts, VMs and stage-2 tables. So an access can't
//! break a Rust object, provided that it stays in RAM, which each one checks.

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_core::addr::{Pa, index};
use havmsi_core::ram::Ram;
use spin::Once;

use crate::cache;

const PAGE: usize = 4096;

static RAM: Once<Ram> = Once::new();

/// Tells which RAM there is. Once, at boot.
///
/// # Safety
/// EL3 must map all of it, 1:1, as non-secure normal write-back memory, and no
/// Rust object may lie in it.
pub unsafe fn set_ram(ram: &Ram) {
    RAM.call_once(|| *ram);
}

/// The virtual address of `size` bytes of RAM at `pa`. Anything else than RAM
/// is a broken invariant of the caller, who took `pa` from an ownership record.
fn address(pa: Pa, size: u64) -> usize {
    let inside = RAM.get().is_some_and(|ram| ram.banks().iter().any(|b| b.contains(pa.0, size)));
    #[cfg(feature = "leave-out")]
    let inside = inside || havmsi_core::left_out!(Ram);
    assert!(inside && pa.0.is_multiple_of(size), "access outside RAM");
    index(pa.0)
}

/// The 64-bit word at `pa` as an atomic.
fn word(pa: Pa) -> &'static AtomicU64 {
    let at = with_exposed_provenance_mut::<u64>(address(pa, 8));
    // SAFETY: `address` checked that the aligned word is RAM, mapped for good;
    // every access of the monitor to normal-world RAM is atomic or volatile.
    unsafe { AtomicU64::from_ptr(at) }
}

/// Reads a word.
pub fn read(pa: Pa) -> u64 {
    word(pa).load(Ordering::Relaxed)
}

/// Writes a word in one go.
pub fn write(pa: Pa, value: u64) {
    word(pa).store(value, Ordering::Relaxed);
}

/// The words of the page at `pa`.
pub fn page(pa: Pa) -> &'static [AtomicU64; PAGE / 8] {
    let at = with_exposed_provenance_mut::<[AtomicU64; PAGE / 8]>(address(pa, PAGE as u64));
    // SAFETY: `address` checked that the aligned page is RAM; see `word`.
    unsafe { &*at }
}

/// Cleans and invalidates the page at `pa` to the point of coherency.
pub fn flush_page(pa: Pa) {
    cache::clean_invalidate(address(pa, PAGE as u64), PAGE);
}

/// Fills the page at `pa` with zeros, also for readers with caches off.
///
/// Before: lines that the old owner left dirty are overwritten in the cache.
/// After: nothing of ours stays there, so the new owner may map it uncached.
pub fn zero_page(pa: Pa) {
    // SAFETY: `address` checked that it is a page of RAM; see `set_ram`.
    unsafe { cache::zero_page(address(pa, PAGE as u64)) };
    flush_page(pa);
}
