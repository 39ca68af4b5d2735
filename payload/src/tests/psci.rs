// SPDX-License-Identifier: MIT OR Apache-2.0
//! Power of the host's CPUs.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::layout;

use crate::guest::{FREE, Vm, nothing};
use crate::harness::{Outcome, several_cpus};
use crate::memory::{RAM_BASE, RAM_SIZE, peek, poke};
use crate::smc::{call, psci};
use crate::{cpu, ensure, expect, gic, test};

fn ask(function: u64, a: u64, b: u64, c: u64) -> u64 {
    call([function, a, b, c, 0, 0, 0, 0])[0]
}

fn versions() -> Outcome {
    expect!(ask(psci::VERSION, 0, 0, 0), 0x1_0001);
    expect!(ask(psci::SMCCC_VERSION, 0, 0, 0), 0x1_0002);
    expect!(ask(psci::MIGRATE_INFO_TYPE, 0, 0, 0), 2);
    expect!(ask(psci::SMCCC_ARCH_FEATURES, psci::SMCCC_VERSION, 0, 0), 0);
    expect!(ask(psci::SMCCC_ARCH_FEATURES, 0x8000_3fff, 0, 0), psci::NOT_SUPPORTED);
    for there in [
        psci::VERSION,
        psci::CPU_ON_64,
        psci::CPU_ON_64 & 0xffff_ffff & !(1 << 30),
        psci::CPU_OFF,
        psci::AFFINITY_INFO_64,
        psci::CPU_SUSPEND_64,
        psci::SYSTEM_OFF,
        psci::SYSTEM_RESET,
        psci::FEATURES,
        psci::SMCCC_VERSION,
    ] {
        let answer = ask(psci::FEATURES, there, 0, 0);
        ensure!(answer == 0, "FEATURES of {there:#x}: {answer:#x}");
    }
    for absent in [0x8400_0005, 0x8400_000b, 0xc400_000e, 0x8400_0013, 0x8400_ffff, 0, 0xc200_0000]
    {
        let answer = ask(psci::FEATURES, absent, 0, 0);
        ensure!(answer == psci::NOT_SUPPORTED, "FEATURES of {absent:#x}: {answer:#x}");
        let answer = ask(0x8400_0014 | absent & 0xf, 0, 0, 0);
        ensure!(answer == psci::NOT_SUPPORTED, "{answer:#x}");
    }
    Ok(())
}
test!(versions, "T20");

fn affinity() -> Outcome {
    expect!(ask(psci::AFFINITY_INFO_64, 0, 0, 0), 0);
    for (affinity, level) in [
        (0, 1),
        (0, 3),
        (0, u64::MAX),
        (8, 0),
        (0x100, 0),
        (0x1_0000, 0),
        (1 << 32, 0),
        (u64::MAX, 0),
        (1 << 24, 0),
        (1 << 31, 0),
    ] {
        let answer = ask(psci::AFFINITY_INFO_64, affinity, level, 0);
        ensure!(
            answer == psci::INVALID_PARAMETERS,
            "AFFINITY_INFO of {affinity:#x}, {level}: {answer:#x}"
        );
    }
    Ok(())
}
test!(affinity, "T20");

/// A CPU starts only at an address where the host may run code.
fn bad_entry_points() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let page = vm.map(FREE)?;
    for entry in [
        0,
        0x0900_0000,
        0x0e00_0000,
        RAM_BASE,
        RAM_BASE + layout::carveout::ZERO_FRAME,
        RAM_BASE + layout::carveout_size(RAM_SIZE) - 4,
        RAM_BASE + RAM_SIZE,
        cpu::entry() + 1,
        cpu::entry() + 2,
        cpu::entry() | 1 << 63,
        1 << 40,
        u64::MAX,
        !3,
        page,
        page + 0x100,
    ] {
        let answer = ask(psci::CPU_ON_64, 1, entry, 0);
        ensure!(answer == psci::INVALID_ADDRESS, "entry {entry:#x}: {answer:#x}");
    }
    vm.destroy()
}
test!(bad_entry_points, "T16", several_cpus);

