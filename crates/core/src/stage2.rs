// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stage-2 descriptors of VMSAv8-64 with a 4 KiB granule and 40-bit IPAs
//! (Arm ARM, DDI 0487, D8.3 "Translation table descriptor formats").
//!
//! 40 bits are translated from level 1 with two concatenated tables, which
//! every Armv8-A CPU with a 40-bit physical range supports.

use havmsi_abi::PAGE_SIZE;

use crate::addr::{Ipa, Pa, index};
use crate::hw::Hardware;

/// Entries of one table.
pub const ENTRIES: usize = 512;
/// Entries of the two concatenated level 1 tables.
pub const ROOT_ENTRIES: usize = 2 * ENTRIES;
/// Bytes that a level 1 entry maps.
pub const LEVEL1_SIZE: u64 = 1 << 30;
/// Bytes that a level 2 entry maps.
pub const LEVEL2_SIZE: u64 = 1 << 21;

const VALID: u64 = 1 << 0;
const TABLE_OR_PAGE: u64 = 1 << 1;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const ACCESS_FLAG: u64 = 1 << 10;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const S2AP_READ: u64 = 0b01 << 6;
const S2AP_WRITE: u64 = 0b10 << 6;
const MEMATTR_NORMAL_WB: u64 = 0b1111 << 2;
const MEMATTR_DEVICE_NGNRE: u64 = 0b0001 << 2;
const EXECUTE_NEVER: u64 = 0b10 << 53;

/// What a leaf entry permits and of what type the memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attributes {
    /// Normal write-back memory; read, write, execute.
    Memory,
    /// Normal write-back memory; read only, execute never: the zero frame.
    ReadOnly,
    /// Device-nGnRE; read, write, execute never.
    Device,
    /// Device-nGnRE; read only, execute never: the host's stores are ignored.
    DeadDevice,
}

impl Attributes {
    const fn bits(self) -> u64 {
        match self {
            Self::Memory => MEMATTR_NORMAL_WB | INNER_SHAREABLE | S2AP_READ | S2AP_WRITE,
            Self::ReadOnly => MEMATTR_NORMAL_WB | INNER_SHAREABLE | S2AP_READ | EXECUTE_NEVER,
            Self::Device => Self::DeadDevice.bits() | S2AP_WRITE,
            Self::DeadDevice => MEMATTR_DEVICE_NGNRE | S2AP_READ | EXECUTE_NEVER,
        }
    }
}

/// A translation table entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry(pub u64);

impl Entry {
    /// Maps nothing.
    pub const INVALID: Self = Self(0);

    /// In the host's map: maps nothing yet, and a read of the host shows the
    /// zero frame there. Told apart from other invalid entries by software only.
    pub const HIDDEN: Self = Self(0b10);

    /// In a VM's map: maps nothing, and says that the host took a page away here.
    /// Nothing may come in its place but what was sealed as this version (from 1 on),
    /// or the host could turn the guest's memory back (I4); where the VM shared it, 0,
    /// any page. The hardware ignores all but bit 0.
    pub const fn gone(version: u64) -> Self {
        Self(version << 2 | 0b10)
    }

    /// The version, if the entry is such a one.
    pub const fn gone_version(self) -> Option<u64> {
        if self.0 & 0b11 == 0b10 { Some(self.0 >> 2) } else { None }
    }

    /// A level 3 entry.
    pub const fn page(pa: Pa, attributes: Attributes) -> Self {
        Self((pa.0 & ADDRESS) | attributes.bits() | ACCESS_FLAG | TABLE_OR_PAGE | VALID)
    }

    /// A level 1 or 2 entry that maps a block.
    pub const fn block(pa: Pa, attributes: Attributes) -> Self {
        Self((pa.0 & ADDRESS) | attributes.bits() | ACCESS_FLAG | VALID)
    }

    /// An entry that maps `size` bytes: a page, or a block.
    pub const fn leaf(pa: Pa, size: u64, attributes: Attributes) -> Self {
        if size == PAGE_SIZE { Self::page(pa, attributes) } else { Self::block(pa, attributes) }
    }

    /// A level 1 or 2 entry that points to the next table.
    pub const fn table(pa: Pa) -> Self {
        Self((pa.0 & ADDRESS) | TABLE_OR_PAGE | VALID)
    }

    /// Whether the entry maps or points to anything.
    pub const fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    /// Whether the entry, found at level 1 or 2, is a block.
    pub const fn is_block(self) -> bool {
        self.is_valid() && self.0 & TABLE_OR_PAGE == 0
    }

    /// The next table or the mapped page or block.
    pub const fn address(self) -> Pa {
        Pa(self.0 & ADDRESS)
    }

    /// Whether a leaf permits writes.
    pub const fn is_writable(self) -> bool {
        self.is_valid() && self.0 & S2AP_WRITE != 0
    }

    /// Whether a leaf permits instruction fetches.
    pub const fn is_executable(self) -> bool {
        self.is_valid() && self.0 & EXECUTE_NEVER == 0
    }
}

/// Index into the root tables.
pub fn level1_index(ipa: Ipa) -> usize {
    index(ipa.0 / LEVEL1_SIZE) % ROOT_ENTRIES
}

/// Index into a level 2 table.
pub fn level2_index(ipa: Ipa) -> usize {
    index(ipa.0 / LEVEL2_SIZE) % ENTRIES
}

/// Index into a level 3 table.
pub fn level3_index(ipa: Ipa) -> usize {
    index(ipa.0 / PAGE_SIZE) % ENTRIES
}

