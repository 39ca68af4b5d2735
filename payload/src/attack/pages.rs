// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks by what the host gives, takes and maps.

use havmsi_abi::layout::carveout;
use havmsi_abi::{ExitClass, Function};

use super::{Outcome, Victim, launch_with_page, verdict, word_at_free};
use crate::cpu;
use crate::guest::{FREE, PORT, RAM, RAM_SIZE, Vcpu, Vm, nothing, vectors};
use crate::memory::{RAM_BASE, clear, copy, fill, peek, poke, read, take, write};
use crate::smc::host;
use crate::{attack, guest_program};

/// A level 3 entry: normal memory, read, write, execute (Arm ARM D8.3).
const LEAF: u64 = 0x7ff;
/// Where the victim's level 3 table has the entry of FREE.
const ENTRY: u64 = 8 * 0x100;

/// The host asks for a VM's page with its content, for a VM of its own.
fn other_vm(victim: &mut Victim) -> Outcome {
    match launch_with_page(word_at_free(), [8, 0, 0, 0], victim.pages[0])? {
        Ok((_, mut vcpu)) => {
            let value = vcpu.report(0x200)?;
            victim.disclosed(value, FREE + 8, format_args!("another VM reads"))
        }
        Err(refusal) => verdict(false, format_args!("VM_POPULATE: {refusal:?}")),
    }
}
attack!(other_vm, "t04::other_vm");

/// A page of the victim once more, at another address of the victim.
fn two_places(victim: &mut Victim) -> Outcome {
    let page = victim.pages[0];
    let result = victim.vm.call(Function::PageMap, &[FREE + 0x5000, page, 4096]);
    victim.harmed(1, format_args!("PAGE_MAP: {result:?}"))
}
attack!(two_places, "t04::two_places");

/// A fresh page where one is.
fn exchanged(victim: &mut Victim) -> Outcome {
    let result = victim.vm.call(Function::PageMap, &[FREE, take(1), 4096]);
    victim.harmed(1, format_args!("PAGE_MAP: {result:?}"))
}
attack!(exchanged, "t04::exchanged");

/// The root of the victim's stage-2, in the carve-out.
fn monitor_page(victim: &mut Victim) -> Outcome {
    let slot = (victim.vm.handle & 0xffff) - 1;
    let root = RAM_BASE + carveout::VM_ROOTS + slot * 8192;
    match launch_with_page(word_at_free(), [8, 0, 0, 0], root)? {
        Ok((_, mut vcpu)) => {
            let entry = vcpu.report(0x200)?;
            verdict(
                victim.tables.iter().any(|table| entry == table | 3),
                format_args!("a VM reads the victim's root table: {entry:#x}"),
            )
        }
        Err(refusal) => verdict(false, format_args!("VM_POPULATE: {refusal:?}")),
    }
}
attack!(monitor_page, "t05::monitor_page");

guest_program!(
    writer_at_free,
    "movz x4, #0x4010, lsl #16",
    "ldr x5, [x4]",
    "str x5, [x20, #0x200]",
    "str x1, [x4, #0x70]",
    "dsb sy",
    "ldr x5, [x4, #0x70]",
    "str x5, [x20, #0x200]"
);

/// EL2's vectors: what is written there runs at EL2.
fn vector_page(victim: &mut Victim) -> Outcome {
    let vectors = RAM_BASE + carveout::EL2_VECTORS;
    match launch_with_page(writer_at_free(), [0, victim.secret, 0, 0], vectors)? {
        Ok((_, mut vcpu)) => {
            let (instruction, got) = (vcpu.report(0x200)?, vcpu.report(0x200)?);
            verdict(
                got == victim.secret,
                format_args!("a VM finds {instruction:#x} in EL2's vectors and writes there"),
            )
        }
        Err(refusal) => verdict(false, format_args!("VM_POPULATE: {refusal:?}")),
    }
}
attack!(vector_page, "t05::vector_page");

