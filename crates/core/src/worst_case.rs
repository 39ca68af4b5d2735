// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of worst cases in `docs/architecture.md` says what is measured here:
//! each call, with all against it that there can be.

use std::vec::Vec;

use core::sync::atomic::AtomicU16;
use havmsi_abi::layout::carveout_size;
use havmsi_abi::{Error, MAX_PAGES_PER_CALL, MAX_PAGES_PER_MAP, PAGE_SIZE};

use crate::addr::{Ipa, Pa, index};
use crate::fake::{BANK2, BASE, Event, FakeMachine, root};
use crate::host_map::Resolution;
use crate::launch::{Boot, Config};
use crate::page::VmSlot;
use crate::ram::{Ram, Range};
use crate::stage2::{ENTRIES, LEVEL1_SIZE, LEVEL2_SIZE};
use crate::vm::{Machine as _, Vm};

const DOCS: &str = include_str!("../../../docs/architecture.md");
const SLOT: VmSlot = VmSlot(2);
const BANK1_SIZE: u64 = 10 << 20;
const BANK2_SIZE: u64 = 2 * LEVEL1_SIZE;

/// What a call costs; in the order of the table's columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Cost {
    wiped: u64,
    flushed: u64,
    host_tlb: u64,
    smmu: u64,
    guest_tlb: u64,
    entries: u64,
}

impl Cost {
    fn max(self, other: Self) -> Self {
        Self {
            wiped: self.wiped.max(other.wiped),
            flushed: self.flushed.max(other.flushed),
            host_tlb: self.host_tlb.max(other.host_tlb),
            smmu: self.smmu.max(other.smmu),
            guest_tlb: self.guest_tlb.max(other.guest_tlb),
            entries: self.entries.max(other.entries),
        }
    }
}

/// What the table says about a call.
fn stated(call: &str) -> Cost {
    let row = DOCS.lines().find_map(|line| line.strip_prefix("| ")?.strip_prefix(call)).unwrap();
    let cells: Vec<u64> = row.split('|').filter_map(|cell| cell.trim().parse().ok()).collect();
    let [wiped, flushed, host_tlb, smmu, guest_tlb, entries] = *cells else {
        panic!("{call}: {cells:?}");
    };
    Cost { wiped, flushed, host_tlb, smmu, guest_tlb, entries }
}

fn ram() -> Ram {
    Ram::new([Range { base: BASE, size: BANK1_SIZE }, Range { base: BANK2, size: BANK2_SIZE }])
}

/// RAM that the host has in blocks of a GiB, with a VM in it that has no table yet.
struct World<'a> {
    m: FakeMachine<'a>,
    vm: Vm,
}

fn records() -> Vec<AtomicU16> {
    (0..ram().page_count()).map(|_| AtomicU16::new(0)).collect()
}

impl<'a> World<'a> {
    fn new(records: &'a [AtomicU16]) -> Self {
        let ram = ram();
        let carveout = carveout_size(BANK1_SIZE + BANK2_SIZE);
        let m = FakeMachine::with_ram(records, ram, carveout);
        let mut vm = Vm::FREE;
        vm.create(SLOT, root(SLOT), Config { ipa_bits: 40, gic: 2, max_vcpus: 64 }, 0, [1; 32])
            .unwrap();
        vm.create_vcpu(&m, 0, BASE + carveout, 0).unwrap();
        vm.set_boot(0, Boot::default()).unwrap();
        Self { m, vm }
    }

    /// RAM at both ends of the address space: its tables are as far apart as can be.
    fn with_ram(mut self) -> Self {
        self.vm.add_ram(0, 2 * LEVEL2_SIZE).unwrap();
        self.vm.add_ram((1 << 40) - LEVEL2_SIZE, LEVEL2_SIZE).unwrap();
        self
    }

    fn active(mut self) -> Self {
        self.vm.activate(&self.m).unwrap();
        self
    }

