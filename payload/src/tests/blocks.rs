// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that come many at once, and 2 MiB of them in a row, which the monitor maps
//! as a block.

use core::sync::atomic::Ordering;

use havmsi_abi::layout::BLOCK_SIZE;
use havmsi_abi::{ExitClass, Function, MAX_PAGES_PER_MAP};

use super::sharing::{Guest, LOAD, REPORT, SHARE};
use super::smp::{HANDLE, PAGE};
use crate::cpu::STOP;
use crate::guest::{FREE, RAM, RAM_SIZE, Vcpu, Vm, nothing};
use crate::harness::{Failure, Outcome, several_cpus};
use crate::memory::{
    self, PATTERN, copy, fill, first_change, is_sealed, is_zero, peek, poke, read, take,
};
use crate::pci::Edu;
use crate::smc::{DENIED, INVALID, host, until_done};
use crate::{cpu, ensure, expect, gic, guest_program, test};

/// Where the block is in the guest; nothing else is in its table.
const AT: u64 = RAM + 2 * BLOCK_SIZE;
const PAGE_SIZE: u64 = 4096;
const PAGES: u64 = BLOCK_SIZE / PAGE_SIZE;
/// Bytes that a call may take.
const MOST: u64 = MAX_PAGES_PER_MAP * PAGE_SIZE;

/// Memory for a block, full of a pattern.
fn memory() -> u64 {
    take(2 * PAGES).next_multiple_of(BLOCK_SIZE)
}

/// Gives the VM all of it, for a block at `ipa`.
#[track_caller]
fn map(vm: &Vm, ipa: u64, memory: u64) -> Outcome {
    for at in (0..BLOCK_SIZE / MOST).map(|n| n * MOST) {
        vm.call(Function::PageMap, &[ipa + at, memory + at, MOST])?;
    }
    Ok(())
}

/// The host can't write to any of these pages.
#[track_caller]
fn is_hidden(memory: u64, pages: impl Iterator<Item = u64>) -> Outcome {
    for page in pages {
        let at = memory + page * PAGE_SIZE;
        let fault = poke(at, 1).err();
        ensure!(fault.is_some_and(|f| f.is_external_abort(at, true)), "page {page}: {fault:x?}");
    }
    Ok(())
}

/// The host has all of it, wiped, and can use it.
#[track_caller]
fn is_back(memory: u64) -> Outcome {
    for page in 0..PAGES {
        let at = memory + page * PAGE_SIZE;
        ensure!(is_zero(at), "page {page} is not wiped");
        poke(at, page)?;
    }
    Ok(())
}

fn many_pages_bad() -> Outcome {
    let (vm, vcpu) = Vm::launch(nothing(), [0; 4])?;
    let pages = take(MAX_PAGES_PER_MAP + 1);
    let taken = vm.map(FREE + 5 * PAGE_SIZE)?;
    let before = host(Function::Stats, &[])?;
    let end = memory::RAM_BASE + memory::RAM_SIZE;
    let mine = memory::RAM_BASE + havmsi_abi::layout::carveout_size(memory::RAM_SIZE);
    for (args, why) in [
        ([AT, pages, MOST + PAGE_SIZE], INVALID),
        ([AT, pages, BLOCK_SIZE], INVALID),
        ([AT, pages, 2 * PAGE_SIZE + 8], INVALID),
        ([AT, pages, 1 << 52], INVALID),
        ([AT, pages, 1 << 63 | PAGE_SIZE], INVALID),
        ([AT + 8, pages, MOST], INVALID),
        ([AT, pages + 8, MOST], INVALID),
        // Over the end of 2 MiB, or of RAM.
        ([AT - PAGE_SIZE, pages, 2 * PAGE_SIZE], INVALID),
        ([AT + BLOCK_SIZE - MOST + PAGE_SIZE, pages, MOST], INVALID),
        ([RAM + RAM_SIZE - PAGE_SIZE, pages, 2 * PAGE_SIZE], DENIED),
        ([RAM - PAGE_SIZE, pages, 2 * PAGE_SIZE], DENIED),
        // One of the places is taken, at the start, within, at the end.
        ([FREE + 5 * PAGE_SIZE, pages, 4 * PAGE_SIZE], DENIED),
        ([FREE + 3 * PAGE_SIZE, pages, 4 * PAGE_SIZE], DENIED),
        ([FREE, pages, 6 * PAGE_SIZE], DENIED),
        // One of the pages is not the host's to give.
        ([AT, end - PAGE_SIZE, 2 * PAGE_SIZE], DENIED),
        ([AT, mine - PAGE_SIZE, 2 * PAGE_SIZE], DENIED),
        ([AT, taken - PAGE_SIZE, 2 * PAGE_SIZE], DENIED),
        ([AT, vcpu.page, 2 * PAGE_SIZE], DENIED),
        ([AT, !0xfff, 2 * PAGE_SIZE], DENIED),
    ] {
        let result = vm.call(Function::PageMap, &args);
        ensure!(result == Err(why), "{args:x?}: {result:x?}");
    }
    expect!(host(Function::Stats, &[])?, before);
    for page in 0..MAX_PAGES_PER_MAP + 1 {
        let at = pages + page * PAGE_SIZE;
        ensure!(first_change(at, PATTERN).is_none(), "page {page} was changed");
        poke(at, 1)?;
    }
    vm.destroy()
}
test!(many_pages_bad, "T04 T05 T20 T26");

