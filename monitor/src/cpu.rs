// SPDX-License-Identifier: MIT OR Apache-2.0
//! The record of each CPU, and the frame of what it interrupted.

use core::cell::{Cell, UnsafeCell};
use core::ptr;

use havmsi_core::exit::write_register;
use havmsi_core::inject::spsr;
use havmsi_core::launch::Boot;
use havmsi_hal::sysreg::tpidr_el3;

use crate::platform::MAX_CPUS;
use crate::run::Local;

/// General registers, PC and PSTATE of a world that is not running. The
/// vectors (vectors.S) know this layout.
#[repr(C, align(16))]
pub struct Frame {
    /// x0 to x30.
    pub x: [u64; 31],
    /// Program counter.
    pub elr: u64,
    /// PSTATE.
    pub spsr: u64,
}

impl Frame {
    /// All zero.
    pub const ZERO: Self = Self { x: [0; 31], elr: 0, spsr: 0 };

    /// A world starts at `boot`, at EL1.
    pub fn start(&mut self, boot: &Boot) {
        *self = Self { elr: boot.pc, spsr: spsr::DAIF | spsr::EL1H, ..Self::ZERO };
        self.x[..4].copy_from_slice(&boot.x);
    }

    /// Answers a trapped access: `value` goes to the register `rt`, 31 for none.
    pub fn answer(&mut self, rt: u8, value: u64) {
        write_register(&mut self.x, rt, value);
        self.step();
    }

    /// Moves the PC over the instruction that was emulated.
    pub fn step(&mut self) {
        self.elr = self.elr.wrapping_add(4);
        self.spsr &= !spsr::STEP;
    }
}

/// What a CPU has for itself.
#[repr(C, align(64))]
pub struct PerCpu {
    frame: Cell<*mut Frame>,
    stack: Cell<usize>,
    host: UnsafeCell<Frame>,
    local: UnsafeCell<Local>,
}

// SAFETY: each CPU reaches its own element only (`this_cpu`, TPIDR_EL3); the
// fields are set before that CPU runs anything else.
unsafe impl Sync for PerCpu {}

pub const FRAME_OFFSET: usize = core::mem::offset_of!(PerCpu, frame);
pub const STACK_OFFSET: usize = core::mem::offset_of!(PerCpu, stack);
pub const FRAME_SPSR: usize = core::mem::offset_of!(Frame, spsr);
const _: () = assert!(core::mem::offset_of!(Frame, elr) == 31 * 8);

pub static PER_CPU: [PerCpu; MAX_CPUS] = [const {
    PerCpu {
        frame: Cell::new(ptr::null_mut()),
        stack: Cell::new(0),
        host: UnsafeCell::new(Frame::ZERO),
        local: UnsafeCell::new(Local::NEW),
    }
}; MAX_CPUS];

/// The record of the CPU that asks.
pub fn this_cpu() -> &'static PerCpu {
    let at = ptr::with_exposed_provenance::<PerCpu>(havmsi_core::addr::index(tpidr_el3::read()));
    // SAFETY: entry.S set TPIDR_EL3 to this CPU's element of `PER_CPU`, and
    // nothing else writes it.
    unsafe { &*at }
}

impl PerCpu {
    /// The CPU's number in the platform's table, as of this record.
    pub fn number(&self) -> usize {
        ptr::from_ref(self).addr().wrapping_sub(PER_CPU.as_ptr().addr()) / size_of::<Self>()
    }

    /// The host is what the way out of the monitor resumes.
    pub fn resume_host_next(&self) {
        self.frame.set(self.host.get());
    }

    /// `frame` is what the way out of the monitor resumes.
    ///
    /// # Safety
    /// The frame must stay in place, and be touched by this CPU's exceptions
    /// only, until another one is set.
    pub unsafe fn resume_next(&self, frame: *mut Frame) {
        self.frame.set(frame);
    }

    /// Whether the host is the current world.
    pub fn in_host(&self) -> bool {
        ptr::eq(self.frame.get(), self.host.get())
    }

    /// Runs `f` on the host's frame. Calls must not be nested.
    pub fn with_host<R>(&self, f: impl FnOnce(&mut Frame) -> R) -> R {
        // SAFETY: of this CPU, whose exceptions don't nest; only the two
        // `with_` functions make references to it, one at a time.
        f(unsafe { &mut *self.host.get() })
    }

    /// Runs `f` on what is kept while a guest runs. Calls must not be nested:
    /// a run and an exit are not.
    pub fn with_local<R>(&self, f: impl FnOnce(&mut Local) -> R) -> R {
        // SAFETY: of this CPU, whose exceptions don't nest; nothing else makes a
        // reference to it.
        f(unsafe { &mut *self.local.get() })
    }
}
