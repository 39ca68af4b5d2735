// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the monitor on the machine: speaks its interface as a host at EL1
//! and, in small programs that it runs as VMs, as a guest. It shares the
//! numbers of the interface with the monitor, and no logic.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod attack;
#[cfg(target_os = "none")]
mod bench;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod exception;
#[cfg(target_os = "none")]
mod failure;
#[cfg(target_os = "none")]
mod fuzz;
#[cfg(target_os = "none")]
mod gic;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod harness;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod pci;
#[cfg(target_os = "none")]
mod smc;
#[cfg(target_os = "none")]
mod tests;

/// On a build machine there is nothing to run; see README.md.
#[cfg(not(target_os = "none"))]
fn main() {}
