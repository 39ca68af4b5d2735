// SPDX-License-Identifier: MIT OR Apache-2.0
use std::vec;
use std::vec::Vec;

use super::*;
use crate::fake::{BANK2, Event, FakeMachine, host_page, records, root};

const SLOT: VmSlot = VmSlot(2);
const PRIVATE: Owner = Owner::Private(SLOT);
const AT: Ipa = Ipa(0x1_4060_3000);

/// A clean page out of the host's hands.
fn clean(m: &FakeMachine<'_>, n: u64) -> Page<Clean> {
    let page = m.pages.claim(host_page(n), Owner::Host).unwrap();
    m.with_host_map(|map| map.hide(&m.hw, &m.pages, page)).unwrap().scrub(&m.hw)
}

fn give_back(m: &FakeMachine<'_>, page: Page<Isolated>) {
    let page = page.scrub(&m.hw);
    m.with_host_map(|map| map.show(&m.hw, &m.pages, page, Owner::Host));
}

/// A map with `tables` pages in its pool: pages 0 and on.
fn map(m: &FakeMachine<'_>, tables: u64) -> GuestMap {
    let mut map = GuestMap::new(SLOT, root(SLOT));
    for n in 0..tables {
        map.add_to_pool(m, clean(m, n));
    }
    map
}

#[test]
fn the_pool_is_a_list_through_zero_pages() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 3);
    assert_eq!(map.pool_len(), 3);
    for n in 0..3 {
        assert_eq!(m.pages.owner(host_page(n)), Some(Owner::Table(SLOT)));
    }
    for n in [2, 1, 0] {
        let page = map.take_from_pool(&m).unwrap();
        assert_eq!((page.pa(), map.pool_len()), (host_page(n), n));
        assert!(m.hw.is_zero(page.pa()));
        give_back(&m, page);
    }
    assert!(map.take_from_pool(&m).is_none());
    assert_eq!(map.pool_len(), 0);
    map.add_to_pool(&m, clean(&m, 9));
    assert_eq!((map.pool.head, map.pool_len()), (Some(host_page(9)), 1));
}

#[test]
fn a_page_is_mapped_where_nothing_was() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 0);
    assert_eq!(map.vttbr(), 3 << 48 | root(SLOT).0);
    assert_eq!(map.check(&m.hw, AT, PAGE_SIZE), Err(Error::NoMemory));
    map.add_to_pool(&m, clean(&m, 0));
    assert_eq!(map.check(&m.hw, AT, PAGE_SIZE), Err(Error::NoMemory));
    // Refused, the page is the host's again.
    assert_eq!(map.map(&m, AT, clean(&m, 10), PRIVATE), Err(Error::NoMemory));
    assert_eq!(m.pages.owner(host_page(10)), Some(Owner::Host));
    assert_eq!(map.pool_len(), 1);
    map.add_to_pool(&m, clean(&m, 1));
    assert_eq!(map.check(&m.hw, AT, PAGE_SIZE), Ok(()));
    let page = clean(&m, 10);
    m.hw.take_events();
    map.map(&m, AT, page, PRIVATE).unwrap();
    // The last table first is linked, then the leaf is written.
    let (level2, level3) = (host_page(1), host_page(0));
    let leaf = Entry::page(host_page(10), Attributes::Memory).0;
    assert_eq!(m.hw.peek(root(SLOT), 5), Entry::table(level2).0);
    assert_eq!(m.hw.peek(level2, 3), Entry::table(level3).0);
    assert_eq!(m.hw.peek(level3, 3), leaf);
    assert_eq!(m.hw.take_events().last(), Some(&Event::Write(level3, 3, leaf)));
    assert_eq!(m.pages.owner(host_page(10)), Some(Owner::Private(SLOT)));
    assert_eq!(map.check(&m.hw, AT, PAGE_SIZE), Err(Error::Denied));
    assert_eq!(map.map(&m, AT, clean(&m, 11), PRIVATE), Err(Error::Denied));
    assert_eq!(m.pages.owner(host_page(11)), Some(Owner::Host));
    assert_eq!(m.hw.peek(level3, 3), leaf);
    // Its tables serve its neighbours, but no others.
    assert_eq!(map.check(&m.hw, Ipa(AT.0 + 0x1000), PAGE_SIZE), Ok(()));
    assert_eq!(map.check(&m.hw, Ipa(AT.0 + 0x20_0000), PAGE_SIZE), Err(Error::NoMemory));
    assert_eq!(map.check(&m.hw, Ipa(AT.0 + 0x4000_0000), PAGE_SIZE), Err(Error::NoMemory));
    map.map(&m, Ipa(AT.0 + 0x1000), clean(&m, 11), PRIVATE).unwrap();
    assert_eq!(m.pages.census().private, 2);
}

