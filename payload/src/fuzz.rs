// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random calls of all CPUs at once, in batches, against a monitor that audits
//! itself after each (`AUDIT_CALL`).
//!
//! A batch starts and ends without any VM. What a CPU does in it depends on the
//! seed, the number of the batch and the CPU's number, and on the answers that it
//! gets: how the calls of the CPUs fall together is the machine's. Each CPU has
//! - a *victim* (`solo`), whose guest verifies a secret all the time, and which
//!   all CPUs attack with calls that must be refused;
//! - a *solo* VM, attacked in the same way, which lives a whole life: of each of
//!   its calls the answer is known;
//! - two *shared* VMs (`shared`), to which every CPU does anything;
//! - random calls (`calls`), and accesses to what is hidden (`touch`).

mod calls;
mod guests;
mod power;
mod random;
mod shared;
mod solo;
mod touch;
mod world;

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{AUDIT_CALL, Function};

use self::random::Random;
use self::shared::Shared;
use self::solo::Solo;
use crate::cpu::{self, MAX_CPUS};
use crate::harness::{Failure, Outcome};
use crate::{ensure, exception, expect, gic, memory, println, smc};

/// What the runner asks for.
#[derive(Clone, Copy)]
pub struct Options {
    seed: u64,
    calls: u64,
    cpus: usize,
    from: u64,
    batch: u64,
}

/// The options, if fuzzing is asked for: `--fuzz seed=1 calls=100000 cpus=4 from=0
/// batch=20000`, numbers in decimal.
pub fn options(words: &str) -> Option<Options> {
    let value = |name: &str, default: u64| {
        let word = words.split(' ').filter_map(|w| w.strip_prefix(name)?.strip_prefix('=')).next();
        word.and_then(|w| w.parse().ok()).unwrap_or(default)
    };
    words.split(' ').any(|w| w == "--fuzz").then(|| Options {
        seed: value("seed", 1),
        calls: value("calls", 100_000),
        cpus: index(value("cpus", 1)).clamp(1, MAX_CPUS),
        from: value("from", 0),
        batch: value("batch", 20_000).max(1),
    })
}

/// A number as an index.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(0)
}

/// What a CPU does its steps with.
pub struct Cpu {
    number: usize,
    cpus: usize,
    random: Random,
    /// VMs that were made for themselves are not destroyed in this batch: the
    /// monitor runs out of them.
    greedy: bool,
}

/// What each CPU keeps from one part of a batch to the next.
struct State {
    cpu: Cpu,
    victim: Solo,
    solo: Solo,
    shared: [Shared; 2],
}

struct States([UnsafeCell<State>; MAX_CPUS]);

// SAFETY: each CPU reaches its own element only (`with_state`), and one job at a time.
unsafe impl Sync for States {}

static STATES: States = States(
    [const {
        UnsafeCell::new(State {
            cpu: Cpu { number: 0, cpus: 1, random: Random::new(0, 0, 0), greedy: false },
            victim: Solo::NONE,
            solo: Solo::NONE,
            shared: [Shared::NONE; 2],
        })
    }; MAX_CPUS],
);

fn with_state(f: impl FnOnce(&mut State) -> Outcome) -> Outcome {
    let cell = &STATES.0[cpu::number()];
    // SAFETY: of this CPU, whose jobs come one after the other and don't nest.
    f(unsafe { &mut *cell.get() })
}

/// The last call of each CPU: `x0` to `x7`.
static LAST: [[AtomicU64; 8]; MAX_CPUS] = [const { [const { AtomicU64::new(0) }; 8] }; MAX_CPUS];

static SEED: AtomicU64 = AtomicU64::new(0);
static BATCH: AtomicU64 = AtomicU64::new(0);
static QUOTA: AtomicU64 = AtomicU64::new(0);
static CPUS: AtomicU64 = AtomicU64::new(1);
static AUDITS: AtomicU64 = AtomicU64::new(0);

/// A call, noted and counted.
fn call(x: [u64; 8]) -> [u64; 8] {
    let cpu = cpu::number();
    for (place, value) in LAST[cpu].iter().zip(x) {
        place.store(value, Ordering::Relaxed);
    }
    let result = smc::call(x);
    world::count(cpu, x[0], result[0]);
    result
}

/// A call of the host ABI: `x1` on, or why not.
fn host(function: Function, args: &[u64]) -> Result<[u64; 4], smc::Refusal> {
    let mut x = [0; 8];
    x[0] = u64::from(function.id());
    for (register, value) in x.iter_mut().skip(1).zip(args) {
        *register = *value;
    }
    let [status, r1, r2, r3, r4, ..] = call(x);
    smc::check(status, r1)?;
    Ok([r1, r2, r3, r4])
}

