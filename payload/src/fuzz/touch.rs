// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host does without a call: loads and stores where a VM's memory or
//! the monitor's is, registers, and run pages that others use just now.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::layout::carveout_size;
use havmsi_abi::{Function, PAGE_SIZE};

use super::calls::checked;
use super::guests::STORED;
use super::world::{self, ACCESSES, HAMMERED, LAST_WORD, any_of};
use super::{Cpu, index, is_magic, solo};
use crate::cpu::MAX_CPUS;
use crate::gic::{self, redistributor};
use crate::guest::RAM;
use crate::harness::Outcome;
use crate::memory::{self, RAM_BASE, RAM_SIZE};
use crate::tests::registers::get_fp;
use crate::{ensure, exception, expect, guest_program, mrs, msr, try_instruction};

/// Registers that are the same at all times.
const REGISTERS: usize = 10;
/// Words of the redistributor's first page that are read.
const WORDS: usize = 64;
static SEEN: [[AtomicU64; REGISTERS + WORDS]; MAX_CPUS] =
    [const { [const { AtomicU64::new(0) }; REGISTERS + WORDS] }; MAX_CPUS];

fn registers() -> [u64; REGISTERS] {
    [
        mrs!("midr_el1"),
        mrs!("mpidr_el1"),
        mrs!("S3_0_C0_C4_0"),
        mrs!("S3_0_C0_C4_1"),
        mrs!("S3_0_C0_C5_0"),
        mrs!("S3_0_C0_C6_0"),
        mrs!("S3_0_C0_C6_1"),
        mrs!("S3_0_C0_C7_0"),
        mrs!("S3_0_C0_C7_1"),
        mrs!("S3_0_C0_C7_2"),
    ]
}

fn frame_word(cpu: &Cpu, i: usize) -> u64 {
    if gic::version() == 3 {
        u64::from(memory::read32(redistributor(cpu.number as u64) + 4 * i as u64))
    } else {
        0
    }
}

/// Before anything happened: what the CPU's registers hold.
pub fn remember(cpu: &Cpu) {
    open_fp();
    let frame = (0..WORDS).map(|i| frame_word(cpu, i));
    for (place, value) in SEEN[cpu.number].iter().zip(registers().into_iter().chain(frame)) {
        place.store(value, Ordering::Relaxed);
    }
}

/// FP registers don't trap.
pub fn open_fp() {
    msr!("cpacr_el1", 0x30_0000);
}

/// No register of this CPU's holds what a guest had in it.
pub fn no_guests_fp() -> Outcome {
    let left = get_fp().into_iter().find(|word| is_magic(*word));
    ensure!(left.is_none(), "a V register holds {left:x?}");
    Ok(())
}

/// They still hold it.
pub fn compare(cpu: &Cpu) -> Outcome {
    no_guests_fp()?;
    let frame = (0..WORDS).map(|i| frame_word(cpu, i));
    let now = registers().into_iter().chain(frame);
    for (i, (place, value)) in SEEN[cpu.number].iter().zip(now).enumerate() {
        let was = place.load(Ordering::Relaxed);
        ensure!(value == was, "register {i} was {was:#x} and is {value:#x}");
    }
    Ok(())
}

/// Loads and stores of any kind abort.
fn out_of_reach(cpu: &mut Cpu, at: u64) -> Outcome {
    let load = memory::peek(at).err();
    ensure!(load.is_some_and(|f| f.is_external_abort(at, false)), "load of {at:#x}: {load:x?}");
    cannot_write(cpu, at)
}

fn cannot_write(cpu: &mut Cpu, at: u64) -> Outcome {
    let value = cpu.random.any() >> 1;
    let (at, fault) = match cpu.random.below(4) {
        0 => (at + 4, memory::poke32(at + 4, value).err()),
        1 => (at + 7, memory::poke8(at + 7, value).err()),
        _ => (at, memory::poke(at, value).err()),
    };
    ensure!(fault.is_some_and(|f| f.is_external_abort(at, true)), "store to {at:#x}: {fault:x?}");
    Ok(())
}

/// A victim's memory, tables and run pages that are not lent: zeros to read.
fn victims_page(cpu: &mut Cpu) -> u64 {
    let of = index(cpu.random.below(cpu.cpus as u64));
    // Without the run pages, which stay the host's.
    let taken = &solo::TAKEN[..solo::TAKEN.len() - 2];
    if cpu.random.once_in(2) {
        world::fence(cpu.random.below(world::ROWS))
    } else {
        world::private(of, cpu.random.pick(taken))
    }
}

guest_program!(raw fuzz_at_el0,
    "movz x0, #0xc200, lsl #16",
    "smc #0",
    "svc #0",
);

