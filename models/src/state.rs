// SPDX-License-Identifier: MIT OR Apache-2.0
//! A state of the small world, its steps, and what must hold in it (DESIGN, section 4).

use std::sync::Arc;

use havmsi_abi::Error;
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::page::Owner;
use havmsi_core::stage2::{Attributes, Entry};
use havmsi_core::vm::Vm;

use crate::call::{
    Call, DATA, MOVING, Op, Outcome, PAGES, Records, Stop, is_sealed, number, page, place,
    with_bench,
};
use crate::memory::{Memory, word};
use crate::tlb::{Below, Stale, Trees, World};

/// CPUs, at most.
pub const CPUS: usize = 3;
/// Addresses of a guest that are followed.
pub const PLACES: usize = 3;

/// What hosts and devices write: a table entry that leads to page 0.
#[must_use]
pub fn forged() -> u64 {
    Entry::page(page(0), Attributes::Memory).0
}

/// What a guest writes; no valid entry.
#[must_use]
pub const fn secret(vm: u8) -> u64 {
    1 << 63 | (vm as u64 + 1) << 1
}

const fn is_secret(word: u64) -> bool {
    word >> 63 != 0
}

/// What a CPU does.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Cpu {
    /// There is none.
    Absent,
    /// It runs the host.
    Host,
    /// It runs this vCPU: VM, number.
    Guest(u8, u8),
    /// It runs the monitor.
    Monitor(Call),
}

/// What a guest's memory at an address must be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Expected {
    /// Nothing is there yet.
    Nothing,
    /// The host took this away, sealed as that: nothing else may come there.
    Gone(u64, u64),
    /// This.
    Content(u64),
}

/// Which promise is broken: a bit each.
pub struct Broken;

impl Broken {
    /// One owner.
    pub const I1: u16 = 1 << 1;
    /// Mapped for the owner only.
    pub const I2: u16 = 1 << 2;
    /// Tables in the monitor's memory.
    pub const I3: u16 = 1 << 3;
    /// One place of the VM.
    pub const I4: u16 = 1 << 4;
    /// Leaves a VM wiped.
    pub const I5: u16 = 1 << 5;
    /// No old translation.
    pub const I6: u16 = 1 << 6;
    /// Zero, or measured.
    pub const I7: u16 = 1 << 7;
    /// I9: no panic, nothing half done, nothing lost.
    pub const I9: u16 = 1 << 9;
    /// Tables are read and written by the holder of their lock.
    pub const LOCKS: u16 = 1 << 10;
    /// Two CPUs wait for each other.
    pub const DEADLOCK: u16 = 1 << 11;
}

/// A state.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    /// Memory.
    pub memory: Memory,
    /// The ownership records.
    pub records: Records,
    /// Who has each page in motion (CPU + 1), and whose it was.
    claims: [(u8, u16); PAGES],
    /// What TLBs may hold that no table says.
    pub stale: Arc<Vec<Stale>>,
    /// Whether TLBs may hold anything of a VM.
    cached: [bool; 2],
    /// Instruction caches may hold a page's last owner's code: a bit each.
    code: u16,
    /// The VMs, by their number among all states of VMs.
    pub vms: [u32; 2],
    /// Who holds the lock of the host's map.
    map_lock: Option<u8>,
    /// The CPUs.
    pub cpus: [Cpu; CPUS],
    /// What guests must find.
    expected: [[Expected; PLACES]; 2],
    /// What the host keeps of pages that it took away from there: the last, the one before.
    kept: [[[u64; 2]; PLACES]; 2],
    /// How many pages of each VM were sealed.
    sealed: [u8; 2],
    /// What does not hold.
    pub broken: u16,
    /// The first such thing.
    pub why: Option<Arc<str>>,
}

/// What a step needs besides the state.
pub trait Known {
    /// The trees.
    fn trees(&self) -> &Trees;
    /// The VM with this number.
    fn vm(&self, number: u32) -> Arc<Vm>;
    /// The number of a VM.
    fn number(&self, vm: Vm) -> u32;
    /// Hosts and guests write whatever they can, as soon as they can.
    fn eager(&self) -> bool;
    /// A call came to its end.
    fn ended(&self, op: Op, result: &Result<(), Error>);
}

