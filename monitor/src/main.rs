// SPDX-License-Identifier: MIT OR Apache-2.0
//! HA-VMSI's security monitor: the firmware at EL3. It starts the host at
//! non-secure EL1 under a stage-2 of its own, and owns all that happens at EL2.
//!
//! For the target `aarch64-unknown-none-softfloat` only; `cargo xtask build`.
#![no_std]
#![no_main]

#[cfg(feature = "audit")]
mod audit;
mod boot;
mod cpu;
mod dispatch;
mod exception;
mod host;
mod host_abort;
#[cfg(feature = "leave-out")]
mod leave_out;
mod log;
mod mmu;
mod platform;
mod psci;
mod run;
mod vms;
