// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `bench` verb: what operations cost, in instructions, changes of exception level and system
//! register accesses, of the same guest under plain KVM, under HA-VMSI and in a protected VM of pKVM's.
//!
//! QEMU runs with `-icount`: one tick of the counter is one instruction, so that the guest's own clock
//! and the plugin count the same thing. `bench/README.md` tells more.

pub mod applications;
pub mod counts;
pub mod docs;
pub mod profile;
pub mod quick;
pub mod report;
pub mod scaling;
pub mod symbols;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use havmsi_operations::{OPERATIONS, Operation, Task};
use serde_json::Value;

use crate::image::{self, Images};
use crate::job::{self, Limits, Outcome};
use crate::kernel::pkvm::{self, Pkvm};
use crate::machine::{Config, Kind, comma};
use crate::run::{self, Cpu};
use crate::ui::Step;
use crate::{Ctx, build, setup, sh, ui};
use counts::{Cost, Group};
use report::{Report, Three};

/// Options of `bench`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Only this operation (may be given several times)
    #[arg(long, value_name = "OPERATION", value_parser = operation)]
    pub only: Vec<usize>,
    /// Only with this interrupt controller
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: Option<u32>,
    /// Without pKVM, whose kernel is another one
    #[arg(long)]
    pub no_pkvm: bool,
    /// Fail if a count has risen by more than 5 % over the figures in docs/benchmarks (without pKVM)
    #[arg(long, conflicts_with_all = ["only", "gic", "docs"])]
    pub quick: bool,
    /// Also a Linux guest, and how costs grow with VMs, vCPUs and RAM (GICv3, without pKVM)
    #[arg(long, conflicts_with_all = ["only", "gic", "quick"])]
    pub all: bool,
    /// Write the figures and what is made of them to docs/benchmarks
    #[arg(long, conflicts_with_all = ["only", "gic", "no_pkvm"])]
    pub docs: bool,
    /// Don't measure: figures from a result of `--all --json`
    #[arg(long, value_name = "FILE", requires = "docs")]
    pub from: Option<PathBuf>,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// An operation by its name.
pub fn operation(name: &str) -> Result<usize, String> {
    havmsi_operations::find(name).ok_or_else(|| {
        let names: Vec<&str> = OPERATIONS.iter().map(|o| o.name).collect();
        format!("one of {}", names.join(", "))
    })
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// Plain KVM (nVHE) on our kernel, without the monitor.
    Kvm,
    /// Ours.
    Havmsi,
    /// Protected VMs of Linux 7.x.
    Pkvm,
}

impl System {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Havmsi => "havmsi",
            Self::Pkvm => "pkvm",
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Kvm | Self::Pkvm => Kind::Control,
            Self::Havmsi => Kind::Havmsi,
        }
    }
}

/// All that is built.
pub struct Parts {
    /// Kernel and roots.
    pub images: Images,
    /// The monitor.
    pub monitor: build::Monitor,
    /// The small VMM, with symbols.
    pub vmm: PathBuf,
    /// The guest, with symbols.
    pub guest: PathBuf,
    plugin: PathBuf,
}

impl Parts {
    /// Builds it.
    pub fn build(ctx: &Ctx) -> Result<Self> {
        setup::ensure(ctx, setup::ALL)?;
        Ok(Self {
            plugin: build::plugin(ctx)?,
            images: image::all(ctx)?,
            monitor: build::monitor(ctx)?,
            vmm: build::programs(ctx)?.join("havmsi-vmm"),
            guest: build::bench_guest(ctx)?.1,
        })
    }
}

/// The time that one machine may take.
const LIMIT: Duration = Duration::from_secs(600);
/// CPUs of the machine: one for each vCPU.
const CPUS: u32 = 2;
const MEM_MIB: u64 = 2048;
/// Counter ticks a second: one for each instruction with `-icount shift=0`.
const FREQUENCY: u64 = 1_000_000_000;
/// How QEMU counts.
const ICOUNT: &str = "shift=0,sleep=off";
/// By how many parts of 100 the guest's clock and the plugin may differ.
const CLOCK_DIFFERS: f64 = 3.0;

/// What one operation gave on one machine.
pub struct Measured {
    /// Which.
    pub operation: &'static Operation,
    /// What the plugin counted.
    pub group: Group,
    /// Counter ticks of each record, as the guest tells.
    pub ticks: Vec<u64>,
}

impl Measured {
    /// The cost of one.
    pub fn cost(&self) -> Cost {
        self.group.cost(self.operation.times)
    }

