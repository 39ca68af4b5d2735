// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM's stage-2 tables and the pool of pages they are made of. The VM's lock
//! protects both.

use havmsi_abi::{Error, PAGE_SIZE};

use crate::addr::{Ipa, Pa, index};
use crate::hw::Hardware;
use crate::page::{Clean, Isolated, Owner, Page, Pages, VmSlot};
use crate::stage2::{
    self, Attributes, ENTRIES, Entry, LEVEL1_SIZE, LEVEL2_SIZE, ROOT_ENTRIES, as_block,
    level1_index, level2_index, level3_index, replace,
};
use crate::vm::{Machine, give_to_host};

/// Spare table pages, zeroed and owned as [`Owner::Table`], as a list that runs
/// through their first words. One for each block of the map is in the list and not
/// counted: kept for the day when the block must be pages again.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Pool {
    pub(crate) head: Option<Pa>,
    pub(crate) len: u64,
}

impl Pool {
    fn push(&mut self, hw: &impl Hardware, page: Pa) {
        hw.write_entry(page, 0, self.head.map_or(0, |p| p.0));
        self.head = Some(page);
        self.len += 1;
    }

    fn pop(&mut self, hw: &impl Hardware) -> Option<Pa> {
        let page = self.head?;
        let next = hw.read_entry(page, 0);
        hw.write_entry(page, 0, 0);
        self.head = (next != 0).then_some(Pa(next));
        self.len = self.len.saturating_sub(1);
        Some(page)
    }
}

/// The stage-2 of one VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct GuestMap {
    slot: VmSlot,
    pub(crate) root: Pa,
    pub(crate) pool: Pool,
    /// Where the teardown goes on.
    cursor: u64,
}

impl GuestMap {
    /// The map of the VM in `slot`, empty. `root` is two zeroed pages at an
    /// 8 KiB boundary in the carve-out.
    pub const fn new(slot: VmSlot, root: Pa) -> Self {
        Self { slot, root, pool: Pool { head: None, len: 0 }, cursor: 0 }
    }

    /// `VTTBR_EL2` of this map.
    pub const fn vttbr(&self) -> u64 {
        stage2::vttbr(self.root, self.slot.vmid())
    }

    /// Spare table pages that nothing is kept for.
    pub const fn pool_len(&self) -> u64 {
        self.pool.len
    }

    /// Takes clean pages as table memory.
    pub fn add_to_pool(&mut self, m: &impl Machine, page: Page<Clean>) {
        let each = page.each();
        m.pages().settle(page, Owner::Table(self.slot));
        each.for_each(|pa| self.pool.push(m.hw(), pa));
    }

    fn find(&self, hw: &impl Hardware, ipa: Ipa) -> Result<(Pa, usize), u64> {
        stage2::find(hw, self.root, ipa)
    }

    /// The entry of `ipa`, a block's or at level 3.
    pub(crate) fn entry(&self, hw: &impl Hardware, ipa: Ipa) -> Option<Entry> {
        self.find(hw, ipa).ok().map(|(table, slot)| Entry(hw.read_entry(table, slot)))
    }

    /// The page that `ipa` leads to.
    pub(crate) fn page(&self, hw: &impl Hardware, ipa: Ipa) -> Option<Pa> {
        let leaf = self.entry(hw, ipa)?;
        let offset = if leaf.is_block() { ipa.page().0 % LEVEL2_SIZE } else { 0 };
        leaf.is_valid().then(|| leaf.address().offset(offset))
    }

    /// Whether `size` bytes can be mapped from `ipa` on now. Checked before the pages
    /// are touched, so that a refused call has changed nothing.
    ///
    /// # Errors
    /// [`Error::Denied`] if some of it is mapped, or is not a single page and some was
    /// taken away, [`Error::Invalid`] if it takes more than one table's
    /// pages; [`Error::NoMemory`] if the pool is short.
    pub fn check(&self, hw: &impl Hardware, ipa: Ipa, size: u64) -> Result<(), Error> {
        if ipa.0 % LEVEL2_SIZE + size > LEVEL2_SIZE {
            return Err(Error::Invalid);
        }
        left_out!(Occupied => if self.find(hw, ipa).is_ok() { return Ok(()) });
        left_out!(LostRun => if size > PAGE_SIZE { return Ok(()) });
        let used = |(table, slot)| {
            let mut entries =
                (slot..slot + index(size / PAGE_SIZE)).map(|i| hw.read_entry(table, i));
            entries.any(|e| Entry(e).is_valid() || size > PAGE_SIZE && e != Entry::INVALID.0)
        };
        match self.find(hw, ipa) {
            Ok(place) if used(place) => Err(Error::Denied),
            Err(missing) if missing > self.pool.len => Err(Error::NoMemory),
            _ => Ok(()),
        }
    }

