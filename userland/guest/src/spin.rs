// SPDX-License-Identifier: MIT OR Apache-2.0
//! Registers that hold known values while time passes, so that a change of any of them shows.

use havmsi_proto::Seed;
use std::arch::asm;

/// General registers that the spin loop fills: x2..x17 and x20..x28.
pub const GENERAL: usize = 25;
/// 64-bit halves of the FP/SIMD registers: all 32.
pub const HALVES: usize = 64;

/// Values in register order.
#[repr(C, align(16))]
#[derive(Clone, PartialEq, Eq)]
pub struct Registers {
    /// x2..x17, x20..x28.
    pub x: [u64; GENERAL + 1],
    /// v0..v31, low half first.
    pub v: [u64; HALVES],
}

impl Registers {
    /// What belongs into them: entry `i` of `x` is `seed.reg(i)`, of `v` `seed.fp(i)`.
    pub fn of(seed: Seed) -> Self {
        let mut r = Self { x: [0; GENERAL + 1], v: [0; HALVES] };
        for (value, i) in r.x.iter_mut().take(GENERAL).zip(0..) {
            *value = seed.reg(i);
        }
        for (value, i) in r.v.iter_mut().zip(0..) {
            *value = seed.fp(i);
        }
        r
    }

    /// Loads all of them, counts down from `count`, and returns what they hold then.
    pub fn spin(&self, count: u64) -> Self {
        let mut found = self.clone();
        // SAFETY: reads and writes only the two structures, whose layout (repr(C), 16-byte
        // aligned) the offsets below follow; every register that changes is declared.
        unsafe {
            asm!(
                "ldp x2, x3, [x0, #0]", "ldp x4, x5, [x0, #16]", "ldp x6, x7, [x0, #32]",
                "ldp x8, x9, [x0, #48]", "ldp x10, x11, [x0, #64]", "ldp x12, x13, [x0, #80]",
                "ldp x14, x15, [x0, #96]", "ldp x16, x17, [x0, #112]", "ldp x20, x21, [x0, #128]",
                "ldp x22, x23, [x0, #144]", "ldp x24, x25, [x0, #160]", "ldp x26, x27, [x0, #176]",
                "ldr x28, [x0, #192]", "add x0, x0, #208",
                "ldp q0, q1, [x0, #0]", "ldp q2, q3, [x0, #32]", "ldp q4, q5, [x0, #64]",
                "ldp q6, q7, [x0, #96]", "ldp q8, q9, [x0, #128]", "ldp q10, q11, [x0, #160]",
                "ldp q12, q13, [x0, #192]", "ldp q14, q15, [x0, #224]", "ldp q16, q17, [x0, #256]",
                "ldp q18, q19, [x0, #288]", "ldp q20, q21, [x0, #320]", "ldp q22, q23, [x0, #352]",
                "ldp q24, q25, [x0, #384]", "ldp q26, q27, [x0, #416]", "ldp q28, q29, [x0, #448]",
                "ldp q30, q31, [x0, #480]",
                "2: subs {n}, {n}, #1",
                "b.ne 2b",
                "stp x2, x3, [x1, #0]", "stp x4, x5, [x1, #16]", "stp x6, x7, [x1, #32]",
                "stp x8, x9, [x1, #48]", "stp x10, x11, [x1, #64]", "stp x12, x13, [x1, #80]",
                "stp x14, x15, [x1, #96]", "stp x16, x17, [x1, #112]", "stp x20, x21, [x1, #128]",
                "stp x22, x23, [x1, #144]", "stp x24, x25, [x1, #160]", "stp x26, x27, [x1, #176]",
                "str x28, [x1, #192]", "add x1, x1, #208",
                "stp q0, q1, [x1, #0]", "stp q2, q3, [x1, #32]", "stp q4, q5, [x1, #64]",
                "stp q6, q7, [x1, #96]", "stp q8, q9, [x1, #128]", "stp q10, q11, [x1, #160]",
                "stp q12, q13, [x1, #192]", "stp q14, q15, [x1, #224]", "stp q16, q17, [x1, #256]",
                "stp q18, q19, [x1, #288]", "stp q20, q21, [x1, #320]", "stp q22, q23, [x1, #352]",
                "stp q24, q25, [x1, #384]", "stp q26, q27, [x1, #416]", "stp q28, q29, [x1, #448]",
                "stp q30, q31, [x1, #480]",
                n = inout(reg) count.max(1) => _,
                inout("x0") &raw const *self => _,
                inout("x1") &raw mut found => _,
                out("x2") _, out("x3") _, out("x4") _, out("x5") _, out("x6") _, out("x7") _,
                out("x8") _, out("x9") _, out("x10") _, out("x11") _, out("x12") _, out("x13") _,
                out("x14") _, out("x15") _, out("x16") _, out("x17") _, out("x20") _,
                out("x21") _, out("x22") _, out("x23") _, out("x24") _, out("x25") _,
                out("x26") _, out("x27") _, out("x28") _,
                out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _,
                out("v6") _, out("v7") _, out("v8") _, out("v9") _, out("v10") _, out("v11") _,
                out("v12") _, out("v13") _, out("v14") _, out("v15") _, out("v16") _,
                out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
                out("v22") _, out("v23") _, out("v24") _, out("v25") _, out("v26") _,
                out("v27") _, out("v28") _, out("v29") _, out("v30") _, out("v31") _,
                options(nostack),
            );
        }
        found
    }
}

/// Some integer and floating-point work whose result depends on every step.
pub fn calculate(seed: Seed, steps: u32) -> (u64, u64) {
    let mut hash = seed.0[0];
    // A number in (0, 1) from the seed, then the logistic map: chaotic, so that an error grows.
    let mut x = f64::from(u32::try_from(seed.0[1] >> 33).unwrap_or(1)).mul_add(0.5, 1.0) / 2e9;
    for i in 0..steps {
        hash = havmsi_proto::stream::mix(hash ^ u64::from(i));
        x = 3.999 * x * (1.0 - x);
    }
    (hash, x.to_bits())
}
