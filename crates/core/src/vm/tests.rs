// SPDX-License-Identifier: MIT OR Apache-2.0
use std::string::String;
use std::vec::Vec;
use std::{format, vec};

use super::*;
use crate::audit::Audit;
use crate::fake::{
    BANK2, BASE, CARVEOUT, Event, FakeMachine, Memory, PAGES, UART, host_page, records, root,
};
use crate::host_map::Resolution;
use crate::stage2::{Attributes, Entry};

const RAM: u64 = 0x8000_0000;
const SLOT: VmSlot = VmSlot(1);
const CONFIG: Config = Config { ipa_bits: 33, gic: 2, max_vcpus: 20 };
const BOOT: Boot = Boot { pc: RAM, x: [1, 2, 3, 4] };
/// Where the fixture's host pages go: run pages, pool, memory.
const RUN: u64 = 0;
const POOL: u64 = 2;
const MEM: u64 = 16;

/// All that a call could change.
#[derive(PartialEq, Debug)]
pub(crate) struct Snapshot {
    memory: Memory,
    owners: Vec<Option<Owner>>,
    vms: Vec<String>,
}

impl Snapshot {
    pub(crate) fn new<'a>(m: &FakeMachine<'_>, vms: impl Iterator<Item = &'a Vm>) -> Self {
        let pages = m.pages.ram().banks().iter().flat_map(|bank| {
            (0..bank.size).step_by(4096).map(|at| m.pages.owner(Pa(bank.base + at)))
        });
        let state = |vm: &Vm| {
            let Vm { phase, slot, generation, config, ram, devices, map, launch, .. } = vm;
            let Vm { vcpus, cntvoff, guards, seal, .. } = vm;
            let digest = launch.digest(config, ram.iter(), devices, core::iter::empty());
            format!(
                "{phase:?} {slot:?} {generation} {config:?} {ram:?} {devices:?} {map:?} \
                 {vcpus:?} {cntvoff} {guards:?} {seal:?} {digest:x?} {:?}",
                launch.check(Ipa(RAM))
            )
        };
        Self { memory: m.hw.snapshot(), owners: pages.collect(), vms: vms.map(state).collect() }
    }
}

/// Every invariant that an audit can see, and no translation left behind.
pub(crate) fn check<'a>(m: &FakeMachine<'_>, vms: impl Iterator<Item = &'a Vm>) {
    let mut scratch = [0; PAGES / 64];
    let mut audit = Audit::new(&m.hw, &m.pages, &mut scratch).unwrap();
    m.with_host_map(|map| audit.host(map).and_then(|()| audit.devices(map))).unwrap();
    for vm in vms {
        audit.vm(vm).unwrap();
    }
    audit.finish().unwrap();
    assert_eq!(m.hw.stale(), vec![]);
}

/// Makes a call that must be refused and change nothing.
fn refused<T: core::fmt::Debug, E: core::fmt::Debug>(
    m: &FakeMachine<'_>,
    vm: &mut Vm,
    f: impl FnOnce(&mut Vm) -> Result<T, E>,
) -> E {
    let before = Snapshot::new(m, core::iter::once(&*vm));
    let error = f(vm).unwrap_err();
    assert!(before == Snapshot::new(m, core::iter::once(&*vm)), "{error:?} has changed something");
    check(m, core::iter::once(&*vm));
    error
}

fn other(error: Error) -> Error {
    error
}

/// A VM with RAM, vCPUs 0 (on at launch) and 17, and four spare tables.
fn open(m: &FakeMachine<'_>) -> Vm {
    let mut vm = Vm::FREE;
    vm.create(SLOT, root(SLOT), CONFIG, 7, [1; 32]).unwrap();
    vm.add_ram(RAM, 0x4000_0000).unwrap();
    vm.create_vcpu(m, 0, host_page(RUN).0, 5).unwrap();
    vm.create_vcpu(m, 17, host_page(RUN + 1).0, 6).unwrap();
    vm.set_boot(0, BOOT).unwrap();
    vm.donate_pool(m, host_page(POOL).0, 4).unwrap();
    vm
}

fn active(m: &FakeMachine<'_>) -> Vm {
    let mut vm = open(m);
    vm.activate(m).unwrap();
    vm
}

fn destroy(m: &FakeMachine<'_>, vm: &mut Vm) -> (u32, Vec<u16>) {
    let (mut steps, mut contexts) = (1, Vec::new());
    while let Err(error) = vm.destroy(m, |context| contexts.push(context)) {
        assert_eq!(error, Error::Again);
        check(m, core::iter::once(&*vm));
        steps += 1;
    }
    (steps, contexts)
}

fn reset(m: &FakeMachine<'_>, vm: &mut Vm) -> u32 {
    let mut steps = 1;
    while let Err(error) = vm.reset(m) {
        assert_eq!(error, Error::Again);
        check(m, core::iter::once(&*vm));
        steps += 1;
    }
    steps
}

/// The guest's page at `ipa`, as its map has it.
fn guest_page(m: &FakeMachine<'_>, vm: &Vm, ipa: u64) -> Option<Pa> {
    let mut table = vm.map.root;
    for slot in [ipa >> 30, ipa >> 21 & 511] {
        let entry = Entry(m.hw.peek(table, index(slot)));
        if !entry.is_valid() {
            return None;
        }
        table = entry.address();
    }
    let entry = Entry(m.hw.peek(table, index(ipa >> 12 & 511)));
    assert!(!entry.is_valid() || entry == Entry::page(entry.address(), Attributes::Memory));
    entry.is_valid().then(|| entry.address())
}

fn is_hidden(m: &FakeMachine<'_>, pa: Pa) -> bool {
    m.with_host_map(|map| {
        assert_eq!(map.lookup(&m.hw, Ipa(pa.0)), None);
        assert_eq!(map.resolve(&m.hw, Ipa(pa.0), true, false), Resolution::Refused);
        map.resolve(&m.hw, Ipa(pa.0), false, false) == Resolution::Retry
            && map.lookup(&m.hw, Ipa(pa.0))
                == Some(Entry::page(Pa(BASE + 0x1000), Attributes::ReadOnly))
    })
}

#[test]
fn handles_name_a_slot_and_a_generation() {
    assert_eq!(handle_slot(0), None);
    assert_eq!(handle_slot(0x1_0000), None);
    assert_eq!(handle_slot(1), Some(VmSlot(0)));
    assert_eq!(handle_slot(0xabc_0080), Some(VmSlot(127)));
    assert_eq!(handle_slot(129), None);
    assert_eq!(handle_slot(0x101), None);
    assert_eq!(handle_slot(u64::MAX), None);

    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = Vm::FREE;
    assert!(!vm.exists());
    assert_eq!(vm.check_handle(vm.handle()), Err(Error::Invalid));
    let first = vm.create(SLOT, root(SLOT), CONFIG, 0, [1; 32]).unwrap();
    assert_eq!(handle_slot(first), Some(SLOT));
    assert!(vm.exists());
    assert_eq!(vm.check_handle(first), Ok(()));
    assert_eq!(vm.check_handle(first - 1), Err(Error::Invalid));
    destroy(&m, &mut vm);
    assert!(!vm.exists());
    assert_eq!(vm.check_handle(first), Err(Error::Invalid));
    let second = vm.create(SLOT, root(SLOT), CONFIG, 0, [1; 32]).unwrap();
    assert_ne!(first, second);
    assert_eq!(handle_slot(second), Some(SLOT));
    assert_eq!(vm.check_handle(first), Err(Error::Invalid));
    vm.generation = u32::MAX;
    assert_eq!(vm.handle(), 0xffff_ffff_0002);
    destroy(&m, &mut vm);
    vm.create(SLOT, root(SLOT), CONFIG, 0, [1; 32]).unwrap();
}