    /// Writes leaves for `size` bytes from `ipa` on that [`Self::check`] finds free. From
    /// invalid to valid, so no TLB holds anything for them. A device's page is the
    /// caller's to check.
    pub(crate) fn insert(
        &mut self,
        hw: &impl Hardware,
        ipa: Ipa,
        (pa, size): (Pa, u64),
        attributes: Attributes,
    ) -> Result<(), Error> {
        self.check(hw, ipa, size)?;
        let mut table = self.root;
        for slot in [level1_index(ipa), level2_index(ipa)] {
            let entry = Entry(hw.read_entry(table, slot));
            table = if entry.is_valid() {
                entry.address()
            } else {
                let next = self.pool.pop(hw).ok_or(Error::NoMemory)?;
                hw.write_entry(table, slot, Entry::table(next).0);
                next
            };
        }
        for (n, at) in (0..).zip((0..size).step_by(index(PAGE_SIZE))) {
            let leaf = Entry::page(pa.offset(at), attributes);
            hw.write_entry(table, level3_index(ipa) + n, leaf.0);
        }
        Ok(())
    }

    /// Gives clean pages to the VM at `ipa` (I4: the token is used up, so they
    /// can't be mapped a second time), private or shared as `owner` says.
    ///
    /// # Errors
    /// As [`Self::check`]; the pages are the host's again then.
    pub fn map(
        &mut self,
        m: &impl Machine,
        ipa: Ipa,
        page: Page<Clean>,
        owner: Owner,
    ) -> Result<(), Error> {
        let size = page.size();
        let result = self.insert(m.hw(), ipa, (page.pa(), size), Attributes::Memory);
        match result {
            Ok(()) => {
                m.pages().settle(page, owner);
                self.join(m.hw(), Ipa(ipa.0 + size - PAGE_SIZE));
            }
            // Not after a `check` under the same lock; still they must not be lost.
            Err(_) => give_to_host(m, page),
        }
        result
    }

    /// Makes a block of the pages around `ipa`, where the last of them came, if they
    /// are 2 MiB of memory in a row. Other vCPUs may fault in that moment.
    fn join(&mut self, hw: &impl Hardware, ipa: Ipa) {
        let level2 = Entry(hw.read_entry(self.root, level1_index(ipa))).address();
        let table = Entry(hw.read_entry(level2, level2_index(ipa))).address();
        let Some(block) = as_block(hw, table, level3_index(ipa), PAGE_SIZE) else { return };
        replace(hw, (level2, level2_index(ipa)), block, || self.forget_block(hw, ipa));
        // Kept, and zero as all that are spare.
        hw.zero_page(table);
        self.pool.push(hw, table);
        self.pool.len -= 1;
    }

    /// The level 3 table of `ipa`, which has an entry in `level2`; a block becomes
    /// pages, in the table that was kept for it.
    fn split(&mut self, hw: &impl Hardware, level2: Pa, ipa: Ipa) -> Option<Pa> {
        let entry = Entry(hw.read_entry(level2, level2_index(ipa)));
        if !entry.is_block() {
            return Some(entry.address());
        }
        self.pool.len += 1;
        let table = self.pool.pop(hw)?;
        for i in 0..ENTRIES {
            let pa = entry.address().offset(i as u64 * PAGE_SIZE);
            hw.write_entry(table, i, Entry::page(pa, Attributes::Memory).0);
        }
        let place = (level2, level2_index(ipa));
        replace(hw, place, Entry::table(table), || self.forget_block(hw, ipa));
        Some(table)
    }

    fn forget_block(&self, hw: &impl Hardware, ipa: Ipa) {
        hw.invalidate_guest(self.vttbr(), Ipa(ipa.0 / LEVEL2_SIZE * LEVEL2_SIZE), LEVEL2_SIZE);
    }

    /// Takes the page at `ipa` out of the map and of all TLBs; `None` if there
    /// is none. Its place says so until it is filled again, or a teardown: with
    /// `version`, or 0 if the page was shared ([`Entry::gone`]). A device page is only
    /// unmapped.
    pub fn unmap(&mut self, m: &impl Machine, ipa: Ipa, version: u64) -> Option<Page<Isolated>> {
        let (hw, pages) = (m.hw(), m.pages());
        let (mut table, mut slot) = self.find(hw, ipa).ok()?;
        if Entry(hw.read_entry(table, slot)).is_block() {
            (table, slot) = (self.split(hw, table, ipa)?, level3_index(ipa));
        }
        let entry = Entry(hw.read_entry(table, slot));
        if !entry.is_valid() {
            return None;
        }
        let page = self.release(pages, entry);
        let version = if page.as_ref().is_some_and(Page::is_shared) { 0 } else { version };
        hw.write_entry(table, slot, Entry::gone(version).0);
        left_out!(Lost => hw.write_entry(table, slot, Entry::INVALID.0));
        left_out!(GuestTlb => return page);
        hw.invalidate_guest(self.vttbr(), ipa, PAGE_SIZE);
        page
    }

