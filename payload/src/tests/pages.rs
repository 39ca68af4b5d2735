// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages change hands.

use havmsi_abi::{ExitClass, Function, MAX_PAGES_PER_CALL};

use crate::guest::{FREE, IPA_BITS, RAM, RAM_SIZE, Vcpu, Vm, nothing};
use crate::harness::{Failure, Outcome};
use crate::memory::{
    self, PATTERN, RAM_BASE, clear, copy, fill, first_change, is_sealed, is_zero, peek, poke, read,
    take,
};
use crate::smc::{AGAIN, DENIED, INTEGRITY, INVALID, Refusal, STATE, host, until_done};
use crate::{ensure, expect, gic, guest_program, test};

/// Addresses that no call may take for a page of the host's.
fn not_the_hosts() -> [u64; 18] {
    let end = RAM_BASE + memory::RAM_SIZE;
    [
        0,
        0x1000,
        0x0400_0000,
        0x0800_0000,
        0x080a_0000,
        0x0900_0000,
        0x0902_0000,
        0x0904_0000,
        0x0e00_0000,
        0x0eff_f000,
        RAM_BASE,
        RAM_BASE + 0x1000,
        RAM_BASE + 0x2000,
        RAM_BASE + (3 << 20),
        end,
        end + (1 << 30),
        1 << 40,
        !0xfff,
    ]
}

fn pool_bad() -> Outcome {
    let vm = Vm::new(1)?;
    let page = take(40);
    let before = host(Function::Stats, &[])?;
    for (args, why) in [
        ([page, 0], INVALID),
        ([page, MAX_PAGES_PER_CALL + 1], INVALID),
        ([page, u64::MAX], INVALID),
        ([page, 1 << 52], INVALID),
        ([page, 1 << 52 | 1], INVALID),
        ([page + 1, 1], INVALID),
        ([page + 0x800, 1], INVALID),
    ] {
        let result = vm.call(Function::PoolDonate, &args);
        ensure!(result == Err(why), "{args:x?}: {result:x?}");
    }
    for at in not_the_hosts() {
        for n in [1, 2, 32] {
            let result = vm.call(Function::PoolDonate, &[at, n]);
            ensure!(result == Err(DENIED), "{at:#x}, {n}: {result:x?}");
        }
    }
    // The range ends where RAM or the carve-out does, or wraps.
    let end = RAM_BASE + memory::RAM_SIZE;
    expect!(vm.call(Function::PoolDonate, &[end - 4096, 2]), Err(DENIED));
    expect!(vm.call(Function::PoolDonate, &[!0xffff, 32]), Err(DENIED));
    let mine = RAM_BASE + havmsi_abi::layout::carveout_size(memory::RAM_SIZE);
    expect!(vm.call(Function::PoolDonate, &[mine - 4096, 2]), Err(DENIED));
    expect!(host(Function::Stats, &[])?, before);
    expect!(first_change(page, PATTERN), None);
    vm.destroy()
}
test!(pool_bad, "T05 T20 T26");

/// One page of the range is not to be had: none of it goes.
fn pool_partly_bad() -> Outcome {
    let vm = Vm::new(2)?;
    let pages = take(16);
    vm.call(Function::VcpuCreate, &[0, pages + 7 * 4096])?;
    let before = host(Function::Stats, &[])?;
    for first in [0, 3, 7] {
        expect!(vm.call(Function::PoolDonate, &[pages + first * 4096, 8]), Err(DENIED));
        expect!(host(Function::Stats, &[])?, before);
        for page in 0..16 {
            let at = pages + page * 4096;
            ensure!(first_change(at, PATTERN).is_none(), "page {page} was changed");
            poke(at, PATTERN ^ at)?;
        }
    }
    vm.call(Function::PoolDonate, &[pages, 7])?;
    vm.call(Function::PoolDonate, &[pages + 8 * 4096, 8])?;
    expect!(host(Function::Stats, &[])?[3], before[3] + 15);
    vm.destroy()
}
test!(pool_partly_bad, "T05 T26");

