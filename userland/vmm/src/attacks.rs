// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a hostile VMM does to a guest of its own. Each attack is decided by what it got.

use crate::memory::Memory;
use crate::obey::{self, order};
use crate::vm::{DATA, Reg, Reply, SLOT, Stop, Vm};
use crate::{Finding, tiny};
use havmsi_operations::{DISTRIBUTOR, REDISTRIBUTOR};
use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_MP_STATE_RUNNABLE, kvm_arm_counter_offset, kvm_device_attr, kvm_guest_debug, kvm_mp_state,
};
use std::os::fd::AsRawFd as _;
use std::rc::Rc;

type Outcome = Result<Finding, String>;
/// An attack.
type Attack = fn() -> Outcome;

/// All of them.
pub const ATTACKS: [(&str, Attack); 16] = [
    ("own-mapping-read", own_mapping_read),
    ("own-mapping-write", own_mapping_write),
    ("slot-alias", slot_alias),
    ("slot-of-two-vms", slot_of_two_vms),
    ("inject-abort", inject_abort),
    ("slot-delete", slot_delete),
    ("slot-replace", slot_replace),
    ("image-change", image_change),
    ("late-fill", late_fill),
    ("take-back", take_back),
    ("replay", replay),
    ("vcpu-entry", vcpu_entry),
    ("guest-debug", guest_debug),
    ("reset-read", reset_read),
    ("time-back", time_back),
    ("forged-sgi", forged_sgi),
];

/// What the guest keeps in its memory.
const SECRET: u64 = 0x5ec2_e7ed_a7a0_0001;
/// Later.
const NEWER: u64 = 0x5ec2_e7ed_a7a0_0002;
/// What the VMM would like the guest to find.
const PLANTED: u64 = 0x6861_636b_6564_2121;
/// A place in the data slot.
const PLACE: u64 = 0x4000;

/// A guest that has run, and has a secret in its memory.
fn with_secret() -> Result<Vm, String> {
    let mut vm = Vm::new(obey::image())?;
    vm.must(order::WRITE, DATA + PLACE, SECRET)?;
    Ok(vm)
}

fn finding(exposed: bool, evidence: String) -> Outcome {
    Ok(Finding { exposed, evidence })
}

fn errors(result: Result<(), String>) -> String {
    result.err().unwrap_or_else(|| "accepted".to_owned())
}

/// A guest that boots, keeps what it stores and runs its own code.
pub fn alive() -> Result<(), String> {
    let mut vm = with_secret()?;
    if vm.must(order::READ, DATA + PLACE, 0)? != SECRET {
        return Err("the guest's memory doesn't keep what it stores".to_owned());
    }
    if vm.must(order::CALL, obey::function(), 0)? != obey::FUNCTION_VALUE {
        return Err("the guest's function returns something else".to_owned());
    }
    Ok(())
}

fn own_mapping_read() -> Outcome {
    let vm = with_secret()?;
    let direct = vm.data.load(PLACE);
    let by_call = vm.data.load_by_call(PLACE);
    let text = match &by_call {
        Ok(value) => format!("{value:#x}"),
        Err(e) => e.to_string(),
    };
    finding(
        direct == SECRET || by_call.is_ok_and(|v| v == SECRET),
        format!("load: {direct:#x}; write(2) from the mapping: {text}"),
    )
}

fn own_mapping_write() -> Outcome {
    let mut vm = with_secret()?;
    let stored = vm.data.store(PLACE, PLANTED);
    let first = vm.must(order::READ, DATA + PLACE, 0)?;
    let call = vm.data.store_by_call(PLACE, PLANTED ^ 1).map_err(|e| e.to_string());
    let second = vm.must(order::READ, DATA + PLACE, 0)?;
    finding(
        first != SECRET || second != SECRET,
        format!(
            "store: {}, the guest reads {first:#x}; read(2) into the mapping: {}, the guest reads {second:#x}",
            if stored { "done" } else { "SIGBUS" },
            errors(call)
        ),
    )
}

