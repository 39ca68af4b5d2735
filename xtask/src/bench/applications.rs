// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a Linux guest under QEMU costs: its boot, and work that applications do.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use havmsi_operations::APPLICATIONS;
use serde::{Deserialize, Serialize};

use super::counts::Cost;
use super::{Parts, System, counts, job_config, machine};
use crate::Ctx;

/// A row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Application {
    /// Its name.
    pub application: String,
    /// What it is.
    pub what: String,
    /// Instructions.
    pub kvm: f64,
    /// Instructions.
    pub havmsi: f64,
    /// HA-VMSI to plain KVM.
    pub ratio_kvm: f64,
    /// Changes of exception level, on plain KVM and on HA-VMSI.
    pub transitions: [f64; 2],
}

/// Measures all rows on plain KVM and on HA-VMSI.
pub fn measure(ctx: &Ctx, parts: &Parts) -> Result<Vec<Application>> {
    let of = |system: System| -> Result<Vec<Cost>> {
        let dir = ctx.log_dir.join(format!("applications-{}", system.name()));
        // One vCPU: with more, a CPU that finds a lock of the monitor's taken would be counted
        // spinning until QEMU's only thread turns to the other one, which hardware has no like of.
        let more = "havmsi.guests=1 havmsi.vcpus=1 havmsi.gmem=256";
        let config = job_config(ctx, parts, system, 3, "applications", more)?;
        let title = format!("applications on {}", system.name());
        machine(parts, system, config, &title, &dir)?;
        costs(&dir)
    };
    let (kvm, havmsi) = (of(System::Kvm)?, of(System::Havmsi)?);
    let rows = APPLICATIONS.iter().zip(kvm.iter().zip(&havmsi));
    Ok(rows
        .map(|((name, what, _), (kvm, havmsi))| Application {
            application: (*name).to_owned(),
            what: (*what).to_owned(),
            kvm: kvm.instructions,
            havmsi: havmsi.instructions,
            ratio_kvm: (havmsi.instructions / kvm.instructions * 1000.0).round() / 1000.0,
            transitions: [kvm.transitions, havmsi.transitions],
        })
        .collect())
}

fn costs(dir: &Path) -> Result<Vec<Cost>> {
    let groups = counts::read(&dir.join("counts.json"))?;
    let records = groups.iter().map(|g| u32::try_from(g.instructions.len()).unwrap_or(0));
    let records: Vec<u32> = records.collect();
    let wanted: Vec<u32> = APPLICATIONS.iter().map(|(_, _, records)| *records).collect();
    if records != wanted {
        bail!("records {records:?}, but {wanted:?} were wanted; see {}", dir.display());
    }
    groups.iter().map(|g| Ok(g.cost(1))).collect::<Result<_>>().context("applications")
}

/// The rows as a table for people.
pub fn table(rows: &[Application]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut text = "| application | what | plain KVM | HA-VMSI | to KVM | transitions |\n\
                    |---|---|---:|---:|---:|---:|\n"
        .to_owned();
    for row in rows {
        let [k, h] = row.transitions;
        text.push_str(&format!(
            "| `{}` | {} | {:.0} | {:.0} | {:.2} | {k:.0} / {h:.0} |\n",
            row.application, row.what, row.kvm, row.havmsi, row.ratio_kvm
        ));
    }
    text
}
