// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel that the benchmark compares with: Linux 7.x as Debian has it, without our series, for
//! protected VMs of its own (`kvm-arm.mode=protected`). Its source is downloaded by an apt that works
//! in its own folder: nothing is installed, and no suite is added to this machine.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{configure, fragments, jobs, make, tool_version};
use crate::cache::Key;
use crate::setup::{self, Need};
use crate::{Ctx, apt, debs, sh, ui};

/// Suites that are looked through; a newer release's backports belong here too. (Names such as `stable-backports`
/// stay the same, but mirrors have been seen with an older state of it under them.)
const SUITES: [&str; 2] = ["trixie-backports", "sid"];
/// Packages are called so, with a minor number behind.
const PACKAGE: &str = "linux-source-7.";
/// Compiled files, about.
const OBJECTS: u64 = 1200;

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Pkvm {
    dir: PathBuf,
    /// Debian's name and version of its source.
    pub version: String,
}

impl Pkvm {
    /// The flat image that boots.
    pub fn image(&self) -> PathBuf {
        self.dir.join("Image")
    }

    /// The same with its symbols.
    pub fn symbols(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }
}

/// The newest of the packages that a search lists.
fn newest(list: &str) -> Option<String> {
    let minor = |line: &str| -> Option<u32> {
        line.split_whitespace().next()?.strip_prefix(PACKAGE)?.parse().ok()
    };
    list.lines().filter_map(minor).max().map(|minor| format!("{PACKAGE}{minor}"))
}

/// The source, unpacked. Kept as it was when it was first needed: a newer one comes with an empty cache.
fn source(ctx: &Ctx) -> Result<PathBuf> {
    let key =
        Key::new("pkvm-source 1").value("package", PACKAGE).value("suites", &SUITES.join(" "));
    ctx.cache.entry("pkvm-source", &key, |dir| {
        ctx.cache.need_space(3000)?;
        let step = ui::Step::new("pKVM's kernel: download the source", None);
        let log = ctx.log("pkvm.log");
        let work = dir.join("work");
        let entry = apt::entry_for(&apt::machine_sources()?, &apt::codename()?, &SUITES)?;
        debs::prepare(&work, &entry)?;
        // This machine's architecture: others get a new source package only when they have built it.
        let apt = |program| debs::apt(program, &work, None);
        // A mirror may have one suite only: what counts is what is offered then.
        let updated = sh::run(apt("apt-get").arg("update"), &log);
        let mut search = apt("apt-cache");
        search.args(["search", "--names-only", &format!("^{PACKAGE}[0-9]+$")]);
        let Some(package) = newest(&sh::output(&mut search)?) else {
            updated?;
            bail!("no package {PACKAGE}N in the suites {}", SUITES.join(" and "));
        };
        let deb = work.join("deb");
        fs::create_dir_all(&deb)?;
        sh::run(apt("apt-get").current_dir(&deb).args(["download", &package]), &log)?;
        let deb = fs::read_dir(&deb)?.next().context("apt downloaded nothing")??.path();
        let version = sh::output(Command::new("dpkg-deb").arg("-f").arg(&deb).arg("Version"))?;
        step.done();
        let step = ui::Step::new("pKVM's kernel: unpack the source", None);
        sh::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(work.join("all")), &log)?;
        let mut tar = Command::new("tar");
        tar.arg("-xf").arg(work.join(format!("all/usr/src/{package}.tar.xz"))).arg("-C").arg(dir);
        tar.args(["--strip-components=1", "--exclude=*/Documentation/devicetree"]);
        sh::run(&mut tar, &log)?;
        fs::remove_dir_all(&work)?;
        fs::write(dir.join("VERSION"), format!("{package} {}", version.trim()))?;
        step.done();
        Ok(())
    })
}

/// Our configuration without what only our series knows.
fn config(ctx: &Ctx) -> Result<String> {
    let mut text = String::new();
    for fragment in fragments(ctx)? {
        for line in fs::read_to_string(fragment)?.lines() {
            if !["CONFIG_KVM_HAVMSI=", "CONFIG_LOCALVERSION="].iter().any(|o| line.starts_with(o)) {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    Ok(text + "CONFIG_LOCALVERSION=\"-pkvm\"\n")
}

/// Builds the kernel if it is not in the cache.
pub fn build(ctx: &Ctx) -> Result<Pkvm> {
    setup::ensure(ctx, &[Need::Kernel, Need::Debs])?;
    let source = source(ctx)?;
    let version = fs::read_to_string(source.join("VERSION"))?;
    let config = config(ctx)?;
    let key = Key::new("pkvm-kernel 1")
        .value("source", &version)
        .value("compiler", &tool_version("aarch64-linux-gnu-gcc")?)
        .value("linker", &tool_version("aarch64-linux-gnu-ld")?)
        .value("config", &config);
    let dir = ctx.cache.entry("pkvm-kernel", &key, |dir| {
        ctx.cache.need_space(2500)?;
        ui::say(&format!("building {version}: minutes the first time, cached afterwards"));
        let log = ctx.log("pkvm.log");
        let work = dir.join("work");
        sh::run(Command::new("cp").args(["-al", "--"]).arg(&source).arg(&work), &log)?;
        // Options that a newer kernel has under other names, or always: it is told, not refused.
        let lost = configure(ctx, &work, &config, &log)?;
        fs::write(dir.join("LOST"), lost.join("\n"))?;
        let step = ui::Step::new("pKVM's kernel: compile", Some(OBJECTS));
        sh::run_lines(make(ctx, &work).arg(jobs()).arg("Image"), &log, |line| {
            if line.starts_with("  CC") || line.starts_with("  AS") {
                step.inc();
            }
        })?;
        step.done();
        for (from, to) in
            [("arch/arm64/boot/Image", "Image"), ("vmlinux", "vmlinux"), (".config", "config")]
        {
            fs::rename(work.join(from), dir.join(to))?;
        }
        fs::remove_dir_all(&work)?;
        Ok(())
    })?;
    Ok(Pkvm { dir, version })
}

/// `kernel --pkvm`.
pub fn main(ctx: &Ctx) -> Result<()> {
    let pkvm = build(ctx)?;
    println!("{} ({})", pkvm.image().display(), pkvm.version);
    for option in fs::read_to_string(pkvm.dir.join("LOST"))?.lines() {
        println!("not by this name: {option}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_chosen_by_number() {
        let list = "linux-source-7.9 - x\nlinux-source-7.10 - y\nlinux-source-7.2-rt - z\n";
        assert_eq!(newest(list).as_deref(), Some("linux-source-7.10"));
        assert_eq!(newest("linux-source-6.12 - x\n"), None);
    }
}
