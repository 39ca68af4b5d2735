// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzing on the emulated machine: the payload makes the calls (`payload/src/fuzz.rs`), a
//! monitor with the feature `audit` checks itself after each batch, and this side watches.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use havmsi_abi::layout;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dtb::RAM_BASE;
use crate::fuzz::Args;
use crate::machine::{Config, Event, Kind, Machine};
use crate::setup::{self, Need};
use crate::ui::Step;
use crate::{Ctx, build, sh};

/// RAM of the machine: what the payload is linked for.
const MEM_MIB: u64 = 1024;
/// Calls in one batch, of all CPUs together.
const BATCH: u64 = 20_000;
/// The longest time without a line: a batch takes seconds.
const SILENCE: Duration = Duration::from_secs(180);
/// At least so many of a hundred calls must be accepted, or the fuzzer tests nothing.
const ACCEPTED_PERCENT: u64 = 20;
/// Of each function, at least one of so many calls must be an accepted one of it.
const RAREST: u64 = 5_000;

/// What became of one function's calls.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Calls of it.
    pub calls: u64,
    /// Those that were accepted.
    pub accepted: u64,
    /// Answers by name.
    pub answers: serde_json::Map<String, Value>,
}

/// What a run gave.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// `ok`, or `violation`.
    pub result: String,
    /// What was found.
    pub violation: Option<String>,
    /// How to see it again.
    pub replay: Option<String>,
    /// What the random numbers started from.
    pub seed: String,
    /// CPUs that called at once.
    pub cpus: u32,
    /// Version of the interrupt controller.
    pub gic: u32,
    /// Model of the CPUs.
    pub cpu: String,
    /// Calls of the host's.
    pub calls: u64,
    /// Of which accepted.
    pub accepted: u64,
    /// Batches.
    pub batches: u64,
    /// Audits of all tables and records.
    pub audits: u64,
    /// Loads and stores of the host's to what it should not reach, and other instructions.
    pub accesses: u64,
    /// Entries into guests.
    pub runs: u64,
    /// Duration.
    pub seconds: f64,
    /// Rate.
    pub calls_per_second: u64,
    /// By function.
    pub functions: Vec<Function>,
}

impl Report {
    /// The closing line.
    pub fn line(&self) -> String {
        format!(
            "{} calls ({} % accepted) of {} functions from {} CPUs in {} batches, {} audits, {} runs of guests, {} accesses; {:.0} s, {} calls/s",
            self.calls,
            self.accepted * 100 / self.calls.max(1),
            self.functions.len(),
            self.cpus,
            self.batches,
            self.audits,
            self.runs,
            self.accesses,
            self.seconds,
            self.calls_per_second,
        )
    }

    /// The table of functions.
    fn table(&self) -> String {
        let mut text = format!("{:24} {:>10} {:>10}   answers\n", "function", "calls", "accepted");
        for f in &self.functions {
            let answers: Vec<String> =
                f.answers.iter().map(|(name, count)| format!("{name} {count}")).collect();
            text.push_str(&format!(
                "{:24} {:>10} {:>10}   {}\n",
                f.name,
                f.calls,
                f.accepted,
                answers.join(", ")
            ));
        }
        text
    }

    /// Whether the calls were of a kind that tests something.
    fn complaint(&self) -> Option<String> {
        if self.accepted * 100 < self.calls * ACCEPTED_PERCENT {
            return Some(format!(
                "only {} of {} calls were accepted: such a run tests too little",
                self.accepted, self.calls
            ));
        }
        // Of a GICv3 no device can be mapped.
        let known = self.functions.iter().filter(|f| {
            f.name != "unknown"
                && (f.name != "MapDev" || self.gic == 2)
                && (!["CpuOff", "CpuOn"].contains(&f.name.as_str()) || self.cpus > 1)
        });
        let rare = known.min_by_key(|f| f.accepted).filter(|f| f.accepted * RAREST < self.calls)?;
        Some(format!(
            "only {} of {} calls of {} were accepted: such a run tests too little of it",
            rare.accepted, rare.calls, rare.name
        ))
    }
}

/// Builds what a run needs.
pub fn prepare(ctx: &Ctx) -> Result<()> {
    setup::ensure(ctx, &[Need::Qemu, Need::Targets, Need::Binutils])?;
    build::test_monitor(ctx)?;
    build::payload(ctx)?;
    Ok(())
}

