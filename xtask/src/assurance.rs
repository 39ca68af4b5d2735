// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `assurance` verb: what was checked, how far, and at which commit. Results of the other
//! verbs (`--json`) are kept in `docs/assurance.json`; `docs/assurance.md`, the tables of
//! `docs/tcb.md` and its plot are what that file says, and the TCB's size is today's.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::tcb::docs::thousands;
use crate::tcb::history::{self, Commit};
use crate::{Ctx, coverage, miri, model, sh, tcb, ui};

const FIGURES: &str = "docs/assurance.json";
const TEXT: &str = "docs/assurance.md";
const TCB: &str = "docs/tcb.md";

/// Options of `assurance`.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Args {
    /// A result to take in: `model=FILE`, as `cargo xtask model --json FILE` writes it
    #[arg(value_name = "NAME=FILE")]
    pub results: Vec<String>,
    /// The commit that they were measured at [default: this one]
    #[arg(long, value_name = "COMMIT")]
    pub commit: Option<String>,
}

/// A result, and when it was.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measured {
    commit: String,
    date: String,
    result: Value,
}

/// The file.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Figures {
    results: BTreeMap<String, Measured>,
    history: Vec<Commit>,
}

/// What is checked in one way.
struct Kind {
    /// Its name in the file, and its section's.
    name: &'static str,
    title: &'static str,
    command: &'static str,
    /// What of a result is kept; fails if it is none, or one that must not be shown as well.
    take: fn(Value) -> Result<Value>,
    /// A line, and a section if there is more to say.
    show: fn(&Value) -> Result<(String, String)>,
}

const KINDS: [Kind; 8] = [
    Kind {
        name: "model",
        title: "Every interleaving, in small worlds",
        command: "cargo xtask model",
        take: |v| {
            model::verdict(&parse::<Vec<model::Scenario>>(&v)?)?;
            Ok(v)
        },
        show: show_model,
    },
    Kind {
        name: "mutants",
        title: "The pure crate, broken one function at a time",
        command: "cargo xtask mutants",
        take: Ok,
        show: |v| {
            let caught = number(v, "caught")? + number(v, "timeout")?;
            let missed = v["missed"].as_array().context("missed")?.len() as u64;
            let all = thousands(caught + missed);
            Ok((format!("{} of {all} mutants noticed", thousands(caught)), String::new()))
        },
    },
    Kind {
        name: "coverage",
        title: "Lines that unit tests execute",
        command: "cargo xtask coverage",
        take: |v| {
            parse::<coverage::Report>(&v)?.verdict()?;
            Ok(v)
        },
        show: show_coverage,
    },
    Kind {
        name: "miri",
        title: "Undefined behaviour",
        command: "cargo xtask miri",
        take: |v| {
            parse::<miri::Report>(&v)?;
            Ok(v)
        },
        show: show_miri,
    },
    Kind {
        name: "fuzz-host",
        title: "Random operations beside a reference model",
        command: "cargo xtask fuzz --host",
        take: |v| {
            if !v["crash"].is_null() {
                bail!("this run found something: {}", v["crash"]);
            }
            Ok(v)
        },
        show: |v| {
            let [inputs, seconds, edges] = ["inputs", "seconds", "edges"].map(|n| number(v, n));
            let inputs = thousands(inputs?);
            let line =
                format!("{inputs} inputs in {} s, {} edges, no difference", seconds?, edges?);
            Ok((line, String::new()))
        },
    },
    Kind {
        name: "fuzz-target",
        title: "Random calls of the running monitor, with audits",
        command: "cargo xtask fuzz --target",
        take: |v| {
            if v["result"] != "ok" {
                bail!("this run found something: {}", v["violation"]);
            }
            let kept = ["calls", "accepted", "audits", "cpus", "gic", "cpu", "seed"];
            Ok(kept.into_iter().map(|n| (n.to_owned(), v[n].clone())).collect())
        },
        show: |v| {
            let [calls, accepted, audits, cpus] =
                ["calls", "accepted", "audits", "cpus"].map(|n| number(v, n));
            let line = format!(
                "{} calls from {} CPUs, {} accepted, {} audits of all tables, no violation",
                thousands(calls?),
                cpus?,
                thousands(accepted?),
                thousands(audits?)
            );
            Ok((line, String::new()))
        },
    },
    Kind {
        name: "attack",
        title: "Attacks, each with a control",
        command: "cargo xtask attack",
        take: |v| {
            if v["problems"].as_array().is_none_or(|p| !p.is_empty()) {
                bail!("this run has problems: {}", v["problems"]);
            }
            let rows = v["rows"].as_array().context("rows")?;
            let blocked = rows.iter().filter(|r| r["havmsi"] == "blocked").count();
            let attacks: usize =
                rows.iter().filter_map(|r| r["variants"].as_array()).map(Vec::len).sum();
            Ok(json!({ "threats": rows.len(), "blocked": blocked, "attacks": attacks }))
        },
        show: |v| {
            let line = format!(
                "{} of {} threats blocked, {} attacks",
                number(v, "blocked")?,
                number(v, "threats")?,
                number(v, "attacks")?
            );
            Ok((line, "Which: [threats.md](threats.md).\n".to_owned()))
        },
    },
    Kind {
        name: "tcb",
        title: "What is trusted, counted",
        command: "cargo xtask tcb",
        take: |mut v| {
            let crates = v["crates"].as_array_mut().context("crates")?;
            for files in crates.iter_mut().filter_map(|c| c.get_mut("files")) {
                // Their places are this machine's.
                *files = json!({});
            }
            parse::<tcb::Summary>(&v)?.stack.verdict()?;
            Ok(v)
        },
        show: |v| {
            let s: tcb::Summary = parse(v)?;
            let line = format!(
                "{} own lines at EL3, {} unsafe blocks; at most {} of {} bytes of stack",
                thousands(s.own_lines as u64),
                s.own_unsafe_blocks,
                thousands(s.stack.bound),
                thousands(s.stack.size)
            );
            Ok((line, "By crate, and what is linked: [tcb.md](tcb.md).\n".to_owned()))
        },
    },
];