guest_program!(
    swapper,
    "movz x4, #0x4010, lsl #16",
    "ldr x5, [x4, #0x800]",
    "ldr x6, [x4, #0x808]",
    "str x6, [x4, #0x800]",
    "str x5, [x4, #0x808]",
    "dsb sy",
    "str x5, [x20, #0x200]"
);

/// The victim's level 3 table in an attacker's VM, which swaps two pages.
fn table_page(victim: &mut Victim) -> Outcome {
    let mut got = [Ok(0); 2];
    for (got, table) in got.iter_mut().zip(victim.tables) {
        *got = match launch_with_page(swapper(), [0; 4], table)? {
            Ok((_, mut vcpu)) => Ok(vcpu.report(0x200)?),
            Err(refusal) => Err(refusal),
        };
    }
    victim.harmed(1, format_args!("the victim's tables in a VM, which swaps entries: {got:x?}"))
}
attack!(table_page, "t05::table_page");

/// A page of ownership records, of RAM that is not there: the monitor would wipe its own memory.
fn secure_ram(_: &mut Victim) -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let before = host(Function::Stats, &[])?[2];
    let result = vm.call(Function::PageMap, &[FREE, 0x0e80_0000, 4096]);
    let after = host(Function::Stats, &[])?[2];
    verdict(
        after > before,
        format_args!("PAGE_MAP: {result:?}; pages of VMs: {before}, then {after}"),
    )
}
attack!(secure_ram, "t05::secure_ram");

/// The real-time clock as a VM's RAM.
fn mmio(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(word_at_free(), [0xfe0, 0, 0, 0])?;
    let result = vm.call(Function::PageMap, &[FREE, 0x0901_0000, 4096]);
    let exit = vcpu.run()?;
    let id = exit.data & 0xff;
    verdict(
        exit.class == ExitClass::MmioWrite && id == 0x31,
        format_args!("PAGE_MAP: {result:?}; then {:?}, data {id:#x}", exit.class),
    )
}
attack!(mmio, "t05::mmio");

/// A page of the victim as device memory of an attacker's VM.
fn as_device(victim: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(word_at_device(), [0; 4])?;
    let result = vm.call(Function::MapDev, &[0x0a00_0000, victim.pages[0]]);
    let exit = vcpu.run()?;
    victim.disclosed(exit.data, FREE, format_args!("MAP_DEV: {result:?}; a VM reads"))
}
attack!(as_device, "t05::as_device");

guest_program!(
    word_at_device,
    "movz x4, #0x0a00, lsl #16",
    "ldr x5, [x4]",
    "str x5, [x20, #0x200]"
);

/// The entry of the host's stage-2 for a page, in the carve-out.
const fn host_leaf(page: u64) -> u64 {
    let offset = page - RAM_BASE;
    RAM_BASE + carveout::LEVEL3_TABLES + (offset >> 21) * 4096 + (offset >> 12 & 511) * 8
}

/// The host maps the victim's page for itself, in its own stage-2.
fn host_tables(victim: &mut Victim) -> Outcome {
    let page = victim.pages[0];
    let written = poke(host_leaf(page), page | LEAF);
    let got = peek(page).unwrap_or(0);
    victim.disclosed(got, FREE, format_args!("the host's table: {:x?}; it reads", written.err()))
}
attack!(host_tables, "t06::host_tables");

/// EL2's vectors, written by the host: an instruction in a gap that is not run.
fn vectors_written(victim: &mut Victim) -> Outcome {
    let at = RAM_BASE + carveout::EL2_VECTORS + 0x70;
    let written = poke(at, victim.secret);
    let got = peek(at).unwrap_or(0);
    verdict(got == victim.secret, format_args!("{:x?}, then {got:#x}", written.err()))
}
attack!(vectors_written, "t06::vectors");

