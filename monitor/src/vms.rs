// SPDX-License-Identifier: MIT OR Apache-2.0
//! All VMs and what they share.

use core::sync::atomic::{AtomicBool, Ordering};

use havmsi_abi::layout::carveout;
use havmsi_abi::{Error, MAX_VCPUS, MAX_VMS, PAGE_SIZE};
use havmsi_core::addr::Pa;
use havmsi_core::drbg::Drbg;
use havmsi_core::page::VmSlot;
use havmsi_core::vm::{Vm, handle_slot};
use spin::mutex::SpinMutex;

use crate::host;

static VMS: [SpinMutex<Vm>; MAX_VMS] = [const { SpinMutex::new(Vm::FREE) }; MAX_VMS];

/// Which vCPU contexts are taken.
static TAKEN: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(false) }; MAX_VCPUS];

/// The random numbers of all guests; fed once, at boot.
pub static RANDOM: SpinMutex<Drbg> = SpinMutex::new(Drbg::NEW);

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
    let free = TAKEN.iter().position(|taken| !taken.swap(true, Ordering::Acquire));
    #[cfg(feature = "leave-out")]
    let free = free.or(havmsi_core::left_out!(Contexts).then_some(0));
    u16::try_from(free?).ok()
}

/// Which contexts are taken, a bit each.
#[cfg(feature = "audit")]
pub fn contexts() -> [u64; MAX_VCPUS / 64] {
    let bit = |context: usize| u64::from(TAKEN[context].load(Ordering::Acquire)) << (context % 64);
    core::array::from_fn(|word| (word * 64..word * 64 + 64).map(bit).sum())
}

/// Gives a context back.
pub fn free_context(context: u16) {
    TAKEN[usize::from(context)].store(false, Ordering::Release);
}
