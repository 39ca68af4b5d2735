// SPDX-License-Identifier: MIT OR Apache-2.0
//! HA-VMSI's security monitor: the firmware at EL3. It starts the host at
//! non-secure EL1 under a stage-2 of its own, and owns all that happens at EL2.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod dispatch;
#[cfg(target_os = "none")]
mod exception;
#[cfg(target_os = "none")]
mod host;
#[cfg(target_os = "none")]
mod host_abort;
#[cfg(target_os = "none")]
mod log;
#[cfg(target_os = "none")]
mod mmu;
#[cfg(target_os = "none")]
mod platform;
#[cfg(target_os = "none")]
mod psci;
#[cfg(target_os = "none")]
mod run;
#[cfg(target_os = "none")]
mod vms;

/// On a build machine there is nothing to run; `cargo xtask` builds the monitor.
#[cfg(not(target_os = "none"))]
fn main() {}
