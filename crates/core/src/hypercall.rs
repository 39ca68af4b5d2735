// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest may call by HVC or SMC: PSCI 1.1 (Arm DEN 0022), SMCCC 1.2
//! discovery (DEN 0028), TRNG 1.0 (DEN 0098). The monitor answers all that it
//! can; the host gets only the PSCI calls that it must act on.

use crate::addr::low32;
use crate::launch::Boot;
use crate::psci;
use crate::vm::{Power, Vm};

/// Function identifiers: those of the host, and what it is not offered.
mod id {
    pub use crate::psci::id::*;
    pub const TRNG_VERSION: u32 = 0x8400_0050;
    pub const TRNG_FEATURES: u32 = 0x8400_0051;
    pub const TRNG_UUID: u32 = 0x8400_0052;
    pub const TRNG_RND: u32 = 0x8400_0053;
    pub const WIDE_CPU_SUSPEND: u32 = CPU_SUSPEND | SMC64;
    pub const WIDE_CPU_ON: u32 = CPU_ON | SMC64;
    pub const WIDE_AFFINITY_INFO: u32 = AFFINITY_INFO | SMC64;
    pub const WIDE_SYSTEM_RESET2: u32 = SYSTEM_RESET2 | SMC64;
    pub const WIDE_TRNG_RND: u32 = TRNG_RND | SMC64;
}

const NOT_SUPPORTED: u64 = psci::Error::NotSupported.code();
const INVALID_PARAMETERS: u64 = psci::Error::InvalidParameters.code();
const TRNG_NO_ENTROPY: u64 = (-3_i64).cast_unsigned();
const TRNG_1_0: u64 = 1 << 16;

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
    let function = low32(function);
    let wide = function & id::SMC64 != 0;
    let argument = |a: u64| if wide { a } else { a & 0xffff_ffff };
    match function {
        id::SMCCC_VERSION => answer(psci::SMCCC_VERSION),
        id::SMCCC_ARCH_FEATURES => answer(psci::arch_features(low32(a1)).unwrap_or(NOT_SUPPORTED)),
        id::VERSION => answer(psci::VERSION),
        id::FEATURES => answer(match low32(a1) {
            id::SYSTEM_RESET2 | id::WIDE_SYSTEM_RESET2 => 0,
            function => psci::features(function).unwrap_or(NOT_SUPPORTED),
        }),
        id::MIGRATE_INFO_TYPE => answer(psci::MIGRATION_NOT_REQUIRED),
        id::AFFINITY_INFO | id::WIDE_AFFINITY_INFO => {
            answer(affinity_info(vm, argument(a1), argument(a2)))
        }
        id::CPU_ON | id::WIDE_CPU_ON => {
            let boot = Boot { pc: argument(a2), x: [argument(a3), 0, 0, 0] };
            match vm.cpu_on(caller, argument(a1) & psci::AFFINITY_MASK, boot) {
                Ok(()) => Reply::Forward,
                Err(Some(Power::On)) => answer(psci::Error::AlreadyOn.code()),
                Err(Some(_)) => answer(psci::Error::OnPending.code()),
                Err(None) => answer(INVALID_PARAMETERS),
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
        id::TRNG_FEATURES => answer(match low32(a1) {
            id::TRNG_VERSION
            | id::TRNG_FEATURES
            | id::TRNG_UUID
            | id::TRNG_RND
            | id::WIDE_TRNG_RND => 0,
            _ => NOT_SUPPORTED,
        }),
        id::TRNG_UUID => Reply::Answer(havmsi_abi::UID.map(u64::from)),
        id::TRNG_RND | id::WIDE_TRNG_RND => {
            let (bits, most) = (argument(a1), if wide { 192 } else { 96 });
            if bits == 0 || bits > most {
                answer(INVALID_PARAMETERS)
            } else {
                Reply::Random { bits, wide }
            }
        }
        _ => answer(NOT_SUPPORTED),
    }
}

/// The answer to a TRNG call: `bits` random bits out of `random`, the highest
/// word in `x1`; no entropy without a seed.
#[must_use]
pub fn random_answer(random: Option<[u64; 4]>, bits: u64, wide: bool) -> [u64; 4] {
    let Some([r0, r1, r2, _]) = random else {
        return [TRNG_NO_ENTROPY, 0, 0, 0];
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

/// AFFINITY_INFO: 0 on, 1 off, 2 being turned on.
fn affinity_info(vm: &Vm, affinity: u64, level: u64) -> u64 {
    if level != 0 {
        return INVALID_PARAMETERS;
    }
    match vm.power(affinity & psci::AFFINITY_MASK) {
        Some(Power::On) => 0,
        Some(Power::Off) => 1,
        Some(Power::Pending(_)) => 2,
        None => INVALID_PARAMETERS,
    }
}

#[cfg(test)]
mod tests;
