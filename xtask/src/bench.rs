// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `bench` verb: what operations cost, in instructions, changes of exception level and system
//! register accesses, of the same guest under plain KVM and under HA-VMSI.
//!
//! QEMU runs with `-icount`: one tick of the counter is one instruction, so that the guest's own clock
//! and the plugin count the same thing. `bench/README.md` tells more.

pub mod counts;
pub mod profile;
pub mod symbols;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use havmsi_operations::{OPERATIONS, Operation};
use serde::Serialize;
use serde_json::{Value, json};

use crate::image::{self, Images};
use crate::job::{self, Limits};
use crate::machine::{Config, Kind, comma};
use crate::run::{self, Cpu};
use crate::ui::Step;
use crate::{Ctx, build, setup, sh};
use counts::{Cost, Group};

/// Options of `bench`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Only this operation (may be given several times)
    #[arg(long, value_name = "OPERATION", value_parser = operation)]
    pub only: Vec<usize>,
    /// Only with this interrupt controller
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: Option<u32>,
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
}

impl System {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Havmsi => "havmsi",
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Kvm => Kind::Control,
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

/// Boots a machine and measures operations.
pub fn measure(
    ctx: &Ctx,
    parts: &Parts,
    system: System,
    gic: u32,
    operations: &[usize],
) -> Result<Vec<Measured>> {
    let dir = ctx.log_dir.join(format!("{}-gic{gic}", system.name()));
    fs::create_dir_all(&dir)?;
    let mut config = config(ctx, parts, system, gic, operations)?;
    let result = dir.join("counts.json");
    config.extra.extend(["-icount".to_owned(), "shift=0,sleep=off".to_owned()]);
    config.extra.push("-plugin".to_owned());
    config.extra.push(format!("file={},out={}", comma(&parts.plugin), comma(&result)));
    let step = Step::new(&format!("{} on GICv{gic}", system.name()), None);
    let limits = Limits { total: LIMIT, silence: LIMIT };
    let outcome = job::run(&config, &dir, limits, |event| {
        step.note(event["operation"].as_str().unwrap_or_default());
    })
    .with_context(|| format!("the machine with {}", system.name()))?;
    step.done();
    match &outcome.done {
        Some((true, _)) => {}
        other => bail!("{} on GICv{gic}: {other:?}; see {}", system.name(), dir.display()),
    }
    if outcome.start("monitor").and_then(Value::as_bool) != Some(system == System::Havmsi) {
        bail!("the host says otherwise about the monitor; see {}", dir.display());
    }
    let groups = counts::read(&result)?;
    if groups.len() != operations.len() || outcome.vmm.len() != operations.len() {
        bail!(
            "{} operations, {} groups of marks, {} reports; see {}",
            operations.len(),
            groups.len(),
            outcome.vmm.len(),
            dir.display()
        );
    }
    let mut measured = Vec::new();
    for ((index, group), event) in operations.iter().zip(groups).zip(outcome.vmm) {
        let operation = OPERATIONS.get(*index).context("no such operation")?;
        if event["operation"] != operation.name
            || group.instructions.len() != usize::try_from(operation.records)?
        {
            bail!("{}: {} records, {event}", operation.name, group.instructions.len());
        }
        let ticks = event["ticks"].as_array().into_iter().flatten();
        let ticks = ticks.filter_map(Value::as_u64).collect();
        measured.push(Measured { operation, group, ticks });
    }
    Ok(measured)
}

fn config(
    ctx: &Ctx,
    parts: &Parts,
    system: System,
    gic: u32,
    operations: &[usize],
) -> Result<Config> {
    let names: Vec<&str> =
        operations.iter().filter_map(|i| OPERATIONS.get(*i)).map(|o| o.name).collect();
    let args = run::Args {
        cpus: CPUS,
        mem: MEM_MIB,
        gic,
        job: "bench".to_owned(),
        // A vCPU that waits sleeps at once, rather than have its thread look for interrupts.
        append: format!(
            "kvm.halt_poll_ns=0 havmsi.thp=madvise havmsi.timeout={} havmsi.operations={}",
            LIMIT.as_secs(),
            names.join(",")
        ),
        ..run::Args::default()
    };
    let mut config = run::configure(ctx, &args, system.kind())?;
    config.kernel = parts.images.kernel.image();
    config.cpu = format!("{},cntfrq={FREQUENCY}", Cpu::CortexA57.name());
    Ok(config)
}

/// A row of the result.
#[derive(Debug, Serialize)]
pub struct Row {
    operation: &'static str,
    what: &'static str,
    gic: u32,
    /// Instructions.
    kvm: f64,
    havmsi: f64,
    ratio_kvm: f64,
    /// All that was counted, by system.
    costs: Costs,
}

#[derive(Debug, Serialize)]
struct Costs {
    kvm: Cost,
    havmsi: Cost,
}

fn row(gic: u32, kvm: &Measured, havmsi: &Measured) -> Row {
    let costs = Costs { kvm: kvm.cost(), havmsi: havmsi.cost() };
    let (a, b) = (costs.kvm.instructions, costs.havmsi.instructions);
    Row {
        operation: kvm.operation.name,
        what: kvm.operation.what,
        gic,
        kvm: a,
        havmsi: b,
        ratio_kvm: (b / a * 1000.0).round() / 1000.0,
        costs,
    }
}

/// The result as a table for people.
fn table(rows: &[Row]) -> String {
    let mut text = "| operation | GIC | KVM | HA-VMSI | ratio | transitions | sysregs | barriers | TLBI | EL3/EL2 |\n\
                    |---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for row in rows {
        let (k, h) = (&row.costs.kvm, &row.costs.havmsi);
        let pair = |f: fn(&Cost) -> f64| format!("{:.1} → {:.1}", f(k), f(h));
        text.push_str(&format!(
            "| {} | v{} | {:.0} | {:.0} | {:.2} | {} | {} | {} | {} | {:.0} → {:.0} |\n",
            row.operation,
            row.gic,
            row.kvm,
            row.havmsi,
            row.ratio_kvm,
            pair(|c| c.transitions),
            pair(|c| c.sysregs),
            pair(|c| c.barriers),
            pair(|c| c.tlbi),
            k.levels[2] + k.levels[3],
            h.levels[2] + h.levels[3],
        ));
    }
    text
}

