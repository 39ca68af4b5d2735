// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory as a small difference from what boot left, so that a state is cheap to
//! copy and to compare.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use havmsi_abi::PAGE_SIZE;
use havmsi_core::addr::{Ipa, Pa, index};
use havmsi_core::hw::Hardware;

type Page = Box<[u64; 512]>;

/// What boot wrote.
#[derive(Debug, Default)]
pub struct Boot {
    base: u64,
    pages: Vec<Option<Page>>,
}

impl Boot {
    /// What the recorded writes left in the `size` bytes from `base` on.
    #[must_use]
    pub fn new(recorder: Recorder, base: u64, size: u64) -> Self {
        let mut pages: Vec<Option<Page>> = vec![None; index(size / PAGE_SIZE)];
        for (at, value) in recorder.words.into_inner() {
            if let Some(page) = pages.get_mut(index((at - base) / PAGE_SIZE)) {
                page.get_or_insert_with(|| Box::new([0; 512]))[index(at / 8 % 512)] = value;
            }
        }
        Self { base, pages }
    }

    fn get(&self, at: u64) -> u64 {
        let page = self.pages.get(index(at.wrapping_sub(self.base) / PAGE_SIZE));
        page.and_then(Option::as_ref).map_or(0, |page| page[index(at / 8 % 512)])
    }
}

/// Boot's hardware: only writes of entries happen, to memory that is zero.
#[derive(Debug, Default)]
pub struct Recorder {
    words: RefCell<HashMap<u64, u64>>,
}

impl Hardware for Recorder {
    fn read_entry(&self, table: Pa, index: usize) -> u64 {
        self.words.borrow().get(&word(table, index)).copied().unwrap_or(0)
    }
    fn write_entry(&self, table: Pa, index: usize, value: u64) {
        self.words.borrow_mut().insert(word(table, index), value);
    }
    fn zero_page(&self, _: Pa) {
        unreachable!("boot wipes no page");
    }
    fn flush_page(&self, _: Pa) {
        unreachable!("boot measures no page");
    }
    fn invalidate_icache(&self) {}
    fn invalidate_host(&self, _: Ipa, _: u64) {}
    fn invalidate_devices(&self, _: Ipa, _: u64) {}
    fn invalidate_guest(&self, _: u64, _: Ipa, _: u64) {}
    fn invalidate_guest_all(&self, _: u64) {}
}

/// The address of an entry.
#[must_use]
pub fn word(table: Pa, index: usize) -> u64 {
    table.0 + index as u64 * 8
}

/// What is no longer as boot left it: words by address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Memory {
    changed: Arc<Vec<(u64, u64)>>,
}

impl Memory {
    fn find(&self, at: u64) -> Result<usize, usize> {
        self.changed.binary_search_by_key(&at, |word| word.0)
    }

    /// Whether it is the same memory, not only alike.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.changed, &other.changed)
    }

    /// The word at an address.
    #[must_use]
    pub fn get(&self, boot: &Boot, at: u64) -> u64 {
        match self.find(at) {
            Ok(i) => self.changed[i].1,
            Err(_) => boot.get(at),
        }
    }

    /// Writes a word.
    pub fn set(&mut self, boot: &Boot, at: u64, value: u64) {
        let same_as_boot = boot.get(at) == value;
        match self.find(at) {
            Ok(i) if same_as_boot => drop(Arc::make_mut(&mut self.changed).remove(i)),
            Ok(i) if self.changed[i].1 != value => Arc::make_mut(&mut self.changed)[i].1 = value,
            Err(i) if !same_as_boot => {
                Arc::make_mut(&mut self.changed).insert(i, (at, value));
            }
            _ => {}
        }
    }

    /// The words of a page that boot left zero and that are not zero now.
    #[must_use]
    pub fn page(&self, page: u64) -> &[(u64, u64)] {
        let from = self.changed.partition_point(|word| word.0 < page);
        let rest = &self.changed[from..];
        let len = rest.iter().take_while(|word| word.0 - page < PAGE_SIZE).count();
        &rest[..len]
    }

    /// Fills a page, which boot left zero, with zeros.
    pub fn clear(&mut self, page: u64) {
        if !self.page(page).is_empty() {
            let inside = |at| at >= page && at - page < PAGE_SIZE;
            Arc::make_mut(&mut self.changed).retain(|(at, _)| !inside(*at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_from_boot_is_kept() {
        let recorder = Recorder::default();
        recorder.write_entry(Pa(0x1000), 3, 7);
        assert_eq!(recorder.read_entry(Pa(0x1000), 3), 7);
        let boot = Boot::new(recorder, 0x1000, 0x1000);
        let mut memory = Memory::default();
        assert_eq!((memory.get(&boot, 0x1018), memory.get(&boot, 0x1010)), (7, 0));
        memory.set(&boot, 0x1018, 8);
        memory.set(&boot, 0x5008, 1);
        memory.set(&boot, 0x6000, 2);
        assert_eq!((memory.get(&boot, 0x1018), memory.get(&boot, 0x5008)), (8, 1));
        assert_eq!(memory.page(0x5000), [(0x5008, 1)]);
        memory.clear(0x5000);
        memory.set(&boot, 0x1018, 7);
        memory.set(&boot, 0x6000, 0);
        assert_eq!(memory, Memory::default());
    }
}
