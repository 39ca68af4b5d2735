// SPDX-License-Identifier: MIT OR Apache-2.0
//! What devices can reach: the host's memory, and nothing else.

use havmsi_abi::Function;
use havmsi_abi::layout::{carveout, carveout_size};

use crate::guest::{FREE, RAM, Vm, nothing};
use crate::harness::{Failure, Outcome};
use crate::memory::{
    self, PATTERN, RAM_BASE, RAM_SIZE, fill, peek, poke, read, read32, take, write,
};
use crate::pci::{Edu, SIZE};
use crate::{ensure, expect, guest_program, test};

const GICD: u64 = 0x0800_0000;
const FW_CFG: u64 = 0x0902_0000;
const SMMU: u64 = 0x0905_0000;
const SECURE_RAM: u64 = 0x0e00_0000;
const ECAM: u64 = 0x3f00_0000;

// Tells the word that x0 points to, for ever.
guest_program!(word, "1: ldr x1, [x0]", "str x1, [x20]", "b 1b",);

fn has_edu() -> bool {
    Edu::near().is_some()
}

fn has_far_edu() -> bool {
    Edu::far().is_some()
}

fn near() -> Result<Edu, Failure> {
    Edu::near().ok_or(Failure::new(format_args!("no edu device")))
}

/// First word of the half page that is not the pattern of `origin`.
fn first_difference(page: u64, origin: u64) -> Option<u64> {
    (0..SIZE).step_by(8).find(|at| read(page + at) != PATTERN ^ (origin + at))
}

/// First word of the half page that is not zero.
fn first_content(page: u64) -> Option<u64> {
    (0..SIZE).step_by(8).map(|at| read(page + at)).find(|word| *word != 0)
}

/// The device's buffer arrives at `at`.
fn arrives(edu: Edu, origin: u64, at: u64) -> Outcome {
    fill(at, 0);
    edu.write(at)?;
    expect!(first_difference(at, origin), None);
    // And not one byte more.
    expect!(read(at + SIZE), at + SIZE);
    Ok(())
}

fn the_hosts_memory() -> Outcome {
    let edu = near()?;
    let origin = edu.load()?;
    // Pages of one block, of another, and the last of RAM.
    let far = RAM_BASE + RAM_SIZE - 4096;
    for at in [take(1), take(513) + 512 * 4096, far] {
        arrives(edu, origin, at)?;
        let copy = edu.read(at)?;
        expect!(first_difference(copy, origin), None);
    }
    Ok(())
}
test!(the_hosts_memory, "T14", has_edu);

fn all_else() -> Outcome {
    let edu = near()?;
    edu.load()?;
    let size = carveout_size(RAM_SIZE);
    let control = read32(GICD);
    for at in [
        RAM_BASE + carveout::EL2_VECTORS,
        RAM_BASE + carveout::ZERO_FRAME,
        RAM_BASE + carveout::HOST_ROOT,
        RAM_BASE + carveout::LEVEL2_TABLES,
        RAM_BASE + carveout::SMMU_LEVEL2_TABLES,
        RAM_BASE + carveout::SMMU_ROOT,
        RAM_BASE + carveout::SMMU_STREAMS,
        RAM_BASE + carveout::SMMU_COMMANDS,
        RAM_BASE + carveout::LEVEL3_TABLES,
        RAM_BASE + size - SIZE,
        0,
        GICD,
        FW_CFG,
        SMMU,
        SECURE_RAM,
        // Devices among themselves.
        edu.registers,
        ECAM,
        RAM_BASE - SIZE,
        RAM_BASE + RAM_SIZE,
        (1 << 40) - SIZE,
    ] {
        edu.write(at)?;
        let page = edu.read(at)?;
        let seen = first_content(page);
        ensure!(seen.is_none(), "{at:#x}: {seen:x?} was read");
    }
    expect!(read32(GICD), control);
    // What stood there works on: EL2's vectors, the tables, the zero frame.
    let (vm, mut vcpu) = Vm::launch(nothing(), [0; 4])?;
    let page = vm.map(FREE)?;
    vcpu.end()?;
    expect!(peek(page)?, 0);
    expect!(peek(page + 8)?, 0);
    vm.destroy()?;
    the_hosts_memory()
}
test!(all_else, "T14 T06", has_edu);

