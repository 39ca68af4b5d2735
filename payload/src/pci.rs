// SPDX-License-Identifier: MIT OR Apache-2.0
//! PCI as far as the tests need it: QEMU's `edu` device (docs/specs/edu.rst of
//! QEMU), whose DMA goes to any 40-bit address, on bus 0 and behind a root port.

use crate::cpu;
use crate::harness::Failure;
use crate::memory::{PATTERN, fill, read, read32, take, write, write32};

/// Configuration space: 4 KiB a function, 8 functions a device, 32 a bus.
const ECAM: u64 = 0x3f00_0000;
/// Memory for registers of devices, and of devices behind the root port.
const WINDOW: u64 = 0x1000_0000;
const FAR_WINDOW: u64 = 0x1100_0000;
const FAR_BUS: u64 = 1;
const EDU: u32 = 0x11e8_1234;
const ROOT_PORT: u32 = 0x000c_1b36;

// Configuration registers.
const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const BUS_NUMBERS: u64 = 0x18;
const BRIDGE_MEMORY: u64 = 0x20;
/// Memory accesses, bus mastering.
const ENABLE: u32 = 0b110;

// Registers of the device.
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const START: u64 = 0x98;
const BUSY: u64 = 1;
const FROM_DEVICE: u64 = 2;
/// Where its buffer of 4 KiB is in its own address space.
const BUFFER: u64 = 0x4_0000;
/// Bytes of the transfers here: half of the buffer.
pub const SIZE: u64 = 2048;

/// The first device of this kind on a bus: its configuration.
fn find(bus: u64, id: u32) -> Option<u64> {
    let mut devices = (0..32).map(|device| ECAM + (bus << 20) + (device << 15));
    devices.find(|config| read32(*config) == id)
}

/// An `edu` device.
#[derive(Clone, Copy)]
pub struct Edu {
    /// Its registers.
    pub registers: u64,
}

impl Edu {
    fn enable(config: u64, registers: u64) -> Self {
        write32(config + BAR0, u32::try_from(registers).unwrap_or(0));
        write32(config + COMMAND, ENABLE);
        Self { registers }
    }

    /// The one on bus 0.
    pub fn near() -> Option<Self> {
        Some(Self::enable(find(0, EDU)?, WINDOW))
    }

    /// The one behind the root port, whose stream is not of bus 0.
    pub fn far() -> Option<Self> {
        let port = Self::number_far_bus(FAR_BUS)?;
        // A window of 1 MiB: address bits [31:20] of its base and of its end.
        let megabyte = u32::try_from(FAR_WINDOW >> 16).unwrap_or(0);
        write32(port + BRIDGE_MEMORY, megabyte << 16 | megabyte);
        write32(port + COMMAND, ENABLE);
        Some(Self::enable(find(FAR_BUS, EDU)?, FAR_WINDOW))
    }

    /// Gives the bus behind the root port its number, which is part of its streams'.
    pub fn number_far_bus(number: u64) -> Option<u64> {
        let port = find(0, ROOT_PORT)?;
        write32(port + BUS_NUMBERS, u32::try_from(number << 16 | number << 8).unwrap_or(0));
        Some(port)
    }

    /// Starts a transfer; QEMU carries it out 100 ms later.
    fn start(self, source: u64, destination: u64, command: u64) {
        write(self.registers + SOURCE, source);
        write(self.registers + DESTINATION, destination);
        write(self.registers + COUNT, SIZE);
        write(self.registers + START, command | BUSY);
    }

    /// Waits for the end of the transfer.
    pub fn wait(self) -> Result<(), Failure> {
        let end = cpu::now() + cpu::milliseconds(20_000);
        while read(self.registers + START) & BUSY != 0 {
            if cpu::now() > end {
                return Err(Failure::new(format_args!("the DMA does not end")));
            }
        }
        Ok(())
    }

    /// Fills the first half of the device's buffer with a page's pattern; the page.
    pub fn load(self) -> Result<u64, Failure> {
        let page = take(1);
        fill(page, PATTERN);
        self.start(page, BUFFER, 0);
        self.wait()?;
        Ok(page)
    }

    /// Starts to write the first half of the buffer to `at`.
    pub fn start_write(self, at: u64) {
        self.start(BUFFER, at, FROM_DEVICE);
    }

    /// Writes the first half of the buffer to `at`.
    pub fn write(self, at: u64) -> Result<(), Failure> {
        self.start_write(at);
        self.wait()
    }

    /// Reads `at` into the second half of the buffer, which is moved to a page of
    /// the host's: the page. What can't be read leaves zeros there.
    pub fn read(self, at: u64) -> Result<u64, Failure> {
        let page = take(1);
        self.start(at, BUFFER + SIZE, 0);
        self.wait()?;
        self.start(BUFFER + SIZE, page, FROM_DEVICE);
        self.wait()?;
        Ok(page)
    }
}
