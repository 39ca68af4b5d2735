// SPDX-License-Identifier: MIT OR Apache-2.0
//! The attacks. Each is decided by what it got, never by which system it runs on.

use crate::attacker::{Attacker, Scan, Via};
use crate::guest::{Corrupt, Guest, RAM};
use crate::params::Params;
use crate::{out, sys};
use havmsi_abi::layout::carveout;
use havmsi_abi::{Error, Function, MAX_VMS, PAGE_SIZE};
use havmsi_proto::json::{Object, field};
use havmsi_proto::{Seed, VMM_PREFIX};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Which of the published pages of a guest serves which attack: writes must not meet.
mod target {
    pub const READ: usize = 0;
    pub const LINEAR_WRITE: usize = 1;
    pub const FRESH_WRITE: usize = 2;
    pub const VMM_WRITE: usize = 3;
    pub const MEM_WRITE: usize = 4;
    pub const OTHER_SOURCE: usize = 6;
    pub const OTHER_PLACE: usize = 7;
    pub const TWICE_SOURCE: usize = 8;
    pub const TWICE_PLACE: usize = 9;
    pub const TABLE: usize = 10;
    pub const DMA_WRITE: usize = 11;
    pub const FW_CFG: usize = 12;
    pub const CPU: usize = 13;
    pub const DMA_TABLE: usize = 14;
}

/// Registers of the SMMU of QEMU's `virt` machine.
const SMMU: u64 = 0x0905_0000;

/// How long a guest may take to notice a change that was made.
const NOTICE: Duration = Duration::from_secs(10);
/// How long to wait when every attempt was refused. The verdict at the end covers all pages.
const REFUSED: Duration = Duration::from_millis(500);
/// How often the vCPUs of a running QEMU are looked at until the guest's values are in sight, and
/// how often they are written without.
const AIMED_LOOKS: u64 = 80;
const BLIND_LOOKS: u64 = 10;

/// What a check came to.
pub enum Found {
    /// The attack worked.
    Exposed(String),
    /// It didn't.
    Protected(String),
    /// The kernel lacks what the attack needs.
    Skipped(String),
}

use Found::{Exposed, Protected, Skipped};

type Outcome = Result<Found, String>;
type Check = fn(&mut Field) -> Outcome;

/// What the checks work on.
pub struct Field<'a> {
    params: &'a Params,
    attacker: &'a Attacker,
    guests: &'a [Guest],
    vms: Vec<OwnedFd>,
    vcpus: Vec<Vec<OwnedFd>>,
    ram: Vec<u64>,
    handles: Vec<u64>,
    pool: Vec<u64>,
    faults: Vec<u64>,
}

/// The checks in their order: reads first, then writes.
const CHECKS: [(&str, Check); 16] = [
    ("scan-physmem", |f| f.scan(Via::Linear)),
    ("scan-fresh-map", |f| f.scan(Via::Fresh)),
    ("linear-map-read", |f| f.linear_read()),
    ("vmm-read", |f| f.vmm_read()),
    ("kcore-read", |f| f.kcore_read()),
    ("devmem-read", |f| f.devmem_read()),
    ("regs-read", |_| own_vmm("regs-read")),
    ("regs-write", |_| own_vmm("regs-write")),
    ("regs-read-qemu", |f| f.regs_read_qemu()),
    ("linear-map-write", |f| f.physical_write(target::LINEAR_WRITE, Via::Linear)),
    ("fresh-map-write", |f| f.physical_write(target::FRESH_WRITE, Via::Fresh)),
    ("vmm-write", |f| f.vmm_write()),
    ("map-into-other-vm", |f| f.map_into_other()),
    ("map-twice", |f| f.map_twice()),
    ("stage2-table-write", |f| f.table_write()),
    ("regs-write-qemu", |f| f.regs_write_qemu()),
];

/// More of them, with `job=attack`.
const MORE_CHECKS: [(&str, Check); 11] = [
    ("regs-at-exits", |f| f.regs_at_exits()),
    ("dma-read", |f| f.dma_read()),
    ("dma-write", |f| f.dma_write()),
    ("dma-table", |f| f.dma_table()),
    ("fw-cfg-dma", |f| f.fw_cfg_dma()),
    ("virtio-mmio", |f| f.virtio_mmio()),
    ("lpi-tables", |f| f.lpi_tables()),
    ("flash", |f| f.flash()),
    ("second-uart", |f| f.second_uart()),
    ("gic-groups", |f| f.gic_groups()),
    ("smmu-registers", |f| f.smmu_registers()),
];

/// The last one: it takes a CPU away for a while.
const CPU_CHECK: (&str, Check) = ("cpu-on", |f| f.cpu_on());

/// With `job=attack`: those of `havmsi-vmm` against guests of its own.
const VMM_ATTACKS: [&str; 16] = [
    "own-mapping-read",
    "own-mapping-write",
    "slot-alias",
    "slot-of-two-vms",
    "inject-abort",
    "slot-delete",
    "slot-replace",
    "image-change",
    "late-fill",
    "take-back",
    "replay",
    "vcpu-entry",
    "guest-debug",
    "reset-read",
    "time-back",
    "forged-sgi",
];

/// What is left after an attack, with `job=attack`.
struct After {
    /// No guest has noticed anything, and none has ended.
    victim: bool,
    /// Another VM starts and works.
    new_vm: bool,
}

/// Prints a check's result; whether it is one.
fn report(id: &str, start: Instant, outcome: Outcome, after: Option<After>) -> bool {
    let (result, evidence) = match outcome {
        Ok(Exposed(text)) => ("exposed", text),
        Ok(Protected(text)) => ("protected", text),
        Ok(Skipped(text)) => ("skipped", text),
        Err(text) => ("error", text),
    };
    let mut event = Object::event("check")
        .text("id", id)
        .text("result", result)
        .text("evidence", &evidence)
        .value("ms", start.elapsed().as_millis());
    if let Some(after) = after {
        event = event.value("victim_ok", after.victim).value("new_vm_ok", after.new_vm);
    }
    out::event(event);
    result != "error"
}

