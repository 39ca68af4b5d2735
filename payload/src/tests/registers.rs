// SPDX-License-Identifier: MIT OR Apache-2.0
//! Registers over a world switch: what a guest keeps, what the host keeps, and
//! what neither sees of the other.

use havmsi_abi::{ExitClass, Function};

use crate::guest::{FREE, RAM, Vcpu, Vm};
use crate::harness::{Outcome, several_cpus};
use crate::memory::{self, read, write};
use crate::smc::{self, host};
use crate::{cpu, ensure, expect, gic, guest_program, mrs, msr, test, try_instruction};

// x0 is a seed; all registers get values from it. Then reports, again and
// again, a checksum of all, with x1 to x3 and x28 as scratch.
guest_program!(
    soak,
    ".arch_extension fp",
    ".arch_extension simd",
    "mov x1, #0x300000",
    "msr cpacr_el1, x1",
    "isb",
    ".macro soak_system op",
    ".irp reg, tcr_el1, ttbr0_el1, ttbr1_el1, mair_el1, amair_el1, contextidr_el1, tpidr_el0, tpidrro_el0, tpidr_el1, sp_el0, elr_el1, spsr_el1, esr_el1, far_el1, par_el1, afsr0_el1, afsr1_el1, cntkctl_el1, csselr_el1, fpcr, fpsr, mdscr_el1, dbgbvr0_el1, dbgbcr0_el1, dbgwvr1_el1, dbgwcr1_el1",
    "\\op \\reg",
    ".endr",
    ".endm",
    ".macro soak_write reg",
    "add x1, x1, x0",
    "ror x1, x1, #9",
    "msr \\reg, x1",
    ".endm",
    ".macro soak_read reg",
    "mrs x2, \\reg",
    "add x1, x1, x2",
    "ror x1, x1, #7",
    ".endm",
    "mov x1, x0",
    "soak_system soak_write",
    // Not armed, no trap of the counter, an existing cache.
    "msr mdscr_el1, xzr",
    "msr csselr_el1, xzr",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
    "add x1, x1, x0",
    "ror x1, x1, #11",
    "dup v\\n\\().2d, x1",
    ".endr",
    ".irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 25, 26, 27, 29, 30",
    "add x\\n, x0, #\\n",
    ".endr",
    "add x1, x0, #0x77",
    "mov sp, x1",
    "1: mov x1, sp",
    "add x1, x1, x0",
    "soak_system soak_read",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
    "umov x2, v\\n\\().d[0]",
    "umov x3, v\\n\\().d[1]",
    "eor x1, x1, x2, ror #3",
    "eor x1, x1, x3, ror #5",
    "ror x1, x1, #1",
    ".endr",
    ".irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 25, 26, 27, 29, 30",
    "add x1, x1, x\\n",
    "ror x1, x1, #13",
    ".endr",
    "str x1, [x20, #0x200]",
    "b 1b"
);

