// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM that one CPU builds and runs while all others do anything to it. Of the
//! answers only their kind is known; what a guest must not see, and what the host
//! must not, holds all the same.

use havmsi_abi::{EXIT_OFFSET, EntryFlags, ExitClass, Function, PAGE_SIZE, WORDS_EXIT};

use super::calls::checked;
use super::guests::{self, FOUND, FOUND_VALUE};
use super::{Cpu, index, is_magic, touch, world};
use crate::guest::{PORT, RAM, VECTORS_AT};
use crate::harness::{Failure, Outcome};
use crate::memory;
use crate::smc::{AGAIN, BUSY, DENIED, INTEGRITY, INVALID, Refusal, STATE};
use crate::{ensure, gic};

/// Bytes of RAM.
const SIZE: u64 = 16 << 20;
/// Pages of RAM that calls name most.
pub const PAGES: u64 = 64;

/// The VM.
pub struct Shared {
    handle: u64,
    run_pages: [u64; 2],
    /// Why each vCPU stopped last.
    classes: [u64; 2],
    left: u64,
    /// A place that this CPU has filled, and with which page.
    filled: (u64, u64),
}

/// A page of RAM, mostly; one in two is of the few to which the guest writes.
pub fn ipa(cpu: &mut Cpu) -> u64 {
    let pages = cpu.random.pick(&[16, PAGES]);
    let page = RAM + cpu.random.below(pages) * PAGE_SIZE;
    match cpu.random.below(16) {
        0 => page + (cpu.random.below(7) << 21),
        1 => 0x8000_0000 + cpu.random.below(4) * PAGE_SIZE,
        2 => 0x9000_0000 + (cpu.random.below(8) << 30),
        _ => page,
    }
}

impl Shared {
    /// None yet.
    pub const NONE: Self =
        Self { handle: 0, run_pages: [0; 2], classes: [0; 2], left: 0, filled: (0, 0) };

    fn build(&mut self, cpu: &mut Cpu, which: u64) -> Outcome {
        let known = &world::SHARED[cpu.number][index(which)];
        let version = cpu.random.pick(&[gic::version(), gic::version(), 0]);
        let bits = cpu.random.pick(&[32, 36, 39, 40]);
        let Ok([handle, ..]) = checked(Function::VmCreate, &[2, version, bits])? else {
            return Ok(());
        };
        self.handle = handle;
        self.left = 50 + cpu.random.below(300);
        known.set(handle);
        let row = cpu.random.below(world::ROWS) * world::ROW;
        // What follows may be refused, as others may be at it.
        let _ = checked(Function::VmAddRam, &[handle, RAM, SIZE])?;
        if cpu.random.once_in(2) {
            let _ = checked(Function::VmAddRam, &[handle, 0x8000_0000, 1 << 20])?;
        }
        let n = 1 + cpu.random.below(6);
        let pool = world::common(row + cpu.random.below(world::ROW - n));
        let _ = checked(Function::PoolDonate, &[handle, pool, n])?;
        for idx in 0..2 {
            let page = world::run_page(cpu.random.below(world::RUN));
            self.run_pages[index(idx)] = page;
            let _ = checked(Function::VcpuCreate, &[handle, idx, page])?;
        }
        let seed = cpu.random.any() >> 33;
        let _ = checked(Function::VcpuSetBoot, &[handle, 0, RAM, seed])?;
        for (ipa, bytes) in
            [(RAM, guests::fuzz_chaos()), (VECTORS_AT, guests::fuzz_chaos_vectors())]
        {
            // No other call names these pages: the guest executes what it should.
            let page = world::image(cpu.number, which, ipa - RAM);
            if memory::poke(page, 0).is_ok() {
                memory::put(page, bytes);
            }
            for _ in 0..3 {
                let answer = checked(Function::VmPopulate, &[handle, ipa, page])?;
                let Err(Refusal::Wanted(n @ 1..)) = answer else { break };
                let pool = world::common(row + cpu.random.below(world::ROW - 3));
                let _ = checked(Function::PoolDonate, &[handle, pool, n])?;
            }
        }
        let _ = checked(Function::VmActivate, &[handle])?;
        Ok(())
    }

    /// Whether another CPU destroyed it: no call but this one tells for sure.
    fn is_lost(&mut self, cpu: &Cpu, which: u64) -> Result<bool, Failure> {
        let lost = checked(Function::TimerLoad, &[self.handle])? == Err(INVALID);
        if lost {
            self.forget(cpu, which);
        }
        Ok(lost)
    }

    fn forget(&mut self, cpu: &Cpu, which: u64) {
        world::SHARED[cpu.number][index(which)].clear(self.handle);
        self.handle = 0;
    }

