// SPDX-License-Identifier: MIT OR Apache-2.0
use core::sync::atomic::AtomicU16;
use std::vec::Vec;
use std::{iter, vec};

use havmsi_abi::layout::carveout_size;

use super::*;
use crate::fake::{
    BANK2, BASE, CARVEOUT, Event, FakeHardware, FakeMachine, UART, host_page, records,
};
use crate::page::VmSlot;
use crate::vm::Machine as _;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn range(base: u64, size: u64) -> Range {
    Range { base, size }
}

fn one_bank(size: u64) -> Ram {
    Ram::new([range(BASE, size), Range::default()])
}

fn build(hw: &impl Hardware, ram: Ram, devices: &[Range]) -> Result<HostMap, Error> {
    let size = carveout_size(ram.page_count() * PAGE_SIZE);
    HostMap::new(hw, ram, size, devices.iter().map(|d| (*d, Attributes::Device)))
}

/// The entry at each level for an address.
fn walk(hw: &FakeHardware, map: &HostMap, at: u64) -> Vec<Entry> {
    walk_from(hw, map.root(), at)
}

fn walk_from(hw: &FakeHardware, root: Pa, at: u64) -> Vec<Entry> {
    let mut table = root;
    let ipa = Ipa(at);
    let mut path = vec![];
    for slot in [level1_index(ipa), level2_index(ipa), level3_index(ipa)] {
        let entry = Entry(hw.read_entry(table, slot));
        path.push(entry);
        if !entry.is_valid() || entry.is_block() {
            break;
        }
        table = entry.address();
    }
    path
}

#[test]
fn the_host_sees_its_ram_and_devices_only() {
    let hw = FakeHardware::default();
    let windows = [range(0x900_0000, PAGE_SIZE), range(0x800_0000, 0x1_0000)];
    let map = build(&hw, one_bank(16 * MIB), &windows).unwrap();
    assert_eq!(map.root(), Pa(BASE + 0x2000));
    let look = |at| map.lookup(&hw, Ipa(at));
    let block = Entry::block(Pa(BASE + 4 * MIB), Attributes::Memory);
    for unmapped in [
        0,
        BASE - 1,
        BASE,
        BASE + 4 * MIB - 1,
        BASE + 16 * MIB,
        0x7ff_f000,
        0x801_0000,
        0x900_1000,
        BASE + GIB,
        1 << 40,
        (1 << 40) + BASE + 4 * MIB,
        u64::MAX,
    ] {
        assert_eq!(look(unmapped), None, "{unmapped:#x}");
    }
    assert_eq!(look(BASE + 4 * MIB), Some(block));
    assert_eq!(look(BASE + 6 * MIB - 1), Some(block));
    assert!(look(BASE + 16 * MIB - 1).is_some());
    for device in [0x900_0000, 0x800_0000, 0x800_f000] {
        assert_eq!(look(device), Some(Entry::page(Pa(device), Attributes::Device)));
    }
}