    /// The guest's clock and the plugin are two witnesses: what they disagree about.
    fn complaint(&self) -> Option<String> {
        let ticks = *self.ticks.iter().min()?;
        let counted = *self.group.instructions.iter().min()?;
        let off = (ticks as f64 - counted as f64).abs() / counted as f64 * 100.0;
        let name = self.operation.name;
        (!self.operation.kind.may_idle() && off > CLOCK_DIFFERS).then(|| {
            format!("{name}: {ticks} ticks by the guest's clock, {counted} instructions counted")
        })
    }
}

/// What one machine gave.
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// Each operation, or why it can't be.
    pub operations: Vec<Result<Measured, String>>,
}

/// The plugin's result.
const COUNTS: &str = "counts.json";

/// Runs a machine with the plugin, which leaves its result in the folder.
fn machine(
    parts: &Parts,
    system: System,
    mut config: Config,
    title: &str,
    dir: &Path,
) -> Result<Outcome> {
    fs::create_dir_all(dir)?;
    config.extra.extend(["-icount".to_owned(), ICOUNT.to_owned()]);
    config.extra.push("-plugin".to_owned());
    config.extra.push(format!("file={},out={}", comma(&parts.plugin), comma(&dir.join(COUNTS))));
    let step = Step::new(title, None);
    let limits = Limits { total: LIMIT, silence: LIMIT };
    let outcome = job::run(&config, dir, limits, |event| {
        step.note(event["operation"].as_str().unwrap_or_default());
    })
    .with_context(|| format!("the machine: {title}"))?;
    step.done();
    match &outcome.done {
        Some((true, _)) => {}
        other => bail!("{title}: {other:?}; see {}", dir.display()),
    }
    if outcome.start("monitor").and_then(Value::as_bool) != Some(system == System::Havmsi) {
        bail!("the host says otherwise about the monitor; see {}", dir.display());
    }
    Ok(outcome)
}

/// Boots a machine and measures operations. `kernel`: which, if not ours.
pub fn measure(
    ctx: &Ctx,
    parts: &Parts,
    (system, kernel): (System, Option<&Path>),
    gic: u32,
    tasks: &[Task],
) -> Result<Machine> {
    let dir = ctx.log_dir.join(format!("{}-gic{gic}", system.name()));
    let mut config = config(ctx, parts, system, gic, tasks)?;
    if let Some(kernel) = kernel {
        config.kernel = kernel.to_owned();
    }
    let outcome = machine(parts, system, config, &format!("{} on GICv{gic}", system.name()), &dir)?;
    let logs = dir.display();
    let groups = counts::read(&dir.join(COUNTS))?;
    if groups.len() != tasks.len() {
        bail!("{} operations, {} groups of marks; see {logs}", tasks.len(), groups.len());
    }
    let mut measured = Vec::new();
    for (task, group) in tasks.iter().zip(groups) {
        let (operation, name) = (task.operation(), task.to_string());
        let by_name = |e: &&Value| e["operation"] == name;
        let failed = outcome.events.iter().filter(|e| e["event"] == "failed").find(by_name);
        if let Some(event) = failed {
            measured.push(Err(event["text"].as_str().unwrap_or_default().to_owned()));
            continue;
        }
        let event = outcome.vmm.iter().find(by_name);
        let event = event.with_context(|| format!("no report of {name}; see {logs}"))?;
        if group.instructions.len() != usize::try_from(task.records())? {
            bail!("{name}: {} records, {event}", group.instructions.len());
        }
        let ticks = event["ticks"].as_array().into_iter().flatten();
        let ticks = ticks.filter_map(Value::as_u64).collect();
        measured.push(Ok(Measured { operation, group, ticks }));
    }
    let kernel = outcome.start("kernel").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(Machine { kernel, operations: measured })
}

fn config(ctx: &Ctx, parts: &Parts, system: System, gic: u32, tasks: &[Task]) -> Result<Config> {
    let names: Vec<String> = tasks.iter().map(Task::to_string).collect();
    let more = format!("havmsi.operations={}", names.join(","));
    job_config(ctx, parts, system, gic, "bench", &more)
}

/// The machine for a job; `more`: what its command line has beside.
fn job_config(
    ctx: &Ctx,
    parts: &Parts,
    system: System,
    gic: u32,
    job: &str,
    more: &str,
) -> Result<Config> {
    let args = run::Args {
        cpus: CPUS,
        mem: MEM_MIB,
        gic,
        job: job.to_owned(),
        // A vCPU that waits sleeps at once, rather than have its thread look for interrupts.
        append: format!(
            "kvm.halt_poll_ns=0 havmsi.thp=madvise havmsi.timeout={} {more}",
            LIMIT.as_secs(),
        ),
        ..run::Args::default()
    };
    let mut config = run::configure(ctx, &args, system.kind())?;
    config.kernel = parts.images.kernel.image();
    config.cpu = format!("{},cntfrq={FREQUENCY}", Cpu::CortexA57.name());
    if system == System::Pkvm {
        // The last mode counts.
        config.append.push_str(" kvm-arm.mode=protected havmsi.protected=1");
    }
    Ok(config)
}

