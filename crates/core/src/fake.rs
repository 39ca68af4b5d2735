// SPDX-License-Identifier: MIT OR Apache-2.0
//! A machine for the tests: a little RAM, and TLBs that remember: the CPUs' and
//! the SMMU's, which share tables.
//!
//! A translation that was valid while its world could run may be in some TLB
//! until the matching invalidation. The fake keeps those as *stale* ones, and
//! stops the test at once when
//! - a valid entry replaces another without break-before-make,
//! - an entry becomes valid while a stale translation of its addresses is left,
//! - a page is wiped, hashed or used as a table while anything, stale or not,
//!   still translates to it (I3, I5, I6); what a guest shares (the host got it
//!   while the guest had it) the host may keep while it is wiped.

use core::hash::{BuildHasherDefault, Hasher};
use std::boxed::Box;
use std::collections::HashMap;
use std::sync::MutexGuard;
#[cfg(not(feature = "shuttle"))]
use std::sync::{Mutex, atomic::AtomicU16};
use std::vec::Vec;

use havmsi_abi::PAGE_SIZE;
use havmsi_abi::layout::carveout;
#[cfg(feature = "shuttle")]
use shuttle::sync::{Mutex, atomic::AtomicU16};

use crate::addr::{Ipa, Pa, index};
use crate::host_map::HostMap;
use crate::hw::Hardware;
use crate::page::{Pages, VmSlot};
use crate::ram::{Ram, Range};
use crate::stage2::Attributes;
use crate::stage2::{self, Entry, LEVEL1_SIZE, LEVEL2_SIZE};
use crate::vm::Machine;

/// What happened, in order, as far as tests look at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A table entry was written: table, index, value.
    Write(Pa, usize, u64),
    /// Host TLBs forgot so many bytes from an IPA on.
    InvalidateHost(Ipa, u64),
    /// The SMMU's TLB forgot them.
    InvalidateDevices(Ipa, u64),
    /// A guest's TLBs forgot them.
    InvalidateGuest(u64, Ipa, u64),
    /// A guest's TLBs forgot everything.
    InvalidateGuestAll(u64),
    /// Instruction caches forgot everything.
    InvalidateIcache,
    /// A page was cleaned and invalidated in the data caches.
    Flush(Pa),
    /// A page was zeroed.
    Zero(Pa),
}

/// A stage-2 that some CPU, or the SMMU, can use.
struct World {
    /// For the SMMU: the root alone, as for the host.
    vttbr: u64,
    /// CPUs that use it now.
    loaded: u32,
    /// It was loaded since its TLB entries were all removed.
    cached: bool,
}

#[derive(Clone, Copy)]
struct Table {
    vttbr: u64,
    level: u32,
    base: u64,
}

/// What a TLB may hold although the tables no longer say so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stale {
    /// Whose stage-2.
    pub vttbr: u64,
    /// What it translates: the first byte.
    pub ipa: u64,
    /// And how many.
    pub size: u64,
    /// Where it leads: a page, a block, or (walk caches) the next table.
    pub to: u64,
    /// The size of that.
    pub to_size: u64,
}

