// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the decisions need of the hardware.

use crate::addr::{Ipa, Pa};

/// Physical memory and TLBs, as the monitor sees them.
///
/// The addresses handed in are pages that the ownership table gave to the
/// monitor, or that are in motion (claimed) while the call lasts.
pub trait Hardware {
    /// Reads a translation table entry, or any word of a page.
    fn read_entry(&self, table: Pa, index: usize) -> u64;

    /// Writes a translation table entry with 64-bit single-copy atomicity and
    /// makes it observable to the table walkers of all CPUs (DSB ISHST). For
    /// the SMMU's, what has become invalid is so by [`Self::invalidate_devices`].
    fn write_entry(&self, table: Pa, index: usize, value: u64);

    /// Fills a page with zeros and cleans and invalidates it to the point of
    /// coherency, for readers whose MMU or caches are off.
    fn zero_page(&self, page: Pa);

    /// Cleans and invalidates a page to the point of coherency: readers with caches
    /// on and off see the same from now on.
    fn flush_page(&self, page: Pa);

    /// Makes instruction fetches of all CPUs see what memory holds.
    fn invalidate_icache(&self);

    /// Removes what any TLB holds for `size` bytes from `ipa` on in the host's
    /// stage-2, the combined stage-1 and stage-2 entries included.
    fn invalidate_host(&self, ipa: Ipa, size: u64);

    /// Removes what the SMMU holds for them in the devices' stage-2, and waits
    /// until all that devices have sent by what it held has arrived.
    fn invalidate_devices(&self, ipa: Ipa, size: u64);

    /// Removes what any TLB holds for them in the stage-2 whose `VTTBR_EL2` is given.
    fn invalidate_guest(&self, vttbr: u64, ipa: Ipa, size: u64);

    /// Removes all that any TLB holds for the stage-2 whose `VTTBR_EL2` is given.
    fn invalidate_guest_all(&self, vttbr: u64);
}
