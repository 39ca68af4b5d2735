// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the monitor's thin layer does with the pure crate (finding a VM by its
//! handle, entry and exit of a vCPU), on the tests' machine, beside the model.

use std::collections::BTreeMap;

use havmsi_abi::{
    Entry, EntryFlags, Error, Exit, ExitClass, MAX_PAGES_PER_MAP, PAGE_SIZE, WORDS_ENTRY,
};
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::exit::{self, Action, Answer, Injection, Pending, Syndrome};
use havmsi_core::fake::{self, BANK2, BASE, CARVEOUT, FakeMachine, UART, host_page, root};
use havmsi_core::host_map::Resolution;
use havmsi_core::hypercall;
use havmsi_core::launch::{Boot, Config};
use havmsi_core::page::{self, Claimed, Page, VmSlot};
use havmsi_core::seal::Tag;
use havmsi_core::stage2::{Attributes, Entry as Leaf, vttbr};
use havmsi_core::vm::{Machine as _, Vm, handle_slot};
use havmsi_core::{psci, vgic};

use crate::model::{
    self, Called, Gone, Handle, Model, Outcome, Owner, Phase, Power, Question, Reasons, Registers,
    Trap,
};

/// VMs that can be at once.
const SLOTS: usize = 2;
/// The host's pages that are tried; in both banks.
const POOL: u64 = 64;
/// List registers of the CPU.
const LRS: u64 = 4;
/// The first page of the GICv2 virtual CPU interface.
const GICV: u64 = 0x804_0000;
/// Set in what guests write, never in what the host writes.
const SECRET: u64 = 1 << 63;

const RAM: u64 = 0x8000_0000;
/// 2 MiB of the host's that can be a block.
const BLOCK: u64 = BANK2 + (2 << 20);
/// Bytes that PAGE_MAP takes at most.
const MOST: u64 = MAX_PAGES_PER_MAP * PAGE_SIZE;
const RANGES: [(u64, u64); 12] = [
    (RAM, 0x4020_0000),
    (0x1_0000_0000, 0x1000),
    (0x801_0000, 0x4000),
    (RAM - 0x1000, 0x2000),
    (0, 0),
    (0x1_0000_0000, u64::MAX - 0xfff),
    (RAM + 8, 0x1000),
    (0, 0x20_0000),
    (0x2_0000_0000, 0x10_0000_0000),
    (0x1_0000_2000, 0x800),
    (0xff_ffff_f000, 0x1000),
    (u64::MAX - 0xfff, 0x1000),
];
/// Where a page is put: places that share tables and that don't, and odd ones.
const PLACES: [u64; 16] = [
    RAM,
    RAM + 0x1000,
    RAM + 0x1f_f000,
    RAM + 0x20_0000,
    RAM + 0x4000_0000,
    RAM + 0x401f_f000,
    0x1_0000_0000,
    0x801_0000,
    0x801_1000,
    0,
    RAM - 0x1000,
    RAM + 0x4020_0000,
    RAM + 8,
    0x2_0000_0000,
    0xff_ffff_f000,
    u64::MAX - 0xfff,
];

fn place(a: u8) -> u64 {
    let [low, high] = [a % 16, a / 16];
    PLACES[usize::from(low)].wrapping_add(u64::from(high) * PAGE_SIZE)
}

/// One of the host's pages, or something that is none.
fn some_page(a: u8) -> u64 {
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
    match u64::from(a) {
        n @ ..POOL => host_page(n).0,
        n => odd.get((n - POOL) as usize % 16).copied().unwrap_or_else(|| host_page(n % POOL).0),
    }
}

/// A number that is different for each byte.
fn spread(a: u8) -> u64 {
    u64::from(a).wrapping_mul(0x9e37_79b9_7f4a_7c15) & !SECRET
}

/// What the monitor keeps of a vCPU.
struct Context {
    registers: Registers,
    pending: Pending,
    /// SGIs of the last entry's list registers.
    sgis: u16,
}

pub struct World<'a> {
    m: &'a FakeMachine<'a>,
    vms: [Vm; SLOTS],
    contexts: BTreeMap<(Handle, u64), Context>,
    running: Vec<(Handle, u64)>,
    held: Vec<Page<Claimed>>,
    power: [psci::Power; 3],
    /// What the host's CPUs are to be: off, being turned on, on.
    cpus: [u8; 3],
    model: Model,
    /// What the host got of VMs, with its tags.
    sealed: Vec<(Box<[u64; 512]>, Tag)>,
    verbose: bool,
}

impl<'a> World<'a> {
    pub fn new(m: &'a FakeMachine<'a>, verbose: bool) -> Self {
        let ram = fake::ram();
        let host = ram.banks().iter().enumerate().flat_map(|(i, bank)| {
            let skip = if i == 0 { CARVEOUT } else { 0 };
            (skip..bank.size).step_by(4096).map(move |at| bank.base + at)
        });
        Self {
            m,
            vms: [const { Vm::FREE }; SLOTS],
            contexts: BTreeMap::new(),
            running: vec![],
            held: vec![],
            power: [psci::Power::On, psci::Power::Off, psci::Power::Off],
            cpus: [2, 0, 0],
            model: Model::new(host),
            sealed: vec![],
            verbose,
        }
    }

