// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole distribution as guest (docs/guests.md): Debian on an encrypted disk whose key is the
//! monitor's for that VM, with Redis, to which this is the client.

use crate::attacker::Via;
use crate::guest::{Guest, QEMU, RUN};
use crate::jobs::{End, Job};
use crate::out;
use havmsi_proto::json::Object;
use havmsi_proto::{PAGE_WORDS, Seed};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The disk with the guest's files, where it is mounted, and the guest's own disk.
const FILES: &str = "/dev/vdc";
pub const PLACE: &str = "/mnt";
const DISK: &str = "/dev/vdd";
/// A line of the initramfs's `/init`, of which another image changes one byte.
const COMMENT: &[u8] = b"# The measured half";
const PORT: u16 = 6379;
const BOOT: Duration = Duration::from_secs(900);
const ANSWER: Duration = Duration::from_secs(120);
const KEYS: usize = 2000;
const VALUE: usize = 1024;

/// A page of memory.
#[repr(C, align(4096))]
struct Page([u64; PAGE_WORDS]);

/// A connection to Redis, and what went through it.
struct Redis {
    stream: BufReader<TcpStream>,
    requests: u64,
    bytes: u64,
}

/// What Redis answers.
#[derive(Debug, PartialEq)]
enum Reply {
    Text(Vec<u8>),
    Nothing,
    List(Vec<Reply>),
}

impl Reply {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => String::from_utf8_lossy(text).into_owned(),
            Self::Nothing => String::new(),
            Self::List(all) => all.iter().map(Self::text).collect::<Vec<_>>().join(" "),
        }
    }
}

impl Redis {
    fn connect() -> Result<Self, String> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT));
        let stream = stream.map_err(|e| format!("redis: {e}"))?;
        stream.set_read_timeout(Some(ANSWER)).map_err(|e| e.to_string())?;
        Ok(Self { stream: BufReader::new(stream), requests: 0, bytes: 0 })
    }

    fn send(&mut self, words: &[&[u8]]) -> Result<(), String> {
        let mut text = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            text.extend(format!("${}\r\n", word.len()).bytes());
            text.extend_from_slice(word);
            text.extend(b"\r\n");
        }
        self.requests += 1;
        self.bytes += text.len() as u64;
        self.stream.get_mut().write_all(&text).map_err(|e| format!("redis: {e}"))
    }

    fn reply(&mut self) -> Result<Reply, String> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).map_err(|e| format!("redis: {e}"))?;
        self.bytes += read as u64;
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).ok_or("redis closed the connection")?;
        let number = || rest.parse::<i64>().map_err(|e| format!("redis: {line:?}: {e}"));
        match kind {
            "+" | ":" => Ok(Reply::Text(rest.into())),
            "$" | "*" => match (kind, usize::try_from(number()?)) {
                (_, Err(_)) => Ok(Reply::Nothing),
                ("$", Ok(length)) => {
                    let mut text = vec![0; length + 2];
                    self.stream.read_exact(&mut text).map_err(|e| format!("redis: {e}"))?;
                    self.bytes += text.len() as u64;
                    text.truncate(length);
                    Ok(Reply::Text(text))
                }
                (_, Ok(length)) => {
                    (0..length).map(|_| self.reply()).collect::<Result<_, _>>().map(Reply::List)
                }
            },
            _ => Err(format!("redis: {line}")),
        }
    }

    fn ask(&mut self, words: &[&str]) -> Result<Reply, String> {
        self.send(&words.iter().map(|w| w.as_bytes()).collect::<Vec<_>>())?;
        self.reply()
    }

    /// Has the guest do something.
    fn order(&mut self, what: &str) -> Result<(), String> {
        self.ask(&["RPUSH", "todo", what]).map(drop)
    }

    /// The same, and gives the answer.
    fn exercise(&mut self, what: &str) -> Result<String, String> {
        self.order(what)?;
        match self.ask(&["BLPOP", "done", "100"])? {
            Reply::List(list) => Ok(list.last().map(Reply::text).unwrap_or_default()),
            other => Err(format!("the guest did not answer to {what}: {other:?}")),
        }
    }
}

