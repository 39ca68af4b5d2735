// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's stage-2: an identity map of its RAM in blocks, and of the
//! allow-listed device windows. A page that leaves the host is replaced by the
//! zero frame, read only (I2's exception); blocks are split where they must be, and
//! joined when the last of their pages is back.
//!
//! Every 2 MiB of RAM have their level 3 table, at a fixed place in the carve-out
//! and filled from boot on. The devices' stage-2 (the SMMU's) always leads to these
//! tables; the CPUs' does once a block was split. So a page comes and goes for both
//! with one entry, a split can't fail, and it never touches what devices use
//! (docs/decisions/0005).
//!
//! All changes go through break-before-make (Arm ARM D8.17):
//! the block is invalid for a moment, in which other CPUs of the host may fault;
//! [`HostMap::resolve`] tells them to try again.

use havmsi_abi::layout::BLOCK_SIZE;
use havmsi_abi::layout::carveout::{self, LEVEL2_TABLES, SMMU_LEVEL2_TABLES};
use havmsi_abi::{Error, PAGE_SIZE};

use crate::addr::{Ipa, Pa, index};
use crate::hw::Hardware;
use crate::page::{Claimed, Clean, Isolated, Owner, Page, Pages};
use crate::ram::{MAX_BANKS, Ram, Range};
use crate::stage2::{
    Attributes, ENTRIES, Entry, LEVEL1_SIZE, LEVEL2_SIZE, as_block, find, level1_index,
    level2_index, level3_index, replace,
};

