// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `deny` verb: cargo-deny over all that is built, by the rules of `deny.toml`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;

use crate::tool::Tool;
use crate::{Ctx, sh};

/// Not optimised: it takes a second either way, and is there in a third of the time.
const TOOL: Tool = Tool { name: "deny", version: "0.20.2", how: &["--debug"] };
/// Folders with a `Cargo.lock` of their own.
const WORKSPACES: [&str; 3] = [".", "fuzz", "schedules"];

/// Options of `deny`.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Args {
    /// Also known vulnerabilities: needs GitHub, where the database is
    #[arg(long)]
    pub advisories: bool,
}

/// Installs cargo-deny.
pub fn prepare(ctx: &Ctx) -> Result<()> {
    TOOL.ensure(ctx)
}

/// The packages of a lock file, by name and version.
fn packages(lock: &str) -> impl Iterator<Item = (String, String)> {
    lock.split("[[package]]").skip(1).filter_map(|package| {
        let value = |key: &str| {
            let line = package.lines().find_map(|l| l.strip_prefix(key))?;
            Some(line.trim_start_matches(" = ").trim_matches('"').to_owned())
        };
        Some((value("name")?, value("version")?))
    })
}

/// Checks; gives a line about it.
pub fn check(ctx: &Ctx, args: &Args) -> Result<String> {
    TOOL.ensure(ctx)?;
    let mut all = BTreeSet::new();
    for dir in WORKSPACES {
        let dir = ctx.root.join(dir);
        let lock = dir.join("Cargo.lock");
        all.extend(packages(
            &fs::read_to_string(&lock).with_context(|| lock.display().to_string())?,
        ));
        let mut command = Command::new("cargo");
        command.args(["deny", "--locked", "--all-features", "--manifest-path"]);
        command.arg(dir.join("Cargo.toml")).arg("--config").arg(ctx.root.join("deny.toml"));
        // No folder has all the exceptions.
        command.args([
            "check",
            "--hide-inclusion-graph",
            "-A",
            "license-exception-not-encountered",
        ]);
        command.args(["licenses", "bans", "sources"]);
        if args.advisories {
            command.arg("advisories");
        }
        sh::run(command.current_dir(&ctx.root), &ctx.log("deny.log"))?;
    }
    if all.is_empty() {
        bail!("the lock files name no package");
    }
    let advisories = if args.advisories {
        "no known vulnerability"
    } else {
        "advisories were not looked at (`cargo xtask deny --advisories`, needs GitHub)"
    };
    Ok(format!("licences, bans and sources of {} packages; {advisories}", all.len()))
}

/// The `deny` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    println!("{}", check(ctx, args)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_counted_by_version() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0\"\ndependencies = [\n \"b\",\n]\n\n\
            [[package]]\nname = \"b\"\nversion = \"2.0\"\n";
        let found: Vec<_> = packages(lock).collect();
        assert_eq!(found, [("a".into(), "1.0".into()), ("b".into(), "2.0".into())]);
    }
}
