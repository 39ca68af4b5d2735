// SPDX-License-Identifier: MIT OR Apache-2.0
//! The launch digest of a guest, computed from its files and configuration alone.
//!
//! The same release of QEMU that starts the guest on the host is started here, stopped before
//! its first instruction, and its RAM read back: boot stub, kernel, initramfs, device tree.
//! The tree that it makes for its own emulated CPU differs from the one for KVM in the CPU's
//! `compatible` (and in the PMU node, which `pmu=off` leaves out); that is corrected.
//! The digest itself is made by the code that the monitor runs.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use havmsi_core::addr::Ipa;
use havmsi_core::launch::{Boot, Config, Launch};
use havmsi_core::ram::Range;
use serde_json::json;

use crate::cache::hex;
use crate::dtb::RAM_BASE;
use crate::setup::{self, Need};
use crate::{Ctx, image, sh};

/// A page as the monitor measures it.
const PAGE: usize = 4096;

/// What the owner of a guest knows about it.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Kernel image [default: ours]
    #[arg(long)]
    pub kernel: Option<PathBuf>,
    /// Initramfs [default: ours]
    #[arg(long)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line [default: that of `cargo xtask run`'s guests]
    #[arg(long)]
    pub append: Option<String>,
    /// vCPUs
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub vcpus: u32,
    /// RAM in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=65536))]
    pub mem: u64,
    /// Interrupt controller
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: u32,
    /// Bits of the guest's physical address space, as QEMU asks KVM for them
    #[arg(long, default_value_t = 40)]
    pub ipa_bits: u64,
    /// Keep the guest's RAM at launch in this file
    #[arg(long, value_name = "FILE")]
    pub dump: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Command line of the guests of `cargo xtask run` (userland/agent makes it).
pub const GUEST_APPEND: &str =
    "console=ttyAMA0 quiet loglevel=1 panic=-1 havmsi.mib=16 havmsi.seconds=120 havmsi.mode=work";

impl Args {
    /// A guest as `cargo xtask run` starts it.
    pub fn guest(vcpus: u32, gic: u32) -> Self {
        Self {
            kernel: None,
            initrd: None,
            append: None,
            vcpus,
            mem: 256,
            gic,
            ipa_bits: 40,
            dump: None,
            json: false,
        }
    }
}

