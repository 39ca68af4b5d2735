// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random calls, and what may be answered to each.

use havmsi_abi::layout::{carveout, carveout_size};
use havmsi_abi::{AUDIT_CALL, Error, FUNCTION_BASE, Function, MAX_PAGES_PER_CALL, PAGE_SIZE, UID};

use super::world::{self, any_of};
use super::{Cpu, call, host, index, power, shared, solo};
use crate::guest::RAM;
use crate::harness::{Failure, Outcome};
use crate::memory::{RAM_BASE, RAM_SIZE};
use crate::smc::{Refusal, psci};
use crate::{ensure, gic};

/// The errors that a call may give, as `docs/abi.md` has them.
const fn errors(function: Function) -> &'static [Error] {
    use Error::{Again, Busy, Denied, Integrity, Invalid, NoMemory, State};
    match function {
        Function::Version | Function::CpuInfo | Function::Stats => &[],
        Function::HostReset => &[Again, Busy],
        Function::TimerLoad => &[Invalid],
        Function::VmCreate => &[Invalid, NoMemory],
        Function::VmAddRam => &[Invalid, State, Integrity, NoMemory],
        Function::VcpuCreate | Function::VmPopulate | Function::PageMap => {
            &[Invalid, State, Integrity, Denied, Again, NoMemory]
        }
        Function::VcpuSetBoot | Function::VmActivate => &[Invalid, State, Integrity],
        Function::PageUnmap => &[Invalid],
        Function::VcpuRun => &[Invalid, State, Integrity, Busy],
        Function::MapDev => &[Invalid, Denied, State, Integrity, NoMemory],
        Function::PoolDonate => &[Invalid, State, Integrity, Denied, Again],
        Function::VmReset | Function::VmDestroy => &[Invalid, State, Busy, Again],
    }
}

type Answer = Result<[u64; 4], Refusal>;

fn check(function: Function, answer: Answer) -> Outcome {
    let error = match answer {
        Ok(_) => return Ok(()),
        Err(Refusal::Error(error)) => Some(error),
        // Tables are two at most; 0 is for slots.
        Err(Refusal::Wanted(0..=2)) => Some(Error::NoMemory),
        Err(_) => None,
    };
    let known = error.is_some_and(|error| errors(function).contains(&error));
    ensure!(known, "{function:?} gives {answer:x?}");
    Ok(())
}

/// A call that may be accepted or refused.
pub fn checked(function: Function, args: &[u64]) -> Result<Answer, Failure> {
    if function == Function::VcpuRun {
        // A guest that does not end is ended.
        gic::alarm_in(10_000);
    }
    let answer = host(function, args);
    check(function, answer)?;
    Ok(answer)
}

/// A call that must be refused; it may not change any register but `x0` and `x1`.
fn refused(function: Function, args: [u64; 7]) -> Outcome {
    let mut x = [0; 8];
    x[0] = u64::from(function.id());
    x[1..].copy_from_slice(&args);
    if function == Function::VcpuRun {
        gic::alarm_in(10_000);
    }
    let result = call(x);
    let answer = crate::smc::check(result[0], result[1]).map(|()| [0; 4]);
    check(function, answer)?;
    ensure!(answer.is_err(), "{function:?} {args:x?} was accepted");
    let told = matches!(answer, Err(Refusal::Wanted(_))) || result[1] == 0;
    ensure!(told && result[2..] == x[2..], "{function:?} {args:x?} gives {result:x?}");
    Ok(())
}

