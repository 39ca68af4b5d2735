// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `fuzz` verb: where to look for what breaks, and for how long.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args as ClapArgs;

use crate::run::Cpu;
use crate::{Ctx, fuzz_host, fuzz_target};

/// Options of `fuzz`.
#[derive(Debug, Clone, ClapArgs)]
#[command(group = clap::ArgGroup::new("where").required(true))]
pub struct Args {
    /// On the emulated machine: a payload calls the real monitor from several CPUs
    #[arg(long, group = "where")]
    pub target: bool,
    #[command(flatten)]
    pub on_host: fuzz_host::Args,
    /// Calls of the host's to make (--target)
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub calls: u64,
    /// CPUs that call at once (--target)
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: u32,
    /// Version of the interrupt controller (--target)
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: u32,
    /// Model of the CPUs (--target)
    #[arg(long, value_enum, default_value_t = Cpu::CortexA57)]
    pub cpu: Cpu,
    /// What the random numbers start from [default: another one each time]
    #[arg(long, value_name = "NUMBER", value_parser = number)]
    pub seed: Option<u64>,
    /// The batch to start with, to repeat one that found something (--target)
    #[arg(long, default_value_t = 0, value_name = "BATCH")]
    pub from: u64,
    /// Leave out a check of the monitor's, by its name in crates/core/src/leave_out.rs: a run
    /// that must find something (--target)
    #[arg(long, value_name = "CHECK")]
    pub leave_out: Option<String>,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            target: true,
            on_host: fuzz_host::Args::default(),
            calls: 1_000_000,
            cpus: 4,
            gic: 3,
            cpu: Cpu::CortexA57,
            seed: None,
            from: 0,
            leave_out: None,
            json: None,
        }
    }
}

/// A number, decimal or with `0x`.
fn number(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// The `fuzz` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    if args.on_host.host {
        return fuzz_host::main(ctx, &args.on_host, args.json.as_deref());
    }
    fuzz_target::main(ctx, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_decimal_or_hexadecimal() {
        assert_eq!(number("0x1f"), Ok(31));
        assert_eq!(number("31"), Ok(31));
        assert!(number("0x").is_err() && number("1f").is_err());
    }
}