/// RAM of the guest as QEMU leaves it before the first instruction.
fn launch_ram(ctx: &Ctx, args: &Args, kernel: &Path, initrd: &Path) -> Result<Vec<u8>> {
    let dir = ctx.log_dir.join("digest");
    fs::create_dir_all(&dir)?;
    let dump = dir.join(format!("ram-{}.bin", args.gic));
    let mut command = Command::new(setup::qemu());
    command
        .args(["-M", &format!("virt,gic-version={},its=off,dtb-randomness=off", args.gic)])
        .args(["-accel", "tcg", "-cpu", "cortex-a57,pmu=off"])
        .args(["-smp", &args.vcpus.to_string(), "-m", &args.mem.to_string()])
        .args([
            "-nic", "none", "-display", "none", "-monitor", "none", "-serial", "null", "-qmp",
            "stdio", "-S",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", args.append.as_deref().unwrap_or(GUEST_APPEND)]);
    command
        .stdin(Stdio::piped())
        .stdout(fs::File::create(dir.join("qmp.log"))?)
        .stderr(fs::File::create(dir.join("qemu.log"))?);
    let mut group = sh::Group::spawn(&mut command)?;
    let size = args.mem << 20;
    if let Some(mut input) = group.child.stdin.take() {
        for line in [
            json!({"execute": "qmp_capabilities"}),
            json!({"execute": "pmemsave", "arguments": {"val": RAM_BASE, "size": size, "filename": dump}}),
            json!({"execute": "quit"}),
        ] {
            // If QEMU is gone already, its status tells.
            drop(writeln!(input, "{line}"));
        }
        let end = Instant::now() + Duration::from_secs(60);
        while group.child.try_wait()?.is_none() {
            if Instant::now() > end {
                bail!(
                    "time-out: waited 60 s for QEMU to save the guest's RAM; see {}",
                    dir.display()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let status = group.child.wait()?;
    if !status.success() {
        bail!("QEMU could not place the guest ({status}):\n{}", sh::tail(&dir.join("qemu.log"), 8));
    }
    let ram =
        fs::read(&dump).with_context(|| format!("QEMU saved no RAM; see {}", dir.display()))?;
    fs::remove_file(&dump)?;
    if ram.len() as u64 != size {
        bail!("QEMU saved {} bytes of the guest's RAM, expected {size}", ram.len());
    }
    Ok(ram)
}

fn be32(data: &[u8], at: usize) -> Result<usize> {
    let bytes = data
        .get(at..at + 4)
        .and_then(|b| <[u8; 4]>::try_from(b).ok())
        .context("device tree cut short")?;
    Ok(usize::try_from(u32::from_be_bytes(bytes))?)
}

fn put32(data: &mut [u8], at: usize, value: usize) -> Result<()> {
    let value = u32::try_from(value)?;
    data.get_mut(at..at + 4)
        .context("device tree cut short")?
        .copy_from_slice(&value.to_be_bytes());
    Ok(())
}

/// Finds the device tree in RAM.
fn find_tree(ram: &[u8]) -> Result<usize> {
    let found: Vec<usize> = ram
        .chunks_exact(PAGE)
        .enumerate()
        .filter(|(_, page)| page.starts_with(&[0xd0, 0x0d, 0xfe, 0xed]))
        .map(|(i, _)| i * PAGE)
        .filter(|&at| be32(ram, at + 20).is_ok_and(|version| version == 17))
        .collect();
    match found.as_slice() {
        [one] => Ok(*one),
        _ => bail!("{} device trees in the guest's RAM, expected one", found.len()),
    }
}

/// Replaces each value `old` of a property in place, as libfdt does: what follows moves.
fn replace_values(tree: &mut Vec<u8>, property: &str, old: &[u8], new: &[u8]) -> Result<usize> {
    let total = be32(tree, 4)?;
    tree.truncate(total);
    let structure = be32(tree, 8)?;
    let strings = be32(tree, 12)?;
    let mut at = structure;
    let mut done = 0;
    let mut grown = 0_isize;
    loop {
        match be32(tree, at)? {
            1 => {
                let name = tree
                    .get(at + 4..)
                    .context("cut short")?
                    .iter()
                    .position(|&b| b == 0)
                    .context("no end of a name")?;
                at = (at + 4 + name + 1).next_multiple_of(4);
            }
            2 | 4 => at += 4,
            3 => {
                let (len, name_at) = (be32(tree, at + 4)?, be32(tree, at + 8)?);
                let value = at + 12;
                let name_start = strings.checked_add_signed(grown).context("bad tree")? + name_at;
                let name: Vec<u8> = tree
                    .get(name_start..)
                    .context("bad name")?
                    .iter()
                    .copied()
                    .take_while(|&b| b != 0)
                    .collect();
                let mut end = (value + len).next_multiple_of(4);
                if name == property.as_bytes() && tree.get(value..value + len) == Some(old) {
                    let mut padded = new.to_vec();
                    padded.resize(new.len().next_multiple_of(4), 0);
                    let change = padded.len().cast_signed() - (end - value).cast_signed();
                    tree.splice(value..end, padded.iter().copied());
                    put32(tree, at + 4, new.len())?;
                    grown += change;
                    end = value + padded.len();
                    done += 1;
                }
                at = end;
            }
            9 => break,
            other => bail!("unknown token {other:#x} in the device tree"),
        }
    }
    put32(tree, 12, strings.checked_add_signed(grown).context("bad tree")?)?;
    let size = be32(tree, 36)?.checked_add_signed(grown).context("bad tree")?;
    put32(tree, 36, size)?;
    Ok(done)
}

/// Makes the tree in RAM the one that QEMU makes with KVM.
fn correct_tree(ram: &mut [u8]) -> Result<()> {
    let at = find_tree(ram)?;
    let old_total = be32(ram, at + 4)?;
    let mut tree = ram.get(at..at + old_total).context("the device tree runs out of RAM")?.to_vec();
    let end_of = |t: &[u8]| -> Result<usize> { Ok(be32(t, 12)? + be32(t, 32)?) };
    let packed = end_of(&tree)? == old_total;
    if replace_values(&mut tree, "compatible", b"arm,cortex-a57\0", b"arm,armv8\0")? == 0 {
        bail!("no CPU in the guest's device tree");
    }
    if packed {
        let total = end_of(&tree)?;
        put32(&mut tree, 4, total)?;
    }
    tree.resize(old_total, 0);
    ram.get_mut(at..at + old_total)
        .context("the device tree runs out of RAM")?
        .copy_from_slice(&tree);
    Ok(())
}

/// Computes the digest of a guest.
pub fn compute(ctx: &Ctx, args: &Args) -> Result<String> {
    setup::ensure(ctx, &[Need::Qemu])?;
    let (kernel, initrd) = match (&args.kernel, &args.initrd) {
        (Some(k), Some(i)) => (k.clone(), i.clone()),
        (k, i) => {
            let images = image::all(ctx)?;
            (k.clone().unwrap_or_else(|| images.kernel.image()), i.clone().unwrap_or(images.guest))
        }
    };
    let mut ram = launch_ram(ctx, args, &kernel, &initrd)?;
    correct_tree(&mut ram)?;
    if let Some(path) = &args.dump {
        sh::write(path, &ram)?;
    }
    let mut launch = Launch::NEW;
    for (ipa, page) in (RAM_BASE..).step_by(PAGE).zip(ram.as_chunks::<PAGE>().0) {
        launch.add_page(Ipa(ipa), page);
    }
    let config =
        Config { ipa_bits: args.ipa_bits, gic: args.gic.into(), max_vcpus: args.vcpus.into() };
    // QEMU's `virt` has two flash banks in front of RAM: blank, but declared.
    let ranges = [
        Range { base: 0, size: 64 << 20 },
        Range { base: 64 << 20, size: 64 << 20 },
        Range { base: RAM_BASE, size: args.mem << 20 },
    ];
    let boot = Boot { pc: RAM_BASE, x: [0; 4] };
    Ok(hex(&launch.digest(&config, ranges.iter(), std::iter::once((0, boot)))))
}

/// The `digest` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let digest = compute(ctx, args)?;
    if args.json {
        println!(
            "{}",
            json!({"digest": digest, "vcpus": args.vcpus, "mem_mib": args.mem, "gic": args.gic, "ipa_bits": args.ipa_bits})
        );
    } else {
        println!("{digest}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtoolkit::fdt::Fdt;
    use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

    #[test]
    fn a_shorter_value_moves_what_follows() {
        let mut tree = DeviceTree::new();
        let mut node = DeviceTreeNode::new("cpu@0").unwrap();
        node.add_property(DeviceTreeProperty::new("compatible", &b"arm,cortex-a57\0"[..]).unwrap());
        node.add_property(DeviceTreeProperty::new("reg", 7_u32).unwrap());
        let mut wanted_node = DeviceTreeNode::new("cpu@0").unwrap();
        wanted_node
            .add_property(DeviceTreeProperty::new("compatible", &b"arm,armv8\0"[..]).unwrap());
        wanted_node.add_property(DeviceTreeProperty::new("reg", 7_u32).unwrap());
        tree.root.add_child(node);
        let mut wanted = DeviceTree::new();
        wanted.root.add_child(wanted_node);
        let mut blob = tree.to_dtb();
        assert_eq!(
            replace_values(&mut blob, "compatible", b"arm,cortex-a57\0", b"arm,armv8\0").unwrap(),
            1
        );
        let total = be32(&blob, 12).unwrap() + be32(&blob, 32).unwrap();
        put32(&mut blob, 4, total).unwrap();
        assert_eq!(DeviceTree::from_fdt(&Fdt::new(&blob).unwrap()), wanted);
    }
}
