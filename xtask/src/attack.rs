// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `attack` verb: every threat tried on the control, where the attack must succeed, and under
//! HA-VMSI, where it must be blocked. The rows are data (`attack/rows.rs`); those of one ground
//! share a boot of each machine.

mod docs;
mod rows;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;
use serde_json::Value;

use crate::job::Outcome;
use crate::machine::{self, Event, Kind, Machine, comma};
use crate::ui::Step;
use crate::{Ctx, build, rows as rows_of_tests, run, setup, sh};
use rows::{Ground, ROWS, Row, Variant};

/// Options of `attack`.
#[derive(Debug, Default, ClapArgs)]
pub struct Args {
    /// Only these threats (`T14`, or `T01,T02`)
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub only: Vec<String>,
    /// List the attacks and the command that each row stands for
    #[arg(long)]
    pub list: bool,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write docs/threats.md from the result; rows that were not run stay as they are
    #[arg(long)]
    pub docs: bool,
}

/// How an attack ended on one machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Try {
    /// `succeeded`, `blocked`, `error`, or `not-run`.
    pub result: String,
    /// What was seen.
    pub evidence: String,
    /// The victim went on verifying.
    pub victim_ok: bool,
    /// Another VM could be started afterwards.
    pub new_vm_ok: bool,
}

impl Try {
    fn not_run(why: &str) -> Self {
        Self { result: "not-run".to_owned(), evidence: why.to_owned(), ..Self::default() }
    }
}

/// One attack on both machines.
#[derive(Debug, Clone, Serialize)]
pub struct Pair {
    name: &'static str,
    attacker: &'static str,
    what: &'static str,
    control_machine: String,
    control: Try,
    havmsi: Try,
}

/// One row of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Judged {
    id: &'static str,
    title: &'static str,
    control: &'static str,
    havmsi: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    command: String,
    variants: Vec<Pair>,
}

/// The JSON file.
#[derive(Debug, Serialize)]
pub struct Report {
    result: &'static str,
    /// What is wrong; nothing if all is well.
    pub problems: Vec<String>,
    rows: Vec<Judged>,
    seconds: f64,
}

/// Results by variant: control, HA-VMSI.
type Tries = BTreeMap<&'static str, (Try, Try)>;

impl Report {
    /// In a few words.
    pub fn summary(&self) -> String {
        let well = self.rows.iter().filter(|r| (r.control, r.havmsi) == ("succeeded", "blocked"));
        let attacks: usize = self.rows.iter().map(|r| r.variants.len()).sum();
        format!("{} of {} threats blocked, {attacks} attacks", well.count(), self.rows.len())
    }
}

fn command(row: &Row) -> String {
    format!("cargo xtask attack --only {}", row.id)
}

/// The rows that are asked for.
fn select(only: &[String]) -> Result<Vec<&'static Row>> {
    let known = |id: &str| ROWS.iter().any(|r| r.id.eq_ignore_ascii_case(id));
    if let Some(strange) = only.iter().find(|id| !known(id)) {
        bail!("there is no threat {strange:?}: `cargo xtask attack --list` lists them");
    }
    let wanted = |r: &&Row| only.is_empty() || only.iter().any(|o| r.id.eq_ignore_ascii_case(o));
    Ok(ROWS.iter().filter(wanted).collect())
}

// ---- Linux ----

/// What the agent's check says about an attack.
fn linux_try(outcome: &Outcome, name: &str, monitor: bool) -> Try {
    let Some(check) = outcome.checks.iter().find(|c| c.id == name) else {
        let why = outcome.done.as_ref().map_or("the job did not end", |(_, text)| text.as_str());
        return Try::not_run(why);
    };
    let result = match check.result.as_str() {
        "exposed" => "succeeded",
        "protected" => "blocked",
        other => other,
    };
    // The guests' verdicts at the end cover all of their memory; in the control it was changed.
    let verified = !monitor || outcome.verdicts.values().all(|v| v.ok && v.corrupt == 0);
    Try {
        result: result.to_owned(),
        evidence: check.evidence.clone(),
        victim_ok: verified && check.victim_ok == Some(true),
        new_vm_ok: check.new_vm_ok == Some(true) && (!monitor || outcome.later == Some(true)),
    }
}

