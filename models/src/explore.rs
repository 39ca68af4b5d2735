// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs a scenario to its end, or to a limit.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use stateright::{Checker, HasDiscoveries, Model as _};

use crate::world::{Scenario, Small};

/// What an exploration came to.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The scenario.
    pub name: String,
    /// What it is about.
    pub what: String,
    /// CPUs.
    pub cpus: usize,
    /// Pages that both VMs can get.
    pub pages: u8,
    /// Different states.
    pub states: usize,
    /// Steps from state to state.
    pub steps: usize,
    /// The longest of the shortest ways to a state.
    pub depth: usize,
    /// Different states of VMs, as the shipped type has it.
    pub vms: usize,
    /// All states that can be reached were.
    pub complete: bool,
    /// Seconds.
    pub seconds: f64,
    /// How calls ended, and how often.
    pub ends: BTreeMap<String, u64>,
    /// What does not hold, with the way there.
    pub broken: Vec<Broken>,
}

/// A promise that does not hold.
#[derive(Debug, Serialize)]
pub struct Broken {
    /// Which.
    pub property: String,
    /// Why not.
    pub why: String,
    /// The steps.
    pub steps: Vec<String>,
}

/// How far an exploration goes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nothing new is begun after this.
    pub time: Duration,
    /// Nor with more of this process in memory.
    pub bytes: u64,
    /// Threads; one finds short ways.
    pub threads: usize,
}

impl Limits {
    /// No limits.
    pub const NONE: Self = Self { time: Duration::MAX, bytes: u64::MAX, threads: 1 };
}

/// Explores all of a scenario, or as much as the limits let, or stops at the
/// first promise that does not hold.
#[must_use]
pub fn explore(scenario: Scenario, limits: Limits) -> Report {
    let start = Instant::now();
    let Scenario { name, what, cpus, pages, .. } = scenario;
    let small = Small::new(scenario, start.checked_add(limits.time), limits.bytes);
    let checker = small
        .checker()
        .threads(limits.threads)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let small = checker.model();
    let mut broken: Vec<Broken> = checker
        .discoveries()
        .into_iter()
        .map(|(property, path)| {
            let path = path.into_vec();
            let why = path.last().and_then(|(last, _)| small.why(last)).unwrap_or_default();
            let steps = path
                .iter()
                .filter_map(|(state, action)| Some(small.tell(state, action.as_ref()?)))
                .collect();
            Broken { property: property.to_owned(), why, steps }
        })
        .collect();
    broken.sort_by_key(|broken| (broken.steps.len(), broken.property.clone()));
    Report {
        name: name.to_owned(),
        what: what.to_owned(),
        cpus,
        pages,
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        vms: small.vm_states(),
        complete: broken.is_empty() && !small.was_late(),
        seconds: start.elapsed().as_secs_f64(),
        ends: small.ends(),
        broken,
    }
}
