// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of the monitor.

use core::arch::asm;

use havmsi_abi::{Error, Function, SUCCESS};

/// PSCI and SMCCC (Arm DEN 0022, DEN 0028).
pub mod psci {
    #![allow(missing_docs, reason = "names of the specification")]
    pub const SMCCC_VERSION: u64 = 0x8000_0000;
    pub const SMCCC_ARCH_FEATURES: u64 = 0x8000_0001;
    pub const VERSION: u64 = 0x8400_0000;
    pub const CPU_SUSPEND_64: u64 = 0xc400_0001;
    pub const CPU_OFF: u64 = 0x8400_0002;
    pub const CPU_ON_64: u64 = 0xc400_0003;
    pub const AFFINITY_INFO_64: u64 = 0xc400_0004;
    pub const MIGRATE_INFO_TYPE: u64 = 0x8400_0006;
    pub const SYSTEM_OFF: u64 = 0x8400_0008;
    pub const SYSTEM_RESET: u64 = 0x8400_0009;
    pub const FEATURES: u64 = 0x8400_000a;
    pub const TRNG_VERSION: u64 = 0x8400_0050;
    pub const TRNG_RND_64: u64 = 0xc400_0053;
    pub const NOT_SUPPORTED: u64 = (-1_i64).cast_unsigned();
    pub const INVALID_PARAMETERS: u64 = (-2_i64).cast_unsigned();
    pub const ALREADY_ON: u64 = (-4_i64).cast_unsigned();
    pub const INVALID_ADDRESS: u64 = (-9_i64).cast_unsigned();
}

/// A call with `x0` to `x7`, and what these hold afterwards.
pub fn call(x: [u64; 8]) -> [u64; 8] {
    let [mut x0, mut x1, mut x2, mut x3, mut x4, mut x5, mut x6, mut x7] = x;
    // SAFETY: the monitor changes no memory that a Rust object lies in: the
    // tests give it pages of their own. Registers are as SMCCC says.
    unsafe {
        asm!(
            "smc #0",
            inout("x0") x0, inout("x1") x1, inout("x2") x2, inout("x3") x3,
            inout("x4") x4, inout("x5") x5, inout("x6") x6, inout("x7") x7,
            lateout("x8") _, lateout("x9") _, lateout("x10") _, lateout("x11") _,
            lateout("x12") _, lateout("x13") _, lateout("x14") _, lateout("x15") _,
            lateout("x16") _, lateout("x17") _,
            options(nostack)
        );
    }
    [x0, x1, x2, x3, x4, x5, x6, x7]
}

unsafe extern "C" {
    fn smc_with_all(x: *mut u64);
}

/// A call with all of `x0` to `x30`, and what these hold afterwards.
pub fn call_with_all(x: &mut [u64; 31]) {
    // SAFETY: as `call`; the routine keeps the registers that Rust needs kept.
    unsafe { smc_with_all(x.as_mut_ptr()) }
}

/// Why a call was refused; `NoMemory` with the pages wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// As the interface names it.
    Error(Error),
    /// Table memory is short.
    Wanted(u64),
    /// A status that the interface does not know.
    Unknown(u64),
}

use Refusal::Error as E;

/// `INVALID`.
pub const INVALID: Refusal = E(Error::Invalid);
/// `DENIED`.
pub const DENIED: Refusal = E(Error::Denied);
/// `STATE`.
pub const STATE: Refusal = E(Error::State);
/// `BUSY`.
pub const BUSY: Refusal = E(Error::Busy);
/// `AGAIN`.
pub const AGAIN: Refusal = E(Error::Again);
/// `INTEGRITY`.
pub const INTEGRITY: Refusal = E(Error::Integrity);
/// `NOMEM` without a number of pages: no slot.
pub const NO_SLOT: Refusal = Refusal::Wanted(0);

/// A call of the host interface: `x1` on after it.
pub fn host(function: Function, args: &[u64]) -> Result<[u64; 4], Refusal> {
    let mut x = [0; 8];
    x[0] = u64::from(function.id());
    for (register, value) in x.iter_mut().skip(1).zip(args) {
        *register = *value;
    }
    let [status, r1, r2, r3, r4, ..] = call(x);
    check(status, r1)?;
    Ok([r1, r2, r3, r4])
}

/// The meaning of a status.
pub fn check(status: u64, x1: u64) -> Result<(), Refusal> {
    let status_signed = status.cast_signed();
    if status_signed == SUCCESS {
        return Ok(());
    }
    Err(match Error::ALL.iter().find(|e| e.code() == status_signed) {
        Some(Error::NoMemory) => Refusal::Wanted(x1),
        Some(error) => E(*error),
        None => Refusal::Unknown(status),
    })
}

/// Repeats a call while it says `AGAIN`; at most `limit` times.
pub fn until_done(function: Function, args: &[u64], limit: u64) -> Result<[u64; 4], Refusal> {
    for _ in 0..limit {
        match host(function, args) {
            Err(AGAIN) => {}
            other => return other,
        }
    }
    Err(AGAIN)
}

/// Turns the machine off.
pub fn power_off() -> ! {
    call([psci::SYSTEM_OFF, 0, 0, 0, 0, 0, 0, 0]);
    loop {
        crate::cpu::wait();
    }
}
