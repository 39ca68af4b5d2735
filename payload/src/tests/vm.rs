// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs and vCPUs come and go; handles; configurations.

use havmsi_abi::{Function, MAX_IPA_BITS, MAX_RAM_RANGES, MAX_VCPUS, MAX_VCPUS_PER_VM, MAX_VMS};

use crate::guest::{IPA_BITS, RAM, RAM_SIZE, Vm, nothing};
use crate::harness::Outcome;
use crate::smc::{AGAIN, DENIED, INVALID, NO_SLOT, STATE, host, until_done};
use crate::{ensure, expect, gic, memory, test};

fn create_bad() -> Outcome {
    let gic = gic::version();
    let other = 5 - gic;
    for config in [
        [0, gic, 40],
        [MAX_VCPUS_PER_VM as u64 + 1, gic, 40],
        [u64::MAX, gic, 40],
        [1 << 32 | 1, gic, 40],
        [1, 1, 40],
        [1, other, 40],
        [1, 4, 40],
        [1, 1 << 32 | gic, 40],
        [1, u64::MAX, 40],
        [1, gic, 31],
        [1, gic, MAX_IPA_BITS + 1],
        [1, gic, 0],
        [1, gic, 64],
        [1, gic, 1 << 32 | 40],
    ] {
        let result = host(Function::VmCreate, &config);
        ensure!(result == Err(INVALID), "{config:x?}: {result:x?}");
    }
    Ok(())
}
test!(create_bad, "T20");

fn create_and_destroy() -> Outcome {
    let before = host(Function::Stats, &[])?;
    for bits in [32, 36, 39, 40] {
        for gic in [0, gic::version()] {
            let [vm, ..] = host(Function::VmCreate, &[4, gic, bits])?;
            ensure!(vm != 0, "a handle of 0");
            expect!(host(Function::Stats, &[])?[0], 1);
            until_done(Function::VmDestroy, &[vm], 10)?;
        }
    }
    expect!(host(Function::Stats, &[])?, before);
    Ok(())
}
test!(create_and_destroy, "");

/// Every call that takes a handle refuses one that names nothing, and one that
/// named a VM that is gone.
fn handles() -> Outcome {
    let old = Vm::new(1)?;
    old.destroy()?;
    let new = Vm::new(1)?;
    ensure!(old.handle != new.handle, "a handle was used again");
    let page = memory::take(1);
    for handle in [
        0,
        old.handle,
        new.handle ^ 1 << 16,
        new.handle ^ 1 << 47,
        new.handle ^ 1 << 63,
        new.handle + 1,
        new.handle & 0xffff,
        new.handle | 0x8000,
        0xffff,
        u64::MAX,
        129,
        new.handle & !0xffff | 129,
        new.handle & !0xffff,
    ] {
        for function in Function::ALL {
            let args: &[u64] = match function {
                Function::Version
                | Function::CpuInfo
                | Function::HostReset
                | Function::VmCreate
                | Function::Stats => continue,
                Function::TimerLoad if handle == 0 => continue,
                Function::VmAddRam => &[handle, RAM, RAM_SIZE],
                Function::VcpuCreate => &[handle, 0, page],
                Function::VmPopulate | Function::PageMap => &[handle, RAM, page, 4096],
                Function::PageUnmap => &[handle, RAM, 1],
                Function::PoolDonate => &[handle, page, 1],
                Function::MapDev => &[handle, 0x0801_0000, 0x0804_0000],
                _ => &[handle, 0, RAM, 0, 0, 0, 0],
            };
            let result = host(function, args);
            let device = function == Function::MapDev && result == Err(DENIED);
            ensure!(
                result == Err(INVALID) || device,
                "{} of {handle:x}: {result:x?}",
                function.name()
            );
        }
    }
    new.destroy()
}
test!(handles, "T20");

/// Nor does it run a vCPU that is there and could run.
fn handles_run_nothing() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(nothing(), [0; 4])?;
    for handle in [vm.handle ^ 1 << 16, vm.handle ^ 1 << 47, vm.handle & 0xffff] {
        expect!(host(Function::VcpuRun, &[handle, 0]), Err(INVALID));
    }
    vcpu.end()?;
    vm.destroy()
}
test!(handles_run_nothing, "T20");

fn ram_ranges() -> Outcome {
    let vm = Vm::new(1)?;
    let top = 1 << IPA_BITS;
    vm.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
    for range in [
        [RAM, 0],
        [RAM + 1, 4096],
        [RAM + 0x800, 4096],
        [0x1000_0000, 4095],
        [0x1000_0000, 1],
        [0, u64::MAX],
        [0, !0xfff],
        [!0xfff, 4096],
        [!0xfff, 8192],
        [top - 4096, 8192],
        [top, 4096],
        [0, top + 4096],
        [RAM, RAM_SIZE - 4096],
        [RAM, RAM_SIZE + 4096],
        [RAM + 4096, 4096],
        [RAM - 4096, 8192],
        [RAM + RAM_SIZE - 4096, 8192],
        [0, top],
    ] {
        let result = vm.call(Function::VmAddRam, &range);
        ensure!(result == Err(INVALID), "{range:x?}: {result:x?}");
    }
    // The same again is no error and takes no place.
    for _ in 0..20 {
        vm.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
    }
    vm.call(Function::VmAddRam, &[top - 4096, 4096])?;
    vm.call(Function::VmAddRam, &[RAM + RAM_SIZE, 4096])?;
    vm.call(Function::VmAddRam, &[RAM - 4096, 4096])?;
    for i in 4..MAX_RAM_RANGES as u64 {
        vm.call(Function::VmAddRam, &[i << 24, 4096])?;
    }
    expect!(vm.call(Function::VmAddRam, &[0, 4096]), Err(NO_SLOT));
    vm.destroy()
}
test!(ram_ranges, "T20 T26");