fn key(n: usize) -> String {
    format!("key:{n}")
}

/// A value that tells of its key.
fn value(n: usize) -> Vec<u8> {
    format!("{n} havmsi-plaintext-marker ").into_bytes().into_iter().cycle().take(VALUE).collect()
}

/// Sets all values, if asked to, and reads them back; how many were wrong.
fn values(redis: &mut Redis, set: bool) -> Result<usize, String> {
    const BATCH: usize = 100;
    let mut wrong = 0;
    for first in (0..KEYS).step_by(BATCH) {
        let batch = first..first + BATCH;
        if set {
            for n in batch.clone() {
                redis.send(&[b"SET", key(n).as_bytes(), &value(n)])?;
            }
            for _ in batch.clone() {
                wrong += usize::from(redis.reply()? != Reply::Text(b"OK".into()));
            }
        }
        for n in batch.clone() {
            redis.send(&[b"GET", key(n).as_bytes()])?;
        }
        for n in batch {
            wrong += usize::from(redis.reply()? != Reply::Text(value(n)));
        }
    }
    Ok(wrong)
}

/// Seconds that the guest's clock differs from the host's.
fn clock(redis: &mut Redis) -> Result<u64, String> {
    let Reply::List(time) = redis.ask(&["TIME"])? else { return Err("redis: no time".to_owned()) };
    let seconds = time.first().map(Reply::text).and_then(|t| t.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|e| e.to_string())?;
    Ok(seconds.ok_or("redis: no time")?.abs_diff(now.as_secs()))
}

fn busybox(words: &[&str]) -> Result<(), String> {
    let status = Command::new("/bin/busybox").args(words).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("busybox {}: {other:?}", words.join(" "))),
    }
}

fn start(job: &Job<'_>, index: usize, initramfs: &str) -> Result<Guest, String> {
    let machine =
        format!("virt,gic-version={},dtb-randomness=off{}", job.params.gic, job.params.machine);
    let mut command = Command::new(RUN);
    command.args(["--pool", "16", QEMU, "-M", &machine, "-accel", "kvm", "-cpu", "host"]);
    command.args(["-smp", "4", "-m", &job.params.gmem.to_string()]);
    command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
    command.args(["-kernel", "/havmsi/Image", "-initrd", initramfs]);
    command.args(["-append", "console=ttyAMA0 quiet loglevel=1 panic=-1"]);
    for (id, file, more) in
        [("disk", DISK, "cache=none"), ("archive", "/mnt/root.tar.zst", "readonly=on")]
    {
        command.args(["-drive", &format!("if=none,id={id},format=raw,file={file},{more}")]);
        command.args(["-device", &format!("virtio-blk-pci,drive={id},disable-legacy=on")]);
    }
    let net = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{PORT}-10.0.2.15:{PORT}");
    command.args(["-netdev", &net]);
    command.args(["-device", "virtio-net-pci,netdev=net,romfile=,disable-legacy=on"]);
    command.args(["-device", "virtio-rng-pci,disable-legacy=on"]);
    Guest::spawn(index, command)
}

/// The last line of the guest that begins with this word.
fn said(guest: &Guest, word: &str) -> Option<String> {
    guest.with(|s| {
        let mut lines = s.debian.iter().rev();
        lines.find_map(|l| l.strip_prefix(word)?.strip_prefix(' ').map(str::to_owned))
    })
}

/// Waits for the `n`th line that begins with this word.
fn wait(guest: &Guest, word: &str, n: u64, limit: Duration) -> Result<(), String> {
    out::progress("debian", 0, 1, &format!("waiting for `{word}`"));
    let is = |l: &&String| l.split(' ').next() == Some(word);
    if guest.wait(limit, |s| {
        s.debian.iter().filter(is).count() as u64 >= n
            || s.debian.iter().any(|l| l.starts_with("fail"))
    }) && said(guest, "fail").is_none()
    {
        return Ok(());
    }
    let (ended, last) = guest.with(|s| (s.ended, s.last.clone()));
    let why = said(guest, "fail").unwrap_or(last);
    Err(format!("the guest never said `{word}` (ended: {ended}): {why:?}"))
}

