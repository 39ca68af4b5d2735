// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exits of a guest: what the host sees, what it may answer.

use havmsi_abi::{EntryFlags, ExitClass, Function};

use crate::guest::{Exit, FREE, IPA_BITS, PORT, Vcpu, Vm, spin};
use crate::harness::{Outcome, gic3};
use crate::memory::{self, PATTERN};
use crate::smc::INVALID;
use crate::{cpu, ensure, expect, gic, guest_program, mrs, test};

const ISV: u64 = 1 << 24;
const WNR: u64 = 1 << 6;

guest_program!(
    loads,
    "mov x1, #-1",
    "ldrb w1, [x20]",
    "str x1, [x20, #0x200]",
    "mov x1, #-1",
    "ldrh w1, [x20, #2]",
    "str x1, [x20, #0x200]",
    "mov x1, #-1",
    "ldr w1, [x20, #4]",
    "str x1, [x20, #0x200]",
    "mov x1, #-1",
    "ldr x1, [x20, #8]",
    "str x1, [x20, #0x200]",
    "mov x1, #0",
    "ldrsb x1, [x20, #1]",
    "str x1, [x20, #0x200]",
    "mov x1, #0",
    "ldrsb w1, [x20, #1]",
    "str x1, [x20, #0x200]",
    "mov x1, #0",
    "ldrsh x1, [x20, #2]",
    "str x1, [x20, #0x200]",
    "mov x1, #0",
    "ldrsh w1, [x20, #2]",
    "str x1, [x20, #0x200]",
    "mov x1, #0",
    "ldrsw x1, [x20, #4]",
    "str x1, [x20, #0x200]",
    "mov x30, #0",
    "ldr x30, [x20, #8]",
    "str x30, [x20, #0x200]",
    "mov x1, #0x77",
    "ldr xzr, [x20, #8]",
    "str x1, [x20, #0x200]",
    "mov x1, #0x77",
    "ldrb wzr, [x20, #9]",
    "str xzr, [x20, #0x200]"
);

/// Loads of all sizes: the host sees the address and the size, and its answer
/// is cut to size and extended as the instruction says.
fn mmio_loads() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(loads(), [0; 4])?;
    let data = 0x8899_aabb_ccdd_eeff;
    for (offset, size, signed, wide, value) in [
        (0, 0, 0, 0, 0xff),
        (2, 1, 0, 0, 0xeeff),
        (4, 2, 0, 0, 0xccdd_eeff),
        (8, 3, 0, 1, data),
        (1, 0, 1, 1, u64::MAX),
        (1, 0, 1, 0, 0xffff_ffff),
        (2, 1, 1, 1, 0xffff_ffff_ffff_eeff),
        (2, 1, 1, 0, 0xffff_eeff),
        (4, 2, 1, 1, 0xffff_ffff_ccdd_eeff),
        (8, 3, 0, 1, data),
        (8, 3, 0, 1, 0x77),
        (9, 0, 0, 0, 0),
    ] {
        let exit = vcpu.expect(ExitClass::MmioRead)?;
        expect!(exit.ipa, PORT + offset);
        let esr = exit.esr & !0x3f;
        expect!(esr, 0x24 << 26 | 1 << 25 | ISV | size << 22 | signed << 21 | wide << 15);
        expect!(
            exit,
            Exit {
                class: ExitClass::MmioRead,
                esr: exit.esr,
                ipa: exit.ipa,
                mode: 1,
                ..Exit::default()
            }
        );
        vcpu.complete(data);
        let got = vcpu.report(0x200)?;
        ensure!(got == value, "load of size {size} at {offset}: {got:#x}");
    }
    vcpu.end()?;
    vm.destroy()
}
test!(mmio_loads, "T07 T09");

