// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks all tables and compares them with the ownership records: what must
//! always hold (I1 to I4), for tests and debug builds. No page may be in motion
//! and no vCPU run meanwhile.

use havmsi_abi::layout::carveout_size;
use havmsi_abi::{MAX_VCPUS, PAGE_SIZE};

use crate::addr::{Ipa, Pa, index};
use crate::host_map::HostMap;
use crate::hw::Hardware;
use crate::page::{Census, Owner, Pages, VmSlot};
use crate::ram::Range;
use crate::stage2::{Attributes, ENTRIES, Entry, LEVEL1_SIZE, LEVEL2_SIZE, ROOT_ENTRIES};
use crate::vm::Vm;

/// What does not hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// The scratch memory is too small.
    Scratch,
    /// The page has no owner.
    Moving(Pa),
    /// A page of the carve-out is not the monitor's, or another one is.
    Carveout(Pa),
    /// A table, the zero frame or spare table memory is not its user's.
    TableOwner(Pa),
    /// This entry above level 3 is neither empty nor a table or block: table, index.
    TableForm(Pa, usize),
    /// The page has two uses.
    UsedTwice(Pa),
    /// The zero frame is not zero, or spare table memory is not.
    NotZero(Pa),
    /// This leaf of the host's map is of no permitted form.
    HostLeaf(Ipa, Entry),
    /// The host's map shows a page that is not the host's, or hides one that is.
    HostOwner(Ipa),
    /// This entry of the devices' stage-2 above level 3 is not what it was at boot,
    /// or the table that it leads to shows more than the block above it.
    DevicesEntry(Ipa, Entry),
    /// The host's map misses pages: the number of the host's, and of those mapped.
    HostMisses(u64, u64),
    /// This leaf of a VM's map is of no permitted form, or not in its RAM.
    GuestLeaf(VmSlot, Ipa, Entry),
    /// A VM's map shows a page that is not the VM's.
    GuestOwner(VmSlot, Ipa),
    /// A slot without a VM has pages, vCPUs or RAM, or the VM has another number.
    NoVm(VmSlot),
    /// The VM's ranges of RAM overlap or are malformed.
    Ranges(VmSlot),
    /// A vCPU counts as running, or more of them than there are.
    Running(VmSlot),
    /// Two vCPUs have this context, or it counts as free, or nobody has it.
    Context(usize),
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
    /// Memory that the host may use as well.
    pub shared: u64,
    /// Table memory.
    pub table: u64,
    /// Run pages.
    pub run: u64,
}

