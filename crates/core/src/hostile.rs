// SPDX-License-Identifier: MIT OR Apache-2.0
//! A hostile host: random calls about two VMs, with every invariant checked
//! after each. See `DESIGN` I1 to I7.

use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;
use std::{format, vec};

use havmsi_abi::{Error, MAX_PAGES_PER_MAP, PAGE_SIZE};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestCaseResult};

use crate::addr::{Ipa, Pa};
use crate::fake::{
    BANK2, BASE, CARVEOUT, Event, FakeMachine, PAGES, UART, host_page, records, root,
};
use crate::hypercall;
use crate::launch::{Boot, Config};
use crate::page::{Owner, VmSlot};
use crate::seal::Tag;
use crate::stage2::{
    Attributes, Entry, LEVEL2_SIZE, level1_index, level2_index, level3_index, vttbr,
};
use crate::vm::Vm;
use crate::vm::tests::{Snapshot, check};

const RAM: u64 = 0x8000_0000;
const RAM_SIZE: u64 = 0x4020_0000;
/// 2 MiB of the host's that can be a block.
const BLOCK: u64 = BANK2 + LEVEL2_SIZE;
const HIGH: u64 = 0x1_0000_0000;
const GICV: u64 = 0x804_0000;
/// Addresses that the host tries for a guest's page.
const IPAS: [u64; 12] = [
    RAM,
    RAM + 0x1000,
    RAM + 0x2000,
    RAM + 0x1f_f000,
    RAM + 0x20_0000,
    RAM + 0x4000_0000,
    RAM + RAM_SIZE - 0x1000,
    HIGH,
    RAM - 0x1000,
    RAM + RAM_SIZE,
    RAM + 8,
    u64::MAX - 0xfff,
];
/// The host's pages that are tried; in both banks.
const POOL: u64 = 64;
/// Words of each page that are written and compared.
const WORDS: usize = 4;
/// Set in what guests write, never in what the host writes.
const SECRET: u64 = 1 << 63;

fn page(n: u64) -> Pa {
    if n < POOL {
        return host_page(n);
    }
    let odd = [
        BASE,
        BASE + 0x1000,
        BASE + 0x2000,
        BASE + (1 << 20),
        BASE + CARVEOUT - 0x1000,
        BASE + (6 << 20),
        BANK2 - 0x1000,
        BANK2 + (4 << 20),
        UART,
        0,
        BASE + CARVEOUT + 8,
        u64::MAX - 0xfff,
    ];
    Pa(odd[crate::addr::index(n - POOL) % odd.len()])
}

#[derive(Clone, Debug)]
enum Op {
    Create(Config),
    AddRam(u64, u64),
    CreateVcpu(u64, u64),
    SetBoot(u64),
    Populate(u64, u64),
    Activate,
    Enter(u64),
    Leave(u64),
    /// The place, the page, and whether the host gives back what was sealed there
    /// last, or what it happens to have.
    Map(u64, u64, bool),
    /// Something that was sealed once, wherever.
    Replay(u64, u64, usize),
    /// Pages in a row: IPA, address, number; not one.
    MapRun(u64, u64, u64),
    Unmap(u64, u64),
    MapDevice(u64),
    Pool(u64, u64),
    Reset,
    Destroy,
    HostWrite(u64, usize, u64),
    GuestWrite(u64, usize, u64),
    GuestCall(u64, [u64; 4]),
    Share(u64),
    Unshare(u64),
    Answer(u64, u64),
}

/// A VM to act on, a page that another CPU has in motion meanwhile, the act.
type Step = (usize, Option<u64>, Op);

