// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest shares with the host, takes back, and where it has devices: the
//! calls of KVM that Linux makes as a protected guest.

use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{ExitClass, Function};

use super::smp::{GO, HANDLE, PAGE};
use crate::cpu::STOP;
use crate::guest::{Exit, FREE, IPA_BITS, PORT, RAM, RAM_SIZE, Vcpu, Vm};
use crate::harness::{Failure, Outcome, several_cpus};
use crate::memory::{self, is_sealed, is_zero, peek, poke, read, take, write};
use crate::pci::{Edu, SIZE};
use crate::smc::{BUSY, DENIED, STATE, host, psci, until_done};
use crate::{cpu, ensure, expect, gic, guest_program, test};

const UID: u64 = 0x8600_ff01;
const FEATURES: u64 = 0x8600_0000;
const MEMINFO: u64 = 0xc600_0002;
pub(crate) const SHARE: u64 = 0xc600_0003;
pub(crate) const UNSHARE: u64 = 0xc600_0004;
pub(crate) const GUARD: u64 = 0xc600_0007;
/// SMCCC's.
const INVALID_PARAMETER: u64 = (-3_i64).cast_unsigned();
const SECRET: u64 = 0x5ec2_e70f_0a5e_c2e7;
const WNR: u64 = 1 << 6;

/// What the guest is told to do.
const CALL: u64 = 0;
pub const LOAD: u64 = 1;
const STORE: u64 = 2;
pub const REPORT: u64 = 0x350;

// Does what the host tells it to do, with x0 to x3, and reports x0.
guest_program!(
    steps,
    "1: ldr x5, [x20, #0x340]",
    "ldr x0, [x20, #0x300]",
    "ldr x1, [x20, #0x308]",
    "ldr x2, [x20, #0x310]",
    "ldr x3, [x20, #0x318]",
    "cmp x5, #1",
    "b.eq 2f",
    "b.hi 3f",
    "hvc #0",
    "b 4f",
    "2: ldr x0, [x1]",
    "b 4f",
    "3: str x2, [x1]",
    "4: str x0, [x20, #0x350]",
    "b 1b"
);

/// A guest that does what it is told.
pub(crate) struct Guest {
    /// Its VM.
    pub vm: Vm,
    /// Its vCPU.
    pub vcpu: Vcpu,
}

impl Guest {
    /// Launches it.
    #[track_caller]
    pub fn new() -> Result<Self, Failure> {
        let (vm, vcpu) = Vm::launch(steps(), [0; 4])?;
        Ok(Self { vm, vcpu })
    }

    /// Tells it what to do; it has not yet done it.
    #[track_caller]
    pub fn tell(&mut self, what: u64, x: [u64; 4]) -> Outcome {
        for value in [what, x[0], x[1], x[2], x[3]] {
            self.vcpu.expect(ExitClass::MmioRead)?;
            self.vcpu.complete(value);
        }
        Ok(())
    }

    /// Its call of `function` about `ipa`, which no host hears of.
    #[track_caller]
    pub fn call(&mut self, function: u64, ipa: u64) -> Result<u64, Failure> {
        self.tell(CALL, [function, ipa, 0, 0])?;
        self.vcpu.report(REPORT)
    }

    /// Its call of UNSHARE, up to what the host hears of it.
    #[track_caller]
    pub fn ask(&mut self, ipa: u64) -> Outcome {
        self.tell(CALL, [UNSHARE, ipa, 0, 0])?;
        self.asked(ipa)
    }

    #[track_caller]
    fn asked(&mut self, ipa: u64) -> Outcome {
        let want = Exit {
            class: ExitClass::Hvc,
            esr: 0x16 << 26 | 1 << 25,
            gpr: [UNSHARE, ipa, 0, 0],
            mode: 1,
            ..Exit::default()
        };
        expect!(self.vcpu.run()?, want);
        Ok(())
    }

    /// What becomes of it if the host agrees.
    #[track_caller]
    pub fn agree(&mut self) -> Result<u64, Failure> {
        self.vcpu.answer([0, 1, 2, 3]);
        self.vcpu.report(REPORT)
    }

