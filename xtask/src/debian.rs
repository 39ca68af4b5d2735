// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask run --scenario debian-guest`: Debian as guest, from its packages to what it
//! answered (docs/guests.md).

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::cache::{Key, files_below};
use crate::cpio::Cpio;
use crate::job::{self, Limits, Outcome};
use crate::kernel::Kernel;
use crate::machine::{self, Config, Event, Kind, Machine, comma};
use crate::report::{self, Report, Seconds};
use crate::setup::{self, Need};
use crate::ui::Step;
use crate::{Ctx, apt, build, debs, image, run, sh, tcb};

/// What the guest's root is made of: a minimal Debian, a service, and what makes and opens its disk.
const PACKAGES: [&str; 8] = [
    "?essential",
    "systemd-sysv",
    "udev",
    "redis-server",
    "cryptsetup-bin",
    "e2fsprogs",
    "zstd",
    "busybox-static",
];

/// Programs of the initramfs, and where they are in the root.
const TOOLS: [(&str, &str); 4] = [
    ("bin/busybox", "usr/bin/busybox"),
    ("sbin/cryptsetup", "usr/sbin/cryptsetup"),
    ("sbin/mkfs.ext4", "usr/sbin/mke2fs"),
    ("bin/zstd", "usr/bin/zstd"),
];

/// Files that nobody reads there. Licences stay.
const EXCLUDED: [&str; 2] = ["/usr/share/man/*", "/usr/share/locale/*"];

/// Bytes of the guest's disk, and of the disk that the root is made on.
const DISK: u64 = 1 << 30;
const WORK_DISK: &str = "800M";
/// MiB of the guest's RAM.
const MEMORY: u32 = 512;
/// What the client writes to Redis, which nobody must find on the disk.
const MARKER: &[u8] = b"havmsi-plaintext-marker";
/// The file that is on every Debian, also not to be found.
const OS_RELEASE: &[u8] = b"PRETTY_NAME=\"Debian GNU/Linux";

/// A root file system, packed: `root.tar.zst`, `version`, and `tools`, for the initramfs.
fn root(ctx: &Ctx, kernel: &Kernel) -> Result<PathBuf> {
    let codename = apt::codename()?;
    let files = ctx.root.join("userland/debian");
    let key = Key::new("debian-root 1")
        .value("release", &codename)
        .value("packages", &PACKAGES.join(" "))
        .file(&ctx.cache, "second-stage", &files.join("second-stage"))?;
    if !ctx.cache.place("debian-root", &key).is_dir() {
        setup::ensure(ctx, &[Need::Debs, Need::Binutils, Need::Qemu])?;
    }
    ctx.cache.entry("debian-root", &key, |dir| {
        ctx.cache.need_space(2500)?;
        let work = dir.join("work");
        let step = Step::new("Debian guest: download the packages", None);
        let sources = apt::release_sources(&apt::machine_sources()?, &codename)?;
        let archives = debs::fetch(ctx, &work, &sources, &PACKAGES, None)?;
        step.done();
        let step = Step::new("Debian guest: unpack", None);
        let all = work.join("all");
        unpack(ctx, &archives, &all)?;
        debs::closure(&all, &dir.join("tools"), &TOOLS)?;
        let disk = work.join("root.ext2");
        prepare(&all, &archives, &files)?;
        image::ext2(ctx, &all, &disk, WORK_DISK)?;
        step.done();
        let (size, version) = second_stage(ctx, kernel, &disk, &work)?;
        let step = Step::new("Debian guest: compress", None);
        let tar = work.join("root.tar");
        File::options().write(true).open(&tar)?.set_len(size)?;
        let packed = dir.join("root.tar.zst");
        sh::run(
            Command::new("zstd").args(["-q", "-12", "-T0", "-o"]).arg(&packed).arg(&tar),
            &log(ctx),
        )?;
        // A disk has whole sectors; zstd ends at its own end.
        fs::write(dir.join("size"), fs::metadata(&packed)?.len().to_string())?;
        let names: Vec<String> = archives
            .iter()
            .filter_map(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()))
            .collect();
        fs::write(dir.join("PACKAGES"), names.join("\n"))?;
        fs::write(dir.join("version"), version)?;
        fs::remove_dir_all(&work)?;
        step.done();
        Ok(())
    })
}

fn log(ctx: &Ctx) -> PathBuf {
    ctx.log("debian-root.log")
}

