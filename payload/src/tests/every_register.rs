// SPDX-License-Identifier: MIT OR Apache-2.0
//! All system registers that EL1 can name: what one world writes no other reads.
//! No list to forget one in: every encoding is tried.

use core::cell::UnsafeCell;

use havmsi_abi::{ExitClass, Function};

use crate::exception::catch;
use crate::guest::{FREE, PORT, RAM, Vcpu, Vm};
use crate::harness::{Failure, Outcome};
use crate::{ensure, guest_program, memory, test};

// Told what to do by PORT + 0x300 (instruction), 0x308 (bitmap of the registers
// left out) and 0x310 (0 write, 1 read, 2 compare), does it with all registers.
// Reports what a comparison finds, then the end.
guest_program!(raw executor,
    "movz x20, #0x0900, lsl #16",
    "adr x28, 9f",
    "msr vbar_el1, x28",
    "isb",
    "1: ldr x21, [x20, #0x300]",
    "ldr x22, [x20, #0x308]",
    "ldr x23, [x20, #0x310]",
    "movz x24, #0x4010, lsl #16",
    "mov x19, #0",
    "2: lsr x3, x19, #3",
    "ldrb w4, [x22, x3]",
    "and x3, x19, #7",
    "lsr w4, w4, w3",
    "tbnz w4, #0, 6f",
    "orr x1, x21, x19, lsl #5",
    "adr x3, 3f",
    "str w1, [x3]",
    "dc cvau, x3",
    "dsb sy",
    "ic iallu",
    "dsb sy",
    "isb",
    "mov x27, #0",
    "mov x0, #0x5a5a",
    "add x0, x0, x19, lsl #17",
    "3: nop",
    "isb",
    "cbz x27, 4f",
    "mov x0, x27",
    "4: cmp x23, #1",
    "b.lo 6f",
    "b.hi 5f",
    "str x0, [x24, x19, lsl #3]",
    "b 6f",
    "5: ldr x1, [x24, x19, lsl #3]",
    "cmp x0, x1",
    "b.eq 6f",
    "str x19, [x20, #0x200]",
    "str x1, [x20, #0x208]",
    "str x0, [x20, #0x210]",
    "6: add x19, x19, #1",
    "tbz x19, #15, 2b",
    "str xzr, [x20, #0x218]",
    "b 1b",
    ".balign 2048",
    "9: .rept 16",
    ".balign 128",
    "mov x27, #0x0fa1",
    "mrs x26, elr_el1",
    "add x26, x26, #4",
    "msr elr_el1, x26",
    "eret",
    ".endr"
);

const fn register(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    (op0 - 2) << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// Registers of op0 2 and 3: bits [19:5] of an instruction.
const ALL: u64 = 1 << 15;
/// `MRS x0`, `MSR x0`.
const MRS: u64 = 0xd530_0000;
const MSR: u64 = 0xd510_0000;
/// In place of a value.
const FAULTED: u64 = 0x0fa1;

const WRITE: u64 = 0;
const READ: u64 = 1;
const COMPARE: u64 = 2;

/// Not written: what the program itself lives by, what acts on the interrupt
/// controller, the timers.
fn spared(encoding: u64) -> bool {
    const DISR: u64 = register(3, 0, 12, 1, 1);
    const OTHERS: [u64; 5] = [
        register(2, 0, 0, 2, 2),  // MDSCR
        register(2, 0, 1, 0, 4),  // OSLAR
        register(3, 0, 1, 0, 0),  // SCTLR
        register(3, 0, 10, 2, 0), // MAIR
        register(3, 0, 13, 0, 4), // TPIDR_EL1
    ];
    let [op0_op1, crn, crm] = [encoding >> 11, encoding >> 7 & 15, encoding >> 3 & 15];
    encoding != DISR
        && (OTHERS.contains(&encoding)
            || match (op0_op1, crn) {
                (8, 2) => crm == 0,
                (8, 4 | 12) => true,
                (11, 4) => crm == 2,
                (11, 14) => true,
                _ => false,
            })
}

/// Not read: random numbers, flags, counters and timers, which change by themselves.
fn alive(encoding: u64) -> bool {
    matches!((encoding >> 11, encoding >> 7 & 15), (11, 2 | 4 | 14))
}

const SPARED_AT: u64 = RAM + 0x2000;
const ALIVE_AT: u64 = RAM + 0x3000;

/// A VM that runs the program.
fn launch() -> Result<(Vm, Vcpu), Failure> {
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    let vcpu = vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM])?;
    vm.populate(RAM, executor())?;
    for (at, left_out) in [(SPARED_AT, spared as fn(u64) -> bool), (ALIVE_AT, alive)] {
        let mut bytes = [0; 4096];
        for (byte, first) in bytes.iter_mut().zip((0..ALL).step_by(8)) {
            *byte = (0..8).fold(0, |bits, i| bits | u8::from(left_out(first + i)) << i);
        }
        vm.populate(at, &bytes)?;
    }
    vm.call(Function::VmActivate, &[])?;
    for page in (FREE..FREE + 8 * ALL).step_by(4096) {
        vm.map(page)?;
    }
    Ok((vm, vcpu))
}