guest_program!(
    stores,
    "movz x1, #0x8899, lsl #48",
    "movk x1, #0xaabb, lsl #32",
    "movk x1, #0xccdd, lsl #16",
    "movk x1, #0xeeff",
    "mov x2, #-1",
    "strb w1, [x20]",
    "strh w1, [x20, #2]",
    "str w1, [x20, #4]",
    "str x1, [x20, #8]",
    "str xzr, [x20, #16]",
    "strb wzr, [x20, #17]",
    "mov x30, x1",
    "strh w30, [x20, #18]",
    "stlr w1, [x20]"
);

/// Stores: no more than what is stored goes out.
fn mmio_stores() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(stores(), [0; 4])?;
    for (offset, size, data) in [
        (0, 0, 0xff),
        (2, 1, 0xeeff),
        (4, 2, 0xccdd_eeff),
        (8, 3, 0x8899_aabb_ccdd_eeff),
        (16, 3, 0),
        (17, 0, 0),
        (18, 1, 0xeeff),
        (0, 2, 0xccdd_eeff),
    ] {
        let exit = vcpu.expect(ExitClass::MmioWrite)?;
        expect!(exit.esr >> 22 & 3, size);
        expect!(exit.esr & (ISV | WNR), ISV | WNR);
        expect!(exit.esr >> 16 & 31, 0);
        expect!(
            exit,
            Exit {
                class: ExitClass::MmioWrite,
                esr: exit.esr,
                ipa: PORT + offset,
                data,
                mode: 1,
                ..Exit::default()
            }
        );
    }
    vcpu.end()?;
    vm.destroy()
}
test!(mmio_stores, "T07");

/// Loads and stores whose syndrome does not tell the register: an external
/// abort in the guest, and no exit.
fn mmio_without_syndrome() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(no_syndrome(), [0; 4])?;
    for write in [0, 0, WNR, WNR] {
        let fault = vcpu.fault()?;
        ensure!(fault.is_external_abort() && fault.esr & WNR == write, "{fault:x?}");
        expect!(fault.far, PORT + 8);
    }
    // Outside the address space.
    let fault = vcpu.fault()?;
    ensure!(fault.is_external_abort() && fault.far == 1 << IPA_BITS, "{fault:x?}");
    vcpu.end()?;
    vm.destroy()
}
guest_program!(
    no_syndrome,
    "add x21, x20, #8",
    "ldp x1, x2, [x21]",
    "add x21, x20, #8",
    "ldr x1, [x21], #8",
    "add x21, x20, #8",
    "stp x1, x2, [x21]",
    "add x21, x20, #8",
    "str x1, [x21], #8",
    "movz x21, #0x10, lsl #32",
    "ldr x1, [x21]"
);
test!(mmio_without_syndrome, "T09 T23");

guest_program!(
    one_load_one_store,
    "mov x1, #0x55",
    "ldr x1, [x20, #8]",
    "str x1, [x20, #0x200]",
    "ldr x1, [x20, #8]",
    "str x1, [x20, #0x200]"
);

/// An external abort as the answer, to a load and to a store.
fn external_abort_as_answer() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(one_load_one_store(), [0; 4])?;
    vcpu.expect(ExitClass::MmioRead)?;
    vcpu.entry.flags.0 = EntryFlags::INJECT_SEA;
    vcpu.entry.data = 0x1234;
    let fault = vcpu.fault()?;
    ensure!(
        fault.is_external_abort() && fault.far == PORT + 8 && fault.esr & WNR == 0,
        "{fault:x?}"
    );
    expect!(vcpu.report(0x200)?, 0x55);
    vcpu.entry.flags.0 = EntryFlags::INJECT_SEA;
    let fault = vcpu.fault()?;
    ensure!(
        fault.is_external_abort() && fault.far == PORT + 0x200 && fault.esr & WNR != 0,
        "{fault:x?}"
    );
    vcpu.expect(ExitClass::MmioRead)?;
    vcpu.complete(0x66);
    expect!(vcpu.report(0x200)?, 0x66);
    vcpu.end()?;
    vm.destroy()
}
test!(external_abort_as_answer, "T27");

