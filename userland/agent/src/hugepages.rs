// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest's memory is made of: pages of 4 KiB, transparent huge pages, or hugetlbfs.

use crate::sys;
use std::fs;

const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const HUGETLB: &str = "/proc/sys/vm/nr_hugepages";
/// Where QEMU makes files of huge pages.
pub const FOLDER: &str = "/dev/hugepages";

/// Prepares the host for guests of so many MiB on that kind of memory: `never` and `always` are
/// the kernel's words for transparent huge pages.
pub fn back(kind: &str, mib: u64) -> Result<(), String> {
    let set = |path: &str, value: &str| fs::write(path, value).map_err(|e| format!("{path}: {e}"));
    set(THP, if kind == "hugetlb" { "never" } else { kind })?;
    if kind != "hugetlb" {
        return Ok(());
    }
    // There already, if it was used before.
    let _ = fs::create_dir(FOLDER);
    sys::mount(c"hugetlbfs", c"/dev/hugepages").map_err(|e| format!("mount {FOLDER}: {e}"))?;
    set("/proc/sys/vm/compact_memory", "1")?;
    let pages = mib / 2;
    set(HUGETLB, &pages.to_string())?;
    let got = fs::read_to_string(HUGETLB).map_err(|e| format!("{HUGETLB}: {e}"))?;
    if got.trim() == pages.to_string() {
        Ok(())
    } else {
        Err(format!("the host has {} huge pages instead of {pages}", got.trim()))
    }
}
