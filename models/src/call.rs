// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of the host, carried out by the shipped code and stopped before each
//! access that another CPU could notice.
//!
//! A call that is under way has to be part of a state: copied, compared, taken up
//! again many times. So it is kept as what it was called with and what it has seen
//! since (its log), and is taken up by carrying it out anew from its start: what it
//! has seen is shown to it again, up to where it stopped; there the world goes on.
//! Then it runs to its next stop, which unwinds it. It sees nothing but the VM that
//! its lock protects, table entries, records and the content of pages, so it comes
//! the same way each time; if not, the model panics.
//!
//! # What is a stop
//! - each write of a table entry, wipe, copy and invalidation;
//! - taking the lock of the host's map (a VM's is taken as the call starts, another
//!   CPU that would wait for it may as well start later);
//! - each look at or change of an ownership record.
//!
//! Between two stops a call reads table entries. That is no step of its own, since
//! tables are read and written by the holder of their lock alone: which the model
//! checks at each access (`Broken::LOCKS`). Likewise what frees a lock is one step with what
//! was done before.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use havmsi_abi::Error;
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::fake::{self, UART, host_page, root};
use havmsi_core::host_map::{HostMap, Resolution};
use havmsi_core::hw::Hardware;
use havmsi_core::launch::{Boot as Entrypoint, Config};
use havmsi_core::page::{Owner, Pages, VmSlot};
use havmsi_core::ram::Range;
use havmsi_core::seal::Tag;
use havmsi_core::stage2::Attributes;
use havmsi_core::vm::{Machine, Vm};

use crate::memory::{Boot, Memory, Recorder, word};

/// Pages of the host that exist in the model; all others stay the host's.
pub const PAGES: usize = 12;
/// Their ownership records, as they are stored.
pub type Records = [u16; PAGES];
/// A record that says `Moving`; the encoding is the crate's own business, and
/// `Bench::new` checks that it is this.
pub const MOVING: u16 = 0xffff;
/// The word of a page that stands for its content. Indices of all levels lead
/// here for [`place`] 0, so that what the host writes can act as a table entry.
pub const DATA: usize = 3;

const CONFIG: Config = Config { ipa_bits: 32, gic: 0, max_vcpus: 2 };
const RAM: u64 = 3 << 30 | 3 << 21;
const RAM_SIZE: u64 = 4 << 20;

type Words = [u64; 512];

/// Contents that no single word tells: what is sealed, by the number that stands for it
/// in the model's memory, and the tags that came with it.
#[derive(Default)]
struct Contents {
    numbers: HashMap<Arc<Words>, u64>,
    words: Vec<Arc<Words>>,
    tags: HashMap<u64, Tag>,
}

static CONTENTS: LazyLock<Mutex<Contents>> = LazyLock::new(Mutex::default);

/// No valid entry, and no guest's secret.
const SEALED: u64 = 1 << 62;

/// Whether a page with this content holds nothing that can be read.
#[must_use]
pub const fn is_sealed(content: u64) -> bool {
    content >> 62 == SEALED >> 62
}

/// What stands for a page with these words.
fn content_of(words: Box<Words>) -> u64 {
    if words.iter().enumerate().all(|(i, word)| *word == 0 || i == DATA) {
        return words[DATA];
    }
    let mut contents = CONTENTS.lock().unwrap_or_else(PoisonError::into_inner);
    let words = Arc::new(*words);
    let next = SEALED | (contents.words.len() as u64) << 2;
    let number = *contents.numbers.entry(Arc::clone(&words)).or_insert(next);
    if number == next {
        contents.words.push(words);
    }
    number
}

/// The words of a page with this content.
fn words_of(content: u64) -> Arc<Words> {
    if is_sealed(content) {
        let contents = CONTENTS.lock().unwrap_or_else(PoisonError::into_inner);
        return Arc::clone(&contents.words[havmsi_core::addr::index((content & !SEALED) >> 2)]);
    }
    let mut words = [0; 512];
    words[DATA] = content;
    Arc::new(words)
}

