// SPDX-License-Identifier: MIT OR Apache-2.0
//! The audit finds what is broken, one thing at a time.
use super::*;
use crate::fake::{BANK2, BASE, CARVEOUT, FakeMachine, PAGES, UART, host_page, records, root};
use crate::launch::{Boot, Config};
use crate::stage2::{level1_index, level2_index, level3_index};
use crate::vm::Machine as _;

const RAM: u64 = 0x8000_0000;
const DEVICE: u64 = 0x801_0000;
const GICV: Pa = Pa(0x804_0000);
const SLOT: VmSlot = VmSlot(1);

fn audit(m: &FakeMachine<'_>, vms: &[&Vm]) -> Result<(), Violation> {
    let mut scratch = [!0; PAGES / 64];
    let mut audit = Audit::new(&m.hw, &m.pages, &mut scratch)?;
    m.with_host_map(|map| audit.host(map).and_then(|()| audit.devices(map)))?;
    for vm in vms {
        audit.vm(vm)?;
    }
    audit.finish()
}

/// A VM with two pages, one that it shares, a device page, three tables, two spare ones, and a vCPU.
fn vm(m: &FakeMachine<'_>) -> Vm {
    let mut vm = Vm::FREE;
    let config = Config { ipa_bits: 32, gic: 2, max_vcpus: 1 };
    vm.create(SLOT, root(SLOT), config, 0, [1; 32]).unwrap();
    vm.add_ram(RAM, 0x10_0000).unwrap();
    vm.create_vcpu(m, 0, host_page(0).0, 0).unwrap();
    vm.set_boot(0, Boot::default()).unwrap();
    vm.donate_pool(m, host_page(100).0, 6).unwrap();
    vm.activate(m).unwrap();
    vm.map_page(m, RAM, host_page(1).0, [0; 2]).unwrap();
    vm.map_page(m, RAM + 0x1000, host_page(2).0, [0; 2]).unwrap();
    vm.map_page(m, RAM + 0x2000, host_page(3).0, [0; 2]).unwrap();
    vm.share(m, Ipa(RAM + 0x2000)).unwrap();
    vm.map_device(m, DEVICE, GICV).unwrap();
    vm
}

/// The place of the leaf for `at`.
fn leaf(m: &FakeMachine<'_>, root: Pa, at: u64) -> (Pa, usize) {
    let mut table = root;
    for slot in [level1_index(Ipa(at)), level2_index(Ipa(at))] {
        table = Entry(m.hw.peek(table, slot)).address();
    }
    (table, level3_index(Ipa(at)))
}

