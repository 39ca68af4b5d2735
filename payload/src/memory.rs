// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw memory by physical address, and pages for the tests to use.

use core::arch::asm;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use havmsi_abi::{PAGE_SIZE, layout};

use crate::exception::{Fault, catch};

/// First byte of RAM.
pub const RAM_BASE: u64 = number(env!("PAYLOAD_RAM_BASE"));
/// Bytes of RAM.
pub const RAM_SIZE: u64 = number(env!("PAYLOAD_RAM_SIZE"));
/// What the tests may take pages from: well behind the payload.
pub const ARENA: u64 = RAM_BASE + (128 << 20);
/// Its end.
pub const ARENA_END: u64 = RAM_BASE + RAM_SIZE - (64 << 20);
/// Where the runner may place a line with the names of tests.
pub const ARGUMENTS: u64 = layout::host_initrd(RAM_BASE, RAM_SIZE);

const fn number(text: &str) -> u64 {
    let mut value = 0;
    let mut rest = text.as_bytes();
    while let [digit, tail @ ..] = rest {
        value = value * 10 + (*digit - b'0') as u64;
        rest = tail;
    }
    value
}

/// A page of the tables that map everything.
#[repr(C, align(4096))]
pub struct Table([u64; 512]);

const BLOCK: u64 = 1 | 1 << 10;
const NORMAL: u64 = BLOCK | 1 << 2 | 0b11 << 8;
const NEVER_EXECUTE: u64 = 0b11 << 53;
const EL0: u64 = 1 << 6 | 1 << 53;
/// Distance of the alias of RAM that EL0 may use.
pub const EL0_ALIAS: u64 = 4 << 30;

/// Identity map of 512 GiB: RAM in the second, all else devices; an alias of
/// RAM for EL0 at 5 GiB.
pub static ROOT: Table = {
    let mut entries = [0; 512];
    let mut i = 0;
    while i < 512 {
        let at = (i as u64) << 30;
        entries[i] = at | BLOCK | NEVER_EXECUTE;
        i += 1;
    }
    entries[1] = RAM_BASE | NORMAL;
    entries[5] = RAM_BASE | NORMAL | EL0;
    Table(entries)
};

fn address(at: u64) -> usize {
    usize::try_from(at).unwrap_or(0)
}

/// Reads 8 bytes.
pub fn read(at: u64) -> u64 {
    // SAFETY: RAM or a device of the host, mapped identically; nothing that
    // Rust knows of is changed.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance::<u64>(address(at))) }
}

/// Writes 8 bytes of a page that the tests took, or of a device.
pub fn write(at: u64, value: u64) {
    // SAFETY: not memory of a Rust object.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(address(at)), value) }
}

/// Reads 4 bytes.
pub fn read32(at: u64) -> u32 {
    // SAFETY: as `read`.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance::<u32>(address(at))) }
}

/// Writes 4 bytes of a device.
pub fn write32(at: u64, value: u32) {
    // SAFETY: as `write`.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(address(at)), value) }
}

/// Writes 1 byte.
pub fn write8(at: u64, value: u8) {
    // SAFETY: as `write`.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(address(at)), value) }
}

/// What a register holds before a load that may fault.
pub const UNTOUCHED: u64 = 0x5ca1_ab1e_0dd5_ba11;

macro_rules! peek {
    ($name:ident, $instruction:literal, $bytes:literal) => {
        #[doc = concat!("Loads ", $bytes, " from anywhere; the abort if there is one.")]
        pub fn $name(at: u64) -> Result<u64, Fault> {
            let mut value = UNTOUCHED;
            let fault = catch(|| {
                // SAFETY: at worst an abort, which is caught.
                unsafe {
                    asm!(
                        "dsb sy",
                        concat!($instruction, "]"),
                        "dsb sy", "isb",
                        v = inout(reg) value,
                        a = in(reg) at,
                        options(nostack, preserves_flags)
                    );
                }
            });
            fault.map_or(Ok(value), Err)
        }
    };
}