fn tag(content: u64) -> Tag {
    let contents = CONTENTS.lock().unwrap_or_else(PoisonError::into_inner);
    contents.tags.get(&content).copied().unwrap_or_default()
}

/// Addresses of a guest that the host maps pages at.
#[must_use]
pub const fn place(n: u8) -> Ipa {
    let places = [RAM | 3 << 12, RAM | 4 << 12, (RAM + (2 << 20)) | 3 << 12];
    Ipa(places[n as usize % places.len()])
}

/// The model's page `n`: even and odd ones lie in different blocks.
#[must_use]
pub fn page(n: u8) -> Pa {
    host_page(u64::from(n))
}

/// The number of the page at an address.
#[must_use]
pub fn number(pa: u64) -> Option<usize> {
    (0..PAGES).zip(0..).find(|(_, n)| page(*n).0 == pa).map(|(i, _)| i)
}

/// The run page of a vCPU.
#[must_use]
pub const fn run_page(vm: u8, idx: u8) -> u8 {
    8 + 2 * vm + idx
}

/// What a CPU of the host can ask for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Op {
    /// A new VM, with RAM.
    Create(u8),
    /// A vCPU: VM, number.
    Vcpu(u8, u8),
    /// vCPU 0 is on at launch.
    Boot(u8),
    /// A page of the launch image: VM, place, page.
    Populate(u8, u8, u8),
    /// The launch is closed.
    Activate(u8),
    /// A page: VM, place, page.
    Map(u8, u8, u8),
    /// Pages back: VM, first place, how many.
    Unmap(u8, u8, u8),
    /// A page where one was taken away, with what was sealed, or with something older:
    /// VM, place, page, which ([`crate::state::State::returned`]).
    Return(u8, u8, u8, u8),
    /// The same as `Unmap` by a thin layer that takes the two locks in the wrong order.
    UnmapSwapped(u8, u8, u8),
    /// Table memory: VM, first page, how many.
    Pool(u8, u8, u8),
    /// A step of a reset.
    Reset(u8),
    /// A step of a destruction.
    Destroy(u8),
    /// A vCPU runs: VM, number.
    Enter(u8, u8),
    /// It stops.
    Leave(u8, u8),
    /// The host read the page and faulted.
    Fault(u8),
    /// The same by a thin layer that takes no lock.
    FaultUnlocked(u8),
}

impl Op {
    /// The VM that it is about.
    #[must_use]
    pub const fn vm(self) -> Option<u8> {
        match self {
            Self::Create(vm)
            | Self::Vcpu(vm, _)
            | Self::Boot(vm)
            | Self::Populate(vm, ..)
            | Self::Activate(vm)
            | Self::Map(vm, ..)
            | Self::Return(vm, ..)
            | Self::Unmap(vm, ..)
            | Self::UnmapSwapped(vm, ..)
            | Self::Pool(vm, ..)
            | Self::Reset(vm)
            | Self::Destroy(vm)
            | Self::Enter(vm, _)
            | Self::Leave(vm, _) => Some(vm),
            Self::Fault(_) | Self::FaultUnlocked(_) => None,
        }
    }

    /// Whether it starts with the lock of its VM, if it is about one.
    #[must_use]
    pub const fn locks_vm_first(self) -> bool {
        !matches!(self, Self::UnmapSwapped(..))
    }

    /// Pages whose records decide what it does: a bit each. Other claims are of the
    /// VM's own pages.
    fn asks_for(self) -> u16 {
        if havmsi_core::left_out!(ClaimOnce) {
            // Each claim has a look that changes nothing yet.
            return u16::MAX;
        }
        match self {
            Self::Populate(.., page) | Self::Map(.., page) | Self::Return(.., page, _) => 1 << page,
            // Of one bank: every second number.
            Self::Pool(_, page, n) => (0b1_0101_0101 & ((1 << (2 * n)) - 1)) << page,
            Self::Vcpu(vm, idx) => 1 << run_page(vm, idx),
            _ => 0,
        }
    }