/// Table memory that the host gave, written by the host: two pages swapped.
fn table_written(victim: &mut Victim) -> Outcome {
    let leaves = victim.pages.map(|page| page | LEAF);
    let faults = victim.tables.map(|table| {
        let at = table + ENTRY;
        poke(at, leaves[1]).and_then(|()| poke(at + 8, leaves[0])).err().map(|fault| fault.esr)
    });
    victim.harmed(1, format_args!("faults at the VM's tables: {faults:x?}"))
}
attack!(table_written, "t06::table_written");

/// Table memory that has an entry already when the host gives it.
fn forged_table(victim: &mut Victim) -> Outcome {
    let vm = Vm::new(1)?;
    vm.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
    let pool = take(8);
    (0..8).for_each(|n| clear(pool + n * 4096));
    for n in 0..8 {
        write(pool + n * 4096 + ENTRY, victim.pages[0] | LEAF);
    }
    vm.call(Function::PoolDonate, &[pool, 8])?;
    let mut vcpu = vm.vcpu(0)?;
    vm.boot(word_at_free(), [0; 4])?;
    let exit = vcpu.run()?;
    victim.disclosed(exit.data, FREE, format_args!("a VM reads, {:?}", exit.class))
}
attack!(forged_table, "t06::forged_table");

/// An image page changed between its measurement and the run.
fn image(_: &mut Victim) -> Outcome {
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM, 0, 0, 0, 0])?;
    vm.populate(RAM, word_at_free())?;
    vm.populate(RAM + 0x1000, vectors())?;
    let page = vm.populate(FREE, &[1; 8])?;
    vm.call(Function::VmActivate, &[])?;
    let written = poke(page, 0x0bad);
    let seen = vcpu.report(0x200)?;
    verdict(
        seen == 0x0bad,
        format_args!("written: {:x?}; the guest finds {seen:#x}", written.err()),
    )
}
attack!(image, "t11::image");

/// Content of the host's in a page that no measurement covers.
fn content(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(word_at_free(), [8, 0, 0, 0])?;
    let page = take(1);
    fill(page, 0);
    vm.call(Function::PageMap, &[FREE, page, 4096])?;
    let seen = vcpu.report(0x200)?;
    verdict(seen == page + 8, format_args!("in a fresh page the guest finds {seen:#x}"))
}
attack!(content, "t11::content");

/// A page with content after the launch was closed.
fn after_launch(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(word_at_free(), [8, 0, 0, 0])?;
    let page = take(1);
    fill(page, 0);
    let result = vm.call(Function::VmPopulate, &[FREE, page]);
    let exit = vcpu.run()?;
    verdict(
        exit.data == page + 8,
        format_args!("VM_POPULATE: {result:?}; the guest finds {:#x}", exit.data),
    )
}
attack!(after_launch, "t11::after_launch");

/// A page taken back, and read.
fn taken_back(victim: &mut Victim) -> Outcome {
    victim.vm.call(Function::PageUnmap, &[FREE + 0x1000, 1])?;
    let got = read(victim.pages[1]);
    victim.disclosed(got, FREE + 0x1000, format_args!("the host reads"))
}
attack!(taken_back, "t12::taken_back");

/// A page taken back, and another one given in its place: zeros again. The VM may stop:
/// it is another one than the victim that must go on.
fn replaced(_: &mut Victim) -> Outcome {
    let mut victim = Victim::new()?;
    victim.wrong(2)?;
    victim.vm.call(Function::PageUnmap, &[FREE + 0x1000, 1])?;
    let result = victim.vm.call(Function::PageMap, &[FREE + 0x1000, take(1), 4096]);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    victim.harmed(2, format_args!("PAGE_MAP: {result:?}"))
}
attack!(replaced, "t12::replaced");

/// A bit of a sealed page is changed.
fn tampered(_: &mut Victim) -> Outcome {
    let mut victim = Victim::new()?;
    victim.wrong(2)?;
    let page = victim.pages[1];
    let tag = victim.vm.take_back(FREE + 0x1000)?;
    write(page + 0x800, read(page + 0x800) ^ 1);
    let result = victim.vm.give(FREE + 0x1000, page, tag);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    victim.harmed(2, format_args!("PAGE_MAP: {result:?}"))
}
attack!(tampered, "t12::tampered");