#[test]
fn a_bad_configuration_makes_no_vm() {
    let mut vm = Vm::FREE;
    for config in [
        Config { max_vcpus: 0, ..CONFIG },
        Config { max_vcpus: 65, ..CONFIG },
        Config { ipa_bits: 31, ..CONFIG },
        Config { ipa_bits: 41, ..CONFIG },
        Config { ipa_bits: u64::MAX, ..CONFIG },
        Config { gic: 1, ..CONFIG },
        Config { gic: 4, ..CONFIG },
    ] {
        assert_eq!(vm.create(SLOT, root(SLOT), config, 0, [1; 32]), Err(Error::Invalid));
        assert!(!vm.exists());
        assert_eq!(vm.generation, 0);
    }
    for config in [
        Config { max_vcpus: 1, ipa_bits: 32, gic: 0 },
        Config { max_vcpus: 64, ipa_bits: 40, gic: 3 },
    ] {
        let mut vm = Vm::FREE;
        vm.create(SLOT, root(SLOT), config, 9, [1; 32]).unwrap();
        assert_eq!((vm.config, vm.cntvoff()), (config, 9));
        assert_eq!(vm.create(SLOT, root(SLOT), CONFIG, 0, [1; 32]), Err(Error::Busy));
        assert_eq!((vm.config, vm.cntvoff()), (config, 9));
    }
}

#[test]
fn ram_is_declared_once_in_pages_and_in_space() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    for (ipa, size) in [
        (0, 0),
        (0x800, 0x1000),
        (0x1000, 0x800),
        (1 << 33, 0x1000),
        ((1 << 33) - 0x1000, 0x2000),
        (0, u64::MAX - 0xfff),
        (u64::MAX - 0xfff, 0x1000),
        (RAM - 0x1000, 0x2000),
        (RAM + 0x3fff_f000, 0x2000),
        (RAM, 0x1000),
        (0, 1 << 33),
    ] {
        let error = refused(&m, &mut vm, |vm| vm.add_ram(ipa, size));
        assert_eq!(error, Error::Invalid, "{ipa:#x} {size:#x}");
    }
    vm.add_ram(RAM, 0x4000_0000).unwrap();
    assert!(vm.is_ram(Ipa(RAM)) && vm.is_ram(Ipa(RAM + 0x3fff_f000)));
    assert!(!vm.is_ram(Ipa(RAM - 0x1000)) && !vm.is_ram(Ipa(RAM + 0x4000_0000)));
    assert!(!vm.is_ram(Ipa(0)) && !vm.is_ram(Ipa(u64::MAX - 0xfff)));
    vm.add_ram((1 << 33) - 0x1000, 0x1000).unwrap();
    for i in 0..6 {
        vm.add_ram(i * 0x1000, 0x1000).unwrap();
    }
    assert_eq!(refused(&m, &mut vm, |vm| vm.add_ram(0x6000, 0x1000)), Error::NoMemory);
    vm.add_ram(0, 0x1000).unwrap();
    vm.activate(&m).unwrap();
    assert_eq!(refused(&m, &mut vm, |vm| vm.add_ram(RAM, 0x4000_0000)), Error::State);
}

#[test]
fn a_run_page_is_lent_by_the_host() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    assert_eq!(vm.vcpu_count(), 2);
    let page = host_page(RUN);
    assert_eq!(m.pages.owner(page), Some(Owner::RunPage(SLOT)));
    assert!(m.host_leaf(page).unwrap().is_writable());
    let free = host_page(MEM).0;
    let mut create = |idx, page| refused(&m, &mut vm, |vm| vm.create_vcpu(&m, idx, page, 8));
    assert_eq!(create(1, free + 8), Error::Invalid);
    assert_eq!(create(20, free), Error::Invalid);
    assert_eq!(create(u64::MAX, free), Error::Invalid);
    assert_eq!(create(0, free), Error::State);
    assert_eq!(create(1, page.0), Error::Denied);
    assert_eq!(create(1, host_page(POOL).0), Error::Denied);
    assert_eq!(create(1, BASE), Error::Denied);
    assert_eq!(create(1, UART), Error::Denied);
    let claimed = m.pages.claim(Pa(free), Owner::Host).unwrap();
    assert_eq!(vm.create_vcpu(&m, 1, free, 8), Err(Error::Again));
    m.pages.unclaim(claimed);
    // Lent is not given: it can't be donated.
    let lent = |vm: &mut Vm| vm.donate_pool(&m, page.0, 1);
    assert_eq!(refused(&m, &mut vm, lent), Error::Denied);
    vm.activate(&m).unwrap();
    let lent = |vm: &mut Vm| vm.map_page(&m, RAM, page.0, [0; 2]);
    assert_eq!(refused(&m, &mut vm, lent), other(Error::Denied));
    let late = |vm: &mut Vm| vm.create_vcpu(&m, 1, free, 8);
    assert_eq!(refused(&m, &mut vm, late), Error::State);
}

#[test]
fn boot_contexts_are_set_while_open() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    assert_eq!(refused(&m, &mut vm, |vm| vm.set_boot(1, BOOT)), Error::Invalid);
    assert_eq!(refused(&m, &mut vm, |vm| vm.set_boot(64, BOOT)), Error::Invalid);
    vm.activate(&m).unwrap();
    assert_eq!(refused(&m, &mut vm, |vm| vm.set_boot(0, BOOT)), Error::State);
}

#[test]
fn the_digest_is_that_of_the_configuration_and_the_image() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = Vm::FREE;
    vm.create(SLOT, root(SLOT), CONFIG, 7, [1; 32]).unwrap();
    vm.add_ram(RAM, 0x10_0000).unwrap();
    vm.add_ram(0x1000, 0x1000).unwrap();
    vm.create_vcpu(&m, 0, host_page(RUN).0, 5).unwrap();
    vm.create_vcpu(&m, 2, host_page(RUN + 1).0, 5).unwrap();
    vm.donate_pool(&m, host_page(POOL).0, 4).unwrap();
    vm.map_device(&m, 0x802_1000, Pa(0x804_1000)).unwrap();
    vm.map_device(&m, 0x802_0000, Pa(0x804_0000)).unwrap();
    assert_eq!(refused(&m, &mut vm, |vm| vm.activate(&m)), Error::State);
    vm.set_boot(2, BOOT).unwrap();
    m.hw.poke(host_page(MEM), 511, 0x1234);
    let mut buffer = [0; 4096];
    vm.populate(&m, RAM, host_page(MEM).0, &mut buffer).unwrap();
    m.hw.take_events();
    let digest = vm.activate(&m).unwrap();
    assert!(m.hw.take_events().contains(&Event::InvalidateIcache));
    let mut launch = Launch::NEW;
    let mut content = [0; 4096];
    content[4088..4090].copy_from_slice(&[0x34, 0x12]);
    launch.add_page(Ipa(RAM), &content);
    let ram = [Range { base: 0x1000, size: 0x1000 }, Range { base: RAM, size: 0x10_0000 }];
    let devices = Range { base: 0x802_0000, size: 0x2000 };
    assert_eq!(digest, launch.digest(&CONFIG, ram.iter(), &devices, core::iter::once((2, BOOT))));
    assert_eq!(vm.power(0), Some(Power::Off));
    assert_eq!(vm.power(2), Some(Power::Pending(BOOT)));
    assert_eq!(refused(&m, &mut vm, |vm| vm.activate(&m)), Error::State);
}