/// Hashes a page's address: the standard hasher takes most of the tests' time.
#[derive(Clone, Copy, Default)]
pub struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (n >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type PageMap<T> = HashMap<u64, T, BuildHasherDefault<PageHasher>>;
/// Pages that are not all zero.
pub type Memory = PageMap<Box<[u64; 512]>>;

#[derive(Default)]
struct State {
    memory: Memory,
    events: Vec<Event>,
    worlds: Vec<World>,
    /// The tables of CPUs, and of the SMMU.
    tables: [PageMap<Table>; 2],
    /// Root of the SMMU's.
    devices: Option<u64>,
    /// How many leaves at level 3 lead to a page, and all others: so that no walk
    /// is needed to see that a page is unused.
    leaves: PageMap<u32>,
    blocks: Vec<(u64, u64)>,
    /// How many leaves of guests lead to a page.
    guest_leaves: PageMap<u32>,
    /// Pages that the host got while a guest had them, and that were not wiped or
    /// flushed since.
    shared: PageMap<()>,
    /// Table entries read and written, so that an endless loop ends.
    accesses: u64,
    stale: Vec<Stale>,
}

/// More than any test needs.
const MAX_ACCESSES: u64 = 1 << 24;

const fn entry_size(level: u32) -> u64 {
    match level {
        1 => LEVEL1_SIZE,
        2 => LEVEL2_SIZE,
        _ => PAGE_SIZE,
    }
}

impl Table {
    /// The addresses that entry `i` of this table translates.
    fn entry(&self, i: usize) -> (u64, u64) {
        let size = entry_size(self.level);
        (self.base + i as u64 * size, size)
    }

    fn is_pointer(&self, entry: Entry) -> bool {
        self.level < 3 && entry.is_valid() && !entry.is_block()
    }
}

/// The host and its devices have VMID 0.
fn is_guest(vttbr: u64) -> bool {
    vttbr >> 48 != 0
}

/// One leaf less; whether it was counted.
fn decrement(leaves: &mut PageMap<u32>, to: u64) -> bool {
    let Some(count) = leaves.get_mut(&to) else { return false };
    *count -= 1;
    if *count == 0 {
        leaves.remove(&to);
    }
    true
}

fn split(table: Pa, i: usize) -> (u64, usize) {
    (table.0 + (i / 512) as u64 * PAGE_SIZE, i % 512)
}

impl State {
    fn count_access(&mut self) {
        self.accesses += 1;
        assert!(self.accesses < MAX_ACCESSES, "table accesses without end");
    }

    fn get(&self, page: u64, i: usize) -> u64 {
        self.memory.get(&page).map_or(0, |p| p[i])
    }

    fn entries(&self, page: u64) -> Vec<(usize, Entry)> {
        let Some(words) = self.memory.get(&page) else { return Vec::new() };
        words.iter().map(|w| Entry(*w)).enumerate().filter(|(_, e)| e.is_valid()).collect()
    }

    fn tables(&mut self, vttbr: u64) -> &mut PageMap<Table> {
        &mut self.tables[usize::from(self.devices == Some(vttbr))]
    }

    fn add_table(&mut self, page: u64, table: Table) {
        assert!(
            self.tables(table.vttbr).insert(page, table).is_none(),
            "table {page:#x} is linked twice"
        );
        for (i, entry) in self.entries(page) {
            if table.is_pointer(entry) {
                let (base, _) = table.entry(i);
                self.add_table(entry.address().0, Table { level: table.level + 1, base, ..table });
            } else {
                self.add_leaf(table, entry);
            }
        }
    }

    fn add_leaf(&mut self, table: Table, entry: Entry) {
        let to = entry.address().0;
        if is_guest(table.vttbr) {
            *self.guest_leaves.entry(to).or_default() += 1;
            // The host has it, and goes on having it.
            if self.leaves.contains_key(&to)
                || self.blocks.iter().any(|(at, size)| *at <= to && to - at < *size)
            {
                self.shared.insert(to, ());
            }
        } else if self.guest_leaves.contains_key(&to) {
            self.shared.insert(to, ());
        }
        match entry_size(table.level) {
            PAGE_SIZE => *self.leaves.entry(to).or_default() += 1,
            size => self.blocks.push((to, size)),
        }
    }

    fn remove_leaf(&mut self, table: Table, entry: Entry) {
        let to = entry.address().0;
        if is_guest(table.vttbr) {
            decrement(&mut self.guest_leaves, to);
        }
        let page = table.level == 3 && decrement(&mut self.leaves, to);
        if !page && let Some(at) = self.blocks.iter().position(|b| b.0 == to) {
            self.blocks.swap_remove(at);
        }
    }

    /// The entry is no longer reachable: TLBs may remember it and all below.
    fn forget(&mut self, table: Table, i: usize, entry: Entry) {
        let (ipa, size) = table.entry(i);
        let to = entry.address().0;
        let pointer = table.is_pointer(entry);
        if !pointer {
            self.remove_leaf(table, entry);
        }
        if self.world(table.vttbr).cached {
            let to_size = if pointer { PAGE_SIZE } else { size };
            self.stale.push(Stale { vttbr: table.vttbr, ipa, size, to, to_size });
        }
        if pointer && let Some(next) = self.tables(table.vttbr).remove(&to) {
            for (i, entry) in self.entries(to) {
                self.forget(next, i, entry);
            }
        }
    }

    fn world(&mut self, vttbr: u64) -> &mut World {
        self.worlds.iter_mut().find(|w| w.vttbr == vttbr).expect("an unknown VTTBR_EL2")
    }

    /// Nothing may translate to `page` or walk through it.
    fn check_unused(&self, page: u64, what: &str) {
        self.check_unused_by(|_| true, page, what);
    }

    /// Nothing of `worlds` may translate to `page`, and nothing walk through it.
    fn check_unused_by(&self, worlds: impl Fn(u64) -> bool, page: u64, what: &str) {
        let mut tables = self.tables.iter();
        assert!(!tables.any(|t| t.contains_key(&page)), "{what} {page:#x}: a table in use");
        let at_page = |s: &&Stale| worlds(s.vttbr) && s.to <= page && page - s.to < s.to_size;
        if let Some(stale) = self.stale.iter().find(at_page) {
            panic!("{what} {page:#x}: a TLB still knows it: {stale:x?}");
        }
        let block = self.blocks.iter().any(|(to, size)| *to <= page && page - to < *size);
        if !block && !self.leaves.contains_key(&page) {
            return;
        }
        for (at, table) in self.tables.iter().flatten().filter(|(_, t)| worlds(t.vttbr)) {
            for (i, entry) in self.entries(*at) {
                let (ipa, size) = table.entry(i);
                let to = entry.address().0;
                let hit = !table.is_pointer(entry) && to <= page && page - to < size;
                assert!(!hit, "{what} {page:#x}: mapped in {:#x} at {ipa:#x}", table.vttbr);
            }
        }
    }

    fn write(&mut self, table: Pa, i: usize, value: u64) {
        let (page, slot) = split(table, i);
        let (old, new) = (Entry(self.get(page, slot)), Entry(value));
        self.memory.entry(page).or_insert_with(|| Box::new([0; 512]))[slot] = value;
        let tables = self.tables.each_ref().map(|t| t.get(&page).copied());
        if tables.iter().all(Option::is_none) {
            self.check_unused(page, "write to");
        }
        for table in tables.into_iter().flatten() {
            self.change(table, slot, old, new);
        }
    }

    /// An entry of a stage-2 changed.
    fn change(&mut self, table: Table, slot: usize, old: Entry, new: Entry) {
        let (ipa, size) = table.entry(slot);
        if old.is_valid() && old != new {
            assert!(
                !new.is_valid() || !self.world(table.vttbr).cached,
                "no break before make at {ipa:#x} of {:#x}",
                table.vttbr
            );
            self.forget(table, slot, old);
        }
        if new.is_valid() && old != new {
            let overlap =
                |s: &&Stale| s.vttbr == table.vttbr && s.ipa < ipa + size && ipa < s.ipa + s.size;
            if let Some(stale) = self.stale.iter().find(overlap) {
                panic!("{ipa:#x} becomes valid before a TLB forgot {stale:x?}");
            }
            if table.is_pointer(new) {
                let next = Table { level: table.level + 1, base: ipa, ..table };
                self.add_table(new.address().0, next);
            } else {
                self.add_leaf(table, new);
            }
        }
    }

    /// What is remembered of `size` bytes from `ipa` on in these worlds is forgotten.
    fn invalidate(&mut self, Ipa(ipa): Ipa, size: u64, worlds: impl Fn(&Self, u64) -> bool) {
        let apart = |s: &Stale| ipa + size <= s.ipa || ipa >= s.ipa + s.size;
        let mut stale = std::mem::take(&mut self.stale);
        stale.retain(|s| !worlds(self, s.vttbr) || apart(s));
        self.stale = stale;
    }
}

/// Memory, TLBs, and what happened.
#[derive(Default)]
pub struct FakeHardware {
    state: std::sync::Mutex<State>,
    /// Whether another CPU may go on at each access: `schedules/`.
    #[cfg(feature = "shuttle")]
    pub crowded: (std::sync::atomic::AtomicBool, shuttle::sync::atomic::AtomicBool),
}

impl FakeHardware {
    fn state(&self) -> MutexGuard<'_, State> {
        #[cfg(feature = "shuttle")]
        if self.crowded.0.load(std::sync::atomic::Ordering::Relaxed) {
            self.crowded.1.load(std::sync::atomic::Ordering::Relaxed);
        }
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// From now on the stage-2 with this `VTTBR_EL2` is watched.
    pub fn watch(&self, vttbr: u64) {
        let mut state = self.state();
        state.worlds.push(World { vttbr, loaded: 0, cached: false });
        let root = vttbr & 0xffff_ffff_f000;
        for (page, base) in [(root, 0), (root + PAGE_SIZE, 512 * LEVEL1_SIZE)] {
            state.add_table(page, Table { vttbr, level: 1, base });
        }
    }

    /// From now on devices use the stage-2 with this root.
    pub fn watch_devices(&self, root: Pa) {
        self.state().devices = Some(root.0);
        self.watch(root.0);
        self.load(root.0);
    }

    /// A CPU uses this stage-2.
    pub fn load(&self, vttbr: u64) {
        let mut state = self.state();
        let world = state.world(vttbr);
        world.loaded += 1;
        world.cached = true;
    }

    /// A CPU no longer uses this stage-2.
    pub fn unload(&self, vttbr: u64) {
        self.state().world(vttbr).loaded -= 1;
    }

    /// What TLBs may still hold.
    pub fn stale(&self) -> Vec<Stale> {
        self.state().stale.clone()
    }

    /// Writes one word, as the owner of the page would.
    pub fn poke(&self, page: Pa, index: usize, value: u64) {
        let mut state = self.state();
        state.memory.entry(page.0).or_insert_with(|| Box::new([0; 512]))[index] = value;
    }

    /// Reads one word.
    pub fn peek(&self, page: Pa, index: usize) -> u64 {
        let (page, slot) = split(page, index);
        self.state().get(page, slot)
    }

    /// Whether a page holds nothing.
    pub fn is_zero(&self, page: Pa) -> bool {
        self.state().memory.get(&page.0).is_none_or(|p| p.iter().all(|w| *w == 0))
    }

    /// Pages that are not all zero.
    pub fn snapshot(&self) -> Memory {
        let mut memory = self.state().memory.clone();
        memory.retain(|_, p| p.iter().any(|w| *w != 0));
        memory
    }

    /// Table entries read and written so far.
    pub fn accesses(&self) -> u64 {
        self.state().accesses
    }

    /// What happened since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }
}

impl Hardware for FakeHardware {
    fn read_entry(&self, table: Pa, index: usize) -> u64 {
        self.state().count_access();
        self.peek(table, index)
    }

    fn write_entry(&self, table: Pa, index: usize, value: u64) {
        let mut state = self.state();
        state.count_access();
        state.write(table, index, value);
        state.events.push(Event::Write(table, index, value));
    }

    fn zero_page(&self, page: Pa) {
        let mut state = self.state();
        let shared = state.shared.remove(&page.0).is_some();
        state.check_unused_by(|world| is_guest(world) || !shared, page.0, "wipe of");
        state.memory.remove(&page.0);
        state.events.push(Event::Zero(page));
    }

    /// What a guest shared it goes on using.
    fn flush_page(&self, page: Pa) {
        let mut state = self.state();
        let shared = state.shared.remove(&page.0).is_some();
        state.check_unused_by(|world| !is_guest(world) || !shared, page.0, "flush of");
        state.events.push(Event::Flush(page));
    }

    fn invalidate_icache(&self) {
        self.state().events.push(Event::InvalidateIcache);
    }

    fn invalidate_host(&self, ipa: Ipa, size: u64) {
        let mut state = self.state();
        let host = |state: &State, world| !is_guest(world) && state.devices != Some(world);
        state.invalidate(ipa, size, host);
        state.events.push(Event::InvalidateHost(ipa, size));
    }

    fn invalidate_devices(&self, ipa: Ipa, size: u64) {
        let mut state = self.state();
        state.invalidate(ipa, size, |state, world| state.devices == Some(world));
        state.events.push(Event::InvalidateDevices(ipa, size));
    }

    fn invalidate_guest(&self, vttbr: u64, ipa: Ipa, size: u64) {
        let mut state = self.state();
        state.invalidate(ipa, size, |_, world| world == vttbr);
        state.events.push(Event::InvalidateGuest(vttbr, ipa, size));
    }

    fn invalidate_guest_all(&self, vttbr: u64) {
        let mut state = self.state();
        state.stale.retain(|s| s.vttbr != vttbr);
        let world = state.world(vttbr);
        world.cached = world.loaded != 0;
        state.events.push(Event::InvalidateGuestAll(vttbr));
    }
}

/// First byte of RAM.
pub const BASE: u64 = 0x4000_0000;
/// Bytes of the carve-out.
pub const CARVEOUT: u64 = 4 << 20;
/// The second bank.
pub const BANK2: u64 = 0x8_8000_0000;
/// Pages in both banks.
pub const PAGES: usize = 2560;
/// The host's only device.
pub const UART: u64 = 0x900_0000;

/// 6 MiB with a carve-out of 4, and 4 MiB far away.
pub fn ram() -> Ram {
    Ram::new([Range { base: BASE, size: 6 << 20 }, Range { base: BANK2, size: 4 << 20 }])
}

/// Ownership records for [`ram`].
pub fn records() -> Vec<AtomicU16> {
    (0..PAGES).map(|_| AtomicU16::new(0)).collect()
}

/// The host's page number `n`: even ones in the first bank, odd ones in the second.
pub fn host_page(n: u64) -> Pa {
    if n.is_multiple_of(2) {
        Pa(BASE + CARVEOUT + n / 2 * PAGE_SIZE)
    } else {
        Pa(BANK2 + n / 2 * PAGE_SIZE)
    }
}

/// The root of a VM's stage-2.
pub fn root(slot: VmSlot) -> Pa {
    Pa(BASE + carveout::VM_ROOTS + u64::from(slot.0) * 2 * PAGE_SIZE)
}

/// A machine whose host runs.
pub struct FakeMachine<'a> {
    /// The hardware.
    pub hw: FakeHardware,
    /// The ownership records.
    pub pages: Pages<'a>,
    /// The host's map.
    pub host: Mutex<HostMap>,
    /// What keys are made from.
    pub secret: Option<[u8; 32]>,
}