/// A page that went into the pool reads as zeros and can't be written; it comes
/// back wiped.
fn pool_pages_are_out_of_reach() -> Outcome {
    let vm = Vm::new(1)?;
    let pages = take(4);
    vm.call(Function::PoolDonate, &[pages, 4])?;
    for at in [pages, pages + 8, pages + 0x3ff8] {
        expect!(peek(at)?, 0);
        let fault = poke(at, 1).err();
        ensure!(fault.is_some_and(|f| f.is_external_abort(at, true)), "write: {fault:x?}");
    }
    // Their neighbours are untouched.
    let neighbour = take(1);
    expect!(neighbour, pages + 4 * 4096);
    expect!(first_change(neighbour, PATTERN), None);
    poke(neighbour, 1)?;
    // Twice is once too often.
    expect!(vm.call(Function::PoolDonate, &[pages, 1]), Err(DENIED));
    expect!(Vm::new(1)?.call(Function::PoolDonate, &[pages, 1]), Err(DENIED));
    vm.destroy()?;
    for page in 0..4 {
        ensure!(is_zero(pages + page * 4096), "page {page} is not wiped");
        poke(pages + page * 4096, 1)?;
    }
    until_done(Function::HostReset, &[], 1000)?;
    Ok(())
}
test!(pool_pages_are_out_of_reach, "T06 T24");

/// The pool is short: as many pages as a call can lack are asked for, and nothing is taken.
fn map_without_tables() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    // The launch used 2 of 8 tables. Spend the rest: each GiB wants two.
    vm.destroy()?;
    let vm = Vm::with_gic(1, gic::version())?;
    vm.call(Function::VmAddRam, &[0, 1 << IPA_BITS])?;
    vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, 0])?;
    let page = take(1);
    expect!(vm.call(Function::VmPopulate, &[0, page]), Err(Refusal::Wanted(2)));
    vm.call(Function::PoolDonate, &[take(1), 1])?;
    expect!(vm.call(Function::VmPopulate, &[0, page]), Err(Refusal::Wanted(2)));
    expect!(first_change(page, PATTERN), None);
    vm.call(Function::VmActivate, &[])?;
    expect!(vm.call(Function::PageMap, &[0, page, 4096]), Err(Refusal::Wanted(2)));
    vm.call(Function::PoolDonate, &[take(1), 1])?;
    expect!(first_change(page, PATTERN), None);
    vm.call(Function::PageMap, &[0, page, 4096])?;
    // Same level 3 table, same level 2 table, another level 2 table.
    vm.call(Function::PageMap, &[0x1f_f000, take(1), 4096])?;
    let more = take(1);
    expect!(vm.call(Function::PageMap, &[0x20_0000, more, 4096]), Err(Refusal::Wanted(2)));
    expect!(vm.call(Function::PageMap, &[1 << 30, more, 4096]), Err(Refusal::Wanted(2)));
    expect!(first_change(more, PATTERN), None);
    poke(more, 1)?;
    let stats = host(Function::Stats, &[])?;
    expect!(stats[2..], [2, 2][..]);
    vm.destroy()
}
test!(map_without_tables, "T25");

fn map_bad() -> Outcome {
    let (vm, vcpu) = Vm::launch(nothing(), [0; 4])?;
    let page = take(2);
    let before = host(Function::Stats, &[])?;
    let no_ram = RAM + RAM_SIZE;
    for (args, why) in [
        ([FREE, page, 0], INVALID),
        ([FREE, page, 4095], INVALID),
        ([FREE, page, 8191], INVALID),
        ([FREE, page, 2 << 20], INVALID),
        ([FREE, page, u64::MAX], INVALID),
        ([FREE + 1, page, 4096], INVALID),
        ([FREE + 0x800, page, 4096], INVALID),
        ([FREE, page + 1, 4096], INVALID),
        ([FREE, page + 0x800, 4096], INVALID),
        ([no_ram, page, 4096], DENIED),
        ([RAM - 4096, page, 4096], DENIED),
        ([0, page, 4096], DENIED),
        ([1 << 40, page, 4096], DENIED),
        ([FREE | 1 << 40, page, 4096], DENIED),
        ([FREE | 1 << 63, page, 4096], DENIED),
        ([!0xfff, page, 4096], DENIED),
        ([RAM, page, 4096], DENIED),
        ([RAM + 0x1000, page, 4096], DENIED),
        ([FREE, vcpu.page, 4096], DENIED),
    ] {
        let result = vm.call(Function::PageMap, &args);
        ensure!(result == Err(why), "{args:x?}: {result:x?}");
    }
    for at in not_the_hosts() {
        let result = vm.call(Function::PageMap, &[FREE, at, 4096]);
        ensure!(result == Err(DENIED), "{at:#x}: {result:x?}");
    }
    expect!(host(Function::Stats, &[])?, before);
    expect!(first_change(page, PATTERN), None);
    vm.destroy()
}
test!(map_bad, "T04 T05 T10 T20 T26");