#[test]
fn an_image_page_is_measured_out_of_the_hosts_hands() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    let page = host_page(MEM);
    m.hw.poke(page, 3, 42);
    let mut buffer = [0; 4096];
    let mut populate = |vm: &mut Vm, ipa, pa: u64| vm.populate(&m, ipa, pa, &mut buffer);
    m.hw.take_events();
    populate(&mut vm, RAM + 0x5000, page.0).unwrap();
    let events = m.hw.take_events();
    let at = |event| events.iter().position(|e| *e == event).unwrap();
    assert!(at(Event::InvalidateHost(Ipa(page.0), PAGE_SIZE)) < at(Event::Flush(page)));
    assert_eq!(guest_page(&m, &vm, RAM + 0x5000), Some(page));
    assert_eq!(m.pages.owner(page), Some(Owner::Private(SLOT)));
    assert_eq!(m.hw.peek(page, 3), 42);
    assert!(is_hidden(&m, page));
    check(&m, core::iter::once(&vm));

    let free = host_page(MEM + 2).0;
    let mut bad = |ipa, pa| refused(&m, &mut vm, |vm| populate(vm, ipa, pa));
    assert_eq!(bad(RAM + 0x4000, free), other(Error::Invalid));
    assert_eq!(bad(RAM + 0x5000, free), other(Error::Invalid));
    assert_eq!(bad(RAM + 0x6000, free + 8), other(Error::Invalid));
    assert_eq!(bad(RAM + 0x6008, free), other(Error::Invalid));
    assert_eq!(bad(RAM + 0x4000_0000, free), other(Error::Denied));
    assert_eq!(bad(RAM + 0x6000, page.0), other(Error::Denied));
    assert_eq!(bad(RAM + 0x6000, BASE + 0x1000), other(Error::Denied));
    assert_eq!(bad(RAM + 0x6000, UART), other(Error::Denied));
    populate(&mut vm, RAM + 0x6000, free).unwrap();
    vm.activate(&m).unwrap();
    let late = |vm: &mut Vm| populate(vm, RAM + 0x7000, host_page(MEM + 4).0);
    assert_eq!(refused(&m, &mut vm, late), other(Error::State));
}

#[test]
fn a_donated_page_is_wiped_before_the_guest_gets_it() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    m.hw.load(vm.map.vttbr());
    let page = host_page(MEM + 1);
    m.hw.poke(page, 0, 42);
    m.hw.take_events();
    vm.map_page(&m, RAM + 0x3000, page.0, [0; 2]).unwrap();
    let events = m.hw.take_events();
    let at = |event| events.iter().position(|e| *e == event).unwrap();
    assert!(at(Event::InvalidateHost(Ipa(page.0), PAGE_SIZE)) < at(Event::Zero(page)));
    let leaf = Entry::page(page, Attributes::Memory).0;
    let mapped = events.iter().position(|e| matches!(e, Event::Write(_, 3, v) if *v == leaf));
    assert!(at(Event::Zero(page)) < at(Event::InvalidateIcache));
    assert!(at(Event::InvalidateIcache) < mapped.unwrap());
    assert!(m.hw.is_zero(page) && is_hidden(&m, page));
    assert_eq!(guest_page(&m, &vm, RAM + 0x3000), Some(page));
    check(&m, core::iter::once(&vm));

    let free = host_page(MEM).0;
    let mut bad = |ipa, pa| refused(&m, &mut vm, |vm| vm.map_page(&m, ipa, pa, [0; 2]));
    assert_eq!(bad(RAM + 0x3000, free), other(Error::Denied));
    assert_eq!(bad(RAM + 8, free), other(Error::Invalid));
    assert_eq!(bad(RAM, free + 8), other(Error::Invalid));
    assert_eq!(bad(RAM - 0x1000, free), other(Error::Denied));
    assert_eq!(bad(u64::MAX - 0xfff, free), other(Error::Denied));
    assert_eq!(bad(RAM, page.0), other(Error::Denied));
    assert_eq!(bad(RAM, host_page(POOL).0), other(Error::Denied));
    assert_eq!(bad(RAM, BASE + CARVEOUT - 0x1000), other(Error::Denied));
    assert_eq!(bad(RAM, BANK2 + (4 << 20)), other(Error::Denied));
    let claimed = m.pages.claim(Pa(free), Owner::Host).unwrap();
    assert_eq!(vm.map_page(&m, RAM, free, [0; 2]), Err(other(Error::Again)));
    m.pages.unclaim(claimed);
    let mut vm = open(&FakeMachine::new(&self::records()));
    let closed = vm.map_page(&m, RAM, free, [0; 2]);
    assert_eq!(closed, Err(other(Error::State)));
}

#[test]
fn a_short_pool_says_how_many_pages_it_wants() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = Vm::FREE;
    vm.create(SLOT, root(SLOT), CONFIG, 7, [1; 32]).unwrap();
    vm.add_ram(0, 1 << 33).unwrap();
    vm.create_vcpu(&m, 0, host_page(RUN).0, 5).unwrap();
    vm.set_boot(0, BOOT).unwrap();
    vm.activate(&m).unwrap();
    let page = host_page(MEM).0;
    for wanted in [2, 1] {
        let error = refused(&m, &mut vm, |vm| vm.map_page(&m, RAM, page, [0; 2]));
        assert_eq!(error, Error::NoMemory);
        vm.donate_pool(&m, host_page(POOL + 2 * wanted).0, 1).unwrap();
    }
    vm.map_page(&m, RAM, page, [0; 2]).unwrap();
    assert_eq!(vm.map.pool_len(), 0);
    assert_eq!(m.pages.census().table, 2);
    // Another 2 MiB of the same GiB wants one table, another GiB two.
    let page = host_page(MEM + 2).0;
    let error = refused(&m, &mut vm, |vm| vm.map_page(&m, RAM + (2 << 20), page, [0; 2]));
    assert_eq!(error, Error::NoMemory);
    let error = refused(&m, &mut vm, |vm| vm.map_page(&m, 0, page, [0; 2]));
    assert_eq!(error, Error::NoMemory);
    vm.map_page(&m, RAM + 0x1000, page, [0; 2]).unwrap();
    check(&m, core::iter::once(&vm));
}

#[test]
fn a_device_page_never_lies_in_ram() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    let gicv = Pa(0x804_0000);
    let mut bad = |ipa| refused(&m, &mut vm, |vm| vm.map_device(&m, ipa, gicv));
    assert_eq!(bad(0x1008), other(Error::Invalid));
    assert_eq!(bad(1 << 33), other(Error::Invalid));
    assert_eq!(bad(RAM), other(Error::Denied));
    vm.map_device(&m, 0x802_0000, gicv).unwrap();
    let again = |vm: &mut Vm| vm.map_device(&m, 0x802_0000, gicv);
    assert_eq!(refused(&m, &mut vm, again), other(Error::Denied));
    vm.map_device(&m, 0x801_f000, gicv.offset(0x1000)).unwrap();
    check(&m, core::iter::once(&vm));
    // Neither may RAM come to lie over it.
    for (ipa, size) in [(0x801_f000, 0x1000), (0x802_0000, 0x1000), (0x800_0000, 0x10_0000)] {
        assert_eq!(refused(&m, &mut vm, |vm| vm.add_ram(ipa, size)), Error::Invalid);
    }
    vm.add_ram(0x802_1000, 0x1000).unwrap();
    vm.unmap_pages(&m, 0x802_0000, 1).unwrap();
    assert_ne!(vm.map_device(&m, 0x802_0000, gicv), Ok(()));
    vm.activate(&m).unwrap();
    vm.map_device(&m, 0x803_0000, gicv).unwrap();
    // All of it goes with a reset.
    reset(&m, &mut vm);
    vm.add_ram(0x802_0000, 0x1000).unwrap();
    vm.map_device(&m, 0x803_0000, gicv).unwrap();
    destroy(&m, &mut vm);
    assert_eq!(vm.map_device(&m, 0x803_0000, gicv), Err(other(Error::State)));
    let config = Config { gic: 3, ..CONFIG };
    vm.create(SLOT, root(SLOT), config, 0, [1; 32]).unwrap();
    vm.donate_pool(&m, host_page(POOL).0, 4).unwrap();
    let gicv3 = |vm: &mut Vm| vm.map_device(&m, 0x803_0000, gicv);
    assert_eq!(refused(&m, &mut vm, gicv3), other(Error::Denied));
    vm.add_ram(0x803_0000, 0x1000).unwrap();
}

