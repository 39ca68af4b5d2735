// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the agent can be asked to do.

use crate::attacker::{Attacker, Via};
use crate::guest::{self, Guest};
use crate::params::Params;
use crate::{checks, debian, hugepages, io, operate, out, overcommit, sys};
use havmsi_abi::Function;
use havmsi_operations::mark;
use havmsi_proto::Seed;
use havmsi_proto::json::{Object, number};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub const BOOT: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(60);
/// The number of the guest that is started when all attacks are over.
const LATER: usize = 9;

/// What a job works with.
pub struct Job<'a> {
    pub params: &'a Params,
    pub attacker: Option<&'a Attacker>,
    pub monitor: bool,
}

/// A job's end: a sentence, good or bad.
pub type End = Result<String, String>;

impl Job<'_> {
    /// Does what the parameters ask for.
    pub fn run(&self) -> End {
        if self.params.kernel.starts_with(debian::PLACE) {
            debian::mount()?;
        }
        match self.params.job.as_str() {
            "run" | "attack" => self.main(),
            "smp4" | "boot" => self.work(),
            "reboot" => self.reboot(),
            "rounds" => self.rounds(),
            "hotplug" => self.hotplug(),
            "memlock" => self.memlock(),
            "overcommit" => self.overcommit(),
            "hugepages" => self.hugepages(),
            "io" => self.io(),
            "devices" => self.devices(),
            "operate" => operate::job(self),
            "bench" => self.bench(),
            "applications" => self.applications(),
            "debian" => debian::run(self),
            "debian-again" => debian::again(self),
            "shell" => shell(),
            _ => Ok("looked around".to_owned()),
        }
    }

    fn guests(&self) -> u64 {
        if self.params.job == "smp4" { 1 } else { self.params.guests }
    }

    /// Starts the guests and waits until each has given its seed.
    fn start(&self, mode: &str) -> Result<Vec<Guest>, String> {
        self.start_as(&vec![mode; usize::try_from(self.guests()).unwrap_or(1)])
    }

    /// The same with a mode for each.
    pub fn start_as(&self, modes: &[&str]) -> Result<Vec<Guest>, String> {
        let count = modes.len();
        let guests: Vec<Guest> = (0..)
            .zip(modes)
            .map(|(i, mode)| Guest::start(i, self.params, mode))
            .collect::<Result<_, _>>()?;
        for (done, guest) in guests.iter().enumerate() {
            out::progress("seeds", done, count, "waiting for the guests' seeds");
            if !guest.wait(self.patience(BOOT), |s| s.seed.is_some()) {
                return Err(self.no_seed(guest));
            }
        }
        out::progress("seeds", count, count, "all guests have given their seeds");
        if let Some(attacker) = self.attacker {
            guests.iter().for_each(|guest| guest.identify(attacker));
        }
        Ok(guests)
    }

    /// Guests that are swapped, or fill a gigabyte, take their time.
    fn patience(&self, limit: Duration) -> Duration {
        if ["overcommit", "hugepages"].contains(&self.params.job.as_str()) {
            10 * limit
        } else {
            limit
        }
    }

    fn no_seed(&self, guest: &Guest) -> String {
        let (ended, last) = guest.with(|s| (s.ended, s.last.clone()));
        let what = if ended { "ended" } else { "gave no seed in time" };
        format!("guest {} {what}; its last line: {last:?}", guest.index)
    }

    /// Has the guests finish; whether each gave a good verdict, and what was wrong.
    pub fn finish(&self, guests: &mut [Guest]) -> Result<(), String> {
        let count = guests.len();
        let mut wrong = Vec::new();
        for guest in guests.iter_mut() {
            guest.say("stop");
        }
        for (done, guest) in guests.iter_mut().enumerate() {
            out::progress("finish", done, count, "waiting for the guests' verdicts");
            // Without the monitor the attacks may have killed it.
            let limit = self.patience(if self.monitor { END } else { END / 4 });
            let spoke = guest.wait(limit, |s| s.verdict.is_some());
            let ended = guest.finish(limit);
            let (verdict, boots, seed) = guest.with(|s| (s.verdict.clone(), s.boots, s.seed));
            let mut object = Object::event("verdict")
                .value("index", guest.index)
                .value("booted", boots > 0 && seed.is_some());
            let mut text = String::new();
            match &verdict {
                Some(v) => {
                    object = object
                        .value("ok", v.ok && ended)
                        .value("vcpus", v.vcpus)
                        .value("verified_mib", v.verified_mib)
                        .value("rounds", v.rounds)
                        .value("corrupt", v.corrupt);
                    v.text.clone_into(&mut text);
                    if !v.ok {
                        wrong.push(format!(
                            "guest {} found {} changes {}",
                            guest.index, v.corrupt, v.text
                        ));
                    } else if v.vcpus != self.params.vcpus {
                        wrong.push(format!("guest {} had {} vCPUs", guest.index, v.vcpus));
                    }
                }
                None => {
                    object = object.value("ok", false);
                    let last = guest.with(|s| s.last.clone());
                    text = format!("no verdict; last line: {last}");
                    wrong.push(format!("guest {}: no verdict", guest.index));
                }
            }
            if spoke && !ended {
                "QEMU did not end".clone_into(&mut text);
                wrong.push(format!("guest {}: QEMU did not end after the power-off", guest.index));
            }
            out::event(object.text("text", &text));
        }
        out::progress("finish", count, count, "all guests ended");
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }

    fn main(&self) -> End {
        let attacker = self.attacker.ok_or("the attacker module is not there")?;
        let mut guests = self.start("work")?;
        let failed = checks::run(self.params, attacker, &guests);
        let seeds: Vec<Seed> = guests.iter().filter_map(|g| g.with(|s| s.seed)).collect();
        let verdicts = self.finish(&mut guests);
        drop(guests);
        let scanned = checks::dead_scan(self.params, attacker, &seeds);
        if self.params.job == "attack" {
            self.later();
        }
        let failed = failed?;
        if !failed.is_empty() || !scanned {
            return Err(format!("checks that could not be carried out: {}", failed.join(", ")));
        }
        // Without the monitor the guests' memory was changed under them: that is the finding.
        if self.monitor {
            verdicts?;
        }
        Ok("all checks were carried out".to_owned())
    }

    /// After all attacks: one more guest with a whole kernel, from its start to its verdict.
    fn later(&self) {
        let guest = self.start_one();
        let result = guest.and_then(|mut guest| self.finish(std::slice::from_mut(&mut guest)));
        let text = result.as_ref().err().map_or("", String::as_str);
        out::event(Object::event("later").value("ok", result.is_ok()).text("text", text));
    }

    fn start_one(&self) -> Result<Guest, String> {
        let guest = Guest::start(LATER, self.params, "work")?;
        if guest.wait(BOOT, |s| s.seed.is_some()) { Ok(guest) } else { Err(self.no_seed(&guest)) }
    }

    fn work(&self) -> End {
        let mut guests = self.start("work")?;
        let seconds = if self.params.job == "boot" { 3 } else { 5 };
        std::thread::sleep(Duration::from_secs(seconds));
        self.finish(&mut guests)?;
        Ok("all guests verified their memory".to_owned())
    }

    fn reboot(&self) -> End {
        let mut guest = Guest::start(0, self.params, "reboot")?;
        if !guest.wait(BOOT, |s| s.boots == 1) {
            return Err(self.no_seed(&guest));
        }
        guest.say("go");
        if !guest.wait(BOOT, |s| s.boots == 2) {
            return Err("the guest did not boot a second time".to_owned());
        }
        let seed = guest.with(|s| s.seed).ok_or("no seed of the first boot")?;
        guest.say(&format!("prev {}", seed.to_hex()));
        if !guest.wait(BOOT, |s| s.old.is_some()) {
            return Err("the guest did not look for its old pages".to_owned());
        }
        let old = guest.with(|s| s.old.clone()).unwrap_or_default();
        let pages = number(&old, "pages");
        out::event(
            Object::event("reboot")
                .value("index", 0)
                .value("old_pages", pages.map_or("null".to_owned(), |p| p.to_string()))
                .value("scanned_mib", number(&old, "scanned_mib").unwrap_or(0)),
        );
        self.finish(std::slice::from_mut(&mut guest))?;
        let pages = pages.ok_or(format!("the guest could not look: {old}"))?;
        if self.monitor && pages > 0 {
            return Err(format!("{pages} pages of the first boot outlived the reset"));
        }
        Ok(format!("the guest rebooted; {pages} pages of its first boot were left"))
    }

    pub fn stats(&self, when: &str) -> Option<[u64; 6]> {
        let attacker = self.attacker.filter(|_| self.monitor)?;
        let x = attacker.smc(&[Function::Stats.id().into()]).ok()?;
        let stats = [x[1], x[2], x[3], x[4], x[5], x[6]];
        let names = ["vms", "vcpus", "private", "tables", "host", "shared"];
        let object = names
            .iter()
            .zip(stats)
            .fold(Object::event("stats").text("when", when), |o, (name, n)| o.value(name, n));
        out::event(object);
        Some(stats)
    }

    /// Whether STATS are again what they were: the kernel ends a VM a moment after its process.
    pub fn settled(&self, before: Option<[u64; 6]>) -> Result<(), String> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut after = self.stats("after");
        while before != after && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(500));
            after = self.stats("after");
        }
        if before == after {
            return Ok(());
        }
        Err(format!("STATS {before:?} before and {after:?} after"))
    }

    fn rounds(&self) -> End {
        let before = self.stats("before");
        let total = usize::try_from(self.params.rounds).unwrap_or(1);
        for round in 0..total {
            out::progress("round", round, total, "");
            let mut guests = self.start("work")?;
            std::thread::sleep(Duration::from_secs(1));
            self.finish(&mut guests).map_err(|e| format!("round {}: {e}", round + 1))?;
        }
        out::progress("round", total, total, "");
        self.settled(before).map_err(|e| format!("{e} {total} rounds"))?;
        if self.monitor && before.is_none() {
            return Err("no STATS (is the attacker module there?)".to_owned());
        }
        Ok(format!("{total} rounds"))
    }

    /// Guests come and go while the host uses its devices.
    fn io(&self) -> End {
        let stop = AtomicBool::new(false);
        let (done, guests) = std::thread::scope(|scope| {
            let io = scope.spawn(|| io::work(&stop));
            let guests = (0..2).try_for_each(|_| {
                let mut guests = self.start("work")?;
                self.finish(&mut guests)
            });
            stop.store(true, Ordering::Relaxed);
            (io.join(), guests)
        });
        let done = done.map_err(|_| "the thread that works with the devices died")??;
        out::event(
            Object::event("io").value("disk_mib", done.disk_mib).value("net_mib", done.net_mib),
        );
        guests?;
        Ok(format!(
            "{} MiB by disk and {} MiB by network came back as they were",
            done.disk_mib, done.net_mib
        ))
    }

    /// Guests use virtio devices, through memory that they share: the host finds what is there,
    /// and nothing else of theirs.
    fn devices(&self) -> End {
        let attacker = self.attacker.ok_or("the attacker module is not there")?;
        loopback()?;
        let before = self.stats("before");
        let mut wrong = Vec::new();
        if self.monitor {
            match checks::own_vmm("sharing") {
                Ok(checks::Found::Protected(how)) => out::progress("sharing", 1, 1, &how),
                Ok(checks::Found::Exposed(what) | checks::Found::Skipped(what)) | Err(what) => {
                    wrong.push(what);
                }
            }
        }
        let mut guests = self.start("devices")?;
        for guest in &guests {
            if !guest.wait(BOOT, |s| s.devices.is_some() || s.verdict.is_some()) {
                return Err(format!("guest {} has not used its devices", guest.index));
            }
        }
        std::thread::sleep(Duration::from_secs(3));
        let during = self.stats("during");
        let seeds = |public: bool| -> Vec<Seed> {
            let seed = |g: &Guest| g.with(|s| if public { s.public } else { s.seed });
            guests.iter().filter_map(seed).collect()
        };
        let (private, public) = (seeds(false), seeds(true));
        let mut all = private.clone();
        all.extend(&public);
        let scan = attacker.scan(&all, Via::Linear).map_err(|e| format!("scan: {e}"))?;
        let found = |at: usize| scan.hits[at].whole + scan.hits[at].partial;
        let secret: u64 = (0..private.len()).map(found).sum();
        let shared: Vec<u64> = (private.len()..all.len()).map(found).collect();
        for (guest, found) in guests.iter().zip(&shared) {
            let used = guest.with(|s| s.devices.clone()).unwrap_or_default();
            out::event(
                Object::event("devices")
                    .value("index", guest.index)
                    .value("disk_kib", used.disk_kib)
                    .value("net_kib", used.net_kib)
                    .value("random", used.random)
                    .text("console", &used.console)
                    .value("pages_seen", found),
            );
            let asked = guest::said(guest.index).contains("who is there?");
            if !asked || used.console != guest::GREETING || used.random == 0 {
                wrong.push(format!("guest {}: {used:?}, asked: {asked}", guest.index));
            }
        }
        let verdicts = self.finish(&mut guests);
        drop(guests);
        wrong.extend(verdicts.err());
        if shared.contains(&0) || public.len() != private.len() {
            wrong.push(format!("the scan sees {shared:?} pages of what is shared"));
        }
        if self.monitor {
            if secret > 0 {
                wrong.push(format!("the host finds {secret} pages that no guest shares"));
            }
            let pool = guest::POOL_MIB * 256 * private.len() as u64;
            if during.is_none_or(|s| s[5] < pool) {
                wrong.push(format!("{during:?}: fewer shared pages than the pools have"));
            }
            wrong.extend(self.settled(before).err());
        }
        if !wrong.is_empty() {
            return Err(wrong.join("; "));
        }
        Ok(format!(
            "of {} pages the host saw {shared:?} that are shared and {secret} that are not",
            scan.pages
        ))
    }

    fn hotplug(&self) -> End {
        let mut guests = self.start("work")?;
        let cpu = cpus() - 1;
        let mut wrong = Vec::new();
        for _ in 0..2 {
            for online in [false, true] {
                let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
                let result = std::fs::write(&path, if online { "1" } else { "0" });
                out::event(
                    Object::event("cpu")
                        .value("cpu", cpu)
                        .value("online", online)
                        .value("ok", result.is_ok()),
                );
                if let Err(e) = result {
                    wrong.push(format!("{path}: {e}"));
                }
                std::thread::sleep(Duration::from_secs(2));
            }
        }
        let verdicts = self.finish(&mut guests);
        if !wrong.is_empty() {
            return Err(wrong.join("; "));
        }
        verdicts?;
        Ok(format!("CPU {cpu} went and came back twice"))
    }

    /// The small VMM measures operations, each in a process of its own; its lines are for whoever
    /// reads the console. What a protected VM of pKVM can't do is told, and no failure.
    fn bench(&self) -> End {
        let kind = if self.params.protected { "protected" } else { "plain" };
        for name in self.params.operations.split(',') {
            let mut command = Command::new("/havmsi/vmm");
            command.arg("bench").arg(self.params.gic.to_string()).args([kind, name]);
            let out = command.stderr(Stdio::piped()).stdout(Stdio::inherit()).output();
            let out = out.map_err(|e| format!("/havmsi/vmm: {e}"))?;
            if out.status.success() {
                continue;
            }
            let said = String::from_utf8_lossy(&out.stderr).trim().replace('\n', "; ");
            let why = format!("{said} ({})", out.status);
            if !self.params.protected {
                return Err(format!("{name}: {why}"));
            }
            out::event(Object::event("failed").text("operation", name).text("text", &why));
        }
        Ok("measured".to_owned())
    }

    /// A Linux guest is measured, from QEMU's start on, by marks for QEMU's plugin.
    fn applications(&self) -> End {
        mark::put::<{ mark::NEXT }>();
        mark::put::<{ mark::START }>();
        let mut guest = Guest::start(0, self.params, "bench")?;
        let limit = Duration::from_secs(self.params.timeout);
        guest.wait(limit, |s| s.verdict.is_some());
        let ended = guest.finish(END);
        let (verdict, last) = guest.with(|s| (s.verdict.clone(), s.last.clone()));
        match verdict {
            Some(v) if v.ok && ended => Ok("measured".to_owned()),
            Some(v) => Err(format!("the guest: {} (QEMU ended: {ended})", v.text)),
            None => Err(format!("the guest gave no verdict; last line: {last}")),
        }
    }

    /// Guests have more memory than the host, which swaps, compacts and merges it meanwhile:
    /// each finds all of its own again, and the host sees none.
    fn overcommit(&self) -> End {
        let attacker = self.attacker.ok_or("the attacker module is not there")?;
        overcommit::prepare()?;
        let before = self.stats("before");
        let stop = AtomicBool::new(false);
        let (result, compacted) = std::thread::scope(|scope| {
            let churn = scope.spawn(|| overcommit::churn(&stop));
            let result = self.crowd(attacker);
            stop.store(true, Ordering::Relaxed);
            (result, churn.join())
        });
        let compacted = compacted.map_err(|_| "the thread that compacts died")?;
        let (clean, verdicts) = result?;
        let settled = self.settled(before);
        let counts = overcommit::Counts::read()?;
        out::event(counts.event().value("compacted", compacted).value("scan_clean", clean));
        verdicts?;
        if !clean || counts.refused != 0 || counts.unsealed < overcommit::ENOUGH {
            return Err(format!("scan clean: {clean}, {counts:?}"));
        }
        settled?;
        Ok(format!("{counts:?}"))
    }

    /// The guests of [`Self::overcommit`]: whether the scan was clean, and their verdicts.
    fn crowd(&self, attacker: &Attacker) -> Result<(bool, End), String> {
        let mut guests = self.start("work")?;
        // Before that the guests would compete with it for pages that are being filled.
        overcommit::scan()?;
        let end = Instant::now() + Duration::from_secs(self.params.seconds);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_secs(5));
            let counts = overcommit::Counts::read()?;
            if counts.unsealed >= overcommit::ENOUGH && counts.all_kinds() {
                break;
            }
            if guests.iter().any(|guest| guest.with(|s| s.ended)) {
                break;
            }
        }
        let seeds: Vec<Seed> = guests.iter().filter_map(|g| g.with(|s| s.seed)).collect();
        let scan = attacker.scan(&seeds, Via::Linear).map_err(|e| format!("scan: {e}"))?;
        let clean = scan.hits.iter().all(|hit| hit.whole + hit.partial == 0);
        let verdicts = self.finish(&mut guests);
        drop(guests);
        Ok((clean, verdicts.map(|()| String::new())))
    }

    /// A guest on pages of 4 KiB, on transparent huge pages and on hugetlbfs: how many calls
    /// each way takes to give it its memory.
    fn hugepages(&self) -> End {
        let mut event = Object::event("hugepages");
        let mut calls = Vec::new();
        for (name, thp) in [("small", "never"), ("thp", "always"), ("hugetlb", "hugetlb")] {
            hugepages::back(thp, self.params.gmem)?;
            let params = Params { thp: thp.to_owned(), ..self.params.clone() };
            let job = Job { params: &params, ..*self };
            let before = overcommit::page_calls()?;
            let mut guests = job.start("work")?;
            job.finish(&mut guests)?;
            let n = overcommit::page_calls()? - before;
            event = event.value(&format!("{name}_calls"), n);
            calls.push(n);
        }
        out::event(event);
        let [small, thp, hugetlb] = calls[..] else { return Err("a round is missing".to_owned()) };
        let said =
            format!("{small} calls for pages of 4 KiB, {thp} with THP, {hugetlb} with hugetlbfs");
        if 100 * thp.max(hugetlb) > small { Err(said) } else { Ok(said) }
    }

    /// A user's VMM need not be allowed to lock any of its guest's memory: none is pinned.
    fn memlock(&self) -> End {
        const LIMIT: u64 = 64 << 10;
        sys::limit_locked_memory(LIMIT).map_err(|e| format!("RLIMIT_MEMLOCK: {e}"))?;
        self.work()?;
        Ok(format!("with RLIMIT_MEMLOCK at {} KiB the guest verified its memory", LIMIT >> 10))
    }
}

/// QEMU talks to the echo of its user network by it.
pub fn loopback() -> Result<(), String> {
    let up = Command::new("/bin/busybox").args(["ifconfig", "lo", "up"]).status();
    if !up.map_err(|e| format!("busybox ifconfig: {e}"))?.success() {
        return Err("busybox ifconfig lo failed".to_owned());
    }
    Ok(())
}

/// CPUs that are online.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn shell() -> End {
    out::line("A shell on the host; `exit` powers the machine off.");
    // The root is read-only.
    let made = std::fs::create_dir_all("/tmp/bin");
    made.map_err(|e| format!("/tmp/bin: {e}"))?;
    let install = Command::new("/bin/busybox").args(["--install", "-s", "/tmp/bin"]).status();
    install.map_err(|e| format!("/bin/busybox: {e}"))?;
    let status = Command::new("/bin/busybox")
        .args(["setsid", "-c", "/bin/busybox", "sh", "-l"])
        .env("PATH", "/bin:/usr/bin:/tmp/bin:/havmsi")
        .env("HOME", "/")
        .env("PS1", "host# ")
        .status()
        .map_err(|e| format!("/bin/busybox: {e}"))?;
    Ok(format!("the shell ended with {status}"))
}
