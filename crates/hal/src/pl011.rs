// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output on a PL011 (Arm DDI 0183).

use core::fmt;

use crate::mmio::Registers;

const DR: usize = 0x00;
const FR: usize = 0x18;
const FR_TXFF: u32 = 1 << 5;
const IBRD: usize = 0x24;
const FBRD: usize = 0x28;
const LCR_H: usize = 0x2c;
const CR: usize = 0x30;
/// 8 bits, FIFOs on.
const LCR_H_8N1: u32 = 0b11 << 5 | 1 << 4;
const CR_UARTEN_TXE: u32 = 1 << 8 | 1;

/// A transmit-only UART.
pub struct Uart(Registers);

impl Uart {
    /// The UART at the physical address `base`.
    ///
    /// # Safety
    /// EL3 must map 4 KiB at `base` as device memory, and a PL011 must be there.
    pub const unsafe fn new(base: usize) -> Self {
        // SAFETY: passed on to the caller.
        Self(unsafe { Registers::new(base, 0x1000) })
    }

    /// Turns the transmitter on. `divisor` is that of the clock, in 64ths;
    /// `None` leaves the line's settings as the boot ROM made them.
    pub fn enable(&self, divisor: Option<u32>) {
        if let Some(divisor) = divisor {
            self.0.write32(CR, 0);
            self.0.write32(IBRD, divisor >> 6);
            self.0.write32(FBRD, divisor & 63);
            self.0.write32(LCR_H, LCR_H_8N1);
        }
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