/// Fills the host's own FP registers.
fn set_fp(seed: u64) {
    msr!("cpacr_el1", 0x30_0000);
    // SAFETY: this program is built without FP registers.
    unsafe {
        core::arch::asm!(
            ".arch_extension fp",
            ".arch_extension simd",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
            "dup v\\n\\().2d, {x}",
            ".endr",
            x = in(reg) seed,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// The host's own FP registers.
pub(crate) fn get_fp() -> [u64; 64] {
    let mut values = [0; 64];
    // SAFETY: writes the array; this program is built without FP registers.
    unsafe {
        core::arch::asm!(
            ".arch_extension fp",
            ".arch_extension simd",
            "stp q0, q1, [{x}]", "stp q2, q3, [{x}, #32]", "stp q4, q5, [{x}, #64]",
            "stp q6, q7, [{x}, #96]", "stp q8, q9, [{x}, #128]", "stp q10, q11, [{x}, #160]",
            "stp q12, q13, [{x}, #192]", "stp q14, q15, [{x}, #224]", "stp q16, q17, [{x}, #256]",
            "stp q18, q19, [{x}, #288]", "stp q20, q21, [{x}, #320]", "stp q22, q23, [{x}, #352]",
            "stp q24, q25, [{x}, #384]", "stp q26, q27, [{x}, #416]", "stp q28, q29, [{x}, #448]",
            "stp q30, q31, [{x}, #480]",
            x = in(reg) values.as_mut_ptr(),
            options(nostack, preserves_flags)
        );
    }
    values
}

macro_rules! system_registers {
    ($($name:literal),+ $(,)?) => {
        /// The host's system registers.
        fn system() -> [(&'static str, u64); 27] {
            [$(($name, mrs!($name))),+]
        }
    };
}

system_registers!(
    "sctlr_el1",
    "tcr_el1",
    "ttbr0_el1",
    "ttbr1_el1",
    "mair_el1",
    "amair_el1",
    "vbar_el1",
    "contextidr_el1",
    "tpidr_el0",
    "tpidrro_el0",
    "tpidr_el1",
    "sp_el0",
    "elr_el1",
    "spsr_el1",
    "esr_el1",
    "far_el1",
    "par_el1",
    "cpacr_el1",
    "cntkctl_el1",
    "csselr_el1",
    "mdscr_el1",
    "mpidr_el1",
    "midr_el1",
    "dbgbvr0_el1",
    "dbgbcr0_el1",
    "dbgwvr1_el1",
    "dbgwcr1_el1",
);

/// The host gives its own registers values that no guest has.
fn set_system(seed: u64) {
    msr!("ttbr1_el1", seed & 0xffff_f000);
    msr!("contextidr_el1", seed & 0xffff_ffff);
    msr!("tpidr_el0", seed);
    msr!("tpidrro_el0", seed + 1);
    msr!("sp_el0", seed + 2);
    msr!("elr_el1", seed + 3);
    msr!("esr_el1", seed & 0xffff_ffff);
    msr!("far_el1", seed + 4);
    msr!("dbgbvr0_el1", seed & 0xffff_fffc);
    msr!("dbgwvr1_el1", seed & 0xffff_fff8);
}

/// Two guests with all registers in use take turns with a host that changes
/// its own: each world finds its registers as it left them.
fn each_world_keeps_its_own() -> Outcome {
    let (seed_a, seed_b) = (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
    let (vm_a, mut a) = Vm::launch(soak(), [seed_a; 4])?;
    let (vm_b, mut b) = Vm::launch(soak(), [seed_b; 4])?;
    let (sum_a, sum_b) = (a.report(0x200)?, b.report(0x200)?);
    ensure!(sum_a != sum_b, "the checksum says nothing");
    for round in 0..20 {
        let seed = 0x1122_3344_5566_7788_u64.wrapping_mul(round * 2 + 1);
        set_system(seed);
        set_fp(seed);
        let before = system();
        let (guest, sum) = if round % 3 == 0 { (&mut b, sum_b) } else { (&mut a, sum_a) };
        let got = guest.report(0x200)?;
        let after = system();
        ensure!(got == sum, "round {round}: the guest's checksum is {got:#x}, not {sum:#x}");
        for ((name, old), (_, new)) in before.iter().zip(&after) {
            ensure!(old == new, "round {round}: {name} was {old:#x}, is {new:#x}");
        }
    }
    set_system(0);
    vm_a.destroy()?;
    vm_b.destroy()
}
test!(each_world_keeps_its_own, "T07 T08");

guest_program!(
    secrets,
    ".arch_extension fp",
    ".arch_extension simd",
    "mov x1, #0x300000",
    "msr cpacr_el1, x1",
    "isb",
    // Exits of each class, with the secret x0 in all registers.
    ".macro secret_all",
    ".irp n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30",
    "mov x\\n, x0",
    ".endr",
    ".irp v, v0.2d, v1.2d, v2.2d, v3.2d, v4.2d, v5.2d, v6.2d, v7.2d, v8.2d, v9.2d, v10.2d, v11.2d, v12.2d, v13.2d, v14.2d, v15.2d, v16.2d, v17.2d, v18.2d, v19.2d, v20.2d, v21.2d, v22.2d, v23.2d, v24.2d, v25.2d, v26.2d, v27.2d, v28.2d, v29.2d, v30.2d, v31.2d",
    "dup \\v, x0",
    ".endr",
    ".irp reg, ttbr0_el1, ttbr1_el1, tpidr_el0, tpidrro_el0, tpidr_el1, sp_el0, elr_el1, far_el1, mair_el1, contextidr_el1, amair_el1, par_el1, dbgbvr0_el1, dbgwvr0_el1",
    "msr \\reg, x0",
    ".endr",
    "mov sp, x0",
    ".endm",
    "secret_all",
    "ldr wzr, [x20]",
    "secret_all",
    "ldrb w5, [x20]",
    "secret_all",
    "str xzr, [x20]",
    "secret_all",
    "mrs x6, cntp_ctl_el0",
    "secret_all",
    "msr cntp_ctl_el0, xzr",
    "secret_all",
    "wfi",
    "movz x5, #0x4010, lsl #16",
    "ldr x5, [x5]",
    "secret_all",
    "mov x15, x0",
    "movz x0, #0x0001",
    "movk x0, #0xc400, lsl #16",
    "mov x1, xzr",
    "mov x2, xzr",
    "mov x3, xzr",
    "hvc #0",
    "mov x0, x15",
    "secret_all",
    "1: b 1b"
);

const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec3;

/// Whether a register shows the secret or a part of it.
const fn shows(value: u64) -> bool {
    value == SECRET
        || value & 0xffff_ffff == SECRET & 0xffff_ffff
        || value >> 32 == SECRET >> 32
        || value == SECRET & !3
        || value == SECRET & !0xfff
}

/// At each exit class, all that the host can look at.
fn nothing_shows() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(secrets(), [SECRET; 4])?;
    let mut seen = 0_u32;
    for step in 0..9 {
        gic::alarm(50);
        loop {
            set_fp(0x1234_1234_1234_1234);
            for at in (vcpu.page + 0x800..vcpu.page + 0x1000).step_by(8) {
                write(at, 0x0dd0_0dd0_0dd0_0dd0);
            }
            vcpu.entry.flags.0 |= havmsi_abi::EntryFlags::TRAP_WFI;
            vcpu.write_entry();
            let mut x: [u64; 31] = core::array::from_fn(|i| 0x4057_0000_0000_0000 + i as u64);
            x[0] = u64::from(Function::VcpuRun.id());
            x[1] = vm.handle;
            x[2] = 0;
            let before = x;
            smc::call_with_all(&mut x);
            let fp = get_fp();
            vcpu.entry.flags.0 = 0;
            expect!(x[0], 0);
            let class = x[1];
            for (i, (old, new)) in before.iter().zip(&x).enumerate().skip(4) {
                ensure!(old == new, "step {step}: x{i} was {old:#x}, is {new:#x}");
            }
            ensure!(!x.iter().any(|v| shows(*v)), "step {step}: x {x:x?}");
            for (i, v) in fp.iter().enumerate() {
                ensure!(
                    *v == 0 || *v == 0x1234_1234_1234_1234,
                    "step {step}: half {i} of the FP registers is {v:#x}"
                );
            }
            for (name, v) in system() {
                ensure!(!shows(v), "step {step}: {name} is {v:#x}");
            }
            for at in (vcpu.page..vcpu.page + 0x1000).step_by(8) {
                ensure!(!shows(read(at)), "step {step}: {:#x} of the run page", at - vcpu.page);
            }
            seen |= 1 << class;
            if class != ExitClass::Irq as u64 || gic::alarm_fired() {
                let flags = match class {
                    1..=5 => havmsi_abi::EntryFlags::COMPLETE,
                    _ => 0,
                };
                if class == ExitClass::Fault as u64 {
                    vm.map(FREE)?;
                }
                vcpu.entry.flags.0 = flags;
                vcpu.entry.data = 0;
                break;
            }
        }
    }
    gic::quiet();
    expect!(seen, 0b1111_1111);
    vm.destroy()
}
test!(nothing_shows, "T07");

guest_program!(raw first_look,
    "movz x20, #0x0900, lsl #16",
    "orr x4, x4, x5", "orr x4, x4, x6", "orr x4, x4, x7", "orr x4, x4, x8", "orr x4, x4, x9",
    "orr x4, x4, x10", "orr x4, x4, x11", "orr x4, x4, x12", "orr x4, x4, x13", "orr x4, x4, x14",
    "orr x4, x4, x15", "orr x4, x4, x16", "orr x4, x4, x17", "orr x4, x4, x18", "orr x4, x4, x19",
    "orr x4, x4, x21", "orr x4, x4, x22", "orr x4, x4, x23", "orr x4, x4, x24", "orr x4, x4, x25",
    "orr x4, x4, x26", "orr x4, x4, x27", "orr x4, x4, x28", "orr x4, x4, x29", "orr x4, x4, x30",
    "str x4, [x20]",
    "str x0, [x20]", "str x1, [x20]", "str x2, [x20]", "str x3, [x20]",
    "adr x5, .", "str x5, [x20]",
    "mrs x5, CurrentEL", "str x5, [x20]",
    "mrs x5, daif", "str x5, [x20]",
    "mrs x5, SPSel", "str x5, [x20]",
    "mrs x5, sctlr_el1", "str x5, [x20]",
    "mov x4, sp",
    ".irp reg, tcr_el1, ttbr0_el1, ttbr1_el1, mair_el1, vbar_el1, contextidr_el1, tpidr_el0, tpidrro_el0, tpidr_el1, sp_el0, elr_el1, spsr_el1, esr_el1, far_el1, cpacr_el1, cntkctl_el1, mdscr_el1, dbgbvr0_el1, dbgbcr0_el1, dbgwvr1_el1, dbgwcr1_el1",
    "mrs x5, \\reg",
    "orr x4, x4, x5",
    ".endr",
    "str x4, [x20]",
    ".arch_extension fp",
    ".arch_extension simd",
    "mov x1, #0x300000",
    "msr cpacr_el1, x1",
    "isb",
    "mrs x4, fpcr", "mrs x5, fpsr", "orr x4, x4, x5",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
    "umov x5, v\\n\\().d[0]", "orr x4, x4, x5",
    "umov x5, v\\n\\().d[1]", "orr x4, x4, x5",
    ".endr",
    "str x4, [x20]",
    "b ."
);

/// What a vCPU starts with: its boot context, and nothing of anyone else's.
fn clean_start() -> Outcome {
    let (vm_a, mut a) = Vm::launch(soak(), [SECRET; 4])?;
    a.report(0x200)?;
    a.report(0x200)?;
    set_system(0x7777_7777_7777_7000);
    set_fp(0x7777_7777_7777_7777);
    let (vm, mut vcpu) = Vm::launch(first_look(), [11, 22, 33, 44])?;
    expect!(vcpu.report(0)?, 0);
    for value in [11, 22, 33, 44] {
        expect!(vcpu.report(0)?, value);
    }
    ensure!(vcpu.report(0)? & !0xfff == RAM, "another PC");
    expect!(vcpu.report(0)?, 4);
    expect!(vcpu.report(0)?, 0x3c0);
    expect!(vcpu.report(0)?, 1);
    expect!(vcpu.report(0)? & 0x1005, 0);
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.report(0)?, 0);
    set_system(0);
    vm.destroy()?;
    vm_a.destroy()
}
test!(clean_start, "T07 T24");

guest_program!(
    identity,
    "mrs x1, midr_el1",
    "str x1, [x20]",
    "mrs x1, mpidr_el1",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C4_0",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C4_1",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C5_0",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C6_1",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C6_2",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C7_0",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C7_1",
    "str x1, [x20]",
    "mrs x1, S3_0_C0_C7_2",
    "str x1, [x20]",
    "mov x1, xzr",
    ".irp reg, S3_0_C0_C1_0, S3_0_C0_C1_1, S3_0_C0_C1_2, S3_0_C0_C1_4, S3_0_C0_C2_0, S3_0_C0_C2_5, S3_0_C0_C3_0, S3_0_C0_C4_2, S3_0_C0_C4_4, S3_0_C0_C4_5, S3_0_C0_C5_1, S3_0_C0_C6_3, S3_0_C0_C7_3, S3_0_C0_C7_4, S3_0_C0_C7_7",
    "mrs x2, \\reg",
    "orr x1, x1, x2",
    ".endr",
    "str x1, [x20]",
    "mrs x1, actlr_el1",
    "str x1, [x20]",
    "mrs x30, S3_0_C0_C4_0",
    "str x30, [x20]",
    "mrs xzr, S3_0_C0_C4_0"
);

fn what_a_guest_sees_of_the_cpu() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(identity(), [0; 4])?;
    expect!(vcpu.report(0)?, mrs!("midr_el1"));
    expect!(vcpu.report(0)?, 1 << 31);
    let pfr0 = vcpu.report(0)?;
    // AArch64 only; no EL2, EL3, RAS, SVE, MPAM, AMU, RME.
    expect!(pfr0 & 0x00f0_fffe_f000_ffff, 0x11);
    for (crm_op2, host, hidden) in [
        ("PFR1", mrs!("S3_0_C0_C4_1"), 0x0000_f0f0_0f0f_ff00),
        ("DFR0", mrs!("S3_0_C0_C5_0"), 0x00f0_ff0f_0000_0ff0),
        ("ISAR1", mrs!("S3_0_C0_C6_1"), 0xff00_0000_ff00_0ff0),
        ("ISAR2", mrs!("S3_0_C0_C6_2"), 0x000f_ff0f),
        ("MMFR0", mrs!("S3_0_C0_C7_0"), 0xff00_0000_0000_0000),
        ("MMFR1", mrs!("S3_0_C0_C7_1"), 0x0000_0f00_000f_0ff0),
        ("MMFR2", mrs!("S3_0_C0_C7_2"), 0x0f00_ff00_0f00_f000),
    ] {
        let value = vcpu.report(0)?;
        ensure!(value & hidden == 0, "{crm_op2}: {value:#x}");
        ensure!(value == host, "{crm_op2}: {value:#x}, the host has {host:#x}");
    }
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.report(0)?, pfr0);
    vcpu.end()?;
    vm.destroy()
}
test!(what_a_guest_sees_of_the_cpu, "");

guest_program!(
    undefined,
    "mov x1, #0x3300000",
    "orr x1, x1, #0x30000",
    "msr cpacr_el1, x1",
    "isb",
    "mrs x9, pmcr_el0",
    "msr pmcntenset_el0, x9",
    "mrs x9, pmccntr_el0",
    "mrs x9, S2_1_C0_C1_0",
    "mrs x9, S3_0_C9_C10_0",
    "mrs x9, S3_0_C9_C11_0",
    "mrs x9, S3_0_C1_C2_1",
    ".inst 0x04bf5029",
    ".inst 0xd503477f",
    "mrs x9, S3_0_C1_C2_0",
    "mrs x9, S3_0_C2_C1_0",
    "mrs x9, S3_0_C1_C0_6",
    "mrs x9, S3_0_C5_C3_0",
    "mrs x9, S3_0_C10_C4_3",
    "mrs x9, S3_3_C13_C2_0",
    "mrs x9, S3_0_C13_C0_7",
    "mrs x9, hcr_el2",
    "msr cntvoff_el2, x9",
    "mrs x9, scr_el3",
    "mrs x9, S3_7_C14_C2_1",
    ".inst 0"
);

fn undefined_in_a_guest() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(undefined(), [0; 4])?;
    let mut count = 0;
    while count < 21 {
        let fault = vcpu.fault()?;
        // Trace is answered as a debug register on some CPUs: never a value.
        ensure!(fault.is_undefined(), "number {count}: {fault:x?}");
        count += 1;
    }
    vcpu.end()?;
    vm.destroy()
}
test!(undefined_in_a_guest, "T18 T23");

