// SPDX-License-Identifier: MIT OR Apache-2.0
//! What whoever runs the host finds: `havmsi`'s list and map beside what the monitor counts, and a
//! QEMU that is asked to do what a protected VM doesn't take part in.

use crate::attacker::Attacker;
use crate::guest::{self, Guest, RAM};
use crate::jobs::{BOOT, End, Job, loopback};
use crate::out;
use havmsi_proto::json::Object;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

const HAVMSI: &str = "/bin/havmsi";
const PAGE: u64 = 4096;
const STATES: [&str; 3] = ["private", "shared", "table"];

/// Where the QEMU of a guest takes orders.
pub fn socket(index: usize) -> String {
    format!("/tmp/qmp{index}")
}

/// Runs `havmsi`; its output, and its exit status.
fn run(words: &[&str]) -> Result<(String, i32), String> {
    let out = Command::new(HAVMSI).args(words).output().map_err(|e| format!("{HAVMSI}: {e}"))?;
    let said = String::from_utf8_lossy(&out.stderr);
    if !said.is_empty() {
        out::line(&format!("{HAVMSI} {}: {}", words.join(" "), said.trim()));
    }
    let status = out.status.code().ok_or_else(|| format!("{HAVMSI}: {}", out.status))?;
    Ok((String::from_utf8_lossy(&out.stdout).into_owned(), status))
}

/// The same, where it must succeed.
fn show(words: &[&str]) -> Result<String, String> {
    match run(words)? {
        (text, 0) => Ok(text),
        (_, status) => Err(format!("{HAVMSI} {}: exit status {status}", words.join(" "))),
    }
}

fn json(words: &[&str]) -> Result<(Value, String), String> {
    let text = show(words)?;
    let value = serde_json::from_str(&text).map_err(|e| format!("{HAVMSI} {words:?}: {e}"))?;
    Ok((value, text.trim().to_owned()))
}

fn items<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

fn hex(value: &Value) -> u64 {
    let digits = value.as_str().and_then(|text| text.strip_prefix("0x"));
    digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or(0)
}

/// A guest as those know it who don't ask `havmsi`.
struct Known {
    vm: u64,
    /// A page of it: where, and where for the guest.
    pa: u64,
    ipa: u64,
}

impl Known {
    fn new(guest: &Guest, attacker: &Attacker, mib: u64) -> Result<Self, String> {
        let bad = |what: &str| format!("guest {}: {what}", guest.index);
        let fd = guest.descriptors("kvm-vm").into_iter().next().ok_or(bad("no descriptor"))?;
        let vm = attacker.vm(fd.as_fd()).map_err(|e| bad(&e.to_string()))?.handle;
        let ipa = guest.with(|s| s.targets.first().copied()).ok_or(bad("it named no page"))?;
        let va = guest.ram(mib).ok_or(bad("no RAM in QEMU"))? + (ipa - RAM);
        let pa = attacker.physical(guest.pid(), va).map_err(|e| bad(&e.to_string()))?;
        Ok(Self { vm, pa, ipa })
    }
}