/// Both Linux machines, one after the other, with all attacks of the rows.
fn on_linux(ctx: &Ctx, variants: &[Variant], limit: Duration, tries: &mut Tries) -> Result<()> {
    let names: Vec<&str> = variants.iter().map(|v| v.name).collect();
    let args = run::Args {
        job: "attack".to_owned(),
        // The control's SMMU lets PCI through, so that DMA goes where a driver says.
        append: format!("iommu.passthrough=1 havmsi.checks={}", names.join(",")),
        ..run::Args::default()
    };
    for kind in [Kind::Control, Kind::Havmsi] {
        let mut config = run::configure(ctx, &args, kind)?;
        config.extra = ["-machine", "iommu=smmuv3"].map(str::to_owned).to_vec();
        let outcome = run::one(ctx, &config, limit);
        for v in variants {
            let result = match &outcome {
                Ok(outcome) => linux_try(outcome, v.name, kind == Kind::Havmsi),
                Err(e) => Try::not_run(&format!("{e:#}")),
            };
            let entry = tries.entry(v.name).or_default();
            *(if kind == Kind::Control { &mut entry.0 } else { &mut entry.1 }) = result;
        }
    }
    Ok(())
}

// ---- Payload ----

/// The longest that one attack of the payload may take on a test monitor.
const ALONE: Duration = Duration::from_secs(90);
/// Where the payload looks for its arguments (payload/README.md).
const ARGUMENTS: u64 = 0x4460_0000;

/// Results by the payload's name of the attack, and whether the monitor stopped.
type Said = (BTreeMap<String, Try>, bool);

/// A line `@attack {...}` of the payload.
fn attack_line(line: &str) -> Option<(String, Try)> {
    let event: Value = serde_json::from_str(line.strip_prefix("@attack ")?).ok()?;
    let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
    let result = Try {
        result: text("result"),
        evidence: text("detail"),
        victim_ok: event["victim_ok"] == true,
        new_vm_ok: event["new_vm_ok"] == true,
    };
    Some((text("name").trim_start_matches("attack::").to_owned(), result))
}

/// What the payload's boots take.
struct Built {
    payload: PathBuf,
    monitor: build::Monitor,
    test_monitor: build::Monitor,
}

/// Boots the payload with these attacks; on a test monitor without a check if there is its name.
fn boot_payload(
    ctx: &Ctx,
    built: &Built,
    names: &[&str],
    leave_out: Option<&str>,
    gic: u32,
    limit: Duration,
) -> Result<Said> {
    let which = leave_out.and(names.first().copied()).unwrap_or("release").replace("::", "-");
    let dir = ctx.log_dir.join(format!("payload-gic{gic}-{which}"));
    fs::create_dir_all(&dir)?;
    // The payload takes words that its names begin with, on a short line.
    let mut words: Vec<String> = names.iter().map(|n| format!("attack::{n}")).collect();
    if words.iter().map(|w| w.len() + 1).sum::<usize>() > 200 {
        words = vec!["attack::".to_owned()];
    }
    let arguments = dir.join("arguments");
    sh::write(&arguments, format!("@args {}\n", words.join(" ")))?;
    let monitor = if leave_out.is_some() { &built.test_monitor } else { &built.monitor };
    let image = built.payload.clone();
    let mut config = rows_of_tests::payload_config(image, monitor, gic, run::Cpu::CortexA57);
    let place = format!("loader,file={},addr={ARGUMENTS:#x},force-raw=on", comma(&arguments));
    config.extra = vec!["-device".to_owned(), place];
    // The shipped monitor is told as well: it must not know how to.
    let option = format!("name=opt/org.havmsi/leave-out,string={}", leave_out.unwrap_or("Owner"));
    config.extra.extend(["-fw_cfg".to_owned(), option]);
    let mut machine = Machine::start(&config, &dir)?;
    let start = Instant::now();
    let mut said = BTreeMap::new();
    loop {
        if start.elapsed() > limit {
            return Err(machine.report(&format!("time-out: {} s are over", limit.as_secs())));
        }
        match machine.next(Duration::from_millis(200))? {
            Event::Line(line) => said.extend(attack_line(&line)),
            Event::Silence if machine::epitaph(&machine.monitor_log()).is_none() => {}
            Event::Silence => return Ok((said, true)),
            Event::End(_) => {
                let stopped = machine::epitaph(&machine.monitor_log()).is_some();
                return Ok((said, stopped));
            }
        }
    }
}

/// What was said of one attack.
fn payload_try(said: &Result<Said>, name: &str, may_stop: bool) -> Try {
    match said {
        Ok((said, stopped)) => match said.get(name) {
            Some(t) => t.clone(),
            None if may_stop && *stopped => Try {
                result: "succeeded".to_owned(),
                evidence: "the monitor stops".to_owned(),
                ..Try::default()
            },
            None if *stopped => Try::not_run("the monitor stopped"),
            None => Try::not_run("the payload said nothing of it"),
        },
        Err(e) => Try::not_run(&format!("{e:#}")),
    }
}