/// Two sealed pages change places.
fn moved(_: &mut Victim) -> Outcome {
    let mut victim = Victim::new()?;
    victim.wrong(2)?;
    let [first, second] = victim.pages;
    let tags = (victim.vm.take_back(FREE)?, victim.vm.take_back(FREE + 0x1000)?);
    let result = victim.vm.give(FREE, second, tags.1);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    victim.vm.give(FREE + 0x1000, first, tags.0)?;
    victim.harmed(2, format_args!("PAGE_MAP: {result:?}"))
}
attack!(moved, "t12::moved");

/// What another VM had at the same address.
fn of_another(_: &mut Victim) -> Outcome {
    let (mut victim, mut other) = (Victim::new()?, Victim::new()?);
    victim.wrong(2)?;
    other.wrong(2)?;
    victim.vm.take_back(FREE + 0x1000)?;
    let tag = other.vm.take_back(FREE + 0x1000)?;
    let result = victim.vm.give(FREE + 0x1000, other.pages[1], tag);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    victim.harmed(2, format_args!("PAGE_MAP: {result:?}"))
}
attack!(of_another, "t12::of_another");

/// A page taken back, and fresh ones given in its place, from the one before it on.
fn among_others(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(tally(), [FREE + 0x1000, 0, 0, 0])?;
    vm.map(FREE + 0x1000)?;
    let first = vcpu.report(0)?;
    vcpu.report(0)?;
    vm.take_back(FREE + 0x1000)?;
    let result = vm.call(Function::PageMap, &[FREE, take(3), 3 * 4096]);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    let seen = vcpu.report(0)?;
    let text = format_args!("PAGE_MAP: {result:?}; after {first} and more the guest counts {seen}");
    verdict(seen <= first + 1, text)
}
attack!(among_others, "t12::among_others");

guest_program!(
    tally,
    // Counts in the page that x0 names.
    "mov x4, x0",
    "movz x20, #0x0900, lsl #16",
    "1: ldr x1, [x4]",
    "add x1, x1, #1",
    "str x1, [x4]",
    "str x1, [x20]",
    "b 1b"
);

/// What a page was when it was taken the first time.
fn replayed(_: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(tally(), [FREE, 0, 0, 0])?;
    let page = vm.map(FREE)?;
    let first = vcpu.report(0)?;
    let tag = vm.take_back(FREE)?;
    let old = take(1);
    copy(page, old);
    vm.give(FREE, page, tag)?;
    vcpu.report(0)?;
    vm.take_back(FREE)?;
    let result = vm.give(FREE, old, tag);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    let seen = vcpu.report(0)?;
    let text = format_args!("PAGE_MAP: {result:?}; after {first} and more the guest counts {seen}");
    verdict(seen == first + 1, text)
}
attack!(replayed, "t12::replayed");

/// The pages of a VM that was destroyed.
fn destroyed(_: &mut Victim) -> Outcome {
    let mut dead = Victim::new()?;
    dead.wrong(2)?;
    dead.vm.destroy()?;
    let got = read(dead.pages[0]);
    dead.disclosed(got, FREE, format_args!("the host reads"))
}
attack!(destroyed, "t24::destroyed");

/// The host makes a page of the victim a table of another VM.
fn pool(victim: &mut Victim) -> Outcome {
    let vm = Vm::new(1)?;
    let result = vm.call(Function::PoolDonate, &[victim.pages[0], 1]);
    victim.harmed(1, format_args!("POOL_DONATE: {result:?}"))
}
attack!(pool, "t20::pool");