impl State {
    /// A machine after boot: all is the host's, no VM exists.
    #[must_use]
    pub fn new(k: &impl Known, cpus: usize) -> Self {
        Self {
            memory: Memory::default(),
            records: with_bench(crate::call::Bench::first_records),
            claims: [(0, 0); PAGES],
            stale: Arc::default(),
            cached: [false; 2],
            code: 0,
            vms: [k.number(Vm::FREE), k.number(Vm::FREE)],
            map_lock: None,
            cpus: std::array::from_fn(|i| if i < cpus { Cpu::Host } else { Cpu::Absent }),
            expected: [[Expected::Nothing; PLACES]; 2],
            kept: [[[0; 2]; PLACES]; 2],
            sealed: [0; 2],
            broken: 0,
            why: None,
        }
    }

    fn break_promise(&mut self, which: u16, why: impl FnOnce() -> String) {
        self.broken |= which;
        if self.why.is_none() {
            self.why = Some(why().into());
        }
    }

    fn runs(&self, vm: u8) -> bool {
        self.cpus.iter().any(|cpu| matches!(cpu, Cpu::Guest(n, _) if *n == vm))
    }

    /// The CPU that holds the lock of a VM.
    fn vm_lock(&self, vm: u8) -> Option<usize> {
        self.cpus.iter().position(|cpu| match cpu {
            Cpu::Monitor(call) => call.vm.is_some() && call.op.vm() == Some(vm),
            _ => false,
        })
    }

    /// Whether a CPU can begin a call.
    #[must_use]
    pub fn can_start(&self, op: Op) -> bool {
        !op.locks_vm_first() || op.vm().is_none_or(|vm| self.vm_lock(vm).is_none())
    }

    /// The CPU that this one waits for.
    fn waits_for(&self, cpu: usize) -> Option<usize> {
        let Cpu::Monitor(call) = &self.cpus[cpu] else { return None };
        match call.next {
            Stop::LockMap => self.map_lock.map(usize::from),
            Stop::LockVm => call.op.vm().and_then(|vm| self.vm_lock(vm)),
            _ => None,
        }
    }

    /// Whether a CPU can take its next step in the monitor.
    #[must_use]
    pub fn can_step(&self, cpu: usize) -> bool {
        matches!(self.cpus[cpu], Cpu::Monitor(_)) && self.waits_for(cpu).is_none()
    }

    /// Begins a call.
    pub fn start(&mut self, k: &impl Known, cpu: usize, op: Op) {
        if let (Cpu::Guest(..), Op::Leave(..)) = (&self.cpus[cpu], op) {
            self.cpus[cpu] = Cpu::Host;
        }
        let vm = op.vm().filter(|_| op.locks_vm_first()).map(|vm| self.vms[usize::from(vm)]);
        let given = self.returned(op).unwrap_or(0);
        let (seen, next) = (Arc::default(), Stop::Look);
        let call = Call { op, vm, seen, next, copied: 0, given, acted: false };
        self.go_on(k, cpu, call, None);
    }

    /// What the host gives back by [`Op::Return`], if the place is one where a page was
    /// taken away (else it is a [`Op::Map`]): 0 what was sealed there last, 1 what was
    /// before, 2 what was last at the next place, 3 what the other VM had there.
    #[must_use]
    pub fn returned(&self, op: Op) -> Option<u64> {
        let Op::Return(vm, at, _, which) = op else { return None };
        let (vm, at) = (usize::from(vm), usize::from(at));
        let content = match which {
            0 | 1 => self.kept[vm][at][usize::from(which)],
            2 => self.kept[vm][(at + 1) % PLACES][0],
            _ => self.kept[1 - vm][at][0],
        };
        let gone = matches!(self.expected[vm][at], Expected::Gone(..));
        (gone && content != 0).then_some(content)
    }

    /// How many pages of a VM were sealed.
    #[must_use]
    pub fn seals(&self, vm: u8) -> u8 {
        self.sealed[usize::from(vm)]
    }

    /// The next step of a call.
    pub fn step(&mut self, k: &impl Known, cpu: usize) {
        let Cpu::Monitor(mut call) = self.cpus[cpu].clone() else { return };
        let turn = call.next;
        self.act(k, cpu, &mut call, turn);
        self.go_on(k, cpu, call, Some(turn));
    }

