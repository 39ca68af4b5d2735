// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several CPUs at once: one vCPU on two of them, calls that race.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{ExitClass, Function};

use crate::cpu::STOP;
use crate::guest::{Exit, FREE, Vcpu, Vm, spin};
use crate::harness::{Outcome, several_cpus};
use crate::memory;
use crate::smc::{AGAIN, BUSY, DENIED, INVALID, STATE, host, until_done};
use crate::{cpu, ensure, expect, gic, guest_program, test};

pub(crate) static HANDLE: AtomicU64 = AtomicU64::new(0);
pub(crate) static PAGE: AtomicU64 = AtomicU64::new(0);
pub(crate) static GO: AtomicU64 = AtomicU64::new(0);
static RUNS: AtomicU64 = AtomicU64::new(0);

/// Runs vCPU 0 for some milliseconds.
pub(crate) extern "C" fn run_for(milliseconds: u64) -> u64 {
    let mut vcpu = Vcpu::new(HANDLE.load(Ordering::SeqCst), 0, PAGE.load(Ordering::SeqCst));
    gic::alarm(milliseconds);
    GO.store(1, Ordering::SeqCst);
    while !gic::alarm_fired() {
        if vcpu.run_once() != Ok(Exit::default()) {
            return 1;
        }
    }
    gic::quiet();
    0
}

/// While a vCPU runs on another CPU it can't be run here, and its VM can't be
/// reset or destroyed; the rest goes on.
fn busy() -> Outcome {
    let (vm, mut vcpu, mut other) = Vm::launch_two(gic::version(), spin(), [0; 4])?;
    HANDLE.store(vm.handle, Ordering::SeqCst);
    PAGE.store(vcpu.page, Ordering::SeqCst);
    GO.store(0, Ordering::SeqCst);
    cpu::start(1, run_for, 3000)?;
    while GO.load(Ordering::SeqCst) == 0 {}
    // Let it get into the guest.
    let end = cpu::now() + cpu::milliseconds(300);
    while cpu::now() < end {}
    expect!(host(Function::VcpuRun, &[vm.handle, 0]), Err(BUSY));
    expect!(vm.call(Function::VmReset, &[]), Err(BUSY));
    expect!(vm.call(Function::VmDestroy, &[]), Err(BUSY));
    expect!(host(Function::HostReset, &[]), Err(BUSY));
    expect!(other.run_once(), Err(STATE));
    let page = vm.map(FREE)?;
    vm.call(Function::PageUnmap, &[FREE, 1])?;
    memory::poke(page, 1)?;
    expect!(cpu::join(1)?, 0);
    gic::alarm(5);
    expect!(vcpu.run_once()?, Exit::default());
    gic::quiet();
    vm.destroy()
}
test!(busy, "T17 T22", several_cpus);

guest_program!(
    writer,
    // Stores to FREE and loads from it for ever.
    "movz x4, #0x4010, lsl #16",
    "1: str x1, [x4]",
    "ldr x2, [x4]",
    "add x1, x1, #1",
    "b 1b"
);

/// Runs vCPU 0, whose page at FREE comes and goes, until told to stop.
extern "C" fn keep_running(_: u64) -> u64 {
    let mut vcpu = Vcpu::new(HANDLE.load(Ordering::SeqCst), 0, PAGE.load(Ordering::SeqCst));
    while STOP.load(Ordering::SeqCst) == 0 {
        gic::alarm(5);
        match vcpu.run_once() {
            Ok(exit) if matches!(exit.class, ExitClass::Irq | ExitClass::Fault) => {
                RUNS.fetch_add(1, Ordering::Relaxed);
            }
            Ok(_) => return 1,
            // Reset or destroyed meanwhile.
            Err(STATE | INVALID | BUSY) => {}
            Err(_) => return 2,
        }
    }
    gic::quiet();
    0
}

fn taken_from_a_running_guest(vm: &Vm, page: u64, round: u64) -> Outcome {
    let end = cpu::now() + cpu::milliseconds(1 + round % 4);
    while cpu::now() < end {}
    vm.call(Function::PageUnmap, &[FREE, 1])?;
    ensure!(memory::is_sealed(page), "round {round}: written after it was taken");
    memory::fill(page, !round);
    for _ in 0..50 {
        let first = memory::first_change(page, !round);
        ensure!(first.is_none(), "round {round}: the guest wrote to {first:x?}");
    }
    Ok(())
}

