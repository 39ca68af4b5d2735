// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the normal world's RAM is divided at boot: facts that the monitor and
//! the tool that places the host's images must share.

use crate::PAGE_SIZE;

/// Size of a stage-2 level 2 block in bytes.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Bytes at the bottom of RAM that belong to the monitor from reset: the EL2
/// vector page, the zero frame, the roots of the VMs' stage-2 tables, and one
/// level 3 table for each 2 MiB of RAM, so that splitting a block of the host's
/// map never has to find memory. A multiple of 2 MiB.
#[must_use]
pub const fn carveout_size(ram_size: u64) -> u64 {
    let level3 = ram_size / BLOCK_SIZE * PAGE_SIZE;
    (level3 + 2 * BLOCK_SIZE).next_multiple_of(BLOCK_SIZE)
}

/// Where the host's device tree is placed.
#[must_use]
pub const fn host_dtb(ram_base: u64, ram_size: u64) -> u64 {
    ram_base + carveout_size(ram_size)
}

/// Where the host's kernel is placed and entered.
#[must_use]
pub const fn host_kernel(ram_base: u64, ram_size: u64) -> u64 {
    host_dtb(ram_base, ram_size) + BLOCK_SIZE
}

/// Where the host's initial RAM file system is placed.
#[must_use]
pub const fn host_initrd(ram_base: u64, ram_size: u64) -> u64 {
    host_kernel(ram_base, ram_size) + 64 * (1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_at_most_three_tenths_of_a_percent() {
        for gib in 8..=16 {
            let ram = gib << 30;
            // Two bytes a page of ownership records lie in secure RAM.
            let records = ram / PAGE_SIZE * 2;
            assert!((carveout_size(ram) + records) * 1000 <= ram * 3);
        }
    }

    #[test]
    fn images_follow_the_carveout() {
        assert_eq!(carveout_size(4 << 30), 12 << 20);
        assert_eq!(host_kernel(0x4000_0000, 4 << 30), 0x40e0_0000);
    }
}