/// The guest has all of it, in order and zeroed, and the host none; nothing of it can
/// be had again, and nothing come in its place.
fn a_block_has_one_place() -> Outcome {
    let mut guest = Guest::new()?;
    let (other, _) = Vm::launch(nothing(), [0; 4])?;
    let open = Vm::new(1)?;
    open.furnish(4)?;
    let before = host(Function::Stats, &[])?;
    let (memory, fresh) = (memory(), take(4));
    map(&guest.vm, AT, memory)?;
    let after = host(Function::Stats, &[])?;
    expect!((after[2], after[3]), (before[2] + PAGES, before[3]));
    for page in [0, 1, 127, 128, 300, PAGES - 1] {
        let ipa = AT + page * PAGE_SIZE;
        expect!(guest.load(ipa)?, 0);
        guest.store(ipa + 16, PATTERN ^ ipa)?;
    }
    for page in [0, 1, 127, 128, 300, PAGES - 1] {
        let ipa = AT + page * PAGE_SIZE;
        expect!(guest.load(ipa + 16)?, PATTERN ^ ipa);
        expect!(peek(memory + page * PAGE_SIZE + 16)?, 0);
    }
    is_hidden(memory, 0..PAGES)?;
    let vm = &guest.vm;
    for page in [0, 127, 128, PAGES - 1] {
        let (ipa, pa) = (AT + page * PAGE_SIZE, memory + page * PAGE_SIZE);
        for (vm, args) in [
            (vm, [ipa, fresh, PAGE_SIZE]),
            (vm, [ipa, pa, PAGE_SIZE]),
            (vm, [FREE, pa, PAGE_SIZE]),
            (vm, [FREE, pa, MOST]),
            (&other, [FREE, pa, PAGE_SIZE]),
            (&other, [ipa, pa, PAGE_SIZE]),
        ] {
            expect!(vm.call(Function::PageMap, &args), Err(DENIED));
        }
        expect!(other.call(Function::PoolDonate, &[pa, 1]), Err(DENIED));
        expect!(open.call(Function::VcpuCreate, &[0, pa]), Err(DENIED));
        expect!(open.call(Function::VmPopulate, &[FREE, pa]), Err(DENIED));
    }
    for at in (0..BLOCK_SIZE / MOST).map(|n| n * MOST) {
        expect!(vm.call(Function::PageMap, &[AT + at, memory + at, MOST]), Err(DENIED));
        expect!(other.call(Function::PageMap, &[AT + at, memory + at, MOST]), Err(DENIED));
    }
    expect!(host(Function::Stats, &[])?, after);
    expect!(first_change(fresh, PATTERN), None);
    guest.vm.destroy()?;
    is_back(memory)?;
    // Another VM's, in another order: pages as ever.
    for at in (0..BLOCK_SIZE / MOST).map(|n| n * MOST) {
        let to = AT + BLOCK_SIZE - MOST - at;
        other.call(Function::PageMap, &[to, memory + at, MOST])?;
    }
    is_hidden(memory, 0..PAGES)?;
    other.destroy()?;
    is_back(memory)?;
    open.destroy()
}
test!(a_block_has_one_place, "T04 T05 T20");

