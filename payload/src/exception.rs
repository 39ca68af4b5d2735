// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exceptions at EL1. A test may expect some (`catch`): then the instruction is
//! skipped. One that nobody expects ends the test.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::cpu::{self, MAX_CPUS};
use crate::harness::Failure;

/// What vectors saved.
#[repr(C)]
pub struct Frame {
    x: [u64; 31],
    elr: u64,
    spsr: u64,
}

/// An exception that was caught.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// `ESR_EL1`.
    pub esr: u64,
    /// `FAR_EL1`.
    pub far: u64,
    /// `ELR_EL1`.
    pub elr: u64,
    /// The vector's number.
    pub vector: u64,
}

impl Fault {
    /// The exception class.
    pub const fn class(&self) -> u64 {
        self.esr >> 26
    }

    /// A synchronous external abort of a data access at EL1 to `at`, a write or not.
    pub const fn is_external_abort(&self, at: u64, write: bool) -> bool {
        self.class() == 0x25
            && self.esr & 0x3f == 0x10
            && (self.esr >> 6 & 1 == 1) == write
            && self.far == at
            && self.vector == 4
    }

    /// An Undefined Instruction exception.
    pub const fn is_undefined(&self) -> bool {
        self.class() == 0 && self.vector == 4
    }
}

struct Expectation {
    armed: AtomicBool,
    taken: AtomicU64,
    esr: AtomicU64,
    far: AtomicU64,
    elr: AtomicU64,
    vector: AtomicU64,
    guard: AtomicU64,
}

static EXPECTED: [Expectation; MAX_CPUS] = [const {
    Expectation {
        armed: AtomicBool::new(false),
        taken: AtomicU64::new(0),
        esr: AtomicU64::new(0),
        far: AtomicU64::new(0),
        elr: AtomicU64::new(0),
        vector: AtomicU64::new(0),
        guard: AtomicU64::new(0),
    }
}; MAX_CPUS];

/// Interrupts that this payload took, by CPU.
pub static INTERRUPTS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Runs `f`, in which each exception is noted and its instruction skipped.
pub fn catch(f: impl FnOnce()) -> Option<Fault> {
    let e = &EXPECTED[cpu::number()];
    e.taken.store(0, Ordering::Relaxed);
    e.armed.store(true, Ordering::SeqCst);
    f();
    e.armed.store(false, Ordering::SeqCst);
    (e.taken.load(Ordering::Relaxed) != 0).then(|| last(e))
}

fn last(e: &Expectation) -> Fault {
    Fault {
        esr: e.esr.load(Ordering::Relaxed),
        far: e.far.load(Ordering::Relaxed),
        elr: e.elr.load(Ordering::Relaxed),
        vector: e.vector.load(Ordering::Relaxed),
    }
}

const EC_SVC: u64 = 0x15;

/// From the vectors.
pub extern "C" fn exception(kind: u64, frame: &mut Frame) {
    if kind & 3 == 1 {
        INTERRUPTS[cpu::number()].fetch_add(1, Ordering::Relaxed);
        crate::gic::handle();
        return;
    }
    let e = &EXPECTED[cpu::number()];
    let fault = Fault {
        esr: crate::mrs!("esr_el1"),
        far: crate::mrs!("far_el1"),
        elr: frame.elr,
        vector: kind,
    };
    let svc = fault.class() == EC_SVC;
    if e.armed.load(Ordering::SeqCst) && !svc {
        e.taken.fetch_add(1, Ordering::Relaxed);
        e.esr.store(fault.esr, Ordering::Relaxed);
        e.far.store(fault.far, Ordering::Relaxed);
        e.elr.store(fault.elr, Ordering::Relaxed);
        e.vector.store(kind, Ordering::Relaxed);
        // A fetch that failed: back to the caller.
        frame.elr = if matches!(fault.class(), 0x20 | 0x21) { frame.x[30] } else { frame.elr + 4 };
        return;
    }
    e.armed.store(false, Ordering::SeqCst);
    if !svc {
        e.esr.store(fault.esr, Ordering::Relaxed);
        e.far.store(fault.far, Ordering::Relaxed);
        e.elr.store(fault.elr, Ordering::Relaxed);
    }
    frame.x[0] = e.guard.load(Ordering::Relaxed);
    frame.elr = unwind as *const () as u64;
    frame.spsr = 0x3c5;
}

#[repr(C)]
struct Guarded {
    value: u64,
    unwound: u64,
}

unsafe extern "C" {
    fn guarded(f: extern "C" fn(u64) -> u64, argument: u64, stack: *mut u64) -> Guarded;
    fn unwind();
    fn enter_el0(pc: u64) -> u64;
}

/// Runs `f` until it returns or takes an exception that it did not expect.
pub fn guard(f: extern "C" fn(u64) -> u64, argument: u64) -> Result<u64, Failure> {
    let e = &EXPECTED[cpu::number()];
    let outer = e.guard.load(Ordering::Relaxed);
    // SAFETY: the stack pointer is kept for `unwind`, which runs while this
    // call is still on the stack.
    let result = unsafe { guarded(f, argument, e.guard.as_ptr()) };
    e.guard.store(outer, Ordering::Relaxed);
    if result.unwound == 0 {
        Ok(result.value)
    } else {
        let fault = last(e);
        Err(Failure::new(format_args!(
            "exception: ESR {:#x}, ELR {:#x}, FAR {:#x}",
            fault.esr, fault.elr, fault.far
        )))
    }
}

/// Runs `program` at EL0 until it makes an SVC; the last exception before that.
pub fn at_el0(program: &[u8]) -> Option<Fault> {
    extern "C" fn enter(pc: u64) -> u64 {
        // SAFETY: the program ends with an SVC, which unwinds to `guard`.
        unsafe { enter_el0(pc) }
    }
    catch(|| {
        // Ends by its SVC, always.
        let _ = guard(enter, program.as_ptr() as u64 + crate::memory::EL0_ALIAS);
    })
}
