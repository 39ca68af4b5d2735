// SPDX-License-Identifier: MIT OR Apache-2.0
//! The decisions of the monitor: who owns which page, what a stage-2 entry may
//! say, what an exit may show and what may come back. No register and no
//! physical memory is touched here; that is behind [`hw::Hardware`].
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "fake"))]
extern crate std;

#[cfg(feature = "leave-out")]
#[macro_use]
pub mod leave_out;

/// Whether a test monitor leaves this check out: no other one does (`leave_out.rs`).
#[cfg(not(feature = "leave-out"))]
#[macro_export]
macro_rules! left_out {
    ($($what:tt)*) => {
        false
    };
}

pub mod addr;
#[cfg(any(test, feature = "audit"))]
pub mod audit;
pub mod drbg;
pub mod exit;
pub mod guest_map;
pub mod host_map;
pub mod hw;
pub mod hypercall;
pub mod idreg;
pub mod inject;
pub mod launch;
pub mod page;
pub mod psci;
pub mod ram;
pub mod seal;
pub mod smmu;
pub mod stage2;
pub mod vgic;
pub mod vm;

#[cfg(test)]
mod concurrent;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod worst_case;
