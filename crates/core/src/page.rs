// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who owns which page (I1), as one record a page at rest and as a token while
//! a page is in motion.
//!
//! A page changes hands in these steps, and the types allow no other order:
//!
//! ```text
//! Pages::claim ─► Page<Claimed> ─► HostMap::hide / GuestMap::unmap ─► Page<Isolated>
//!   (record: Moving)                (no map, no TLB shows it: I6)        │
//!                        scrub (zeroed: I5, I7), measure (hashed)        ▼
//! Pages::settle ◄── or change (encrypted, decrypted: I5) ──────────  Page<Clean>
//! ```
//!
//! What a VM shares it says itself: `Page<Claimed>` ─ share ─► `Page<Clean>`, and back
//! ─ hide ─► `Page<Isolated>` ─ keep ─► `Page<Clean>`, while it stays in the VM's map.
//!
//! The record is the page's lock: whoever turned it into `Moving` is alone.

use core::marker::PhantomData;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use havmsi_abi::{Error, PAGE_SIZE};
// In `schedules/` only: their atomics in place of the CPU's.
#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU16, AtomicU64, Ordering};
#[cfg(feature = "shuttle")]
use shuttle::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use crate::addr::Pa;
use crate::hw::Hardware;
use crate::ram::Ram;

/// The slot of a VM; its VMID is one more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VmSlot(pub u8);

impl VmSlot {
    /// The VMID; 0 is the host's.
    pub const fn vmid(self) -> u64 {
        self.0 as u64 + 1
    }
}

/// The owner and use of a page at rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The monitor's from reset; never changes. Also what a record says that
    /// nobody wrote.
    Monitor,
    /// The host's.
    Host,
    /// The host's, lent to the monitor as the run page of a vCPU of this VM:
    /// mapped for the host, but not to be given to anyone.
    RunPage(VmSlot),
    /// Table memory, in use or spare, of this VM; the monitor's.
    Table(VmSlot),
    /// Private memory of this VM.
    Private(VmSlot),
    /// Memory of this VM that the host may use as well: the named borrower of I1.
    Shared(VmSlot),
}

const MOVING: u16 = 0xffff;

impl Owner {
    const fn encode(self) -> u16 {
        match self {
            Self::Monitor => 0,
            Self::Host => 1 << 8,
            Self::RunPage(vm) => 2 << 8 | vm.0 as u16,
            Self::Table(vm) => 3 << 8 | vm.0 as u16,
            Self::Private(vm) => 4 << 8 | vm.0 as u16,
            Self::Shared(vm) => 5 << 8 | vm.0 as u16,
        }
    }

    #[cfg(any(test, feature = "audit"))]
    const fn decode(record: u16) -> Option<Self> {
        let [vm, kind] = record.to_le_bytes();
        match kind {
            0 => Some(Self::Monitor),
            1 => Some(Self::Host),
            2 => Some(Self::RunPage(VmSlot(vm))),
            3 => Some(Self::Table(VmSlot(vm))),
            4 => Some(Self::Private(VmSlot(vm))),
            5 => Some(Self::Shared(VmSlot(vm))),
            _ => None,
        }
    }
}

/// Token state: the record says `Moving`, maps may still show the page.
#[derive(Debug)]
pub struct Claimed;
/// Token state: no stage-2 and no TLB shows the page; one that its VM shared is out
/// of one of the two maps that showed it.
#[derive(Debug)]
pub struct Isolated;
/// Token state: isolated, and its content is zero or measured; or its VM shares it,
/// or did.
#[derive(Debug)]
pub struct Clean;

/// A page in motion, or a run of pages that move together. A record that says
/// `Moving` has exactly one token.
#[derive(Debug)]
#[must_use = "a page in motion has no owner until it is settled"]
pub struct Page<S> {
    pa: Pa,
    /// How many pages.
    n: u64,
    was: Owner,
    state: PhantomData<S>,
}

impl<S> Page<S> {
    /// Where the page is, or the first one.
    pub const fn pa(&self) -> Pa {
        self.pa
    }

    /// Bytes of all.
    pub const fn size(&self) -> u64 {
        self.n * PAGE_SIZE
    }

    /// Where each page is.
    pub(crate) fn each(&self) -> impl Iterator<Item = Pa> + use<S> {
        let pa = self.pa;
        (0..self.n).map(move |i| pa.offset(i * PAGE_SIZE))
    }