guest_program!(
    debugger,
    "mov x1, #0x1230",
    "msr dbgbvr0_el1, x1",
    "mrs x2, dbgbvr0_el1",
    "str x2, [x20]",
    "mov x1, #0x1e4",
    "msr dbgbcr1_el1, x1",
    "mrs x2, dbgbcr1_el1",
    "str x2, [x20]",
    "mrs x2, mdscr_el1",
    "str x2, [x20]",
    "mrs x2, oslsr_el1",
    "str x2, [x20]",
    "mrs x2, mdrar_el1",
    "str x2, [x20]",
    "msr oslar_el1, xzr",
    "isb",
    // A watchpoint on a word of the stack page, for loads and stores at EL1.
    "movz x5, #0x4000, lsl #16",
    "orr x5, x5, #0x2000",
    "msr dbgwvr0_el1, x5",
    "mov x1, #0x1fe0 ",
    "orr x1, x1, #0x18",
    "movz x1, #0x1ffb",
    "msr dbgwcr0_el1, x1",
    "str x1, [x5]",
    "movz x1, #0xa000",
    "msr mdscr_el1, x1",
    "isb",
    "msr daifclr, #8",
    "ldr x1, [x5]",
    "mov x6, #2",
    "str x6, [x5]",
    "ldr x7, [x5, #64]",
    "mrs x2, mdscr_el1",
    "str x2, [x20]",
    "mrs x2, dbgwcr0_el1",
    "str x2, [x20]",
    "ldr x1, [x5]",
    "msr mdscr_el1, xzr",
    "isb",
    "ldr x1, [x5]",
    "str x1, [x20]",
    "mrs x2, dbgbvr0_el1",
    "str x2, [x20]"
);

