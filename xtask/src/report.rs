// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a run shows: the table of checks with its two columns, and the JSON file.

use serde::Serialize;

use crate::job::Outcome;
use crate::tcb;

/// One attack on both machines.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Which attack.
    pub id: String,
    /// Without the monitor; `exposed` is what makes the check worth something.
    pub control: Option<String>,
    /// With the monitor.
    pub havmsi: Option<String>,
    /// What was seen without the monitor.
    pub control_evidence: String,
    /// What was seen with the monitor.
    pub havmsi_evidence: String,
}

/// One guest under the monitor.
#[derive(Debug, Clone, Serialize)]
pub struct Guest {
    /// Its number.
    pub index: u32,
    /// Its kernel came up.
    pub booted: bool,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Memory that it verified.
    pub verified_mib: u64,
    /// Pages or registers that it found changed.
    pub corrupt: u64,
    /// Its verdict.
    pub ok: bool,
    /// Launch digest that the monitor reported.
    pub digest: Option<String>,
    /// Launch digest that `cargo xtask digest` computes.
    pub digest_expected: Option<String>,
}

/// How long it took.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Seconds {
    /// Making sure that everything is built.
    pub build: f64,
    /// Control machine.
    pub control: f64,
    /// Protected machine.
    pub havmsi: f64,
    /// All of it.
    pub total: f64,
}

/// The JSON file.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// `ok` or `fail`.
    pub result: &'static str,
    /// Why it failed.
    pub problems: Vec<String>,
    /// Guests of the protected machine.
    pub guests: Vec<Guest>,
    /// Attacks.
    pub checks: Vec<Row>,
    /// Size of what must be trusted.
    pub tcb: tcb::Summary,
    /// The machine that was emulated.
    pub machine: serde_json::Value,
    /// The figures of `--scenario`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scenario: Option<serde_json::Value>,
    /// Times.
    pub seconds: Seconds,
}

/// Joins the outcomes by check id, in the order of the protected machine.
pub fn rows(control: Option<&Outcome>, havmsi: Option<&Outcome>) -> Vec<Row> {
    let mut ids: Vec<&str> = Vec::new();
    for outcome in [havmsi, control].into_iter().flatten() {
        for check in &outcome.checks {
            if !ids.contains(&check.id.as_str()) {
                ids.push(&check.id);
            }
        }
    }
    let find = |o: Option<&Outcome>, id: &str| {
        let found = o.and_then(|o| o.checks.iter().find(|c| c.id == id));
        (found.map(|c| c.result.clone()), found.map(|c| c.evidence.clone()).unwrap_or_default())
    };
    ids.into_iter()
        .map(|id| {
            let ((control, control_evidence), (havmsi, havmsi_evidence)) =
                (find(control, id), find(havmsi, id));
            Row { id: id.to_owned(), control, havmsi, control_evidence, havmsi_evidence }
        })
        .collect()
}

/// What is wrong with the rows: empty if every check is exposed there and protected here.
pub fn problems(rows: &[Row], with_control: bool, with_havmsi: bool, guests: u32) -> Vec<String> {
    let mut found = Vec::new();
    if rows.is_empty() {
        found.push("no check was carried out".to_owned());
    }
    for row in rows {
        let alone = guests == 1 && row.id == "map-into-other-vm";
        let mut judge = |result: &Option<String>, wanted: &str, column: &str, evidence: &str| {
            let result = result.as_deref().unwrap_or("missing");
            if result != wanted && !(alone && result == "skipped") {
                found.push(format!(
                    "check {}: {result} {column}, expected {wanted} ({evidence})",
                    row.id
                ));
            }
        };
        if with_control {
            judge(&row.control, "exposed", "on plain KVM", &row.control_evidence);
        }
        if with_havmsi {
            judge(&row.havmsi, "protected", "under HA-VMSI", &row.havmsi_evidence);
        }
    }
    found
}

/// The guests of the protected machine, with the digests that the monitor reported.
pub fn guests(outcome: &Outcome, expected: Option<&str>) -> Vec<Guest> {
    let launches = outcome.launches();
    outcome
        .verdicts
        .values()
        .map(|v| Guest {
            index: v.index,
            booted: v.booted,
            vcpus: v.vcpus,
            verified_mib: v.verified_mib,
            corrupt: v.corrupt,
            ok: v.ok,
            digest: outcome
                .vms
                .get(&v.index)
                .and_then(|vm| launches.iter().rev().find(|l| l.0 == *vm))
                .map(|l| l.1.clone()),
            digest_expected: expected.map(str::to_owned),
        })
        .collect()
}

/// The table for people.
pub fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|r| r.id.len()).max().unwrap_or(0).max(5);
    let mut text = format!("{:width$}  {:10}  {:10}\n", "check", "plain KVM", "HA-VMSI");
    text.push_str(&format!("{}\n", "-".repeat(width + 24)));
    for row in rows {
        let show = |r: &Option<String>| r.clone().unwrap_or_else(|| "-".to_owned());
        text.push_str(&format!(
            "{:width$}  {:10}  {:10}\n",
            row.id,
            show(&row.control),
            show(&row.havmsi)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Check;

    fn outcome(results: &[(&str, &str)]) -> Outcome {
        let check = |(id, result): &(&str, &str)| Check {
            id: (*id).to_owned(),
            result: (*result).to_owned(),
            ..Check::default()
        };
        Outcome { checks: results.iter().map(check).collect(), ..Outcome::default() }
    }

    #[test]
    fn only_exposed_there_and_protected_here_is_good() {
        let control = outcome(&[("a", "exposed"), ("b", "exposed")]);
        let good = rows(Some(&control), Some(&outcome(&[("a", "protected"), ("b", "protected")])));
        assert!(problems(&good, true, true, 2).is_empty());
        let leak = rows(Some(&control), Some(&outcome(&[("a", "protected"), ("b", "exposed")])));
        assert_eq!(problems(&leak, true, true, 2).len(), 1);
        let lost = rows(Some(&control), Some(&outcome(&[("a", "protected")])));
        assert_eq!(problems(&lost, true, true, 2).len(), 1);
        let blunt =
            rows(Some(&outcome(&[("a", "protected")])), Some(&outcome(&[("a", "protected")])));
        assert_eq!(problems(&blunt, true, true, 2).len(), 1);
        assert_eq!(problems(&[], true, true, 2).len(), 1);
    }

    #[test]
    fn one_guest_has_no_other_to_map_into() {
        let r = rows(
            Some(&outcome(&[("map-into-other-vm", "skipped")])),
            Some(&outcome(&[("map-into-other-vm", "skipped")])),
        );
        assert!(problems(&r, true, true, 1).is_empty());
        assert_eq!(problems(&r, true, true, 2).len(), 2);
    }

    #[test]
    fn the_table_has_a_line_for_each_check() {
        let t = table(&rows(None, Some(&outcome(&[("x", "protected")]))));
        assert!(t.contains("x      -           protected"), "{t}");
    }
}
