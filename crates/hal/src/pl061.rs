// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output pins of a PL061 (Arm DDI 0190).

use crate::mmio::Registers;

const DIR: usize = 0x400;

/// A GPIO block.
pub struct Gpio(pub Registers);

impl Gpio {
    /// Drives `pin` (0 to 7) high. Bits [9:2] of a data address mask the pins.
    pub fn raise(&self, pin: u32) {
        let bit = 1u32 << (pin & 7);
        self.0.write32(DIR, self.0.read32(DIR) | bit);
        self.0.write32(4usize << (pin & 7), 0);
        self.0.write32(4usize << (pin & 7), bit);
    }
}
