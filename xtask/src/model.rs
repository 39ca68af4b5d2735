// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `model` verb: `models/` explores every interleaving of the shipped
//! transition code in small worlds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::{Deserialize, Serialize};

use crate::{Ctx, sh, ui};

/// States that a run must see at least, if it is one of all scenarios.
pub const FEWEST_STATES: u64 = 1_000_000;

/// Options of `model`.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Args {
    /// Wider bounds, as far as there is time for
    #[arg(long)]
    pub deep: bool,
    /// How long a deep run may take
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub minutes: u64,
    /// Only this scenario (may be given several times)
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What a scenario came to, of what `models/` writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// What it is about.
    pub what: String,
    /// CPUs.
    pub cpus: u64,
    /// Pages that both VMs can get.
    pub pages: u64,
    /// Different states.
    pub states: u64,
    /// Steps between them.
    pub steps: u64,
    /// The longest of the shortest ways to a state.
    pub depth: u64,
    /// All states that can be reached were.
    pub complete: bool,
}

/// Builds the program.
pub fn build(ctx: &Ctx) -> Result<PathBuf> {
    let step = ui::Step::short("build the model");
    sh::run(
        Command::new("cargo")
            .args(["build", "--profile", "model", "--locked", "-p", "havmsi-models"])
            .current_dir(&ctx.root),
        &ctx.log("build-model.log"),
    )?;
    step.done();
    Ok(ctx.target_dir().join("model/havmsi-models"))
}

fn command(program: &Path, args: &Args, json: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--minutes", &args.minutes.to_string(), "--json"]).arg(json);
    if args.deep {
        command.arg("--deep");
    }
    for name in &args.only {
        command.args(["--only", name]);
    }
    command
}

fn read(json: &Path) -> Result<Vec<Scenario>> {
    let text = fs::read_to_string(json).with_context(|| format!("no {}", json.display()))?;
    serde_json::from_str(&text).context("the model's results")
}

/// The exploration of the table of tests: all scenarios to their end.
pub fn row(ctx: &Ctx, limit: Duration) -> Result<Vec<Scenario>> {
    let json = ctx.log("model.json");
    let program = build(ctx)?;
    sh::run_limited(
        &mut command(&program, &Args { minutes: 30, ..Args::default() }, &json),
        &ctx.log("model.log"),
        limit,
    )?;
    read(&json)
}

/// What the scenarios came to, in a line; fails if that is not enough.
pub fn verdict(scenarios: &[Scenario]) -> Result<String> {
    if let Some(cut) = scenarios.iter().find(|scenario| !scenario.complete) {
        bail!("{}: cut short after {} states", cut.name, cut.states);
    }
    let states: u64 = scenarios.iter().map(|scenario| scenario.states).sum();
    if states < FEWEST_STATES {
        bail!("{states} states; there should be {FEWEST_STATES}");
    }
    Ok(format!("{states} states of {} small worlds, which are all", scenarios.len()))
}

/// The `model` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let program = build(ctx)?;
    let json = args.json.clone().unwrap_or_else(|| ctx.log("model.json"));
    fs::create_dir_all(&ctx.log_dir)?;
    sh::run_attached(&mut command(&program, args, &json))?;
    let scenarios = read(&json)?;
    if !args.deep && args.only.is_empty() {
        println!("{}", verdict(&scenarios)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(states: u64, complete: bool) -> Scenario {
        let (name, what) = ("a".to_owned(), "b".to_owned());
        Scenario { name, what, cpus: 2, pages: 1, states, steps: 1, depth: 1, complete }
    }

    #[test]
    fn few_states_and_a_cut_are_failures() {
        assert!(verdict(&[scenario(600_000, true), scenario(400_000, true)]).is_ok());
        assert!(verdict(&[scenario(999_999, true)]).is_err());
        assert!(verdict(&[scenario(2_000_000, true), scenario(9_000_000, false)]).is_err());
        assert!(verdict(&[]).is_err());
    }
}