    /// Maps a block, of memory behind [`page`] 16.
    fn block(&mut self, ipa: u64) {
        let most = MAX_PAGES_PER_MAP * PAGE_SIZE;
        for at in (ipa..ipa + LEVEL2_SIZE).step_by(index(most)) {
            self.vm.map_pages(&self.m, at, page(16) + at, most, [0; 2]).unwrap();
        }
    }

    fn pool(&mut self, first: u64, n: u64) {
        self.vm.donate_pool(&self.m, page(first), n).unwrap();
    }

    /// The host has looked there: its map shows the zero frame.
    fn looked_at(&self, pages: impl Iterator<Item = u64>) {
        for ipa in pages.map(Ipa) {
            let seen = self.m.with_host_map(|map| map.resolve(&self.m.hw, ipa, false, false));
            assert_eq!(seen, Resolution::Retry);
        }
    }

    fn cost<T>(&mut self, call: impl FnOnce(&mut Vm, &FakeMachine<'_>) -> T) -> (Cost, T) {
        self.m.hw.take_events();
        let before = self.m.hw.accesses();
        let result = call(&mut self.vm, &self.m);
        let mut cost = Cost { entries: self.m.hw.accesses() - before, ..Cost::default() };
        for event in self.m.hw.take_events() {
            match event {
                Event::Write(..) | Event::InvalidateIcache => {}
                Event::Zero(_) => cost.wiped += 1,
                Event::Flush(_) => cost.flushed += 1,
                Event::InvalidateHost(..) => cost.host_tlb += 1,
                Event::InvalidateDevices(..) => cost.smmu += 1,
                Event::InvalidateGuest(..) | Event::InvalidateGuestAll(_) => cost.guest_tlb += 1,
            }
        }
        (cost, result)
    }

    /// All steps of a reset or destruction: what the worst costs of each kind.
    fn steps(&mut self, call: impl Fn(&mut Vm, &FakeMachine<'_>) -> Result<(), Error>) -> Cost {
        let mut worst = Cost::default();
        loop {
            let (cost, result) = self.cost(&call);
            worst = worst.max(cost);
            match result {
                Ok(()) => return worst,
                Err(error) => assert_eq!(error, Error::Again),
            }
        }
    }
}

/// Pages of 64 blocks that are the host's but for them, the last block first: with each
/// that comes back a block is joined, and nearly a GiB is.
fn scattered(n: u64) -> u64 {
    BANK2 + (64 - n) * LEVEL2_SIZE + PAGE_SIZE
}

/// A page in the second bank, from the middle of it on: its GiBs are blocks as yet.
fn page(n: u64) -> u64 {
    BANK2 + LEVEL1_SIZE - PAGE_SIZE * 16 + n * PAGE_SIZE
}

#[test]
fn a_page_that_splits_two_blocks_and_needs_two_tables_or_makes_one() {
    let records = records();
    let mut world = World::new(&records).with_ram();
    world.vm.donate_pool(&world.m, BANK2, 2).unwrap();
    // Of the GiB that the pool is not in.
    let (cost, result) = world.cost(|vm, m| vm.populate(m, 0, page(16), &mut [0; 4096]));
    assert_eq!(result, Ok(()));
    // The last one of a block.
    let mut world = World::new(&records).with_ram();
    world.pool(600, 2);
    for n in 0..511 {
        world.vm.populate(&world.m, n * PAGE_SIZE, page(16 + n), &mut [0; 4096]).unwrap();
    }
    let last = |vm: &mut Vm, m: &FakeMachine<'_>| {
        vm.populate(m, 511 * PAGE_SIZE, page(16 + 511), &mut [0; 4096])
    };
    let (joined, result) = world.cost(last);
    assert_eq!((cost.max(joined), result), (stated("VM_POPULATE"), Ok(())));
}

#[test]
fn pages_that_split_four_blocks_or_make_one() {
    let records = records();
    let mut world = World::new(&records).with_ram().active();
    let elsewhere = BASE + carveout_size(BANK1_SIZE + BANK2_SIZE) + PAGE_SIZE;
    world.vm.donate_pool(&world.m, elsewhere, 2).unwrap();
    let most = MAX_PAGES_PER_MAP * PAGE_SIZE;
    let (cost, result) = world.cost(|vm, m| vm.map_pages(m, 0, page(0), most, [0; 2]));
    assert_eq!(result, Ok(()));

    let mut world = World::new(&records).with_ram().active();
    world.pool(600, 2);
    for at in (0..LEVEL2_SIZE - most).step_by(index(most)) {
        world.vm.map_pages(&world.m, at, page(16) + at, most, [0; 2]).unwrap();
    }
    let at = LEVEL2_SIZE - most;
    let (joined, result) = world.cost(|vm, m| vm.map_pages(m, at, page(16) + at, most, [0; 2]));
    assert_eq!((cost.max(joined), result), (stated("PAGE_MAP"), Ok(())));
}

#[test]
fn table_memory_from_two_gib() {
    let records = records();
    let mut world = World::new(&records);
    let (cost, result) = world.cost(|vm, m| vm.donate_pool(m, page(0), MAX_PAGES_PER_CALL));
    assert_eq!((cost, result), (stated("POOL_DONATE"), Ok(())));
}

#[test]
fn pages_that_the_host_looked_for() {
    let records = records();
    let mut world = World::new(&records).with_ram().active();
    world.vm.donate_pool(&world.m, BANK2, 3).unwrap();
    // On both sides of a table's end.
    let first = LEVEL2_SIZE - 16 * PAGE_SIZE;
    let (n, last) = (MAX_PAGES_PER_CALL, first + (MAX_PAGES_PER_CALL - 1) * PAGE_SIZE);
    world.vm.map_page(&world.m, first, page(0), [0; 2]).unwrap();
    world.vm.unmap_pages(&world.m, first, 1).unwrap();
    world.vm.map_page(&world.m, last, scattered(0), [0; 2]).unwrap();
    world.looked_at([scattered(0)].into_iter());
    let unmap = |vm: &mut Vm, m: &FakeMachine<'_>| vm.unmap_pages(m, first, n);
    let (cost, result) = world.cost(unmap);
    let (done, tag) = result.unwrap();
    assert_eq!(done, n);
    // Back in a page of another GiB.
    let other = page(16);
    for i in 0..ENTRIES {
        world.m.hw.poke(Pa(other), i, world.m.hw.peek(Pa(scattered(0)), i));
    }
    let (unsealed, result) = world.cost(|vm, m| vm.map_page(m, last, other, tag));
    assert_eq!((unsealed, result), (stated("PAGE_MAP, unsealing"), Ok(())));
    // The first one behind a hole is part of a block.
    let mut world = World::new(&records).with_ram().active();
    world.pool(0, 3);
    world.block(LEVEL2_SIZE);
    let (split, result) = world.cost(unmap);
    assert_eq!((cost.max(split), result.unwrap().0), (stated("PAGE_UNMAP"), 17));
}

#[test]
fn a_page_that_the_host_looked_for_is_shared_and_unshared() {
    let records = records();
    let mut world = World::new(&records).with_ram().active();
    world.pool(100, 2);
    world.vm.map_page(&world.m, 0, page(0), [0; 2]).unwrap();
    world.looked_at([page(0)].into_iter());
    let (cost, result) = world.cost(|vm, m| vm.share(m, Ipa(0)));
    assert_eq!((cost, result), (stated("MEM_SHARE"), Ok(())));
    let (cost, result) = world.cost(|vm, m| vm.unshare(m, Ipa(0)));
    assert_eq!((cost, result), (stated("MEM_UNSHARE"), Ok(())));
}

#[test]
fn a_device_that_needs_two_tables() {
    let records = records();
    let mut world = World::new(&records);
    world.pool(0, 2);
    let (cost, result) = world.cost(|vm, m| vm.map_device(m, 0x801_0000, Pa(0x804_0000)));
    assert_eq!((cost, result), (stated("MAP_DEV"), Ok(())));
}

/// The most that a step of a teardown finds: the rest of a level 2 table, all of
/// the root, all of another level 2 table, then a level 3 table without a hole.
fn two_far_tables(world: &mut World<'_>) {
    world.pool(100, 4);
    let end = (1 << 40) - LEVEL2_SIZE;
    world.vm.map_page(&world.m, 0, page(99), [0; 2]).unwrap();
    let per_table = ENTRIES as u64;
    let lost = per_table - MAX_PAGES_PER_CALL;
    for n in 0..lost {
        world.vm.map_page(&world.m, end + n * PAGE_SIZE, page(200 + n), [0; 2]).unwrap();
    }
    for n in 0..MAX_PAGES_PER_CALL {
        world.vm.map_page(&world.m, end + (lost + n) * PAGE_SIZE, scattered(n), [0; 2]).unwrap();
    }
    for n in 0..lost {
        world.vm.unmap_pages(&world.m, end + n * PAGE_SIZE, 1).unwrap();
    }
    world.looked_at((0..MAX_PAGES_PER_CALL).map(scattered));
}

#[test]
fn a_reset_looks_far_and_gives_all_back() {
    let records = records();
    let mut world = World::new(&records).with_ram().active();
    two_far_tables(&mut world);
    let cost = world.steps(|vm, m| vm.reset(m));
    // It begins with a block.
    let mut world = World::new(&records).with_ram().active();
    world.pool(0, 2);
    world.block(0);
    let split = world.steps(|vm, m| vm.reset(m));
    assert_eq!(cost.max(split), stated("VM_RESET"));
}

#[test]
fn a_destruction_has_the_same_steps_and_those_of_the_pool() {
    let records = records();
    let mut world = World::new(&records).with_ram().active();
    two_far_tables(&mut world);
    let tables = world.steps(|vm, m| vm.destroy(m, |_| ()));
    // The pool's pages were looked at; the last ones come back first.
    let mut world = World::new(&records).with_ram().active();
    for n in (32..64).rev() {
        world.vm.donate_pool(&world.m, scattered(n), 1).unwrap();
    }
    world.looked_at((32..64).map(scattered));
    let cost = world.steps(|vm, m| vm.destroy(m, |_| ()));
    assert_eq!(world.m.pages.census().table, 0);
    let mut world = World::new(&records).with_ram().active();
    world.pool(0, 2);
    world.block(0);
    let split = world.steps(|vm, m| vm.destroy(m, |_| ()));
    assert_eq!(cost.max(tables).max(split), stated("VM_DESTROY"));
}

/// A call that is refused does no more than one that isn't.
#[test]
fn a_refusal_is_cheap() {
    let records = records();
    let mut world = World::new(&records).with_ram().active();
    world.pool(100, 2);
    let zero = Cost::default();
    for (ipa, pa) in [(1 << 39, page(0)), (0, BASE), (0, u64::MAX - 0xfff), (8, page(0))] {
        let (cost, result) = world.cost(|vm, m| vm.map_page(m, ipa, pa, [0; 2]));
        assert!(matches!(result, Err(Error::Denied | Error::Invalid)), "{ipa:#x} {pa:#x}");
        assert_eq!(cost, zero, "{ipa:#x} {pa:#x}");
    }
    let most = MAX_PAGES_PER_CALL + 1;
    assert_eq!(world.cost(|vm, m| vm.unmap_pages(m, 0, most)).0, zero);
    assert_eq!(world.cost(|vm, m| vm.donate_pool(m, page(0), most)).0, zero);
    assert_eq!(world.cost(|vm, m| vm.donate_pool(m, page(99), 2)), (zero, Err(Error::Denied)));
    let tables = world.vm.map.pool_len();
    let (cost, _) = world.cost(|vm, m| vm.map_page(m, 0, page(100), [0; 2]));
    assert_eq!((cost, world.vm.map.pool_len()), (zero, tables));
    assert_eq!(index(tables), 2);
}