    /// The host writes to a page, or a device: what it is about to give back, or an entry.
    pub fn host_stores(&mut self, k: &impl Known, n: u8) {
        let given = self.cpus.iter().find_map(|cpu| match cpu {
            Cpu::Monitor(Call { op: Op::Return(_, _, page, _), given, .. }) if *page == n => {
                Some(*given)
            }
            _ => None,
        });
        let at = word(page(n), DATA);
        self.memory.set(k.trees().boot(), at, given.unwrap_or(forged()));
    }

    fn go_on(&mut self, k: &impl Known, cpu: usize, mut call: Call, turn: Option<Stop>) {
        let vm = call.vm.map(|number| k.vm(number));
        self.cpus[cpu] = Cpu::Monitor(call.clone());
        let stretch = with_bench(|bench| {
            let vm = vm.as_deref().unwrap_or(&Vm::FREE);
            bench.go_on(&call, turn, vm, &self.memory, &self.records)
        });
        for table in stretch.read {
            self.check_lock(k, cpu, table & !0xfff, "reads");
        }
        if stretch.map_freed {
            self.map_lock = None;
        }
        self.note_records(cpu, &stretch.records);
        match stretch.outcome {
            Outcome::Stopped(next, seen) => {
                call.next = next;
                call.seen = Arc::new(seen);
                self.cpus[cpu] = Cpu::Monitor(call);
            }
            Outcome::Ended(result, vm) => {
                self.cpus[cpu] = Cpu::Host;
                self.end(k, cpu, &call, &result, *vm);
            }
            Outcome::Panicked(text) => {
                self.cpus[cpu] = Cpu::Host;
                self.break_promise(Broken::I9, || format!("{:?} panics: {text}", call.op));
            }
        }
    }

    /// A call came to its end: its locks are free.
    fn end(&mut self, k: &impl Known, cpu: usize, call: &Call, result: &Result<(), Error>, vm: Vm) {
        k.ended(call.op, result);
        if self.map_lock.map(usize::from) == Some(cpu) {
            self.map_lock = None;
        }
        if let Some(number) = call.vm {
            let after = if *k.vm(number) == vm { number } else { k.number(vm) };
            let step =
                matches!(call.op, Op::Reset(_) | Op::Destroy(_)) && *result == Err(Error::Again);
            // The VM has stopped, and has no other page.
            let stops = *result == Err(Error::Integrity) && after != number;
            if result.is_err() && !step && !stops && (after != number || call.acted) {
                self.break_promise(Broken::I9, || {
                    format!("{:?} was refused ({result:?}) and changed something", call.op)
                });
            }
            self.vms[usize::from(call.op.vm().unwrap_or(0))] = after;
        }
        if let (Op::Destroy(vm), Ok(())) = (call.op, result) {
            self.sealed[usize::from(vm)] = 0;
        }
        if let (Op::Enter(vm, idx), Ok(())) = (call.op, result) {
            self.cpus[cpu] = Cpu::Guest(vm, idx);
            self.cached[usize::from(vm)] = true;
        }
        let holder = CPUS_NAMES[cpu];
        if let Some(n) = self.claims.iter().position(|claim| claim.0 == holder) {
            self.break_promise(Broken::I9, || format!("page {n} is lost in motion"));
        }
    }

    /// Records that a CPU changed.
    fn note_records(&mut self, cpu: usize, after: &Records) {
        let before = std::mem::replace(&mut self.records, *after);
        for (n, (old, new)) in before.into_iter().zip(*after).enumerate() {
            if old == new {
                continue;
            }
            let (holder, was) = self.claims[n];
            if new == MOVING {
                self.claims[n] = (CPUS_NAMES[cpu], old);
                continue;
            }
            if old != MOVING || holder != CPUS_NAMES[cpu] {
                self.break_promise(Broken::I1, || {
                    format!("page {n} gets the owner {new:#x} from a CPU that does not have it")
                });
            }
            self.claims[n] = (0, 0);
            if kind(was) == kind(new) || kind(new) == Kind::RunPage || kind(was) == Kind::RunPage {
                continue;
            }
            let pa = page(n.to_le_bytes()[0]).0;
            if let Some(stale) = self.stale.iter().find(|stale| stale.shows(pa)) {
                let stale = *stale;
                self.break_promise(Broken::I6, || {
                    format!("page {n} gets a new owner, and a TLB knows it: {stale:x?}")
                });
            }
            if self.code >> n & 1 != 0 {
                self.break_promise(Broken::I6, || {
                    format!("page {n} gets a new owner, instruction caches know its last one's")
                });
            }
        }
    }