fn parse<T: DeserializeOwned>(value: &Value) -> Result<T> {
    T::deserialize(value).context("the result is not of that kind")
}

fn number(value: &Value, name: &str) -> Result<u64> {
    value[name].as_u64().with_context(|| format!("no {name} in the result"))
}

fn show_model(value: &Value) -> Result<(String, String)> {
    let all: Vec<model::Scenario> = parse(value)?;
    let mut section = "| scenario | about | CPUs | pages | states | steps | longest way |\n\
        |---|---|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for s in &all {
        section.push_str(&format!(
            "| `{}` | {} | {} | {} | {} | {} | {} |\n",
            s.name,
            s.what,
            s.cpus,
            s.pages,
            thousands(s.states),
            thousands(s.steps),
            s.depth
        ));
    }
    let states: u64 = all.iter().map(|s| s.states).sum();
    let line = format!(
        "{} states of {} worlds, which are all; no property broken",
        thousands(states),
        all.len()
    );
    Ok((line, section))
}

fn show_coverage(value: &Value) -> Result<(String, String)> {
    let report: coverage::Report = parse(value)?;
    let line = format!(
        "{} of {} lines of the pure crate: {:.2} %",
        thousands(report.executed as u64),
        thousands(report.lines as u64),
        report.percent()
    );
    let gaps: Vec<String> =
        report.gaps().map(|gap| format!("- `crates/core/src/{gap}`\n")).collect();
    let section = if gaps.is_empty() {
        "None is left out.\n".to_owned()
    } else {
        format!("Not executed:\n\n{}", gaps.concat())
    };
    Ok((
        line,
        section
            + "\nTests and their machine don't count, the audit does. Constants are computed by the compiler and have no lines here.\n",
    ))
}

fn show_miri(value: &Value) -> Result<(String, String)> {
    let report: miri::Report = parse(value)?;
    let mut section = "Miri takes a thousand times as long as the machine. Left out (`--only` interprets any of them):\n\n".to_owned();
    for (name, why) in &report.why {
        section.push_str(&format!("- `{name}`: {why}\n"));
    }
    let line = format!(
        "{} tests of the pure crate and of their machine in Miri, {} left out",
        report.passed, report.left_out
    );
    Ok((line, section))
}

