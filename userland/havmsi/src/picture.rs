// SPDX-License-Identifier: MIT OR Apache-2.0
//! The map as a picture: rows of memory, each owner in a colour.

use crate::list::size;
use crate::map::{Map, Owner, name};
use crate::state::{Kind, State};
use svg::Document;
use svg::node::element::{Group, Rectangle, Text, Title};

/// Cells of a row, rows at most.
const COLUMNS: u64 = 1024;
const ROWS: u64 = 64;
/// Of the picture, in its own units: a cell is one wide.
const LEFT: u64 = 130;
const TOP: u64 = 40;
const HEIGHT: u64 = 12;
const LINE: u64 = 18;

/// An owner's colour: VMs are as far apart on the colour wheel as the golden angle puts them.
fn colour(owner: Owner) -> String {
    match owner {
        Owner::Nobody => "none".to_owned(),
        Owner::Host => "#e4e4e4".to_owned(),
        Owner::Reserved => "#9a9a9a".to_owned(),
        Owner::Monitor => "#222222".to_owned(),
        Owner::Vm(index, kind) => {
            let light = match kind {
                Kind::Private => 42,
                Kind::Shared => 72,
                Kind::Table => 22,
            };
            format!("hsl({}, 65%, {light}%)", (200 + index * 137) % 360)
        }
    }
}

/// The text beside a colour.
fn label(owner: Owner, state: &State) -> String {
    match owner {
        Owner::Vm(index, _) => {
            let vm = state.vms.get(index).map_or(0, |vm| vm.vm);
            format!("VM {vm:#x} {}", name(owner))
        }
        Owner::Nobody | Owner::Host | Owner::Reserved | Owner::Monitor => name(owner).to_owned(),
    }
}

/// A text at a place.
fn text(x: u64, y: u64, what: impl Into<String>) -> Text {
    Text::new(what.into()).set("x", x).set("y", y)
}

/// The picture, as SVG.
pub fn draw(map: &Map, state: &State) -> String {
    let cell = map.cell_size(ROWS * COLUMNS);
    let row = cell * COLUMNS;
    let (first, last) = map.span();
    // Rows begin where their addresses are round.
    let base = first / row * row;
    let lead = (first / cell * cell - base) / cell;
    let cells = map.cells(cell);
    let mut owners = vec![Owner::Host, Owner::Reserved, Owner::Monitor];
    for index in 0..state.vms.len() {
        owners
            .extend([Kind::Private, Kind::Shared, Kind::Table].map(|kind| Owner::Vm(index, kind)));
    }
    let mut groups: Vec<Group> = owners
        .iter()
        .map(|owner| {
            let id = label(*owner, state).replace(' ', "-").to_lowercase();
            Group::new().set("id", id).set("fill", colour(*owner))
        })
        .collect();
    let mut at = 0;
    for run in cells.chunk_by(|a, b| a == b) {
        let Some(owner) = run.first() else { continue };
        let mut left = run.len() as u64;
        // A run that goes on in the next row is two rectangles.
        while left > 0 {
            let place = lead + at;
            let wide = left.min(COLUMNS - place % COLUMNS);
            let start = base + place * cell;
            if let Some(slot) = owners.iter().position(|o| o == owner)
                && let Some(group) = groups.get_mut(slot)
            {
                let title =
                    format!("{:#x}-{:#x} {}", start, start + wide * cell - 1, label(*owner, state));
                let rectangle = Rectangle::new()
                    .set("x", LEFT + place % COLUMNS)
                    .set("y", TOP + place / COLUMNS * HEIGHT)
                    .set("width", wide)
                    .set("height", HEIGHT - 2)
                    .add(Title::new(title));
                *group = std::mem::replace(group, Group::new()).add(rectangle);
            }
            at += wide;
            left -= wide;
        }
    }
    let rows = (last - base).div_ceil(row);
    let legend = TOP + rows * HEIGHT + LINE;
    let height = legend + owners.len() as u64 * LINE + TOP;
    let width = LEFT + COLUMNS + 20;
    let mut document = Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("width", width)
        .set("height", height)
        .set("font-family", "sans-serif")
        .set("font-size", 11)
        .add(Rectangle::new().set("width", width).set("height", height).set("fill", "white"))
        .add(text(
            LEFT,
            24,
            format!("Memory by owner, as the host says; a row is {}", size(row >> 12)),
        ));
    for n in 0..rows {
        let y = TOP + n * HEIGHT + HEIGHT - 3;
        document = document.add(text(10, y, format!("{:#014x}", base + n * row)));
    }
    for group in groups {
        document = document.add(group);
    }
    for (n, owner) in (0..).zip(owners) {
        let y = legend + n * LINE;
        let pages = if owner == Owner::Host { map.host_pages() } else { map.pages(owner) };
        let box_ = Rectangle::new().set("x", LEFT).set("y", y).set("width", 24).set("height", 12);
        let mut words = format!("{}: {}", label(owner, state), size(pages));
        if let Owner::Vm(index, Kind::Private) = owner
            && let Some(vm) = state.vms.get(index)
        {
            words =
                format!("{words}; PID {}, digest {}", vm.pid, vm.digest.as_deref().unwrap_or("-"));
        }
        document =
            document.add(box_.set("fill", colour(owner))).add(text(LEFT + 32, y + 10, words));
    }
    format!("{document}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Fake;
    use svg::node::element::tag::{self, Type};
    use svg::parser::Event;

    #[test]
    fn every_owner_has_as_much_of_the_picture_as_of_the_memory() {
        let fake = Fake::new("picture");
        let state = State::read(&fake.0).unwrap();
        let map = Map::read(&fake.0, &state).unwrap();
        let picture = draw(&map, &state);
        let mut group = String::new();
        let mut wide = std::collections::BTreeMap::new();
        for event in svg::read(&picture).unwrap() {
            match event {
                Event::Tag(tag::Group, Type::Start, attributes) => {
                    group = attributes["id"].to_string()
                }
                Event::Tag(tag::Group, Type::End, _) => group.clear(),
                Event::Tag(tag::Rectangle, Type::Start, attributes) => {
                    *wide.entry(group.clone()).or_insert(0) +=
                        attributes["width"].parse::<u64>().unwrap();
                }
                Event::Error(e) => panic!("{e}"),
                _ => {}
            }
        }
        // 512 MiB in 64 Ki cells of 8 KiB.
        assert_eq!(wide["monitor"], 512);
        assert_eq!(wide["vm-0x10001-private"], 257);
        assert_eq!(wide["vm-0x10001-table"], 4);
        assert_eq!(wide["vm-0x10002-private"], 1);
        let all: u64 = wide.iter().filter(|(id, _)| !id.is_empty()).map(|(_, n)| n).sum();
        assert_eq!(all, 65_536);
    }
}
