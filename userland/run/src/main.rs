// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starts an unmodified QEMU so that a guest of Linux 6.12 shares memory with its virtio devices.
//!
//! Such a guest shares what its device tree calls a `restricted-dma-pool`, and QEMU's tree has
//! none. So QEMU is asked for its tree (`dumpdtb`), the pool is put in, and QEMU is started with
//! the result. Guests of Linux 7 need no pool; for them this does no harm.

mod tree;

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: havmsi-run [--pool MIB] QEMU ARGUMENT...

Runs QEMU with ARGUMENTs and a device tree in which MIB (16 without the option) of the guest's RAM
are a pool for transfers. Virtio devices on PCI get iommu_platform=on, so that their drivers use it.
QEMU refuses to migrate the guest or to save it: it has not its memory.";

/// PCI devices of QEMU that take their addresses as they are unless told otherwise.
const VIRTIO: [&str; 6] = ["blk", "net", "rng", "serial", "scsi", "9p"];

/// What QEMU names as the reason why it does not migrate.
const NODE: &str = "memory-of-a-protected-VM";

/// A disk image of QEMU's first qcow format (a header, and no data of its 1 MiB), of which QEMU
/// says that it can't be migrated.
fn unmigratable() -> Vec<u8> {
    let mut image = b"QFI\xfb".to_vec();
    // Version 1; no backing file: its name's place and length; its time.
    image.extend([1_u32, 0, 0, 0, 0].iter().flat_map(|n| n.to_be_bytes()));
    image.extend((1_u64 << 20).to_be_bytes());
    // Clusters of 4 KiB, tables of 512 entries, not encrypted; the first table.
    image.extend([12, 9, 0, 0, 0, 0, 0, 0]);
    image.extend(48_u64.to_be_bytes());
    image.resize(4096, 0);
    image
}

/// A file without a name, which QEMU gets as well, and its path there.
fn memory(content: &[u8]) -> Result<(File, String), String> {
    // SAFETY: a valid C string; no flag, so that the descriptor outlives an exec.
    let fd = unsafe { libc::memfd_create(c"havmsi-run".as_ptr(), 0) };
    if fd < 0 {
        return Err(format!("memfd_create: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: just made, and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(content).map_err(|e| e.to_string())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok((file, path))
}

/// A new folder, which is nobody else's.
fn folder() -> Result<PathBuf, String> {
    let mut name = std::env::temp_dir().join("havmsi-run.XXXXXX").into_os_string().into_vec();
    name.push(0);
    // SAFETY: a C string that is ours to change.
    if unsafe { libc::mkdtemp(name.as_mut_ptr().cast()) }.is_null() {
        return Err(format!("mkdtemp: {}", std::io::Error::last_os_error()));
    }
    name.pop();
    Ok(OsString::from_vec(name).into())
}

/// The device tree that QEMU makes for these arguments.
fn dump(qemu: &OsString, arguments: &[OsString]) -> Result<Vec<u8>, String> {
    let folder = folder()?;
    let path = folder.join("dtb");
    let mut option = OsString::from("dumpdtb=");
    option.push(&path);
    let output = Command::new(qemu).args(arguments).arg("-machine").arg(option).output();
    let blob = std::fs::read(&path);
    // What is left there does no harm.
    let _ = std::fs::remove_dir_all(&folder);
    let output = output.map_err(|e| format!("{}: {e}", qemu.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    blob.map_err(|_| format!("QEMU gave no device tree ({}): {said}", output.status))
}

fn run(words: &[OsString]) -> Result<(), String> {
    let (mib, command) = match words {
        [option, mib, rest @ ..] if option == "--pool" => {
            let mib = mib.to_str().and_then(|mib| mib.parse().ok());
            let mib = mib.filter(|mib| mib % 2 == 0 && (2..=1 << 20).contains(mib));
            (mib.ok_or("--pool: want an even number of MiB")?, rest)
        }
        all => (16_u64, all),
    };
    let (qemu, arguments) = command.split_first().ok_or(USAGE)?;
    if qemu.to_string_lossy().starts_with('-') {
        return Err(USAGE.to_owned());
    }
    let blob = dump(qemu, arguments)?;
    let blob = tree::with_pool(&blob, mib << 20)?;
    let (_tree, tree) = memory(&blob)?;
    let (_image, image) = memory(&unmigratable())?;
    let mut command = Command::new(qemu);
    for device in VIRTIO {
        command.args(["-global", &format!("virtio-{device}-pci.iommu_platform=on")]);
    }
    // No device has it, so the guest doesn't see it.
    let node = format!(
        "driver=qcow,node-name={NODE},read-only=on,file.driver=file,file.locking=off,file.filename={image}"
    );
    let error = command.args(arguments).args(["-dtb", &tree, "-blockdev", &node]).exec();
    Err(format!("{}: {error}", qemu.display()))
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if words.iter().any(|word| word == "--help" || word == "-h") && words.len() == 1 {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("havmsi-run: {error}");
            ExitCode::FAILURE
        }
    }
}
