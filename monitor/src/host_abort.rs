// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses of the host that its stage-2 refused.

use havmsi_core::addr::Ipa;
use havmsi_core::exit::{
    Access, CM, EC_SHIFT, FSC_PERMISSION, FSC_TYPE, Injection, S1PTW, WNR, ec, write_register,
};
use havmsi_core::host_map::Resolution;
use havmsi_core::vm::Machine;
use havmsi_hal::sysreg::{far_el2, hpfar_el2};
use havmsi_hal::tlb;

use crate::cpu::Frame;
use crate::exception::inject;
use crate::{host, platform};

/// `FAR_EL2` is not valid.
const FNV: u64 = 1 << 10;

/// A stage-2 abort of the host with this `ESR_EL2`.
pub fn handle(frame: &mut Frame, esr: u64) {
    let far = far_el2::read();
    let Some(ipa) = fault_address(esr, far) else {
        // Stage 1 changed meanwhile: let it happen again.
        return;
    };
    let world = host::world();
    if emulate(frame, esr, ipa) {
        return;
    }
    let walk = esr & S1PTW != 0;
    // Where a walk may not even read, there is no leaf; where it lacks a
    // permission, it is to write (FEAT_HAFDBS) or hit a device, which is never
    // executable. Cache maintenance says "write", but needs that right only where
    // it says that it lacks it.
    let permission = esr & FSC_TYPE == FSC_PERMISSION;
    let execute = if walk { permission } else { esr >> EC_SHIFT == ec::INSTRUCTION_ABORT };
    let write = if walk || esr & CM != 0 { permission } else { !execute && esr & WNR != 0 };
    let verdict = world.with_host_map(|map| map.resolve(&world.machine, Ipa(ipa), write, execute));
    if verdict == Resolution::Refused {
        let far = if esr & FNV == 0 { far } else { 0 };
        inject(frame, Injection::ExternalAbort, (esr, far));
    }
}

/// The IPA of the access in bytes.
///
/// HPFAR_EL2 is valid for translation faults and for stage-1 walks (Arm ARM
/// D24.2.61), except that Cortex-A57 (erratum 834220) may report a stage-2
/// translation fault for an access that stage 1 refuses, with a wrong address.
/// So for all but walks, and for permission faults in any case, stage 1 is
/// asked again.
fn fault_address(esr: u64, far: u64) -> Option<u64> {
    let walk = esr & S1PTW != 0;
    if walk || (esr & FNV != 0 && esr & FSC_TYPE != FSC_PERMISSION) {
        // FIPA [39:4] holds address bits [47:12]; a walk's offset is lost.
        return Some((hpfar_el2::read() >> 4 & 0xf_ffff_ffff) << 12);
    }
    tlb::stage1_page(far).map(|page| page | far & 0xfff)
}

/// The first page of each redistributor: read what the host may know, ignore
/// writes.
fn emulate(frame: &mut Frame, esr: u64, ipa: u64) -> bool {
    let world = host::world();
    if world.gic.version() != 3 || esr >> EC_SHIFT != ec::DATA_ABORT {
        return false;
    }
    let Some(offset) = platform::emulated_redistributor(ipa, world.facts.cpus) else {
        return false;
    };
    let Some(access) = Access::decode(esr) else { return false };
    let size = u64::from(access.size);
    if size < 4 || !ipa.is_multiple_of(size) {
        return false;
    }
    if !access.write {
        let mut data = u64::from(world.gic.redistributor_view(offset));
        if size == 8 {
            data |= u64::from(world.gic.redistributor_view(offset + 4)) << 32;
        }
        write_register(&mut frame.x, access.rt, access.loaded(data));
    }
    frame.step();
    true
}