/// The same memory at a second address of the VM.
fn slot_alias() -> Outcome {
    const ALIAS: u64 = DATA + 4 * SLOT;
    let mut vm = with_secret()?;
    let slot = vm.slot(2, ALIAS, SLOT, &vm.data);
    let reply = vm.order(order::READ, ALIAS + PLACE, 0);
    finding(
        reply == Reply::Value(SECRET),
        format!(
            "second slot over the same memory: {}; the guest reads there {reply}",
            errors(slot)
        ),
    )
}

/// The same memory in a second VM.
fn slot_of_two_vms() -> Outcome {
    let mut victim = with_secret()?;
    let mut other = Vm::with(obey::image(), 1, Rc::clone(&victim.data))?;
    let reply = other.order(order::READ, DATA + PLACE, 0);
    let intact = victim.must(order::READ, DATA + PLACE, 0)? == SECRET;
    finding(
        reply == Reply::Value(SECRET) || !intact,
        format!(
            "a second VM over the same memory reads {reply}; the first one's data is {}",
            if intact { "intact" } else { "changed" }
        ),
    )
}

/// An external abort for a guest that touched nothing.
fn inject_abort() -> Outcome {
    let mut vm = with_secret()?;
    vm.interrupted()?;
    let mut events = kvm_bindings::kvm_vcpu_events::default();
    events.exception.ext_dabt_pending = 1;
    let set = vm.vcpu(0).set_vcpu_events(&events).map_err(|e| e.to_string());
    let stop = vm.run(true)?;
    finding(
        matches!(stop, Stop::Store(obey::FAULT, _)),
        format!(
            "KVM_SET_VCPU_EVENTS after an interrupt: {}; the guest {}",
            errors(set),
            match stop {
                Stop::Store(obey::FAULT, esr) => format!("takes an abort, class {:#x}", esr >> 26),
                Stop::Interrupt => "goes on counting".to_owned(),
                other => format!("stops: {other:x?}"),
            }
        ),
    )
}

/// RAM that is RAM no more: do the guest's stores come out?
fn slot_delete() -> Outcome {
    let mut vm = with_secret()?;
    let slot = vm.slot(1, DATA, 0, &vm.data);
    let reply = vm.order(order::WRITE, DATA + PLACE, NEWER);
    let leak = matches!(&reply, Reply::Stopped(s) if s.contains(&format!("{NEWER:x}")));
    finding(
        leak,
        format!("slot deleted: {}; a store of the guest's to it ends with {reply}", errors(slot)),
    )
}

/// Other memory in the place of the guest's.
fn slot_replace() -> Outcome {
    let mut vm = with_secret()?;
    let other = Memory::new(SLOT)?;
    other.store(PLACE, PLANTED);
    let gone = vm.slot(1, DATA, 0, &vm.data);
    let slot = vm.slot(1, DATA, SLOT, &other);
    let reply = vm.order(order::READ, DATA + PLACE, 0);
    finding(
        matches!(reply, Reply::Value(v) if v != SECRET),
        format!(
            "slot deleted: {}; one with other content: {}; the guest reads {reply}",
            errors(gone),
            errors(slot)
        ),
    )
}

/// Code of the launch image, changed after the guest has begun to run.
fn image_change() -> Outcome {
    let mut vm = with_secret()?;
    let offset = obey::function() - tiny::RAM;
    let stored = vm.code.store(offset, obey::OTHER_FUNCTION);
    let call = vm.code.store_by_call(offset, obey::OTHER_FUNCTION).map_err(|e| e.to_string());
    let reply = vm.order(order::CALL, obey::function(), 0);
    finding(
        reply != Reply::Value(obey::FUNCTION_VALUE),
        format!(
            "store: {}, read(2): {}; the guest's function returns {reply}",
            if stored { "done" } else { "SIGBUS" },
            errors(call)
        ),
    )
}