#[test]
fn a_page_is_isolated_once_no_tlb_knows_it() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 2);
    map.map(&m, AT, clean(&m, 10), PRIVATE).unwrap();
    m.hw.load(map.vttbr());
    assert!(map.unmap(&m, Ipa(AT.0 + 0x1000), 7).is_none());
    assert!(map.unmap(&m, Ipa(AT.0 + 0x20_0000), 7).is_none());
    assert!(map.unmap(&m, Ipa(AT.0 + 0x4000_0000), 7).is_none());
    m.hw.take_events();
    let page = map.unmap(&m, AT, 7).unwrap();
    let events = vec![
        Event::Write(host_page(0), 3, Entry::gone(7).0),
        Event::InvalidateGuest(map.vttbr(), AT, PAGE_SIZE),
    ];
    assert_eq!(m.hw.take_events(), events);
    assert_eq!(page.pa(), host_page(10));
    assert_eq!(m.pages.owner(page.pa()), None);
    assert!(map.unmap(&m, AT, 7).is_none());
    give_back(&m, page);
    // Its place is known until the map was torn down, and free for one page.
    assert_eq!(map.entry(&m.hw, AT), Some(Entry::gone(7)));
    assert_eq!(map.check(&m.hw, AT, PAGE_SIZE), Ok(()));
    assert_eq!(map.check(&m.hw, AT, 2 * PAGE_SIZE), Err(Error::Denied));
    assert_eq!(map.check(&m.hw, Ipa(AT.0 - PAGE_SIZE), 2 * PAGE_SIZE), Err(Error::Denied));
    m.hw.unload(map.vttbr());
    map.begin_teardown(&m.hw);
    while map.teardown(&m, 1, |_| panic!("nothing is left")).is_err() {}
    assert_eq!(map.entry(&m.hw, AT), None);
    assert!(m.hw.is_zero(host_page(0)) || map.pool_len() == 2);
}

#[test]
fn a_device_page_is_unmapped_and_belongs_to_nobody() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 2);
    m.hw.load(map.vttbr());
    let gicv = Pa(0x804_0000);
    map.insert(&m.hw, AT, (gicv, PAGE_SIZE), Attributes::Device).unwrap();
    let leaf = Entry::page(gicv, Attributes::Device).0;
    assert_eq!(m.hw.peek(host_page(0), 3), leaf);
    assert_eq!(map.insert(&m.hw, AT, (gicv, PAGE_SIZE), Attributes::Device), Err(Error::Denied));
    assert!(map.unmap(&m, AT, 7).is_none());
    assert!(!Entry(m.hw.peek(host_page(0), 3)).is_valid());
    assert_eq!(m.hw.stale(), vec![]);
}

