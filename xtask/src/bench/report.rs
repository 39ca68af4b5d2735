// SPDX-License-Identifier: MIT OR Apache-2.0
//! The result: rows of what operations cost, as JSON and as a table.

use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::applications::Application;
use super::counts::Cost;
use super::scaling::Growth;
use super::{CPUS, ICOUNT, MEM_MIB, Measured};
use crate::kernel::pkvm::Pkvm;
use crate::run::Cpu;
use crate::{Ctx, setup, sh};

/// The same of each system; of pKVM if there is one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Three<T, P = T> {
    /// Plain KVM.
    pub kvm: T,
    /// Ours.
    pub havmsi: T,
    /// A protected VM of pKVM's.
    pub pkvm: Option<P>,
}

/// An operation on an interrupt controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub operation: String,
    /// What it is.
    pub what: String,
    /// 2 or 3.
    pub gic: u32,
    /// Instructions.
    #[serde(flatten)]
    pub instructions: Three<f64>,
    /// HA-VMSI to plain KVM.
    pub ratio_kvm: f64,
    /// HA-VMSI to pKVM.
    pub ratio_pkvm: Option<f64>,
    /// Why pKVM has no figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pkvm_why: Option<String>,
    /// Changes of exception level.
    pub transitions: Three<f64>,
    /// Accesses to system registers.
    pub sysregs: Three<f64>,
    /// All that was counted.
    pub costs: Three<Cost>,
}

/// What was run on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Its version.
    pub qemu: String,
    /// The model.
    pub cpu: String,
    /// How many.
    pub cpus: u32,
    /// RAM.
    pub mem_mib: u64,
    /// QEMU's option.
    pub icount: String,
}

/// Everything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// What was built.
    pub commit: String,
    /// The emulated machine.
    pub machine: Machine,
    /// Releases of the kernels.
    pub kernels: Three<String>,
    /// Debian's name and version of pKVM's source.
    pub pkvm_source: Option<String>,
    /// Why there is no column of pKVM.
    pub pkvm_left_out: Option<String>,
    /// The Rust compiler.
    pub rustc: String,
    /// The kernels' compiler.
    pub gcc: String,
    /// The result.
    pub rows: Vec<Row>,
    /// A Linux guest.
    pub applications: Vec<Application>,
    /// How costs grow.
    pub scaling: Vec<Growth>,
}

impl Report {
    /// One without rows.
    pub fn new(ctx: &Ctx, pkvm: &Result<Pkvm, String>) -> Result<Self> {
        let line = |program: &str, words: &[&str]| -> Result<String> {
            let text = sh::output(Command::new(program).current_dir(&ctx.root).args(words))?;
            Ok(text.lines().next().unwrap_or_default().to_owned())
        };
        Ok(Self {
            commit: line("git", &["describe", "--always", "--dirty", "--abbrev=12"])?,
            machine: Machine {
                qemu: setup::qemu_version()?,
                cpu: Cpu::CortexA57.name().to_owned(),
                cpus: CPUS,
                mem_mib: MEM_MIB,
                icount: ICOUNT.to_owned(),
            },
            kernels: Three::default(),
            pkvm_source: pkvm.as_ref().ok().map(|p| p.version.clone()),
            pkvm_left_out: pkvm.as_ref().err().cloned(),
            rustc: line("rustc", &["--version"])?,
            gcc: line("aarch64-linux-gnu-gcc", &["--version"])?,
            rows: vec![],
            applications: vec![],
            scaling: vec![],
        })
    }
}

/// A ratio to three digits behind the point.
fn ratio(a: f64, b: f64) -> f64 {
    (a / b * 1000.0).round() / 1000.0
}

/// The row of an operation.
pub fn row(gic: u32, all: &Three<Measured, &Measured>, pkvm_why: Option<&String>) -> Row {
    let costs = Three {
        kvm: all.kvm.cost(),
        havmsi: all.havmsi.cost(),
        pkvm: all.pkvm.map(Measured::cost),
    };
    let of = |f: fn(&Cost) -> f64| Three {
        kvm: f(&costs.kvm),
        havmsi: f(&costs.havmsi),
        pkvm: costs.pkvm.as_ref().map(f),
    };
    let instructions = of(|c| c.instructions);
    Row {
        operation: all.kvm.operation.name.to_owned(),
        what: all.kvm.operation.what.to_owned(),
        gic,
        ratio_kvm: ratio(instructions.havmsi, instructions.kvm),
        ratio_pkvm: instructions.pkvm.map(|p| ratio(instructions.havmsi, p)),
        instructions,
        pkvm_why: pkvm_why.cloned(),
        transitions: of(|c| c.transitions),
        sysregs: of(|c| c.sysregs),
        costs,
    }
}

