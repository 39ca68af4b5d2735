// SPDX-License-Identifier: MIT OR Apache-2.0
//! The digests of `job=operate`: what `havmsi` lists on the host, beside what the monitor printed and
//! what is computed from the guest's files. The rest is the agent's to judge.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

use crate::job::Outcome;
use crate::run::Args;
use crate::{Ctx, digest};

/// What is right, in words.
pub fn digests(ctx: &Ctx, outcome: &Outcome, args: &Args) -> Result<String> {
    let computed = digest::compute(ctx, &digest::Args::guest(args.vcpus, args.gic))?;
    compare(outcome, &computed)
}

/// `computed` is that of the first guest.
fn compare(outcome: &Outcome, computed: &str) -> Result<String> {
    let event = outcome.events.iter().find(|e| e["event"] == "operate").context("no list")?;
    let printed: BTreeMap<u64, String> = outcome.launches().into_iter().collect();
    let first = outcome.vms.get(&0).context("no name of the first guest's VM")?;
    let list = event["list"]["vms"].as_array().context("no VMs in the list")?;
    let mut found = false;
    for vm in list {
        let name = vm["vm"].as_str().and_then(|v| v.strip_prefix("0x")).context("a VM's name")?;
        let name = u64::from_str_radix(name, 16)?;
        let digest = vm["digest"].as_str().with_context(|| format!("VM {name:#x}: no digest"))?;
        let printed = printed.get(&name).map(String::as_str);
        if printed != Some(digest) {
            bail!("VM {name:#x}: listed with {digest}, the monitor printed {printed:?}");
        }
        if name == *first {
            found = true;
            if digest != computed {
                bail!("VM {name:#x}: listed with {digest}, its files give {computed}");
            }
        }
    }
    if !found || list.len() != outcome.vms.len() {
        bail!("{} VMs are listed, VM {first:#x} {found}", list.len());
    }
    Ok(format!("{} VMs, counts and pages as the monitor has them, digests as computed", list.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn outcome(digests: [&str; 2]) -> Outcome {
        let line =
            |vm: u64, digest: &str| format!("havmsi: VM {vm:#x} launched, digest {digest}\n");
        let (a, b) = ("aa".repeat(32), "bb".repeat(32));
        let list = json!({"vms": [
            {"vm": "0x10001", "digest": digests[0]}, {"vm": "0x10002", "digest": digests[1]},
        ]});
        Outcome {
            events: vec![json!({"event": "operate", "list": list})],
            vms: [(0, 0x10001), (1, 0x10002)].into(),
            monitor: line(0x10001, &a) + &line(0x10002, &b),
            ..Outcome::default()
        }
    }

    #[test]
    fn each_digest_is_the_monitors_and_the_first_is_computed() {
        let (a, b) = ("aa".repeat(32), "bb".repeat(32));
        assert!(compare(&outcome([&a, &b]), &a).is_ok());
        assert!(compare(&outcome([&a, &a]), &a).is_err());
        assert!(compare(&outcome([&b, &b]), &a).is_err());
        assert!(compare(&outcome([&a, &b]), &b).is_err());
        let mut short = outcome([&a, &b]);
        short.events = vec![json!({"event": "operate", "list": {"vms": []}})];
        assert!(compare(&short, &a).is_err());
    }
}
