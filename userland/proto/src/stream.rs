// SPDX-License-Identifier: MIT OR Apache-2.0
//! The stream: pages of memory that anyone who holds the seed recognises, each on its own.

/// 64-bit words in a 4 KiB page.
pub const PAGE_WORDS: usize = 512;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
const REG_SALT: u64 = 0x5245_4749_5354_4552;
const FP_SALT: u64 = 0x464c_4f41_5450_5421;

/// `SplitMix64`'s finaliser: a bijection of 64-bit words that leaves no visible pattern.
#[must_use]
pub const fn mix(mut z: u64) -> u64 {
    z ^= z >> 30;
    z = z.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= z >> 27;
    z = z.wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A guest's random seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub [u64; 4]);

impl Seed {
    /// The seed in 32 random bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(chunk);
            *word = u64::from_le_bytes(le);
        }
        Self(words)
    }

    /// The seed in 64 hex digits (the bytes in order), if they are that.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
        }
        Some(Self::from_bytes(&bytes))
    }

    /// 64 hex digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        let bytes = self.0.iter().flat_map(|w| w.to_le_bytes());
        bytes.map(|b| format!("{b:02x}")).collect()
    }

    /// Word 0 of every page.
    #[must_use]
    pub const fn tag(&self) -> u64 {
        mix(self.0[0].wrapping_add(GAMMA))
    }

    const fn index_mask(&self) -> u64 {
        mix(self.0[1].wrapping_add(GAMMA))
    }

    /// Word `n` of page `page`, for n >= 2, from the page's own state.
    const fn body(&self, state: u64, n: u64) -> u64 {
        mix(state.wrapping_add(self.0[3]).wrapping_add(n.wrapping_mul(GAMMA)))
    }

    const fn state(&self, page: u64) -> u64 {
        mix(self.0[2].wrapping_add(page.wrapping_mul(GAMMA)))
    }

    /// The words of a page, in order.
    pub fn words(&self, page: u64) -> impl Iterator<Item = u64> + use<> {
        let seed = *self;
        let state = seed.state(page);
        (0..PAGE_WORDS as u64).map(move |n| match n {
            0 => seed.tag(),
            1 => seed.index_mask() ^ page,
            n => seed.body(state, n),
        })
    }

    /// Looks at the words of a page of memory: `None` if it doesn't begin as a page of the stream
    /// does, else the page's number and how many words are right.
    #[must_use]
    pub fn identify(&self, words: &[u64]) -> Option<(u64, usize)> {
        if *words.first()? != self.tag() {
            return None;
        }
        let page = words.get(1)? ^ self.index_mask();
        let right = self.words(page).zip(words).filter(|(a, b)| a == *b);
        Some((page, right.count()))
    }

    /// What the workload keeps in general register `i` while it spins.
    #[must_use]
    pub const fn reg(&self, i: u64) -> u64 {
        mix(self.0[0] ^ REG_SALT.wrapping_add(i.wrapping_mul(GAMMA)))
    }

    /// What it keeps in half `i & 1` of FP/SIMD register `i >> 1`.
    #[must_use]
    pub const fn fp(&self, i: u64) -> u64 {
        mix(self.0[0] ^ FP_SALT.wrapping_add(i.wrapping_mul(GAMMA)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed() -> Seed {
        let mut bytes = [0; 32];
        for (i, byte) in (0u8..).zip(bytes.iter_mut()) {
            *byte = i.wrapping_mul(37);
        }
        Seed::from_bytes(&bytes)
    }

    #[test]
    fn hex_goes_there_and_back() {
        assert_eq!(Seed::from_hex(&seed().to_hex()), Some(seed()));
        assert_eq!(Seed::from_hex("12"), None);
        assert_eq!(Seed::from_hex(&"g".repeat(64)), None);
        assert_eq!(Seed::from_hex(&"é".repeat(32)), None);
    }

    #[test]
    fn each_page_is_recognised_on_its_own() {
        for page in [0, 1, 77, 4095, u64::MAX] {
            let words: Vec<u64> = seed().words(page).collect();
            assert_eq!(words.len(), PAGE_WORDS);
            assert_eq!(seed().identify(&words), Some((page, PAGE_WORDS)));
        }
    }

    #[test]
    fn a_changed_word_is_counted_and_a_strange_page_is_none() {
        let mut words: Vec<u64> = seed().words(9).collect();
        words[500] ^= 1;
        assert_eq!(seed().identify(&words), Some((9, PAGE_WORDS - 1)));
        words[0] ^= 1;
        assert_eq!(seed().identify(&words), None);
        assert_eq!(seed().identify(&[0; PAGE_WORDS]), None);
        assert_eq!(seed().identify(&[]), None);
    }

    #[test]
    fn the_definition_stands() {
        // The kernel module carries the same definition in C; these values tie the two together.
        let s = Seed([1, 2, 3, 4]);
        assert_eq!(s.tag(), mix(1 + GAMMA));
        let words: Vec<u64> = s.words(5).collect();
        assert_eq!(words[1], mix(2 + GAMMA) ^ 5);
        let state = mix(3u64.wrapping_add(5u64.wrapping_mul(GAMMA)));
        assert_eq!(words[2], mix(state.wrapping_add(4).wrapping_add(2u64.wrapping_mul(GAMMA))));
    }
}
