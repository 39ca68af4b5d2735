// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's stage-2: an identity map of its RAM in blocks, and of the
//! allow-listed device windows. A page that leaves the host is replaced by the
//! zero frame, read only (I2's exception); blocks are split where they must be.
//!
//! The table that splits a block has its fixed place in the carve-out, so a
//! split can't fail. All changes go through break-before-make (Arm ARM D8.17):
//! the block is invalid for a moment, in which other CPUs of the host may fault;
//! [`HostMap::resolve`] tells them to try again.

use havmsi_abi::layout::{BLOCK_SIZE, carveout};
use havmsi_abi::{Error, PAGE_SIZE};

use crate::addr::{Ipa, Pa};
use crate::hw::Hardware;
use crate::page::{Claimed, Clean, Isolated, Owner, Page, Pages};
use crate::ram::{Ram, Range};
use crate::stage2::{
    Attributes, ENTRIES, Entry, LEVEL1_SIZE, LEVEL2_SIZE, level1_index, level2_index, level3_index,
};

/// What the host's access to an address should find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// The map permits it by now: try again.
    Retry,
    /// It is not the host's.
    Refused,
}

/// The host's stage-2 tables. One lock of the caller's protects them.
pub struct HostMap {
    carveout: Pa,
    ram: Ram,
    device_tables: u64,
}

impl HostMap {
    /// Builds the map: all RAM behind the carve-out, which lies at the start of
    /// the first bank, and the `devices`. The tables' memory must be zero.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the windows or banks are not page aligned, lie
    /// where no table can map them, or need more tables than there are.
    pub fn new(
        hw: &impl Hardware,
        ram: Ram,
        carveout_size: u64,
        devices: impl Iterator<Item = Range>,
    ) -> Result<Self, Error> {
        let [first, ..] = *ram.banks();
        let mut map = Self { carveout: Pa(first.base), ram, device_tables: 0 };
        let ram_size = ram.page_count() * PAGE_SIZE;
        if !carveout_size.is_multiple_of(BLOCK_SIZE)
            || carveout_size < havmsi_abi::layout::carveout_size(ram_size)
            || Self::share_level2_table(&ram)
        {
            return Err(Error::Invalid);
        }
        for (i, bank) in ram.banks().iter().enumerate() {
            let skip = if i == 0 && !left_out!(Carveout) { carveout_size } else { 0 };
            let end = bank.base.checked_add(bank.size).ok_or(Error::Invalid)?;
            if !bank.base.is_multiple_of(BLOCK_SIZE)
                || !bank.size.is_multiple_of(BLOCK_SIZE)
                || end > 1 << havmsi_abi::MAX_IPA_BITS
                || skip > bank.size
            {
                return Err(Error::Invalid);
            }
            let mut at = bank.base + skip;
            while at < end {
                // Also where a block needs no table yet: splitting it must not fail.
                let table = map.level2_table(Pa(at)).ok_or(Error::Invalid)?;
                let whole = at.is_multiple_of(LEVEL1_SIZE) && end - at >= LEVEL1_SIZE;
                if whole {
                    let entry = Entry::block(Pa(at), Attributes::Memory);
                    hw.write_entry(map.root(), level1_index(Ipa(at)), entry.0);
                    at += LEVEL1_SIZE;
                } else {
                    hw.write_entry(map.root(), level1_index(Ipa(at)), Entry::table(table).0);
                    let entry = Entry::block(Pa(at), Attributes::Memory);
                    hw.write_entry(table, level2_index(Ipa(at)), entry.0);
                    at += LEVEL2_SIZE;
                }
            }
        }
        for window in devices {
            if !window.base.is_multiple_of(PAGE_SIZE) || !window.size.is_multiple_of(PAGE_SIZE) {
                return Err(Error::Invalid);
            }
            for at in (0..window.size).step_by(4096) {
                map.add_device_page(hw, Pa(window.base + at))?;
            }
        }
        Ok(map)
    }

    /// The root table, for `VTTBR_EL2`.
    #[must_use]
    pub const fn root(&self) -> Pa {
        self.carveout.offset(carveout::HOST_ROOT)
    }