/// A page that a VM has can't be had again: not at another address, not by
/// another VM, not as a table, not as a run page.
fn one_page_one_place() -> Outcome {
    let (a, _) = Vm::launch(nothing(), [0; 4])?;
    let (b, _) = Vm::launch(nothing(), [0; 4])?;
    let open = Vm::new(1)?;
    open.furnish(4)?;
    let page = a.map(FREE)?;
    let other = take(1);
    expect!(a.call(Function::PageMap, &[FREE, other, 4096]), Err(DENIED));
    expect!(a.call(Function::PageMap, &[FREE, page, 4096]), Err(DENIED));
    expect!(a.call(Function::PageMap, &[FREE + 4096, page, 4096]), Err(DENIED));
    expect!(b.call(Function::PageMap, &[FREE, page, 4096]), Err(DENIED));
    expect!(b.call(Function::PageMap, &[FREE + 4096, page, 4096]), Err(DENIED));
    expect!(a.call(Function::PoolDonate, &[page, 1]), Err(DENIED));
    expect!(b.call(Function::PoolDonate, &[page, 1]), Err(DENIED));
    expect!(open.call(Function::VcpuCreate, &[0, page]), Err(DENIED));
    expect!(open.call(Function::VmPopulate, &[FREE, page]), Err(DENIED));
    // B can't give A's page back.
    b.call(Function::PageUnmap, &[FREE, 1])?;
    let fault = poke(page, 1).err();
    ensure!(fault.is_some_and(|f| f.is_external_abort(page, true)), "write: {fault:x?}");
    a.destroy()?;
    poke(page, 1)?;
    b.call(Function::PageMap, &[FREE, page, 4096])?;
    b.destroy()?;
    open.destroy()
}
test!(one_page_one_place, "T04 T05");

/// What the host sees of a page of a VM's: zeros; and it can't write it.
fn the_hosts_view() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let page = vm.map(FREE)?;
    for at in [page, page + 8, page + 0xff8] {
        expect!(peek(at)?, 0);
        expect!(memory::peek32(at + 4)?, 0);
        expect!(memory::peek8(at + 7)?, 0);
        for fault in [poke(at, 1).err(), memory::poke32(at, 1).err(), memory::poke8(at, 1).err()] {
            ensure!(fault.is_some_and(|f| f.is_external_abort(at, true)), "write: {fault:x?}");
        }
    }
    // Instructions, atomics and cache maintenance.
    let f = crate::exception::catch(|| {
        // SAFETY: the fetch faults, which is caught and returned from.
        unsafe {
            core::arch::asm!("blr {}", in(reg) page, out("x30") _, options(nostack));
        }
    });
    ensure!(
        f.is_some_and(|f| f.class() == 0x21 && f.esr & 0x3f == 0x10 && f.far == page),
        "fetch: {f:x?}"
    );
    let f = crate::exception::catch(|| {
        // SAFETY: the store faults, which is caught.
        unsafe {
            core::arch::asm!("ldxr {v}, [{a}]", "stxr {w:w}, {v}, [{a}]", a = in(reg) page, v = out(reg) _, w = out(reg) _, options(nostack));
        }
    });
    ensure!(f.is_none_or(|f| f.is_external_abort(page, true)), "stxr: {f:x?}");
    let f = crate::exception::catch(|| {
        // SAFETY: at worst it faults.
        unsafe {
            core::arch::asm!("dc civac, {a}", "dc cvac, {a}", "ic ivau, {a}", "dsb sy", a = in(reg) page, options(nostack));
        }
    });
    ensure!(f.is_none(), "cache maintenance: {f:x?}");
    // DC ZVA and DC IVAC write, or may.
    let f = crate::exception::catch(|| {
        // SAFETY: at worst it faults.
        unsafe { core::arch::asm!("dc zva, {a}", a = in(reg) page, options(nostack)) }
    });
    ensure!(f.is_some_and(|f| f.is_external_abort(page, true)), "dc zva: {f:x?}");
    vm.call(Function::PageUnmap, &[FREE, 1])?;
    ensure!(is_sealed(page), "not sealed");
    vm.destroy()
}
test!(the_hosts_view, "T01 T02");