macro_rules! poke {
    ($name:ident, $instruction:literal, $bytes:literal) => {
        #[doc = concat!("Stores ", $bytes, " anywhere but to Rust objects; the abort if there is one.")]
        pub fn $name(at: u64, value: u64) -> Result<(), Fault> {
            let fault = catch(|| {
                // SAFETY: at worst an abort, which is caught.
                unsafe {
                    asm!(
                        "dsb sy",
                        concat!($instruction, "]"),
                        "dsb sy", "isb",
                        v = in(reg) value,
                        a = in(reg) at,
                        options(nostack, preserves_flags)
                    );
                }
            });
            fault.map_or(Ok(()), Err)
        }
    };
}

peek!(peek, "ldr {v:x}, [{a}", "8 bytes");
peek!(peek32, "ldr {v:w}, [{a}", "4 bytes");
peek!(peek8, "ldrb {v:w}, [{a}", "1 byte");
poke!(poke, "str {v:x}, [{a}", "8 bytes");
poke!(poke32, "str {v:w}, [{a}", "4 bytes");
poke!(poke8, "strb {v:w}, [{a}", "1 byte");

static NEXT: AtomicU64 = AtomicU64::new(ARENA);

/// All pages may be taken again: all VMs are gone.
pub fn restart() {
    NEXT.store(ARENA, Ordering::Relaxed);
}

/// Fresh pages hold zeros: where nothing is tested but what is attacked, so
/// that a VM can also be launched if nobody wipes its tables.
pub static ZEROS: AtomicBool = AtomicBool::new(false);

/// Takes `n` contiguous pages; their content is a pattern.
pub fn take(n: u64) -> u64 {
    let at = NEXT.fetch_add(n * PAGE_SIZE, Ordering::Relaxed);
    assert!(at + n * PAGE_SIZE <= ARENA_END, "out of pages");
    for page in 0..n {
        if ZEROS.load(Ordering::Relaxed) {
            clear(at + page * PAGE_SIZE);
        } else {
            fill(at + page * PAGE_SIZE, PATTERN);
        }
    }
    at
}

/// What fresh pages hold, xor the address.
pub const PATTERN: u64 = 0xdead_10cc_dead_10cc;

/// Fills a page with `pattern` xor the address of each word.
pub fn fill(page: u64, pattern: u64) {
    for at in (page..page + PAGE_SIZE).step_by(8) {
        write(at, pattern ^ at);
    }
}

/// Fills a page with zeros.
pub fn clear(page: u64) {
    for at in (page..page + PAGE_SIZE).step_by(8) {
        write(at, 0);
    }
}

/// First word of the page that is not as [`fill`] made it.
pub fn first_change(page: u64, pattern: u64) -> Option<u64> {
    (page..page + PAGE_SIZE).step_by(8).find(|at| read(*at) != pattern ^ at)
}

/// Whether the page is all zeros for the host.
pub fn is_zero(page: u64) -> bool {
    (page..page + PAGE_SIZE).step_by(8).all(|at| read(at) == 0)
}

/// Whether nothing in the page is what was there: it is encrypted. No word is zero, none
/// is like the one before it, or as [`fill`] would make that with any pattern.
pub fn is_sealed(page: u64) -> bool {
    (page..page + PAGE_SIZE).step_by(8).all(|at| {
        let next = if at % PAGE_SIZE == PAGE_SIZE - 8 { page } else { at + 8 };
        let (word, other) = (read(at), read(next));
        word != 0 && word != other && word ^ at != other ^ next
    })
}

/// Copies a page.
pub fn copy(from: u64, to: u64) {
    for at in (0..PAGE_SIZE).step_by(8) {
        write(to + at, read(from + at));
    }
}

/// Puts `bytes` at `page`, the rest of its page zero.
pub fn put(page: u64, bytes: &[u8]) {
    clear(page);
    for (at, byte) in (page..).zip(bytes) {
        write8(at, *byte);
    }
}
