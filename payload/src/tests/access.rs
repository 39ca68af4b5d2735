// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host can reach by loads and stores, and what not.

use havmsi_abi::layout::{carveout, carveout_size};

use crate::gic::{self, redistributor};
use crate::harness::{Outcome, gic2, gic3};
use crate::memory::{self, RAM_BASE, RAM_SIZE, peek, peek8, peek32, poke, poke8, poke32};
use crate::smc::{call, psci};
use crate::{ensure, expect, test};

/// Reads and writes of all widths abort.
fn out_of_reach(at: u64) -> Outcome {
    for fault in [peek(at).err(), peek32(at + 4).err(), peek8(at + 9).err()] {
        ensure!(
            fault.is_some_and(|f| f.is_external_abort(f.far, false) && f.far & !0xf == at),
            "read of {at:#x}: {fault:x?}"
        );
    }
    for fault in [poke(at, 0).err(), poke32(at + 4, 0).err(), poke8(at + 9, 0).err()] {
        ensure!(
            fault.is_some_and(|f| f.is_external_abort(f.far, true) && f.far & !0xf == at),
            "write of {at:#x}: {fault:x?}"
        );
    }
    Ok(())
}

fn carve_out() -> Outcome {
    let size = carveout_size(RAM_SIZE);
    for at in [
        carveout::EL2_VECTORS,
        carveout::EL2_VECTORS + 0x400,
        carveout::ZERO_FRAME,
        carveout::HOST_ROOT,
        carveout::HOST_ROOT + 0x1000,
        carveout::DEVICE_TABLES,
        carveout::LEVEL2_TABLES,
        carveout::SMMU_LEVEL2_TABLES,
        carveout::SMMU_ROOT,
        carveout::SMMU_STREAMS,
        carveout::SMMU_COMMANDS,
        carveout::VM_ROOTS,
        carveout::LEVEL3_TABLES,
        size / 2,
        size - 16,
    ] {
        out_of_reach(RAM_BASE + at)?;
    }
    // All of its pages.
    for at in (RAM_BASE..RAM_BASE + size).step_by(4096) {
        ensure!(peek(at).is_err_and(|f| f.is_external_abort(at, false)), "{at:#x} is readable");
    }
    poke(RAM_BASE + size, memory::read(RAM_BASE + size))?;
    Ok(())
}
test!(carve_out, "T05 T06");

fn the_rest_of_the_machine() -> Outcome {
    for at in [
        0,
        0x0020_0000,
        0x0400_0000,
        0x0802_0000,
        0x0808_0000,
        0x0900_1000,
        0x0901_1000,
        0x0902_0000,
        0x0902_0010,
        0x0903_0000,
        0x0903_1000,
        0x0904_0000,
        0x0905_0000,
        0x0907_0000,
        0x0908_0000,
        0x0909_0000,
        0x090b_0000,
        0x0a00_0000,
        0x0a00_3e00,
        0x0c00_0000,
        0x0e00_0000,
        0x0e10_0000,
        0x0eff_fff0,
        0x0f00_0000,
        0x0fff_f000,
        RAM_BASE + RAM_SIZE,
        0xffff_f000,
        0x2_0000_0000,
        0x40_0000_0000,
        0x40_1000_0000,
        0x7f_ffff_f000,
    ] {
        out_of_reach(at)?;
    }
    // Both ends of RAM, and the devices that are the host's.
    peek(RAM_BASE + RAM_SIZE - 8)?;
    for at in [0x0800_0000, 0x0900_0018, 0x0901_0000, 0x0900_0fe0, 0x0901_0fe0, 0x3f00_0000] {
        peek32(at)?;
    }
    Ok(())
}
test!(the_rest_of_the_machine, "T05 T14 T15");

