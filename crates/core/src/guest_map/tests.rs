// SPDX-License-Identifier: MIT OR Apache-2.0
use std::vec;

use super::*;
use crate::fake::{Event, FakeMachine, host_page, records, root};

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
    assert_eq!(map.check(&m.hw, AT), Err(MapError::Tables(2)));
    map.add_to_pool(&m, clean(&m, 0));
    assert_eq!(map.check(&m.hw, AT), Err(MapError::Tables(1)));
    // Refused, the page is the host's again.
    assert_eq!(map.map(&m, AT, clean(&m, 10), PRIVATE), Err(MapError::Tables(1)));
    assert_eq!(m.pages.owner(host_page(10)), Some(Owner::Host));
    assert_eq!(map.pool_len(), 1);
    map.add_to_pool(&m, clean(&m, 1));
    assert_eq!(map.check(&m.hw, AT), Ok(()));
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
    assert_eq!(map.check(&m.hw, AT), Err(MapError::Other(Error::Denied)));
    assert_eq!(map.map(&m, AT, clean(&m, 11), PRIVATE), Err(MapError::Other(Error::Denied)));
    assert_eq!(m.pages.owner(host_page(11)), Some(Owner::Host));
    assert_eq!(m.hw.peek(level3, 3), leaf);
    // Its tables serve its neighbours, but no others.
    assert_eq!(map.check(&m.hw, Ipa(AT.0 + 0x1000)), Ok(()));
    assert_eq!(map.check(&m.hw, Ipa(AT.0 + 0x20_0000)), Err(MapError::Tables(1)));
    assert_eq!(map.check(&m.hw, Ipa(AT.0 + 0x4000_0000)), Err(MapError::Tables(2)));
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
        Event::InvalidateGuest(map.vttbr(), AT),
    ];
    assert_eq!(m.hw.take_events(), events);
    assert_eq!(page.pa(), host_page(10));
    assert_eq!(m.pages.owner(page.pa()), None);
    assert!(map.unmap(&m, AT, 7).is_none());
    give_back(&m, page);
    // Its place is known until the map was torn down, and free.
    assert_eq!(map.entry(&m.hw, AT), Some(Entry::gone(7)));
    assert_eq!(map.check(&m.hw, AT), Ok(()));
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
    let device = Entry::page(Pa(0x804_0000), Attributes::Device);
    map.insert(&m.hw, AT, device).unwrap();
    let leaf = Entry::page(Pa(0x804_0000), Attributes::Device).0;
    assert_eq!(m.hw.peek(host_page(0), 3), leaf);
    assert_eq!(map.insert(&m.hw, AT, device), Err(MapError::Other(Error::Denied)));
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
