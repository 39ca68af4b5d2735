// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `run` verb.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args as ClapArgs, ValueEnum};
use serde_json::{Value, json};

use crate::image::{self, Images};
use crate::job::{self, Limits, Outcome};
use crate::machine::{self, Config, Kind};
use crate::report::{self, Report, Seconds};
use crate::setup;
use crate::ui::Step;
use crate::{Ctx, build, debian, digest, operate, sh, tcb};

/// CPU models that the machine was tried with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cpu {
    /// The paper's core: Armv8.0, no VHE
    CortexA57,
    /// Armv8.2
    NeoverseN1,
    /// Everything that QEMU emulates; features that are not switched are hidden
    Max,
}

impl Cpu {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CortexA57 => "cortex-a57",
            Self::NeoverseN1 => "neoverse-n1",
            Self::Max => "max",
        }
    }
}

/// Options of `run`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Guests side by side
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub guests: u32,
    /// vCPUs of each guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub vcpus: u32,
    /// CPUs of the host
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: u32,
    /// RAM of the host in MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1024..=16384))]
    pub mem: u64,
    /// Interrupt controller
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: u32,
    /// CPU model
    #[arg(long, value_enum, default_value_t = Cpu::CortexA57)]
    pub cpu: Cpu,
    /// Don't boot the control machine (plain KVM) for comparison
    #[arg(long, conflicts_with = "control")]
    pub no_control: bool,
    /// Boot only the control machine (plain KVM, no monitor)
    #[arg(long)]
    pub control: bool,
    /// A shell on the host instead of the guests and attacks (Ctrl-A X ends the machine)
    #[arg(long)]
    pub shell: bool,
    /// Another job for the host's agent (userland/README.md lists them)
    #[arg(long, default_value = "run")]
    pub job: String,
    /// What the job is about in full: machine, guests and job are the scenario's
    #[arg(long, value_enum, conflicts_with_all = ["job", "control", "shell"])]
    pub scenario: Option<Scenario>,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// More words for the host's kernel command line
    #[arg(long, default_value = "", value_name = "WORDS")]
    pub append: String,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            guests: 2,
            vcpus: 2,
            cpus: 4,
            mem: 4096,
            gic: 3,
            cpu: Cpu::CortexA57,
            no_control: false,
            control: false,
            shell: false,
            job: "run".to_owned(),
            scenario: None,
            json: None,
            append: String::new(),
        }
    }
}

/// A job with a machine of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// 3 guests of 1 GiB on a host of 2 GiB that swaps, compacts and scans with KSM
    Overcommit,
    /// A guest of 1 GiB on pages of 4 KiB, on transparent huge pages, on hugetlbfs: calls counted
    Hugepages,
    /// Debian as guest: its disk encrypted with a key of the monitor's, a service, a reboot
    DebianGuest,
    /// The attacks of `run`, on guests with Debian's own kernel as it comes
    DebianKernel,
}

impl Scenario {
    /// The job, its options, and how long it may take; none if the scenario is more than a job.
    fn job(self, args: &Args) -> Option<(Args, Duration, &'static str)> {
        let (guests, mem, job, words, limit) = match self {
            Self::Overcommit => {
                let words =
                    "havmsi.gmem=1024 havmsi.mib=900 havmsi.seconds=1500 havmsi.timeout=3000";
                (3, 2048, "overcommit", words, 3600)
            }
            Self::Hugepages => {
                let words = "havmsi.gmem=1024 havmsi.mib=900 havmsi.timeout=900";
                (1, 3072, "hugepages", words, 1200)
            }
            Self::DebianGuest | Self::DebianKernel => return None,
        };
        let args = Args {
            guests,
            mem,
            job: job.to_owned(),
            no_control: true,
            append: format!("{words} {}", args.append),
            ..args.clone()
        };
        Some((args, Duration::from_secs(limit), job))
    }
}

/// Builds what a machine needs and configures it.
pub fn configure(ctx: &Ctx, args: &Args, kind: Kind) -> Result<Config> {
    setup::ensure(ctx, setup::ALL)?;
    let images = image::all(ctx)?;
    let monitor = if kind == Kind::Havmsi { Some(build::monitor(ctx)?) } else { None };
    Ok(args.config(kind, &images, monitor.as_ref(), &args.job))
}