/// The payload once on the shipped monitor, and once on each test monitor that an attack needs.
fn on_payload(ctx: &Ctx, variants: &[Variant], limit: Duration, tries: &mut Tries) -> Result<()> {
    let built = Built {
        payload: build::payload(ctx)?.context("there is no payload/ in this tree")?,
        monitor: build::monitor(ctx)?,
        test_monitor: build::test_monitor(ctx)?,
    };
    let step = Step::new("payload", Some(0));
    /// GIC version, and the check left out with the attack that is to succeed without it: what
    /// succeeds may leave a machine that is of no use to the next one.
    type Boot = (u32, Option<(&'static str, &'static str)>);
    let mut boots: BTreeMap<Boot, Vec<&Variant>> = BTreeMap::new();
    for v in variants {
        let Ground::Payload { leave_out, gic, .. } = v.ground else { continue };
        for check in [None, Some(leave_out)] {
            boots.entry((gic, check.map(|c| (c, v.name)))).or_default().push(v);
        }
    }
    for ((gic, alone), attacks) in boots {
        let leave_out = alone.map(|(check, _)| check);
        step.note(leave_out.unwrap_or("HA-VMSI"));
        let names: Vec<&str> = attacks.iter().map(|v| v.name).collect();
        // One attack alone has no need of the time of all.
        let limit = if leave_out.is_some() { limit.min(ALONE) } else { limit };
        let said = boot_payload(ctx, &built, &names, leave_out, gic, limit);
        for v in attacks {
            let stops = matches!(v.ground, Ground::Payload { stops: true, .. });
            let result = payload_try(&said, v.name, stops && leave_out.is_some());
            let entry = tries.entry(v.name).or_default();
            *(if leave_out.is_some() { &mut entry.0 } else { &mut entry.1 }) = result;
        }
        step.inc();
    }
    step.done();
    Ok(())
}

// ---- Judging ----

/// A row's two words, from its attacks: the control's attacks all succeed, here all are blocked,
/// the victim is well and another VM starts.
fn judge(row: &'static Row, tries: &Tries) -> Judged {
    let pair = |v: &Variant| {
        let (control, havmsi) = tries.get(v.name).cloned().unwrap_or_default();
        Pair {
            name: v.name,
            attacker: v.attacker.name(),
            what: v.what,
            control_machine: v.ground.control(),
            control,
            havmsi,
        }
    };
    let variants: Vec<Pair> = row.variants().iter().map(pair).collect();
    let all = |is: fn(&Pair) -> bool| variants.iter().all(is);
    let (control, havmsi, reason) = if variants.is_empty() {
        ("not-run", "not-run", Some("there is no attack for this row yet".to_owned()))
    } else {
        let control = if all(|p| p.control.result == "succeeded") { "succeeded" } else { "failed" };
        let here =
            all(|p| p.havmsi.result == "blocked" && p.havmsi.victim_ok && p.havmsi.new_vm_ok);
        (control, if here { "blocked" } else { "failed" }, None)
    };
    let command = command(row);
    Judged { id: row.id, title: row.title, control, havmsi, reason, command, variants }
}

/// Rows that may be not run at most.
const MOST_NOT_RUN: usize = 2;

/// What is wrong with the rows.
fn problems(rows: &[Judged]) -> Vec<String> {
    let mut found = Vec::new();
    for row in rows {
        for p in &row.variants {
            let mut say = |what: &str, t: &Try| {
                found.push(format!("{} {}: {what}: {}", row.id, p.name, t.evidence));
            };
            if p.control.result != "succeeded" {
                say(
                    &format!("{} on the control ({})", p.control.result, p.control_machine),
                    &p.control,
                );
            }
            if p.havmsi.result != "blocked" {
                say(&format!("{} under HA-VMSI", p.havmsi.result), &p.havmsi);
            } else if !p.havmsi.victim_ok {
                say("blocked, but the victim is not well", &p.havmsi);
            } else if !p.havmsi.new_vm_ok {
                say("blocked, but no other VM starts afterwards", &p.havmsi);
            }
        }
    }
    let not_run: Vec<&str> = rows.iter().filter(|r| r.control == "not-run").map(|r| r.id).collect();
    if not_run.len() > MOST_NOT_RUN {
        found.push(format!("not run: {}", not_run.join(", ")));
    }
    found
}

