// SPDX-License-Identifier: MIT OR Apache-2.0
use std::collections::BTreeSet;
use std::vec::Vec;

use super::*;

const ACTIVE: u64 = 1 << 63;
const STATES: [u64; 4] = [0, PENDING, ACTIVE, PENDING | ACTIVE];
const HW: u64 = 1 << 61;

fn list(some: &[u64]) -> [u64; MAX_LRS] {
    core::array::from_fn(|i| some.get(i).copied().unwrap_or(0))
}

fn accepted(gic: u64, some: &[u64]) -> bool {
    check(gic, &list(some), some.len() as u64, MAX_LRS).is_ok()
}

#[test]
fn counts_beyond_the_hardware_are_refused() {
    let lrs = [0; MAX_LRS];
    assert_eq!(check(3, &lrs, 4, 4), Ok(4));
    assert_eq!(check(0, &lrs, 0, 0), Ok(0));
    for (nr, implemented) in [(1, 0), (5, 4), (u64::MAX, 16), (1 << 32, 16), (17, 32), (17, 64)] {
        assert_eq!(check(3, &lrs, nr, implemented), Err(Error::Invalid));
    }
    // What is not in use is not looked at.
    assert!(check(3, &list(&[0, u64::MAX]), 1, 4).is_ok());
}

#[test]
fn interrupts_are_sgis_ppis_and_spis() {
    for gic in [2, 3] {
        for id in 0..1024 {
            for state in STATES {
                assert_eq!(accepted(gic, &[state | id]), id < 1020, "{state:#x} {id}");
            }
        }
    }
    // Extended ranges and LPIs.
    for id in [1024, 1056, 1119, 4096, 5119, 8191, 8192, 0xffff, u64::from(u32::MAX)] {
        assert!(!accepted(3, &[PENDING | id]), "{id}");
        assert!(!accepted(2, &[PENDING | id | 16]), "{id}");
    }
}

#[test]
fn only_the_timer_is_linked_to_hardware() {
    for physical in 0..0x2000 {
        for id in [0, 1, 15, 16, 26, 27, 28, 30, 32, 1019] {
            let allowed = physical == 27 && id == 27;
            for state in [0, PENDING, ACTIVE] {
                assert_eq!(accepted(3, &[state | HW | physical << 32 | id]), allowed);
            }
        }
    }
    let timer = HW | 27 << 32 | 27;
    assert!(!accepted(3, &[PENDING | ACTIVE | timer]));
    // Without the link it is a PPI like others.
    assert!(accepted(3, &[PENDING | ACTIVE | 27]));
}

#[test]
fn bits_without_a_meaning_are_refused() {
    let (plain, timer) = (PENDING | 40, PENDING | HW | 27 << 32 | 27);
    for bit in 0..64 {
        // NMI [59] is not offered.
        let free = bit == 60 || (48..56).contains(&bit);
        let expected = free || !(10..62).contains(&bit) || bit == 41;
        assert_eq!(accepted(3, &[plain | 1 << bit]), expected, "{bit}");
        assert_eq!(accepted(3, &[timer | 1 << bit]), free || timer >> bit & 1 != 0, "{bit}");
    }
    // Only an SGI has a sender, and only on GICv2.
    for sender in 0..8 {
        assert!(accepted(2, &[PENDING | sender << 10 | 15]));
        assert_eq!(accepted(2, &[PENDING | sender << 10 | 16]), sender == 0);
        assert_eq!(accepted(3, &[PENDING | sender << 10 | 15]), sender == 0);
    }
    assert!(!accepted(2, &[PENDING | 1 << 13 | 15]));
}

#[test]
fn an_interrupt_is_in_one_list_register_only() {
    for one in &STATES[1..] {
        for other in &STATES[1..] {
            assert!(!accepted(3, &[one | 40, other | 40]));
            assert!(!accepted(3, &[one | 40, 41, PENDING | 42, other | 40]));
            assert!(accepted(3, &[one | 40, other | 41]));
            // SGIs of two senders too: KVM gives one after the other.
            assert!(!accepted(2, &[one | 1 << 10 | 3, other | 2 << 10 | 3]));
        }
        // An empty one counts for nothing.
        assert!(accepted(3, &[one | 40, 40, 40]));
    }
    assert!(accepted(3, &[0; MAX_LRS]));
}

#[test]
fn pending_sgis_are_told_from_the_rest() {
    let lrs = [PENDING | 3, ACTIVE | 4, PENDING | ACTIVE | 15, PENDING | 16, 5];
    assert_eq!(pending_sgis(&list(&lrs), 5), 1 << 3 | 1 << 15);
    assert_eq!(pending_sgis(&list(&[PENDING | 5 << 10 | 2, PENDING | 0x23]), 2), 1 << 2);
    assert_eq!(pending_sgis(&list(&lrs), 0), 0);
    // Twice is once, whoever lets it come to that.
    assert_eq!(pending_sgis(&list(&[PENDING | 3, PENDING | 3]), 2), 1 << 3);
}

