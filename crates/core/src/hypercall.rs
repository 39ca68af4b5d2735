// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest may call by HVC or SMC: PSCI 1.1 (Arm DEN 0022), SMCCC 1.2
//! discovery (DEN 0028), TRNG 1.0 (DEN 0098). The monitor answers all that it
//! can; the host gets only the PSCI calls that it must act on.

use crate::addr::low32;
use crate::launch::Boot;
use crate::psci::{self, Power};
use crate::vm::Vm;

/// Function identifiers: those of the host, and what it is not offered.
mod id {
    pub use crate::psci::id::*;
    pub const TRNG_VERSION: u32 = 0x8400_0050;
    pub const TRNG_FEATURES: u32 = 0x8400_0051;
    pub const TRNG_UUID: u32 = 0x8400_0052;
    pub const TRNG_RND: u32 = 0x8400_0053;
    pub const WIDE_TRNG_RND: u32 = TRNG_RND | SMC64;
}

const NOT_SUPPORTED: u64 = psci::Error::NotSupported.code();
const INVALID_PARAMETERS: u64 = psci::Error::InvalidParameters.code();
const TRNG_NO_ENTROPY: u64 = (-3_i64).cast_unsigned();
const TRNG_1_0: u64 = 1 << 16;

/// Decides about a call by vCPU `caller` with these `x0` to `x3`: what they are
/// afterwards, or `None` if the host acts on it and answers. `random` gives
/// random words, if there are any.
pub fn call(
    vm: &mut Vm,
    caller: u64,
    x: [u64; 4],
    random: impl FnOnce() -> Option<[u64; 4]>,
) -> Option<[u64; 4]> {
    let [function, a1, a2, a3] = x;
    let function = low32(function);
    let wide = function & id::SMC64 != 0;
    let argument = |a: u64| if wide { a } else { a & 0xffff_ffff };
    let answer = match (function & !id::SMC64, wide) {
        (id::AFFINITY_INFO, _) => affinity_info(vm, argument(a1), argument(a2)),
        (id::CPU_ON, _) => {
            let boot = Boot { pc: argument(a2), x: [argument(a3), 0, 0, 0] };
            match vm.cpu_on(caller, argument(a1) & psci::AFFINITY_MASK, boot) {
                Ok(()) => return None,
                Err(error) => error.code(),
            }
        }
        (id::CPU_OFF, false) => {
            vm.cpu_off(caller);
            return None;
        }
        (id::CPU_SUSPEND | id::SYSTEM_RESET2, _) => return None,
        (id::SYSTEM_OFF | id::SYSTEM_RESET, false) => return None,
        (id::FEATURES, false) if low32(a1) & !id::SMC64 == id::SYSTEM_RESET2 => 0,
        (id::TRNG_VERSION, false) => TRNG_1_0,
        (id::TRNG_FEATURES, false) => match low32(a1) {
            id::TRNG_VERSION..=id::TRNG_RND | id::WIDE_TRNG_RND => 0,
            _ => NOT_SUPPORTED,
        },
        (id::TRNG_UUID, false) => return Some(havmsi_abi::UID.map(u64::from)),
        (id::TRNG_RND, _) => {
            let (bits, most) = (argument(a1), if wide { 192 } else { 96 });
            if (1..=most).contains(&bits) {
                return Some(random_answer(random(), bits, wide));
            }
            INVALID_PARAMETERS
        }
        _ => psci::discovery(function, low32(a1)).unwrap_or(NOT_SUPPORTED),
    };
    Some([answer, 0, 0, 0])
}

/// The answer to a TRNG call: `bits` random bits out of `random`, the highest
/// word in `x1`; no entropy without a seed.
fn random_answer(random: Option<[u64; 4]>, bits: u64, wide: bool) -> [u64; 4] {
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

/// AFFINITY_INFO.
fn affinity_info(vm: &Vm, affinity: u64, level: u64) -> u64 {
    if level != 0 {
        return INVALID_PARAMETERS;
    }
    vm.power(affinity & psci::AFFINITY_MASK).map_or(INVALID_PARAMETERS, Power::info)
}

#[cfg(test)]
mod tests;
