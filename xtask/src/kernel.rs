// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel: Debian's source + our series + our configuration, one image for host,
//! control host and guest; and the attacker module that is built against it.

pub mod pkvm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache::{Key, files_below};
use crate::setup::{self, LINUX_SOURCE, Need};
use crate::{Ctx, sh, ui};

/// Compiled files of one build, about: only the bar's length depends on it.
const OBJECTS: u64 = 1150;

/// A built kernel in the cache.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The build folder (source and objects), good for building modules.
    pub dir: PathBuf,
}

impl Kernel {
    /// The flat image that boots.
    pub fn image(&self) -> PathBuf {
        self.dir.join("arch/arm64/boot/Image")
    }
}

/// Debian's source, unpacked: built once per version of the package.
fn source(ctx: &Ctx) -> Result<PathBuf> {
    let tarball = Path::new(LINUX_SOURCE);
    let key = Key::new("linux-source 1").file(&ctx.cache, "tarball", tarball)?;
    ctx.cache.entry("linux-source", &key, |dir| {
        ctx.cache.need_space(2500)?;
        let step = ui::Step::new("kernel: unpack the source", None);
        let mut tar = Command::new("tar");
        tar.arg("-xf")
            .arg(tarball)
            .arg("-C")
            .arg(dir)
            .args(["--strip-components=1", "--exclude=*/Documentation/devicetree"]);
        sh::run(&mut tar, &ctx.log("kernel.log"))?;
        step.done();
        Ok(())
    })
}

/// The patches of the series, in order.
fn patches(ctx: &Ctx) -> Result<Vec<PathBuf>> {
    let mut found = files_below(&ctx.root.join("linux/patches"))?;
    found.retain(|p| p.extension().is_some_and(|e| e == "patch"));
    Ok(found)
}

/// The configuration fragments, in order.
fn fragments(ctx: &Ctx) -> Result<Vec<PathBuf>> {
    let mut found = files_below(&ctx.root.join("linux/config"))?;
    found.retain(|p| p.extension().is_some_and(|e| e == "config"));
    Ok(found)
}

fn tool_version(program: &str) -> Result<String> {
    Ok(sh::output(Command::new(program).arg("--version"))?
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned())
}

fn make(ctx: &Ctx, dir: &Path) -> Command {
    let mut make = Command::new("make");
    make.current_dir(dir)
        .args([
            "ARCH=arm64",
            "CROSS_COMPILE=aarch64-linux-gnu-",
            "CC=ccache aarch64-linux-gnu-gcc",
            "HOSTCC=ccache gcc",
        ])
        .env("CCACHE_DIR", ctx.cache.dir.join("ccache"))
        .env("CCACHE_MAXSIZE", "3G")
        .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
        .env("KBUILD_BUILD_USER", "havmsi")
        .env("KBUILD_BUILD_HOST", "havmsi")
        .env("LC_ALL", "C")
        .env_remove("MAKEFLAGS");
    make
}

