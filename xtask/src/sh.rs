// SPDX-License-Identifier: MIT OR Apache-2.0
//! Running other programs: output to a log, a clear error, nothing left behind.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// Process groups that are running for us now.
static RUNNING: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// A child in its own process group, killed with the whole group when dropped.
#[derive(Debug)]
pub struct Group {
    /// The child itself.
    pub child: Child,
    pid: i32,
}

impl Group {
    /// Starts `command` as the leader of a new process group.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.process_group(0).spawn().with_context(|| {
            format!("cannot start `{program}` (is it installed? try `cargo xtask setup`)")
        })?;
        let pid = i32::try_from(child.id()).context("process id out of range")?;
        if let Ok(mut running) = RUNNING.lock() {
            running.push(pid);
        }
        Ok(Self { child, pid })
    }

    /// Kills the whole group and collects the child.
    pub fn kill(&mut self) {
        kill_group(self.pid);
        // The child is gone or about to go: its status does not matter any more.
        drop(self.child.wait());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.kill();
        }
        if let Ok(mut running) = RUNNING.lock() {
            running.retain(|&pid| pid != self.pid);
        }
    }
}

fn kill_group(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        // The group may have ended by itself.
        let _gone = kill_process_group(pid, Signal::KILL);
    }
}

/// Kills everything that we started when the user presses Ctrl-C or ends us.
pub fn install_signal_handler() -> Result<()> {
    ctrlc::set_handler(|| {
        if let Ok(running) = RUNNING.lock() {
            running.iter().copied().for_each(kill_group);
        }
        eprintln!("\ninterrupted");
        std::process::exit(130);
    })
    .context("cannot install the signal handler")
}

/// The command as the user could type it.
pub fn display(command: &Command) -> String {
    let quote = |s: &OsStr| {
        let s = s.to_string_lossy();
        if !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c))
        {
            s.into_owned()
        } else {
            format!("'{}'", s.replace('\'', r"'\''"))
        }
    };
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quote)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command with all output appended to `log`; calls `each` for every line of it.
pub fn run_lines(command: &mut Command, log: &Path, each: impl FnMut(&str)) -> Result<()> {
    run_told(command, log, each, |_| ())
}

fn run_told(
    command: &mut Command,
    log: &Path,
    mut each: impl FnMut(&str),
    tell: impl FnOnce(i32),
) -> Result<()> {
    if let Some(parent) = log.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create the log folder {}", parent.display()))?;
    }
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    writeln!(file, "$ {}", display(command))?;
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut group = Group::spawn(command)?;
    tell(group.pid);
    // The builder still holds the write ends: swap them out so that the reader sees the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(file, "{line}")?;
        each(&line);
    }
    let status = group.child.wait()?;
    if !status.success() {
        bail!(
            "`{}` failed ({status}); its last lines:\n{}\nwhole log: {}",
            short(command),
            tail(log, 15),
            log.display()
        );
    }
    Ok(())
}

/// Runs a command with all output appended to `log`.
pub fn run(command: &mut Command, log: &Path) -> Result<()> {
    run_lines(command, log, |_| ())
}

/// Runs a command with all output appended to `log`; ends it when its time is up.
pub fn run_limited(command: &mut Command, log: &Path, limit: Duration) -> Result<()> {
    let (done, wait) = mpsc::channel::<()>();
    let (tell, pid) = mpsc::channel();
    let guard = std::thread::spawn(move || {
        let Ok(pid) = pid.recv() else { return false };
        let late = wait.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            kill_group(pid);
        }
        late
    });
    let result = run_told(
        command,
        log,
        |_| (),
        |pid| {
            let _nobody_waits = tell.send(pid);
        },
    );
    drop(tell);
    drop(done);
    if guard.join().unwrap_or(false) {
        bail!(
            "time-out: waited {} s for `{}`; its last lines:\n{}",
            limit.as_secs(),
            short(command),
            tail(log, 10)
        );
    }
    result
}

/// Runs a command with our own terminal.
pub fn run_attached(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", short(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", display(command));
    }
    Ok(())
}

/// Runs a command and returns what it prints.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", short(command)))?;
    if !out.status.success() {
        bail!(
            "`{}` failed ({}): {}",
            display(command),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn short(command: &Command) -> String {
    let text = display(command);
    if text.chars().count() > 160 {
        text.chars().take(157).chain("...".chars()).collect()
    } else {
        text
    }
}

/// The last `lines` lines of a file, indented.
pub fn tail(path: &Path, lines: usize) -> String {
    let Ok(data) = fs::read(path) else { return String::new() };
    let text = String::from_utf8_lossy(&data);
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.iter().skip(from).map(|l| format!("    {l}")).collect::<Vec<_>>().join("\n")
}

/// True if `program` is in the search path.
pub fn have(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(program).is_file()))
}

/// Creates a file with the given text, with a useful error.
pub fn write(path: &Path, data: impl AsRef<[u8]>) -> Result<()> {
    let mut file =
        File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(data.as_ref()).with_context(|| format!("cannot write {}", path.display()))
}