#[test]
fn large_ram_is_mapped_in_gib_blocks_where_it_can() {
    let hw = FakeHardware::default();
    let ram =
        Ram::new([range(BASE, 2 * GIB + 16 * MIB), range(BANK2 + 512 * MIB, GIB + 512 * MIB)]);
    let map = build(&hw, ram, &[]).unwrap();
    let carveout = carveout_size(ram.page_count() * PAGE_SIZE);
    let levels = |at| walk(&hw, &map, at).len();
    let leaf = |at: u64, size: u64| {
        let block = Entry::block(Pa(at / size * size), Attributes::Memory);
        assert_eq!(map.lookup(&hw, Ipa(at)), Some(block), "{at:#x}");
    };
    assert_eq!(levels(BASE + carveout), 2);
    leaf(BASE + carveout, 2 * MIB);
    leaf(BASE + GIB - 1, 2 * MIB);
    assert_eq!(levels(BASE + GIB), 1);
    leaf(BASE + 2 * GIB - 1, GIB);
    leaf(BASE + 2 * GIB, 2 * MIB);
    assert_eq!(map.lookup(&hw, Ipa(BASE + 2 * GIB + 16 * MIB)), None);
    assert_eq!(map.lookup(&hw, Ipa(BANK2 + 512 * MIB - 1)), None);
    leaf(BANK2 + 512 * MIB, 2 * MIB);
    leaf(BANK2 + GIB, GIB);
    leaf(BANK2 + 2 * GIB - 1, GIB);
    assert_eq!(map.lookup(&hw, Ipa(BANK2 + 2 * GIB)), None);
    // All tables differ, and lie in the carve-out behind the roots.
    let mut tables = vec![];
    for at in [BASE, BASE + GIB, BASE + 2 * GIB, BANK2 + 512 * MIB, BANK2 + GIB] {
        tables.push(map.level2_table(LEVEL2_TABLES, Pa(at)).unwrap());
        tables.push(map.level3_table(Pa(at)).unwrap());
    }
    tables.push(map.level3_table(Pa(BANK2 + 2 * GIB - 1)).unwrap());
    tables.push(map.level2_table(SMMU_LEVEL2_TABLES, Pa(BASE)).unwrap());
    tables.push(map.level2_table(SMMU_LEVEL2_TABLES, Pa(BANK2 + GIB)).unwrap());
    tables.sort_unstable();
    tables.dedup();
    assert_eq!(tables.len(), 13);
    assert!(tables.iter().all(|t| t.0 >= BASE + carveout::LEVEL2_TABLES));
    assert!(tables.iter().all(|t| t.0 < BASE + carveout));
    assert_eq!(map.level2_table(LEVEL2_TABLES, Pa(BASE - 1)), None);
    assert_eq!(map.level3_table(Pa(BASE - 1)), None);
}

/// Tables that nobody looks at: the fake's memory would take all of the build machine's.
struct Nowhere;

impl Hardware for Nowhere {
    fn read_entry(&self, _table: Pa, _index: usize) -> u64 {
        0
    }
    fn write_entry(&self, _table: Pa, _index: usize, _value: u64) {}
    fn zero_page(&self, _page: Pa) {}
    fn flush_page(&self, _page: Pa) {}
    fn invalidate_icache(&self) {}
    fn invalidate_host(&self, _ipa: Ipa, _size: u64) {}
    fn invalidate_devices(&self, _ipa: Ipa, _size: u64) {}
    fn invalidate_guest(&self, _vttbr: u64, _ipa: Ipa, _size: u64) {}
    fn invalidate_guest_all(&self, _vttbr: u64) {}
}

#[test]
fn a_platform_that_tables_cannot_hold_is_refused() {
    let hw = Nowhere;
    let none = Range::default();
    let bad = |banks| build(&hw, Ram::new(banks), &[]).err();
    assert_eq!(bad([range(BASE + MIB, 16 * MIB), none]), Some(Error::Invalid));
    assert_eq!(bad([range(BASE, 17 * MIB), none]), Some(Error::Invalid));
    assert_eq!(bad([range(BASE, 16 * MIB), range(BANK2 + MIB, 2 * MIB)]), Some(Error::Invalid));
    assert_eq!(bad([range(BASE, 16 * MIB), range(BANK2, MIB)]), Some(Error::Invalid));
    assert_eq!(bad([range(BASE, 16 * MIB), range(1 << 40, 2 * MIB)]), Some(Error::Invalid));
    let last = range((1 << 40) - 2 * MIB, 2 * MIB);
    assert_eq!(bad([range(BASE, 16 * MIB), last]), None);
    let wraps = range(u64::MAX - 2 * MIB + 1, 4 * MIB);
    assert_eq!(bad([range(BASE, 16 * MIB), wraps]), Some(Error::Invalid));
    assert_eq!(bad([none, range(BANK2, 16 * MIB)]), Some(Error::Invalid));
    // 32 level 2 tables a bank: 32 GiB, wherever they are.
    assert_eq!(bad([range(0, 32 * GIB), none]), None);
    assert_eq!(bad([range(0, 33 * GIB), none]), Some(Error::Invalid));
    assert_eq!(bad([range(BASE, 2 * GIB), range(BANK2, 32 * GIB)]), None);
    assert_eq!(bad([range(BASE, 2 * GIB), range(BANK2, 33 * GIB)]), Some(Error::Invalid));
    // Two banks in one GiB.
    assert_eq!(bad([range(0, 16 * MIB), range(512 * MIB, 16 * MIB)]), Some(Error::Invalid));
    assert_eq!(bad([range(GIB, 16 * MIB), range(512 * MIB, GIB)]), Some(Error::Invalid));
    assert_eq!(bad([range(512 * MIB, GIB), range(GIB + 512 * MIB, GIB)]), Some(Error::Invalid));
    assert_eq!(bad([range(512 * MIB, GIB), range(2 * GIB, GIB)]), None);
    assert_eq!(bad([range(2 * GIB, GIB), range(512 * MIB, GIB)]), None);
    for carveout in [0, 2 * MIB, 4 * MIB + PAGE_SIZE, 18 * MIB] {
        let map = HostMap::new(&hw, one_bank(16 * MIB), carveout, iter::empty());
        assert_eq!(map.err(), Some(Error::Invalid), "{carveout:#x}");
    }
    assert!(HostMap::new(&hw, one_bank(16 * MIB), 16 * MIB, iter::empty()).is_ok());
}

