// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks all tables and compares them with the ownership records: what must
//! always hold (I1 to I4), for tests and debug builds. No page may be in motion
//! meanwhile.

use havmsi_abi::PAGE_SIZE;

use crate::addr::{Ipa, Pa, index};
use crate::host_map::HostMap;
use crate::hw::Hardware;
use crate::page::{Census, Owner, Pages, VmSlot};
use crate::stage2::{Attributes, ENTRIES, Entry, LEVEL1_SIZE, LEVEL2_SIZE, ROOT_ENTRIES};
use crate::vm::Vm;

/// What does not hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// The scratch memory is too small.
    Scratch,
    /// The page has no owner.
    Moving(Pa),
    /// A table, the zero frame or spare table memory is not its user's.
    TableOwner(Pa),
    /// The page has two uses.
    UsedTwice(Pa),
    /// The zero frame is not zero, or spare table memory is not.
    NotZero(Pa),
    /// This leaf of the host's map is of no permitted form.
    HostLeaf(Ipa, Entry),
    /// The host's map shows a page that is not the host's, or hides one that is.
    HostOwner(Ipa),
    /// The host's map misses pages: the number of the host's, and of those mapped.
    HostMisses(u64, u64),
    /// This leaf of a VM's map is of no permitted form, or not in its RAM.
    GuestLeaf(VmSlot, Ipa, Entry),
    /// A VM's map shows a page that is not the VM's.
    GuestOwner(VmSlot, Ipa),
    /// A slot without a VM has pages.
    NoVm(VmSlot),
    /// A run page is not lent to the VM.
    RunPage(VmSlot, Pa),
    /// Fewer spare tables than counted.
    PoolCount(VmSlot),
    /// A page of a VM that nothing of the VM refers to: records, and uses found.
    Lost(Found, Found),
    /// The statistics are not what the records say.
    Census(Census),
}

/// Pages of VMs by use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// Private memory.
    pub private: u64,
    /// Table memory.
    pub table: u64,
    /// Run pages.
    pub run: u64,
}

/// An audit under way: [`Self::host`], then [`Self::vm`] for each slot, then
/// [`Self::finish`].
pub struct Audit<'a, H: Hardware> {
    hw: &'a H,
    pages: &'a Pages<'a>,
    /// One bit a page of RAM: seen in use.
    seen: &'a mut [u64],
    found: Found,
}

impl<'a, H: Hardware> Audit<'a, H> {
    /// Starts an audit. `scratch` has one bit for each page of RAM.
    ///
    /// # Errors
    /// [`Violation::Scratch`].
    pub fn new(hw: &'a H, pages: &'a Pages<'a>, scratch: &'a mut [u64]) -> Result<Self, Violation> {
        if (scratch.len() as u64) < pages.ram().page_count().div_ceil(64) {
            return Err(Violation::Scratch);
        }
        scratch.fill(0);
        Ok(Self { hw, pages, seen: scratch, found: Found::default() })
    }

    /// Notes a use of the page.
    fn take(&mut self, pa: Pa) -> Result<(), Violation> {
        let n = self.pages.ram().page_index(pa).ok_or(Violation::TableOwner(pa))?;
        let word = self.seen.get_mut(n / 64).ok_or(Violation::Scratch)?;
        let bit = 1 << (n % 64);
        if *word & bit != 0 {
            return Err(Violation::UsedTwice(pa));
        }
        *word |= bit;
        Ok(())
    }

    /// A table of `owner`'s.
    fn table(&mut self, pa: Pa, owner: Owner) -> Result<(), Violation> {
        if self.pages.owner(pa) != Some(owner) {
            return Err(Violation::TableOwner(pa));
        }
        self.take(pa)
    }

    fn is_zero(&self, page: Pa, from: usize) -> Result<(), Violation> {
        if (from..ENTRIES).all(|i| self.hw.read_entry(page, i) == 0) {
            Ok(())
        } else {
            Err(Violation::NotZero(page))
        }
    }

