// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest may call by HVC or SMC: PSCI 1.1 (Arm DEN 0022), SMCCC 1.2
//! discovery (DEN 0028), TRNG 1.0 (DEN 0098), and what Linux has protected guests
//! call of KVM (Documentation/virt/kvm/arm/hypercalls.rst, one page a call). The
//! monitor answers all that it can; the host gets only the PSCI calls that it must
//! act on, and is asked before it loses a shared page.

use havmsi_abi::{Error, PAGE_SIZE};

use crate::addr::{Ipa, low32};
use crate::exit::{Answer, Pending};
use crate::launch::Boot;
use crate::psci::{self, Power};
use crate::vm::{Machine, Vm};

/// Function identifiers: those of the host, and what it is not offered.
mod id {
    pub use crate::psci::id::*;
    pub const TRNG_VERSION: u32 = 0x8400_0050;
    pub const TRNG_FEATURES: u32 = 0x8400_0051;
    pub const TRNG_UUID: u32 = 0x8400_0052;
    pub const TRNG_RND: u32 = 0x8400_0053;
    pub const WIDE_TRNG_RND: u32 = TRNG_RND | SMC64;
    pub const GUEST_KEY: u32 = havmsi_abi::GUEST_KEY_CALL & !SMC64;
    pub const KVM_UID: u32 = 0x8600_ff01;
    pub const KVM_FEATURES: u32 = 0x8600_0000;
    pub const HYP_MEMINFO: u32 = 0x8600_0002;
    pub const MEM_SHARE: u32 = 0x8600_0003;
    pub const MEM_UNSHARE: u32 = 0x8600_0004;
    pub const MMIO_GUARD: u32 = 0x8600_0007;
}

/// Who answers KVM's calls.
const KVM_UID: [u64; 4] = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];
/// Which of KVM's calls there are, a bit each.
const KVM_FEATURES: u64 = 1 << 7 | 1 << 4 | 1 << 3 | 1 << 2 | 1;

const NOT_SUPPORTED: u64 = psci::Error::NotSupported.code();
const INVALID_PARAMETERS: u64 = psci::Error::InvalidParameters.code();
/// The same of SMCCC.
const INVALID_PARAMETER: u64 = (-3_i64).cast_unsigned();
const TRNG_NO_ENTROPY: u64 = (-3_i64).cast_unsigned();
const TRNG_1_0: u64 = 1 << 16;

/// Decides about a call by vCPU `caller` with these `x0` to `x3`: what they are
/// afterwards. `random` gives random words, if there are any.
///
/// # Errors
/// The host has to do something first, see [`crate::exit::call`]; it may answer this.
/// Without an answer the call is made again.
pub fn call(
    m: &impl Machine,
    vm: &mut Vm,
    caller: u64,
    x: [u64; 4],
    random: impl FnOnce() -> Option<[u64; 4]>,
) -> Result<[u64; 4], Pending> {
    let [function, a1, a2, a3] = x;
    let function = low32(function);
    let wide = function & id::SMC64 != 0;
    let argument = |a: u64| if wide { a } else { a & 0xffff_ffff };
    let host = Err(Pending::Hypercall);
    left_out!(UnshareAsked => if function == id::MEM_UNSHARE | id::SMC64 {
        return Ok([smccc(vm.unshare(m, Ipa(a1))), 0, 0, 0]);
    });
    let answer = match (function & !id::SMC64, wide) {
        (id::AFFINITY_INFO, _) => affinity_info(vm, argument(a1), argument(a2)),
        (id::CPU_ON, _) => {
            let boot = Boot { pc: argument(a2), x: [argument(a3), 0, 0, 0] };
            match vm.cpu_on(caller, argument(a1) & psci::AFFINITY_MASK, boot) {
                Ok(()) => return host,
                Err(error) => error.code(),
            }
        }
        (id::CPU_OFF, false) => {
            vm.cpu_off(caller);
            return host;
        }
        (id::CPU_SUSPEND | id::SYSTEM_RESET2, _) | (id::SYSTEM_OFF | id::SYSTEM_RESET, false) => {
            return host;
        }
        (id::FEATURES, false) if low32(a1) & !id::SMC64 == id::SYSTEM_RESET2 => 0,
        (id::TRNG_VERSION, false) => TRNG_1_0,
        (id::TRNG_FEATURES, false) => match low32(a1) {
            id::TRNG_VERSION..=id::TRNG_RND | id::WIDE_TRNG_RND => 0,
            _ => NOT_SUPPORTED,
        },
        (id::TRNG_UUID, false) => return Ok(havmsi_abi::UID.map(u64::from)),
        (id::TRNG_RND, _) => {
            let (bits, most) = (argument(a1), if wide { 192 } else { 96 });
            if (1..=most).contains(&bits) {
                return Ok(random_answer(random(), bits, wide));
            }
            INVALID_PARAMETERS
        }
        (id::GUEST_KEY, true) => match vm.key(m, a1) {
            Some([low, high]) => return Ok([0, low, high, 0]),
            None => NOT_SUPPORTED,
        },
        (id::KVM_UID, false) => return Ok(KVM_UID),
        (id::KVM_FEATURES, false) => KVM_FEATURES,
        (id::HYP_MEMINFO, true) if a1 | a2 | a3 == 0 => PAGE_SIZE,
        (id::MEM_SHARE, true) if a2 | a3 == 0 => match vm.share(m, Ipa(a1)) {
            Err(Error::Again) => return Err(Pending::Nothing),
            result => smccc(result),
        },
        (id::MEM_UNSHARE, true) if a2 | a3 == 0 => return host,
        (id::MMIO_GUARD, true) if a2 | a3 == 0 => smccc(vm.guard(Ipa(a1))),
        (id::HYP_MEMINFO..=id::MEM_UNSHARE | id::MMIO_GUARD, true) => INVALID_PARAMETER,
        _ => psci::discovery(function, low32(a1)).unwrap_or(NOT_SUPPORTED),
    };
    Ok([answer, 0, 0, 0])
}

/// The host answers the call that `caller` made with these `x0` and `x1`, or does
/// not: what becomes of that. A page is unshared if the host agrees.
pub fn answered(m: &impl Machine, vm: &mut Vm, caller: u64, x: [u64; 2], answer: &mut Answer) {
    let Answer::Results(results) = answer else { return vm.cpu_on_answered(caller, 0) };
    vm.cpu_on_answered(caller, results[0]);
    if low32(x[0]) == id::MEM_UNSHARE | id::SMC64 && results[0] == 0 {
        match vm.unshare(m, Ipa(x[1])) {
            // The host took the page away meanwhile: the guest calls again.
            Err(Error::Again) => *answer = Answer::Nothing,
            result => results[0] = smccc(result),
        }
    }
}

/// What a call of KVM's answers.
fn smccc(result: Result<(), Error>) -> u64 {
    result.map_or(INVALID_PARAMETER, |()| 0)
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
