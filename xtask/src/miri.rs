// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `miri` verb: the pure crate's unit tests, and those of their machine (`fake.rs`), in Miri's
//! interpreter. Our own code there has no unsafe block; what it links has, and the tests' machine
//! has atomics and locks. Miri takes a thousand times as long as the machine itself, so what
//! walks all tables again and again is left out.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::{Deserialize, Serialize};

use crate::setup::{self, MIRI_TOOLCHAIN, Need};
use crate::{Ctx, sh, ui};

/// Tests that are left out, by the start of their names, and why.
const LEFT_OUT: [(&str, &str); 12] = [
    ("audit::", "each test audits all tables several times: ten minutes and more a test"),
    ("vm::", "an audit, and a picture of all memory, after each call: minutes a test"),
    ("hypercall::", "guests with table memory, page by page: a minute a test and more"),
    ("guest_map::", "the host's map is split for each page: a minute a test"),
    ("host_map::", "the host's map is split for each page: a minute a test"),
    ("hostile::", "random calls with an audit after each: hours"),
    ("concurrent::races_lose_no_page", "two CPUs with an audit: `schedules/` looks for races too"),
    ("worst_case::", "records of 8 GiB of RAM"),
    ("vgic::tests::interrupts_are_sgis_ppis_and_spis", "a loop over all numbers: minutes"),
    ("vgic::tests::kvm_is_never_refused", "a loop over all states: minutes"),
    ("vgic::tests::only_the_timer_is_linked_to_hardware", "a loop over all numbers: minutes"),
    ("vgic::tests::pending_sgis_are_told_from_the_rest", "a loop over all states: minutes"),
];

/// Options of `miri`.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Args {
    /// Only tests whose name contains this, left out otherwise or not (may be given several times)
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What a run came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The tool chain.
    pub toolchain: String,
    /// Tests that were interpreted.
    pub passed: u64,
    /// Tests that were not.
    pub left_out: u64,
    /// By the start of their names, and why.
    pub why: Vec<(String, String)>,
}

impl Report {
    /// A line about it.
    pub fn line(&self) -> String {
        format!(
            "{} tests in Miri ({}), no undefined behaviour; {} that take long are left out",
            self.passed, self.toolchain, self.left_out
        )
    }
}

fn command(ctx: &Ctx) -> Command {
    let mut command = Command::new("rustup");
    command
        .args(["run", MIRI_TOOLCHAIN, "cargo", "miri", "test", "--locked", "--lib"])
        .args(["-p", "havmsi-core", "--target-dir"])
        .arg(ctx.target_dir().join("miri"))
        .env_remove("RUSTFLAGS")
        .current_dir(&ctx.root);
    command
}

/// Builds what is interpreted, the standard library too.
pub fn prepare(ctx: &Ctx) -> Result<()> {
    setup::ensure(ctx, &[Need::Miri])?;
    let step = ui::Step::short("build the unit tests for Miri");
    sh::run(command(ctx).arg("--no-run"), &ctx.log("build-miri.log"))?;
    step.done();
    Ok(())
}

/// A figure of the line that closes the tests.
fn figure(log: &str, word: &str) -> Result<u64> {
    let line = log.lines().rev().find(|l| l.starts_with("test result: ok. "));
    let line = line.context("the tests came to no good end")?;
    let part = line.split(['.', ';']).find_map(|part| part.strip_suffix(word));
    part.and_then(|n| n.trim().parse().ok()).with_context(|| format!("{line}: no figure"))
}

/// Interprets the tests.
pub fn execute(ctx: &Ctx, only: &[String], limit: Option<Duration>) -> Result<Report> {
    prepare(ctx)?;
    let mut command = command(ctx);
    command.arg("--").args(only);
    if only.is_empty() {
        LEFT_OUT.iter().for_each(|(name, _)| {
            command.args(["--skip", name]);
        });
    }
    let log = ctx.log("miri.log");
    match limit {
        Some(limit) => sh::run_limited(&mut command, &log, limit)?,
        None => sh::run(&mut command, &log)?,
    }
    let text = fs::read_to_string(&log)?;
    let why = if only.is_empty() { &LEFT_OUT[..] } else { &[] };
    let report = Report {
        toolchain: MIRI_TOOLCHAIN.to_owned(),
        passed: figure(&text, " passed")?,
        left_out: figure(&text, " filtered out")?,
        why: why.iter().map(|(name, why)| ((*name).to_owned(), (*why).to_owned())).collect(),
    };
    if report.passed == 0 {
        bail!("no test was interpreted");
    }
    Ok(report)
}

/// The `miri` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    fs::create_dir_all(&ctx.log_dir)?;
    if args.only.is_empty() {
        println!("left out, as Miri takes long over them (`--only` interprets any):");
        LEFT_OUT.iter().for_each(|(name, why)| println!("  {name} {why}"));
    }
    let report = execute(ctx, &args.only, None)?;
    if let Some(path) = &args.json {
        sh::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    println!("{}", report.line());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_closing_line() {
        let log = "test a ... ok\ntest result: ok. 70 passed; 0 failed; 0 ignored; 0 measured; 71 filtered out; finished in 3.2s\n";
        assert_eq!(figure(log, " passed").unwrap(), 70);
        assert_eq!(figure(log, " filtered out").unwrap(), 71);
        assert!(figure("test result: FAILED. 1 passed; 1 failed\n", " passed").is_err());
    }
}