    /// Calls `leaf` with the address, entry and size of all that the tables of
    /// `owner` map.
    fn walk(
        &mut self,
        root: Pa,
        owner: Owner,
        mut leaf: impl FnMut(&mut Self, Ipa, Entry, u64) -> Result<(), Violation>,
    ) -> Result<u64, Violation> {
        let mut tables = 0;
        for page in [root, root.offset(PAGE_SIZE)] {
            self.table(page, Owner::Monitor)?;
        }
        for i in 0..ROOT_ENTRIES {
            let at1 = i as u64 * LEVEL1_SIZE;
            let entry = Entry(self.hw.read_entry(root, i));
            if entry.is_block() {
                leaf(self, Ipa(at1), entry, LEVEL1_SIZE)?;
            }
            if !entry.is_valid() || entry.is_block() {
                continue;
            }
            let level2 = entry.address();
            self.table(level2, owner)?;
            tables += 1;
            for j in 0..ENTRIES {
                let at2 = at1 + j as u64 * LEVEL2_SIZE;
                let entry = Entry(self.hw.read_entry(level2, j));
                if entry.is_block() {
                    leaf(self, Ipa(at2), entry, LEVEL2_SIZE)?;
                }
                if !entry.is_valid() || entry.is_block() {
                    continue;
                }
                let level3 = entry.address();
                self.table(level3, owner)?;
                tables += 1;
                for k in 0..ENTRIES {
                    let entry = Entry(self.hw.read_entry(level3, k));
                    if entry != Entry::INVALID {
                        leaf(self, Ipa(at2 + k as u64 * PAGE_SIZE), entry, PAGE_SIZE)?;
                    }
                }
            }
        }
        Ok(tables)
    }

    /// The host's map: every page of the host is there, every page of a VM is
    /// hidden or the zero frame, nothing else is but devices (I1, I2, I3).
    ///
    /// # Errors
    /// What does not hold.
    pub fn host(&mut self, map: &HostMap) -> Result<(), Violation> {
        let zero = map.zero_frame();
        self.table(zero, Owner::Monitor)?;
        self.is_zero(zero, 0)?;
        let hidden = Entry::page(zero, Attributes::ReadOnly);
        let (mut shown, mut veiled) = (0, 0);
        self.walk(map.root(), Owner::Monitor, |audit, ipa, entry, size| {
            let owner = |at| audit.pages.owner(at);
            let pa = Pa(ipa.0);
            let memory = if size == PAGE_SIZE {
                Entry::page(pa, Attributes::Memory)
            } else {
                Entry::block(pa, Attributes::Memory)
            };
            if entry == memory {
                for i in 0..size / PAGE_SIZE {
                    let at = pa.offset(i * PAGE_SIZE);
                    if !matches!(owner(at), Some(Owner::Host | Owner::RunPage(_))) {
                        return Err(Violation::HostOwner(Ipa(at.0)));
                    }
                }
                shown += size / PAGE_SIZE;
            } else if size != PAGE_SIZE {
                return Err(Violation::HostLeaf(ipa, entry));
            } else if entry == hidden || entry == Entry::HIDDEN {
                if !matches!(owner(pa), Some(Owner::Table(_) | Owner::Private(_))) {
                    return Err(Violation::HostOwner(ipa));
                }
                veiled += 1;
            } else if entry != Entry::page(pa, Attributes::Device)
                || audit.pages.ram().page_index(pa).is_some()
            {
                return Err(Violation::HostLeaf(ipa, entry));
            }
            Ok(())
        })?;
        let (mut host, mut taken) = (0, 0);
        for bank in self.pages.ram().banks() {
            for at in (0..bank.size).step_by(index(PAGE_SIZE)) {
                let pa = Pa(bank.base + at);
                match self.pages.owner(pa) {
                    None => return Err(Violation::Moving(pa)),
                    Some(Owner::Host | Owner::RunPage(_)) => host += 1,
                    Some(Owner::Table(_) | Owner::Private(_)) => taken += 1,
                    Some(Owner::Monitor) => {}
                }
            }
        }
        if host != shown {
            return Err(Violation::HostMisses(host, shown));
        }
        if taken != veiled {
            return Err(Violation::HostMisses(taken, veiled));
        }
        Ok(())
    }

