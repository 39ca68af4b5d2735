// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interrupt controller as far as the tests need it: timers' interrupts
//! and one software-generated one, group 1.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::Function;

use crate::memory::{read32, write32};
use crate::{cpu, mrs, msr, smc};

const GICD: u64 = 0x0800_0000;
const GICC: u64 = 0x0801_0000;
const GICR: u64 = 0x080a_0000;
/// Bytes of a redistributor.
pub const GICR_STRIDE: u64 = 0x2_0000;
const GICR_SGI: u64 = 0x1_0000;

/// The physical timer's and the virtual timer's interrupt.
pub const PHYSICAL_TIMER: u32 = 30;
/// The virtual timer's interrupt.
pub const VIRTUAL_TIMER: u32 = 27;

static VERSION: AtomicU64 = AtomicU64::new(0);
/// The interrupt that was taken last, plus one.
pub static LAST: AtomicU64 = AtomicU64::new(0);

/// 2 or 3.
pub fn version() -> u64 {
    VERSION.load(Ordering::Relaxed)
}

/// RD_base of a CPU's redistributor.
pub const fn redistributor(cpu: u64) -> u64 {
    GICR + cpu * GICR_STRIDE
}

/// Distributor, and the first CPU's part.
pub fn init() {
    let version = smc::host(Function::CpuInfo, &[]).map_or(0, |r| r[1]);
    VERSION.store(version, Ordering::Relaxed);
    write32(GICD, if version == 3 { 0x13 } else { 1 });
    init_cpu();
}

/// A CPU's part.
pub fn init_cpu() {
    let enable = 1 << PHYSICAL_TIMER | 1 << VIRTUAL_TIMER | 1 << 1;
    if version() == 3 {
        let frame = redistributor(cpu::number() as u64) + GICR_SGI;
        write32(frame + 0x100, enable);
        msr!("S3_0_C4_C6_0", 0xff);
        msr!("S3_0_C12_C12_7", 1);
    } else {
        write32(GICD + 0x100, enable);
        write32(GICC + 4, 0xff);
        write32(GICC, 1);
    }
}

/// Takes the pending interrupt and ends it.
pub fn handle() {
    let id = if version() == 3 {
        let id = mrs!("S3_0_C12_C12_0");
        silence(id);
        msr!("S3_0_C12_C12_1", id);
        id
    } else {
        let id = read32(GICC + 0xc);
        silence(u64::from(id));
        write32(GICC + 0x10, id);
        u64::from(id)
    };
    LAST.store(id + 1, Ordering::Relaxed);
}

fn silence(id: u64) {
    match id {
        30 => msr!("cntp_ctl_el0", 0),
        27 => msr!("cntv_ctl_el0", 0),
        _ => {}
    }
}

/// Timers off.
pub fn quiet() {
    msr!("cntp_ctl_el0", 0);
    msr!("cntv_ctl_el0", 0);
}

/// The physical timer fires in so many milliseconds.
pub fn alarm(milliseconds: u64) {
    alarm_in(cpu::milliseconds(milliseconds));
}

/// The physical timer fires in so many ticks.
pub fn alarm_in(ticks: u64) {
    msr!("cntp_cval_el0", cpu::now() + ticks);
    msr!("cntp_ctl_el0", 1);
}

/// Whether the physical timer has fired.
pub fn alarm_fired() -> bool {
    mrs!("cntp_ctl_el0") & 0b101 == 0b101
}

/// Sends SGI 1 to CPU `target`.
pub fn send(target: u64) {
    if version() == 3 {
        msr!("S3_0_C12_C11_5", 1 << 24 | 1 << target);
    } else {
        write32(GICD + 0xf00, 1 << (16 + target) | 1 << 15 | 1);
    }
}

/// Lets an interrupt in, if one is pending.
pub fn take_pending() {
    // SAFETY: the handler saves all registers.
    unsafe {
        core::arch::asm!("msr daifclr, #2", "isb", "nop", "msr daifset, #2", options(nostack))
    }
}
