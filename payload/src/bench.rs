// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the monitor's own part of an operation costs: `@args --bench`, on one CPU
//! of a machine whose counter ticks once an instruction (README.md). No host
//! kernel is in it but a few instructions of this loop.

use havmsi_abi::{EntryFlags, ExitClass, Function};

use crate::guest::{FREE, Vcpu, Vm};
use crate::harness::Failure;
use crate::{cpu, gic, guest_program, memory, println, smc};

/// Rounds of a measurement, and measurements of which the least counts.
const ROUNDS: usize = 200;
const TIMES: u64 = 3;

// Each program does one thing for ever; the first store says that it is at it.
guest_program!(bench_stores, "1: str x1, [x20]", "b 1b");
guest_program!(bench_loads, "str x1, [x20]", "1: ldr x1, [x20, #8]", "b 1b");
guest_program!(
    bench_calls,
    "str x1, [x20]",
    "1: movz x0, #0x0001",
    "movk x0, #0xc400, lsl #16",
    "hvc #0",
    "b 1b"
);
guest_program!(bench_registers, "str x1, [x20]", "1: mrs x1, cntp_ctl_el0", "b 1b");
guest_program!(bench_waits, "str x1, [x20]", "1: wfi", "b 1b");
// 256 of what the monitor answers itself, between two stores.
guest_program!(
    versions,
    "1: mov x19, #256",
    "2: movz x0, #0x8400, lsl #16",
    "hvc #0",
    "subs x19, x19, #1",
    "b.ne 2b",
    "str x1, [x20]",
    "b 1b"
);
guest_program!(
    identification,
    "1: mov x19, #256",
    "2: mrs x0, id_aa64pfr0_el1",
    "subs x19, x19, #1",
    "b.ne 2b",
    "str x1, [x20]",
    "b 1b"
);
guest_program!(
    bench_empty,
    "1: mov x19, #256",
    "2: nop",
    "subs x19, x19, #1",
    "b.ne 2b",
    "str x1, [x20]",
    "b 1b"
);

fn report(operation: &str, ticks: u64, per: usize) {
    println!("@bench {{\"operation\":\"{operation}\",\"instructions\":{}}}", ticks / per as u64);
}

/// The least ticks that `ROUNDS` of `f` took.
fn least(mut f: impl FnMut() -> Result<(), Failure>) -> Result<u64, Failure> {
    let mut least = u64::MAX;
    for _ in 0..TIMES {
        let start = cpu::now();
        for _ in 0..ROUNDS {
            f()?;
        }
        least = least.min(cpu::now() - start);
    }
    Ok(least)
}

/// One exit and the way back, without a look at it.
fn round(vcpu: &Vcpu) -> Result<(), Failure> {
    let [status, ..] =
        smc::call([u64::from(Function::VcpuRun.id()), vcpu.vm, vcpu.idx, 0, 0, 0, 0, 0]);
    smc::check(status, 0)?;
    Ok(())
}

/// Exits of this class, one after the other.
fn exits(program: &[u8], class: ExitClass, flags: u64, list: &[u64]) -> Result<u64, Failure> {
    let (vm, mut vcpu) = Vm::launch(program, [0; 4])?;
    vcpu.list(list);
    vcpu.report(0)?;
    vcpu.entry.flags.0 |= EntryFlags::COMPLETE | flags;
    vcpu.expect(class)?;
    vcpu.entry.flags.0 = flags;
    vcpu.write_entry();
    let ticks = least(|| round(&vcpu))?;
    vm.destroy()?;
    Ok(ticks)
}

fn all(wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
    gic::quiet();
    if wanted("smc") {
        let version = || smc::host(Function::Version, &[]).map(drop).map_err(Into::into);
        report("smc", least(version)?, ROUNDS);
    }
    let complete = EntryFlags::COMPLETE;
    // An interrupt that nobody takes: 64, pending, of group 1.
    let interrupt = 1 << 62 | 1 << 60 | 64;
    for (name, program, class, flags, list) in [
        ("exit-mmio-write", bench_stores(), ExitClass::MmioWrite, complete, &[][..]),
        ("exit-mmio-read", bench_loads(), ExitClass::MmioRead, complete, &[]),
        ("exit-hvc", bench_calls(), ExitClass::Hvc, complete, &[]),
        ("exit-sysreg", bench_registers(), ExitClass::SysregRead, complete, &[]),
        ("exit-wfi", bench_waits(), ExitClass::Wfx, EntryFlags::TRAP_WFI, &[]),
        ("exit-list-register", bench_stores(), ExitClass::MmioWrite, complete, &[interrupt]),
    ] {
        if wanted(name) {
            report(name, exits(program, class, flags, list)?, ROUNDS);
        }
    }
    for (name, program) in [("hypercall-monitor", versions()), ("id-register", identification())] {
        if wanted(name) {
            let nothing = exits(bench_empty(), ExitClass::MmioWrite, complete, &[])?;
            let ticks = exits(program, ExitClass::MmioWrite, complete, &[])?;
            report(name, ticks.saturating_sub(nothing), ROUNDS * 256);
        }
    }
    if wanted("page") {
        pages()?;
    }
    Ok(())
}

fn pages() -> Result<(), Failure> {
    let (vm, _vcpu) = Vm::launch(bench_stores(), [0; 4])?;
    vm.map(FREE)?;
    let places = || (FREE..).step_by(4096).skip(1).take(ROUNDS);
    let pages = memory::take(ROUNDS as u64);
    let pages = || (pages..).step_by(4096);
    let start = cpu::now();
    for (ipa, page) in places().zip(pages()) {
        vm.call(Function::PageMap, &[ipa, page, 4096])?;
    }
    report("page-map", cpu::now() - start, ROUNDS);
    let mut tags = [[0; 2]; ROUNDS];
    let start = cpu::now();
    for (ipa, tag) in places().zip(&mut tags) {
        *tag = vm.take_back(ipa)?;
    }
    report("page-seal", cpu::now() - start, ROUNDS);
    let start = cpu::now();
    for ((ipa, page), tag) in places().zip(pages()).zip(tags) {
        vm.give(ipa, page, tag)?;
    }
    report("page-unseal", cpu::now() - start, ROUNDS);
    vm.destroy()
}

/// Measures those operations that `only` is part of the name of, and turns the machine off.
pub fn main(only: &str) -> ! {
    match all(|name| name.contains(only)) {
        Ok(()) => println!("@done {{\"passed\":1,\"failed\":0}}"),
        Err(failure) => println!("@done {{\"passed\":0,\"failed\":1,\"detail\":\"{failure}\"}}"),
    }
    smc::power_off()
}