/// An address that no call takes for a page of the host's: whatever the VM.
fn hostile_page(cpu: &mut Cpu) -> u64 {
    let r = &mut cpu.random;
    let common = world::common(r.below(world::COMMON));
    match r.below(20) {
        0 => RAM_BASE + r.below(carveout_size(RAM_SIZE) / PAGE_SIZE) * PAGE_SIZE,
        1 => {
            let places = [
                carveout::EL2_VECTORS,
                carveout::ZERO_FRAME,
                carveout::HOST_ROOT,
                carveout::DEVICE_TABLES,
                carveout::LEVEL2_TABLES,
                carveout::VM_ROOTS,
                carveout::LEVEL3_TABLES,
            ];
            RAM_BASE + r.pick(&places)
        }
        // Secure RAM, flash, devices.
        2 => 0x0e00_0000 + r.below(4096) * PAGE_SIZE,
        3 => r.pick(&[0, 0x0400_0000, 0x0800_0000, 0x0801_0000, 0x0804_0000, 0x080a_0000]),
        4 => r.pick(&[0x0900_0000, 0x0902_0000, 0x0904_0000, 0x0905_0000, 0x0a00_0000]),
        5 => RAM_BASE + RAM_SIZE + r.below(4) * PAGE_SIZE,
        6 => RAM_BASE - PAGE_SIZE,
        // Not a page; aliases; what overflows.
        7 => common + 1 + r.below(PAGE_SIZE - 1),
        8 => common | 1 << (32 + r.below(32)),
        9 => u64::MAX - r.below(4) * PAGE_SIZE - (PAGE_SIZE - 1),
        10 => common.wrapping_neg() & !(PAGE_SIZE - 1),
        // The memory, tables and run pages of a victim.
        11..15 => world::fence(r.below(world::ROWS)),
        _ => {
            let of = index(r.below(cpu.cpus as u64));
            world::private(of, r.pick(&solo::TAKEN))
        }
    }
}

/// A page that a call may take.
fn page(cpu: &mut Cpu) -> u64 {
    world::any_common(&mut cpu.random)
}

fn any_page(cpu: &mut Cpu) -> u64 {
    match cpu.random.below(8) {
        0 => hostile_page(cpu),
        1 => world::run_page(cpu.random.below(world::RUN)),
        _ => page(cpu),
    }
}

fn any_ipa(cpu: &mut Cpu) -> u64 {
    let good = shared::ipa(cpu);
    match cpu.random.below(24) {
        0 => good + 1 + cpu.random.below(PAGE_SIZE - 1),
        1 => good | 1 << (32 + cpu.random.below(32)),
        2 => u64::MAX - (PAGE_SIZE - 1),
        3 => cpu.random.below(16) * PAGE_SIZE,
        4 => 0x0801_0000 + cpu.random.below(4) * PAGE_SIZE,
        _ => good,
    }
}

/// A count or size, mostly small.
fn any_count(cpu: &mut Cpu) -> u64 {
    let small = cpu.random.below(4);
    let odd = [0, 31, 32, 33, 64, 512, 1 << 20, 1 << 32, 1 << 52, 1 << 63, u64::MAX];
    if cpu.random.once_in(4) { cpu.random.pick(&odd) } else { small }
}

/// A handle that names no VM, whatever happens.
fn bad_handle(cpu: &mut Cpu) -> u64 {
    let known = any_of(&world::SHARED, cpu.cpus, cpu.random.any());
    let other = any_of(&world::PROTECTED, cpu.cpus, cpu.random.any());
    let r = &mut cpu.random;
    match r.below(8) {
        // What it was before; 0 is none either.
        0..3 => r.pick(&[known.old(), other.old()]),
        3 => r.pick(&[0, 1, 2, 128, 129, 0xffff, 0x1_0000, 0x1_0081, u64::MAX]),
        4 => other.handle() | 1 << (48 + r.below(16)),
        5 => other.handle() | 1 << (8 + r.below(8)),
        6 => other.handle() & 0xffff,
        _ => other.handle() ^ 1 << 47,
    }
}

fn any_handle(cpu: &mut Cpu) -> u64 {
    let known = match cpu.random.below(8) {
        0 => return bad_handle(cpu),
        1 => &world::STRAY[index(cpu.random.below(16))],
        _ => any_of(&world::SHARED, cpu.cpus, cpu.random.any()),
    };
    known.handle()
}

