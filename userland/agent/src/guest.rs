// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest: a QEMU process and what its console says.

use crate::attacker::Attacker;
use crate::hugepages;
use crate::operate;
use crate::out;
use crate::params::Params;
use crate::sys;
use havmsi_proto::json::{Object, field, hex_list, number};
use havmsi_proto::{GUEST_PREFIX, Seed};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub const QEMU: &str = "/usr/bin/qemu-system-aarch64";
/// Puts a pool for transfers into the guest's device tree.
pub const RUN: &str = "/havmsi/run";
/// MiB of that pool.
pub const POOL_MIB: u64 = 16;
/// The host's disk that guests use, each a part of its own, past the host's page cache.
const DISK: &str = "/dev/vdb";
const DISK_PART: u64 = 16 << 20;
/// What a distribution's own lines begin with.
const DEBIAN_PREFIX: &str = "@debian ";
/// What the host answers on a guest's second console.
pub const GREETING: &str = "it is I, the host";
/// Where QEMU's `virt` machine has its RAM.
pub const RAM: u64 = 0x4000_0000;

/// A change that a guest noticed.
#[derive(Clone, Debug)]
pub struct Corrupt {
    /// `page`, `reg`, `fp`, `calc`.
    pub what: String,
    /// Which page.
    pub page: u64,
    /// Its first two words.
    pub words: [u64; 2],
}

/// What a guest said at its end.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub ok: bool,
    pub vcpus: u64,
    pub verified_mib: u64,
    pub rounds: u64,
    pub corrupt: u64,
    pub text: String,
}

/// What went through a guest's devices and came back.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    pub disk_kib: u64,
    pub net_kib: u64,
    pub random: u64,
    pub console: String,
}

/// What its console has said so far.
#[derive(Default)]
pub struct State {
    pub boots: u64,
    pub vcpus: u64,
    pub seed: Option<Seed>,
    pub targets: Vec<u64>,
    pub public: Option<Seed>,
    pub devices: Option<Devices>,
    pub corrupt: Vec<Corrupt>,
    pub verdict: Option<Verdict>,
    pub old: Option<String>,
    pub ended: bool,
    pub last: String,
    /// What a distribution said, from its initramfs on.
    pub debian: Vec<String>,
}

type Shared = Arc<(Mutex<State>, Condvar)>;

/// A running guest.
pub struct Guest {
    pub index: usize,
    child: Child,
    stdin: Option<ChildStdin>,
    shared: Shared,
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn take(&mut self, index: usize, object: &str) {
        match field(object, "event").unwrap_or_default() {
            "boot" => {
                self.boots += 1;
                self.verdict = None;
                self.vcpus = number(object, "vcpus").unwrap_or(0);
            }
            "seed" => {
                self.seed = field(object, "seed").and_then(Seed::from_hex);
                self.targets = hex_list(object, "targets").unwrap_or_default();
                out::event(
                    Object::event("seed")
                        .value("index", index)
                        .text("seed", field(object, "seed").unwrap_or_default())
                        .value("vcpus", self.vcpus)
                        .value("boot", self.boots),
                );
            }
            "corrupt" => self.corrupt.push(Corrupt {
                what: field(object, "what").unwrap_or_default().to_owned(),
                page: number(object, "page").unwrap_or(u64::MAX),
                words: ["w0", "w1"].map(|w| number(object, w).unwrap_or(0)),
            }),
            "public" => self.public = field(object, "seed").and_then(Seed::from_hex),
            "devices" => {
                let n = |key| number(object, key).unwrap_or(0);
                self.devices = Some(Devices {
                    disk_kib: n("disk_kib"),
                    net_kib: n("net_kib"),
                    random: n("random"),
                    console: field(object, "console").unwrap_or_default().to_owned(),
                });
            }
            "old" => self.old = Some(object.to_owned()),
            "verdict" => {
                let n = |key| number(object, key).unwrap_or(0);
                self.verdict = Some(Verdict {
                    ok: field(object, "ok") == Some("true"),
                    vcpus: n("vcpus"),
                    verified_mib: n("verified_mib"),
                    rounds: n("rounds"),
                    corrupt: n("corrupt"),
                    text: field(object, "text").unwrap_or_default().to_owned(),
                });
            }
            _ => {}
        }
    }
}

