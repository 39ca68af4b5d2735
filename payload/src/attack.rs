// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks, each made on a victim VM with a secret. What came of one is said
//! by what it got alone (README.md).

use core::fmt::{self, Write};
use core::sync::atomic::Ordering;

use havmsi_abi::{ExitClass, Function};
use linkme::distributed_slice;

use crate::guest::{FREE, PORT, RAM, RAM_SIZE, Vcpu, Vm};
use crate::harness::Failure;
use crate::memory::{self, take};
use crate::smc::{self, Refusal};
use crate::{cpu, exception, gic, guest_program, println};

mod devices;
mod guests;
mod pages;
mod races;
pub mod table;
mod vcpus;

use table::{Attack, TABLE};

/// A line of text.
pub struct Text {
    bytes: [u8; 200],
    len: usize,
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            // So that the line stays JSON; cut off if it is too long.
            let plain = (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
            let place = self.bytes.get_mut(self.len).ok_or(fmt::Error)?;
            *place = if plain { byte } else { b'.' };
            self.len += 1;
        }
        Ok(())
    }
}

impl Text {
    fn new(what: fmt::Arguments<'_>) -> Self {
        let mut text = Self { bytes: [0; 200], len: 0 };
        // Cut off if it is too long.
        let _ = text.write_fmt(what);
        text
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

/// What came of an attack.
pub struct Verdict {
    succeeded: bool,
    detail: Text,
}

/// What came of an attack, or why it could not be made.
pub type Outcome = Result<Verdict, Failure>;

/// Succeeded if the condition holds, blocked if not; what was seen.
pub fn verdict(succeeded: bool, detail: fmt::Arguments<'_>) -> Outcome {
    Ok(Verdict { succeeded, detail: Text::new(detail) })
}

/// The function of an attack in the table.
pub struct Entry {
    /// As in the table.
    pub name: &'static str,
    /// The attack.
    pub run: fn(&mut Victim) -> Outcome,
}

/// All functions.
#[distributed_slice]
pub static ENTRIES: [Entry];

/// Says which attack of the table a function is.
#[macro_export]
macro_rules! attack {
    ($function:ident, $name:literal) => {
        const _: () = {
            #[linkme::distributed_slice($crate::attack::ENTRIES)]
            static ENTRY: $crate::attack::Entry =
                $crate::attack::Entry { name: $name, run: $function };
        };
    };
}

/// Where the victim is told how many of its pages to verify.
const WANTED: u64 = 0x208;
/// Where it reports what is wrong.
const WRONG: u64 = 0x200;

guest_program!(
    victim,
    // x0: the secret, in x19. Each word of the pages is the secret xor its address.
    "mov x19, x0",
    "movz x21, #0x4010, lsl #16",
    "add x22, x21, #2, lsl #12",
    "mov x4, x21",
    "1: eor x5, x4, x19",
    "str x5, [x4]",
    "add x4, x4, #8",
    "cmp x4, x22",
    "b.ne 1b",
    "2: ldr x6, [x20, #0x208]",
    "add x6, x21, x6, lsl #12",
    "mov x5, xzr",
    "mov x4, x21",
    "3: ldr x7, [x4]",
    "eor x7, x7, x4",
    "cmp x7, x19",
    "cinc x5, x5, ne",
    "add x4, x4, #8",
    "cmp x4, x6",
    "b.lo 3b",
    "str x5, [x20, #0x200]",
    "b 2b"
);

/// A VM with a secret in two pages at [`FREE`] and in its registers, which
/// verifies the first page, or both, when it is told.
pub struct Victim {
    /// The VM.
    pub vm: Vm,
    /// Its vCPU.
    pub vcpu: Vcpu,
    /// The secret.
    pub secret: u64,
    /// A page of the host's that lies just ahead of the victim's.
    pub before: u64,
    /// Where its pages lie.
    pub pages: [u64; 2],
    /// Where its tables of level 2 and level 3 lie, in whatever order.
    pub tables: [u64; 2],
}

impl Victim {
    /// Launches one and lets it fill its pages.
    pub fn new() -> Result<Self, Failure> {
        let vm = Vm::new(1)?;
        vm.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
        let pool = take(2);
        vm.call(Function::PoolDonate, &[pool, 2])?;
        let vcpu = vm.vcpu(0)?;
        let secret = cpu::now().wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63;
        vm.boot(victim(), [secret, 0, 0, 0])?;
        // At a multiple of 64 KiB, which some tables of the hardware must have.
        let first = (take(33) + 0x1000).next_multiple_of(1 << 16);
        let (before, pages) = (first - 0x1000, [first, first + 0x1000]);
        for (ipa, page) in [FREE, FREE + 0x1000].into_iter().zip(pages) {
            vm.call(Function::PageMap, &[ipa, page, 4096])?;
        }
        Ok(Self { vm, vcpu, secret, before, pages, tables: [pool, pool + 4096] })
    }

    /// Words that are wrong in the first `pages` pages.
    #[track_caller]
    pub fn wrong(&mut self, pages: u64) -> Result<u64, Failure> {
        let asked = self.vcpu.expect(ExitClass::MmioRead)?;
        if asked.ipa != PORT + WANTED {
            return Err(Failure::new(format_args!("the victim asks at {:#x}", asked.ipa)));
        }
        self.vcpu.complete(pages);
        self.vcpu.report(WRONG)
    }

    /// Whether `value` is what the victim has in the word at `ipa`.
    pub const fn shows(&self, value: u64, ipa: u64) -> bool {
        value ^ ipa == self.secret
    }

    /// The verdict of an attack on the victim's integrity: whether one of the
    /// first `pages` pages is wrong, or the victim does not go on at all.
    pub fn harmed(&mut self, pages: u64, how: fmt::Arguments<'_>) -> Outcome {
        match self.wrong(pages) {
            Ok(0) => verdict(false, format_args!("{how}; the victim's memory is intact")),
            Ok(n) => verdict(true, format_args!("{how}; {n} words of the victim changed")),
            Err(why) => verdict(true, format_args!("{how}; the victim does not go on: {why}")),
        }
    }

    /// The verdict of an attack that read `value` where the victim has the word at `ipa`.
    pub fn disclosed(&self, value: u64, ipa: u64, how: fmt::Arguments<'_>) -> Outcome {
        let text = if self.shows(value, ipa) { "the victim's secret" } else { "not the secret" };
        verdict(self.shows(value, ipa), format_args!("{how}: {value:#x}, {text}"))
    }
}

/// An attacker's VM that has the page at `pa` at [`FREE`], content and all; or
/// why it could not be had.
pub fn launch_with_page(
    program: &[u8],
    x: [u64; 4],
    pa: u64,
) -> Result<Result<(Vm, Vcpu), Refusal>, Failure> {
    let vm = Vm::new(2)?;
    vm.furnish(8)?;
    let vcpu = vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM, x[0], x[1], x[2], x[3]])?;
    vm.populate(RAM, program)?;
    vm.populate(RAM + 0x1000, crate::guest::vectors())?;
    if let Err(refusal) = vm.call(Function::VmPopulate, &[FREE, pa]) {
        vm.destroy()?;
        return Ok(Err(refusal));
    }
    vm.call(Function::VmActivate, &[])?;
    Ok(Ok((vm, vcpu)))
}

