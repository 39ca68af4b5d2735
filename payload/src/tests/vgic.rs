// SPDX-License-Identifier: MIT OR Apache-2.0
//! Virtual interrupts.

use havmsi_abi::{EntryFlags, ExitClass, Function};

use crate::gic;
use crate::guest::{Exit, PORT, RAM, Vcpu, Vm};
use crate::harness::{Failure, Outcome, gic2, gic3};
use crate::memory;
use crate::smc::{self, DENIED, INVALID, Refusal, host};
use crate::{ensure, expect, guest_program, test};

const PENDING: u64 = 1 << 62;
const ACTIVE: u64 = 1 << 63;
const STATE: u64 = PENDING | ACTIVE;
const HW: u64 = 1 << 61;
const GROUP1: u64 = 1 << 60;
/// Priority 0x80.
const MIDDLE: u64 = 0x80 << 48;

const fn physical(id: u64) -> u64 {
    HW | id << 32
}

// Sends as many SGIs by `x0` as `x1` says, then tells which interrupts it takes.
guest_program!(
    listener,
    "mov x2, #0xf0",
    "msr S3_0_C4_C6_0, x2",
    "mov x2, #1",
    "msr S3_0_C12_C12_7, x2",
    "isb",
    "1: cbz x1, 2f",
    "msr S3_0_C12_C11_5, x0",
    "sub x1, x1, #1",
    "b 1b",
    "2: msr daifclr, #2",
    "3: mov x1, #0x10",
    "str x1, [x20, #0x200]",
    "b 3b"
);
// The same with a GICv2: it looks itself, and tells 1023 if there is none.
guest_program!(
    old_listener,
    "movz x4, #0x0801, lsl #16",
    "movz x5, #0x0800, lsl #16",
    "mov w2, #0xf0",
    "str w2, [x4, #4]",
    "mov w2, #1",
    "str w2, [x4]",
    "1: cbz x1, 3f",
    "str w0, [x5, #0xf00]",
    "sub x1, x1, #1",
    "b 1b",
    "3: ldr w1, [x4, #0xc]",
    "str x1, [x20, #0x140]",
    "str w1, [x4, #0x10]",
    "mov x1, #0x10",
    "str x1, [x20, #0x200]",
    "b 3b"
);

pub(super) const GICC: u64 = 0x0801_0000;
const GICH: u64 = 0x0803_0000;
pub(super) const GICV: u64 = 0x0804_0000;

fn program() -> &'static [u8] {
    if gic::version() == 3 { listener() } else { old_listener() }
}

/// A VM whose first vCPU listens and has the virtual CPU interface.
fn launch(x: [u64; 4]) -> Result<(Vm, Vcpu), Failure> {
    let (vm, vcpu) = Vm::launch(program(), x)?;
    map_interface(&vm)?;
    Ok((vm, vcpu))
}

fn map_interface(vm: &Vm) -> Outcome {
    if gic::version() == 2 {
        vm.call(Function::MapDev, &[GICC, GICV])?;
        vm.call(Function::MapDev, &[GICC + 0x1000, GICV + 0x1000])?;
    }
    Ok(())
}

/// A pending interrupt that the programs take.
fn pending(id: u64) -> u64 {
    PENDING | MIDDLE | id | if gic::version() == 3 { GROUP1 } else { 0 }
}

/// Runs to the programs' next round; the interrupt that came before.
fn round(vcpu: &mut Vcpu) -> Result<Option<u64>, Failure> {
    let mut taken = None;
    loop {
        let exit = vcpu.expect(ExitClass::MmioWrite)?;
        // What is left of the list register that was loaded.
        let used = vcpu.entry.lr[0] & !STATE | vcpu.vgic.lr[0] & STATE;
        if vcpu.entry.nr_lr == 1 {
            vcpu.list(&[used]);
        }
        match exit.ipa - PORT {
            0x140 => taken = Some(exit.data & 0x3ff).filter(|id| *id != 1023),
            0x200 => return Ok(taken),
            _ => return Err(Failure::new(format_args!("{exit:x?}"))),
        }
    }
}

fn refused(vcpu: &mut Vcpu, lrs: &[u64]) -> Outcome {
    vcpu.list(lrs);
    let result = vcpu.run_once();
    vcpu.list(&[]);
    ensure!(result == Err(INVALID), "{lrs:x?}: {result:x?}");
    Ok(())
}

fn implemented() -> Result<u64, Failure> {
    Ok((host(Function::CpuInfo, &[])?[0] & 0x3f) + 1)
}

