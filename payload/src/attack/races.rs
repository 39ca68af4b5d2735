// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks by two CPUs at once.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{EntryFlags, ExitClass, Function};

use super::{Outcome, Victim, verdict};
use crate::cpu::STOP;
use crate::guest::{FREE, Vm, spin};
use crate::memory::{fill, first_change, poke, read, take, write};
use crate::smc::{host, until_done};
use crate::tests::smp::{GO, HANDLE, PAGE, map_many, map_many_elsewhere, reader, run_for, writer};
use crate::{attack, cpu, ensure, gic, guest_program};

/// Times that CPU 1 went round.
static ROUNDS: AtomicU64 = AtomicU64::new(0);
const STALE: u64 = 0x0bad_0bad_0bad_0bad;

/// Stores to a page, whether that faults or not.
extern "C" fn store(page: u64) -> u64 {
    while STOP.load(Ordering::SeqCst) == 0 {
        // A fault is what should happen.
        let _ = poke(page, STALE);
        ROUNDS.fetch_add(1, Ordering::SeqCst);
    }
    0
}

/// Waits until CPU 1 went round a few times.
fn let_it_go_on() {
    let (from, start) = (ROUNDS.load(Ordering::SeqCst), cpu::now());
    while ROUNDS.load(Ordering::SeqCst) - from < 5 && cpu::now() - start < cpu::milliseconds(2000) {
    }
}

/// A CPU of the host's goes on storing to a page while it is donated.
fn stale_host(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(reader(), [0; 4])?;
    let page = take(1);
    STOP.store(0, Ordering::SeqCst);
    cpu::start(1, store, page)?;
    let mut seen = 0;
    for round in 0..5 {
        let ipa = FREE + round * 4096;
        vcpu.expect(ExitClass::MmioRead)?;
        vcpu.complete(ipa);
        vcpu.expect(ExitClass::Fault)?;
        let_it_go_on();
        vm.call(Function::PageMap, &[ipa, page, 4096])?;
        let_it_go_on();
        for _ in 0..5 {
            seen |= vcpu.report(0)?;
        }
        vm.call(Function::PageUnmap, &[ipa, 1])?;
    }
    STOP.store(1, Ordering::SeqCst);
    cpu::join(1)?;
    verdict(seen != 0, format_args!("in pages that were just donated the guest reads {seen:#x}"))
}
attack!(stale_host, "t13::host");

/// Lets CPU 1 run vCPU 0 of this VM for some milliseconds, and get into the guest.
fn run_elsewhere(vm: &Vm, page: u64, milliseconds: u64) -> Result<(), crate::harness::Failure> {
    HANDLE.store(vm.handle, Ordering::SeqCst);
    PAGE.store(page, Ordering::SeqCst);
    GO.store(0, Ordering::SeqCst);
    cpu::start(1, run_for, milliseconds)?;
    while GO.load(Ordering::SeqCst) == 0 {}
    let end = cpu::now() + cpu::milliseconds(100);
    while cpu::now() < end {}
    Ok(())
}

/// A guest goes on storing to a page that was taken from it.
fn stale_guest(_: &mut Victim) -> Outcome {
    let (vm, vcpu, _) = Vm::launch_two(gic::version(), writer(), [0; 4])?;
    let page = vm.map(FREE)?;
    let mut changed = None;
    run_elsewhere(&vm, vcpu.page, 300)?;
    vm.call(Function::PageUnmap, &[FREE, 1])?;
    fill(page, 1);
    let end = cpu::now() + cpu::milliseconds(100);
    while cpu::now() < end {
        changed = changed.or(first_change(page, 1));
    }
    cpu::join(1)?;
    verdict(
        changed.is_some(),
        format_args!("in a page that is the host's again, changed by the guest: {changed:x?}"),
    )
}
attack!(stale_guest, "t13::guest");

/// One vCPU on two CPUs at once.
fn twice(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu, _) = Vm::launch_two(gic::version(), spin(), [0; 4])?;
    run_elsewhere(&vm, vcpu.page, 500)?;
    gic::alarm(5);
    let result = vcpu.run_once();
    gic::quiet();
    let other = cpu::join(1);
    verdict(
        result.is_ok(),
        format_args!(
            "VCPU_RUN of a vCPU that runs: {:?}; there: {:?}",
            result.map(|e| e.class),
            other.ok()
        ),
    )
}
attack!(twice, "t17::twice");

