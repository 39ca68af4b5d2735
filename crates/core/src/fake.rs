// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory and TLBs for the tests: a machine with a little RAM whose TLBs are
//! sets of remembered translations.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::vec::Vec;

use crate::addr::{Ipa, Pa};
use crate::hw::Hardware;

/// What happened, in order, as far as tests look at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A table entry was written: table, index, value.
    Write(Pa, usize, u64),
    /// Host TLBs forgot an IPA.
    InvalidateHost(Ipa),
    /// A guest's TLBs forgot an IPA.
    InvalidateGuest(u64, Ipa),
    /// A guest's TLBs forgot everything.
    InvalidateGuestAll(u64),
    /// A page was zeroed.
    Zero(Pa),
}

#[derive(Default)]
pub struct FakeHardware {
    memory: RefCell<BTreeMap<u64, [u64; 512]>>,
    pub events: RefCell<Vec<Event>>,
}

impl FakeHardware {
    /// Writes one word, as the host would.
    pub fn poke(&self, page: Pa, index: usize, value: u64) {
        self.memory.borrow_mut().entry(page.0).or_insert([0; 512])[index] = value;
    }

    pub fn peek(&self, page: Pa, index: usize) -> u64 {
        self.memory.borrow().get(&page.0).map_or(0, |p| p[index])
    }

    pub fn is_zero(&self, page: Pa) -> bool {
        self.memory.borrow().get(&page.0).is_none_or(|p| p.iter().all(|w| *w == 0))
    }

    pub fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }
}

impl Hardware for FakeHardware {
    fn read_entry(&self, table: Pa, index: usize) -> u64 {
        self.peek(table, index)
    }

    fn write_entry(&self, table: Pa, index: usize, value: u64) {
        self.poke(table, index, value);
        self.events.borrow_mut().push(Event::Write(table, index, value));
    }

    fn zero_page(&self, page: Pa) {
        self.memory.borrow_mut().remove(&page.0);
        self.events.borrow_mut().push(Event::Zero(page));
    }

    fn copy_page(&self, page: Pa, to: &mut [u8; 4096]) {
        for (i, chunk) in to.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&self.peek(page, i).to_le_bytes());
        }
    }

    fn invalidate_icache(&self) {}

    fn invalidate_host(&self, ipa: Ipa) {
        self.events.borrow_mut().push(Event::InvalidateHost(ipa));
    }

    fn invalidate_guest(&self, vttbr: u64, ipa: Ipa) {
        self.events.borrow_mut().push(Event::InvalidateGuest(vttbr, ipa));
    }

    fn invalidate_guest_all(&self, vttbr: u64) {
        self.events.borrow_mut().push(Event::InvalidateGuestAll(vttbr));
    }
}