fn bad_targets() -> Outcome {
    expect!(ask(psci::CPU_ON_64, 0, cpu::entry(), 0), psci::ALREADY_ON);
    for target in [8, 0x100, 1 << 24, 1 << 32, u64::MAX, 1 << 31 | 1] {
        let answer = ask(psci::CPU_ON_64, target, cpu::entry(), 0);
        ensure!(answer == psci::INVALID_PARAMETERS, "target {target:#x}: {answer:#x}");
    }
    Ok(())
}
test!(bad_targets, "T16");

extern "C" fn look_around(_: u64) -> u64 {
    let fails = |at: u64| {
        peek(at).is_err_and(|f| f.is_external_abort(at, false))
            && poke(at, 0).is_err_and(|f| f.is_external_abort(at, true))
    };
    let held = [RAM_BASE, RAM_BASE + 0x1000, 0x0e00_0000, 0x0902_0000, 0x0904_0000];
    u64::from(held.into_iter().all(fails)) | u64::from(cpu::number() == 1) << 1
}

/// Another CPU comes up under the host's stage-2, also the second time.
fn on_and_off() -> Outcome {
    for _ in 0..10 {
        if !cpu::is_on(1) {
            expect!(ask(psci::AFFINITY_INFO_64, 1, 0, 0), 1);
        }
        cpu::start(1, look_around, 0)?;
        expect!(cpu::join(1)?, 3);
        expect!(ask(psci::AFFINITY_INFO_64, 1, 0, 0), 0);
        expect!(ask(psci::CPU_ON_64, 1, cpu::entry(), 1), psci::ALREADY_ON);
        cpu::turn_off(1)?;
    }
    Ok(())
}
test!(on_and_off, "T16", several_cpus);

static SEEN: AtomicU64 = AtomicU64::new(0);

extern "C" fn take_interrupt(_: u64) -> u64 {
    gic::LAST.store(0, Ordering::SeqCst);
    SEEN.store(1, Ordering::SeqCst);
    let end = cpu::now() + cpu::milliseconds(20_000);
    while gic::LAST.load(Ordering::SeqCst) == 0 && cpu::now() < end {
        gic::take_pending();
    }
    gic::LAST.load(Ordering::SeqCst)
}

/// The host's own interrupts reach it without the monitor: a timer's, and one
/// CPU's of another.
fn interrupts() -> Outcome {
    gic::alarm(1);
    let end = cpu::now() + cpu::milliseconds(20_000);
    gic::LAST.store(0, Ordering::SeqCst);
    while gic::LAST.load(Ordering::SeqCst) == 0 && cpu::now() < end {
        gic::take_pending();
    }
    expect!(gic::LAST.load(Ordering::SeqCst), u64::from(gic::PHYSICAL_TIMER) + 1);
    if several_cpus() {
        SEEN.store(0, Ordering::SeqCst);
        cpu::start(1, take_interrupt, 0)?;
        while SEEN.load(Ordering::SeqCst) == 0 {}
        gic::send(1);
        // SGI 1; a GICv2 tells the sender too, which is CPU 0.
        expect!(cpu::join(1)?, 2);
    }
    Ok(())
}
test!(interrupts, "");

/// Standby: an interrupt ends it, also one that is masked.
fn suspend() -> Outcome {
    gic::alarm(20);
    let start = cpu::now();
    expect!(ask(psci::CPU_SUSPEND_64, 0, 0, 0), 0);
    let slept = cpu::now() - start;
    ensure!(slept < cpu::milliseconds(20_000), "{slept} ticks");
    gic::quiet();
    // With an entry point that is none: it is not used.
    gic::alarm(5);
    expect!(ask(psci::CPU_SUSPEND_64, 1 << 16, RAM_BASE, 0), 0);
    gic::quiet();
    Ok(())
}
test!(suspend, "T16");

/// TRNG and other services are not the host's.
fn no_services() -> Outcome {
    expect!(ask(psci::TRNG_VERSION, 0, 0, 0), psci::NOT_SUPPORTED);
    expect!(ask(psci::TRNG_RND_64, 64, 0, 0), psci::NOT_SUPPORTED);
    Ok(())
}
test!(no_services, "T20");
