// SPDX-License-Identifier: MIT OR Apache-2.0
//! Virtual interrupts.

use havmsi_abi::{ExitClass, Function};

use crate::guest::{PORT, RAM, Vm};
use crate::harness::{Outcome, gic2, gic3};
use crate::memory::{self, read32, write32};
use crate::smc::{DENIED, INVALID, Refusal, host};
use crate::{ensure, expect, guest_program, test};

const PENDING: u64 = 1 << 62;
const ACTIVE: u64 = 1 << 63;
const HW: u64 = 1 << 61;
const GROUP1: u64 = 1 << 60;

const fn physical(id: u64) -> u64 {
    HW | id << 32
}

guest_program!(
    listener,
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

/// Counts and physical links of list registers that no guest may have.
fn bad_list_registers() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(listener(), [0; 4])?;
    let implemented = (host(Function::CpuInfo, &[])?[0] & 0x1f) + 1;
    expect!(vcpu.report(0x200)?, 0x10);
    vcpu.complete(0);
    for nr in [implemented + 1, 16 + 1, 32, 64, 1 << 32, u64::MAX] {
        vcpu.entry.nr_lr = nr;
        let result = vcpu.run_once();
        ensure!(result == Err(INVALID), "{nr} list registers: {result:x?}");
    }
    for id in [0, 1, 15, 16, 25, 26, 28, 29, 30, 32, 33, 1019, 1023] {
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
    expect!(vcpu.report(0x200)?, 0x10);
    expect!(vcpu.report(0x200)?, 0x10);
    expect!(vcpu.vgic.lr, [0; 16]);
    vm.destroy()
}
test!(bad_list_registers, "T19 T26", gic3);

/// A virtual interrupt comes, becomes active, and ends.
fn delivery() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(listener(), [0; 4])?;
    expect!(vcpu.report(0x200)?, 0x10);
    for (round, id) in [(0, 40), (1, 27), (2, 1019), (3, 40)] {
        let link = if id == 27 { physical(27) } else { 0 };
        let lr = PENDING | GROUP1 | link | 0x80 << 48 | id;
        vcpu.list(&[lr]);
        let got = vcpu.report(0x140)?;
        ensure!(got == id, "round {round}: {got}, not {id}");
        // Between acknowledgement and end: active.
        expect!(vcpu.vgic.lr[0] >> 62, 2);
        vcpu.list(&[vcpu.vgic.lr[0]]);
        expect!(vcpu.report(0x200)?, 0x10);
        expect!(vcpu.vgic.lr[0] >> 62, 0);
        expect!(vcpu.vgic.elrsr & 1, 1);
        vcpu.list(&[]);
        expect!(vcpu.report(0x200)?, 0x10);
    }
    // Masked by the interface's group enable of the host's: En = 0.
    vcpu.list(&[PENDING | GROUP1 | 0x80 << 48 | 41]);
    vcpu.entry.ich_hcr = 0;
    expect!(vcpu.report(0x200)?, 0x10);
    expect!(vcpu.vgic.lr[0] >> 62, 1);
    vm.destroy()
}
test!(delivery, "T19", gic3);

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
        expect!(a.vgic.hcr & 0x07ff_ff00, 0);
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

guest_program!(
    old_listener,
    "movz x4, #0x0801, lsl #16",
    "mov w1, #0xf0",
    "str w1, [x4, #4]",
    "mov w1, #1",
    "str w1, [x4]",
    "1: ldr w1, [x4, #0xc]",
    "str x1, [x20]",
    "str w1, [x4, #0x10]",
    "b 1b"
);

const GICV: u64 = 0x0804_0000;
const GICH: u64 = 0x0803_0000;

/// GICv2: the virtual CPU interface is mapped into the guest; the host keeps
/// the list registers.
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
    vcpu.exit = havmsi_abi::Exit::default();
    vcpu.entry.nr_lr = 1;
    expect!(vcpu.run_once(), Err(INVALID));
    vcpu.entry.nr_lr = 0;
    write32(GICH, 1);
    expect!(vcpu.report(0)?, 1023);
    // Pending, priority 0x80, group 0, 40.
    write32(GICH + 0x100, 1 << 28 | 0x10 << 23 | 40);
    expect!(vcpu.report(0)?, 40);
    expect!(read32(GICH + 0x100) >> 28 & 3, 2);
    expect!(vcpu.report(0)?, 1023);
    expect!(read32(GICH + 0x100) >> 28 & 3, 0);
    write32(GICH, 0);
    write32(GICH + 0x100, 0);
    vm.destroy()?;
    peek_all(GICV)
}
test!(virtual_cpu_interface, "T19", gic2);

fn peek_all(at: u64) -> Outcome {
    memory::peek32(at)?;
    memory::poke32(at, 0)?;
    Ok(())
}

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
