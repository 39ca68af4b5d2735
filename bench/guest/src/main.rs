// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest on no operating system that carries out one of the operations of the table, between marks
//! that QEMU's plugin sees, and reports the counter's ticks to the VMM.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod bare;

/// On a build machine there is nothing to run.
#[cfg(not(target_os = "none"))]
fn main() {}
