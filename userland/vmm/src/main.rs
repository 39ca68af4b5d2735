// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tiny VMM on KVM's ioctls that attacks guests of its own: registers (the guest of `tiny.rs`),
//! memory slots, exceptions, vCPUs, debugging, time (the guest of `obey.rs`).
//!
//! `havmsi-vmm ID` carries out one attack and prints a line
//! `@vmm {"event":"check","id":...,"result":"exposed"|"protected"|"error","evidence":...}`;
//! `havmsi-vmm alive` only runs a guest: exit status 0 if all is well with it. `havmsi-vmm sharing`
//! has a guest share memory while this VMM's disk writes there.
//!
//! `havmsi-vmm bench GIC plain|protected NAME` measures an operation instead, and prints a line
//! `@vmm {"event":"bench","operation":...,"ticks":[...]}`.

mod attacks;
mod bench;
mod gic;
mod memory;
mod obey;
mod sharing;
mod tiny;
mod vm;

use havmsi_proto::VMM_PREFIX;
use havmsi_proto::json::Object;
use std::process::ExitCode;
use vm::{Reg, Stop, Vm};

/// Registers that hold the guest's values, and which value.
fn known() -> Vec<(Reg, u64)> {
    let secret = |i: u8| tiny::SECRETS[usize::from(i)];
    let general = (0..10).map(|i| (Reg::X(19 + i), secret(i)));
    let fp = (0..8).map(|i| (Reg::D(8 + i), secret(i)));
    let system = [(Reg::TpidrEl1, secret(8)), (Reg::TpidrEl0, secret(9))];
    general.chain(fp).chain(system).collect()
}

fn seen(vm: &Vm) -> usize {
    known().iter().filter(|(reg, value)| vm.get(*reg).is_ok_and(|v| v == *value)).count()
}

struct Finding {
    exposed: bool,
    evidence: String,
}

/// Looks at the registers after each exit.
fn regs_read() -> Result<Finding, String> {
    let mut vm = Vm::new(tiny::image())?;
    let total = known().len();
    let (mut texts, mut exposed) = (Vec::new(), false);
    let mut phase = 0;
    let mut changed = 0;
    loop {
        let stop = vm.run(phase == 3)?;
        let found = seen(&vm);
        let exit = match stop {
            Stop::Store(tiny::PHASE, value) => {
                phase = value;
                "store"
            }
            Stop::Store(tiny::CHANGED, mask) => {
                changed |= mask;
                continue;
            }
            Stop::Load(tiny::ANSWER) => "load",
            Stop::Interrupt => "interrupt",
            Stop::Off => break,
            other => return Err(format!("unexpected exit {other:x?}")),
        };
        // One line of evidence for each kind of exit.
        if !texts.iter().any(|(e, _)| *e == exit) {
            exposed |= found > 0;
            texts.push((exit, found));
        }
    }
    if changed != 0 {
        return Err(format!("the guest's registers changed by themselves: mask {changed:#x}"));
    }
    if !texts.iter().any(|(exit, _)| *exit == "interrupt") {
        return Err("the guest ended before an interrupt came".to_owned());
    }
    let texts: Vec<String> =
        texts.iter().map(|(exit, n)| format!("after a {exit} {n} of {total}")).collect();
    let evidence = format!("values of the guest that KVM_GET_ONE_REG shows: {}", texts.join(", "));
    Ok(Finding { exposed, evidence })
}

/// Changes registers after exits, and listens to the guest.
fn regs_write() -> Result<Finding, String> {
    let mut vm = Vm::new(tiny::image())?;
    let mut refused = 0;
    let mut changed = Vec::new();
    let mut pwned = false;
    let mut phase = 0;
    loop {
        let stop = vm.run(phase == 3)?;
        match stop {
            Stop::Store(tiny::PHASE, value) => {
                phase = value;
                if phase == 1 {
                    for (reg, value) in known() {
                        refused += usize::from(vm.set(reg, !value).is_err());
                    }
                }
            }
            Stop::Load(tiny::ANSWER) => {
                refused += usize::from(vm.set(Reg::Pc, tiny::pwned()).is_err());
            }
            Stop::Store(tiny::CHANGED, mask) => changed.push(mask),
            Stop::Store(tiny::PWNED, _) => {
                pwned = true;
                break;
            }
            Stop::Interrupt => {}
            Stop::Off => break,
            other => return Err(format!("unexpected exit {other:x?}")),
        }
    }
    let mask = changed.first().copied().ok_or("the guest gave no report")?;
    let evidence = format!(
        "of {} registers set by KVM_SET_ONE_REG ({refused} refused) the guest finds {} changed; the program \
         counter {}",
        known().len(),
        mask.count_ones(),
        if pwned { "went where it was set" } else { "stayed on its path" }
    );
    Ok(Finding { exposed: mask != 0 || pwned || changed.iter().any(|m| *m != 0), evidence })
}

fn ended(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("havmsi-vmm: {e}");
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    let id = std::env::args().nth(1).unwrap_or_default();
    let attack = attacks::ATTACKS.iter().find(|(name, _)| *name == id);
    let result = match (id.as_str(), attack) {
        ("regs-read", _) => regs_read(),
        ("regs-write", _) => regs_write(),
        ("sharing", _) => sharing::check(),
        (_, Some((_, attack))) => attack(),
        ("alive", _) => return ended(attacks::alive()),
        ("bench", _) => return ended(bench::main(&std::env::args().skip(2).collect::<Vec<_>>())),
        _ => {
            let names: Vec<&str> = attacks::ATTACKS.iter().map(|a| a.0).collect();
            eprintln!(
                "usage: havmsi-vmm alive|bench|sharing|regs-read|regs-write|{}",
                names.join("|")
            );
            return ExitCode::from(2);
        }
    };
    let (word, evidence) = match &result {
        Ok(r) => (if r.exposed { "exposed" } else { "protected" }, &r.evidence),
        Err(e) => ("error", e),
    };
    let object =
        Object::event("check").text("id", &id).text("result", word).text("evidence", evidence);
    println!("{VMM_PREFIX}{}", object.finish());
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
