// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks by how the host runs a vCPU and what it answers.

use havmsi_abi::{EntryFlags, ExitClass, Function};

use super::{Outcome, Victim, verdict};
use crate::guest::{FREE, PORT, RAM, Vcpu, Vm};
use crate::harness::Failure;
use crate::memory::{peek32, poke32};
use crate::smc::{Refusal, host, psci};
use crate::tests::registers::get_fp;
use crate::tests::vgic::listener;
use crate::{attack, cpu, gic, guest_program, msr};

// After each wait it goes over an instruction that shows x1.
guest_program!(
    guarded,
    "1: wfi",
    "b 2f",
    "str x1, [x20, #0x220]",
    "2: str xzr, [x20, #0x200]",
    "b 1b"
);

/// A guest that waits, with this as the host's answer; its next exit.
fn answered(victim: &Victim, flag: u64) -> Result<(Result<(), Refusal>, Vcpu), Failure> {
    let (_, mut vcpu) = Vm::launch(guarded(), [0, victim.secret ^ FREE, 0, 0])?;
    vcpu.entry.flags.0 = EntryFlags::TRAP_WFI;
    vcpu.expect(ExitClass::Wfx)?;
    vcpu.entry.flags.0 |= flag;
    let result = vcpu.run_once().map(|_| ());
    if result.is_err() {
        vcpu.entry.flags.0 = EntryFlags::TRAP_WFI;
        vcpu.run()?;
    }
    Ok((result, vcpu))
}

/// An instruction that the guest should run is stepped over.
fn skipped(victim: &mut Victim) -> Outcome {
    let (result, vcpu) = answered(victim, EntryFlags::COMPLETE)?;
    let shown = if vcpu.exit.ipa == PORT + 0x220 { vcpu.exit.data } else { 0 };
    victim.disclosed(
        shown,
        FREE,
        format_args!("VCPU_RUN with COMPLETE: {result:?}; the guest shows"),
    )
}
attack!(skipped, "t08::skipped");

guest_program!(waiting, "ldr x5, [x20, #8]", "1: b 1b", "str x1, [x20, #0x220]");

/// A load is completed, an interrupt comes, the load is completed again: that
/// would step over what the guest is doing by then.
fn answered_twice(victim: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(waiting(), [0, victim.secret ^ FREE, 0, 0])?;
    vcpu.expect(ExitClass::MmioRead)?;
    vcpu.complete(0);
    gic::alarm(50);
    while !gic::alarm_fired() {
        vcpu.run_once()?;
    }
    vcpu.complete(0);
    gic::alarm(50);
    let result = vcpu.run_once().map(|e| e.class);
    gic::quiet();
    let shown = if result.is_ok() { vcpu.exit.data } else { 0 };
    victim.disclosed(shown, FREE, format_args!("VCPU_RUN with COMPLETE: {result:?}; it shows"))
}
attack!(answered_twice, "t08::answered_twice");

/// An external abort that no access of the guest's has caused.
fn abort(victim: &mut Victim) -> Outcome {
    let (result, vcpu) = answered(victim, EntryFlags::INJECT_SEA)?;
    verdict(
        vcpu.exit.ipa == PORT + 0x100,
        format_args!("VCPU_RUN with INJECT_SEA: {result:?}; then {:#x}", vcpu.exit.ipa),
    )
}
attack!(abort, "t27::abort");

guest_program!(
    table_user,
    "adr x4, 2f",
    "add x6, x4, #0x800",
    "str x1, [x6]",
    "1: ldrb w5, [x20, #8]",
    "ldr x6, [x4, x5, lsl #3]",
    "str x6, [x20, #0x200]",
    "b 1b",
    ".balign 8",
    "2: .zero 0x808",
    "nop"
);

/// A load of a byte is answered with more: it is an index into a table of 256.
fn wide_answer(victim: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(table_user(), [0, victim.secret ^ FREE, 0, 0])?;
    vcpu.expect(ExitClass::MmioRead)?;
    vcpu.complete(256);
    let shown = vcpu.report(0x200)?;
    victim.disclosed(shown, FREE, format_args!("index 256 of a table of 256 shows"))
}
attack!(wide_answer, "t09::wide_answer");

guest_program!(narrow_store, "strb w1, [x20, #0x200]");

/// A store of a byte, out of a register with a secret.
fn narrow(victim: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(narrow_store(), [0, victim.secret ^ FREE, 0, 0])?;
    let shown = vcpu.report(0x200)?;
    victim.disclosed(shown, FREE, format_args!("the exit of a byte's store shows"))
}
attack!(narrow, "t07::narrow_store");

guest_program!(
    vector_user,
    ".arch_extension fp",
    ".arch_extension simd",
    "mov x2, #0x300000",
    "msr cpacr_el1, x2",
    "isb",
    "dup v7.2d, x1",
    "str xzr, [x20, #0x200]"
);

/// What a guest left in FP registers.
fn fp_registers(victim: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(vector_user(), [0, victim.secret ^ FREE, 0, 0])?;
    msr!("cpacr_el1", 0x30_0000);
    vcpu.report(0x200)?;
    let shown = get_fp()[15];
    victim.disclosed(shown, FREE, format_args!("v7 is"))
}
attack!(fp_registers, "t07::fp_registers");