/// Forwards a console to the host's, and takes the workload's lines to heart.
fn listen(index: usize, from: impl Read, shared: &Shared) {
    let mut from = BufReader::new(from);
    let mut raw = Vec::new();
    while matches!(from.read_until(b'\n', &mut raw), Ok(n) if n > 0) {
        let text = String::from_utf8_lossy(&raw);
        let text = text.trim_end_matches(['\r', '\n']);
        if !text.is_empty() {
            out::line(&format!("@g{index} {text}"));
            let mut state = lock(shared);
            text.clone_into(&mut state.last);
            if let Some((_, object)) = text.split_once(GUEST_PREFIX) {
                state.take(index, object);
            } else if let Some((_, said)) = text.split_once(DEBIAN_PREFIX) {
                state.debian.push(said.to_owned());
            }
            shared.1.notify_all();
        }
        raw.clear();
    }
}

/// QEMU with a disk, a network that only echoes, a random source and a second console, all of
/// them virtio, by way of the program that tells the guest which memory to share.
fn with_devices(index: usize) -> Result<Command, String> {
    let console = |end| format!("/tmp/console{index}.{end}");
    let greeting = std::fs::write(console("in"), format!("{GREETING}\n"));
    greeting.map_err(|e| format!("{}: {e}", console("in")))?;
    let place = index as u64 * DISK_PART;
    let disk = format!(
        "if=none,id=disk,format=raw,cache=none,offset={place},size={DISK_PART},file={DISK},file.locking=off"
    );
    let mut command = Command::new(RUN);
    command.args(["--pool", &POOL_MIB.to_string(), QEMU]);
    command.args(["-drive", &disk, "-device", "virtio-blk-pci,drive=disk,disable-legacy=on"]);
    let echo = "user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:/bin/busybox cat";
    command.args(["-netdev", echo]);
    command.args(["-device", "virtio-net-pci,netdev=net,romfile=,disable-legacy=on"]);
    command.args(["-device", "virtio-rng-pci,disable-legacy=on"]);
    command.args(["-device", "virtio-serial-pci,disable-legacy=on"]);
    let ends = format!("file,id=console,path={},input-path={}", console("out"), console("in"));
    command.args(["-chardev", &ends, "-device", "virtconsole,chardev=console"]);
    Ok(command)
}

/// What a guest has said on its second console.
pub fn said(index: usize) -> String {
    std::fs::read_to_string(format!("/tmp/console{index}.out")).unwrap_or_default()
}

