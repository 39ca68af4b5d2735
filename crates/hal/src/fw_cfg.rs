// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's configuration device, read byte by byte through its data register
//! (QEMU docs/specs/fw_cfg.rst); its DMA interface is never used.

use crate::mmio::Registers;

const SELECTOR: usize = 8;
const FILE_DIRECTORY: u16 = 0x19;
const CPU_COUNT: u16 = 0x05;
/// Directory entries that are looked at.
const MAX_FILES: u32 = 256;

/// The device.
pub struct FwCfg(pub Registers);

impl FwCfg {
    fn select(&self, key: u16) {
        self.0.write16(SELECTOR, key.to_be());
    }

    fn bytes<const N: usize>(&self) -> [u8; N] {
        core::array::from_fn(|_| self.0.read8(0))
    }

    /// CPUs that the machine started with.
    pub fn cpu_count(&self) -> u16 {
        self.select(CPU_COUNT);
        u16::from_le_bytes(self.bytes())
    }

    /// Reads the start of the file `name` into `to`, if there is such a file;
    /// returns how many bytes that were.
    pub fn read_file(&self, name: &str, to: &mut [u8]) -> Option<usize> {
        self.select(FILE_DIRECTORY);
        let count = u32::from_be_bytes(self.bytes());
        for _ in 0..count.min(MAX_FILES) {
            let size = u32::from_be_bytes(self.bytes());
            let key = u16::from_be_bytes(self.bytes());
            let _reserved: [u8; 2] = self.bytes();
            let entry: [u8; 56] = self.bytes();
            if entry.split(|&b| b == 0).next() != Some(name.as_bytes()) {
                continue;
            }
            self.select(key);
            let length = to.len().min(usize::try_from(size).unwrap_or(usize::MAX));
            to[..length].fill_with(|| self.0.read8(0));
            return Some(length);
        }
        None
    }

    /// The decimal number that the file `name` holds.
    pub fn read_number(&self, name: &str) -> Option<u64> {
        let mut text = [0; 20];
        let length = self.read_file(name, &mut text)?;
        str::from_utf8(text.get(..length)?).ok()?.trim_end_matches('\0').parse().ok()
    }
}