/// A guest debugs itself with its own registers; the host's don't act in it
/// and are kept. Nor do the host's OS lock and double lock, which turn
/// breakpoints off.
fn debug_registers() -> Outcome {
    debug_itself(0)?;
    debug_itself(1)
}

fn debug_itself(lock: u64) -> Outcome {
    let vm = Vm::new(2)?;
    vm.furnish(8)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM, 0, 0, 0, 0])?;
    vm.populate(RAM, debugger())?;
    vm.populate(RAM + 0x1000, crate::guest::vectors())?;
    vm.populate(RAM + 0x2000, &[1, 0, 0, 0, 0, 0, 0, 0])?;
    vm.call(Function::VmActivate, &[])?;
    // The host's breakpoint at the guest's first instruction, armed.
    msr!("oslar_el1", 0);
    msr!("dbgbvr0_el1", RAM);
    msr!("dbgbcr0_el1", 0x1e7);
    msr!("dbgwvr0_el1", RAM + 0x2000);
    msr!("dbgwcr0_el1", 0x1fff);
    let before = (mrs!("dbgbcr0_el1"), mrs!("dbgwcr0_el1"));
    msr!("oslar_el1", lock);
    msr!("osdlr_el1", lock);
    let locks = (mrs!("oslsr_el1"), mrs!("osdlr_el1"));
    let outcome = watch_itself(&mut vcpu);
    let after = (mrs!("oslsr_el1"), mrs!("osdlr_el1"));
    msr!("oslar_el1", 0);
    msr!("osdlr_el1", 0);
    outcome?;
    expect!((locks, after), ((8, 0), (8, 0)));
    expect!((mrs!("dbgbcr0_el1"), mrs!("dbgwcr0_el1")), before);
    expect!(mrs!("dbgbvr0_el1"), RAM);
    expect!(mrs!("dbgwvr0_el1"), RAM + 0x2000);
    msr!("dbgbcr0_el1", 0);
    msr!("dbgwcr0_el1", 0);
    vm.destroy()
}
test!(debug_registers, "T18");

