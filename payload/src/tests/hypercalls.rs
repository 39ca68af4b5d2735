// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest may call: answers of the monitor, and calls that reach the host.

use havmsi_abi::{EntryFlags, ExitClass, FUNCTION_BASE, Function, GUEST_KEY_CALL, UID};

use crate::guest::{Exit, RAM, Vcpu, Vm};
use crate::harness::{Failure, Outcome};
use crate::smc::{self, STATE, host, psci};
use crate::{ensure, expect, guest_program, test};

// Calls what the host tells it to, and reports x0 to x3.
guest_program!(
    by_hvc,
    "1: ldr x0, [x20, #0x300]",
    "ldr x1, [x20, #0x308]",
    "ldr x2, [x20, #0x310]",
    "ldr x3, [x20, #0x318]",
    "hvc #0",
    "str x0, [x20, #0x320]",
    "str x1, [x20, #0x328]",
    "str x2, [x20, #0x330]",
    "str x3, [x20, #0x338]",
    "b 1b"
);
guest_program!(
    by_smc,
    "1: ldr x0, [x20, #0x300]",
    "ldr x1, [x20, #0x308]",
    "ldr x2, [x20, #0x310]",
    "ldr x3, [x20, #0x318]",
    "smc #0",
    "str x0, [x20, #0x320]",
    "str x1, [x20, #0x328]",
    "str x2, [x20, #0x330]",
    "str x3, [x20, #0x338]",
    "b 1b"
);

/// What became of a guest's call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Called {
    /// The monitor answered.
    Answered([u64; 4]),
    /// It reached the host.
    Forwarded(Exit),
}

/// Has the guest make a call.
#[track_caller]
pub fn make(vcpu: &mut Vcpu, x: [u64; 4]) -> Result<Called, Failure> {
    for value in x {
        vcpu.expect(ExitClass::MmioRead)?;
        vcpu.complete(value);
    }
    let exit = vcpu.run()?;
    if exit.class == ExitClass::Hvc {
        return Ok(Called::Forwarded(exit));
    }
    let x0 = exit.data;
    if exit.class != ExitClass::MmioWrite {
        return Err(Failure::new(format_args!("{exit:x?}")));
    }
    Ok(Called::Answered([x0, vcpu.report(0x328)?, vcpu.report(0x330)?, vcpu.report(0x338)?]))
}

/// The results that the guest sees of a call that was forwarded.
#[track_caller]
pub fn results(vcpu: &mut Vcpu) -> Result<[u64; 4], Failure> {
    Ok([vcpu.report(0x320)?, vcpu.report(0x328)?, vcpu.report(0x330)?, vcpu.report(0x338)?])
}