    /// Does what a call stopped for.
    fn act(&mut self, k: &impl Known, cpu: usize, call: &mut Call, what: Stop) {
        call.acted |= what.changes_memory();
        match what {
            Stop::Look | Stop::Done | Stop::Pause => {}
            Stop::LockMap => self.map_lock = Some(cpu.to_le_bytes()[0]),
            Stop::LockVm => call.vm = call.op.vm().map(|vm| self.vms[usize::from(vm)]),
            Stop::Write(table, i, value) => self.write(k, cpu, call, word(table, i), value),
            Stop::Zero(pa) => {
                self.unused(k, cpu, pa, "wiped");
                self.memory.clear(pa.0);
                if let Some(n) = number(pa.0) {
                    self.code |= 1 << n;
                }
            }
            Stop::Change(pa, content) => {
                self.unused(k, cpu, pa, "encrypted");
                let (boot, at) = (k.trees().boot(), word(pa, DATA));
                let before = self.memory.get(boot, at);
                self.memory.clear(pa.0);
                self.memory.set(boot, at, content);
                if let (Op::Unmap(vm, ..) | Op::UnmapSwapped(vm, ..), Some(n)) =
                    (call.op, number(pa.0))
                {
                    self.code |= 1 << n;
                    self.note_seal(usize::from(vm), before, content);
                }
            }
            Stop::Copy(pa) => {
                self.unused(k, cpu, pa, "measured");
                call.copied = self.memory.get(k.trees().boot(), word(pa, DATA));
            }
            Stop::InvalidateIcache => self.code = 0,
            Stop::InvalidateHost(ipa, size) => self.forget(ipa, size, World::Host),
            Stop::InvalidateDevices(ipa, size) => self.forget(ipa, size, World::Devices),
            Stop::InvalidateGuest(vttbr, ipa, size) => {
                if let Some(vm) = k.trees().vm_of(vttbr) {
                    self.forget(ipa, size, World::Vm(vm));
                }
            }
            Stop::InvalidateGuestAll(vttbr) => {
                if let Some(vm) = k.trees().vm_of(vttbr) {
                    if self.stale.iter().any(|stale| stale.world == World::Vm(vm)) {
                        let stale = Arc::make_mut(&mut self.stale);
                        stale.retain(|stale| stale.world != World::Vm(vm));
                    }
                    self.cached[usize::from(vm)] = self.runs(vm);
                }
            }
        }
    }

    /// What was in a page of a VM is sealed: the host has it from now on.
    fn note_seal(&mut self, vm: usize, before: u64, content: u64) {
        self.sealed[vm] += 1;
        let unsealed = |expected: &Expected| matches!(expected, Expected::Gone(_, 0));
        let Some(at) = self.expected[vm].iter().position(unsealed) else { return };
        if let Expected::Gone(was, _) = self.expected[vm][at]
            && before != was
            && before != secret(vm.to_le_bytes()[0])
        {
            self.break_promise(Broken::I7, || {
                format!("{before:#x} is sealed, the guest had {was:#x} in place {at}")
            });
        }
        self.expected[vm][at] = Expected::Gone(before, content);
        let kept = &mut self.kept[vm][at];
        *kept = [content, kept[0]];
    }

    fn forget(&mut self, Ipa(ipa): Ipa, size: u64, world: World) {
        let hit = |stale: &Stale| {
            stale.world == world && stale.ipa < ipa + size && ipa < stale.ipa + stale.size
        };
        if self.stale.iter().any(hit) {
            Arc::make_mut(&mut self.stale).retain(|stale| !hit(stale));
        }
    }

    /// The page is in motion with this CPU, and nothing leads to it any more.
    fn unused(&mut self, k: &impl Known, cpu: usize, pa: Pa, what: &str) {
        let holder = number(pa.0).map(|n| self.claims[n].0);
        if holder != Some(CPUS_NAMES[cpu]) {
            self.break_promise(Broken::I1, || {
                format!("{:#x} is {what} by a CPU that does not have it", pa.0)
            });
        }
        if !k.trees().places(&self.memory, pa.0).is_empty() {
            self.break_promise(Broken::I3, || format!("a table is {what}: {:#x}", pa.0));
        }
        let Some(n) = number(pa.0) else { return };
        if let Some(Reach { world, stale, .. }) = View::new(self, k).reach[n].first().copied() {
            let which = if stale { Broken::I6 } else { Broken::I2 };
            self.break_promise(which, || {
                format!("page {n} is {what}, and {world:?} can still reach it")
            });
        }
    }

