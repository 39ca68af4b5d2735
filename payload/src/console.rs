// SPDX-License-Identifier: MIT OR Apache-2.0
//! The non-secure UART (PL011), for results. Used by the first CPU only.

use core::fmt::{self, Write};

const UART: u64 = 0x0900_0000;
const FR_TXFF: u32 = 1 << 5;

struct Console;

impl Write for Console {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            while crate::memory::read32(UART + 0x18) & FR_TXFF != 0 {}
            crate::memory::write32(UART, u32::from(byte));
        }
        Ok(())
    }
}

/// Prints to the console.
pub fn print(args: fmt::Arguments<'_>) {
    // The console has no errors.
    let _ = Console.write_fmt(args);
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {
        $crate::console::print(format_args!("{}\n", format_args!($($arg)*)))
    };
}
