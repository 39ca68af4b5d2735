// SPDX-License-Identifier: MIT OR Apache-2.0
//! The monitor's console. It shows what the monitor does, never what a VM
//! holds: no register of a guest is printed.

use core::fmt::{self, Write};

use havmsi_hal::pl011::Uart;
use spin::mutex::SpinMutex;

use crate::platform;

static CONSOLE: SpinMutex<Uart> = SpinMutex::new(platform::UART);

/// Prints a line on the monitor's console.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::log::line(format_args!($($arg)*)) };
}

/// Turns the console on.
pub fn init() {
    CONSOLE.lock().enable();
}

/// Prints a line.
pub fn line(text: fmt::Arguments<'_>) {
    // The UART takes all: `write_fmt` has no error to give.
    let _ = CONSOLE.lock().write_fmt(format_args!("havmsi: {text}\n"));
}

/// Prints a line when the lock's holder may be gone.
pub fn last_words(text: fmt::Arguments<'_>) {
    let held = CONSOLE.try_lock();
    let mut uart = platform::UART;
    let _ = uart.write_fmt(format_args!("havmsi: {text}\n"));
    drop(held);
}