/// Starts the machine and follows it to the end. `limit` is for the whole, if there is one.
pub fn run(ctx: &Ctx, args: &Args, limit: Option<Duration>) -> Result<Report> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => {
            let mut bytes = [0; 8];
            std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
            u64::from_le_bytes(bytes)
        }
    };
    std::fs::create_dir_all(&ctx.log_dir)?;
    let words = ctx.log("arguments");
    sh::write(
        &words,
        format!(
            "@args --fuzz seed={seed} calls={} cpus={} from={} batch={BATCH}\n",
            args.calls, args.cpus, args.from
        ),
    )?;
    let at = format!(
        "loader,file={},addr={:#x},force-raw=on",
        words.display().to_string().replace(',', ",,"),
        layout::host_initrd(RAM_BASE, MEM_MIB << 20)
    );
    let mut extra = vec!["-device".to_owned(), at];
    if let Some(check) = &args.leave_out {
        extra.extend([
            "-fw_cfg".to_owned(),
            format!("name=opt/org.havmsi/leave-out,string={check}"),
        ]);
    }
    let config = Config {
        kind: Kind::Havmsi,
        cpus: args.cpus,
        mem_mib: MEM_MIB,
        gic: args.gic,
        cpu: args.cpu.name().to_owned(),
        kernel: build::payload(ctx)?.context("there is no payload/ in this tree")?,
        root: None,
        append: String::new(),
        monitor: Some(build::test_monitor(ctx)?.image),
        behind: vec![],
        secret: None,
        extra,
    };
    let mut report = Report {
        seed: format!("{seed:#x}"),
        cpus: args.cpus,
        gic: args.gic,
        cpu: config.cpu.clone(),
        ..Report::default()
    };
    let replay = |batch: u64| {
        format!(
            "cargo xtask fuzz --target --seed {seed:#x} --cpus {} --gic {} --cpu {} --from {batch} --calls {BATCH}",
            args.cpus,
            args.gic,
            args.cpu.name()
        )
    };
    let step = Step::new(
        &format!("{} calls from {} CPUs, seed {seed:#x}", args.calls, args.cpus),
        Some(args.calls.div_ceil(BATCH)),
    );
    let mut machine = Machine::start(&config, &ctx.log_dir)?;
    let start = Instant::now();
    let mut last = Instant::now();
    let mut batch = args.from;
    let mut ended = false;
    let found = loop {
        if let Some(limit) = limit.filter(|limit| start.elapsed() > *limit) {
            return Err(machine.report(&format!(
                "time-out: {} s are over in batch {batch}; replay: {}",
                limit.as_secs(),
                replay(batch)
            )));
        }
        match machine.next(Duration::from_secs(1))? {
            Event::Silence => {
                if let Some(line) = crate::machine::epitaph(&machine.monitor_log()) {
                    break Some(format!("the monitor stopped: {line}"));
                }
                if last.elapsed() > SILENCE {
                    break Some(format!(
                        "nothing for {} s: a CPU hangs, probably in the monitor",
                        SILENCE.as_secs()
                    ));
                }
            }
            Event::End(_) if ended => break None,
            Event::End(_) => break Some("the machine ended by itself".to_owned()),
            Event::Line(line) => {
                last = Instant::now();
                let Some(json) = line.strip_prefix("@fuzz ") else {
                    if let Some(json) = line.strip_prefix("@panic ") {
                        break Some(format!("the payload broke: {json}"));
                    }
                    continue;
                };
                let event: Value =
                    serde_json::from_str(json).with_context(|| format!("a broken line: {line}"))?;
                match event["event"].as_str().unwrap_or_default() {
                    "batch" => {
                        batch = event["batch"].as_u64().unwrap_or(batch) + 1;
                        step.inc();
                    }
                    "function" => report.functions.push(serde_json::from_value(event)?),
                    "violation" => {
                        batch = event["batch"].as_u64().unwrap_or(batch);
                        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
                        let after = event["calls"].as_u64().unwrap_or(0);
                        report.calls = after;
                        break Some(format!("{} (after about {after} calls)", text("detail")));
                    }
                    "end" => {
                        let number = |name: &str| event[name].as_u64().unwrap_or(0);
                        report.calls = number("calls");
                        report.accepted = number("accepted");
                        report.batches = number("batches");
                        report.audits = number("audits");
                        report.accesses = number("accesses");
                        report.runs = number("runs");
                        report.seconds = start.elapsed().as_secs_f64();
                        ended = true;
                    }
                    _ => {}
                }
            }
        }
    };
    step.done();
    report.result = if found.is_some() { "violation" } else { "ok" }.to_owned();
    if let Some(found) = found {
        // The rest of the words is on its way.
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until && !matches!(machine.next(secs(1))?, Event::End(_)) {}
        report.seconds = start.elapsed().as_secs_f64();
        let audit = machine.monitor_log();
        let audit = audit.lines().find(|l| l.contains("audit:")).unwrap_or_default();
        let what = [found.as_str(), audit].join(" ");
        eprintln!("{:#}", machine.report(&format!("batch {batch}: {}", what.trim())));
        report.violation = Some(what.trim().to_owned());
        report.replay = Some(replay(batch));
    }
    report.calls_per_second = per_second(report.calls, report.seconds);
    Ok(report)
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate, for people")]
fn per_second(calls: u64, seconds: f64) -> u64 {
    (calls as f64 / seconds.max(0.001)) as u64
}

/// A run as a row of `cargo xtask test`.
pub fn row(ctx: &Ctx, args: &Args, limit: Duration) -> Result<String> {
    let report = run(ctx, args, Some(limit))?;
    verdict(&report)?;
    Ok(report.line())
}

fn verdict(report: &Report) -> Result<()> {
    if let (Some(what), Some(replay)) = (&report.violation, &report.replay) {
        bail!("{what}\nseed {}, replay: {replay}", report.seed);
    }
    if let Some(complaint) = report.complaint() {
        bail!("{complaint}");
    }
    Ok(())
}

/// `cargo xtask fuzz --target`.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    prepare(ctx)?;
    let report = run(ctx, args, None)?;
    if let Some(path) = &args.json {
        sh::write(path, serde_json::to_string_pretty(&report)? + "\n").context("the results")?;
    }
    print!("{}", report.table());
    println!("seed {}, logs in {}", report.seed, ctx.log_dir.display());
    verdict(&report)?;
    println!("{}", report.line());
    Ok(())
}
