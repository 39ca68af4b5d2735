// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of tests, and the lines that tell of their results.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use havmsi_abi::Function;
use linkme::distributed_slice;

use crate::cpu::{self, MAX_CPUS};
use crate::memory::{self, ARGUMENTS};
use crate::{bench, exception, failure, fuzz, gic, println, smc};

/// Longest text of a failure.
const TEXT: usize = 240;
/// What each CPU found wrong last.
static TEXTS: [[AtomicU8; TEXT]; MAX_CPUS] =
    [const { [const { AtomicU8::new(0) }; TEXT] }; MAX_CPUS];

/// What a test found wrong: the text is the CPU's last.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    cpu: usize,
    len: usize,
}

impl Failure {
    /// Says what is wrong, and where.
    #[track_caller]
    pub fn new(what: fmt::Arguments<'_>) -> Self {
        let mut failure = Self { cpu: cpu::number(), len: 0 };
        let place = core::panic::Location::caller();
        let file = place.file().rsplit('/').next().unwrap_or("");
        // Cut off if it is too long.
        let _ = write!(failure, "{file}:{}: {what}", place.line());
        failure
    }
}

impl Failure {
    /// As the result of a job of its CPU; 0 is none.
    pub const fn code(self) -> u64 {
        self.len as u64 + 1
    }

    /// The failure of `cpu` with this code.
    pub fn from_code(cpu: usize, code: u64) -> Option<Self> {
        let len = usize::try_from(code.checked_sub(1)?).ok()?;
        Some(Self { cpu, len })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = TEXTS[self.cpu].iter().take(self.len);
        text.map(|b| b.load(Ordering::Relaxed)).try_for_each(|b| f.write_char(char::from(b)))
    }
}

impl Write for Failure {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            // So that the line stays JSON.
            let plain = (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
            let place = TEXTS[self.cpu].get(self.len).ok_or(fmt::Error)?;
            place.store(if plain { byte } else { b'.' }, Ordering::Relaxed);
            self.len += 1;
        }
        Ok(())
    }
}

impl From<smc::Refusal> for Failure {
    #[track_caller]
    fn from(refusal: smc::Refusal) -> Self {
        Self::new(format_args!("a call was refused: {refusal:?}"))
    }
}

impl From<exception::Fault> for Failure {
    #[track_caller]
    fn from(fault: exception::Fault) -> Self {
        Self::new(format_args!("{fault:x?}"))
    }
}

/// What a test returns.
pub type Outcome = Result<(), Failure>;

/// A test.
pub struct Test {
    /// Module and function.
    pub name: &'static str,
    /// Attacks of the threat model that it makes.
    pub threats: &'static str,
    /// Whether it makes sense on this machine.
    pub when: fn() -> bool,
    /// The test.
    pub run: fn() -> Outcome,
}

/// All tests.
#[distributed_slice]
pub static TESTS: [Test];

/// Adds a function to the table: name, threats, and when it makes sense.
#[macro_export]
macro_rules! test {
    ($name:ident, $threats:literal) => {
        $crate::test!($name, $threats, $crate::harness::always);
    };
    ($name:ident, $threats:literal, $when:expr) => {
        const _: () = {
            #[linkme::distributed_slice($crate::harness::TESTS)]
            static TEST: $crate::harness::Test = $crate::harness::Test {
                name: concat!(module_path!(), "::", stringify!($name)),
                threats: $threats,
                when: $when,
                run: $name,
            };
        };
    };
}

/// Ends the test unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err($crate::harness::Failure::new(format_args!($($what)+)));
        }
    };
}

/// Ends the test unless both are equal.
#[macro_export]
macro_rules! expect {
    ($got:expr, $want:expr) => {{
        let (got, want) = (&$got, &$want);
        $crate::ensure!(*got == *want, "{}: {:x?}, not {:x?}", stringify!($got), got, want);
    }};
}

/// On every machine.
pub fn always() -> bool {
    true
}

/// With a GICv3.
pub fn gic3() -> bool {
    gic::version() == 3
}

/// With a GICv2.
pub fn gic2() -> bool {
    gic::version() == 2
}

/// With more than one CPU.
pub fn several_cpus() -> bool {
    smc::call([smc::psci::AFFINITY_INFO_64, 1, 0, 0, 0, 0, 0, 0])[0]
        != smc::psci::INVALID_PARAMETERS
}