impl<'a> FakeMachine<'a> {
    /// All of [`ram`] but the carve-out is the host's.
    pub fn new(records: &'a [AtomicU16]) -> Self {
        Self::with_ram(records, ram(), CARVEOUT)
    }

    /// The same with other RAM, whose first bank starts at [`BASE`].
    pub fn with_ram(records: &'a [AtomicU16], ram: Ram, carveout: u64) -> Self {
        let hw = FakeHardware::default();
        let pages = Pages::new(ram, records).expect("enough records");
        let uart = (Range { base: UART, size: PAGE_SIZE }, Attributes::Device);
        let host = HostMap::new(&hw, ram, carveout, core::iter::once(uart)).expect("a map");
        for (i, bank) in ram.banks().iter().enumerate() {
            let skip = if i == 0 { carveout } else { 0 };
            for at in (skip..bank.size).step_by(index(PAGE_SIZE)) {
                pages.give_to_host(Pa(bank.base + at));
            }
        }
        hw.watch(host.root().0);
        hw.load(host.root().0);
        hw.watch_devices(host.devices_root());
        for slot in 0..3 {
            hw.watch(stage2::vttbr(root(VmSlot(slot)), VmSlot(slot).vmid()));
        }
        hw.take_events();
        Self { hw, pages, host: Mutex::new(host), secret: Some([7; 32]) }
    }