/// Carries out the rows that are asked for.
pub fn execute(ctx: &Ctx, only: &[String]) -> Result<Report> {
    let start = Instant::now();
    let rows = select(only)?;
    setup::ensure(ctx, setup::ALL)?;
    let mut tries = Tries::new();
    let limit = rows.iter().map(|r| r.limit).sum();
    let all = rows.iter().flat_map(|r| r.variants());
    let (linux, payload): (Vec<_>, Vec<_>) = all.partition(|v| v.ground == Ground::Linux);
    if !linux.is_empty() {
        on_linux(ctx, &linux, limit, &mut tries)?;
    }
    if !payload.is_empty() {
        on_payload(ctx, &payload, limit, &mut tries)?;
    }
    let rows: Vec<Judged> = rows.into_iter().map(|r| judge(r, &tries)).collect();
    let problems = problems(&rows);
    Ok(Report {
        result: if problems.is_empty() { "ok" } else { "fail" },
        problems,
        rows,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The table for people: one line a row, with the command that repeats it.
fn table(rows: &[Judged]) -> String {
    let line = |cells: [&str; 6]| {
        let [id, control, havmsi, attacks, title, command] = cells;
        format!("{id:4} {control:10} {havmsi:8} {attacks:8} {title:56} {command}\n")
    };
    let mut text = line(["id", "control", "HA-VMSI", "attacks", "threat", "to repeat it"]);
    for r in rows {
        let count = r.variants.len().to_string();
        text.push_str(&line([r.id, r.control, r.havmsi, &count, r.title, &r.command]));
    }
    text
}

fn list() {
    for row in &ROWS {
        println!("{} {} (at most {} s): {}", row.id, row.title, row.limit.as_secs(), command(row));
        for v in row.variants() {
            println!(
                "    {:20} {}, control: {}; {}",
                v.name,
                v.attacker.name(),
                v.ground.control(),
                v.what
            );
        }
    }
}

/// The `attack` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    if args.list {
        list();
        return Ok(());
    }
    if let Some(path) = &args.json {
        // Found out now rather than at the end.
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let report = execute(ctx, &args.only)?;
    println!("\n{}", table(&report.rows));
    for problem in &report.problems {
        println!("PROBLEM {problem}");
    }
    println!("{}; {:.0} s, consoles: {}", report.summary(), report.seconds, ctx.log_dir.display());
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::create_dir_all(&ctx.log_dir)?;
    sh::write(&ctx.log("report.json"), &text)?;
    if let Some(path) = &args.json {
        sh::write(path, &text)?;
    }
    if args.docs {
        docs::write(ctx, &report.rows)?;
    }
    if report.result != "ok" {
        bail!(
            "{} problem(s), see above; consoles in {}",
            report.problems.len(),
            ctx.log_dir.display()
        );
    }
    Ok(())
}

/// The committed docs/threats.md has these rows and attacks, all of them as they must be.
pub fn docs_match(ctx: &Ctx) -> Result<String> {
    docs::check(ctx)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tries(control: &str, havmsi: &str, well: bool) -> Tries {
        let t = |result: &str| Try {
            result: result.to_owned(),
            victim_ok: well,
            new_vm_ok: true,
            ..Try::default()
        };
        ROWS[1].variants().iter().map(|v| (v.name, (t(control), t(havmsi)))).collect()
    }

    #[test]
    fn only_succeeded_there_and_blocked_here_is_good() {
        let words = |t: &Tries| {
            let row = judge(&ROWS[1], t);
            let bad = problems(std::slice::from_ref(&row)).len();
            (row.control, row.havmsi, bad > 0)
        };
        assert_eq!(words(&tries("succeeded", "blocked", true)), ("succeeded", "blocked", false));
        assert_eq!(words(&tries("blocked", "blocked", true)), ("failed", "blocked", true));
        assert_eq!(words(&tries("succeeded", "succeeded", true)), ("succeeded", "failed", true));
        assert_eq!(words(&tries("succeeded", "blocked", false)), ("succeeded", "failed", true));
        assert_eq!(words(&Tries::new()), ("failed", "failed", true));
    }

    #[test]
    fn three_rows_without_a_run_are_too_many() {
        let rows = |n: usize| -> Vec<Judged> {
            let mut row = judge(&ROWS[1], &tries("succeeded", "blocked", true));
            (row.control, row.havmsi) = ("not-run", "not-run");
            vec![row; n]
        };
        assert!(problems(&rows(2)).is_empty());
        assert_eq!(problems(&rows(3)).len(), 1);
    }

    #[test]
    fn the_payloads_lines_are_read() {
        let line = r#"@attack {"id":"T05","name":"attack::t05::x","result":"blocked","detail":"DENIED","victim_ok":true,"new_vm_ok":false}"#;
        let (name, t) = attack_line(line).unwrap();
        assert_eq!((name.as_str(), t.result.as_str()), ("t05::x", "blocked"));
        assert_eq!((t.victim_ok, t.new_vm_ok), (true, false));
        assert!(attack_line("@attack {").is_none() && attack_line("@test {}").is_none());
        let stopped = Ok((BTreeMap::new(), true));
        assert_eq!(payload_try(&stopped, "t05::x", true).result, "succeeded");
        assert_eq!(payload_try(&stopped, "t05::x", false).result, "not-run");
    }

    #[test]
    fn rows_are_chosen_by_id() {
        assert_eq!(select(&["t14".to_owned()]).unwrap().len(), 1);
        assert_eq!(select(&[]).unwrap().len(), 28);
        assert!(select(&["T29".to_owned()]).is_err());
    }
}