/// Has the guest go through all registers.
fn in_guest(vcpu: &mut Vcpu, mode: u64) -> Outcome {
    let (instruction, left_out) = if mode == WRITE { (MSR, SPARED_AT) } else { (MRS, ALIVE_AT) };
    for value in [instruction, left_out, mode] {
        vcpu.expect(ExitClass::MmioRead)?;
        vcpu.complete(value);
    }
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    if exit.ipa == PORT + 0x200 {
        return Err(differs("a guest", exit.data, vcpu.report(0x208)?, vcpu.report(0x210)?));
    }
    ensure!(exit.ipa == PORT + 0x218, "{exit:x?}");
    Ok(())
}

fn differs(who: &str, encoding: u64, old: u64, new: u64) -> Failure {
    Failure::new(format_args!(
        "{who} sees S{}_{}_C{}_C{}_{}: {old:#x}, then {new:#x}",
        2 + (encoding >> 14),
        encoding >> 11 & 7,
        encoding >> 7 & 15,
        encoding >> 3 & 15,
        encoding & 7
    ))
}

/// A page to run instructions from.
#[repr(align(4096))]
struct Code(UnsafeCell<[u64; 2]>);

// SAFETY: by the one CPU that runs the test.
unsafe impl Sync for Code {}

static CODE: Code = Code(UnsafeCell::new([0; 2]));

/// Runs one instruction in the host; its x0.
fn in_host(instruction: u64, mut x0: u64) -> u64 {
    let code = CODE.0.get().addr() as u64;
    memory::write(code, instruction | 0xd503_3fdf << 32);
    memory::write(code + 8, 0xd65f_03c0);
    let fault = catch(|| {
        // SAFETY: the instruction (none that this program lives by), ISB and RET.
        unsafe {
            core::arch::asm!("dc cvau, {code}", "dsb sy", "ic ivau, {code}", "dsb sy", "isb",
                "blr {code}", code = in(reg) code, inout("x0") x0, out("x30") _);
        }
    });
    if fault.is_some() { FAULTED } else { x0 }
}

fn read_in_host(encoding: u64) -> u64 {
    in_host(MRS | encoding << 5, 0)
}

/// A guest writes whatever it can write: neither another VM nor the host sees
/// any of it. Then the host does.
fn every_register() -> Outcome {
    let (vm, mut victim) = launch()?;
    let (other, mut writer) = launch()?;
    in_guest(&mut victim, READ)?;
    let values = memory::take(ALL * 8 / 4096);
    let place = |encoding| values + 8 * encoding;
    let all = || (0..ALL).filter(|encoding| !alive(*encoding));
    all().for_each(|encoding| memory::write(place(encoding), read_in_host(encoding)));
    in_guest(&mut writer, WRITE)?;
    in_guest(&mut victim, COMPARE)?;
    for encoding in all() {
        let (old, new) = (memory::read(place(encoding)), read_in_host(encoding));
        if old != new {
            return Err(differs("the host", encoding, old, new));
        }
    }
    let written = || {
        let readable = |encoding: &u64| memory::read(place(*encoding)) != FAULTED;
        all().filter(|encoding| !spared(*encoding)).filter(readable)
    };
    ensure!(written().count() > 100, "the host reads {}", written().count());
    for encoding in written() {
        in_host(MSR | encoding << 5, 0x5a5a + (encoding << 17));
    }
    let outcome = in_guest(&mut victim, COMPARE);
    for encoding in written() {
        in_host(MSR | encoding << 5, memory::read(place(encoding)));
    }
    outcome?;
    vm.destroy()?;
    other.destroy()
}
test!(every_register, "T07 T08 T18");