/// List and map, while nothing changes: what is wrong with them, and the list.
fn look(stats: [u64; 6], known: &[Known], vcpus: u64) -> Result<(Vec<String>, String), String> {
    let mut wrong = Vec::new();
    let mut same = |what: &str, found: u64, wanted: u64| {
        if found != wanted {
            wrong.push(format!("{what}: {found}, not {wanted}"));
        }
    };
    let (list, list_text) = json(&["list", "--json"])?;
    let (map, _) = json(&["map", "--json"])?;
    let (vms, pieces) = (items(&list, "vms"), items(&map, "pieces"));
    let sum = |key: &str| vms.iter().filter_map(|vm| vm[key].as_u64()).sum::<u64>();

    let [count, all_vcpus, private, tables, host, shared] = stats;
    same("VMs", vms.len() as u64, count);
    same("vCPUs", sum("vcpus"), all_vcpus);
    for (state, wanted) in [("private", private), ("shared", shared), ("pool", tables)] {
        let key = format!("{state}_pages");
        same(&key, sum(&key), wanted);
        same("the monitor's count", list["monitor"][&key].as_u64().unwrap_or(0), wanted);
    }
    same("pages of the host", map["host_pages"].as_u64().unwrap_or(0), host);

    let mut last = 0;
    for piece in pieces {
        let (start, end) = (hex(&piece["start"]), hex(&piece["end"]));
        same("pieces that overlap", u64::from(start < last || end <= start), 0);
        last = end;
    }
    for guest in known {
        let name = format!("{:#x}", guest.vm);
        let vm = vms.iter().find(|vm| vm["vm"] == name.as_str());
        let vm = vm.ok_or_else(|| format!("VM {name} is not in the list"))?;
        same("vCPUs of a VM", vm["vcpus"].as_u64().unwrap_or(0), vcpus);
        same("VMs that were launched", u64::from(vm["launched"] == true), 1);
        let faults = vm["faults"].as_u64().unwrap_or(0);
        same("VMs without a fault", u64::from(faults == 0), 0);
        let mine: Vec<&Value> = pieces.iter().filter(|p| p["vm"] == name.as_str()).collect();
        for state in STATES {
            let of = mine.iter().filter(|p| p["owner"] == state);
            let pages = of.map(|p| (hex(&p["end"]) - hex(&p["start"])) / PAGE).sum();
            let key = if state == "table" { "pool_pages" } else { &format!("{state}_pages") };
            same(&format!("{state} pages in the map"), pages, vm[key].as_u64().unwrap_or(0));
        }
        let here = |p: &&&Value| (hex(&p["start"])..hex(&p["end"])).contains(&guest.pa);
        let page = mine.iter().find(here);
        let guests = page.map_or(0, |p| hex(&p["guest"]) + (guest.pa - hex(&p["start"])));
        let private = page.is_some_and(|p| p["owner"] == "private");
        same("its page in the map, for the guest", guests, guest.ipa);
        same("its page in the map, private", u64::from(private), 1);
    }
    pictures(known, &mut wrong)?;
    Ok((wrong, list_text))
}

/// Each VM is in the text and in the picture.
fn pictures(known: &[Known], wrong: &mut Vec<String>) -> Result<(), String> {
    let text = show(&["map"])?;
    text.lines().chain(show(&["list"])?.lines()).for_each(out::line);
    show(&["map", "--svg", "/tmp/map.svg"])?;
    let picture = std::fs::read_to_string("/tmp/map.svg").map_err(|e| format!("map.svg: {e}"))?;
    for guest in known {
        let legend = text.lines().find(|l| l.starts_with(&format!("VM {:#x} ", guest.vm)));
        let sign = legend.and_then(|l| l.split_once(": ")?.1.chars().next()).unwrap_or('?');
        let drawn = text.lines().take_while(|l| !l.is_empty()).any(|l| l.contains(sign));
        if !drawn {
            wrong.push(format!("VM {:#x} ({sign}) is not in the text: {text}", guest.vm));
        }
        let group = picture.split_once(&format!("id=\"vm-{:#x}-private\"", guest.vm));
        let group = group.and_then(|(_, rest)| rest.split_once("</g>"));
        if !group.is_some_and(|(group, _)| group.contains("<rect")) {
            wrong.push(format!("VM {:#x} is not in the picture", guest.vm));
        }
    }
    Ok(())
}

/// A QEMU's ear.
struct Qemu(BufReader<UnixStream>);

impl Qemu {
    fn connect(index: usize) -> Result<Self, String> {
        let stream = UnixStream::connect(socket(index)).map_err(|e| format!("QMP: {e}"))?;
        let limit = stream.set_read_timeout(Some(Duration::from_secs(60)));
        limit.map_err(|e| format!("QMP: {e}"))?;
        let mut this = Self(BufReader::new(stream));
        this.ask("{\"execute\":\"qmp_capabilities\"}")?;
        Ok(this)
    }

    fn ask(&mut self, line: &str) -> Result<Value, String> {
        let sent = self.0.get_mut().write_all(format!("{line}\n").as_bytes());
        sent.map_err(|e| format!("QMP: {e}"))?;
        loop {
            let mut line = String::new();
            let n = self.0.read_line(&mut line).map_err(|e| format!("QMP: {e}"))?;
            let value: Value = serde_json::from_str(&line).map_err(|e| format!("QMP: {e}"))?;
            match (n, value.get("return"), value.get("error")) {
                (0, ..) => return Err("QEMU is gone".to_owned()),
                (_, Some(value), _) => return Ok(value.clone()),
                (_, _, Some(error)) => return Err(format!("QMP: {error}")),
                // The greeting, and events.
                _ => {}
            }
        }
    }