/// Unpacks packages as they will lie, with `/bin`, `/sbin` and `/lib` in `/usr`.
fn unpack(ctx: &Ctx, archives: &[PathBuf], to: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib"] {
        fs::create_dir_all(to.join("usr").join(name))?;
        std::os::unix::fs::symlink(format!("usr/{name}"), to.join(name))?;
    }
    for deb in archives {
        // tar notices if it gets less than an archive.
        let script = "to=$1 deb=$2; shift 2; dpkg-deb --fsys-tarfile \"$deb\" | \
            tar -x --keep-directory-symlink --no-same-owner -C \"$to\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(to).arg(deb);
        command.args(EXCLUDED.map(|path| format!("--exclude=.{path}")));
        sh::run(&mut command, &log(ctx))?;
    }
    Ok(())
}

/// Puts in what the second stage works with.
fn prepare(all: &Path, archives: &[PathBuf], files: &Path) -> Result<()> {
    let mut settings = "force-unsafe-io\n".to_owned();
    for path in EXCLUDED {
        settings.push_str(&format!("path-exclude={path}\n"));
    }
    fs::create_dir_all(all.join("etc/dpkg/dpkg.cfg.d"))?;
    fs::write(all.join("etc/dpkg/dpkg.cfg.d/havmsi"), settings)?;
    fs::create_dir_all(all.join("debs"))?;
    for deb in archives {
        fs::rename(deb, all.join("debs").join(deb.file_name().unwrap_or_default()))?;
    }
    fs::copy(files.join("second-stage"), all.join("second-stage"))?;
    Ok(())
}

/// A disk for a machine whose content need not outlive it.
fn drive(id: &str, file: &Path) -> [String; 4] {
    [
        "-drive".to_owned(),
        format!("if=none,id={id},format=raw,cache=unsafe,file={}", comma(file)),
        "-device".to_owned(),
        format!("virtio-blk-pci,drive={id}"),
    ]
}

/// Configures the packages in an emulated machine: no root is needed here, and no foreign binary
/// runs. The size of the archive that it leaves as `root.tar`, and Debian's version.
fn second_stage(ctx: &Ctx, kernel: &Kernel, disk: &Path, work: &Path) -> Result<(u64, String)> {
    let tar = work.join("root.tar");
    File::create(&tar)?.set_len(DISK)?;
    let config = Config {
        kind: Kind::Bare,
        cpus: 2,
        mem_mib: 1024,
        gic: 3,
        cpu: run::Cpu::CortexA57.name().to_owned(),
        kernel: kernel.image(),
        root: None,
        append: "console=ttyAMA0 loglevel=3 panic=-1 root=/dev/vda rw init=/second-stage"
            .to_owned(),
        monitor: None,
        behind: vec![],
        secret: None,
        extra: [drive("root", disk), drive("archive", &tar)].concat(),
    };
    let step = Step::new("Debian guest: configure the packages, in an emulated machine", None);
    let mut machine = Machine::start(&config, &ctx.log_dir.join("debian-root"))?;
    let (start, limit) = (Instant::now(), Duration::from_secs(1800));
    let mut made = None;
    loop {
        match machine.next(Duration::from_secs(5))? {
            Event::Line(line) => match line.strip_prefix("@build ").map(|l| l.split_once(' ')) {
                Some(Some(("root", text))) => {
                    let (size, version) = text.split_once(' ').context("no version")?;
                    made = Some((size.parse()?, version.to_owned()));
                }
                Some(Some(("progress", text))) => step.note(text),
                Some(Some(("fail", text))) => return Err(machine.report(text)),
                _ => {}
            },
            Event::Silence if start.elapsed() > limit => {
                return Err(machine.report("the packages took too long"));
            }
            Event::Silence => {}
            Event::End(_) => break,
        }
    }
    step.done();
    made.ok_or_else(|| machine.report("the machine that configures the packages made no archive"))
}

