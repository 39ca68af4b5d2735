// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the CPUs share: pages by what may be done with them, VMs, counters.
//!
//! A batch uses 8 MiB of RAM; the next one uses others, so that the host's
//! blocks are split anew. In it lie, in pages:
//! - of each CPU 64 *private* ones, which only that CPU names in calls that may
//!   be accepted: so it knows what becomes of them;
//! - 64 *common* ones in four rows, which any CPU gives to anyone. Three rows
//!   lie across the border of two blocks. Behind each row is a *fence*, a page of
//!   a victim's memory, so that no call may go beyond it;
//! - 32 *run* pages that any CPU lends, gives away and writes to.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{Error, Function, PAGE_SIZE, UID_CALL};

use super::index;
use super::random::Random;
use crate::cpu::MAX_CPUS;
use crate::memory::{ARENA, ARENA_END};
use crate::smc::psci;

const REGION: u64 = 8 << 20;
const BLOCK: u64 = 512;
static BASE: AtomicU64 = AtomicU64::new(ARENA);

/// Private pages of a CPU.
pub const PRIVATE: u64 = 64;
/// Common pages.
pub const COMMON: u64 = ROW * ROWS;
/// Common pages in a row.
pub const ROW: u64 = 16;
/// Rows, and fences.
pub const ROWS: u64 = 4;
/// Run pages.
pub const RUN: u64 = 32;
/// The private page of which other CPUs write the last word all the time.
pub const HAMMERED: u64 = PRIVATE - 1;
/// Offset of the last word of a page.
pub const LAST_WORD: u64 = PAGE_SIZE - 8;

/// What guests write, in the upper half; nobody else writes it.
pub const MAGIC: u64 = 0x5ec7_e7a5;

/// Takes the pages of a batch.
pub fn use_region(batch: u64) {
    let regions = (ARENA_END - ARENA) / REGION;
    BASE.store(ARENA + batch % regions * REGION, Ordering::SeqCst);
}

fn page(n: u64) -> u64 {
    BASE.load(Ordering::Relaxed) + n * PAGE_SIZE
}

/// A private page.
pub fn private(cpu: usize, i: u64) -> u64 {
    let cpu = cpu as u64;
    page(cpu % 4 * BLOCK + 100 + cpu / 4 * PRIVATE + i)
}

const fn row(n: u64) -> u64 {
    // The last one in the middle of a block.
    if n == ROWS - 1 { 3 * BLOCK + 300 } else { (n + 1) * BLOCK - ROW / 2 }
}

/// A common page.
pub fn common(i: u64) -> u64 {
    page(row(i / ROW) + i % ROW)
}

/// A common page at random: one in three is of the few that all CPUs want most.
pub fn any_common(random: &mut Random) -> u64 {
    let wanted = random.below(ROWS) * ROW + ROW / 2;
    let any = random.below(COMMON);
    common(if random.once_in(3) { wanted } else { any })
}

/// The page behind a row.
pub fn fence(n: u64) -> u64 {
    page(row(n) + ROW)
}

/// A page for the image of a shared VM, which its CPU gives to it.
pub fn image(cpu: usize, which: u64, offset: u64) -> u64 {
    page(340 + cpu as u64 * 4 + which * 2) + offset
}

/// A run page.
pub fn run_page(i: u64) -> u64 {
    page(300 + i)
}

/// The handle of a VM that others know.
pub struct Known {
    /// The handle, 0 for none.
    handle: AtomicU64,
    /// Those that it had before.
    old: AtomicU64,
}

impl Known {
    const fn new() -> Self {
        Self { handle: AtomicU64::new(0), old: AtomicU64::new(0) }
    }

    /// The handle; 0 if there is none.
    pub fn handle(&self) -> u64 {
        self.handle.load(Ordering::Relaxed)
    }

    /// A handle that once was this VM's; 0 if there is none.
    pub fn old(&self) -> u64 {
        self.old.load(Ordering::Relaxed)
    }

    /// A VM was made.
    pub fn set(&self, handle: u64) {
        self.handle.store(handle, Ordering::Relaxed);
    }

    /// The VM with this handle is gone.
    pub fn clear(&self, handle: u64) {
        let gone = self.handle.compare_exchange(handle, 0, Ordering::Relaxed, Ordering::Relaxed);
        if gone.is_ok() {
            self.old.store(handle, Ordering::Relaxed);
        }
    }
}

/// VMs of each CPU that no other one may harm: the victim, then the solo VM.
pub static PROTECTED: [[Known; 2]; MAX_CPUS] = [const { [const { Known::new() }; 2] }; MAX_CPUS];
/// VMs that any CPU may do anything to: as many as that of each CPU.
pub static SHARED: [[Known; 2]; MAX_CPUS] = [const { [const { Known::new() }; 2] }; MAX_CPUS];
/// VMs that were made by a call for itself.
pub static STRAY: [Known; 16] = [const { Known::new() }; 16];