    fn carry_out(self, m: &Bench, vm: &mut Vm) -> Result<(), Error> {
        match self {
            Self::Create(n) => {
                // Another one for each VM that ever was.
                let mut key = [n; 32];
                key[..8].copy_from_slice(&vm.handle().to_le_bytes());
                vm.create(VmSlot(n), root(VmSlot(n)), CONFIG, 0, key)?;
                vm.add_ram(RAM, RAM_SIZE)?;
            }
            Self::Vcpu(n, idx) => {
                let context = u16::from(2 * n + idx);
                vm.create_vcpu(m, u64::from(idx), page(run_page(n, idx)).0, context)?;
            }
            Self::Boot(_) => vm.set_boot(0, Entrypoint::default())?,
            Self::Populate(_, at, pa) => {
                vm.populate(m, place(at).0, page(pa).0, &mut [0; 4096])?;
            }
            Self::Activate(_) => drop(vm.activate(m)?),
            Self::Map(_, at, pa) => vm.map_page(m, place(at).0, page(pa).0, [0; 2])?,
            Self::Return(_, at, pa, _) => {
                let tag = tag(m.run.borrow().as_ref().map_or(0, |run| run.given));
                vm.map_page(m, place(at).0, page(pa).0, tag)?;
            }
            Self::Unmap(_, at, n) => {
                let (_, tag) = vm.unmap_pages(m, place(at).0, u64::from(n))?;
                m.sealed(tag);
            }
            Self::UnmapSwapped(_, at, n) => {
                m.stop(Stop::LockMap);
                m.map_held.set(true);
                m.stop(Stop::LockVm);
                let (_, tag) = vm.unmap_pages(m, place(at).0, u64::from(n))?;
                m.sealed(tag);
                m.free_map();
            }
            Self::Pool(_, pa, n) => vm.donate_pool(m, page(pa).0, u64::from(n))?,
            Self::Reset(_) => vm.reset(m)?,
            Self::Destroy(_) => vm.destroy(m, |_| ())?,
            Self::Enter(_, idx) => drop(vm.enter(u64::from(idx))?),
            Self::Leave(_, idx) => vm.leave(u64::from(idx), 0),
            Self::Fault(pa) | Self::FaultUnlocked(pa) => {
                m.map_held.set(matches!(self, Self::FaultUnlocked(_)));
                let ipa = Ipa(page(pa).0);
                let to = m.with_host_map(|map| map.resolve(m, ipa, false, false));
                if to == Resolution::Refused {
                    return Err(Error::Denied);
                }
            }
        }
        Ok(())
    }
}

/// Before what a call has stopped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stop {
    /// A look at the ownership records, or a change.
    Look,
    /// After an access, before what comes next.
    Done,
    /// Between a look and the act, in a monitor that leaves a check out.
    Pause,
    /// The lock of the host's map.
    LockMap,
    /// The lock of the VM, by a call that did not start with it.
    LockVm,
    /// A write of a table entry: table, index, value.
    Write(Pa, usize, u64),
    /// A page is wiped.
    Zero(Pa),
    /// A page is copied out.
    Copy(Pa),
    /// A page is encrypted or decrypted, or found to be neither: what is in it now.
    Change(Pa, u64),
    /// All instruction caches forget.
    InvalidateIcache,
    /// The host's TLBs forget so many bytes from an address on.
    InvalidateHost(Ipa, u64),
    /// The SMMU forgets them.
    InvalidateDevices(Ipa, u64),
    /// A VM's TLBs forget them: `VTTBR_EL2`, address, size.
    InvalidateGuest(u64, Ipa, u64),
    /// A VM's TLBs forget all.
    InvalidateGuestAll(u64),
}

