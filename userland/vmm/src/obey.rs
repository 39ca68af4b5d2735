// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that does what it is told: it asks for an order by loads from a device that isn't there,
//! carries it out and stores the result there. It runs with the MMU off, from the start of its RAM.

use std::arch::global_asm;

use crate::tiny::{DEVICE, RAM};

/// The order is loaded from here: a number and two operands.
pub const ORDER: [u64; 3] = [DEVICE + 0x40, DEVICE + 0x48, DEVICE + 0x50];
/// Where the result is stored.
pub const RESULT: u64 = DEVICE + 0x58;
/// Where `ESR_EL1` is stored when the guest takes an exception.
pub const FAULT: u64 = DEVICE + 0x60;
/// Only the code at [`hostile`] stores here.
pub const HOSTILE: u64 = DEVICE + 0x68;

/// Numbers of orders.
pub mod order {
    /// Load a word.
    pub const READ: u64 = 1;
    /// Store a word.
    pub const WRITE: u64 = 2;
    /// Read the virtual counter.
    pub const TIME: u64 = 3;
    /// Count down from a number.
    pub const SPIN: u64 = 4;
    /// Call the function at an address.
    pub const CALL: u64 = 5;
    /// Store 32 bits.
    pub const WRITE_32: u64 = 6;
    /// Open the CPU interface to interrupts of group 1.
    pub const LISTEN: u64 = 7;
    /// Acknowledge an interrupt: its number, 1023 for none.
    pub const ACKNOWLEDGE: u64 = 8;
    /// A hypercall with one argument.
    pub const HVC: u64 = 9;
}

/// What the function at [`function`] returns.
pub const FUNCTION_VALUE: u64 = 0x11;
/// The instructions `mov x5, #0x66; ret`: another function.
pub const OTHER_FUNCTION: u64 = 0xd65f_03c0_d280_0cc5;

global_asm!(
    ".pushsection .rodata.havmsi_obey, \"a\"",
    ".balign 2048",
    ".global havmsi_obey_start, havmsi_obey_function, havmsi_obey_hostile, havmsi_obey_end",
    "havmsi_obey_start:",
    "mov x1, #0x0a000000",
    "adr x2, 8f",
    "msr vbar_el1, x2",
    "isb",
    "1: ldr x2, [x1, #0x40]",
    "ldr x3, [x1, #0x48]",
    "ldr x4, [x1, #0x50]",
    "cbz x2, 6f",
    "cmp x2, #1",
    "b.eq 2f",
    "cmp x2, #2",
    "b.eq 3f",
    "cmp x2, #3",
    "b.eq 4f",
    "cmp x2, #4",
    "b.eq 5f",
    "cmp x2, #6",
    "b.eq 10f",
    "cmp x2, #7",
    "b.eq 11f",
    "cmp x2, #8",
    "b.eq 12f",
    "cmp x2, #9",
    "b.eq 13f",
    "ic iallu",
    "dsb sy",
    "isb",
    "blr x3",
    "b 7f",
    "2: ldr x5, [x3]",
    "b 7f",
    "3: str x4, [x3]",
    "mov x5, x4",
    "b 7f",
    "4: isb",
    "mrs x5, cntvct_el0",
    "b 7f",
    "5: subs x3, x3, #1",
    "b.ne 5b",
    "mov x5, xzr",
    "b 7f",
    "10: str w4, [x3]",
    "mov x5, x4",
    "b 7f",
    // ICC_PMR_EL1, ICC_IGRPEN1_EL1.
    "11: mov x5, #0xff",
    "msr S3_0_C4_C6_0, x5",
    "mov x5, #1",
    "msr S3_0_C12_C12_7, x5",
    "isb",
    "b 7f",
    // ICC_IAR1_EL1.
    "12: mrs x5, S3_0_C12_C12_0",
    "dsb sy",
    "b 7f",
    "13: mov x0, x3",
    "mov x1, x4",
    "mov x2, xzr",
    "mov x3, xzr",
    "hvc #0",
    "mov x1, #0x0a000000",
    "mov x5, x0",
    "b 7f",
    "6: movz w0, #0x8400, lsl #16",
    "orr w0, w0, #8",
    "hvc #0",
    "7: str x5, [x1, #0x58]",
    "b 1b",
    // Where nobody sends a vCPU but a hostile host.
    "havmsi_obey_hostile:",
    "mov x1, #0x0a000000",
    "mov x5, #0x66",
    "str x5, [x1, #0x68]",
    "9: b 9b",
    // Every exception: its syndrome, then the next order.
    ".balign 2048",
    "8: .rept 16",
    "mov x1, #0x0a000000",
    "mrs x5, esr_el1",
    "str x5, [x1, #0x60]",
    "b 1b",
    ".balign 128",
    ".endr",
    ".balign 4096",
    "havmsi_obey_function:",
    "mov x5, #0x11",
    "ret",
    "havmsi_obey_end:",
    ".popsection",
);

unsafe extern "C" {
    static havmsi_obey_start: u8;
    static havmsi_obey_function: u8;
    static havmsi_obey_hostile: u8;
    static havmsi_obey_end: u8;
}

fn offset(of: *const u8) -> u64 {
    (of.addr() - (&raw const havmsi_obey_start).addr()) as u64
}

/// The guest's code.
pub fn image() -> &'static [u8] {
    let start = &raw const havmsi_obey_start;
    let end = &raw const havmsi_obey_end;
    // SAFETY: the bytes between the two labels lie in one read-only section.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// A function on a page of its own, part of the launch image.
pub fn function() -> u64 {
    RAM + offset(&raw const havmsi_obey_function)
}

/// An entry point that is not the guest's choice.
pub fn hostile() -> u64 {
    RAM + offset(&raw const havmsi_obey_hostile)
}
