// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `cargo xtask model` runs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use havmsi_models::explore::{Limits, Report, explore};
use havmsi_models::scenarios;
use havmsi_models::world::Scenario;

/// Explores every interleaving of the shipped transition code in small worlds.
#[derive(Debug, Parser)]
struct Args {
    /// Wider bounds, as far as there is time for
    #[arg(long)]
    deep: bool,
    /// How long all scenarios may take together
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Only this scenario (may be given several times)
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// How much memory it may take
    #[arg(long, default_value_t = 12)]
    gib: u64,
    /// Threads: one finds short ways to a failure
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn line(report: &Report) -> String {
    format!(
        "{:8} {:4} {:5} {:>11} {:>12} {:>5} {:>4} {:>7.1} s  {}",
        report.name,
        report.cpus,
        report.pages,
        report.states,
        report.steps,
        report.depth,
        report.vms,
        report.seconds,
        if report.complete { "all" } else { "cut short" },
    )
}

fn run(args: &Args) -> Result<()> {
    let chosen = |scenario: &Scenario| {
        args.only.is_empty() || args.only.iter().any(|name| name == scenario.name)
    };
    let list: Vec<Scenario> = scenarios::list(args.deep).into_iter().filter(chosen).collect();
    if list.is_empty() {
        bail!("no scenario is called {:?}", args.only);
    }
    let end = Instant::now() + Duration::from_secs(60 * args.minutes);
    println!("scenario CPUs pages      states        steps depth  VMs       time  explored");
    let mut reports: Vec<Report> = Vec::new();
    for scenario in list {
        let time = end.saturating_duration_since(Instant::now());
        let bytes = args.gib.saturating_mul(1 << 30);
        let report = explore(scenario, Limits { time, bytes, threads: args.threads });
        println!("{}", line(&report));
        reports.push(report);
    }
    let states: usize = reports.iter().map(|report| report.states).sum();
    println!("{states} states");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&reports)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let broken: Vec<_> = reports.iter().filter(|report| !report.broken.is_empty()).collect();
    for report in &broken {
        for broken in &report.broken {
            println!("\n{}: does not hold: {}", report.name, broken.property);
            println!("(CPUs are alike: their numbers may change from line to line)");
            broken.steps.iter().for_each(|step| println!("  {step}"));
            println!("  => {}", broken.why);
        }
    }
    if !broken.is_empty() {
        bail!("{} of {} scenarios break a promise", broken.len(), reports.len());
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