#[test]
fn whose_page_it_is_comes_before_a_lack_of_tables() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    let page = host_page(MEM);
    vm.map_page(&m, RAM, page.0, [0; 2]).unwrap();
    // No table is there for the last page of RAM, and none in the pool.
    while vm.map.take_from_pool(&m).is_some() {}
    let far = vm.ram[0].base + vm.ram[0].size - 0x1000;
    let mut map = |pa: Pa| vm.map_page(&m, far, pa.0, [0; 2]);
    assert_eq!(map(page), Err(other(Error::Denied)));
    assert!(matches!(map(host_page(MEM + 1)), Err(Error::NoMemory)));
    assert_eq!(m.pages.owner(host_page(MEM + 1)), Some(Owner::Host));
}

/// Where its pages lie, and what the host has to give them back.
type Sealed = (u64, Tag);

/// Two pages of the guest's, with a secret in each.
fn two_pages(m: &FakeMachine<'_>, vm: &mut Vm) -> (Pa, Pa) {
    let (a, b) = (host_page(MEM), host_page(MEM + 1));
    for (ipa, page) in [(RAM, a), (RAM + 0x2000, b)] {
        vm.map_page(m, ipa, page.0, [0; 2]).unwrap();
        m.hw.poke(page, 9, 0x5ec0 + ipa);
    }
    (a, b)
}

fn content(m: &FakeMachine<'_>, pa: Pa) -> [u64; 512] {
    core::array::from_fn(|i| m.hw.peek(pa, i))
}

fn put(m: &FakeMachine<'_>, pa: Pa, content: &[u64; 512]) {
    for (i, word) in content.iter().enumerate() {
        m.hw.poke(pa, i, *word);
    }
}

#[test]
fn pages_come_back_sealed_one_by_one() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    m.hw.load(vm.map.vttbr());
    let (a, b) = two_pages(&m, &mut vm);
    let mut bad = |ipa, n| refused(&m, &mut vm, |vm| vm.unmap_pages(&m, ipa, n));
    assert_eq!(bad(RAM, 33), Error::Invalid);
    assert_eq!(bad(RAM, u64::MAX), Error::Invalid);
    assert_eq!(bad(RAM + 8, 1), Error::Invalid);
    assert_eq!(bad((1 << 33) - 0x1000, 2), Error::Invalid);
    assert_eq!(bad((1 << 33) - 0x2000, 3), Error::Invalid);
    assert_eq!(bad(u64::MAX - 0xfff, 1), Error::Invalid);
    assert_eq!(vm.unmap_pages(&m, RAM, 0), Ok((0, [0; 2])));
    assert_eq!(guest_page(&m, &vm, RAM), Some(a));
    // Holes, and the end of the guest's RAM, are skipped.
    let mut tags = vec![];
    for (from, n, ipa, page, done) in
        [(RAM - 0x1000, 32, RAM, a, 2), (RAM + 0x1000, 30, RAM + 0x2000, b, 2)]
    {
        m.hw.take_events();
        let (looked_at, tag) = vm.unmap_pages(&m, from, n).unwrap();
        assert_eq!(looked_at, done);
        let events = m.hw.take_events();
        let at = |event| events.iter().position(|e| *e == event).unwrap();
        let gone = at(Event::InvalidateGuest(vm.map.vttbr(), Ipa(ipa), PAGE_SIZE));
        let shown = Entry::page(page, Attributes::Memory).0;
        let shown = events.iter().position(|e| matches!(e, Event::Write(_, _, v) if *v == shown));
        let word = events.iter().position(|e| matches!(e, Event::Write(p, 511, _) if *p == page));
        let (written, shown) = (word.unwrap(), shown.unwrap());
        assert!(gone < at(Event::Flush(page)) && at(Event::Flush(page)) < written);
        let after = &events[written..shown];
        assert!(after.contains(&Event::Flush(page)) && after.contains(&Event::InvalidateIcache));
        assert_eq!(guest_page(&m, &vm, ipa), None);
        assert_eq!(m.pages.owner(page), Some(Owner::Host));
        // Nothing of it is as it was: neither the secret nor a zero.
        let words = content(&m, page);
        assert!(words.iter().all(|word| *word != 0 && *word != 0x5ec0 + ipa));
        assert!(m.host_has(page));
        check(&m, core::iter::once(&vm));
        tags.push(tag);
    }
    assert_ne!(tags[0], tags[1]);
    assert_eq!(m.pages.census().private, 0);
    assert_eq!(vm.unmap_pages(&m, RAM, 32), Ok((32, [0; 2])));
    m.hw.unload(vm.map.vttbr());
    // In whatever state it is.
    for phase in [Phase::Open, Phase::Stopped, Phase::Resetting, Phase::Destroying] {
        vm.phase = Phase::Active;
        vm.map_page(&m, RAM + 0x5000, host_page(MEM + 2).0, [0; 2]).unwrap();
        vm.phase = phase;
        let (done, tag) = vm.unmap_pages(&m, RAM + 0x5000, 1).unwrap();
        assert_eq!((done, m.pages.census().private), (1, 0));
        vm.phase = Phase::Active;
        vm.map_page(&m, RAM + 0x5000, host_page(MEM + 2).0, tag).unwrap();
        vm.unmap_pages(&m, RAM + 0x5000, 1).unwrap();
        // What is there now is another version.
        let stale = vm.map_page(&m, RAM + 0x5000, host_page(MEM + 2).0, tag);
        assert_eq!(stale, Err(other(Error::Integrity)));
        vm.phase = Phase::Active;
        reset(&m, &mut vm);
        vm.set_boot(0, BOOT).unwrap();
        vm.activate(&m).unwrap();
    }
}