/// None of `flags` is a permitted answer now; nothing happens on any of them.
fn refused(vcpu: &mut Vcpu, flags: &[u64]) -> Outcome {
    let unknown = [1 << 5, 1 << 31, 1 << 32, 1 << 63, u64::MAX, EntryFlags::ANSWERS];
    let two = [
        EntryFlags::COMPLETE | EntryFlags::INJECT_SEA,
        EntryFlags::COMPLETE | EntryFlags::INJECT_UNDEF,
        EntryFlags::INJECT_SEA | EntryFlags::INJECT_UNDEF,
    ];
    let old = vcpu.entry.flags;
    for flags in flags.iter().chain(&unknown).chain(&two) {
        vcpu.entry.flags.0 = *flags;
        vcpu.entry.data = 0xbad;
        vcpu.entry.gpr = [0xbad; 4];
        let before: [u64; 30] =
            core::array::from_fn(|i| memory::read(vcpu.page + 0x800 + 8 * i as u64));
        let result = vcpu.run_once();
        ensure!(result == Err(INVALID), "flags {flags:#x}: {result:x?}");
        let after: [u64; 30] =
            core::array::from_fn(|i| memory::read(vcpu.page + 0x800 + 8 * i as u64));
        ensure!(before == after, "flags {flags:#x} changed the exit");
    }
    vcpu.entry.flags = old;
    Ok(())
}

const COMPLETE: u64 = EntryFlags::COMPLETE;
const SEA: u64 = EntryFlags::INJECT_SEA;
const UNDEF: u64 = EntryFlags::INJECT_UNDEF;

guest_program!(
    every_class,
    "mov x1, #0x55",
    "ldr x1, [x20, #8]",
    "str x1, [x20, #0x200]",
    "mrs x2, cntp_ctl_el0",
    "str x2, [x20, #0x200]",
    "mov x3, #3",
    "msr cntp_cval_el0, x3",
    "wfi",
    "movz x4, #0x4010, lsl #16",
    "ldr x5, [x4]",
    "str x5, [x20, #0x200]",
    "movz x0, #0x0001",
    "movk x0, #0xc400, lsl #16",
    "hvc #0",
    "str x0, [x20, #0x200]",
    "mrs x4, elr_el1",
    "str x4, [x20, #0x200]"
);

/// At each exit class, answers that it does not allow.
fn wrong_answers() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(every_class(), [0; 4])?;
    // Before the first run nothing is pending.
    refused(&mut vcpu, &[COMPLETE, SEA, UNDEF])?;
    for _ in 0..3 {
        // Not answered: the access is tried again.
        vcpu.expect(ExitClass::MmioRead)?;
        refused(&mut vcpu, &[UNDEF])?;
    }
    vcpu.complete(0x1234);
    expect!(vcpu.report(0x200)?, 0x1234);
    refused(&mut vcpu, &[UNDEF])?;
    expect!(vcpu.run_once()?.class, ExitClass::MmioWrite);
    vcpu.expect(ExitClass::SysregRead)?;
    refused(&mut vcpu, &[SEA])?;
    vcpu.complete(0x4321);
    expect!(vcpu.report(0x200)?, 0x4321);
    expect!(vcpu.expect(ExitClass::SysregWrite)?.data, 3);
    refused(&mut vcpu, &[SEA])?;
    vcpu.entry.flags.0 = EntryFlags::TRAP_WFI;
    vcpu.complete(0x999);
    vcpu.expect(ExitClass::Wfx)?;
    refused(&mut vcpu, &[COMPLETE, SEA, UNDEF])?;
    vcpu.expect(ExitClass::Fault)?;
    refused(&mut vcpu, &[COMPLETE, SEA, UNDEF])?;
    vm.map(FREE)?;
    expect!(vcpu.report(0x200)?, 0);
    vcpu.expect(ExitClass::Hvc)?;
    refused(&mut vcpu, &[SEA, UNDEF])?;
    vcpu.answer([0x77, 0, 0, 0]);
    expect!(vcpu.report(0x200)?, 0x77);
    // No exception was taken on the way.
    expect!(vcpu.report(0x200)?, 0);
    vcpu.end()?;
    vm.destroy()
}
test!(wrong_answers, "T08 T09 T27");