/// A page that a device has used is given away, and comes back.
fn a_page_that_goes_and_comes_back() -> Outcome {
    const SECRET: u64 = 0x5ec2_e70f_0a5e_c2e7;
    let edu = near()?;
    let origin = edu.load()?;
    let pages = take(2);
    let (page, neighbour) = (pages, pages + 4096);
    // The SMMU knows it by now.
    arrives(edu, origin, page)?;
    let (vm, mut vcpu) = Vm::launch(word(), [FREE, 0, 0, 0])?;
    vm.call(Function::PageMap, &[FREE, page, 4096])?;
    expect!(vcpu.report(0)?, 0);
    edu.write(page)?;
    expect!(vcpu.report(0)?, 0);
    // The neighbour in the same table is still the host's.
    arrives(edu, origin, neighbour)?;
    // What the host has looked at shows zeros to devices too, and takes nothing.
    expect!(peek(page)?, 0);
    edu.write(page)?;
    let copy = edu.read(page)?;
    expect!(first_content(copy), None);
    expect!(peek(page)?, 0);
    let other = vm.map(FREE + 4096)?;
    expect!(peek(other)?, 0);
    expect!(vcpu.report(0)?, 0);
    vm.call(Function::PageUnmap, &[FREE, 1])?;
    arrives(edu, origin, page)?;
    vm.destroy()?;
    // A launch page with content, and a page of the pool.
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM, FREE])?;
    vm.populate(RAM, word())?;
    let secret = take(1);
    arrives(edu, origin, secret)?;
    write(secret, SECRET);
    vm.call(Function::VmPopulate, &[FREE, secret])?;
    let pool = take(1);
    arrives(edu, origin, pool)?;
    vm.call(Function::PoolDonate, &[pool, 1])?;
    for at in [secret, pool] {
        edu.write(at)?;
        let copy = edu.read(at)?;
        let seen = first_content(copy);
        ensure!(seen.is_none(), "{at:#x}: {seen:x?} was read");
    }
    vm.call(Function::VmActivate, &[])?;
    expect!(vcpu.report(0)?, SECRET);
    vm.destroy()?;
    for at in [secret, pool] {
        ensure!(memory::is_zero(at), "{at:#x} is not wiped");
        arrives(edu, origin, at)?;
    }
    Ok(())
}
test!(a_page_that_goes_and_comes_back, "T14 T13", has_edu);

/// The transfer was started before the page went. One to its neighbour goes on,
/// whatever block is split for the page.
fn during_a_donation() -> Outcome {
    let edu = near()?;
    let origin = edu.load()?;
    let (vm, mut vcpu) = Vm::launch(word(), [FREE, 0, 0, 0])?;
    for (i, to_page) in (0..).zip([true, false]) {
        // In a block of its own, whole as yet.
        let block = take(1024).next_multiple_of(2 << 20);
        let (page, neighbour) = (block, block + 4096);
        fill(neighbour, 0);
        edu.start_write(if to_page { page } else { neighbour });
        vm.call(Function::PageMap, &[FREE + i * 4096, page, 4096])?;
        edu.wait()?;
        if to_page {
            expect!(vcpu.report(0)?, 0);
            // The page is the VM's, and it is the device that did not get there.
            ensure!(poke(page, 0).is_err(), "the page is not the VM's");
        } else {
            expect!(first_difference(neighbour, origin), None);
        }
    }
    vm.destroy()
}
test!(during_a_donation, "T14", has_edu);

/// A stream that the stream table has no entry for; and what the host gets by
/// calling its bus 0: no more than bus 0 has.
fn another_bus() -> Outcome {
    let edu = Edu::far().ok_or(Failure::new(format_args!("no edu device")))?;
    let origin = edu.load()?;
    let page = take(1);
    fill(page, 0);
    edu.write(page)?;
    expect!(memory::first_change(page, 0), None);
    let copy = edu.read(page)?;
    expect!(memory::first_change(copy, PATTERN), None);
    ensure!(Edu::number_far_bus(0).is_some(), "no root port");
    let loaded = edu.load()?;
    ensure!(loaded != origin, "two pages at one place");
    arrives(edu, loaded, page)?;
    let vectors = edu.read(RAM_BASE + carveout::EL2_VECTORS)?;
    expect!(first_content(vectors), None);
    Ok(())
}
test!(another_bus, "T14", has_far_edu);