#[test]
fn what_was_sealed_comes_back_to_its_place_in_any_page() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    m.hw.load(vm.map.vttbr());
    let (a, _) = two_pages(&m, &mut vm);
    let words = content(&m, a);
    let (_, tag) = vm.unmap_pages(&m, RAM, 1).unwrap();
    let sealed = content(&m, a);
    let elsewhere = host_page(MEM + 3);
    put(&m, elsewhere, &sealed);
    m.hw.take_events();
    vm.map_page(&m, RAM, elsewhere.0, tag).unwrap();
    // Decrypted where the host can't see it, and visible to caches that are off.
    let events = m.hw.take_events();
    let at = |event| events.iter().position(|e| *e == event).unwrap();
    let leaf = Entry::page(elsewhere, Attributes::Memory).0;
    let mapped = events.iter().position(|e| matches!(e, Event::Write(_, _, v) if *v == leaf));
    let word = events.iter().position(|e| matches!(e, Event::Write(p, 511, _) if *p == elsewhere));
    let (word, mapped) = (word.unwrap(), mapped.unwrap());
    assert!(at(Event::InvalidateHost(Ipa(elsewhere.0), PAGE_SIZE)) < word);
    assert!(events[word..mapped].contains(&Event::Flush(elsewhere)));
    assert!(events[word..mapped].contains(&Event::InvalidateIcache));
    assert_eq!(content(&m, elsewhere), words);
    assert!(is_hidden(&m, elsewhere));
    assert_eq!(guest_page(&m, &vm, RAM), Some(elsewhere));
    assert_eq!(m.pages.owner(elsewhere), Some(Owner::Private(SLOT)));
    // Not a second time, and the same content is never sealed to the same again.
    assert_eq!(vm.map_page(&m, RAM, a.0, tag), Err(other(Error::Denied)));
    let (_, second) = vm.unmap_pages(&m, RAM, 1).unwrap();
    assert_ne!(tag, second);
    assert!(content(&m, elsewhere).iter().zip(&sealed).all(|(a, b)| a != b));
    check(&m, core::iter::once(&vm));
}

/// Takes two pages of a VM, has `forge` prepare the host's answer for the first, and
/// sees the VM stop.
fn forged(forge: impl FnOnce(&FakeMachine<'_>, &mut Vm, [Sealed; 2]) -> (u64, u64, Tag)) {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    let mut other_vm = Vm::FREE;
    other_vm.create(VmSlot(2), root(VmSlot(2)), CONFIG, 0, [1; 32]).unwrap();
    let (a, b) = two_pages(&m, &mut vm);
    let (_, first) = vm.unmap_pages(&m, RAM, 1).unwrap();
    let (_, second) = vm.unmap_pages(&m, RAM + 0x2000, 1).unwrap();
    let sealed = [content(&m, a), content(&m, b)];
    let (ipa, page, tag) = forge(&m, &mut vm, [(a.0, first), (b.0, second)]);
    let before = content(&m, Pa(page));
    vm.enter(0).unwrap();
    assert_eq!(vm.map_page(&m, ipa, page, tag), Err(other(Error::Integrity)));
    // The host has what it gave.
    assert_eq!(m.pages.owner(Pa(page)), Some(Owner::Host));
    assert_eq!(content(&m, Pa(page)), before);
    assert!(m.host_leaf(Pa(page)).is_some_and(Entry::is_writable));
    assert_eq!(guest_page(&m, &vm, ipa), None);
    check(&m, core::iter::once(&vm));
    // It has stopped: not even what is right helps.
    vm.leave(0, 0);
    put(&m, a, &sealed[0]);
    for result in [vm.runnable(0).map(|_| ()), vm.enter(0).map(|_| ())] {
        assert_eq!(result, Err(Error::Integrity));
    }
    let right = |vm: &mut Vm| vm.map_page(&m, RAM, a.0, first);
    assert_eq!(refused(&m, &mut vm, right), other(Error::Integrity));
    assert_eq!(refused(&m, &mut vm, |vm| vm.add_ram(0, 0x1000)), Error::Integrity);
    // Started anew it runs; no version comes a second time.
    let old = vm.seal.clone();
    reset(&m, &mut vm);
    assert_eq!(vm.seal, old);
    vm.set_boot(0, BOOT).unwrap();
    vm.activate(&m).unwrap();
    vm.runnable(0).unwrap();
    destroy(&m, &mut vm);
    assert_eq!(vm.seal, Seal::new([0; 32]));
    check(&m, [&vm, &other_vm].into_iter());
}

#[test]
fn what_is_not_what_was_sealed_stops_the_vm() {
    // One bit of the content, of the tag.
    for (word, bit) in [(0, 0), (511, 63)] {
        forged(|m, _, [(a, tag), _]| {
            m.hw.poke(Pa(a), word, m.hw.peek(Pa(a), word) ^ 1 << bit);
            (RAM, a, tag)
        });
    }
    for n in 0..128 {
        forged(|_, _, [(a, mut tag), _]| {
            tag[n / 64] ^= 1 << (n % 64);
            (RAM, a, tag)
        });
        if cfg!(miri) {
            break;
        }
    }
    // Half of it, zeros, nothing.
    forged(|m, _, [(a, tag), _]| {
        (256..512).for_each(|i| m.hw.poke(Pa(a), i, 0));
        (RAM, a, tag)
    });
    forged(|_, _, [_, (_, tag)]| (RAM, host_page(MEM + 5).0, tag));
    forged(|_, _, _| (RAM, host_page(MEM + 5).0, [0; 2]));
    // Of another place, with its tag.
    forged(|_, _, [_, (b, tag)]| (RAM, b, tag));
    forged(|_, _, [(a, _), (_, tag)]| (RAM, a, tag));
    // What was there before.
    forged(|m, vm, [(a, tag), _]| {
        let old = content(m, Pa(a));
        vm.map_page(m, RAM, a, tag).unwrap();
        vm.unmap_pages(m, RAM, 1).unwrap();
        put(m, Pa(a), &old);
        (RAM, a, tag)
    });
    // Of another VM in its slot before it, under the same key.
    forged(|_, vm, [(a, tag), _]| {
        vm.generation += 1;
        (RAM, a, tag)
    });
}

#[test]
fn pool_pages_are_donated_all_or_none() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    assert_eq!((vm.map.pool_len(), m.pages.census().table), (4, 4));
    let first = BASE + CARVEOUT + 0x10_0000;
    let mut bad = |pa, n| refused(&m, &mut vm, |vm| vm.donate_pool(&m, pa, n));
    assert_eq!(bad(first, 0), Error::Invalid);
    assert_eq!(bad(first, 33), Error::Invalid);
    assert_eq!(bad(first + 8, 1), Error::Invalid);
    assert_eq!(bad(BASE + CARVEOUT - 0x1000, 2), Error::Denied);
    assert_eq!(bad(BASE + (6 << 20) - 0x1000, 2), Error::Denied);
    assert_eq!(bad(host_page(POOL).0 - 0x1000, 2), Error::Denied);
    assert_eq!(bad(u64::MAX - 0xfff, 2), Error::Denied);
    // The last of the range is in another CPU's hands.
    let last = m.pages.claim(Pa(first + 31 * 0x1000), Owner::Host).unwrap();
    assert_eq!(vm.donate_pool(&m, first, 32), Err(Error::Again));
    m.pages.unclaim(last);
    assert_eq!(vm.map.pool_len(), 4);
    check(&m, core::iter::once(&vm));
    m.hw.poke(Pa(first), 7, 42);
    vm.donate_pool(&m, first, 32).unwrap();
    assert_eq!((vm.map.pool_len(), m.pages.census().table), (36, 36));
    assert_eq!(m.hw.peek(Pa(first), 7), 0);
    check(&m, core::iter::once(&vm));
    vm.phase = Phase::Destroying;
    assert_eq!(refused(&m, &mut vm, |vm| vm.donate_pool(&m, first, 1)), Error::State);
}

