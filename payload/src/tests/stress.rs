// SPDX-License-Identifier: MIT OR Apache-2.0
//! Much of the same, at bad moments.

use core::sync::atomic::Ordering;

use havmsi_abi::{EntryFlags, ExitClass, Function, MAX_VCPUS_PER_VM};

use crate::cpu::STOP;
use crate::guest::{FREE, PORT, RAM, Vcpu, Vm, vectors};
use crate::harness::{Outcome, gic3, several_cpus};
use crate::memory::{self, take};
use crate::smc::{AGAIN, INVALID, host};
use crate::tests::registers;
use crate::{cpu, ensure, exception, expect, gic, guest_program, mrs, msr, test};

fn random(state: &mut u64, n: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % n
}

guest_program!(
    sequence,
    "mrs x9, S3_0_C0_C4_0",
    "mov x5, #0",
    "1: str x5, [x20]",
    "add x5, x5, #1",
    "mrs x2, S3_0_C0_C4_0",
    "cmp x2, x9",
    "b.ne 2f",
    "movz x0, #0x8400, lsl #16",
    "hvc #0",
    "movz x11, #0x1, lsl #16",
    "orr x11, x11, #1",
    "cmp x0, x11",
    "b.ne 2f",
    "movz x0, #0x8400, lsl #16",
    "smc #0",
    "cmp x0, x11",
    "b.eq 1b",
    "2: str x0, [x20, #0x208]"
);

/// The host's interrupt comes at any moment of a guest's exits: none is lost,
/// none comes twice.
fn interrupts_at_every_moment() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(sequence(), [0; 4])?;
    let mut state = 0x1234_5678_9abc_def1;
    let pfr0 = mrs!("S3_0_C0_C4_0");
    // On a slow machine the guest must get anywhere in between.
    let (mut next, mut interrupts, mut stuck) = (0, 0, 0_u32);
    while next < 40_000 {
        if gic::alarm_fired() || mrs!("cntp_ctl_el0") == 0 {
            msr!("cntp_tval_el0", random(&mut state, 4000 << stuck.min(15)));
            msr!("cntp_ctl_el0", 1);
        }
        let exit = vcpu.run_once()?;
        match exit.class {
            ExitClass::Irq => {
                interrupts += 1;
                stuck += 1;
                // A trap of the host's: EL2's registers hold something else now.
                expect!(mrs!("S3_0_C0_C4_0"), pfr0);
            }
            ExitClass::MmioWrite if exit.ipa == PORT => {
                ensure!(exit.data == next, "{}, not {next}", exit.data);
                next += 1;
                stuck = 0;
                vcpu.complete(0);
            }
            _ => ensure!(false, "{exit:x?}"),
        }
    }
    ensure!(interrupts > 20, "{interrupts} interrupts only");
    vm.destroy()
}
test!(interrupts_at_every_moment, "");

/// The same for what the monitor answers to the host.
fn interrupts_in_the_host() -> Outcome {
    let mut state = 0x1234_5678_9abc_def3;
    let (vm, _) = Vm::launch(sequence(), [0; 4])?;
    let page = vm.map(FREE)?;
    let pfr0 = mrs!("S3_0_C0_C4_0");
    let mmfr0 = mrs!("S3_0_C0_C7_0");
    let before = exception::INTERRUPTS[0].load(Ordering::Relaxed);
    for round in 0..20_000 {
        msr!("cntp_tval_el0", random(&mut state, 3000));
        msr!("cntp_ctl_el0", 1);
        // SAFETY: the handler keeps all registers.
        unsafe { core::arch::asm!("msr daifclr, #2", options(nostack)) };
        let seen = (mrs!("S3_0_C0_C4_0"), mrs!("S3_0_C0_C7_0"));
        let version = host(Function::Version, &[])?[0];
        let fault = memory::poke(page, 1).err();
        // SAFETY: as above.
        unsafe { core::arch::asm!("msr daifset, #2", options(nostack)) };
        ensure!(seen == (pfr0, mmfr0), "round {round}: {seen:x?}");
        expect!(version, havmsi_abi::VERSION);
        ensure!(
            fault.is_some_and(|f| f.is_external_abort(page, true)),
            "round {round}: {fault:x?}"
        );
    }
    let count = exception::INTERRUPTS[0].load(Ordering::Relaxed) - before;
    ensure!(count > 100, "{count} interrupts only");
    vm.destroy()
}
test!(interrupts_in_the_host, "");

