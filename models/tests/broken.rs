// SPDX-License-Identifier: MIT OR Apache-2.0
//! Monitors that are broken on purpose: the model must find what does not hold.
#![allow(missing_docs, reason = "tests")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use havmsi_models::explore::{Limits, Report, explore};
use havmsi_models::scenarios;
use havmsi_models::world::Scenario;

/// Which check is left out is the process's: one test at a time.
static ONE: Mutex<()> = Mutex::new(());

fn tell(report: &Report) -> String {
    let broken = report.broken.iter().map(|broken| {
        format!("{}: {}\n  {}\n", broken.property, broken.why, broken.steps.join("\n  "))
    });
    format!("{} states\n{}", report.states, broken.collect::<String>())
}

/// Explores a scenario; one of these promises must be broken.
fn breaks(scenario: Scenario, promises: &[&str]) {
    let report = explore(scenario, Limits::NONE);
    let expected = |property: &str| promises.iter().any(|promise| property.starts_with(promise));
    assert!(report.broken.iter().any(|broken| expected(&broken.property)), "{}", tell(&report));
}

/// All that is in the model is checked.
fn nothing_left_out() -> MutexGuard<'static, ()> {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    #[cfg(feature = "leave-out")]
    havmsi_core::leave_out::leave_out(havmsi_core::leave_out::Check::LrCount);
    one
}

#[test]
fn two_locks_swapped() {
    let _one = nothing_left_out();
    breaks(scenarios::swapped_locks(), &["no deadlock"]);
}

#[test]
fn a_lock_not_taken() {
    let _one = nothing_left_out();
    breaks(scenarios::no_lock(), &["tables are used under their lock"]);
}

#[test]
fn nothing_is_found_where_nothing_is_broken() {
    let _one = nothing_left_out();
    for scenario in [scenarios::pages(1), scenarios::stores(1), scenarios::launch(1)] {
        let report = explore(scenario, Limits::NONE);
        assert!(report.complete && report.states > 1000, "{}", tell(&report));
    }
}

#[cfg(feature = "leave-out")]
mod left_out {
    use havmsi_core::leave_out::{self, Check};

    use super::*;

    fn breaks(check: Check, scenario: Scenario, promises: &[&str]) {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        leave_out::leave_out(check);
        super::breaks(scenario, promises);
    }

    /// A VM's page, in TLBs of the host, of devices, of the VM.
    #[test]
    fn an_invalidation() {
        breaks(Check::HostTlb, scenarios::boot(1), &["I6"]);
        breaks(Check::DevicesTlb, scenarios::boot(1), &["I6"]);
        breaks(Check::GuestTlb, scenarios::pages(1), &["I6"]);
        breaks(Check::GuestTlb, scenarios::launch(1), &["I6"]);
    }

    #[test]
    fn a_wipe() {
        breaks(Check::ScrubIn, scenarios::stores(1), &["I7"]);
        breaks(Check::ScrubIn, scenarios::boot(1), &["I3", "the audit"]);
        breaks(Check::ScrubOut, scenarios::launch(1), &["I5"]);
        breaks(Check::ScrubOut, scenarios::life(1), &["I5"]);
    }

    /// Whose page it is: not looked at, looked at after it was taken, looked at and
    /// taken in two steps.
    #[test]
    fn ownership() {
        breaks(Check::Owner, scenarios::pages(2), &["I1"]);
        breaks(Check::OwnerLate, scenarios::pages(2), &["I9"]);
        breaks(Check::ClaimOnce, scenarios::pages(1), &["I1"]);
        breaks(Check::ClaimOnce, scenarios::pool(1), &["I1"]);
        breaks(Check::EveryPage, scenarios::pool(3), &["I1"]);
        breaks(Check::RunPage, scenarios::boot(1), &["I1"]);
    }

    #[test]
    fn a_page_stays_in_the_hosts_map() {
        breaks(Check::Hide, scenarios::boot(1), &["I2"]);
    }

    #[test]
    fn a_guests_memory_changes_its_page() {
        breaks(Check::Lost, scenarios::pages(1), &["I4"]);
        breaks(Check::Occupied, scenarios::pages(2), &["I4", "I6"]);
    }

    /// What is sealed: not at all, what comes back not verified, all with one version.
    #[test]
    fn a_seal() {
        breaks(Check::Seal, scenarios::pages(1), &["I5"]);
        breaks(Check::Tag, scenarios::pages(1), &["I4"]);
        breaks(Check::Tag, scenarios::seals(1, 2), &["I4"]);
        breaks(Check::Version, scenarios::seals(1, 2), &["I4"]);
    }

    #[test]
    fn a_vm_at_the_wrong_time() {
        breaks(Check::Phase, scenarios::life(1), &["the audit", "I6"]);
        breaks(Check::VmBusy, scenarios::launch(1), &["I6"]);
        breaks(Check::VcpuBusy, scenarios::launch(1), &["I6"]);
    }
}
