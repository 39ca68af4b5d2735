// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is explored: from where on, and what the host's CPUs may ask for.

use crate::call::Op;
use crate::world::Scenario;

/// Pages beyond these are two spare tables for each VM, and run pages.
const TABLES: u8 = 4;

/// How far the VMs are when the host turns hostile: they can run, with two spare
/// tables and a vCPU each.
fn both_active() -> Vec<Op> {
    (0..2).flat_map(|vm| [create(vm), vec![Op::Activate(vm)]].concat()).collect()
}

fn create(vm: u8) -> Vec<Op> {
    vec![Op::Create(vm), Op::Vcpu(vm, 0), Op::Boot(vm), tables(vm)]
}

fn tables(vm: u8) -> Op {
    Op::Pool(vm, TABLES + vm, 2)
}

fn map(vm: u8, places: u8, pages: u8) -> impl Iterator<Item = Op> {
    (0..places).flat_map(move |at| (0..pages).map(move |page| Op::Map(vm, at, page)))
}

fn populate(vm: u8, places: u8, pages: u8) -> impl Iterator<Item = Op> {
    (0..places).flat_map(move |at| (0..pages).map(move |page| Op::Populate(vm, at, page)))
}

fn unmap(vm: u8, places: u8) -> impl Iterator<Item = Op> {
    (0..places).map(move |at| Op::Unmap(vm, at, 1))
}

fn give_back(vm: u8, places: u8, pages: u8, whats: &'static [u8]) -> impl Iterator<Item = Op> {
    let page = move |at| (0..pages).map(move |page| (at, page));
    let returns = move |(at, page)| whats.iter().map(move |what| Op::Return(vm, at, page, *what));
    (0..places).flat_map(page).flat_map(returns)
}

fn run(vm: u8, vcpus: u8) -> impl Iterator<Item = Op> {
    (0..vcpus).flat_map(move |idx| [Op::Enter(vm, idx), Op::Leave(vm, idx)])
}

fn each_vm<I: IntoIterator<Item = Op>>(calls: impl FnMut(u8) -> I) -> Vec<Op> {
    (0..2).flat_map(calls).collect()
}

fn scenario(name: &'static str, what: &'static str, pages: u8, calls: Vec<Op>) -> Scenario {
    Scenario {
        name,
        what,
        before: both_active(),
        calls,
        eager: true,
        generations: 1,
        seals: 1,
        cpus: 2,
        pages,
    }
}

/// Pages come and go.
#[must_use]
pub fn pages(pages: u8) -> Scenario {
    let mut calls = each_vm(|vm| {
        map(vm, 1, pages).chain(unmap(vm, 1)).chain(give_back(vm, 1, pages, &[0])).chain(run(vm, 1))
    });
    calls.extend((0..pages).map(Op::Fault));
    scenario("pages", "pages come and go while guests run", pages, calls)
}

/// The same, with each write of hosts, devices and guests a step of its own.
#[must_use]
pub fn stores(n: u8) -> Scenario {
    let what = "pages come and go; each store of host, device or guest is a step";
    let mut scenario = Scenario { name: "stores", what, eager: false, ..pages(n) };
    // What comes back is `pages`' and `seals`'.
    scenario.calls.retain(|op| !matches!(op, Op::Return(..)));
    scenario
}

/// Pages are sealed and come back, where they were or not, as they were or not.
#[must_use]
pub fn seals(places: u8, pages: u8) -> Scenario {
    let calls = map(0, places, pages)
        .chain(unmap(0, places))
        .chain(give_back(0, places, pages, &[0, 1, 2, 3]))
        .chain(run(0, 1))
        .chain([Op::Reset(0), Op::Boot(0), Op::Activate(0)])
        .chain(map(1, 1, 1))
        .chain(unmap(1, 1))
        .chain(run(1, 1))
        .collect();
    let scenario = scenario("seals", "pages are sealed, and come back or others do", pages, calls);
    Scenario { seals: 2, ..scenario }
}

/// Each VM has several places, that share tables and that don't.
#[must_use]
pub fn places(places: u8, pages: u8) -> Scenario {
    let calls = each_vm(|vm| {
        map(vm, places, pages)
            .chain(unmap(vm, places))
            .chain([Op::Unmap(vm, 0, 2)])
            .chain(run(vm, 1))
    });
    scenario("places", "pages at several places of a VM", pages, calls)
}