/// Writes junk into the entry half of a run page.
extern "C" fn scribble(page: u64) -> u64 {
    let mut state = 0xdead_beef_1234_5679;
    while STOP.load(Ordering::SeqCst) == 0 {
        let r = &mut state;
        let flags = [0, 0, 0, 1, 1, 2, 4, 8, 9, 3, 7, 31, u64::MAX];
        let counts = [0, 0, 0, 0, 1, 2, 4, 5, 16, 17, 64, u64::MAX];
        let pick = |list: &[u64], n: u64| list[usize::from(n.to_le_bytes()[0]) % list.len()];
        let n = random(r, 251);
        match random(r, 4) {
            0 => memory::write(page, pick(&flags, n)),
            1 => memory::write(page + 0x38, pick(&counts, n)),
            2 => memory::write(page + 0x40 + 8 * random(r, 16), random(r, u64::MAX)),
            _ => memory::write(page + 8 + 8 * random(r, 6), random(r, u64::MAX)),
        }
    }
    0
}

/// Another CPU changes the run page all the time: a run is refused or done.
fn run_page_changes_under_the_monitor() -> Outcome {
    let (vm, vcpu) = Vm::launch(sequence(), [0; 4])?;
    STOP.store(0, Ordering::SeqCst);
    cpu::start(1, scribble, vcpu.page)?;
    let (mut done, mut refused) = (0, 0);
    let outcome = (|| {
        let end = cpu::now() + cpu::milliseconds(20_000);
        while (done < 500 || refused < 500) && cpu::now() < end {
            gic::alarm(1);
            match host(Function::VcpuRun, &[vm.handle, 0]) {
                Ok([class, ..]) => {
                    ensure!(class <= 7, "class {class}");
                    done += 1;
                }
                Err(INVALID) => refused += 1,
                Err(other) => ensure!(false, "{other:x?}"),
            }
        }
        Ok(())
    })();
    STOP.store(1, Ordering::SeqCst);
    cpu::join(1)?;
    gic::quiet();
    outcome?;
    ensure!(done > 0 && refused > 0, "{done} done, {refused} refused");
    let mut vcpu = vcpu;
    vcpu.list(&[]);
    // Whatever happened to it, it still runs.
    vcpu.entry.flags.0 = 0;
    gic::alarm(100);
    vcpu.run_once()?;
    gic::quiet();
    vm.destroy()
}
test!(run_page_changes_under_the_monitor, "T21", several_cpus);

extern "C" fn one_report(vcpu: u64) -> u64 {
    let at = usize::try_from(vcpu).unwrap_or(0);
    // SAFETY: the test that gives it waits for the end of this job.
    let vcpu = unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Vcpu>(at) };
    vcpu.report(0x200).unwrap_or(u64::MAX)
}

/// A vCPU goes from CPU to CPU with all its registers.
fn from_cpu_to_cpu() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(registers::soak(), [0x0123_4567_89ab_cdef; 4])?;
    let (other, mut busy) = Vm::launch(registers::soak(), [0x0f0f_0f0f_1234_5678; 4])?;
    let sum = vcpu.report(0x200)?;
    let busy_sum = busy.report(0x200)?;
    for round in 0..30 {
        cpu::start(1, one_report, (&raw mut vcpu).expose_provenance() as u64)?;
        let there = cpu::join(1)?;
        ensure!(there == sum, "round {round}: {there:#x}, not {sum:#x}");
        expect!(busy.report(0x200)?, busy_sum);
        let here = vcpu.report(0x200)?;
        ensure!(here == sum, "round {round}: {here:#x}, not {sum:#x}");
    }
    vm.destroy()?;
    other.destroy()
}
test!(from_cpu_to_cpu, "T07 T28", several_cpus);

guest_program!(who, "mrs x2, mpidr_el1", "str x2, [x20]");

/// As many vCPUs as a VM can have, each with its own number.
fn sixty_four_vcpus() -> Outcome {
    let most = MAX_VCPUS_PER_VM as u64;
    let vm = Vm::new(most)?;
    vm.furnish(8)?;
    let pages = take(most);
    for idx in 0..most {
        vm.call(Function::VcpuCreate, &[idx, pages + idx * 4096])?;
        vm.call(Function::VcpuSetBoot, &[idx, RAM])?;
        memory::clear(pages + idx * 4096);
    }
    vm.populate(RAM, who())?;
    vm.populate(RAM + 0x1000, vectors())?;
    vm.call(Function::VmActivate, &[])?;
    for idx in (0..most).rev() {
        let mut vcpu = Vcpu::new(vm.handle, idx, pages + idx * 4096);
        expect!(vcpu.report(0)?, 1 << 31 | (idx >> 4) << 8 | idx & 15);
        vcpu.end()?;
    }
    vm.destroy()
}
test!(sixty_four_vcpus, "T25");

