// SPDX-License-Identifier: MIT OR Apache-2.0
//! `bench --quick`: counts that have risen over the committed figures.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use havmsi_operations::OPERATIONS;

use super::report::{Report, Row};
use crate::Ctx;

/// By how many parts of 100 a count may rise.
const MORE: f64 = 5.0;
/// A rise of less than this is none: of a count of one or two, 5 % is nothing.
const LEAST: f64 = 0.5;

/// Where the figures are.
pub fn place(ctx: &Ctx) -> PathBuf {
    ctx.root.join("docs/benchmarks/figures.json")
}

/// A report that was written before.
pub fn read(path: &Path) -> Result<Report> {
    let text = fs::read(path)
        .with_context(|| format!("no figures at {}: `cargo xtask bench --docs`", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))
}

/// The committed figures.
pub fn committed(ctx: &Ctx) -> Result<Report> {
    read(&place(ctx))
}

/// What is worse now.
pub fn compare(old: &Report, new: &Report) -> Vec<String> {
    let mut found = Vec::new();
    for row in &new.rows {
        let name = format!("{} on GICv{}", row.operation, row.gic);
        let same = |r: &&Row| r.operation == row.operation && r.gic == row.gic;
        let Some(before) = old.rows.iter().find(same) else {
            found.push(format!("{name}: not in the committed figures"));
            continue;
        };
        for (what, before, now) in [
            ("instructions", before.instructions.havmsi, row.instructions.havmsi),
            ("transitions", before.transitions.havmsi, row.transitions.havmsi),
            ("system register accesses", before.sysregs.havmsi, row.sysregs.havmsi),
        ] {
            if now > before * (1.0 + MORE / 100.0) && now > before + LEAST {
                let more = (now / before - 1.0) * 100.0;
                found.push(format!("{name}: {now} {what}, {more:.1} % more than {before}"));
            }
        }
    }
    for o in OPERATIONS.iter().filter(|o| !new.rows.iter().any(|r| r.operation == o.name)) {
        found.push(format!("{}: was not measured", o.name));
    }
    if !found.is_empty() {
        for (what, old, new) in [
            ("kernel", &old.kernels.havmsi, &new.kernels.havmsi),
            ("QEMU", &old.machine.qemu, &new.machine.qemu),
            ("rustc", &old.rustc, &new.rustc),
            ("gcc", &old.gcc, &new.gcc),
        ] {
            if old != new {
                found.push(format!("the committed figures have another {what}: {old}, here {new}"));
            }
        }
        found.push(
            "if it has to be so: `cargo xtask bench --docs` writes new figures to docs/benchmarks"
                .to_owned(),
        );
    }
    found
}

/// The row of `cargo xtask test`.
pub fn row(ctx: &Ctx) -> Result<String> {
    let old = committed(ctx)?;
    let all: Vec<usize> = (0..OPERATIONS.len()).collect();
    let (new, mut problems) = super::execute(ctx, &all, &[3, 2], false, false)?;
    problems.extend(compare(&old, &new));
    if !problems.is_empty() {
        anyhow::bail!("{}", problems.join("\n"));
    }
    Ok(format!("{} counts, none risen by more than {MORE} %", new.rows.len() * 3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    fn risen(now: [f64; 3]) -> Vec<String> {
        let old = report([1000.0, 5.0, 180.0]);
        let mut found = compare(&old, &report(now));
        found.retain(|line| line.starts_with("hypercall on"));
        found
    }

    #[test]
    fn what_has_risen_is_named() {
        assert!(risen([1000.0, 5.0, 180.0]).is_empty());
        assert!(risen([1049.0, 5.2, 189.0]).is_empty());
        assert!(risen([500.0, 4.0, 90.0]).is_empty());
        let found = risen([1051.0, 6.0, 190.0]);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found.iter().any(|l| l.contains("1051 instructions, 5.1 % more than 1000")));
    }

    #[test]
    fn rows_without_figures_are_named() {
        let mut old = report([1.0; 3]);
        old.rows.clear();
        assert!(
            compare(&old, &report([1.0; 3])).iter().any(|l| l.contains("not in the committed"))
        );
    }
}
