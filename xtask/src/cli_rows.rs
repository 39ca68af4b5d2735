// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rows that call xtask itself with bad input, or in a broken environment: each must end
//! with a clear message and leave nothing half-built.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::machine::{Kind, Machine};
use crate::test::Ended;
use crate::{Ctx, rows, run, sh};

/// This program with words; what it must say.
fn must_say(
    ctx: &Ctx,
    qemu: Option<&Path>,
    words: &[&str],
    code: i32,
    says: &[&str],
) -> Result<Ended> {
    let mut command = Command::new(std::env::current_exe()?);
    command.current_dir(&ctx.root).args(words).arg("--log").arg(&ctx.log_dir).stdin(Stdio::null());
    if let Some(qemu) = qemu {
        command.env("HAVMSI_QEMU", qemu);
    }
    expect(&mut command, code, says)
}

fn expect(command: &mut Command, code: i32, says: &[&str]) -> Result<Ended> {
    let out = command.output().with_context(|| format!("cannot start {}", sh::display(command)))?;
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    if out.status.code() != Some(code) {
        bail!("exit status {} instead of {code}; it says: {text}", out.status);
    }
    for part in says {
        if !text.contains(part) {
            bail!("it does not say {part:?} but: {text}");
        }
    }
    Ok(Ended::ok(format!("says {:?}", says.first().copied().unwrap_or_default())))
}

/// A program that claims to be some QEMU.
fn fake_qemu(ctx: &Ctx, version: &str) -> Result<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = ctx.log("fake-qemu");
    sh::write(&path, format!("#!/bin/sh\necho '{version}'\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Does the work of one of these rows.
pub fn work(ctx: &Ctx, what: &str, limit: Duration) -> Result<Ended> {
    let digest = ["digest", "--kernel", "/dev/null", "--initrd", "/dev/null"];
    match what {
        "wrong-option" => {
            must_say(ctx, None, &["run", "--gusts", "2"], 2, &["--gusts", "--guests"])
        }
        "wrong-value" => must_say(ctx, None, &["run", "--gic", "5"], 2, &["--gic", "5"]),
        "unknown-qemu" => {
            let fake = fake_qemu(ctx, "hello")?;
            must_say(
                ctx,
                Some(&fake),
                &digest,
                1,
                &["unknown QEMU", "HAVMSI_QEMU", "cargo xtask setup"],
            )
        }
        "old-qemu" => {
            let fake = fake_qemu(ctx, "QEMU emulator version 7.2.9 (Debian)")?;
            must_say(ctx, Some(&fake), &digest, 1, &["too old", "QEMU 10", "cargo xtask setup"])
        }
        "no-qemu" => must_say(
            ctx,
            Some(Path::new("/nowhere/qemu")),
            &digest,
            1,
            &["can't be run", "cargo xtask setup"],
        ),
        "small-disk" => small_disk(ctx),
        "dead-qemu" => dead_qemu(ctx, limit),
        other => bail!("no such row: {other}"),
    }
}

/// A cache on a file system that is too small: refused before anything is built.
fn small_disk(ctx: &Ctx) -> Result<Ended> {
    let dir = ctx.log("small-disk");
    fs::create_dir_all(&dir)?;
    let script = r#"mount -t tmpfs -o size=4m none "$1" && shift && exec "$@""#;
    let works = Command::new("unshare")
        .args(["-rm", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !works {
        return Ok(Ended::Skip(
            "no user namespaces here: a small file system can't be mounted".to_owned(),
        ));
    }
    let mut command = Command::new("unshare");
    command.current_dir(&ctx.root).args(["-rm", "sh", "-c", script, "sh"]).arg(&dir);
    command.arg(std::env::current_exe()?).arg("image").arg("--log").arg(&ctx.log_dir);
    command.env("HAVMSI_CACHE", &dir).stdin(Stdio::null());
    let ended =
        expect(&mut command, 1, &["MiB left", "cargo xtask clean --cache", "HAVMSI_CACHE"])?;
    if !rows::no_entries(&dir.join("kernel")) || !rows::no_entries(&dir.join("arm64-root")) {
        bail!("something was left in the cache");
    }
    Ok(ended)
}

/// QEMU is killed in the middle: the message says so, and where the logs are.
fn dead_qemu(ctx: &Ctx, limit: Duration) -> Result<Ended> {
    let args = run::Args { control: true, job: "boot".to_owned(), ..run::Args::default() };
    let config = run::configure(ctx, &args, Kind::Control)?;
    let dir = ctx.log_dir.clone();
    let result = std::thread::scope(|s| {
        s.spawn(|| kill_soon(&dir));
        let limits = crate::job::Limits { total: limit, silence: limit };
        crate::job::run(&config, &dir, limits, |_| ())
    });
    match result {
        Ok(_) => bail!("the machine ended well although QEMU was killed"),
        Err(e) => {
            let text = e.to_string();
            if !text.contains("QEMU died while we waited for") || !text.contains("logs: ") {
                bail!("it says {text:?}");
            }
            Ok(Ended::ok("says what was waited for"))
        }
    }
}

/// Kills the QEMU whose command line names our log folder, once it has printed something.
fn kill_soon(dir: &Path) {
    let monitor_log = Machine::monitor_log_path(dir).display().to_string();
    for _ in 0..200 {
        std::thread::sleep(Duration::from_millis(100));
        if fs::metadata(dir.join("console.log")).map_or(0, |m| m.len()) == 0 {
            continue;
        }
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let pid = entry
                .file_name()
                .to_string_lossy()
                .parse::<i32>()
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid
                && String::from_utf8_lossy(&line).contains(&monitor_log)
            {
                let _gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                return;
            }
        }
    }
}