impl Args {
    /// The machine that these options ask for.
    pub fn config(
        &self,
        kind: Kind,
        images: &Images,
        monitor: Option<&build::Monitor>,
        job: &str,
    ) -> Config {
        let mut append = format!(
            "console=ttyAMA0 loglevel=5 panic=-1 root=/dev/vda init=/init kvm-arm.mode={} havmsi.job={job} havmsi.guests={} havmsi.vcpus={} havmsi.gic={}",
            if kind == Kind::Havmsi { "havmsi" } else { "nvhe" },
            self.guests,
            self.vcpus,
            self.gic,
        );
        if !self.append.is_empty() {
            append.push(' ');
            append.push_str(&self.append);
        }
        Config {
            kind,
            cpus: self.cpus,
            mem_mib: self.mem,
            gic: self.gic,
            cpu: self.cpu.name().to_owned(),
            kernel: images.kernel.image(),
            root: Some(images.host.clone()),
            append,
            monitor: monitor.map(|m| m.image.clone()),
            behind: vec![],
            secret: None,
            extra: vec![],
        }
    }
}

const LIMIT: Duration = Duration::from_secs(420);
const SILENCE: Duration = Duration::from_secs(120);

/// Runs the job on one machine, with a bar.
pub fn one(ctx: &Ctx, config: &Config, total: Duration) -> Result<Outcome> {
    let title = match config.kind {
        Kind::Control => "plain KVM (control)",
        Kind::Havmsi => "HA-VMSI",
        Kind::Bare => "no hypervisor",
    };
    let step = Step::new(title, None);
    // A scenario's guests are silent while their host swaps.
    let silence = if total > LIMIT { total / 6 } else { SILENCE.min(total) };
    let limits = Limits { total, silence };
    let outcome = job::run(config, &ctx.log_dir.join(config.kind.name()), limits, |event| {
        step.note(&describe(event))
    })
    .with_context(|| format!("the machine with {title}"))?;
    step.done();
    Ok(outcome)
}

/// An event in a few words.
pub fn describe(event: &Value) -> String {
    let text = |name: &str| event[name].as_str().unwrap_or_default();
    match text("event") {
        "progress" => {
            format!("{} {}/{} {}", text("step"), event["done"], event["total"], text("text"))
        }
        "check" => format!("check {} {}", text("id"), text("result")),
        "verdict" => format!("guest {} verified {} MiB", event["index"], event["verified_mib"]),
        other => other.to_owned(),
    }
}

/// What a single outcome says against itself.
pub fn complaints(outcome: &Outcome, title: &str, guests: u32, must_verify: bool) -> Vec<String> {
    let mut found = Vec::new();
    match &outcome.done {
        Some((true, _)) => {}
        Some((false, text)) => found.push(format!("the job failed on {title}: {text}")),
        None => found.push(format!("the job did not end on {title}")),
    }
    if outcome.start("kvm").and_then(Value::as_bool) == Some(false) {
        found.push(format!(
            "the host has no /dev/kvm on {title}: is this kernel built with the series, and does the monitor answer? \
             (linux/README.md lists what its log says)"
        ));
    }
    if must_verify {
        for index in 0..guests {
            match outcome.verdicts.get(&index) {
                Some(v) if v.ok && v.booted && v.corrupt == 0 && v.verified_mib >= 16 => {}
                Some(v) => found.push(format!(
                    "guest {index} on {title}: booted {}, verified {} MiB, {} corrupt: {}",
                    v.booted, v.verified_mib, v.corrupt, v.text
                )),
                None => found.push(format!("guest {index} on {title} gave no verdict")),
            }
        }
    }
    found
}

