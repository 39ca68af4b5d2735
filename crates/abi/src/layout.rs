// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the normal world's RAM is divided at boot: facts that the monitor and
//! the tool that places the host's images must share.

use crate::PAGE_SIZE;

/// Size of a stage-2 level 2 block in bytes.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Bytes at the bottom of RAM that belong to the monitor from reset: the EL2
/// vector page, the zero frame, the roots of the VMs' stage-2 tables, what the
/// SMMU reads, and one level 3 table for each 2 MiB of RAM, which the host's map
/// and the devices' share. A multiple of 2 MiB.
pub const fn carveout_size(ram_size: u64) -> u64 {
    let level3 = ram_size / BLOCK_SIZE * PAGE_SIZE;
    (level3 + BLOCK_SIZE).next_multiple_of(BLOCK_SIZE)
}

/// Offsets of what the carve-out holds, from its base.
pub mod carveout {
    use crate::{MAX_VMS, PAGE_SIZE};

    /// The EL2 vector page.
    pub const EL2_VECTORS: u64 = 0;
    /// The zero frame that the host reads where a VM's page lies.
    pub const ZERO_FRAME: u64 = PAGE_SIZE;
    /// Root of the host's stage-2: two concatenated level 1 tables.
    pub const HOST_ROOT: u64 = 2 * PAGE_SIZE;
    /// Level 2 table and level 3 tables of the device windows.
    pub const DEVICE_TABLES: u64 = 4 * PAGE_SIZE;
    /// Tables at [`DEVICE_TABLES`].
    pub const DEVICE_TABLE_COUNT: u64 = 28;
    /// Level 2 tables of RAM, one a GiB.
    pub const LEVEL2_TABLES: u64 = DEVICE_TABLES + DEVICE_TABLE_COUNT * PAGE_SIZE;
    /// Level 2 tables at [`LEVEL2_TABLES`]: the GiBs of RAM that can be mapped, half of
    /// them in each of two banks.
    pub const LEVEL2_TABLE_COUNT: u64 = 64;
    /// Level 2 tables of RAM in the devices' stage-2, as many.
    pub const SMMU_LEVEL2_TABLES: u64 = LEVEL2_TABLES + LEVEL2_TABLE_COUNT * PAGE_SIZE;
    /// Root of the devices' stage-2: two concatenated level 1 tables.
    pub const SMMU_ROOT: u64 = SMMU_LEVEL2_TABLES + LEVEL2_TABLE_COUNT * PAGE_SIZE;
    /// The SMMU's stream table.
    pub const SMMU_STREAMS: u64 = SMMU_ROOT + 4 * PAGE_SIZE;
    /// Bytes at [`SMMU_STREAMS`], to which it is aligned: 64 for each device of bus 0.
    pub const SMMU_STREAMS_SIZE: u64 = 256 * 64;
    /// The SMMU's command queue, a page.
    pub const SMMU_COMMANDS: u64 = SMMU_STREAMS + SMMU_STREAMS_SIZE;
    /// Roots of the VMs' stage-2: two concatenated level 1 tables a VM.
    pub const VM_ROOTS: u64 = 1 << 20;
    /// Level 3 tables of RAM, one for each 2 MiB.
    pub const LEVEL3_TABLES: u64 = VM_ROOTS + MAX_VMS as u64 * 2 * PAGE_SIZE;

    const _: () = assert!(SMMU_COMMANDS + PAGE_SIZE <= VM_ROOTS);
    const _: () = assert!(SMMU_STREAMS.is_multiple_of(SMMU_STREAMS_SIZE));
    const _: () = assert!(LEVEL3_TABLES == super::BLOCK_SIZE);
}

/// Where the host's device tree is placed.
pub const fn host_dtb(ram_base: u64, ram_size: u64) -> u64 {
    ram_base + carveout_size(ram_size)
}

/// Where the host's kernel is placed and entered.
pub const fn host_kernel(ram_base: u64, ram_size: u64) -> u64 {
    host_dtb(ram_base, ram_size) + BLOCK_SIZE
}

/// Where an initial RAM file system of the host has room, and the payload finds
/// its arguments: for the tools that place them.
#[cfg(any(test, feature = "header"))]
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
        assert_eq!(carveout_size(4 << 30), 10 << 20);
        assert_eq!(host_kernel(0x4000_0000, 4 << 30), 0x40c0_0000);
    }
}
