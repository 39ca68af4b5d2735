// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output pins of a PL061 (Arm DDI 0190).

use crate::mmio::Registers;

const DIR: usize = 0x400;

/// A GPIO block.
pub struct Gpio(Registers);

impl Gpio {
    /// The GPIO block at the physical address `base`.
    ///
    /// # Safety
    /// EL3 must map 4 KiB at `base` as device memory, and a PL061 must be there.
    pub const unsafe fn new(base: usize) -> Self {
        // SAFETY: passed on to the caller.
        Self(unsafe { Registers::new(base, 0x1000) })
    }

    /// Drives `pin` (0 to 7) high. Bits [9:2] of a data address mask the pins.
    pub fn raise(&self, pin: u32) {
        let bit = 1u32 << (pin & 7);
        self.0.write32(DIR, self.0.read32(DIR) | bit);
        self.0.write32(4usize << (pin & 7), 0);
        self.0.write32(4usize << (pin & 7), bit);
    }
}