    /// A table entry, or a link of spare tables, is written.
    fn write(&mut self, k: &impl Known, cpu: usize, call: &Call, at: u64, value: u64) {
        let trees = k.trees();
        let table = at & !0xfff;
        let i = havmsi_core::addr::index(at / 8 % 512);
        let (old, new) = (Entry(self.memory.get(trees.boot(), at)), Entry(value));
        let places = trees.places(&self.memory, table);
        self.check_lock(k, cpu, table, "writes to");
        self.memory.set(trees.boot(), at, value);
        if old == new {
            return;
        }
        for place in places {
            let (ipa, size) = place.entry(i);
            let vm = match place.world {
                World::Vm(vm) => Some(usize::from(vm)),
                World::Host | World::Devices => None,
            };
            let cached = vm.is_none_or(|vm| self.cached[vm]);
            if old.is_valid() {
                if new.is_valid() && cached {
                    self.break_promise(Broken::I6, || {
                        format!("no break before make at {ipa:#x} of {:?}", place.world)
                    });
                }
                if place.world == World::Devices && place.is_table(old) {
                    self.break_promise(Broken::I3, || format!("a devices' table goes: {ipa:#x}"));
                }
                if cached {
                    let stale = Arc::make_mut(&mut self.stale);
                    stale.extend(trees.forgotten(&self.memory, place, i, old));
                    stale.sort_unstable();
                    stale.dedup();
                }
            }
            if new.is_valid() {
                let overlaps = |stale: &&Stale| {
                    stale.world == place.world
                        && stale.ipa < ipa + size
                        && ipa < stale.ipa + stale.size
                };
                if let Some(stale) = self.stale.iter().find(overlaps).copied() {
                    self.break_promise(Broken::I6, || {
                        format!("{ipa:#x} becomes valid before a TLB forgot {stale:x?}")
                    });
                }
                if place.is_table(new) && trees.places(&self.memory, new.address().0).len() > 2 {
                    let to = new.address().0;
                    self.break_promise(Broken::I3, || format!("table {to:#x} is linked twice"));
                }
                if vm.is_none() && place.level == 3 {
                    self.shown(new);
                }
            }
            if let (Some(vm), 3) = (vm, place.level) {
                self.note_leaf(call, vm, ipa, new);
            }
        }
    }

    /// The host is about to see a page again: of what a VM had, nothing is left.
    fn shown(&mut self, entry: Entry) {
        let Some(n) = number(entry.address().0) else { return };
        let was = self.claims[n].1;
        let words = self.memory.page(entry.address().0);
        let hidden = match kind(was) {
            Kind::Private(_) => words.iter().all(|(_, word)| is_sealed(*word)),
            Kind::Table(_) => words.is_empty(),
            Kind::Monitor | Kind::Host | Kind::RunPage | Kind::Moving => true,
        };
        if !hidden {
            self.break_promise(Broken::I5, || format!("page {n} goes to the host as it is"));
        }
    }

    /// A guest's leaf came or went.
    fn note_leaf(&mut self, call: &Call, vm: usize, ipa: u64, new: Entry) {
        let Some(at) = (0..PLACES).find(|at| place(at.to_le_bytes()[0]).0 == ipa) else { return };
        let expected = &mut self.expected[vm][at];
        let was = *expected;
        let teardown = matches!(call.op, Op::Reset(_) | Op::Destroy(_));
        *expected = match (new.is_valid(), was) {
            (true, _) if matches!(call.op, Op::Populate(..)) => Expected::Content(call.copied),
            (true, Expected::Gone(content, _)) => Expected::Content(content),
            (true, _) => Expected::Content(0),
            (false, _) if teardown => Expected::Nothing,
            (false, Expected::Content(content)) => Expected::Gone(content, 0),
            (false, was) => was,
        };
        if let (true, Expected::Gone(_, sealed)) = (new.is_valid(), was)
            && (call.given != sealed || !matches!(call.op, Op::Return(..)))
        {
            self.break_promise(Broken::I4, || {
                format!("a page comes to {ipa:#x} of VM {vm}, where another was taken away")
            });
        }
    }

