// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks of a guest.

use havmsi_abi::Function;

use super::devices::edu;
use super::{Outcome, Victim, verdict};
use crate::guest::{FREE, PORT, Vm};
use crate::memory::{peek, poke, read};
use crate::tests::sharing::{GUARD, Guest, SHARE};
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

/// A guest shares the page at the physical address of the victim's; the host, which
/// told it, reads that.
fn share_other(victim: &mut Victim) -> Outcome {
    let mut guest = Guest::new()?;
    let status = guest.call(SHARE, victim.pages[0])?.cast_signed();
    let seen = peek(victim.pages[0])?;
    victim.disclosed(seen, FREE, format_args!("MEM_SHARE: {status}; the host reads"))
}
attack!(share_other, "t23::share_other");

/// A guest unshares a page while the host's device writes to it; the host does not agree.
fn unshare_at_once(_: &mut Victim) -> Outcome {
    let edu = edu()?;
    let origin = edu.load()?;
    let mut guest = Guest::new()?;
    let page = guest.vm.map(FREE)?;
    guest.call(SHARE, FREE)?;
    edu.start_write(page);
    let asked = guest.ask(FREE).is_ok();
    edu.wait()?;
    let (arrived, sent) = (peek(page + 8)?, read(origin + 8));
    verdict(
        arrived != sent,
        format_args!(
            "the host was asked: {asked}; the device sent {sent:#x}, there is {arrived:#x}"
        ),
    )
}
attack!(unshare_at_once, "t23::unshare_at_once");

/// The host reads a page after it agreed that the guest has it back.
fn after_unshare(_: &mut Victim) -> Outcome {
    let mut guest = Guest::new()?;
    let page = guest.vm.map(FREE)?;
    guest.call(SHARE, FREE)?;
    peek(page)?;
    guest.ask(FREE)?;
    let status = guest.agree()?;
    guest.store(FREE, 0x5ec2)?;
    let seen = peek(page)?;
    verdict(seen == 0x5ec2, format_args!("MEM_UNSHARE: {status}; the host reads {seen:#x}"))
}
attack!(after_unshare, "t23::after_unshare");

/// A guest that has said where its devices are stores a secret elsewhere.
fn unguarded(_: &mut Victim) -> Outcome {
    let mut guest = Guest::new()?;
    let status = guest.call(GUARD, PORT)?;
    guest.tell(2, [0, PORT + 0x10_0000, 0x5ec2, 0])?;
    let exit = guest.vcpu.run()?;
    let told = exit.ipa == PORT + 0x10_0000 && exit.data == 0x5ec2;
    verdict(
        told,
        format_args!("MMIO_GUARD: {status}; exit at {:#x} with {:#x}", exit.ipa, exit.data),
    )
}
attack!(unguarded, "t10::unguarded");
