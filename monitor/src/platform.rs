// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the monitor must know of the board it is built for. Constants, and
//! what only the board can tell at boot.

#[cfg(any(
    all(feature = "board-juno", feature = "board-qemu"),
    not(any(feature = "board-juno", feature = "board-qemu"))
))]
compile_error!("one board, as in --no-default-features --features board-juno");

#[cfg(feature = "board-juno")]
mod juno;
#[cfg(feature = "board-qemu")]
mod qemu;

#[cfg(feature = "board-juno")]
pub use juno::*;
#[cfg(feature = "board-qemu")]
pub use qemu::*;

use havmsi_core::ram::Ram;

/// Pages of RAM that there are records for: 20 GiB, in 10 MiB of secure RAM.
pub const MAX_PAGES: usize = 5 << 20;

/// What was found at boot.
#[derive(Clone, Copy)]
pub struct Facts {
    /// The normal world's RAM; the first bank starts with the carve-out.
    pub ram: Ram,
    /// CPUs present.
    pub cpus: usize,
    /// Entropy that the host can't know.
    pub seed: Option<[u8; 32]>,
    /// What the keys of VMs are made from: the same at each boot, other on each machine,
    /// and nobody's but the monitor's.
    pub secret: Option<[u8; 32]>,
    /// Bytes from the host's device tree on that the board's loader writes at each
    /// reset, all of them; 0 if it does not tell.
    pub images: u64,
}

/// Whether a VM may have the page at `pa`: the GICv2 virtual CPU interface, 8 KiB.
pub const fn is_virtual_cpu_interface(pa: u64, gic_version: u64) -> bool {
    gic_version == 2 && (pa == GICV || pa == GICV + 0x1000)
}

/// The number of the CPU with this affinity: Aff3 in [39:32], Aff2 to Aff0 in [23:0], and
/// no other bit.
pub fn cpu_number(affinity: u64) -> Option<usize> {
    AFFINITIES.iter().position(|&a| a == affinity)
}