#[test]
fn a_vcpu_runs_on_one_cpu_at_a_time() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(0)), Error::State);
    vm.activate(&m).unwrap();
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(1)), Error::Invalid);
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(u64::MAX)), Error::Invalid);
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(17)), Error::State);
    // As long as an entry is refused, it starts the next time.
    let run = vm.runnable(0).unwrap();
    let expected = Run {
        context: 5,
        run_page: host_page(RUN),
        start: Some(BOOT),
        vttbr: 2 << 48 | root(SLOT).0,
        cntvoff: 7,
        config: CONFIG,
    };
    assert_eq!(run, expected);
    assert_eq!((vm.power(0), vm.runnable(0)), (Some(Power::Pending(BOOT)), Ok(expected)));
    assert_eq!(vm.enter(0), Ok(expected));
    assert_eq!(vm.power(0), Some(Power::On));
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(0)), Error::Busy);
    assert_eq!(refused(&m, &mut vm, |vm| vm.reset(&m)), Error::Busy);
    assert_eq!(refused(&m, &mut vm, |vm| vm.destroy(&m, |_| panic!("running"))), Error::Busy);
    vm.leave(17, 0);
    vm.leave(1, 0);
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(0)), Error::Busy);
    vm.leave(0, 0);
    vm.leave(0, 0);
    assert_eq!(vm.enter(0).unwrap().start, None);
    vm.cpu_off(0);
    vm.leave(0, 0);
    assert_eq!(vm.power(0), Some(Power::Off));
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(0)), Error::State);
}

#[test]
fn the_guest_says_where_a_vcpu_starts() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    vm.enter(0).unwrap();
    let boot = Boot { pc: 0x1234, x: [9, 0, 0, 0] };
    assert_eq!(mpidr_affinity(17), 0x101);
    assert_eq!(mpidr_affinity(0xfff), 0xff0f);
    assert_eq!(vm.cpu_on(0, 0x100, boot), Err(psci::Error::InvalidParameters));
    assert_eq!(vm.cpu_on(0, 17, boot), Err(psci::Error::InvalidParameters));
    assert_eq!(vm.cpu_on(0, 0x104, boot), Err(psci::Error::InvalidParameters));
    assert_eq!(vm.power(0x100), None);
    assert_eq!(vm.power(0x101), Some(Power::Off));
    assert_eq!(vm.cpu_on(0, 0x101, boot), Ok(()));
    assert_eq!(vm.power(0x101), Some(Power::Pending(boot)));
    assert_eq!(vm.cpu_on(0, 0x101, BOOT), Err(psci::Error::OnPending));
    // The host did it.
    vm.cpu_on_answered(0, 0);
    assert_eq!(vm.power(0x101), Some(Power::Pending(boot)));
    // A later answer is about another call.
    vm.cpu_on_answered(0, 1);
    assert_eq!(vm.power(0x101), Some(Power::Pending(boot)));
    assert_eq!(vm.enter(17).unwrap().start, Some(boot));
    assert_eq!(vm.cpu_on(0, 0x101, BOOT), Err(psci::Error::AlreadyOn));
    assert_eq!(vm.cpu_on(17, 0, BOOT), Err(psci::Error::AlreadyOn));
    vm.cpu_off(17);
    vm.leave(17, 0);
    // The host could not do it.
    vm.cpu_on(0, 0x101, boot).unwrap();
    vm.cpu_on_answered(0, u64::MAX);
    assert_eq!(vm.power(0x101), Some(Power::Off));
    assert_eq!(vm.cpu_on(0, 0x101, BOOT), Ok(()));
    // It says so, but runs it already: too late.
    vm.enter(17).unwrap();
    vm.cpu_on_answered(0, u64::MAX);
    assert_eq!(vm.power(0x101), Some(Power::On));
    vm.leave(17, 0);
    vm.cpu_off(17);
    vm.cpu_on(0, 0x101, boot).unwrap();
    vm.enter(17).unwrap();
    vm.leave(17, 0);
    vm.cpu_on_answered(0, u64::MAX);
    assert_eq!(vm.power(0x101), Some(Power::On));
    // Nobody's answer.
    vm.cpu_on_answered(63, 1);
    vm.cpu_off(63);
}

#[test]
fn an_sgi_is_for_vcpus_of_its_vm_that_it_was_sent_to() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    let to_17 = Sgi { id: 1 << 5, targets: 1 << 17 };
    let to_others = Sgi { id: 1 << 6, targets: !1 };
    assert_eq!(refused(&m, &mut vm, |vm| vm.take_sgis(17, 1 << 5)), Error::Invalid);
    vm.send_sgi(to_17);
    vm.send_sgi(to_others);
    // Neither the sender, nor another one, nor one that isn't there.
    for (idx, set) in [(0, 1 << 5), (0, 1 << 6), (17, 1 << 4), (17, 1 << 4 | 1 << 5), (1, 1 << 6)] {
        assert_eq!(refused(&m, &mut vm, |vm| vm.take_sgis(idx, set)), Error::Invalid);
    }
    assert_eq!(vm.take_sgis(17, 1 << 5 | 1 << 6), Ok(()));
    assert_eq!(refused(&m, &mut vm, |vm| vm.take_sgis(17, 1 << 5)), Error::Invalid);
    // Still pending after the run; once off and on again too.
    vm.cpu_on(0, 0x101, BOOT).unwrap();
    vm.enter(17).unwrap();
    vm.cpu_off(17);
    vm.leave(17, 1 << 5);
    vm.leave(17, 1 << 5);
    vm.cpu_on(0, 0x101, BOOT).unwrap();
    vm.enter(17).unwrap();
    assert_eq!(vm.take_sgis(17, 1 << 5), Ok(()));
    assert_eq!(refused(&m, &mut vm, |vm| vm.take_sgis(17, 1 << 5)), Error::Invalid);
    vm.leave(17, 0);
    // A new life knows nothing of the old one's.
    vm.send_sgi(to_17);
    reset(&m, &mut vm);
    assert_eq!(refused(&m, &mut vm, |vm| vm.take_sgis(17, 1 << 5)), Error::Invalid);
}

/// Maps `n` pages from both banks at spread addresses; each holds a secret.
fn fill(m: &FakeMachine<'_>, vm: &mut Vm, n: u64) {
    for i in 0..n {
        let page = host_page(2 * MEM + i);
        let ipa = RAM + (i % 2) * (2 << 20) + i / 2 * 0x6000;
        vm.map_page(m, ipa, page.0, [0; 2]).unwrap();
        m.hw.poke(page, 5, 0x5ec0);
    }
}