    fn into_state<T>(self) -> Page<T> {
        Page { pa: self.pa, n: self.n, was: self.was, state: PhantomData }
    }
}

impl Page<Claimed> {
    /// Called by the maps once the page is in none of them, TLBs included.
    pub(crate) fn isolated(self) -> Page<Isolated> {
        self.into_state()
    }

    /// Its VM wants the host to see it, now or when it was here last.
    pub(crate) fn share(self) -> Page<Clean> {
        self.into_state()
    }
}

impl Page<Isolated> {
    /// Whether the host has it in its map all the time.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.was, Owner::Shared(_))
    }

    /// The host has back what its VM shared; it knows what is in it.
    pub(crate) fn give_back(self) -> Page<Clean> {
        self.into_state()
    }

    /// Has the page's content changed: encrypted, or decrypted if it is what it should
    /// be. Nobody else sees how far that is.
    pub(crate) fn change<T>(
        self,
        hw: &impl Hardware,
        change: impl FnOnce(&mut [u8; 4096]) -> T,
    ) -> (Page<Clean>, T) {
        let mut content = [0; 4096];
        let page = self.measure(hw, &mut content);
        let result = change(&mut content);
        for (i, word) in content.as_chunks().0.iter().enumerate() {
            hw.write_entry(page.pa, i, u64::from_le_bytes(*word));
        }
        hw.flush_page(page.pa);
        hw.invalidate_icache();
        (page, result)
    }

    /// Wipes the pages; no instruction cache keeps what the old owner ran there.
    pub fn scrub(self, hw: &impl Hardware) -> Page<Clean> {
        left_out!(ScrubIn => if self.was == Owner::Host { return self.into_state() });
        left_out!(ScrubOut => if self.was != Owner::Host { return self.into_state() });
        self.each().for_each(|page| hw.zero_page(page));
        hw.invalidate_icache();
        self.into_state()
    }

    /// Keeps what is in a page that its VM shared. What the host has written with
    /// other attributes than the VM's comes to light now, not later.
    pub(crate) fn keep(self, hw: &impl Hardware) -> Page<Clean> {
        hw.flush_page(self.pa);
        self.into_state()
    }

    /// Takes the page's content out to be hashed. Nobody can change it any more.
    pub fn measure(self, hw: &impl Hardware, content: &mut [u8; 4096]) -> Page<Clean> {
        hw.flush_page(self.pa);
        for (i, word) in content.as_chunks_mut().0.iter_mut().enumerate() {
            *word = hw.read_entry(self.pa, i).to_le_bytes();
        }
        self.into_state()
    }
}

/// The ownership records of all RAM.
pub struct Pages<'a> {
    ram: Ram,
    records: &'a [AtomicU16],
    /// Pages of each kind, by its number in a record.
    counters: [AtomicU64; 6],
}

impl<'a> Pages<'a> {
    /// Records for `ram`; all say [`Owner::Monitor`] until [`Self::give_to_host`].
    ///
    /// `None` if there are fewer records than pages.
    pub fn new(ram: Ram, records: &'a [AtomicU16]) -> Option<Self> {
        (records.len() as u64 >= ram.page_count()).then_some(Self {
            ram,
            records,
            counters: core::array::from_fn(|_| AtomicU64::new(0)),
        })
    }

    /// The RAM that is recorded.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// At boot, before the host runs: the page is the host's.
    pub fn give_to_host(&self, pa: Pa) {
        if let Some(record) = self.record(pa) {
            record.store(Owner::Host.encode(), Ordering::Relaxed);
            self.counter(Owner::Host).fetch_add(1, Ordering::Relaxed);
        }
    }

    fn record(&self, pa: Pa) -> Option<&AtomicU16> {
        self.records.get(self.ram.page_index(pa)?)
    }

    /// The owner of a page; `None` if it is no RAM or in motion.
    #[cfg(any(test, feature = "audit"))]
    pub fn owner(&self, pa: Pa) -> Option<Owner> {
        Owner::decode(self.record(pa)?.load(Ordering::Acquire))
    }

    /// The owner of page number `n`; `None` if it is in motion.
    #[cfg(any(test, feature = "audit"))]
    pub(crate) fn numbered(&self, n: usize) -> Option<Owner> {
        Owner::decode(self.records.get(n)?.load(Ordering::Acquire))
    }

