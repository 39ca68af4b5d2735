// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest may call by HVC or SMC: PSCI 1.1 (Arm DEN 0022), SMCCC 1.2
//! discovery (DEN 0028), TRNG 1.0 (DEN 0098). The monitor answers all that it
//! can; the host gets only the PSCI calls that it must act on.

use crate::launch::Boot;
use crate::vm::{Power, Vm};

/// Function identifiers, 32-bit convention; bit 30 makes the 64-bit one.
mod id {
    pub const WIDE: u32 = 1 << 30;
    pub const SMCCC_VERSION: u32 = 0x8000_0000;
    pub const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
    pub const PSCI_VERSION: u32 = 0x8400_0000;
    pub const CPU_SUSPEND: u32 = 0x8400_0001;
    pub const CPU_OFF: u32 = 0x8400_0002;
    pub const CPU_ON: u32 = 0x8400_0003;
    pub const AFFINITY_INFO: u32 = 0x8400_0004;
    pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
    pub const PSCI_FEATURES: u32 = 0x8400_000a;
    pub const SYSTEM_RESET2: u32 = 0x8400_0012;
    pub const TRNG_VERSION: u32 = 0x8400_0050;
    pub const TRNG_FEATURES: u32 = 0x8400_0051;
    pub const TRNG_UUID: u32 = 0x8400_0052;
    pub const TRNG_RND: u32 = 0x8400_0053;
    pub const WIDE_CPU_SUSPEND: u32 = CPU_SUSPEND | WIDE;
    pub const WIDE_CPU_ON: u32 = CPU_ON | WIDE;
    pub const WIDE_AFFINITY_INFO: u32 = AFFINITY_INFO | WIDE;
    pub const WIDE_SYSTEM_RESET2: u32 = SYSTEM_RESET2 | WIDE;
    pub const WIDE_TRNG_RND: u32 = TRNG_RND | WIDE;
}

/// Negative results, as the 64-bit register holds them.
mod result {
    pub const NOT_SUPPORTED: u64 = (-1_i64).cast_unsigned();
    pub const INVALID_PARAMETERS: u64 = (-2_i64).cast_unsigned();
    pub const ALREADY_ON: u64 = (-4_i64).cast_unsigned();
    pub const ON_PENDING: u64 = (-5_i64).cast_unsigned();
    pub const TRNG_INVALID: u64 = (-2_i64).cast_unsigned();
    pub const TRNG_NO_ENTROPY: u64 = (-3_i64).cast_unsigned();
}

const PSCI_1_1: u64 = 1 << 16 | 1;
const SMCCC_1_2: u64 = 1 << 16 | 2;
const TRNG_1_0: u64 = 1 << 16;
const MIGRATION_NOT_REQUIRED: u64 = 2;
const AFFINITY_ON: u64 = 0;
const AFFINITY_OFF: u64 = 1;
const AFFINITY_ON_PENDING: u64 = 2;
/// `Aff3:Aff2:Aff1:Aff0` of an MPIDR.
const AFFINITY_MASK: u64 = 0xff_00ff_ffff;

/// What becomes of a hypercall.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    /// The guest's `x0` to `x3`.
    Answer([u64; 4]),
    /// The host acts on it and answers.
    Forward,
    /// Random bits, in words of 32 bits or 64.
    Random {
        /// How many; at most three words.
        bits: u64,
        /// Words of 64 bits.
        wide: bool,
    },
}

const fn answer(x0: u64) -> Reply {
    Reply::Answer([x0, 0, 0, 0])
}