/// RAM that the launch did not cover, filled before the guest first looks at it.
fn late_fill() -> Outcome {
    let mut vm = Vm::new(obey::image())?;
    vm.must(order::TIME, 0, 0)?;
    let stored = vm.data.store(PLACE, PLANTED);
    let reply = vm.order(order::READ, DATA + PLACE, 0);
    finding(
        reply == Reply::Value(PLANTED),
        format!(
            "content put into untouched RAM after the launch ({}); the guest reads {reply}",
            if stored { "stored" } else { "SIGBUS" }
        ),
    )
}

/// Memory taken back with the guest's data in it.
fn take_back() -> Outcome {
    let vm = with_secret()?;
    let slot = vm.slot(1, DATA, 0, &vm.data);
    let value = vm.data.load(PLACE);
    finding(value == SECRET, format!("slot deleted: {}; it then holds {value:#x}", errors(slot)))
}

/// Memory taken back and returned with what it held earlier.
fn replay() -> Outcome {
    let mut vm = with_secret()?;
    let old = vm.data.load(PLACE);
    vm.must(order::WRITE, DATA + PLACE, NEWER)?;
    let gone = vm.slot(1, DATA, 0, &vm.data);
    vm.data.store(PLACE, if old == 0 { SECRET } else { old });
    let back = vm.slot(1, DATA, SLOT, &vm.data);
    let reply = vm.order(order::READ, DATA + PLACE, 0);
    finding(
        matches!(reply, Reply::Value(v) if v != NEWER),
        format!(
            "slot deleted: {}; returned with the earlier content: {}; the guest reads {reply}",
            errors(gone),
            errors(back)
        ),
    )
}

/// A vCPU that the guest has not turned on, entered where the VMM likes.
fn vcpu_entry() -> Outcome {
    let mut vm = Vm::with(obey::image(), 2, Rc::new(Memory::new(SLOT)?))?;
    vm.must(order::WRITE, DATA + PLACE, SECRET)?;
    let pc = vm.set_of(1, Reg::Pc, obey::hostile());
    let state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    let on = vm.vcpu(1).set_mp_state(state).map_err(|e| e.to_string());
    // A vCPU that KVM waits for ends with a signal.
    vm.timer(1000)?;
    let stop = vm.run_of(1);
    finding(
        matches!(stop, Stop::Store(obey::HOSTILE, _)),
        format!(
            "PC set: {}, KVM_SET_MP_STATE: {}; the vCPU {}",
            errors(pc),
            errors(on),
            match stop {
                Stop::Store(obey::HOSTILE, _) => "runs there".to_owned(),
                Stop::Failed(why) => format!("doesn't run ({why})"),
                Stop::Interrupt => "doesn't run".to_owned(),
                other => format!("stops: {other:x?}"),
            }
        ),
    )
}

/// Single-stepping and breakpoints by the user API.
fn guest_debug() -> Outcome {
    const HARDWARE: u32 = 1 << 17;
    let mut texts = Vec::new();
    let mut exposed = false;
    for (what, control) in [("single step", KVM_GUESTDBG_SINGLESTEP), ("breakpoint", HARDWARE)] {
        let mut vm = with_secret()?;
        let mut debug =
            kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | control, ..Default::default() };
        // Enabled at EL1 and EL0, all four bytes: DBGBCR_EL1.BAS, PMC and E.
        debug.arch.dbg_bcr[0] = 0xf << 5 | 3 << 1 | 1;
        debug.arch.dbg_bvr[0] = obey::function();
        let set = vm.vcpu(0).set_guest_debug(&debug).map_err(|e| e.to_string());
        let reply = vm.order(order::CALL, obey::function(), 0);
        let stopped = matches!(&reply, Reply::Stopped(s) if s.contains("Debug"));
        exposed |= stopped;
        let end = if stopped { "stops for the VMM".to_owned() } else { format!("returns {reply}") };
        texts.push(format!("{what}: {}; the guest's function {end}", errors(set)));
    }
    finding(exposed, texts.join("; "))
}