#[test]
fn a_teardown_takes_no_more_than_its_budget_a_step() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 7);
    // Two tables of one GiB, the last of that GiB among them, and another GiB.
    let places = [0, 0x1000, 0x1f_f000, 0x3fe0_0000, 0x3fff_f000, 0x4000_0000, 0x40_0000_0000];
    for (n, ipa) in (10..).zip(places) {
        map.map(&m, Ipa(ipa), clean(&m, n), PRIVATE).unwrap();
    }
    assert_eq!(map.pool_len(), 0);
    m.hw.load(map.vttbr());
    m.hw.unload(map.vttbr());
    m.hw.take_events();
    map.begin_teardown(&m.hw);
    assert_eq!(m.hw.take_events(), vec![Event::InvalidateGuestAll(map.vttbr())]);
    let mut steps = vec![];
    loop {
        let mut taken = 0;
        let step = map.teardown(&m, 2, |page| {
            taken += 1;
            give_back(&m, page);
        });
        steps.push((taken, map.pool_len()));
        if steps.len() == 1 {
            // Where the third page lies: what was looked at is not looked at again.
            assert_eq!(map.cursor, 0x1f_f000);
        }
        if step == Ok(()) {
            break;
        }
    }
    // Two, then the rest of the first table, a table a step, with its level 2
    // table where it is the last.
    assert_eq!(steps[..4], [(2, 0), (1, 1), (2, 3), (1, 4)]);
    assert_eq!(steps.last(), Some(&(0, 7)));
    assert_eq!(m.pages.census().private, 0);
    for page in [root(SLOT), root(SLOT).offset(PAGE_SIZE)] {
        assert!(m.hw.is_zero(page));
    }
    for n in 0..7 {
        let page = map.take_from_pool(&m).unwrap();
        assert!(m.hw.is_zero(page.pa()), "table {n}");
        give_back(&m, page);
    }
    assert_eq!(m.hw.stale(), vec![]);
}

/// An address that a block can have, in the GiB of [`AT`].
const BLOCK: Ipa = Ipa(0x1_4080_0000);
/// The same in memory: all of it the host's.
const MEMORY: Pa = Pa(BANK2 + LEVEL2_SIZE);

/// `n` clean pages out of the host's hands.
fn run(m: &FakeMachine<'_>, pa: Pa, n: u64) -> Page<Clean> {
    let page = m.pages.claim_run(pa, n, Owner::Host).unwrap();
    m.with_host_map(|map| map.hide(&m.hw, &m.pages, page)).unwrap().scrub(&m.hw)
}

/// The level 2 entry of [`BLOCK`].
fn level2(m: &FakeMachine<'_>, map: &GuestMap) -> (Pa, Entry) {
    let table = Entry(m.hw.peek(map.root, 5)).address();
    (table, Entry(m.hw.peek(table, 4)))
}

/// Maps [`MEMORY`] at [`BLOCK`] in runs of so many pages, in this order.
fn fill(m: &FakeMachine<'_>, map: &mut GuestMap, n: u64, order: impl Iterator<Item = u64>) {
    for i in order {
        let at = i * n * PAGE_SIZE;
        let before = level2(m, map).1;
        assert!(!before.is_block());
        map.map(m, Ipa(BLOCK.0 + at), run(m, MEMORY.offset(at), n), PRIVATE).unwrap();
    }
}

#[test]
fn what_is_two_mib_in_a_row_becomes_a_block() {
    let block = Entry::block(MEMORY, Attributes::Memory);
    for (n, reversed) in [(1, false), (1, true), (128, false), (64, true), (512, false)] {
        let records = records();
        let m = FakeMachine::new(&records);
        let mut map = map(&m, 3);
        m.hw.load(map.vttbr());
        let order: Vec<u64> =
            if reversed { (0..512 / n).rev().collect() } else { (0..512 / n).collect() };
        fill(&m, &mut map, n, order.into_iter());
        let (table, entry) = level2(&m, &map);
        assert_eq!(entry, block);
        // Broken before it is made, and the table is kept.
        let events = m.hw.take_events();
        let made = events.iter().rposition(|e| *e == Event::Write(table, 4, block.0)).unwrap();
        let gone = Event::InvalidateGuest(map.vttbr(), BLOCK, LEVEL2_SIZE);
        assert_eq!(events[made - 2..made], [Event::Write(table, 4, 0), gone]);
        assert_eq!(m.hw.stale(), vec![]);
        assert_eq!(map.pool_len(), 1);
        let kept = map.pool.head.unwrap();
        assert_eq!(m.pages.owner(kept), Some(Owner::Table(SLOT)));
        for at in (0..LEVEL2_SIZE).step_by(4096) {
            assert_eq!(map.page(&m.hw, Ipa(BLOCK.0 + at)), Some(MEMORY.offset(at)));
        }
        assert_eq!(map.page(&m.hw, Ipa(BLOCK.0 + 0x5678)), Some(MEMORY.offset(0x5000)));
        assert_eq!(map.page(&m.hw, Ipa(BLOCK.0 + LEVEL2_SIZE)), None);
        assert_eq!(m.pages.census().private, 512);
    }
}