/// What the host gets on a disk: the guest's initramfs, and the archive of its root.
fn files(ctx: &Ctx, root: &Path) -> Result<PathBuf> {
    let witness = build::programs(ctx)?.join("havmsi-guest");
    let init = ctx.root.join("userland/debian/init");
    let overlay = ctx.root.join("userland/debian/overlay");
    let key = Key::new("debian 1")
        .value("root", &root.file_name().unwrap_or_default().to_string_lossy())
        .file(&ctx.cache, "init", &init)?
        .file(&ctx.cache, "witness", &witness)?
        .tree(&ctx.cache, &overlay)?;
    let dir = ctx.cache.entry("image", &key, |dir| {
        let archive = root.join("root.tar.zst");
        let mut cpio = Cpio::default();
        for name in ["dev", "proc", "sys", "run", "mnt", "tmp"] {
            cpio.dir(name);
        }
        cpio.char_device("dev/console", 0o600, 5, 1);
        cpio.char_device("dev/null", 0o666, 1, 3);
        cpio.copy("init", &init)?;
        cpio.copy("overlay/usr/local/sbin/havmsi-witness", &witness)?;
        for file in files_below(&overlay)? {
            let name = file.strip_prefix(&overlay)?.to_string_lossy().into_owned();
            cpio.copy(&format!("overlay/{name}"), &file)?;
        }
        let tools = root.join("tools");
        for file in files_below(&tools)? {
            cpio.copy(&file.strip_prefix(&tools)?.to_string_lossy(), &file)?;
        }
        let size = fs::metadata(&archive)?.len();
        let sum = ctx.cache.file_hash(&archive)?;
        cpio.file("etc/root.sha256", 0o644, format!("{size} {sum}\n").into_bytes());
        let tree = dir.join("files");
        fs::create_dir_all(&tree)?;
        fs::write(tree.join("initramfs.cpio"), cpio.finish()?)?;
        let to = tree.join("root.tar.zst");
        fs::copy(&archive, &to)?;
        File::options().write(true).open(&to)?.set_len(size.next_multiple_of(4096))?;
        let blocks = files_below(&tree)?.iter().try_fold(0, |sum, file| {
            Ok::<_, anyhow::Error>(sum + fs::metadata(file)?.len().div_ceil(4096))
        })?;
        image::ext2(
            ctx,
            &tree,
            &dir.join("debian.ext2"),
            &(1024 + blocks + blocks / 20).to_string(),
        )?;
        Ok(fs::remove_dir_all(&tree)?)
    })?;
    Ok(dir.join("debian.ext2"))
}

/// What of the guest's the disk shows in clear.
struct Clear {
    /// Pages of the stream that only the guest knows.
    pages: u64,
    /// Places with what the client wrote or what is on every Debian.
    markers: u64,
    /// Bytes that are not zero.
    written: u64,
}

/// Looks for it. The stream's pages lie at file system blocks, each with this tag in front.
fn look(disk: &Path, tag: [u8; 8]) -> Result<Clear> {
    let mut clear = Clear { pages: 0, markers: 0, written: 0 };
    let mut file = File::open(disk)?;
    if file.metadata()?.len() != DISK {
        bail!("{} is not the guest's disk any more", disk.display());
    }
    let mut chunk = vec![0; 4 << 20];
    for _ in 0..DISK / (4 << 20) {
        file.read_exact(&mut chunk)?;
        for block in chunk.chunks(4096).filter(|block| **block != [0; 4096]) {
            clear.written += 4096;
            clear.pages += u64::from(block.starts_with(&tag));
            for marker in [MARKER, OS_RELEASE] {
                clear.markers += u64::from(memchr::memmem::find(block, marker).is_some());
            }
        }
    }
    file.seek(SeekFrom::Start(0))?;
    let mut magic = [0; 6];
    file.read_exact(&mut magic)?;
    if magic != *b"LUKS\xba\xbe" {
        bail!("{} does not begin as a LUKS disk does", disk.display());
    }
    Ok(clear)
}

/// The event `debian` of a job.
fn figures(outcome: &Outcome) -> Result<Value> {
    let found = outcome.events.iter().rfind(|e| e["event"] == "debian").cloned();
    found.with_context(|| match &outcome.done {
        Some((_, text)) => format!("the guest did not get far: {text}"),
        None => "the job did not end".to_owned(),
    })
}