#[test]
fn a_device_window_never_lies_in_ram() {
    let bad = |window| build(&FakeHardware::default(), one_bank(16 * MIB), &[window]).err();
    let invalid = Some(Error::Invalid);
    assert_eq!(bad(range(BASE, PAGE_SIZE)), invalid);
    assert_eq!(bad(range(BASE + 16 * MIB - PAGE_SIZE, PAGE_SIZE)), invalid);
    assert_eq!(bad(range(BASE - PAGE_SIZE, 2 * PAGE_SIZE)), invalid);
    assert_eq!(bad(range(0x900_0800, PAGE_SIZE)), invalid);
    assert_eq!(bad(range(0x900_0000, 0x800)), invalid);
    assert_eq!(bad(range((1 << 40) - PAGE_SIZE, 2 * PAGE_SIZE)), invalid);
    assert_eq!(bad(range(1 << 40, PAGE_SIZE)), invalid);
    assert_eq!(bad(range((1 << 40) - PAGE_SIZE, PAGE_SIZE)), None);
    assert_eq!(bad(range(BASE + 16 * MIB, PAGE_SIZE)), None);
    assert_eq!(bad(range(BASE - PAGE_SIZE, PAGE_SIZE)), None);
    assert_eq!(bad(range(u64::MAX - PAGE_SIZE + 1, PAGE_SIZE)), invalid);
}

#[test]
fn device_windows_take_blocks_where_they_can() {
    let hw = FakeHardware::default();
    let at = 0x1000_0000;
    let window = range(at - PAGE_SIZE, 4 * MIB + 2 * PAGE_SIZE);
    let map = build(&hw, one_bank(16 * MIB), &[window]).unwrap();
    for (at, size) in [
        (at - PAGE_SIZE, PAGE_SIZE),
        (at, 2 * MIB),
        (at + 2 * MIB, 2 * MIB),
        (at + 4 * MIB, PAGE_SIZE),
    ] {
        let leaf = if size == PAGE_SIZE {
            Entry::page(Pa(at), Attributes::Device)
        } else {
            Entry::block(Pa(at), Attributes::Device)
        };
        assert_eq!(map.lookup(&hw, Ipa(at)), Some(leaf));
        assert_eq!(map.lookup(&hw, Ipa(at + size - 1)), Some(leaf));
    }
    assert_eq!(map.lookup(&hw, Ipa(at - PAGE_SIZE - 1)), None);
    assert_eq!(map.lookup(&hw, Ipa(at + 4 * MIB + PAGE_SIZE)), None);
    // A level 2 table and two of level 3; there are 28.
    let pages = |count: u64| {
        let windows = (0..count).map(|i| range(i * 2 * MIB, PAGE_SIZE));
        build(&FakeHardware::default(), one_bank(16 * MIB), &windows.collect::<Vec<_>>()).err()
    };
    assert_eq!(pages(27), None);
    assert_eq!(pages(28), Some(Error::Invalid));
    // A page of what a block maps already.
    let twice = [range(at, 2 * MIB), range(at + PAGE_SIZE, PAGE_SIZE)];
    let map = build(&FakeHardware::default(), one_bank(16 * MIB), &twice);
    assert_eq!(map.err(), Some(Error::Invalid));
}

