// SPDX-License-Identifier: MIT OR Apache-2.0
//! What QEMU's plugin (`bench/plugin`) wrote, and what it comes to for one operation.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// An instruction of the smallest record.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Line {
    /// Its exception level.
    pub level: usize,
    /// Its virtual address.
    pub address: u64,
    /// Itself.
    pub word: u32,
    /// How often it was executed.
    pub count: u64,
}

/// What one operation gave.
#[derive(Debug, Clone, Deserialize)]
pub struct Group {
    /// Instructions of each record.
    pub instructions: Vec<u64>,
    /// Changes of exception level of the smallest record: from, to, how often.
    pub changes: Vec<(usize, usize, u64)>,
    /// Its instructions.
    pub lines: Vec<Line>,
    /// Ways from block to block at the same level: level, from (its last instruction), to, how often.
    pub ways: Vec<(usize, u64, u64, u64)>,
}

/// Reads the plugin's result.
pub fn read(path: &Path) -> Result<Vec<Group>> {
    let text = fs::read(path)
        .with_context(|| format!("QEMU's plugin left no result at {}", path.display()))?;
    serde_json::from_slice(&text).context("the result of QEMU's plugin")
}

/// Instructions that hardware charges more for than for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// MSR or MRS of a system register.
    Register,
    /// DSB or ISB.
    Barrier,
    /// TLB maintenance.
    Tlb,
    /// Cache maintenance, and address translation.
    Cache,
}

/// Which of these an instruction is (Arm ARM C4.1 "System instructions").
pub fn special(word: u32) -> Option<Special> {
    if word >> 22 != 0b11_0101_0100 {
        return None;
    }
    let (op0, crn, op2) = (word >> 19 & 3, word >> 12 & 15, word >> 5 & 7);
    match (op0, crn, op2) {
        (0, 3, 4 | 6) => Some(Special::Barrier),
        (1, 8 | 9, _) => Some(Special::Tlb),
        (1, 7, _) => Some(Special::Cache),
        (2 | 3, ..) => Some(Special::Register),
        _ => None,
    }
}

/// What an operation costs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Instructions, of all CPUs: those of the smallest record.
    pub instructions: f64,
    /// The same of the record in the middle.
    pub median: f64,
    /// Instructions at EL0 to EL3.
    pub levels: [f64; 4],
    /// Changes of exception level.
    pub transitions: f64,
    /// By kind, as `1>2`.
    pub transitions_by: BTreeMap<String, f64>,
    /// Accesses to system registers.
    pub sysregs: f64,
    /// At EL0 to EL3.
    pub sysregs_by: [f64; 4],
    /// DSB and ISB.
    pub barriers: f64,
    /// TLB maintenance instructions.
    pub tlbi: f64,
    /// Cache maintenance instructions.
    pub cache: f64,
}

/// A number of so many operations, for one of them, to two digits behind the point.
fn each(n: u64, times: u32) -> f64 {
    let hundredths = (n * 100 + u64::from(times) / 2) / u64::from(times);
    // Counts are far below 2^53.
    hundredths as f64 / 100.0
}

impl Group {
    /// What one of the `times` operations of a record costs.
    pub fn cost(&self, times: u32) -> Cost {
        let mut sorted = self.instructions.clone();
        sorted.sort_unstable();
        let at = |i: usize| sorted.get(i).map_or(0.0, |n| each(*n, times));
        let sum = |keep: &dyn Fn(&Line) -> bool| {
            each(self.lines.iter().filter(|l| keep(l)).map(|l| l.count).sum(), times)
        };
        let all = |what| sum(&|l| special(l.word) == Some(what));
        Cost {
            instructions: at(0),
            median: at(sorted.len() / 2),
            levels: [0, 1, 2, 3].map(|level| sum(&|l| l.level == level)),
            transitions: each(self.changes.iter().map(|c| c.2).sum(), times),
            transitions_by: self
                .changes
                .iter()
                .map(|(from, to, n)| (format!("{from}>{to}"), each(*n, times)))
                .collect(),
            sysregs: all(Special::Register),
            sysregs_by: [0, 1, 2, 3].map(|level| {
                sum(&|l| l.level == level && special(l.word) == Some(Special::Register))
            }),
            barriers: all(Special::Barrier),
            tlbi: all(Special::Tlb),
            cache: all(Special::Cache),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_instructions_are_told_apart() {
        for (word, kind) in [
            (0xd538_2040, Some(Special::Register)), // mrs x0, tcr_el1
            (0xd51c_1100, Some(Special::Register)), // msr hcr_el2, x0
            (0xd530_0243, Some(Special::Register)), // mrs x3, mdscr_el1 (op0 2)
            (0xd503_3fdf, Some(Special::Barrier)),  // isb
            (0xd503_3b9f, Some(Special::Barrier)),  // dsb ish
            (0xd503_3bbf, None),                    // dmb ish
            (0xd50c_83df, Some(Special::Tlb)),      // tlbi vmalls12e1is
            (0xd50b_7423, Some(Special::Cache)),    // dc zva, x3
            (0xd503_201f, None),                    // nop
            (0xd503_42ff, None),                    // msr daifclr, #2
            (0xd69f_03e0, None),                    // eret
        ] {
            assert_eq!(special(word), kind, "{word:#x}");
        }
    }

    #[test]
    fn a_cost_is_that_of_the_smallest_record() {
        let line = |level, word, count| Line { level, address: 0, word, count };
        let group = Group {
            instructions: vec![300, 210, 220],
            changes: vec![(1, 2, 4), (2, 3, 4)],
            lines: vec![line(1, 0xd503_201f, 180), line(3, 0xd51c_1100, 30)],
            ways: vec![],
        };
        let cost = group.cost(20);
        assert_eq!((cost.instructions, cost.median), (10.5, 11.0));
        assert_eq!((cost.levels[1], cost.levels[3]), (9.0, 1.5));
        assert_eq!((cost.transitions, cost.sysregs, cost.sysregs_by[3]), (0.4, 1.5, 1.5));
        assert_eq!(cost.transitions_by.get("2>3"), Some(&0.2));
    }
}
