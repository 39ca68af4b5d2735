// SPDX-License-Identifier: MIT OR Apache-2.0
//! One job of the host's agent on one machine, from power-on to the agent's last event.
//! The line protocol is described in `userland/README.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;

use crate::machine::{Config, Event, Machine};

/// Result of one check.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Check {
    /// Which attack.
    pub id: String,
    /// `exposed`, `protected`, `error` or `skipped`.
    pub result: String,
    /// What was seen.
    #[serde(default)]
    pub evidence: String,
    /// No guest noticed a change (`job=attack`).
    #[serde(default)]
    pub victim_ok: Option<bool>,
    /// Another VM started and worked afterwards (`job=attack`).
    #[serde(default)]
    pub new_vm_ok: Option<bool>,
}

/// What a guest said at its end.
#[derive(Debug, Clone, Deserialize)]
pub struct Verdict {
    /// Which guest.
    pub index: u32,
    /// Its kernel came up.
    #[serde(default)]
    pub booted: bool,
    /// Nothing of its memory and registers changed.
    #[serde(default)]
    pub ok: bool,
    /// vCPUs that worked.
    #[serde(default)]
    pub vcpus: u32,
    /// Memory that it verified.
    #[serde(default)]
    pub verified_mib: u64,
    /// Pages or registers found changed.
    #[serde(default)]
    pub corrupt: u64,
    /// For people.
    #[serde(default)]
    pub text: String,
}

/// All that a job gave.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Events of the agent, as they came.
    pub events: Vec<Value>,
    /// Events of the small VMM.
    pub vmm: Vec<Value>,
    /// Checks, in order.
    pub checks: Vec<Check>,
    /// Verdicts by guest.
    pub verdicts: BTreeMap<u32, Verdict>,
    /// Handles of the guests' VMs, as the host sees them.
    pub vms: BTreeMap<u32, u64>,
    /// The guest that was started after all attacks was well (`job=attack`).
    pub later: Option<bool>,
    /// The last event: `ok` or not, and why.
    pub done: Option<(bool, String)>,
    /// What the monitor printed.
    pub monitor: String,
    /// Duration of the whole.
    pub seconds: f64,
}

impl Outcome {
    /// A field of the `start` event.
    pub fn start(&self, field: &str) -> Option<&Value> {
        self.events.iter().find(|e| e["event"] == "start").and_then(|e| e.get(field))
    }

    /// Launches that the monitor reported: handle of the VM and digest.
    pub fn launches(&self) -> Vec<(u64, String)> {
        self.monitor.lines().filter_map(launch).collect()
    }
}

/// `... VM 0x10001 launched, digest HEX`.
fn launch(line: &str) -> Option<(u64, String)> {
    let (head, tail) = line.split_once(" launched, digest ")?;
    let vm = u64::from_str_radix(head.rsplit_once("VM 0x")?.1, 16).ok()?;
    hex_digest(tail).map(|digest| (vm, digest))
}

/// The first word of exactly 64 hexadecimal digits.
fn hex_digest(line: &str) -> Option<String> {
    line.split(|c: char| !c.is_ascii_alphanumeric())
        .find(|w| w.len() == 64 && w.bytes().all(|b| b.is_ascii_hexdigit()))
        .map(str::to_owned)
}

/// Limits of a job.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The whole job.
    pub total: Duration,
    /// Without any line on the console.
    pub silence: Duration,
}