/// An audit under way: [`Self::host`] and [`Self::devices`], then [`Self::vm`] (and
/// [`Self::at_rest`]) for each slot, then [`Self::finish`].
pub struct Audit<'a, H: Hardware> {
    hw: &'a H,
    pages: &'a Pages<'a>,
    /// One bit a page of RAM: seen in use.
    seen: &'a mut [u64],
    /// One bit a context: of a vCPU.
    contexts: [u64; MAX_VCPUS / 64],
    found: Found,
    /// What the records say.
    records: Found,
    /// Pages of the host's, without run pages.
    host: u64,
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
        Ok(Self {
            hw,
            pages,
            seen: scratch,
            contexts: [0; MAX_VCPUS / 64],
            found: Found::default(),
            records: Found::default(),
            host: 0,
        })
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

    /// The table that entry `i` of `table` points to, if it does.
    fn next(
        &mut self,
        table: Pa,
        i: usize,
        entry: Entry,
        owner: Owner,
    ) -> Result<Option<Pa>, Violation> {
        if entry == Entry::INVALID || entry.is_block() {
            return Ok(None);
        }
        let next = entry.address();
        if entry != Entry::table(next) {
            return Err(Violation::TableForm(table, i));
        }
        self.table(next, owner)?;
        Ok(Some(next))
    }

    /// Counts the records: nothing is in motion, and of the monitor's is the
    /// carve-out at the start of RAM and nothing else (I1, I3).
    fn records(&mut self) -> Result<(), Violation> {
        let reserved = carveout_size(self.pages.ram().page_count() * PAGE_SIZE) / PAGE_SIZE;
        let mut n = 0;
        for bank in self.pages.ram().banks() {
            for at in (0..bank.size).step_by(index(PAGE_SIZE)) {
                let pa = Pa(bank.base + at);
                let owner = self.pages.numbered(index(n)).ok_or(Violation::Moving(pa))?;
                if (owner == Owner::Monitor) != (n < reserved) {
                    return Err(Violation::Carveout(pa));
                }
                match owner {
                    Owner::Monitor => {}
                    Owner::Host => self.host += 1,
                    Owner::RunPage(_) => self.records.run += 1,
                    Owner::Table(_) => self.records.table += 1,
                    Owner::Private(_) => self.records.private += 1,
                    Owner::Shared(_) => self.records.shared += 1,
                }
                n += 1;
            }
        }
        Ok(())
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
            let Some(level2) = self.next(root, i, entry, owner)? else { continue };
            tables += 1;
            for j in 0..ENTRIES {
                let at2 = at1 + j as u64 * LEVEL2_SIZE;
                let entry = Entry(self.hw.read_entry(level2, j));
                if entry.is_block() {
                    leaf(self, Ipa(at2), entry, LEVEL2_SIZE)?;
                }
                let Some(level3) = self.next(level2, j, entry, owner)? else { continue };
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

    /// The host's map: every page of the host is there and every page that a VM
    /// shares, every other page of a VM is hidden or the zero frame, nothing else is
    /// but devices, in pages or blocks (I1, I2, I3).
    ///
    /// # Errors
    /// What does not hold.
    pub fn host(&mut self, map: &HostMap) -> Result<(), Violation> {
        self.records()?;
        let zero = map.zero_frame();
        self.table(zero, Owner::Monitor)?;
        self.is_zero(zero, 0)?;
        let hidden = Entry::page(zero, Attributes::ReadOnly);
        let (mut shown, mut veiled) = (0, 0);
        self.walk(map.root(), Owner::Monitor, |audit, ipa, entry, size| {
            let owner = |at| audit.pages.owner(at);
            let pa = Pa(ipa.0);
            let form = |attributes| Entry::leaf(pa, size, attributes);
            let range = Range { base: pa.0, size };
            if entry == form(Attributes::Memory) {
                // All of it, or nothing, lies in one bank.
                let first = audit.pages.ram().page_index(pa).ok_or(Violation::HostOwner(ipa))?;
                for i in 0..index(size / PAGE_SIZE) {
                    let owner = audit.pages.numbered(first + i);
                    if !matches!(owner, Some(Owner::Host | Owner::RunPage(_) | Owner::Shared(_))) {
                        let at = ipa.0 + i as u64 * PAGE_SIZE;
                        return Err(Violation::HostOwner(Ipa(at)));
                    }
                }
                shown += size / PAGE_SIZE;
            } else if size == PAGE_SIZE && (entry == hidden || entry == Entry::HIDDEN) {
                if !matches!(owner(pa), Some(Owner::Table(_) | Owner::Private(_))) {
                    return Err(Violation::HostOwner(ipa));
                }
                veiled += 1;
            } else if ![form(Attributes::Device), form(Attributes::DeadDevice)].contains(&entry)
                || audit.pages.ram().banks().iter().any(|bank| bank.overlaps(&range))
            {
                return Err(Violation::HostLeaf(ipa, entry));
            }
            Ok(())
        })?;
        let host = self.host + self.records.run + self.records.shared;
        let taken = self.records.table + self.records.private;
        if host != shown {
            return Err(Violation::HostMisses(host, shown));
        }
        if taken != veiled {
            return Err(Violation::HostMisses(taken, veiled));
        }
        Ok(())
    }

    /// Ranges of RAM are within the address space and apart from each other.
    fn ranges(vm: &Vm) -> Result<(), Violation> {
        let space = Range { base: 0, size: 1 << vm.config.ipa_bits };
        let used = |range: &&Range| range.size != 0;
        let ranges = || vm.ram.iter().filter(used);
        let whole = |range: &Range| {
            Ipa(range.base | range.size).is_page() && space.contains(range.base, range.size)
        };
        let apart = ranges().enumerate().all(|(i, range)| {
            whole(range) && ranges().skip(i + 1).all(|other| !range.overlaps(other))
        });
        if apart { Ok(()) } else { Err(Violation::Ranges(vm.slot)) }
    }

    /// The devices' stage-2: the level 3 tables of the host's RAM, which
    /// [`Self::host`] has looked at where they are in use there, and nothing else.
    ///
    /// # Errors
    /// What does not hold.
    pub fn devices(&mut self, map: &HostMap) -> Result<(), Violation> {
        let root = map.devices_root();
        for page in [root, root.offset(PAGE_SIZE)] {
            self.table(page, Owner::Monitor)?;
        }
        for i in 0..ROOT_ENTRIES {
            let at1 = i as u64 * LEVEL1_SIZE;
            let entry = Entry(self.hw.read_entry(root, i));
            if entry == Entry::INVALID {
                continue;
            }
            if entry != Entry::table(entry.address()) {
                return Err(Violation::DevicesEntry(Ipa(at1), entry));
            }
            self.table(entry.address(), Owner::Monitor)?;
            for j in 0..ENTRIES {
                let at2 = Pa(at1 + j as u64 * LEVEL2_SIZE);
                let ipa = Ipa(at2.0);
                let entry = Entry(self.hw.read_entry(entry.address(), j));
                let level3 = if self.pages.owner(at2) == Some(Owner::Monitor) {
                    None
                } else {
                    map.level3_table(at2)
                };
                if entry != level3.map_or(Entry::INVALID, Entry::table) {
                    return Err(Violation::DevicesEntry(ipa, entry));
                }
                // Where the host has a block, the table shows the same.
                let Some(level3) = level3 else { continue };
                let block = map.lookup(self.hw, ipa).is_some_and(Entry::is_block);
                for k in 0..ENTRIES {
                    let page = Entry::page(at2.offset(k as u64 * PAGE_SIZE), Attributes::Memory);
                    if block && Entry(self.hw.read_entry(level3, k)) != page {
                        return Err(Violation::DevicesEntry(ipa, entry));
                    }
                }
            }
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
        let empty = vm.vcpu_count() == 0 && vm.ram.iter().all(|range| range.size == 0);
        if !(vm.exists() || empty) {
            return Err(Violation::NoVm(slot));
        }
        Self::ranges(vm)?;
        let before = self.found;
        let mut blocks = 0;
        let tables = self.walk(vm.map.root, Owner::Table(slot), |audit, ipa, entry, size| {
            let form = Violation::GuestLeaf(slot, ipa, entry);
            if let Some(version) = entry.gone_version() {
                let was = vm.is_ram(ipa) && size == PAGE_SIZE && version <= vm.seal.version;
                return if was { Ok(()) } else { Err(form) };
            }
            let pa = entry.address();
            if size == LEVEL1_SIZE || ipa.0 >> vm.config.ipa_bits != 0 {
                return Err(form);
            }
            if entry == Entry::page(pa, Attributes::Device) {
                let permitted = vm.config.gic == 2 && !vm.is_ram(ipa);
                let ram = audit.pages.ram().page_index(pa).is_some();
                return if permitted && !ram { Ok(()) } else { Err(form) };
            }
            let whole = pa.0.is_multiple_of(size) && vm.in_ram(ipa, size);
            if entry != Entry::leaf(pa, size, Attributes::Memory) || !whole {
                return Err(form);
            }
            for at in (0..size).step_by(index(PAGE_SIZE)) {
                match audit.pages.owner(pa.offset(at)) {
                    Some(Owner::Private(vm)) if vm == slot => audit.found.private += 1,
                    Some(Owner::Shared(vm)) if vm == slot => audit.found.shared += 1,
                    _ => return Err(Violation::GuestOwner(slot, Ipa(ipa.0 + at))),
                }
                audit.take(pa.offset(at))?;
            }
            blocks += u64::from(size != PAGE_SIZE);
            Ok(())
        })?;
        self.found.table += tables;
        let mut next = vm.map.pool.head;
        // One more for each block.
        for _ in 0..vm.map.pool_len() + blocks {
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

    /// The VM in `slot` runs nowhere, and each of its vCPUs has a context of its own.
    ///
    /// # Errors
    /// What does not hold.
    pub fn at_rest(&mut self, slot: VmSlot, vm: &Vm) -> Result<(), Violation> {
        if vm.slot != slot && vm.map.root != Pa(0) {
            return Err(Violation::NoVm(slot));
        }
        if vm.vcpus.iter().any(|vcpu| vcpu.running) {
            return Err(Violation::Running(slot));
        }
        for vcpu in vm.vcpus.iter().filter(|vcpu| vcpu.exists) {
            let context = usize::from(vcpu.context);
            let word = self.contexts.get_mut(context / 64).ok_or(Violation::Context(context))?;
            if *word & 1 << (context % 64) != 0 {
                return Err(Violation::Context(context));
            }
            *word |= 1 << (context % 64);
        }
        Ok(())
    }

    /// After [`Self::at_rest`] of all VMs: only their contexts are taken, a bit
    /// of `taken` each.
    ///
    /// # Errors
    /// [`Violation::Context`].
    pub fn contexts(&self, taken: &[u64; MAX_VCPUS / 64]) -> Result<(), Violation> {
        for (i, (taken, used)) in taken.iter().zip(&self.contexts).enumerate() {
            if taken != used {
                let bit = (taken ^ used).trailing_zeros();
                return Err(Violation::Context(i * 64 + index(u64::from(bit))));
            }
        }
        Ok(())
    }

    /// After all VMs: no page of a VM is without use.
    ///
    /// # Errors
    /// What does not hold.
    pub fn finish(self) -> Result<(), Violation> {
        if self.records != self.found {
            return Err(Violation::Lost(self.records, self.found));
        }
        let census = Census {
            host: self.host + self.records.run,
            private: self.records.private,
            shared: self.records.shared,
            table: self.records.table,
        };
        if census == self.pages.census() { Ok(()) } else { Err(Violation::Census(census)) }
    }
}

#[cfg(test)]
mod tests;