fn jobs() -> String {
    format!("-j{}", std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// Applies series and overlay to a source tree.
fn apply(ctx: &Ctx, dir: &Path) -> Result<()> {
    for patch in patches(ctx)? {
        let mut command = Command::new("patch");
        command
            .current_dir(dir)
            .args(["-p1", "--forward", "--fuzz=2", "--batch", "-i"])
            .arg(&patch);
        sh::run(&mut command, &ctx.log("kernel.log")).with_context(|| {
            format!(
                "{} does not apply to {LINUX_SOURCE}: the series is for Linux 6.12; see linux/README.md for other kernels",
                patch.display()
            )
        })?;
    }
    let overlay = ctx.root.join("linux/files");
    for file in files_below(&overlay)? {
        let to = dir.join(file.strip_prefix(&overlay)?);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        // Never write through a hard link into the pristine source.
        if to.exists() {
            fs::remove_file(&to)?;
        }
        fs::copy(&file, &to)
            .with_context(|| format!("cannot copy {} into the kernel", file.display()))?;
    }
    Ok(())
}

/// Configures a source tree; the options that it does not take.
fn configure(ctx: &Ctx, dir: &Path, all: &str, log: &Path) -> Result<Vec<String>> {
    let file = dir.join("havmsi-all.config");
    sh::write(&file, all)?;
    sh::run(make(ctx, dir).arg("allnoconfig").env("KCONFIG_ALLCONFIG", &file), log)?;
    let config = fs::read_to_string(dir.join(".config"))?;
    let have: std::collections::HashSet<&str> = config.lines().collect();
    let lost = all.lines().filter(|l| l.starts_with("CONFIG_") && !have.contains(l));
    Ok(lost.map(str::to_owned).collect())
}

/// Configures our kernel.
fn configure_ours(ctx: &Ctx, dir: &Path, log: &Path) -> Result<()> {
    let mut all = String::new();
    for fragment in fragments(ctx)? {
        all.push_str(&fs::read_to_string(&fragment)?);
    }
    let lost = configure(ctx, dir, &all, log)?;
    if !lost.is_empty() {
        bail!(
            "the kernel does not take these options of linux/config (renamed, or something they depend on is off):\n  {}",
            lost.join("\n  ")
        );
    }
    Ok(())
}

/// Builds the kernel if it is not in the cache. `$HAVMSI_KERNEL_DIR` names a kernel that is
/// built already (for work on the series).
pub fn build(ctx: &Ctx) -> Result<Kernel> {
    if let Some(dir) = std::env::var_os("HAVMSI_KERNEL_DIR") {
        let kernel = Kernel { dir: PathBuf::from(dir) };
        ui::say(&format!(
            "HAVMSI_KERNEL_DIR is set: {} is used as it is",
            kernel.image().display()
        ));
        if !kernel.image().is_file() {
            bail!(
                "{} is not there: build it, or unset HAVMSI_KERNEL_DIR",
                kernel.image().display()
            );
        }
        return Ok(kernel);
    }
    setup::ensure(ctx, &[Need::Kernel])?;
    let source = source(ctx)?;
    let mut key = Key::new("kernel 3")
        .value(
            "source",
            &source.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        )
        .value("compiler", &tool_version("aarch64-linux-gnu-gcc")?)
        .value("linker", &tool_version("aarch64-linux-gnu-ld")?);
    for part in ["linux/patches", "linux/config", "linux/files"] {
        key = key.value("part", part).tree(&ctx.cache, &ctx.root.join(part))?;
    }
    let dir = ctx.cache.entry("kernel", &key, |dir| {
        ctx.cache.need_space(2500)?;
        ui::say("building the kernel: minutes the first time, cached afterwards");
        let log = ctx.log("kernel.log");
        let step = ui::Step::new("kernel: copy, patch, configure", None);
        fs::remove_dir(dir)?;
        sh::run(Command::new("cp").args(["-al", "--"]).arg(&source).arg(dir), &log)?;
        fs::remove_file(dir.join("INPUTS"))?;
        apply(ctx, dir)?;
        configure_ours(ctx, dir, &log)?;
        step.done();
        let step = ui::Step::new("kernel: compile", Some(OBJECTS));
        sh::run_lines(make(ctx, dir).arg(jobs()).args(["Image", "modules"]), &log, |line| {
            if line.starts_with("  CC") || line.starts_with("  AS") {
                step.inc();
            }
        })?;
        step.done();
        slim(dir)
    })?;
    Ok(Kernel { dir })
}

/// Removes what no module build reads: object files and the C files of drivers.
fn slim(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if matches!(name.as_str(), "Documentation" | "sound" | "samples" | "LICENSES") {
            fs::remove_dir_all(&path)?;
        } else if path.is_dir() && !matches!(name.as_str(), "scripts" | "include" | "tools") {
            for file in files_below(&path)? {
                if file.extension().is_some_and(|e| {
                    matches!(e.to_str(), Some("o" | "a" | "cmd" | "c" | "dts" | "dtsi"))
                }) {
                    fs::remove_file(&file)?;
                }
            }
        }
    }
    for name in ["vmlinux.o", "vmlinux.a"] {
        drop(fs::remove_file(dir.join(name)));
    }
    Ok(())
}

/// Builds the attacker module against a kernel; `None` while there is none in the tree.
pub fn attacker(ctx: &Ctx, kernel: &Kernel) -> Result<Option<PathBuf>> {
    let source = ctx.root.join("linux/attacker");
    if !source.join("Makefile").is_file() && !source.join("Kbuild").is_file() {
        return Ok(None);
    }
    let key = Key::new("module 3")
        .value("place", &kernel.dir.display().to_string())
        .file(&ctx.cache, "image", &kernel.image())?
        .tree(&ctx.cache, &source)?;
    let place = ctx.cache.entry("module", &key, |dir| {
        let step = ui::Step::new("attacker module: compile", None);
        let log = ctx.log("module.log");
        let work = dir.join("build");
        sh::run(Command::new("cp").args(["-r", "--"]).arg(&source).arg(&work), &log)?;
        sh::run(make(ctx, &kernel.dir).arg(format!("M={}", work.display())).arg("modules"), &log)?;
        fs::copy(work.join("havmsi_attacker.ko"), dir.join("havmsi_attacker.ko"))
            .context("linux/attacker did not produce havmsi_attacker.ko")?;
        fs::remove_dir_all(&work)?;
        step.done();
        Ok(())
    })?;
    Ok(Some(place.join("havmsi_attacker.ko")))
}

/// Size of the series: lines touched in the kernel's own files, and lines of new files.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct Stat {
    /// Existing files that change.
    pub touched_files: usize,
    /// Lines added to existing files.
    pub added: usize,
    /// Lines removed from existing files.
    pub removed: usize,
    /// Files that are new.
    pub new_files: usize,
    /// Lines of new files.
    pub new_lines: usize,
}

