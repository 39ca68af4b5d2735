// SPDX-License-Identifier: MIT OR Apache-2.0
//! Root file systems of the emulated machines, as initramfs archives.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::{Key, files_below};
use crate::cpio::Cpio;
use crate::kernel::{self, Kernel};
use crate::setup::{self, Need};
use crate::{Ctx, build, debs};

/// busybox programs that get a name of their own on the host.
const APPLETS: &str = "sh ash mount umount poweroff reboot cat echo grep dmesg uname sleep head tail date ls nproc free mkdir \
    rmdir rm cp mv ln chroot tr sed awk time taskset sysctl ps kill top vi less find xargs hexdump od dd insmod rmmod lsmod \
    setsid cttyhack clear env id df du wc sort uniq cut seq test true false printf stat chmod touch strings devmem which";

/// Everything that a run of the emulated host needs.
#[derive(Debug, Clone)]
pub struct Images {
    /// The kernel of host and guests.
    pub kernel: Kernel,
    /// The host's initramfs.
    pub host: PathBuf,
    /// The guest's initramfs.
    pub guest: PathBuf,
}

/// The guest's initramfs: one static program.
pub fn guest(ctx: &Ctx) -> Result<PathBuf> {
    let program = build::programs(ctx)?.join("havmsi-guest");
    let key = Key::new("guest 2").file(&ctx.cache, "init", &program)?;
    let dir = ctx.cache.entry("image", &key, |dir| {
        let mut cpio = Cpio::default();
        base(&mut cpio);
        cpio.copy("init", &program)?;
        fs::write(dir.join("guest.cpio"), cpio.finish()?)?;
        Ok(())
    })?;
    Ok(dir.join("guest.cpio"))
}

fn base(cpio: &mut Cpio) {
    for dir in ["dev", "proc", "sys", "tmp", "root", "mnt"] {
        cpio.dir(dir);
    }
    cpio.char_device("dev/console", 0o600, 5, 1);
    cpio.char_device("dev/null", 0o666, 1, 3);
}

/// The part of the host's root that changes rarely: Debian's QEMU and busybox.
fn host_base(ctx: &Ctx) -> Result<PathBuf> {
    let root = debs::arm64_root(ctx)?;
    let key = Key::new("host-base 1")
        .value(
            "root",
            &root.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        )
        .value("applets", APPLETS);
    let dir = ctx.cache.entry("image", &key, |dir| {
        ctx.cache.need_space(300)?;
        let mut cpio = Cpio::default();
        base(&mut cpio);
        let from = root.join("root");
        for file in files_below(&from)? {
            let name = file.strip_prefix(&from)?.to_string_lossy().into_owned();
            cpio.file(&name, 0o755, fs::read(&file)?);
        }
        for applet in APPLETS.split_whitespace() {
            cpio.link(&format!("bin/{applet}"), "busybox");
        }
        fs::write(dir.join("base.cpio"), cpio.finish()?)?;
        Ok(())
    })?;
    Ok(dir.join("base.cpio"))
}

/// The host's initramfs: the base and, as a second archive behind it, what we build.
pub fn host(ctx: &Ctx, kernel: &Kernel, guest: &Path) -> Result<PathBuf> {
    let base = host_base(ctx)?;
    let programs = build::programs(ctx)?;
    let module = kernel::attacker(ctx, kernel)?;
    let mut files = vec![
        ("init", programs.join("havmsi-agent")),
        ("havmsi/vmm", programs.join("havmsi-vmm")),
        ("havmsi/Image", kernel.image()),
        ("havmsi/guest.cpio.gz", guest.to_path_buf()),
    ];
    if let Some(module) = module {
        files.push(("havmsi/attacker.ko", module));
    }
    let mut key = Key::new("host 3").file(&ctx.cache, "base", &base)?;
    for (name, from) in &files {
        key = key.file(&ctx.cache, name, from)?;
    }
    let dir = ctx.cache.entry("image", &key, |dir| {
        ctx.cache.need_space(300)?;
        let mut cpio = Cpio::default();
        for (name, from) in &files {
            cpio.copy(name, from)?;
        }
        let mut all = fs::read(&base).context("cannot read the base archive")?;
        all.extend(cpio.finish()?);
        fs::write(dir.join("host.cpio"), all)?;
        Ok(())
    })?;
    Ok(dir.join("host.cpio"))
}

/// Builds kernel and both images.
pub fn all(ctx: &Ctx) -> Result<Images> {
    // The download waits for the network, the kernel for the CPUs.
    setup::ensure(ctx, &[Need::Kernel, Need::Debs, Need::Binutils, Need::Targets])?;
    let kernel = std::thread::scope(|s| {
        let download = s.spawn(|| debs::arm64_root(ctx));
        let kernel = kernel::build(ctx);
        download.join().map_err(|_| anyhow::anyhow!("the download thread panicked"))??;
        kernel
    })?;
    let guest = guest(ctx)?;
    let host = host(ctx, &kernel, &guest)?;
    Ok(Images { kernel, host, guest })
}

/// The `image` verb.
pub fn main(ctx: &Ctx) -> Result<()> {
    let images = all(ctx)?;
    for path in [images.kernel.image(), images.host, images.guest] {
        println!("{} ({} bytes)", path.display(), fs::metadata(&path)?.len());
    }
    Ok(())
}