    pub(crate) const fn zero_frame(&self) -> Pa {
        self.carveout.offset(carveout::ZERO_FRAME)
    }

    /// Whether two banks have pages in the same GiB: each would claim its table.
    fn share_level2_table(ram: &Ram) -> bool {
        let around = |bank: &Range| Range {
            base: bank.base / LEVEL1_SIZE,
            size: (bank.base % LEVEL1_SIZE).saturating_add(bank.size).div_ceil(LEVEL1_SIZE),
        };
        let mut banks = ram.banks().iter().filter(|bank| bank.size != 0).map(around);
        let first = banks.next().unwrap_or_default();
        banks.any(|bank| bank.overlaps(&first))
    }

    /// The place of the level 2 table for the GiB of RAM around `pa`: the
    /// GiBs are counted from the bottom of each bank.
    fn level2_table(&self, pa: Pa) -> Option<Pa> {
        let mut number = 0;
        for bank in self.ram.banks() {
            let first = bank.base / LEVEL1_SIZE;
            if bank.contains(pa.0, 1) {
                number += pa.0 / LEVEL1_SIZE - first;
                return (number < carveout::LEVEL2_TABLE_COUNT)
                    .then(|| self.carveout.offset(carveout::LEVEL2_TABLES + number * PAGE_SIZE));
            }
            number += (bank.base + bank.size).div_ceil(LEVEL1_SIZE) - first;
        }
        None
    }

    /// The place of the level 3 table for the 2 MiB of RAM around `pa`.
    fn level3_table(&self, pa: Pa) -> Option<Pa> {
        let block = Pa(pa.0 / LEVEL2_SIZE * LEVEL2_SIZE);
        let number = self.ram.page_index(block)? / ENTRIES;
        Some(self.carveout.offset(carveout::LEVEL3_TABLES + number as u64 * PAGE_SIZE))
    }

    fn next_device_table(&mut self) -> Result<Pa, Error> {
        if self.device_tables >= carveout::DEVICE_TABLE_COUNT {
            return Err(Error::Invalid);
        }
        let at = carveout::DEVICE_TABLES + self.device_tables * PAGE_SIZE;
        self.device_tables += 1;
        Ok(self.carveout.offset(at))
    }

    fn add_device_page(&mut self, hw: &impl Hardware, pa: Pa) -> Result<(), Error> {
        let ipa = Ipa(pa.0);
        let page = Range { base: pa.0, size: PAGE_SIZE };
        if pa.0 >= 1 << havmsi_abi::MAX_IPA_BITS
            || self.ram.banks().iter().any(|bank| bank.overlaps(&page))
        {
            return Err(Error::Invalid);
        }
        let mut table = self.root();
        for slot in [level1_index(ipa), level2_index(ipa)] {
            let entry = Entry(hw.read_entry(table, slot));
            if entry.is_block() {
                return Err(Error::Invalid);
            }
            if entry.is_valid() {
                table = entry.address();
            } else {
                let next = self.next_device_table()?;
                hw.write_entry(table, slot, Entry::table(next).0);
                table = next;
            }
        }
        hw.write_entry(table, level3_index(ipa), Entry::page(pa, Attributes::Device).0);
        Ok(())
    }

    /// The level 3 table that maps `pa`, splitting blocks on the way.
    #[expect(clippy::needless_pass_by_ref_mut, reason = "writes tables: needs the lock")]
    fn split_to_page(&mut self, hw: &impl Hardware, pa: Pa) -> Result<Pa, Error> {
        let ipa = Ipa(pa.0);
        let level2 = self.level2_table(pa).ok_or(Error::Denied)?;
        let level3 = self.level3_table(pa).ok_or(Error::Denied)?;
        let root = self.root();
        for (table, slot, next, size) in [
            (root, level1_index(ipa), level2, LEVEL1_SIZE),
            (level2, level2_index(ipa), level3, LEVEL2_SIZE),
        ] {
            if !Entry(hw.read_entry(table, slot)).is_block() {
                continue;
            }
            let base = pa.0 / size * size;
            let step = size / ENTRIES as u64;
            for i in 0..ENTRIES {
                let at = Pa(base + i as u64 * step);
                let entry = if size == LEVEL1_SIZE {
                    Entry::block(at, Attributes::Memory)
                } else {
                    Entry::page(at, Attributes::Memory)
                };
                hw.write_entry(next, i, entry.0);
            }
            hw.write_entry(table, slot, Entry::INVALID.0);
            hw.invalidate_host(ipa);
            hw.write_entry(table, slot, Entry::table(next).0);
        }
        Ok(level3)
    }