#[test]
fn a_reset_returns_every_page_and_opens_the_launch() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = open(&m);
    let handle = vm.handle();
    vm.populate(&m, RAM + 0x1000, host_page(MEM).0, &mut [0; 4096]).unwrap();
    let digest = vm.activate(&m).unwrap();
    vm.enter(0).unwrap();
    m.hw.load(vm.map.vttbr());
    fill(&m, &mut vm, 150);
    vm.cpu_on(0, 0x101, BOOT).unwrap();
    m.hw.unload(vm.map.vttbr());
    vm.leave(0, 0);
    check(&m, core::iter::once(&vm));
    assert_eq!(m.pages.census().private, 151);

    m.hw.take_events();
    assert_eq!(vm.reset(&m), Err(Error::Again));
    let events = m.hw.take_events();
    assert_eq!(events[0], Event::InvalidateGuestAll(vm.map.vttbr()));
    assert_eq!(m.pages.census().private, 151 - MAX_PAGES_PER_CALL);
    // Half reset it can do nothing else.
    assert_eq!(refused(&m, &mut vm, |vm| vm.enter(0)), Error::State);
    let page = host_page(MEM + 2).0;
    assert_eq!(refused(&m, &mut vm, |vm| vm.map_page(&m, RAM, page, [0; 2])), other(Error::State));
    assert_eq!(refused(&m, &mut vm, |vm| vm.donate_pool(&m, page, 1)), Error::State);
    assert_eq!(refused(&m, &mut vm, |vm| vm.activate(&m)), Error::State);
    assert_eq!(refused(&m, &mut vm, |vm| vm.add_ram(0, 0x1000)), Error::State);
    // 76 pages in one table, 75 in the other.
    assert_eq!(reset(&m, &mut vm), 6);
    assert_eq!(m.pages.census().private, 0);
    assert_eq!((m.pages.census().table, vm.map.pool_len()), (4, 4));
    for i in 0..150 {
        assert!(m.hw.is_zero(host_page(2 * MEM + i)));
    }
    // The root is empty again.
    assert!(m.hw.is_zero(vm.map.root) && m.hw.is_zero(vm.map.root.offset(PAGE_SIZE)));
    // What stays: handle, RAM, vCPUs, offset. What doesn't: power, boot, image.
    assert_eq!(vm.check_handle(handle), Ok(()));
    assert_eq!((vm.vcpu_count(), vm.cntvoff()), (2, 7));
    assert!(vm.is_ram(Ipa(RAM)));
    assert_eq!((vm.power(0), vm.power(0x101)), (Some(Power::Off), Some(Power::Off)));
    assert_eq!(refused(&m, &mut vm, |vm| vm.activate(&m)), Error::State);
    // Again is the same.
    let before = Snapshot::new(&m, core::iter::once(&vm));
    assert_eq!(reset(&m, &mut vm), 1);
    assert!(before == Snapshot::new(&m, core::iter::once(&vm)));
    // The same launch gives the same digest; no answer of before counts.
    vm.set_boot(0, BOOT).unwrap();
    vm.populate(&m, RAM + 0x1000, host_page(MEM).0, &mut [0; 4096]).unwrap();
    assert_eq!(vm.activate(&m), Ok(digest));
    vm.cpu_on(0, 0x101, BOOT).unwrap();
    // Each vCPU has the context and run page that it had.
    for (idx, context, page) in [(0, 5, RUN), (17, 6, RUN + 1)] {
        let run = vm.enter(idx).unwrap();
        assert_eq!((run.start, run.context, run.run_page), (Some(BOOT), context, host_page(page)));
    }
    check(&m, core::iter::once(&vm));
}

#[test]
fn a_reset_forgets_a_cpu_on_in_flight() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    vm.cpu_on(0, 0x101, BOOT).unwrap();
    reset(&m, &mut vm);
    vm.set_boot(17, BOOT).unwrap();
    vm.activate(&m).unwrap();
    vm.cpu_on_answered(0, 1);
    assert_eq!(vm.power(0x101), Some(Power::Pending(BOOT)));
}

#[test]
fn a_destroyed_vm_leaves_nothing() {
    let records = records();
    let m = FakeMachine::new(&records);
    let census = m.pages.census();
    let mut vm = active(&m);
    vm.donate_pool(&m, BASE + CARVEOUT + 0x10_0000, 32).unwrap();
    m.hw.load(vm.map.vttbr());
    fill(&m, &mut vm, 40);
    m.hw.unload(vm.map.vttbr());
    assert_eq!(vm.reset(&m), Err(Error::Again));
    assert_eq!(vm.destroy(&m, |_| panic!("not yet")), Err(Error::Again));
    assert_eq!(refused(&m, &mut vm, |vm| vm.reset(&m)), Error::State);
    let (steps, contexts) = destroy(&m, &mut vm);
    // Both tables' 20 pages, then 36 pool pages.
    assert!((2..=5).contains(&steps), "{steps}");
    assert_eq!(contexts, vec![5, 6]);
    assert!(!vm.exists());
    assert_eq!((vm.vcpu_count(), m.pages.census()), (0, census));
    for n in 0..2 * MEM + 40 {
        let page = host_page(n);
        assert_eq!(m.pages.owner(page), Some(Owner::Host));
        assert!(m.hw.is_zero(page));
    }
    assert!(m.hw.is_zero(root(SLOT)));
    check(&m, core::iter::once(&vm));
    // The dead can't be killed or raised.
    assert_eq!(refused(&m, &mut vm, |vm| vm.reset(&m)), Error::State);
    assert_eq!(refused(&m, &mut vm, |vm| vm.destroy(&m, |_| ())), Error::State);
    // A new one in the slot has none of the old.
    vm.create(SLOT, root(SLOT), CONFIG, 8, [1; 32]).unwrap();
    assert!(!vm.is_ram(Ipa(RAM)));
    assert_eq!(vm.map.pool_len(), 0);
    check(&m, core::iter::once(&vm));
}

#[test]
fn a_slot_never_used_has_nothing_to_tear_down() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = Vm::FREE;
    assert_eq!(vm.reset(&m), Err(Error::State));
    assert_eq!(vm.destroy(&m, |_| ()), Err(Error::State));
    assert_eq!(m.hw.take_events(), vec![]);
}

#[test]
fn an_address_space_of_several_gib_is_torn_down() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = Vm::FREE;
    let config = Config { ipa_bits: 40, ..CONFIG };
    vm.create(SLOT, root(SLOT), config, 0, [1; 32]).unwrap();
    vm.add_ram(0, 1 << 40).unwrap();
    vm.create_vcpu(&m, 0, host_page(RUN).0, 0).unwrap();
    vm.set_boot(0, BOOT).unwrap();
    vm.donate_pool(&m, BASE + CARVEOUT + 0x10_0000, 20).unwrap();
    vm.activate(&m).unwrap();
    // First and last page of a GiB, in both halves of the root, the very last.
    let ends = [0, 0x3fff_f000, 0x4000_0000, 512 << 30, (1 << 40) - 0x1000];
    for (ipa, n) in ends.into_iter().zip(0..) {
        vm.map_page(&m, ipa, host_page(MEM + n).0, [0; 2]).unwrap();
        assert_eq!(guest_page(&m, &vm, ipa), Some(host_page(MEM + n)));
    }
    check(&m, core::iter::once(&vm));
    assert_eq!(vm.map.pool_len(), 20 - 9);
    reset(&m, &mut vm);
    assert_eq!(vm.map.pool_len(), 20);
    destroy(&m, &mut vm);
    check(&m, core::iter::once(&vm));
}