fn step() -> impl Strategy<Value = Step> {
    let any_page = || prop_oneof![9 => 0..POOL, 1 => POOL..POOL + 12];
    let ipa = || prop_oneof![9 => 0..8_usize, 1 => 8..12_usize].prop_map(|i| IPAS[i]);
    let few = || prop_oneof![9 => 0..3_usize, 1 => 3..12_usize].prop_map(|i| IPAS[i]);
    let vcpu = || 0..4_u64;
    let config = (0..3_u64, 31..35_u64, 0..4_u64).prop_map(|(max_vcpus, ipa_bits, gic)| Config {
        max_vcpus,
        ipa_bits,
        gic,
    });
    let ranges = prop::sample::select(vec![
        (RAM, RAM_SIZE),
        (HIGH, 0x1000),
        (0x801_0000, 0x4000),
        (RAM - 0x1000, 0x2000),
        (0, 0),
        (HIGH, u64::MAX - 0xfff),
    ]);
    let functions = prop::sample::select(vec![
        0xc400_0003_u64,
        0x8400_0003,
        0x8400_0002,
        0xc400_0004,
        0x8400_0009,
        0xc200_000b,
    ]);
    let op = prop_oneof![
        1 => config.prop_map(Op::Create),
        1 => ranges.prop_map(|(base, size)| Op::AddRam(base, size)),
        1 => (vcpu(), any_page()).prop_map(|(idx, page)| Op::CreateVcpu(idx, page)),
        1 => vcpu().prop_map(Op::SetBoot),
        4 => (ipa(), any_page()).prop_map(|(ipa, page)| Op::Populate(ipa, page)),
        1 => Just(Op::Activate),
        3 => vcpu().prop_map(Op::Enter),
        3 => vcpu().prop_map(Op::Leave),
        9 => (ipa(), any_page(), prop::bool::weighted(0.95))
            .prop_map(|(ipa, page, honest)| Op::Map(ipa, page, honest)),
        1 => (ipa(), any_page(), any::<usize>()).prop_map(|(i, p, n)| Op::Replay(i, p, n)),
        // A quarter of a block.
        4 => (0..3_u64, 0..4_u64).prop_map(|(block, part)| {
            let at = part * MAX_PAGES_PER_MAP * PAGE_SIZE;
            Op::MapRun(RAM + block * LEVEL2_SIZE + at, BLOCK + at, MAX_PAGES_PER_MAP)
        }),
        2 => (ipa(), any_page(), 2..6_u64).prop_map(|(ipa, at, n)| Op::MapRun(ipa, page(at).0, n)),
        1 => (ipa(), 127..131_u64).prop_map(|(ipa, n)| Op::MapRun(ipa, BLOCK, n)),
        4 => (ipa(), 0..35_u64).prop_map(|(ipa, n)| Op::Unmap(ipa, n)),
        1 => (0x801_0000..0x801_2001_u64).prop_map(|ipa| Op::MapDevice(ipa & !0x7ff)),
        2 => (any_page(), 0..6_u64).prop_map(|(page, n)| Op::Pool(page, n)),
        1 => Just(Op::Reset),
        1 => Just(Op::Destroy),
        3 => (any_page(), 0..WORDS, any::<u64>()).prop_map(|(p, w, v)| Op::HostWrite(p, w, v)),
        4 => (ipa(), 0..WORDS, any::<u64>()).prop_map(|(i, w, v)| Op::GuestWrite(i, w, v)),
        1 => (vcpu(), functions, 0..4_u64)
            .prop_map(|(idx, f, target)| Op::GuestCall(idx, [f, target, 0, 0])),
        12 => few().prop_map(Op::Share),
        12 => few().prop_map(Op::Unshare),
        1 => (vcpu(), 0..2_u64).prop_map(|(idx, result)| Op::Answer(idx, result)),
    ];
    (0..2_usize, prop::option::weighted(0.1, 0..POOL), op)
}

/// How far a VM is when the host turns hostile: nothing, open, active.
fn prepare(m: &FakeMachine<'_>, vm: &mut Vm, n: u64, stage: u8) {
    if stage == 0 {
        return;
    }
    let config = Config { max_vcpus: 3, ipa_bits: 34, gic: 2 };
    vm.create(slot(n), root(slot(n)), config, 0, [n.to_le_bytes()[0] + 1; 32]).unwrap();
    vm.add_ram(RAM, RAM_SIZE).unwrap();
    vm.create_vcpu(m, 0, host_page(2 * n).0, 0).unwrap();
    vm.create_vcpu(m, 1, host_page(2 * n + 1).0, 1).unwrap();
    vm.set_boot(0, Boot::default()).unwrap();
    vm.donate_pool(m, host_page(4 + 10 * n).0, 5).unwrap();
    if stage == 2 {
        vm.activate(m).unwrap();
    }
}