/// The entry at each level of the devices' stage-2.
fn devices_walk(hw: &FakeHardware, map: &HostMap, at: u64) -> Vec<Entry> {
    walk_from(hw, map.devices_root(), at)
}

#[test]
fn devices_see_the_hosts_ram_in_pages_and_nothing_else() {
    let hw = FakeHardware::default();
    let ram = Ram::new([range(BASE, 2 * GIB), range(BANK2, 16 * MIB)]);
    let windows = [range(0x900_0000, PAGE_SIZE), range(0x1000_0000, 4 * MIB)];
    let map = build(&hw, ram, &windows).unwrap();
    let carveout = carveout_size(ram.page_count() * PAGE_SIZE);
    for at in [BASE + carveout, BASE + GIB + 0x5000, BASE + 2 * GIB - PAGE_SIZE, BANK2] {
        let path = devices_walk(&hw, &map, at);
        assert_eq!(path.len(), 3, "{at:#x}");
        assert_eq!(path[2], Entry::page(Pa(at), Attributes::Memory), "{at:#x}");
    }
    for at in [
        BASE,
        BASE + carveout - PAGE_SIZE,
        BASE - PAGE_SIZE,
        BASE + 2 * GIB,
        BANK2 - PAGE_SIZE,
        BANK2 + 16 * MIB,
        0x900_0000,
        0x1000_0000,
        0,
    ] {
        let path = devices_walk(&hw, &map, at);
        assert!(!path.last().unwrap().is_valid(), "{at:#x}: {path:x?}");
    }
}

#[test]
fn a_hidden_page_is_hidden_from_devices() {
    let records = records();
    let m = FakeMachine::new(&records);
    let pa = host_page(1);
    let leaf = || m.with_host_map(|map| devices_walk(&m.hw, map, pa.0)[2]);
    let page = m.pages.claim(pa, Owner::Host).unwrap();
    let page = m.with_host_map(|map| map.hide(&m.hw, &m.pages, page)).unwrap();
    assert_eq!(leaf(), Entry::HIDDEN);
    assert_eq!(m.hw.stale(), vec![]);
    // What the host looks at, devices may read as well: zeros.
    m.with_host_map(|map| map.resolve(&m.hw, Ipa(pa.0), false, false));
    assert_eq!(leaf(), Entry::page(Pa(BASE + 0x1000), Attributes::ReadOnly));
    let page = page.scrub(&m.hw);
    m.with_host_map(|map| map.show(&m.hw, &m.pages, page, Owner::Host));
    assert_eq!(leaf(), Entry::page(pa, Attributes::Memory));
    assert_eq!(m.hw.stale(), vec![]);
}

#[test]
fn a_window_in_a_gib_of_ram_shares_its_table() {
    let hw = FakeHardware::default();
    let windows = [range(BASE + 32 * MIB, PAGE_SIZE)];
    let map = build(&hw, one_bank(16 * MIB), &windows).unwrap();
    let device = Entry::page(Pa(BASE + 32 * MIB), Attributes::Device);
    assert_eq!(map.lookup(&hw, Ipa(BASE + 32 * MIB)), Some(device));
    let block = Entry::block(Pa(BASE + 4 * MIB), Attributes::Memory);
    assert_eq!(map.lookup(&hw, Ipa(BASE + 4 * MIB)), Some(block));
}

/// Checks that every page but those in `hidden` is mapped to itself.
fn identical(hw: &FakeHardware, map: &HostMap, pages: Range, hidden: &[u64]) {
    for at in (pages.base..pages.base + pages.size).step_by(4096) {
        if hidden.contains(&at) {
            assert_eq!(map.lookup(hw, Ipa(at)), None);
            continue;
        }
        let leaf = map.lookup(hw, Ipa(at)).unwrap();
        let size = [GIB, 2 * MIB, PAGE_SIZE][walk(hw, map, at).len() - 1];
        let own = Pa(at / size * size);
        let expected = if size == PAGE_SIZE {
            Entry::page(own, Attributes::Memory)
        } else {
            Entry::block(own, Attributes::Memory)
        };
        assert_eq!(leaf, expected, "{at:#x}");
    }
}