/// A VM destroyed while it runs.
fn destroyed_while_it_runs(_: &mut Victim) -> Outcome {
    let (vm, vcpu, _) = Vm::launch_two(gic::version(), spin(), [0; 4])?;
    run_elsewhere(&vm, vcpu.page, 500)?;
    let result = until_done(Function::VmDestroy, &[vm.handle], 1000);
    let other = cpu::join(1);
    verdict(
        result.is_ok(),
        format_args!("VM_DESTROY of a VM that runs: {result:?}; there: {:?}", other.ok()),
    )
}
attack!(destroyed_while_it_runs, "t22::destroy");

/// Each of many pages given to two VMs by two CPUs.
fn two_owners(_: &mut Victim) -> Outcome {
    let mut most = 0;
    for _ in 0..8 {
        let (a, _) = Vm::launch(spin(), [0; 4])?;
        let (b, _) = Vm::launch(spin(), [0; 4])?;
        let pages = take(64);
        HANDLE.store(a.handle, Ordering::SeqCst);
        PAGE.store(b.handle, Ordering::SeqCst);
        GO.store(0, Ordering::SeqCst);
        cpu::start(1, map_many_elsewhere, pages)?;
        let mine = map_many(pages);
        most = most.max(mine + cpu::join(1)?);
        a.destroy()?;
        b.destroy()?;
    }
    verdict(most > 64, format_args!("64 pages were mapped {most} times"))
}
attack!(two_owners, "t22::two_owners");

guest_program!(reporter, "1: str xzr, [x20, #0x200]", "b 1b");

/// `lr[0]` of the run page, as the host gives it and gets it back (docs/abi.md).
const LR: u64 = 0x40;
const LR_AFTER: u64 = 0x850;
/// The run page that CPU 1 writes to.
static TARGET: AtomicU64 = AtomicU64::new(0);
const GOOD: u64 = 1 << 60 | 40;
/// Linked to a physical interrupt that isn't the guest's.
const BAD: u64 = 1 << 61 | 26 << 32 | GOOD;

extern "C" fn change(_: u64) -> u64 {
    let at = TARGET.load(Ordering::SeqCst);
    let mut n = 0;
    while STOP.load(Ordering::SeqCst) == 0 {
        write(at, if n % 2 == 0 { BAD } else { GOOD });
        (0..20).for_each(|_| core::hint::spin_loop());
        n += 1;
    }
    n
}

/// A list register that another CPU changes during the call: what is loaded
/// is what was checked.
fn double_fetch(_: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(reporter(), [0; 4])?;
    vcpu.report(0x200)?;
    vcpu.list(&[GOOD]);
    vcpu.write_entry();
    TARGET.store(vcpu.page + LR, Ordering::SeqCst);
    STOP.store(0, Ordering::SeqCst);
    cpu::start(1, change, 0)?;
    let (mut accepted, mut refused, mut loaded) = (0, 0, 0);
    let start = cpu::now();
    let over = |ms| cpu::now() - start > cpu::milliseconds(ms);
    let mut flags = EntryFlags::COMPLETE;
    while loaded == 0 && !(over(1500) && accepted > 0 && refused > 0) && !over(10_000) {
        write(vcpu.page, flags);
        match host(Function::VcpuRun, &[vcpu.vm, 0]) {
            Ok([class, ..]) => {
                let store = class == ExitClass::MmioWrite as u64;
                flags = if store { EntryFlags::COMPLETE } else { 0 };
                accepted += 1;
                loaded += u64::from(read(vcpu.page + LR_AFTER) == BAD);
            }
            Err(_) => refused += 1,
        }
    }
    STOP.store(1, Ordering::SeqCst);
    let changes = cpu::join(1)?;
    ensure!(refused + loaded > 0, "{changes} changes, but none in time for {accepted} runs");
    verdict(
        loaded != 0,
        format_args!(
            "{accepted} runs accepted, {refused} refused, {loaded} loaded what is refused, {changes} changes"
        ),
    )
}
attack!(double_fetch, "t21::run_page");