    /// Tables are read and written by the holder of the lock that they belong to.
    fn check_lock(&mut self, k: &impl Known, cpu: usize, table: u64, what: &str) {
        let trees = k.trees();
        let root_of =
            |vm| (trees.root(World::Vm(vm))..trees.root(World::Vm(vm)) + 0x2000).contains(&table);
        let vm = match number(table).map(|n| kind(self.records[n])) {
            Some(Kind::Table(vm)) => Some(vm),
            Some(owner) => {
                return self.break_promise(Broken::I3, || {
                    format!("CPU {cpu} {what} table {table:#x}, which is {owner:?}")
                });
            }
            None => (0..2).find(|vm| root_of(*vm)),
        };
        let holder = match vm {
            Some(vm) => self.vm_lock(vm),
            None => self.map_lock.map(usize::from),
        };
        if holder != Some(cpu) {
            self.break_promise(Broken::LOCKS, || {
                format!("CPU {cpu} {what} table {table:#x} without its lock")
            });
        }
    }

    /// What must hold after each step; then hosts and guests write, where they are
    /// eager. `last` is the state before, for which it held.
    pub fn settle(&mut self, k: &impl Known, last: Option<&Self>) {
        self.check_waits();
        let same = |last: &Self| {
            self.memory.is(&last.memory)
                && self.records == last.records
                && Arc::ptr_eq(&self.stale, &last.stale)
        };
        let same_worlds = |last: &Self| {
            (0..2).all(|vm| self.runs(vm) == last.runs(vm))
                && self.cpus.contains(&Cpu::Host) == last.cpus.contains(&Cpu::Host)
        };
        let (nothing_new, no_one_new) =
            last.map_or((false, false), |last| (same(last), same_worlds(last)));
        if nothing_new && no_one_new {
            return;
        }
        let view = View::new(self, k);
        if !nothing_new {
            self.check(k, &view);
        }
        if !k.eager() || self.broken != 0 {
            return;
        }
        for vm in 0..2 {
            for at in 0..PLACES {
                self.guest_stores(k, vm, at.to_le_bytes()[0]);
            }
        }
        for n in 0..PAGES {
            if self.host_stores_to(&view, n) {
                self.host_stores(k, n.to_le_bytes()[0]);
            }
        }
        self.check_content(k, &view);
    }

    fn host_stores_to(&self, view: &View, n: usize) -> bool {
        let cpu = self.cpus.contains(&Cpu::Host);
        view.reach[n].iter().any(|reach| match reach.world {
            World::Host => reach.write && cpu,
            World::Devices => reach.write,
            World::Vm(_) => false,
        })
    }

    /// The pages among these that the host, or a device, can write to.
    #[must_use]
    pub fn stores_of_host(&self, k: &impl Known, pages: u8) -> Vec<u8> {
        let view = View::new(self, k);
        (0..pages).filter(|n| self.host_stores_to(&view, usize::from(*n))).collect()
    }

    /// Pages that a guest that runs can write to at an address.
    fn guest_pages(&self, k: &impl Known, vm: u8, at: u8) -> Vec<u64> {
        if !self.runs(vm) {
            return Vec::new();
        }
        let ipa = place(at);
        let leaf = k.trees().walk(&self.memory, World::Vm(vm), ipa);
        let now = leaf
            .filter(|(_, _, entry)| entry.is_writable())
            .map(|(base, _, entry)| entry.address().0 + (ipa.0 - base));
        let stale = self.stale.iter().filter(|stale| {
            stale.world == World::Vm(vm)
                && stale.write
                && stale.ipa <= ipa.0
                && ipa.0 - stale.ipa < stale.size
        });
        now.into_iter().chain(stale.map(|stale| stale.to + (ipa.0 - stale.ipa))).collect()
    }

    /// Whether a guest can write there.
    #[must_use]
    pub fn guest_can_store(&self, k: &impl Known, vm: u8, at: u8) -> bool {
        !self.guest_pages(k, vm, at).is_empty()
    }