/// All VMs are gone.
pub fn forget_vms() {
    let all = PROTECTED.iter().chain(&SHARED).flatten().chain(&STRAY);
    all.for_each(|known| known.clear(known.handle()));
}

/// Kinds of calls that are counted, after the functions of the host ABI.
const OTHERS: [(&str, u64); 11] = [
    ("Uid", UID_CALL as u64),
    ("PsciVersion", psci::VERSION),
    ("PsciFeatures", psci::FEATURES),
    ("CpuSuspend", psci::CPU_SUSPEND_64),
    ("CpuOff", psci::CPU_OFF),
    ("CpuOn", psci::CPU_ON_64),
    ("AffinityInfo", psci::AFFINITY_INFO_64),
    ("MigrateInfoType", psci::MIGRATE_INFO_TYPE),
    ("SmcccVersion", psci::SMCCC_VERSION),
    ("SmcccArchFeatures", psci::SMCCC_ARCH_FEATURES),
    ("unknown", u64::MAX),
];
const HOST: usize = Function::ALL.len();
const KINDS: usize = HOST + OTHERS.len();
/// Accepted, the nine errors, and whatever else.
const ANSWERS: usize = 11;
/// Of PSCI the calls with both widths.
const SMC64: u64 = 1 << 30;

type Counts = [[AtomicU64; ANSWERS]; KINDS];
static COUNTS: [Counts; MAX_CPUS] =
    [const { [const { [const { AtomicU64::new(0) }; ANSWERS] }; KINDS] }; MAX_CPUS];
/// Loads, stores and other instructions that are no calls, by CPU.
pub static ACCESSES: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

fn kind(x0: u64) -> usize {
    let id = x0 & 0xffff_ffff;
    if let Some(function) = u32::try_from(id).ok().and_then(Function::from_id) {
        return function as usize;
    }
    let both = |known: u64| known & SMC64 != 0 && id == known & !SMC64;
    let place = OTHERS.iter().position(|(_, known)| *known == id || both(*known));
    HOST + place.unwrap_or(OTHERS.len() - 1)
}

/// Whether this is the identifier of no function.
pub fn is_unknown(x0: u64) -> bool {
    kind(x0) == KINDS - 1
}

/// Counts an answer.
pub fn count(cpu: usize, x0: u64, answer: u64) {
    let counts = &COUNTS[cpu][kind(x0)];
    let signed = answer.cast_signed();
    let error = usize::try_from(signed.wrapping_neg()).unwrap_or(ANSWERS - 1);
    // Not negative: a result.
    let place = if signed >= 0 { 0 } else { error.min(ANSWERS - 1) };
    counts[place].fetch_add(1, Ordering::Relaxed);
}

fn sum(kind: usize, answer: usize) -> u64 {
    COUNTS.iter().map(|counts| counts[kind][answer].load(Ordering::Relaxed)).sum()
}

/// Calls that a CPU has made.
pub fn calls_of(cpu: usize) -> u64 {
    COUNTS[cpu].iter().flatten().map(|count| count.load(Ordering::Relaxed)).sum()
}

/// Calls that were made, and accepted.
pub fn totals() -> (u64, u64) {
    let calls = (0..MAX_CPUS).map(calls_of).sum();
    (calls, (0..KINDS).map(|kind| sum(kind, 0)).sum())
}

/// Calls of a function that were accepted.
pub fn accepted(function: Function) -> u64 {
    sum(function as usize, 0)
}

/// Prints the counts.
pub fn tell_counts() {
    for kind in 0..KINDS {
        let calls: u64 = (0..ANSWERS).map(|answer| sum(kind, answer)).sum();
        let other = kind.checked_sub(HOST);
        crate::console::print(format_args!("@fuzz {{\"event\":\"function\",\"name\":\""));
        match other {
            None => crate::console::print(format_args!("{:?}", Function::ALL[kind])),
            Some(other) => crate::console::print(format_args!("{}", OTHERS[other].0)),
        }
        let accepted = sum(kind, 0);
        crate::console::print(format_args!(
            "\",\"calls\":{calls},\"accepted\":{accepted},\"answers\":{{\"ok\":{accepted}"
        ));
        for answer in 1..ANSWERS {
            let times = sum(kind, answer);
            if times == 0 {
                continue;
            }
            let error = Error::ALL.iter().find(|e| e.code().unsigned_abs() == answer as u64);
            match error {
                Some(error) if other.is_none() => {
                    crate::console::print(format_args!(",\"{error:?}\":{times}"));
                }
                _ => crate::console::print(format_args!(",\"-{answer}\":{times}")),
            }
        }
        crate::println!("}}}}");
    }
}

/// A place in a table that a random number chooses.
pub fn any_of(table: &[[Known; 2]; MAX_CPUS], cpus: usize, number: u64) -> &Known {
    let number = index(number % (2 * cpus as u64));
    &table[number / 2][number % 2]
}