    /// The host's leaf for a page.
    pub fn host_leaf(&self, pa: Pa) -> Option<Entry> {
        self.with_host_map(|map| map.lookup(&self.hw, Ipa(pa.0)))
    }

    /// Whether the host can use a page, alone or as part of a block.
    pub fn host_has(&self, pa: Pa) -> bool {
        let block = Pa(pa.0 / LEVEL2_SIZE * LEVEL2_SIZE);
        let leaves = [(pa, PAGE_SIZE), (block, LEVEL2_SIZE)]
            .map(|(pa, size)| Some(Entry::leaf(pa, size, stage2::Attributes::Memory)));
        leaves.contains(&self.host_leaf(pa))
    }
}

impl Machine for FakeMachine<'_> {
    type Hw = FakeHardware;
    fn hw(&self) -> &FakeHardware {
        &self.hw
    }
    fn pages(&self) -> &Pages<'_> {
        &self.pages
    }
    fn secret(&self) -> Option<&[u8; 32]> {
        self.secret.as_ref()
    }
    fn with_host_map<R>(&self, f: impl FnOnce(&mut HostMap) -> R) -> R {
        f(&mut self.host.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// The fake stops a test that does what it must not.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage2::Attributes;

    const VTTBR: u64 = 1 << 48 | (BASE + carveout::VM_ROOTS);
    const LEVEL2: Pa = Pa(BASE + CARVEOUT);
    const LEVEL3: Pa = Pa(BASE + CARVEOUT + 0x1000);
    const PAGE: Pa = Pa(BASE + CARVEOUT + 0x2000);

    /// A guest with one page, running.
    fn guest() -> FakeHardware {
        let hw = FakeHardware::default();
        hw.watch(VTTBR);
        hw.write_entry(LEVEL3, 7, Entry::page(PAGE, Attributes::Memory).0);
        hw.write_entry(LEVEL2, 0, Entry::table(LEVEL3).0);
        hw.write_entry(Pa(VTTBR & 0xffff_ffff_f000), 0, Entry::table(LEVEL2).0);
        hw.load(VTTBR);
        hw
    }

    #[test]
    fn translations_stay_until_the_matching_invalidation() {
        let hw = guest();
        hw.write_entry(LEVEL3, 7, 0);
        assert_eq!(hw.stale().len(), 1);
        hw.invalidate_guest(VTTBR, Ipa(0x6000), PAGE_SIZE);
        hw.invalidate_guest(VTTBR, Ipa(0x8000), PAGE_SIZE);
        hw.invalidate_guest(2 << 48 | VTTBR, Ipa(0x7000), PAGE_SIZE);
        hw.invalidate_host(Ipa(0x7000), PAGE_SIZE);
        assert_eq!(hw.stale().len(), 1);
        hw.invalidate_guest(VTTBR, Ipa(0x6000), 2 * PAGE_SIZE);
        assert_eq!(hw.stale(), Vec::new());
        hw.zero_page(PAGE);
    }

    #[test]
    fn an_unlinked_table_leaves_all_below_it() {
        let hw = guest();
        hw.write_entry(LEVEL2, 0, 0);
        assert_eq!(hw.stale().len(), 2);
        hw.invalidate_guest_all(VTTBR);
        assert_eq!(hw.stale(), Vec::new());
        hw.zero_page(LEVEL3);
    }

    /// A level 3 table that the host and devices share: what one forgets, the
    /// other may still hold.
    fn shared_table() -> FakeHardware {
        let hw = FakeHardware::default();
        let roots = [BASE + carveout::HOST_ROOT, BASE + carveout::SMMU_ROOT];
        hw.write_entry(LEVEL3, 7, Entry::page(PAGE, Attributes::Memory).0);
        for (root, level2) in roots.into_iter().zip([LEVEL2, LEVEL2.offset(0x10_0000)]) {
            hw.write_entry(level2, 0, Entry::table(LEVEL3).0);
            hw.write_entry(Pa(root), 0, Entry::table(level2).0);
        }
        hw.watch(roots[0]);
        hw.load(roots[0]);
        hw.watch_devices(Pa(roots[1]));
        hw
    }

    #[test]
    fn a_shared_table_leaves_two_translations() {
        let hw = shared_table();
        hw.write_entry(LEVEL3, 7, 0);
        assert_eq!(hw.stale().len(), 2);
        hw.invalidate_host(Ipa(0x7000), PAGE_SIZE);
        assert_eq!(hw.stale().len(), 1);
        hw.invalidate_devices(Ipa(0x6000), PAGE_SIZE);
        assert_eq!(hw.stale().len(), 1);
        hw.invalidate_devices(Ipa(0x7000), PAGE_SIZE);
        assert_eq!(hw.stale(), Vec::new());
        hw.zero_page(PAGE);
    }

    #[test]
    #[should_panic(expected = "a TLB still knows it")]
    fn a_page_that_the_smmu_still_knows_is_seen() {
        let hw = shared_table();
        hw.write_entry(LEVEL3, 7, 0);
        hw.invalidate_host(Ipa(0x7000), PAGE_SIZE);
        hw.zero_page(PAGE);
    }

    #[test]
    #[should_panic(expected = "a TLB still knows it")]
    fn a_page_wiped_before_the_invalidation_is_seen() {
        let hw = guest();
        hw.write_entry(LEVEL3, 7, 0);
        hw.zero_page(PAGE);
    }

    #[test]
    #[should_panic(expected = "mapped in")]
    fn a_page_hashed_while_mapped_is_seen() {
        guest().flush_page(PAGE);
    }

    #[test]
    #[should_panic(expected = "no break before make")]
    fn a_replaced_entry_is_seen() {
        guest().write_entry(LEVEL3, 7, Entry::page(LEVEL2, Attributes::Memory).0);
    }

    #[test]
    #[should_panic(expected = "becomes valid before")]
    fn a_missing_invalidation_is_seen() {
        let hw = guest();
        hw.write_entry(LEVEL3, 7, 0);
        hw.write_entry(LEVEL3, 7, Entry::page(PAGE, Attributes::Memory).0);
    }

    #[test]
    #[should_panic(expected = "a table in use")]
    fn a_wiped_table_is_seen() {
        guest().zero_page(LEVEL3);
    }

    #[test]
    #[should_panic(expected = "linked twice")]
    fn a_table_with_two_places_is_seen() {
        guest().write_entry(LEVEL2, 1, Entry::table(LEVEL3).0);
    }
}
