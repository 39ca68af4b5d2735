// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the monitor must know of the board it is built for. Constants, and
//! what only the board can tell at boot.

mod qemu;

pub use qemu::*;

use havmsi_core::ram::Ram;

/// What was found at boot.
#[derive(Clone, Copy)]
pub struct Facts {
    /// The normal world's RAM; the first bank starts with the carve-out.
    pub ram: Ram,
    /// CPUs present.
    pub cpus: usize,
    /// Entropy that the host can't know.
    pub seed: Option<[u8; 32]>,
}

/// The number of the CPU with this affinity.
#[must_use]
pub fn cpu_number(affinity: u64) -> Option<usize> {
    AFFINITIES.iter().position(|&a| a == affinity)
}
