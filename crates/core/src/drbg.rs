// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random numbers from the platform's seed: SHA-256 with fast key erasure. The
//! state is replaced before any output leaves, so that what was given out can't
//! be computed from a later state.

use crate::launch::sha256;

/// A generator; without a seed it gives nothing.
#[derive(Debug, Default)]
pub struct Drbg {
    key: Option<[u8; 32]>,
}

fn derive(key: &[u8; 32], label: u8) -> [u8; 32] {
    sha256(&[b"HA-VMSI DRBG", &[label], key])
}

impl Drbg {
    /// A generator that waits for its seed.
    pub const NEW: Self = Self { key: None };

    /// Adds entropy; of the same seed, another `start` makes another state.
    pub fn seed(&mut self, seed: &[u8; 32], start: u64) {
        let old = self.key.unwrap_or_default();
        self.key = Some(sha256(&[b"HA-VMSI seed", &old, seed, &start.to_le_bytes()]));
    }

    /// 32 random bytes; `None` without a seed.
    pub fn random(&mut self) -> Option<[u8; 32]> {
        let key = self.key?;
        self.key = Some(derive(&key, 0));
        Some(derive(&key, 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_seed_no_numbers() {
        let mut d = Drbg::NEW;
        assert!(d.random().is_none());
        assert!(d.random().is_none());
        d.seed(&[1; 32], 1);
        assert!(d.random().is_some());
    }

    #[test]
    fn outputs_differ_and_follow_the_seed() {
        let (mut a, mut b, mut c) = (Drbg::NEW, Drbg::NEW, Drbg::NEW);
        a.seed(&[1; 32], 1);
        b.seed(&[1; 32], 1);
        c.seed(&[2; 32], 1);
        let first = a.random();
        assert_eq!(first, b.random());
        assert_ne!(first, c.random());
        assert_ne!(first, a.random());
    }

    #[test]
    fn a_seed_gives_other_numbers_at_each_start() {
        let (mut a, mut b) = (Drbg::NEW, Drbg::NEW);
        a.seed(&[1; 32], 1);
        b.seed(&[1; 32], 2);
        assert_ne!(a.random(), b.random());
    }

    #[test]
    fn a_second_seed_adds_to_the_first() {
        let (mut a, mut b) = (Drbg::NEW, Drbg::NEW);
        a.seed(&[1; 32], 1);
        b.seed(&[2; 32], 1);
        a.seed(&[3; 32], 1);
        b.seed(&[3; 32], 1);
        assert_ne!(a.random(), b.random());
        // What is too short changes nothing.
        let mut c = Drbg::NEW;
        c.seed(&[1; 32], 1);
        c.seed(&[3; 32], 1);
        a = Drbg::NEW;
        a.seed(&[1; 32], 1);
        a.seed(&[3; 32], 1);
        assert_eq!(a.random(), c.random());
    }
}