/// What the host's access to an address should find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// The map permits it by now: try again.
    Retry,
    /// It stores to a device that the host may only read: nothing happens.
    Ignored,
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
        devices: impl Iterator<Item = (Range, Attributes)>,
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
            for at in (bank.base + skip..end).step_by(index(LEVEL2_SIZE)) {
                map.add_ram(hw, Pa(at), Range { base: bank.base + skip, size: bank.size - skip })?;
            }
        }
        for (window, attributes) in devices {
            map.add_device(hw, window, attributes)?;
        }
        Ok(map)
    }

    /// The root table, for `VTTBR_EL2`.
    pub const fn root(&self) -> Pa {
        self.carveout.offset(carveout::HOST_ROOT)
    }

    /// The root table of the devices' stage-2.
    pub const fn devices_root(&self) -> Pa {
        self.carveout.offset(carveout::SMMU_ROOT)
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

    /// The place of the level 2 table for the GiB of RAM around `pa`, among the
    /// `tables` of CPUs or devices: each bank has its share of them.
    fn level2_table(&self, tables: u64, pa: Pa) -> Option<Pa> {
        const SHARE: u64 = carveout::LEVEL2_TABLE_COUNT / MAX_BANKS as u64;
        let mut banks = (0..).zip(self.ram.banks());
        let (n, bank) = banks.find(|(_, bank)| bank.contains(pa.0, 1))?;
        let number = pa.0 / LEVEL1_SIZE - bank.base / LEVEL1_SIZE;
        (number < SHARE).then(|| self.carveout.offset(tables + (n * SHARE + number) * PAGE_SIZE))
    }

    /// The place of the level 3 table for the 2 MiB of RAM around `pa`.
    pub(crate) fn level3_table(&self, pa: Pa) -> Option<Pa> {
        let block = Pa(pa.0 / LEVEL2_SIZE * LEVEL2_SIZE);
        let number = self.ram.page_index(block)? / ENTRIES;
        Some(self.carveout.offset(carveout::LEVEL3_TABLES + number as u64 * PAGE_SIZE))
    }

    /// At boot: maps 2 MiB of `ram` at `pa`, for CPUs and devices.
    fn add_ram(&self, hw: &impl Hardware, pa: Pa, ram: Range) -> Result<(), Error> {
        let level2 = self.level2_table(LEVEL2_TABLES, pa).ok_or(Error::Invalid)?;
        let devices_level2 = self.level2_table(SMMU_LEVEL2_TABLES, pa).ok_or(Error::Invalid)?;
        let level3 = self.level3_table(pa).ok_or(Error::Invalid)?;
        for i in 0..ENTRIES {
            let entry = Entry::page(pa.offset(i as u64 * PAGE_SIZE), Attributes::Memory);
            hw.write_entry(level3, i, entry.0);
        }
        let ipa = Ipa(pa.0);
        let block = Entry::block(pa, Attributes::Memory);
        hw.write_entry(level2, level2_index(ipa), block.0);
        hw.write_entry(devices_level2, level2_index(ipa), Entry::table(level3).0);
        let gib = Pa(pa.0 / LEVEL1_SIZE * LEVEL1_SIZE);
        let around = if ram.contains(gib.0, LEVEL1_SIZE) {
            Entry::block(gib, Attributes::Memory)
        } else {
            Entry::table(level2)
        };
        hw.write_entry(self.root(), level1_index(ipa), around.0);
        hw.write_entry(self.devices_root(), level1_index(ipa), Entry::table(devices_level2).0);
        Ok(())
    }

    /// At boot: maps a device window, for CPUs only.
    fn add_device(
        &mut self,
        hw: &impl Hardware,
        window: Range,
        attributes: Attributes,
    ) -> Result<(), Error> {
        let end = window.base.checked_add(window.size).ok_or(Error::Invalid)?;
        if !window.base.is_multiple_of(PAGE_SIZE)
            || !window.size.is_multiple_of(PAGE_SIZE)
            || end > 1 << havmsi_abi::MAX_IPA_BITS
            || self.ram.banks().iter().any(|bank| bank.overlaps(&window))
        {
            return Err(Error::Invalid);
        }
        let mut at = window.base;
        while at < end {
            let ipa = Ipa(at);
            let level2 = self.device_table(hw, self.root(), level1_index(ipa))?;
            if at.is_multiple_of(LEVEL2_SIZE) && end - at >= LEVEL2_SIZE {
                let entry = Entry::block(Pa(at), attributes);
                hw.write_entry(level2, level2_index(ipa), entry.0);
                at += LEVEL2_SIZE;
            } else {
                let level3 = self.device_table(hw, level2, level2_index(ipa))?;
                let entry = Entry::page(Pa(at), attributes);
                hw.write_entry(level3, level3_index(ipa), entry.0);
                at += PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// The table that an entry leads to: a new one if it is still invalid.
    fn device_table(&mut self, hw: &impl Hardware, table: Pa, slot: usize) -> Result<Pa, Error> {
        let entry = Entry(hw.read_entry(table, slot));
        if entry.is_block() {
            return Err(Error::Invalid);
        }
        if entry.is_valid() {
            return Ok(entry.address());
        }
        if self.device_tables >= carveout::DEVICE_TABLE_COUNT {
            return Err(Error::Invalid);
        }
        let at = carveout::DEVICE_TABLES + self.device_tables * PAGE_SIZE;
        self.device_tables += 1;
        let next = self.carveout.offset(at);
        hw.write_entry(table, slot, Entry::table(next).0);
        Ok(next)
    }

    /// The level 3 table that maps `pa`, splitting the CPUs' blocks on the way.
    #[expect(clippy::needless_pass_by_ref_mut, reason = "writes tables: needs the lock")]
    fn split_to_page(&mut self, hw: &impl Hardware, pa: Pa) -> Result<Pa, Error> {
        let ipa = Ipa(pa.0);
        let level2 = self.level2_table(LEVEL2_TABLES, pa).ok_or(Error::Denied)?;
        let level3 = self.level3_table(pa).ok_or(Error::Denied)?;
        for (table, slot, next) in
            [(self.root(), level1_index(ipa), level2), (level2, level2_index(ipa), level3)]
        {
            if Entry(hw.read_entry(table, slot)).is_block() {
                let forget = || hw.invalidate_host(ipa, PAGE_SIZE);
                replace(hw, (table, slot), Entry::table(next), forget);
            }
        }
        Ok(level3)
    }

    /// Joins the CPUs' blocks around `pa` where their pages are all the host's. What
    /// devices walk through stays as it is.
    fn join(&self, hw: &impl Hardware, pa: Pa) {
        let Some(level2) = self.level2_table(LEVEL2_TABLES, pa) else { return };
        let Some(level3) = self.level3_table(pa) else { return };
        let ipa = Ipa(pa.0);
        for (place, table, slot, size) in [
            ((level2, level2_index(ipa)), level3, level3_index(ipa), PAGE_SIZE),
            ((self.root(), level1_index(ipa)), level2, level2_index(ipa), LEVEL2_SIZE),
        ] {
            let Some(block) = as_block(hw, table, slot, size) else { return };
            let forget = || hw.invalidate_host(Ipa(block.address().0), size * ENTRIES as u64);
            replace(hw, place, block, forget);
        }
    }

    /// No TLB of a CPU or of the SMMU holds anything of these pages any more.
    fn invalidate(hw: &impl Hardware, ipa: Ipa, size: u64) {
        hw.invalidate_host(ipa, size);
        left_out!(DevicesTlb => return);
        hw.invalidate_devices(ipa, size);
    }

    /// Takes pages out of the host's map, the devices' and all TLBs. If the
    /// host reads there it finds zeros ([`Self::resolve`]).
    ///
    /// # Errors
    /// [`Error::Denied`], with the pages given back, if no table can map them
    /// (they are not RAM, so they can't have been claimed).
    pub fn hide(
        &mut self,
        hw: &impl Hardware,
        pages: &Pages<'_>,
        page: Page<Claimed>,
    ) -> Result<Page<Isolated>, Error> {
        left_out!(Hide => return Ok(page.isolated()));
        left_out!(Ram => if self.level3_table(page.pa()).is_none() { return Ok(page.isolated()) });
        let mut table = None;
        for pa in page.each() {
            let slot = level3_index(Ipa(pa.0));
            // Each table has 2 MiB.
            if slot == 0 || table.is_none() {
                table = self.split_to_page(hw, pa).ok();
            }
            let Some(table) = table else {
                pages.unclaim(page);
                return Err(Error::Denied);
            };
            hw.write_entry(table, slot, Entry::HIDDEN.0);
        }
        left_out!(HostTlb => return Ok(page.isolated()));
        Self::invalidate(hw, Ipa(page.pa().0), page.size());
        Ok(page.isolated())
    }

    /// Shows pages to the host, devices included, and settles them: the host's, or
    /// of a VM that shares them. What is the host's alone can be part of a block.
    pub fn show(&mut self, hw: &impl Hardware, pages: &Pages<'_>, page: Page<Clean>, owner: Owner) {
        for pa in page.each() {
            // Every page that was hidden has its tables.
            let Ok(table) = self.split_to_page(hw, pa) else { return };
            let slot = level3_index(Ipa(pa.0));
            let (old, new) =
                (Entry(hw.read_entry(table, slot)), Entry::page(pa, Attributes::Memory));
            // From invalid to valid no TLB needs to forget anything; the zero frame, if
            // the host looked there, must go first. What was shared is there.
            if old.is_valid() && old != new {
                let forget = || Self::invalidate(hw, Ipa(pa.0), PAGE_SIZE);
                replace(hw, (table, slot), new, forget);
            } else {
                hw.write_entry(table, slot, new.0);
            }
            if owner == Owner::Host {
                self.join(hw, pa);
            }
        }
        pages.settle(page, owner);
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
        } else if write && entry == Entry::page(Pa(ipa.page().0), Attributes::DeadDevice) {
            Resolution::Ignored
        } else {
            Resolution::Refused
        }
    }

    /// The leaf that maps `ipa`.
    pub fn lookup(&self, hw: &impl Hardware, ipa: Ipa) -> Option<Entry> {
        let (table, slot) = self.leaf(hw, ipa)?;
        Some(Entry(hw.read_entry(table, slot))).filter(|entry| entry.is_valid())
    }

    /// The place of the entry that ends the walk for `ipa`, if that is a block
    /// or at level 3.
    fn leaf(&self, hw: &impl Hardware, ipa: Ipa) -> Option<(Pa, usize)> {
        let known = ipa.0 >> havmsi_abi::MAX_IPA_BITS == 0;
        find(hw, self.root(), ipa).ok().filter(|_| known)
    }
}

#[cfg(test)]
mod tests;