/// Resets and launches.
#[must_use]
pub fn launch(pages: u8) -> Scenario {
    let calls = each_vm(|vm| {
        let launch = [Op::Reset(vm), Op::Boot(vm), Op::Activate(vm)];
        map(vm, 1, pages)
            .chain(populate(vm, 1, pages))
            .chain(unmap(vm, 1))
            .chain(run(vm, 1))
            .chain(launch)
    });
    scenario("launch", "resets, and launches with measured pages", pages, calls)
}

/// VMs come and go, one of them with all calls.
#[must_use]
pub fn life(pages: u8) -> Scenario {
    let mut calls: Vec<Op> = map(0, 1, pages).chain(unmap(0, 1)).chain(run(0, 1)).collect();
    calls.extend([Op::Destroy(0), Op::Activate(0)]);
    calls.extend(create(0));
    calls.extend(map(1, 1, pages).chain(unmap(1, 1)).chain([Op::Reset(1), Op::Destroy(1)]));
    let scenario = scenario("life", "a VM is destroyed and made again", pages, calls);
    Scenario { generations: 2, ..scenario }
}

/// The host gives the same pages as memory and as tables.
#[must_use]
pub fn pool(pages: u8) -> Scenario {
    let calls = each_vm(|vm| {
        let pool = (0..pages).map(move |page| Op::Pool(vm, page, 1)).chain([Op::Pool(vm, 0, 2)]);
        map(vm, 1, pages).chain(pool).chain(run(vm, 1)).chain([Op::Destroy(vm)])
    });
    scenario("pool", "the same pages are given as memory and as tables", pages, calls)
}

/// All calls, with bounds as wide as the model has them.
#[must_use]
pub fn all(cpus: usize, places: u8, pages: u8) -> Scenario {
    let mut calls = each_vm(|vm| {
        let pool = (0..pages).map(move |page| Op::Pool(vm, page, 1));
        let life = [
            Op::Reset(vm),
            Op::Destroy(vm),
            Op::Activate(vm),
            Op::Vcpu(vm, 1),
            Op::Unmap(vm, 0, 2),
        ];
        map(vm, places, pages)
            .chain(populate(vm, places, pages))
            .chain(unmap(vm, places))
            .chain(run(vm, 2))
            .chain(pool)
            .chain(life)
            .chain(create(vm))
    });
    calls.extend((0..pages).map(Op::Fault));
    let scenario = scenario("all", "all calls at any time", pages, calls);
    Scenario { generations: 3, cpus, ..scenario }
}

/// From boot on: no VM exists yet.
#[must_use]
pub fn boot(pages: u8) -> Scenario {
    let calls = each_vm(|vm| {
        let all = map(vm, 1, pages).chain(populate(vm, 1, pages)).chain(unmap(vm, 1));
        all.chain(run(vm, 1)).chain(create(vm)).chain([Op::Activate(vm)])
    });
    let scenario = scenario("boot", "the first VMs since boot", pages, calls);
    Scenario { before: Vec::new(), ..scenario }
}

/// A thin layer that takes the two locks in the wrong order for one call.
#[must_use]
pub fn swapped_locks() -> Scenario {
    let mut scenario = pages(1);
    for op in &mut scenario.calls {
        if let Op::Unmap(vm, at, n) = *op {
            *op = Op::UnmapSwapped(vm, at, n);
        }
    }
    scenario
}

/// A thin layer that does not take the lock of the host's map for one call.
#[must_use]
pub fn no_lock() -> Scenario {
    let mut scenario = pages(1);
    for op in &mut scenario.calls {
        if let Op::Fault(page) = *op {
            *op = Op::FaultUnlocked(page);
        }
    }
    scenario
}

/// What is explored: each to its end; or, `deep`, with wider bounds, and the last
/// one for as long as there is time.
#[must_use]
pub fn list(deep: bool) -> Vec<Scenario> {
    if deep {
        let three_cpus = Scenario { cpus: 3, ..pages(3) };
        let wide = [stores(3), places(3, 2), launch(3), life(3), pool(2), boot(2), three_cpus];
        wide.into_iter().chain([seals(2, 2), all(3, 2, 4)]).collect()
    } else {
        vec![pages(4), stores(3), seals(1, 2), places(2, 2), launch(2), life(2), pool(1), boot(1)]
    }
}