/// A size of the address space that no shift can make.
fn config(_: &mut Victim) -> Outcome {
    let made = host(Function::VmCreate, &[1, 0, 64]);
    let Ok([handle, ..]) = made else {
        return verdict(false, format_args!("VM_CREATE: {made:?}"));
    };
    let result = host(Function::VmAddRam, &[handle, RAM, RAM_SIZE]);
    verdict(true, format_args!("VM_CREATE: {made:x?}, VM_ADD_RAM: {result:?}"))
}
attack!(config, "t20::config");

/// A run page that is a VM's memory: the monitor would write exits there.
fn run_page(_: &mut Victim) -> Outcome {
    let (owner, mut reader) = Vm::launch(word_at_free(), [0x800, 0, 0, 0])?;
    let page = owner.map(FREE)?;
    reader.report(0x200)?;
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    let result = vm.call(Function::VcpuCreate, &[0, page]);
    if result.is_err() {
        return verdict(false, format_args!("VCPU_CREATE: {result:?}"));
    }
    vm.boot(word_at_free(), [0; 4])?;
    exit_seen(&mut reader, vm.handle)
}

/// Runs a vCPU to its first exit, a fault: whether another VM has that in its memory.
fn exit_seen(reader: &mut Vcpu, vm: u64) -> Outcome {
    let run = host(Function::VcpuRun, &[vm, 0]);
    let seen = reader.report(0x200)?;
    verdict(seen != 0, format_args!("VCPU_RUN: {run:?}; in another VM's page there is {seen:#x}"))
}
attack!(run_page, "t26::run_page");

/// A run page that is given to a VM while it is lent.
fn lent_run_page(_: &mut Victim) -> Outcome {
    let (_, vcpu) = Vm::launch(word_at_free(), [0; 4])?;
    let (vm, mut reader) = Vm::launch(word_at_free(), [0x800, 0, 0, 0])?;
    let result = vm.call(Function::PageMap, &[FREE, vcpu.page, 4096]);
    if result.is_err() {
        return verdict(false, format_args!("PAGE_MAP: {result:?}"));
    }
    reader.report(0x200)?;
    exit_seen(&mut reader, vcpu.vm)
}
attack!(lent_run_page, "t26::lent_run_page");

/// A range of which the first page is the host's and the second the victim's.
fn range(victim: &mut Victim) -> Outcome {
    let vm = Vm::new(1)?;
    let result = vm.call(Function::PoolDonate, &[victim.before, 2]);
    victim.harmed(1, format_args!("POOL_DONATE: {result:?}"))
}
attack!(range, "t26::range");

/// So many pages that their size is no number any more; the first is there.
fn overflow(_: &mut Victim) -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    vm.map(FREE)?;
    let result = vm.call(Function::PageUnmap, &[FREE, 1 << 52 | 1]);
    verdict(result.is_ok(), format_args!("PAGE_UNMAP: {result:?}"))
}
attack!(overflow, "t26::overflow");

/// No RAM to the guest: it talks to a device there.
const DEVICE: u64 = 0x0a00_0000;

guest_program!(
    device_user,
    "movz x4, #0x0a00, lsl #16",
    "str x1, [x4]",
    "ldr x5, [x4]",
    "str x5, [x20, #0x200]"
);

/// Runs a guest that stores to a device: whether that went to memory instead.
fn device_is_memory(victim: &Victim, vcpu: &mut Vcpu, how: core::fmt::Arguments<'_>) -> Outcome {
    let exit = vcpu.run()?;
    verdict(
        exit.ipa == PORT + 0x200 && exit.data == victim.secret,
        format_args!("{how}; the guest's first exit is at {:#x}", exit.ipa),
    )
}

/// A page where the guest has a device.
fn page_for_device(victim: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(device_user(), [0, victim.secret, 0, 0])?;
    let result = vm.call(Function::PageMap, &[DEVICE, take(1), 4096]);
    device_is_memory(victim, &mut vcpu, format_args!("PAGE_MAP: {result:?}"))
}
attack!(page_for_device, "t10::page_for_device");