#[test]
fn splitting_changes_no_other_page() {
    let hw = FakeHardware::default();
    let ram = one_bank(2 * GIB);
    let mut map = build(&hw, ram, &[]).unwrap();
    let vttbr = map.root().0;
    hw.watch(vttbr);
    hw.load(vttbr);
    let records: Vec<_> = (0..ram.page_count()).map(|_| AtomicU16::new(0)).collect();
    let pages = Pages::new(ram, &records).unwrap();
    let around = range(BASE + GIB, 8 * MIB);
    let (a, b) = (BASE + GIB + 4 * MIB, BASE + GIB + 6 * MIB - PAGE_SIZE);
    hw.take_events();
    for at in [a, b] {
        pages.give_to_host(Pa(at));
        let page = pages.claim(Pa(at), Owner::Host).unwrap();
        let page = map.hide(&hw, &pages, page).unwrap().scrub(&hw);
        pages.settle(page, Owner::Private(VmSlot(0)));
        assert_eq!(walk(&hw, &map, at).len(), 3);
        assert_eq!(walk(&hw, &map, BASE + GIB).len(), 2);
        assert_eq!(walk(&hw, &map, BASE + 2 * GIB - 1).len(), 2);
        let hidden: &[u64] = if at == a { &[a] } else { &[a, b] };
        identical(&hw, &map, around, hidden);
        identical(&hw, &map, range(BASE + 2 * GIB - 4 * MIB, 4 * MIB), &[]);
    }
    assert_eq!(hw.stale(), vec![]);
    // Back again: the last one joins the blocks.
    for (at, hidden, levels) in [(a, vec![b], 3), (b, vec![], 1)] {
        let page = pages.claim(Pa(at), Owner::Private(VmSlot(0))).unwrap();
        map.show(&hw, &pages, page.isolated().scrub(&hw), Owner::Host);
        assert_eq!(pages.owner(Pa(at)), Some(Owner::Host));
        identical(&hw, &map, around, &hidden);
        assert_eq!(walk(&hw, &map, at).len(), levels);
    }
    assert_eq!(hw.stale(), vec![]);
}