    /// The page of a leaf that is gone: this VM's, or none if it was a device's. Of
    /// what was shared the host goes on seeing all that is done to it, so that no
    /// transfer of its devices aborts.
    fn release(&self, pages: &Pages<'_>, leaf: Entry) -> Option<Page<Isolated>> {
        let claim = |owner| pages.claim(leaf.address(), owner);
        let page = claim(Owner::Private(self.slot)).or_else(|_| claim(Owner::Shared(self.slot)));
        Some(page.ok()?.isolated())
    }

    /// Starts a teardown: no vCPU of the VM runs, and none will until it is
    /// done. From here on no TLB holds anything of this map (I6), and nothing
    /// can come in, as no CPU has its root.
    pub fn begin_teardown(&mut self, hw: &impl Hardware) {
        hw.invalidate_guest_all(self.vttbr());
        self.cursor = 0;
    }

    /// One step of a teardown: hands at most `budget` pages to `give_back`,
    /// wiped there; looks at no more than one table of each level.
    ///
    /// # Errors
    /// [`Error::Again`] while there is more.
    pub fn teardown(
        &mut self,
        m: &impl Machine,
        budget: u64,
        mut give_back: impl FnMut(Page<Isolated>),
    ) -> Result<(), Error> {
        let (hw, pages) = (m.hw(), m.pages());
        let Some((level1, level2)) = self.next_table(hw) else { return Ok(()) };
        let ipa = Ipa(self.cursor);
        let parent = self.split(hw, level2, ipa).ok_or(Error::NoMemory)?;
        let mut left = budget;
        let start = level3_index(ipa);
        for slot in start..ENTRIES {
            let entry = Entry(hw.read_entry(parent, slot));
            if entry.gone_version().is_some() {
                hw.write_entry(parent, slot, Entry::INVALID.0);
            }
            if !entry.is_valid() {
                continue;
            }
            if left == 0 {
                self.cursor = ipa.0 + (slot - start) as u64 * PAGE_SIZE;
                return Err(Error::Again);
            }
            left -= 1;
            hw.write_entry(parent, slot, Entry::INVALID.0);
            if let Some(page) = self.release(pages, entry) {
                give_back(page);
            }
        }
        // The level 3 table is empty.
        hw.write_entry(level2, level2_index(ipa), Entry::INVALID.0);
        self.pool.push(hw, parent);
        self.cursor = (ipa.0 / LEVEL2_SIZE + 1) * LEVEL2_SIZE;
        if self.cursor.is_multiple_of(LEVEL1_SIZE) {
            self.free_level2(hw, level1);
        }
        Err(Error::Again)
    }

    /// Moves the cursor to the next level 3 table; frees the empty level 2
    /// tables on the way. Returns the level 1 slot and the level 2 table.
    fn next_table(&mut self, hw: &impl Hardware) -> Option<(usize, Pa)> {
        let end = ROOT_ENTRIES as u64 * LEVEL1_SIZE;
        while self.cursor < end {
            let level1 = level1_index(Ipa(self.cursor));
            let entry = Entry(hw.read_entry(self.root, level1));
            if entry.is_valid() {
                let level2 = entry.address();
                for slot in level2_index(Ipa(self.cursor))..ENTRIES {
                    if Entry(hw.read_entry(level2, slot)).is_valid() {
                        let base = level1 as u64 * LEVEL1_SIZE + slot as u64 * LEVEL2_SIZE;
                        self.cursor = self.cursor.max(base);
                        return Some((level1, level2));
                    }
                }
                self.free_level2(hw, level1);
            }
            self.cursor = (level1 as u64 + 1) * LEVEL1_SIZE;
        }
        None
    }

    fn free_level2(&mut self, hw: &impl Hardware, level1: usize) {
        let entry = Entry(hw.read_entry(self.root, level1));
        if entry.is_valid() {
            hw.write_entry(self.root, level1, Entry::INVALID.0);
            self.pool.push(hw, entry.address());
        }
    }

    /// After a teardown: takes one page out of the pool, to go back to the host.
    pub fn take_from_pool(&mut self, m: &impl Machine) -> Option<Page<Isolated>> {
        let pa = self.pool.pop(m.hw())?;
        // No stage-2 ever shows a table.
        let page = m.pages().claim(pa, Owner::Table(self.slot)).ok()?;
        Some(page.isolated())
    }
}

#[cfg(test)]
mod tests;
