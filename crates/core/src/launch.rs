// SPDX-License-Identifier: MIT OR Apache-2.0
//! The launch digest: what a VM starts as. It depends on the configuration and
//! the non-zero pages alone, so the VM's owner can compute it beforehand.
//!
//! ```text
//! digest = SHA-256( "HA-VMSI launch 1"
//!                 ‖ ipa_bits ‖ gic ‖ max_vcpus ‖ number of RAM ranges
//!                 ‖ (base ‖ size) of each RAM range, by base
//!                 ‖ (base ‖ size) of the run of device pages; 0 ‖ 0 for none
//!                 ‖ (idx ‖ pc ‖ x0 ‖ x1 ‖ x2 ‖ x3) of each vCPU that is on, by idx
//!                 ‖ SHA-256( (IPA ‖ 4096 bytes) of each non-zero page, by IPA ) )
//! ```
//! with every number as 8 bytes, little endian.

use havmsi_abi::Error;
use sha2::{Digest as _, Sha256};

use crate::addr::Ipa;
use crate::ram::Range;

/// A launch digest.
pub type Digest = [u8; 32];

/// The hash of `parts`, one behind the other.
pub(crate) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

/// The key of the VM with this digest on the platform with this secret. As all parts
/// have a fixed length, a hash is as good here as HMAC: nothing can be appended.
pub fn key(secret: &[u8; 32], digest: &Digest) -> [u8; 32] {
    sha256(&[b"HA-VMSI key 1", secret, digest])
}

/// Where a vCPU starts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Boot {
    /// Entry point, an IPA (the MMU is off).
    pub pc: u64,
    /// `x0` to `x3`.
    pub x: [u64; 4],
}

/// The configuration of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Config {
    /// Bits of the guest's physical address space.
    pub ipa_bits: u64,
    /// 0, 2 or 3.
    pub gic: u64,
    /// vCPUs that the VM can have.
    pub max_vcpus: u64,
}

/// The pages measured so far.
#[derive(Debug, Clone)]
pub struct Launch {
    /// `None` until the first page.
    pages: Option<Sha256>,
    /// First IPA that may come next.
    next: u64,
}

impl Launch {
    /// Nothing is measured.
    pub const NEW: Self = Self { pages: None, next: 0 };

    /// Whether a page at `ipa` may come next: pages come in rising order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not.
    pub fn check(&self, ipa: Ipa) -> Result<(), Error> {
        if ipa.0 >= self.next { Ok(()) } else { Err(Error::Invalid) }
    }

    /// Adds a page that [`Self::check`] let in.
    pub fn add_page(&mut self, ipa: Ipa, content: &[u8; 4096]) {
        self.next = ipa.0.saturating_add(havmsi_abi::PAGE_SIZE);
        if content.iter().any(|b| *b != 0) {
            let pages = self.pages.get_or_insert_default();
            pages.update(ipa.0.to_le_bytes());
            pages.update(content);
        }
    }

    /// Closes the launch.
    pub fn digest<'a>(
        &self,
        config: &Config,
        ram: impl Iterator<Item = &'a Range> + Clone,
        devices: &'a Range,
        boots: impl Iterator<Item = (u64, Boot)>,
    ) -> Digest {
        let mut hash = Sha256::new();
        hash.update(b"HA-VMSI launch 1");
        let mut number = |n: u64| hash.update(n.to_le_bytes());
        number(config.ipa_bits);
        number(config.gic);
        number(config.max_vcpus);
        number(ram.clone().count() as u64);
        for range in ram.chain([devices]) {
            number(range.base);
            number(range.size);
        }
        for (idx, boot) in boots {
            number(idx);
            number(boot.pc);
            boot.x.into_iter().for_each(&mut number);
        }
        hash.update(self.pages.clone().unwrap_or_default().finalize());
        hash.finalize().into()
    }
}

#[cfg(any(test, feature = "fake"))]
impl PartialEq for Launch {
    fn eq(&self, other: &Self) -> bool {
        let digest = |launch: &Self| launch.pages.clone().map(Sha256::finalize);
        self.next == other.next && digest(self) == digest(other)
    }
}

