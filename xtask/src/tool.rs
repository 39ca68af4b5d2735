// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subcommands of Cargo that are not part of it: in one version, installed by Cargo itself.

use std::process::Command;

use anyhow::Result;

use crate::{Ctx, sh, ui};

/// A subcommand of Cargo.
#[derive(Debug)]
pub struct Tool {
    /// What is behind `cargo`.
    pub name: &'static str,
    /// The version that the project's results are of.
    pub version: &'static str,
    /// More words for `cargo install`.
    pub how: &'static [&'static str],
}

impl Tool {
    /// Installs it unless it is there, saying so before.
    pub fn ensure(&self, ctx: &Ctx) -> Result<()> {
        let Self { name, version, how } = self;
        let found = sh::output(Command::new("cargo").args([name, "--version"]));
        if found.is_ok_and(|v| v.trim().ends_with(&format!(" {version}"))) {
            return Ok(());
        }
        let package = format!("cargo-{name}");
        ui::say(&format!("missing on this machine: {package} {version}; installing it with Cargo"));
        let step = ui::Step::new(&format!("cargo install {package}"), None);
        sh::run(
            Command::new("cargo")
                .args(["install", "--locked", &package, "--version", version])
                .args(*how)
                .current_dir(&ctx.cache.dir),
            &ctx.log("setup.log"),
        )?;
        step.done();
        Ok(())
    }
}