#[test]
fn every_change_breaks_before_it_makes() {
    let hw = FakeHardware::default();
    let ram = one_bank(2 * GIB);
    let mut map = build(&hw, ram, &[]).unwrap();
    let records: Vec<AtomicU16> = (0..ram.page_count()).map(|_| AtomicU16::new(0)).collect();
    let pages = Pages::new(ram, &records).unwrap();
    let pa = Pa(BASE + GIB + 0x3000);
    pages.give_to_host(pa);
    let (root, level2) = (map.root(), map.level2_table(LEVEL2_TABLES, pa).unwrap());
    let level3 = map.level3_table(pa).unwrap();
    hw.take_events();
    let page = pages.claim(pa, Owner::Host).unwrap();
    let page = map.hide(&hw, &pages, page).unwrap();
    let events = hw.take_events();
    let gone = Event::InvalidateHost(Ipa(pa.0), PAGE_SIZE);
    let gone_for_devices = Event::InvalidateDevices(Ipa(pa.0), PAGE_SIZE);
    let split = |table, slot: usize, to: Entry| {
        vec![Event::Write(table, slot, 0), gone, Event::Write(table, slot, to.0)]
    };
    // Splitting is none of the devices' business.
    assert_eq!(events[..3], split(root, 2, Entry::table(level2)));
    assert_eq!(events[3..6], split(level2, 0, Entry::table(level3)));
    let hidden = Event::Write(level3, 3, Entry::HIDDEN.0);
    assert_eq!(events[6..], vec![hidden, gone, gone_for_devices]);
    // The zero frame comes in without an invalidation, and goes with one.
    let zero = Entry::page(map.zero_frame(), Attributes::ReadOnly);
    assert_eq!(map.resolve(&hw, Ipa(pa.0), false, false), Resolution::Retry);
    assert_eq!(hw.take_events(), vec![Event::Write(level3, 3, zero.0)]);
    let own = Entry::page(pa, Attributes::Memory);
    let page = page.scrub(&hw);
    hw.take_events();
    map.show(&hw, &pages, page, Owner::Host);
    let own_again = Event::Write(level3, 3, own.0);
    let broken = Event::Write(level3, 3, 0);
    let events = hw.take_events();
    assert_eq!(events[..4], vec![broken, gone, gone_for_devices, own_again]);
    // It was the last one: blocks again, which is none of the devices' business.
    let join = |table, slot: usize, size: u64| {
        let block = Pa(BASE + GIB);
        let gone = Event::InvalidateHost(Ipa(block.0), size);
        let made = Event::Write(table, slot, Entry::block(block, Attributes::Memory).0);
        vec![Event::Write(table, slot, 0), gone, made]
    };
    assert_eq!(events[4..7], join(level2, 0, 2 * MIB));
    assert_eq!(events[7..], join(root, 2, GIB));
    // A page that nobody looked at comes back without one; shared, it is part of no block.
    let page = pages.claim(pa, Owner::Host).unwrap();
    let page = map.hide(&hw, &pages, page).unwrap().scrub(&hw);
    hw.take_events();
    map.show(&hw, &pages, page, Owner::Shared(VmSlot(0)));
    assert_eq!(hw.take_events(), vec![own_again]);
}

#[test]
fn a_run_of_pages_goes_at_once() {
    let hw = FakeHardware::default();
    let ram = one_bank(2 * GIB);
    let mut map = build(&hw, ram, &[]).unwrap();
    let vttbr = map.root().0;
    hw.watch(vttbr);
    hw.load(vttbr);
    hw.watch_devices(map.devices_root());
    let records: Vec<_> = (0..ram.page_count()).map(|_| AtomicU16::new(0)).collect();
    let pages = Pages::new(ram, &records).unwrap();
    // On both sides of a block's end, and of a GiB's.
    for first in [BASE + 8 * MIB - 3 * PAGE_SIZE, BASE + GIB - 3 * PAGE_SIZE] {
        let run: Vec<_> = (0..7).map(|n| first + n * PAGE_SIZE).collect();
        run.iter().for_each(|at| pages.give_to_host(Pa(*at)));
        hw.take_events();
        let page = pages.claim_run(Pa(first), 7, Owner::Host).unwrap();
        let page = map.hide(&hw, &pages, page).unwrap();
        let events = hw.take_events();
        let gone = [
            Event::InvalidateHost(Ipa(first), 7 * PAGE_SIZE),
            Event::InvalidateDevices(Ipa(first), 7 * PAGE_SIZE),
        ];
        assert_eq!(events[events.len() - 2..], gone);
        let devices = events.iter().filter(|e| matches!(e, Event::InvalidateDevices(..)));
        assert_eq!(devices.count(), 1);
        assert_eq!(hw.stale(), vec![]);
        for at in &run {
            assert_eq!(walk(&hw, &map, *at)[2], Entry::HIDDEN);
            assert_eq!(devices_walk(&hw, &map, *at)[2], Entry::HIDDEN);
        }
        let around = range(first / (2 * MIB) * 2 * MIB, 4 * MIB);
        identical(&hw, &map, around, &run);
        // The host looks at one.
        assert_eq!(map.resolve(&hw, Ipa(run[5]), false, false), Resolution::Retry);
        map.show(&hw, &pages, page.scrub(&hw), Owner::Host);
        assert_eq!(hw.stale(), vec![]);
        identical(&hw, &map, around, &[]);
        for at in &run {
            assert_eq!(pages.owner(Pa(*at)), Some(Owner::Host));
            assert!(walk(&hw, &map, *at).len() < 3);
        }
    }
}