/// Runs both machines and judges what came of it.
pub fn execute(ctx: &Ctx, args: &Args) -> Result<Report> {
    match args.scenario {
        Some(Scenario::DebianGuest) => return debian::execute(ctx, args),
        Some(Scenario::DebianKernel) => return debian::kernel(ctx, args),
        _ => {}
    }
    let start = Instant::now();
    let scenario = args.scenario.and_then(|scenario| scenario.job(args));
    let (args, limit, event) = match &scenario {
        Some((args, limit, event)) => (args, *limit, Some(*event)),
        None => (args, LIMIT, None),
    };
    setup::ensure(ctx, setup::ALL)?;
    let images = image::all(ctx)?;
    let monitor = if args.control { None } else { Some(build::monitor(ctx)?) };
    let config = |kind| args.config(kind, &images, monitor.as_ref(), &args.job);
    let is_run = args.job == "run";
    let expected = if is_run && !args.control {
        Some(digest::compute(ctx, &digest::Args::guest(args.vcpus, args.gic))?)
    } else {
        None
    };
    let mut seconds = Seconds { build: start.elapsed().as_secs_f64(), ..Seconds::default() };
    let control =
        if args.no_control { None } else { Some(one(ctx, &config(Kind::Control), limit)?) };
    let havmsi = if args.control { None } else { Some(one(ctx, &config(Kind::Havmsi), limit)?) };
    seconds.control = control.as_ref().map_or(0.0, |o| o.seconds);
    seconds.havmsi = havmsi.as_ref().map_or(0.0, |o| o.seconds);

    let rows = report::rows(control.as_ref(), havmsi.as_ref());
    let mut problems = Vec::new();
    if is_run {
        problems = report::problems(&rows, control.is_some(), havmsi.is_some(), args.guests);
    }
    // In the control the attacks change the guests' memory: there they need not verify.
    for (outcome, title, verify) in [(&control, "plain KVM", false), (&havmsi, "HA-VMSI", is_run)] {
        if let Some(outcome) = outcome {
            problems.extend(complaints(outcome, title, args.guests, verify));
        }
    }
    let guests =
        havmsi.as_ref().map(|o| report::guests(o, expected.as_deref())).unwrap_or_default();
    if is_run {
        for g in guests.iter().filter(|g| g.digest.is_none() || g.digest != g.digest_expected) {
            problems.push(format!(
                "guest {}: the monitor measured {}, its files and configuration give {}",
                g.index,
                g.digest.as_deref().unwrap_or("nothing"),
                g.digest_expected.as_deref().unwrap_or("nothing")
            ));
        }
    }
    if args.job == "operate"
        && let Some(outcome) = &havmsi
        && let Err(e) = operate::digests(ctx, outcome, args)
    {
        problems.push(e.to_string());
    }
    let tcb = if args.control { tcb::Summary::default() } else { tcb::count(ctx)? };
    seconds.total = start.elapsed().as_secs_f64();
    Ok(Report {
        result: if problems.is_empty() { "ok" } else { "fail" },
        problems,
        guests,
        checks: rows,
        tcb,
        machine: json!({
            "cpu": args.cpu.name(), "gic": args.gic, "cpus": args.cpus, "mem_mib": args.mem,
            "guests": args.guests, "vcpus": args.vcpus, "qemu": setup::qemu_version()?,
            "kernel": havmsi.as_ref().or(control.as_ref()).and_then(|o| o.start("kernel")).cloned(),
            "logs": ctx.log_dir,
        }),
        scenario: havmsi.as_ref().and_then(|o| last(o, event?)),
        seconds,
    })
}

/// The last event of this name.
fn last(outcome: &Outcome, name: &str) -> Option<Value> {
    outcome.events.iter().rfind(|e| e["event"] == name).cloned()
}

/// The `run` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    if args.shell {
        let kind = if args.control { Kind::Control } else { Kind::Havmsi };
        let config = configure(ctx, &Args { job: "shell".to_owned(), ..args.clone() }, kind)?;
        return machine::shell(&config, &ctx.log_dir.join(kind.name()));
    }
    if let Some(path) = &args.json {
        // Found out now rather than at the end.
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let report = execute(ctx, args)?;
    print_result(&report, ctx);
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::create_dir_all(&ctx.log_dir)?;
    sh::write(&ctx.log("report.json"), &text)?;
    if let Some(path) = &args.json {
        sh::write(path, &text)?;
    }
    if report.result != "ok" {
        bail!(
            "the run failed: {} problem(s), see above; consoles in {}",
            report.problems.len(),
            ctx.log_dir.display()
        );
    }
    Ok(())
}

fn print_result(report: &Report, ctx: &Ctx) {
    if !report.checks.is_empty() {
        println!("\n{}", report::table(&report.checks));
    }
    for g in &report.guests {
        println!(
            "guest {}: {}, {} vCPUs, verified {} MiB, {} corrupt, digest {}",
            g.index,
            if g.ok { "ok" } else { "NOT OK" },
            g.vcpus,
            g.verified_mib,
            g.corrupt,
            g.digest.as_deref().unwrap_or("-")
        );
    }
    if let Some(figures) = report.scenario.as_ref().and_then(Value::as_object) {
        figures.iter().for_each(|(name, value)| println!("{name}: {value}"));
    }
    for problem in &report.problems {
        println!("PROBLEM {problem}");
    }
    println!("consoles: {}", ctx.log_dir.display());
}