fn audit(what: u64, when: &str) -> Outcome {
    let [status, ..] = smc::call([u64::from(AUDIT_CALL), what, 0, 0, 0, 0, 0, 0]);
    ensure!(status == 0, "the audit {when} gives {:#x}", status);
    if what == 0 {
        AUDITS.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Before the calls: pages, and the victim.
fn prepare(state: &mut State) -> Outcome {
    let batch = BATCH.load(Ordering::SeqCst);
    let number = cpu::number();
    let cpus = index(CPUS.load(Ordering::SeqCst));
    let seed = SEED.load(Ordering::SeqCst);
    state.cpu = Cpu {
        number,
        cpus,
        random: Random::new(seed, batch, number as u64),
        greedy: batch % 16 == 7,
    };
    touch::remember(&state.cpu);
    for i in 0..world::PRIVATE {
        memory::fill(world::private(number, i), memory::PATTERN);
    }
    state.solo = Solo::new(&state.cpu, false);
    state.victim = Solo::new(&state.cpu, true);
    state.shared = [Shared::NONE; 2];
    state.victim.launch(&mut state.cpu)
}

/// The calls.
fn work(state: &mut State) -> Outcome {
    let State { cpu, victim, solo, shared } = state;
    let end = world::calls_of(cpu.number) + QUOTA.load(Ordering::SeqCst);
    while world::calls_of(cpu.number) < end {
        // Some of each, so that counting the calls costs little.
        for _ in 0..16 {
            match cpu.random.below(100) {
                0..22 => solo.step(cpu)?,
                22..26 => victim.step(cpu)?,
                26..56 => {
                    let which = cpu.random.below(2);
                    shared[index(which)].step(cpu, which)?;
                }
                56..78 => calls::anything(cpu)?,
                78..86 => calls::attack(cpu)?,
                86..89 => calls::psci(cpu)?,
                89..92 => calls::unknown(cpu)?,
                _ => touch::anything(cpu)?,
            }
        }
    }
    Ok(())
}

/// After the calls: what each CPU can tell of its own.
fn look(state: &mut State) -> Outcome {
    audit(1, "of a CPU's registers")?;
    state.victim.verify(&mut state.cpu)?;
    state.solo.verify(&mut state.cpu)?;
    touch::compare(&state.cpu)?;
    audit(1, "of a CPU's registers after its guests ran")
}

/// All CPUs destroy all VMs at once.
fn reset(_: &mut State) -> Outcome {
    let mut done = 0;
    for _ in 0..1_000_000 {
        match host(Function::HostReset, &[]) {
            // While others are still at it, and when nothing is left.
            Ok(_) if done == 4 => return Ok(()),
            Ok(_) => done += 1,
            Err(smc::AGAIN) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(Failure::new(format_args!("HOST_RESET comes to no end")))
}

/// After the reset: the CPU's pages are back, wiped or as they were written.
fn clean(state: &mut State) -> Outcome {
    state.victim.returned()?;
    state.solo.returned()?;
    for i in 0..solo::KEPT {
        let page = world::private(state.cpu.number, i);
        let change = memory::first_change(page, memory::PATTERN);
        ensure!(change.is_none(), "{change:x?}: changed, and never named in a call");
    }
    Ok(())
}

/// The common pages are back: wiped, sealed, or as they were written.
fn common_pages() -> Outcome {
    for i in 0..world::COMMON {
        let page = world::common(i);
        memory::poke(page, memory::read(page))?;
        let untouched = memory::first_change(page, memory::PATTERN).is_none();
        let hidden = memory::is_zero(page) || memory::is_sealed(page);
        ensure!(untouched || hidden, "{page:#x} is neither wiped, nor sealed, nor as it was");
    }
    for i in 0..world::RUN {
        let page = world::run_page(i);
        memory::poke(page, memory::read(page))?;
        let guests = (page..page + 4096).step_by(8).find(|at| is_magic(memory::read(*at)));
        ensure!(guests.is_none(), "{guests:x?}: a run page holds a guest's memory");
    }
    Ok(())
}

const fn is_magic(word: u64) -> bool {
    word >> 32 == world::MAGIC
}

/// The parts of a batch, as the number of a job.
const PARTS: [fn(&mut State) -> Outcome; 5] = [prepare, work, look, reset, clean];

extern "C" fn part(n: u64) -> u64 {
    extern "C" fn inner(n: u64) -> u64 {
        with_state(PARTS[index(n)]).err().map_or(0, Failure::code)
    }
    exception::guard(inner, n).unwrap_or_else(Failure::code)
}

/// Has all CPUs do a part of a batch.
fn all(n: u64) -> Outcome {
    let cpus = index(CPUS.load(Ordering::SeqCst));
    for cpu in 1..cpus {
        cpu::start(cpu, part, n)?;
    }
    let mut outcome = of(0, part(n));
    let end = cpu::now() + cpu::milliseconds(120_000);
    for cpu in 1..cpus {
        let result = loop {
            if let Some(result) = cpu::result(cpu) {
                break result;
            }
            power::wake_if_off(cpu);
            if cpu::now() > end {
                return Err(Failure::new(format_args!("CPU {cpu} hangs")));
            }
            cpu::nap(100);
        };
        outcome = outcome.and(result.and_then(|code| of(cpu, code)));
    }
    outcome
}

fn of(cpu: usize, code: u64) -> Outcome {
    Failure::from_code(cpu, code).map_or(Ok(()), Err)
}

fn one_batch(before: &[u64; 4]) -> Outcome {
    let totals = |function| world::accepted(function);
    let (made, gone) = (totals(Function::VmCreate), totals(Function::VmDestroy));
    for i in 0..world::COMMON {
        memory::fill(world::common(i), memory::PATTERN);
    }
    for i in 0..world::RUN {
        memory::clear(world::run_page(i));
    }
    all(0)?;
    all(1)?;
    let vms = totals(Function::VmCreate) - made - (totals(Function::VmDestroy) - gone);
    let [x0, count, _, private, table, host, shared, _] = stats();
    ensure!(x0 == 0 && count == vms, "{count} VMs, {vms} were made");
    let [.., private0, table0] = *before;
    let host0 = BASELINE.load(Ordering::SeqCst);
    expect!(private + table + shared + host, private0 + table0 + host0);
    audit(0, "after the calls")?;
    all(2)?;
    all(3)?;
    world::forget_vms();
    let [_, count, vcpus, private, table, host, shared, _] = stats();
    expect!([count, vcpus, private, table], *before);
    expect!((shared, host), (0, host0));
    audit(0, "after the reset")?;
    all(4)?;
    common_pages()
}

/// Pages of the host's without any VM.
static BASELINE: AtomicU64 = AtomicU64::new(0);

fn stats() -> [u64; 8] {
    call([u64::from(Function::Stats.id()), 0, 0, 0, 0, 0, 0, 0])
}

fn batches(o: &Options) -> Outcome {
    let [_, count, vcpus, private, table, host, ..] = stats();
    BASELINE.store(host, Ordering::SeqCst);
    audit(0, "at the start")?;
    for batch in o.from..o.from + o.calls.div_ceil(o.batch) {
        BATCH.store(batch, Ordering::SeqCst);
        world::use_region(batch);
        one_batch(&[count, vcpus, private, table])?;
        println!("@fuzz {{\"event\":\"batch\",\"batch\":{batch},\"calls\":{}}}", world::totals().0);
    }
    Ok(())
}

/// Fuzzes, tells the result and turns the machine off.
pub fn main(o: &Options) -> ! {
    SEED.store(o.seed, Ordering::SeqCst);
    CPUS.store(o.cpus as u64, Ordering::SeqCst);
    QUOTA.store((o.batch / o.cpus as u64).max(1), Ordering::SeqCst);
    println!(
        "@fuzz {{\"event\":\"start\",\"seed\":\"{:#x}\",\"cpus\":{},\"gic\":{}}}",
        o.seed,
        o.cpus,
        gic::version()
    );
    let outcome = batches(o);
    let (calls, accepted) = world::totals();
    match outcome {
        Ok(()) => {
            world::tell_counts();
            let accesses: u64 = world::ACCESSES.iter().map(|n| n.load(Ordering::Relaxed)).sum();
            println!(
                "@fuzz {{\"event\":\"end\",\"calls\":{calls},\"accepted\":{accepted},\"batches\":{},\"audits\":{},\"runs\":{},\"accesses\":{accesses}}}",
                o.calls.div_ceil(o.batch),
                AUDITS.load(Ordering::Relaxed),
                world::accepted(Function::VcpuRun)
            );
        }
        Err(failure) => {
            println!(
                "@fuzz {{\"event\":\"violation\",\"batch\":{},\"calls\":{calls},\"detail\":\"{failure}\"}}",
                BATCH.load(Ordering::SeqCst)
            );
            for (cpu, last) in LAST.iter().enumerate().take(o.cpus) {
                let last = last.each_ref().map(|x| x.load(Ordering::Relaxed));
                println!("last call of CPU {cpu}: {last:x?}");
            }
        }
    }
    smc::power_off()
}