/// Looks for the entry of `ipa`, a block's or at level 3: its place, or how many
/// tables miss.
pub(crate) fn find(hw: &impl Hardware, root: Pa, ipa: Ipa) -> Result<(Pa, usize), u64> {
    let mut table = root;
    for (slot, missing) in [(level1_index(ipa), 2), (level2_index(ipa), 1)] {
        let entry = Entry(hw.read_entry(table, slot));
        if !entry.is_valid() {
            return Err(missing);
        }
        if entry.is_block() {
            return Ok((table, slot));
        }
        table = entry.address();
    }
    Ok((table, level3_index(ipa)))
}

/// Puts `entry` in place of the valid one at a table's slot: break before make, with `forget` to
/// invalidate what TLBs hold of that (Arm ARM D8.17).
pub(crate) fn replace(hw: &impl Hardware, at: (Pa, usize), entry: Entry, forget: impl FnOnce()) {
    hw.write_entry(at.0, at.1, Entry::INVALID.0);
    forget();
    hw.write_entry(at.0, at.1, entry.0);
}

/// The block that says the same as all of a table, whose entries are of `size`
/// bytes each: memory in a row. Looks behind `slot` first, where a table that is
/// filled in order has its hole.
pub(crate) fn as_block(hw: &impl Hardware, table: Pa, slot: usize, size: u64) -> Option<Entry> {
    let base = Entry(hw.read_entry(table, 0)).address();
    let in_row = |i| {
        let leaf = Entry::leaf(base.offset(i as u64 * size), size, Attributes::Memory);
        hw.read_entry(table, i) == leaf.0
    };
    let whole = base.0.is_multiple_of(size * ENTRIES as u64)
        && (1..=ENTRIES).all(|n| in_row((slot + n) % ENTRIES));
    whole.then_some(Entry::block(base, Attributes::Memory))
}

/// `VTCR_EL2` for these tables, with the given `PS` field (output size):
/// T0SZ = 24, SL0 = level 1, walks inner shareable and write-back, 8-bit VMID
/// (Arm ARM D19.2 "VTCR_EL2").
pub const fn vtcr(ps: u64) -> u64 {
    const RES1: u64 = 1 << 31;
    const SH0_INNER: u64 = 0b11 << 12;
    const ORGN0_WB: u64 = 0b01 << 10;
    const IRGN0_WB: u64 = 0b01 << 8;
    const SL0_LEVEL1: u64 = 0b01 << 6;
    const T0SZ: u64 = 64 - havmsi_abi::MAX_IPA_BITS;
    RES1 | (ps & 0b111) << 16 | SH0_INNER | ORGN0_WB | IRGN0_WB | SL0_LEVEL1 | T0SZ
}

/// `VTTBR_EL2` for a root table and a VMID.
pub const fn vttbr(root: Pa, vmid: u64) -> u64 {
    vmid << 48 | root.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_say_what_they_were_made_of() {
        let page = Entry::page(Pa(0x1_2345_6000), Attributes::Memory);
        assert_eq!(page.address(), Pa(0x1_2345_6000));
        assert_eq!(page.0, 0x1_2345_6000 | 0x7ff);
        assert!(page.is_valid() && page.is_writable() && page.is_executable());
        let zero = Entry::page(Pa(0x4000_1000), Attributes::ReadOnly);
        assert!(zero.is_valid() && !zero.is_writable() && !zero.is_executable());
        let device = Entry::block(Pa(0x800_0000), Attributes::Device);
        assert!(device.is_block() && device.is_writable() && !device.is_executable());
        assert!(!Entry::table(Pa(0x1000)).is_block());
        assert!(!Entry::INVALID.is_valid() && !Entry::INVALID.is_block());
    }

    #[test]
    fn leaves_have_the_bits_of_the_manual() {
        // AF 10, SH 9:8, S2AP 7:6, MemAttr 5:2, type 1:0, XN 54:53.
        let normal = 1 << 10 | 3 << 8 | 0b1111 << 2;
        let at = 0x8_1234_5000;
        let page = |attributes| Entry::page(Pa(at), attributes).0;
        assert_eq!(page(Attributes::Memory), at | normal | 3 << 6 | 3);
        assert_eq!(page(Attributes::ReadOnly), at | normal | 1 << 6 | 3 | 1 << 54);
        assert_eq!(page(Attributes::Device), at | 1 << 10 | 3 << 6 | 1 << 2 | 3 | 1 << 54);
        let at = 0x8_4000_0000;
        assert_eq!(Entry::block(Pa(at), Attributes::Memory).0, at | normal | 3 << 6 | 1);
        assert_eq!(Entry::table(Pa(0x5000)).0, 0x5003);
        assert_eq!(vttbr(Pa(0x4010_0000), 128), 0x0080_0000_4010_0000);
    }

    #[test]
    fn what_is_gone_keeps_its_version() {
        for version in [0, 1, 2, u64::MAX >> 2] {
            let gone = Entry::gone(version);
            assert!(!gone.is_valid() && gone != Entry::INVALID);
            assert_eq!(gone.gone_version(), Some(version));
        }
        let page = Entry::page(Pa(0x1000), Attributes::Memory);
        for entry in [Entry::INVALID, page, Entry::table(Pa(0x1000))] {
            assert_eq!(entry.gone_version(), None);
        }
    }

    #[test]
    fn indices_split_a_forty_bit_address() {
        let ipa = Ipa((1023 << 30) | (511 << 21) | (7 << 12));
        assert_eq!((level1_index(ipa), level2_index(ipa), level3_index(ipa)), (1023, 511, 7));
    }

    #[test]
    fn vtcr_matches_the_manual() {
        assert_eq!(vtcr(2), 0x8002_3558);
    }
}
