// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random numbers that can be had again.

/// A stream of random numbers (SplitMix64).
pub struct Random(u64);

const fn mix(z: u64) -> u64 {
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl Random {
    /// The stream of a CPU in a batch: of each seed another one.
    pub const fn new(seed: u64, batch: u64, cpu: u64) -> Self {
        Self(mix(mix(seed ^ 0x6a09_e667_f3bc_c908) ^ batch << 8 ^ cpu))
    }

    /// Any number.
    pub const fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `n`.
    pub const fn below(&mut self, n: u64) -> u64 {
        self.any() % n
    }

    /// Whether something happens that happens once in `n` times.
    pub const fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[super::index(self.below(from.len() as u64))]
    }
}