guest_program!(
    faults,
    "movz x4, #0x4010, lsl #16",
    "ldr x5, [x4, #0x128]",
    "str x5, [x20, #0x200]",
    "add x4, x4, #0x1000",
    "mov x5, #0x99",
    "strb w5, [x4, #0x7]",
    "ldr x6, [x4]",
    "str x6, [x20, #0x200]",
    "add x4, x4, #0x1000",
    "br x4"
);

/// Faults in RAM: the page and the kind of access show, no offset, no data. A
/// page that is mapped then reads as zero, whatever the host left in it.
fn faults_in_ram() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(faults(), [0; 4])?;
    let want = |class: u64, write: u64, ipa: u64| Exit {
        class: ExitClass::Fault,
        esr: class << 26 | 1 << 25 | write | 7,
        ipa,
        mode: 1,
        ..Exit::default()
    };
    for _ in 0..3 {
        expect!(vcpu.expect(ExitClass::Fault)?, want(0x24, 0, FREE));
    }
    let page = memory::take(1);
    expect!(memory::first_change(page, PATTERN), None);
    vm.call(Function::PageMap, &[FREE, page, 4096])?;
    expect!(vcpu.report(0x200)?, 0);
    expect!(vcpu.expect(ExitClass::Fault)?, want(0x24, WNR, FREE + 0x1000));
    let page = vm.map(FREE + 0x1000)?;
    expect!(vcpu.report(0x200)?, 0x99 << 56);
    // What the guest wrote is not to be seen.
    expect!(memory::peek(page)?, 0);
    expect!(vcpu.expect(ExitClass::Fault)?, want(0x20, 0, FREE + 0x2000));
    vm.map(FREE + 0x2000)?;
    let fault = vcpu.fault()?;
    ensure!(fault.is_undefined() && fault.elr == FREE + 0x2000, "{fault:x?}");
    for _ in 0..2 {
        vm.call(Function::PageUnmap, &[FREE + 0x1000, 2])?;
    }
    expect!(vcpu.expect(ExitClass::Fault)?, want(0x20, 0, FREE + 0x2000));
    ensure!(memory::is_sealed(page), "not sealed");
    vm.destroy()
}
test!(faults_in_ram, "T07 T10 T11");

guest_program!(
    waits,
    "wfi",
    "str xzr, [x20, #0x200]",
    "wfe",
    "wfe",
    "wfe",
    "wfe",
    "str xzr, [x20, #0x200]",
    "sevl",
    "wfe",
    "str xzr, [x20, #0x200]",
    "wfi"
);

fn wait_instructions() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(waits(), [0; 4])?;
    vcpu.entry.flags.0 = EntryFlags::TRAP_WFI | EntryFlags::TRAP_WFE;
    let want = |wfe: u64| Exit {
        class: ExitClass::Wfx,
        esr: 1 << 26 | 1 << 25 | wfe,
        mode: 1,
        ..Exit::default()
    };
    expect!(vcpu.expect(ExitClass::Wfx)?, want(0));
    vcpu.report(0x200)?;
    // The event register is set by the way into the guest, so not every WFE
    // waits; under QEMU's emulation none does.
    while vcpu.run()?.class == ExitClass::Wfx {
        expect!(vcpu.exit, want(1));
    }
    expect!(vcpu.exit.ipa, PORT + 0x200);
    vcpu.entry.flags.0 = EntryFlags::TRAP_WFI;
    vcpu.report(0x200)?;
    // Not trapped: an interrupt of the host's ends it.
    vcpu.entry.flags.0 = COMPLETE;
    gic::alarm(20);
    loop {
        let exit = vcpu.run_once()?;
        expect!(exit.class, ExitClass::Irq);
        if gic::alarm_fired() {
            break;
        }
    }
    gic::quiet();
    vm.destroy()
}
test!(wait_instructions, "");

