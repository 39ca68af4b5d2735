// SPDX-License-Identifier: MIT OR Apache-2.0
//! Root file systems of the emulated machines: the host's on a disk, the guests' as an
//! initramfs archive.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache::{Key, files_below};
use crate::cpio::Cpio;
use crate::kernel::{self, Kernel};
use crate::setup::{self, Need};
use crate::{Ctx, build, debs, sh};

/// busybox programs that get a name of their own on the host.
const APPLETS: &str = "sh ash mount umount poweroff reboot cat echo grep dmesg uname sleep head tail date ls nproc free mkdir \
    rmdir rm cp mv ln chroot tr sed awk time taskset sysctl ps kill top vi less find xargs hexdump od dd insmod rmmod lsmod \
    setsid cttyhack clear env id df du wc sort uniq cut seq test true false printf stat chmod touch strings devmem which";

/// Empty folders of a root.
const DIRS: [&str; 6] = ["dev", "proc", "sys", "tmp", "root", "mnt"];

/// Everything that a run of the emulated host needs.
#[derive(Debug, Clone)]
pub struct Images {
    /// The kernel of host and guests.
    pub kernel: Kernel,
    /// The host's root, a disk image.
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
    for dir in DIRS {
        cpio.dir(dir);
    }
    cpio.char_device("dev/console", 0o600, 5, 1);
    cpio.char_device("dev/null", 0o666, 1, 3);
}

/// Puts a copy of a file into a folder that becomes a root.
fn copy(root: &Path, name: &str, from: &Path, mode: u32) -> Result<()> {
    let to = root.join(name);
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// The host's root: Debian's QEMU and busybox, and what we build, as an ext2 image that is
/// mounted read-only (`mke2fs -d` needs no root, and the kernel's driver is small).
pub fn host(ctx: &Ctx, kernel: &Kernel, guest: &Path) -> Result<PathBuf> {
    let debian = debs::arm64_root(ctx)?;
    let programs = build::programs(ctx)?;
    let module = kernel::attacker(ctx, kernel)?;
    let mut files = vec![
        ("init", programs.join("havmsi-agent")),
        ("bin/havmsi", programs.join("havmsi")),
        ("havmsi/run", programs.join("havmsi-run")),
        ("havmsi/vmm", programs.join("havmsi-vmm")),
        ("havmsi/bench.bin", build::bench_guest(ctx)?.0),
        ("havmsi/Image", kernel.image()),
        ("havmsi/guest.cpio.gz", guest.to_path_buf()),
    ];
    if let Some(module) = module {
        files.push(("havmsi/attacker.ko", module));
    }
    let mut key = Key::new("host 4")
        .value(
            "root",
            &debian.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        )
        .value("applets", APPLETS);
    for (name, from) in &files {
        key = key.file(&ctx.cache, name, from)?;
    }
    let dir = ctx.cache.entry("image", &key, |dir| {
        ctx.cache.need_space(300)?;
        let root = dir.join("root");
        for name in DIRS {
            fs::create_dir_all(root.join(name))?;
        }
        let from = debian.join("root");
        for file in files_below(&from)? {
            copy(&root, &file.strip_prefix(&from)?.to_string_lossy(), &file, 0o755)?;
        }
        for applet in APPLETS.split_whitespace() {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        for (name, from) in &files {
            copy(&root, name, from, 0o755)?;
        }
        let mut blocks = 1024;
        for file in files_below(&root)? {
            blocks += fs::metadata(&file)?.len().div_ceil(4096) + 1;
        }
        ext2(ctx, &root, &dir.join("host.ext2"), &(blocks + blocks / 20).to_string())?;
        fs::remove_dir_all(&root)?;
        Ok(())
    })?;
    Ok(dir.join("host.ext2"))
}

/// Makes an ext2 image of a folder; its size in blocks of 4 KiB, or with a unit.
pub fn ext2(ctx: &Ctx, root: &Path, image: &Path, size: &str) -> Result<()> {
    let mut command = Command::new("mke2fs");
    // Debian keeps it where only root looks.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command.args(["-q", "-F", "-t", "ext2", "-b", "4096", "-m", "0", "-E", "root_owner=0:0"]);
    command.arg("-d").arg(root).arg(image).arg(size);
    sh::run(&mut command, &ctx.log("image.log"))
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
