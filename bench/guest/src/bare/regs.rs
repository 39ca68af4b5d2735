// SPDX-License-Identifier: MIT OR Apache-2.0
//! Registers, instructions and memory.

use core::arch::asm;

/// The virtual counter.
#[inline(always)]
pub fn counter() -> u64 {
    let value;
    // SAFETY: a read.
    unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack)) };
    value
}

/// HVC.
#[inline(always)]
pub fn call(mut x: [u64; 4]) -> u64 {
    // SAFETY: calls that nothing of ours depends on but their results.
    unsafe {
        asm!(
            "hvc #0",
            inout("x0") x[0], inout("x1") x[1], inout("x2") x[2], inout("x3") x[3],
            clobber_abi("C"),
            options(nostack),
        );
    }
    x[0]
}

/// A store of 64 bits.
#[inline(always)]
pub fn store(address: u64, value: u64) {
    // SAFETY: memory that nothing of ours lies in, or a device; one register, so that it can be emulated.
    unsafe { asm!("str {}, [{}]", in(reg) value, in(reg) address, options(nostack)) };
}

/// A load of 32 bits.
#[inline(always)]
pub fn load_32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: a device; one register, so that it can be emulated.
    unsafe { asm!("ldr {:w}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

/// A store of 32 bits.
#[inline(always)]
pub fn store_32(address: u64, value: u32) {
    // SAFETY: as `load_32`.
    unsafe { asm!("str {:w}, [{}]", in(reg) value, in(reg) address, options(nostack)) };
}

/// `ID_AA64PFR0_EL1`.
#[inline(always)]
pub fn id_aa64pfr0() -> u64 {
    let value;
    // SAFETY: a read.
    unsafe { asm!("mrs {}, id_aa64pfr0_el1", out(reg) value, options(nostack)) };
    value
}

/// Lets interrupts come.
#[inline(always)]
pub fn unmask() {
    // SAFETY: the vectors are set.
    unsafe { asm!("msr daifclr, #2", "isb", options(nostack)) };
}

/// Holds interrupts off.
#[inline(always)]
pub fn mask() {
    // SAFETY: no more than that.
    unsafe { asm!("msr daifset, #2", options(nostack)) };
}

/// Waits for an interrupt.
#[inline(always)]
pub fn wait() {
    // SAFETY: returns at once if an interrupt is pending, masked or not.
    unsafe { asm!("wfi", options(nostack)) };
}

/// Lets another CPU of the emulated machine go on.
#[inline(always)]
pub fn pause() {
    // SAFETY: a hint.
    unsafe { asm!("yield", options(nostack)) };
}

/// The virtual timer's interrupt comes now.
#[inline(always)]
pub fn start_timer() {
    // SAFETY: its interrupt is handled.
    unsafe {
        asm!(
            "mrs {0}, cntvct_el0",
            "msr cntv_cval_el0, {0}",
            "msr cntv_ctl_el0, {1}",
            "isb",
            out(reg) _, in(reg) 1_u64, options(nostack),
        );
    }
}

/// It comes no more.
#[inline(always)]
pub fn stop_timer() {
    // SAFETY: no more than that.
    unsafe { asm!("msr cntv_ctl_el0, xzr", "isb", options(nostack)) };
}