#[test]
fn what_is_not_in_a_row_stays_pages() {
    // Two halves of other memory, in the wrong order, from where no block can begin;
    // a device.
    for (first, second) in [(512, 256), (768, 512), (256, 512), (512, 768)] {
        let records = records();
        let m = FakeMachine::new(&records);
        let mut map = map(&m, 2);
        let half = LEVEL2_SIZE / 2;
        let pa = |n| Pa(BANK2 + n * PAGE_SIZE);
        map.map(&m, BLOCK, run(&m, pa(first), 256), PRIVATE).unwrap();
        map.map(&m, Ipa(BLOCK.0 + half), run(&m, pa(second), 256), PRIVATE).unwrap();
        assert_eq!(level2(&m, &map).1.is_block(), second == 768, "{first} {second}");
        assert_eq!(map.page(&m.hw, BLOCK), Some(pa(first)));
        assert_eq!(map.page(&m.hw, Ipa(BLOCK.0 + half)), Some(pa(second)));
    }
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 2);
    let last = Ipa(BLOCK.0 + LEVEL2_SIZE - PAGE_SIZE);
    let pa = MEMORY.offset(LEVEL2_SIZE - PAGE_SIZE);
    map.insert(&m.hw, last, (pa, PAGE_SIZE), Attributes::Device).unwrap();
    map.map(&m, BLOCK, run(&m, MEMORY, 511), PRIVATE).unwrap();
    assert!(!level2(&m, &map).1.is_block());
}

#[test]
fn nothing_comes_where_a_block_is_or_over_its_edge() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 3);
    fill(&m, &mut map, 512, 0..1);
    let denied = Err(Error::Denied);
    for (at, n) in [(0, 1), (0, 512), (511, 1), (7, 3)] {
        let ipa = Ipa(BLOCK.0 + at * PAGE_SIZE);
        assert_eq!(map.check(&m.hw, ipa, n * PAGE_SIZE), denied);
    }
    let before = m.hw.snapshot();
    let used = map.map(&m, Ipa(BLOCK.0 + PAGE_SIZE), clean(&m, 40), PRIVATE);
    assert_eq!((used, m.pages.owner(host_page(40))), (denied, Some(Owner::Host)));
    assert!(before == m.hw.snapshot());
    // Over the edge of a table, with and without one.
    for at in [BLOCK.0 - PAGE_SIZE, BLOCK.0 + 2 * LEVEL2_SIZE - PAGE_SIZE] {
        let invalid = Err(Error::Invalid);
        assert_eq!(map.check(&m.hw, Ipa(at), 2 * PAGE_SIZE), invalid);
        assert_eq!(map.check(&m.hw, Ipa(at), PAGE_SIZE), Ok(()));
    }
    // Some of a run's places are taken.
    let next = BLOCK.0 + LEVEL2_SIZE;
    map.map(&m, Ipa(next + 5 * PAGE_SIZE), clean(&m, 40), PRIVATE).unwrap();
    for (at, n, result) in [(4, 2, denied), (0, 6, denied), (5, 4, denied), (6, 9, Ok(()))] {
        assert_eq!(map.check(&m.hw, Ipa(next + at * PAGE_SIZE), n * PAGE_SIZE), result);
    }
}