/// An interrupt of the host's brings it back from a guest that never exits;
/// nothing is exposed.
fn interrupt_exit() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(spin(), [0x1111; 4])?;
    for _ in 0..20 {
        let start = cpu::now();
        gic::alarm(2);
        while !gic::alarm_fired() {
            let exit = vcpu.run_once()?;
            expect!(exit, Exit::default());
        }
        gic::quiet();
        ensure!(cpu::now() - start < cpu::milliseconds(20_000), "late");
    }
    vm.destroy()
}
test!(interrupt_exit, "T07 T23");

guest_program!(
    system_registers,
    "movz x19, #0xabcd",
    "mrs x1, cntp_tval_el0",
    "str x1, [x20, #0x200]",
    "mrs x1, cntp_ctl_el0",
    "str x1, [x20, #0x200]",
    "mrs x30, cntp_cval_el0",
    "str x30, [x20, #0x200]",
    "msr cntp_tval_el0, x19",
    "msr cntp_ctl_el0, x19",
    "msr cntp_cval_el0, xzr",
    "mrs xzr, cntp_ctl_el0",
    "mov x1, #0x31",
    "mrs x1, cntp_ctl_el0",
    "msr cntp_ctl_el0, x1",
    "str x1, [x20, #0x200]"
);

const fn iss(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    0x18 << 26 | 1 << 25 | op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | crm << 1
}

/// The physical timer is the host's to emulate.
fn physical_timer() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(system_registers(), [0; 4])?;
    let read = |op2: u64| Exit {
        class: ExitClass::SysregRead,
        esr: iss(3, 3, 14, 2, op2) | 1,
        mode: 1,
        ..Exit::default()
    };
    let write = |op2: u64, data: u64| Exit {
        class: ExitClass::SysregWrite,
        esr: iss(3, 3, 14, 2, op2),
        data,
        mode: 1,
        ..Exit::default()
    };
    for op2 in 0..3 {
        expect!(vcpu.expect(ExitClass::SysregRead)?, read(op2));
        vcpu.complete(0x8000_0000_0000_0001 + op2);
        expect!(vcpu.report(0x200)?, 0x8000_0000_0000_0001 + op2);
    }
    for (op2, data) in [(0, 0xabcd), (1, 0xabcd), (2, 0)] {
        expect!(vcpu.expect(ExitClass::SysregWrite)?, write(op2, data));
        vcpu.complete(0);
    }
    expect!(vcpu.expect(ExitClass::SysregRead)?, read(1));
    vcpu.complete(1);
    expect!(vcpu.expect(ExitClass::SysregRead)?, read(1));
    vcpu.entry.flags.0 = UNDEF;
    ensure!(vcpu.fault()?.is_undefined(), "no UNDEF");
    expect!(vcpu.expect(ExitClass::SysregWrite)?, write(1, 0x31));
    vcpu.entry.flags.0 = UNDEF;
    ensure!(vcpu.fault()?.is_undefined(), "no UNDEF");
    expect!(vcpu.report(0x200)?, 0x31);
    vcpu.end()?;
    vm.destroy()
}
test!(physical_timer, "T09");

guest_program!(
    sgis,
    "mov x1, #0x111",
    "msr S3_0_C12_C11_5, x1",
    "mov x1, #0x222",
    "msr S3_0_C12_C11_6, x1",
    "mov x1, #0x333",
    "msr S3_0_C12_C11_7, x1",
    "mrs x1, S3_0_C12_C12_5",
    "str x1, [x20, #0x200]",
    "msr S3_0_C12_C12_5, xzr",
    "mrs x1, S3_0_C12_C12_5",
    "str x1, [x20, #0x200]"
);

