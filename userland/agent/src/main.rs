// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host side of a test machine, as its `/init`: starts guests, attacks them, prints what came
//! of it as JSON lines, and powers the machine off. See `userland/README.md`.

mod attacker;
mod checks;
mod debian;
mod guest;
mod hugepages;
mod io;
mod jobs;
mod operate;
mod out;
mod overcommit;
mod params;
mod sys;

use attacker::Attacker;
use havmsi_proto::json::Object;
use params::Params;
use std::path::Path;
use std::time::Duration;

const CHILD: &str = "HAVMSI_AGENT_CHILD";

fn done(end: &jobs::End) {
    let (result, text) = match end {
        Ok(text) => ("ok", text),
        Err(text) => ("fail", text),
    };
    out::event(Object::event("done").text("result", result).text("text", text));
}

/// Process 1 only mounts, starts the agent proper as a child, collects orphans, and powers off: so
/// an agent that dies doesn't take the kernel with it.
fn init() -> ! {
    for (kind, target) in [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
        (c"tmpfs", c"/tmp"),
        (c"debugfs", c"/sys/kernel/debug"),
    ] {
        // There already, or made by the mount before; what is missing shows where it is used.
        let _ = std::fs::create_dir(target.to_string_lossy().as_ref());
        let _ = sys::mount(kind, target);
    }
    match std::process::Command::new("/proc/self/exe").env(CHILD, "1").spawn() {
        Ok(child) => {
            let status = sys::wait_for(child.id());
            if status != 0 {
                done(&Err(format!("the agent died (wait status {status:#x})")));
            }
        }
        Err(e) => done(&Err(format!("the agent could not be started: {e}"))),
    }
    sys::power_off();
}

fn memory_mib() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = total.and_then(|t| t.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

/// Passes kernel lines on that say how the machine came up or what went wrong.
fn kernel_lines(from: &str, words: &[&str], most: usize) {
    let lines = from.lines().filter(|line| {
        let line = line.to_lowercase();
        words.iter().any(|w| line.contains(w))
    });
    for line in lines.take(most) {
        let text = line.split_once('>').map_or(line, |(_, text)| text);
        out::event(Object::event("dmesg").text("line", text));
    }
}

fn agent() -> jobs::End {
    let line = std::fs::read_to_string("/proc/cmdline").map_err(|e| e.to_string())?;
    let params = Params::parse(&line)?;
    sys::quiet_console(1);
    let log = sys::kernel_log();
    if params.thp != "keep" {
        // A kernel without huge pages needs no word.
        let _ = std::fs::write("/sys/kernel/mm/transparent_hugepage/enabled", &params.thp);
    }
    let module = ["/havmsi/attacker-plain.ko", "/havmsi/attacker.ko"];
    let with_monitor = line.contains("kvm-arm.mode=havmsi");
    let mut module_error = String::new();
    if !["boot", "bench", "applications"].contains(&params.job.as_str()) {
        let mut paths = module.iter().filter(|p| Path::new(p).exists());
        let path = if with_monitor { Some(&module[1]) } else { paths.next() };
        if let Some(Err(e)) = path.map(|p| sys::load_module(p)) {
            module_error = format!("the attacker module does not load: {e}");
        }
    }
    let attacker = Attacker::open().ok();
    let monitor = attacker.as_ref().map_or(with_monitor, Attacker::monitor);
    let kvm = Path::new("/dev/kvm").exists();
    // `Linux version RELEASE ...`; not every kernel has /proc/sys.
    let version = std::fs::read_to_string("/proc/version").unwrap_or_default();
    let release = version.split_whitespace().nth(2).unwrap_or_default();
    out::event(
        Object::event("start")
            .text("job", &params.job)
            .text("kernel", release)
            .value("cpus", jobs::cpus())
            .value("mem_mib", memory_mib())
            .value("monitor", monitor)
            .value("kvm", kvm)
            .text("params", line.trim()),
    );
    kernel_lines(&log, &["kvm", "ha-vmsi", "havmsi:"], 20);
    if !module_error.is_empty() {
        return Err(module_error);
    }
    if !kvm && !["nokvm", "shell"].contains(&params.job.as_str()) {
        return Err("the host has no /dev/kvm".to_owned());
    }
    let limit = Duration::from_secs(params.timeout);
    if params.job != "shell" {
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            let text = format!("the job took longer than {} s (havmsi.timeout)", limit.as_secs());
            kernel_trouble();
            done(&Err(text));
            sys::power_off();
        });
    }
    let end = jobs::Job { params: &params, attacker: attacker.as_ref(), monitor }.run();
    kernel_trouble();
    end
}

/// Kernel lines that tell of trouble, at the end of a job.
fn kernel_trouble() {
    let words = [
        "bug:",
        "oops",
        "warning:",
        "external abort",
        "unable to handle",
        "call trace",
        "stall",
        "blocked for",
    ];
    kernel_lines(&sys::kernel_log(), &words, 10);
}

fn main() {
    if std::process::id() == 1 && std::env::var_os(CHILD).is_none() {
        init();
    }
    done(&agent());
}
