// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache folder: every artefact in a directory named by the SHA-256 of its inputs.
//!
//! An entry is built in `tmp/` and renamed into place when it is complete, so what is
//! there is whole. A lock per kind keeps two runs from building the same thing at once.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::ui;

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The inputs of one artefact, as a hash and as text for people.
#[derive(Debug, Clone)]
pub struct Key {
    text: String,
}

impl Key {
    /// Starts a key; `recipe` changes whenever the building code changes its result.
    pub fn new(recipe: &str) -> Self {
        Self { text: format!("recipe {recipe}\n") }
    }

    /// Adds a named value.
    #[must_use]
    pub fn value(mut self, name: &str, value: &str) -> Self {
        self.text.push_str(&format!("{name} = {value}\n"));
        self
    }

    /// Adds a file by name and content.
    pub fn file(self, cache: &Cache, name: &str, path: &Path) -> Result<Self> {
        let hash = cache.file_hash(path)?;
        Ok(self.value(name, &hash))
    }

    /// Adds every file below a folder, by relative path and content, in order.
    pub fn tree(mut self, cache: &Cache, root: &Path) -> Result<Self> {
        for path in files_below(root)? {
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            self = self.file(cache, &name, &path)?;
        }
        Ok(self)
    }

    /// The key itself: 40 hexadecimal digits of the hash.
    pub fn id(&self) -> String {
        hex(&Sha256::digest(self.text.as_bytes())).chars().take(40).collect()
    }
}

/// All files below a folder, sorted; none if the folder does not exist.
pub fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        if !dir.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                todo.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Kinds of entries, each with a lock.
const KINDS: [&str; 8] = [
    "linux-source",
    "kernel",
    "module",
    "arm64-root",
    "debian-root",
    "image",
    "pkvm-source",
    "pkvm-kernel",
];

/// What else is in the cache folder, but for the locks.
const OTHERS: [&str; 3] = ["tmp", "ccache", "hashes.json"];

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    /// Where it is.
    pub dir: PathBuf,
}

impl Cache {
    /// `$HAVMSI_CACHE`, else `$XDG_CACHE_HOME/havmsi`, else `~/.cache/havmsi`.
    pub fn open() -> Result<Self> {
        let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let dir = from("HAVMSI_CACHE")
            .or_else(|| from("XDG_CACHE_HOME").map(|d| d.join("havmsi")))
            .or_else(|| from("HOME").map(|d| d.join(".cache/havmsi")))
            .context("no cache folder: set HAVMSI_CACHE or HOME")?;
        fs::create_dir_all(dir.join("locks")).with_context(|| {
            format!("cannot create the cache folder {} (HAVMSI_CACHE names another)", dir.display())
        })?;
        Ok(Self { dir: fs::canonicalize(dir)? })
    }