fn software_interrupts() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(sgis(), [0; 4])?;
    for (op2, data) in [(5, 0x111), (6, 0x222), (7, 0x333)] {
        let exit = vcpu.expect(ExitClass::SysregWrite)?;
        expect!(exit.esr, iss(3, 0, 12, 11, op2));
        expect!(exit.data, data);
        vcpu.complete(0);
    }
    // The system register interface is on, and stays.
    expect!(vcpu.report(0x200)?, 7);
    expect!(vcpu.report(0x200)?, 7);
    vcpu.end()?;
    vm.destroy()
}
test!(software_interrupts, "T19", gic3);

/// Exits are the same from a guest's EL0, which they say.
fn from_el0() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(at_el0(), [0; 4])?;
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    expect!((exit.ipa, exit.data, exit.mode), (PORT + 0x200, 0x66, 0));
    let exit = vcpu.expect(ExitClass::Fault)?;
    expect!((exit.ipa, exit.mode), (FREE, 0));
    vm.map(FREE)?;
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    expect!((exit.ipa, exit.data, exit.mode), (PORT + 0x200, 0, 0));
    // HVC and SMC are undefined there.
    for _ in 0..2 {
        let fault = vcpu.fault()?;
        ensure!(fault.is_undefined(), "{fault:x?}");
    }
    // ISV = 0: from the lower level.
    let fault = vcpu.fault()?;
    ensure!(fault.esr >> 26 == 0x24 && fault.esr & 0x3f == 0x10, "{fault:x?}");
    let fault = vcpu.fault()?;
    expect!(fault.esr >> 26, 0x15);
    vm.destroy()
}
guest_program!(
    at_el0,
    "adr x1, 1f",
    "msr elr_el1, x1",
    "mov x1, #0x3c0",
    "msr spsr_el1, x1",
    "mov x2, #0x66",
    "movz x4, #0x4010, lsl #16",
    "eret",
    "1: str x2, [x20, #0x200]",
    "ldr x5, [x4]",
    "str x5, [x20, #0x200]",
    "hvc #0",
    "smc #0",
    "ldp x1, x2, [x20, #8]",
    "svc #0"
);
test!(from_el0, "T20 T23");

guest_program!(
    odd_vectors,
    // Bits [10:0] of VBAR_EL1 are reserved: a CPU may keep what is written there.
    "mrs x1, vbar_el1",
    "orr x1, x1, #0x7e0",
    "msr vbar_el1, x1",
    "isb",
    "mrs x9, pmcr_el0",
    // The end of the address space.
    "mov x1, #-1",
    "msr vbar_el1, x1",
    "isb",
    "str xzr, [x20]",
    "mrs x9, pmcr_el0",
    "b ."
);

/// A vector base of any value: an exception that the monitor gives a guest goes
/// where the CPU would take it.
fn odd_vector_base() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(odd_vectors(), [0; 4])?;
    let fault = vcpu.fault()?;
    ensure!(fault.is_undefined(), "{fault:x?}");
    vcpu.report(0)?;
    // There is nothing at the vector: it faults for ever.
    vcpu.entry.flags.0 |= EntryFlags::COMPLETE;
    gic::alarm(50);
    let exit = vcpu.run_once();
    gic::quiet();
    expect!(exit?, Exit::default());
    vm.destroy()
}
test!(odd_vector_base, "T23");

// Goes to EL0 in AArch32, and stores there.
guest_program!(
    user_32,
    "adr x1, 1f",
    "msr elr_el1, x1",
    "mov x1, #0x1d0",
    "msr spsr_el1, x1",
    "mov x1, #7",
    "mov w2, w20",
    "eret",
    "1: .inst 0xe5821000",
    ".inst 0xeafffffe"
);

fn has_aarch32() -> bool {
    mrs!("id_aa64pfr0_el1") & 15 == 2
}

/// EL0 is EL0 in AArch32 too, which a guest is not offered but can enter.
fn aarch32_is_el0() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(user_32(), [0; 4])?;
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    expect!((exit.ipa, exit.data, exit.mode), (PORT, 7, 0));
    vm.destroy()
}
test!(aarch32_is_el0, "T07", has_aarch32);
