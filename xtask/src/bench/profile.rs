// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `profile` verb: where the instructions of operations are executed.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::{Args as ClapArgs, ValueEnum};

use havmsi_operations::Task;

use super::counts::special;
use super::symbols::Symbols;
use super::{Measured, Parts, System, measure, operation};
use crate::Ctx;
use crate::kernel::pkvm::{self, Pkvm};

/// Options of `profile`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Which operations
    #[arg(value_name = "OPERATION", required = true, value_parser = operation)]
    pub operations: Vec<usize>,
    /// Interrupt controller
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: u32,
    /// On which system
    #[arg(long, value_enum, default_value_t = Which::Both)]
    pub on: Which,
    /// Lines of each table
    #[arg(long, default_value_t = 40)]
    pub top: usize,
    /// What a line of the table is (kernels have symbols only)
    #[arg(long, value_enum, default_value_t = By::Function)]
    pub by: By,
    /// Also who calls the functions of the table that are compiled as such
    #[arg(long)]
    pub callers: bool,
}

/// What instructions are summed up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// The innermost function of ours that they were inlined from
    Function,
    /// The innermost function, the core library's too
    Inlined,
    /// A line of our sources
    Line,
    /// The function that was compiled as one
    Symbol,
}

/// Which systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// Plain KVM
    Kvm,
    /// HA-VMSI
    Havmsi,
    /// A protected VM of pKVM's
    Pkvm,
    /// KVM and HA-VMSI, one after the other
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
    let mut places = BTreeMap::<(&'static str, String), Sum>::new();
    let mut parts = BTreeMap::<&'static str, Sum>::new();
    let mut all = Sum::default();
    for line in &measured.group.lines {
        let place = symbols.place(line.level, line.address);
        let name = match args.by {
            By::Function => place.function,
            By::Inlined => place.inlined,
            By::Line => place.line,
            By::Symbol => place.symbol,
        };
        let special = if special(line.word).is_some() { line.count } else { 0 };
        let by_name = places.entry((place.part, name)).or_default();
        for sum in [by_name, parts.entry(place.part).or_default(), &mut all] {
            sum.instructions += line.count;
            sum.special += special;
        }
    }
    let mut sorted: Vec<_> = places.iter().collect();
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
    for ((part, name), sum) in sorted.into_iter().take(args.top) {
        put(sum, &format!("  {part}  {name}"));
    }
    out.push_str("changes of level:");
    for (from, to, n) in &measured.group.changes {
        out.push_str(&format!(" {from}>{to} {:.2}", each(*n)));
    }
    out.push('\n');
    if args.callers {
        out.push_str(&callers(measured, symbols, args.top));
    }
    out
}

/// Who calls what: ways to the start of a symbol from another one.
fn callers(measured: &Measured, symbols: &Symbols, top: usize) -> String {
    let mut called = BTreeMap::<(&'static str, String), BTreeMap<String, u64>>::new();
    for (level, from, to, n) in &measured.group.ways {
        let (from, to) = (symbols.place(*level, *from), symbols.place(*level, *to));
        if to.start && from.symbol != to.symbol {
            let callers = called.entry((to.part, to.symbol)).or_default();
            *callers.entry(from.line).or_default() += n;
        }
    }
    let mut sorted: Vec<_> = called.iter().collect();
    sorted.sort_by_key(|(_, callers)| std::cmp::Reverse(callers.values().sum::<u64>()));
    let mut out = "calls of compiled functions, by caller:\n".to_owned();
    let each = |n: u64| n as f64 / f64::from(measured.operation.times);
    for ((part, name), callers) in sorted.into_iter().take(top) {
        out.push_str(&format!("{:9.1}  {part}  {name}\n", each(callers.values().sum())));
        let mut callers: Vec<_> = callers.iter().collect();
        callers.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        for (caller, n) in callers {
            out.push_str(&format!("{:19.1}  {caller}\n", each(*n)));
        }
    }
    out
}

/// The `profile` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    let parts = Parts::build(ctx)?;
    let tasks: Vec<Task> = args.operations.iter().map(|i| Task::plain(*i)).collect();
    let systems = match args.on {
        Which::Kvm => vec![System::Kvm],
        Which::Havmsi => vec![System::Havmsi],
        Which::Pkvm => vec![System::Pkvm],
        Which::Both => vec![System::Kvm, System::Havmsi],
    };
    for system in systems {
        let pkvm = if system == System::Pkvm { Some(pkvm::build(ctx)?) } else { None };
        let image = pkvm.as_ref().map(Pkvm::image);
        let machine = measure(ctx, &parts, (system, image.as_deref()), args.gic, &tasks)?;
        let symbols = Symbols::read(&parts, system, pkvm.map(|p| p.symbols()))?;
        for measured in machine.operations {
            let measured = measured.map_err(anyhow::Error::msg)?;
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
