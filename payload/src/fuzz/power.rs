// SPDX-License-Identifier: MIT OR Apache-2.0
//! A CPU turns itself off in the middle of its work; another one turns it on,
//! and it goes on where it was.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::MAX_CPUS;
use crate::smc::psci;
use crate::{gic, smc};

use super::{Cpu, call, touch, world};

// What CPU_OFF does not keep: x19 to x30, the stack pointer.
const SAVED: usize = 13;
static SAVE: [[AtomicU64; SAVED]; MAX_CPUS] =
    [const { [const { AtomicU64::new(0) }; SAVED] }; MAX_CPUS];
/// Whether the CPU is on its way off and back.
static AWAY: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

global_asm!(
    ".pushsection .text.fuzz, \"ax\"",
    // x0 = place for what is kept. Gives x0 of a call that was refused, or 1.
    ".global fuzz_power_off",
    "fuzz_power_off:",
    "stp x19, x20, [x0]",
    "stp x21, x22, [x0, #16]",
    "stp x23, x24, [x0, #32]",
    "stp x25, x26, [x0, #48]",
    "stp x27, x28, [x0, #64]",
    "stp x29, x30, [x0, #80]",
    "mov x1, sp",
    "str x1, [x0, #96]",
    "dsb sy",
    "movz x0, #0x0002",
    "movk x0, #0x8400, lsl #16",
    "smc #0",
    "ret",
    // From CPU_ON: x0 = that place.
    ".global fuzz_wake",
    ".balign 4",
    "fuzz_wake:",
    "mov x19, x0",
    "mrs x0, mpidr_el1",
    "and x0, x0, #0xff",
    "bl set_up",
    "mov x0, x19",
    "ldp x19, x20, [x0]",
    "ldp x21, x22, [x0, #16]",
    "ldp x23, x24, [x0, #32]",
    "ldp x25, x26, [x0, #48]",
    "ldp x27, x28, [x0, #64]",
    "ldp x29, x30, [x0, #80]",
    "ldr x1, [x0, #96]",
    "mov sp, x1",
    "mov x0, #1",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn fuzz_power_off(place: *mut u64) -> u64;
    fn fuzz_wake();
}

/// Turns the calling CPU off until another one turns it on.
pub fn off_and_on(cpu: &Cpu) -> u64 {
    AWAY[cpu.number].store(1, Ordering::SeqCst);
    // SAFETY: keeps what a function must keep, and comes back once.
    let result = unsafe { fuzz_power_off(SAVE[cpu.number][0].as_ptr()) };
    AWAY[cpu.number].store(0, Ordering::SeqCst);
    if result == 1 {
        gic::init_cpu();
        touch::open_fp();
    }
    world::count(cpu.number, psci::CPU_OFF, result);
    result
}

/// The arguments with which CPU `target` can be turned on whenever it is off.
pub fn wake_arguments(target: usize) -> [u64; 3] {
    let place = SAVE[target][0].as_ptr().expose_provenance() as u64;
    [target as u64, fuzz_wake as *const () as u64, place]
}

/// Turns a CPU on that is away and finds nobody else to do it.
pub fn wake_if_off(target: usize) {
    if AWAY[target].load(Ordering::SeqCst) == 0 {
        return;
    }
    let [affinity, entry, place] = wake_arguments(target);
    let [info, ..] = smc::call([psci::AFFINITY_INFO_64, affinity, 0, 0, 0, 0, 0, 0]);
    if info == 1 {
        call([psci::CPU_ON_64, affinity, entry, place, 0, 0, 0, 0]);
    }
}