guest_program!(raw first_register,
    "movz x20, #0x0900, lsl #16",
    "str x19, [x20, #0x200]",
    "b ."
);

/// A new vCPU of the host's shows what a dead one had in a register.
fn dead_registers(_: &mut Victim) -> Outcome {
    let mut dead = Victim::new()?;
    dead.wrong(1)?;
    dead.vm.destroy()?;
    let (_, mut vcpu) = Vm::launch(first_register(), [0; 4])?;
    let shown = vcpu.report(0x200)?;
    verdict(shown == dead.secret, format_args!("a new vCPU's x19 is {shown:#x}"))
}
attack!(dead_registers, "t24::registers");

// vCPU 0 turns vCPU 1 on, which shows 7, turns itself off, and has a line for
// nobody behind that; another one, with the secret, is at an address that all know.
guest_program!(
    two_vcpus,
    "adr x4, 9f",
    "str x1, [x4]",
    "movz x0, #0x0003",
    "movk x0, #0xc400, lsl #16",
    "mov x1, #1",
    "adr x2, 2f",
    "mov x3, #7",
    "hvc #0",
    "1: str xzr, [x20, #0x200]",
    "b 1b",
    "2: movz x20, #0x0900, lsl #16",
    "str x0, [x20, #0x210]",
    "movz x0, #0x0002",
    "movk x0, #0x8400, lsl #16",
    "hvc #0",
    "str xzr, [x20, #0x218]",
    "b .",
    ".balign 256",
    "movz x20, #0x0900, lsl #16",
    "adr x4, 9f",
    "ldr x4, [x4]",
    "str x4, [x20, #0x220]",
    "b .",
    ".balign 8",
    "9: .quad 0",
    "nop"
);

/// Such a VM, its vCPU 1 turned on.
fn second_is_on(secret: u64) -> Result<(Vm, Vcpu, Vcpu), Failure> {
    let (vm, mut first, second) = Vm::launch_two(gic::version(), two_vcpus(), [0, secret, 0, 0])?;
    first.expect(ExitClass::Hvc)?;
    first.answer([0; 4]);
    first.report(0x200)?;
    Ok((vm, first, second))
}

/// The host says where a vCPU starts: at a line of the guest's that shows the secret.
fn entry_point(victim: &mut Victim) -> Outcome {
    let (_, _first, mut second) = second_is_on(victim.secret ^ FREE)?;
    second.entry.gpr = [RAM + 0x100; 4];
    second.entry.data = RAM + 0x100;
    let exit = second.run()?;
    victim.disclosed(exit.data, FREE, format_args!("at {:#x} it shows", exit.ipa - PORT))
}
attack!(entry_point, "t17::entry_point");

/// A vCPU that turned itself off goes on behind that.
fn off(_: &mut Victim) -> Outcome {
    let (_, _first, mut second) = second_is_on(0)?;
    second.report(0x210)?;
    let exit = second.expect(ExitClass::Hvc)?;
    let off = exit.gpr[0] == psci::CPU_OFF;
    second.answer([0; 4]);
    let result = second.run_once();
    verdict(
        off && result.is_ok_and(|e| e.ipa == PORT + 0x218),
        format_args!("VCPU_RUN of a vCPU that is off: {:?}", result.map(|e| e.class)),
    )
}
attack!(off, "t17::off");

const PENDING: u64 = 1 << 62;
const HW: u64 = 1 << 61;
const GROUP1: u64 = 1 << 60;

/// Registers of this CPU's PPIs that make one active, and not.
const SET_ACTIVE: u64 = 0x1_0300;
const CLEAR_ACTIVE: u64 = 0x1_0380;
/// The hypervisor's timer: its PPI, which nobody uses.
const OTHER: u64 = 26;

/// A virtual interrupt linked to a physical one that isn't the guest's: the
/// guest ends that one.
fn link(_: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(listener(), [0; 4])?;
    vcpu.report(0x200)?;
    let frame = gic::redistributor(0);
    poke32(frame + SET_ACTIVE, 1 << OTHER)?;
    vcpu.list(&[PENDING | GROUP1 | HW | OTHER << 32 | 40]);
    vcpu.complete(0);
    let result = vcpu.run_once();
    if result.is_ok() {
        // It was acknowledged; now it is ended.
        vcpu.list(&[vcpu.vgic.lr[0]]);
        vcpu.run()?;
    }
    let active = peek32(frame + SET_ACTIVE)? >> OTHER & 1;
    poke32(frame + CLEAR_ACTIVE, 1 << OTHER)?;
    verdict(
        active == 0,
        format_args!(
            "VCPU_RUN: {:?}; the other interrupt is active: {active}",
            result.map(|e| e.class)
        ),
    )
}
attack!(link, "t19::link");