/// Runs the checks that are asked for; the ids of those that failed to run.
pub fn run(params: &Params, attacker: &Attacker, guests: &[Guest]) -> Result<Vec<String>, String> {
    let mut field = Field::new(params, attacker, guests)?;
    let all = params.job == "attack";
    let own = || CHECKS.iter().chain(&MORE_CHECKS).chain([&CPU_CHECK]);
    let ids = own().map(|c| c.0).take(if all { usize::MAX } else { CHECKS.len() });
    let ids = ids.chain(VMM_ATTACKS.into_iter().filter(|_| all));
    let wanted: Vec<_> = ids.filter(|id| params.wants(id)).collect();
    let mut failed = Vec::new();
    for (i, id) in wanted.iter().enumerate() {
        out::progress("checks", i, wanted.len(), id);
        let start = Instant::now();
        let changes = field.all_changes();
        let outcome = match own().find(|c| c.0 == *id) {
            Some((_, check)) => check(&mut field),
            None => own_vmm(id),
        };
        let after = all.then(|| After {
            victim: field.all_changes() == changes && guests.iter().all(|g| !g.with(|s| s.ended)),
            new_vm: another_vm(),
        });
        if !report(id, start, outcome, after) {
            failed.push((*id).to_owned());
        }
    }
    out::progress("checks", wanted.len(), wanted.len(), "done");
    Ok(failed)
}

/// After the guests ended: their streams in memory that is free now.
pub fn dead_scan(params: &Params, attacker: &Attacker, seeds: &[Seed]) -> bool {
    const ID: &str = "dead-vm-scan";
    if !params.wants(ID) {
        return true;
    }
    let start = Instant::now();
    let outcome = attacker.scan(seeds, Via::Linear).map_err(|e| format!("scan: {e}"));
    let after = (params.job == "attack").then(|| After { victim: true, new_vm: another_vm() });
    report(ID, start, outcome.map(|scan| judge(&scan, seeds.len())), after)
}

/// Whether a VM can be started and works.
fn another_vm() -> bool {
    let vmm = Command::new("/havmsi/vmm").arg("alive").stdin(Stdio::null()).status();
    vmm.is_ok_and(|status| status.success())
}

fn judge(scan: &Scan, guests: usize) -> Found {
    let each: Vec<String> =
        scan.hits.iter().take(guests).map(|h| (h.whole + h.partial).to_string()).collect();
    let first: Vec<String> =
        scan.hits.iter().filter(|h| h.whole > 0).map(|h| format!("{:#x}", h.pfn[0])).collect();
    let text = format!(
        "{} pages looked at ({} could not be read): {} pages of the guests' streams{}{}",
        scan.pages,
        scan.faults,
        each.join(" + "),
        if first.is_empty() { "" } else { ", first at PFN " },
        first.join(", ")
    );
    if scan.hits.iter().any(|h| h.whole + h.partial > 0) { Exposed(text) } else { Protected(text) }
}

fn to_words(page: &[u8]) -> Vec<u64> {
    page.chunks_exact(8).filter_map(|w| w.try_into().ok().map(u64::from_le_bytes)).collect()
}

/// Says whether what was read is the guest's page.
fn is_page(seed: Seed, number: usize, page: &[u8]) -> (bool, String) {
    let words = to_words(page);
    match seed.identify(&words) {
        Some((found, right)) => {
            (true, format!("the guest's page {found} (wanted {number}), {right} of 512 words"))
        }
        None if words.iter().all(|w| *w == 0) => (false, "zeros".to_owned()),
        None => (false, format!("strange data, first word {:#x}", words[0])),
    }
}

/// The outcome of one or more ways to read.
fn reads(results: Vec<(&str, (bool, String))>) -> Outcome {
    let exposed = results.iter().any(|(_, (leak, _))| *leak);
    let texts: Vec<String> =
        results.iter().map(|(how, (_, text))| format!("{how}: {text}")).collect();
    let text = texts.join("; ");
    Ok(if exposed { Exposed(text) } else { Protected(text) })
}

fn error_text(e: &std::io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::EFAULT) => "refused (EFAULT)".to_owned(),
        Some(libc::EIO) => "refused (EIO)".to_owned(),
        _ => format!("refused ({e})"),
    }
}

impl<'a> Field<'a> {
    fn new(
        params: &'a Params,
        attacker: &'a Attacker,
        guests: &'a [Guest],
    ) -> Result<Self, String> {
        let mut field = Self {
            params,
            attacker,
            guests,
            vms: Vec::new(),
            vcpus: Vec::new(),
            ram: Vec::new(),
            handles: Vec::new(),
            pool: Vec::new(),
            faults: Vec::new(),
        };
        for guest in guests {
            let vm = guest.descriptors("kvm-vm").into_iter().next();
            let vm = vm.ok_or_else(|| format!("guest {}: QEMU has no VM open", guest.index))?;
            let slots = attacker.vm(vm.as_fd()).map_err(|e| format!("module, VM: {e}"))?;
            let slot = slots.slot.iter().find(|s| s.ipa == RAM).map(|s| s.va);
            let ram = slot.or_else(|| guest.ram(params.gmem));
            field.ram.push(ram.ok_or_else(|| format!("guest {}: RAM not found", guest.index))?);
            field.vms.push(vm);
            field.handles.extend(Some(slots.handle).filter(|h| *h != 0));
            field.pool.extend(slots.pool.iter().filter(|pfn| **pfn != 0).take(2));
            field.vcpus.push(guest.descriptors("kvm-vcpu"));
        }
        if attacker.monitor() && field.handles.is_empty() {
            field.handles = field.find_handles();
        }
        Ok(field)
    }

