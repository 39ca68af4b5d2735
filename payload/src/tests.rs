// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tests, by what they look at.

mod access;
mod calls;
mod exits;
mod features;
mod hypercalls;
mod launch;
mod pages;
mod psci;
mod registers;
mod smp;
mod stress;
mod translation;
mod vgic;
mod vm;