fn answered_by_the_monitor() -> Outcome {
    const NONE: u64 = psci::NOT_SUPPORTED;
    for program in [by_hvc(), by_smc()] {
        let (vm, mut vcpu) = Vm::launch(program, [0; 4])?;
        for (x, x0) in [
            ([psci::SMCCC_VERSION, 0, 0, 0], 0x1_0002),
            ([psci::SMCCC_ARCH_FEATURES, psci::SMCCC_VERSION, 0, 0], 0),
            ([psci::SMCCC_ARCH_FEATURES, 0x8000_0002, 0, 0], NONE),
            ([psci::SMCCC_ARCH_FEATURES, 0x8000_3fff, 0, 0], NONE),
            ([psci::VERSION, 0, 0, 0], 0x1_0001),
            ([psci::MIGRATE_INFO_TYPE, 0, 0, 0], 2),
            ([psci::FEATURES, psci::CPU_ON_64, 0, 0], 0),
            ([psci::FEATURES, psci::CPU_OFF, 0, 0], 0),
            ([psci::FEATURES, psci::SYSTEM_OFF, 0, 0], 0),
            ([psci::FEATURES, psci::SMCCC_VERSION, 0, 0], 0),
            ([psci::FEATURES, 0x8400_0005, 0, 0], NONE),
            ([psci::FEATURES, u64::from(FUNCTION_BASE), 0, 0], NONE),
            ([psci::AFFINITY_INFO_64, 0, 0, 0], 0),
            ([psci::AFFINITY_INFO_64, 1, 0, 0], 1),
            ([psci::AFFINITY_INFO_64, 2, 0, 0], psci::INVALID_PARAMETERS),
            ([psci::AFFINITY_INFO_64, 0x100, 0, 0], psci::INVALID_PARAMETERS),
            ([psci::AFFINITY_INFO_64, 1 << 32, 0, 0], psci::INVALID_PARAMETERS),
            ([psci::AFFINITY_INFO_64, 0, 1, 0], psci::INVALID_PARAMETERS),
            ([psci::CPU_ON_64, 0, RAM, 0], psci::ALREADY_ON),
            ([psci::CPU_ON_64, 2, RAM, 0], psci::INVALID_PARAMETERS),
            ([psci::CPU_ON_64, 64, RAM, 0], psci::INVALID_PARAMETERS),
            ([psci::CPU_ON_64, 0x100, RAM, 0], psci::INVALID_PARAMETERS),
            ([psci::TRNG_VERSION, 0, 0, 0], 0x1_0000),
            ([0x8400_0051, psci::TRNG_RND_64, 0, 0], 0),
            ([0x8400_0051, 0x8400_0054, 0, 0], NONE),
            ([0x8400_ffff, 0, 0, 0], NONE),
            ([0xc600_0000, 0, 0, 0], NONE),
            ([0, 0, 0, 0], NONE),
            ([u64::MAX, 0, 0, 0], NONE),
        ] {
            let called = make(&mut vcpu, x)?;
            ensure!(called == Called::Answered([x0, 0, 0, 0]), "{x:x?}: {called:x?}");
        }
        let called = make(&mut vcpu, [0x8400_0052, 0, 0, 0])?;
        expect!(called, Called::Answered(UID.map(u64::from)));
        vm.destroy()?;
    }
    Ok(())
}
test!(answered_by_the_monitor, "T23");

/// The host's calls are not the guest's, by SMC neither, and change nothing.
fn host_calls_from_a_guest() -> Outcome {
    for program in [by_hvc(), by_smc()] {
        let (vm, mut vcpu) = Vm::launch(program, [0; 4])?;
        let before = host(Function::Stats, &[])?;
        for function in Function::ALL {
            let called = make(&mut vcpu, [u64::from(function.id()), vm.handle, 0, 0])?;
            ensure!(
                called == Called::Answered([psci::NOT_SUPPORTED, 0, 0, 0]),
                "{}: {called:x?}",
                function.name()
            );
        }
        expect!(host(Function::Stats, &[])?, before);
        vm.destroy()?;
    }
    Ok(())
}
test!(host_calls_from_a_guest, "T20 T23");

fn forwarded_to_the_host() -> Outcome {
    for program in [by_hvc(), by_smc()] {
        let (vm, mut vcpu) = Vm::launch(program, [0; 4])?;
        // How much of its arguments the host sees.
        for (id, shown) in [
            (psci::CPU_SUSPEND_64, u64::MAX),
            (0x8400_0001, u64::MAX),
            (psci::SYSTEM_OFF, 0),
            (psci::SYSTEM_RESET, 0),
            (0x8400_0012, u64::MAX),
            (0xc400_0012, u64::MAX),
        ] {
            let [a, b, c] = [0x1111, 0x2222, 0x3333].map(|n| n | n << 40);
            let x = [id, a, b, c];
            let want = Exit {
                class: ExitClass::Hvc,
                esr: 0x16 << 26 | 1 << 25,
                gpr: [id, a & shown, b & shown, c & shown],
                mode: 1,
                ..Exit::default()
            };
            expect!(make(&mut vcpu, x)?, Called::Forwarded(want));
            vcpu.answer([1, 2, 3, 4]);
            expect!(results(&mut vcpu)?, [1, 2, 3, 4]);
            // Without an answer the guest calls again.
            expect!(make(&mut vcpu, x)?, Called::Forwarded(want));
            vcpu.entry.gpr = [9; 4];
            expect!(vcpu.expect(ExitClass::Hvc)?, want);
            vcpu.answer([5, 6, 7, 8]);
            expect!(results(&mut vcpu)?, [5, 6, 7, 8]);
        }
        vm.destroy()?;
    }
    Ok(())
}
test!(forwarded_to_the_host, "T08");

