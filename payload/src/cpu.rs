// SPDX-License-Identifier: MIT OR Apache-2.0
//! CPUs: entry code, jobs for those beyond the first, time.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::harness::Failure;
use crate::{exception, gic, harness, memory, smc};

/// Most CPUs that are used.
pub const MAX_CPUS: usize = 8;

global_asm!(
    include_str!("entry.S"),
    stack_size = const 64 * 1024,
    max_cpus = const MAX_CPUS,
    main = sym harness::main,
    secondary = sym secondary,
    exception = sym exception::exception,
    root = sym memory::ROOT,
);

unsafe extern "C" {
    fn secondary_start();
}

/// Reads a system register.
#[macro_export]
macro_rules! mrs {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading it has no side effect that Rust knows of.
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack, preserves_flags));
        }
        value
    }};
}

/// Writes a system register.
#[macro_export]
macro_rules! msr {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the callers write registers that Rust code does not depend on.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack, preserves_flags));
        }
    }};
}

/// Runs one instruction; the exception that it takes.
#[macro_export]
macro_rules! try_instruction {
    ($($line:literal),+) => {
        $crate::exception::catch(|| {
            // SAFETY: an instruction that at most changes x9 or faults.
            unsafe { core::arch::asm!($($line),+, "isb", out("x9") _, options(nostack)) }
        })
    };
}

/// The number of the calling CPU.
pub fn number() -> usize {
    usize::try_from(mrs!("tpidr_el1")).unwrap_or(0) % MAX_CPUS
}

/// Waits for an event or an interrupt.
pub fn wait() {
    // SAFETY: only waits.
    unsafe { asm!("wfe", options(nomem, nostack, preserves_flags)) }
}

/// Waits for an interrupt; one that is masked ends it too.
fn wait_for_interrupt() {
    // SAFETY: only waits.
    unsafe { asm!("dsb sy", "wfi", options(nostack, preserves_flags)) }
}

/// Ticks of the physical counter.
pub fn now() -> u64 {
    mrs!("cntpct_el0")
}

/// Ticks of so many milliseconds.
pub fn milliseconds(n: u64) -> u64 {
    mrs!("cntfrq_el0") / 1000 * n
}

/// What a CPU is to do, and what came of it.
struct Job {
    function: AtomicUsize,
    argument: AtomicU64,
    result: AtomicU64,
    state: AtomicU64,
}

const OFF: u64 = 0;
const IDLE: u64 = 1;
const WORK: u64 = 2;
const DONE: u64 = 3;
const BROKEN: u64 = 4;

static JOBS: [Job; MAX_CPUS] = [const {
    Job {
        function: AtomicUsize::new(0),
        argument: AtomicU64::new(0),
        result: AtomicU64::new(0),
        state: AtomicU64::new(OFF),
    }
}; MAX_CPUS];

/// A job: pure code on another CPU.
pub type Function = extern "C" fn(u64) -> u64;

extern "C" fn secondary(cpu: usize) -> ! {
    gic::init_cpu();
    let job = &JOBS[cpu % MAX_CPUS];
    job.state.store(IDLE, Ordering::SeqCst);
    loop {
        // With WFE an emulated CPU would keep a core of the build machine busy.
        while job.state.load(Ordering::SeqCst) != WORK {
            wait_for_interrupt();
            gic::take_pending();
        }
        let address = job.function.load(Ordering::SeqCst);
        // SAFETY: `start` stored a function there.
        let function = unsafe { core::mem::transmute::<usize, Function>(address) };
        let end = match exception::guard(function, job.argument.load(Ordering::SeqCst)) {
            Ok(result) => {
                job.result.store(result, Ordering::SeqCst);
                DONE
            }
            Err(_) => BROKEN,
        };
        job.state.store(end, Ordering::SeqCst);
    }
}

/// Address and argument for CPU_ON of CPU `cpu`.
pub fn entry() -> u64 {
    secondary_start as *const () as u64
}

/// Gives `function` to CPU `cpu`, turning it on the first time.
pub fn start(cpu: usize, function: Function, argument: u64) -> Result<(), Failure> {
    let job = &JOBS[cpu];
    if job.state.load(Ordering::SeqCst) == OFF {
        let [result, ..] =
            smc::call([smc::psci::CPU_ON_64, cpu as u64, entry(), cpu as u64, 0, 0, 0, 0]);
        if result != 0 {
            return Err(Failure::new(format_args!("CPU_ON of CPU {cpu}: {:#x}", result)));
        }
        let end = now() + milliseconds(20_000);
        while job.state.load(Ordering::SeqCst) == OFF {
            if now() > end {
                return Err(Failure::new(format_args!("CPU {cpu} did not come up")));
            }
        }
    }
    job.function.store(function as *const () as usize, Ordering::SeqCst);
    job.argument.store(argument, Ordering::SeqCst);
    job.state.store(WORK, Ordering::SeqCst);
    gic::send(cpu as u64);
    Ok(())
}

/// What came of the job of CPU `cpu`, once it has ended.
pub fn result(cpu: usize) -> Option<Result<u64, Failure>> {
    let job = &JOBS[cpu];
    match job.state.load(Ordering::SeqCst) {
        DONE => Some(Ok(job.result.load(Ordering::SeqCst))),
        BROKEN => Some(Err(Failure::new(format_args!("an exception on CPU {cpu}")))),
        _ => None,
    }
}

/// Waits for the job of CPU `cpu`.
pub fn join(cpu: usize) -> Result<u64, Failure> {
    let end = now() + milliseconds(60_000);
    loop {
        match result(cpu) {
            Some(result) => return result,
            None if now() > end => {
                return Err(Failure::new(format_args!("CPU {cpu} does not end its job")));
            }
            None => {}
        }
    }
}

/// Sleeps for so many microseconds, or less if an interrupt comes.
pub fn nap(microseconds: u64) {
    gic::alarm_in(milliseconds(microseconds) / 1000);
    wait_for_interrupt();
    gic::quiet();
}

/// Tells jobs that go on until they are told otherwise.
pub static STOP: AtomicU64 = AtomicU64::new(0);

/// Ends what a failed test left running.
pub fn stop_all() {
    STOP.store(1, Ordering::SeqCst);
    for (cpu, job) in JOBS.iter().enumerate() {
        if job.state.load(Ordering::SeqCst) == WORK {
            // Its result is nobody's.
            let _ = join(cpu);
        }
    }
}

extern "C" fn off(_: u64) -> u64 {
    smc::call([smc::psci::CPU_OFF, 0, 0, 0, 0, 0, 0, 0])[0]
}

/// Turns CPU `cpu` off; the next job turns it on.
pub fn turn_off(cpu: usize) -> Result<(), Failure> {
    start(cpu, off, 0)?;
    let end = now() + milliseconds(20_000);
    while smc::call([smc::psci::AFFINITY_INFO_64, cpu as u64, 0, 0, 0, 0, 0, 0])[0] != 1 {
        if now() > end {
            return Err(Failure::new(format_args!("CPU {cpu} does not go off")));
        }
    }
    JOBS[cpu].state.store(OFF, Ordering::SeqCst);
    Ok(())
}

/// Whether CPU `cpu` was turned on.
pub fn is_on(cpu: usize) -> bool {
    JOBS[cpu].state.load(Ordering::SeqCst) != OFF
}