fn slot(n: u64) -> VmSlot {
    VmSlot(n.to_le_bytes()[0])
}

type Content = [u64; WORDS];

/// What the host got when it took a page.
#[derive(Clone)]
struct Sealed {
    page: [u64; 512],
    tag: Tag,
}

/// What the guest must find again.
#[derive(Clone)]
enum Gone {
    /// The number of what was sealed, and what it was.
    Sealed(usize, Content),
    Shared,
}

struct World<'a> {
    m: &'a FakeMachine<'a>,
    vms: [Vm; 2],
    running: Vec<(usize, u64)>,
    /// What each guest's memory must hold.
    memory: BTreeMap<(usize, u64), Content>,
    /// What the host took from each.
    gone: BTreeMap<(usize, u64), Gone>,
    /// All that was ever sealed.
    sealed: Vec<Sealed>,
    /// What guests wrote and nobody else may know.
    secrets: BTreeSet<u64>,
    /// VMs that stopped because of what the host gave back.
    stopped: [bool; 2],
    /// As the last step left all.
    before: Snapshot,
}

impl<'a> World<'a> {
    fn new(m: &'a FakeMachine<'a>, vms: [Vm; 2]) -> Self {
        let before = Snapshot::new(m, vms.iter());
        Self {
            m,
            vms,
            running: vec![],
            memory: BTreeMap::new(),
            gone: BTreeMap::new(),
            sealed: vec![],
            secrets: BTreeSet::new(),
            stopped: [false; 2],
            before,
        }
    }

    fn content(&self, pa: Pa) -> Content {
        core::array::from_fn(|i| self.m.hw.peek(pa, i))
    }

    /// What a guest's access at `ipa` reaches.
    fn guest_page(&self, n: usize, ipa: u64) -> Option<Pa> {
        let mut table = root(slot(n as u64));
        for index in [level1_index(Ipa(ipa)), level2_index(Ipa(ipa))] {
            let entry = Entry(self.m.hw.peek(table, index));
            if !entry.is_valid() {
                return None;
            }
            if entry.is_block() {
                return Some(entry.address().offset(Ipa(ipa).page().0 % LEVEL2_SIZE));
            }
            table = entry.address();
        }
        let entry = Entry(self.m.hw.peek(table, level3_index(Ipa(ipa))));
        (entry == Entry::page(entry.address(), Attributes::Memory)).then(|| entry.address())
    }

    /// Which of what was sealed the host gives back; it puts it into the page.
    fn prepare(&mut self, n: usize, op: &Op) -> Option<usize> {
        let (at, which) = match *op {
            Op::Map(ipa, at, true) => match self.gone.get(&(n, ipa))? {
                Gone::Sealed(which, _) => (at, *which),
                Gone::Shared => return None,
            },
            Op::Replay(_, at, which) => (at, which % self.sealed.len().max(1)),
            _ => return None,
        };
        let sealed = self.sealed.get(which)?.clone();
        let pa = page(at);
        // Not what it lent or shares.
        if self.m.pages.owner(pa) != Some(Owner::Host) {
            return None;
        }
        for (i, word) in sealed.page.iter().enumerate() {
            self.m.hw.poke(pa, i, *word);
        }
        self.before = Snapshot::new(self.m, self.vms.iter());
        Some(which)
    }

    /// Takes a page, and remembers what came.
    fn unmap(&mut self, n: usize, ipa: u64, count: u64) -> Result<(), Error> {
        let m = self.m;
        let range = ipa..ipa.saturating_add(count.min(64) * PAGE_SIZE);
        let first = self.memory.keys().find(|(vm, at)| *vm == n && range.contains(at)).copied();
        let pa = first.and_then(|(_, at)| self.guest_page(n, at));
        let shared = pa.is_some_and(|pa| matches!(m.pages.owner(pa), Some(Owner::Shared(_))));
        let (done, tag) = self.vms[n].unmap_pages(m, ipa, count)?;
        let (Some(key), Some(pa)) = (first, pa) else {
            assert_eq!((done, tag), (count, [0; 2]));
            return Ok(());
        };
        assert_eq!(done, (key.1 - ipa) / PAGE_SIZE + 1);
        let content = self.memory.remove(&key).expect("known");
        if shared {
            assert_eq!((self.content(pa), tag), (content, [0; 2]));
            content.iter().for_each(|word| {
                self.secrets.remove(word);
            });
            self.gone.insert(key, Gone::Shared);
        } else {
            let page = core::array::from_fn(|i| m.hw.peek(pa, i));
            assert!(page.iter().all(|word| !content.contains(word)), "not encrypted");
            self.gone.insert(key, Gone::Sealed(self.sealed.len(), content));
            self.sealed.push(Sealed { page, tag });
        }
        Ok(())
    }