#[cfg(any(test, feature = "fake"))]
impl Eq for Launch {}

#[cfg(any(test, feature = "fake"))]
impl core::hash::Hash for Launch {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.next.hash(state);
        self.pages.clone().map(Sha256::finalize).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config { ipa_bits: 40, gic: 3, max_vcpus: 2 };
    const RAM: [Range; 1] = [Range { base: 0x4000_0000, size: 0x1000_0000 }];
    const NONE: Range = Range { base: 0, size: 0 };
    const BOOT: Boot = Boot { pc: 0x4000_0000, x: [0; 4] };

    fn digest(launch: &Launch) -> Digest {
        launch.digest(&CONFIG, RAM.iter(), &NONE, core::iter::once((0, BOOT)))
    }

    #[test]
    fn a_key_is_of_one_digest_and_one_secret() {
        // By another implementation.
        assert_eq!(key(&[1; 32], &[2; 32])[..4], [0xf7, 0x57, 0x09, 0x75]);
        assert_ne!(key(&[1; 32], &[2; 32]), key(&[1; 32], &[3; 32]));
        assert_ne!(key(&[1; 32], &[2; 32]), key(&[2; 32], &[2; 32]));
        assert_ne!(key(&[1; 32], &[2; 32]), key(&[2; 32], &[1; 32]));
    }

    #[test]
    fn zero_pages_do_not_count_but_their_order_does() {
        let mut launch = Launch::NEW;
        let empty = digest(&launch);
        launch.add_page(Ipa(0x4000_0000), &[0; 4096]);
        assert_eq!(digest(&launch), empty);
        assert_eq!(launch.check(Ipa(0x4000_0000)), Err(Error::Invalid));
        assert_eq!(launch.check(Ipa(0x4000_1000)), Ok(()));
    }

    #[test]
    fn ranges_and_boot_contexts_are_not_confused() {
        let range = |n| Range { base: n, size: n + 1 };
        let ranges = [range(0), range(2), range(4)];
        let boot = Boot { pc: 1, x: [2, 3, 4, 5] };
        let launch = Launch::NEW;
        assert_ne!(
            launch.digest(&CONFIG, ranges.iter(), &NONE, core::iter::empty()),
            launch.digest(&CONFIG, [].iter(), &NONE, core::iter::once((0, boot)))
        );
    }

    #[test]
    fn everything_measured_changes_the_digest() {
        let mut page = [0; 4096];
        page[4095] = 1;
        let mut a = Launch::NEW;
        a.add_page(Ipa(0x4000_0000), &page);
        let mut b = Launch::NEW;
        b.add_page(Ipa(0x4000_1000), &page);
        page[4095] = 2;
        let mut c = Launch::NEW;
        c.add_page(Ipa(0x4000_0000), &page);
        let once = |idx, boot| core::iter::once((idx, boot));
        let other_boot = Boot { x: [1, 0, 0, 0], ..BOOT };
        let all = [
            digest(&Launch::NEW),
            digest(&a),
            digest(&b),
            digest(&c),
            a.digest(&Config { max_vcpus: 3, ..CONFIG }, RAM.iter(), &NONE, once(0, BOOT)),
            a.digest(&Config { gic: 2, ..CONFIG }, RAM.iter(), &NONE, once(0, BOOT)),
            a.digest(&Config { ipa_bits: 39, ..CONFIG }, RAM.iter(), &NONE, once(0, BOOT)),
            a.digest(&CONFIG, [].iter(), &NONE, once(0, BOOT)),
            a.digest(&CONFIG, RAM.iter(), &NONE, once(1, BOOT)),
            a.digest(&CONFIG, RAM.iter(), &NONE, once(0, other_boot)),
            a.digest(&CONFIG, RAM.iter(), &RAM[0], once(0, BOOT)),
        ];
        for (i, x) in all.iter().enumerate() {
            assert!(all.iter().skip(i + 1).all(|y| x != y), "digest {i} repeats");
        }
    }
}
