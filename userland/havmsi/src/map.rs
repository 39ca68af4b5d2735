// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who owns which memory.

use crate::list::size;
use crate::state::{Kind, PAGE, State, Trouble, hex};
use havmsi_abi::layout;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;

/// Whose memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// Nobody's: there is no RAM.
    Nobody,
    /// The host's.
    Host,
    /// Kept from the host by its device tree.
    Reserved,
    /// The monitor's carve-out.
    Monitor,
    /// A VM's, by its place in the list.
    Vm(usize, Kind),
}

/// Memory in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// The byte behind the last.
    pub end: u64,
    /// Whose.
    pub owner: Owner,
    /// Where a guest has it.
    guest: Option<u64>,
}

/// All RAM that Linux knows of, and the monitor's part below.
pub struct Map {
    /// What is not the host's, by address.
    pub pieces: Vec<Piece>,
    /// RAM, by address, and whether it is in the host's device tree.
    banks: Vec<(u64, u64)>,
}

/// Numbers of a device tree's property, each of so many 32-bit cells in turn.
fn numbers(bytes: &[u8], cells: [usize; 2]) -> Vec<[u64; 2]> {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |n: u64, b| n << 8 | u64::from(*b));
    let (first, second) = (4 * cells[0], 4 * cells[1]);
    if first + second == 0 || first > 8 || second > 8 {
        return vec![];
    }
    let pair = |pair: &[u8]| {
        let (a, b) = pair.split_at(first);
        [number(a), number(b)]
    };
    bytes.chunks_exact(first + second).map(pair).collect()
}

