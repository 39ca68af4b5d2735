// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `coverage` verb: which lines of the pure crate its unit tests execute. The compiler counts
//! (`-C instrument-coverage`), the tools of the same LLVM read; nothing else is needed. Lines are
//! those of the crate as it is shipped, and of the audit: tests and their machine don't count.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::setup::{self, Need};
use crate::{Ctx, sh, tcb, ui};

/// Of 100 lines, as many must be executed.
const LEAST: f64 = 95.0;
/// What is no part of the crate but in a test.
const TESTS: [&str; 5] =
    ["fake.rs", "concurrent.rs", "hostile.rs", "worst_case.rs", "leave_out.rs"];

/// Options of `coverage`.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Args {
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// The lines of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Lines that can be executed.
    pub lines: usize,
    /// Of which were.
    pub executed: usize,
    /// Those that were not: `12` or `12-15`.
    pub gaps: Vec<String>,
}

/// What a run came to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Lines that can be executed.
    pub lines: usize,
    /// Of which were.
    pub executed: usize,
    /// By file.
    pub files: BTreeMap<String, File>,
}

impl Report {
    /// Of 100 lines.
    pub fn percent(&self) -> f64 {
        let n = |n: usize| u32::try_from(n).map_or(0.0, f64::from);
        if self.lines == 0 { 0.0 } else { 100.0 * n(self.executed) / n(self.lines) }
    }

    /// A line about it; fails if that is not enough.
    pub fn verdict(&self) -> Result<String> {
        let line = format!(
            "{} of {} lines of the pure crate are executed by its unit tests: {:.2} %",
            self.executed,
            self.lines,
            self.percent()
        );
        if self.percent() < LEAST {
            let gaps: Vec<String> = self.gaps().collect();
            bail!("{line}; there should be {LEAST} %. Not executed:\n{}", gaps.join("\n"));
        }
        Ok(line)
    }

    /// What was not executed.
    pub fn gaps(&self) -> impl Iterator<Item = String> {
        self.files
            .iter()
            .flat_map(|(name, file)| file.gaps.iter().map(move |g| format!("{name}:{g}")))
    }
}

/// Line numbers as ranges.
fn ranges(lines: &[u32]) -> Vec<String> {
    let mut found: Vec<(u32, u32)> = Vec::new();
    for line in lines {
        match found.last_mut() {
            Some(last) if last.1 + 1 == *line => last.1 = *line,
            _ => found.push((*line, *line)),
        }
    }
    let text = |(from, to): &(u32, u32)| {
        if from == to { from.to_string() } else { format!("{from}-{to}") }
    };
    found.iter().map(text).collect()
}

/// Reads what llvm-cov exports (`--format=lcov`): how often each line was executed.
/// `shipped` gives the lines of a file that count, or nothing if none does.
fn read(
    lcov: &str,
    mut shipped: impl FnMut(&str) -> Option<(String, std::collections::BTreeSet<u32>)>,
) -> Report {
    let mut files: BTreeMap<String, BTreeMap<u32, u64>> = BTreeMap::new();
    let mut counted = None;
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            counted = shipped(path);
        } else if let (Some(rest), Some((name, lines))) = (line.strip_prefix("DA:"), &counted)
            && let Some((at, n)) = rest.split_once(',')
            && let (Ok(at), Ok(n)) =
                (at.parse::<u32>(), n.split(',').next().unwrap_or("").parse::<u64>())
            && lines.contains(&at)
        {
            // A generic function is there once for each type.
            let count = files.entry(name.clone()).or_default().entry(at).or_default();
            *count = (*count).max(n);
        }
    }
    let mut report = Report::default();
    for (name, lines) in files {
        let missed: Vec<u32> = lines.iter().filter(|(_, n)| **n == 0).map(|(at, _)| *at).collect();
        let file = File {
            lines: lines.len(),
            executed: lines.len() - missed.len(),
            gaps: ranges(&missed),
        };
        report.lines += file.lines;
        report.executed += file.executed;
        report.files.insert(name, file);
    }
    report
}

