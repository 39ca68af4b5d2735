// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `test` verb: a table of rows, each with its limit and the command that repeats it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;

use crate::rows::{self, Row};
use crate::{Ctx, sh};

/// Options of `test`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Only rows whose name contains this (may be given several times)
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// List the rows and the command that each stands for
    #[arg(long)]
    pub list: bool,
    /// Stop at the first row that fails
    #[arg(long)]
    pub fail_fast: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What one test came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "result", content = "why", rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Passed,
    /// Not as it should be, and why.
    Failed(String),
    /// Could not be carried out here, and why: counted and shown.
    Skipped(String),
}

/// One test: a row, or one of several that a row stands for.
#[derive(Debug, Clone, Serialize)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// What a row gives back: nothing but itself, or a list of tests.
#[derive(Debug, Default)]
pub struct Gave {
    /// Tests by name.
    pub tests: Vec<Test>,
    /// Tests that say that this machine is not for them.
    pub not_here: Vec<String>,
    /// Words for the line of the row.
    pub note: String,
}

/// Everything together.
#[derive(Debug, Default, Serialize)]
struct Totals {
    passed: usize,
    failed: usize,
    skipped: usize,
    seconds: f64,
    tests: Vec<Test>,
}

impl Totals {
    fn add(&mut self, result: Test) {
        match &result.verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Failed(_) => self.failed += 1,
            Verdict::Skipped(_) => self.skipped += 1,
        }
        self.tests.push(result);
    }

    /// What did not pass, by name and with the reason: for whoever sees the end only.
    fn rest(&self) -> Vec<String> {
        let line = |test: &Test| match &test.verdict {
            Verdict::Passed => None,
            Verdict::Failed(why) => Some(format!("failed: {}: {why}", test.name)),
            Verdict::Skipped(why) => Some(format!("skipped: {}: {why}", test.name)),
        };
        self.tests.iter().filter_map(line).collect()
    }

    /// The closing line.
    fn line(&self) -> String {
        let skipped =
            if self.skipped == 0 { String::new() } else { format!(", {} skipped", self.skipped) };
        format!("{} passed, {} failed{skipped}", self.passed, self.failed)
    }
}

/// Tests that no machine was right for: they were never carried out.
fn never_run(ran: &BTreeMap<String, bool>) -> Vec<&str> {
    ran.iter().filter(|(_, ran)| !**ran).map(|(name, _)| name.as_str()).collect()
}

/// Carries out one row and adds its tests to the totals.
fn one(ctx: &Ctx, row: &Row, totals: &mut Totals, payload: &mut BTreeMap<String, bool>) {
    let start = Instant::now();
    let sub = Ctx {
        root: ctx.root.clone(),
        cache: ctx.cache.clone(),
        log_dir: ctx.log_dir.join(row.name.replace('/', "-")),
    };
    let gave = rows::work(&sub, row);
    let seconds = start.elapsed().as_secs_f64();
    let line =
        |mark: &str, text: &str| println!("{mark:7} {:34} {seconds:6.1} s  {text}", row.name);
    let repeat =
        || println!("        repeat it: {}\n        logs: {}", row.command, sub.log_dir.display());
    match gave {
        Ok(Ended::Skip(why)) => {
            line("SKIPPED", &why);
            totals.add(Test { name: row.name.clone(), verdict: Verdict::Skipped(why) });
        }
        Ok(Ended::Gave(gave)) if gave.tests.is_empty() => {
            line("ok", &gave.note);
            totals.add(Test { name: row.name.clone(), verdict: Verdict::Passed });
        }
        Ok(Ended::Gave(gave)) => {
            let failed: Vec<&Test> =
                gave.tests.iter().filter(|t| matches!(t.verdict, Verdict::Failed(_))).collect();
            line(
                if failed.is_empty() { "ok" } else { "FAILED" },
                &format!(
                    "{} tests, {} failed, {} for other machines {}",
                    gave.tests.len(),
                    failed.len(),
                    gave.not_here.len(),
                    gave.note
                ),
            );
            for t in &failed {
                if let Verdict::Failed(why) = &t.verdict {
                    println!("          {}: {why}", t.name);
                }
            }
            if !failed.is_empty() {
                repeat();
            }
            for name in &gave.not_here {
                payload.entry(name.clone()).or_insert(false);
            }
            for t in gave.tests {
                payload.insert(t.name.clone(), true);
                totals.add(Test { name: format!("{}/{}", row.name, t.name), verdict: t.verdict });
            }
        }
        Err(e) => {
            let why = e.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n  because: ");
            line("FAILED", "");
            println!("          {}", why.replace('\n', "\n          "));
            repeat();
            totals.add(Test { name: row.name.clone(), verdict: Verdict::Failed(why) });
        }
    }
}

/// A row's own end: skipped as a whole, or carried out.
#[derive(Debug)]
pub enum Ended {
    /// Not carried out, and why.
    Skip(String),
    /// Carried out.
    Gave(Gave),
}

impl Ended {
    /// Passed, with a note.
    pub fn ok(note: impl Into<String>) -> Self {
        Self::Gave(Gave { note: note.into(), ..Gave::default() })
    }
}

/// The `test` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let all = rows::table();
    let chosen: Vec<&Row> = all
        .iter()
        .filter(|r| args.only.is_empty() || args.only.iter().any(|p| r.name.contains(p.as_str())))
        .collect();
    if chosen.is_empty() {
        bail!("no row matches {:?}; `cargo xtask test --list` shows them", args.only);
    }
    if args.list {
        for row in chosen {
            println!("{:34} {:4} s  {}", row.name, row.limit.as_secs(), row.command);
        }
        return Ok(());
    }
    let start = Instant::now();
    rows::prepare(ctx, &chosen)?;
    let mut totals = Totals::default();
    let mut payload = BTreeMap::new();
    for row in chosen {
        one(ctx, row, &mut totals, &mut payload);
        if args.fail_fast && totals.failed > 0 {
            println!("stopped at the first failure: the rest was not carried out");
            break;
        }
    }
    if args.only.is_empty() {
        for name in never_run(&payload) {
            println!("FAILED  payload test {name}: no machine was right for it, so it never ran");
            let verdict = Verdict::Failed("never ran".to_owned());
            totals.add(Test { name: format!("payload/{name}"), verdict });
        }
    }
    totals.seconds = start.elapsed().as_secs_f64();
    if let Some(path) = &args.json {
        sh::write(path, serde_json::to_string_pretty(&totals)? + "\n").context("the results")?;
    }
    println!();
    totals.rest().iter().for_each(|line| println!("{line}"));
    println!("{:.0} s, logs in {}", totals.seconds, ctx.log_dir.display());
    println!("{}", totals.line());
    if totals.failed > 0 {
        std::process::exit(1);
    }
    Ok(())
}

/// Seconds.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line() {
        let mut t = Totals::default();
        t.add(Test { name: "a".into(), verdict: Verdict::Passed });
        assert_eq!(t.line(), "1 passed, 0 failed");
        t.add(Test { name: "b".into(), verdict: Verdict::Skipped("no".into()) });
        t.add(Test { name: "c".into(), verdict: Verdict::Failed("bad".into()) });
        assert_eq!(t.line(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(t.rest(), ["skipped: b: no", "failed: c: bad"]);
    }

    #[test]
    fn a_test_that_no_machine_is_right_for_is_named() {
        let ran = BTreeMap::from([("a".to_owned(), true), ("b".to_owned(), false)]);
        assert_eq!(never_run(&ran), ["b"]);
    }

    #[test]
    fn row_names_are_unique() {
        let mut names: Vec<String> = rows::table().into_iter().map(|r| r.name).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