    /// How far each VM is: nothing, open, active, running.
    pub fn prepare(&mut self, stages: u8) {
        for n in 0..2 {
            let stage = stages >> (2 * n) & 3;
            let v = n * 2;
            if stage == 0 {
                continue;
            }
            // Two CPUs, GICv2 or GICv3, 34 bits.
            self.step(&[0, 0, 3, 2 + (stages >> 4 & 1), 34, 0, 0, 0]);
            self.step(&[1, v, 0, 0, 0, 0, 0, 0]);
            self.step(&[2, v, 0, n * 2, 0, 0, 0, 0]);
            self.step(&[2, v, 1, n * 2 + 1, 0, 0, 0, 0]);
            self.step(&[3, v, 0, 7, 0, 0, 0, 0]);
            // Even pages lie side by side.
            self.step(&[10, v, 4 + n * 12, 5, 0, 0, 0, 0]);
            if stage >= 2 {
                self.step(&[5, v, 0, 0, 0, 0, 0, 0]);
            }
            if stage == 3 {
                self.step(&[6, v, 0, 0, 0, 0, 0, 0]);
            }
        }
    }

    /// A handle: mostly one that was given, or what was never.
    fn handle(&self, v: u8) -> Handle {
        let given = &self.model.handles;
        match v % 16 {
            n @ 0..8 => {
                let live: Vec<_> = self.model.vms.keys().collect();
                live.get(usize::from(n / 2)).map_or(1, |handle| **handle)
            }
            n @ 8..14 => given.get(usize::from(n - 8)).copied().unwrap_or(u64::from(v)),
            14 => u64::from(v / 16),
            _ => u64::MAX,
        }
    }

    fn find(&mut self, handle: Handle) -> Result<&mut Vm, Error> {
        let slot = handle_slot(handle).ok_or(Error::Invalid)?;
        let vm = self.vms.get_mut(usize::from(slot.0)).ok_or(Error::Invalid)?;
        vm.check_handle(handle)?;
        Ok(vm)
    }