/// Counts the series from the patches themselves and the overlay.
pub fn stat(ctx: &Ctx) -> Result<Stat> {
    let mut stat = Stat::default();
    let mut touched = std::collections::BTreeSet::new();
    for patch in patches(ctx)? {
        count_patch(&fs::read_to_string(&patch)?, &mut stat, &mut touched);
    }
    stat.touched_files = touched.len();
    for file in files_below(&ctx.root.join("linux/files"))? {
        stat.new_files += 1;
        stat.new_lines += fs::read_to_string(&file)?.lines().count();
    }
    Ok(stat)
}

fn count_patch(text: &str, stat: &mut Stat, touched: &mut std::collections::BTreeSet<String>) {
    let (mut is_new, mut left, mut right) = (false, 0_usize, 0_usize);
    for line in text.lines() {
        if left == 0 && right == 0 {
            if let Some(old) = line.strip_prefix("--- ") {
                is_new = old.starts_with("/dev/null");
            } else if let Some(new) = line.strip_prefix("+++ ") {
                if is_new {
                    stat.new_files += 1;
                } else {
                    touched.insert(new.split('\t').next().unwrap_or(new).to_owned());
                }
            } else if let Some(range) = line.strip_prefix("@@ -") {
                let mut parts = range.split(' ');
                let count = |p: Option<&str>| {
                    p.and_then(|p| p.split(',').nth(1))
                        .map_or(Some(1), |n| n.parse::<usize>().ok())
                        .unwrap_or(0)
                };
                left = count(parts.next());
                right = count(parts.next());
            }
            continue;
        }
        match line.as_bytes().first() {
            Some(b'+') => {
                right = right.saturating_sub(1);
                if is_new { stat.new_lines += 1 } else { stat.added += 1 }
            }
            Some(b'-') => {
                left = left.saturating_sub(1);
                stat.removed += 1;
            }
            Some(b'\\') => {}
            _ => {
                left = left.saturating_sub(1);
                right = right.saturating_sub(1);
            }
        }
    }
}

/// The `kernel` verb.
pub fn main(ctx: &Ctx, only_stat: bool) -> Result<()> {
    if only_stat {
        let s = stat(ctx)?;
        println!(
            "existing files: {} touched, {} lines added, {} removed (touched lines: {})",
            s.touched_files,
            s.added,
            s.removed,
            s.added + s.removed
        );
        println!("new files:      {} files, {} lines", s.new_files, s.new_lines);
        return Ok(());
    }
    let kernel = build(ctx)?;
    println!("{}", kernel.image().display());
    if let Some(module) = attacker(ctx, &kernel)? {
        println!("{}", module.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_lines_are_counted_by_kind_of_file() {
        let text = "From: x\n---\n a | 2 +-\n--- a/x.c\t1\n+++ b/x.c\t2\n@@ -1,3 +1,3 @@ f\n a\n-b\n+c\n d\n--- /dev/null\n+++ b/new.c\n@@ -0,0 +1,2 @@\n+--- one\n+two\n-- \n2.39\n";
        let (mut stat, mut touched) = (Stat::default(), std::collections::BTreeSet::new());
        count_patch(text, &mut stat, &mut touched);
        assert_eq!(
            (stat.added, stat.removed, stat.new_files, stat.new_lines, touched.len()),
            (1, 1, 1, 2, 1)
        );
    }
}