/// The key of the VM that starts so, as its vCPU gets it.
fn key_of(program: &[u8], x0: u64) -> Result<[u64; 4], Failure> {
    const KEY: u64 = GUEST_KEY_CALL as u64;
    let (vm, mut vcpu) = Vm::launch(program, [x0, 0, 0, 0])?;
    let halves = [make(&mut vcpu, [KEY, 0, 0, 0])?, make(&mut vcpu, [KEY, 1, 0, 0])?];
    let [Called::Answered([0, a, b, 0]), Called::Answered([0, c, d, 0])] = halves else {
        return Err(Failure::new(format_args!("{halves:x?}")));
    };
    for half in [2, 1 << 32, u64::MAX] {
        let called = make(&mut vcpu, [KEY, half, 0, 0])?;
        expect!(called, Called::Answered([psci::NOT_SUPPORTED, 0, 0, 0]));
    }
    let called = make(&mut vcpu, [KEY & !0x4000_0000, 0, 0, 0])?;
    expect!(called, Called::Answered([psci::NOT_SUPPORTED, 0, 0, 0]));
    // Nor does the host get it.
    let asked = smc::call([KEY, 0, 0, 0, 0, 0, 0, 0]);
    expect!(asked, [psci::NOT_SUPPORTED, 0, 0, 0, 0, 0, 0, 0]);
    vm.destroy()?;
    Ok([a, b, c, d])
}

/// The same launch gives the same key, any other another.
fn keys() -> Outcome {
    let all = [key_of(by_hvc(), 0)?, key_of(by_smc(), 0)?, key_of(by_hvc(), 1)?];
    expect!(key_of(by_hvc(), 0)?, all[0]);
    for (i, key) in all.iter().enumerate() {
        ensure!(key.iter().all(|word| *word != 0), "{key:x?}");
        ensure!(!all[..i].contains(key), "key {i} is another VM's");
    }
    Ok(())
}
test!(keys, "T11");

fn random_numbers() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(by_hvc(), [0; 4])?;
    let mut seen = [0; 20];
    for (n, place) in (0..).zip(&mut seen) {
        let Called::Answered([status, r1, r2, r3]) =
            make(&mut vcpu, [psci::TRNG_RND_64, 192, 0, 0])?
        else {
            return Err(Failure::new(format_args!("forwarded")));
        };
        expect!(status, 0);
        ensure!(r1 != 0 && r2 != 0 && r3 != 0 && r1 != r2 && r2 != r3, "{r1:x} {r2:x} {r3:x}");
        *place = r3;
        let bits = 1 + n * 10;
        let called = make(&mut vcpu, [psci::TRNG_RND_64, bits, 0, 0])?;
        let Called::Answered([0, r1, r2, r3]) = called else {
            return Err(Failure::new(format_args!("{bits} bits: {called:x?}")));
        };
        let over = |r: u64, from: u64| match bits.saturating_sub(from) {
            0 => r != 0,
            n if n < 64 => r >> n != 0,
            _ => false,
        };
        ensure!(!over(r3, 0) && !over(r2, 64) && !over(r1, 128), "{bits}: {r1:x} {r2:x} {r3:x}");
        // 32-bit words.
        let called = make(&mut vcpu, [0x8400_0053, 96, 0, 0])?;
        let Called::Answered([0, r1, r2, r3]) = called else {
            return Err(Failure::new(format_args!("{called:x?}")));
        };
        ensure!((r1 | r2 | r3) >> 32 == 0, "{r1:x} {r2:x} {r3:x}");
    }
    for (i, value) in seen.iter().enumerate() {
        ensure!(!seen[..i].contains(value), "{value:#x} came twice");
    }
    for (function, bits) in [
        (psci::TRNG_RND_64, 0),
        (psci::TRNG_RND_64, 193),
        (psci::TRNG_RND_64, u64::MAX),
        (0x8400_0053, 97),
        (0x8400_0053, 0),
    ] {
        let called = make(&mut vcpu, [function, bits, 0, 0])?;
        ensure!(
            called == Called::Answered([psci::INVALID_PARAMETERS, 0, 0, 0]),
            "{bits} bits: {called:x?}"
        );
    }
    vm.destroy()
}
test!(random_numbers, "");