/// A call with anything in its arguments, to any VM but the protected ones.
pub fn anything(cpu: &mut Cpu) -> Outcome {
    let vm = any_handle(cpu);
    let idx = cpu.random.pick(&[0, 0, 0, 1, 1, 2, 63, 64, 1 << 32, u64::MAX]);
    let (ipa, pa) = (any_ipa(cpu), any_page(cpu));
    let n = any_count(cpu);
    let (function, args) = match cpu.random.below(40) {
        0 => (Function::Version, [n, 0, 0, 0]),
        1 => (Function::CpuInfo, [n, 0, 0, 0]),
        2 => return create(cpu),
        3 => (Function::VmAddRam, [vm, ipa, cpu.random.pick(&[PAGE_SIZE, 1 << 21, n, n << 12]), 0]),
        4..6 => (Function::VcpuCreate, [vm, idx, world::run_page(cpu.random.below(world::RUN)), 0]),
        // Not a common page: the monitor would write to it.
        6 => (Function::VcpuCreate, [vm, idx, hostile_page(cpu), 0]),
        7 => (Function::VcpuSetBoot, [vm, idx, ipa, n]),
        8..11 => (Function::VmPopulate, [vm, ipa, pa, 0]),
        11 => (Function::VmActivate, [vm, 0, 0, 0]),
        12..16 => (Function::VcpuRun, [vm, idx, 0, 0]),
        16..18 => (Function::TimerLoad, [cpu.random.pick(&[0, vm]), 0, 0, 0]),
        18..24 => {
            let size = if cpu.random.once_in(8) { n } else { PAGE_SIZE };
            (Function::PageMap, [vm, ipa, pa, size])
        }
        24..28 => (Function::PageUnmap, [vm, ipa, n, 0]),
        28..30 => {
            let pa = if cpu.random.once_in(2) { 0x0804_0000 + (n & 1) * PAGE_SIZE } else { pa };
            (Function::MapDev, [vm, 0x0801_0000 + cpu.random.below(4) * PAGE_SIZE, pa, 0])
        }
        30..35 => (Function::PoolDonate, [vm, pa, n, 0]),
        35 => (Function::VmReset, [vm, 0, 0, 0]),
        36 => return destroy(vm),
        _ => (Function::Stats, [n, 0, 0, 0]),
    };
    let answer = checked(function, &args)?;
    if function == Function::VcpuRun && answer.is_ok_and(|r| r[0] == 0) {
        gic::take_pending();
    }
    if function == Function::Stats {
        // Others may be moving pages: no number is larger than all.
        ensure!(answer.is_ok_and(|r| r.iter().all(|n| *n <= RAM_SIZE / PAGE_SIZE)), "{answer:x?}");
    }
    Ok(())
}

fn create(cpu: &mut Cpu) -> Outcome {
    let vcpus = cpu.random.pick(&[1, 2, 64, 0, 65, u64::MAX]);
    let version = cpu.random.pick(&[0, gic::version(), gic::version(), 2, 3, 4, u64::MAX]);
    let bits = cpu.random.pick(&[32, 36, 40, 40, 31, 41, 0, 64, u64::MAX]);
    let good = (1..=64).contains(&vcpus)
        && (version == 0 || version == gic::version())
        && (32..=40).contains(&bits);
    let answer = checked(Function::VmCreate, &[vcpus, version, bits])?;
    ensure!(good || answer.is_err(), "VM_CREATE {vcpus} {version} {bits} was accepted");
    if let Ok([handle, ..]) = answer {
        let place = &world::STRAY[index(cpu.random.below(16))];
        let before = place.handle();
        place.set(handle);
        if before != 0 && !cpu.greedy {
            destroy(before)?;
        }
    }
    Ok(())
}

fn destroy(vm: u64) -> Outcome {
    if checked(Function::VmDestroy, &[vm])?.is_ok() {
        let all = world::SHARED.iter().flatten().chain(&world::STRAY);
        all.for_each(|known| known.clear(vm));
    }
    Ok(())
}