    fn seed(&self, guest: usize) -> Result<Seed, String> {
        self.guests[guest].with(|s| s.seed).ok_or_else(|| format!("guest {guest}: no seed"))
    }

    fn seeds(&self) -> Result<Vec<Seed>, String> {
        (0..self.guests.len()).map(|g| self.seed(g)).collect()
    }

    /// The guest that the writes go against: the last one.
    fn victim(&self) -> usize {
        self.guests.len() - 1
    }

    /// A published page of a guest: its guest-physical address.
    fn ipa(&self, guest: usize, page: usize) -> Result<u64, String> {
        let ipa = self.guests[guest].with(|s| s.targets.get(page).copied()).unwrap_or(0);
        if ipa < RAM {
            return Err(format!("guest {guest} did not say where its page {page} lies"));
        }
        Ok(ipa)
    }

    /// Its address in QEMU.
    fn va(&self, guest: usize, page: usize) -> Result<u64, String> {
        Ok(self.ram[guest] + (self.ipa(guest, page)? - RAM))
    }

    /// Its physical address.
    fn pa(&self, guest: usize, page: usize) -> Result<u64, String> {
        let va = self.va(guest, page)?;
        self.attacker
            .physical(self.guests[guest].pid(), va)
            .map_err(|e| format!("guest {guest}, page {page}: no page frame behind {va:#x}: {e}"))
    }

    fn pid(&self, guest: usize) -> Result<i32, String> {
        i32::try_from(self.guests[guest].pid()).map_err(|e| e.to_string())
    }

    // ---- Reading ----

    fn scan(&mut self, via: Via) -> Outcome {
        let seeds = self.seeds()?;
        let scan = self.attacker.scan(&seeds, via).map_err(|e| format!("scan: {e}"))?;
        let known = usize::try_from(scan.faults).unwrap_or(0).min(scan.fault_pfn.len());
        self.faults = scan.fault_pfn[..known].to_vec();
        Ok(judge(&scan, seeds.len()))
    }

    fn linear_read(&self) -> Outcome {
        let (seed, pa) = (self.seed(0)?, self.pa(0, target::READ)?);
        let mut page = [0; 4096];
        let mut results = Vec::new();
        for (how, via) in [("linear map", Via::Linear), ("mapping of our own", Via::Fresh)] {
            let result = match self.attacker.read(pa, &mut page, via) {
                Ok(()) => is_page(seed, target::READ, &page),
                Err(e) => (false, error_text(&e)),
            };
            results.push((how, result));
        }
        reads(results)
    }

    fn vmm_read(&self) -> Outcome {
        let (seed, va, pid) = (self.seed(0)?, self.va(0, target::READ)?, self.pid(0)?);
        let mut page = [0; 4096];
        let first = match sys::process_read(pid, va, &mut page) {
            Ok(()) => is_page(seed, target::READ, &page),
            Err(e) => (false, error_text(&e)),
        };
        page.fill(0);
        let file = File::open(format!("/proc/{pid}/mem")).map_err(|e| e.to_string())?;
        let second = match file.read_exact_at(&mut page, va) {
            Ok(()) => is_page(seed, target::READ, &page),
            Err(e) => (false, error_text(&e)),
        };
        page.fill(0);
        let third = match sys::ptrace_read(pid, va, &mut page) {
            Ok(()) => is_page(seed, target::READ, &page),
            Err(e) => (false, error_text(&e)),
        };
        reads(vec![("process_vm_readv", first), ("/proc/PID/mem", second), ("ptrace", third)])
    }

    fn kcore_read(&self) -> Outcome {
        let Ok(file) = File::open("/proc/kcore") else {
            return Ok(Skipped("no /proc/kcore".to_owned()));
        };
        let pa = self.pa(0, target::READ)?;
        let at = kcore_offset(&file, pa).ok_or("no segment of /proc/kcore has the page")?;
        let mut page = [0; 4096];
        let result = match file.read_exact_at(&mut page, at) {
            Ok(()) => is_page(self.seed(0)?, target::READ, &page),
            Err(e) => (false, error_text(&e)),
        };
        reads(vec![("/proc/kcore", result)])
    }