/// The interrupt that a guest finds which can't expect it.
fn unexpected(id: u64) -> Outcome {
    let (_, mut vcpu) = Vm::launch(listener(), [0; 4])?;
    vcpu.report(0x200)?;
    vcpu.list(&[PENDING | GROUP1 | id]);
    vcpu.complete(0);
    let result = vcpu.run_once();
    let taken = result.is_ok() && vcpu.exit.ipa == PORT + 0x140 && vcpu.exit.data == id;
    verdict(taken, format_args!("VCPU_RUN: {:?}; taken: {taken}", result.map(|e| e.class)))
}

/// An SGI that no vCPU has sent.
fn sgi(_: &mut Victim) -> Outcome {
    unexpected(5)
}
attack!(sgi, "t27::sgi");

/// An LPI, for a VM that has no ITS.
fn lpi(_: &mut Victim) -> Outcome {
    unexpected(8192 + 40)
}
attack!(lpi, "t27::lpi");

/// More list registers than there are.
fn used_lrs(_: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(listener(), [0; 4])?;
    vcpu.report(0x200)?;
    vcpu.complete(0);
    vcpu.entry.nr_lr = u64::MAX;
    let result = vcpu.run_once();
    verdict(result.is_ok(), format_args!("VCPU_RUN: {result:?}"))
}
attack!(used_lrs, "t26::used_lrs");

guest_program!(
    mask_user,
    "1: msr S3_0_C4_C6_0, x0",
    "mrs x1, S3_0_C4_C6_0",
    "str x1, [x20, #0x200]",
    "b 1b"
);

guest_program!(mask_reader, "1: mrs x1, S3_0_C4_C6_0", "str x1, [x20, #0x200]", "b 1b");

/// A VM without interrupt controller looks at the registers of another one's.
fn interface(_: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(mask_user(), [0xa0, 0, 0, 0])?;
    vcpu.report(0x200)?;
    let (_, mut other, _) = Vm::launch_two(0, mask_reader(), [0; 4])?;
    let exit = other.run()?;
    verdict(
        exit.ipa == PORT + 0x200 && exit.data & 0xf8 == 0xa0,
        format_args!("another VM finds {:#x} at {:#x}", exit.data, exit.ipa - PORT),
    )
}
attack!(interface, "t07::interface");

// Debugs itself, with no breakpoint of its own.
guest_program!(
    armed,
    "msr oslar_el1, xzr",
    "msr dbgbcr0_el1, xzr",
    "msr dbgwcr0_el1, xzr",
    "movz x1, #0xa000",
    "msr mdscr_el1, x1",
    "isb",
    "msr daifclr, #8",
    "str xzr, [x20, #0x200]",
    "nop",
    "str xzr, [x20, #0x208]",
    "b ."
);

/// The guest arms breakpoints, and those are the host's.
fn breakpoint(_: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(armed(), [0; 4])?;
    vcpu.report(0x200)?;
    // Any instruction of its page that is not an exit's: the one behind it.
    msr!("oslar_el1", 0);
    msr!("dbgbvr0_el1", RAM + 4 * 13);
    msr!("dbgbcr0_el1", 0x1e7);
    let exit = vcpu.run()?;
    msr!("dbgbcr0_el1", 0);
    let class = exit.data >> 26;
    verdict(
        exit.ipa == PORT + 0x100 && class == 0x31,
        format_args!("the guest is at {:#x}, data {:#x}", exit.ipa - PORT, exit.data),
    )
}
attack!(breakpoint, "t26::flag_without_state");

guest_program!(attacked_clock, "1: isb", "mrs x1, cntvct_el0", "str x1, [x20, #0x200]", "b 1b");

/// The host loads another counter offset between two runs.
fn counter(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(attacked_clock(), [0; 4])?;
    host(Function::TimerLoad, &[0])?;
    let first = vcpu.report(0x200)?;
    host(Function::TimerLoad, &[vm.handle])?;
    let second = vcpu.report(0x200)?;
    host(Function::TimerLoad, &[0])?;
    let third = vcpu.report(0x200)?;
    let step = cpu::milliseconds(5000);
    let jumps = |a: u64, b: u64| b < a || b - a > step;
    verdict(
        jumps(first, second) || second < first || third < second,
        format_args!("the guest's counter: {first}, {second}, {third}"),
    )
}
attack!(counter, "t28::offset");

/// The same on another CPU, to which the vCPU moves.
fn counter_elsewhere(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(attacked_clock(), [0; 4])?;
    host(Function::TimerLoad, &[vm.handle])?;
    let first = vcpu.report(0x200)?;
    extern "C" fn run(vcpu: u64) -> u64 {
        let at = usize::try_from(vcpu).unwrap_or(0);
        // SAFETY: the attack waits for the end of this job.
        let vcpu = unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Vcpu>(at) };
        let _ = host(Function::TimerLoad, &[0]);
        vcpu.report(0x200).unwrap_or(0)
    }
    cpu::start(1, run, (&raw mut vcpu).expose_provenance() as u64)?;
    let second = cpu::join(1)?;
    let third = vcpu.report(0x200)?;
    verdict(
        second < first || third < second,
        format_args!("the guest's counter: {first}, {second}, {third}"),
    )
}
attack!(counter_elsewhere, "t28::other_cpu");
