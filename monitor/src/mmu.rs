// SPDX-License-Identifier: MIT OR Apache-2.0
//! EL3's own translation: an identity map with 39-bit addresses, no page both
//! writable and executable (WXN is set too). The image's tables are made with
//! the MMU off, RAM is added once its size is known; nothing changes later.
//! Flash is not mapped. (Arm ARM D8.2, D8.3.)

use core::ptr::with_exposed_provenance_mut;
use core::slice;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};

use havmsi_core::addr::index;
use havmsi_core::ram::{MAX_BANKS, Ram, Range};
use havmsi_hal::tlb;

use crate::platform::{EL3_DEVICES, MAX_CPUS, SECURE_RAM_SIZE};

const ENTRIES: usize = 512;
const PAGE: u64 = 4096;
const BLOCK2: u64 = 2 << 20;
const BLOCK1: u64 = 1 << 30;

#[repr(C, align(4096))]
pub struct Table([AtomicU64; ENTRIES]);

impl Table {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; ENTRIES])
    }

    /// Plain stores: also with the MMU off, where exclusives don't work.
    fn set(&self, slot: u64, value: u64) {
        self.0[index(slot) % ENTRIES].store(value, Ordering::Relaxed);
    }

    fn get(&self, slot: u64) -> u64 {
        self.0[index(slot) % ENTRIES].load(Ordering::Relaxed)
    }

    fn descriptor(&self) -> u64 {
        core::ptr::from_ref(self).addr() as u64 | TABLE
    }
}

/// Level 1: 512 GiB.
pub static ROOT: Table = Table::new();
/// Level 2, for the GiBs that are not one block: at most that of secure RAM,
/// one for each window of devices, two for each bank of RAM.
static LEVEL2: [Table; 1 + EL3_DEVICES.len() + 2 * MAX_BANKS] =
    [const { Table::new() }; 1 + EL3_DEVICES.len() + 2 * MAX_BANKS];
/// Tables of `LEVEL2` that are used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Level 3: the 4 MiB that hold the image (monitor.ld checks).
static IMAGE: [Table; 2] = [const { Table::new() }; 2];
const IMAGE_SIZE: u64 = 2 * BLOCK2;

const TABLE: u64 = 3;
const LEVEL3_PAGE: u64 = 3;
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

/// Bytes of a CPU's stack, the guard page at its lower end included.
pub const STACK_STRIDE: usize = 32 * 1024;

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

/// First byte of secure RAM behind the image.
pub fn image_end() -> u64 {
    address(&raw const __image_end)
}

/// Makes the tables of the image, the rest of secure RAM and the devices.
/// By the first CPU, with the MMU off.
pub fn build_tables() {
    let start = image_start();
    let text = address(&raw const __text_end);
    let rodata = address(&raw const __rodata_end);
    let data = address(&raw const __data_end);
    let end = image_end();

    let level2 = level2(start);
    let mut at = start;
    while at < start + IMAGE_SIZE {
        let Some(table) = IMAGE.get(index((at - start) / BLOCK2)) else { break };
        level2.set(at / BLOCK2, table.descriptor());
        let attributes = if at < text {
            READ_ONLY
        } else if at < rodata {
            READ_ONLY | XN
        } else {
            XN
        };
        // A stack's lowest page stays invalid.
        let guard = at >= data && at < end && (at - data).is_multiple_of(STACK_STRIDE as u64);
        if !guard {
            table.set(at / PAGE, at | attributes | NORMAL | LEVEL3_PAGE);
        }
        at += PAGE;
    }
    map(Range { base: start + IMAGE_SIZE, size: SECURE_RAM_SIZE - IMAGE_SIZE }, XN | NORMAL);
    for window in EL3_DEVICES {
        map(window, DEVICE);
    }
}

/// The level 2 table around `at`. Plain stores, as in `Table::set`.
fn level2(at: u64) -> &'static Table {
    let entry = ROOT.get(at / BLOCK1);
    if let Some(table) = LEVEL2.iter().find(|table| table.descriptor() == entry) {
        return table;
    }
    let used = USED.load(Ordering::Relaxed);
    USED.store(used + 1, Ordering::Relaxed);
    let table = &LEVEL2[used];
    ROOT.set(at / BLOCK1, table.descriptor());
    table
}

/// Maps whole blocks. Entries go from invalid to valid, so no TLB holds
/// anything of them.
fn map(range: Range, attributes: u64) {
    let mut at = range.base;
    let end = range.base + range.size;
    while at < end {
        let entry = at | attributes | BLOCK;
        if at.is_multiple_of(BLOCK1) && end - at >= BLOCK1 {
            ROOT.set(at / BLOCK1, entry);
            at += BLOCK1;
        } else {
            level2(at).set(at / BLOCK2, entry);
            at += BLOCK2;
        }
    }
}

/// Maps the normal world's RAM.
pub fn map_ram(ram: &Ram) {
    for bank in ram.banks() {
        map(*bank, XN | NON_SECURE | NORMAL);
    }
    tlb::publish_el3_entries();
}

/// One zeroed ownership record a page, in the secure RAM behind the image. To
/// be called once; empty if there is not enough.
pub fn claim_records(count: u64) -> &'static [AtomicU16] {
    static CLAIMED: AtomicBool = AtomicBool::new(false);
    let free = image_start() + SECURE_RAM_SIZE - image_end();
    if count > free / size_of::<AtomicU16>() as u64 || CLAIMED.swap(true, Ordering::Relaxed) {
        return &[];
    }
    let at = with_exposed_provenance_mut::<AtomicU16>(index(image_end()));
    // SAFETY: `count` records fit between the image's end (page aligned) and
    // the end of secure RAM: mapped, and no other object is there.
    unsafe { at.write_bytes(0, index(count)) };
    // SAFETY: as above; initialised now, and given out only once.
    unsafe { slice::from_raw_parts(at, index(count)) }
}

const _: () = assert!(MAX_CPUS * STACK_STRIDE <= 1 << 20);
