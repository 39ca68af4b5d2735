// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sealing: pages that the host takes back from a VM are encrypted and authenticated
//! (AES-256-GCM). The host keeps the tag; the monitor keeps the version, in the place
//! that the page had in the VM's map, so that nothing older fits there
//! (docs/decisions/0009).

use aes_gcm::{AeadInOut as _, Aes256Gcm, KeyInit as _};

use crate::addr::words;

/// What the host needs to give a page back.
pub type Tag = [u64; 2];

/// A VM's key, and how often it was used.
#[cfg_attr(any(test, feature = "fake"), derive(Clone, PartialEq, Eq, Hash, Debug))]
pub(crate) struct Seal {
    key: [u8; 32],
    /// Of what was sealed last.
    pub(crate) version: u64,
}

fn nonce(version: u64) -> [u8; 12] {
    left_out!(Version => return [0; 12]);
    core::array::from_fn(|i| version.to_le_bytes().get(i).copied().unwrap_or(0))
}

impl Seal {
    pub(crate) const fn new(key: [u8; 32]) -> Self {
        Self { key, version: 0 }
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new(&self.key.into())
    }

    /// Encrypts what was at `place` (VM and IPA) as the next version: no two have the
    /// same under one key.
    pub(crate) fn seal(&mut self, place: u128, content: &mut [u8; 4096]) -> Tag {
        self.version += 1;
        left_out!(Seal => return [1; 2]);
        let (nonce, place) = (nonce(self.version).into(), place.to_le_bytes());
        let content = content.as_mut_slice().into();
        let tag = self.cipher().encrypt_inout_detached(&nonce, &place, content);
        let Ok(tag) = tag else { panic!("a page is too long for GCM") };
        words(&tag)
    }

    /// Decrypts it if it is that, or leaves it as it is.
    pub(crate) fn open(
        &self,
        version: u64,
        place: u128,
        content: &mut [u8; 4096],
        tag: Tag,
    ) -> bool {
        let (nonce, place) = (nonce(version).into(), place.to_le_bytes());
        left_out!(Tag => return self.cipher().encrypt_inout_detached(&nonce, &place, content.as_mut_slice().into()).is_ok());
        let tag = u128::from(tag[1]) << 64 | u128::from(tag[0]);
        let (content, tag) = (content.as_mut_slice().into(), tag.to_le_bytes().into());
        self.cipher().decrypt_inout_detached(&nonce, &place, content, &tag).is_ok()
    }
}