    /// Takes the page out of its owner's hands.
    ///
    /// # Errors
    /// [`Error::Denied`] if it is not RAM or not `owner`'s, [`Error::Again`] if
    /// another CPU has it in motion.
    pub fn claim(&self, pa: Pa, owner: Owner) -> Result<Page<Claimed>, Error> {
        left_out!(Ram => if self.record(pa).is_none() { return Ok(Page { pa, n: 1, was: owner, state: PhantomData }) });
        let record = self.record(pa).ok_or(Error::Denied)?;
        left_out!(Owner => return self.claim_from_anyone(pa, owner).ok_or(Error::Denied));
        left_out!(ClaimOnce => return Self::claim_in_two_steps(pa, owner, record));
        match record.compare_exchange(owner.encode(), MOVING, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => Ok(Page { pa, n: 1, was: owner, state: PhantomData }),
            Err(MOVING) => Err(Error::Again),
            Err(_) => Err(Error::Denied),
        }
    }

    /// Takes `n` pages in a row, all or none.
    ///
    /// # Errors
    /// As [`Self::claim`], for the first that is not to be had.
    pub fn claim_run(&self, pa: Pa, n: u64, owner: Owner) -> Result<Page<Claimed>, Error> {
        let mut run = self.claim(pa, owner)?;
        while run.n < n {
            let pa = pa.offset(run.size());
            let next = self.claim(pa, owner);
            #[cfg(feature = "leave-out")]
            let next = if left_out!(EveryPage) {
                next.or_else(|error| self.claim_from_anyone(pa, owner).ok_or(error))
            } else {
                next
            };
            if next.is_err() {
                self.unclaim(run);
                return next;
            }
            run.n += 1;
        }
        Ok(run)
    }

    #[cfg(feature = "leave-out")]
    pub(crate) fn claim_from_anyone(&self, pa: Pa, was: Owner) -> Option<Page<Claimed>> {
        self.record(pa)?.store(MOVING, Ordering::Relaxed);
        Some(Page { pa, n: 1, was, state: PhantomData })
    }

    #[cfg(feature = "leave-out")]
    fn claim_in_two_steps(
        pa: Pa,
        owner: Owner,
        record: &AtomicU16,
    ) -> Result<Page<Claimed>, Error> {
        if record.load(Ordering::Relaxed) != owner.encode() {
            return Err(Error::Denied);
        }
        crate::leave_out::pause();
        record.store(MOVING, Ordering::Relaxed);
        Ok(Page { pa, n: 1, was: owner, state: PhantomData })
    }

    /// A token for a page that nobody has looked at.
    #[cfg(feature = "leave-out")]
    pub(crate) fn not_claimed(pa: Pa) -> Page<Claimed> {
        Page { pa, n: 1, was: Owner::Host, state: PhantomData }
    }

    /// Gives claimed pages back to the owner they were taken from; nothing has happened.
    pub fn unclaim(&self, page: Page<Claimed>) {
        self.put(&page, page.was);
    }

    /// Lends a host page to the monitor as a run page, or gives it back; it
    /// stays in the host's map.
    pub fn relabel(&self, page: Page<Claimed>, owner: Owner) {
        debug_assert!(matches!(
            (page.was, owner),
            (Owner::Host, Owner::RunPage(_)) | (Owner::RunPage(_), Owner::Host)
        ));
        self.put(&page, owner);
    }

    /// Gives clean pages to their new owner.
    pub fn settle(&self, page: Page<Clean>, owner: Owner) {
        self.counter(page.was).fetch_sub(page.n, Ordering::Relaxed);
        self.counter(owner).fetch_add(page.n, Ordering::Relaxed);
        self.put(&page, owner);
    }

    fn put<S>(&self, page: &Page<S>, owner: Owner) {
        for record in page.each().filter_map(|pa| self.record(pa)) {
            record.store(owner.encode(), Ordering::Release);
        }
    }

    /// Pages of this kind, whatever VM's, for statistics; other CPUs may be moving pages
    /// meanwhile.
    pub fn count(&self, owner: Owner) -> u64 {
        self.counter(owner).load(Ordering::Relaxed)
    }