/// What [`debugger`] reports.
fn watch_itself(vcpu: &mut Vcpu) -> Outcome {
    expect!(vcpu.report(0)?, 0x1230);
    expect!(vcpu.report(0)?, 0x1e4);
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.report(0)?, 8);
    expect!(vcpu.report(0)?, 0);
    // The load and the store hit; after each the guest's handler goes on
    // behind it.
    for write in [0, 1 << 6] {
        let fault = vcpu.fault()?;
        ensure!(
            fault.esr >> 26 == 0x35 && fault.esr & 1 << 6 == write && fault.far == RAM + 0x2000,
            "{fault:x?}"
        );
    }
    expect!(vcpu.report(0)?, 0xa000);
    expect!(vcpu.report(0)?, 0x1ffb);
    ensure!(vcpu.fault()?.esr >> 26 == 0x35, "no second hit");
    // The store was skipped.
    expect!(vcpu.report(0)?, 0x1ffb);
    expect!(vcpu.report(0)?, 0x1230);
    vcpu.end()
}

guest_program!(
    claimer,
    "1: mrs x1, dbgclaimclr_el1",
    "str x1, [x20]",
    "mov x1, #0x5a",
    "msr dbgclaimset_el1, x1",
    "b 1b"
);

/// Claim tags: eight bits that one world leaves for itself.
fn claim_tags() -> Outcome {
    msr!("dbgclaimset_el1", 0xa5);
    let before = mrs!("dbgclaimclr_el1");
    for _ in 0..2 {
        let (vm, mut vcpu) = Vm::launch(claimer(), [0; 4])?;
        expect!(vcpu.report(0)?, 0);
        expect!(vcpu.report(0)?, 0x5a);
        expect!(mrs!("dbgclaimclr_el1"), before);
        vm.destroy()?;
    }
    msr!("dbgclaimclr_el1", 0xff);
    Ok(())
}
test!(claim_tags, "T07 T08");