#[test]
fn an_sgi_goes_where_its_register_says() {
    let sgi = Sgi::by_register(2, 7 << 24 | 0b1000_0000_0000_0101);
    assert_eq!(sgi, Sgi { id: 1 << 7, targets: 0x8005 });
    let sgi = Sgi::by_register(2, 15 << 24 | 3 << 16 | 0b11);
    assert_eq!(sgi, Sgi { id: 1 << 15, targets: 0b11 << 48 });
    // All but the sender; the list does not count then.
    let sgi = Sgi::by_register(63, 1 << 40 | 1 << 16 | 0b11);
    assert_eq!(sgi, Sgi { id: 1, targets: u64::MAX >> 1 });
    // The range selector is RES0.
    assert_eq!(Sgi::by_register(0, 5 << 44 | 0b10).targets, 0b10);
    // Nobody is there.
    for nobody in [0, 1 << 32 | 1, 1 << 48 | 1, 4 << 16 | 1, 0xff00_00ff_00ff_ffff] {
        assert_eq!(Sgi::by_register(0, nobody & !(1 << 40)).targets, 0);
    }
}

#[test]
fn an_sgi_goes_where_the_distributor_sends_it() {
    let sgi = Sgi::by_distributor(0, 0b1010_0001 << 16 | 9);
    assert_eq!(sgi, Sgi { id: 1 << 9, targets: 0b1010_0001 });
    let sgi = Sgi::by_distributor(3, 1 << 24 | 0xff << 16 | 1 << 15 | 9);
    assert_eq!(sgi, Sgi { id: 1 << 9, targets: !0b1000 });
    assert_eq!(Sgi::by_distributor(3, 2 << 24 | 0xff << 16).targets, 0b1000);
    assert_eq!(Sgi::by_distributor(3, 3 << 24 | 0xff << 16).targets, 0);
}

#[test]
fn no_more_are_taken_than_were_sent() {
    let mut sent = SentSgis::NONE;
    assert_eq!(sent.take(0), Ok(()));
    assert_eq!(sent.take(1), Err(Error::Invalid));
    sent.add(0b1001);
    sent.add(0b1000);
    // All or none.
    assert_eq!(sent.take(0b1011), Err(Error::Invalid));
    assert_eq!(sent.take(0b1001), Ok(()));
    assert_eq!(sent.take(0b0001), Err(Error::Invalid));
    assert_eq!(sent.take(0b1000), Ok(()));
    assert_eq!(sent.take(0b1000), Err(Error::Invalid));
    for _ in 0..1000 {
        sent.add(1 << 15);
    }
    for _ in 0..255 {
        assert_eq!(sent.take(1 << 15), Ok(()));
    }
    assert_eq!(sent.take(1 << 15), Err(Error::Invalid));
}

/// One SGI of one vCPU, its senders, and KVM between them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Kvm {
    /// Sends that the guest will still make.
    left: u8,
    /// Counted by the monitor; KVM has not handled the exit yet.
    on_the_way: u8,
    /// `pending_latch`.
    latch: bool,
    /// A list register in KVM's memory, before the entry and behind the exit.
    listed: Option<bool>,
    /// The list register of the running vCPU.
    running: Option<bool>,
    /// What the guest has seen.
    delivered: u8,
    sent: [u8; 16],
}

const SENDS: u8 = 6;

impl Kvm {
    fn count(self, change: impl FnOnce(&mut SentSgis) -> Result<(), Error>) -> Self {
        let mut sent = SentSgis(self.sent);
        change(&mut sent).expect("a host that follows the rules is refused");
        Self { sent: sent.0, ..self }
    }

    /// All that can happen next (vgic-v3.c, vgic.c of Linux 6.12).
    fn next(self) -> Vec<Self> {
        let mut all = Vec::new();
        if self.left > 0 {
            let sent = self.count(|s| {
                s.add(1);
                Ok(())
            });
            all.push(Self { left: self.left - 1, on_the_way: self.on_the_way + 1, ..sent });
        }
        if self.on_the_way > 0 {
            // vgic_v3_queue_sgi
            all.push(Self { on_the_way: self.on_the_way - 1, latch: true, ..self });
        }
        match (self.listed, self.running) {
            // vgic_v3_populate_lr; the latch stays for another time if it is not enabled.
            (None, None) => {
                all.push(Self { listed: Some(self.latch), latch: false, ..self });
                all.push(Self { listed: Some(false), ..self });
            }
            (Some(pending), None) => {
                // Entered, or given up before (a signal, BUSY): vgic_v3_fold_lr_state.
                let entered = self.count(|s| s.take(u16::from(pending)));
                all.push(Self { listed: None, running: Some(pending), ..entered });
                all.push(Self { listed: None, latch: self.latch || pending, ..self });
            }
            (None, Some(pending)) => {
                let left = self.count(|s| {
                    s.add(u16::from(pending));
                    Ok(())
                });
                all.push(Self { running: None, latch: self.latch || pending, ..left });
                if pending {
                    let delivered = self.delivered + 1;
                    all.push(Self { running: Some(false), delivered, ..self });
                }
            }
            (Some(_), Some(_)) => unreachable!(),
        }
        all
    }
}

/// Every order of sends, deliveries and merges: KVM is never refused, and the
/// guest never sees more than was sent.
#[test]
fn kvm_is_never_refused() {
    let first = Kvm {
        left: SENDS,
        on_the_way: 0,
        latch: false,
        listed: None,
        running: None,
        delivered: 0,
        sent: [0; 16],
    };
    let mut seen = BTreeSet::from([first]);
    let mut todo = Vec::from([first]);
    while let Some(state) = todo.pop() {
        assert!(state.delivered <= SENDS - state.left, "{state:?}");
        for next in state.next() {
            if seen.insert(next) {
                todo.push(next);
            }
        }
    }
    assert!(seen.iter().any(|s| s.delivered == SENDS) && seen.len() > 500, "{}", seen.len());
}
