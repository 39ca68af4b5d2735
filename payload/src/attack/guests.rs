// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks of a guest.

use havmsi_abi::Function;

use super::{Outcome, Victim, verdict};
use crate::guest::{FREE, Vm};
use crate::memory::poke;
use crate::{attack, guest_program};

guest_program!(
    caller,
    // PAGE_UNMAP of the VM in x1.
    "mov x2, x3",
    "mov x3, #1",
    "hvc #0",
    "str x0, [x20, #0x200]"
);

/// A guest calls the monitor as the host does: it takes a page of another VM.
fn host_call(victim: &mut Victim) -> Outcome {
    let function = u64::from(Function::PageUnmap.id());
    let x = [function, victim.vm.handle, 0, FREE + 0x1000];
    let (_, mut vcpu) = Vm::launch(caller(), x)?;
    let status = vcpu.report(0x200)?.cast_signed();
    let fault = poke(victim.pages[1], 1).err();
    verdict(
        fault.is_none(),
        format_args!("PAGE_UNMAP by a guest: {status}; the host writes the page: {fault:x?}"),
    )
}
attack!(host_call, "t23::host_call");