/// RAM beyond the address space, whose tables are those of a device's address.
fn beyond_the_space(victim: &mut Victim) -> Outcome {
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    let at = 1 << 40 | DEVICE;
    let declared = vm.call(Function::VmAddRam, &[at, 0x1000]);
    let mut vcpu = vm.vcpu(0)?;
    vm.boot(device_user(), [0, victim.secret, 0, 0])?;
    let mapped = vm.call(Function::PageMap, &[at, take(1), 4096]);
    device_is_memory(
        victim,
        &mut vcpu,
        format_args!("VM_ADD_RAM: {declared:?}, PAGE_MAP: {mapped:?}"),
    )
}
attack!(beyond_the_space, "t26::beyond_the_space");

guest_program!(
    ram_user,
    "movz x4, #0x4010, lsl #16",
    "str x1, [x4]",
    "ldr x5, [x4]",
    "str x5, [x20, #0x200]"
);

/// RAM that is not mapped: the guest's store is emulated by the host.
fn ram_as_mmio(victim: &mut Victim) -> Outcome {
    let (_, mut vcpu) = Vm::launch(ram_user(), [0, victim.secret ^ FREE, 0, 0])?;
    let exit = vcpu.run()?;
    victim.disclosed(exit.data, FREE, format_args!("{:?} at {:#x}", exit.class, exit.ipa))
}
attack!(ram_as_mmio, "t10::ram_as_mmio");

/// A device where the guest has RAM: its stores go out.
fn device_in_ram(victim: &mut Victim) -> Outcome {
    let (vm, mut vcpu) = Vm::launch(ram_user(), [0, victim.secret, 0, 0])?;
    let result = vm.call(Function::MapDev, &[FREE, 0x0804_0000]);
    let exit = vcpu.run()?;
    verdict(
        exit.class == ExitClass::MmioWrite && exit.data != victim.secret,
        format_args!("MAP_DEV: {result:?}; then {:?}, data {:#x}", exit.class, exit.data),
    )
}
attack!(device_in_ram, "t10::device_in_ram");

extern "C" fn read_here(at: u64) -> u64 {
    peek(at).unwrap_or(0)
}

/// A CPU that the host turns on reads the victim's page.
fn cpu_on(victim: &mut Victim) -> Outcome {
    if cpu::is_on(1) {
        cpu::turn_off(1)?;
    }
    cpu::start(1, read_here, victim.pages[0])?;
    let got = cpu::join(1)?;
    victim.disclosed(got, FREE, format_args!("CPU 1 reads"))
}
attack!(cpu_on, "t16::cpu_on");

/// As many vCPUs as the host likes: the one beyond the last.
fn vcpus(victim: &mut Victim) -> Outcome {
    let mut made = [None; 9];
    let mut count = 0;
    let refused = 'all: {
        for place in &mut made {
            let vm = *place.insert(Vm::new(64)?);
            for idx in 0..64 {
                let page = take(1);
                clear(page);
                if let Err(refusal) = vm.call(Function::VcpuCreate, &[idx, page]) {
                    break 'all Some(refusal);
                }
                count += 1;
            }
        }
        None
    };
    if let Some(refusal) = refused {
        made.into_iter().flatten().try_for_each(|vm| vm.destroy())?;
        return verdict(false, format_args!("after {count} vCPUs: {refusal:?}"));
    }
    let [.., Some(vm)] = made else { return verdict(false, format_args!("none made")) };
    vm.furnish(8)?;
    vm.call(Function::VcpuSetBoot, &[63, RAM, 0, 0, 0, 0])?;
    vm.populate(RAM, word_at_free())?;
    vm.call(Function::VmActivate, &[])?;
    let run = host(Function::VcpuRun, &[vm.handle, 63]);
    victim.harmed(1, format_args!("{count} vCPUs, VCPU_RUN: {run:?}"))
}
attack!(vcpus, "t25::vcpus");