    /// Takes a host page out of the host's map and all TLBs. If the host reads
    /// there it finds zeros ([`Self::resolve`]).
    ///
    /// # Errors
    /// [`Error::Denied`], with the page given back, if no table can map it
    /// (it is not RAM, so it can't have been claimed).
    pub fn hide(
        &mut self,
        hw: &impl Hardware,
        pages: &Pages<'_>,
        page: Page<Claimed>,
    ) -> Result<Page<Isolated>, Error> {
        let ipa = Ipa(page.pa().0);
        left_out!(Hide => return Ok(page.isolated()));
        left_out!(Ram => if self.level3_table(page.pa()).is_none() { return Ok(page.isolated()) });
        match self.split_to_page(hw, page.pa()) {
            Ok(table) => {
                hw.write_entry(table, level3_index(ipa), Entry::HIDDEN.0);
                left_out!(HostTlb => return Ok(page.isolated()));
                hw.invalidate_host(ipa);
                Ok(page.isolated())
            }
            Err(error) => {
                pages.unclaim(page);
                Err(error)
            }
        }
    }

    /// Gives a page to the host: maps it and settles it.
    pub fn show(&mut self, hw: &impl Hardware, pages: &Pages<'_>, page: Page<Clean>) {
        let ipa = Ipa(page.pa().0);
        // Every page that was hidden has its tables.
        let Ok(table) = self.split_to_page(hw, page.pa()) else { return };
        let slot = level3_index(ipa);
        // From invalid to valid no TLB needs to forget anything; the zero
        // frame, if the host looked there, must go first.
        if Entry(hw.read_entry(table, slot)).is_valid() {
            hw.write_entry(table, slot, Entry::INVALID.0);
            hw.invalidate_host(ipa);
        }
        hw.write_entry(table, slot, Entry::page(page.pa(), Attributes::Memory).0);
        pages.settle(page, Owner::Host);
    }

    /// What became of an access of the host that faulted at `ipa`. Where a page
    /// is hidden, a read gets the zero frame.
    pub fn resolve(
        &mut self,
        hw: &impl Hardware,
        ipa: Ipa,
        write: bool,
        execute: bool,
    ) -> Resolution {
        let Some((table, slot)) = self.leaf(hw, ipa) else { return Resolution::Refused };
        let mut entry = Entry(hw.read_entry(table, slot));
        if entry == Entry::HIDDEN && !write && !execute {
            entry = Entry::page(self.zero_frame(), Attributes::ReadOnly);
            hw.write_entry(table, slot, entry.0);
        }
        if entry.is_valid()
            && (!write || entry.is_writable())
            && (!execute || entry.is_executable())
        {
            Resolution::Retry
        } else {
            Resolution::Refused
        }
    }

    /// The leaf that maps `ipa`.
    #[must_use]
    pub fn lookup(&self, hw: &impl Hardware, ipa: Ipa) -> Option<Entry> {
        let (table, slot) = self.leaf(hw, ipa)?;
        Some(Entry(hw.read_entry(table, slot))).filter(|entry| entry.is_valid())
    }

    /// The place of the entry that ends the walk for `ipa`, if that is a block
    /// or at level 3.
    fn leaf(&self, hw: &impl Hardware, ipa: Ipa) -> Option<(Pa, usize)> {
        if ipa.0 >= 1 << havmsi_abi::MAX_IPA_BITS {
            return None;
        }
        let mut table = self.root();
        for slot in [level1_index(ipa), level2_index(ipa)] {
            let entry = Entry(hw.read_entry(table, slot));
            if entry.is_block() {
                return Some((table, slot));
            }
            if !entry.is_valid() {
                return None;
            }
            table = entry.address();
        }
        Some((table, level3_index(ipa)))
    }
}

#[cfg(test)]
mod tests;
