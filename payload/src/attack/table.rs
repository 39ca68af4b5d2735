// SPDX-License-Identifier: MIT OR Apache-2.0
//! The payload's attacks as data; xtask includes this file too.

/// An attack and its control.
pub struct Attack {
    /// Module and function below `attack::`.
    pub name: &'static str,
    /// Its row of the list of threats.
    pub id: &'static str,
    /// The check without which it succeeds, by its name in
    /// `crates/core/src/leave_out.rs`.
    pub leave_out: &'static str,
    /// The GIC version that it needs; 0 for any.
    pub gic: u32,
    /// In the control the monitor stops, so that there is no line of the result.
    pub stops: bool,
    /// What the attacker does.
    pub what: &'static str,
}

const fn attack(
    name: &'static str,
    id: &'static str,
    leave_out: &'static str,
    what: &'static str,
) -> Attack {
    Attack { name, id, leave_out, gic: 0, stops: false, what }
}

/// All of them.
pub const TABLE: &[Attack] = &[attack(
    "t05::table_page",
    "T05",
    "Owner",
    "a table page of the victim is mapped into a VM of the attacker",
)];
