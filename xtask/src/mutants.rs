// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `mutants` verb: cargo-mutants over the pure crate. What a broken function
//! does must be seen by some unit test; what none sees is explained in
//! `docs/mutants.md`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;

use crate::tool::Tool;
use crate::{Ctx, sh, ui};

/// In the version whose mutants `docs/mutants.md` explains.
const TOOL: Tool = Tool { name: "mutants", version: "27.1.0", how: &[] };
/// Of the mutants that compile, at most this share may survive, in percent.
const MOST_SURVIVORS: usize = 5;
/// Seconds until a test that hangs is given up: all of them take a few together.
const TEST_SECONDS: u32 = 30;
/// Where the survivors are explained.
const DOCS: &str = "docs/mutants.md";

/// Options of `mutants`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Only this file of the pure crate, such as `page` (may be given several times)
    #[arg(long, value_name = "NAME")]
    pub file: Vec<String>,
    /// Part K of N of the mutants, as K/N
    #[arg(long, value_name = "K/N")]
    pub shard: Option<String>,
    /// Mutants that are built and tested at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub jobs: u32,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What became of the mutants.
#[derive(Debug, Default, Serialize)]
struct Report {
    caught: usize,
    /// A test hung: seen as well.
    timeout: usize,
    /// Does not compile.
    unviable: usize,
    missed: Vec<String>,
    /// Of the missed ones, those that the docs don't explain.
    unexplained: Vec<String>,
}

fn lines(path: &Path) -> Vec<String> {
    // A list without entries may have no file.
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// A mutant without its line and column, which change with each edit above it.
fn without_place(mutant: &str) -> String {
    let mut parts = mutant.splitn(4, ':');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(file), Some(_), Some(_), Some(what)) => format!("{file}:{what}"),
        _ => mutant.to_owned(),
    }
}

/// The mutants that the docs explain: lines of code that start with a dash.
fn explained(docs: &str) -> BTreeSet<String> {
    docs.lines()
        .filter_map(|line| line.strip_prefix("- `")?.split_once('`'))
        .map(|(mutant, _)| mutant.to_owned())
        .collect()
}

impl Report {
    fn read(dir: &Path, docs: &str) -> Self {
        let count = |name: &str| lines(&dir.join(name)).len();
        let known = explained(docs);
        let missed = lines(&dir.join("missed.txt"));
        let unexplained =
            missed.iter().filter(|m| !known.contains(&without_place(m))).cloned().collect();
        Self {
            caught: count("caught.txt"),
            timeout: count("timeout.txt"),
            unviable: count("unviable.txt"),
            missed,
            unexplained,
        }
    }

    fn viable(&self) -> usize {
        self.caught + self.timeout + self.missed.len()
    }

    fn line(&self) -> String {
        format!(
            "{} mutants: {} caught, {} ended by the time limit, {} missed; {} did not compile",
            self.viable(),
            self.caught,
            self.timeout,
            self.missed.len(),
            self.unviable
        )
    }

    fn verdict(&self) -> Result<()> {
        if self.viable() == 0 {
            bail!("no mutant was tested");
        }
        if !self.unexplained.is_empty() {
            bail!(
                "{} survivors are not explained in {DOCS}:\n  {}",
                self.unexplained.len(),
                self.unexplained.join("\n  ")
            );
        }
        if self.missed.len() * 100 > self.viable() * MOST_SURVIVORS {
            bail!("more than {MOST_SURVIVORS} % survive");
        }
        Ok(())
    }
}

/// The `mutants` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    TOOL.ensure(ctx)?;
    fs::create_dir_all(&ctx.log_dir)?;
    let mut command = Command::new("nice");
    command
        .args(["-n", "10", "cargo", "mutants", "--package", "havmsi-core", "--no-shuffle"])
        .args(["--timeout", &TEST_SECONDS.to_string(), "--jobs", &args.jobs.to_string()])
        .arg("--output")
        .arg(&ctx.log_dir)
        .env_remove("CARGO_TARGET_DIR")
        .current_dir(&ctx.root);
    for file in &args.file {
        let path = format!("crates/core/src/{file}.rs");
        if !ctx.root.join(&path).is_file() {
            bail!("there is no {path}");
        }
        command.args(["--file", &path]);
    }
    if let Some(shard) = &args.shard {
        command.args(["--shard", shard]);
    }
    let step = ui::Step::new("break the pure crate", None);
    let log = ctx.log("mutants.log");
    let result = sh::run_lines(&mut command, &log, |line| step.note(line));
    step.done();
    let dir = ctx.log_dir.join("mutants.out");
    let docs = fs::read_to_string(ctx.root.join(DOCS)).context(DOCS)?;
    let report = Report::read(&dir, &docs);
    if report.viable() == 0 {
        // It could not begin; if mutants survive it ends with an error as well.
        result?;
    }
    if let Some(path) = &args.json {
        sh::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    println!("{}", report.line());
    for mutant in &report.missed {
        println!("  missed: {mutant}");
    }
    report.verdict()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCS_TEXT: &str =
        "# x\n- `crates/core/src/a.rs: replace f with ()`: equal because\ntext `y`\n";

    #[test]
    fn a_survivor_is_explained_wherever_it_stands() {
        assert_eq!(
            without_place("crates/core/src/a.rs:12:5: replace f with ()"),
            "crates/core/src/a.rs: replace f with ()"
        );
        assert_eq!(without_place("odd"), "odd");
        let known = explained(DOCS_TEXT);
        assert_eq!(known.len(), 1);
        assert!(known.contains("crates/core/src/a.rs: replace f with ()"));
    }

    #[test]
    fn survivors_need_an_explanation_and_are_few() {
        let mut report = Report { caught: 99, ..Report::default() };
        assert!(report.verdict().is_ok());
        report.missed.push("m".into());
        assert!(report.verdict().is_ok());
        report.unexplained.push("m".into());
        assert!(report.verdict().is_err());
        report.unexplained.clear();
        report.caught = 10;
        assert!(report.verdict().is_err());
        assert!(Report::default().verdict().is_err());
    }
}
