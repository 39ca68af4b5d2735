// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sealing: pages that the host takes back from a VM are encrypted and authenticated
//! (AES-256-GCM). The host keeps the tag; the monitor keeps the version, in the place
//! that the page had in the VM's map, so that nothing older fits there
//! (docs/decisions/0008).

use aes_gcm::{AeadInOut as _, Aes256Gcm, KeyInit as _};
use havmsi_abi::Error;

use crate::addr::words;

/// What the host needs to give a page back.
pub type Tag = [u64; 2];

/// A VM's key, and how often it was used.
#[cfg_attr(any(test, feature = "fake"), derive(Clone, PartialEq, Eq, Hash, Debug))]
pub(crate) struct Seal {
    key: [u64; 4],
    version: u64,
}

fn bytes<const N: usize, const B: usize>(words: [u64; N]) -> [u8; B] {
    let mut bytes = [0; B];
    for (to, word) in bytes.chunks_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes()[..to.len()]);
    }
    bytes
}

fn nonce(version: u64) -> [u8; 12] {
    left_out!(Version => return [0; 12]);
    bytes([version, 0])
}

impl Seal {
    /// No key yet.
    pub(crate) const NEW: Self = Self { key: [0; 4], version: 0 };

    /// The version of what is sealed next; makes the key first.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if there are no random numbers for it.
    pub(crate) fn next_version(
        &mut self,
        random: impl FnOnce() -> Option<[u64; 4]>,
    ) -> Result<u64, Error> {
        if self.key == [0; 4] {
            self.key = random().ok_or(Error::NotSupported)?;
        }
        Ok(self.version + 1)
    }

    /// The last one.
    #[cfg(any(test, feature = "audit"))]
    pub(crate) const fn version(&self) -> u64 {
        self.version
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new(&bytes::<4, 32>(self.key).into())
    }

    /// Encrypts what was at `place` (VM and IPA) as the next version: no two have the
    /// same under one key.
    pub(crate) fn seal(&mut self, place: [u64; 2], content: &mut [u8; 4096]) -> Tag {
        self.version += 1;
        left_out!(Seal => return [1; 2]);
        let (nonce, place) = (nonce(self.version).into(), bytes::<2, 16>(place));
        let content = content.as_mut_slice().into();
        let tag = self.cipher().encrypt_inout_detached(&nonce, &place, content);
        let Ok(tag) = tag else { panic!("a page is too long for GCM") };
        words(&tag)
    }

    /// Decrypts it if it is that, or leaves it as it is.
    pub(crate) fn open(
        &self,
        version: u64,
        place: [u64; 2],
        content: &mut [u8; 4096],
        tag: Tag,
    ) -> bool {
        let (nonce, place) = (nonce(version).into(), bytes::<2, 16>(place));
        left_out!(Tag => return self.cipher().encrypt_inout_detached(&nonce, &place, content.as_mut_slice().into()).is_ok());
        let (content, tag) = (content.as_mut_slice().into(), bytes::<2, 16>(tag).into());
        self.cipher().decrypt_inout_detached(&nonce, &place, content, &tag).is_ok()
    }
}
