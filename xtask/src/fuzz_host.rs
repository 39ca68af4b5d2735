// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fuzz --host`: the pure crate against the reference model in `fuzz/`, on the
//! build machine. The target is a plain program with libFuzzer in it, so nothing
//! but a C++ compiler is needed; `cargo fuzz run -s none transitions` does the
//! same for whoever has cargo-fuzz.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;

use crate::setup::{self, Need};
use crate::{Ctx, sh, ui};

/// What cargo-fuzz passes: a counter at each edge, in this folder's crates.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table --cfg fuzzing";
/// Bytes of an input: two hundred operations.
const MAX_LEN: u32 = 1601;
/// The longest that one input may take; most take milliseconds.
const INPUT_SECONDS: u32 = 20;

/// Options of `fuzz` for the build machine.
#[derive(Debug, Clone, Default, ClapArgs)]
#[group(skip)]
pub struct Args {
    /// On this machine: the pure crate against the reference model
    #[arg(long, group = "where")]
    pub host: bool,
    /// How long (--host)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub minutes: u64,
    /// Carry out one input and show its operations (--host)
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
}

/// What a run came to.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Inputs that were carried out.
    pub inputs: u64,
    /// Edges of the code that were reached.
    pub edges: u64,
    /// Seconds.
    pub seconds: u64,
    /// The input that found a difference, or made a panic.
    pub crash: Option<PathBuf>,
}

/// Builds the target; gives the program.
fn build(ctx: &Ctx) -> Result<PathBuf> {
    setup::ensure(ctx, &[Need::Cxx])?;
    let version = sh::output(Command::new("rustc").arg("-vV").current_dir(&ctx.root))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc does not say what machine this is")?;
    let target_dir = ctx.target_dir().join("fuzz");
    let step = ui::Step::short("build the fuzz target");
    // With --target build scripts are built without the counters.
    sh::run(
        Command::new("cargo")
            .args(["build", "--release", "--locked", "--target", host, "--manifest-path"])
            .arg(ctx.root.join("fuzz/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target_dir)
            .env("RUSTFLAGS", FLAGS)
            .current_dir(&ctx.root),
        &ctx.log("build-fuzz.log"),
    )?;
    step.done();
    Ok(target_dir.join(host).join("release/transitions"))
}

/// The number behind the last `name` in a log of libFuzzer.
fn figure(log: &str, name: &str) -> u64 {
    let last = log.rsplit_once(name).map_or("", |(_, rest)| rest.trim_start());
    last.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Fuzzes for as long as `time`; what is new goes to a folder beside the build's.
pub fn fuzz(ctx: &Ctx, time: Duration) -> Result<Report> {
    let program = build(ctx)?;
    let found = ctx.target_dir().join("fuzz/corpus");
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&ctx.log_dir)?;
    let log = ctx.log("fuzz.log");
    let start = Instant::now();
    let step = ui::Step::new("fuzz the pure crate", None);
    let result = sh::run(
        Command::new(program)
            .arg(format!("-max_total_time={}", time.as_secs().max(1)))
            .arg(format!("-max_len={MAX_LEN}"))
            .arg(format!("-timeout={INPUT_SECONDS}"))
            .args(["-len_control=0", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/", ctx.log_dir.display()))
            .arg(&found)
            .arg(ctx.root.join("fuzz/corpus"))
            .current_dir(&ctx.root),
        &log,
    );
    step.done();
    let text = fs::read_to_string(&log)?;
    let crash = text
        .rsplit_once("Test unit written to ")
        .and_then(|(_, rest)| rest.lines().next())
        .map(PathBuf::from);
    if crash.is_none() {
        result?;
    }
    Ok(Report {
        inputs: figure(&text, "stat::number_of_executed_units:"),
        edges: figure(&text, " cov:"),
        seconds: start.elapsed().as_secs(),
        crash,
    })
}

/// Fails if something was found, and says how to repeat it.
pub fn verdict(report: &Report) -> Result<String> {
    if let Some(crash) = &report.crash {
        bail!(
            "the pure crate and the model differ after {} inputs\n\
             repeat it: cargo xtask fuzz --host --input {}",
            report.inputs,
            crash.display()
        );
    }
    if report.inputs == 0 {
        bail!("nothing was carried out");
    }
    Ok(format!(
        "{} inputs in {} s, {} edges, no difference",
        report.inputs, report.seconds, report.edges
    ))
}

/// Carries one input out and shows its operations.
pub fn replay(ctx: &Ctx, input: &Path) -> Result<()> {
    if !input.is_file() {
        bail!("there is no file {}", input.display());
    }
    let program = build(ctx)?;
    sh::run_attached(
        Command::new(program).arg(input).env("HAVMSI_FUZZ_VERBOSE", "1").current_dir(&ctx.root),
    )
}

/// `fuzz --host`.
pub fn main(ctx: &Ctx, args: &Args, json: Option<&Path>) -> Result<()> {
    if let Some(input) = &args.input {
        return replay(ctx, input);
    }
    let report = fuzz(ctx, Duration::from_secs(60 * args.minutes))?;
    if let Some(path) = json {
        sh::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    println!("{}", verdict(&report)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_the_last_ones() {
        let log = "#2 INITED cov: 12 ft: 13\n#9 NEW    cov: 345 ft: 400\nstat::number_of_executed_units: 77\n";
        assert_eq!(figure(log, " cov:"), 345);
        assert_eq!(figure(log, "stat::number_of_executed_units:"), 77);
        assert_eq!(figure(log, "absent:"), 0);
    }

    #[test]
    fn a_crash_and_an_empty_run_are_failures() {
        let report = |inputs, crash| Report { inputs, edges: 1, seconds: 1, crash };
        assert!(verdict(&report(5, None)).is_ok());
        assert!(verdict(&report(0, None)).is_err());
        let text = verdict(&report(5, Some("x/crash-1".into()))).unwrap_err().to_string();
        assert!(text.contains("--input x/crash-1"), "{text}");
    }
}