impl Stop {
    /// Whether memory changes.
    #[must_use]
    pub const fn changes_memory(self) -> bool {
        matches!(self, Self::Write(..) | Self::Zero(_) | Self::Change(..))
    }
}

/// Records as a stretch of a call found them: those that it looked at. It is shown
/// the others as `Moving`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Found(Records);

impl Found {
    const NONE: Self = Self([MOVING; PAGES]);

    fn of(records: &Records, after: &Records, asked: u16) -> Self {
        let looked_at = |n: usize| records[n] != after[n] || asked >> n & 1 != 0;
        Self(std::array::from_fn(|n| if looked_at(n) { records[n] } else { MOVING }))
    }
}

/// What a call has seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Seen {
    /// A word, so many times.
    Words(u64, u16),
    /// Time to do what it had stopped for, with these records afterwards.
    Turn(Found),
}

/// A call under way.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Call {
    /// What was asked for.
    pub op: Op,
    /// The VM's number among all states of VMs, once it is locked.
    pub vm: Option<u32>,
    /// What it has seen.
    pub seen: Arc<Vec<Seen>>,
    /// Before what it has stopped.
    pub next: Stop,
    /// What a copied page had as its content.
    pub copied: u64,
    /// The content that the host gives back.
    pub given: u64,
    /// It changed memory.
    pub acted: bool,
}

/// How a stretch of a call ended.
#[derive(Debug)]
pub enum Outcome {
    /// At the next stop.
    Stopped(Stop, Vec<Seen>),
    /// With a result; the VM is this now.
    Ended(Result<(), Error>, Box<Vm>),
    /// By a panic.
    Panicked(String),
}

/// A stretch of a call.
#[derive(Debug)]
pub struct Stretch {
    /// Its end.
    pub outcome: Outcome,
    /// The records afterwards.
    pub records: Records,
    /// The lock of the host's map was freed.
    pub map_freed: bool,
    /// Tables that it read.
    pub read: Vec<u64>,
}

/// A call as it is carried out.
struct Run {
    op: Op,
    seen: Vec<Seen>,
    at: usize,
    /// Of the words there, so many were shown again.
    again: u16,
    /// So much of it was seen earlier.
    known: usize,
    /// What it stopped for, and does now.
    turn: Option<Stop>,
    live: bool,
    memory: Memory,
    /// As they are when it goes on.
    records: Records,
    /// Stop at the soft stop with this number.
    soft: Option<usize>,
    /// Records at each soft stop that was passed.
    passed: Vec<Records>,
    acted: bool,
    next: Option<Stop>,
    map_freed: bool,
    read: Vec<u64>,
    /// The page that is being measured: what is read there is no table's.
    measured: Option<Pa>,
    /// All words of it.
    words: Arc<Words>,
    /// The words that are written there.
    written: Option<Box<Words>>,
    /// What that came to.
    changed: u64,
    given: u64,
}

/// Unwinds a call to where it was taken up.
struct Unwound;

/// What calls are carried out on: the shipped host map and records, and in place of
/// hardware the state that the model hands in.
pub struct Bench {
    records: &'static [AtomicU16],
    pages: Pages<'static>,
    /// In `records`.
    numbers: [usize; PAGES],
    host: RefCell<HostMap>,
    run: RefCell<Option<Run>>,
    boot: Arc<Boot>,
    first_records: Records,
    /// The lock of the host's map is held from outside.
    map_held: Cell<bool>,
}