/// Measures all that is asked for. `with_pkvm`: the third column too; `with_more`: applications, and how costs grow.
pub fn execute(
    ctx: &Ctx,
    operations: &[usize],
    gics: &[u32],
    with_pkvm: bool,
    with_more: bool,
) -> Result<(Report, Vec<String>)> {
    let tasks: Vec<Task> = operations.iter().map(|i| Task::plain(*i)).collect();
    let parts = Parts::build(ctx)?;
    let pkvm: Result<Pkvm, String> = if with_pkvm {
        pkvm::build(ctx).map_err(|e| format!("its kernel can't be had: {e:#}"))
    } else {
        Err("not asked for".to_owned())
    };
    let mut report = Report::new(ctx, &pkvm)?;
    let mut problems = Vec::new();
    for gic in gics {
        let kvm = measure(ctx, &parts, (System::Kvm, None), *gic, &tasks)?;
        let havmsi = measure(ctx, &parts, (System::Havmsi, None), *gic, &tasks)?;
        let third = match &pkvm {
            Err(why) => Err(why.clone()),
            Ok(_) if *gic != 3 => Err("pKVM needs a GICv3".to_owned()),
            Ok(pkvm) => {
                let image = pkvm.image();
                measure(ctx, &parts, (System::Pkvm, Some(&image)), *gic, &tasks)
                    .map_err(|e| format!("its machine failed: {e:#}"))
            }
        };
        report.kernels.kvm.clone_from(&kvm.kernel);
        report.kernels.havmsi.clone_from(&havmsi.kernel);
        let mut third = match third {
            Ok(machine) => {
                report.kernels.pkvm = Some(machine.kernel);
                machine.operations
            }
            Err(why) => operations.iter().map(|_| Err(why.clone())).collect(),
        };
        for ((kvm, havmsi), pkvm) in
            kvm.operations.into_iter().zip(havmsi.operations).zip(third.drain(..))
        {
            let all = Three {
                kvm: kvm.map_err(anyhow::Error::msg)?,
                havmsi: havmsi.map_err(anyhow::Error::msg)?,
                pkvm: pkvm.as_ref().ok(),
            };
            let measured = [Some(&all.kvm), Some(&all.havmsi), all.pkvm];
            problems.extend(measured.into_iter().flatten().filter_map(Measured::complaint));
            report.rows.push(report::row(*gic, &all, pkvm.as_ref().err()));
        }
    }
    if with_more {
        report.applications = applications::measure(ctx, &parts)?;
        report.scaling = scaling::measure(ctx, &parts)?;
    }
    Ok((report, problems))
}

/// The `bench` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    if let Some(path) = &args.json {
        // Found out now rather than at the end.
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.from {
        return docs::write(ctx, &quick::read(path)?);
    }
    let committed = if args.quick { Some(quick::committed(ctx)?) } else { None };
    let all: Vec<usize> = (0..OPERATIONS.len()).collect();
    let chosen = if args.only.is_empty() { all } else { args.only.clone() };
    let mut gics = vec![3, 2];
    gics.retain(|g| args.gic.is_none_or(|only| only == *g));
    let with_pkvm = !args.no_pkvm && !args.quick;
    let (report, mut problems) = execute(ctx, &chosen, &gics, with_pkvm, args.all || args.docs)?;
    println!("\n{}", report::table(&report.rows));
    println!("{}", applications::table(&report.applications));
    println!("{}", scaling::table(&report.scaling));
    if let Some(why) = &report.pkvm_left_out {
        ui::say(&format!("pKVM is left out: {why}"));
    }
    for why in report::not_on_pkvm(&report) {
        println!("{why}");
    }
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::create_dir_all(&ctx.log_dir)?;
    sh::write(&ctx.log("report.json"), &text)?;
    if let Some(path) = &args.json {
        sh::write(path, &text)?;
    }
    println!("logs: {}", ctx.log_dir.display());
    if let Some(committed) = committed {
        problems.extend(quick::compare(&committed, &report));
    }
    if !problems.is_empty() {
        bail!("{}", problems.join("\n"));
    }
    if args.docs {
        docs::write(ctx, &report)?;
    }
    Ok(())
}
