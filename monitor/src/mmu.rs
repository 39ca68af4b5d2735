// SPDX-License-Identifier: MIT OR Apache-2.0
//! EL3's own translation: an identity map with 39-bit addresses, no page both
//! writable and executable (WXN is set too). The image's tables are made with
//! the MMU off, RAM is added once its size is known; nothing changes later.
//! Flash is not mapped. (Arm ARM D8.2, D8.3.)

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use havmsi_abi::PAGE_SIZE;
use havmsi_core::addr::index;
use havmsi_core::ram::{MAX_BANKS, Ram};
use havmsi_core::stage2::{ENTRIES, LEVEL1_SIZE};
use havmsi_hal::barrier;

use crate::platform::{EL3_DEVICES, MAX_CPUS};

#[repr(C, align(4096))]
pub struct Table([AtomicU64; ENTRIES]);

impl Table {
    /// The entry for block or page `number`. Plain loads and stores only, here
    /// and below: exclusives don't work with the MMU off.
    fn entry(&self, number: u64) -> &AtomicU64 {
        &self.0[index(number) % ENTRIES]
    }

    fn descriptor(&self) -> u64 {
        core::ptr::from_ref(self).addr() as u64 | TABLE_OR_PAGE
    }

    /// The table that entry `number` points to, a new one if it points nowhere.
    fn next(&self, number: u64) -> &'static Self {
        let entry = self.entry(number);
        let pointer = entry.load(Ordering::Relaxed);
        if let Some(table) = TABLES.iter().find(|table| table.descriptor() == pointer) {
            return table;
        }
        let used = USED.load(Ordering::Relaxed);
        USED.store(used + 1, Ordering::Relaxed);
        let table = &TABLES[used];
        entry.store(table.descriptor(), Ordering::Relaxed);
        table
    }
}

/// The root; level 2 for the GiBs that are not one block, at most that of secure
/// RAM, one for each window of devices, two for each bank of RAM; level 3 for
/// the image's first 2 MiB and, where it has stacks, the last 4.
pub static TABLES: [Table; 1 + 1 + EL3_DEVICES.len() + 2 * MAX_BANKS + 3] =
    [const { Table([const { AtomicU64::new(0) }; ENTRIES]) }; _];
/// Tables that are used.
static USED: AtomicUsize = AtomicUsize::new(1);

const TABLE_OR_PAGE: u64 = 3;
const BLOCK: u64 = 1;
/// AF, and AP[1], which is RES1 at EL3.
const COMMON: u64 = 1 << 10 | 1 << 6;
const XN: u64 = 1 << 54;
const READ_ONLY: u64 = 1 << 7;
const NON_SECURE: u64 = 1 << 5;
const INNER: u64 = 3 << 8;
/// AttrIndx: MAIR_EL3 is set in entry.S.
const NORMAL: u64 = 2 << 2 | INNER | COMMON;
const DEVICE: u64 = 1 << 2 | COMMON | XN;

/// Bytes of a CPU's stack, the guard page at its lower end and the emergency
/// stack at its upper end included.
pub const STACK_STRIDE: usize = 32 * 1024;
/// Bytes for the epitaph, if a CPU's stack is what broke.
pub const EMERGENCY_STACK: usize = 2048;

unsafe extern "C" {
    static __image_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __data_end: u8;
    static __image_end: u8;
}

fn address(symbol: *const u8) -> u64 {
    symbol.addr() as u64
}

/// First byte of secure RAM, and of the image: its entry.
pub fn image_start() -> u64 {
    address(&raw const __image_start)
}

/// Makes the tables of the image, which fills secure RAM, and the devices.
/// By the first CPU, with the MMU off.
pub fn build_tables() {
    let text = address(&raw const __text_end);
    let rodata = address(&raw const __rodata_end);
    let data = address(&raw const __data_end);
    map(image_start(), text, READ_ONLY | NORMAL);
    map(text, rodata, READ_ONLY | XN | NORMAL);
    map(rodata, data, XN | NORMAL);
    for stack in (data..address(&raw const __image_end)).step_by(STACK_STRIDE) {
        // A stack's lowest page stays invalid.
        map(stack + PAGE_SIZE, stack + STACK_STRIDE as u64, XN | NORMAL);
    }
    for window in EL3_DEVICES {
        map(window.base, window.base + window.size, DEVICE);
    }
}

/// Maps from `at` to `end` in the largest steps that fit. Entries go from
/// invalid to valid, so no TLB holds anything of them.
fn map(mut at: u64, end: u64, attributes: u64) {
    while at < end {
        let (mut table, mut size) = (&TABLES[0], LEVEL1_SIZE);
        while !at.is_multiple_of(size) || end - at < size {
            table = table.next(at / size);
            size /= ENTRIES as u64;
        }
        let kind = if size == PAGE_SIZE { TABLE_OR_PAGE } else { BLOCK };
        table.entry(at / size).store(at | attributes | kind, Ordering::Relaxed);
        at += size;
    }
}

/// Maps the normal world's RAM.
pub fn map_ram(ram: &Ram) {
    for bank in ram.banks() {
        map(bank.base, bank.base + bank.size, XN | NON_SECURE | NORMAL);
    }
    barrier::dsb_ishst();
    barrier::isb();
}

const _: () = assert!(MAX_CPUS * STACK_STRIDE <= 1 << 20);