    fn devmem_read(&self) -> Outcome {
        let Ok(file) = File::open("/dev/mem") else {
            return Ok(Skipped("no /dev/mem".to_owned()));
        };
        let mut page = [0; 4096];
        let result = match file.read_exact_at(&mut page, self.pa(0, target::READ)?) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                return Ok(Skipped("the kernel keeps /dev/mem off RAM".to_owned()));
            }
            Ok(()) => is_page(self.seed(0)?, target::READ, &page),
            Err(e) => (false, error_text(&e)),
        };
        reads(vec![("/dev/mem", result)])
    }

    // ---- Writing ----

    /// Changes that all guests have noticed so far.
    fn all_changes(&self) -> usize {
        (0..self.guests.len()).map(|g| self.changes(g)).sum()
    }

    fn changes(&self, guest: usize) -> usize {
        self.guests[guest].with(|s| s.corrupt.len())
    }

    /// Waits for a guest to notice a change like that, among the reports after the first `seen`.
    fn noticed(
        &self,
        guest: usize,
        seen: usize,
        limit: Duration,
        is: impl Fn(&Corrupt) -> bool,
    ) -> Option<Corrupt> {
        let find = |s: &crate::guest::State| s.corrupt.iter().skip(seen).find(|c| is(c)).cloned();
        self.guests[guest].wait(limit, |s| find(s).is_some() || s.verdict.is_some());
        self.guests[guest].with(find)
    }

    /// Changes a word of a page in one or several ways, and listens to the guest.
    fn writes(&self, ways: &[Way]) -> Outcome {
        let guest = self.victim();
        let mut texts = Vec::new();
        let mut exposed = false;
        for (how, page, write) in ways {
            let seen = self.changes(guest);
            // The last word of the page: the first two tell the guest which page it is.
            let value = 0x6861_636b_6564_2121_u64;
            let result = write(4088, value);
            let limit = if result.is_ok() { NOTICE } else { REFUSED };
            let is = |c: &Corrupt| c.what == "page" && c.page == *page as u64;
            let change = self.noticed(guest, seen, limit, is);
            let text = match (&result, &change) {
                (_, Some(_)) => format!("guest {guest} finds its page {page} changed"),
                (Ok(()), None) => "accepted, but the guest sees no change".to_owned(),
                (Err(e), None) => error_text(e),
            };
            exposed |= change.is_some();
            texts.push(format!("{how}: {text}"));
            if result.is_ok() {
                let seed = self.seed(guest)?;
                let right = seed.words(*page as u64).last().unwrap_or(0);
                // The page is put right so that later checks meet a quiet guest.
                let _ = write(4088, right);
            }
        }
        let text = texts.join("; ");
        Ok(if exposed { Exposed(text) } else { Protected(text) })
    }

    fn physical_write(&self, page: usize, via: Via) -> Outcome {
        let pa = self.pa(self.victim(), page)?;
        let how = if via == Via::Linear { "linear map" } else { "mapping of our own" };
        let write = |at: u64, value: u64| self.attacker.write(pa + at, &value.to_le_bytes(), via);
        self.writes(&[(how, page, &write)])
    }

    fn vmm_write(&self) -> Outcome {
        let victim = self.victim();
        let pid = self.pid(victim)?;
        let (first, second) =
            (self.va(victim, target::VMM_WRITE)?, self.va(victim, target::MEM_WRITE)?);
        let file = File::options()
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|e| format!("/proc/{pid}/mem: {e}"))?;
        let by_call =
            |at: u64, value: u64| sys::process_write(pid, first + at, &value.to_le_bytes());
        let by_file = |at: u64, value: u64| file.write_all_at(&value.to_le_bytes(), second + at);
        self.writes(&[
            ("process_vm_writev", target::VMM_WRITE, &by_call),
            ("/proc/PID/mem", target::MEM_WRITE, &by_file),
        ])
    }

    // ---- Stage 2 ----

    /// The handles of all VMs of the monitor, found by trying: activating a VM that runs changes
    /// nothing, and the answer tells whether the handle is one.
    fn find_handles(&self) -> Vec<u64> {
        const GENERATIONS: u64 = 64;
        let slots = 1..=MAX_VMS as u64;
        slots
            .flat_map(|slot| (0..GENERATIONS).map(move |g| g << 16 | slot))
            .filter(|handle| {
                let id = Function::VmActivate.id().into();
                let answer = self.attacker.smc(&[id, *handle]);
                answer.is_ok_and(|x| x[0].cast_signed() != Error::Invalid.code())
            })
            .collect()
    }

    /// Points one guest's address at another page, in KVM's own table, and listens to the guest.
    fn remap(&self, guest: usize, page: usize, pa: u64) -> Result<Option<Corrupt>, String> {
        const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
        let (vm, ipa) = (self.vms[guest].as_fd(), self.ipa(guest, page)?);
        let old = self.attacker.descriptor(vm, ipa).map_err(|e| format!("no descriptor: {e}"))?;
        if old.level != 3 {
            return Err("the page lies in a block (havmsi.thp=never avoids that)".to_owned());
        }
        let seen = self.changes(guest);
        let new = old.desc & !ADDRESS | pa;
        self.attacker.set_descriptor(vm, ipa, new).map_err(|e| error_text(&e))?;
        let is = |c: &Corrupt| c.what == "page" && c.page == page as u64;
        let change = self.noticed(guest, seen, NOTICE, is);
        self.attacker.set_descriptor(vm, ipa, old.desc).map_err(|e| format!("undo: {e}"))?;
        Ok(change)
    }

    /// `PAGE_MAP`: 0, or the status with which the monitor refused. Only an answer about the page
    /// counts, not that it was busy or short of table memory.
    fn page_map(&self, vm: u64, ipa: u64, pa: u64) -> Result<i64, String> {
        let refusals = [Error::Denied, Error::Invalid].map(Error::code);
        let mut status = 0;
        for _ in 0..100 {
            let x = self.attacker.smc(&[Function::PageMap.id().into(), vm, ipa, pa, PAGE_SIZE]);
            status = x.map_err(|e| format!("SMC: {e}"))?[0].cast_signed();
            if status == 0 || refusals.contains(&status) {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(format!("PAGE_MAP keeps answering {status}: that says nothing about the page"))
    }

    /// Asks the monitor to map a page at an address of each VM: how many times it did.
    fn ask_monitor(&self, ipas: &[u64], pa: u64) -> Result<(usize, String), String> {
        let mut answers = Vec::new();
        let mut mapped = 0;
        for handle in &self.handles {
            for ipa in ipas {
                let status = self.page_map(*handle, *ipa, pa)?;
                mapped += usize::from(status == 0);
                answers.push(status.to_string());
            }
        }
        let count = self.handles.len();
        Ok((mapped, format!("PAGE_MAP into {count} VMs answered {}", answers.join(", "))))
    }

    /// An address in a guest's RAM that it hardly uses: three quarters up.
    fn quiet_ipa(&self) -> u64 {
        RAM + (self.params.gmem << 20) / 4 * 3
    }

    fn map_attack(
        &self,
        guest: usize,
        page: usize,
        pa: u64,
        is: impl Fn(&Corrupt) -> bool,
    ) -> Outcome {
        let mut texts = Vec::new();
        let mut exposed = false;
        match self.remap(guest, page, pa) {
            Ok(Some(change)) => {
                exposed |= is(&change);
                let whose = if is(&change) { "that page" } else { "something else" };
                texts.push(format!("table write: guest {guest} finds {whose} at its page {page}"));
            }
            Ok(None) => texts.push("table write: accepted, the guest sees no change".to_owned()),
            Err(e) => texts.push(format!("table write: {e}")),
        }
        if self.attacker.monitor() {
            if self.handles.is_empty() {
                return Err("no VM of the monitor's was found".to_owned());
            }
            let (mapped, text) =
                self.ask_monitor(&[self.ipa(guest, page)?, self.quiet_ipa()], pa)?;
            exposed |= mapped > 0;
            texts.push(text);
        }
        let text = texts.join("; ");
        Ok(if exposed { Exposed(text) } else { Protected(text) })
    }

    fn map_into_other(&self) -> Outcome {
        if self.guests.len() < 2 {
            return Ok(Skipped("needs two guests".to_owned()));
        }
        let (pa, seed) = (self.pa(0, target::OTHER_SOURCE)?, self.seed(0)?);
        let is = |c: &Corrupt| c.words[0] == seed.tag();
        self.map_attack(self.victim(), target::OTHER_PLACE, pa, is)
    }

    fn map_twice(&self) -> Outcome {
        let guest = self.victim();
        let (pa, seed) = (self.pa(guest, target::TWICE_SOURCE)?, self.seed(guest)?);
        let words: Vec<u64> = seed.words(target::TWICE_SOURCE as u64).take(2).collect();
        let is = |c: &Corrupt| c.words[..] == words[..];
        self.map_attack(guest, target::TWICE_PLACE, pa, is)
    }

    /// Pages that a monitor may keep tables in: what KVM gave it for that, what the host may not
    /// read, and the part of RAM below the host's.
    fn table_pages(&self) -> Vec<u64> {
        let known = self.pool.iter().chain(self.faults.iter().take(4));
        let mut pages: Vec<u64> = known.map(|pfn| pfn * PAGE_SIZE).collect();
        let map = std::fs::read_to_string("/proc/iomem").unwrap_or_default();
        let first = map.lines().find_map(|line| {
            let (range, name) = line.split_once(" : ")?;
            let start = range.split_once('-')?.0;
            (name == "System RAM").then(|| u64::from_str_radix(start, 16).ok())?
        });
        if first.is_some_and(|start| start > RAM) {
            let places = [
                carveout::EL2_VECTORS,
                carveout::ZERO_FRAME,
                carveout::HOST_ROOT,
                carveout::LEVEL2_TABLES,
                carveout::VM_ROOTS,
                carveout::LEVEL3_TABLES,
            ];
            pages.extend(places.map(|offset| RAM + offset));
        }
        pages
    }

    fn table_write(&self) -> Outcome {
        let guest = self.victim();
        let mut texts = Vec::new();
        let mut exposed = false;
        // A page of our own in place of the guest's.
        let marker = 0x6f75_7220_7061_6765_u64;
        let page = vec![marker; 1024];
        let start = page.as_ptr().expose_provenance() as u64;
        let own = self
            .attacker
            .physical(std::process::id(), start.next_multiple_of(PAGE_SIZE))
            .map_err(|e| format!("own page: {e}"))?;
        match self.remap(guest, target::TABLE, own) {
            Ok(Some(change)) if change.words[0] == marker => {
                exposed = true;
                texts.push(format!("KVM's table: guest {guest} reads a page of the attacker's"));
            }
            Ok(_) => texts.push("KVM's table: written, without effect".to_owned()),
            Err(e) => texts.push(format!("KVM's table: {e}")),
        }
        drop(page);
        let pages = self.table_pages();
        let mut written = Vec::new();
        for pa in &pages {
            let mut word = [0; 8];
            // What can't be read is written with zeros.
            let _ = self.attacker.read(*pa, &mut word, Via::Linear);
            for via in [Via::Linear, Via::Fresh] {
                if self.attacker.write(*pa, &word, via).is_ok() {
                    written.push(format!("{pa:#x}"));
                }
            }
        }
        if !pages.is_empty() {
            exposed |= !written.is_empty();
            texts.push(format!(
                "monitor's pages: {} tried, {} written {}",
                pages.len(),
                written.len(),
                written.join(" ")
            ));
        } else if self.attacker.monitor() {
            return Err("no page of the monitor's was found to write to".to_owned());
        }
        let text = texts.join("; ");
        Ok(if exposed { Exposed(text) } else { Protected(text) })
    }

    // ---- Registers ----

    /// The general registers that the guest's workload keeps known values in.
    fn general(seed: Seed) -> Vec<(usize, u64)> {
        (2..18).chain(20..29).zip(0..).map(|(register, i)| (register, seed.reg(i))).collect()
    }

    fn regs_read_qemu(&self) -> Outcome {
        let seed = self.seed(0)?;
        let (mut best, mut best_fp, mut by_call, mut looks) = (0, 0, 0, 0);
        for _ in 0..25 {
            std::thread::sleep(Duration::from_millis(23));
            self.guests[0].while_stopped(|| -> Result<(), String> {
                for vcpu in &self.vcpus[0] {
                    looks += 1;
                    let regs = self.attacker.regs(vcpu.as_fd(), &[]).map_err(|e| e.to_string())?;
                    let known = Self::general(seed);
                    best = best.max(known.iter().filter(|(r, v)| regs.x[*r] == *v).count());
                    let fp = regs.v.iter().zip(0..).filter(|(v, i)| **v == seed.fp(*i)).count();
                    best_fp = best_fp.max(fp);
                    let hits = known.iter().take(4).filter(|(r, v)| {
                        self.attacker.get_reg(vcpu.as_fd(), *r as u64).is_ok_and(|x| x == *v)
                    });
                    by_call = by_call.max(hits.count());
                }
                Ok(())
            })?;
            if best >= 20 && best_fp >= 60 && by_call >= 4 {
                break;
            }
        }
        let text = format!(
            "{looks} looks at stopped vCPUs: at best {best} of 25 general and {best_fp} of 64 FP words in \
             KVM's structure, {by_call} of 4 by KVM_GET_ONE_REG, are what the guest holds"
        );
        Ok(if best + best_fp + by_call > 0 { Exposed(text) } else { Protected(text) })
    }

    fn regs_write_qemu(&self) -> Outcome {
        let guest = self.victim();
        let known = Self::general(self.seed(guest)?);
        let seen = self.changes(guest);
        let (register, right) = known[16];
        let wrong = !right;
        let (mut hit, mut accepted) = (false, 0);
        for look in 0..AIMED_LOOKS + BLIND_LOOKS {
            // Out of step with the guest, which spins and rests in turn.
            std::thread::sleep(Duration::from_millis(11 + look * 7 % 23));
            self.guests[guest].while_stopped(|| -> Result<(), String> {
                for vcpu in &self.vcpus[guest] {
                    let regs = self.attacker.regs(vcpu.as_fd(), &[]).map_err(|e| e.to_string())?;
                    let aimed = known.iter().all(|(r, v)| regs.x[*r] == *v);
                    // Without sight of the registers it is tried blindly, towards the end.
                    if hit || !(aimed || look >= AIMED_LOOKS) {
                        continue;
                    }
                    hit = aimed;
                    let write = [(register, wrong)];
                    self.attacker.regs(vcpu.as_fd(), &write).map_err(|e| e.to_string())?;
                    let by_call = self.attacker.set_reg(vcpu.as_fd(), register as u64, wrong);
                    accepted += usize::from(by_call.is_ok());
                }
                Ok(())
            })?;
            if hit {
                break;
            }
        }
        let limit = if hit { NOTICE } else { Duration::from_secs(2) };
        let is = |c: &Corrupt| c.what == "reg";
        let change = self.noticed(guest, seen, limit, is);
        let aimed = if hit { "with the guest's values in sight" } else { "blindly" };
        let text = format!(
            "x{register} set {aimed} in KVM's structure and by KVM_SET_ONE_REG ({accepted} accepted): guest {guest} {}",
            if change.is_some() { "runs on with it" } else { "keeps its own" }
        );
        Ok(if change.is_some() { Exposed(text) } else { Protected(text) })
    }

    /// Looks at every exit of every guest, right behind the switch.
    fn regs_at_exits(&self) -> Outcome {
        let seed = self.seed(0)?;
        let fp = std::array::from_fn(|i| seed.fp(i as u64));
        let wait = || std::thread::sleep(Duration::from_secs(2));
        let seen = self.attacker.watch(&Self::general(seed), &fp, wait);
        let w = seen.map_err(|e| format!("kprobe: {e}"))?;
        if w.exits == 0 {
            return Err("no guest has left in two seconds".to_owned());
        }
        let text = format!(
            "exits of {} classes: at best {} of {} general and {} of 64 FP words in KVM's structure, {} of 64 in the \
             CPU's FP registers, are what guest 0 holds",
            w.classes.count_ones(),
            w.best_general,
            Self::general(seed).len(),
            w.best_fp,
            w.best_live
        );
        let found = w.best_general + w.best_fp + w.best_live;
        Ok(if found > 0 { Exposed(text) } else { Protected(text) })
    }

    // ---- Devices ----

    /// The edu device reaches memory of the host's: else what it doesn't reach proves nothing.
    fn dma_works(&self) -> Result<(), String> {
        let own = OwnPage::new(self.attacker)?;
        let reaches = |value: u64| -> Result<bool, String> {
            self.attacker.dma_write(own.pa, value).map_err(|e| format!("edu device: {e}"))?;
            Ok(own.word(0) == value)
        };
        if reaches(0x6f77_6e20_7061_6765)? {
            return Ok(());
        }
        // Linux lets no device through that has no driver: the kernel may turn its SMMU off
        // (IHI 0070, 6.3.9: SMMU_CR0; 6.3.14: SMMU_GBPA).
        let off = self.attacker.io_write(SMMU + 0x20, 4, 0);
        off.and_then(|()| self.attacker.io_write(SMMU + 0x44, 4, 1 << 31))
            .map_err(|e| format!("SMMU off: {e}"))?;
        if reaches(0x6f77_6e20_7061_6766)? {
            Ok(())
        } else {
            Err("the edu device does not reach the host's own memory".to_owned())
        }
    }

    fn dma_read(&self) -> Outcome {
        const HELD: [u64; 8] = [0x6865_6c64; 8];
        self.dma_works()?;
        let words: Vec<u64> = self.seed(0)?.words(target::READ as u64).take(8).collect();
        let pa = self.pa(0, target::READ)?;
        let read = self.attacker.dma_read(pa, HELD).map_err(|e| format!("edu device: {e}"))?;
        let text = format!(
            "the device reaches the host's memory; of the guest's page it {}",
            if read[..] == words[..] {
                "reads the content"
            } else if read == HELD || read == [0; 8] {
                "reads nothing"
            } else {
                "reads something else"
            }
        );
        Ok(if read == HELD || read == [0; 8] { Protected(text) } else { Exposed(text) })
    }

    fn dma_write(&self) -> Outcome {
        self.dma_works()?;
        let pa = self.pa(self.victim(), target::DMA_WRITE)?;
        let write = |at: u64, value: u64| self.attacker.dma_write(pa + at, value);
        self.writes(&[("edu device", target::DMA_WRITE, &write)])
    }

    /// A device writes where tables lie.
    fn dma_table(&self) -> Outcome {
        const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
        self.dma_works()?;
        let guest = self.victim();
        let mut texts = Vec::new();
        let mut exposed = false;
        let (vm, ipa) = (self.vms[guest].as_fd(), self.ipa(guest, target::DMA_TABLE)?);
        if let Ok(old) = self.attacker.descriptor(vm, ipa) {
            let own = OwnPage::new(self.attacker)?;
            let seen = self.changes(guest);
            let dma = |desc| self.attacker.dma_write(old.desc_pa, desc).map_err(|e| error_text(&e));
            dma(old.desc & !ADDRESS | own.pa)?;
            // Writes what it finds: nothing changes but that TLBs forget.
            let flush = || {
                let now = self.attacker.descriptor(vm, ipa).map_err(|e| error_text(&e))?;
                self.attacker.set_descriptor(vm, ipa, now.desc).map_err(|e| error_text(&e))
            };
            flush()?;
            let is = |c: &Corrupt| c.what == "page" && c.page == target::DMA_TABLE as u64;
            exposed |= self.noticed(guest, seen, NOTICE, is).is_some();
            dma(old.desc)?;
            flush()?;
            let sees = if exposed { "reads a page of the attacker's" } else { "sees no change" };
            texts.push(format!("a descriptor of KVM's: guest {guest} {sees}"));
        }
        let pages = self.table_pages();
        let held = [0x6865_6c64; 8];
        let mut read = 0;
        for pa in &pages {
            let found = self.attacker.dma_read(*pa, held).map_err(|e| error_text(&e))?;
            read += usize::from(found != held && found != [0; 8]);
            self.attacker.dma_write(*pa + 4088, 0).map_err(|e| error_text(&e))?;
        }
        if !pages.is_empty() {
            exposed |= read > 0;
            texts.push(format!("monitor's pages: {} tried, {read} read", pages.len()));
        }
        let text = texts.join("; ");
        Ok(if exposed { Exposed(text) } else { Protected(text) })
    }

    /// Has QEMU's configuration device copy four bytes over a guest's page.
    fn fw_cfg_dma(&self) -> Outcome {
        const DMA_REGISTER: u64 = 0x0902_0010;
        const SELECT_AND_READ: u64 = 0xa;
        let pa = self.pa(self.victim(), target::FW_CFG)?;
        let own = OwnPage::new(self.attacker)?;
        let write = |at: u64, _: u64| {
            // Item 0, length, address; all big-endian.
            own.set_word(0, (SELECT_AND_READ << 32 | 4).to_be());
            own.set_word(1, (pa + at).to_be());
            self.attacker.io_write(DMA_REGISTER, 8, own.pa.to_be())
        };
        self.writes(&[("fw_cfg", target::FW_CFG, &write)])
    }

    /// Tries a way to change a device; `Ok(true)` if the change is there.
    fn device(what: &str, result: std::io::Result<bool>) -> Outcome {
        Ok(match result {
            Ok(true) => Exposed(format!("{what}: changed")),
            Ok(false) => Protected(format!("{what}: written, without effect")),
            Err(e) => Protected(format!("{what}: {}", error_text(&e))),
        })
    }

    /// Finds a transport of virtio's, whose queues lie wherever its registers say.
    fn virtio_mmio(&self) -> Outcome {
        // "virt", the magic number (virtio 1.2, 4.2.2).
        const MAGIC: u64 = 0x7472_6976;
        Ok(match self.attacker.io_read(0x0a00_0000, 4) {
            Ok(MAGIC) => Exposed("the first virtio-mmio transport answers".to_owned()),
            Ok(other) => Protected(format!("no virtio-mmio transport but {other:#x}")),
            Err(e) => Protected(format!("virtio-mmio: {}", error_text(&e))),
        })
    }

    /// Makes a guest's page the table of pending LPIs, in which a redistributor clears bits.
    fn lpi_tables(&self) -> Outcome {
        // GICR_PENDBASER of the first CPU (IHI 0069, 12.11); address in bits 51:16.
        const PENDBASER: u64 = 0x080a_0078;
        const ADDRESS: u64 = 0x000f_ffff_ffff_0000;
        if self.params.gic != 3 {
            return Ok(Skipped("a GICv2 has no LPIs".to_owned()));
        }
        let page = self.pa(self.victim(), target::READ)? & ADDRESS;
        let point = || {
            let before = self.attacker.io_read(PENDBASER, 8)?;
            self.attacker.io_write(PENDBASER, 8, before & !ADDRESS | page)?;
            let after = self.attacker.io_read(PENDBASER, 8)?;
            self.attacker.io_write(PENDBASER, 8, before)?;
            Ok(after & ADDRESS == page)
        };
        Self::device("GICR_PENDBASER", point())
    }

    /// Programs a word of the flash: on the protected machine, the one with the monitor's image.
    fn flash(&self) -> Outcome {
        const WORD: u64 = 0x03ff_fff0;
        const PROGRAM: u64 = 0x0040_0040;
        const READ_ARRAY: u64 = 0x00ff_00ff;
        const VALUE: u64 = 0x6861_636b;
        let program = || {
            self.attacker.io_write(WORD, 4, PROGRAM)?;
            self.attacker.io_write(WORD, 4, VALUE)?;
            self.attacker.io_write(WORD, 4, READ_ARRAY)?;
            Ok(self.attacker.io_read(WORD, 4)? == VALUE)
        };
        Self::device("a word of the first flash", program())
    }

    /// The second UART, where the secure console is.
    fn second_uart(&self) -> Outcome {
        const UART: u64 = 0x0904_0000;
        const ID: u64 = UART + 0xfe0;
        let speak = || {
            let pl011 = self.attacker.io_read(ID, 4)? & 0xff == 0x11;
            self.attacker.io_write(UART, 4, b'!'.into())?;
            Ok(pl011)
        };
        Self::device("the second UART", speak())
    }

    /// Turns an interrupt over to the secure side.
    fn gic_groups(&self) -> Outcome {
        // GICD_IGROUPR3, interrupt 127, which nothing on the machine uses.
        const GROUPS: u64 = 0x0800_008c;
        let turn = || {
            let before = self.attacker.io_read(GROUPS, 4)?;
            self.attacker.io_write(GROUPS, 4, before ^ 1 << 31)?;
            let after = self.attacker.io_read(GROUPS, 4)?;
            self.attacker.io_write(GROUPS, 4, before)?;
            Ok(after == before ^ 1 << 31)
        };
        Self::device("the group of an interrupt", turn())
    }

    fn smmu_registers(&self) -> Outcome {
        // SMMU_GBPA: what becomes of traffic while the SMMU is off (IHI 0070, 6.3.14).
        const GBPA: u64 = SMMU + 0x44;
        const UPDATE: u64 = 1 << 31;
        let change = || {
            let before = self.attacker.io_read(GBPA, 4)?;
            self.attacker.io_write(GBPA, 4, before ^ 1 | UPDATE)?;
            let after = self.attacker.io_read(GBPA, 4)?;
            self.attacker.io_write(GBPA, 4, before | UPDATE)?;
            Ok(after == before ^ 1)
        };
        Self::device("SMMU_GBPA", change())
    }

    // ---- CPUs ----

    /// Takes a CPU from Linux and turns it on with code of the attacker's.
    fn cpu_on(&self) -> Outcome {
        let cpu = crate::jobs::cpus() - 1;
        let guest = self.victim();
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let words: Vec<u64> = self.seed(guest)?.words(target::CPU as u64).take(8).collect();
        let pa = self.pa(guest, target::CPU)?;
        let seen = self.changes(guest);
        std::fs::write(&path, "0").map_err(|e| format!("CPU {cpu} off: {e}"))?;
        let result = self.attacker.cpu_on(cpu as u64, pa, 0x6861_636b_6564_2121);
        std::fs::write(&path, "1").map_err(|e| format!("CPU {cpu} on again: {e}"))?;
        let found = result.map_err(|e| format!("the CPU does not end: {e}"))?;
        let is = |c: &Corrupt| c.what == "page" && c.page == target::CPU as u64;
        let limit = if found.state == 2 { NOTICE } else { REFUSED };
        let changed = self.noticed(guest, seen, limit, is).is_some();
        let read = match found.read {
            read if read[..] == words[..] => "the guest's words",
            read if read == [0; 8] => "zeros",
            _ => "something else",
        };
        let text = format!(
            "CPU_ON answers {}; the CPU comes up at EL{}, reads {read}, and its write {}",
            found.status.cast_signed(),
            found.el,
            match found.state {
                2 if changed => "changes the guest's page",
                2 => "has no effect",
                3 => "ends in an abort",
                _ => "never comes",
            }
        );
        let leak = changed || read != "zeros";
        Ok(if leak { Exposed(text) } else { Protected(text) })
    }
}

/// Lets `havmsi-vmm` do a check, and takes its word.
pub fn own_vmm(id: &str) -> Outcome {
    let mut child = Command::new("/havmsi/vmm")
        .arg(id)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("/havmsi/vmm: {e}"))?;
    let pid = i32::try_from(child.id()).unwrap_or(0);
    let (alive, ended) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(60))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            // It hangs; its end closes the pipe that is read below.
            let _ = sys::kill(pid, libc::SIGKILL);
        }
    });
    let mut outcome = Err("havmsi-vmm ended without a result".to_owned());
    let lines = child.stdout.take().map(|s| BufReader::new(s).lines());
    for line in lines.into_iter().flatten().map_while(Result::ok) {
        out::line(&line);
        let Some(object) = line.strip_prefix(VMM_PREFIX) else { continue };
        let text = field(object, "evidence").unwrap_or_default().to_owned();
        match field(object, "result") {
            Some("exposed") => outcome = Ok(Exposed(text)),
            Some("protected") => outcome = Ok(Protected(text)),
            Some(_) => outcome = Err(text),
            None => {}
        }
    }
    // The guard may be gone already; then the wait below is short.
    drop(alive);
    let _ = guard.join();
    let _ = child.wait();
    outcome
}