    /// What it reads.
    #[track_caller]
    pub fn load(&mut self, ipa: u64) -> Result<u64, Failure> {
        self.tell(LOAD, [0, ipa, 0, 0])?;
        self.vcpu.report(REPORT)
    }

    /// It writes.
    #[track_caller]
    pub fn store(&mut self, ipa: u64, value: u64) -> Outcome {
        self.tell(STORE, [0, ipa, value, 0])?;
        self.vcpu.report(REPORT)?;
        Ok(())
    }
}

fn discovery() -> Outcome {
    let mut guest = Guest::new()?;
    expect!(guest.call(UID, 0)?, 0xb66f_b428);
    expect!(guest.call(FEATURES, 0)?, 0x9d);
    expect!(guest.call(MEMINFO, 0)?, 4096);
    // Not for time, not by 32 bits, not what Android calls.
    for function in [0x8600_0001, 0x8600_0003, 0xc600_0005, 0xc600_0006, 0xc600_0008, 0xc600_0009] {
        expect!(guest.call(function, 0)?, psci::NOT_SUPPORTED);
    }
    for function in [MEMINFO, SHARE, UNSHARE, GUARD] {
        for x in [[1, 0], [0, 1], [1 << 63, 0]] {
            guest.tell(CALL, [function, PORT, x[0], x[1]])?;
            expect!(guest.vcpu.report(REPORT)?, INVALID_PARAMETER);
        }
    }
    expect!(guest.call(MEMINFO, FREE)?, INVALID_PARAMETER);
    guest.vm.destroy()
}
test!(discovery, "T23");

fn the_host_reads_and_writes(guest: &mut Guest, ipa: u64, page: u64) -> Outcome {
    for n in 1..4 {
        guest.store(ipa, SECRET ^ n)?;
        expect!(peek(page)?, SECRET ^ n);
        poke(page + 8, n)?;
        expect!(guest.load(ipa + 8)?, n);
    }
    Ok(())
}

fn hidden(page: u64) -> Outcome {
    expect!(peek(page)?, 0);
    ensure!(poke(page, 1).is_err(), "the host writes to {page:#x}");
    Ok(())
}

/// A page is shared with what is in it; the host may use it and not give it away.
/// It is the guest's alone again once the host agrees.
fn there_and_back() -> Outcome {
    let mut guest = Guest::new()?;
    let page = guest.vm.map(FREE)?;
    let other = guest.vm.map(FREE + 0x1000)?;
    guest.store(FREE, SECRET)?;
    hidden(page)?;
    for _ in 0..3 {
        expect!(guest.call(SHARE, FREE)?, 0);
        expect!(peek(page)?, guest.load(FREE)?);
        the_host_reads_and_writes(&mut guest, FREE, page)?;
        expect!(guest.call(SHARE, FREE)?, INVALID_PARAMETER);
        hidden(other)?;
        let vm = guest.vm;
        for ipa in [FREE + 0x2000, FREE] {
            expect!(vm.call(Function::PageMap, &[ipa, page, 4096]), Err(DENIED));
        }
        expect!(vm.call(Function::PoolDonate, &[page, 1]), Err(DENIED));
        let second = Vm::new(1)?;
        second.furnish(8)?;
        expect!(second.call(Function::VcpuCreate, &[0, page]), Err(DENIED));
        expect!(second.call(Function::VmPopulate, &[FREE, page]), Err(DENIED));
        second.destroy()?;

        // Not yet; no.
        guest.ask(FREE)?;
        the_page_is_still_shared(page)?;
        guest.asked(FREE)?;
        guest.vcpu.answer([psci::NOT_SUPPORTED, 0, 0, 0]);
        expect!(guest.vcpu.report(REPORT)?, psci::NOT_SUPPORTED);
        the_host_reads_and_writes(&mut guest, FREE, page)?;
        guest.ask(FREE)?;
        poke(page, 77)?;
        expect!(guest.agree()?, 0);
        hidden(page)?;
        expect!(guest.load(FREE)?, 77);
        guest.store(FREE, SECRET)?;
        hidden(page)?;
        // It is no longer.
        guest.ask(FREE)?;
        expect!(guest.agree()?, INVALID_PARAMETER);
        expect!(guest.load(FREE)?, SECRET);
    }
    guest.vm.destroy()
}
test!(there_and_back, "T23 T13");

