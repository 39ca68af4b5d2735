// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attacks by what reads and writes memory without a CPU.

use havmsi_abi::Function;

use super::{Outcome, Victim, verdict, word_at_free};
use crate::guest::{FREE, Vm};
use crate::harness::Failure;
use crate::memory::{poke, poke32, read, take, write, write8};
use crate::pci::Edu;
use crate::tests::sharing::{Guest, SHARE};
use crate::{attack, gic, mrs, msr};

/// fw_cfg's DMA register (QEMU docs/specs/fw_cfg.rst): it writes its signature
/// over the victim's page.
fn fw_cfg(victim: &mut Victim) -> Outcome {
    let order = take(1);
    // Select item 0 and read 16 bytes, all big endian.
    write(order, u64::from(0xa_u32.swap_bytes()) | u64::from(16_u32.swap_bytes()) << 32);
    write(order + 8, victim.pages[0].swap_bytes());
    let fault = poke(0x0902_0010, order.swap_bytes()).err();
    victim.harmed(1, format_args!("fw_cfg's DMA register: {fault:x?}"))
}
attack!(fw_cfg, "t14::fw_cfg");

pub(super) fn edu() -> Result<Edu, Failure> {
    Edu::near().ok_or(Failure::new(format_args!("no edu device")))
}

/// A PCI device writes to the victim's page.
fn dma_write(victim: &mut Victim) -> Outcome {
    let edu = edu()?;
    edu.load()?;
    edu.write(victim.pages[0])?;
    victim.harmed(1, format_args!("DMA to the page"))
}
attack!(dma_write, "t14::dma_write");

/// A PCI device reads the victim's page.
fn dma_read(victim: &mut Victim) -> Outcome {
    let copy = edu()?.read(victim.pages[0])?;
    victim.disclosed(read(copy), FREE, format_args!("the device reads"))
}
attack!(dma_read, "t14::dma_read");

/// A PCI device goes on writing to a page that it knew before it was donated.
fn stale_dma(_: &mut Victim) -> Outcome {
    let edu = edu()?;
    edu.load()?;
    let page = take(1);
    edu.write(page)?;
    let (vm, mut vcpu) = Vm::launch(word_at_free(), [8, 0, 0, 0])?;
    vm.call(Function::PageMap, &[FREE, page, 4096])?;
    let before = vcpu.report(0x200)?;
    edu.write(page)?;
    let after = vcpu.report(0x200)?;
    verdict(before != after, format_args!("the guest finds {before:#x}, after the DMA {after:#x}"))
}
attack!(stale_dma, "t14::stale_dma");

/// A PCI device goes on writing to a page that it knew while it was shared.
fn unshared(_: &mut Victim) -> Outcome {
    let edu = edu()?;
    edu.load()?;
    let mut guest = Guest::new()?;
    let page = guest.vm.map(FREE)?;
    guest.call(SHARE, FREE)?;
    edu.write(page)?;
    guest.ask(FREE)?;
    guest.agree()?;
    guest.store(FREE + 8, 0x5ec2)?;
    edu.write(page)?;
    let seen = guest.load(FREE + 8)?;
    verdict(seen != 0x5ec2, format_args!("the guest wrote 0x5ec2 and finds {seen:#x}"))
}
attack!(unshared, "t14::unshared");

/// GICR_CTLR.EnableLPIs, PROPBASER and PENDBASER (IHI 0069H 12.11).
const CTLR: u64 = 0;
const PROPBASER: u64 = 0x70;
const PENDBASER: u64 = 0x78;

/// The victim's page as the redistributor's table of pending LPIs: each that
/// is taken tells a bit of it and clears it.
fn pending_table(victim: &mut Victim) -> Outcome {
    // Each LPI of 16-bit identifiers: enabled, a high priority.
    let properties = take(16);
    (0..16 * 4096).for_each(|n| write8(properties + n, 0x11));
    let frame = gic::redistributor(0);
    poke(frame + PROPBASER, properties | 15)?;
    poke(frame + PENDBASER, victim.pages[0])?;
    poke32(frame + CTLR, 1)?;
    let (mut taken, mut last) = (0, 0);
    for _ in 0..64 {
        let id = mrs!("S3_0_C12_C12_0");
        if id < 8192 {
            break;
        }
        (taken, last) = (taken + 1, id);
        msr!("S3_0_C12_C12_1", id);
    }
    poke32(frame + CTLR, 0)?;
    victim.harmed(1, format_args!("{taken} LPIs taken, the last {last}"))
}
attack!(pending_table, "t14::pending_table");
