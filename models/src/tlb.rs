// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stage-2 trees as the hardware walks them, and what TLBs may still hold of them.
//!
//! A TLB may fill itself at any time with what is valid, and forget at any time. So
//! all that TLBs can hold is: what is valid now, and what was valid at some time since
//! the last invalidation of it (the set of *stale* entries). An access may use any of
//! them. This set is kept as a whole, for all CPUs together since all invalidations
//! are broadcast, and for the SMMU: a TLB that holds less shows less.

use std::sync::Arc;

use havmsi_abi::PAGE_SIZE;
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::page::VmSlot;
use havmsi_core::stage2::{
    self, Entry, LEVEL1_SIZE, LEVEL2_SIZE, level1_index, level2_index, level3_index,
};
use havmsi_core::{fake, host_map::HostMap};

use crate::call::{PAGES, page};
use crate::memory::{Boot, Memory, word};

/// Whose stage-2 a tree is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum World {
    /// The host's on CPUs.
    Host,
    /// The host's devices'.
    Devices,
    /// A VM's.
    Vm(u8),
}

/// What a TLB may hold although no table says so any more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Stale {
    /// Whose.
    pub world: World,
    /// What it translates: the first byte.
    pub ipa: u64,
    /// And how many.
    pub size: u64,
    /// Where to: a page or block, or (in a walk cache) a table.
    pub to: u64,
    /// It is a table.
    pub table: bool,
    /// Writes are permitted.
    pub write: bool,
}

impl Stale {
    /// Whether it leads to this page of memory.
    #[must_use]
    pub fn shows(&self, page: u64) -> bool {
        let size = if self.table { PAGE_SIZE } else { self.size };
        self.to <= page && page - self.to < size
    }
}

/// A table's place in a tree.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Whose tree.
    pub world: World,
    /// 1 to 3.
    pub level: u8,
    /// The first address that it translates.
    pub base: u64,
}

impl Place {
    /// What entry `i` translates: address, size.
    #[must_use]
    pub fn entry(&self, i: usize) -> (u64, u64) {
        let size = match self.level {
            1 => LEVEL1_SIZE,
            2 => LEVEL2_SIZE,
            _ => PAGE_SIZE,
        };
        (self.base + i as u64 * size, size)
    }

    /// Whether a valid entry here leads to a table.
    #[must_use]
    pub fn is_table(&self, entry: Entry) -> bool {
        self.level < 3 && entry.is_valid() && !entry.is_block()
    }
}

/// Tables and leaves that an entry leads to.
#[derive(Debug, Default)]
pub struct Below {
    /// Tables, with their places.
    pub tables: Vec<(u64, Place)>,
    /// Leaves: address, size, entry.
    pub leaves: Vec<(u64, u64, Entry)>,
}

/// The trees in memory.
#[derive(Debug)]
pub struct Trees {
    boot: Arc<Boot>,
    roots: [u64; 4],
}

impl Trees {
    /// Those of a machine that has booted.
    #[must_use]
    pub fn new(boot: Arc<Boot>, host: &HostMap) -> Self {
        let vm = |n| fake::root(VmSlot(n)).0;
        Self { boot, roots: [host.root().0, host.devices_root().0, vm(0), vm(1)] }
    }

    /// Memory at boot.
    #[must_use]
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// The root table of a world.
    #[must_use]
    pub fn root(&self, world: World) -> u64 {
        let [host, devices, vm0, vm1] = self.roots;
        match world {
            World::Host => host,
            World::Devices => devices,
            World::Vm(0) => vm0,
            World::Vm(_) => vm1,
        }
    }

    /// The VM whose `VTTBR_EL2` this is.
    #[must_use]
    pub fn vm_of(&self, vttbr: u64) -> Option<u8> {
        let of = |n| stage2::vttbr(Pa(self.root(World::Vm(n))), VmSlot(n).vmid());
        (0..2).find(|n| of(*n) == vttbr)
    }

    /// The leaf that an address is translated by: its address, its size, it.
    #[must_use]
    pub fn walk(&self, memory: &Memory, world: World, ipa: Ipa) -> Option<(u64, u64, Entry)> {
        let mut table = self.root(world);
        let steps = [
            (level1_index(ipa), LEVEL1_SIZE),
            (level2_index(ipa), LEVEL2_SIZE),
            (level3_index(ipa), PAGE_SIZE),
        ];
        for (i, size) in steps {
            let entry = Entry(memory.get(&self.boot, word(Pa(table), i)));
            if !entry.is_valid() {
                return None;
            }
            if size == PAGE_SIZE || entry.is_block() {
                return Some((ipa.0 / size * size, size, entry));
            }
            table = entry.address().0;
        }
        None
    }

