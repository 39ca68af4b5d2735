// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filling memory and verifying it.

use crate::spin::{Registers, calculate};
use crate::{say, sys};
use havmsi_proto::json::Object;
use havmsi_proto::{PAGE_WORDS, Seed};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How many pages an attack may aim at: their addresses are published.
const TARGETS: usize = 16;
const SPIN: u64 = 4_000_000;
const STEPS: u32 = 20_000;
const PAUSE: Duration = Duration::from_millis(20);
/// Passes over the whole memory at least, whatever the time limit.
const MIN_ROUNDS: u64 = 2;
/// More `corrupt` lines than this help nobody.
const MAX_REPORTS: u64 = 64;

/// Memory with the stream in it.
pub struct Memory {
    seed: Seed,
    words: &'static [AtomicU64],
}

impl Memory {
    /// Takes memory and writes the stream.
    pub fn fill(seed: Seed, mib: u64) -> Result<Self, String> {
        let words = usize::try_from(mib << 17).map_err(|e| e.to_string())?;
        let words = sys::memory(words)?;
        for (page, number) in words.chunks_exact(PAGE_WORDS).zip(0..) {
            for (word, value) in page.iter().zip(seed.words(number)) {
                word.store(value, Relaxed);
            }
        }
        Ok(Self { seed, words })
    }

    /// Guest-physical addresses of the first pages.
    pub fn targets(&self) -> Vec<u64> {
        let pages = self.words.chunks_exact(PAGE_WORDS).take(TARGETS);
        pages.map(|page| sys::physical(page.as_ptr().expose_provenance() as u64)).collect()
    }

    fn pages(&self) -> usize {
        self.words.len() / PAGE_WORDS
    }

    /// The first two words of a page, if it isn't what it should be.
    fn check(&self, number: usize) -> Option<(u64, u64)> {
        let page = &self.words[number * PAGE_WORDS..(number + 1) * PAGE_WORDS];
        let right = page
            .iter()
            .zip(self.seed.words(number as u64))
            .all(|(word, value)| word.load(Relaxed) == value);
        (!right).then(|| (page[0].load(Relaxed), page[1].load(Relaxed)))
    }
}

/// What came of it.
pub struct Outcome {
    /// Complete passes over the memory.
    pub rounds: u64,
    /// Pages and registers found changed.
    pub corrupt: u64,
}

struct Shared<'a> {
    memory: &'a Memory,
    bad: Vec<AtomicBool>,
    corrupt: AtomicU64,
    rounds: AtomicU64,
    finish: AtomicBool,
    barrier: Barrier,
    registers: Registers,
    result: (u64, u64),
}

impl Shared<'_> {
    fn report(&self, vcpu: usize, object: Object) {
        if self.corrupt.fetch_add(1, Relaxed) < MAX_REPORTS {
            say(object.value("vcpu", vcpu));
        }
    }

    /// One thread's part of a round: its share of the pages, then registers and arithmetic.
    fn part(&self, vcpu: usize, part: usize, parts: usize) {
        let pages = self.memory.pages();
        for number in part * pages / parts..(part + 1) * pages / parts {
            match self.memory.check(number) {
                None => self.bad[number].store(false, Relaxed),
                Some((w0, w1)) if !self.bad[number].swap(true, Relaxed) => {
                    let object = Object::event("corrupt")
                        .text("what", "page")
                        .value("page", number)
                        .hex("w0", w0)
                        .hex("w1", w1);
                    self.report(vcpu, object);
                }
                Some(_) => {}
            }
        }
        let found = self.registers.spin(SPIN);
        let wrong = |a: &[u64], b: &[u64]| a.iter().zip(b).position(|(a, b)| a != b);
        for (what, at) in [
            ("reg", wrong(&found.x, &self.registers.x)),
            ("fp", wrong(&found.v, &self.registers.v)),
        ] {
            if let Some(at) = at {
                let object = Object::event("corrupt").text("what", what).value("at", at);
                self.report(vcpu, object);
            }
        }
        if calculate(self.memory.seed, STEPS) != self.result {
            self.report(vcpu, Object::event("corrupt").text("what", "calc"));
        }
    }
}

/// Verifies until the time is over or the flag is set; each CPU checks each page in turn.
pub fn verify(
    memory: &Memory,
    cpus: &[usize],
    stop: &AtomicBool,
    end: Instant,
    idle: bool,
) -> Outcome {
    let parts = cpus.len();
    let shared = Shared {
        memory,
        bad: (0..memory.pages()).map(|_| AtomicBool::new(false)).collect(),
        corrupt: AtomicU64::new(0),
        rounds: AtomicU64::new(0),
        finish: AtomicBool::new(false),
        barrier: Barrier::new(parts),
        registers: Registers::of(memory.seed),
        result: calculate(memory.seed, STEPS),
    };
    std::thread::scope(|scope| {
        for (index, cpu) in cpus.iter().enumerate() {
            let shared = &shared;
            scope.spawn(move || {
                sys::pin(*cpu);
                let mut said = Instant::now();
                for round in 0.. {
                    shared.part(*cpu, (index + round) % parts, parts);
                    if shared.barrier.wait().is_leader() {
                        let rounds = shared.rounds.fetch_add(1, Relaxed) + 1;
                        let over = stop.load(Relaxed) || Instant::now() >= end;
                        let least = MIN_ROUNDS.max(parts as u64);
                        shared.finish.store(over && rounds >= least, Relaxed);
                    }
                    shared.barrier.wait();
                    if shared.finish.load(Relaxed) {
                        return;
                    }
                    if index == 0 && said.elapsed() >= Duration::from_secs(5) {
                        said = Instant::now();
                        let rounds = shared.rounds.load(Relaxed);
                        say(Object::event("progress").value("rounds", rounds));
                    }
                    // A pause, so that there are exits for idle vCPUs, and room for others.
                    std::thread::sleep(PAUSE);
                    if idle {
                        let pause = || !stop.load(Relaxed) && Instant::now() < end;
                        while pause() {
                            std::thread::sleep(Duration::from_millis(50));
                        }
                    }
                }
            });
        }
    });
    Outcome { rounds: shared.rounds.load(Relaxed), corrupt: shared.corrupt.load(Relaxed) }
}
