// SPDX-License-Identifier: MIT OR Apache-2.0
//! The workload of a guest, as its `/init`: draws a seed, fills memory with a stream derived from
//! it, keeps verifying memory and registers on all vCPUs, gives its verdict and powers off.
//! Its lines and modes are described in `userland/README.md`.

mod bench;
mod io;
mod keep;
mod spin;
mod sys;
mod work;

use havmsi_proto::json::Object;
use havmsi_proto::{GUEST_PREFIX, Seed, cmdline};
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Prints one line, in one write, so that the kernel's messages don't fall into it.
fn say(object: Object) {
    let up = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let object = object.value("t", up.split_whitespace().next().unwrap_or("0"));
    let line = format!("{GUEST_PREFIX}{}\n", object.finish());
    let mut out = std::io::stdout().lock();
    // A console that doesn't take our line leaves nobody to tell.
    let _ = out.write_all(line.as_bytes());
    let _ = out.flush();
}

/// What the command line asks for.
struct Config {
    mib: u64,
    seconds: u64,
    mode: String,
}

fn config(line: &str) -> Result<Config, String> {
    let mode = cmdline::value(line, "mode").unwrap_or("work");
    if !["work", "reboot", "idle", "devices", "bench"].contains(&mode) {
        return Err(format!("havmsi.mode={mode}: want work, reboot, idle, devices or bench"));
    }
    Ok(Config {
        mib: cmdline::number(line, "mib", 16, 1, 65_536)?,
        seconds: cmdline::number(line, "seconds", 120, 1, 86_400)?,
        mode: mode.to_owned(),
    })
}

/// Reads console lines: `stop` sets the flag, all others go to whoever waits for an answer.
fn listen(stop: Arc<AtomicBool>) -> Receiver<String> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            match line {
                Ok(line) if line.trim() == "stop" => stop.store(true, Ordering::Relaxed),
                // Nobody listens any more: the words have no meaning then.
                Ok(line) => drop(send.send(line.trim().to_owned())),
                Err(_) => return,
            }
        }
    });
    receive
}

/// The second boot of mode `reboot`: looks for pages of the first boot's stream in all of RAM.
fn look_for(old: Seed) {
    let object = match sys::scan_ram(old) {
        Ok((pages, bytes)) => {
            Object::event("old").value("pages", pages).value("scanned_mib", bytes >> 20)
        }
        Err(e) => Object::event("old").text("error", &e),
    };
    say(object);
}

/// Mode `devices`: uses them until told to stop, once at least.
fn devices(seed: Seed, stop: &AtomicBool) -> Result<(), String> {
    say(Object::event("public").text("seed", &seed.to_hex()));
    let mut devices = io::Devices::open(seed)?;
    let mut said = None;
    loop {
        let last = stop.load(Ordering::Relaxed);
        devices.round()?;
        let recent = |said: Instant| said.elapsed() < Duration::from_secs(2);
        if !last && said.is_some_and(recent) {
            continue;
        }
        said = Some(Instant::now());
        let done = &devices.done;
        say(Object::event("devices")
            .value("disk_kib", done.disk >> 10)
            .value("net_kib", done.net >> 10)
            .value("random", done.random)
            .text("console", &done.said));
        if last {
            return Ok(());
        }
    }
}

fn run() -> Result<sys::End, String> {
    sys::mount_all();
    let line = std::fs::read_to_string("/proc/cmdline").map_err(|e| e.to_string())?;
    let config = config(&line)?;
    if config.mode == "bench" {
        bench::run()?;
        say(Object::event("verdict").value("ok", true).value("vcpus", sys::cpus().len()));
        return Ok(sys::End::PowerOff);
    }
    let cpus = sys::cpus();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let stop = Arc::new(AtomicBool::new(false));
    let answers = listen(stop.clone());
    say(Object::event("boot")
        .text("kernel", release.trim())
        .value("vcpus", cpus.len())
        .value("mib", config.mib)
        .text("mode", &config.mode));

    let mut last_boot = true;
    let mut end = Instant::now() + Duration::from_secs(config.seconds);
    if config.mode == "reboot" {
        let limit = Duration::from_secs(60);
        let answer = answers
            .recv_timeout(limit)
            .map_err(|_| "mode reboot: nobody answered `go` or `prev SEED` on the console")?;
        match answer.strip_prefix("prev ") {
            Some(seed) => look_for(Seed::from_hex(seed).ok_or("`prev` without a seed")?),
            None => last_boot = false,
        }
        end = Instant::now() + Duration::from_secs(config.seconds.min(3));
    }

    let seed = Seed::from_bytes(&sys::random()?);
    let memory = work::Memory::fill(seed, config.mib)?;
    say(Object::event("seed").text("seed", &seed.to_hex()).hex_list("targets", &memory.targets()));
    let start = Instant::now();
    let idle = config.mode == "idle";
    let (result, used) = std::thread::scope(|scope| {
        let used = (config.mode == "devices").then(|| {
            let seed = sys::random().map(|bytes| Seed::from_bytes(&bytes));
            let stop = &stop;
            scope.spawn(move || devices(seed?, stop))
        });
        let result = work::verify(&memory, &cpus, &stop, end, idle);
        stop.store(true, Ordering::Relaxed);
        let died = |_| Err("the thread that works with the devices died".to_owned());
        (result, used.map_or(Ok(()), |used| used.join().unwrap_or_else(died)))
    });
    used?;
    say(Object::event("verdict")
        .value("ok", result.corrupt == 0)
        .value("vcpus", cpus.len())
        .value("verified_mib", config.mib)
        .value("rounds", result.rounds)
        .value("corrupt", result.corrupt)
        .value("ms", start.elapsed().as_millis()));
    Ok(if last_boot { sys::End::PowerOff } else { sys::End::Reboot })
}

fn main() {
    let mut words = std::env::args().skip(1);
    match words.next().as_deref() {
        Some(bench::NOTHING) => return,
        Some("keep") => keep::run(&words.next().unwrap_or_default()),
        _ => {}
    }
    let end = run().unwrap_or_else(|e| {
        say(Object::event("verdict").value("ok", false).text("text", &e));
        sys::End::PowerOff
    });
    // The console driver still has the last line in its buffer.
    sys::drain_console();
    sys::end(end);
}