fn unmap_bad() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let page = vm.map(FREE)?;
    for args in [
        [FREE, MAX_PAGES_PER_CALL + 1],
        [FREE, u64::MAX],
        [FREE, 1 << 52],
        [FREE, 1 << 52 | 1],
        [FREE + 1, 1],
        [FREE + 0x800, 1],
        [1 << IPA_BITS, 1],
        [(1 << IPA_BITS) - 4096, 2],
        [!0xfff, 1],
        [!0xfff, 2],
    ] {
        let result = vm.call(Function::PageUnmap, &args);
        ensure!(result == Err(INVALID), "{args:x?}: {result:x?}");
    }
    ensure!(poke(page, 1).is_err(), "the page came back");
    expect!(vm.call(Function::PageUnmap, &[FREE, 0])?[0], 0);
    ensure!(poke(page, 1).is_err(), "the page came back");
    vm.destroy()
}
test!(unmap_bad, "T20 T26");

/// Pages that are taken back are the host's again, sealed; holes are passed over. They
/// come back to their places and no others.
fn unmap() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let before = host(Function::Stats, &[])?;
    let mut pages = [(0, [0; 2]); 5];
    for (i, (page, _)) in (0..).zip(&mut pages) {
        *page = vm.map(FREE + i * 3 * 4096)?;
    }
    expect!(host(Function::Stats, &[])?[2], before[2] + 5);
    // The first one that is there, and how far that was.
    let mut at = FREE;
    for (i, (_, tag)) in pages.iter_mut().enumerate() {
        let [done, low, high, _] = vm.call(Function::PageUnmap, &[at, 32])?;
        expect!(done, if i == 0 { 1 } else { 3 });
        *tag = [low, high];
        at += done * 4096;
    }
    // The table that was needed stays.
    expect!(host(Function::Stats, &[])?[2], before[2]);
    // Nothing there: no error. RAM and no RAM.
    expect!(vm.call(Function::PageUnmap, &[FREE, 32])?, [32, 0, 0, 0]);
    expect!(vm.call(Function::PageUnmap, &[0, 32])?[0], 32);
    expect!(vm.call(Function::PageUnmap, &[RAM + RAM_SIZE - 4096, 2])?[0], 2);
    for (i, (page, tag)) in (0..).zip(pages) {
        ensure!(is_sealed(page), "{page:#x} is not sealed");
        // In another page of the host's, as after swapping.
        let other = take(1);
        copy(page, other);
        fill(page, 1);
        vm.give(FREE + i * 3 * 4096, other, tag)?;
        expect!(peek(other)?, 0);
        expect!(first_change(page, 1), None);
        vm.call(Function::PageMap, &[FREE + (i * 3 + 1) * 4096, page, 4096])?;
    }
    vm.destroy()?;
    for (page, _) in pages {
        ensure!(is_zero(page), "{page:#x} is not wiped");
    }
    Ok(())
}
test!(unmap, "T11 T12 T24");

guest_program!(
    two_words,
    // Counts in the page that x0 names, in its first and last word; tells both.
    "mov x19, x0",
    "movz x20, #0x0900, lsl #16",
    "1: ldr x1, [x19]",
    "ldr x2, [x19, #0xff8]",
    "str x1, [x20]",
    "str x2, [x20, #8]",
    "add x1, x1, #1",
    "add x2, x2, #3",
    "str x1, [x19]",
    "str x2, [x19, #0xff8]",
    "str x2, [x20, #16]",
    "b 1b"
);

/// What the host has of a guest's page, and would like to give it instead.
type Forge = fn(&Vm, u64, [u64; 2]) -> Result<(u64, u64, [u64; 2]), Failure>;

