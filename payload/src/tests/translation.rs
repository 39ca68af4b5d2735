// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests, and a host, with stage-1 tables of their own.

use core::sync::atomic::Ordering;

use havmsi_abi::{ExitClass, Function};

use crate::guest::{Exit, FREE, IPA_BITS, PORT, RAM, Vcpu, Vm, nothing, vectors};
use crate::harness::{Failure, Outcome, several_cpus};
use crate::memory::{self, RAM_BASE, take};
use crate::{cpu, ensure, expect, gic, guest_program, mrs, msr, test};

const TABLE: u64 = 0b11;
const DEVICE: u64 = 1 | 1 << 10 | 0b11 << 53;
const NORMAL: u64 = 1 | 1 << 10 | 1 << 2 | 0b11 << 8;

/// Level 1 tables of two vCPUs, their level 2 tables.
const ROOTS: [u64; 2] = [RAM + 0x3000, RAM + 0x4000];
const LEVEL2: [u64; 2] = [RAM + 0x5000, RAM + 0x6000];
/// What the alias of each vCPU maps.
const ALIASED: [u64; 2] = [RAM, RAM + 0x20_0000];
/// A level 2 table in RAM that is not there yet, one outside RAM.
const LATE_TABLE: u64 = RAM + 0x40_0000;
const NO_TABLE: u64 = 0x1000_0000;

const GIB: u64 = 1 << 30;
const ALIAS: u64 = 8 * GIB;
const LATE: u64 = 9 * GIB;
const NOWHERE: u64 = 11 * GIB;
const OUTSIDE: u64 = 12 * GIB;

/// A page with these words populated.
fn words(vm: &Vm, ipa: u64, words: &[(u64, u64)]) -> Outcome {
    let page = take(1);
    memory::clear(page);
    for (index, value) in words {
        memory::write(page + 8 * index, *value);
    }
    vm.call(Function::VmPopulate, &[ipa, page])?;
    Ok(())
}

/// A VM of two vCPUs that are both on, `program` turning the MMU on with x0.
fn launch(program: &[u8]) -> Result<(Vm, [Vcpu; 2]), Failure> {
    let vm = Vm::new(2)?;
    vm.furnish(8)?;
    let vcpus = [vm.vcpu(0)?, vm.vcpu(1)?];
    vm.populate(RAM, program)?;
    vm.populate(RAM + 0x1000, vectors())?;
    for (idx, root) in (0..).zip(ROOTS) {
        vm.call(Function::VcpuSetBoot, &[idx, RAM, root, idx])?;
        let level2 = LEVEL2[usize::from(idx != 0)];
        words(
            &vm,
            root,
            &[
                (0, DEVICE),
                (1, RAM | NORMAL),
                (8, level2 | TABLE),
                (9, LATE_TABLE | TABLE),
                (10, DEVICE),
                (11, NO_TABLE | TABLE),
                (12, 1 << IPA_BITS | NORMAL),
            ],
        )?;
    }
    for (level2, to) in LEVEL2.into_iter().zip(ALIASED) {
        words(&vm, level2, &[(0, to | NORMAL)])?;
    }
    words(&vm, ALIASED[1], &[(0, 0x1111_2222_3333_4444)])?;
    vm.call(Function::VmActivate, &[])?;
    Ok((vm, vcpus))
}

// The macro turns the MMU on, with the root in x0.
guest_program!(
    translated,
    ".macro mmu_on",
    "msr ttbr0_el1, x0",
    "mov x0, #0xff00",
    "msr mair_el1, x0",
    "movz x0, #0x3519",
    "movk x0, #0x8080, lsl #16",
    "movk x0, #0x2, lsl #32",
    "msr tcr_el1, x0",
    "isb",
    "movz x0, #0x1805",
    "movk x0, #0x30d0, lsl #16",
    "msr sctlr_el1, x0",
    "isb",
    ".endm",
    "mmu_on",
    // x21: 8 GiB and so on.
    "movz x21, #2, lsl #32",
    "movz x22, #0x0010, lsl #16",
    "add x22, x21, x22",
    "ldr x1, [x22, #0x128]",
    "str x1, [x20]",
    "mov x1, #0x77",
    "str x1, [x22, #0x128]",
    "movz x23, #0x4010, lsl #16",
    "ldr x1, [x23, #0x128]",
    "str x1, [x20]",
    "movz x22, #0x8900, lsl #16",
    "add x22, x21, x22",
    "ldr w1, [x22, #0x10]",
    "str w1, [x22, #0x18]",
    "movz x22, #0x4000, lsl #16",
    "add x22, x21, x22",
    "ldr x1, [x22, #0x8]",
    "str x1, [x22, #0x10]",
    "movz x22, #0xc000, lsl #16",
    "add x22, x21, x22",
    "ldr x1, [x22, #0x8]",
    "movz x22, #3, lsl #32",
    "ldr x1, [x22, #0x8]",
    "str x1, [x22, #0x10]",
    "movz x22, #0x0010, lsl #16",
    "add x22, x21, x22",
    "add x22, x22, #1, lsl #12",
    "ldp x1, x2, [x22, #16]",
    "str x2, [x20]",
    "add x22, x22, #1, lsl #12",
    "stp x1, x2, [x22, #16]",
    "br x22"
);

