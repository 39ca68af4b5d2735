// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses that can't be mixed up.

use havmsi_abi::PAGE_SIZE;

/// A physical address in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Pa(pub u64);

/// An intermediate physical address (what a guest takes for physical) in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Ipa(pub u64);

impl Pa {
    /// Whether the address is that of a page.
    pub const fn is_page(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// The address `bytes` further on; wraps, for addresses known to be small.
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl Ipa {
    /// Whether the address is that of a page.
    pub const fn is_page(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// The page that holds this address.
    pub const fn page(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }
}

/// `n` as an index. Every target of this crate has 64-bit (or on a build
/// machine at least 32-bit) `usize`; a value that does not fit is out of every
/// table, which the callers' bounds checks then see.
pub fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// A hash as registers hold it: in memory order, little endian.
pub fn words<const N: usize>(hash: &[u8]) -> [u64; N] {
    core::array::from_fn(|i| u64::from_le_bytes(hash.as_chunks().0[i]))
}

/// The lower half.
pub const fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