/// A call to a protected VM, or with what is a victim's: it must be refused.
pub fn attack(cpu: &mut Cpu) -> Outcome {
    let victim = cpu.random.once_in(2);
    let of = index(cpu.random.below(cpu.cpus as u64));
    let target = world::PROTECTED[of][usize::from(!victim)].handle();
    let hostile = hostile_page(cpu);
    let (ipa, n) = (any_ipa(cpu), any_count(cpu));
    let unaligned = ipa | (1 + cpu.random.below(PAGE_SIZE - 1));
    // No VM like these has any RAM below.
    let low = cpu.random.below(RAM / PAGE_SIZE) * PAGE_SIZE;
    let too_many = n.max(MAX_PAGES_PER_CALL + 1);
    // A range that starts in a row and ends behind its fence.
    let start = cpu.random.below(world::COMMON);
    let over = world::ROW - start % world::ROW + 1;
    let across = (world::common(start), over + cpu.random.below(8));
    let vm = any_handle(cpu);
    // Off at most, and beyond what there is.
    let no_vcpu = cpu.random.pick(&[1, 2, 63, 64, 65, 128, 256, 1 << 32, 1 << 63, u64::MAX]);
    let either = if cpu.random.once_in(2) { target } else { vm };
    let (function, [a, b, c, d]) = match cpu.random.below(26) {
        0 => (Function::VmAddRam, [either, unaligned, PAGE_SIZE, 0]),
        1 => (Function::VmAddRam, [either, low, 1 << (41 + n % 23), 0]),
        2 => (Function::VcpuCreate, [target, n, hostile, 0]),
        3 => (Function::VcpuCreate, [target, no_vcpu.max(2), page(cpu), 0]),
        4 => (Function::VcpuSetBoot, [target, no_vcpu.max(2), RAM, 0]),
        5 => (Function::VmPopulate, [target, ipa, hostile, 0]),
        6 => (Function::VmPopulate, [target, low, page(cpu), 0]),
        7 => (Function::PageMap, [target, ipa, hostile, PAGE_SIZE]),
        8 => (Function::PageMap, [target, low, page(cpu), PAGE_SIZE]),
        9 => (Function::PageMap, [target, ipa, page(cpu), n + (n == PAGE_SIZE) as u64]),
        10 => (Function::PageUnmap, [target, unaligned, n, 0]),
        11 => (Function::PageUnmap, [target, ipa, too_many, 0]),
        12 => {
            let ipa = if cpu.random.once_in(2) { low } else { ipa };
            (Function::MapDev, [either, ipa, hostile & !0x1000 | 0x2000, 0])
        }
        13 => (Function::PoolDonate, [target, hostile, 1 + n % 32, 0]),
        14 => (Function::PoolDonate, [target, across.0, across.1, 0]),
        15 => (Function::VcpuRun, [target, no_vcpu, 0, 0]),
        // With what is a victim's, to another VM.
        16 => (Function::PageMap, [vm, ipa, hostile, PAGE_SIZE]),
        17 => (Function::VmPopulate, [vm, ipa, hostile, 0]),
        18 => (Function::VcpuCreate, [vm, n, hostile, 0]),
        19 => (Function::PoolDonate, [vm, hostile, 1 + n % 32, 0]),
        20 => (Function::PoolDonate, [vm, across.0, across.1, 0]),
        24 => (Function::TimerLoad, [bad_handle(cpu).max(1), 0, 0, 0]),
        // Where a victim has memory.
        23 => (Function::MapDev, [target, RAM + n % 16 * PAGE_SIZE, 0x0804_0000, 0]),
        // A victim alone: the solo VM may be open.
        21 if victim => (Function::VmActivate, [target, 0, 0, 0]),
        22 if victim => (Function::VcpuSetBoot, [target, 0, RAM, 0]),
        _ => {
            let all = [
                Function::VmAddRam,
                Function::VcpuCreate,
                Function::VcpuSetBoot,
                Function::VmPopulate,
                Function::VmActivate,
                Function::VcpuRun,
                Function::PageMap,
                Function::PageUnmap,
                Function::MapDev,
                Function::PoolDonate,
                Function::VmReset,
                Function::VmDestroy,
            ];
            (cpu.random.pick(&all), [bad_handle(cpu), ipa, page(cpu), PAGE_SIZE])
        }
    };
    refused(function, [a, b, c, d, cpu.random.any() >> 1, cpu.random.any() >> 1, n])
}