/// Exits tell the guest's physical address, wherever its tables map it; walks
/// that find a table missing are resolved like any access.
fn exits_with_tables() -> Outcome {
    let (vm, [mut vcpu, _]) = launch(translated())?;
    let fault = |class: u64, write: u64, ipa: u64| Exit {
        class: ExitClass::Fault,
        esr: class << 26 | 1 << 25 | write << 6 | 7,
        ipa,
        mode: 1,
        ..Exit::default()
    };
    expect!(vcpu.expect(ExitClass::Fault)?, fault(0x24, 0, FREE));
    vm.map(FREE)?;
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.report(0)?, 0x77);
    let exit = vcpu.expect(ExitClass::MmioRead)?;
    expect!(exit.ipa, PORT + 0x10);
    vcpu.complete(5);
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    expect!((exit.ipa, exit.data), (PORT + 0x18, 5));
    // The walk's page, not the access's address; no write.
    for _ in 0..3 {
        expect!(vcpu.expect(ExitClass::Fault)?, fault(0x24, 0, LATE_TABLE));
    }
    vm.map(LATE_TABLE)?;
    for (offset, write) in [(8, 0), (0x10, 1)] {
        let f = vcpu.fault()?;
        ensure!(
            f.esr >> 26 == 0x25
                && f.esr & 0x3f == 6
                && f.esr >> 6 & 1 == write
                && f.far == LATE + offset,
            "{f:x?}"
        );
    }
    for (at, write) in [(NOWHERE + 8, 0), (OUTSIDE + 8, 0), (OUTSIDE + 0x10, 1)] {
        let f = vcpu.fault()?;
        ensure!(f.is_external_abort() && f.esr >> 6 & 1 == write && f.far == at, "{at:#x}: {f:x?}");
    }
    expect!(vcpu.expect(ExitClass::Fault)?, fault(0x24, 0, FREE + 0x1000));
    vm.map(FREE + 0x1000)?;
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.expect(ExitClass::Fault)?, fault(0x24, 1, FREE + 0x2000));
    vm.map(FREE + 0x2000)?;
    // Executing zeros through the alias.
    let f = vcpu.fault()?;
    ensure!(f.is_undefined() && f.elr == ALIAS + 0x10_2000, "{f:x?}");
    vm.destroy()
}
test!(exits_with_tables, "T07 T10");

guest_program!(
    alias_reader,
    "mmu_on",
    "movz x21, #2, lsl #32",
    "1: ldr x2, [x21]",
    "str x2, [x20]",
    "b 1b"
);

/// Two vCPUs of a VM with different tables and one address space number take
/// turns on one CPU: none uses the other's translations.
fn two_vcpus_two_tables() -> Outcome {
    let (vm, mut vcpus) = launch(alias_reader())?;
    let mut first = [0; 8];
    first.copy_from_slice(&alias_reader()[..8]);
    let want = [u64::from_le_bytes(first), 0x1111_2222_3333_4444];
    for round in 0..30 {
        let turn = round % 2;
        expect!(vcpus[turn].report(0)?, want[turn]);
    }
    vm.destroy()
}
test!(two_vcpus_two_tables, "T13");