/// A page is taken from a running guest again and again: as soon as the call
/// returns the guest can't change it (T13).
fn unmap_while_it_runs() -> Outcome {
    let (vm, vcpu, _) = Vm::launch_two(gic::version(), writer(), [0; 4])?;
    HANDLE.store(vm.handle, Ordering::SeqCst);
    PAGE.store(vcpu.page, Ordering::SeqCst);
    RUNS.store(0, Ordering::SeqCst);
    let page = memory::take(1);
    for round in 0..40 {
        STOP.store(0, Ordering::SeqCst);
        memory::fill(page, round);
        vm.call(Function::PageMap, &[FREE, page, 4096])?;
        cpu::start(1, keep_running, 0)?;
        let outcome = taken_from_a_running_guest(&vm, page, round);
        STOP.store(1, Ordering::SeqCst);
        expect!(cpu::join(1)?, 0);
        outcome?;
        until_done(Function::VmReset, &[vm.handle], 100)?;
        vm.boot(writer(), [0; 4])?;
    }
    ensure!(RUNS.load(Ordering::Relaxed) > 10, "it did not run");
    vm.destroy()
}
test!(unmap_while_it_runs, "T13", several_cpus);

/// Loads from and stores to a page that is donated meanwhile: what is loaded
/// after the donation is zero.
extern "C" fn touch(page: u64) -> u64 {
    let mut count = 0;
    while STOP.load(Ordering::SeqCst) == 0 {
        match memory::poke(page, 0x0bad_0bad_0bad_0bad) {
            Ok(()) => {}
            Err(fault) if fault.is_external_abort(page, true) => count += 1,
            Err(_) => return u64::MAX,
        }
        if memory::peek(page).is_err() {
            return u64::MAX - 1;
        }
    }
    count
}

guest_program!(
    reader,
    // From where the host says, five times.
    "1: ldr x4, [x20, #8]",
    "mov x5, #5",
    "2: ldr x1, [x4]",
    "str x1, [x20]",
    "subs x5, x5, #1",
    "b.ne 2b",
    "b 1b"
);

/// The host writes a page on another CPU while it is donated: the guest sees
/// zeros, always.
fn write_while_it_is_donated() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(reader(), [0; 4])?;
    let page = memory::take(1);
    STOP.store(0, Ordering::SeqCst);
    cpu::start(1, touch, page)?;
    let outcome = (|| {
        for round in 0..200 {
            let ipa = FREE + round * 4096;
            vcpu.expect(ExitClass::MmioRead)?;
            vcpu.complete(ipa);
            expect!(vcpu.expect(ExitClass::Fault)?.ipa, ipa);
            vm.call(Function::PageMap, &[ipa, page, 4096])?;
            for _ in 0..5 {
                let seen = vcpu.report(0)?;
                ensure!(seen == 0, "round {round}: the guest reads {seen:#x}");
            }
            vm.call(Function::PageUnmap, &[ipa, 1])?;
        }
        Ok(())
    })();
    STOP.store(1, Ordering::SeqCst);
    let faults = cpu::join(1)?;
    outcome?;
    ensure!(faults > 0 && faults < 1 << 60, "{faults:#x} faults");
    vm.destroy()
}
test!(write_while_it_is_donated, "T02 T11 T13", several_cpus);

/// The same call with the same arguments on two CPUs.
pub(crate) extern "C" fn map_many(first: u64) -> u64 {
    let handle = HANDLE.load(Ordering::SeqCst);
    GO.fetch_add(1, Ordering::SeqCst);
    while GO.load(Ordering::SeqCst) < 2 {}
    let mut won = 0;
    for i in 0..64 {
        loop {
            match host(Function::PageMap, &[handle, FREE + i * 4096, first + i * 4096, 4096]) {
                Ok(_) => won += 1,
                Err(AGAIN) => continue,
                Err(DENIED) => {}
                Err(_) => return u64::MAX,
            }
            break;
        }
    }
    won
}

pub(crate) extern "C" fn map_many_elsewhere(first: u64) -> u64 {
    let handle = PAGE.load(Ordering::SeqCst);
    HANDLE.fetch_add(0, Ordering::SeqCst);
    GO.fetch_add(1, Ordering::SeqCst);
    while GO.load(Ordering::SeqCst) < 2 {}
    let mut won = 0;
    for i in 0..64 {
        loop {
            match host(Function::PageMap, &[handle, FREE + i * 4096, first + i * 4096, 4096]) {
                Ok(_) => won += 1,
                Err(AGAIN) => continue,
                Err(DENIED) => {}
                Err(_) => return u64::MAX,
            }
            break;
        }
    }
    won
}