/// One page of a block is shared, and taken back: the others stay where they are.
fn a_page_of_a_block_is_shared() -> Outcome {
    let mut guest = Guest::new()?;
    let memory = memory();
    map(&guest.vm, AT, memory)?;
    let (ipa, page) = (AT + 200 * PAGE_SIZE, memory + 200 * PAGE_SIZE);
    for at in [ipa - 8, ipa, ipa + PAGE_SIZE] {
        guest.store(at, PATTERN ^ at)?;
    }
    expect!(guest.call(SHARE, ipa)?, 0);
    expect!(peek(page)?, PATTERN ^ ipa);
    poke(page + 8, 0x0dd5)?;
    expect!(guest.load(ipa + 8)?, 0x0dd5);
    is_hidden(memory, (0..200).chain(201..PAGES))?;
    expect!(guest.vm.call(Function::PageMap, &[FREE, page, PAGE_SIZE]), Err(DENIED));
    guest.ask(ipa)?;
    expect!(guest.agree()?, 0);
    is_hidden(memory, 0..PAGES)?;
    expect!(guest.load(ipa + 8)?, 0x0dd5);
    for at in [ipa - 8, ipa, ipa + PAGE_SIZE] {
        expect!(guest.load(at)?, PATTERN ^ at);
    }
    // Shared when the VM goes.
    expect!(guest.call(SHARE, ipa)?, 0);
    guest.vm.destroy()?;
    is_back(memory)
}
test!(a_page_of_a_block_is_shared, "T04");

/// Pages of a block are taken away, each sealed: the guest keeps the others, and finds in
/// these what it had once they are back. They come back one by one, nothing else does.
fn pages_of_a_block_are_taken() -> Outcome {
    let mut guest = Guest::new()?;
    let (memory, fresh) = (memory(), take(MAX_PAGES_PER_MAP));
    let before = host(Function::Stats, &[])?;
    map(&guest.vm, AT, memory)?;
    let at = |page: u64| (AT + page * PAGE_SIZE, memory + page * PAGE_SIZE);
    for page in [99, 100, 131, 132] {
        guest.store(at(page).0, PATTERN + page)?;
    }
    let mut tags = [[0; 2]; 32];
    for (page, tag) in (100..).zip(&mut tags) {
        *tag = guest.vm.take_back(at(page).0)?;
        ensure!(is_sealed(at(page).1), "page {page} is not sealed");
    }
    expect!(host(Function::Stats, &[])?[2], before[2] + PAGES - 32);
    is_hidden(memory, (0..100).chain(132..PAGES))?;
    for page in [99, 132] {
        expect!(guest.load(at(page).0)?, PATTERN + page);
    }
    guest.tell(LOAD, [0, at(100).0, 0, 0])?;
    expect!(guest.vcpu.expect(ExitClass::Fault)?.ipa, at(100).0);
    // Many at once, of which one or all were taken: the VM does not stop either.
    for (page, n) in [(100, 2), (130, 2), (100, 32), (128, 4)] {
        for pa in [fresh, at(page).1] {
            let args = [at(page).0, pa, n * PAGE_SIZE, tags[0][0], tags[0][1]];
            expect!(guest.vm.call(Function::PageMap, &args), Err(DENIED));
        }
    }
    for page in 0..MAX_PAGES_PER_MAP {
        expect!(first_change(fresh + page * PAGE_SIZE, PATTERN), None);
    }
    // The first one in another page: no block any more.
    copy(at(100).1, fresh);
    guest.vm.give(at(100).0, fresh, tags[0])?;
    expect!(guest.vcpu.report(REPORT)?, PATTERN + 100);
    tags[0] = guest.vm.take_back(at(100).0)?;
    copy(fresh, at(100).1);
    // All where they were: one again.
    for (page, tag) in (100..).zip(tags) {
        guest.vm.give(at(page).0, at(page).1, tag)?;
    }
    is_hidden(memory, 0..PAGES)?;
    for page in [99, 100, 131, 132] {
        expect!(guest.load(at(page).0)?, PATTERN + page);
    }
    expect!(guest.load(at(115).0)?, 0);
    guest.vm.take_back(at(0).0)?;
    until_done(Function::VmReset, &[guest.vm.handle], 1000)?;
    expect!(host(Function::Stats, &[])?[2], before[2] - 2);
    memory::clear(memory);
    is_back(memory)?;
    guest.vm.destroy()
}
test!(pages_of_a_block_are_taken, "T12 T13 T20");