/// Counts and physical links of list registers that no guest may have.
fn bad_list_registers() -> Outcome {
    let (vm, mut vcpu) = launch([0; 4])?;
    let implemented = implemented()?;
    expect!(round(&mut vcpu)?, None);
    vcpu.complete(0);
    for nr in [implemented + 1, 16 + 1, 32, 64, 1 << 32, u64::MAX] {
        vcpu.entry.nr_lr = nr;
        let result = vcpu.run_once();
        ensure!(result == Err(INVALID), "{nr} list registers: {result:x?}");
    }
    for id in [0, 1, 15, 16, 25, 26, 27, 28, 29, 30, 32, 33, 1019, 1023] {
        for state in [0, PENDING, ACTIVE, PENDING | ACTIVE] {
            for place in 0..implemented.min(3) {
                vcpu.entry.lr = [0; 16];
                vcpu.entry.nr_lr = implemented;
                vcpu.entry.lr[usize::from(place.to_le_bytes()[0])] =
                    state | physical(id) | GROUP1 | 40;
                let result = vcpu.run_once();
                ensure!(result == Err(INVALID), "linked to {id}: {result:x?}");
            }
        }
    }
    // Beyond the count it is not looked at, and not loaded.
    vcpu.entry.lr = [PENDING | physical(33) | GROUP1 | 40; 16];
    vcpu.entry.nr_lr = 0;
    vcpu.entry.ich_hcr = 1;
    expect!(round(&mut vcpu)?, None);
    expect!(round(&mut vcpu)?, None);
    expect!(vcpu.vgic.lr, [0; 16]);
    vm.destroy()
}
test!(bad_list_registers, "T19 T26");

/// Interrupts, states and flags that no guest can expect.
fn hostile_injection() -> Outcome {
    let (vm, mut vcpu) = launch([0; 4])?;
    expect!(round(&mut vcpu)?, None);
    // Special numbers, extended ranges, LPIs.
    for id in [1020, 1021, 1022, 1023, 1056, 4096 + 16, 8192, 8192 + 16, 0xff_fff0] {
        for state in [PENDING, ACTIVE, PENDING | ACTIVE] {
            refused(&mut vcpu, &[pending(id) & !STATE | state])?;
        }
    }
    // The timer's number with another link, active and pending at once.
    refused(&mut vcpu, &[pending(27) | physical(30)])?;
    refused(&mut vcpu, &[pending(28) | physical(27)])?;
    refused(&mut vcpu, &[pending(27) | physical(27) | ACTIVE])?;
    // Non-maskable, and bits that mean nothing.
    for bit in (32..41).chain(42..48).chain(56..60) {
        refused(&mut vcpu, &[pending(40) | 1 << bit])?;
    }
    // One interrupt twice.
    if implemented()? >= 3 {
        refused(&mut vcpu, &[pending(40), pending(40)])?;
        refused(&mut vcpu, &[pending(40), pending(41), pending(40) & !STATE | ACTIVE])?;
        refused(&mut vcpu, &[pending(27) | physical(27), pending(27)])?;
    }
    expect!(round(&mut vcpu)?, None);
    // The control flags that the host may not set have no effect: none traps.
    vcpu.list(&[pending(42)]);
    vcpu.entry.ich_hcr = u64::MAX;
    expect!(round(&mut vcpu)?, Some(42));
    vm.destroy()
}
test!(hostile_injection, "T19 T27");

/// A virtual interrupt comes, becomes active, and ends.
fn delivery() -> Outcome {
    let (vm, mut vcpu) = launch([0; 4])?;
    expect!(round(&mut vcpu)?, None);
    for (number, id) in [(0, 40), (1, 27), (2, 1019), (3, 40)] {
        let link = if id == 27 { physical(27) } else { 0 };
        vcpu.list(&[pending(id) | link]);
        let got = vcpu.report(0x140)?;
        ensure!(got == id, "round {number}: {got}, not {id}");
        // Between acknowledgement and end: active.
        expect!(vcpu.vgic.lr[0] >> 62, 2);
        expect!(vcpu.vgic.lr[0] & 0x3ff, id);
        vcpu.list(&[(pending(id) | link) & !STATE | ACTIVE]);
        expect!(vcpu.report(0x200)?, 0x10);
        expect!(vcpu.vgic.lr[0] >> 62, 0);
        vcpu.list(&[]);
        expect!(round(&mut vcpu)?, None);
    }
    // Masked by the interface's group enable of the host's: En = 0.
    vcpu.list(&[pending(41)]);
    vcpu.entry.ich_hcr = 0;
    let exit = vcpu.run()?;
    ensure!(exit.ipa != PORT + 0x140 || exit.data == 1023, "{exit:x?}");
    expect!(vcpu.vgic.lr[0] >> 62, 1);
    vm.destroy()
}
test!(delivery, "T19");