    fn act(&mut self, n: usize, op: &Op, tag: Tag) -> Result<(), Error> {
        let m = self.m;
        let root = root(slot(n as u64));
        let vttbr = vttbr(root, slot(n as u64).vmid());
        let vm = &mut self.vms[n];
        match *op {
            Op::Create(config) => {
                vm.create(slot(n as u64), root, config, 0, [n.to_le_bytes()[0] + 1; 32]).map(|_| ())
            }
            Op::AddRam(base, size) => vm.add_ram(base, size),
            Op::CreateVcpu(idx, at) => vm.create_vcpu(m, idx, page(at).0, 0),
            Op::SetBoot(idx) => vm.set_boot(idx, Boot::default()),
            Op::Populate(ipa, at) => vm.populate(m, ipa, page(at).0, &mut [0; 4096]),
            Op::Activate => vm.activate(m).map(|_| ()),
            Op::Enter(idx) => {
                let run = vm.enter(idx)?;
                assert_eq!(run.vttbr, vttbr);
                m.hw.load(vttbr);
                self.running.push((n, idx));
                Ok(())
            }
            Op::Leave(idx) => {
                if let Some(at) = self.running.iter().position(|r| *r == (n, idx)) {
                    self.running.swap_remove(at);
                    m.hw.unload(vttbr);
                    vm.leave(idx, 0);
                }
                Ok(())
            }
            Op::Map(ipa, at, _) | Op::Replay(ipa, at, _) => vm.map_page(m, ipa, page(at).0, tag),
            Op::MapRun(ipa, pa, n) => vm.map_pages(m, ipa, pa, n * PAGE_SIZE, tag),
            Op::Unmap(ipa, count) => self.unmap(n, ipa, count),
            Op::MapDevice(ipa) => vm.map_device(m, ipa, Pa(GICV)),
            Op::Pool(at, count) => vm.donate_pool(m, page(at).0, count),
            Op::Reset => vm.reset(m),
            Op::Destroy => vm.destroy(m, |_| ()),
            Op::HostWrite(at, word, value) => {
                let pa = page(at);
                if m.host_leaf(pa).is_some_and(Entry::is_writable) && pa.0 != UART {
                    let pa = Pa(pa.0 & !0xfff);
                    m.hw.poke(pa, word, value & !SECRET);
                    // What a guest shares with the host both write.
                    let shared = matches!(m.pages.owner(pa), Some(Owner::Shared(_)));
                    let keys: Vec<_> = self.memory.keys().copied().filter(|_| shared).collect();
                    for (vm, ipa) in keys {
                        if self.guest_page(vm, ipa) == Some(pa) {
                            self.memory.get_mut(&(vm, ipa)).expect("known")[word] = value & !SECRET;
                        }
                    }
                }
                Ok(())
            }
            Op::GuestWrite(ipa, word, value) => {
                let runs = self.running.iter().any(|r| r.0 == n);
                if let Some(pa) = self.guest_page(n, ipa & !0xfff).filter(|_| runs) {
                    self.m.hw.poke(pa, word, value | SECRET);
                    self.memory.get_mut(&(n, ipa & !0xfff)).expect("a known page")[word] =
                        value | SECRET;
                    if matches!(self.m.pages.owner(pa), Some(Owner::Private(_))) {
                        self.secrets.insert(value | SECRET);
                    }
                }
                Ok(())
            }
            Op::GuestCall(idx, x) => {
                if self.running.contains(&(n, idx)) {
                    let _ = hypercall::call(m, vm, idx, x, || None);
                }
                Ok(())
            }
            Op::Share(ipa) => vm.share(m, Ipa(ipa)),
            Op::Unshare(ipa) => vm.unshare(m, Ipa(ipa)),
            Op::Answer(idx, result) => {
                vm.cpu_on_answered(idx, result);
                Ok(())
            }
        }
    }