/// Each page is had by one.
fn two_maps_of_one_page() -> Outcome {
    for other in [map_many as cpu::Function, map_many_elsewhere] {
        let (a, _) = Vm::launch(spin(), [0; 4])?;
        let (b, _) = Vm::launch(spin(), [0; 4])?;
        let before = host(Function::Stats, &[])?[2];
        let pages = memory::take(64);
        HANDLE.store(a.handle, Ordering::SeqCst);
        PAGE.store(b.handle, Ordering::SeqCst);
        GO.store(0, Ordering::SeqCst);
        cpu::start(1, other, pages)?;
        let mine = map_many(pages);
        let theirs = cpu::join(1)?;
        ensure!(mine + theirs == 64, "{mine} and {theirs}");
        expect!(host(Function::Stats, &[])?[2], before + 64);
        a.destroy()?;
        b.destroy()?;
    }
    Ok(())
}
test!(two_maps_of_one_page, "T04 T22", several_cpus);

/// Calls at random, on a few VMs and pages that all CPUs use.
extern "C" fn hammer(mut random: u64) -> u64 {
    let pages = PAGE.load(Ordering::SeqCst);
    let mut calls = 0;
    while STOP.load(Ordering::SeqCst) == 0 {
        let mut next = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        // Of this generation, rarely of another.
        let handle = (HANDLE.load(Ordering::Relaxed) + next(4) + 1) ^ (next(8) / 7) << 16;
        let page = pages + next(64) * 4096;
        let ipa = FREE + next(64) * 4096;
        gic::alarm(1);
        let result = match next(16) {
            0 => host(Function::VmCreate, &[2, 0, 36]).inspect(|r| {
                HANDLE.store(r[0] & !0xf, Ordering::Relaxed);
            }),
            1 => host(Function::VmAddRam, &[handle, crate::guest::RAM, crate::guest::RAM_SIZE]),
            2 => host(Function::PoolDonate, &[handle, page, next(4) + 1]),
            3 => host(Function::VcpuCreate, &[handle, next(2), page]),
            4 => host(Function::VcpuSetBoot, &[handle, next(2), crate::guest::RAM]),
            5 => host(Function::VmPopulate, &[handle, ipa, page]),
            6 | 7 => host(Function::VmActivate, &[handle]),
            8 | 9 => host(Function::VcpuRun, &[handle, next(2)]),
            10 | 11 => host(Function::PageMap, &[handle, ipa, page, 4096]),
            12 => host(Function::PageUnmap, &[handle, ipa, next(33)]),
            13 => host(Function::VmReset, &[handle]),
            14 => host(Function::VmDestroy, &[handle]),
            _ => host(Function::TimerLoad, &[handle]),
        };
        if matches!(result, Err(crate::smc::Refusal::Unknown(_))) {
            return 0;
        }
        // A write to any of the pages: a fault or not, and no other page's.
        if memory::poke(page + 8 * next(512), random).is_err_and(|f| f.class() != 0x25) {
            return 0;
        }
        calls += 1;
    }
    gic::quiet();
    calls
}

/// All calls from all CPUs, at random, for some seconds: afterwards everything
/// can be had back.
fn all_calls_at_once() -> Outcome {
    let before = host(Function::Stats, &[])?;
    let pages = memory::take(70);
    PAGE.store(pages, Ordering::SeqCst);
    STOP.store(0, Ordering::SeqCst);
    HANDLE.store(1 << 16, Ordering::SeqCst);
    let mut started = [false; cpu::MAX_CPUS];
    for (n, started) in started.iter_mut().enumerate().skip(1) {
        if crate::smc::call([crate::smc::psci::AFFINITY_INFO_64, n as u64, 0, 0, 0, 0, 0, 0])[0]
            <= 1
        {
            cpu::start(n, hammer, 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n as u64) | 1)?;
            *started = true;
        }
    }
    let end = cpu::now() + cpu::milliseconds(3000);
    while cpu::now() < end {
        host(Function::Stats, &[])?;
    }
    STOP.store(1, Ordering::SeqCst);
    for (n, _) in started.iter().enumerate().filter(|(_, s)| **s) {
        let calls = cpu::join(n)?;
        ensure!(calls > 0, "CPU {n} met something that it did not expect");
    }
    until_done(Function::HostReset, &[], 1_000_000)?;
    host(Function::TimerLoad, &[0])?;
    expect!(host(Function::Stats, &[])?, before);
    for n in 0..70 {
        memory::poke(pages + n * 4096, n)?;
    }
    Ok(())
}
test!(all_calls_at_once, "T20 T22", several_cpus);