/// `x0` and `x1` for `count` sends of SGI `id` to vCPU `target`.
fn sending(count: u64, id: u64, target: u64) -> [u64; 4] {
    let three = gic::version() == 3;
    let command = if three { id << 24 | 1 << target } else { 1 << (16 + target) | id };
    [command, count, 0, 0]
}

/// Runs to the next send.
#[track_caller]
fn sends(vcpu: &mut Vcpu) -> Outcome {
    let exit = vcpu.run()?;
    let place = if gic::version() == 3 {
        exit.class == ExitClass::SysregWrite
    } else {
        exit.class == ExitClass::MmioWrite && exit.ipa == 0x0800_0f00
    };
    ensure!(place, "{exit:x?} where an SGI was expected");
    Ok(())
}

fn only(vcpu: &mut Vcpu, sent: Option<u64>) -> Outcome {
    for id in (0..16).filter(|id| Some(*id) != sent) {
        refused(vcpu, &[pending(id)])?;
        refused(vcpu, &[pending(id) | ACTIVE])?;
    }
    Ok(())
}

/// SGIs come only to the vCPU that they were sent to, and no more often.
fn only_sgis_that_were_sent() -> Outcome {
    let (vm, mut vcpu) = launch(sending(2, 5, 0))?;
    let (other, mut stranger) = launch([0; 4])?;
    only(&mut vcpu, None)?;
    sends(&mut vcpu)?;
    only(&mut vcpu, Some(5))?;
    // Neither is another VM's its own.
    only(&mut stranger, None)?;
    expect!(round(&mut stranger)?, None);
    sends(&mut vcpu)?;
    // Two that wait may come one after the other, and no third one.
    for _ in 0..2 {
        only(&mut vcpu, Some(5))?;
        vcpu.list(&[pending(5)]);
        expect!(round(&mut vcpu)?, Some(5));
    }
    only(&mut vcpu, None)?;
    vcpu.list(&[]);
    expect!(round(&mut vcpu)?, None);
    other.destroy()?;
    vm.destroy()?;
    // To another vCPU.
    let (vm, mut vcpu) = launch(sending(1, 5, 1))?;
    sends(&mut vcpu)?;
    only(&mut vcpu, None)?;
    vm.destroy()
}
test!(only_sgis_that_were_sent, "T19 T27");

/// A send counts once, however often the host has its exit: the guest goes on
/// behind it, answered or not.
fn a_send_is_not_repeated() -> Outcome {
    let (vm, mut vcpu) = launch(sending(1, 9, 0))?;
    sends(&mut vcpu)?;
    vcpu.exit = Exit::default();
    for answer in [EntryFlags::INJECT_SEA, EntryFlags::INJECT_UNDEF] {
        vcpu.entry.flags.0 = answer;
        expect!(vcpu.run_once(), Err(INVALID));
    }
    vcpu.entry.flags.0 = 0;
    // Not taken in one run, it is still to come.
    vcpu.list(&[pending(9)]);
    vcpu.entry.ich_hcr = 0;
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    ensure!(exit.ipa >= PORT && exit.data != 9, "{exit:x?}");
    expect!(vcpu.vgic.lr[0] & (STATE | 0x3ff), PENDING | 9);
    vcpu.list(&[]);
    expect!(round(&mut vcpu)?, None);
    vcpu.list(&[pending(9)]);
    expect!(round(&mut vcpu)?, Some(9));
    only(&mut vcpu, None)?;
    vm.destroy()
}
test!(a_send_is_not_repeated, "T27");

/// An SGI of the VM's earlier life does not come in the next one.
fn a_reset_forgets_sgis() -> Outcome {
    let (vm, mut vcpu) = launch(sending(3, 3, 0))?;
    for _ in 0..3 {
        sends(&mut vcpu)?;
    }
    smc::until_done(Function::VmReset, &[vm.handle], 100_000)?;
    vm.boot(program(), [0; 4])?;
    map_interface(&vm)?;
    vcpu.exit = Exit::default();
    only(&mut vcpu, None)?;
    expect!(round(&mut vcpu)?, None);
    only(&mut vcpu, None)?;
    vm.destroy()
}
test!(a_reset_forgets_sgis, "T24 T27");