/// Addresses beyond 40 bits, through the alias in the tables' last entry.
fn fetch_from_what_is_not_there() -> Outcome {
    for at in [RAM_BASE, RAM_BASE + RAM_SIZE - 0x1000_0000 + 0x2000_0000] {
        let f = crate::exception::catch(|| {
            // SAFETY: the fetch faults, which is caught and returned from.
            unsafe {
                core::arch::asm!("blr {}", in(reg) at, out("x30") _, options(nostack));
            }
        });
        ensure!(f.is_some_and(|f| f.class() == 0x21), "{at:#x}: {f:x?}");
    }
    Ok(())
}
test!(fetch_from_what_is_not_there, "T06");

fn cpus() -> u64 {
    (0..8)
        .take_while(|n| {
            call([psci::AFFINITY_INFO_64, *n, 0, 0, 0, 0, 0, 0])[0] != psci::INVALID_PARAMETERS
        })
        .count() as u64
}

const CTLR: u64 = 0;
const TYPER: u64 = 8;
const PROPBASER: u64 = 0x70;
const PENDBASER: u64 = 0x78;

/// LPIs stay off; the registers that point into memory are dead.
fn redistributors() -> Outcome {
    let cpus = cpus();
    for cpu in 0..cpus {
        let rd = redistributor(cpu);
        let typer = peek(rd + TYPER)?;
        expect!(typer >> 32, cpu);
        expect!(typer >> 4 & 1, u64::from(cpu + 1 == cpus && cpus == 8) | (typer >> 4 & 1));
        expect!(peek32(rd + TYPER)?, typer & 0xffff_ffff);
        let target = memory::take(16);
        for (register, value) in [(PROPBASER, target | 0xf), (PENDBASER, target | 1 << 62)] {
            poke(rd + register, value)?;
            expect!(peek(rd + register)?, 0);
            poke32(rd + register, 0xffff_ffff)?;
            poke32(rd + register + 4, 0xffff_ffff)?;
            expect!(peek(rd + register)?, 0);
        }
        poke32(rd + CTLR, 1)?;
        expect!(peek32(rd + CTLR)? & 1, 0);
        for at in (0..0x1000).step_by(8) {
            poke(rd + at, u64::MAX)?;
            peek(rd + at)?;
        }
        expect!(peek32(rd + CTLR)? & 1, 0);
        expect!(peek(rd + PENDBASER)?, 0);
        for page in 0..16 {
            expect!(memory::first_change(target + page * 4096, memory::PATTERN), None);
        }
        poke8(rd + PENDBASER, 1)?;
        expect!(peek(rd + PENDBASER)?, 0);
        // The page with SGIs and PPIs is the host's.
        peek32(rd + 0x1_0100)?;
    }
    if cpus < 8 {
        out_of_reach(redistributor(cpus))?;
    }
    Ok(())
}
test!(redistributors, "T14", gic3);

/// The secure side of the distributor is read-as-zero.
fn distributor_security() -> Outcome {
    const GICD: u64 = 0x0800_0000;
    let private = if gic::version() == 3 { redistributor(0) + 0x1_0000 } else { GICD };
    for at in [private + 0x80, GICD + 0x84, GICD + 0xd00] {
        poke32(at, 0)?;
        expect!(peek32(at)?, 0);
        poke32(at, u32::MAX.into())?;
        expect!(peek32(at)?, 0);
    }
    // Group 0's SGI 15 can't be turned off, given a priority or made pending.
    poke32(private + 0x180, 1 << 15)?;
    poke32(private + 0x200, 1 << 15)?;
    expect!(peek32(private + 0x100)? & 1 << 15, 0);
    expect!(peek32(private + 0x200)? & 1 << 15, 0);
    poke8(private + 0x40f, 0x10)?;
    expect!(peek8(private + 0x40f)?, 0);
    Ok(())
}
test!(distributor_security, "T15");

fn gicv2_interfaces() -> Outcome {
    for at in [0x0801_0000, 0x0801_1000] {
        peek32(at)?;
    }
    // The virtual interface and its control registers are the monitor's.
    for at in (0x0801_2000..0x0806_0000).step_by(0x1000) {
        out_of_reach(at)?;
    }
    out_of_reach(0x080a_0000)
}
test!(gicv2_interfaces, "T15", gic2);