/// What the host may try, each with a guest of its own: the VM stops, and only it.
fn forged() -> Outcome {
    let (other, mut neighbour) = Vm::launch(two_words(), [FREE, 0, 0, 0])?;
    other.map(FREE)?;
    let forgeries: [(&str, Forge); 7] = [
        ("a bit of it", |_, page, tag| {
            poke(page + 0x800, read(page + 0x800) ^ 1)?;
            Ok((FREE, page, tag))
        }),
        ("a bit of the tag", |_, page, [low, high]| Ok((FREE, page, [low, high ^ 1 << 63]))),
        ("half of it", |_, page, tag| {
            (0x800..0x1000).step_by(8).for_each(|at| memory::write(page + at, 0));
            Ok((FREE, page, tag))
        }),
        ("zeros", |_, page, _| {
            clear(page);
            Ok((FREE, page, [0; 2]))
        }),
        ("what was there before", |vm, page, tag| {
            let old = take(1);
            copy(page, old);
            vm.give(FREE, page, tag)?;
            vm.take_back(FREE)?;
            Ok((FREE, old, tag))
        }),
        ("what was at another address", |vm, page, tag| {
            vm.map(FREE + 0x1000)?;
            vm.take_back(FREE + 0x1000)?;
            Ok((FREE + 0x1000, page, tag))
        }),
        ("what another VM had there", |_, _, _| {
            let (second, _) = Vm::launch(nothing(), [0; 4])?;
            let theirs = second.map(FREE)?;
            let tag = second.take_back(FREE)?;
            Ok((FREE, theirs, tag))
        }),
    ];
    for (round, (what, forge)) in (0..).zip(forgeries) {
        let (vm, mut vcpu) = Vm::launch(two_words(), [FREE, 0, 0, 0])?;
        let page = vm.map(FREE)?;
        vcpu.report(0)?;
        vcpu.report(8)?;
        vcpu.report(16)?;
        let tag = vm.take_back(FREE)?;
        let (ipa, page, tag) = forge(&vm, page, tag)?;
        let before = read(page);
        let result = vm.give(ipa, page, tag);
        ensure!(result == Err(INTEGRITY), "{what}: {result:x?}");
        ensure!(read(page) == before, "{what}: the page was changed");
        poke(page, 1)?;
        for call in [
            vcpu.run_once().map(|_| ()),
            vm.give(FREE, page, tag),
            vm.call(Function::VmActivate, &[]).map(|_| ()),
        ] {
            ensure!(call == Err(INTEGRITY), "{what}, then: {call:x?}");
        }
        // Its host can have its pages back, and the others run.
        expect!(neighbour.report(0)?, round);
        neighbour.report(8)?;
        neighbour.report(16)?;
        until_done(Function::VmReset, &[vm.handle], 100)?;
        vm.boot(two_words(), [FREE, 0, 0, 0])?;
        let mut vcpu = Vcpu::new(vm.handle, 0, vcpu.page);
        vm.map(FREE)?;
        expect!(vcpu.report(0)?, 0);
        vm.destroy()?;
    }
    until_done(Function::HostReset, &[], 1000)?;
    Ok(())
}
test!(forged, "T12");

/// The guest finds in its page what it left there, wherever the host has had it.
fn sealed_and_back() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(two_words(), [FREE, 0, 0, 0])?;
    let mut page = vm.map(FREE)?;
    let mut seen = [(0, [0; 2]); 8];
    for round in 0..8 {
        expect!(vcpu.report(0)?, round);
        expect!(vcpu.report(8)?, 3 * round);
        vcpu.report(16)?;
        let tag = vm.take_back(FREE)?;
        ensure!(is_sealed(page), "round {round}: not sealed");
        let other = take(1);
        copy(page, other);
        let kept = take(1);
        copy(page, kept);
        seen[usize::from(round.to_le_bytes()[0])] = (kept, tag);
        clear(page);
        page = other;
        expect!(vcpu.expect(ExitClass::Fault)?.ipa, FREE);
        vm.give(FREE, page, tag)?;
    }
    // Never the same twice.
    for (i, (a, tag)) in seen.iter().enumerate() {
        for (b, other) in &seen[i + 1..] {
            ensure!(tag != other, "a tag twice");
            ensure!((0..4096).step_by(8).all(|w| read(a + w) != read(b + w)), "a word twice");
        }
    }
    vm.destroy()
}
test!(sealed_and_back, "T12");