/// The folder of the compiler's LLVM tools.
fn tools() -> Result<PathBuf> {
    let print = |what: &[&str]| sh::output(Command::new("rustc").args(what));
    let version = print(&["-vV"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let sysroot = print(&["--print", "sysroot"])?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib").join(host.context("rustc -vV")?).join("bin"))
}

/// Whether they are there.
pub fn have_tools() -> bool {
    tools().is_ok_and(|dir| dir.join("llvm-cov").is_file())
}

/// Builds the unit tests with counters; gives the program.
pub fn build(ctx: &Ctx) -> Result<PathBuf> {
    setup::ensure(ctx, &[Need::LlvmTools])?;
    fs::create_dir_all(&ctx.log_dir)?;
    let step = ui::Step::short("build the unit tests with counters");
    let messages = sh::output(
        Command::new("cargo")
            .args(["test", "--no-run", "--locked", "--lib", "-p", "havmsi-core"])
            .args(["--message-format=json", "--target-dir"])
            .arg(ctx.target_dir().join("coverage"))
            .env("RUSTFLAGS", "-C instrument-coverage")
            .current_dir(&ctx.root),
    )?;
    step.done();
    let messages = messages.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let mut programs = messages.filter_map(|m| m["executable"].as_str().map(PathBuf::from));
    programs.next_back().context("Cargo built no test")
}

/// Runs the unit tests and sees what they execute.
pub fn measure(ctx: &Ctx) -> Result<Report> {
    let program = build(ctx)?;
    let tools = tools()?;
    let raw = ctx.log("unit-tests.profraw");
    let data = ctx.log("unit-tests.profdata");
    let log = ctx.log("coverage.log");
    let step = ui::Step::short("run the unit tests with counters");
    sh::run(
        Command::new(&program)
            .arg("-q")
            .env("LLVM_PROFILE_FILE", &raw)
            .current_dir(ctx.root.join("crates/core")),
        &log,
    )?;
    step.done();
    let mut merge = Command::new(tools.join("llvm-profdata"));
    sh::run(merge.args(["merge", "--sparse"]).arg(&raw).arg("-o").arg(&data), &log)?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "--format=lcov", "--instr-profile"]).arg(&data).arg(&program);
    let lcov = sh::output(&mut export)?;
    fs::remove_file(raw)?;
    let dir = ctx.root.join("crates/core/src");
    let report = read(&lcov, |path| {
        let name = Path::new(path).strip_prefix(&dir).ok()?.to_str()?.to_owned();
        if name.ends_with("tests.rs") || TESTS.contains(&name.as_str()) {
            return None;
        }
        let lines = tcb::shipped_lines(&fs::read_to_string(path).ok()?);
        Some((name, lines))
    });
    if report.lines == 0 {
        bail!("llvm-cov knows no line of crates/core");
    }
    Ok(report)
}

/// The `coverage` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let report = measure(ctx)?;
    if let Some(path) = &args.json {
        sh::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    println!("{:20} {:>6} {:>9}  not executed", "file", "lines", "executed");
    for (name, file) in &report.files {
        println!("{name:20} {:6} {:9}  {}", file.lines, file.executed, file.gaps.join(", "));
    }
    println!("{}", report.verdict()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const LCOV: &str = "SF:/x/a.rs\nDA:1,5\nDA:2,0\nDA:3,0\nDA:9,0\nend_of_record\n\
        SF:/x/a.rs\nDA:2,1\nend_of_record\nSF:/y/b.rs\nDA:1,0\nend_of_record\n";

    fn report() -> Report {
        let counts = |path: &str| {
            path.strip_prefix("/x/").map(|name| (name.to_owned(), BTreeSet::from([1, 2, 3, 4])))
        };
        read(LCOV, counts)
    }

    #[test]
    fn lines_that_count_are_counted_once() {
        let report = report();
        assert_eq!((report.lines, report.executed), (3, 2));
        assert_eq!(report.gaps().collect::<Vec<_>>(), ["a.rs:3"]);
    }

    #[test]
    fn few_lines_are_a_failure() {
        let text = report().verdict().unwrap_err().to_string();
        assert!(text.contains("a.rs:3"), "{text}");
        let well = Report { lines: 100, executed: 95, files: BTreeMap::new() };
        assert!(well.verdict().is_ok());
        assert!(Report { executed: 94, ..well }.verdict().is_err());
        assert!(Report::default().verdict().is_err());
    }

    #[test]
    fn gaps_are_ranges() {
        assert_eq!(ranges(&[1, 2, 3, 7, 9, 10]), ["1-3", "7", "9-10"]);
    }
}