/// Mounts what the host has on a disk of its own.
pub fn mount() -> Result<(), String> {
    busybox(&["mount", "-t", "ext2", "-o", "ro", FILES, PLACE])
}

fn prepare() -> Result<(), String> {
    // QEMU's user network listens there.
    busybox(&["ifconfig", "lo", "up"])?;
    mount()
}

fn up(guest: &Guest, boot: u64) -> Result<Redis, String> {
    wait(guest, "key", boot, BOOT)?;
    wait(guest, "disk", boot, BOOT)?;
    wait(guest, "up", boot, BOOT)?;
    if !guest.wait(ANSWER, |s| s.boots >= boot && s.verdict.is_some()) {
        return Err("the guest's witness did not speak".to_owned());
    }
    if let Some(v) = guest.with(|s| s.verdict.clone()).filter(|v| !v.ok || v.vcpus != 4) {
        return Err(format!("the guest's witness: {v:?}"));
    }
    Redis::connect()
}

/// An image of which one byte is another.
fn other_image() -> Result<&'static str, String> {
    const PATH: &str = "/tmp/other.cpio";
    let mut bytes = std::fs::read("/mnt/initramfs.cpio").map_err(|e| format!("initramfs: {e}"))?;
    let at = bytes
        .windows(COMMENT.len())
        .position(|w| w == COMMENT)
        .ok_or("no comment in the initramfs")?;
    bytes[at + COMMENT.len() - 1] = b'F';
    std::fs::write(PATH, bytes).map_err(|e| format!("{PATH}: {e}"))?;
    Ok(PATH)
}

/// A guest that comes up, or that does not get its disk: how it went, and which key it has.
fn attempt(job: &Job<'_>, index: usize, initramfs: &str) -> Result<(String, String), String> {
    let mut guest = start(job, index, initramfs)?;
    wait(&guest, "key", 1, BOOT)?;
    let key = said(&guest, "key").unwrap_or_default();
    let is = |l: &String| l.starts_with("fail") || l.starts_with("disk");
    if !guest.wait(BOOT, |s| s.debian.iter().any(is)) {
        return Err("the guest said nothing of its disk".to_owned());
    }
    let outcome = match said(&guest, "fail") {
        Some(why) => {
            guest.finish(ANSWER);
            why
        }
        None => {
            let mut redis = up(&guest, 1)?;
            let wrong = values(&mut redis, false)?;
            redis.order("poweroff")?;
            guest.finish(ANSWER);
            format!("opened, {wrong} values wrong")
        }
    };
    Ok((outcome, key))
}