fn the_page_is_still_shared(page: u64) -> Outcome {
    let was = peek(page + 16)?;
    poke(page + 16, was + 1)?;
    expect!(peek(page + 16)?, was + 1);
    Ok(())
}

/// What is no page of the guest's RAM can't be shared; one that is not there yet is
/// a fault, as if the guest had written there.
fn what_can_be_shared() -> Outcome {
    let mut guest = Guest::new()?;
    let end = RAM + RAM_SIZE;
    for ipa in [0, PORT, RAM - 0x1000, end, FREE + 8, FREE + 1, 1 << IPA_BITS, u64::MAX - 0xfff] {
        let answer = guest.call(SHARE, ipa)?;
        ensure!(answer == INVALID_PARAMETER, "MEM_SHARE of {ipa:#x}: {answer:#x}");
        guest.ask(ipa)?;
        let answer = guest.agree()?;
        ensure!(answer == INVALID_PARAMETER, "MEM_UNSHARE of {ipa:#x}: {answer:#x}");
    }
    // There is no page yet: the host may agree or not, the guest calls again.
    guest.ask(FREE)?;
    for _ in 0..3 {
        guest.vcpu.answer([0, 1, 2, 3]);
        expect!(guest.vcpu.run()?.class, ExitClass::Hvc);
    }
    guest.vcpu.answer([INVALID_PARAMETER, 0, 0, 0]);
    expect!(guest.vcpu.report(REPORT)?, INVALID_PARAMETER);
    let want = Exit {
        class: ExitClass::Fault,
        esr: 0x24 << 26 | 1 << 25 | WNR | 7,
        ipa: FREE,
        mode: 1,
        ..Exit::default()
    };
    guest.tell(CALL, [SHARE, FREE, 0, 0])?;
    for _ in 0..3 {
        expect!(guest.vcpu.run()?, want);
    }
    let page = guest.vm.map(FREE)?;
    expect!(guest.vcpu.report(REPORT)?, 0);
    expect!(peek(page)?, 0);
    the_host_reads_and_writes(&mut guest, FREE, page)?;
    // Taken away it is the host's, as it is; any page comes in its place, shared.
    let before = host(Function::Stats, &[])?;
    guest.vm.call(Function::PageUnmap, &[FREE, 1])?;
    expect!(host(Function::Stats, &[])?, before);
    poke(page, 1)?;
    guest.tell(CALL, [SHARE, FREE, 0, 0])?;
    expect!(guest.vcpu.run()?, want);
    let fresh = take(1);
    guest.vm.call(Function::PageMap, &[FREE, fresh, 4096])?;
    expect!(guest.vcpu.report(REPORT)?, INVALID_PARAMETER);
    the_host_reads_and_writes(&mut guest, FREE, fresh)?;
    guest.vm.destroy()
}
test!(what_can_be_shared, "T23 T05");

/// Shared pages are the host's again after a reset and after the end, and wiped.
fn after_its_life() -> Outcome {
    for end in [Function::VmReset, Function::VmDestroy] {
        let mut guest = Guest::new()?;
        let mut pages = [0; 40];
        for (i, page) in (0..).zip(&mut pages) {
            *page = guest.vm.map(FREE + i * 4096)?;
            guest.store(FREE + i * 4096, SECRET)?;
            if i % 3 != 0 {
                expect!(guest.call(SHARE, FREE + i * 4096)?, 0);
                expect!(peek(*page)?, SECRET);
            }
        }
        until_done(end, &[guest.vm.handle], 1000)?;
        for page in pages {
            ensure!(is_zero(page), "{page:#x} has content");
            poke(page, 1)?;
            expect!(read(page), 1);
        }
        if end == Function::VmReset {
            guest.vm.destroy()?;
        }
    }
    Ok(())
}
test!(after_its_life, "T24");