extern "C" fn leave_registers(_: u64) -> u64 {
    set_fp(0x005e_c2e7);
    msr!("dbgbvr0_el1", 0x1230);
    msr!("dbgwvr0_el1", 0x4560);
    0
}

extern "C" fn find_registers(_: u64) -> u64 {
    msr!("cpacr_el1", 0x30_0000);
    let fp = get_fp().into_iter().fold(0, |all, v| all | v);
    fp | mrs!("dbgbvr0_el1") | mrs!("dbgwvr0_el1") | mrs!("dbgclaimclr_el1")
}

/// A CPU comes on with nothing in what a reset of the hardware need not clear:
/// a guest may have had it.
fn come_on_empty() -> Outcome {
    cpu::start(1, leave_registers, 0)?;
    expect!(cpu::join(1)?, 0);
    cpu::turn_off(1)?;
    cpu::start(1, find_registers, 0)?;
    expect!(cpu::join(1)?, 0);
    cpu::turn_off(1)
}
test!(come_on_empty, "T24", several_cpus);

guest_program!(count, "1: isb", "mrs x1, cntvct_el0", "str x1, [x20]", "b 1b");

/// The guest's counter: from 0 at the VM's making, never back, whatever the
/// host does to its own.
fn counter() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(count(), [0; 4])?;
    let other = Vm::new(1)?;
    ensure!(other.cntvoff > vm.cntvoff, "both VMs have one offset");
    let mut last = 0;
    for round in 0..30 {
        match round % 3 {
            0 => host(Function::TimerLoad, &[0])?,
            1 => host(Function::TimerLoad, &[other.handle])?,
            _ => host(Function::TimerLoad, &[vm.handle])?,
        };
        msr!("cntv_cval_el0", u64::MAX);
        let low = cpu::now();
        let value = vcpu.report(0)?;
        let high = cpu::now();
        ensure!(value > last, "round {round}: from {last} to {value}");
        ensure!(
            (low - vm.cntvoff..=high - vm.cntvoff).contains(&value),
            "round {round}: {value}, not in {:?}",
            low - vm.cntvoff..=high - vm.cntvoff
        );
        last = value;
    }
    host(Function::TimerLoad, &[0])?;
    other.destroy()?;
    vm.destroy()
}
test!(counter, "T28");