guest_program!(
    word_at_free,
    // Reports the word at FREE + x0.
    "movz x4, #0x4010, lsl #16",
    "1: ldr x5, [x4, x0]",
    "str x5, [x20, #0x200]",
    "b 1b"
);

struct State {
    run: fn(&mut Victim) -> Outcome,
    result: &'static str,
    detail: Text,
    victim_ok: bool,
}

impl State {
    fn make(&mut self) -> Result<(), Failure> {
        let mut victim = Victim::new()?;
        if victim.wrong(2)? != 0 {
            return Err(Failure::new(format_args!("the victim does not verify to begin with")));
        }
        let verdict = (self.run)(&mut victim)?;
        self.result = if verdict.succeeded { "succeeded" } else { "blocked" };
        self.detail = verdict.detail;
        self.victim_ok = matches!((victim.wrong(1), victim.wrong(1)), (Ok(0), Ok(0)));
        Ok(())
    }
}

/// Another VM runs and verifies its memory.
fn new_vm() -> Result<bool, Failure> {
    let mut victim = Victim::new()?;
    let wrong = victim.wrong(2)? + victim.wrong(2)?;
    victim.vm.destroy()?;
    Ok(wrong == 0)
}

/// Makes an attack and says what came of it.
pub fn run(attack: &Attack) {
    let Some(entry) = ENTRIES.iter().find(|e| e.name == attack.name) else {
        panic!("no function for {}", attack.name)
    };
    extern "C" fn make(state: u64) -> u64 {
        let at = usize::try_from(state).unwrap_or(0);
        // SAFETY: `state` below lives until the guard returns.
        let state = unsafe { &mut *core::ptr::with_exposed_provenance_mut::<State>(at) };
        if let Err(failure) = state.make() {
            state.detail = Text::new(format_args!("{failure}"));
        }
        0
    }
    extern "C" fn another(_: u64) -> u64 {
        u64::from(new_vm().is_ok_and(|ok| ok))
    }
    memory::restart();
    memory::ZEROS.store(true, Ordering::Relaxed);
    gic::quiet();
    let (result, detail) = ("failed", Text::new(format_args!("")));
    let mut state = State { run: entry.run, result, detail, victim_ok: false };
    if let Err(failure) = exception::guard(make, (&raw mut state).expose_provenance() as u64) {
        state.result = "failed";
        state.detail = Text::new(format_args!("{failure}"));
    }
    cpu::stop_all();
    let new_vm_ok = exception::guard(another, 0).is_ok_and(|ok| ok == 1);
    println!(
        "@attack {{\"id\":\"{}\",\"name\":\"attack::{}\",\"result\":\"{}\",\"detail\":\"{}\",\"victim_ok\":{},\"new_vm_ok\":{new_vm_ok}}}",
        attack.id,
        attack.name,
        state.result,
        state.detail.as_str(),
        state.victim_ok,
    );
    // What is left; the damage of a control may not let it.
    let _ = smc::until_done(Function::HostReset, &[], 100_000);
}

/// Whether an attack can be made on this machine.
pub fn fits(attack: &Attack) -> bool {
    attack.gic == 0 || u64::from(attack.gic) == gic::version()
}

/// Prints the table.
pub fn list(attack: &Attack) {
    println!(
        "@list {{\"name\":\"attack::{}\",\"threats\":\"{}\",\"leave_out\":\"{}\",\"gic\":{},\"stops\":{},\"what\":\"{}\"}}",
        attack.name, attack.id, attack.leave_out, attack.gic, attack.stops, attack.what
    );
}

/// The attacks whose names have one of `words` in them.
pub fn chosen<'a>(words: &'a str) -> impl Iterator<Item = &'static Attack> + 'a {
    TABLE.iter().filter(|attack| {
        let name = |w: &str| {
            let rest = w.strip_prefix("attack::");
            rest.is_some_and(|rest| attack.name.starts_with(rest)) || attack.name.contains(w)
        };
        words.split(' ').any(|w| !w.is_empty() && w != "--list" && name(w))
    })
}