fn has_edu() -> bool {
    Edu::near().is_some()
}

/// What is shared devices reach too, and no longer once the host agreed. As long as it
/// does not, their transfers arrive.
fn devices() -> Outcome {
    let edu = Edu::near().ok_or(Failure::new(format_args!("no edu device")))?;
    let mut guest = Guest::new()?;
    let page = guest.vm.map(FREE)?;
    guest.store(FREE, SECRET)?;
    edu.load()?;
    let copy = edu.read(page)?;
    expect!(read(copy), 0);
    expect!(guest.call(SHARE, FREE)?, 0);
    let copy = edu.read(page)?;
    expect!(read(copy), SECRET);
    let origin = edu.load()?;
    edu.start_write(page);
    // Unshared while the transfer is under way: the host waits.
    guest.ask(FREE)?;
    edu.wait()?;
    let wrong = (0..SIZE).step_by(8).find(|at| read(page + at) != read(origin + at));
    expect!(wrong, None);
    guest.asked(FREE)?;
    expect!(guest.agree()?, 0);
    expect!(guest.load(FREE + 8)?, memory::PATTERN ^ (origin + 8));
    guest.store(FREE, SECRET)?;
    edu.write(page)?;
    expect!(guest.load(FREE)?, SECRET);
    let copy = edu.read(page)?;
    expect!(read(copy), 0);
    guest.vm.destroy()
}
test!(devices, "T14 T23", has_edu);

/// A guest that has said where its devices are has none elsewhere: an access there
/// is its own error, and the host hears nothing.
fn guarded_devices() -> Outcome {
    let mut guest = Guest::new()?;
    let other = PORT + 0x10_0000;
    let touch = |guest: &mut Guest, what, at| -> Result<Exit, Failure> {
        guest.tell(what, [0, at, SECRET, 0])?;
        guest.vcpu.run()
    };
    let exit = touch(&mut guest, STORE, other)?;
    expect!((exit.class, exit.ipa, exit.data), (ExitClass::MmioWrite, other, SECRET));
    guest.vcpu.report(REPORT)?;
    for ipa in [RAM, FREE, PORT + 8, RAM + RAM_SIZE - 0x1000, 1 << IPA_BITS, u64::MAX - 0xfff] {
        expect!(guest.call(GUARD, ipa)?, INVALID_PARAMETER);
    }
    // Nothing has changed so far.
    let exit = touch(&mut guest, LOAD, other)?;
    expect!((exit.class, exit.ipa), (ExitClass::MmioRead, other));
    guest.vcpu.complete(5);
    expect!(guest.vcpu.report(REPORT)?, 5);

    expect!(guest.call(GUARD, PORT)?, 0);
    for (what, wnr) in [(LOAD, 0), (STORE, WNR)] {
        for at in [other, PORT - 8, PORT + 0x1000, RAM - 8, RAM + RAM_SIZE] {
            guest.tell(what, [0, at, SECRET, 0])?;
            let fault = guest.vcpu.fault()?;
            ensure!(
                fault.is_external_abort() && fault.far == at && fault.esr & WNR == wnr,
                "{at:#x}: {fault:x?}"
            );
            guest.vcpu.report(REPORT)?;
        }
    }
    expect!(guest.call(GUARD, other)?, 0);
    let exit = touch(&mut guest, STORE, other + 0xff8)?;
    expect!((exit.class, exit.ipa, exit.data), (ExitClass::MmioWrite, other + 0xff8, SECRET));
    guest.vcpu.report(REPORT)?;
    // RAM is RAM.
    guest.tell(LOAD, [0, FREE, 0, 0])?;
    expect!(guest.vcpu.expect(ExitClass::Fault)?.ipa, FREE);
    guest.vm.map(FREE)?;
    expect!(guest.vcpu.report(REPORT)?, 0);
    // A region is one place, whatever its size; of those there is an end.
    for page in 0..512 {
        expect!(guest.call(GUARD, 0x1000_0000 + page * 4096)?, 0);
    }
    let refused = |guest: &mut Guest, n: u64| guest.call(GUARD, 0x2000_0000 + n * 0x2000);
    let mut places = 3;
    while refused(&mut guest, places)? == 0 {
        places += 1;
        ensure!(places < 1000, "no end of places");
    }
    ensure!(places >= 64, "no more than {places} places");
    guest.vm.destroy()
}
test!(guarded_devices, "T10 T23");