    /// A guest writes to its memory.
    pub fn guest_stores(&mut self, k: &impl Known, vm: u8, at: u8) {
        for pa in self.guest_pages(k, vm, at) {
            let boot = k.trees().boot();
            self.memory.set(boot, word(Pa(pa), DATA), secret(vm));
            let expected = &mut self.expected[usize::from(vm)][usize::from(at)];
            let leaf = k.trees().walk(&self.memory, World::Vm(vm), place(at));
            if leaf.is_some_and(|(_, _, entry)| entry.address().0 == pa) {
                *expected = Expected::Content(secret(vm));
            }
        }
    }

    /// No two CPUs wait for each other.
    fn check_waits(&mut self) {
        for cpu in 0..CPUS {
            let mut other = self.waits_for(cpu);
            for _ in 0..CPUS {
                if other == Some(cpu) {
                    self.break_promise(Broken::DEADLOCK, || {
                        format!("CPU {cpu} waits for a CPU that waits for it")
                    });
                    return;
                }
                other = other.and_then(|cpu| self.waits_for(cpu));
            }
        }
    }

    fn check(&mut self, k: &impl Known, view: &View) {
        for (n, reach) in view.reach.iter().enumerate() {
            self.check_page(n, reach);
        }
        for (vm, below) in (0..).zip(&view.vms) {
            self.check_tables(vm, below);
        }
        self.check_content(k, view);
    }

    /// Who can reach a page (I2, I6).
    fn check_page(&mut self, n: usize, reach: &[Reach]) {
        let Some(first) = reach.first() else { return };
        let owner = kind(self.records[n]);
        let side = |reach: &Reach| match reach.world {
            World::Host | World::Devices => None,
            World::Vm(vm) => Some(vm),
        };
        let wrong = reach.iter().find(|reach| match owner {
            Kind::Host | Kind::RunPage => side(reach).is_some(),
            Kind::Private(vm) => side(reach) != Some(vm),
            // Its own walk caches may know it.
            Kind::Table(vm) => !reach.table || side(reach) != Some(vm),
            Kind::Monitor => true,
            // The old owner's, or the new one's.
            Kind::Moving => side(reach) != side(first),
        });
        if let Some(Reach { world, stale, .. }) = wrong.copied() {
            let (which, how) =
                if stale { (Broken::I6, "a TLB may lead") } else { (Broken::I2, "a table leads") };
            self.break_promise(which, || {
                format!("{how} {world:?} to page {n}, which is {owner:?}")
            });
        }
    }

    /// A VM's tables are its table memory (I3), and no page is at two places (I4).
    fn check_tables(&mut self, vm: u8, below: &Below) {
        for (table, _) in below.tables.iter().filter(|(_, place)| place.level > 1) {
            let owner = number(*table).map(|n| kind(self.records[n]));
            if owner != Some(Kind::Table(vm)) {
                self.break_promise(Broken::I3, || {
                    format!("VM {vm} is translated by {table:#x}, which is {owner:?}")
                });
            }
        }
        for (i, (ipa, size, entry)) in below.leaves.iter().enumerate() {
            let to = entry.address().0;
            if number(to).is_none() || *size != 0x1000 {
                self.break_promise(Broken::I2, || {
                    format!("{ipa:#x} of VM {vm} leads to {to:#x}, size {size:#x}")
                });
            }
            if below.leaves.iter().skip(i + 1).any(|leaf| leaf.2.address().0 == to) {
                self.break_promise(Broken::I4, || format!("{to:#x} is at two places of VM {vm}"));
            }
        }
    }

    /// What everybody finds (I4, I5, I7).
    fn check_content(&mut self, k: &impl Known, view: &View) {
        let boot = k.trees().boot();
        for (n, reach) in view.reach.iter().enumerate().filter(|(_, reach)| !reach.is_empty()) {
            let data = self.memory.get(boot, word(page(n.to_le_bytes()[0]), DATA));
            if !is_secret(data) {
                continue;
            }
            let theirs = reach.iter().find(|reach| match reach.world {
                World::Host | World::Devices => true,
                World::Vm(vm) => data != secret(vm),
            });
            if let Some(Reach { world, .. }) = theirs.copied() {
                self.break_promise(Broken::I5, || {
                    format!("{world:?} can read a secret of another VM in page {n}")
                });
            }
        }
        for (vm, below) in view.vms.iter().enumerate() {
            for (ipa, _, entry) in &below.leaves {
                let at = (0..PLACES).find(|at| place(at.to_le_bytes()[0]).0 == *ipa);
                let expected = at.map_or(Expected::Nothing, |at| self.expected[vm][at]);
                let words = self.memory.page(entry.address().0);
                let data = word(entry.address(), DATA);
                let found = match words {
                    [] => Some(0),
                    [(at, value)] if *at == data => Some(*value),
                    _ => None,
                };
                if expected != found.map_or(Expected::Nothing, Expected::Content) {
                    let words = words.to_vec();
                    self.break_promise(Broken::I7, || {
                        format!("{ipa:#x} of VM {vm} should be {expected:x?} and is {words:x?}")
                    });
                }
            }
        }
    }