const HEAD: &str = "<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->
<!-- Written by `cargo xtask assurance` from assurance.json: don't edit. -->
# What was checked, and how far

Each line was measured at the commit that it names; `cargo xtask test` repeats all of them but the mutants, which take an hour. None of this is a proof of the monitor:
models and unit tests run the pure crate as it is shipped, but not the thin layer below it; the emulated machine has no caches and no errata.

";

fn text(figures: &Figures) -> Result<String> {
    let mut out = HEAD.to_owned();
    out.push_str("| what | result | commit | day | again |\n|---|---|---|---|---|\n");
    let mut sections = String::new();
    for kind in &KINDS {
        let Some(measured) = figures.results.get(kind.name) else {
            out.push_str(&format!(
                "| {} | not taken in yet | | | `{}` |\n",
                kind.title, kind.command
            ));
            continue;
        };
        let (line, section) = (kind.show)(&measured.result).context(kind.name)?;
        out.push_str(&format!(
            "| {} | {line} | `{}` | {} | `{}` |\n",
            kind.title, measured.commit, measured.date, kind.command
        ));
        if !section.is_empty() {
            sections.push_str(&format!("\n## {}\n\n{section}", kind.title));
        }
    }
    out.push_str(
        "\nWhat survives of the mutants, and why: [mutants.md](mutants.md). Licences, bans and sources of all packages are checked by `cargo xtask test` (`style/deny`); **known \
         vulnerabilities are not**, as their database is on GitHub: `cargo xtask deny --advisories` looks, where that can be reached.\n",
    );
    Ok(out + &sections)
}

fn read(ctx: &Ctx) -> Result<Figures> {
    let path = ctx.root.join(FIGURES);
    if !path.is_file() {
        return Ok(Figures::default());
    }
    serde_json::from_slice(&fs::read(path)?).context(FIGURES)
}

/// The files that the figures give.
fn files(ctx: &Ctx, figures: &Figures) -> Result<Vec<(PathBuf, String)>> {
    let tcb =
        figures.results.get("tcb").context("no figures of the TCB: `cargo xtask tcb --docs`")?;
    let old = fs::read_to_string(ctx.root.join(TCB)).context(TCB)?;
    let summary: tcb::Summary = parse(&tcb.result)?;
    Ok(vec![
        (TEXT.into(), text(figures)?),
        (TCB.into(), tcb::docs::text(&old, &summary, &figures.history)?),
        (Path::new("docs").join(tcb::docs::PLOT), tcb::docs::plot(&figures.history)?),
    ])
}

fn line(ctx: &Ctx, args: &[&str]) -> Result<String> {
    Ok(sh::output(Command::new("git").args(args).current_dir(&ctx.root))?.trim().to_owned())
}