    /// The model's pages that the host's tree, or the devices', translates to
    /// themselves: an identity map, nothing else leads there.
    pub fn identity<'a>(
        &'a self,
        memory: &'a Memory,
        world: World,
    ) -> impl Iterator<Item = (usize, Entry)> + 'a {
        // Even and odd pages lie in one block each: where their walks end, or go on.
        let ends = [0, 1].map(|n| {
            let ipa = Ipa(page(n).0);
            let mut table = self.root(world);
            for (i, size) in [(level1_index(ipa), LEVEL1_SIZE), (level2_index(ipa), LEVEL2_SIZE)] {
                let entry = Entry(memory.get(&self.boot, word(Pa(table), i)));
                if !entry.is_valid() || entry.is_block() {
                    return Err((ipa.0 / size * size, entry));
                }
                table = entry.address().0;
            }
            Ok(table)
        });
        (0..PAGES).filter_map(move |n| {
            let pa = page(n.to_le_bytes()[0]);
            let (base, entry) = match ends[n % 2] {
                Ok(table) => {
                    let i = level3_index(Ipa(pa.0));
                    (pa.0, Entry(memory.get(&self.boot, word(Pa(table), i))))
                }
                Err(end) => end,
            };
            let leads = entry.is_valid() && entry.address().0 + (pa.0 - base) == pa.0;
            leads.then_some((n, entry))
        })
    }

    /// All below a VM's root: of its tables only what boot did not write is looked
    /// at, and boot wrote nothing there.
    #[must_use]
    pub fn vm(&self, memory: &Memory, vm: u8) -> Below {
        let mut below = Below::default();
        let world = World::Vm(vm);
        let root = self.root(world);
        for (page, base) in [(root, 0), (root + PAGE_SIZE, 512 * LEVEL1_SIZE)] {
            let place = Place { world, level: 1, base };
            below.tables.push((page, place));
            self.below(memory, page, place, &mut below);
        }
        below
    }

    fn below(&self, memory: &Memory, table: u64, place: Place, below: &mut Below) {
        for (at, value) in memory.page(table) {
            let i = havmsi_core::addr::index(at / 8 % 512);
            let entry = Entry(*value);
            let (ipa, size) = place.entry(i);
            if place.is_table(entry) {
                let next = entry.address().0;
                let place = Place { level: place.level + 1, base: ipa, ..place };
                below.tables.push((next, place));
                self.below(memory, next, place, below);
            } else if entry.is_valid() {
                below.leaves.push((ipa, size, entry));
            }
        }
    }

    /// The host's tables on the way to the model's pages, with their places, in both
    /// trees.
    fn host_tables(&self, memory: &Memory) -> Vec<(u64, Place)> {
        let mut tables = Vec::new();
        for world in [World::Host, World::Devices] {
            let root = self.root(world);
            tables.push((root, Place { world, level: 1, base: 0 }));
            // Even and odd pages lie in one block each.
            for n in 0..2 {
                let ipa = Ipa(page(n).0);
                let mut table = root;
                for (level, i, size) in
                    [(2, level1_index(ipa), LEVEL1_SIZE), (3, level2_index(ipa), LEVEL2_SIZE)]
                {
                    let entry = Entry(memory.get(&self.boot, word(Pa(table), i)));
                    if !entry.is_valid() || entry.is_block() {
                        break;
                    }
                    table = entry.address().0;
                    tables.push((table, Place { world, level, base: ipa.0 / size * size }));
                }
            }
        }
        tables
    }

    /// Where in trees this page is a table.
    #[must_use]
    pub fn places(&self, memory: &Memory, table: u64) -> Vec<Place> {
        let is_it = |(at, place): (u64, Place)| (at == table).then_some(place);
        let mut places: Vec<Place> =
            self.host_tables(memory).into_iter().filter_map(is_it).collect();
        for vm in 0..2 {
            places.extend(self.vm(memory, vm).tables.into_iter().filter_map(is_it));
        }
        places
    }

    /// What becomes stale when this entry goes: it, and all below.
    #[must_use]
    pub fn forgotten(&self, memory: &Memory, place: Place, i: usize, entry: Entry) -> Vec<Stale> {
        let (ipa, size) = place.entry(i);
        let to = entry.address().0;
        let table = place.is_table(entry);
        let write = entry.is_writable();
        let mut stale = vec![Stale { world: place.world, ipa, size, to, table, write }];
        if table {
            let mut below = Below::default();
            let next = Place { level: place.level + 1, base: ipa, ..place };
            self.below(memory, to, next, &mut below);
            stale.extend(below.leaves.iter().map(|(ipa, size, leaf)| Stale {
                world: place.world,
                ipa: *ipa,
                size: *size,
                to: leaf.address().0,
                table: false,
                write: leaf.is_writable(),
            }));
        }
        stale
    }
}
