// SPDX-License-Identifier: MIT OR Apache-2.0
//! In a test monitor: which check QEMU's command line leaves out. No release
//! has this (`havmsi_core::leave_out`).

#[cfg(not(feature = "board-qemu"))]
compile_error!("test monitors are for the emulated machine only");

use havmsi_core::leave_out::{Check, leave_out};

use crate::{log, platform};

/// Asks and says it; before anything is checked.
pub fn init() {
    let mut text = [0; 32];
    let Some(length) = platform::left_out(&mut text) else {
        log!("TEST BUILD, with all checks");
        return;
    };
    let name = text.get(..length).unwrap_or_default();
    let Some((check, name, what)) = Check::ALL.iter().find(|c| c.1.as_bytes() == name) else {
        panic!("TEST BUILD: there is no check of this name to leave out");
    };
    leave_out(*check);
    log!("TEST BUILD without the check {name}: {what}");
}