/// Takes results in by name, counts the TCB, and writes the files.
pub fn write(ctx: &Ctx, new: Vec<(String, Value)>, commit: Option<&str>) -> Result<()> {
    let mut figures = read(ctx)?;
    let here = line(ctx, &["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])?;
    let mut put = |name: &str, result: Value, commit: &str| -> Result<()> {
        let kind = KINDS.iter().find(|k| k.name == name);
        let names = || KINDS.map(|k| k.name).join(", ");
        let kind =
            kind.with_context(|| format!("no kind of result is called {name}: {}", names()))?;
        let result = (kind.take)(result).with_context(|| name.to_owned())?;
        let at = commit.trim_end_matches("-dirty");
        let date = line(ctx, &["show", "-s", "--format=%cs", at])?;
        figures
            .results
            .insert(name.to_owned(), Measured { commit: commit.to_owned(), date, result });
        Ok(())
    };
    for (name, result) in new {
        put(&name, result, commit.unwrap_or(&here))?;
    }
    let summary = tcb::count(ctx)?;
    put("tcb", serde_json::to_value(&summary)?, &here)?;
    figures.history = history::history(ctx, &figures.history)?;
    if let Some(last) = figures.history.last_mut().filter(|last| here == last.commit) {
        last.image_bytes = Some(summary.image_bytes);
    }
    sh::write(&ctx.root.join(FIGURES), serde_json::to_string_pretty(&figures)? + "\n")?;
    for (path, text) in files(ctx, &figures)? {
        sh::write(&ctx.root.join(&path), text)?;
        ui::say(&format!("written: {}", path.display()));
    }
    Ok(())
}

/// What of the TCB must be today's, in words.
fn figures_of(s: &tcb::Summary) -> Vec<String> {
    let mut all: Vec<String> =
        s.crates.iter().map(|c| format!("{} {}: {:?}", c.name, c.version, c.count)).collect();
    let stack = &s.stack;
    all.push(format!(
        "stack: {} of {}, {} of {}",
        stack.bound, stack.size, stack.emergency_bound, stack.emergency_size
    ));
    all
}

/// The files must be what the figures give, and the TCB's those of today.
pub fn matching(ctx: &Ctx) -> Result<String> {
    let figures = read(ctx)?;
    let again = "`cargo xtask tcb --docs` writes it anew";
    let files = files(ctx, &figures)?;
    for (path, text) in &files {
        if fs::read_to_string(ctx.root.join(path)).ok().as_ref() != Some(text) {
            bail!("{} is not what {FIGURES} gives: {again}", path.display());
        }
    }
    let committed = figures.results.get("tcb").map(|m| parse::<tcb::Summary>(&m.result));
    let (committed, today) = (committed.context("no tcb")??, tcb::count(ctx)?);
    let (old, new) = (figures_of(&committed), figures_of(&today));
    if let Some((old, new)) = old.iter().zip(&new).find(|(a, b)| a != b) {
        bail!("{FIGURES} has {old:?}, today it is {new:?}: {again}");
    }
    // Names of folders are in the image: another machine's may need a page more or less.
    if old.len() != new.len() || committed.image_bytes.abs_diff(today.image_bytes) > 4096 {
        bail!("{FIGURES} has other crates, or an image of another size, than today's: {again}");
    }
    let by_objects = history::count_here(ctx)?;
    let (rust, assembly) = (today.own_rust, today.own_assembly);
    if (by_objects.rust, by_objects.assembly) != (rust, assembly) {
        bail!(
            "the files of `mod` lines have {} + {} lines, those that the compiler read {rust} + {assembly}: tcb/history.rs",
            by_objects.rust,
            by_objects.assembly
        );
    }
    Ok(format!("{} files are what {FIGURES} gives, and the TCB is today's", files.len()))
}

/// The `assurance` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut new = Vec::new();
    for word in &args.results {
        let (name, path) = word.split_once('=').with_context(|| format!("{word}: NAME=FILE"))?;
        let text = fs::read(path).with_context(|| format!("cannot read {path}"))?;
        new.push((name.to_owned(), serde_json::from_slice(&text).context(word.clone())?));
    }
    write(ctx, new, args.commit.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str) -> &'static Kind {
        static ALL: [Kind; 8] = KINDS;
        ALL.iter().find(|k| k.name == name).unwrap()
    }

    #[test]
    fn a_result_that_is_none_or_bad_is_refused() {
        for (name, bad) in [
            ("model", json!([])),
            ("coverage", json!({ "lines": 100, "executed": 94, "files": {} })),
            ("miri", json!({ "passed": 3 })),
            ("fuzz-host", json!({ "inputs": 3, "crash": "x" })),
            ("fuzz-target", json!({ "result": "violation", "violation": "x" })),
            ("attack", json!({ "problems": ["x"], "rows": [] })),
            ("tcb", json!({ "crates": [] })),
        ] {
            assert!((kind(name).take)(bad).is_err(), "{name}");
        }
    }

    #[test]
    fn what_was_measured_is_shown_with_its_commit() {
        let result = json!({ "inputs": 1234, "seconds": 60, "edges": 7, "crash": null });
        let measured = Measured { commit: "abc".into(), date: "2026-01-02".into(), result };
        let mut figures = Figures::default();
        figures.results.insert("fuzz-host".into(), measured);
        let text = text(&figures).unwrap();
        assert!(
            text.contains("| 1,234 inputs in 60 s, 7 edges, no difference | `abc` | 2026-01-02 |"),
            "{text}"
        );
        assert!(text.contains("| not taken in yet |"), "{text}");
    }
}
