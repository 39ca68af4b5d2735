// SPDX-License-Identifier: MIT OR Apache-2.0
//! The banks of RAM of a platform.

use havmsi_abi::PAGE_SIZE;

use crate::addr::{Pa, index};

/// Banks that a platform can have.
pub const MAX_BANKS: usize = 2;

/// A run of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Range {
    /// First byte.
    pub base: u64,
    /// Bytes; 0 for none.
    pub size: u64,
}

impl Range {
    /// Whether all of `size` bytes at `base` lie inside.
    pub fn contains(&self, base: u64, size: u64) -> bool {
        base >= self.base && base.checked_add(size).is_some_and(|end| end - self.base <= self.size)
    }

    /// Whether a byte is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.base < other.base.saturating_add(other.size)
            && other.base < self.base.saturating_add(self.size)
    }
}

/// All RAM of the normal world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ram {
    banks: [Range; MAX_BANKS],
}

impl Ram {
    /// RAM in these banks; each must start and end on a page.
    pub const fn new(banks: [Range; MAX_BANKS]) -> Self {
        Self { banks }
    }

    /// The banks, empty ones included.
    pub fn banks(&self) -> &[Range; MAX_BANKS] {
        &self.banks
    }

    /// The number of the page at `pa`, counted through all banks.
    pub fn page_index(&self, pa: Pa) -> Option<usize> {
        let mut before = 0;
        for bank in &self.banks {
            if bank.contains(pa.0, PAGE_SIZE) && pa.is_page() {
                return Some(index((before + pa.0 - bank.base) / PAGE_SIZE));
            }
            before += bank.size;
        }
        None
    }

    /// Pages in all banks.
    pub fn page_count(&self) -> u64 {
        self.banks.iter().map(|b| b.size / PAGE_SIZE).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_ends_are_exclusive_and_do_not_wrap() {
        let r = Range { base: 0x1000, size: 0x1000 };
        assert!(r.contains(0x1000, 0x1000));
        assert!(!r.contains(0x1001, 0x1000));
        assert!(!r.contains(0xfff, 1));
        assert!(!r.contains(u64::MAX, 2));
        assert!(r.overlaps(&Range { base: 0x1fff, size: 1 }));
        assert!(!r.overlaps(&Range { base: 0x2000, size: 1 }));
        assert!(!r.overlaps(&Range { base: 0x1800, size: 0 }) || r.contains(0x1800, 0));
    }

    #[test]
    fn pages_are_numbered_through_both_banks() {
        let ram = Ram::new([
            Range { base: 0x8000_0000, size: 0x3000 },
            Range { base: 0x8_8000_0000, size: 0x2000 },
        ]);
        assert_eq!(ram.page_index(Pa(0x8000_0000)), Some(0));
        assert_eq!(ram.page_index(Pa(0x8000_2000)), Some(2));
        assert_eq!(ram.page_index(Pa(0x8000_3000)), None);
        assert_eq!(ram.page_index(Pa(0x8000_0800)), None);
        assert_eq!(ram.page_index(Pa(0x8_8000_1000)), Some(4));
        assert_eq!(ram.page_index(Pa(0x8_8000_1800)), None);
        assert_eq!(ram.page_count(), 5);
    }
}
