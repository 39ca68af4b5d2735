// SPDX-License-Identifier: MIT OR Apache-2.0
//! All VMs and what they share.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::layout::carveout;
use havmsi_abi::{Error, MAX_VCPUS, MAX_VMS, PAGE_SIZE};
use havmsi_core::addr::Pa;
use havmsi_core::drbg::Drbg;
use havmsi_core::page::VmSlot;
use havmsi_core::vm::{Vm, handle_slot};
use spin::mutex::SpinMutex;

use crate::host;

static VMS: [SpinMutex<Vm>; MAX_VMS] = [const { SpinMutex::new(Vm::FREE) }; MAX_VMS];

/// Which contexts are taken, a bit each.
static CONTEXTS: [AtomicU64; MAX_VCPUS / 64] = [const { AtomicU64::new(0) }; MAX_VCPUS / 64];

static RANDOM: SpinMutex<Drbg> = SpinMutex::new(Drbg::new());

/// Feeds the generator with the platform's seed, once, at boot.
pub fn seed(seed: &[u8]) {
    RANDOM.lock().seed(seed);
}

/// Random words for a guest; `None` without a seed.
pub fn random() -> Option<[u64; 4]> {
    RANDOM.lock().random()
}

/// The slot of the VM that `handle` may name. Whether it does is for
/// `Vm::check_handle`, under the lock.
pub fn by_handle(handle: u64) -> Result<(VmSlot, &'static SpinMutex<Vm>), Error> {
    let slot = handle_slot(handle).ok_or(Error::Invalid)?;
    Ok((slot, VMS.get(usize::from(slot.0)).ok_or(Error::Invalid)?))
}

/// All slots.
pub fn all() -> impl Iterator<Item = (VmSlot, &'static SpinMutex<Vm>)> {
    (0..).map(VmSlot).zip(&VMS)
}

/// The root tables of the VM in `slot`, in the carve-out.
pub fn root(slot: VmSlot) -> Pa {
    let base = Pa(host::world().facts.ram.banks()[0].base);
    base.offset(carveout::VM_ROOTS + u64::from(slot.0) * 2 * PAGE_SIZE)
}

/// Takes a free vCPU context.
pub fn take_context() -> Option<u16> {
    for (word, bits) in (0u16..).zip(&CONTEXTS) {
        // Sets the lowest bit that is 0.
        let take = |old: u64| (old != u64::MAX).then(|| old | (old + 1));
        if let Ok(old) = bits.fetch_update(Ordering::Acquire, Ordering::Relaxed, take) {
            return Some(word * 64 + u16::try_from(old.trailing_ones()).ok()?);
        }
    }
    havmsi_core::left_out!(Contexts => return Some(0));
    None
}

/// Which contexts are taken.
#[cfg(feature = "audit")]
pub fn contexts() -> [u64; MAX_VCPUS / 64] {
    CONTEXTS.each_ref().map(|bits| bits.load(Ordering::Acquire))
}

/// Gives a context back.
pub fn free_context(context: u16) {
    if let Some(bits) = CONTEXTS.get(usize::from(context / 64)) {
        bits.fetch_and(!(1 << (context % 64)), Ordering::Release);
    }
}