guest_program!(
    memory_user,
    // x0: what to store at FREE; reports what was there, again and again.
    "movz x4, #0x4010, lsl #16",
    "1: ldr x5, [x4]",
    "str x5, [x20]",
    "str x0, [x4]",
    "add x0, x0, #1",
    "b 1b"
);

/// Two VMs with the same addresses have memory of their own.
fn two_vms() -> Outcome {
    let (vm_a, mut a) = Vm::launch(memory_user(), [0xa000; 4])?;
    let (vm_b, mut b) = Vm::launch(memory_user(), [0xb000; 4])?;
    let (page_a, page_b) = (vm_a.map(FREE)?, vm_b.map(FREE)?);
    expect!((a.report(0)?, b.report(0)?), (0, 0));
    for i in 0..10 {
        expect!(a.report(0)?, 0xa000 + i);
        expect!(b.report(0)?, 0xb000 + i);
        expect!((memory::peek(page_a)?, memory::peek(page_b)?), (0, 0));
    }
    // A's page goes, and B's stays.
    vm_a.call(Function::PageUnmap, &[FREE, 1])?;
    ensure!(memory::is_sealed(page_a), "not sealed");
    memory::poke(page_a, 0x600d)?;
    expect!(b.report(0)?, 0xb00a);
    expect!(a.expect(ExitClass::Fault)?.ipa, FREE);
    // A's old page in B, elsewhere; a new one for A: zero.
    vm_b.call(Function::PageMap, &[FREE + 0x1000, page_a, 4096])?;
    // A can't have zeros where it had memory.
    let new = memory::take(1);
    expect!(vm_a.call(Function::PageMap, &[FREE, new, 4096]), Err(smc::INTEGRITY));
    expect!(host(Function::VcpuRun, &[vm_a.handle, 0]), Err(smc::INTEGRITY));
    expect!(b.report(0)?, 0xb00b);
    vm_a.destroy()?;
    vm_b.destroy()
}
test!(two_vms, "T01 T04 T13");

/// After a reset the same VM runs what was launched then, at the same address.
fn nothing_stale_after_a_reset() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(memory_user(), [1; 4])?;
    vm.map(FREE)?;
    expect!(vcpu.report(0)?, 0);
    expect!(vcpu.report(0)?, 1);
    for _ in 0..3 {
        smc::until_done(Function::VmReset, &[vm.handle], 100)?;
        vm.boot(count(), [0; 4])?;
        vcpu.entry.flags.0 = 0;
        vcpu.exit = crate::guest::Exit::default();
        ensure!(vcpu.report(0)? != 0, "no counter");
        smc::until_done(Function::VmReset, &[vm.handle], 100)?;
        vm.boot(memory_user(), [7; 4])?;
        vcpu.exit = crate::guest::Exit::default();
        expect!(vcpu.expect(ExitClass::Fault)?.ipa, FREE);
        vm.map(FREE)?;
        expect!(vcpu.report(0)?, 0);
        expect!(vcpu.report(0)?, 7);
    }
    ensure!(try_instruction!("nop").is_none(), "a fault of a nop");
    vm.destroy()
}
test!(nothing_stale_after_a_reset, "T13 T24");
