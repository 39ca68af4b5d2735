// SPDX-License-Identifier: MIT OR Apache-2.0
use std::vec;

use super::*;
use crate::fake::{Event, FakeHardware};

const BASE: u64 = 0x4000_0000;

fn map(hw: &FakeHardware) -> HostMap {
    let ram = Ram::new([Range { base: BASE, size: 16 << 20 }, Range::default()]);
    let uart = Range { base: 0x900_0000, size: PAGE_SIZE };
    HostMap::new(hw, ram, 4 << 20, core::iter::once(uart)).unwrap()
}

#[test]
fn the_host_sees_its_ram_and_devices_only() {
    let hw = FakeHardware::default();
    hw.poke(Pa(BASE), 0, 1);
    hw.zero_page(Pa(BASE));
    assert!(hw.is_zero(Pa(BASE)));
    assert_eq!(hw.take_events(), vec![Event::Zero(Pa(BASE))]);
    let map = map(&hw);
    assert_ne!(hw.peek(map.root(), 1), 0);
    assert_eq!(map.lookup(&hw, Ipa(BASE)), None);
    assert_eq!(map.lookup(&hw, Ipa(BASE + (4 << 20) - 1)), None);
    assert!(map.lookup(&hw, Ipa(BASE + (4 << 20))).is_some_and(Entry::is_writable));
    assert!(map.lookup(&hw, Ipa(0x900_0000)).is_some_and(|e| !e.is_executable()));
    assert_eq!(map.lookup(&hw, Ipa(0x900_1000)), None);
}