/// Failures and passes so far.
static FAILED: AtomicU64 = AtomicU64::new(0);
static PASSED: AtomicU64 = AtomicU64::new(0);
/// Times the table is run.
const ARGUMENTS_MAGIC: &[u8] = b"@args ";

/// From the entry code, on the first CPU.
pub extern "C" fn main() -> ! {
    // SAFETY: RAM that nothing of Rust's lies in; the runner may have put a
    // line there, else it is zero.
    let line = unsafe {
        core::slice::from_raw_parts(
            core::ptr::with_exposed_provenance::<u8>(usize::try_from(ARGUMENTS).unwrap_or(0)),
            256,
        )
    };
    let words = line.strip_prefix(ARGUMENTS_MAGIC).unwrap_or(&[]);
    let end = words.iter().position(|b| !(b' '..0x7f).contains(b)).unwrap_or(words.len());
    let words = core::str::from_utf8(&words[..end]).unwrap_or("");
    let list = words.split(' ').any(|w| w == "--list");
    let filter = |name: &str| {
        let mut wanted = words.split(' ').filter(|w| !w.is_empty() && *w != "--list").peekable();
        wanted.peek().is_none() || wanted.any(|w| name.contains(w))
    };
    println!("");
    gic::init();
    if let Some(options) = fuzz::options(words) {
        fuzz::main(&options);
    }
    if let Some(only) = words.strip_prefix("--bench") {
        bench::main(only.trim());
    }
    match words {
        "--life" => failure::life(),
        "--panic" => failure::panic(),
        _ => {}
    }
    for test in TESTS {
        let name = test.name.trim_start_matches("havmsi_payload::tests::");
        if !filter(name) {
            continue;
        }
        if list {
            println!("@list {{\"name\":\"{name}\",\"threats\":\"{}\"}}", test.threats);
            continue;
        }
        if !(test.when)() {
            println!("@skip {{\"name\":\"{name}\"}}");
            continue;
        }
        let outcome = run(test);
        match outcome {
            Ok(()) => {
                PASSED.fetch_add(1, Ordering::Relaxed);
                println!("@test {{\"name\":\"{name}\",\"result\":\"ok\",\"detail\":\"\"}}");
            }
            Err(failure) => {
                FAILED.fetch_add(1, Ordering::Relaxed);
                println!(
                    "@test {{\"name\":\"{name}\",\"result\":\"fail\",\"detail\":\"{failure}\"}}"
                );
            }
        }
    }
    for attack in crate::attack::chosen(words) {
        if list {
            crate::attack::list(attack);
        } else if !crate::attack::fits(attack) {
            println!("@skip {{\"name\":\"attack::{}\"}}", attack.name);
        } else {
            crate::attack::run(attack);
        }
    }
    let (passed, failed) = (PASSED.load(Ordering::Relaxed), FAILED.load(Ordering::Relaxed));
    println!("@done {{\"passed\":{passed},\"failed\":{failed}}}");
    smc::power_off()
}

fn run(test: &Test) -> Outcome {
    memory::restart();
    gic::quiet();
    let mut outcome = Err(Failure::new(format_args!("not run")));
    let mut state = (test, &mut outcome);
    extern "C" fn call(state: u64) -> u64 {
        let state = usize::try_from(state).unwrap_or(0);
        // SAFETY: `state` below lives until the guard returns.
        let state =
            unsafe { &mut *core::ptr::with_exposed_provenance_mut::<(&Test, &mut Outcome)>(state) };
        *state.1 = (state.0.run)();
        0
    }
    let guarded = exception::guard(call, (&raw mut state).expose_provenance() as u64);
    let outcome = guarded.and(outcome);
    // What a failed test left.
    if outcome.is_err() {
        cpu::stop_all();
    }
    let left = smc::host(Function::Stats, &[])?[0];
    if left != 0 {
        smc::until_done(Function::HostReset, &[], 1_000_000)?;
        if outcome.is_ok() {
            return Err(Failure::new(format_args!("{left} VMs were left")));
        }
    }
    outcome
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let failure = Failure::new(format_args!("{info}"));
    println!("@panic {{\"detail\":\"{}\"}}", failure);
    println!(
        "@done {{\"passed\":{},\"failed\":{}}}",
        PASSED.load(Ordering::Relaxed),
        FAILED.load(Ordering::Relaxed) + 1
    );
    smc::power_off()
}