/// Decides about a call by vCPU `caller` with these `x0` to `x3`.
pub fn call(vm: &mut Vm, caller: u64, x: [u64; 4]) -> Reply {
    let [function, a1, a2, a3] = x;
    let Ok(function) = u32::try_from(function & 0xffff_ffff) else {
        return answer(result::NOT_SUPPORTED);
    };
    let wide = function & id::WIDE != 0;
    let argument = |a: u64| if wide { a } else { a & 0xffff_ffff };
    match function {
        id::SMCCC_VERSION => answer(SMCCC_1_2),
        id::SMCCC_ARCH_FEATURES => answer(match u32::try_from(a1 & 0xffff_ffff) {
            Ok(id::SMCCC_VERSION | id::SMCCC_ARCH_FEATURES) => 0,
            _ => result::NOT_SUPPORTED,
        }),
        id::PSCI_VERSION => answer(PSCI_1_1),
        id::PSCI_FEATURES => answer(features(a1)),
        id::MIGRATE_INFO_TYPE => answer(MIGRATION_NOT_REQUIRED),
        id::AFFINITY_INFO | id::WIDE_AFFINITY_INFO => {
            answer(affinity_info(vm, argument(a1), argument(a2)))
        }
        id::CPU_ON | id::WIDE_CPU_ON => {
            let boot = Boot { pc: argument(a2), x: [argument(a3), 0, 0, 0] };
            match vm.cpu_on(caller, argument(a1) & AFFINITY_MASK, boot) {
                Ok(()) => Reply::Forward,
                Err(Some(Power::On)) => answer(result::ALREADY_ON),
                Err(Some(_)) => answer(result::ON_PENDING),
                Err(None) => answer(result::INVALID_PARAMETERS),
            }
        }
        id::CPU_OFF => {
            vm.cpu_off(caller);
            Reply::Forward
        }
        id::CPU_SUSPEND
        | id::WIDE_CPU_SUSPEND
        | id::SYSTEM_OFF
        | id::SYSTEM_RESET
        | id::SYSTEM_RESET2
        | id::WIDE_SYSTEM_RESET2 => Reply::Forward,
        id::TRNG_VERSION => answer(TRNG_1_0),
        id::TRNG_FEATURES => answer(match u32::try_from(a1 & 0xffff_ffff) {
            Ok(
                id::TRNG_VERSION
                | id::TRNG_FEATURES
                | id::TRNG_UUID
                | id::TRNG_RND
                | id::WIDE_TRNG_RND,
            ) => 0,
            _ => result::NOT_SUPPORTED,
        }),
        id::TRNG_UUID => Reply::Answer(havmsi_abi::UID.map(u64::from)),
        id::TRNG_RND | id::WIDE_TRNG_RND => {
            let (bits, most) = (argument(a1), if wide { 192 } else { 96 });
            if bits == 0 || bits > most {
                answer(result::TRNG_INVALID)
            } else {
                Reply::Random { bits, wide }
            }
        }
        _ => answer(result::NOT_SUPPORTED),
    }
}

/// The answer to a TRNG call: `bits` random bits out of `random`, the highest
/// word in `x1`; no entropy without a seed.
#[must_use]
pub fn random_answer(random: Option<[u64; 4]>, bits: u64, wide: bool) -> [u64; 4] {
    let Some([r0, r1, r2, _]) = random else {
        return [result::TRNG_NO_ENTROPY, 0, 0, 0];
    };
    let (word, ones) = if wide { (64, u64::MAX) } else { (32, 0xffff_ffff) };
    // Bits wanted of the word that starts at bit `from`.
    let part = |value: u64, from: u64| match bits.saturating_sub(from) {
        0 => 0,
        n if n >= word => value & ones,
        n => value & ((1 << n) - 1),
    };
    [0, part(r0, 2 * word), part(r1, word), part(r2, 0)]
}

fn features(function: u64) -> u64 {
    match u32::try_from(function & 0xffff_ffff) {
        Ok(
            id::PSCI_VERSION
            | id::CPU_SUSPEND
            | id::WIDE_CPU_SUSPEND
            | id::CPU_OFF
            | id::CPU_ON
            | id::WIDE_CPU_ON
            | id::AFFINITY_INFO
            | id::WIDE_AFFINITY_INFO
            | id::MIGRATE_INFO_TYPE
            | id::SYSTEM_OFF
            | id::SYSTEM_RESET
            | id::PSCI_FEATURES
            | id::SYSTEM_RESET2
            | id::WIDE_SYSTEM_RESET2
            | id::SMCCC_VERSION,
        ) => 0,
        _ => result::NOT_SUPPORTED,
    }
}

fn affinity_info(vm: &Vm, affinity: u64, level: u64) -> u64 {
    if level != 0 {
        return result::INVALID_PARAMETERS;
    }
    match vm.power(affinity & AFFINITY_MASK) {
        Some(Power::On) => AFFINITY_ON,
        Some(Power::Off) => AFFINITY_OFF,
        Some(Power::Pending(_)) => AFFINITY_ON_PENDING,
        None => result::INVALID_PARAMETERS,
    }
}

#[cfg(test)]
mod tests;