/// Reset: all private pages come back wiped, the launch is open, the handle,
/// vCPUs, RAM and pool stay. Twice is once.
fn reset() -> Outcome {
    let start = host(Function::Stats, &[])?;
    let (vm, vcpu) = Vm::launch(nothing(), [0; 4])?;
    let mut pages = [0; 70];
    for (i, page) in (0..).zip(&mut pages) {
        *page = vm.map(FREE + i * 4096)?;
    }
    expect!(host(Function::VmReset, &[vm.handle]), Err(AGAIN));
    // Half done: nothing else is possible.
    expect!(vm.call(Function::VcpuRun, &[vcpu.idx]), Err(STATE));
    expect!(vm.call(Function::PageMap, &[FREE, take(1), 4096]), Err(STATE));
    // But what the host can't do without.
    vm.take_back(FREE + 69 * 4096)?;
    ensure!(is_sealed(pages[69]), "not sealed");
    clear(pages[69]);
    expect!(vm.call(Function::VmActivate, &[]), Err(STATE));
    expect!(vm.call(Function::VmPopulate, &[RAM, take(1)]), Err(STATE));
    expect!(vm.call(Function::VmAddRam, &[0, 4096]), Err(STATE));
    expect!(vm.call(Function::PoolDonate, &[take(1), 1]), Err(STATE));
    expect!(vm.call(Function::VcpuCreate, &[1, take(1)]), Err(STATE));
    expect!(vm.call(Function::VcpuSetBoot, &[0, RAM]), Err(STATE));
    until_done(Function::VmReset, &[vm.handle], 1000)?;
    for page in pages {
        ensure!(is_zero(page), "{page:#x} is not wiped");
        clear(page);
    }
    let after = host(Function::Stats, &[])?;
    expect!(after, [1, 2, 0, start[3] + 8]);
    until_done(Function::VmReset, &[vm.handle], 10)?;
    expect!(host(Function::Stats, &[])?, after);
    expect!(vm.call(Function::VcpuRun, &[0]), Err(STATE));
    // Boot contexts are gone with the launch.
    expect!(vm.call(Function::VmActivate, &[]), Err(STATE));
    vm.boot(nothing(), [0; 4])?;
    let mut vcpu = vcpu;
    vcpu.end()?;
    vm.destroy()?;
    expect!(host(Function::Stats, &[])?, start);
    Ok(())
}
test!(reset, "T24");

/// While a destroy is under way the VM can do nothing; then its handle is dead.
fn destroy_in_steps() -> Outcome {
    let start = host(Function::Stats, &[])?;
    let (vm, vcpu) = Vm::launch(nothing(), [0; 4])?;
    for i in 0..70 {
        vm.map(FREE + i * 4096)?;
    }
    expect!(host(Function::VmDestroy, &[vm.handle]), Err(AGAIN));
    expect!(vm.call(Function::VcpuRun, &[0]), Err(STATE));
    expect!(vm.call(Function::VmReset, &[]), Err(STATE));
    expect!(vm.call(Function::PageMap, &[FREE, take(1), 4096]), Err(STATE));
    vm.take_back(FREE + 69 * 4096)?;
    expect!(vm.call(Function::PoolDonate, &[take(1), 1]), Err(STATE));
    until_done(Function::VmDestroy, &[vm.handle], 100)?;
    expect!(host(Function::VmDestroy, &[vm.handle]), Err(INVALID));
    expect!(host(Function::Stats, &[])?, start);
    fill(vcpu.page, 3);
    Ok(())
}
test!(destroy_in_steps, "T22 T24");

fn twenty_rounds() -> Outcome {
    let start = host(Function::Stats, &[])?;
    for round in 0..20 {
        memory::restart();
        let (vm, mut vcpu) = Vm::launch(nothing(), [round; 4])?;
        for i in 0..20 {
            vm.map(FREE + i * 0x10_000)?;
        }
        vcpu.end()?;
        vm.destroy()?;
        expect!(host(Function::Stats, &[])?, start);
    }
    Ok(())
}
test!(twenty_rounds, "T24 T25");

/// Every page that is tried as VM memory, over all of a small range around the
/// carve-out's end, is taken only if it is the host's.
fn carveout_edge() -> Outcome {
    let (vm, _) = Vm::launch(nothing(), [0; 4])?;
    let edge = RAM_BASE + havmsi_abi::layout::carveout_size(memory::RAM_SIZE);
    for n in 0..512 {
        let at = edge - 4096 * (n + 1);
        expect!(vm.call(Function::PageMap, &[FREE, at, 4096]), Err(DENIED));
    }
    // The first page behind it is the host's (it holds no device tree here).
    let old = read(edge);
    vm.call(Function::PageMap, &[FREE, edge, 4096])?;
    vm.call(Function::PageUnmap, &[FREE, 1])?;
    memory::write(edge, old);
    vm.destroy()
}
test!(carveout_edge, "T05 T26");
