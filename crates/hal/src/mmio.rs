// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses to device registers.

use core::ptr::with_exposed_provenance_mut;

/// The registers of one device, by offset in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Registers {
    base: usize,
    size: usize,
}

impl Registers {
    /// The registers at the physical address `base`.
    ///
    /// # Safety
    /// EL3 must map `size` bytes at `base` as device memory, and they must be
    /// those of a device whose accesses touch no memory of the monitor.
    pub(crate) const unsafe fn new(base: usize, size: usize) -> Self {
        Self { base, size }
    }

    fn address(self, offset: usize, width: usize) -> usize {
        assert!(offset + width <= self.size && offset.is_multiple_of(width));
        self.base + offset
    }

    pub(crate) fn read32(self, offset: usize) -> u32 {
        let at = with_exposed_provenance_mut::<u32>(self.address(offset, 4));
        // SAFETY: within the window and aligned; the window is a device (`new`).
        unsafe { at.read_volatile() }
    }

    pub(crate) fn write32(self, offset: usize, value: u32) {
        let at = with_exposed_provenance_mut::<u32>(self.address(offset, 4));
        // SAFETY: within the window and aligned; the window is a device (`new`).
        unsafe { at.write_volatile(value) }
    }

    pub(crate) fn write64(self, offset: usize, value: u64) {
        let at = with_exposed_provenance_mut::<u64>(self.address(offset, 8));
        // SAFETY: within the window and aligned; the window is a device (`new`).
        unsafe { at.write_volatile(value) }
    }

    #[cfg(feature = "qemu")]
    pub(crate) fn write16(self, offset: usize, value: u16) {
        let at = with_exposed_provenance_mut::<u16>(self.address(offset, 2));
        // SAFETY: within the window and aligned; the window is a device (`new`).
        unsafe { at.write_volatile(value) }
    }

    #[cfg(feature = "qemu")]
    pub(crate) fn read8(self, offset: usize) -> u8 {
        let at = with_exposed_provenance_mut::<u8>(self.address(offset, 1));
        // SAFETY: within the window; the window is a device (`new`).
        unsafe { at.read_volatile() }
    }
}
