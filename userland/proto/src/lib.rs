// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest workload, the host agent and the build tool say to each other: the memory stream
//! that a guest fills its memory with, the words of a kernel command line, and JSON text.
//! The protocol is described in `userland/README.md`.
#![forbid(unsafe_code)]

pub mod cmdline;
pub mod json;
pub mod stream;

pub use stream::{PAGE_WORDS, Seed};

/// What a line of the host agent begins with.
pub const AGENT_PREFIX: &str = "@havmsi ";
/// What a line of a guest's workload begins with, on the guest's own console.
pub const GUEST_PREFIX: &str = "@guest ";
/// What a line of the small VMM begins with.
pub const VMM_PREFIX: &str = "@vmm ";
