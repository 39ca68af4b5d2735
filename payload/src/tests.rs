// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tests, by what they look at.

mod access;
mod blocks;
mod calls;
mod dma;
mod every_register;
mod exits;
mod features;
mod hypercalls;
mod launch;
mod pages;
mod psci;
pub(crate) mod registers;
pub(crate) mod sharing;
pub(crate) mod smp;
mod stress;
mod time;
mod translation;
pub(crate) mod vgic;
mod vm;
