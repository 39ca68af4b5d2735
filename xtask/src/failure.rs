// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is left of a VM after a reset of the machine, and after the monitor's own panic; the
//! payload's `failure.rs` does the work.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use havmsi_abi::layout;
use serde_json::Value;

use crate::dtb::RAM_BASE;
use crate::machine::{self, Config, Event, Machine};
use crate::run::Cpu;
use crate::{Ctx, build, rows};

/// The payload's machine with these words for it, which a reset doesn't clear.
fn config(ctx: &Ctx, words: &str, leave_out: &str) -> Result<Config> {
    let monitor =
        if leave_out.is_empty() { build::monitor(ctx)? } else { build::test_monitor(ctx)? };
    let image = build::payload(ctx)?.context("there is no payload/ in this tree")?;
    let kernel = fs::metadata(&image)?.len();
    let mut config = rows::payload_config(image, &monitor, 3, Cpu::CortexA57);
    let ram = config.mem_mib << 20;
    let behind = layout::host_kernel(RAM_BASE, ram) + kernel.next_multiple_of(4096);
    config.behind = vec![0; usize::try_from(layout::host_initrd(RAM_BASE, ram) - behind)?];
    config.behind.extend(format!("@args {words}\n").bytes());
    if !leave_out.is_empty() {
        let option = format!("name=opt/org.havmsi/leave-out,string={leave_out}");
        config.extra.extend(["-fw_cfg".to_owned(), option]);
    }
    Ok(config)
}

/// Pages of the first life's guest that the second one finds. Its random numbers are others.
fn found_after_reset(ctx: &Ctx, leave_out: &str, limit: Duration) -> Result<u64> {
    let dir = ctx.log_dir.join(format!("reset-{leave_out}"));
    let mut config = config(ctx, "--life", leave_out)?;
    config.extra.extend(["-action", "reboot=reset"].map(str::to_owned));
    let mut machine = Machine::start(&config, &dir)?;
    let start = Instant::now();
    let mut lives = Vec::new();
    let mut planted = 0;
    loop {
        if start.elapsed() > limit {
            return Err(machine.report("time-out: the machine does not come to its second life"));
        }
        match machine.next(Duration::from_millis(200))? {
            Event::Line(line) => {
                let Some((word, json)) = line.split_once(' ') else { continue };
                match word {
                    "@life" => {
                        let event: Value = serde_json::from_str(json)?;
                        let random = event["random"].as_str().context("a broken line")?;
                        let found = event["found"].as_u64().context("a broken line")?;
                        lives.push((found, random.to_owned()));
                    }
                    "@planted" => planted += 1,
                    "@panic" => bail!("the payload: {json}"),
                    _ => {}
                }
            }
            Event::Silence => {}
            Event::End(_) => return Err(machine.report("the machine ended")),
        }
        if let Some(line) = machine::epitaph(&machine.monitor_log()) {
            return Err(machine.report(&format!("the monitor stopped: {line}")));
        }
        if let [(first, old), (second, new)] = &lives[..] {
            if *first != 0 || planted != 1 {
                bail!("the first life found {first} pages; {planted} guests were left");
            }
            if old == new {
                bail!("guests get the same random numbers after a reset: {new}");
            }
            let cleared = machine.monitor_log().matches("RAM is cleared").count();
            if cleared != usize::from(leave_out.is_empty()) {
                bail!("the monitor says {cleared} times that it cleared RAM");
            }
            return Ok(*second);
        }
    }
}

/// Nothing of a guest is left after a reset, without the check it is; random numbers don't repeat.
pub fn reset(ctx: &Ctx, limit: Duration) -> Result<String> {
    let without = found_after_reset(ctx, "Wipe", limit / 2)?;
    if without == 0 {
        bail!("a monitor that clears nothing leaves nothing either: this shows nothing");
    }
    let found = found_after_reset(ctx, "", limit / 2)?;
    if found != 0 {
        bail!("{found} pages of a guest are left after a reset");
    }
    Ok(format!("0 pages of a guest after a reset; {without} if RAM is not cleared"))
}

/// The exception level of each CPU, as QEMU tells.
fn levels(socket: &Path) -> Result<Vec<String>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    lines.next().context("QEMU says nothing")??;
    let mut ask = |what: &str| -> Result<Value> {
        writeln!(stream, "{what}")?;
        loop {
            let line = lines.next().context("QEMU is gone")??;
            let answer: Value = serde_json::from_str(&line)?;
            if !answer["return"].is_null() {
                return Ok(answer);
            }
        }
    };
    ask(r#"{"execute":"qmp_capabilities"}"#)?;
    let command =
        r#"{"execute":"human-monitor-command","arguments":{"command-line":"info registers -a"}}"#;
    let text = ask(command)?["return"].as_str().unwrap_or_default().to_owned();
    let states = text.lines().filter(|l| l.contains("PSTATE="));
    Ok(states.filter_map(|l| Some(l.rsplit_once("EL")?.1.get(..2)?.to_owned())).collect())
}

/// The monitor's panic stops all CPUs and shows nothing of a guest.
pub fn panic(ctx: &Ctx, limit: Duration) -> Result<String> {
    let dir = ctx.log_dir.join("panic");
    let mut config = config(ctx, "--panic", "Panic")?;
    // The path of a socket is short.
    let socket: PathBuf = std::env::temp_dir().join(format!("havmsi-{}.qmp", std::process::id()));
    let option = format!("unix:{},server=on,wait=off", socket.display());
    config.extra.extend(["-qmp".to_owned(), option]);
    let mut machine = Machine::start(&config, &dir)?;
    let start = Instant::now();
    let mut beats = 0;
    let epitaph = loop {
        if start.elapsed() > limit {
            return Err(machine.report("time-out: the monitor does not panic"));
        }
        match machine.next(Duration::from_millis(200))? {
            Event::Line(line) if line.starts_with("@panic") => bail!("the payload: {line}"),
            Event::Line(line) => beats += u32::from(line.starts_with("@beat")),
            Event::Silence => {}
            Event::End(_) => return Err(machine.report("the machine ended")),
        }
        if let Some(line) = machine::epitaph(&machine.monitor_log()) {
            break line.to_owned();
        }
    };
    // What was on its way; then nobody speaks any more.
    while matches!(machine.next(Duration::from_secs(1))?, Event::Line(_)) {}
    if beats < 5 || !matches!(machine.next(Duration::from_secs(3))?, Event::Silence) {
        return Err(machine.report("the host was not there, or goes on after the panic"));
    }
    let levels = levels(&socket);
    drop(fs::remove_file(&socket));
    let levels = levels?;
    if levels.len() != 4 || levels.iter().any(|l| l != "3h") {
        bail!("CPUs are at EL {levels:?} after the panic, not all at EL3");
    }
    // The guest's registers hold its secret (payload/src/failure.rs, `next(SEED)`).
    let factor: u64 = 0xd134_2543_de82_ef95;
    let secret = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(factor).wrapping_add(factor);
    if machine.monitor_log().contains(&format!("{secret:x}")) {
        bail!("the monitor's console shows a guest's register");
    }
    Ok(format!("all CPUs at EL3: {epitaph}"))
}
