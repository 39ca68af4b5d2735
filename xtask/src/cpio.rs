// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes initramfs archives (cpio, "newc") without needing root, and the same bytes every time.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHAR: u32 = 0o020_000;

struct Entry {
    mode: u32,
    data: Vec<u8>,
    device: (u32, u32),
}

/// An archive in the making: entries by path, parents added by themselves.
#[derive(Default)]
pub struct Cpio {
    entries: BTreeMap<String, Entry>,
}

impl Cpio {
    /// Adds a directory and its parents.
    pub fn dir(&mut self, path: &str) {
        let mut at = String::new();
        for part in path.split('/').filter(|p| !p.is_empty()) {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            self.entries.entry(at.clone()).or_insert(Entry {
                mode: DIR | 0o755,
                data: vec![],
                device: (0, 0),
            });
        }
    }

    fn put(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.put(path, Entry { mode: FILE | mode, data, device: (0, 0) });
    }

    /// Adds a copy of a file of this machine (symbolic links are followed).
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let mode =
            if fs::metadata(from)?.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
        self.file(path, mode, data);
        Ok(())
    }

    /// Adds a character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.put(path, Entry { mode: CHAR | mode, data: vec![], device: (major, minor) });
    }

    /// The finished archive.
    pub fn finish(self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            record(&mut out, inode, path, entry)?;
        }
        record(&mut out, 0, "TRAILER!!!", &Entry { mode: 0, data: vec![], device: (0, 0) })?;
        out.resize(out.len().next_multiple_of(512), 0);
        Ok(out)
    }
}

fn record(out: &mut Vec<u8>, inode: u32, path: &str, entry: &Entry) -> Result<()> {
    let size = u32::try_from(entry.data.len()).context("file too large for an initramfs")?;
    let name = u32::try_from(path.len() + 1)?;
    let (major, minor) = entry.device;
    out.extend_from_slice(b"070701");
    // inode mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
    for field in [inode, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(&entry.data);
    out.resize(out.len().next_multiple_of(4), 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_the_bytes_are_stable() {
        let make = || {
            let mut c = Cpio::default();
            c.file("/a/b/c", 0o644, b"hello".to_vec());
            c.char_device("dev/console", 0o600, 5, 1);
            c.finish().unwrap()
        };
        let bytes = make();
        assert_eq!(bytes, make());
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |s: &str| text.find(s).unwrap();
        assert!(
            at("a\0") < at("a/b\0")
                && at("a/b\0") < at("a/b/c\0")
                && at("a/b/c\0") < at("TRAILER!!!")
        );
    }
}