/// The `bench` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    if let Some(path) = &args.json {
        // Found out now rather than at the end.
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let parts = Parts::build(ctx)?;
    let all: Vec<usize> = (0..OPERATIONS.len()).collect();
    let chosen = if args.only.is_empty() { all } else { args.only.clone() };
    let (mut rows, mut problems) = (Vec::new(), Vec::new());
    for gic in [3, 2].into_iter().filter(|g| args.gic.is_none_or(|only| only == *g)) {
        let kvm = measure(ctx, &parts, System::Kvm, gic, &chosen)?;
        let havmsi = measure(ctx, &parts, System::Havmsi, gic, &chosen)?;
        for (kvm, havmsi) in kvm.iter().zip(&havmsi) {
            problems.extend([kvm, havmsi].into_iter().filter_map(Measured::complaint));
            rows.push(row(gic, kvm, havmsi));
        }
    }
    println!("\n{}", table(&rows));
    let commit = sh::output(Command::new("git").current_dir(&ctx.root).args([
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]))?;
    let report = json!({
        "commit": commit.trim(),
        "machine": {
            "qemu": setup::qemu_version()?,
            "cpu": Cpu::CortexA57.name(),
            "cpus": CPUS,
            "mem_mib": MEM_MIB,
            "icount": "shift=0,sleep=off",
        },
        "rows": rows,
    });
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::create_dir_all(&ctx.log_dir)?;
    sh::write(&ctx.log("report.json"), &text)?;
    if let Some(path) = &args.json {
        sh::write(path, &text)?;
    }
    println!("logs: {}", ctx.log_dir.display());
    if !problems.is_empty() {
        bail!("{}", problems.join("\n"));
    }
    Ok(())
}