thread_local! {
    static BENCH: Bench = Bench::new();
    /// A call is being carried out.
    static CALLS: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with this thread's bench.
pub fn with_bench<T>(f: impl FnOnce(&Bench) -> T) -> T {
    BENCH.with(f)
}

/// What a monitor that leaves a check out does in between.
#[cfg(feature = "leave-out")]
pub fn pause() {
    // Not while the bench is made.
    if CALLS.get() {
        with_bench(|bench| bench.stop(Stop::Pause));
    }
}

impl Bench {
    fn new() -> Self {
        let recorder = Recorder::default();
        let records: &'static [AtomicU16] = fake::records().leak();
        let ram = fake::ram();
        let pages = Pages::new(ram, records).expect("as many records as pages");
        let uart = std::iter::once((Range { base: UART, size: 4096 }, Attributes::Device));
        let host = HostMap::new(&recorder, ram, fake::CARVEOUT, uart).expect("a map");
        for (bank, skip) in ram.banks().iter().zip([fake::CARVEOUT, 0]) {
            for at in (skip..bank.size).step_by(4096) {
                pages.give_to_host(Pa(bank.base + at));
            }
        }
        let numbers = std::array::from_fn(|i| {
            let pa = page(u8::try_from(i).unwrap_or(u8::MAX));
            let number = pages.ram().page_index(pa).expect("a page of RAM");
            let claimed = pages.claim(pa, Owner::Host).expect("the host's");
            assert_eq!(records[number].load(Ordering::Relaxed), MOVING);
            pages.unclaim(claimed);
            number
        });
        let boot = Arc::new(Boot::new(recorder, fake::BASE, fake::CARVEOUT));
        let first_records = numbers.map(|number: usize| records[number].load(Ordering::Relaxed));
        Self {
            records,
            pages,
            numbers,
            first_records,
            host: RefCell::new(host),
            run: RefCell::new(None),
            boot,
            map_held: Cell::new(false),
        }
    }

    /// Memory as boot left it.
    #[must_use]
    pub fn boot(&self) -> &Arc<Boot> {
        &self.boot
    }

    /// The shipped records, as they are set now.
    #[must_use]
    pub fn shipped_pages(&self) -> &Pages<'static> {
        &self.pages
    }

    /// The shipped host map.
    #[must_use]
    pub fn host_map(&self) -> &RefCell<HostMap> {
        &self.host
    }

    /// The owner that a record names, by the shipped decoder.
    #[must_use]
    pub fn owner(&self, record: u16) -> Option<Owner> {
        self.records[self.numbers[0]].store(record, Ordering::Relaxed);
        self.pages.owner(page(0))
    }

    /// The records after boot: all pages are the host's.
    #[must_use]
    pub fn first_records(&self) -> Records {
        self.first_records
    }

    fn records(&self) -> Records {
        self.numbers.map(|number| self.records[number].load(Ordering::Relaxed))
    }

    /// Sets the records.
    pub fn set_records(&self, records: &Records) {
        for (number, record) in self.numbers.iter().zip(records) {
            self.records[*number].store(*record, Ordering::Relaxed);
        }
    }

    /// Takes a call up where it stopped, what it stopped for having been done to
    /// `memory` already. A new call has no `turn`.
    pub fn go_on(
        &self,
        call: &Call,
        turn: Option<Stop>,
        vm: &Vm,
        memory: &Memory,
        records: &Records,
    ) -> Stretch {
        let (passed, stretch) = self.run_to(call, turn, vm, memory, records, None);
        // A change of records behind a soft stop is a step of its own.
        let ends = passed.iter().skip(1).chain(std::iter::once(&stretch.records));
        match passed.iter().zip(ends).position(|(before, after)| before != after) {
            None => stretch,
            soft => self.run_to(call, turn, vm, memory, records, soft).1,
        }
    }

    fn run_to(
        &self,
        call: &Call,
        turn: Option<Stop>,
        vm: &Vm,
        memory: &Memory,
        records: &Records,
        soft: Option<usize>,
    ) -> (Vec<Records>, Stretch) {
        let seen = call.seen.as_ref().clone();
        let known = seen.len();
        let live = turn.is_none();
        self.set_records(if live { records } else { &[MOVING; PAGES] });
        self.run.replace(Some(Run {
            op: call.op,
            seen,
            at: 0,
            again: 0,
            known,
            turn,
            live,
            memory: memory.clone(),
            records: *records,
            soft,
            passed: Vec::new(),
            acted: false,
            next: None,
            map_freed: false,
            read: Vec::new(),
            measured: None,
            words: Arc::new([0; 512]),
            written: None,
            changed: 0,
            given: call.given,
        }));
        self.map_held.set(false);
        let mut vm = Box::new(vm.clone());
        CALLS.set(true);
        let end = catch_unwind(AssertUnwindSafe(|| call.op.carry_out(self, &mut vm)));
        CALLS.set(false);
        let mut run = self.run.take().expect("it was put there above");
        let records = self.records();
        assert!(run.live || end.is_err(), "{:?} ended before it came to where it was", call.op);
        if let Some(Seen::Turn(found)) = run.seen.get_mut(run.known) {
            // What this stretch looked at, to show it again.
            // The claim of a run's next page begins where the act of the last one ends.
            let looks = matches!(turn, Some(Stop::Look | Stop::Pause));
            let asked = if looks { run.op.asks_for() } else { 0 };
            let after = run.passed.first().unwrap_or(&records);
            *found = Found::of(&run.records, after, asked);
        }
        let outcome = match (end, run.next) {
            (Ok(result), _) => Outcome::Ended(result, vm),
            (Err(what), Some(next)) if what.is::<Unwound>() => Outcome::Stopped(next, run.seen),
            (Err(what), _) => Outcome::Panicked(
                what.downcast_ref::<String>()
                    .cloned()
                    .or_else(|| what.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                    .unwrap_or_default(),
            ),
        };
        (run.passed, Stretch { outcome, records, map_freed: run.map_freed, read: run.read })
    }

    /// A stop of the call that is carried out: passed if it was passed before, the
    /// turn of what it stopped for, or its end for now.
    fn stop(&self, stop: Stop) {
        let mut guard = self.run.borrow_mut();
        let run = guard.as_mut().expect("only calls stop");
        let acted = run.acted;
        run.acted |= stop.changes_memory();
        if run.at < run.known {
            let Seen::Turn(found) = run.seen[run.at] else {
                panic!("{:?} came to {stop:x?} where it had read", run.op);
            };
            run.at += 1;
            return self.set_records(&found.0);
        }
        if !run.live {
            assert_eq!(Some(stop), run.turn, "{:?} went another way", run.op);
            run.live = true;
            self.set_records(&run.records);
            run.seen.push(Seen::Turn(Found::NONE));
            return;
        }
        let soft = match stop {
            // What it claims first decides what it does.
            Stop::Look => (acted && !havmsi_core::left_out!(ClaimOnce)) || run.op.asks_for() == 0,
            Stop::Done => true,
            _ => false,
        };
        if soft && run.soft != Some(run.passed.len()) {
            run.passed.push(self.records());
            run.seen.push(Seen::Turn(Found::NONE));
            return;
        }
        run.next = Some(stop);
        drop(guard);
        resume_unwind(Box::new(Unwound));
    }

    /// What the call sees now, which is shown to it again later.
    fn see(&self, f: impl FnOnce(&Run, &Boot) -> u64) -> u64 {
        let mut guard = self.run.borrow_mut();
        let run = guard.as_mut().expect("only calls see");
        if run.at < run.known {
            let Seen::Words(value, n) = run.seen[run.at] else {
                panic!("{:?} read where it had stopped", run.op);
            };
            run.again += 1;
            if run.again == n {
                (run.at, run.again) = (run.at + 1, 0);
            }
            return value;
        }
        assert!(run.live, "{:?} went another way", run.op);
        let value = f(run, &self.boot);
        match run.seen.last_mut() {
            Some(Seen::Words(last, n)) if *last == value && *n < u16::MAX => *n += 1,
            _ => run.seen.push(Seen::Words(value, 1)),
        }
        value
    }

    fn is_measured(&self, page: Pa) -> bool {
        self.run.borrow().as_ref().is_some_and(|run| run.measured == Some(page))
    }

    /// A word of a page that is measured, from the first one on: seen as the one word that
    /// stands for all.
    fn read_content(&self, page: Pa, index: usize) -> u64 {
        if index == 0 {
            let content = self.see(|run, boot| run.memory.get(boot, word(page, DATA)));
            if let Some(run) = self.run.borrow_mut().as_mut() {
                run.words = words_of(content);
            }
        }
        self.run.borrow().as_ref().map_or(0, |run| run.words[index])
    }

    /// What was sealed has this tag.
    fn sealed(&self, tag: Tag) {
        if let Some(run) = self.run.borrow().as_ref()
            && is_sealed(run.changed)
        {
            CONTENTS.lock().unwrap_or_else(PoisonError::into_inner).tags.insert(run.changed, tag);
        }
    }

    fn free_map(&self) {
        if let Some(run) = self.run.borrow_mut().as_mut() {
            run.map_freed = run.live;
        }
    }
}

impl Hardware for Bench {
    fn read_entry(&self, table: Pa, index: usize) -> u64 {
        if self.is_measured(table) {
            return self.read_content(table, index);
        }
        if let Some(run) = self.run.borrow_mut().as_mut()
            && run.live
            && run.read.last() != Some(&table.0)
        {
            run.read.push(table.0);
        }
        self.see(|run, boot| run.memory.get(boot, word(table, index)))
    }

    fn write_entry(&self, table: Pa, index: usize, value: u64) {
        if self.is_measured(table)
            && let Some(run) = self.run.borrow_mut().as_mut()
        {
            run.written.get_or_insert_with(|| Box::new([0; 512]))[index] = value;
            return;
        }
        self.stop(Stop::Write(table, index, value));
        self.stop(Stop::Done);
    }

    fn zero_page(&self, page: Pa) {
        self.stop(Stop::Zero(page));
    }

    fn flush_page(&self, page: Pa) {
        let written = self.run.borrow_mut().as_mut().and_then(|run| run.written.take());
        if let Some(words) = written {
            let content = content_of(words);
            if let Some(run) = self.run.borrow_mut().as_mut() {
                (run.measured, run.changed) = (None, content);
            }
            return self.stop(Stop::Change(page, content));
        }
        self.stop(Stop::Copy(page));
        if let Some(run) = self.run.borrow_mut().as_mut() {
            run.measured = Some(page);
        }
    }

    fn invalidate_icache(&self) {
        self.stop(Stop::InvalidateIcache);
    }

    fn invalidate_host(&self, ipa: Ipa, size: u64) {
        self.stop(Stop::InvalidateHost(ipa, size));
    }

    fn invalidate_devices(&self, ipa: Ipa, size: u64) {
        self.stop(Stop::InvalidateDevices(ipa, size));
    }

    fn invalidate_guest(&self, vttbr: u64, ipa: Ipa, size: u64) {
        self.stop(Stop::InvalidateGuest(vttbr, ipa, size));
        self.stop(Stop::Done);
    }

    fn invalidate_guest_all(&self, vttbr: u64) {
        self.stop(Stop::InvalidateGuestAll(vttbr));
    }
}

impl Machine for Bench {
    type Hw = Self;

    fn hw(&self) -> &Self {
        self
    }

    fn pages(&self) -> &Pages<'_> {
        if self.run.borrow().is_some() {
            self.stop(Stop::Look);
        }
        &self.pages
    }

    fn secret(&self) -> Option<&[u8; 32]> {
        None
    }

    fn with_host_map<R>(&self, f: impl FnOnce(&mut HostMap) -> R) -> R {
        if self.map_held.get() {
            return f(&mut self.host.borrow_mut());
        }
        self.stop(Stop::LockMap);
        let result = f(&mut self.host.borrow_mut());
        self.free_map();
        result
    }
}
