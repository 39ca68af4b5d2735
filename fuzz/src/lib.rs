// SPDX-License-Identifier: MIT OR Apache-2.0
//! Carries a sequence of operations out on the monitor's pure crate and on the
//! reference model, and stops at the first difference.
//!
//! An input is one byte that says how far the two VMs are at the start, and
//! eight bytes an operation, so that a mutation of one leaves the others alone.

pub mod model;
mod world;

use havmsi_core::fake::{self, FakeMachine};
use world::World;

/// Operations of one input that are carried out.
const MOST: usize = 400;

/// Carries out one input.
///
/// # Panics
/// At the first difference between the crate and the model.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let verbose = std::env::var_os("HAVMSI_FUZZ_VERBOSE").is_some();
    #[cfg(feature = "leave-out")]
    leave_out();
    let records = fake::records();
    let machine = FakeMachine::new(&records);
    let mut world = World::new(&machine, verbose);
    world.prepare(*first);
    for op in rest.as_chunks::<8>().0.iter().take(MOST) {
        world.step(op);
    }
    world.end();
}

/// Leaves the check that `HAVMSI_LEAVE_OUT` names out.
#[cfg(feature = "leave-out")]
fn leave_out() {
    use havmsi_core::leave_out::{Check, leave_out};
    if let Ok(wanted) = std::env::var("HAVMSI_LEAVE_OUT") {
        let (check, ..) =
            Check::ALL.iter().find(|(_, name, _)| *name == wanted).expect("a check of that name");
        leave_out(*check);
    }
}