    /// Waits for a named lock; it is held until the file is dropped.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.dir.join("locks").join(name);
        let file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                ui::say(&format!(
                    "waiting: another run is busy with `{name}` in {}",
                    self.dir.display()
                ));
                file.lock()?;
            }
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        Ok(file)
    }

    /// The place of an entry, whether it exists or not.
    pub fn place(&self, kind: &str, key: &Key) -> PathBuf {
        self.dir.join(kind).join(key.id())
    }

    /// Returns an entry, building it first if it is not there.
    pub fn entry(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let place = self.place(kind, key);
        if place.is_dir() {
            return Ok(place);
        }
        let _lock = self.lock(kind)?;
        if place.is_dir() {
            return Ok(place);
        }
        // With the lock in hand, what is left in tmp/ of this kind is from a run that died.
        let tmp_root = self.dir.join("tmp");
        fs::create_dir_all(&tmp_root)?;
        for entry in fs::read_dir(&tmp_root)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&format!("{kind}-")) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let tmp = tmp_root.join(format!("{kind}-{}", key.id()));
        fs::create_dir_all(&tmp)?;
        let result = build(&tmp).and_then(|()| {
            fs::write(tmp.join("INPUTS"), &key.text)?;
            fs::create_dir_all(self.dir.join(kind))?;
            fs::rename(&tmp, &place)?;
            Ok(())
        });
        if let Err(e) = result {
            // Never keep half of an entry; the first error is the one to report.
            drop(fs::remove_dir_all(&tmp));
            return Err(e.context(format!("building `{kind}` in the cache")));
        }
        Ok(place)
    }

    /// SHA-256 of a file, remembered by path, size and time stamps for the big ones.
    pub fn file_hash(&self, path: &Path) -> Result<String> {
        let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        if meta.len() < 1 << 20 {
            return Ok(hex(&Sha256::digest(fs::read(path)?)));
        }
        let real = fs::canonicalize(path)?;
        let stamp = format!(
            "{}|{}|{}|{}.{}|{}.{}",
            real.display(),
            meta.ino(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec()
        );
        let memo_path = self.dir.join("hashes.json");
        let mut memo: BTreeMap<String, String> = fs::read(&memo_path)
            .ok()
            .and_then(|d| serde_json::from_slice(&d).ok())
            .unwrap_or_default();
        if let Some(hash) = memo.get(&stamp) {
            return Ok(hash.clone());
        }
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut buffer)?;
            let Some(part) = buffer.get(..n).filter(|p| !p.is_empty()) else { break };
            hasher.update(part);
        }
        let hash = hex(&hasher.finalize());
        memo.insert(stamp, hash.clone());
        if memo.len() > 500 {
            memo.clear();
        }
        let tmp = self.dir.join(format!("hashes.json.{}", std::process::id()));
        fs::write(&tmp, serde_json::to_vec_pretty(&memo)?)?;
        fs::rename(&tmp, &memo_path)?;
        Ok(hash)
    }

    /// Fails early, with the way out, when the file system has less than `mib` MiB left.
    pub fn need_space(&self, mib: u64) -> Result<()> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
        if free < mib {
            bail!(
                "{} has {free} MiB left and this step needs about {mib} MiB.\n\
                 Free some space, run `cargo xtask clean --cache`, or set HAVMSI_CACHE to a folder on a larger disk.",
                self.dir.display()
            );
        }
        Ok(())
    }

    /// Empties the cache; returns the number of bytes that were freed.
    pub fn clean(&self) -> Result<u64> {
        let mut bytes = 0;
        let locks: Vec<File> = KINDS.iter().map(|n| self.lock(n)).collect::<Result<_>>()?;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            // What else lies there is not ours: HAVMSI_CACHE may name any folder.
            let ours = |name: &str| KINDS.contains(&name) || OTHERS.contains(&name);
            if !path.file_name().and_then(|name| name.to_str()).is_some_and(ours) {
                continue;
            }
            for file in files_below(&path).unwrap_or_default() {
                bytes += fs::symlink_metadata(&file)
                    .map(|m| m.blocks() * 512 / m.nlink().max(1))
                    .unwrap_or(0);
            }
            if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
        }
        drop(locks);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> Cache {
        let dir =
            std::env::temp_dir().join(format!("havmsi-cache-test-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("locks")).unwrap();
        Cache { dir }
    }

    #[test]
    fn cleaning_spares_what_is_not_ours() {
        let cache = scratch("clean");
        for name in ["kernel/a", "tmp/b", "photos/c"] {
            fs::create_dir_all(cache.dir.join(name)).unwrap();
            fs::write(cache.dir.join(name).join("file"), "x").unwrap();
        }
        fs::write(cache.dir.join("letter"), "x").unwrap();
        assert!(cache.clean().unwrap() > 0);
        let mut left: Vec<_> =
            fs::read_dir(&cache.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["letter", "locks", "photos"]);
        fs::remove_dir_all(&cache.dir).unwrap();
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let cache = scratch("failed");
        let key = Key::new("x 1").value("a", "b");
        let result = cache.entry("thing", &key, |dir| {
            fs::write(dir.join("half"), "half")?;
            bail!("no")
        });
        assert!(result.is_err());
        assert!(!cache.place("thing", &key).exists());
        assert_eq!(fs::read_dir(cache.dir.join("tmp")).unwrap().count(), 0);
        fs::remove_dir_all(&cache.dir).unwrap();
    }

    #[test]
    fn an_entry_is_built_once_and_left_overs_are_removed() {
        let cache = scratch("once");
        let key = Key::new("x 1");
        fs::create_dir_all(cache.dir.join("tmp/thing-dead")).unwrap();
        let mut built = 0;
        for _ in 0..2 {
            cache
                .entry("thing", &key, |dir| {
                    built += 1;
                    fs::write(dir.join("f"), "x").map_err(Into::into)
                })
                .unwrap();
        }
        assert_eq!(built, 1);
        assert!(!cache.dir.join("tmp/thing-dead").exists());
        assert_ne!(key.id(), Key::new("x 2").id());
        fs::remove_dir_all(&cache.dir).unwrap();
    }
}