#[test]
fn pages_of_both_banks_go_and_come_back() {
    let records = records();
    let m = FakeMachine::new(&records);
    for pa in [host_page(0), host_page(1), Pa(BASE + 6 * MIB - 0x1000), Pa(BANK2 + 0x1f_f000)] {
        let page = m.pages.claim(pa, Owner::Host).unwrap();
        let page = m.with_host_map(|map| map.hide(&m.hw, &m.pages, page)).unwrap();
        assert_eq!(m.host_leaf(pa), None);
        if pa != host_page(1) {
            let read = m.with_host_map(|map| map.resolve(&m.hw, Ipa(pa.0), false, false));
            assert_eq!(read, Resolution::Retry);
            let zero = Entry::page(Pa(BASE + 0x1000), Attributes::ReadOnly);
            assert_eq!(m.host_leaf(pa), Some(zero));
        }
        let page = page.scrub(&m.hw);
        m.with_host_map(|map| map.show(&m.hw, &m.pages, page, Owner::Host));
        assert!(m.host_has(pa));
        assert_eq!(m.pages.owner(pa), Some(Owner::Host));
    }
    assert_eq!(m.host_leaf(Pa(BASE + CARVEOUT - 1)), None);
}

#[test]
fn a_page_that_cannot_be_hidden_stays_the_hosts() {
    let records = records();
    let m = FakeMachine::new(&records);
    let pa = host_page(1);
    let page = m.pages.claim(pa, Owner::Host).unwrap();
    // A map that does not know the second bank.
    let hw = FakeHardware::default();
    let mut small = build(&hw, one_bank(6 * MIB), &[]).unwrap();
    assert_eq!(small.hide(&hw, &m.pages, page).unwrap_err(), Error::Denied);
    assert_eq!(m.pages.owner(pa), Some(Owner::Host));
}

#[test]
fn a_fault_is_retried_if_the_map_permits_the_access_by_now() {
    let records = records();
    let m = FakeMachine::new(&records);
    let hidden = host_page(0);
    let page = m.pages.claim(hidden, Owner::Host).unwrap();
    let page = m.with_host_map(|map| map.hide(&m.hw, &m.pages, page)).unwrap();
    let resolve = |at, write, execute| {
        m.with_host_map(|map| map.resolve(&m.hw, Ipa(at), write, execute) == Resolution::Retry)
    };
    for (at, read, write, execute) in [
        (host_page(2).0, true, true, true),
        (hidden.0, true, false, false),
        (UART, true, true, false),
        (BASE, false, false, false),
        (UART + 0x1000, false, false, false),
        (u64::MAX, false, false, false),
    ] {
        assert_eq!(resolve(at, false, false), read, "{at:#x}");
        assert_eq!(resolve(at, true, false), write, "{at:#x}");
        assert_eq!(resolve(at, false, true), execute, "{at:#x}");
        assert_eq!(resolve(at, true, true), write && execute, "{at:#x}");
    }
    m.pages.settle(page.scrub(&m.hw), Owner::Private(VmSlot(0)));
}

#[test]
fn a_store_to_a_dead_device_is_ignored() {
    let hw = FakeHardware::default();
    let (dead, beside) = (range(UART, PAGE_SIZE), range(UART + PAGE_SIZE, PAGE_SIZE));
    let devices = [(dead, Attributes::DeadDevice), (beside, Attributes::Device)];
    let size = carveout_size(16 * MIB);
    let mut map = HostMap::new(&hw, one_bank(16 * MIB), size, devices.into_iter()).unwrap();
    let mut resolve = |at, write, execute| map.resolve(&hw, Ipa(at), write, execute);
    assert_eq!(resolve(UART + 8, false, false), Resolution::Retry);
    assert_eq!(resolve(UART + 8, true, false), Resolution::Ignored);
    assert_eq!(resolve(UART + 8, false, true), Resolution::Refused);
    assert_eq!(resolve(beside.base, true, false), Resolution::Retry);
    assert_eq!(resolve(beside.base + PAGE_SIZE, true, false), Resolution::Refused);
    let leaf = map.lookup(&hw, Ipa(UART)).unwrap();
    assert!(!leaf.is_writable() && !leaf.is_executable());
}