    fn step(&mut self, (n, held, op): &Step) -> TestCaseResult {
        let m = self.m;
        let given = self.prepare(*n, op);
        let held = held.and_then(|at| m.pages.claim(page(at), Owner::Host).ok());
        let owners = |m: &FakeMachine<'_>| -> Vec<_> {
            (0..POOL).map(|at| m.pages.owner(page(at))).collect()
        };
        let owners_before = owners(m);
        let tag = given.map_or([0; 2], |given| self.sealed[given].tag);
        let contents: Vec<_> = (0..POOL).map(|at| self.content(page(at))).collect();
        m.hw.take_events();
        let result = self.act(*n, op, tag);
        let step = matches!(op, Op::Reset | Op::Destroy) && result == Err(Error::Again);
        if !matches!(op, Op::Reset | Op::Destroy) {
            // No call is long.
            let events = m.hw.take_events();
            let wiped = events.iter().filter(|e| matches!(e, Event::Zero(_))).count();
            // And a table, when a block is made.
            prop_assert!(wiped as u64 <= MAX_PAGES_PER_MAP + 1 && events.len() < 8 * 1024);
        }
        // Only these take pages from a guest.
        if result.is_ok() || step {
            match *op {
                Op::Reset | Op::Destroy => {
                    self.gone.retain(|(vm, _), _| vm != n || step);
                    self.stopped[*n] &= step;
                    let mut memory = core::mem::take(&mut self.memory);
                    memory.retain(|(vm, at), _| {
                        vm != n || step && self.guest_page(*vm, *at).is_some()
                    });
                    self.memory = memory;
                }
                // I7: zero, or what was measured; or what was there when the page went.
                Op::Map(ipa, at, _) | Op::Replay(ipa, at, _) => {
                    let content = match self.gone.remove(&(*n, ipa)) {
                        None => [0; WORDS],
                        Some(Gone::Shared) => contents[crate::addr::index(at)],
                        Some(Gone::Sealed(which, content)) => {
                            prop_assert_eq!(given, Some(which), "not what was sealed last");
                            content
                        }
                    };
                    self.memory.insert((*n, ipa), content);
                }
                Op::MapRun(ipa, _, count) => {
                    let places = (0..count).map(|i| (*n, ipa + i * PAGE_SIZE));
                    self.memory.extend(places.map(|place| (place, [0; WORDS])));
                }
                Op::Populate(ipa, at) => {
                    self.memory.insert((*n, ipa), contents[crate::addr::index(at)]);
                }
                _ => {}
            }
        }
        let stops = result == Err(Error::Integrity) && !self.stopped[*n];
        if stops {
            let (Op::Map(ipa, at, _) | Op::Replay(ipa, at, _)) = *op else {
                return Err(TestCaseError::fail(format!("{op:?} stops the VM")));
            };
            let Some(Gone::Sealed(which, _)) = self.gone.get(&(*n, ipa)) else {
                return Err(TestCaseError::fail("nothing was sealed there"));
            };
            prop_assert_ne!(given, Some(*which), "what was sealed is refused");
            prop_assert_eq!(contents[crate::addr::index(at)], self.content(page(at)));
            self.stopped[*n] = true;
        }
        for (at, (old, new)) in owners_before.iter().zip(owners(m)).enumerate() {
            let pa = page(at as u64);
            let was_vms =
                matches!(old, Some(Owner::Private(_) | Owner::Shared(_) | Owner::Table(_)));
            if was_vms && new == Some(Owner::Host) && !matches!(op, Op::Unmap(..)) {
                prop_assert!(m.hw.is_zero(pa), "{pa:x?} left its VM with content (I5)");
            }
            if matches!(new, Some(Owner::Host | Owner::RunPage(_))) {
                let leaks = self.content(pa).iter().any(|w| self.secrets.contains(w));
                prop_assert!(!leaks, "{pa:x?} leaks");
            }
        }
        // Nobody but the guest changed its memory, or where it lies; but the host what
        // was shared with it.
        let census = m.pages.census();
        prop_assert_eq!(self.memory.len() as u64, census.private + census.shared);
        for ((vm, ipa), expected) in &self.memory {
            let pa = self.guest_page(*vm, *ipa);
            prop_assert!(pa.is_some(), "{ipa:#x} was lost");
            prop_assert_eq!(&self.content(pa.unwrap()), expected, "at {:#x}", ipa);
        }
        if let Some(held) = held {
            m.pages.unclaim(held);
        }
        let after = Snapshot::new(m, self.vms.iter());
        if result.is_err() && !step && !stops {
            prop_assert!(self.before == after, "{result:?} changed something");
        }
        self.before = after;
        check(m, self.vms.iter());
        Ok(())
    }

    /// If the first VM is active, it has a block.
    fn map_block(&mut self) -> TestCaseResult {
        (0..4).try_for_each(|part| {
            let at = part * MAX_PAGES_PER_MAP * PAGE_SIZE;
            let ipa = RAM + LEVEL2_SIZE + at;
            self.step(&(0, None, Op::MapRun(ipa, BLOCK + at, MAX_PAGES_PER_MAP)))
        })
    }

    fn end(&mut self) -> TestCaseResult {
        for n in 0..2 {
            for idx in 0..4 {
                self.step(&(n, None, Op::Leave(idx)))?;
            }
            for _ in 0..60 {
                if self.vms[n].exists() {
                    self.step(&(n, None, Op::Destroy))?;
                }
            }
            prop_assert!(!self.vms[n].exists());
        }
        for at in 0..POOL {
            prop_assert_eq!(self.m.pages.owner(page(at)), Some(Owner::Host));
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 64 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_call_breaks_an_invariant(
        stages in [0..3_u8, 0..3_u8],
        block in any::<bool>(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let records = records();
        let m = FakeMachine::new(&records);
        let census = m.pages.census();
        let mut vms = [Vm::FREE, Vm::FREE];
        for (vm, (n, stage)) in vms.iter_mut().zip((0..).zip(stages)) {
            prepare(&m, vm, n, stage);
        }
        let mut world = World::new(&m, vms);
        if block {
            world.map_block()?;
        }
        for step in &steps {
            world.step(step)?;
        }
        world.end()?;
        prop_assert_eq!(m.pages.census(), census);
        prop_assert_eq!(records.len(), PAGES);
    }
}

/// How often the steps of the property test are carried out and not refused:
/// it is worth nothing if all are refused.
#[test]
fn hostile_steps_get_somewhere() {
    use proptest::strategy::ValueTree as _;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut done = BTreeMap::new();
    for _ in 0..if cfg!(miri) { 1 } else { 120 } {
        let records = records();
        let m = FakeMachine::new(&records);
        let mut vms = [Vm::FREE, Vm::FREE];
        prepare(&m, &mut vms[0], 0, 2);
        prepare(&m, &mut vms[1], 1, 1);
        let mut world = World::new(&m, vms);
        world.map_block().unwrap();
        let level2 = Entry(m.hw.peek(root(slot(0)), level1_index(Ipa(RAM)))).address();
        assert!(Entry(m.hw.peek(level2, 1)).is_block());
        for _ in 0..60 {
            let (n, _, op) = step().new_tree(&mut runner).unwrap().current();
            let state =
                |world: &World<'_>| (world.memory.len(), m.pages.census().shared, world.stopped);
            let before = state(&world);
            world.step(&(n, None, op.clone())).unwrap();
            let name = format!("{op:?}").split('(').next().map(std::string::String::from);
            if state(&world) != before {
                *done.entry(name).or_insert(0) += 1;
            }
        }
    }
    for name in ["Map", "MapRun", "Replay", "Populate", "Unmap", "Share", "Unshare"] {
        let n = done.get(&Some(name.into())).copied().unwrap_or(0);
        assert!(cfg!(miri) || n >= 5, "{name} changed a map {n} times");
    }
}
