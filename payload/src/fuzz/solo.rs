// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM that only its own CPU may change, made of private pages: so of each
//! call the answer is known, and of each page where it is. Its guest verifies
//! its memory and registers (`guests::fuzz_keeper`).

use havmsi_abi::{EntryFlags, ExitClass, Function, PAGE_SIZE};

use super::guests::FOUND;
use super::world::{self, Known, LAST_WORD};
use super::{Cpu, guests, host, index, is_magic};
use crate::guest::{Exit, PORT, RAM, VECTORS_AT, Vcpu};
use crate::harness::{Failure, Outcome};
use crate::memory::{self, PATTERN};
use crate::smc::{AGAIN, DENIED, INTEGRITY, INVALID, NO_SLOT, Refusal, STATE};
use crate::{ensure, expect, gic};

/// Private pages that no call ever names.
pub const KEPT: u64 = 4;
/// Private pages of the victim, behind these.
const VICTIM: u64 = 24;
/// Those of them that it has from its launch on: memory from the first one up,
/// run pages and tables from the last one down.
pub const TAKEN: [u64; 12] = [4, 5, 6, 7, 8, 12, 16, 17, 24, 25, 26, 27];
/// Most pages of one such VM.
const MOST: usize = 40;

/// Where the guest's data is.
const DATA: u64 = RAM + 0x2000;
/// Pages of data; a power of two.
const PLACES: u64 = NO_PLACES.len() as u64;
const NO_PLACES: [Place; 16] = [Place::Free; 16];
/// Table pages that a launch gives.
const POOL: u64 = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// The host's, as it was written.
    Host,
    /// The VM's memory.
    Private,
    /// The VM's table memory.
    Table,
    /// A run page.
    Lent,
    /// The host's, and holds sealed memory of the VM.
    Sealed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing was ever there.
    Free,
    /// This page.
    Mapped(u8),
    /// The host has it, with this tag.
    Taken(u8, [u64; 2]),
    /// The host had it, and has changed it.
    Lost,
}

/// The VM.
pub struct Solo {
    victim: bool,
    handle: u64,
    pages: [(u64, Use); MOST],
    count: usize,
    places: [Place; NO_PLACES.len()],
    vcpu: Option<Vcpu>,
    /// The guest's last report, and whether it was told to make it again.
    report: u64,
    again: bool,
    runs: u64,
}

/// The answer to a call must be this one.
macro_rules! must {
    ($call:expr, $answer:expr) => {
        expect!($call.map(|_| ()), $answer)
    };
}

impl Solo {
    /// Before the first batch.
    pub const NONE: Self = Self {
        victim: false,
        handle: 0,
        pages: [(0, Use::Host); MOST],
        count: 0,
        places: NO_PLACES,
        vcpu: None,
        report: 0,
        again: false,
        runs: 0,
    };

    /// None yet, with the CPU's pages for it.
    pub fn new(cpu: &Cpu, victim: bool) -> Self {
        let mut solo = Self { victim, ..Self::NONE };
        if victim {
            let fences = (0..world::ROWS).filter(|row| index(*row) % cpu.cpus == cpu.number);
            fences.for_each(|row| {
                memory::fill(world::fence(row), PATTERN);
                solo.add(world::fence(row));
            });
            (KEPT..KEPT + VICTIM).for_each(|i| solo.add(world::private(cpu.number, i)));
        } else {
            solo.add(world::private(cpu.number, world::HAMMERED));
            let others = KEPT + VICTIM..world::HAMMERED;
            others.for_each(|i| solo.add(world::private(cpu.number, i)));
        }
        solo
    }

    fn add(&mut self, page: u64) {
        self.pages[self.count] = (page, Use::Host);
        self.count += 1;
    }