#[test]
fn a_block_becomes_pages_when_one_goes_whatever_the_pool_has() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 3);
    m.hw.load(map.vttbr());
    fill(&m, &mut map, 128, 0..4);
    // The table that is kept for the block is nobody else's.
    map.map(&m, Ipa(BLOCK.0 + LEVEL2_SIZE), clean(&m, 40), PRIVATE).unwrap();
    assert_eq!(map.pool_len(), 0);
    let further = Ipa(BLOCK.0 + 2 * LEVEL2_SIZE);
    assert_eq!(map.check(&m.hw, further, PAGE_SIZE), Err(Error::NoMemory));
    let gone = Ipa(BLOCK.0 + 9 * PAGE_SIZE);
    m.hw.poke(MEMORY.offset(8 * PAGE_SIZE), 1, 0x5ec0);
    m.hw.take_events();
    let page = map.unmap(&m, gone, 7).unwrap();
    assert_eq!(page.pa(), MEMORY.offset(9 * PAGE_SIZE));
    assert_eq!((m.hw.stale(), map.pool_len()), (vec![], 0));
    let (table, entry) = level2(&m, &map);
    assert!(entry.is_valid() && !entry.is_block());
    let events = m.hw.take_events();
    let split = events.iter().position(|e| *e == Event::Write(table, 4, 0)).unwrap();
    let forget = Event::InvalidateGuest(map.vttbr(), BLOCK, LEVEL2_SIZE);
    assert_eq!(events[split + 1..split + 3], [forget, Event::Write(table, 4, entry.0)]);
    give_back(&m, page);
    for at in (0..LEVEL2_SIZE).step_by(4096) {
        let expected = (BLOCK.0 + at != gone.0).then(|| MEMORY.offset(at));
        assert_eq!(map.page(&m.hw, Ipa(BLOCK.0 + at)), expected);
    }
    assert_eq!(m.hw.peek(MEMORY.offset(8 * PAGE_SIZE), 1), 0x5ec0);
    // One page can come in its place, and no more at once.
    assert_eq!(map.check(&m.hw, gone, PAGE_SIZE), Ok(()));
    let around = Ipa(gone.0 - PAGE_SIZE);
    assert_eq!(map.check(&m.hw, around, 2 * PAGE_SIZE), Err(Error::Denied));
}

#[test]
fn a_teardown_finds_the_pages_of_a_block() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 3);
    fill(&m, &mut map, 128, 0..4);
    map.map(&m, AT, clean(&m, 40), PRIVATE).unwrap();
    assert_eq!(map.pool_len(), 0);
    let mut back = 0;
    map.begin_teardown(&m.hw);
    loop {
        let mut step = 0;
        let result = map.teardown(&m, 32, |page| {
            give_back(&m, page);
            step += 1;
        });
        back += step;
        assert!(step <= 32);
        if result.is_ok() {
            break;
        }
    }
    assert_eq!((back, map.pool_len(), m.pages.census().private), (513, 3, 0));
    while let Some(page) = map.take_from_pool(&m) {
        give_back(&m, page);
    }
    assert_eq!(m.pages.census().table, 0);
    assert_eq!(m.host_leaf(MEMORY), Some(Entry::block(MEMORY, Attributes::Memory)));
}

#[test]
fn the_page_that_came_last_is_in_the_row_or_there_is_no_block() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut map = map(&m, 2);
    map.map(&m, BLOCK, run(&m, MEMORY, 511), PRIVATE).unwrap();
    map.map(&m, Ipa(BLOCK.0 + LEVEL2_SIZE - PAGE_SIZE), clean(&m, 40), PRIVATE).unwrap();
    assert!(!level2(&m, &map).1.is_block());
}