/// What the audit says once this word was overwritten.
fn with_word(at: impl FnOnce(&FakeMachine<'_>, &Vm) -> (Pa, usize, u64)) -> Violation {
    let records = records();
    let m = FakeMachine::new(&records);
    let vm = vm(&m);
    assert_eq!(audit(&m, &[&vm]), Ok(()));
    let (page, word, value) = at(&m, &vm);
    m.hw.poke(page, word, value);
    audit(&m, &[&vm]).unwrap_err()
}

/// What the audit says once this leaf of the host's was overwritten.
fn with_host_leaf(at: u64, entry: Entry) -> Violation {
    with_word(|m, _| {
        let (table, slot) = leaf(m, m.with_host_map(|map| map.root()), at);
        (table, slot, entry.0)
    })
}

/// What the audit says once this leaf of the VM's was overwritten.
fn with_guest_leaf(at: u64, entry: Entry) -> Violation {
    with_word(|m, vm| {
        let (table, slot) = leaf(m, vm.map.root, at);
        (table, slot, entry.0)
    })
}

#[test]
fn the_hosts_map_is_checked_leaf_by_leaf() {
    let (own, taken) = (host_page(4), host_page(1));
    let at = |pa: Pa| Ipa(pa.0);
    let page = |pa, attributes| Entry::page(pa, attributes);
    let zero = page(Pa(BASE + 0x1000), Attributes::ReadOnly);
    // A VM's page, a table, the carve-out.
    let shown = with_host_leaf(taken.0, page(taken, Attributes::Memory));
    assert_eq!(shown, Violation::HostOwner(at(taken)));
    let table = host_page(100);
    let shown = with_host_leaf(table.0, page(table, Attributes::Memory));
    assert_eq!(shown, Violation::HostOwner(at(table)));
    let hidden = with_host_leaf(own.0, zero);
    assert_eq!(hidden, Violation::HostOwner(at(own)));
    let shared = with_host_leaf(host_page(3).0, zero);
    assert_eq!(shared, Violation::HostOwner(at(host_page(3))));
    // Missing.
    for pa in [own, host_page(3)] {
        assert!(matches!(with_host_leaf(pa.0, Entry::INVALID), Violation::HostMisses(..)));
    }
    assert!(matches!(with_host_leaf(taken.0, Entry::INVALID), Violation::HostMisses(..)));
    // Aliases, and wrong forms.
    for entry in [
        page(host_page(6), Attributes::Memory),
        page(own, Attributes::ReadOnly),
        page(own, Attributes::Device),
        page(GICV, Attributes::Device),
        Entry(page(own, Attributes::Memory).0 | 1 << 54),
        Entry(zero.0 | 1 << 7),
    ] {
        assert_eq!(with_host_leaf(own.0, entry), Violation::HostLeaf(at(own), entry));
    }
    let uart = page(Pa(UART), Attributes::Memory);
    assert_eq!(with_host_leaf(UART, uart), Violation::HostOwner(Ipa(UART)));
    let block = Entry::block(Pa(0), Attributes::Memory);
    let all = with_word(|m, _| (m.with_host_map(|map| map.root()), 0, block.0));
    assert_eq!(all, Violation::HostOwner(Ipa(0)));
    // A block of the host's over the second page, which is a VM's.
    let first = host_page(0);
    let block = Entry::block(first, Attributes::Memory);
    let over = with_word(|m, _| {
        let root = m.with_host_map(|map| map.root());
        let level2 = Entry(m.hw.peek(root, level1_index(at(first)))).address();
        (level2, level2_index(at(first)), block.0)
    });
    assert_eq!(over, Violation::HostOwner(Ipa(first.0 + 0x1000)));
    let block = Entry::block(Pa(2 << 30), Attributes::Memory);
    let other = with_word(|m, _| (m.with_host_map(|map| map.root()), 3, block.0));
    assert_eq!(other, Violation::HostLeaf(Ipa(3 << 30), block));
    // A device's block: beyond RAM, but not around it.
    let records = records();
    let m = FakeMachine::new(&records);
    let root = m.with_host_map(|map| map.root());
    m.hw.poke(root, 7, Entry::block(Pa(7 << 30), Attributes::Device).0);
    assert_eq!(audit(&m, &[]), Ok(()));
    let block = Entry::block(Pa(1 << 30), Attributes::Device);
    let around = with_word(|m, _| (m.with_host_map(|map| map.root()), 1, block.0));
    assert_eq!(around, Violation::HostLeaf(Ipa(1 << 30), block));
    // The zero frame.
    let written = with_word(|_, _| (Pa(BASE + 0x1000), 511, 1));
    assert_eq!(written, Violation::NotZero(Pa(BASE + 0x1000)));
    // A table that is the host's memory; one that is used twice.
    let table = Entry::table(own).0;
    let foreign = with_word(|m, _| (m.with_host_map(|map| map.root()), 5, table));
    assert_eq!(foreign, Violation::TableOwner(own));
    let twice = with_word(|m, _| {
        let root = m.with_host_map(|map| map.root());
        (root, 5, m.hw.peek(root, 1))
    });
    assert!(matches!(twice, Violation::UsedTwice(_)));
}

#[test]
fn the_devices_stage_2_is_checked() {
    let own = host_page(4);
    // The first bank's second block is split, the far bank's only one not yet.
    let m_records = records();
    let m = FakeMachine::new(&m_records);
    assert_eq!(audit(&m, &[]), Ok(()));
    let level3 = m.with_host_map(|map| map.level3_table(Pa(BANK2))).unwrap();
    for entry in [Entry::page(own, Attributes::Memory), Entry::HIDDEN, Entry::INVALID] {
        let was = m.hw.peek(level3, 511);
        m.hw.poke(level3, 511, entry.0);
        let to = Entry::table(level3);
        assert_eq!(audit(&m, &[]), Err(Violation::DevicesEntry(Ipa(BANK2), to)));
        m.hw.poke(level3, 511, was);
    }
    let with_entry = |level: usize, at: u64, entry: Entry| {
        with_word(|m, _| {
            let root = m.with_host_map(|map| map.devices_root());
            if level == 1 {
                return (root, level1_index(Ipa(at)), entry.0);
            }
            let level2 = Entry(m.hw.peek(root, level1_index(Ipa(at)))).address();
            (level2, level2_index(Ipa(at)), entry.0)
        })
    };
    let violation = |at, entry| Violation::DevicesEntry(Ipa(at), entry);
    let block = Entry::block(Pa(1 << 30), Attributes::Memory);
    assert_eq!(with_entry(1, 1 << 30, block), violation(1 << 30, block));
    let block = Entry::block(Pa(0), Attributes::Device);
    assert_eq!(with_entry(1, 0, block), violation(0, block));
    let table = Entry::table(own);
    assert_eq!(with_entry(1, 0, table), Violation::TableOwner(own));
    // The carve-out, RAM in a block, RAM missing, beyond RAM, the wrong table.
    for (at, entry) in [
        (BASE, Entry::block(Pa(BASE), Attributes::Memory)),
        (BASE + CARVEOUT, Entry::block(Pa(BASE + CARVEOUT), Attributes::Memory)),
        (BASE + CARVEOUT, Entry::INVALID),
        (BASE + (6 << 20), Entry::table(level3)),
        (BANK2, Entry::table(own)),
    ] {
        assert_eq!(with_entry(2, at, entry), violation(at, entry));
    }
}

#[test]
fn a_vms_map_is_checked_leaf_by_leaf() {
    let first = Ipa(RAM);
    let page = |pa, attributes| Entry::page(pa, attributes);
    for pa in [host_page(4), host_page(100), host_page(0), Pa(BASE), Pa(UART)] {
        let entry = page(pa, Attributes::Memory);
        assert_eq!(with_guest_leaf(RAM, entry), Violation::GuestOwner(SLOT, first));
    }
    let twice = with_guest_leaf(RAM, page(host_page(2), Attributes::Memory));
    assert_eq!(twice, Violation::UsedTwice(host_page(2)));
    for at in [RAM, RAM + 0x2000] {
        assert!(matches!(with_guest_leaf(at, Entry::INVALID), Violation::Lost(..)));
    }
    for entry in [
        page(host_page(1), Attributes::ReadOnly),
        page(host_page(1), Attributes::Device),
        page(GICV, Attributes::Device),
        Entry(page(host_page(1), Attributes::Memory).0 & !(3 << 8)),
    ] {
        assert_eq!(with_guest_leaf(RAM, entry), Violation::GuestLeaf(SLOT, first, entry));
    }
    // Beyond RAM; memory as a device; a block; beyond the address space.
    let entry = page(host_page(1), Attributes::Memory);
    let beyond = RAM + 0x10_0000;
    let violation = Violation::GuestLeaf(SLOT, Ipa(beyond), entry);
    assert_eq!(with_guest_leaf(beyond, entry), violation);
    let entry = page(host_page(1), Attributes::Device);
    let violation = Violation::GuestLeaf(SLOT, Ipa(DEVICE), entry);
    assert_eq!(with_guest_leaf(DEVICE, entry), violation);
    let block = Entry::block(Pa(0), Attributes::Memory);
    let large = with_word(|_, vm| (vm.map.root, 1, block.0));
    assert_eq!(large, Violation::GuestLeaf(SLOT, Ipa(1 << 30), block));
    let far = with_word(|m, vm| {
        let (table, _) = leaf(m, vm.map.root, DEVICE);
        m.hw.poke(table, 100, 0);
        let level2 = Entry(m.hw.peek(vm.map.root, 0)).address();
        m.hw.poke(vm.map.root, 0, 0);
        (vm.map.root, 4, Entry::table(level2).0)
    });
    assert!(matches!(far, Violation::GuestLeaf(SLOT, Ipa(ipa), _) if ipa >> 32 == 1));
    // Tables that are not its own.
    let table = with_word(|_, vm| (vm.map.root, 1, Entry::table(host_page(4)).0));
    assert_eq!(table, Violation::TableOwner(host_page(4)));
    let private = with_word(|_, vm| (vm.map.root, 1, Entry::table(host_page(1)).0));
    assert_eq!(private, Violation::TableOwner(host_page(1)));
}

#[test]
fn spare_tables_are_counted_and_zero() {
    let head = |vm: &Vm| vm.map.pool.head.unwrap();
    let dirty = with_word(|_, vm| (head(vm), 511, 1));
    assert!(matches!(dirty, Violation::NotZero(_)));
    let short = with_word(|_, vm| (head(vm), 0, 0));
    assert_eq!(short, Violation::PoolCount(SLOT));
    let twice = with_word(|_, vm| (head(vm), 0, head(vm).0));
    assert!(matches!(twice, Violation::UsedTwice(_)));
    let foreign = with_word(|_, vm| (head(vm), 0, host_page(4).0));
    assert_eq!(foreign, Violation::TableOwner(host_page(4)));
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = vm(&m);
    vm.map.pool.len -= 1;
    assert_eq!(audit(&m, &[&vm]), Err(Violation::PoolCount(SLOT)));
}

#[test]
fn records_without_use_are_found() {
    let records = records();
    let m = FakeMachine::new(&records);
    let vm = vm(&m);
    assert_eq!(audit(&m, &[&Vm::FREE, &vm]), Ok(()));
    // A VM that the audit was not shown; one that was never made.
    let found = Found { private: 2, shared: 1, table: 6, run: 1 };
    assert_eq!(audit(&m, &[]), Err(Violation::Lost(found, Found::default())));
    assert!(matches!(audit(&m, &[&vm, &vm]), Err(Violation::UsedTwice(_))));
    // In motion.
    let page = m.pages.claim(host_page(8), Owner::Host).unwrap();
    assert!(matches!(audit(&m, &[&vm]), Err(Violation::HostOwner(_) | Violation::Moving(_))));
    // The host's, and of another VM's use: not this one's run page.
    m.pages.relabel(page, Owner::RunPage(SLOT));
    assert!(matches!(audit(&m, &[&vm]), Err(Violation::Lost(..))));
    let page = m.pages.claim(host_page(8), Owner::RunPage(SLOT)).unwrap();
    m.pages.relabel(page, Owner::Host);
    assert_eq!(audit(&m, &[&vm]), Ok(()));
    let page = m.pages.claim(host_page(0), Owner::RunPage(SLOT)).unwrap();
    m.pages.relabel(page, Owner::Host);
    assert_eq!(audit(&m, &[&vm]), Err(Violation::RunPage(SLOT, host_page(0))));
    let page = m.pages.claim(host_page(0), Owner::Host).unwrap();
    m.pages.relabel(page, Owner::RunPage(SLOT));
    // Counted twice.
    m.pages.give_to_host(host_page(8));
    assert!(matches!(audit(&m, &[&vm]), Err(Violation::Census(_))));
}

#[test]
fn entries_above_level_3_are_tables_or_blocks() {
    let root = |m: &FakeMachine<'_>, _: &Vm| m.with_host_map(|map| map.root());
    for bits in [1 << 59, 1 << 2] {
        let form = with_word(|m, vm| {
            let root = root(m, vm);
            (root, 1, m.hw.peek(root, 1) | bits)
        });
        assert!(matches!(form, Violation::TableForm(_, 1)), "{form:?}");
    }
    let guest = with_word(|_, vm| (vm.map.root, 7, 0b10));
    assert_eq!(guest, Violation::TableForm(self::root(SLOT), 7));
    // What is gone is RAM, and no version from the future.
    for (at, gone) in [(DEVICE, Entry::gone(0)), (RAM, Entry::gone(1))] {
        assert_eq!(with_guest_leaf(at, gone), Violation::GuestLeaf(SLOT, Ipa(at), gone));
    }
}

#[test]
fn the_carve_out_is_the_monitors_and_nothing_else() {
    let carveout = crate::fake::CARVEOUT;
    for (pa, owner) in [
        (Pa(BASE), Owner::Host),
        (Pa(BASE + carveout - 0x1000), Owner::Table(SLOT)),
        (Pa(BASE + carveout), Owner::Monitor),
        (host_page(1), Owner::Monitor),
    ] {
        let records = records();
        let m = FakeMachine::new(&records);
        let n = m.pages.ram().page_index(pa).unwrap();
        let record = match owner {
            Owner::Monitor => 0,
            Owner::Host => 1 << 8,
            _ => 3 << 8 | 1,
        };
        records[n].store(record, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(m.pages.owner(pa), Some(owner));
        assert_eq!(audit(&m, &[]), Err(Violation::Carveout(pa)));
    }
}

#[test]
fn ranges_of_ram_are_apart_and_whole() {
    let range = |base, size| Range { base, size };
    for bad in [
        range(RAM, 0x1000),
        range(RAM + 0xf_f000, 0x2000),
        range(RAM - 0x1000, 0x2000),
        range(0x1000, 0x800),
        range(0x800, 0x1000),
        range(0x800, 0x1800),
        range(1 << 32, 0x1000),
        range((1 << 32) - 0x1000, 0x2000),
    ] {
        let records = records();
        let m = FakeMachine::new(&records);
        let mut vm = vm(&m);
        vm.ram[1] = range(RAM + 0x10_0000, 0x1000);
        assert_eq!(audit(&m, &[&vm]), Ok(()));
        vm.ram[2] = bad;
        assert_eq!(audit(&m, &[&vm]), Err(Violation::Ranges(SLOT)), "{bad:x?}");
    }
    let records = records();
    let m = FakeMachine::new(&records);
    let mut free = vm(&m);
    while free.destroy(&m, |_| ()).is_err() {}
    assert_eq!(audit(&m, &[&free]), Ok(()));
    free.ram[0] = range(RAM, 0x1000);
    assert_eq!(audit(&m, &[&free]), Err(Violation::NoVm(SLOT)));
    free.ram[0] = Range::default();
    assert_eq!(audit(&m, &[&free]), Ok(()));
    // A page that is its own, where no VM is.
    let page = m.pages.claim(host_page(9), Owner::Host).unwrap();
    m.pages.relabel(page, Owner::RunPage(SLOT));
    free.vcpus[0].exists = true;
    free.vcpus[0].run_page = host_page(9);
    assert_eq!(audit(&m, &[&free]), Err(Violation::NoVm(SLOT)));
}

#[test]
fn at_rest_no_vcpu_runs_and_each_has_its_context() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = vm(&m);
    vm.vcpus[0].context = 70;
    let audit = |vms: &[(VmSlot, &Vm)], taken: u64| {
        let mut scratch = [0; PAGES / 64];
        let mut audit = Audit::new(&m.hw, &m.pages, &mut scratch)?;
        for (slot, vm) in vms {
            audit.at_rest(*slot, vm)?;
        }
        audit.contexts(&[0, taken, 0, 0, 0, 0, 0, 0])
    };
    assert_eq!(audit(&[(VmSlot(0), &Vm::FREE), (SLOT, &vm)], 1 << 6), Ok(()));
    assert_eq!(audit(&[(VmSlot(2), &vm)], 1 << 6), Err(Violation::NoVm(VmSlot(2))));
    let context = Err(Violation::Context(70));
    assert_eq!(audit(&[(SLOT, &vm)], 0), context);
    assert_eq!(audit(&[], 1 << 6), context);
    assert_eq!(audit(&[(SLOT, &vm)], 1 << 6 | 1 << 8), Err(Violation::Context(72)));
    assert_eq!(audit(&[(SLOT, &vm), (SLOT, &vm)], 1 << 6), context);
    vm.enter(0).unwrap();
    let running = Err(Violation::Running(SLOT));
    assert_eq!(audit(&[(SLOT, &vm)], 1 << 6), running);
    vm.vcpus[0].context = 512;
    vm.leave(0, 0);
    assert_eq!(audit(&[(SLOT, &vm)], 1 << 6), Err(Violation::Context(512)));
}

#[test]
fn the_scratch_memory_has_a_bit_for_each_page() {
    let records = records();
    let m = FakeMachine::new(&records);
    assert!(Audit::new(&m.hw, &m.pages, &mut [0; PAGES / 64]).is_ok());
    let short = Audit::new(&m.hw, &m.pages, &mut [0; PAGES / 64 - 1]).err();
    assert_eq!(short, Some(Violation::Scratch));
}