/// Thousands of pages in one VM, and back in steps of bounded length.
fn many_pages() -> Outcome {
    let before = host(Function::Stats, &[])?;
    let (vm, _) = Vm::launch(sequence(), [0; 4])?;
    vm.call(Function::PoolDonate, &[take(4), 4])?;
    let count = 3500;
    let pages = take(count);
    for i in 0..count {
        vm.call(Function::PageMap, &[FREE + i * 4096, pages + i * 4096, 4096])?;
    }
    let mut steps = 0;
    loop {
        match host(Function::VmDestroy, &[vm.handle]) {
            Ok(_) => break,
            Err(AGAIN) => steps += 1,
            Err(other) => ensure!(false, "{other:x?}"),
        }
    }
    ensure!(steps >= count / 32, "{steps} steps only");
    for i in 0..count {
        ensure!(memory::is_zero(pages + i * 4096), "page {i} is not wiped");
    }
    expect!(host(Function::Stats, &[])?, before);
    Ok(())
}
test!(many_pages, "T24 T25");

guest_program!(
    flood,
    // Calls of all kinds, with junk in them.
    "1: add x5, x5, #0x111",
    "mov x0, x5",
    "mov x1, x5",
    "smc #0",
    "movz x0, #0xc200, lsl #16",
    "and x6, x5, #0x1f",
    "orr x0, x0, x6",
    "hvc #0",
    "movz x0, #0xc400, lsl #16",
    "movk x0, #0x53",
    "mov x1, #192",
    "hvc #0",
    "mrs x2, S3_0_C0_C5_0",
    "mrs x2, mdscr_el1",
    "msr dbgbvr0_el1, x5",
    "b 1b"
);

/// A guest that floods the monitor with calls doesn't keep the host from its CPU.
fn flood_of_calls() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(flood(), [0; 4])?;
    for _ in 0..50 {
        gic::alarm(2);
        let start = cpu::now();
        while !gic::alarm_fired() {
            let exit = vcpu.run_once()?;
            ensure!(matches!(exit.class, ExitClass::Irq | ExitClass::Hvc), "{exit:x?}");
            if exit.class == ExitClass::Hvc {
                vcpu.entry.flags.0 = EntryFlags::COMPLETE;
                vcpu.entry.gpr = [0; 4];
            }
        }
        ensure!(cpu::now() - start < cpu::milliseconds(10_000), "kept for too long");
    }
    gic::quiet();
    vm.destroy()
}
test!(flood_of_calls, "T23");

guest_program!(
    moving_listener,
    "mov x1, #0xf0",
    "msr S3_0_C4_C6_0, x1",
    "mov x1, #1",
    "msr S3_0_C12_C12_7, x1",
    "isb",
    "msr daifclr, #2",
    "1: mov x1, #0x10",
    "str x1, [x20, #0x200]",
    "b 1b"
);

/// An interrupt that is active when the vCPU moves stays active: its priority
/// still holds back a lower one.
fn active_interrupt_moves() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(moving_listener(), [0; 4])?;
    let lr = |state: u64, priority: u64, id: u64| state << 62 | 1 << 60 | priority << 48 | id;
    expect!(vcpu.report(0x200)?, 0x10);
    vcpu.list(&[lr(1, 0x40, 40)]);
    expect!(vcpu.report(0x140)?, 40);
    let active = vcpu.vgic.lr[0];
    expect!(active >> 62, 2);
    // Another VM uses the interface here in between.
    let (other, mut busy) = Vm::launch(moving_listener(), [0; 4])?;
    busy.report(0x200)?;
    busy.list(&[lr(1, 0x80, 50)]);
    expect!(busy.report(0x140)?, 50);
    vcpu.list(&[active, lr(1, 0x80, 41)]);
    if several_cpus() {
        cpu::start(1, one_report, (&raw mut vcpu).expose_provenance() as u64)?;
        // First the end of 40, then 41.
        expect!(cpu::join(1)?, u64::MAX);
        expect!((vcpu.exit.ipa, vcpu.exit.data), (PORT + 0x140, 41));
    } else {
        expect!(vcpu.report(0x140)?, 41);
    }
    expect!(vcpu.vgic.lr[0] >> 62, 0);
    expect!(vcpu.vgic.lr[1] >> 62, 2);
    other.destroy()?;
    vm.destroy()
}
test!(active_interrupt_moves, "T19", gic3);
