// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest proper.

mod gic;
mod regs;

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use gic::Gic;
use havmsi_operations::{
    FRESH, Kind, OPERATIONS, Operation, PAGE, RAM, RAM_SIZE, STRIDE, mark, port,
};

const STACK_SIZE: usize = 16 << 10;

core::arch::global_asm!(
    include_str!("bare/entry.S"),
    stop = const mark::STOP,
    fault = const port::FAULT,
    stack_size = const STACK_SIZE,
    main = sym main,
    second = sym second,
    interrupt = sym interrupt,
);

unsafe extern "C" {
    static second_start: u8;
}

/// Interrupts that were handled.
static HANDLED: AtomicU64 = AtomicU64::new(0);
/// The second vCPU is there.
static UP: AtomicBool = AtomicBool::new(false);
/// It shall wait for interrupts rather than look for them.
static SLEEP: AtomicBool = AtomicBool::new(false);
/// It shall end.
static END: AtomicBool = AtomicBool::new(false);
/// The GIC's version.
static GIC: AtomicU64 = AtomicU64::new(3);

/// Counter ticks of each record.
static TICKS: [AtomicU64; 128] = [const { AtomicU64::new(0) }; 128];

/// Records that go ahead and don't count: code, stacks and tables are touched there.
const WARM_UP: u32 = 1;
/// Ticks after which a vCPU that waits sleeps for sure.
const FALL_ASLEEP: u64 = 150_000;

fn gic() -> Gic {
    Gic { version: GIC.load(Ordering::Relaxed) }
}

extern "C" fn interrupt() {
    let gic = gic();
    let id = gic.acknowledge();
    if id & gic::ID == gic::TIMER {
        regs::stop_timer();
    }
    gic.end(id);
    HANDLED.fetch_add(1, Ordering::Release);
}

extern "C" fn second() -> ! {
    gic().open(1);
    UP.store(true, Ordering::Release);
    regs::unmask();
    while !END.load(Ordering::Acquire) {
        if SLEEP.load(Ordering::Acquire) {
            regs::mask();
            regs::wait();
            regs::unmask();
        } else {
            regs::pause();
        }
    }
    loop {
        regs::store(port::OTHER_DONE, 0);
    }
}

/// Carries out `before` and a record of `once`, as often as the operation says.
fn measure(operation: &Operation, mut before: impl FnMut(), mut once: impl FnMut()) {
    for _ in 0..WARM_UP {
        before();
        (0..operation.times).for_each(|_| once());
    }
    let records = usize::try_from(operation.records).unwrap_or(0);
    for ticks in TICKS.iter().take(records) {
        before();
        let start = regs::counter();
        mark::put::<{ mark::START }>();
        for _ in 0..operation.times {
            once();
        }
        mark::put::<{ mark::STOP }>();
        ticks.store(regs::counter() - start, Ordering::Relaxed);
    }
    TICKS.iter().take(records).for_each(|t| regs::store(port::TICKS, t.load(Ordering::Relaxed)));
}

fn wrong(value: u64) -> ! {
    loop {
        regs::store(port::WRONG, value);
    }
}

/// Waits for the handler to have run once more than `before`.
fn handled_since(before: u64, wait: impl Fn()) {
    while HANDLED.load(Ordering::Acquire) == before {
        wait();
    }
}

fn ipi(operation: &Operation, sleeping: bool) {
    const CPU_ON: u64 = 0xc400_0003;
    let entry = (&raw const second_start).addr() as u64;
    let answer = regs::call([CPU_ON, 1, entry, 0]);
    if answer != 0 {
        wrong(answer);
    }
    while !UP.load(Ordering::Acquire) {
        regs::pause();
    }
    SLEEP.store(sleeping, Ordering::Release);
    let gic = gic();
    let fall_asleep = || {
        let start = regs::counter();
        while sleeping && regs::counter() - start < FALL_ASLEEP {
            regs::pause();
        }
    };
    measure(operation, fall_asleep, || {
        let before = HANDLED.load(Ordering::Relaxed);
        gic.send(1);
        handled_since(before, regs::pause);
    });
    END.store(true, Ordering::Release);
    gic.send(1);
}

/// Both calls are there, or neither.
fn share() {
    const MEM_SHARE: u64 = 0xc600_0003;
    const MEM_UNSHARE: u64 = 0xc600_0004;
    const NOT_SUPPORTED: u64 = u64::MAX;
    let results = [MEM_SHARE, MEM_UNSHARE].map(|id| regs::call([id, FRESH, 0, 0]));
    if ![[0; 2], [NOT_SUPPORTED; 2]].contains(&results) {
        wrong(results[0] | results[1]);
    }
}

extern "C" fn main(operation: u64, gic_version: u64, more_ram: u64) -> ! {
    GIC.store(gic_version, Ordering::Relaxed);
    let index = usize::try_from(operation).unwrap_or(usize::MAX);
    let Some(operation) = OPERATIONS.get(index) else { wrong(operation) };
    if !operation.kind.is_of_host() {
        gic().set_up();
        gic().open(0);
    }
    let mut more = RAM + RAM_SIZE;
    while more < RAM + RAM_SIZE + more_ram {
        regs::store(more, more);
        more += STRIDE;
    }
    match operation.kind {
        Kind::Call { x: [x0, x1], answer } => measure(
            operation,
            || (),
            || {
                let result = regs::call([x0, x1, 0, 0]);
                if answer.is_some_and(|a| u64::from(a) != result & 0xffff_ffff) {
                    wrong(result);
                }
            },
        ),
        Kind::Load(address) => {
            measure(
                operation,
                || (),
                || {
                    regs::load_32(address);
                },
            );
        }
        Kind::IdRegister => {
            measure(
                operation,
                || (),
                || {
                    regs::id_aa64pfr0();
                },
            );
        }
        Kind::Ipi { sleeping } => ipi(operation, sleeping),
        Kind::Timer => {
            regs::unmask();
            measure(
                operation,
                || (),
                || {
                    let before = HANDLED.load(Ordering::Relaxed);
                    regs::start_timer();
                    handled_since(before, || ());
                },
            );
        }
        Kind::Touch(bytes) => {
            let mut next = FRESH;
            measure(
                operation,
                || (),
                || {
                    let end = next + bytes;
                    while next < end {
                        regs::store(next, next);
                        next += PAGE;
                    }
                },
            );
        }
        Kind::Share => measure(operation, || regs::store(FRESH, FRESH), share),
        Kind::Start | Kind::End | Kind::Host(_) => {}
    }
    loop {
        regs::store(port::DONE, 0);
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    wrong(u64::MAX)
}