/// The `reg` of each child of a node whose name begins so.
fn regs(node: &Path, name: &str, wanted: impl Fn(&Path) -> bool) -> Result<Vec<[u64; 2]>, Trouble> {
    let failed = |path: &Path, e| Trouble::Other(format!("{}: {e}", path.display()));
    // With what holds where a node doesn't say (Devicetree Specification, 2.3.5).
    let cells = [("#address-cells", 2), ("#size-cells", 1)].map(|(name, default)| {
        let bytes = std::fs::read(node.join(name)).unwrap_or_default();
        bytes.last().map_or(default, |cells| usize::from(*cells))
    });
    let mut all = vec![];
    for entry in std::fs::read_dir(node).map_err(|e| failed(node, e))? {
        let path = entry.map_err(|e| failed(node, e))?.path();
        let is_it = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name));
        if is_it && path.is_dir() && wanted(&path) {
            let reg = path.join("reg");
            let bytes = std::fs::read(&reg).map_err(|e| failed(&reg, e))?;
            all.extend(numbers(&bytes, cells));
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// The carve-out of a machine whose host has so much RAM: the rest of `ram` such that
/// `ram` = host + carve-out.
fn carveout(host: u64) -> u64 {
    let mut ram = host;
    loop {
        let next = host + layout::carveout_size(ram);
        if next == ram {
            return ram - host;
        }
        ram = next;
    }
}

impl Map {
    /// Reads the device tree, and from debugfs which pages are whose.
    pub fn read(root: &Path, state: &State) -> Result<Self, Trouble> {
        let tree = root.join("proc/device-tree");
        let memory = regs(&tree, "memory@", |_| true)?;
        let mut banks: Vec<(u64, u64)> = memory.iter().map(|[at, size]| (*at, at + size)).collect();
        let host = memory.iter().map(|[_, size]| size).sum();
        let first = memory.first().map(|[at, _]| *at);
        let first = first.ok_or_else(|| Trouble::Other("no memory in the device tree".into()))?;
        // What the monitor has from reset on lies below the host's, which isn't told of it.
        let below = first.saturating_sub(carveout(host));
        banks.insert(0, (below, first));
        let piece = |start, end, owner| Piece { start, end, owner, guest: None };
        let mut pieces = vec![piece(below, first, Owner::Monitor)];
        let reserved = tree.join("reserved-memory");
        if reserved.is_dir() {
            for [at, size] in regs(&reserved, "", |node| node.join("no-map").exists())? {
                pieces.push(piece(at, at + size, Owner::Reserved));
            }
        }
        for (index, vm) in state.vms.iter().enumerate() {
            for run in vm.runs()? {
                let owner = Owner::Vm(index, run.kind);
                pieces.push(Piece { start: run.start, end: run.end, owner, guest: run.guest });
            }
        }
        pieces.sort_by_key(|p| p.start);
        Ok(Self { pieces, banks })
    }

    /// Pages of an owner.
    pub fn pages(&self, owner: Owner) -> u64 {
        let bytes: u64 =
            self.pieces.iter().filter(|p| p.owner == owner).map(|p| p.end - p.start).sum();
        bytes / PAGE
    }

    /// Pages of the host's: what is left.
    pub fn host_pages(&self) -> u64 {
        let all: u64 = self.banks.iter().map(|(start, end)| end - start).sum();
        let others: u64 = self.pieces.iter().map(|p| p.end - p.start).sum();
        all.saturating_sub(others) / PAGE
    }

    /// From the first byte of RAM to behind its last.
    pub fn span(&self) -> (u64, u64) {
        (
            self.banks.first().map_or(0, |bank| bank.0),
            self.banks.iter().map(|bank| bank.1).max().unwrap_or(0),
        )
    }

    /// All RAM in cells of this size, beginning with the one that has the first byte. A cell is
    /// whose most of it is, the host not counted if anybody else is there.
    pub fn cells(&self, size: u64) -> Vec<Owner> {
        let (first, last) = self.span();
        let base = first / size * size;
        let count = usize::try_from((last - base).div_ceil(size)).unwrap_or(0);
        let mut cells = vec![Owner::Nobody; count];
        let mut most = vec![0; count];
        let mut sums = std::collections::BTreeMap::new();
        let host = self.banks.iter().map(|(start, end)| (*start, *end, Owner::Host));
        for (start, end, owner) in host.chain(self.pieces.iter().map(|p| (p.start, p.end, p.owner)))
        {
            let mut at = start.max(base);
            while at < end {
                let stop = ((at / size + 1) * size).min(end);
                if let Ok(cell) = usize::try_from((at - base) / size) {
                    let sum = sums.entry((cell, owner)).or_insert(0);
                    // One byte beats all of the host's.
                    *sum += if owner == Owner::Host { 0 } else { stop - at };
                    if let (Some(cell), Some(most)) = (cells.get_mut(cell), most.get_mut(cell))
                        && (*sum > *most || *cell == Owner::Nobody)
                    {
                        (*cell, *most) = (owner, *sum);
                    }
                }
                at = stop;
            }
        }
        cells
    }

    /// The size of a cell, a power of two, so that a map has at most so many.
    pub fn cell_size(&self, at_most: u64) -> u64 {
        let (first, last) = self.span();
        (last - first).div_ceil(at_most).next_power_of_two().max(PAGE)
    }

    /// For a terminal.
    pub fn text(&self, state: &State) -> String {
        const COLUMNS: u64 = 64;
        let cell = self.cell_size(COLUMNS * 32);
        let row = COLUMNS * cell;
        let (first, _) = self.span();
        // Rows begin where their addresses are round.
        let base = first / row * row;
        let mut cells = vec![Owner::Nobody; usize::try_from((first - base) / cell).unwrap_or(0)];
        cells.extend(self.cells(cell));
        let mut out = format!("each character is {} of memory\n", size(cell / PAGE));
        for (n, line) in (0..).zip(cells.chunks(64)) {
            let signs: String = line.iter().map(|owner| sign(*owner)).collect();
            // Writing to a String can't fail.
            let _ = writeln!(out, "{:#014x} {signs}", base + n * row);
        }
        let _ = writeln!(
            out,
            "\n. host {}   # monitor {}   r reserved {}   + a VM's tables",
            size(self.host_pages()),
            size(self.pages(Owner::Monitor)),
            size(self.pages(Owner::Reserved))
        );
        for (index, vm) in state.vms.iter().enumerate() {
            let of = |kind| Owner::Vm(index, kind);
            let pages = |kind| size(self.pages(of(kind)));
            let (private, shared) = (Kind::Private, Kind::Shared);
            let _ = writeln!(
                out,
                "VM {:#x} (PID {}): {} private {}   {} shared {}   + tables {}",
                vm.vm,
                vm.pid,
                sign(of(private)),
                pages(private),
                sign(of(shared)),
                pages(shared),
                pages(Kind::Table)
            );
        }
        out
    }

    /// For programs: one line, with each piece that is not the host's.
    pub fn json(&self, state: &State) -> Result<String, Trouble> {
        #[derive(Serialize)]
        struct Out<'a> {
            host_pages: u64,
            pieces: Vec<Part<'a>>,
        }
        #[derive(Serialize)]
        struct Part<'a> {
            #[serde(serialize_with = "hex")]
            start: u64,
            #[serde(serialize_with = "hex")]
            end: u64,
            owner: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            vm: Option<String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            guest: Option<String>,
        }
        let part = |p: &Piece| Part {
            start: p.start,
            end: p.end,
            owner: name(p.owner),
            vm: match p.owner {
                Owner::Vm(index, _) => state.vms.get(index).map(|vm| format!("{:#x}", vm.vm)),
                Owner::Nobody | Owner::Host | Owner::Reserved | Owner::Monitor => None,
            },
            guest: p.guest.map(|at| format!("{at:#x}")),
        };
        let out =
            Out { host_pages: self.host_pages(), pieces: self.pieces.iter().map(part).collect() };
        let text = serde_json::to_string(&out).map_err(|e| Trouble::Other(e.to_string()))?;
        Ok(text + "\n")
    }
}