fn vcpus() -> Outcome {
    let vm = Vm::new(3)?;
    let page = memory::take(4);
    let carveout = memory::RAM_BASE;
    for (args, why) in [
        ([3, page], INVALID),
        ([64, page], INVALID),
        ([u64::MAX, page], INVALID),
        ([1 << 32, page], INVALID),
        ([0, page + 1], INVALID),
        ([0, page + 8], INVALID),
        ([0, 0], DENIED),
        ([0, carveout], DENIED),
        ([0, 0x0e00_0000], DENIED),
        ([0, 0x0900_0000], DENIED),
        ([0, memory::RAM_BASE + memory::RAM_SIZE], DENIED),
        ([0, !0xfff], DENIED),
        ([0, 1 << 40], DENIED),
    ] {
        let result = vm.call(Function::VcpuCreate, &args);
        ensure!(result == Err(why), "{args:x?}: {result:x?}");
    }
    vm.call(Function::VcpuCreate, &[0, page])?;
    expect!(vm.call(Function::VcpuCreate, &[0, page + 4096]), Err(STATE));
    // A run page is taken.
    expect!(vm.call(Function::VcpuCreate, &[1, page]), Err(DENIED));
    expect!(vm.call(Function::PoolDonate, &[page, 1]), Err(DENIED));
    vm.call(Function::PoolDonate, &[page + 4096, 3])?;
    vm.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
    expect!(vm.call(Function::VmPopulate, &[RAM, page]), Err(DENIED));
    // A table page is no run page.
    expect!(vm.call(Function::VcpuCreate, &[1, page + 4096]), Err(DENIED));
    // Still the host's to read and write.
    memory::fill(page, 7);
    expect!(memory::first_change(page, 7), None);
    let other = Vm::new(1)?;
    expect!(other.call(Function::VcpuCreate, &[0, page]), Err(DENIED));
    expect!(host(Function::Stats, &[])?[..2], [2, 1][..]);
    expect!(vm.call(Function::VcpuRun, &[0]), Err(STATE));
    expect!(vm.call(Function::VcpuRun, &[1]), Err(INVALID));
    expect!(vm.call(Function::VcpuSetBoot, &[1, RAM]), Err(INVALID));
    expect!(vm.call(Function::VcpuSetBoot, &[u64::MAX, RAM]), Err(INVALID));
    vm.destroy()?;
    // Its run page is free again.
    other.call(Function::VcpuCreate, &[0, page])?;
    other.destroy()
}
test!(vcpus, "T20 T05");

fn as_many_vms_as_there_are() -> Outcome {
    let before = host(Function::Stats, &[])?;
    let mut count = 0;
    let refused = loop {
        match host(Function::VmCreate, &[1, 0, 40]) {
            Ok(_) => count += 1,
            Err(refusal) => break refusal,
        }
        ensure!(count <= MAX_VMS, "too many VMs");
    };
    expect!(refused, NO_SLOT);
    expect!(count, MAX_VMS);
    // A VM a call, so that no call is long.
    expect!(host(Function::HostReset, &[]), Err(AGAIN));
    expect!(host(Function::Stats, &[])?[0], before[0] + MAX_VMS as u64 - 1);
    until_done(Function::HostReset, &[], 10_000)?;
    expect!(host(Function::Stats, &[])?, before);
    Ok(())
}
test!(as_many_vms_as_there_are, "T25");

fn as_many_vcpus_as_there_are() -> Outcome {
    let before = host(Function::Stats, &[])?;
    let mut count = 0;
    let refused = 'all: loop {
        let vm = Vm::new(MAX_VCPUS_PER_VM as u64)?;
        for idx in 0..MAX_VCPUS_PER_VM as u64 {
            match vm.call(Function::VcpuCreate, &[idx, memory::take(1)]) {
                Ok(_) => count += 1,
                Err(refusal) => break 'all refusal,
            }
        }
    };
    expect!(refused, NO_SLOT);
    expect!(count, MAX_VCPUS);
    until_done(Function::HostReset, &[], 10_000)?;
    expect!(host(Function::Stats, &[])?, before);
    // And again, so that every context came back.
    let vm = Vm::new(1)?;
    vm.vcpu(0)?;
    vm.destroy()
}
test!(as_many_vcpus_as_there_are, "T25");

fn timer_load() -> Outcome {
    let vm = Vm::new(1)?;
    host(Function::TimerLoad, &[vm.handle])?;
    let (physical, virtual_) = (crate::mrs!("cntpct_el0"), crate::mrs!("cntvct_el0"));
    let offset = physical.wrapping_sub(virtual_);
    ensure!(
        vm.cntvoff.wrapping_sub(offset) < 1_000_000,
        "CNTVOFF is {offset:#x}, not {:#x}",
        vm.cntvoff
    );
    expect!(host(Function::TimerLoad, &[vm.handle + 1]), Err(INVALID));
    host(Function::TimerLoad, &[0])?;
    let (physical, virtual_) = (crate::mrs!("cntpct_el0"), crate::mrs!("cntvct_el0"));
    ensure!(virtual_.wrapping_sub(physical) < 1_000_000, "CNTVOFF is not 0");
    vm.destroy()
}
test!(timer_load, "T28");
