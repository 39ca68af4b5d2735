// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses of the host that its stage-2 refused.

use havmsi_core::exit::{CM, EC_SHIFT, FNV, FSC_PERMISSION, FSC_TYPE, Injection, S1PTW, WNR, ec};
use havmsi_core::host_map::Resolution;
use havmsi_core::vm::Machine;
use havmsi_hal::sysreg::far_el2;

use crate::cpu::Frame;
use crate::exception::{faulting_ipa, inject};
use crate::host;

/// A stage-2 abort of the host with this `ESR_EL2`.
pub fn handle(frame: &mut Frame, esr: u64) {
    let Some(ipa) = faulting_ipa(esr) else {
        // Stage 1 changed meanwhile: let it happen again.
        return;
    };
    let world = host::world();
    let walk = esr & S1PTW != 0;
    // Where a walk may not even read, there is no leaf; where it lacks a
    // permission, it is to write (FEAT_HAFDBS) or hit a device, which is never
    // executable. Cache maintenance says "write", but needs that right only where
    // it says that it lacks it.
    let permission = esr & FSC_TYPE == FSC_PERMISSION;
    let execute = if walk { permission } else { esr >> EC_SHIFT & 0x3f == ec::INSTRUCTION_ABORT };
    let write = if walk || esr & CM != 0 { permission } else { !execute && esr & WNR != 0 };
    match world.with_host_map(|map| map.resolve(&world.machine, ipa, write, execute)) {
        Resolution::Retry => {}
        Resolution::Ignored if !walk => frame.step(),
        Resolution::Ignored | Resolution::Refused => {
            let far = if esr & FNV == 0 { far_el2::read() } else { 0 };
            inject(frame, Injection::ExternalAbort, (esr, far));
        }
    }
}
