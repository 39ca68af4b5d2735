// SPDX-License-Identifier: MIT OR Apache-2.0
//! What Cargo builds for the emulated machine: the monitor's flash image and the static
//! arm64 programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::setup::{self, Need, TARGETS};
use crate::{Ctx, sh, ui};

/// Static arm64 programs in `userland/`.
pub const PROGRAMS: [&str; 5] =
    ["havmsi", "havmsi-agent", "havmsi-guest", "havmsi-run", "havmsi-vmm"];

/// Secure flash of QEMU's `virt`: what the monitor's image must fit into.
const FLASH: u64 = 64 << 20;

fn cargo(ctx: &Ctx) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&ctx.root).env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// Builds packages for a target in release mode; returns the folder with the results.
fn release(ctx: &Ctx, target: &str, packages: &[&str]) -> Result<PathBuf> {
    profile(ctx, target, packages, "release", &[])
}

/// The same in some profile, with more words for Cargo.
fn profile(
    ctx: &Ctx,
    target: &str,
    packages: &[&str],
    profile: &str,
    extra: &[&str],
) -> Result<PathBuf> {
    setup::ensure(ctx, &[Need::Targets])?;
    let step = ui::Step::short(&format!("cargo build {}", packages.join(" ")));
    let mut command = cargo(ctx);
    command.args(["build", "--profile", profile, "--target", target]);
    for package in packages {
        command.args(["-p", package]);
    }
    sh::run(command.args(extra), &ctx.log("cargo.log"))?;
    step.done();
    Ok(ctx.target_dir().join(target).join(profile))
}

/// Makes a flat binary of an ELF file.
fn flat(ctx: &Ctx, elf: &Path, to: &Path) -> Result<()> {
    setup::ensure(ctx, &[Need::Binutils])?;
    let mut command = Command::new("aarch64-linux-gnu-objcopy");
    command.args(["-O", "binary"]).arg(elf).arg(to);
    sh::run(&mut command, &ctx.log("cargo.log"))
}

/// The monitor.
#[derive(Debug, Clone)]
pub struct Monitor {
    /// What `-bios` takes.
    pub image: PathBuf,
    /// The same with its symbols.
    pub elf: PathBuf,
}

/// What is in the image of each test monitor, and in no other.
const TEST_BUILD: &[u8] = b"TEST BUILD";

/// Builds the monitor.
pub fn monitor(ctx: &Ctx) -> Result<Monitor> {
    let monitor = monitor_image(ctx, &release(ctx, TARGETS[0], &["havmsi-monitor"])?)?;
    if is_test_build(&monitor)? {
        bail!("{} can leave a check out: not for use", monitor.image.display());
    }
    Ok(monitor)
}

/// Builds the test monitor, which has the audit call, and leaves out the check which QEMU's option
/// `-fw_cfg name=opt/org.havmsi/leave-out,string=NAME` names. In a profile and folder of its own.
pub fn test_monitor(ctx: &Ctx) -> Result<Monitor> {
    let dir = profile(
        ctx,
        TARGETS[0],
        &["havmsi-monitor"],
        "leave-out",
        &["--features", "havmsi-monitor/leave-out,havmsi-monitor/audit"],
    )?;
    let monitor = monitor_image(ctx, &dir)?;
    if !is_test_build(&monitor)? {
        bail!("{} leaves no check out", monitor.image.display());
    }
    Ok(monitor)
}

/// A release that can leave checks out, or has the audit call, must not even compile.
pub fn no_release_leaves_out(ctx: &Ctx) -> Result<()> {
    for (feature, refusal) in
        [("leave-out", "a release has all its checks"), ("audit", "a release has no audit call")]
    {
        let mut command = cargo(ctx);
        command.args(["build", "--release", "--target", TARGETS[0], "-p", "havmsi-monitor"]);
        let out = command.args(["--features", feature]).output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        if out.status.success() || !said.contains(refusal) {
            bail!("a release builds with the feature {feature}: {said}");
        }
    }
    Ok(())
}

fn is_test_build(monitor: &Monitor) -> Result<bool> {
    Ok(fs::read(&monitor.image)?.windows(TEST_BUILD.len()).any(|w| w == TEST_BUILD))
}

fn monitor_image(ctx: &Ctx, dir: &Path) -> Result<Monitor> {
    let elf = dir.join("havmsi-monitor");
    let image = dir.join("havmsi-monitor.bin");
    flat(ctx, &elf, &image)?;
    let size = fs::metadata(&image).context("no monitor image")?.len();
    if size == 0 || size > FLASH {
        bail!(
            "the monitor's image has {size} bytes: it must be between 1 and {FLASH} (linker script?)"
        );
    }
    Ok(Monitor { image, elf })
}

/// The guest that carries out the operations that are measured: flat, and with its symbols.
pub fn bench_guest(ctx: &Ctx) -> Result<(PathBuf, PathBuf)> {
    let dir = release(ctx, TARGETS[0], &["havmsi-bench-guest"])?;
    let (elf, image) = (dir.join("havmsi-bench-guest"), dir.join("havmsi-bench-guest.bin"));
    flat(ctx, &elf, &image)?;
    Ok((image, elf))
}

/// QEMU's plugin, which runs on the build machine.
pub fn plugin(ctx: &Ctx) -> Result<PathBuf> {
    let step = ui::Step::short("cargo build havmsi-plugin");
    let mut command = cargo(ctx);
    command.args(["build", "--release", "-p", "havmsi-plugin"]);
    sh::run(&mut command, &ctx.log("cargo.log"))?;
    step.done();
    Ok(ctx.target_dir().join("release/libhavmsi_plugin.so"))
}

/// Builds the arm64 user programs; returns their folder.
pub fn programs(ctx: &Ctx) -> Result<PathBuf> {
    release(ctx, TARGETS[1], &PROGRAMS)
}

/// Builds the bare-metal payload; `None` while there is none in the tree.
pub fn payload(ctx: &Ctx) -> Result<Option<PathBuf>> {
    if !ctx.root.join("payload/Cargo.toml").is_file() {
        return Ok(None);
    }
    let dir = release(ctx, TARGETS[0], &["havmsi-payload"])?;
    let image = dir.join("havmsi-payload.bin");
    flat(ctx, &dir.join("havmsi-payload"), &image)?;
    Ok(Some(image))
}

/// The `build` verb.
pub fn main(ctx: &Ctx) -> Result<()> {
    let monitor = monitor(ctx)?;
    println!("{} ({} bytes)", monitor.image.display(), fs::metadata(&monitor.image)?.len());
    let dir = programs(ctx)?;
    for name in PROGRAMS {
        println!("{}", dir.join(name).display());
    }
    if let Some(payload) = payload(ctx)? {
        println!("{}", payload.display());
    }
    Ok(())
}
