// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is left when things end badly: lives of one machine (`@args --life`),
//! and a monitor that panics (`@args --panic`, for a test monitor). xtask's
//! `failure.rs` judges.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{Function, layout};

use crate::guest::{FREE, Vcpu, Vm, spin};
use crate::harness::{Failure, Outcome};
use crate::memory::{self, RAM_BASE, RAM_SIZE};
use crate::{cpu, guest_program, println, smc};

/// Pages that the guest fills.
const PAGES: usize = 16;
/// What its stream is made of; the host never has it in memory itself.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const FACTOR: u64 = 0xd134_2543_de82_ef95;

guest_program!(
    keeper,
    "movz x4, #0x4010, lsl #16",
    "movz x5, #0x2000",
    "1: madd x0, x0, x1, x1",
    "str x0, [x4], #8",
    "subs x5, x5, #1",
    "b.ne 1b",
    "2: str x5, [x20, #0x200]",
    "b 2b"
);

guest_program!(
    asker,
    "hvc #0",
    "str x1, [x20, #0x200]",
    "str x2, [x20, #0x208]",
    "str x3, [x20, #0x210]"
);

/// What the monitor's random generator gives a guest.
fn random() -> Result<[u64; 3], Failure> {
    let (vm, mut vcpu) = Vm::launch(asker(), [smc::psci::TRNG_RND_64, 192, 0, 0])?;
    let words = [vcpu.report(0x200)?, vcpu.report(0x208)?, vcpu.report(0x210)?];
    vm.destroy()?;
    Ok(words)
}

fn next(value: u64) -> u64 {
    value.wrapping_mul(FACTOR).wrapping_add(FACTOR)
}

/// Pages of RAM that begin as one of the guest's does.
fn found() -> u64 {
    let mut first = [(0, 0); PAGES];
    let mut value = SEED;
    for words in &mut first {
        *words = (next(value), next(next(value)));
        (0..512).for_each(|_| value = next(value));
    }
    let pages = (layout::host_dtb(RAM_BASE, RAM_SIZE)..RAM_BASE + RAM_SIZE).step_by(4096);
    pages.filter(|at| first.contains(&(memory::read(*at), memory::read(at + 8)))).count() as u64
}

fn plant() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(keeper(), [SEED, FACTOR, 0, 0])?;
    for page in 0..PAGES as u64 {
        vm.map(FREE + page * 4096)?;
    }
    vcpu.report(0x200)?;
    println!("@planted {{\"pages\":{PAGES}}}");
    Ok(())
}

/// Says how much of the earlier life's guest is in RAM and what random numbers a
/// guest gets, leaves a guest, and resets the machine.
pub fn life() -> ! {
    let found = found();
    let outcome = random().and_then(|[a, b, c]| {
        println!("@life {{\"found\":{found},\"random\":\"{a:016x}{b:016x}{c:016x}\"}}");
        plant()
    });
    if let Err(failure) = outcome {
        println!("@panic {{\"detail\":\"{failure}\"}}");
    }
    smc::call([smc::psci::SYSTEM_RESET, 0, 0, 0, 0, 0, 0, 0]);
    smc::power_off()
}

static BEATS: AtomicU64 = AtomicU64::new(0);

/// The host goes on on this CPU.
extern "C" fn beat(_: u64) -> u64 {
    loop {
        let end = cpu::now() + cpu::milliseconds(100);
        while cpu::now() < end {}
        println!("@beat {{\"n\":{}}}", BEATS.fetch_add(1, Ordering::Relaxed));
    }
}

/// A guest goes on on this CPU.
extern "C" fn run_on(vcpu: u64) -> u64 {
    let at = usize::try_from(vcpu).unwrap_or(0);
    // SAFETY: `spoil` lends it and never returns.
    let vcpu = unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Vcpu>(at) };
    while vcpu.run_once().is_ok() {}
    0
}

/// With the host on one CPU and a guest on another, makes the monitor panic.
fn spoil(vcpu: &mut Vcpu) -> Result<(), Failure> {
    cpu::start(1, beat, 0)?;
    cpu::start(2, run_on, (&raw mut *vcpu).expose_provenance() as u64)?;
    while BEATS.load(Ordering::Relaxed) < 5 {}
    let _ = smc::host(Function::TimerLoad, &[u64::MAX]);
    Err(Failure::new(format_args!("the monitor goes on")))
}

/// Breaks the monitor.
pub fn panic() -> ! {
    let secret = next(SEED);
    let result = Vm::launch(spin(), [secret; 4]).and_then(|(_, mut vcpu)| spoil(&mut vcpu));
    if let Err(failure) = result {
        println!("@panic {{\"detail\":\"{failure}\"}}");
    }
    smc::power_off()
}
