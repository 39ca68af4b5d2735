// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `profile` verb: where the instructions of one operation are executed.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::{Args as ClapArgs, ValueEnum};

use super::counts::special;
use super::symbols::{Place, Symbols};
use super::{Measured, Parts, System, measure, operation};
use crate::Ctx;

/// Options of `profile`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Which operation
    #[arg(value_name = "OPERATION", value_parser = operation)]
    pub operation: usize,
    /// Interrupt controller
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: u32,
    /// On which system
    #[arg(long, value_enum, default_value_t = Which::Both)]
    pub on: Which,
    /// Lines of each table
    #[arg(long, default_value_t = 40)]
    pub top: usize,
    /// By line of the source, where that is known (monitor, VMM, guest)
    #[arg(long)]
    pub lines: bool,
}

/// Which systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// Plain KVM
    Kvm,
    /// HA-VMSI
    Havmsi,
    /// One after the other
    Both,
}

/// What one place costs.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    instructions: u64,
    special: u64,
}

/// The profile as text.
fn text(measured: &Measured, symbols: &Symbols, args: &Args) -> String {
    let times = f64::from(measured.operation.times);
    let each = |n: u64| n as f64 / times;
    let (mut places, mut parts) =
        (BTreeMap::<Place, Sum>::new(), BTreeMap::<&'static str, Sum>::new());
    let mut all = Sum::default();
    for line in &measured.group.lines {
        let mut place = symbols.place(line);
        if !args.lines {
            place.source.clear();
        }
        let part = place.part;
        let special = if special(line.word).is_some() { line.count } else { 0 };
        for sum in [places.entry(place).or_default(), parts.entry(part).or_default(), &mut all] {
            sum.instructions += line.count;
            sum.special += special;
        }
    }
    let mut sorted: Vec<(&Place, &Sum)> = places.iter().collect();
    sorted.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.instructions));
    let mut out = format!(
        "{:>9} {:>6} {:>7}  of {} (a record of {})\n",
        "insns", "%", "special", measured.operation.name, measured.operation.times
    );
    let mut put = |sum: &Sum, name: &str| {
        let share = sum.instructions as f64 / all.instructions as f64 * 100.0;
        out.push_str(&format!(
            "{:9.1} {share:6.1} {:7.1}  {name}\n",
            each(sum.instructions),
            each(sum.special)
        ));
    };
    put(&all, "all");
    parts.iter().rev().for_each(|(part, sum)| put(sum, part));
    for (place, sum) in sorted.into_iter().take(args.top) {
        put(sum, &format!("  {}  {} {}", place.part, place.function, place.source));
    }
    out.push_str("changes of level:");
    for (from, to, n) in &measured.group.changes {
        out.push_str(&format!(" {from}>{to} {:.2}", each(*n)));
    }
    out.push('\n');
    out
}

/// The `profile` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut parts = Parts::build(ctx)?;
    for system in [System::Kvm, System::Havmsi] {
        if matches!((args.on, system), (Which::Kvm, System::Havmsi) | (Which::Havmsi, System::Kvm))
        {
            continue;
        }
        for measured in measure(ctx, &parts, system, args.gic, &[args.operation])? {
            let monitor = parts.monitor.take();
            if system == System::Havmsi {
                parts.monitor.clone_from(&monitor);
            }
            let symbols = Symbols::read(&parts)?;
            parts.monitor = monitor;
            println!(
                "\n{} on GICv{}\n{}",
                system.name(),
                args.gic,
                text(&measured, &symbols, args)
            );
        }
    }
    Ok(())
}
