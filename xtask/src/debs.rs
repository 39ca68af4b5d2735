// SPDX-License-Identifier: MIT OR Apache-2.0
//! Debian's arm64 QEMU and busybox for the emulated host: fetched by an apt that works in
//! its own folder, so that this machine's package state and architecture stay as they are.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache::{Key, files_below};
use crate::setup::{self, Need};
use crate::{Ctx, apt, sh, ui};

const WANTED: [&str; 2] = ["qemu-system-arm", "busybox-static"];
/// Programs of theirs: where the host has them, and where the packages do.
const PROGRAMS: [(&str, &str); 2] = [
    ("bin/busybox", "bin/busybox"),
    ("usr/bin/qemu-system-aarch64", "usr/bin/qemu-system-aarch64"),
];

/// The files that the emulated host needs, below one folder (`usr/bin/...`, `lib/...`).
pub fn arm64_root(ctx: &Ctx) -> Result<PathBuf> {
    let codename = apt::codename()?;
    let key =
        Key::new("arm64-root 2").value("release", &codename).value("packages", &WANTED.join(" "));
    if !ctx.cache.place("arm64-root", &key).is_dir() {
        setup::ensure(ctx, &[Need::Debs, Need::Binutils])?;
    }
    ctx.cache.entry("arm64-root", &key, |dir| {
        ctx.cache.need_space(700)?;
        let work = dir.join("work");
        let step = ui::Step::new("arm64 QEMU and busybox: download", None);
        let archives = download(ctx, &work, &codename)?;
        step.done();
        let step = ui::Step::new("arm64 QEMU and busybox: unpack", None);
        unpack(ctx, &archives, &work.join("all"))?;
        closure(&work.join("all"), &dir.join("root"), &PROGRAMS)?;
        let names: Vec<String> = archives
            .iter()
            .filter_map(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()))
            .collect();
        fs::write(dir.join("PACKAGES"), names.join("\n"))?;
        fs::remove_dir_all(&work)?;
        step.done();
        Ok(())
    })
}

/// The emulated host's architecture.
const ARM64: &str = "arm64";

/// A program of apt's with a folder of its own, for an architecture other than this machine's.
pub fn apt(program: &str, work: &Path, architecture: Option<&str>) -> Command {
    let mut command = Command::new(program);
    let option = |name: &str, path: &str| format!("{name}={}", work.join(path).display());
    if program == "apt-get" {
        command.arg("-q");
    }
    if let Some(name) = architecture {
        for option in ["APT::Architecture", "APT::Architectures::"] {
            command.args(["-o", &format!("{option}={name}")]);
        }
    }
    for o in [
        "APT::Sandbox::User=",
        // Lists that only people look at.
        "Acquire::Languages=none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
    ] {
        command.args(["-o", o]);
    }
    for o in [
        option("Dir::State", "state"),
        option("Dir::State::status", "state/status"),
        option("Dir::Cache", "cache"),
        option("Dir::Etc::sourcelist", "none.list"),
        option("Dir::Etc::sourceparts", "sources"),
        option("Dir::Etc::preferences", "none"),
        option("Dir::Etc::preferencesparts", "none.d"),
    ] {
        command.args(["-o", &o]);
    }
    command
}

/// That folder, with these package sources.
pub fn prepare(work: &Path, sources: &str) -> Result<()> {
    for d in ["state/lists/partial", "cache/archives/partial", "sources", "none.d"] {
        fs::create_dir_all(work.join(d))?;
    }
    fs::write(work.join("state/status"), "")?;
    Ok(fs::write(work.join("sources/debian.sources"), sources)?)
}

fn download(ctx: &Ctx, work: &Path, codename: &str) -> Result<Vec<PathBuf>> {
    let sources = apt::foreign_sources(&apt::machine_sources()?, codename)?;
    fetch(ctx, work, &sources, &WANTED, Some(&apt::new_suite(codename)))
}

/// Downloads arm64 packages, those of `suite` first, with all that they depend on.
pub fn fetch(
    ctx: &Ctx,
    work: &Path,
    sources: &str,
    packages: &[&str],
    suite: Option<&str>,
) -> Result<Vec<PathBuf>> {
    prepare(work, sources)?;
    let log = ctx.log("arm64-root.log");
    sh::run(apt("apt-get", work, Some(ARM64)).arg("update"), &log).context(
        "cannot read the package lists for arm64 (network? does your mirror carry arm64?)",
    )?;
    let mut install = apt("apt-get", work, Some(ARM64));
    install
        .args(["install", "-y", "--download-only", "--no-install-recommends"])
        .args(suite.into_iter().flat_map(|suite| ["-t", suite]))
        .args(packages);
    sh::run(&mut install, &log).context("cannot download the arm64 packages")?;
    let mut found = files_below(&work.join("cache/archives"))?;
    found.retain(|p| p.extension().is_some_and(|e| e == "deb"));
    if found.is_empty() {
        bail!("apt downloaded nothing for arm64; see {}", log.display());
    }
    Ok(found)
}

fn unpack(ctx: &Ctx, archives: &[PathBuf], to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for deb in archives {
        sh::run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(to), &ctx.log("arm64-root.log"))?;
    }
    Ok(())
}

/// Copies programs (where to, where from below `all`) and the shared libraries that they need.
pub fn closure(all: &Path, root: &Path, programs: &[(&str, &str)]) -> Result<()> {
    let mut libraries = BTreeMap::new();
    for base in ["lib", "usr/lib"] {
        for file in files_below(&all.join(base))? {
            if let Some(name) = file.file_name().map(|n| n.to_string_lossy().into_owned())
                && name.contains(".so")
            {
                libraries.entry(name).or_insert(file);
            }
        }
    }
    let mut todo = Vec::new();
    for (to, from) in programs {
        put(&all.join(from), &root.join(to))?;
        todo.push(root.join(to));
    }
    let loader = libraries
        .get("ld-linux-aarch64.so.1")
        .context("no dynamic loader in the arm64 packages")?;
    put(loader, &root.join("lib/ld-linux-aarch64.so.1"))?;
    let mut missing = Vec::new();
    while let Some(file) = todo.pop() {
        for name in needed(&file)? {
            let to = root.join("lib/aarch64-linux-gnu").join(&name);
            if to.exists() || name.starts_with("ld-linux") {
                continue;
            }
            let Some(from) = libraries.get(&name) else {
                missing.push(name);
                continue;
            };
            put(from, &to)?;
            todo.push(to);
        }
    }
    if !missing.is_empty() {
        bail!("libraries missing from the arm64 packages: {}", missing.join(" "));
    }
    Ok(())
}

fn put(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

fn needed(file: &Path) -> Result<Vec<String>> {
    let text = sh::output(Command::new("aarch64-linux-gnu-readelf").arg("-d").arg(file))?;
    Ok(parse_needed(&text))
}

fn parse_needed(text: &str) -> Vec<String> {
    text.lines()
        .filter(|l| l.contains("(NEEDED)"))
        .filter_map(|l| l.split_once('[')?.1.split_once(']').map(|(n, _)| n.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needed_lines() {
        let text = " 0x01 (NEEDED)   Shared library: [libc.so.6]\n 0x0e (SONAME) Library soname: [libx.so]\n";
        assert_eq!(parse_needed(text), ["libc.so.6"]);
    }
}
