// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the cost of an operation grows with what there is beside it.

use anyhow::{Context as _, Result};
use havmsi_operations::{Load, Task, find};
use serde::{Deserialize, Serialize};

use super::{Machine, Measured, Parts, System};
use crate::Ctx;

/// A row: an operation, and what grows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Growth {
    /// Which.
    pub operation: String,
    /// `VMs`, `vCPUs`, `MiB of RAM`.
    pub of: String,
    /// The cost of each.
    pub points: Vec<Point>,
}

/// What one operation costs with so many.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Point {
    /// How many.
    pub n: u32,
    /// Instructions.
    pub kvm: f64,
    /// Instructions.
    pub havmsi: f64,
}

/// What grows, what it is called, how far, and what is measured.
type Series = (fn(u32) -> Load, &'static str, &'static [u32], &'static [&'static str]);

const SERIES: [Series; 3] = [
    (Load::Vms, "VMs", &[1, 4, 16, 64], &["hypercall", "touch-4k", "vm-start", "vm-teardown"]),
    (Load::Vcpus, "vCPUs", &[1, 2, 4, 8], &["hypercall", "vm-start", "vm-teardown"]),
    (Load::Ram, "MiB of RAM", &[64, 512, 2048, 8192], &["touch-4k", "vm-teardown"]),
];

/// Measures all rows on plain KVM and on HA-VMSI.
pub fn measure(ctx: &Ctx, parts: &Parts) -> Result<Vec<Growth>> {
    let mut tasks = Vec::new();
    for (load, _, numbers, names) in SERIES {
        for name in names {
            let index = find(name).context("no such operation")?;
            tasks.extend(numbers.iter().map(|n| Task { index, load: load(*n) }));
        }
    }
    let ctx = Ctx {
        root: ctx.root.clone(),
        cache: ctx.cache.clone(),
        log_dir: ctx.log_dir.join("scaling"),
    };
    let of = |system| -> Result<Vec<f64>> {
        let Machine { operations, .. } = super::measure(&ctx, parts, (system, None), 3, &tasks)?;
        let cost = |m: Result<Measured, String>| m.map(|m| m.cost().instructions);
        operations.into_iter().map(|m| cost(m).map_err(anyhow::Error::msg)).collect()
    };
    let mut points = of(System::Kvm)?.into_iter().zip(of(System::Havmsi)?);
    let mut found = Vec::new();
    for (_, of, numbers, names) in SERIES {
        for name in names {
            let points = numbers.iter().zip(points.by_ref());
            let points = points.map(|(n, (kvm, havmsi))| Point { n: *n, kvm, havmsi }).collect();
            found.push(Growth { operation: (*name).to_owned(), of: of.to_owned(), points });
        }
    }
    Ok(found)
}

/// The rows as a table for people.
pub fn table(rows: &[Growth]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut text = "| operation | with | plain KVM | HA-VMSI |\n|---|---|---|---|\n".to_owned();
    for row in rows {
        let list =
            |f: &dyn Fn(&Point) -> String| row.points.iter().map(f).collect::<Vec<_>>().join(" / ");
        text.push_str(&format!(
            "| `{}` | {} {} | {} | {} |\n",
            row.operation,
            list(&|p| p.n.to_string()),
            row.of,
            list(&|p| format!("{:.0}", p.kvm)),
            list(&|p| format!("{:.0}", p.havmsi)),
        ));
    }
    text
}
