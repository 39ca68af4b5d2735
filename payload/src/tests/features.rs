// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host sees of the CPU, and what traps.

use crate::exception::at_el0;
use crate::harness::{Outcome, gic3};
use crate::{ensure, expect, guest_program, mrs, msr, test, try_instruction};

/// Fields of ID registers that say 0: nothing of this is switched.
fn hidden_fields() -> Outcome {
    let pfr0 = mrs!("S3_0_C0_C4_0");
    for (field, name) in [
        (8, "EL2"),
        (12, "EL3"),
        (28, "RAS"),
        (32, "SVE"),
        (36, "SEL2"),
        (40, "MPAM"),
        (44, "AMU"),
        (52, "RME"),
    ] {
        ensure!(pfr0 >> field & 15 == 0, "{name}: {pfr0:#x}");
    }
    let pfr1 = mrs!("S3_0_C0_C4_1");
    for (field, name) in
        [(8, "MTE"), (12, "RAS_frac"), (16, "MPAM_frac"), (24, "SME"), (36, "NMI"), (44, "GCS")]
    {
        ensure!(pfr1 >> field & 15 == 0, "{name}: {pfr1:#x}");
    }
    let dfr0 = mrs!("S3_0_C0_C5_0");
    for (field, name) in [
        (4, "TraceVer"),
        (8, "PMUVer"),
        (32, "PMSVer"),
        (40, "TraceFilt"),
        (44, "TraceBuffer"),
        (52, "BRBE"),
    ] {
        ensure!(dfr0 >> field & 15 == 0, "{name}: {dfr0:#x}");
    }
    let isar1 = mrs!("S3_0_C0_C6_1");
    for (field, name) in
        [(4, "APA"), (8, "API"), (24, "GPA"), (28, "GPI"), (56, "XS"), (60, "LS64")]
    {
        ensure!(isar1 >> field & 15 == 0, "{name}: {isar1:#x}");
    }
    let isar2 = mrs!("S3_0_C0_C6_2");
    for (field, name) in [(8, "GPA3"), (12, "APA3"), (16, "MOPS")] {
        ensure!(isar2 >> field & 15 == 0, "{name}: {isar2:#x}");
    }
    let mmfr0 = mrs!("S3_0_C0_C7_0");
    for (field, name) in [(56, "FGT"), (60, "ECV")] {
        ensure!(mmfr0 >> field & 15 == 0, "{name}: {mmfr0:#x}");
    }
    let mmfr1 = mrs!("S3_0_C0_C7_1");
    for (field, name) in [(8, "VH"), (16, "LO"), (40, "HCX")] {
        ensure!(mmfr1 >> field & 15 == 0, "{name}: {mmfr1:#x}");
    }
    let mmfr2 = mrs!("S3_0_C0_C7_2");
    for (field, name) in [(24, "NV"), (40, "FWB")] {
        ensure!(mmfr2 >> field & 15 == 0, "{name}: {mmfr2:#x}");
    }
    for (value, name) in [
        (mrs!("S3_0_C0_C4_2"), "PFR2"),
        (mrs!("S3_0_C0_C4_4"), "ZFR0"),
        (mrs!("S3_0_C0_C4_5"), "SMFR0"),
        (mrs!("S3_0_C0_C5_1"), "DFR1"),
        (mrs!("S3_0_C0_C5_4"), "AFR0"),
        (mrs!("S3_0_C0_C6_3"), "ISAR3"),
        (mrs!("S3_0_C0_C7_3"), "MMFR3"),
        (mrs!("S3_0_C0_C7_4"), "MMFR4"),
    ] {
        ensure!(value == 0, "ID_AA64{name}: {value:#x}");
    }
    // What must be there: AArch64 at EL1, FP, the counter of breakpoints.
    expect!(pfr0 >> 4 & 15, 1);
    ensure!(pfr0 >> 16 & 15 <= 1, "no FP: {pfr0:#x}");
    ensure!(dfr0 & 15 >= 6, "DebugVer: {dfr0:#x}");
    Ok(())
}
test!(hidden_fields, "T18");

macro_rules! undefined {
    ($($line:literal),+ $(,)?) => {
        $(
            let fault = try_instruction!($line);
            ensure!(fault.is_some_and(|f| f.is_undefined()), "{}: {fault:x?}", $line);
        )+
    };
}

fn hypercall() -> Outcome {
    undefined!("hvc #0", "hvc #0xffff");
    Ok(())
}
test!(hypercall, "T20");

fn performance_monitors() -> Outcome {
    undefined!(
        "mrs x9, pmcr_el0",
        "msr pmcr_el0, x9",
        "mrs x9, pmccntr_el0",
        "msr pmcntenset_el0, x9",
        "msr pmuserenr_el0, x9",
        "mrs x9, pmintenset_el1",
        "mrs x9, S3_3_C14_C8_0",
        "mrs x9, S3_3_C13_C2_0",
    );
    Ok(())
}
test!(performance_monitors, "T18");

fn trace_and_profiling() -> Outcome {
    undefined!(
        "mrs x9, S2_1_C0_C1_0",
        "msr S2_1_C0_C1_0, x9",
        "mrs x9, S3_0_C1_C2_1",
        "msr S3_0_C1_C2_1, x9",
        "mrs x9, S3_0_C9_C10_0",
        "msr S3_0_C9_C10_0, x9",
        "mrs x9, S3_0_C9_C9_0",
        "mrs x9, S3_0_C9_C11_0",
        "msr S3_0_C9_C11_0, x9",
    );
    Ok(())
}
test!(trace_and_profiling, "T14 T18");