    fn known(&self, cpu: &Cpu) -> &'static Known {
        &world::PROTECTED[cpu.number][usize::from(!self.victim)]
    }

    fn call(&self, function: Function, args: &[u64]) -> Result<[u64; 4], Refusal> {
        let mut all = [self.handle, 0, 0, 0, 0, 0, 0];
        for (place, arg) in all.iter_mut().skip(1).zip(args) {
            *place = *arg;
        }
        host(function, &all)
    }

    /// A page of the host's: often the first, which is a fence or hammered.
    fn choose(&self, cpu: &mut Cpu) -> Result<usize, Failure> {
        let first = self.victim || cpu.random.once_in(3);
        let start = if first { 0 } else { index(cpu.random.below(self.count as u64)) };
        (start..self.count)
            .chain(0..start)
            .find(|i| self.pages[*i].1 == Use::Host)
            .ok_or_else(|| Failure::new(format_args!("the fuzzer ran out of private pages")))
    }

    /// Makes, fills and starts the VM.
    pub fn launch(&mut self, cpu: &mut Cpu) -> Outcome {
        let version = cpu.random.pick(&[gic::version(), gic::version(), 0]);
        let bits = cpu.random.pick(&[32, 36, 40]);
        match host(Function::VmCreate, &[2, version, bits]) {
            Ok([handle, ..]) => self.handle = handle,
            // Strays hold all slots.
            Err(NO_SLOT) => return Ok(()),
            Err(other) => return Err(other.into()),
        }
        self.known(cpu).set(self.handle);
        let beyond = [(1 << bits) - PAGE_SIZE, 2 * PAGE_SIZE];
        must!(self.call(Function::VmAddRam, &beyond), Err(INVALID));
        must!(self.call(Function::VmAddRam, &[RAM, DATA - RAM + PLACES * PAGE_SIZE]), Ok(()));
        for idx in 0..2 {
            let run = self.choose_last()?;
            memory::clear(self.pages[run].0);
            match self.call(Function::VcpuCreate, &[idx, self.pages[run].0]) {
                Ok(_) => self.pages[run].1 = Use::Lent,
                // Strays hold all contexts.
                Err(NO_SLOT) => {
                    memory::fill(self.pages[run].0, PATTERN);
                    return self.destroy(cpu);
                }
                Err(other) => return Err(other.into()),
            }
            if idx == 0 {
                self.vcpu = Some(Vcpu::new(self.handle, 0, self.pages[run].0));
            }
        }
        self.boot(cpu)?;
        if self.victim {
            for place in 0..PLACES {
                self.map(cpu, place)?;
            }
        }
        Ok(())
    }

    /// The last page of the host's: the others are for memory.
    fn choose_last(&self) -> Result<usize, Failure> {
        let place = (0..self.count).rev().find(|i| self.pages[*i].1 == Use::Host);
        place.ok_or_else(|| Failure::new(format_args!("the fuzzer ran out of private pages")))
    }

    fn donate_pool(&mut self, n: u64) -> Outcome {
        for _ in 0..n {
            let i = self.choose_last()?;
            must!(self.call(Function::PoolDonate, &[self.pages[i].0, 1]), Ok(()));
            self.pages[i].1 = Use::Table;
        }
        Ok(())
    }

    fn populate(&mut self, cpu: &mut Cpu, ipa: u64, bytes: &[u8]) -> Outcome {
        let i = self.choose(cpu)?;
        let page = self.pages[i].0;
        memory::put(page, bytes);
        self.pages[i].1 = Use::Private;
        match self.call(Function::VmPopulate, &[ipa, page]) {
            Err(Refusal::Wanted(n @ 1..=POOL)) => {
                self.donate_pool(n)?;
                must!(self.call(Function::VmPopulate, &[ipa, page]), Ok(()));
            }
            other => must!(other, Ok(())),
        }
        self.gone(page)
    }

    /// Fills the VM, which is open, and starts it.
    fn boot(&mut self, cpu: &mut Cpu) -> Outcome {
        let have = self.pages.iter().filter(|page| page.1 == Use::Table).count() as u64;
        if have < POOL && !cpu.random.once_in(4) {
            self.donate_pool(POOL - have)?;
        }
        let secret = world::MAGIC << 32 | cpu.random.below(1 << 30);
        let seed = cpu.random.any() | 1;
        let boot = [0, RAM, secret, DATA, PLACES - 1, seed];
        must!(self.call(Function::VmActivate, &[]), Err(STATE));
        must!(self.call(Function::VcpuSetBoot, &boot), Ok(()));
        self.populate(cpu, RAM, guests::fuzz_keeper())?;
        must!(self.call(Function::VmPopulate, &[RAM, self.pages[0].0]), Err(INVALID));
        self.populate(cpu, VECTORS_AT, guests::fuzz_keeper_vectors())?;
        must!(self.call(Function::VcpuRun, &[0]), Err(STATE));
        must!(self.call(Function::VmActivate, &[]), Ok(()));
        (self.report, self.again) = (0, false);
        self.runs = 20 + cpu.random.below(120);
        if let Some(vcpu) = &mut self.vcpu {
            *vcpu = Vcpu::new(vcpu.vm, vcpu.idx, vcpu.page);
        }
        Ok(())
    }

    /// A page that the VM has: the host reads zeros and can't write.
    fn gone(&self, page: u64) -> Outcome {
        for at in [page, page + LAST_WORD] {
            let seen = memory::peek(at);
            ensure!(seen == Ok(0), "{at:#x} is the VM's, and the host reads {seen:x?}");
            let fault = memory::poke(at, 0x0bad).err();
            ensure!(
                fault.is_some_and(|f| f.is_external_abort(at, true)),
                "{at:#x} is the VM's, and the host's write gives {fault:x?}"
            );
        }
        Ok(())
    }

    /// A page that the VM had: the host's again, and wiped.
    fn back(&mut self, i: usize) -> Outcome {
        let page = self.pages[i].0;
        let what = (page..page + LAST_WORD).step_by(8).find(|at| memory::read(*at) != 0);
        ensure!(what.is_none(), "{what:x?} came back and holds something");
        self.refill(i)
    }

    /// A page that is the host's is as the others are.
    fn refill(&mut self, i: usize) -> Outcome {
        let page = self.pages[i].0;
        let fault = memory::poke(page, 0).err();
        ensure!(fault.is_none(), "{page:#x} came back, and a write gives {fault:x?}");
        memory::fill(page, PATTERN);
        self.pages[i].1 = Use::Host;
        Ok(())
    }

    /// A page that a refused call named: as it was.
    fn untouched(page: u64) -> Outcome {
        for at in [page, page + 0x800, page + LAST_WORD - 8] {
            let word = memory::read(at);
            ensure!(word == PATTERN ^ at, "{at:#x}: {word:#x} after a call that was refused");
        }
        Ok(())
    }

    fn map(&mut self, cpu: &mut Cpu, place: u64) -> Outcome {
        let ipa = DATA + place * PAGE_SIZE;
        let i = self.choose(cpu)?;
        let page = self.pages[i].0;
        // This CPU's TLB knows it.
        memory::write(page, PATTERN ^ page);
        let args = [ipa, page, PAGE_SIZE];
        match self.places[index(place)] {
            Place::Free => {}
            Place::Mapped(_) => {
                must!(self.call(Function::PageMap, &args), Err(DENIED));
                return Self::untouched(page);
            }
            Place::Taken(from, tag) => return self.give(cpu, place, usize::from(from), tag),
            Place::Lost => return self.forge(place, page, [0; 2]),
        }
        self.pages[i].1 = Use::Private;
        match self.call(Function::PageMap, &args) {
            Err(Refusal::Wanted(n @ 1..=POOL)) => {
                Self::untouched(page)?;
                self.donate_pool(n)?;
                must!(self.call(Function::PageMap, &args), Ok(()));
            }
            other => must!(other, Ok(())),
        }
        self.places[index(place)] = Place::Mapped(i.to_le_bytes()[0]);
        self.gone(page)
    }

    /// Gives back what the host took from `place`, which is in page number `from`: there,
    /// in another page, or, now and then, not as it was.
    fn give(&mut self, cpu: &mut Cpu, place: u64, from: usize, tag: [u64; 2]) -> Outcome {
        let ipa = DATA + place * PAGE_SIZE;
        let sealed = self.pages[from].0;
        let [low, high] = tag;
        // Others write to the hammered one.
        let to = self.choose_last()?;
        let other = self.pages[to].0;
        match cpu.random.below(16) {
            0 => return self.forge(place, other, tag),
            1 => return self.forge(place, sealed, [low ^ 1 << cpu.random.below(64), high]),
            2 => {
                let at = sealed + cpu.random.below(512) * 8;
                memory::write(at, memory::read(at) ^ 1 << cpu.random.below(64));
                return self.forge(place, sealed, tag);
            }
            // As part of more; which may be in motion, or not the host's.
            3 => {
                let answer = self.call(Function::PageMap, &[ipa, other, 2 * PAGE_SIZE, low, high]);
                ensure!(
                    matches!(answer, Err(DENIED | AGAIN)),
                    "two pages at {ipa:#x}: {answer:x?}"
                );
                return Self::untouched(other);
            }
            _ => {}
        }
        let to = if cpu.random.once_in(2) {
            from
        } else {
            memory::copy(sealed, other);
            self.refill(from)?;
            to
        };
        let page = self.pages[to].0;
        must!(self.call(Function::PageMap, &[ipa, page, PAGE_SIZE, low, high]), Ok(()));
        self.pages[to].1 = Use::Private;
        self.places[index(place)] = Place::Mapped(to.to_le_bytes()[0]);
        self.gone(page)
    }

    /// Gives what was not taken from `place`: the VM stops, the page stays as it is.
    fn forge(&mut self, place: u64, page: u64, [low, high]: [u64; 2]) -> Outcome {
        let words = [8, 0x800, LAST_WORD - 8].map(|at| page + at);
        let before = words.map(memory::read);
        let args = [DATA + place * PAGE_SIZE, page, PAGE_SIZE, low, high];
        must!(self.call(Function::PageMap, &args), Err(INTEGRITY));
        expect!(words.map(memory::read), before);
        must!(self.call(Function::PageMap, &args), Err(INTEGRITY));
        must!(self.call(Function::VcpuRun, &[0]), Err(INTEGRITY));
        self.runs = 0;
        Ok(())
    }

    fn unmap(&mut self, cpu: &mut Cpu) -> Outcome {
        let first = cpu.random.below(PLACES);
        let n = cpu.random.below(4).min(PLACES - first);
        let answer = self.call(Function::PageUnmap, &[DATA + first * PAGE_SIZE, n])?;
        let mapped = (first..first + n).find_map(|place| match self.places[index(place)] {
            Place::Mapped(i) => Some((place, i)),
            _ => None,
        });
        let Some((place, i)) = mapped else {
            expect!(answer, [n, 0, 0, 0]);
            return Ok(());
        };
        let [done, low, high, _] = answer;
        expect!(done, place - first + 1);
        let (i, page) = (usize::from(i), self.pages[usize::from(i)].0);
        if page == world::private(cpu.number, world::HAMMERED) {
            let found = (page..page + LAST_WORD).step_by(8).any(|at| is_magic(memory::read(at)));
            ensure!(!found, "{page:#x} came back with a guest's memory");
            self.places[index(place)] = Place::Lost;
            return self.refill(i);
        }
        ensure!(memory::is_sealed(page), "{page:#x} came back and is not sealed");
        self.places[index(place)] = Place::Taken(i.to_le_bytes()[0], [low, high]);
        self.pages[i].1 = Use::Sealed;
        Ok(())
    }

    fn all_back(&mut self, kind: Use) -> Outcome {
        for i in 0..self.count {
            match self.pages[i].1 {
                Use::Sealed => self.refill(i)?,
                used if used == kind => self.back(i)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn until_done(&self, function: Function) -> Outcome {
        for _ in 0..1000 {
            match self.call(function, &[]) {
                Err(AGAIN) => {}
                other => {
                    must!(other, Ok(()));
                    return Ok(());
                }
            }
        }
        Err(Failure::new(format_args!("{function:?} comes to no end")))
    }

    fn reset(&mut self, cpu: &mut Cpu) -> Outcome {
        self.until_done(Function::VmReset)?;
        self.all_back(Use::Private)?;
        self.places = NO_PLACES;
        self.boot(cpu)
    }

    fn destroy(&mut self, cpu: &Cpu) -> Outcome {
        self.until_done(Function::VmDestroy)?;
        self.known(cpu).clear(self.handle);
        self.all_back(Use::Private)?;
        self.all_back(Use::Table)?;
        for page in self.pages.iter_mut().filter(|page| page.1 == Use::Lent) {
            memory::poke(page.0, 0)?;
            memory::fill(page.0, PATTERN);
            page.1 = Use::Host;
        }
        must!(self.call(Function::VmDestroy, &[]), Err(INVALID));
        self.handle = 0;
        self.vcpu = None;
        self.places = NO_PLACES;
        Ok(())
    }

    /// Entries that are refused.
    fn bad_entry(&mut self, cpu: &mut Cpu) -> Outcome {
        let Some(vcpu) = &mut self.vcpu else { return Ok(()) };
        let good = vcpu.entry;
        let access = matches!(vcpu.exit.class, ExitClass::MmioWrite | ExitClass::MmioRead);
        let e = &mut vcpu.entry;
        let lr = 1 << 62 | 1 << 60;
        match cpu.random.below(8) {
            // What was not asked for.
            0 if access => e.flags.0 |= EntryFlags::INJECT_UNDEF,
            1 if access => e.flags.0 |= EntryFlags::INJECT_SEA | EntryFlags::COMPLETE,
            0 => e.flags.0 |= EntryFlags::COMPLETE,
            1 => e.flags.0 |= EntryFlags::INJECT_SEA,
            2 => e.flags.0 |= 1 << (5 + cpu.random.below(59)),
            3 => e.nr_lr = cpu.random.pick(&[17, 64, 1 << 32, u64::MAX]),
            // Another's interrupt, an SGI that nobody sent, no interrupt, one twice.
            4 => (e.nr_lr, e.lr[0]) = (1, lr | 1 << 61 | 30 << 32 | 27),
            5 => (e.nr_lr, e.lr[0]) = (1, lr | cpu.random.below(16)),
            6 => (e.nr_lr, e.lr[0]) = (1, lr | 1020),
            _ => (e.nr_lr, e.lr[0], e.lr[1]) = (2, lr | 40, lr | 40),
        }
        vcpu.write_entry();
        vcpu.entry = good;
        must!(host(Function::VcpuRun, &[self.handle, 0]), Err(INVALID));
        Ok(())
    }

    /// Runs the guest once, and does what its exit asks for.
    fn run(&mut self, cpu: &mut Cpu) -> Outcome {
        let Some(vcpu) = &mut self.vcpu else { return Ok(()) };
        // Nothing asks for these.
        vcpu.entry.gpr = [(); 4].map(|()| cpu.random.any() >> 1);
        vcpu.entry.data = u64::MAX;
        if matches!(vcpu.exit.class, ExitClass::MmioWrite | ExitClass::MmioRead) {
            match cpu.random.below(16) {
                // The access comes again.
                0 => self.again = vcpu.exit.ipa == PORT,
                1 => vcpu.entry.flags.0 |= EntryFlags::INJECT_SEA,
                _ => vcpu.entry.flags.0 |= EntryFlags::COMPLETE,
            }
        }
        gic::alarm_in(cpu.random.below(200_000));
        vcpu.write_entry();
        host(Function::VcpuRun, &[self.handle, 0])?;
        vcpu.entry.flags.0 &= !EntryFlags::ANSWERS;
        let mut exit = vcpu.read_exit();
        match exit.class {
            ExitClass::Irq => {
                expect!(exit, Exit::default());
                gic::take_pending();
            }
            ExitClass::MmioWrite | ExitClass::MmioRead => {
                let data = core::mem::take(&mut exit.data);
                let found = exit.ipa == PORT + FOUND;
                ensure!(!found, "the guest found {data}: see guests.rs");
                // Of a register that is not told: 8 bytes, or one.
                let esr = 0x24 << 26 | 1 << 25 | 1 << 24;
                let (esr, expected) = match exit.ipa.wrapping_sub(PORT) {
                    0 => {
                        let next = if self.again { self.report } else { self.report + 1 };
                        (self.report, self.again) = (next, false);
                        (esr | 3 << 22 | 1 << 15 | 1 << 6, next)
                    }
                    0x10 => (esr | 1 << 6, 0xff),
                    _ => (esr, 0),
                };
                ensure!(data == expected, "{exit:x?} tells {data:#x}, not {expected:#x}");
                // The level of the fault is the tables'.
                exit.esr &= !0x3f;
                expect!(
                    exit,
                    Exit { class: exit.class, esr, ipa: exit.ipa, mode: 1, ..Exit::default() }
                );
            }
            ExitClass::Fault => {
                let place = exit.ipa.wrapping_sub(DATA) / PAGE_SIZE;
                ensure!(place < PLACES && exit.ipa.is_multiple_of(PAGE_SIZE), "{exit:x?}");
                let mapped = matches!(self.places[index(place)], Place::Mapped(_));
                ensure!(!mapped, "a fault where a page is mapped: {exit:x?}");
                self.map(cpu, place)?;
            }
            _ => ensure!(false, "an exit that the guest does not make: {exit:x?}"),
        }
        Ok(())
    }

    /// Calls that are refused, and how.
    fn refused(&self, cpu: &mut Cpu) -> Outcome {
        let page = self.pages[self.choose(cpu)?].0;
        let beyond = DATA + PLACES * PAGE_SIZE;
        let run_page = self.vcpu.as_ref().map_or(0, |vcpu| vcpu.page);
        match cpu.random.below(14) {
            0 => must!(self.call(Function::VmAddRam, &[0x1_0000_0000, PAGE_SIZE]), Err(STATE)),
            1 => must!(self.call(Function::VcpuCreate, &[1, page]), Err(STATE)),
            2 => must!(self.call(Function::VcpuCreate, &[2, page]), Err(INVALID)),
            3 => must!(self.call(Function::VcpuSetBoot, &[0, RAM]), Err(STATE)),
            4 => must!(self.call(Function::VmPopulate, &[DATA, page]), Err(STATE)),
            5 => must!(self.call(Function::VmActivate, &[]), Err(STATE)),
            6 => must!(self.call(Function::VcpuRun, &[1]), Err(STATE)),
            7 => must!(self.call(Function::VcpuRun, &[2]), Err(INVALID)),
            8 => must!(self.call(Function::PageMap, &[beyond, page, PAGE_SIZE]), Err(DENIED)),
            9 => must!(self.call(Function::PageMap, &[DATA + 8, page, PAGE_SIZE]), Err(INVALID)),
            10 => must!(self.call(Function::PageMap, &[DATA, page + 8, PAGE_SIZE]), Err(INVALID)),
            11 => must!(self.call(Function::PageMap, &[DATA, page, 2 << 20]), Err(INVALID)),
            12 => must!(self.call(Function::PageMap, &[DATA, run_page, PAGE_SIZE]), Err(DENIED)),
            _ => must!(self.call(Function::PoolDonate, &[page, 33]), Err(INVALID)),
        }
        Self::untouched(page)
    }

    /// A step of its life. A victim only runs.
    pub fn step(&mut self, cpu: &mut Cpu) -> Outcome {
        if self.handle == 0 {
            return self.launch(cpu);
        }
        if self.victim {
            return if cpu.random.once_in(8) { self.bad_entry(cpu) } else { self.run(cpu) };
        }
        if self.runs == 0 {
            return if cpu.random.once_in(3) { self.destroy(cpu) } else { self.reset(cpu) };
        }
        self.runs -= 1;
        match cpu.random.below(40) {
            0 => self.unmap(cpu),
            1 => {
                let place = cpu.random.below(PLACES);
                self.map(cpu, place)
            }
            2..8 => self.refused(cpu),
            9..12 => self.bad_entry(cpu),
            8 => {
                must!(host(Function::TimerLoad, &[self.handle]), Ok(()));
                Ok(())
            }
            _ => self.run(cpu),
        }
    }

    /// The guest gets through all that it has once more.
    pub fn verify(&mut self, cpu: &mut Cpu) -> Outcome {
        let before = self.report;
        for _ in 0..10_000 {
            if self.handle == 0 || self.runs == 0 || self.report >= before + PLACES {
                return Ok(());
            }
            self.run(cpu)?;
        }
        Err(Failure::new(format_args!("the guest does not go on after report {before}")))
    }

    /// After all VMs were destroyed: all pages are back.
    pub fn returned(&mut self) -> Outcome {
        self.handle = 0;
        self.all_back(Use::Private)?;
        self.all_back(Use::Table)?;
        for (page, state) in self.pages.iter().take(self.count) {
            memory::poke(*page, memory::read(*page))?;
            if *state == Use::Host {
                let change = memory::first_change(*page, PATTERN);
                let change = change.filter(|at| at % PAGE_SIZE != LAST_WORD);
                ensure!(change.is_none(), "{change:x?} is not as the host wrote it");
            }
        }
        Ok(())
    }
}