/// An access.
pub fn anything(cpu: &mut Cpu) -> Outcome {
    ACCESSES[cpu.number].fetch_add(1, Ordering::Relaxed);
    let offset = cpu.random.below(PAGE_SIZE / 8) * 8;
    match cpu.random.below(24) {
        0..4 => {
            let at = victims_page(cpu) + offset;
            let seen = memory::peek(at);
            ensure!(seen == Ok(0), "{at:#x} of a victim: {seen:x?}");
            cannot_write(cpu, at)
        }
        4..8 => {
            // Whosever it is now: as the host wrote it, nothing, or sealed.
            let at = world::common(cpu.random.below(world::COMMON)) + offset;
            let seen = memory::peek(at)?;
            ensure!(!is_magic(seen), "{at:#x} holds a guest's {seen:#x}");
            Ok(())
        }
        8 => {
            let carveout = cpu.random.below(carveout_size(RAM_SIZE) / PAGE_SIZE);
            out_of_reach(cpu, RAM_BASE + carveout * PAGE_SIZE + offset)
        }
        9 => {
            let places = [0, 0x0400_0000, 0x0802_0000, 0x0902_0000, 0x0904_0000, 0x0a00_0000];
            let at = match cpu.random.below(3) {
                0 => 0x0e00_0000 + cpu.random.below(16 << 20) / 8 * 8,
                1 => RAM_BASE + RAM_SIZE + cpu.random.below(1 << 30) / 8 * 8,
                _ => cpu.random.pick(&places) + offset,
            };
            out_of_reach(cpu, at)
        }
        10 => compare(cpu),
        11 => {
            if gic::version() == 3 {
                let of = cpu.random.below(cpu.cpus as u64);
                let word = u32::try_from(cpu.random.any() >> 32).unwrap_or(0);
                memory::write32(redistributor(of) + offset, word);
                memory::poke(redistributor(of) + offset, cpu.random.any() >> 1)?;
            }
            Ok(())
        }
        12 => {
            let fault = match cpu.random.below(4) {
                0 => try_instruction!("hvc #0"),
                1 => try_instruction!("mrs x9, hcr_el2"),
                2 => try_instruction!("msr vttbr_el2, x9"),
                _ => try_instruction!("mrs x9, S3_6_C1_C1_0"),
            };
            ensure!(fault.is_some_and(|f| f.is_undefined()), "of another level: {fault:x?}");
            Ok(())
        }
        13 => {
            let fault = exception::at_el0(fuzz_at_el0());
            expect!(fault.map(|f| (f.class(), f.vector)), Some((0, 8)));
            Ok(())
        }
        14..17 => {
            // A page that its CPU gives away again and again.
            let of = index(cpu.random.below(cpu.cpus as u64));
            let at = world::private(of, HAMMERED) + LAST_WORD;
            for _ in 0..16 {
                if memory::peek(at).is_ok_and(is_magic) {
                    ensure!(false, "{at:#x} shows a guest's memory");
                }
                // An abort, if it is a VM's now.
                let _ = memory::poke(at, cpu.random.any() >> 1);
            }
            Ok(())
        }
        17 => strip(cpu),
        _ => {
            scribble(cpu);
            Ok(())
        }
    }
}

/// Takes the pages from a VM that its guest writes to, perhaps just now: nothing
/// of it arrives any more.
fn strip(cpu: &mut Cpu) -> Outcome {
    let vm = any_of(&world::SHARED, cpu.cpus, cpu.random.any()).handle();
    let _ = checked(Function::PageUnmap, &[vm, RAM + 2 * PAGE_SIZE, 14])?;
    for i in 0..world::COMMON {
        let at = world::common(i) + STORED;
        ensure!(!memory::peek(at).is_ok_and(is_magic), "{at:#x} is the host's, and a guest writes");
    }
    Ok(())
}

/// Writes into a run page that another CPU may be running a vCPU with: a word
/// or two again and again, so that it changes while the monitor reads.
fn scribble(cpu: &mut Cpu) {
    let page = world::run_page(cpu.random.below(world::RUN));
    let random = &mut cpu.random;
    let mut pair = |word: u64| match word {
        0 => (0, random.pick(&[1, 2, 4, 8, 9, 3, 7, 31, 32, u64::MAX])),
        7 => (random.pick(&[0, 1]), random.pick(&[2, 4, 5, 16, 17, 64, u64::MAX])),
        _ => (random.any() >> 33, random.any() >> 1),
    };
    let (flags, count) = (pair(0), pair(7));
    let other = pair(1).0 % 24;
    let values = pair(1);
    // It may be somebody's memory by now.
    let _ = exception::catch(|| {
        for _ in 0..100 {
            memory::write(page, flags.0);
            memory::write(page + 8 * 7, count.0);
            memory::write(page + 8 * other, values.0);
            memory::write(page, flags.1);
            memory::write(page + 8 * 7, count.1);
            memory::write(page + 8 * other, if is_magic(values.1) { 0 } else { values.1 });
        }
        memory::write(page, flags.0);
        memory::write(page + 8 * 7, count.0);
    });
}