/// The whole scenario.
pub fn execute(ctx: &Ctx, args: &run::Args) -> Result<Report> {
    let start = Instant::now();
    setup::ensure(ctx, setup::ALL)?;
    let images = image::all(ctx)?;
    let root = root(ctx, &images.kernel)?;
    let files = files(ctx, &root)?;
    let monitor = build::monitor(ctx)?;
    fs::create_dir_all(&ctx.log_dir)?;
    let disk = ctx.log_dir.join("guest.img");
    File::create(&disk)?.set_len(DISK)?;
    let mut seconds = Seconds { build: start.elapsed().as_secs_f64(), ..Seconds::default() };

    let secret = machine::random()?;
    let go = |name: &str, job: &str, secret: [u8; 32]| -> Result<Outcome> {
        let words = format!("havmsi.gmem={MEMORY} havmsi.timeout=3000 {}", args.append);
        let args = run::Args { append: words, guests: 1, vcpus: 4, ..args.clone() };
        let mut config = args.config(Kind::Havmsi, &images, Some(&monitor), job);
        config.secret = Some(secret);
        for (id, file, more) in [("files", &files, ",readonly=on"), ("guest", &disk, "")] {
            config.extra.push("-drive".to_owned());
            config.extra.push(format!("if=none,id={id},format=raw{more},file={}", comma(file)));
            config.extra.push("-device".to_owned());
            config.extra.push(format!("virtio-blk-pci,drive={id},{}", machine::VIRTIO));
        }
        let step = Step::new(name, None);
        let limits = Limits { total: Duration::from_secs(3300), silence: Duration::from_secs(600) };
        let outcome =
            job::run(&config, &ctx.log_dir.join(name.replace(' ', "-")), limits, |event| {
                step.note(&run::describe(event));
            })?;
        step.done();
        Ok(outcome)
    };
    let mut problems = Vec::new();
    let mut expect = |what: &str, good: bool, found: &str| {
        if !good {
            problems.push(format!("{what}: {found}"));
        }
    };
    let first = go("Debian guest", "debian", secret)?;
    let done = first.done.clone().unwrap_or_default();
    expect("the job", done.0, &done.1);
    let mut figures_ = figures(&first)?;
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let key = text(&figures_, "key");

    let mut digests: Vec<String> = first.launches().into_iter().map(|(_, digest)| digest).collect();
    let (same, other) = (digests.first() == digests.get(1), digests.first() != digests.get(2));
    expect(
        "digests of both boots and of another image",
        same && other && digests.len() == 3,
        &digests.join(" "),
    );

    // The same machine, turned on again; then another, with the disk of the first.
    let again = figures(&go("the machine turned on again", "debian-again", secret)?)?;
    expect(
        "the same machine",
        text(&again, "outcome") == "opened, 0 values wrong",
        &again.to_string(),
    );
    expect("its key", text(&again, "key") == key, &again.to_string());
    let moved = go("another machine", "debian-again", machine::random()?)?;
    digests.extend(moved.launches().into_iter().map(|(_, digest)| digest));
    let moved = figures(&moved)?;
    expect("another machine", text(&moved, "outcome").contains("another VM's"), &moved.to_string());
    expect(
        "its key",
        text(&moved, "key") != key && !text(&moved, "key").is_empty(),
        &moved.to_string(),
    );
    expect("its digest", digests.first() == digests.get(3), &digests.join(" "));

    let step = Step::new("look for plain text on the guest's disk", None);
    let seed = havmsi_proto::Seed::from_hex(&text(&figures_, "seed")).context("no seed")?;
    let clear = look(&disk, seed.tag().to_le_bytes())?;
    step.done();
    expect(
        "the disk in clear",
        clear.pages == 0 && clear.markers == 0,
        &format!("{} pages, {} markers", clear.pages, clear.markers),
    );
    expect("the disk", clear.written > 100 << 20, &format!("{} bytes written", clear.written));
    fs::remove_file(&disk)?;

    let more = json!({
        "name": "debian-guest",
        "digest": digests.first(),
        "outcome_again": text(&again, "outcome"), "key_again": text(&again, "key"),
        "outcome_other_machine": text(&moved, "outcome"), "key_of_other_machine": text(&moved, "key"),
        "disk_bytes_written": clear.written, "disk_pages_in_clear": clear.pages,
        "disk_markers_in_clear": clear.markers,
        "root_packages": fs::read_to_string(root.join("PACKAGES"))?.lines().count(),
        "root_archive_bytes": fs::metadata(root.join("root.tar.zst"))?.len(),
    });
    if let (Some(to), Some(from)) = (figures_.as_object_mut(), more.as_object()) {
        to.extend(from.clone());
        to.retain(|name, _| !["event", "n", "t", "seed"].contains(&name.as_str()));
    }
    seconds.havmsi = first.seconds;
    seconds.total = start.elapsed().as_secs_f64();
    Ok(Report {
        result: if problems.is_empty() { "ok" } else { "fail" },
        problems,
        guests: vec![],
        checks: vec![],
        tcb: tcb::count(ctx)?,
        machine: json!({
            "cpu": args.cpu.name(), "gic": args.gic, "cpus": args.cpus, "mem_mib": args.mem,
            "guests": 1, "vcpus": 4, "qemu": setup::qemu_version()?,
            "kernel": first.start("kernel"), "logs": ctx.log_dir,
        }),
        scenario: Some(figures_),
        seconds,
    })
}