/// Starts the machine and follows the job to its end. `watch` sees every event.
pub fn run(
    config: &Config,
    dir: &Path,
    limits: Limits,
    mut watch: impl FnMut(&Value),
) -> Result<Outcome> {
    let mut machine = Machine::start(config, dir)?;
    let start = Instant::now();
    let mut outcome = Outcome::default();
    let mut guests: BTreeMap<String, File> = BTreeMap::new();
    let mut waiting = "the host's kernel".to_owned();
    let mut last_line = Instant::now();
    loop {
        if outcome.done.is_none() {
            if start.elapsed() > limits.total {
                return Err(machine.report(&format!(
                    "time-out: {} s are over, still waiting for {waiting}",
                    limits.total.as_secs()
                )));
            }
            if last_line.elapsed() > limits.silence {
                return Err(machine.report(&format!(
                    "time-out: nothing for {} s, waiting for {waiting}",
                    limits.silence.as_secs()
                )));
            }
        } else if last_line.elapsed() > Duration::from_secs(20) {
            return Err(
                machine.report("time-out: the host did not power off within 20 s after the job")
            );
        }
        match machine.next(Duration::from_secs(1))? {
            Event::Silence => {
                if let Some(line) = crate::machine::epitaph(&machine.monitor_log()) {
                    return Err(machine.report(&format!(
                        "the monitor stopped while we waited for {waiting}: {line}"
                    )));
                }
            }
            Event::End(ok) => {
                outcome.monitor = machine.monitor_log();
                outcome.seconds = start.elapsed().as_secs_f64();
                if outcome.done.is_none() {
                    let how = if ok { "ended" } else { "died" };
                    return Err(
                        machine.report(&format!("QEMU {how} while we waited for {waiting}"))
                    );
                }
                return Ok(outcome);
            }
            Event::Line(line) => {
                last_line = Instant::now();
                if let Some((name, text)) = line.strip_prefix("@g").and_then(|l| l.split_once(' '))
                {
                    if !guests.contains_key(name) {
                        guests.insert(
                            name.to_owned(),
                            File::create(dir.join(format!("guest{name}.log")))?,
                        );
                    }
                    if let Some(file) = guests.get_mut(name) {
                        writeln!(file, "{text}")?;
                    }
                } else if let Some((who, json)) = line
                    .strip_prefix('@')
                    .and_then(|l| l.split_once(' '))
                    .filter(|(who, _)| ["havmsi", "vmm"].contains(who))
                {
                    match serde_json::from_str::<Value>(json) {
                        Ok(event) => {
                            watch(&event);
                            if who == "vmm" {
                                outcome.vmm.push(event);
                            } else {
                                take(&event, &mut outcome, &mut waiting);
                                outcome.events.push(event);
                            }
                        }
                        Err(e) => {
                            return Err(machine.report(&format!("a broken line ({e}): {line}")));
                        }
                    }
                } else if line.contains("Kernel panic") {
                    waiting = format!("{waiting} ({line})");
                }
            }
        }
    }
}

fn take(event: &Value, outcome: &mut Outcome, waiting: &mut String) {
    let text = |name: &str| event.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    match event["event"].as_str().unwrap_or_default() {
        "start" => *waiting = "the agent's first step".to_owned(),
        "progress" => {
            *waiting = format!(
                "step `{}` {}/{} {}",
                text("step"),
                event["done"],
                event["total"],
                text("text")
            );
        }
        "check" => match serde_json::from_value::<Check>(event.clone()) {
            Ok(check) => {
                *waiting = format!("what comes after check `{}`", check.id);
                outcome.checks.push(check);
            }
            Err(e) => outcome.checks.push(Check {
                id: text("id"),
                result: "error".to_owned(),
                evidence: format!("broken event: {e}"),
                ..Check::default()
            }),
        },
        "guest" => {
            let vm = u64::from_str_radix(text("vm").trim_start_matches("0x"), 16);
            let index = event["index"].as_u64().and_then(|i| u32::try_from(i).ok());
            if let (Some(index), Ok(vm)) = (index, vm) {
                outcome.vms.insert(index, vm);
            }
        }
        "verdict" => {
            if let Ok(verdict) = serde_json::from_value::<Verdict>(event.clone()) {
                *waiting = format!("what comes after the verdict of guest {}", verdict.index);
                outcome.verdicts.insert(verdict.index, verdict);
            }
        }
        "later" => outcome.later = event["ok"].as_bool(),
        "done" => {
            outcome.done = Some((text("result") == "ok", text("text")));
            *waiting = "the host's power-off".to_owned();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_found_in_the_monitors_words() {
        let hex = "0123456789abcdef".repeat(4);
        assert_eq!(hex_digest(&format!("vm 1: launch digest {hex}")), Some(hex.clone()));
        assert_eq!(hex_digest(&format!("digest={hex}.")), Some(hex.clone()));
        assert_eq!(hex_digest("digest none"), None);
        assert_eq!(
            launch(&format!("havmsi: VM 0x10001 launched, digest {hex}")),
            Some((0x10001, hex))
        );
    }

    #[test]
    fn events_become_an_outcome() {
        let mut outcome = Outcome::default();
        let mut waiting = String::new();
        for line in [
            r#"{"event":"progress","n":1,"step":"checks","done":1,"total":3,"text":"vmm-read"}"#,
            r#"{"event":"check","n":2,"id":"vmm-read","result":"protected","evidence":"zeros","ms":3}"#,
            r#"{"event":"verdict","n":3,"index":1,"booted":true,"ok":true,"vcpus":2,"verified_mib":16,"rounds":3,"corrupt":0,"text":""}"#,
            r#"{"event":"done","n":4,"result":"ok","text":"fine"}"#,
        ] {
            take(&serde_json::from_str(line).unwrap(), &mut outcome, &mut waiting);
        }
        assert_eq!(outcome.checks.first().unwrap().result, "protected");
        assert_eq!(outcome.verdicts.get(&1).unwrap().verified_mib, 16);
        assert_eq!(outcome.done, Some((true, "fine".to_owned())));
    }
}
