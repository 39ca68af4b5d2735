// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output on a PL011 (Arm DDI 0183).

use core::fmt;

use crate::mmio::Registers;

const DR: usize = 0x00;
const FR: usize = 0x18;
const FR_TXFF: u32 = 1 << 5;
const CR: usize = 0x30;
const CR_UARTEN_TXE: u32 = 1 << 8 | 1;

/// A transmit-only UART.
pub struct Uart(pub Registers);

impl Uart {
    /// Turns the transmitter on, with the line's settings as they are.
    pub fn enable(&self) {
        self.0.write32(CR, CR_UARTEN_TXE);
    }

    /// Sends one byte, when there is room. It is lost if that takes longer than
    /// any line is slow (a byte has 87 us at 115,200 baud).
    pub fn send(&self, byte: u8) {
        let _ = (0..1 << 16).any(|_| self.0.read32(FR) & FR_TXFF == 0);
        self.0.write32(DR, u32::from(byte));
    }
}

impl fmt::Write for Uart {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            if byte == b'\n' {
                self.send(b'\r');
            }
            self.send(byte);
        }
        Ok(())
    }
}