/// A reset of the guest by the VMM, and a look at its memory.
fn reset_read() -> Outcome {
    let vm = with_secret()?;
    let init = vm.init(0);
    let value = vm.data.load(PLACE);
    finding(
        value == SECRET,
        format!("KVM_ARM_VCPU_INIT: {}; the memory then holds {value:#x}", errors(init)),
    )
}

/// The guest's counter, turned back.
fn time_back() -> Outcome {
    // _IOW(KVMIO, 0xb5, struct kvm_arm_counter_offset)
    const SET_COUNTER_OFFSET: libc::c_ulong = 0x4010_aeb5;
    let mut texts = Vec::new();
    let mut exposed = false;
    for by_register in [true, false] {
        let mut vm = with_secret()?;
        // So that there is some way back.
        vm.must(order::SPIN, 20_000_000, 0)?;
        let before = vm.must(order::TIME, 0, 0)?;
        let (what, set) = if by_register {
            ("KVM_SET_ONE_REG of the counter", vm.set(Reg::Counter, 0))
        } else {
            let now: u64;
            // SAFETY: reads a counter.
            unsafe { std::arch::asm!("mrs {}, cntvct_el0", out(reg) now) };
            let offset = kvm_arm_counter_offset { counter_offset: now, reserved: 0 };
            // SAFETY: the kernel reads the structure that belongs to this request.
            let r = unsafe {
                libc::syscall(
                    libc::SYS_ioctl,
                    vm.vm.as_raw_fd(),
                    SET_COUNTER_OFFSET,
                    &raw const offset,
                )
            };
            let set =
                if r == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().to_string()) };
            ("KVM_ARM_SET_COUNTER_OFFSET", set)
        };
        let after = vm.must(order::TIME, 0, 0)?;
        exposed |= after < before;
        let end = if after < before { "went back" } else { "went on" };
        texts.push(format!("{what}: {}; the guest's counter {end}", errors(set)));
    }
    finding(exposed, texts.join("; "))
}

/// An interrupt between processors that no processor of the guest sent.
fn forged_sgi() -> Outcome {
    const NONE: u64 = 1023;
    const SGI: u32 = 5;
    // Of the redistributor's second page, and GICD_CTLR.
    const GROUPS: u64 = 0x1_0080;
    const ENABLE: u64 = 0x1_0100;
    const PENDING: u64 = 0x1_0200;
    const GROUP_1: u64 = 1 << 1;
    let mut vm = Vm::new(obey::image())?;
    let gic = vm.gic()?;
    vm.must(order::WRITE_32, DISTRIBUTOR, GROUP_1)?;
    vm.must(order::WRITE_32, REDISTRIBUTOR + GROUPS, 0xffff_ffff)?;
    vm.must(order::WRITE_32, REDISTRIBUTOR + ENABLE, 0xffff)?;
    vm.must(order::LISTEN, 0, 0)?;
    let before = vm.must(order::ACKNOWLEDGE, 0, 0)?;
    if before != NONE {
        return Err(format!("interrupt {before} came by itself"));
    }
    let value: u32 = 1 << SGI;
    let attr = kvm_device_attr {
        group: KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
        attr: PENDING,
        addr: (&raw const value).expose_provenance() as u64,
        flags: 0,
    };
    let set = gic.set_device_attr(&attr).map_err(|e| e.to_string());
    let reply = vm.order(order::ACKNOWLEDGE, 0, 0);
    finding(
        reply == Reply::Value(SGI.into()),
        format!(
            "SGI {SGI} made pending through the GIC's user interface: {}; the guest {}",
            errors(set),
            match reply {
                Reply::Value(NONE) => "finds none".to_owned(),
                Reply::Value(id) => format!("takes interrupt {id}"),
                other => format!("stops: {other}"),
            }
        ),
    )
}