/// A device wrote to memory of a block before, can't while it is a VM's, and can again.
fn devices() -> Outcome {
    const LAST: u64 = (PAGES - 1) * PAGE_SIZE;
    let edu = Edu::near().ok_or(Failure::new(format_args!("no edu device")))?;
    let mut guest = Guest::new()?;
    let memory = memory();
    let origin = edu.load()?;
    let places = [memory, memory + 77 * PAGE_SIZE, memory + LAST];
    let arrived = |at: u64| read(at) == PATTERN ^ origin;
    for at in places {
        fill(at, 0);
        edu.write(at)?;
        ensure!(arrived(at), "{at:#x}: nothing arrives");
    }
    map(&guest.vm, AT, memory)?;
    for at in places {
        edu.write(at)?;
        expect!(guest.load(AT + at - memory)?, 0);
    }
    guest.vm.destroy()?;
    for at in places {
        edu.write(at)?;
        ensure!(arrived(at), "{at:#x}: nothing arrives any more");
    }
    for at in places {
        fill(at, 0);
        memory::clear(at);
    }
    is_back(memory)
}
test!(devices, "T14 T13", || Edu::near().is_some());

guest_program!(
    counter,
    // Counts in a page of the block, and compares.
    "movz x4, #0x4040, lsl #16",
    "1: ldr x2, [x4, #8]",
    "cmp x2, x1",
    "b.ne 2f",
    "add x1, x1, #1",
    "str x1, [x4, #8]",
    "b 1b",
    "2: str x1, [x20]",
    "b 2b"
);

/// Runs vCPU 0 until told to stop; 1 if it saw another number than its last.
extern "C" fn count(_: u64) -> u64 {
    let mut vcpu = Vcpu::new(HANDLE.load(Ordering::SeqCst), 0, PAGE.load(Ordering::SeqCst));
    while STOP.load(Ordering::SeqCst) == 0 {
        gic::alarm(2);
        match vcpu.run_once() {
            // A fault where a block is made or broken: it tries again.
            Ok(exit) if matches!(exit.class, ExitClass::Irq | ExitClass::Fault) => {}
            Ok(_) => return 1,
            Err(_) => return 2,
        }
    }
    gic::quiet();
    0
}

/// A block is made and broken under a guest that uses it, and that misses nothing.
fn while_it_runs() -> Outcome {
    for round in 0..8 {
        let (vm, vcpu, _) = Vm::launch_two(gic::version(), counter(), [0; 4])?;
        HANDLE.store(vm.handle, Ordering::SeqCst);
        PAGE.store(vcpu.page, Ordering::SeqCst);
        STOP.store(0, Ordering::SeqCst);
        let memory = memory();
        vm.call(Function::PageMap, &[AT, memory, MOST])?;
        cpu::start(1, count, 0)?;
        let end = cpu::now() + cpu::milliseconds(1 + round % 3);
        while cpu::now() < end {}
        for at in (1..BLOCK_SIZE / MOST).map(|n| n * MOST) {
            vm.call(Function::PageMap, &[AT + at, memory + at, MOST])?;
        }
        let end = cpu::now() + cpu::milliseconds(1 + round % 3);
        while cpu::now() < end {}
        // One that it does not use, and the one that it does.
        for page in [1 + round, 0] {
            let at = page * PAGE_SIZE;
            let tag = vm.take_back(AT + at)?;
            ensure!(is_sealed(memory + at), "round {round}: written after it was taken");
            let end = cpu::now() + cpu::milliseconds(1 + round % 3);
            while cpu::now() < end {}
            vm.give(AT + at, memory + at, tag)?;
        }
        let end = cpu::now() + cpu::milliseconds(1 + round % 3);
        while cpu::now() < end {}
        STOP.store(1, Ordering::SeqCst);
        expect!(cpu::join(1)?, 0);
        vm.destroy()?;
        is_back(memory)?;
        memory::restart();
    }
    Ok(())
}
test!(while_it_runs, "T12 T13", several_cpus);