impl Guest {
    /// Starts QEMU.
    pub fn start(index: usize, params: &Params, mode: &str) -> Result<Self, String> {
        let machine =
            format!("virt,gic-version={},dtb-randomness=off{}", params.gic, params.machine);
        let mut command = if mode == "devices" { with_devices(index)? } else { Command::new(QEMU) };
        command
            .args(["-M", &machine, "-accel", "kvm", "-cpu", "host"])
            .args(["-smp", &params.vcpus.to_string(), "-m", &params.gmem.to_string()])
            .args(["-nic", "none", "-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args(["-kernel", &params.kernel, "-initrd", "/havmsi/guest.cpio.gz"])
            .args(["-append", &params.guest_cmdline(mode, params.seconds)]);
        if mode != "reboot" {
            command.arg("-no-reboot");
        }
        if params.thp == "hugetlb" {
            command.args(["-mem-path", hugepages::FOLDER]);
        }
        if params.job == "operate" {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", operate::socket(index))]);
        }
        if params.job == "memlock" {
            // Root may lock what it likes.
            command.args(["-run-with", "user=1:1"]);
        }
        Self::spawn(index, command)
    }

    /// Starts this QEMU, whose standard output is the guest's console.
    pub fn spawn(index: usize, mut command: Command) -> Result<Self, String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("{QEMU}: {e}"))?;
        let shared = Shared::default();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        if let Some(stdout) = stdout {
            let shared = shared.clone();
            std::thread::spawn(move || {
                listen(index, stdout, &shared);
                lock(&shared).ended = true;
                shared.1.notify_all();
            });
        }
        if let Some(stderr) = stderr {
            let shared = shared.clone();
            std::thread::spawn(move || listen(index, stderr, &shared));
        }
        let stdin = child.stdin.take();
        out::event(
            Object::event("guest").value("index", index).value("pid", child.id()).text("vm", ""),
        );
        Ok(Self { index, child, stdin, shared })
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says which VM of the monitor's this guest is, if the kernel knows.
    pub fn identify(&self, attacker: &Attacker) {
        let vm = self.descriptors("kvm-vm").into_iter().next();
        let vm = vm.and_then(|vm| attacker.vm(vm.as_fd()).ok());
        if let Some(vm) = vm.filter(|vm| vm.handle != 0) {
            let object = Object::event("guest").value("index", self.index);
            out::event(object.value("pid", self.pid()).hex("vm", vm.handle));
        }
    }

    fn signal(&self, signal: i32) {
        if let Ok(pid) = i32::try_from(self.pid()) {
            // A process that has ended needs no signal.
            let _ = sys::kill(pid, signal);
        }
    }

    /// Looks at the state.
    pub fn with<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        f(&lock(&self.shared))
    }

    /// Waits until the state is so; false when the guest ended or the time is over before.
    pub fn wait(&self, limit: Duration, is: impl Fn(&State) -> bool) -> bool {
        let end = Instant::now() + limit;
        let mut state = lock(&self.shared);
        loop {
            if is(&state) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return false;
            }
            state =
                self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Says a line to the guest.
    pub fn say(&mut self, text: &str) {
        if let Some(stdin) = &mut self.stdin {
            // A guest that has ended doesn't listen.
            let _ = stdin.write_all(format!("{text}\n").as_bytes());
            let _ = stdin.flush();
        }
    }

    /// Waits for QEMU to end; after the limit it is killed, and the answer is false.
    pub fn finish(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Ok(Some(_)) = self.child.try_wait() {
                self.wait(Duration::from_secs(2), |s| s.ended);
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.signal(libc::SIGCONT);
        // Ended in between: nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
        false
    }

    /// Our copies of descriptors whose link begins so.
    pub fn descriptors(&self, kind: &str) -> Vec<OwnedFd> {
        let folder = format!("/proc/{}/fd", self.pid());
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let mut found: Vec<(String, i32)> = entries
            .flatten()
            .filter_map(|entry| {
                let link = std::fs::read_link(entry.path()).ok()?;
                let link = link.to_str()?.strip_prefix("anon_inode:")?.to_owned();
                let number = entry.file_name().to_str()?.parse().ok()?;
                (link == kind || link.starts_with(&format!("{kind}:"))).then_some((link, number))
            })
            .collect();
        found.sort();
        found.iter().filter_map(|(_, fd)| sys::take_fd(self.pid(), *fd).ok()).collect()
    }

    /// Stops QEMU with all its vCPUs out of KVM, does something, and lets it go on.
    pub fn while_stopped<T>(&self, f: impl FnOnce() -> T) -> T {
        self.signal(libc::SIGSTOP);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && !self.is_stopped() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let result = f();
        self.signal(libc::SIGCONT);
        result
    }

    fn is_stopped(&self) -> bool {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", self.pid())) else {
            return true;
        };
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'))
        })
    }

    /// Where QEMU maps the guest's RAM: the mapping that has its size.
    pub fn ram(&self, mib: u64) -> Option<u64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).ok()?;
        maps.lines().find_map(|line| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let end = u64::from_str_radix(end, 16).ok()?;
            (end - start == mib << 20).then_some(start)
        })
    }
}