/// The guest's own registers of the interface: its alone, kept over runs and
/// switches, and never trapped on the host's word.
fn interface_registers() -> Outcome {
    let (vm_a, mut a) = Vm::launch(interface(), [0x50; 4])?;
    let (vm_b, mut b) = Vm::launch(interface(), [0xa0; 4])?;
    // Priority mask of 0 at the start.
    expect!((a.report(0)?, b.report(0)?), (0, 0));
    for _ in 0..5 {
        a.entry.ich_hcr = u64::MAX;
        let pmr = a.report(0)?;
        ensure!(pmr & !7 == 0x50, "{pmr:#x}");
        let pmr = b.report(0)?;
        ensure!(pmr & !7 == 0xa0, "{pmr:#x}");
        expect!(a.vgic.vmcr >> 24 & 0xf8, 0x50);
        expect!(b.vgic.vmcr >> 24 & 0xf8, 0xa0);
    }
    // A VM without an interrupt controller sees nothing of theirs.
    let (vm_c, mut c, _) = Vm::launch_two(0, interface(), [0x30; 4])?;
    let (vm_d, mut d, _) = Vm::launch_two(0, interface(), [0x70; 4])?;
    for _ in 0..3 {
        let seen = (c.run()?, d.run()?);
        for exit in [seen.0, seen.1] {
            ensure!(
                exit.class == ExitClass::MmioWrite
                    && (exit.ipa != PORT || exit.data & !7 != 0x50 && exit.data & !7 != 0xa0),
                "{exit:x?}"
            );
        }
        ensure!(seen.0.ipa != PORT || seen.0.data & !7 != 0x70, "C sees D's {:x?}", seen.0);
        ensure!(seen.1.ipa != PORT || seen.1.data & !7 != 0x30, "D sees C's {:x?}", seen.1);
    }
    c.entry.nr_lr = 1;
    c.entry.lr[0] = PENDING | GROUP1 | 40;
    expect!(c.run_once(), Err(INVALID));
    for vm in [vm_a, vm_b, vm_c, vm_d] {
        vm.destroy()?;
    }
    Ok(())
}
guest_program!(
    interface,
    "1: mrs x1, S3_0_C4_C6_0",
    "str x1, [x20]",
    "msr S3_0_C4_C6_0, x0",
    "isb",
    "b 1b"
);
test!(interface_registers, "T07 T19", gic3);

/// GICv2: the virtual CPU interface is mapped into the guest, and nothing else.
fn virtual_cpu_interface() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(old_listener(), [0; 4])?;
    let at = 0x0801_0000;
    // Not mapped: it is MMIO for the host to emulate.
    let exit = vcpu.expect(ExitClass::MmioWrite)?;
    expect!((exit.ipa, exit.data), (at + 4, 0xf0));
    for (args, why) in [
        ([at, GICV + 0x2000], DENIED),
        ([at, GICV - 0x1000], DENIED),
        ([at, GICH], DENIED),
        ([at, 0x0801_0000], DENIED),
        ([at, 0x0800_0000], DENIED),
        ([at, 0x0900_0000], DENIED),
        ([at, 0x0904_0000], DENIED),
        ([at, 0x0e00_0000], DENIED),
        ([at, GICV + 1], DENIED),
        ([at, memory::RAM_BASE], DENIED),
        ([at, memory::take(1)], DENIED),
        ([RAM, GICV], DENIED),
        ([RAM + 0x5000, GICV], DENIED),
        ([at + 1, GICV], INVALID),
        ([1 << 36, GICV], INVALID),
        ([!0xfff, GICV], INVALID),
    ] {
        let result = vm.call(Function::MapDev, &args);
        ensure!(result == Err(why), "{args:x?}: {result:x?}");
    }
    vm.call(Function::MapDev, &[at, GICV])?;
    vm.call(Function::MapDev, &[at + 0x1000, GICV + 0x1000])?;
    expect!(vm.call(Function::MapDev, &[at, GICV]), Err(DENIED));
    // Not the guest's memory: it doesn't go to the host.
    expect!(vm.call(Function::PageUnmap, &[at, 2])?[0], 2);
    vcpu.exit = Exit::default();
    expect!(round(&mut vcpu)?, None);
    vcpu.list(&[PENDING | 0x80 << 48 | 40]);
    expect!(round(&mut vcpu)?, Some(40));
    vm.destroy()
}
test!(virtual_cpu_interface, "T19", gic2);

/// With another interrupt controller there is nothing to map.
fn no_virtual_cpu_interface() -> Outcome {
    let (vm, _) = Vm::launch(listener(), [0; 4])?;
    for pa in [GICV, 0x080a_0000, 0x0800_0000] {
        expect!(vm.call(Function::MapDev, &[0x0801_0000, pa]), Err(DENIED));
    }
    vm.destroy()
}
test!(no_virtual_cpu_interface, "T05", gic3);

/// A VM made without one can't map it.
fn none_for_a_vm_without() -> Outcome {
    let (vm, _, _) = Vm::launch_two(0, old_listener(), [0; 4])?;
    expect!(vm.call(Function::MapDev, &[0x0801_0000, GICV]), Err(DENIED));
    let short = Vm::new(1)?;
    expect!(short.call(Function::MapDev, &[0x0801_0000, GICV]), Err(Refusal::Wanted(2)));
    short.destroy()?;
    vm.destroy()
}
test!(none_for_a_vm_without, "T05", gic2);