/// Debian's own kernel for arm64, as it comes, on a disk for the host: the disk, and the package.
fn stock(ctx: &Ctx) -> Result<(PathBuf, String)> {
    let codename = apt::codename()?;
    let key = Key::new("debian-kernel 1").value("release", &codename);
    let dir = ctx.cache.entry("debian-root", &key, |dir| {
        ctx.cache.need_space(1200)?;
        let step = Step::new("Debian's kernel: download and unpack", None);
        let work = dir.join("work");
        let sources = apt::release_sources(&apt::machine_sources()?, &codename)?;
        let archives = debs::fetch(ctx, &work, &sources, &["linux-image-arm64"], None)?;
        let name =
            |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let package = archives.iter().find(|p| {
            name(p)
                .strip_prefix("linux-image-")
                .is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
        });
        let package = package.context("no kernel among the packages")?;
        sh::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(work.join("all")), &log(ctx))?;
        let image = files_below(&work.join("all/boot"))?;
        let image = image.iter().find(|p| name(p).starts_with("vmlinuz")).context("no vmlinuz")?;
        let tree = work.join("files");
        fs::create_dir_all(&tree)?;
        fs::rename(image, tree.join("vmlinuz"))?;
        image::ext2(ctx, &tree, &dir.join("kernel.ext2"), "64M")?;
        fs::write(dir.join("PACKAGES"), name(package))?;
        fs::remove_dir_all(&work)?;
        step.done();
        Ok(())
    })?;
    Ok((dir.join("kernel.ext2"), fs::read_to_string(dir.join("PACKAGES"))?))
}

/// The attacks of `run` on guests with that kernel.
pub fn kernel(ctx: &Ctx, args: &run::Args) -> Result<Report> {
    let start = Instant::now();
    setup::ensure(ctx, setup::ALL)?;
    let images = image::all(ctx)?;
    let (disk, package) = stock(ctx)?;
    let monitor = build::monitor(ctx)?;
    let mut seconds = Seconds { build: start.elapsed().as_secs_f64(), ..Seconds::default() };
    let words = format!("havmsi.kernel=/mnt/vmlinuz havmsi.timeout=900 {}", args.append);
    let args = &run::Args { append: words, ..args.clone() };
    let mut config = args.config(Kind::Havmsi, &images, Some(&monitor), "run");
    config.extra = vec![
        "-drive".to_owned(),
        format!("if=none,id=files,format=raw,readonly=on,file={}", comma(&disk)),
        "-device".to_owned(),
        format!("virtio-blk-pci,drive=files,{}", machine::VIRTIO),
    ];
    let outcome = run::one(ctx, &config, Duration::from_secs(960))?;
    let rows = report::rows(None, Some(&outcome));
    let mut problems = report::problems(&rows, false, true, args.guests);
    problems.extend(run::complaints(&outcome, "HA-VMSI", args.guests, true));
    seconds.havmsi = outcome.seconds;
    seconds.total = start.elapsed().as_secs_f64();
    Ok(Report {
        result: if problems.is_empty() { "ok" } else { "fail" },
        problems,
        guests: report::guests(&outcome, None),
        checks: rows,
        tcb: tcb::count(ctx)?,
        machine: json!({
            "cpu": args.cpu.name(), "gic": args.gic, "cpus": args.cpus, "mem_mib": args.mem,
            "guests": args.guests, "vcpus": args.vcpus, "qemu": setup::qemu_version()?,
            "kernel": outcome.start("kernel"), "logs": ctx.log_dir,
        }),
        scenario: Some(json!({ "name": "debian-kernel", "package": package })),
        seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_on_a_disk_is_found() {
        let path = std::env::temp_dir().join(format!("havmsi-look-{}", std::process::id()));
        let write = |at: u64, bytes: &[u8]| {
            use std::os::unix::fs::FileExt as _;
            let file =
                File::options().write(true).create(true).truncate(false).open(&path).unwrap();
            file.set_len(DISK).unwrap();
            file.write_all_at(bytes, at).unwrap();
        };
        write(0, b"LUKS\xba\xbe");
        let tag = [1, 2, 3, 4, 5, 6, 7, 8];
        let clear = look(&path, tag).unwrap();
        assert_eq!((clear.pages, clear.markers, clear.written), (0, 0, 4096));
        write(DISK - 4096, &tag);
        write(9 << 20, MARKER);
        write((5 << 20) + 100, OS_RELEASE);
        let clear = look(&path, tag).unwrap();
        assert_eq!((clear.pages, clear.markers, clear.written), (1, 2, 4 * 4096));
        write(0, b"plain");
        assert!(look(&path, tag).is_err());
        fs::remove_file(&path).unwrap();
    }
}