guest_program!(
    second,
    "mrs x2, mpidr_el1",
    "str x2, [x20, #0x200]",
    "str x0, [x20, #0x208]",
    "mrs x2, CurrentEL",
    "str x2, [x20, #0x210]",
    "movz x0, #2",
    "movk x0, #0x8400, lsl #16",
    "hvc #0",
    "str x0, [x20, #0x218]"
);

/// CPU_ON, with the host's veto, and CPU_OFF.
fn second_vcpu() -> Outcome {
    let vm = Vm::new(2)?;
    vm.furnish(8)?;
    let (mut first, mut other) = (vm.vcpu(0)?, vm.vcpu(1)?);
    vm.call(Function::VcpuSetBoot, &[0, RAM, 0, 0, 0, 0])?;
    vm.populate(RAM, by_hvc())?;
    // The prelude of a program sets x20 before the program looks at x0.
    vm.populate(RAM + 0x2000, second())?;
    vm.call(Function::VmActivate, &[])?;
    // Off: whatever the host says.
    expect!(other.run_once(), Err(STATE));
    other.entry.flags.0 = EntryFlags::COMPLETE;
    other.entry.gpr = [0, RAM, RAM, RAM];
    expect!(other.run_once(), Err(STATE));
    other.entry.flags.0 = 0;
    let on = [psci::CPU_ON_64, 1, RAM + 0x2000, 0x5ea1];
    let info = [psci::AFFINITY_INFO_64, 1, 0, 0];
    let ask = |vcpu: &mut Vcpu| make(vcpu, info);
    for _ in 0..3 {
        expect!(ask(&mut first)?, Called::Answered([1, 0, 0, 0]));
        let called = make(&mut first, on)?;
        ensure!(matches!(called, Called::Forwarded(e) if e.gpr == on), "{called:x?}");
        // The veto.
        first.answer([psci::INVALID_PARAMETERS, 0, 0, 0]);
        expect!(results(&mut first)?[0], psci::INVALID_PARAMETERS);
        expect!(ask(&mut first)?, Called::Answered([1, 0, 0, 0]));
        expect!(other.run_once(), Err(STATE));
    }
    for _ in 0..3 {
        let called = make(&mut first, on)?;
        ensure!(matches!(called, Called::Forwarded(_)), "{called:x?}");
        first.answer([0; 4]);
        expect!(results(&mut first)?[0], 0);
        expect!(ask(&mut first)?, Called::Answered([2, 0, 0, 0]));
        expect!(make(&mut first, on)?, Called::Answered([(-5_i64).cast_unsigned(), 0, 0, 0]));
        // The host has its own idea of where to start.
        other.entry.gpr = [RAM; 4];
        other.entry.data = RAM;
        expect!(other.report(0x200)?, 1 << 31 | 1);
        expect!(other.report(0x208)?, 0x5ea1);
        expect!(other.report(0x210)?, 4);
        expect!(ask(&mut first)?, Called::Answered([0, 0, 0, 0]));
        expect!(make(&mut first, on)?, Called::Answered([psci::ALREADY_ON, 0, 0, 0]));
        // CPU_OFF.
        let exit = other.expect(ExitClass::Hvc)?;
        expect!(exit.gpr[0], psci::CPU_OFF);
        expect!(ask(&mut first)?, Called::Answered([1, 0, 0, 0]));
        expect!(other.run_once(), Err(STATE));
        other.answer([0; 4]);
        expect!(other.run_once(), Err(STATE));
        other.entry.flags.0 = 0;
    }
    vm.destroy()
}
test!(second_vcpu, "T17");