#[test]
fn a_shared_page_is_seen_by_both_and_comes_back_as_it_is() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    m.hw.load(vm.map.vttbr());
    let (a, b) = (host_page(MEM), host_page(MEM + 1));
    vm.map_page(&m, RAM, a.0, [0; 2]).unwrap();
    vm.map_page(&m, RAM + 0x1000, b.0, [0; 2]).unwrap();
    m.hw.poke(a, 9, 42);
    // The host looked where it is hidden.
    assert!(is_hidden(&m, a));
    m.hw.take_events();
    vm.share(&m, Ipa(RAM)).unwrap();
    let events = m.hw.take_events();
    let own = Entry::page(a, Attributes::Memory);
    assert!(!events.iter().any(|e| matches!(e, Event::Zero(_) | Event::InvalidateGuest(..))));
    assert_eq!((guest_page(&m, &vm, RAM), m.host_leaf(a)), (Some(a), Some(own)));
    assert_eq!(m.hw.peek(a, 9), 42);
    assert_eq!(m.pages.owner(a), Some(Owner::Shared(SLOT)));
    assert!(is_hidden(&m, b));
    check(&m, core::iter::once(&vm));

    // It is the VM's: not to be given to it again, nor to anyone else.
    assert_eq!(refused(&m, &mut vm, |vm| vm.share(&m, Ipa(RAM))), Error::Denied);
    let again = |vm: &mut Vm| vm.map_page(&m, RAM + 0x2000, a.0, [0; 2]);
    assert_eq!(refused(&m, &mut vm, again), other(Error::Denied));
    assert_eq!(refused(&m, &mut vm, |vm| vm.donate_pool(&m, a.0, 1)), Error::Denied);
    let mut bad = |ipa| refused(&m, &mut vm, |vm| vm.share(&m, Ipa(ipa)));
    assert_eq!(bad(RAM + 0x2000), Error::Again);
    assert_eq!(bad(RAM + 0x20_0000), Error::Again);
    assert_eq!(bad(RAM + 8), Error::Invalid);
    assert_eq!(bad(RAM - 0x1000), Error::Invalid);
    assert_eq!(bad(RAM + 0x4000_0000), Error::Invalid);
    assert_eq!(bad(u64::MAX - 0xfff), Error::Invalid);
    let mut bad = |ipa| refused(&m, &mut vm, |vm| vm.unshare(&m, Ipa(ipa)));
    assert_eq!(bad(RAM + 0x1000), Error::Denied);
    assert_eq!(bad(RAM + 0x2000), Error::Again);
    assert_eq!(bad(RAM + 8), Error::Invalid);
    assert_eq!(bad(0), Error::Invalid);

    // What the host left there is the guest's now, and nobody sees what comes after.
    m.hw.poke(a, 9, 43);
    m.hw.take_events();
    vm.unshare(&m, Ipa(RAM)).unwrap();
    let events = m.hw.take_events();
    let at = |event| events.iter().position(|e| *e == event).unwrap();
    let hidden = events.iter().position(|e| matches!(e, Event::Write(_, _, v) if *v == 2)).unwrap();
    assert!(hidden < at(Event::InvalidateHost(Ipa(a.0), PAGE_SIZE)));
    assert!(at(Event::InvalidateHost(Ipa(a.0), PAGE_SIZE)) < at(Event::Flush(a)));
    assert!(at(Event::InvalidateDevices(Ipa(a.0), PAGE_SIZE)) < at(Event::Flush(a)));
    assert_eq!((m.hw.peek(a, 9), guest_page(&m, &vm, RAM)), (43, Some(a)));
    assert_eq!(m.pages.owner(a), Some(Owner::Private(SLOT)));
    assert!(is_hidden(&m, a));
    check(&m, core::iter::once(&vm));
    assert_eq!(refused(&m, &mut vm, |vm| vm.unshare(&m, Ipa(RAM))), Error::Denied);
    vm.share(&m, Ipa(RAM)).unwrap();
    assert_eq!(m.pages.census().shared, 1);
}

#[test]
fn a_shared_page_comes_back_as_it_is_and_is_never_out_of_the_hosts_map() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    for n in 0..3 {
        vm.map_page(&m, RAM + n * 0x1000, host_page(MEM + n).0, [0; 2]).unwrap();
        m.hw.poke(host_page(MEM + n), 7, 0x5ec0);
        vm.share(&m, Ipa(RAM + n * 0x1000)).unwrap();
    }
    m.hw.load(vm.map.vttbr());
    m.hw.take_events();
    assert_eq!(vm.unmap_pages(&m, RAM, 1), Ok((1, [0; 2])));
    assert_eq!(m.pages.owner(host_page(MEM)), Some(Owner::Host));
    assert_eq!((m.hw.peek(host_page(MEM), 7), m.pages.census().shared), (0x5ec0, 2));
    check(&m, core::iter::once(&vm));
    let gone = |vm: &mut Vm| vm.share(&m, Ipa(RAM));
    assert_eq!(refused(&m, &mut vm, gone), Error::Again);
    let gone = |vm: &mut Vm| vm.unshare(&m, Ipa(RAM));
    assert_eq!(refused(&m, &mut vm, gone), Error::Again);
    // Any page of the host's comes in its place, and is shared; also one that was never
    // out of a block of the host's map.
    for n in [MEM + 3, 1 << 9] {
        m.hw.poke(host_page(n), 7, n);
        vm.map_page(&m, RAM, host_page(n).0, [1; 2]).unwrap();
        assert_eq!(m.pages.owner(host_page(n)), Some(Owner::Shared(SLOT)));
        assert_eq!((m.hw.peek(host_page(n), 7), guest_page(&m, &vm, RAM)), (n, Some(host_page(n))));
        check(&m, core::iter::once(&vm));
        vm.unmap_pages(&m, RAM, 1).unwrap();
    }
    // Beside private ones, in both banks, the host has no block until those come back.
    for n in [4, 5] {
        vm.map_page(&m, RAM + n * 0x1000, host_page(MEM + n).0, [0; 2]).unwrap();
    }
    vm.map_page(&m, RAM, host_page(MEM).0, [0; 2]).unwrap();
    m.hw.unload(vm.map.vttbr());
    m.hw.take_events();
    reset(&m, &mut vm);
    let events = m.hw.take_events();
    let page =
        |e: &Event| matches!(e, Event::InvalidateDevices(..) | Event::InvalidateHost(_, PAGE_SIZE));
    assert!(!events.iter().any(page));
    for n in 0..3 {
        let page = host_page(MEM + n);
        assert_eq!(m.pages.owner(page), Some(Owner::Host));
        assert!(m.host_has(page));
        assert!(m.hw.is_zero(page));
    }
    assert_eq!((m.pages.census().shared, m.pages.census().private), (0, 0));
    check(&m, core::iter::once(&vm));
    destroy(&m, &mut vm);
}

#[test]
fn a_guest_says_where_its_devices_are() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = active(&m);
    let place = |vm: &Vm, at: u64| vm.ram_or_device(Ipa(at));
    assert_eq!(place(&vm, RAM), Some(true));
    for at in [0, 0x900_0000, RAM - 0x1000, RAM + 0x4000_0000] {
        assert_eq!(place(&vm, at), Some(false));
    }
    for (at, error) in [
        (0x900_0008, Error::Invalid),
        (RAM, Error::Invalid),
        (RAM + 0x3fff_f000, Error::Invalid),
        (1 << 33, Error::Invalid),
        (u64::MAX - 0xfff, Error::Invalid),
    ] {
        assert_eq!(refused(&m, &mut vm, |vm| vm.guard(Ipa(at))), error);
        assert_eq!(place(&vm, 0x900_0000), Some(false));
    }
    // Two pages in turn are one run; known ones need none.
    for at in [0x900_0000, 0x900_1000, 0x900_0000, 0x900_1000, 0x900_0000] {
        vm.guard(Ipa(at)).unwrap();
    }
    assert_eq!(vm.guards[0], Range { base: 0x900_0000, size: 0x2000 });
    assert_eq!(vm.guards[1], Range::default());
    assert_eq!((place(&vm, RAM), place(&vm, 0x900_1000)), (Some(true), Some(false)));
    for at in [0, 0x8ff_f000, 0x900_2000, (1 << 33) - 0x1000] {
        assert_eq!(place(&vm, at), None);
    }
    for n in 1..MAX_GUARDS as u64 {
        vm.guard(Ipa(n * 0x2000)).unwrap();
        vm.guard(Ipa(n * 0x2000)).unwrap();
    }
    assert_eq!(refused(&m, &mut vm, |vm| vm.guard(Ipa(0xa00_0000))), Error::NoMemory);
    vm.guard(Ipa(0x900_2000)).unwrap();
    assert_eq!(place(&vm, 0x900_2000), Some(false));
    check(&m, core::iter::once(&vm));
    // Another guest starts anew.
    reset(&m, &mut vm);
    assert_eq!(place(&vm, 0xa00_0000), Some(false));
    assert_eq!(vm.guards, [Range::default(); MAX_GUARDS]);
}