/// A call of the firmware's.
pub fn psci(cpu: &mut Cpu) -> Outcome {
    let r = &mut cpu.random;
    let target = index(r.below(cpu.cpus as u64));
    let [affinity, entry, place] = power::wake_arguments(target);
    let junk = r.any() >> 1;
    let bad_affinity = r.pick(&[cpu.cpus as u64, 8, 0xff, 0x100, 1 << 32, 1 << 40 | affinity]);
    let narrow = if r.once_in(3) { 1 << 30 } else { 0 };
    let (x, allowed): ([u64; 4], &[i64]) = match r.below(24) {
        0 => ([psci::VERSION, junk, 0, 0], &[0x1_0001]),
        1 => ([psci::SMCCC_VERSION, junk, 0, 0], &[0x1_0002]),
        2 => ([psci::MIGRATE_INFO_TYPE, junk, 0, 0], &[2]),
        3 => ([psci::FEATURES, r.pick(&[psci::VERSION, psci::CPU_ON_64]), 0, 0], &[0]),
        4 => ([psci::FEATURES, junk, 0, 0], &[-1, 0]),
        5 => ([psci::SMCCC_ARCH_FEATURES, 0x8000_0000, 0, 0], &[0]),
        6 => ([psci::SMCCC_ARCH_FEATURES, junk, 0, 0], &[-1, 0, 1]),
        7..10 => ([psci::AFFINITY_INFO_64 & !narrow, affinity, 0, 0], &[0, 1, 2]),
        10 => ([psci::AFFINITY_INFO_64 & !narrow, affinity, 1 + junk % 8, 0], &[-2]),
        11 => ([psci::AFFINITY_INFO_64, bad_affinity, 0, 0], &[-2]),
        12..17 => ([psci::CPU_ON_64, affinity, entry, place], &[0, -4, -5]),
        17 => ([psci::CPU_ON_64, bad_affinity, entry, place], &[-2]),
        18..21 => {
            let bad = match r.below(3) {
                0 => world::fence(r.below(world::ROWS)),
                1 => r.pick(&[RAM_BASE, 0x0e00_0000, 0x0900_0000, 0, RAM_BASE + RAM_SIZE, 1 << 45]),
                _ => entry + 1 + r.below(3),
            };
            ([psci::CPU_ON_64, affinity, bad, place], &[-9])
        }
        21 => {
            gic::alarm_in(1000);
            ([psci::CPU_SUSPEND_64 & !narrow, junk, entry, place], &[0])
        }
        22 => ([0x8200_ff01, junk, 0, 0], &[UID[0] as i64]),
        _ => {
            if cpu.number != 0 {
                let result = power::off_and_on(cpu);
                ensure!(result == 1, "CPU_OFF gives {result:#x}");
            }
            return Ok(());
        }
    };
    let result = call([x[0], x[1], x[2], x[3], 4, 5, 6, 7]);
    let answer = result[0].cast_signed();
    ensure!(allowed.contains(&answer), "{x:x?} gives {answer:#x}");
    if x[0] != 0x8200_ff01 {
        ensure!(result[1..4] == x[1..] && result[4..] == [4, 5, 6, 7], "{x:x?} gives {result:x?}");
    }
    Ok(())
}

/// A call of no function.
pub fn unknown(cpu: &mut Cpu) -> Outcome {
    let r = &mut cpu.random;
    let low = r.below(32);
    let id = match r.below(8) {
        // The host's calls as SMC32, yielding, of another owner.
        0 => u64::from(FUNCTION_BASE) - (1 << 30) + low,
        1 => u64::from(FUNCTION_BASE) - (1 << 31) + low,
        2 => u64::from(FUNCTION_BASE) + (r.below(64) << 24) + low,
        3 => u64::from(FUNCTION_BASE) + Function::ALL.len() as u64 + low,
        4 => 0x8400_0000 + r.below(0x100),
        5 => 0xc400_0000 + r.below(0x100),
        6 => r.pick(&[0x8000_0000, 0x8000_3fff, 0x8600_ff01, 0xb200_0000, 0x3200_0000]) + low,
        _ => r.any() & 0xffff_ffff,
    };
    let ends_the_machine = matches!(id, psci::SYSTEM_OFF | psci::SYSTEM_RESET);
    if ends_the_machine || id == u64::from(AUDIT_CALL) || !world::is_unknown(id) {
        return Ok(());
    }
    // Of the identifier 32 bits count.
    let x0 = id | if r.once_in(2) { 0 } else { r.any() << 32 };
    let x = [x0, page(cpu), RAM, cpu.random.any() >> 1, 4, 5, 6, 7];
    let result = call(x);
    let unknown = Error::NotSupported.code().cast_unsigned();
    ensure!(result[0] == unknown && result[2..] == x[2..], "{x:x?} gives {result:x?}");
    Ok(())
}
