// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two CPUs at once: no page is lost, none has two owners.

use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::Mutex;
use std::thread;

use havmsi_abi::{Error, PAGE_SIZE};

use crate::addr::Ipa;
use crate::fake::{FakeMachine, host_page, records, root};
use crate::launch::{Boot, Config};
use crate::page::{Owner, VmSlot};
use crate::vm::Vm;
use crate::vm::tests::check;

const RAM: u64 = 0x8000_0000;
const ROUNDS: u64 = if cfg!(miri) { 8 } else { 600 };
/// Pages that both CPUs want.
const WANTED: u64 = 24;

/// Numbers that differ between CPUs.
fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) % below
    }
}

#[test]
fn a_claimed_page_is_one_cpus_alone() {
    let records = records();
    let m = FakeMachine::new(&records);
    let holders: [AtomicU32; 4] = Default::default();
    thread::scope(|scope| {
        for seed in 0..2 {
            let (m, holders) = (&m, &holders);
            scope.spawn(move || {
                let mut number = numbers(seed);
                for _ in 0..50 * ROUNDS {
                    let n = number(4);
                    let (from, to) = if number(2) == 0 {
                        (Owner::Host, Owner::RunPage(VmSlot(1)))
                    } else {
                        (Owner::RunPage(VmSlot(1)), Owner::Host)
                    };
                    match m.pages.claim(host_page(n), from) {
                        Ok(page) => {
                            let holder = &holders[crate::addr::index(n)];
                            assert_eq!(holder.fetch_add(1, Ordering::Relaxed), 0);
                            assert_eq!(m.pages.owner(page.pa()), None);
                            holder.fetch_sub(1, Ordering::Relaxed);
                            if number(3) == 0 {
                                m.pages.unclaim(page);
                            } else {
                                m.pages.relabel(page, to);
                            }
                        }
                        Err(error) => assert!(matches!(error, Error::Again | Error::Denied)),
                    }
                }
            });
        }
    });
    for n in 0..4 {
        let owner = m.pages.owner(host_page(n));
        assert!(matches!(owner, Some(Owner::Host | Owner::RunPage(VmSlot(1)))));
    }
}

/// Both CPUs act on both VMs and want the same pages.
#[test]
fn races_lose_no_page() {
    let records = records();
    let m = FakeMachine::new(&records);
    let census = m.pages.census();
    let vms = [Mutex::new(Vm::FREE), Mutex::new(Vm::FREE)];
    for (vm, n) in vms.iter().zip(0..) {
        let vm = &mut vm.lock().unwrap();
        let slot = VmSlot(n);
        let config = Config { ipa_bits: 32, gic: 0, max_vcpus: 2 };
        vm.create(slot, root(slot), config, 0, [1; 32]).unwrap();
        vm.add_ram(RAM, 0x40_0000).unwrap();
        vm.create_vcpu(&m, 0, host_page(100 + u64::from(n)).0, 0).unwrap();
        vm.set_boot(0, Boot::default()).unwrap();
        vm.activate(&m).unwrap();
    }
    thread::scope(|scope| {
        for seed in 0..2 {
            let (m, vms) = (&m, &vms);
            scope.spawn(move || {
                let mut number = numbers(seed);
                for _ in 0..ROUNDS {
                    let which = crate::addr::index(number(2));
                    let ipa = RAM + number(2) * 0x20_0000 + number(4) * PAGE_SIZE;
                    let page = host_page(number(WANTED)).0;
                    let vm = &mut vms[which].lock().unwrap();
                    let result = match number(12) {
                        8..10 => vm.share(m, Ipa(ipa)),
                        10..12 => vm.unshare(m, Ipa(ipa)),
                        0..4 => vm.map_page(m, ipa, page, [0; 2]),
                        4..6 => vm.unmap_pages(m, ipa, number(3)).map(|_| ()),
                        6 => vm.donate_pool(m, page, 1 + number(2)),
                        _ if number(8) == 0 => {
                            let result = vm.reset(m);
                            if result.is_ok() {
                                vm.set_boot(0, Boot::default()).unwrap();
                                vm.activate(m).unwrap();
                            }
                            result
                        }
                        _ => Ok(()),
                    };
                    if result == Err(Error::Integrity) {
                        // Not what was sealed there: the VM has stopped.
                        while vm.reset(m).is_err() {}
                        vm.set_boot(0, Boot::default()).unwrap();
                        vm.activate(m).unwrap();
                        continue;
                    }
                    assert!(matches!(
                        result,
                        Ok(()) | Err(Error::NoMemory | Error::Again | Error::Denied | Error::State)
                    ));
                }
            });
        }
    });
    let mut vms = vms.map(|vm| vm.into_inner().unwrap());
    check(&m, vms.iter());
    for vm in &mut vms {
        while let Err(error) = vm.destroy(&m, |_| ()) {
            assert_eq!(error, Error::Again);
        }
    }
    check(&m, vms.iter());
    assert_eq!(m.pages.census(), census);
}
