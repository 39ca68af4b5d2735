// SPDX-License-Identifier: MIT OR Apache-2.0
//! One ownership record between CPUs, with all schedules and all that the memory
//! orders permit (loom): a claim is one CPU's alone, and who holds it sees all
//! that the last holder did to the page.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use havmsi_core::addr::Pa;
use havmsi_core::leave_out::{self, Check};
use havmsi_core::page::{Owner, Pages, VmSlot};
use havmsi_core::ram::{Ram, Range};
use loom::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};
use loom::thread;

const PAGE: Pa = Pa(0x4000_0000);
const RUN_PAGE: Owner = Owner::RunPage(VmSlot(3));

/// The record, and what stands for the page's content: two words without any
/// order of their own.
struct Board {
    pages: Pages<'static>,
    content: [AtomicU64; 2],
}

impl Board {
    fn new() -> Arc<Self> {
        let ram = Ram::new([Range { base: PAGE.0, size: 4096 }, Range::default()]);
        let records = Box::leak(Box::new([AtomicU16::new(0)]));
        let pages = Pages::new(ram, records).unwrap();
        pages.give_to_host(PAGE);
        Arc::new(Self { pages, content: [AtomicU64::new(0), AtomicU64::new(0)] })
    }

    /// Takes the page from `from`, changes it, and gives it to `to`; whether it
    /// was to be had.
    fn pass(&self, from: Owner, to: Owner) -> bool {
        let Ok(page) = self.pages.claim(PAGE, from) else { return false };
        let [first, second] = &self.content;
        let n = first.load(Relaxed);
        first.store(n + 1, Relaxed);
        assert_eq!(second.load(Relaxed), n, "the last holder's writes are not all seen");
        second.store(n + 1, Relaxed);
        if from == to {
            self.pages.unclaim(page);
        } else {
            self.pages.relabel(page, to);
        }
        true
    }

    fn passed(&self) -> u64 {
        let [first, second] = self.content.each_ref().map(|word| word.load(Relaxed));
        assert_eq!(first, second);
        first
    }
}

/// Both CPUs want the host's page; whoever has it gives it back.
fn back_and_forth() {
    let board = Board::new();
    let there = board.clone();
    let other =
        thread::spawn(move || (0..2).filter(|_| there.pass(Owner::Host, Owner::Host)).count());
    let here = (0..2).filter(|_| board.pass(Owner::Host, Owner::Host)).count();
    let all = here + other.join().unwrap();
    assert!(all >= 2, "one of two CPUs always gets it");
    assert_eq!(board.passed(), all as u64);
}

/// One lends the page, the other gives it back, a third one wants it.
fn lent_and_returned() {
    let board = Board::new();
    let (second, third) = (board.clone(), board.clone());
    let second = thread::spawn(move || second.pass(RUN_PAGE, Owner::Host));
    let third = thread::spawn(move || third.pass(Owner::Host, Owner::Host));
    let first = board.pass(Owner::Host, RUN_PAGE);
    let (second, third) = (second.join().unwrap(), third.join().unwrap());
    assert!(first || third, "somebody was first");
    assert!(first || !second, "a page came back that was not lent");
    assert_eq!(board.passed(), [first, second, third].map(u64::from).iter().sum());
}

/// Which check is left out is told to the whole program.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// A check that the pure crate doesn't make: nothing is left out there.
const NOTHING: Check = Check::Panic;

fn explore(left_out: Check, scenario: fn()) -> bool {
    let _one = ONE_AT_A_TIME.lock().unwrap();
    leave_out::leave_out(left_out);
    catch_unwind(AssertUnwindSafe(|| loom::model(scenario))).is_ok()
}

#[test]
fn a_claim_is_one_cpus_alone() {
    assert!(explore(NOTHING, back_and_forth));
}

#[test]
fn a_record_passes_the_page_on_with_its_content() {
    assert!(explore(NOTHING, lent_and_returned));
}

#[test]
fn a_claim_in_two_steps_is_found() {
    assert!(!explore(Check::ClaimOnce, back_and_forth));
    assert!(!explore(Check::ClaimOnce, lent_and_returned));
}