    /// A command of the monitor for people, and what it says.
    fn human(&mut self, command: &str) -> Result<String, String> {
        let line = serde_json::json!({
            "execute": "human-monitor-command", "arguments": {"command-line": command}
        });
        let said = self.ask(&line.to_string())?.as_str().unwrap_or_default().trim().to_owned();
        out::line(&format!("(qemu) {command}: {}", said.replace("\r\n", "; ")));
        Ok(said)
    }

    /// Logs dirty pages for a second; what is wrong with that.
    fn log_dirty(&mut self) -> Result<(), String> {
        self.human("calc_dirty_rate -b 1")?;
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(500));
            if self.human("info dirty_rate")?.contains("Status: measured") {
                return Ok(());
            }
        }
        Err("no dirty rate was measured".to_owned())
    }

    /// Migration and snapshot must be refused, and the guest run on.
    fn refuses(&mut self) -> Result<(), String> {
        for command in ["migrate \"exec:cat > /tmp/moved\"", "savevm saved"] {
            let said = self.human(command)?;
            if !said.starts_with("Error: ") || !said.contains("migration") {
                return Err(format!("{command}: {said:?}"));
            }
        }
        if std::path::Path::new("/tmp/moved").exists() {
            return Err("something was written by `migrate`".to_owned());
        }
        let status = self.human("info status")?;
        if status.contains("running") { Ok(()) } else { Err(status) }
    }
}

/// `havmsi` where something is missing: its exit status says what.
fn statuses() -> Result<(), String> {
    let made = std::fs::create_dir_all("/tmp/bare/sys/kernel/debug/kvm");
    made.map_err(|e| format!("/tmp/bare: {e}"))?;
    for (words, wanted) in [
        (&["--help"][..], 0),
        (&["--no-such-option"], 2),
        (&["--json", "map"], 2),
        (&["--root", "/tmp/bare"], 3),
        (&["--root", "/tmp/nowhere", "map"], 4),
        (&["map", "--svg", "/nowhere/map.svg"], 1),
    ] {
        let (_, status) = run(words)?;
        if status != wanted {
            return Err(format!("havmsi {words:?}: exit status {status}, not {wanted}"));
        }
    }
    Ok(())
}

/// The job.
pub fn job(job: &Job<'_>) -> End {
    let attacker = job.attacker.filter(|_| job.monitor).ok_or("no monitor, or no module")?;
    statuses()?;
    loopback()?;
    let before = job.stats("before");
    // The digest of the first can be computed; the second shares memory.
    let mut guests = job.start_as(&["work", "devices"])?;
    let used = |guest: &Guest| guest.wait(BOOT, |s| s.devices.is_some() || s.verdict.is_some());
    if !used(&guests[1]) {
        return Err("guest 1 has not used its devices".to_owned());
    }
    let known: Vec<Known> = guests
        .iter()
        .map(|guest| Known::new(guest, attacker, job.params.gmem))
        .collect::<Result<_, _>>()?;
    let (stats, looked) = guests[0].while_stopped(|| {
        guests[1].while_stopped(|| {
            let stats = job.stats("during");
            (stats, stats.map(|stats| look(stats, &known, job.params.vcpus)))
        })
    });
    let (mut wrong, list) = looked.ok_or("no STATS")??;
    out::event(Object::event("operate").value("list", list));
    let shared = stats.map_or(0, |stats| stats[5]);
    if shared < guest::POOL_MIB * 256 {
        wrong.push(format!("{shared} shared pages are fewer than the pool has"));
    }
    // Not only when all stand still.
    show(&["list"])?;
    for guest in &guests {
        let mut qemu = Qemu::connect(guest.index)?;
        let bad = |e| format!("guest {}: {e}", guest.index);
        qemu.log_dirty().map_err(bad)?;
        // A GICv2 that QEMU starts by itself has nothing that QEMU could refuse for.
        if job.params.gic == 3 || guest.index == 1 {
            wrong.extend(qemu.refuses().map_err(bad).err());
        }
    }
    let log = crate::sys::kernel_log();
    let told = log.lines().filter(|l| l.contains("dirty logging tells of shared pages only"));
    if told.count() != guests.len() {
        wrong.push("the log doesn't tell once a VM that it can't be migrated".to_owned());
    }
    let verdicts = job.finish(&mut guests);
    drop(guests);
    wrong.extend(verdicts.err());
    wrong.extend(job.settled(before).err());
    if !wrong.is_empty() {
        return Err(wrong.join("; "));
    }
    Ok(format!(
        "list and map are what the monitor counts ({:?}), nothing was migrated",
        stats.unwrap_or_default()
    ))
}