fn vector_extensions() -> Outcome {
    // EL1 itself permits all of them: FPEN, ZEN, SMEN.
    let cpacr = mrs!("cpacr_el1");
    msr!("cpacr_el1", cpacr | 0b11 << 20 | 0b11 << 16 | 0b11 << 24);
    let outcome = vector_instructions();
    msr!("cpacr_el1", cpacr);
    outcome
}

fn vector_instructions() -> Outcome {
    undefined!(
        ".inst 0x04bf5029", // rdvl x9, #1
        ".inst 0x2518e3e0", // ptrue p0.b
        "mrs x9, S3_0_C1_C2_0",
        "msr S3_0_C1_C2_0, x9",
        ".inst 0xd503477f", // smstart
        "mrs x9, S3_0_C1_C2_6",
        "mrs x9, S3_3_C4_C2_2",
        "mrs x9, S3_3_C13_C0_5",
    );
    Ok(())
}
test!(vector_extensions, "T07");

fn keys_tags_errors_and_the_rest() -> Outcome {
    undefined!(
        "mrs x9, S3_0_C2_C1_0", // APIAKeyLo
        "msr S3_0_C2_C1_0, x9",
        "mrs x9, S3_0_C2_C3_1",  // APGAKeyHi
        "mrs x9, S3_0_C1_C0_6",  // GCR
        "msr S3_0_C1_C0_5, x9",  // RGSR
        "mrs x9, S3_0_C5_C6_0",  // TFSR
        "mrs x9, S3_0_C5_C3_0",  // ERRIDR
        "msr S3_0_C5_C3_1, x9",  // ERRSELR
        "msr S3_0_C5_C4_5, x9",  // ERXPFGCTL
        "mrs x9, S3_0_C10_C4_3", // LORC
        "mrs x9, S3_0_C10_C5_0", // MPAM1
        "mrs x9, S3_0_C2_C0_3",  // TCR2
        "mrs x9, S3_0_C1_C0_3",  // SCTLR2
        "mrs x9, S3_0_C10_C2_3", // PIR
        "mrs x9, S3_0_C13_C0_7", // SCXTNUM_EL1
        "mrs x9, S3_3_C13_C0_7", // SCXTNUM_EL0
        "mrs x9, S3_0_C2_C5_0",  // GCSCR
    );
    Ok(())
}
test!(keys_tags_errors_and_the_rest, "T07");

fn higher_levels() -> Outcome {
    undefined!(
        "mrs x9, hcr_el2",
        "msr hcr_el2, x9",
        "mrs x9, vttbr_el2",
        "msr vttbr_el2, x9",
        "msr vbar_el2, x9",
        "msr sctlr_el2, x9",
        "msr cntvoff_el2, x9",
        "msr cnthctl_el2, x9",
        "msr S3_4_C12_C11_0, x9",
        "msr S3_4_C12_C12_0, x9",
        "msr S3_4_C12_C9_5, x9",
        "mrs x9, scr_el3",
        "msr scr_el3, x9",
        "msr S3_6_C12_C12_5, x9",
        "msr S3_6_C12_C12_7, x9",
        "mrs x9, S3_7_C14_C2_1",
        "tlbi ipas2e1is, x9",
        "tlbi alle1is",
        "at s12e1r, x9",
    );
    Ok(())
}
test!(higher_levels, "T06 T28");

/// The monitor's interrupt is group 0: its registers trap.
fn group_0_interrupts() -> Outcome {
    undefined!(
        "mrs x9, S3_0_C12_C8_0",
        "msr S3_0_C12_C8_1, x9",
        "mrs x9, S3_0_C12_C8_2",
        "msr S3_0_C12_C12_6, x9",
        "msr S3_0_C12_C8_4, x9",
    );
    Ok(())
}
test!(group_0_interrupts, "T15", gic3);

guest_program!(raw el0_calls,
    "movz w0, #0x8400, lsl #16",
    "smc #0",
    "svc #0");
guest_program!(raw el0_hvc,
    "hvc #0",
    "svc #0");
guest_program!(raw el0_id,
    "mrs x0, S3_0_C0_C4_0",
    "svc #0");

fn calls_from_el0() -> Outcome {
    for program in [el0_calls(), el0_hvc(), el0_id()] {
        let fault = at_el0(program);
        ensure!(
            fault.is_some_and(|f| f.vector == 8 && matches!(f.class(), 0 | 0x18)),
            "at EL0: {fault:x?}"
        );
    }
    Ok(())
}
test!(calls_from_el0, "T20");

/// Cache maintenance by set and way, and of the whole instruction cache, goes.
fn maintenance() -> Outcome {
    for fault in [
        try_instruction!("mov x9, #0", "dc cisw, x9", "dc csw, x9", "dsb sy"),
        try_instruction!("ic iallu", "ic ialluis", "dsb sy"),
        try_instruction!("tlbi vmalle1", "tlbi vmalle1is", "dsb sy"),
    ] {
        ensure!(fault.is_none(), "{fault:x?}");
    }
    Ok(())
}
test!(maintenance, "");