    /// Writes an answer to the last exit into the run page, a good one mostly.
    fn answer(&self, cpu: &mut Cpu, idx: usize) {
        let page = self.run_pages[idx];
        let known = |class: ExitClass| class as u64 == self.classes[idx];
        let mut flags = 0;
        let answered = [ExitClass::Hvc, ExitClass::MmioRead, ExitClass::MmioWrite];
        if answered.into_iter().any(known) || known(ExitClass::SysregRead) {
            flags = EntryFlags::COMPLETE;
        }
        if known(ExitClass::SysregWrite) {
            flags = cpu.random.pick(&[EntryFlags::COMPLETE, EntryFlags::INJECT_UNDEF]);
        }
        if flags != 0 && cpu.random.once_in(8) {
            flags = cpu.random.pick(&[0, EntryFlags::INJECT_SEA, EntryFlags::INJECT_UNDEF, 3, 32]);
        }
        flags |= cpu.random.pick(&[0, 0, EntryFlags::TRAP_WFI, EntryFlags::TRAP_WFE]);
        let lr = 1 << 62 | 1 << 60 | cpu.random.below(256) << 48;
        let lr = match cpu.random.below(8) {
            0 => lr | 1 << 61 | cpu.random.pick(&[27, 27, 30]) << 32 | 27,
            // Who knows whether it was sent.
            1 => lr | cpu.random.below(16),
            2 => cpu.random.any() >> 1,
            _ => lr | (16 + cpu.random.below(1004)),
        };
        let words = [
            flags,
            0,
            cpu.random.below(1 << 20),
            0,
            0,
            cpu.random.any() >> 32,
            cpu.random.pick(&[0, 1, 0xff]),
            cpu.random.pick(&[0, 0, 0, 0, 0, 1, 1, 2, 4, 5]),
            lr,
            lr ^ 1,
        ];
        for (at, word) in (page..).step_by(8).zip(words) {
            // It may be somebody's memory by now.
            let _ = memory::poke(at, word);
        }
    }

    fn run(&mut self, cpu: &mut Cpu, which: u64) -> Outcome {
        let idx = usize::from(cpu.random.once_in(6));
        self.answer(cpu, idx);
        let answer = checked(Function::VcpuRun, &[self.handle, idx as u64])?;
        let Ok([class, ..]) = answer else {
            // Nothing to run, or not with this answer.
            let stuck = matches!(answer, Err(STATE | INTEGRITY)) || cpu.random.once_in(4);
            if stuck && !self.is_lost(cpu, which)? {
                self.left /= 2;
            }
            self.classes[idx] = 0;
            return Ok(());
        };
        self.classes[idx] = class;
        let page = self.run_pages[idx];
        let word = |n: usize| memory::peek(page + (EXIT_OFFSET + 8 * n) as u64).unwrap_or(0);
        for n in 0..WORDS_EXIT {
            ensure!(!is_magic(word(n)), "word {n} of an exit is a guest's: {:#x}", word(n));
        }
        let (at, data) = (word(2), word(7));
        let found = at == PORT + FOUND && data == FOUND_VALUE;
        ensure!(!found, "a shared guest found its registers changed");
        if cpu.random.once_in(4) {
            touch::no_guests_fp()?;
        }
        match class {
            0 => gic::take_pending(),
            // A fault; if others changed the page meanwhile the call is refused.
            7 => {
                let page = world::any_common(&mut cpu.random);
                let args = [self.handle, at & !(PAGE_SIZE - 1), page, PAGE_SIZE];
                match checked(Function::PageMap, &args)? {
                    Err(Refusal::Wanted(1..)) => {
                        let page = world::any_common(&mut cpu.random);
                        let _ = checked(Function::PoolDonate, &[self.handle, page, 1])?;
                    }
                    Err(DENIED) => self.left /= 2,
                    // Its page was taken away, and this is not it.
                    Err(INTEGRITY) => self.left = 0,
                    Ok(_) => self.filled = (args[1], page),
                    Err(_) => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A step of its life.
    pub fn step(&mut self, cpu: &mut Cpu, which: u64) -> Outcome {
        let known = &world::SHARED[cpu.number][index(which)];
        if self.handle == 0 || known.handle() == 0 {
            return self.build(cpu, which);
        }
        let vm = self.handle;
        if self.left == 0 {
            let end =
                cpu.random.pick(&[Function::VmDestroy, Function::VmDestroy, Function::VmReset]);
            return match checked(end, &[vm])? {
                Err(AGAIN | BUSY) => Ok(()),
                _ => {
                    // A VM that was reset stays as it is until somebody destroys it.
                    self.left = 20;
                    if end == Function::VmDestroy {
                        self.forget(cpu, which);
                    }
                    Ok(())
                }
            };
        }
        self.left -= 1;
        match cpu.random.below(20) {
            0..2 => {
                let args = [vm, ipa(cpu), world::any_common(&mut cpu.random), PAGE_SIZE];
                let _ = checked(Function::PageMap, &args)?;
            }
            2 => {
                let (filled, page) = self.filled;
                let (ipa, n) = (ipa(cpu), cpu.random.below(5));
                let (ipa, n) = if cpu.random.once_in(4) { (ipa, n) } else { (filled, 1) };
                let answer = checked(Function::PageUnmap, &[vm, ipa, n])?;
                // At once, mostly, and if nobody else was quicker. The audit of debug builds
                // and the guest see to it that nothing else comes in its place.
                if let Ok([done, low, high, _]) = answer
                    && ipa == filled
                    && done == 1
                    && !cpu.random.once_in(8)
                {
                    let args = [vm, ipa, page, PAGE_SIZE, low, high];
                    let _ = checked(Function::PageMap, &args)?;
                }
            }
            _ => self.run(cpu, which)?,
        }
        Ok(())
    }
}