    /// Pages of all kinds.
    #[cfg(any(test, feature = "audit"))]
    pub fn census(&self) -> Census {
        let any = VmSlot(0);
        Census {
            host: self.count(Owner::Host),
            table: self.count(Owner::Table(any)),
            private: self.count(Owner::Private(any)),
            shared: self.count(Owner::Shared(any)),
        }
    }

    fn counter(&self, owner: Owner) -> &AtomicU64 {
        &self.counters[usize::from(owner.encode() >> 8)]
    }
}

/// Pages by owner.
#[cfg(any(test, feature = "audit"))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Census {
    /// The host's, run pages included.
    pub host: u64,
    /// Table memory of VMs.
    pub table: u64,
    /// Private memory of VMs.
    pub private: u64,
    /// What VMs share with the host.
    pub shared: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Range;

    fn records() -> [AtomicU16; 8] {
        core::array::from_fn(|_| AtomicU16::new(0))
    }

    fn ram() -> Ram {
        Ram::new([Range { base: 0x4000_0000, size: 0x8000 }, Range::default()])
    }

    #[test]
    fn encoding_round_trips_and_moving_is_no_owner() {
        for owner in [
            Owner::Monitor,
            Owner::Host,
            Owner::RunPage(VmSlot(127)),
            Owner::Table(VmSlot(1)),
            Owner::Private(VmSlot(0)),
            Owner::Shared(VmSlot(127)),
        ] {
            assert_eq!(Owner::decode(owner.encode()), Some(owner));
        }
        assert_eq!(Owner::decode(MOVING), None);
    }

    #[test]
    fn too_few_records_are_refused() {
        let r = records();
        assert!(Pages::new(ram(), &r[..7]).is_none());
        assert!(Pages::new(ram(), &r).is_some());
    }

    #[test]
    fn a_page_has_one_claimant() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        let pa = Pa(0x4000_1000);
        assert_eq!(pages.claim(pa, Owner::Host).unwrap_err(), Error::Denied);
        pages.give_to_host(pa);
        let page = pages.claim(pa, Owner::Host).unwrap();
        assert_eq!(pages.owner(pa), None);
        assert_eq!(pages.claim(pa, Owner::Host).unwrap_err(), Error::Again);
        pages.unclaim(page);
        assert_eq!(pages.owner(pa), Some(Owner::Host));
    }

    #[test]
    fn a_run_is_claimed_whole_or_not_at_all() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        let at = |n: u64| Pa(0x4000_0000 + n * 0x1000);
        for n in 0..7 {
            pages.give_to_host(at(n));
        }
        let owners = || (0..8).map(|n| pages.owner(at(n))).collect::<std::vec::Vec<_>>();
        let before = owners();
        // The last one is the monitor's; behind it is none.
        for (first, n) in [(0, 8), (6, 2), (7, 1), (3, u64::MAX)] {
            let error = pages.claim_run(at(first), n, Owner::Host).unwrap_err();
            assert_eq!((error, owners()), (Error::Denied, before.clone()));
        }
        let held = pages.claim(at(4), Owner::Host).unwrap();
        assert_eq!(pages.claim_run(at(2), 4, Owner::Host).unwrap_err(), Error::Again);
        pages.unclaim(held);
        assert_eq!(owners(), before);
        let run = pages.claim_run(at(2), 4, Owner::Host).unwrap();
        assert_eq!((run.pa(), run.size()), (at(2), 0x4000));
        assert_eq!(owners()[1..7], [before[1], None, None, None, None, before[6]]);
        let hw = crate::fake::FakeHardware::default();
        for n in 0..8 {
            hw.poke(at(n), 5, 1);
        }
        pages.settle(run.isolated().scrub(&hw), Owner::Private(VmSlot(0)));
        let zero: std::vec::Vec<_> = (0..8).filter(|n| hw.is_zero(at(*n))).collect();
        assert_eq!(zero, [2, 3, 4, 5]);
        assert_eq!(pages.census(), Census { host: 3, private: 4, ..Census::default() });
        let page = pages.claim(at(3), Owner::Private(VmSlot(0))).unwrap();
        assert_eq!(page.size(), 0x1000);
        pages.settle(page.isolated().scrub(&hw), Owner::Host);
        assert_eq!(pages.census(), Census { host: 4, private: 3, ..Census::default() });
    }

    #[test]
    fn settling_moves_a_page_between_the_counts() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        let hw = crate::fake::FakeHardware::default();
        let pa = Pa(0x4000_2000);
        for n in 0..4 {
            pages.give_to_host(Pa(0x4000_0000 + n * 0x1000));
        }
        assert_eq!(pages.census(), Census { host: 4, ..Census::default() });
        let mut was = Owner::Host;
        for (owner, table, private) in [
            (Owner::Table(VmSlot(0)), 1, 0),
            (Owner::Host, 0, 0),
            (Owner::Private(VmSlot(1)), 0, 1),
            (Owner::Private(VmSlot(2)), 0, 1),
            (Owner::Host, 0, 0),
        ] {
            let page = pages.claim(pa, was).unwrap().isolated().scrub(&hw);
            assert_eq!((page.pa(), pages.owner(pa)), (pa, None));
            pages.settle(page, owner);
            assert_eq!(pages.owner(pa), Some(owner));
            let host = 4 - table - private;
            assert_eq!(pages.census(), Census { host, table, private, shared: 0 });
            was = owner;
        }
    }

    #[test]
    fn what_a_vm_shares_it_keeps() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        let hw = crate::fake::FakeHardware::default();
        let (pa, vm) = (Pa(0x4000_2000), VmSlot(1));
        pages.give_to_host(pa);
        let page = pages.claim(pa, Owner::Host).unwrap().isolated().scrub(&hw);
        pages.settle(page, Owner::Private(vm));
        hw.poke(pa, 3, 42);
        let page = pages.claim(pa, Owner::Private(vm)).unwrap().share();
        pages.settle(page, Owner::Shared(vm));
        assert_eq!(pages.census(), Census { shared: 1, ..Census::default() });
        // The VM's, and nobody else's: not the host's to give.
        for other in [Owner::Host, Owner::Private(vm), Owner::Shared(VmSlot(2))] {
            assert_eq!(pages.claim(pa, other).unwrap_err(), Error::Denied);
        }
        hw.take_events();
        let page = pages.claim(pa, Owner::Shared(vm)).unwrap().isolated().keep(&hw);
        assert_eq!(hw.take_events(), [crate::fake::Event::Flush(pa)]);
        pages.settle(page, Owner::Private(vm));
        assert_eq!(pages.census(), Census { private: 1, ..Census::default() });
        assert_eq!(hw.peek(pa, 3), 42);
    }

    #[test]
    fn what_is_scrubbed_is_zero_and_what_is_measured_is_all() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        let hw = crate::fake::FakeHardware::default();
        let pa = Pa(0x4000_2000);
        pages.give_to_host(pa);
        for i in 0..512 {
            hw.poke(pa, i, i as u64 + 1);
        }
        let mut content = [0; 4096];
        let page = pages.claim(pa, Owner::Host).unwrap().isolated().measure(&hw, &mut content);
        for (bytes, n) in content.as_chunks::<8>().0.iter().zip(1..) {
            assert_eq!(u64::from_le_bytes(*bytes), n);
        }
        pages.settle(page, Owner::Host);
        assert!(!hw.is_zero(pa));
        let page = pages.claim(pa, Owner::Host).unwrap().isolated().scrub(&hw);
        assert!(hw.is_zero(pa));
        pages.settle(page, Owner::Host);
    }

    #[test]
    fn unrecorded_and_unaligned_addresses_are_denied() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        for pa in [0, 0x3fff_f000, 0x4000_8000, 0x4000_0800, u64::MAX] {
            assert_eq!(pages.claim(Pa(pa), Owner::Host).unwrap_err(), Error::Denied);
        }
    }

    #[test]
    fn another_vms_page_is_not_claimed() {
        let r = records();
        let pages = Pages::new(ram(), &r).unwrap();
        let pa = Pa(0x4000_0000);
        pages.give_to_host(pa);
        let page = pages.claim(pa, Owner::Host).unwrap();
        pages.relabel(page, Owner::RunPage(VmSlot(3)));
        assert_eq!(pages.claim(pa, Owner::RunPage(VmSlot(4))).unwrap_err(), Error::Denied);
        assert_eq!(pages.claim(pa, Owner::Host).unwrap_err(), Error::Denied);
        assert_eq!(pages.census(), Census { host: 1, ..Census::default() });
    }
}
