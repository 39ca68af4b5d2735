// SPDX-License-Identifier: MIT OR Apache-2.0
//! The list of VMs.

use crate::state::{PAGE, State, Trouble};
use std::fmt::Write as _;

/// Pages as a size.
pub fn size(pages: u64) -> String {
    let kib = pages * (PAGE >> 10);
    match kib {
        0..1024 => format!("{kib} KiB"),
        _ => format!("{}.{} MiB", kib >> 10, ((kib & 1023) * 10) >> 10),
    }
}

/// For people.
pub fn table(state: &State) -> String {
    let mut out = String::new();
    let mut line = |words: [&str; 11]| {
        let [vm, pid, launched, vcpus, private, shared, sealed, tables, faults, seals, digest] =
            words;
        // Writing to a String can't fail.
        let _ = writeln!(
            out,
            "{vm:<10} {pid:>7} {launched:<8} {vcpus:>5} {private:>12} {shared:>12} {sealed:>12} {tables:>10} {faults:>9} {seals:>9} {digest}"
        );
    };
    line([
        "VM", "PID", "STATE", "VCPUS", "PRIVATE", "SHARED", "SEALED", "TABLES", "FAULTS", "SEALS",
        "DIGEST",
    ]);
    let mut sums = [0; 4];
    for vm in &state.vms {
        let counts =
            ["vcpus", "private_pages", "shared_pages", "pool_pages"].map(|name| vm.count(name));
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
        let [vcpus, private, shared, tables] = counts;
        line([
            &format!("{:#x}", vm.vm),
            &vm.pid.to_string(),
            if vm.launched { "launched" } else { "open" },
            &vcpus.to_string(),
            &size(private),
            &size(shared),
            &size(vm.count("sealed_pages")),
            &size(tables),
            &vm.count("faults").to_string(),
            &vm.count("seals").to_string(),
            vm.digest.as_deref().unwrap_or("-"),
        ]);
    }
    let monitor =
        ["vcpus", "private_pages", "shared_pages", "pool_pages"].map(|name| count(state, name));
    for (what, number, [vcpus, private, shared, tables]) in
        [("sum", state.vms.len() as u64, sums), ("monitor", count(state, "vms"), monitor)]
    {
        let words = [size(private), size(shared), size(tables)];
        let vms = format!("{number} VMs");
        let [private, shared, tables] = &words;
        line([what, "", &vms, &vcpus.to_string(), private, shared, "", tables, "", "", ""]);
    }
    let _ = writeln!(out, "host       {}", size(count(state, "host_pages")));
    out
}

fn count(state: &State, name: &str) -> u64 {
    state.monitor.get(name).copied().unwrap_or(0)
}

/// For programs: one line.
pub fn json(state: &State) -> Result<String, Trouble> {
    let text = serde_json::to_string(state).map_err(|e| Trouble::Other(e.to_string()))?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Fake;

    #[test]
    fn sums_stand_above_the_monitors_counts() {
        let fake = Fake::new("list");
        let text = table(&State::read(&fake.0).unwrap());
        let row = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row("sum"), row("monitor"), "{text}");
        assert_eq!(row("sum"), "2 VMs 3 2.0 MiB 4 KiB 32 KiB");
        assert!(row("0x10001").ends_with(&"ab".repeat(32)), "{text}");
    }

    #[test]
    fn a_program_finds_all_counts_by_their_names() {
        let fake = Fake::new("json");
        let text = json(&State::read(&fake.0).unwrap()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let vm = &value["vms"][0];
        assert_eq!((&vm["vm"], &vm["later"]), (&"0x10001".into(), &4.into()));
        assert_eq!(value["monitor"]["private_pages"], 514);
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn sizes_are_rounded_down() {
        assert_eq!(
            [1, 255, 256, 383].map(size),
            ["4 KiB", "1020 KiB", "1.0 MiB", "1.4 MiB"].map(str::to_owned)
        );
    }
}