/// `job=debian`: the guest's first boot and what it is for; a reboot; another image.
pub fn run(job: &Job<'_>) -> End {
    let attacker = job.attacker.ok_or("the attacker module is not there")?;
    let begin = Instant::now();
    prepare()?;
    let mut guest = start(job, 0, "/mnt/initramfs.cpio")?;
    let mut redis = up(&guest, 1)?;
    guest.identify(attacker);
    let first = said(&guest, "key").unwrap_or_default();
    let booted = begin.elapsed().as_secs();
    let mut wrong = Vec::new();
    let mut check = |what: &str, found: String, good: bool| {
        out::progress("check", 0, 0, &format!("{what}: {found}"));
        if !good {
            wrong.push(format!("{what}: {found}"));
        }
    };
    let state = redis.exercise("state")?;
    check("state", state.clone(), state.starts_with("running"));
    let lost = values(&mut redis, true)?;
    check("values", format!("{lost} wrong"), lost == 0);
    let seconds_off = clock(&mut redis)?;
    check("clock", format!("{seconds_off} s off"), seconds_off <= 10);
    let mut plugged = 0;
    for (what, wanted) in
        [("offline", "0-2"), ("online", "0-3"), ("offline", "0-2"), ("online", "0-3")]
    {
        let found = redis.exercise(what)?;
        plugged += u64::from(what == "online" && found == wanted);
        check(what, found.clone(), found == wanted);
    }
    // rtcwake's status, seconds, how often the kernel suspended.
    let suspended = redis.exercise("suspend")?;
    let words: Vec<&str> = suspended.split(' ').collect();
    let slept = words.get(1).and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
    check(
        "suspend",
        suspended.clone(),
        words.first() == Some(&"0") && words.get(2) == Some(&"1") && slept >= 4,
    );
    let seconds_off = seconds_off.max(clock(&mut redis)?);
    check("clock", format!("{seconds_off} s off"), seconds_off <= 10);
    let seed = guest.with(|s| s.seed).ok_or("no seed")?;
    // A page of a stream of the host's own shows that the scan finds what there is.
    let own = Seed([1, 2, 3, seed.0[3] ^ 1]);
    let mut page = Box::new(Page([0; PAGE_WORDS]));
    page.0.iter_mut().zip(own.words(0)).for_each(|(to, word)| *to = word);
    let scan = attacker.scan(&[seed, own], Via::Linear).map_err(|e| format!("scan: {e}"))?;
    let seen = |at: usize| scan.hits[at].whole + scan.hits[at].partial;
    check(
        "scan",
        format!("{} pages of the guest's, {} of the host's own", seen(0), seen(1)),
        seen(0) == 0 || !job.monitor,
    );
    check("scan of the host's own", format!("{} pages", seen(1)), seen(1) > 0);
    drop(page);
    redis.order("reboot")?;
    let (mut requests, mut bytes) = (redis.requests, redis.bytes);
    let mut redis = up(&guest, 2)?;
    let second = said(&guest, "key").unwrap_or_default();
    check(
        "key after the reboot",
        format!("{first} {second}"),
        first == second && !first.is_empty(),
    );
    let kept = guest.with(|s| s.seed) == Some(seed);
    check("the witness's stream after the reboot", format!("the same: {kept}"), kept);
    let lost = values(&mut redis, false)?;
    check("values after the reboot", format!("{lost} wrong"), lost == 0);
    let again = values(&mut redis, true)?;
    check("values", format!("{again} wrong"), again == 0);
    redis.order("poweroff")?;
    check("end", "QEMU".to_owned(), guest.finish(ANSWER));
    requests += redis.requests;
    bytes += redis.bytes;
    let (refusal, other) = attempt(job, 1, other_image()?)?;
    check("another image", refusal.clone(), refusal.contains("another VM's"));
    check("another image's key", format!("{first} {other}"), other != first && !other.is_empty());
    out::event(
        Object::event("debian")
            .text("version", &said(&guest, "root").unwrap_or_default())
            .text("key", &first)
            .text("key_after_reboot", &second)
            .text("key_of_other_image", &other)
            .text("other_image", &refusal)
            .value("first_boot_s", booted)
            .value("requests", requests)
            .value("bytes", bytes)
            .value("values", KEYS)
            .value("reboots", guest.with(|s| s.boots).saturating_sub(1))
            .value("cpus_hotplugged", plugged)
            .value("suspended_s", slept)
            .value("clock_off_s", seconds_off)
            .value("pages_seen", seen(0))
            .value("pages_scanned", scan.pages)
            .text("seed", &seed.to_hex()),
    );
    if wrong.is_empty() {
        Ok(format!("Debian served {requests} requests, {bytes} bytes"))
    } else {
        Err(wrong.join("; "))
    }
}

/// `job=debian-again`: does the guest get its disk on this machine?
pub fn again(job: &Job<'_>) -> End {
    prepare()?;
    let (outcome, key) = attempt(job, 0, "/mnt/initramfs.cpio")?;
    out::event(Object::event("debian").text("key", &key).text("outcome", &outcome));
    Ok(outcome)
}