guest_program!(
    share_unshare,
    // Shares and unshares its page at FREE for ever; counts how often.
    "movz x19, #0x4010, lsl #16",
    "1: movz x0, #0xc600, lsl #16",
    "movk x0, #3",
    "mov x1, x19",
    "mov x2, xzr",
    "mov x3, xzr",
    "hvc #0",
    "str x21, [x19]",
    "movz x0, #0xc600, lsl #16",
    "movk x0, #4",
    "mov x1, x19",
    "hvc #0",
    // Only here the secret is in it.
    "mov x22, #-1",
    "cbnz x0, 2f",
    "str x22, [x19]",
    "2: str xzr, [x19]",
    "add x21, x21, #1",
    "b 1b"
);

/// Runs vCPU 0, and agrees to all; a page that misses stays away.
extern "C" fn keep_agreeing(_: u64) -> u64 {
    let mut vcpu = Vcpu::new(HANDLE.load(Ordering::SeqCst), 0, PAGE.load(Ordering::SeqCst));
    GO.store(1, Ordering::SeqCst);
    while STOP.load(Ordering::SeqCst) == 0 {
        gic::alarm(5);
        match vcpu.run_once() {
            Ok(exit) => match exit.class {
                ExitClass::Hvc => {
                    AGREED.fetch_add(1, Ordering::Relaxed);
                    vcpu.answer([0; 4]);
                }
                ExitClass::Irq | ExitClass::Fault => {}
                _ => return 1,
            },
            Err(STATE | BUSY) => vcpu.entry.flags.0 = 0,
            Err(_) => return 2,
        }
    }
    gic::quiet();
    0
}

static AGREED: AtomicU64 = AtomicU64::new(0);

/// A guest that shares and unshares without end, while the host reads the page all the
/// time, takes it away and gives it again: it sees no secret, and loses nothing.
fn endless() -> Outcome {
    let (vm, vcpu, _) = Vm::launch_two(gic::version(), share_unshare(), [0; 4])?;
    HANDLE.store(vm.handle, Ordering::SeqCst);
    PAGE.store(vcpu.page, Ordering::SeqCst);
    AGREED.store(0, Ordering::SeqCst);
    STOP.store(0, Ordering::SeqCst);
    let page = vm.map(FREE)?;
    cpu::start(1, keep_agreeing, 0)?;
    let looked = look(page);
    let taken = vm.call(Function::PageUnmap, &[FREE, 1]);
    // Shared it is a number of rounds, else it is sealed.
    let first = read(page);
    let still = (0..100).all(|_| read(page) == first);
    let hidden = first >> 32 == 0 || is_sealed(page);
    STOP.store(1, Ordering::SeqCst);
    expect!(cpu::join(1)?, 0);
    looked?;
    taken?;
    ensure!(still && hidden, "the page came back with {first:#x}");
    write(page, 1);
    let agreed = AGREED.load(Ordering::SeqCst);
    ensure!(agreed > 100, "only {agreed} times");
    vm.destroy()
}
test!(endless, "T22 T23", several_cpus);

fn look(page: u64) -> Outcome {
    let end = cpu::now() + cpu::milliseconds(1500);
    while cpu::now() < end {
        // Zero, or a number of rounds.
        let seen = peek(page)?;
        ensure!(seen >> 32 == 0, "the host reads {seen:#x}");
    }
    Ok(())
}