/// An owner's name.
pub fn name(owner: Owner) -> &'static str {
    match owner {
        Owner::Nobody => "nobody",
        Owner::Host => "host",
        Owner::Reserved => "reserved",
        Owner::Monitor => "monitor",
        Owner::Vm(_, Kind::Private) => "private",
        Owner::Vm(_, Kind::Shared) => "shared",
        Owner::Vm(_, Kind::Table) => "table",
    }
}

/// A cell of an owner's: a VM has a letter, which comes again after 26.
fn sign(owner: Owner) -> char {
    let letter = |index: usize, from| (from..).nth(index % 26).unwrap_or(from);
    match owner {
        Owner::Nobody => ' ',
        Owner::Host => '.',
        Owner::Reserved => 'r',
        Owner::Monitor => '#',
        Owner::Vm(index, Kind::Private) => letter(index, 'A'),
        Owner::Vm(index, Kind::Shared) => letter(index, 'a'),
        Owner::Vm(_, Kind::Table) => '+',
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Fake;

    fn both(name: &str) -> (State, Map) {
        let fake = Fake::new(name);
        let state = State::read(&fake.0).unwrap();
        let map = Map::read(&fake.0, &state).unwrap();
        (state, map)
    }

    #[test]
    fn the_carve_out_is_what_the_hosts_tree_leaves_out() {
        for ram in [1 << 30, 4 << 30, 5 << 30, 16 << 30, 512 << 20] {
            let carve = layout::carveout_size(ram);
            assert_eq!(carveout(ram - carve), carve, "{ram:#x}");
        }
        let (_, map) = both("carve-out");
        assert_eq!(map.span(), (0x4000_0000, 0x6000_0000));
        assert_eq!(map.pages(Owner::Monitor), 1024);
        // Only what is not mapped is kept from the host.
        assert_eq!(map.pages(Owner::Reserved), 256);
        assert_eq!(map.host_pages(), (512 << 8) - 1024 - 256 - 513 - 1 - 8 - 1);
    }

    #[test]
    fn a_cell_is_whose_most_of_it_is_and_the_hosts_last() {
        let (_, map) = both("cells");
        let cells = map.cells(2 << 20);
        let at = |address: usize| cells[(address - 0x4000_0000) >> 21];
        assert_eq!(cells.len(), 256);
        assert_eq!((at(0x4000_0000), at(0x4020_0000)), (Owner::Monitor, Owner::Monitor));
        assert_eq!(at(0x4040_0000), Owner::Host);
        assert_eq!(at(0x4800_0000), Owner::Vm(0, Kind::Private));
        // A page each, the first of them.
        assert_eq!(at(0x4820_0000), Owner::Vm(0, Kind::Private));
        assert_eq!(at(0x5000_0000), Owner::Vm(0, Kind::Table));
        assert_eq!(at(0x5f00_0000), Owner::Reserved);
        let pages = map.cells(PAGE);
        assert_eq!(pages[0x8201], Owner::Vm(0, Kind::Shared));
    }

    #[test]
    fn the_text_has_each_vms_letter_where_its_memory_is() {
        let (state, map) = both("text");
        let text = map.text(&state);
        assert!(text.starts_with("each character is 256 KiB of memory"), "{text}");
        let row = text.lines().find(|l| l.starts_with("0x000048000000 ")).unwrap();
        assert!(row.ends_with(&format!("{}{}", "A".repeat(9), ".".repeat(55))), "{row}");
        assert!(text.contains("VM 0x10002 (PID 71): B private 4 KiB   b shared 0 KiB"), "{text}");
    }

    #[test]
    fn a_program_finds_every_page() {
        let (state, map) = both("pieces");
        let value: serde_json::Value = serde_json::from_str(&map.json(&state).unwrap()).unwrap();
        let pieces = value["pieces"].as_array().unwrap();
        let of = |owner: &str| pieces.iter().filter(|p| p["owner"] == owner).collect::<Vec<_>>();
        assert_eq!(pieces.len(), 7);
        assert_eq!(of("shared")[0]["guest"], "0x40201000");
        assert_eq!(of("shared")[0]["vm"], "0x10001");
        assert!(of("monitor")[0].get("vm").is_none());
    }

    #[test]
    fn cells_of_a_property_are_taken_as_the_tree_says() {
        let bytes = [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3];
        assert_eq!(numbers(&bytes, [2, 1]), [[1 << 32 | 2, 3]]);
        assert_eq!(numbers(&bytes, [1, 1]), [[1, 2]]);
        assert_eq!(numbers(&bytes, [3, 1]), [[0; 2]; 0]);
        assert_eq!(numbers(&bytes, [0, 0]), [[0; 2]; 0]);
    }
}
