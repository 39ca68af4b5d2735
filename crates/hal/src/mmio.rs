// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses to device registers.

use core::ptr::with_exposed_provenance_mut;

/// The registers of one device, by offset in bytes.
#[derive(Clone, Copy)]
pub struct Registers {
    base: usize,
    size: usize,
}

impl Registers {
    /// The registers at the physical address `base`.
    ///
    /// # Safety
    /// EL3 must map `size` bytes at `base` as device memory, and they must be
    /// those of the device that the driver is for which gets them.
    pub const unsafe fn new(base: usize, size: usize) -> Self {
        Self { base, size }
    }

    /// Where a register of this type is: within the window and aligned.
    fn at<T>(self, offset: usize) -> *mut T {
        let width = size_of::<T>();
        assert!(offset + width <= self.size && offset.is_multiple_of(width));
        with_exposed_provenance_mut(self.base + offset)
    }

    pub(crate) fn read32(self, offset: usize) -> u32 {
        // SAFETY: a register of a device (`new`).
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    pub(crate) fn write32(self, offset: usize, value: u32) {
        // SAFETY: a register of a device (`new`).
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }

    pub(crate) fn write64(self, offset: usize, value: u64) {
        // SAFETY: a register of a device (`new`).
        unsafe { self.at::<u64>(offset).write_volatile(value) }
    }

    #[cfg(feature = "qemu")]
    pub(crate) fn write16(self, offset: usize, value: u16) {
        // SAFETY: a register of a device (`new`).
        unsafe { self.at::<u16>(offset).write_volatile(value) }
    }

    #[cfg(feature = "qemu")]
    pub(crate) fn read8(self, offset: usize) -> u8 {
        // SAFETY: a register of a device (`new`).
        unsafe { self.at::<u8>(offset).read_volatile() }
    }
}