    fn on<T>(
        &mut self,
        handle: Handle,
        f: impl FnOnce(&mut Vm, &FakeMachine<'a>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let m = self.m;
        f(self.find(handle)?, m)
    }

    fn slot(handle: Handle) -> VmSlot {
        handle_slot(handle).expect("a live VM")
    }

    fn vttbr(handle: Handle) -> u64 {
        let slot = Self::slot(handle);
        vttbr(root(slot), slot.vmid())
    }

    /// The crate's answer must be one that the model permits.
    fn same<T: std::fmt::Debug>(what: &str, result: &Result<T, Error>, no: &Reasons) {
        match result {
            Ok(_) => assert!(no.none(), "{what}: done, but {no:?}"),
            Err(error) => assert!(no.0.contains(error), "{what}: {error:?}, expected {no:?}"),
        }
    }

    /// Carries out one operation.
    pub fn step(&mut self, op: &[u8; 8]) {
        let [what, v, a, b, c, d, e, _] = *op;
        let handle = self.handle(v);
        if self.verbose {
            eprintln!("{op:?}: operation {} on {handle:#x}", what % 24);
        }
        let idx = match a {
            // A vCPU of the second cluster.
            7 => 17,
            a => u64::from(a % 8) % 5,
        };
        match what % 24 {
            0 => self.create(u64::from(a), u64::from(b % 8), u64::from(c)),
            1 => {
                let (base, size) = RANGES[usize::from(a) % RANGES.len()];
                let base = base.wrapping_add(u64::from(b & 3) * 0x1_0000);
                let result = self.on(handle, |vm, _| vm.add_ram(base, size));
                Self::same("VM_ADD_RAM", &result, &self.model.add_ram(handle, base, size));
            }
            2 => self.vcpu_create(handle, idx, some_page(b)),
            3 => {
                let (pc, x) = (spread(b), [1, 2, 3, 4].map(|n| n * u64::from(b)));
                let result = self.on(handle, |vm, _| vm.set_boot(idx, Boot { pc, x }));
                Self::same("VCPU_SET_BOOT", &result, &self.model.set_boot(handle, idx, pc, x));
            }
            4 => {
                let (ipa, pa) = (place(a), some_page(b));
                let result = self.on(handle, |vm, m| vm.populate(m, ipa, pa, &mut [0; 4096]));
                let no = self.model.donate(handle, ipa, (pa, PAGE_SIZE), true, None);
                Self::same("VM_POPULATE", &result, &no);
            }
            5 => {
                let result = self.on(handle, |vm, m| vm.activate(m));
                match self.model.activate(handle) {
                    Ok(digest) => assert_eq!(result, Ok(digest), "VM_ACTIVATE"),
                    Err(no) => Self::same("VM_ACTIVATE", &result, &no),
                }
            }
            6 => self.enter(handle, idx, [b, c, d, e]),
            7 => {
                // One page, some, or a part of a block.
                let part = u64::from(b % 4) * MOST;
                let (ipa, pa, size) = match c {
                    ..176 => (place(a), some_page(b), PAGE_SIZE),
                    176..208 => (place(a), some_page(b), u64::from(d) * PAGE_SIZE),
                    208..212 => (place(a), some_page(b), PAGE_SIZE + u64::from(d)),
                    _ => (RAM + 0x20_0000 * u64::from(a % 3) + part, BLOCK + part, MOST),
                };
                self.map(handle, ipa, (pa, size), e);
            }
            8 => self.unmap(handle, place(a), u64::from(b % 40)),
            9 => {
                let (ipa, pa) = (place(a), Pa(GICV + u64::from(b & 1) * PAGE_SIZE));
                let result = self.on(handle, |vm, m| vm.map_device(m, ipa, pa));
                Self::same("MAP_DEV", &result, &self.model.map_device(handle, ipa));
            }
            10 => {
                let (pa, n) = (some_page(a), if b == 255 { u64::MAX } else { u64::from(b % 36) });
                let result = self.on(handle, |vm, m| vm.donate_pool(m, pa, n));
                Self::same("POOL_DONATE", &result, &self.model.donate_pool(handle, pa, n));
            }
            11 => self.teardown(handle, false),
            12 => self.teardown(handle, true),
            13 | 14 => self.host_access(some_page(a), what % 24 == 13, b & 1 == 1, spread(c)),
            15 | 16 => self.guest_access(a, place(b), what % 24 == 15, spread(c) | SECRET),
            17 | 18 => self.trap(a, [b, c, d, e]),
            19 => self.interrupt(a, b & 1 == 1),
            20 => self.guest_call(a, [b, c, d, e]),
            21 => self.hold(some_page(a), b & 1 == 1),
            22 => self.host_psci(a, b),
            _ => {
                if let Some((handle, idx)) = self.guest(a) {
                    let register = usize::from(b % 31);
                    let value = spread(c) | SECRET | u64::from(d);
                    let key = (handle, idx);
                    self.contexts.get_mut(&key).expect("it runs").registers.x[register] = value;
                    self.model.vcpu(handle, idx).registers.x[register] = value;
                }
            }
        }
        self.compare();
        self.m.hw.take_events();
    }

    /// PAGE_MAP; `what` says whether the host is honest about what was sealed there.
    fn map(&mut self, handle: Handle, ipa: u64, (pa, size): (u64, u64), what: u8) {
        let gone = self.model.vms.get(&handle).and_then(|vm| vm.gone.get(&ipa)).copied();
        let number = match gone {
            Some(Gone::Sealed(number, _)) if what < 0xe0 => number,
            _ => usize::from(what % 32),
        };
        let host = self.model.owners.get(&pa) == Some(&Owner::Host) && size == PAGE_SIZE;
        let given = self.sealed.get(number).filter(|_| host && gone.is_some());
        let mut tag = [0; 2];
        if let Some((words, is)) = given {
            tag = *is;
            for (i, word) in words.iter().enumerate() {
                self.m.hw.poke(Pa(pa), i, *word);
            }
            self.model.contents.insert(pa, [words[0], words[511]]);
        }
        let given = given.map(|_| number);
        let result = self.on(handle, |vm, m| vm.map_pages(m, ipa, pa, size, tag));
        let no = self.model.donate(handle, ipa, (pa, size), false, given);
        Self::same("PAGE_MAP", &result, &no);
        // What is between the two words that are looked at is zero in all pages.
        match self.model.owners.get(&pa) {
            Some(Owner::Private(_)) if given.is_some() => {
                let zero = (1..511).all(|i| self.m.hw.peek(Pa(pa), i) == 0);
                assert!(zero, "{pa:#x} comes back changed");
            }
            Some(Owner::Host) if given.is_some() => self.clear(pa),
            _ if given.is_some() => (1..511).for_each(|i| self.m.hw.poke(Pa(pa), i, 0)),
            _ => {}
        }
    }

    /// The host clears its page.
    fn clear(&mut self, pa: u64) {
        (0..512).for_each(|i| self.m.hw.poke(Pa(pa), i, 0));
        self.model.contents.remove(&pa);
    }

    /// PAGE_UNMAP; what comes sealed the host puts aside.
    fn unmap(&mut self, handle: Handle, ipa: u64, n: u64) {
        let result = self.on(handle, |vm, m| vm.unmap_pages(m, ipa, n));
        match self.model.unmap(handle, ipa, n, self.sealed.len()) {
            Err(no) => Self::same("PAGE_UNMAP", &result, &no),
            Ok(None) => assert_eq!(result, Ok((n, [0; 2])), "PAGE_UNMAP of nothing"),
            Ok(Some((at, pa, gone))) => {
                let (done, tag) = result.expect("a page to take");
                assert_eq!(done, (at - ipa) / PAGE_SIZE + 1, "PAGE_UNMAP");
                let Gone::Sealed(_, content) = gone else {
                    assert_eq!(tag, [0; 2], "a shared page is not sealed");
                    return;
                };
                let words: Box<[u64; 512]> =
                    Box::new(std::array::from_fn(|i| self.m.hw.peek(Pa(pa), i)));
                let old = words.iter().any(|word| *word == 0 || content.contains(word));
                assert!(!old, "{pa:#x} leaves its VM in clear (I5)");
                self.sealed.push((words, tag));
                self.clear(pa);
            }
        }
    }

    fn create(&mut self, max_vcpus: u64, gic: u64, bits: u64) {
        let no = self.model.create(SLOTS, max_vcpus, gic, bits);
        let config = Config { ipa_bits: bits, gic, max_vcpus };
        let mut result = Err(Error::NoMemory);
        for (vm, slot) in self.vms.iter_mut().zip((0..).map(VmSlot)) {
            // One key for all: another VM's page is refused for its place.
            match vm.create(slot, root(slot), config, 0, [7; 32]) {
                Ok(handle) => result = Ok(handle),
                Err(Error::Busy) => continue,
                Err(error) => result = Err(error),
            }
            break;
        }
        Self::same("VM_CREATE", &result, &no);
        if let Ok(handle) = result {
            self.model.created(handle, max_vcpus, gic, bits);
        }
    }

    fn vcpu_create(&mut self, handle: Handle, idx: u64, page: u64) {
        let result = self.on(handle, |vm, m| vm.create_vcpu(m, idx, page, 0));
        Self::same("VCPU_CREATE", &result, &self.model.vcpu_create(handle, idx, page));
        if result.is_ok() {
            let registers = Registers { x: [0; 31], pc: 0 };
            let context = Context { registers, pending: Pending::Nothing, sgis: 0 };
            self.contexts.insert((handle, idx), context);
        }
    }

    /// VCPU_RUN, as the monitor carries it out.
    fn enter(&mut self, handle: Handle, idx: u64, [a, b, c, d]: [u8; 4]) {
        let mut words = [0; WORDS_ENTRY];
        let flags = u64::from(a);
        // Mostly a plausible one.
        words[0] = if a < 0x40 { flags % 20 } else { flags & 0x1f };
        if a == 0xff {
            words[0] = 1 << 40;
        }
        for (i, word) in words.iter_mut().enumerate().skip(1).take(5) {
            *word = spread(b).wrapping_add(i as u64 & u64::from(b));
        }
        if b & 1 == 0 {
            // The hypercall is done.
            words[1] = 0;
        }
        words[7] = match c {
            0..=0x7f => 0,
            0xff => u64::MAX,
            c => u64::from(c % 20),
        };
        for (i, lr) in (0..).zip(words.iter_mut().skip(8)) {
            let pending = 1 << 62 | 1 << 60 | 0xa0 << 48;
            *lr = match (d / 16 + i * 5) % 16 {
                0..4 => pending | u64::from(d.wrapping_add(i) & 15),
                4 => pending | 1 << 61 | 27 << 32 | 27,
                5 => pending | u64::from(32 + i),
                6 => pending | 1 << 63 | u64::from(64 + i),
                7 => u64::from(d & 15),
                8 => pending | 1 << 61 | 30 << 32 | 27,
                9 => pending | (1020 + u64::from(d & 3)),
                10 => pending | u64::from(d & 7) << 10 | u64::from(i),
                11 => pending | 1 << (32 + d % 16) | u64::from(96 + i),
                12 => pending | 1 << (48 + d % 16) | u64::from(128 + i),
                13 => pending | 1 << (10 + d % 22) | 33,
                14 => 1 << 61 | 27 << 32 | 27,
                _ => pending | 1 << 61 | u64::from(d & 31) << 32 | 27,
            };
        }
        let entry = Entry::read(|i| words[i]);
        let result = self.try_enter(handle, idx, &entry);
        let no = self.model.run(handle, idx, &entry, LRS);
        Self::same("VCPU_RUN", &result, &no);
        if result.is_ok() {
            self.m.hw.load(Self::vttbr(handle));
            self.running.push((handle, idx));
        }
    }

    fn try_enter(&mut self, handle: Handle, idx: u64, entry: &Entry) -> Result<(), Error> {
        let slot = handle_slot(handle).ok_or(Error::Invalid)?;
        let vm = self.vms.get_mut(usize::from(slot.0)).ok_or(Error::Invalid)?;
        vm.check_handle(handle)?;
        let run = vm.runnable(idx)?;
        assert_eq!(run.vttbr, Self::vttbr(handle));
        let context = self.contexts.get_mut(&(handle, idx)).expect("a vCPU that exists");
        let pending = if run.start.is_some() { Pending::Nothing } else { context.pending };
        let mut answer = exit::answer(&pending, entry)?;
        let implemented = if run.config.gic == 0 { 0 } else { LRS as usize };
        let used = vgic::check(run.config.gic, &entry.lr, entry.nr_lr, implemented)?;
        let sgis = vgic::pending_sgis(&entry.lr, used);
        vm.take_sgis(idx, sgis)?;
        vm.enter(idx)?;
        if pending == Pending::Hypercall {
            let [x0, x1, ..] = context.registers.x;
            hypercall::answered(self.m, vm, idx, [x0, x1], &mut answer);
        }
        context.sgis = sgis;
        context.pending = Pending::Nothing;
        let registers = &mut context.registers;
        if let Some(boot) = run.start {
            *registers = Registers { x: [0; 31], pc: boot.pc };
            registers.x[..4].copy_from_slice(&boot.x);
        }
        match answer {
            Answer::Nothing | Answer::Inject(_) => {}
            Answer::Set { rt, value } => {
                exit::write_register(&mut registers.x, rt, value);
                registers.pc += 4;
            }
            Answer::Results(results) => {
                registers.x[..4].copy_from_slice(&results);
                registers.pc += 4;
            }
        }
        let injected = matches!(answer, Answer::Inject(_));
        let flags = entry.flags.0;
        let wanted = flags & (EntryFlags::INJECT_SEA | EntryFlags::INJECT_UNDEF);
        assert_eq!(injected, wanted != 0);
        if let Answer::Inject(what) = answer {
            assert_eq!(what == Injection::Undefined, wanted == EntryFlags::INJECT_UNDEF);
        }
        Ok(())
    }

    fn teardown(&mut self, handle: Handle, destroy: bool) {
        let before = self.model.pages_of(handle);
        let result =
            self.on(handle, |vm, m| if destroy { vm.destroy(m, |_| ()) } else { vm.reset(m) });
        let host = |pa: &u64| self.m.pages.owner(Pa(*pa)) == Some(page::Owner::Host);
        let back: Vec<_> = before.into_iter().filter(host).collect();
        for pa in &back {
            assert!(self.m.hw.is_zero(Pa(*pa)), "{pa:#x} leaves its VM with content (I5)");
        }
        self.model.teardown(handle, destroy, result, &back);
        if result.is_ok() && destroy {
            self.contexts.retain(|(vm, _), _| *vm != handle);
        }
        self.walk_all();
    }

    /// What the host's stage-2 gives for an access, after the abort that the
    /// monitor resolves.
    fn host_leaf(&self, pa: u64, write: bool, fetch: bool) -> Option<Leaf> {
        let hw = &self.m.hw;
        self.m.with_host_map(|map| {
            let permits = |leaf: &Leaf| {
                leaf.is_valid()
                    && (!write || leaf.is_writable())
                    && (!fetch || leaf.is_executable())
            };
            if let Some(leaf) = map.lookup(hw, Ipa(pa)).filter(permits) {
                return Some(leaf);
            }
            match map.resolve(hw, Ipa(pa), write, fetch) {
                Resolution::Refused | Resolution::Ignored => None,
                Resolution::Retry => {
                    Some(map.lookup(hw, Ipa(pa)).filter(permits).expect("a retry that succeeds"))
                }
            }
        })
    }

    fn host_access(&mut self, pa: u64, write: bool, fetch: bool, value: u64) {
        let (write, fetch) = (write && !fetch, fetch);
        let leaf = self.host_leaf(pa, write, fetch);
        if pa == UART {
            assert_eq!(leaf.is_some(), !fetch, "the host's device");
            return;
        }
        let page = pa / PAGE_SIZE * PAGE_SIZE;
        let expected = self.model.host_sees(pa, write, fetch);
        assert_eq!(leaf.is_some(), expected.is_some(), "host at {pa:#x}, write {write}");
        let (Some(leaf), Some(expected)) = (leaf, expected) else { return };
        let zero = leaf.address() == Pa(BASE + 0x1000);
        let at = if zero { leaf.address() } else { Pa(page) };
        let found = [self.m.hw.peek(at, 0), self.m.hw.peek(at, 511)];
        assert_eq!(found, expected, "what the host sees at {pa:#x}");
        let shared = matches!(self.model.owners.get(&page), Some(Owner::Shared(_)));
        let secret = !shared && found.iter().any(|w| w & SECRET != 0);
        assert!(!secret, "the host sees a guest's word at {pa:#x}");
        if write {
            self.write(page, value);
        }
    }

    /// A word of the page, by whoever may write it.
    fn write(&mut self, page: u64, value: u64) {
        let word = usize::from(value & 2 != 0);
        self.m.hw.poke(Pa(page), word * 511, value);
        self.model.contents.entry(page).or_default()[word] = value;
    }

    /// A running guest.
    fn guest(&self, a: u8) -> Option<(Handle, u64)> {
        let n = self.running.len().max(1);
        self.running.get(usize::from(a) % n).copied()
    }

    /// The leaf of a VM's stage-2.
    fn guest_leaf(&self, handle: Handle, ipa: u64) -> Option<Leaf> {
        let mut table = root(Self::slot(handle));
        for slot in [ipa >> 30, ipa >> 21 & 511] {
            let entry = Leaf(self.m.hw.peek(table, slot as usize));
            if !entry.is_valid() {
                return None;
            }
            if entry.is_block() {
                let page = entry.address().offset(ipa & 0x1f_f000);
                return Some(Leaf::page(page, Attributes::Memory));
            }
            table = entry.address();
        }
        Some(Leaf(self.m.hw.peek(table, (ipa >> 12 & 511) as usize))).filter(|e| e.is_valid())
    }

    fn guest_access(&mut self, a: u8, ipa: u64, write: bool, value: u64) {
        let Some((handle, _)) = self.guest(a) else { return };
        if ipa >> 40 != 0 {
            return;
        }
        let ipa = ipa / PAGE_SIZE * PAGE_SIZE;
        let vm = &self.model.vms[&handle];
        let Some(pa) = vm.private.get(&ipa).copied() else {
            let device = vm.devices.contains(&ipa);
            assert_eq!(self.guest_leaf(handle, ipa).is_some(), device, "guest at {ipa:#x}");
            return;
        };
        let leaf = self.guest_leaf(handle, ipa).expect("a guest's page");
        let found = [self.m.hw.peek(leaf.address(), 0), self.m.hw.peek(leaf.address(), 511)];
        assert_eq!(found, self.model.content(pa), "what the guest sees at {ipa:#x}");
        if write {
            self.write(pa, value);
        }
    }

    /// The guest's vCPU stops, and the host hears of it.
    fn leave(&mut self, handle: Handle, idx: u64, pending: Pending, question: Question) {
        let context = self.contexts.get_mut(&(handle, idx)).expect("it ran");
        context.pending = pending;
        // The guest has taken the lower half of what was pending.
        let left = context.sgis & 0xff00;
        self.find(handle).expect("it ran").leave(idx, left);
        self.m.hw.unload(Self::vttbr(handle));
        self.running.retain(|r| *r != (handle, idx));
        let left: Vec<_> = (0..16).filter(|id| left >> id & 1 == 1).collect();
        self.model.stopped(handle, idx, question, &left);
    }

    fn interrupt(&mut self, a: u8, _serror: bool) {
        if let Some((handle, idx)) = self.guest(a) {
            let pending = self.contexts[&(handle, idx)].pending;
            assert_eq!(pending, Pending::Nothing);
            self.leave(handle, idx, Pending::Nothing, Question::Nothing);
        }
    }

    fn trap(&mut self, a: u8, [b, c, d, e]: [u8; 4]) {
        let Some((handle, idx)) = self.guest(a) else { return };
        let offset = if e & 0x60 == 0x40 { 0xf00 } else { u64::from(e) };
        let ipa = place(c).wrapping_add(offset) & ((1 << 41) - 1);
        let rt = usize::from(d % 32);
        let bit = |n: u8| e >> n & 1 == 1;
        let trap = match b % 9 {
            0 => Trap::Wfx { wfe: bit(0) },
            1 | 2 => Trap::Data {
                ipa,
                rt,
                size: 1 << (e & 3),
                signed: bit(2),
                wide: bit(3),
                write: bit(4),
                known: !bit(7),
            },
            3 => Trap::Fetch { ipa },
            4 => Trap::Walk { ipa, fetch: bit(0), write: bit(1) },
            5 => Trap::Cache { ipa },
            6 => Trap::External { ipa, fetch: bit(0) },
            7 => {
                let fields: [u64; 5] = [
                    [3, 3, 14, 2, 0],
                    [3, 0, 12, 11, 5],
                    [2, 0, 0, 2, 2],
                    [3, 0, 0, 4, 0],
                    [3, 0, 12, 12, 5],
                    [3, 0, 1, 0, 1],
                    [3, 0, 0, 0, 5],
                    [3, 3, 9, 12, 0],
                ][usize::from(c % 8)];
                let [op0, op1, crn, crm, op2] = fields;
                let near = u64::from(c >> 3);
                let op = [op0, op1, crn, (crm + (near >> 2)) & 15, (op2 + near) & 7];
                Trap::Sysreg { op, rt, read: bit(0) }
            }
            _ => match u64::from(c % 64) {
                0x16 | 0x17 | 0x24 | 0x20 | 0x18 | 0x01 => Trap::Call { smc: bit(1) },
                ec => Trap::Other { ec },
            },
        };
        let el1 = !bit(5);
        self.take(handle, idx, &trap, el1, u64::from(c) << 8 | u64::from(d));
    }

    fn take(&mut self, handle: Handle, idx: u64, trap: &Trap, el1: bool, noise: u64) {
        let esr = model::syndrome(trap, noise);
        let ipa = match *trap {
            Trap::Data { ipa, .. }
            | Trap::Fetch { ipa }
            | Trap::Walk { ipa, .. }
            | Trap::Cache { ipa }
            | Trap::External { ipa, .. } => ipa,
            _ => 0,
        };
        let x = self.contexts[&(handle, idx)].registers.x;
        let &model::Vm { bits, gic, max_vcpus, .. } = &self.model.vms[&handle];
        let config = Config { ipa_bits: bits, gic, max_vcpus };
        let vm = self.find(handle).expect("it runs");
        let syndrome = Syndrome { esr, ipa: Ipa(ipa), privileged: el1, idx };
        let action = exit::decide(&syndrome, &x, &config, |ipa| vm.ram_or_device(ipa), |_, _| 0);
        let expected = model::exit(trap, &self.model.vms[&handle], &x, el1, esr);
        if self.verbose {
            eprintln!("  {trap:x?}: {action:x?}");
        }
        match action {
            Action::Exit { exit, pending, step } => {
                let question = question(pending);
                assert_eq!(expected, Outcome::Shown { exit, question, step }, "{trap:x?}");
                if step {
                    self.go_on(handle, idx);
                }
                self.leave(handle, idx, pending, question);
            }
            Action::Sgi(exit, sgi) => {
                let question = Question::Sgi;
                assert_eq!(expected, Outcome::Shown { exit, question, step: true }, "{trap:x?}");
                self.find(handle).expect("it runs").send_sgi(sgi);
                let distributor = exit.class == ExitClass::MmioWrite;
                self.model.sent(handle, idx, distributor, exit.data);
                self.go_on(handle, idx);
                self.leave(handle, idx, Pending::Sgi, question);
            }
            Action::Inject(what) => {
                let undefined = what == Injection::Undefined;
                assert_eq!(expected, Outcome::Injected { undefined }, "{trap:x?}");
            }
            Action::Skip => {
                assert_eq!(expected, Outcome::Stepped, "{trap:x?}");
                self.go_on(handle, idx);
            }
            Action::Debug(target) | Action::Fixed { rt: target, .. } => {
                assert_eq!(expected, Outcome::Emulated, "{trap:x?}");
                let Trap::Sysreg { rt, read, .. } = *trap else { panic!("{trap:x?}") };
                assert_eq!(usize::from(target), if read { rt } else { 31 });
                self.go_on(handle, idx);
            }
            Action::Hypercall => {
                assert_eq!(expected, Outcome::Call, "{trap:x?}");
                self.call(handle, idx);
            }
        }
    }

    /// Behind the instruction.
    fn go_on(&mut self, handle: Handle, idx: u64) {
        self.contexts.get_mut(&(handle, idx)).expect("it runs").registers.pc += 4;
        self.model.vcpu(handle, idx).registers.pc += 4;
    }

    /// HVC or SMC with what is in the registers.
    fn call(&mut self, handle: Handle, idx: u64) {
        let x = self.contexts[&(handle, idx)].registers.x;
        let function = x[0] & 0xbfff_ffff;
        let m = self.m;
        let vm = self.find(handle).expect("it runs");
        let gpr = [x[0], x[1], x[2], x[3]];
        let answer = hypercall::call(m, vm, idx, gpr, || None);
        if (0x8400_0050..=0x8400_0053).contains(&function) {
            // Random numbers are not modelled; the host must not hear of it.
            assert!(answer.is_ok());
            // Behind it: what was called stays.
            self.go_on(handle, idx);
            return;
        }
        let expected = self.model.guest_call(handle, idx);
        match (answer, expected) {
            (Ok(answer), Called::Answered(expected)) => {
                assert_eq!(answer, expected, "call {:x?}", &x[..4]);
                let registers =
                    &mut self.contexts.get_mut(&(handle, idx)).expect("it runs").registers;
                registers.x[..4].copy_from_slice(&answer);
                self.model.vcpu(handle, idx).registers.x[..4].copy_from_slice(&answer);
                self.go_on(handle, idx);
            }
            (Err(Pending::Hypercall), Called::Forwarded) => {
                let shown = exit::call(&Pending::Hypercall, x[1]);
                let gpr = match x[0] & 0xffff_ffff {
                    0x8400_0002 | 0x8400_0008 | 0x8400_0009 => [x[0], 0, 0, 0],
                    _ => [x[0], x[1], x[2], x[3]],
                };
                assert_eq!(
                    (
                        shown.class,
                        exit::shown_registers(shown.class, &x),
                        shown.ipa,
                        shown.data,
                        shown.esr & 0x1ff_ffff
                    ),
                    (ExitClass::Hvc, gpr, 0, 0, 0)
                );
                self.leave(handle, idx, Pending::Hypercall, Question::Hypercall);
            }
            (Err(Pending::Nothing), Called::Missing(ipa)) => {
                let shown = exit::call(&Pending::Nothing, x[1]);
                let esr = 0x24 << 26 | 1 << 25 | 1 << 6 | 7;
                let class = ExitClass::Fault;
                assert_eq!(shown, Exit { class, esr, ipa, mode: 1, ..Exit::default() });
                self.leave(handle, idx, Pending::Nothing, Question::Nothing);
            }
            (answer, expected) => panic!("call {:x?}: {answer:?}, expected {expected:?}", &x[..4]),
        }
    }

    fn guest_call(&mut self, a: u8, [b, c, d, e]: [u8; 4]) {
        const FUNCTIONS: [u64; 28] = [
            0xc400_0003,
            0x8400_0003,
            0xc400_0003,
            0x8400_0002,
            0xc400_0004,
            0x8400_0004,
            0x8400_0000,
            0x8400_0001,
            0xc400_0001,
            0x8400_0006,
            0x8400_0008,
            0x8400_0009,
            0x8400_000a,
            0x8400_0012,
            0xc400_0012,
            0x8000_0000,
            0x8000_0001,
            0xc200_000b,
            0x8400_000e,
            0xc400_0002,
            0xc600_0002,
            0xc600_0003,
            0xc600_0003,
            0xc600_0004,
            0xc600_0004,
            0xc600_0007,
            0x8600_0000,
            0x8600_ff01,
        ];
        let Some((handle, idx)) = self.guest(a) else { return };
        let function = FUNCTIONS[usize::from(b) % FUNCTIONS.len()];
        let high = u64::from(c >> 7) << 33;
        let x1 = match c % 16 {
            n @ 0..5 => u64::from(n),
            5 => 0x101,
            6 => 0x8000_0000,
            7 => 1 << 24,
            n => FUNCTIONS[(usize::from(n) + usize::from(d)) % FUNCTIONS.len()],
        } | high;
        // KVM's calls name a place, and mostly no more.
        let about_page = (0xc600_0002..=0xc600_0007).contains(&function);
        let x = if about_page {
            let rest = u64::from(e & 0x3f == 1);
            [function | u64::from(e >> 7) << 40, place(c), rest, u64::from(e & 0x3f == 2)]
        } else {
            [function | u64::from(e >> 7) << 40, x1, u64::from(d % 4) | high, spread(e)]
        };
        let registers = &mut self.contexts.get_mut(&(handle, idx)).expect("it runs").registers;
        registers.x[..4].copy_from_slice(&x);
        self.model.vcpu(handle, idx).registers.x[..4].copy_from_slice(&x);
        self.take(handle, idx, &Trap::Call { smc: e & 1 == 1 }, true, 0);
    }

    /// Another CPU begins or ends to move a page of the host.
    fn hold(&mut self, pa: u64, release: bool) {
        if release {
            if let Some(page) = self.held.pop() {
                self.model.owners.insert(page.pa().0, Owner::Host);
                self.m.pages.unclaim(page);
            }
            return;
        }
        let result = self.m.pages.claim(Pa(pa), page::Owner::Host);
        let expected = match self.model.owners.get(&pa) {
            Some(Owner::Host) => None,
            Some(Owner::Moving) => Some(Error::Again),
            _ => Some(Error::Denied),
        };
        assert_eq!(result.as_ref().err().copied(), expected, "a claim of {pa:#x}");
        if let Ok(page) = result {
            self.model.owners.insert(pa, Owner::Moving);
            self.held.push(page);
        }
    }

    fn host_psci(&mut self, a: u8, b: u8) {
        let cpu = usize::from(b % 3);
        let (power, state) = (&mut self.power[cpu], &mut self.cpus[cpu]);
        match a % 4 {
            0 => {
                let result = power.turn_on(Boot { pc: u64::from(b), x: [0; 4] });
                let expected = match *state {
                    2 => Err(psci::Error::AlreadyOn),
                    1 => Err(psci::Error::OnPending),
                    _ => Ok(()),
                };
                assert_eq!(result, expected, "CPU_ON");
                *state = (*state).max(1);
            }
            1 => {
                let told = power.start();
                assert_eq!(told.is_some(), *state == 1, "a CPU's entry");
                if told.is_some() {
                    *state = 2;
                }
            }
            2 => {
                *power = psci::Power::Off;
                *state = 0;
            }
            _ => assert_eq!(power.info(), [1, 2, 0][usize::from(*state)], "AFFINITY_INFO"),
        }
    }

    /// What the records, maps and registers must be after each operation.
    fn compare(&self) {
        let handle_of = |slot: VmSlot| self.vms[usize::from(slot.0)].handle();
        for n in 0..POOL {
            let pa = host_page(n);
            let owner = match self.m.pages.owner(pa) {
                None => Some(Owner::Moving),
                Some(page::Owner::Host) => Some(Owner::Host),
                Some(page::Owner::RunPage(vm)) => Some(Owner::RunPage(handle_of(vm))),
                Some(page::Owner::Table(vm)) => Some(Owner::Table(handle_of(vm))),
                Some(page::Owner::Private(vm)) => Some(Owner::Private(handle_of(vm))),
                Some(page::Owner::Shared(vm)) => Some(Owner::Shared(handle_of(vm))),
                Some(page::Owner::Monitor) => None,
            };
            let expected = self.model.owners.get(&pa.0).copied();
            assert_eq!(owner, expected, "the owner of {pa:x?}");
            let leaf = self.m.host_leaf(pa);
            match expected {
                Some(Owner::Private(_) | Owner::Table(_)) => {
                    let zero = Leaf::page(Pa(BASE + 0x1000), Attributes::ReadOnly);
                    assert!(leaf.is_none_or(|l| l == zero), "the host's map shows {pa:x?}");
                }
                _ => assert!(
                    leaf.is_some_and(|l| l.is_writable() && l.is_executable()),
                    "the host's map misses {pa:x?}"
                ),
            }
            if !matches!(expected, Some(Owner::Table(_))) {
                let found = [self.m.hw.peek(pa, 0), self.m.hw.peek(pa, 511)];
                assert_eq!(found, self.model.content(pa.0), "the content of {pa:x?}");
            }
        }
        for (handle, vm) in &self.model.vms {
            for (ipa, pa) in &vm.private {
                let leaf = Leaf::page(Pa(*pa), Attributes::Memory);
                assert_eq!(self.guest_leaf(*handle, *ipa), Some(leaf), "{ipa:#x} of {handle:#x}");
            }
            let core = &self.vms[usize::from(Self::slot(*handle).0)];
            for (idx, vcpu) in &vm.vcpus {
                let context = &self.contexts[&(*handle, *idx)];
                assert_eq!(context.registers, vcpu.registers, "vCPU {idx} of {handle:#x}");
                let power = core.power((idx % 16) | ((idx / 16) << 8));
                let expected = match vcpu.power {
                    Power::Off => psci::Power::Off,
                    Power::Pending(pc, x) => psci::Power::Pending(Boot { pc, x }),
                    Power::On => psci::Power::On,
                };
                assert_eq!(power, Some(expected), "power of vCPU {idx}");
            }
            assert_eq!(core.vcpu_count(), vm.vcpus.len());
        }
        let (census, stats) = (self.m.pages.census(), self.model.stats());
        assert_eq!(
            (census.host, census.table, census.private, census.shared),
            (stats.host, stats.table, stats.private, stats.shared),
            "STATS"
        );
        let live = self.vms.iter().filter(|vm| vm.exists()).count() as u64;
        assert_eq!(live, stats.vms);
        assert_eq!(self.m.hw.stale(), vec![], "a TLB remembers");
    }

    /// Every leaf of every VM's map is one that the model knows (I2, I4).
    fn walk_all(&self) {
        for slot in (0..SLOTS as u8).map(VmSlot) {
            let core = &self.vms[usize::from(slot.0)];
            let vm = self.model.vms.get(&core.handle());
            let mut leaves = 0;
            for i in 0..1024 {
                let level1 = Leaf(self.m.hw.peek(root(slot), i));
                if !level1.is_valid() {
                    continue;
                }
                for j in 0..512 {
                    let level2 = Leaf(self.m.hw.peek(level1.address(), j));
                    if !level2.is_valid() {
                        continue;
                    }
                    for k in 0..512 {
                        let leaf = Leaf(self.m.hw.peek(level2.address(), k));
                        if !leaf.is_valid() {
                            continue;
                        }
                        leaves += 1;
                        let ipa = (i as u64) << 30 | (j as u64) << 21 | (k as u64) << 12;
                        let vm = vm.expect("a slot without a VM maps nothing");
                        let known = vm.private.contains_key(&ipa);
                        // While it is torn down devices may be gone already.
                        let device = vm.devices.contains(&ipa)
                            && leaf == Leaf::page(leaf.address(), Attributes::Device);
                        assert!(known || device, "a leaf at {ipa:#x}: {leaf:x?}");
                    }
                }
            }
            if let Some(vm) = vm {
                let devices = if matches!(vm.phase, Phase::Open | Phase::Active) {
                    vm.devices.len()
                } else {
                    0
                };
                assert!(leaves >= vm.private.len() + devices, "a leaf is missing");
            }
        }
    }

    /// Ends all VMs: every page is the host's again, and no word of a guest left.
    pub fn end(&mut self) {
        self.walk_all();
        while let Some((handle, idx)) = self.running.first().copied() {
            self.leave(handle, idx, Pending::Nothing, Question::Nothing);
        }
        while !self.held.is_empty() {
            self.hold(0, true);
        }
        while let Some(handle) = self.model.vms.keys().next().copied() {
            self.teardown(handle, true);
        }
        self.compare();
        for n in 0..POOL {
            let pa = host_page(n);
            assert_eq!(self.m.pages.owner(pa), Some(page::Owner::Host));
            for i in 0..512 {
                assert_eq!(self.m.hw.peek(pa, i) & SECRET, 0, "a guest's word survives at {pa:x?}");
            }
        }
    }
}

fn question(pending: Pending) -> Question {
    match pending {
        Pending::Nothing => Question::Nothing,
        Pending::Mmio(a) if a.write => Question::Store,
        Pending::Mmio(a) => Question::Load(usize::from(a.rt), a.size, a.signed, a.wide),
        Pending::Sysreg(a) if a.read => Question::SysregRead(usize::from(a.rt)),
        Pending::Sysreg(_) => Question::SysregWrite,
        Pending::Sgi => Question::Sgi,
        Pending::Hypercall => Question::Hypercall,
    }
}