guest_program!(
    adder,
    "mov x6, x1",
    "mmu_on",
    "movz x4, #0x4010, lsl #16",
    "movz x5, #20000",
    "1: ldaxr w3, [x4]",
    "add w3, w3, #1",
    "stlxr w7, w3, [x4]",
    "cbnz w7, 1b",
    "subs x5, x5, #1",
    "b.ne 1b",
    "str x6, [x20]",
    "ldr w3, [x4]",
    "str x3, [x20]"
);

/// Runs a vCPU to its first report.
extern "C" fn first_report(vcpu: u64) -> u64 {
    let at = usize::try_from(vcpu).unwrap_or(0);
    // SAFETY: the test that gives it waits for the end of this job.
    let vcpu = unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Vcpu>(at) };
    vcpu.report(0).unwrap_or(u64::MAX)
}

/// Two vCPUs at once, on memory that both count in.
fn two_vcpus_at_once() -> Outcome {
    for _ in 0..5 {
        let (vm, [mut a, mut b]) = launch(adder())?;
        vm.map(FREE)?;
        cpu::start(1, first_report, (&raw mut b).expose_provenance() as u64)?;
        expect!(a.report(0)?, 0);
        expect!(cpu::join(1)?, 1);
        expect!(a.report(0)?, 40000);
        a.end()?;
        vm.destroy()?;
        gic::quiet();
    }
    Ok(())
}
test!(two_vcpus_at_once, "", several_cpus);

/// The host's own table walks see what its loads see: zeros in a VM's page,
/// nothing in the monitor's. They read no device.
fn walks_of_the_host() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let page = vm.map(FREE)?;
    let tcr = mrs!("tcr_el1");
    // TTBR1: 39 bits, 4 KiB, write-back walks.
    let upper = 25 << 16 | 0b10 << 30 | 0b11 << 28 | 0b01 << 26 | 0b01 << 24;
    let at = 0xffff_ff80_0000_0000;
    for (table, status) in [
        (page, 0b00_0101),
        (RAM_BASE, 0b01_0000),
        (RAM_BASE + 0x2000, 0b01_0000),
        (0x0e00_0000, 0b01_0000),
        (0x0904_0000, 0b01_0000),
        // The host's own UART.
        (0x0900_0000, 0b01_0000),
    ] {
        msr!("ttbr1_el1", table);
        msr!("tcr_el1", tcr & !(1 << 23) | upper);
        // SAFETY: no translation that this program uses goes.
        unsafe { core::arch::asm!("tlbi vmalle1", "dsb nsh", "isb", options(nostack)) };
        let result = memory::peek(at);
        msr!("tcr_el1", tcr);
        msr!("ttbr1_el1", 0);
        // SAFETY: as above.
        unsafe { core::arch::asm!("tlbi vmalle1", "dsb nsh", "isb", options(nostack)) };
        ensure!(
            result.is_err_and(|f| f.class() == 0x25 && f.esr & 0x3f == status && f.far == at),
            "table at {table:#x}: {result:x?}"
        );
    }
    vm.destroy()
}
test!(walks_of_the_host, "T01 T06");

/// Behind the GICv2's virtual CPU interface: the host's, and answers with an error.
const BUS_ERROR: u64 = 0x0804_4000;
/// Nothing of the host's.
const FLASH: u64 = DEVICE;
const FLICKERING: u64 = 9;

fn flickering_entry() -> u64 {
    core::ptr::from_ref(&memory::ROOT).addr() as u64 + 8 * FLICKERING
}

extern "C" fn flicker(_: u64) -> u64 {
    while cpu::STOP.load(Ordering::SeqCst) == 0 {
        for entry in [FLASH, BUS_ERROR | TABLE] {
            memory::write(flickering_entry(), entry);
            (0..20).for_each(|_| core::hint::spin_loop());
        }
    }
    0
}

/// The monitor asks what stage 1 makes of an address that stage 2 refused;
/// by then the host has put its tables into a device that answers with an error.
fn walks_of_the_monitor() -> Outcome {
    cpu::STOP.store(0, Ordering::SeqCst);
    cpu::start(1, flicker, 0)?;
    for _ in 0..20_000 {
        let result = memory::peek(FLICKERING * GIB);
        ensure!(result.is_err(), "{result:x?}");
    }
    cpu::STOP.store(1, Ordering::SeqCst);
    expect!(cpu::join(1)?, 0);
    memory::write(flickering_entry(), DEVICE | (FLICKERING * GIB));
    Ok(())
}
test!(walks_of_the_monitor, "T20 T22", several_cpus);