/// What can't be measured on pKVM, by reason.
pub fn not_on_pkvm(report: &Report) -> Vec<String> {
    if report.pkvm_left_out.is_some() {
        return vec![];
    }
    let mut found = std::collections::BTreeMap::<&str, Vec<String>>::new();
    for row in &report.rows {
        if let Some(why) = &row.pkvm_why {
            let name = format!("`{}` (GICv{})", row.operation, row.gic);
            found.entry(why.as_str()).or_default().push(name);
        }
    }
    let line = |(why, names): (&str, Vec<String>)| {
        let all =
            names.len() * 2 == report.rows.len() && names.iter().all(|n| n.ends_with("(GICv2)"));
        let what = if all { "GICv2".to_owned() } else { names.join(", ") };
        format!("not on pKVM: {what}: {why}")
    };
    found.into_iter().map(line).collect()
}

/// Figures of the three systems, one behind the other.
fn three(f: impl Fn(&Cost) -> f64, digits: usize, costs: &Three<Cost>) -> String {
    let number = |c: &Cost| format!("{:.digits$}", f(c));
    let pkvm = costs.pkvm.as_ref().map_or("–".to_owned(), number);
    format!("{} / {} / {pkvm}", number(&costs.kvm), number(&costs.havmsi))
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = "| operation | GIC | KVM | HA-VMSI | pKVM | to KVM | to pKVM | transitions | sysregs | barriers | TLBI | EL2 and EL3 |\n\
                    |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for row in rows {
        let or_dash =
            |n: Option<f64>, digits: usize| n.map_or("–".to_owned(), |n| format!("{n:.digits$}"));
        let n = &row.instructions;
        text.push_str(&format!(
            "| `{}` | v{} | {:.0} | {:.0} | {} | {:.2} | {} | {} | {} | {} | {} | {} |\n",
            row.operation,
            row.gic,
            n.kvm,
            n.havmsi,
            or_dash(n.pkvm, 0),
            row.ratio_kvm,
            or_dash(row.ratio_pkvm, 2),
            three(|c| c.transitions, 1, &row.costs),
            three(|c| c.sysregs, 0, &row.costs),
            three(|c| c.barriers, 0, &row.costs),
            three(|c| c.tlbi, 1, &row.costs),
            three(|c| c.levels[2] + c.levels[3], 0, &row.costs),
        ));
    }
    text
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::bench::scaling::Point;

    /// A report of one row, in which HA-VMSI has these instructions, transitions and register accesses.
    pub fn report([instructions, transitions, sysregs]: [f64; 3]) -> Report {
        let three = |havmsi| Three { kvm: 800.0, havmsi, pkvm: Some(1600.0) };
        let text = String::new;
        Report {
            commit: text(),
            machine: Machine { qemu: text(), cpu: text(), cpus: 2, mem_mib: 1, icount: text() },
            kernels: Three::default(),
            pkvm_source: None,
            pkvm_left_out: None,
            rustc: text(),
            gcc: text(),
            rows: vec![Row {
                operation: "hypercall".to_owned(),
                what: text(),
                gic: 3,
                instructions: three(instructions),
                ratio_kvm: ratio(instructions, 800.0),
                ratio_pkvm: Some(ratio(instructions, 1600.0)),
                pkvm_why: None,
                transitions: three(transitions),
                sysregs: three(sysregs),
                costs: Three { pkvm: Some(Cost::default()), ..Three::default() },
            }],
            applications: vec![],
            scaling: vec![Growth {
                operation: "hypercall".to_owned(),
                of: "VMs".to_owned(),
                points: vec![Point { n: 1, kvm: 800.0, havmsi: instructions }],
            }],
        }
    }

    #[test]
    fn what_pkvm_can_not_do_is_told_by_reason() {
        let mut report = report([1000.0, 5.0, 180.0]);
        let mut other = report.rows.first().unwrap().clone();
        (other.gic, other.pkvm_why) = (2, Some("needs a GICv3".to_owned()));
        report.rows.push(other.clone());
        assert_eq!(not_on_pkvm(&report), ["not on pKVM: GICv2: needs a GICv3"]);
        (other.gic, other.pkvm_why) = (3, Some("refused".to_owned()));
        report.rows.push(other);
        assert!(not_on_pkvm(&report).iter().any(|l| l.ends_with("`hypercall` (GICv3): refused")));
    }

    #[test]
    fn rows_have_the_fields_that_readers_look_for() {
        let text = serde_json::to_string(&report([1000.0, 5.0, 180.0])).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let row = &value["rows"][0];
        for (field, wanted) in [("kvm", 800.0), ("havmsi", 1000.0), ("pkvm", 1600.0)] {
            assert_eq!(row[field], wanted);
        }
        assert_eq!((&row["ratio_kvm"], &row["ratio_pkvm"]), (&1.25.into(), &0.625.into()));
        assert_eq!(row["transitions"]["havmsi"], 5.0);
        let again: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(again.rows.first().unwrap().instructions.pkvm, Some(1600.0));
    }
}
