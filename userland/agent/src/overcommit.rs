// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host that is short of memory: it swaps to a disk, compacts, and scans for pages to merge.

use crate::{out, sys};
use havmsi_proto::json::Object;
use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The second disk.
const DISK: &str = "/dev/vdb";
/// So many pages must have come back.
pub const ENOUGH: u64 = 100_000;
const KSM: &str = "/sys/kernel/mm/ksm";
/// What KVM counts.
const COUNTS: &str = "/sys/kernel/debug/havmsi_stats";

fn set(path: &str, value: &str) -> Result<(), String> {
    fs::write(path, value).map_err(|e| format!("{path}: {e}"))
}

/// Makes the disk swap space.
pub fn prepare() -> Result<(), String> {
    const PAGE: usize = 4096;
    let disk = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_SYNC).open(DISK);
    let disk = disk.map_err(|e| format!("{DISK}: {e}"))?;
    let sectors = fs::read_to_string("/sys/block/vdb/size").map_err(|e| e.to_string())?;
    let pages = sectors.trim().parse::<u64>().map_err(|e| e.to_string())? / 8;
    let last = u32::try_from(pages - 1).map_err(|e| e.to_string())?;
    // union swap_header of Linux: version, last page, no bad pages; the signature at the end.
    let mut header = [0; PAGE];
    header[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
    header[1028..1032].copy_from_slice(&last.to_le_bytes());
    header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    disk.write_all_at(&header, 0).map_err(|e| format!("{DISK}: {e}"))?;
    drop(disk);
    sys::swap_on(c"/dev/vdb").map_err(|e| format!("swapon {DISK}: {e}"))
}

/// Has KSM scan from now on.
pub fn scan() -> Result<(), String> {
    set(&format!("{KSM}/sleep_millisecs"), "200")?;
    set(&format!("{KSM}/pages_to_scan"), "200")?;
    set(&format!("{KSM}/run"), "1")
}

/// Compacts all memory, again and again, and tells what was done so far; how often.
pub fn churn(stop: &AtomicBool) -> u64 {
    let mut rounds = 0;
    let mut seconds = 0;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_secs(1));
        seconds += 1;
        if seconds % 5 == 0
            && let Ok(counts) = Counts::read()
        {
            out::event(counts.event());
        }
        if seconds % 30 == 0 {
            if let Err(e) = set("/proc/sys/vm/compact_memory", "1") {
                out::line(&e);
                break;
            }
            rounds += 1;
        }
    }
    rounds
}

/// What was done so far.
#[derive(Debug, Default)]
pub struct Counts {
    pub sealed: u64,
    pub unsealed: u64,
    pub refused: u64,
    swapped_out: u64,
    swapped_in: u64,
    migrated: u64,
    ksm_scans: u64,
}

/// Calls that have mapped or taken back pages so far.
pub fn page_calls() -> Result<u64, String> {
    let text = fs::read_to_string(COUNTS).map_err(|e| format!("{COUNTS}: {e}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("page_calls "));
    line.and_then(|n| n.trim().parse().ok()).ok_or_else(|| format!("{COUNTS}: no page_calls"))
}

impl Counts {
    /// Reads all of them.
    pub fn read() -> Result<Self, String> {
        let read = |path: &str| fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
        let (ours, vm) = (read(COUNTS)?, read("/proc/vmstat")?);
        let find = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
        };
        Ok(Self {
            sealed: find(&ours, "pages_sealed"),
            unsealed: find(&ours, "pages_unsealed"),
            refused: find(&ours, "integrity_failures"),
            swapped_out: find(&vm, "pswpout"),
            swapped_in: find(&vm, "pswpin"),
            migrated: find(&vm, "pgmigrate_success"),
            ksm_scans: read(&format!("{KSM}/full_scans"))?.trim().parse().unwrap_or(0),
        })
    }

    /// Whether the host has swapped, migrated and scanned.
    pub fn all_kinds(&self) -> bool {
        self.swapped_out > 0 && self.swapped_in > 0 && self.migrated > 0 && self.ksm_scans > 0
    }

    /// As an event.
    pub fn event(&self) -> Object {
        Object::event("overcommit")
            .value("pages_sealed", self.sealed)
            .value("pages_unsealed", self.unsealed)
            .value("integrity_failures", self.refused)
            .value("swapped_out", self.swapped_out)
            .value("swapped_in", self.swapped_in)
            .value("migrated", self.migrated)
            .value("ksm_scans", self.ksm_scans)
    }
}