/// A page of the attacker's own.
struct OwnPage {
    words: Box<[AtomicU64]>,
    first: usize,
    /// Where it lies.
    pa: u64,
}

impl OwnPage {
    fn new(attacker: &Attacker) -> Result<Self, String> {
        let words: Box<[AtomicU64]> = (1..=1024).map(AtomicU64::new).collect();
        let start = words.as_ptr().expose_provenance() as u64;
        let page = start.next_multiple_of(PAGE_SIZE);
        let first = usize::try_from((page - start) / 8).map_err(|e| e.to_string())?;
        let pa =
            attacker.physical(std::process::id(), page).map_err(|e| format!("own page: {e}"))?;
        Ok(Self { words, first, pa })
    }

    fn word(&self, i: usize) -> u64 {
        self.words[self.first + i].load(Ordering::Relaxed)
    }

    fn set_word(&self, i: usize, value: u64) {
        self.words[self.first + i].store(value, Ordering::SeqCst);
    }
}

/// A way to write: its name, the page that it goes against, and the write (offset, value).
type Way<'a> = (&'a str, usize, &'a dyn Fn(u64, u64) -> std::io::Result<()>);

/// Where /proc/kcore has a physical address.
fn kcore_offset(file: &File, pa: u64) -> Option<u64> {
    let mut head = [0; 64];
    file.read_exact_at(&mut head, 0).ok()?;
    let word = |b: &[u8], at: usize| -> Option<u64> {
        Some(u64::from_le_bytes(b.get(at..at + 8)?.try_into().ok()?))
    };
    let table = word(&head, 32)?;
    let count = u16::from_le_bytes([head[56], head[57]]);
    (0..u64::from(count)).find_map(|i| {
        let mut entry = [0; 56];
        file.read_exact_at(&mut entry, table + 56 * i).ok()?;
        let (offset, start, size) = (word(&entry, 8)?, word(&entry, 24)?, word(&entry, 32)?);
        let load = entry.first_chunk::<4>() == Some(&[1, 0, 0, 0]);
        (load && start <= pa && pa < start.saturating_add(size) && start != u64::MAX)
            .then(|| offset + (pa - start))
    })
}