    /// CPUs are alike: states that differ by their numbers alone become one.
    pub fn order_cpus(&mut self) {
        for _ in 1..CPUS {
            for i in 1..CPUS {
                if self.cpus[i] > self.cpus[i - 1] {
                    self.swap_cpus(i - 1, i);
                }
            }
        }
    }

    fn swap_cpus(&mut self, a: usize, b: usize) {
        self.cpus.swap(a, b);
        let [name_a, name_b] = [a, b].map(|cpu| CPUS_NAMES[cpu]);
        let renamed = |name: u8| match name {
            _ if name == name_a => name_b,
            _ if name == name_b => name_a,
            _ => name,
        };
        for claim in &mut self.claims {
            claim.0 = renamed(claim.0);
        }
        self.map_lock = self.map_lock.map(|cpu| renamed(cpu + 1) - 1);
    }
}

/// A way to a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Reach {
    world: World,
    /// Writes are permitted.
    write: bool,
    /// By a TLB alone.
    stale: bool,
    /// As a table, by a walk cache.
    table: bool,
}

/// What all worlds can reach.
struct View {
    reach: [Vec<Reach>; PAGES],
    vms: [Below; 2],
}

impl View {
    fn new(state: &State, k: &impl Known) -> Self {
        let (memory, trees) = (&state.memory, k.trees());
        let mut reach = [const { Vec::new() }; PAGES];
        let vms = [0, 1].map(|vm| trees.vm(memory, vm));
        for world in [World::Host, World::Devices] {
            for (n, entry) in trees.identity(memory, world) {
                let write = entry.is_writable();
                reach[n].push(Reach { world, write, stale: false, table: false });
            }
        }
        for (vm, below) in (0..).zip(&vms) {
            for (_, size, entry) in &below.leaves {
                let to = entry.address().0;
                for n in pages_in(to, *size) {
                    let (world, write) = (World::Vm(vm), entry.is_writable());
                    reach[n].push(Reach { world, write, stale: false, table: false });
                }
            }
        }
        for stale in state.stale.iter() {
            let size = if stale.table { 0x1000 } else { stale.size };
            for n in pages_in(stale.to, size) {
                let Stale { world, table, .. } = *stale;
                reach[n].push(Reach { world, write: stale.write && !table, stale: true, table });
            }
        }
        Self { reach, vms }
    }
}

/// The model's pages in these bytes of memory.
fn pages_in(base: u64, size: u64) -> impl Iterator<Item = usize> {
    let inside = move |n: &usize| {
        let pa = page(n.to_le_bytes()[0]).0;
        base <= pa && pa - base < size
    };
    // Most are one page.
    let one = if size == 0x1000 { number(base) } else { None };
    let all = if size == 0x1000 { 0 } else { PAGES };
    one.into_iter().chain((0..all).filter(inside))
}

/// CPUs as [`State::claims`] names them; 0 is nobody.
const CPUS_NAMES: [u8; CPUS] = [1, 2, 3];

/// An owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Monitor,
    Host,
    RunPage,
    Table(u8),
    Private(u8),
    Moving,
}

/// What a record says, by the shipped decoder.
fn kind(record: u16) -> Kind {
    match with_bench(|bench| bench.owner(record)) {
        None => Kind::Moving,
        Some(Owner::Monitor) => Kind::Monitor,
        Some(Owner::Host) => Kind::Host,
        Some(Owner::RunPage(_)) => Kind::RunPage,
        Some(Owner::Table(vm)) => Kind::Table(vm.0),
        // None of the scenarios has a VM share.
        Some(Owner::Private(vm) | Owner::Shared(vm)) => Kind::Private(vm.0),
    }
}