    /// A VM's map and records: only its own pages, each once, in its RAM; its
    /// tables and spare tables are its table memory (I2, I3, I4).
    ///
    /// # Errors
    /// What does not hold.
    pub fn vm(&mut self, vm: &Vm) -> Result<(), Violation> {
        let slot = vm.slot;
        if vm.map.root == Pa(0) {
            // Never used.
            return if vm.exists() { Err(Violation::NoVm(slot)) } else { Ok(()) };
        }
        let before = self.found;
        let tables = self.walk(vm.map.root, Owner::Table(slot), |audit, ipa, entry, size| {
            if entry == Entry::LOST {
                return Ok(());
            }
            let pa = entry.address();
            let form = Violation::GuestLeaf(slot, ipa, entry);
            if size != PAGE_SIZE || ipa.0 >> vm.config().ipa_bits != 0 {
                return Err(form);
            }
            if entry == Entry::page(pa, Attributes::Device) {
                let permitted = vm.config().gic == 2 && !vm.is_ram(ipa);
                let ram = audit.pages.ram().page_index(pa).is_some();
                return if permitted && !ram { Ok(()) } else { Err(form) };
            }
            if entry != Entry::page(pa, Attributes::Memory) || !vm.is_ram(ipa) {
                return Err(form);
            }
            if audit.pages.owner(pa) != Some(Owner::Private(slot)) {
                return Err(Violation::GuestOwner(slot, ipa));
            }
            audit.found.private += 1;
            audit.take(pa)
        })?;
        self.found.table += tables;
        let mut next = vm.map.pool.head;
        for _ in 0..vm.map.pool_len() {
            let page = next.ok_or(Violation::PoolCount(slot))?;
            self.table(page, Owner::Table(slot))?;
            self.is_zero(page, 1)?;
            self.found.table += 1;
            let link = self.hw.read_entry(page, 0);
            next = (link != 0).then_some(Pa(link));
        }
        if next.is_some() {
            return Err(Violation::PoolCount(slot));
        }
        for vcpu in vm.vcpus.iter().filter(|vcpu| vcpu.exists) {
            let page = vcpu.run_page;
            if self.pages.owner(page) != Some(Owner::RunPage(slot)) {
                return Err(Violation::RunPage(slot, page));
            }
            self.found.run += 1;
            self.take(page)?;
        }
        if !vm.exists() && self.found != before {
            return Err(Violation::NoVm(slot));
        }
        Ok(())
    }

    /// After all VMs: no page of a VM is without use.
    ///
    /// # Errors
    /// What does not hold.
    pub fn finish(self) -> Result<(), Violation> {
        let mut records = Found::default();
        let mut census = Census::default();
        for bank in self.pages.ram().banks() {
            for at in (0..bank.size).step_by(index(PAGE_SIZE)) {
                match self.pages.owner(Pa(bank.base + at)) {
                    Some(Owner::Private(_)) => records.private += 1,
                    Some(Owner::Table(_)) => records.table += 1,
                    Some(Owner::RunPage(_)) => records.run += 1,
                    Some(Owner::Host) => census.host += 1,
                    Some(Owner::Monitor) | None => {}
                }
            }
        }
        if records != self.found {
            return Err(Violation::Lost(records, self.found));
        }
        census.host += records.run;
        census.private = records.private;
        census.table = records.table;
        if census != self.pages.census() {
            return Err(Violation::Census(census));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
