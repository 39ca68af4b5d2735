// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest: a few instructions of its own, loaded at the start of its RAM, entered with the MMU
//! off. It keeps known values in registers over exits and says which of them have changed.
//!
//! It talks through stores to a device that isn't there: `PHASE` gets the number of the coming
//! phase, `CHANGED` a mask of registers that don't hold what they should, `PWNED` a word if the
//! program counter was led astray; a load from `ANSWER` is the second kind of exit.

use std::arch::global_asm;

/// Where its RAM begins, and its code.
pub const RAM: u64 = 0x4000_0000;
/// The device.
pub const DEVICE: u64 = 0x0a00_0000;
/// A phase begins.
pub const PHASE: u64 = DEVICE;
/// A mask of changed registers.
pub const CHANGED: u64 = DEVICE + 8;
/// A load that the VMM answers.
pub const ANSWER: u64 = DEVICE + 0x10;
/// Only the code at [`pwned`] stores here.
pub const PWNED: u64 = DEVICE + 0x18;
/// What the load should get.
pub const ANSWER_VALUE: u32 = 0x600d_600d;

/// The values: x19 to x28 hold them, d8 to d15 the first eight, `TPIDR_EL1` and `TPIDR_EL0` the last two.
pub const SECRETS: [u64; 10] = [
    0x5ec0_0000_1111_a001,
    0x5ec0_0000_2222_a002,
    0x5ec0_0000_3333_a003,
    0x5ec0_0000_4444_a004,
    0x5ec0_0000_5555_a005,
    0x5ec0_0000_6666_a006,
    0x5ec0_0000_7777_a007,
    0x5ec0_0000_8888_a008,
    0x5ec0_0000_9999_a009,
    0x5ec0_0000_aaaa_a00a,
];

global_asm!(
    ".pushsection .rodata.havmsi_tiny, \"a\"",
    ".balign 16",
    ".global havmsi_tiny_start, havmsi_tiny_pwned, havmsi_tiny_end",
    "havmsi_tiny_start:",
    "mov x0, #(3 << 20)",
    "msr cpacr_el1, x0",
    "isb",
    "mov x1, #0x0a000000",
    "adr x2, 9f",
    "ldp x19, x20, [x2]",
    "ldp x21, x22, [x2, #16]",
    "ldp x23, x24, [x2, #32]",
    "ldp x25, x26, [x2, #48]",
    "ldp x27, x28, [x2, #64]",
    "fmov d8, x19",
    "fmov d9, x20",
    "fmov d10, x21",
    "fmov d11, x22",
    "fmov d12, x23",
    "fmov d13, x24",
    "fmov d14, x25",
    "fmov d15, x26",
    "msr tpidr_el1, x27",
    "msr tpidr_el0, x28",
    // Phase 1: an exit by a store.
    "mov w3, #1",
    "str w3, [x1]",
    "bl 5f",
    // Phase 2: an exit by a load, which must get what the VMM answers.
    "mov w3, #2",
    "str w3, [x1]",
    "ldr w5, [x1, #0x10]",
    "movz w6, #0x600d",
    "movk w6, #0x600d, lsl #16",
    "cmp w5, w6",
    "cset x7, ne",
    "bl 5f",
    // Phase 3: an exit by whatever interrupts the host.
    "mov w3, #3",
    "str w3, [x1]",
    "movz x8, #0x0400, lsl #16",
    "2: subs x8, x8, #1",
    "b.ne 2b",
    "bl 5f",
    "movz w0, #0x8400, lsl #16",
    "orr w0, w0, #8",
    "hvc #0",
    "3: b 3b",
    // Says which registers changed: bits 0..9 x19..x28, 10..17 d8..d15, 18 TPIDR_EL1,
    // 19 TPIDR_EL0, 20 the answer of phase 2.
    "5: mov x4, xzr",
    "adr x2, 9f",
    "ldr x9, [x2]",
    "cmp x19, x9", "cset x10, ne", "orr x4, x4, x10",
    "fmov x11, d8", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #10",
    "ldr x9, [x2, #8]",
    "cmp x20, x9", "cset x10, ne", "orr x4, x4, x10, lsl #1",
    "fmov x11, d9", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #11",
    "ldr x9, [x2, #16]",
    "cmp x21, x9", "cset x10, ne", "orr x4, x4, x10, lsl #2",
    "fmov x11, d10", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #12",
    "ldr x9, [x2, #24]",
    "cmp x22, x9", "cset x10, ne", "orr x4, x4, x10, lsl #3",
    "fmov x11, d11", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #13",
    "ldr x9, [x2, #32]",
    "cmp x23, x9", "cset x10, ne", "orr x4, x4, x10, lsl #4",
    "fmov x11, d12", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #14",
    "ldr x9, [x2, #40]",
    "cmp x24, x9", "cset x10, ne", "orr x4, x4, x10, lsl #5",
    "fmov x11, d13", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #15",
    "ldr x9, [x2, #48]",
    "cmp x25, x9", "cset x10, ne", "orr x4, x4, x10, lsl #6",
    "fmov x11, d14", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #16",
    "ldr x9, [x2, #56]",
    "cmp x26, x9", "cset x10, ne", "orr x4, x4, x10, lsl #7",
    "fmov x11, d15", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #17",
    "ldr x9, [x2, #64]",
    "cmp x27, x9", "cset x10, ne", "orr x4, x4, x10, lsl #8",
    "mrs x11, tpidr_el1", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #18",
    "ldr x9, [x2, #72]",
    "cmp x28, x9", "cset x10, ne", "orr x4, x4, x10, lsl #9",
    "mrs x11, tpidr_el0", "cmp x11, x9", "cset x10, ne", "orr x4, x4, x10, lsl #19",
    "orr x4, x4, x7, lsl #20",
    "str x4, [x1, #8]",
    "ret",
    // Nothing leads here. An aborted load may be stepped over on the way: hence the spare ones.
    "havmsi_tiny_pwned:",
    "nop",
    "nop",
    "mov x1, #0x0a000000",
    "mov w3, #0x66",
    "str w3, [x1, #0x18]",
    "6: b 6b",
    ".balign 8",
    "9: .quad {s0}, {s1}, {s2}, {s3}, {s4}, {s5}, {s6}, {s7}, {s8}, {s9}",
    "havmsi_tiny_end:",
    ".popsection",
    s0 = const SECRETS[0], s1 = const SECRETS[1], s2 = const SECRETS[2], s3 = const SECRETS[3],
    s4 = const SECRETS[4], s5 = const SECRETS[5], s6 = const SECRETS[6], s7 = const SECRETS[7],
    s8 = const SECRETS[8], s9 = const SECRETS[9],
);

unsafe extern "C" {
    static havmsi_tiny_start: u8;
    static havmsi_tiny_pwned: u8;
    static havmsi_tiny_end: u8;
}

/// The guest's code and data.
pub fn image() -> &'static [u8] {
    let start = &raw const havmsi_tiny_start;
    let end = &raw const havmsi_tiny_end;
    // SAFETY: the bytes between the two labels lie in one read-only section.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Where the program counter has no business to be.
pub fn pwned() -> u64 {
    let offset = (&raw const havmsi_tiny_pwned).addr() - (&raw const havmsi_tiny_start).addr();
    RAM + offset as u64
}
