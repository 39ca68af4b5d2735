// SPDX-License-Identifier: MIT OR Apache-2.0
//! The launch digest of a guest, computed from its files and configuration alone.
//!
//! The same release of QEMU that starts the guest on the host is started here, stopped before
//! its first instruction, and its RAM read back: boot stub, kernel, initramfs, device tree.
//! The tree that it makes for its own emulated CPU differs from the one for KVM in the CPU's
//! `compatible` (and in the PMU node, which `pmu=off` leaves out); that is corrected, to the byte.
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
        .args(["-M", &format!("virt,gic-version={},dtb-randomness=off", args.gic)])
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

/// The name of a property.
fn property_name(tree: &[u8], strings: usize, at: usize) -> Result<&[u8]> {
    let start = strings + be32(tree, at + 8)?;
    let name = tree.get(start..).context("bad name")?;
    Ok(name.split(|&b| b == 0).next().unwrap_or_default())
}

/// Replaces the `compatible` of every CPU in place, down to the padding.
///
/// libfdt makes room and does not clear it, so the padding after a value shows what lay there
/// before. QEMU adds CPUs from the last to the first, each in front of the others, and in each
/// node `compatible` in front of `device_type`, then `enable-method` in front of that:
/// - after `compatible` lies the last byte of the token that followed the node then: the begin
///   of the next CPU (1), or the end of `/cpus` (2) for the last one;
/// - after `psci` lie bytes 5 to 7 of `compatible`'s value.
fn replace_cpus(tree: &mut Vec<u8>, old: &[u8], new: &[u8]) -> Result<usize> {
    let mut strings = be32(tree, 12)?;
    let mut size = be32(tree, 36)?;
    let mut at = be32(tree, 8)?;
    let mut last_pad = None;
    let mut before = None;
    let mut done = 0;
    loop {
        match be32(tree, at)? {
            1 => {
                let name = tree.get(at + 4..).context("cut short")?.iter().position(|&b| b == 0);
                at = (at + 4 + name.context("no end of a name")? + 1).next_multiple_of(4);
            }
            2 | 4 => {
                at += 4;
                before = None;
            }
            3 => {
                let len = be32(tree, at + 4)?;
                let value = at + 12;
                let mut end = (value + len).next_multiple_of(4);
                let is_cpu = property_name(tree, strings, at)? == b"compatible"
                    && tree.get(value..value + len) == Some(old);
                if is_cpu {
                    if let Some(method) = before
                        && property_name(tree, strings, method)? == b"enable-method"
                        && be32(tree, method + 4)? == 5
                    {
                        let pad = new.get(5..8).context("short name")?;
                        tree.get_mut(method + 17..method + 20)
                            .context("cut short")?
                            .copy_from_slice(pad);
                    }
                    let mut padded = new.to_vec();
                    padded.resize(new.len().next_multiple_of(4), 0);
                    tree.splice(value..end, padded.iter().copied());
                    put32(tree, at + 4, new.len())?;
                    let shrink =
                        (end - value).checked_sub(padded.len()).context("longer than before")?;
                    strings -= shrink;
                    size -= shrink;
                    end = value + padded.len();
                    if padded.len() > new.len() {
                        *tree.get_mut(end - 1).context("cut short")? = 1;
                        last_pad = Some(end - 1);
                    }
                    done += 1;
                }
                before = Some(at);
                at = end;
            }
            9 => break,
            other => bail!("unknown token {other:#x} in the device tree"),
        }
    }
    if let Some(last) = last_pad.and_then(|p| tree.get_mut(p)) {
        *last = 2;
    }
    put32(tree, 12, strings)?;
    put32(tree, 36, size)?;
    Ok(done)
}

/// Makes the tree in RAM the one that QEMU makes with KVM.
fn correct_tree(ram: &mut [u8]) -> Result<()> {
    let at = find_tree(ram)?;
    let old_total = be32(ram, at + 4)?;
    let mut tree = ram.get(at..at + old_total).context("the device tree runs out of RAM")?.to_vec();
    if replace_cpus(&mut tree, b"arm,cortex-a57\0", b"arm,arm-v8\0")? == 0 {
        bail!("no CPU in the guest's device tree");
    }
    tree.resize(old_total, 0);
    ram.get_mut(at..at + old_total)
        .context("the device tree runs out of RAM")?
        .copy_from_slice(&tree);
    Ok(())
}

/// Computes the digest of a guest.
pub fn compute(ctx: &Ctx, args: &Args) -> Result<String> {
    // Found out now rather than after a kernel was built.
    for path in args.kernel.iter().chain(&args.initrd) {
        fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    }
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
    // QEMU's flash banks are no RAM to KVM, which takes no read-only memory under the monitor.
    let ranges = [Range { base: RAM_BASE, size: args.mem << 20 }];
    // The CPU interface that the device tree tells of, where KVM has the GICv2's mapped.
    let interface = Range { base: 0x0801_0000, size: 0x2000 };
    let devices = if args.gic == 2 { interface } else { Range::default() };
    let boot = Boot { pc: RAM_BASE, x: [0; 4] };
    Ok(hex(&launch.digest(&config, ranges.iter(), &devices, std::iter::once((0, boot)))))
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

    fn cpu(name: &str, compatible: &[u8]) -> DeviceTreeNode {
        let mut node = DeviceTreeNode::new(name).unwrap();
        node.add_property(DeviceTreeProperty::new("enable-method", &b"psci\0"[..]).unwrap());
        node.add_property(DeviceTreeProperty::new("compatible", compatible).unwrap());
        node.add_property(DeviceTreeProperty::new("device_type", &b"cpu\0"[..]).unwrap());
        node
    }

    #[test]
    fn the_cpus_of_kvm_down_to_the_padding() {
        let tree = |compatible: &[u8]| {
            let mut tree = DeviceTree::new();
            tree.root.add_child(cpu("cpu@0", compatible));
            tree.root.add_child(cpu("cpu@1", compatible));
            tree
        };
        let mut blob = tree(b"arm,cortex-a57\0").to_dtb();
        assert_eq!(replace_cpus(&mut blob, b"arm,cortex-a57\0", b"arm,arm-v8\0").unwrap(), 2);
        let total = be32(&blob, 12).unwrap() + be32(&blob, 32).unwrap();
        put32(&mut blob, 4, total).unwrap();
        assert_eq!(DeviceTree::from_fdt(&Fdt::new(&blob).unwrap()), tree(b"arm,arm-v8\0"));
        let all = |word: &[u8]| blob.windows(word.len()).filter(|w| *w == word).count();
        assert_eq!(all(b"psci\0rm-"), 2);
        assert_eq!((all(b"arm,arm-v8\0\x01"), all(b"arm,arm-v8\0\x02")), (1, 1));
    }
}
