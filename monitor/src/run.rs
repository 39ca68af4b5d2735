// SPDX-License-Identifier: MIT OR Apache-2.0
//! Running a vCPU: the switch between the host's world and a guest's, and what
//! is done about a guest's exits. What may be shown and taken back is decided
//! by `havmsi_core::exit`.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{
    ENTRY_OFFSET, EXIT_OFFSET, Entry, EntryFlags, Error, Exit, ExitClass, MAX_VCPUS, MAX_VMS,
    WORDS_EXIT_CAUSE,
};
use havmsi_core::addr::{Ipa, words};
use havmsi_core::exit::{self, Action, Answer, Pending, Syndrome, ec};
use havmsi_core::hypercall;
use havmsi_core::inject::spsr;
use havmsi_core::launch::{Boot, Config};
use havmsi_core::vgic as policy;
use havmsi_core::vm::{Vm, mpidr_affinity};
use havmsi_hal::debug::DebugState;
use havmsi_hal::fpsimd::FpState;
use havmsi_hal::sysreg as reg;
use havmsi_hal::vgic::VgicState;
use havmsi_hal::world::{self, El1State};
use havmsi_hal::{barrier, bits, idreg, phys, tlb};
use spin::mutex::SpinMutex;

use crate::cpu::{Frame, this_cpu};
use crate::{exception, host, vms};

/// `HCR_EL2` of a guest (Arm ARM D24.2 "HCR_EL2"): as the host's, and virtual
/// interrupts; TLB maintenance and barriers reach the inner
/// shareable domain, for a vCPU may have moved.
const HCR: u64 = host::HCR | bits!(FMO 3, IMO 4, AMO 5, FB 9, BSU_IS 10);
const HCR_TWI: u64 = 1 << 13;
const HCR_TWE: u64 = 1 << 14;

/// `MDCR_EL2.TDA`: debug registers trap while the vCPU's are not loaded.
const MDCR_TDA: u64 = 1 << 9;
/// `MDSCR_EL1`: MDE, KDE, SS. While none is set, breakpoints and watchpoints
/// have no effect on EL1 and EL0 and need not be loaded.
const MDSCR_ARMED: u64 = bits!(SS 0, KDE 13, MDE 15);
/// `CNTHCTL_EL2.EL1PCTEN`: the physical counter is open to a guest, the
/// physical timer traps.
const CNTHCTL: u64 = 1;
/// `CPTR_EL3.TFP`.
const CPTR_TFP: u64 = 1 << 10;
const MPIDR_RES1: u64 = 1 << 31;

/// A vCPU that is not running.
pub struct Context {
    frame: Frame,
    el1: El1State,
    fp: FpState,
    debug: DebugState,
    vgic: VgicState,
    pending: Pending,
    /// `ESR` and `FAR` of the access that the last exit reported.
    syndrome: (u64, u64),
}

impl Context {
    /// A context that no vCPU has started in.
    const ZERO: Self = Self {
        frame: Frame::ZERO,
        el1: El1State::ZERO,
        fp: FpState::RESET,
        debug: DebugState::RESET,
        vgic: VgicState::RESET,
        pending: Pending::Nothing,
        syndrome: (0, 0),
    };

    fn start(&mut self, boot: &Boot) {
        #[cfg(feature = "leave-out")]
        let old = self.frame.x;
        *self = Self { el1: El1State::RESET, ..Self::ZERO };
        self.frame.start(boot);
        havmsi_core::left_out!(ContextReset => self.frame.x[4..].copy_from_slice(&old[4..]));
    }
}

/// The contexts of all vCPUs.
struct Contexts([UnsafeCell<Context>; MAX_VCPUS]);

// SAFETY: a context is reached through `Current` only, of which a vCPU has one
// at a time: made where the VM's lock is held and the vCPU does not run, it is
// used until `Vm::leave`, or until the entry is refused under that lock.
unsafe impl Sync for Contexts {}

static CONTEXTS: Contexts = Contexts([const { UnsafeCell::new(Context::ZERO) }; MAX_VCPUS]);

/// The run page of a vCPU: memory of the host's, which may change at any time.
#[derive(Clone, Copy)]
struct RunPage(&'static [AtomicU64; 512]);

impl RunPage {
    /// The entry half, copied.
    fn entry(&self) -> Entry {
        Entry::read(|i| self.0[ENTRY_OFFSET / 8 + i].load(Ordering::Relaxed))
    }

    /// Tells the host word `n` of the exit half.
    fn tell(&self, n: usize, value: u64) {
        self.0[EXIT_OFFSET / 8 + n].store(value, Ordering::Relaxed);
    }
}

/// The vCPU that a CPU runs.
struct Current {
    world: &'static host::World,
    vm: &'static SpinMutex<Vm>,
    idx: u64,
    config: Config,
    context: &'static mut Context,
    page: RunPage,
    used_lrs: usize,
    fp_loaded: bool,
    debug_loaded: bool,
}

/// What each CPU keeps of the host while a guest runs.
pub struct Local {
    host: El1State,
    current: Option<Current>,
    /// The vCPU of each VM that ran here last: its index plus 1, 0 for none.
    last: [u8; MAX_VMS],
}

impl Local {
    /// Nothing yet.
    pub const NEW: Self = Self { host: El1State::ZERO, current: None, last: [0; MAX_VMS] };
}

impl Current {
    /// The CPU gets the vCPU's debug registers, its context the host's, until
    /// the exit.
    fn load_debug(&mut self) {
        reg::mdcr_el2::write(host::MDCR_EL2);
        self.context.debug.swap();
        self.debug_loaded = true;
    }
}

/// VCPU_RUN: makes vCPU `idx` the current world of this CPU.
///
/// # Errors
/// Those of [`Vm::runnable`], [`exit::answer`] and the check of the list
/// registers; then nothing has changed.
pub fn run(local: &mut Local, handle: u64, idx: u64) -> Result<(), Error> {
    let (slot, vm) = vms::by_handle(handle)?;
    let mut locked = vm.lock();
    locked.check_handle(handle)?;
    let run = locked.runnable(idx)?;
    let world = host::world();
    // SAFETY: see `Contexts`.
    let context = unsafe { &mut *CONTEXTS.0[usize::from(run.context)].get() };
    let page = RunPage(phys::page(run.run_page));
    let entry = page.entry();
    if run.start.is_some() {
        // What its last life left open is nobody's business any more.
        context.pending = Pending::Nothing;
    }
    let mut answer = exit::answer(&context.pending, &entry)?;
    let implemented = if run.config.gic == 0 { 0 } else { world.vgic.list_registers() };
    let used_lrs = policy::check(run.config.gic, &entry.lr, entry.nr_lr, implemented)?;
    locked.take_sgis(idx, policy::pending_sgis(&entry.lr, used_lrs))?;

    #[cfg(feature = "leave-out")]
    let entry = if havmsi_core::left_out!(CopyOnce) { entry_again(page) } else { entry };
    #[cfg(feature = "leave-out")]
    let cntvoff = reg::cntvoff_el2::read();
    // Accepted: from here on things change.
    locked.enter(idx)?;
    let current = local.current.insert(Current {
        world,
        vm,
        idx,
        config: run.config,
        context,
        page,
        used_lrs,
        fp_loaded: false,
        debug_loaded: false,
    });
    let context = &mut *current.context;
    if context.pending == Pending::Hypercall {
        let [x0, x1, ..] = context.frame.x;
        hypercall::answered(world, &mut locked, idx, [x0, x1], &mut answer);
    }
    drop(locked);
    if !havmsi_core::left_out!(AnswerOnce) {
        context.pending = Pending::Nothing;
    }
    if let Some(boot) = &run.start {
        context.start(boot);
        havmsi_core::left_out!(GuestEntry => if entry.gpr[0] != 0 { context.frame.elr = entry.gpr[0] });
    }
    let mut injection = None;
    match answer {
        Answer::Nothing => {}
        Answer::Set { rt, value } => context.frame.answer(rt, value),
        Answer::Results(results) => {
            context.frame.x[..4].copy_from_slice(&results);
            context.frame.step();
        }
        Answer::Inject(what) => injection = Some(what),
    }

    local.host.save();
    reg::mdcr_el2::write(host::MDCR_EL2 | MDCR_TDA);
    reg::cptr_el3::write(host::CPTR_EL3 | CPTR_TFP);
    reg::cnthctl_el2::write(CNTHCTL);
    reg::cntvoff_el2::write(run.cntvoff);
    havmsi_core::left_out!(CounterOffset => reg::cntvoff_el2::write(cntvoff));
    reg::vmpidr_el2::write(MPIDR_RES1 | mpidr_affinity(idx));
    // SAFETY: still non-secure below; only what is routed to EL3 differs.
    unsafe { reg::write_scr_el3(host::SCR_GUEST) };
    if run.config.gic != 0 {
        let hcr = entry.ich_hcr & policy::HCR_ALLOWED;
        world.vgic.load(&context.vgic, hcr, entry.lr.get(..used_lrs).unwrap_or(&entry.lr));
    } else if !havmsi_core::left_out!(CloseGic) {
        world.vgic.close();
    }
    // This is a guest's DISR_EL1, and would tell it what the last one left there.
    if world.ras {
        reg::vdisr_el2::write(0);
    }
    let trap = |flag, bit| if entry.flags.0 & flag != 0 { bit } else { 0 };
    let hcr = HCR | trap(EntryFlags::TRAP_WFI, HCR_TWI) | trap(EntryFlags::TRAP_WFE, HCR_TWE);
    world::switch_to(&context.el1, run.vttbr, hcr);
    if let Some(what) = injection {
        let syndrome = context.syndrome;
        exception::inject(&mut context.frame, what, syndrome);
    }
    let frame = &raw mut context.frame;
    if context.el1.mdscr_el1 & MDSCR_ARMED != 0 && !havmsi_core::left_out!(DebugState) {
        current.load_debug();
    }
    let last = &mut local.last[usize::from(slot.0)];
    let vcpu = idx.to_le_bytes()[0] + 1;
    if *last != vcpu {
        *last = vcpu;
        tlb::flush_local_vcpu();
    }
    // SAFETY: the frame lies in a static, and is this CPU's alone until
    // `Vm::leave`, before which `leave` below sets the host's again.
    unsafe { this_cpu().resume_next(frame) };
    Ok(())
}

/// Reads the run page once more, after a while in which it can change.
#[cfg(feature = "leave-out")]
fn entry_again(page: RunPage) -> Entry {
    (0..20_000).for_each(|_| core::hint::spin_loop());
    page.entry()
}

/// Carries out a guest's call as if it were the host's.
#[cfg(feature = "leave-out")]
fn host_call_of_guest(frame: &mut Frame) -> bool {
    let args = core::array::from_fn(|i| frame.x[i]);
    let function = havmsi_core::addr::low32(args[0]);
    if havmsi_abi::Function::from_id(function).is_none() {
        return false;
    }
    frame.x[..7].copy_from_slice(&crate::dispatch::host_call(function, &args));
    true
}

/// What brought a world to EL3, as vectors.S numbers it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
#[expect(dead_code, reason = "vectors.S makes them")]
pub enum Cause {
    /// A synchronous exception.
    Synchronous = 0,
    /// IRQ or FIQ.
    Interrupt = 1,
    /// SError.
    SError = 2,
}

/// The current guest came to EL3: handles it, and either leaves the guest the
/// current world or makes the host that.
pub fn guest_exit(cause: Cause) {
    this_cpu().with_local(|local| {
        let current = local.current.as_mut().expect("a guest without a vCPU");
        let frame = &mut current.context.frame;
        let exit = if frame.spsr & spsr::MODE == spsr::EL2H {
            // Through EL2's vector, or interrupted on the way from there to its
            // `smc`: the exit is what EL2's registers say; an interrupt stays
            // pending.
            frame.elr = reg::elr_el2::read();
            frame.spsr = reg::spsr_el2::read();
            decide(current, reg::esr_el2::read(), true)
        } else {
            match cause {
                Cause::Synchronous => decide(current, reg::esr_el3::read(), false),
                Cause::Interrupt => Some(Exit::default()),
                Cause::SError => Some(Exit { class: ExitClass::SError, ..Exit::default() }),
            }
        };
        if let Some(exit) = exit {
            leave(&local.host, current, &exit);
            local.current = None;
        }
    });
    if cause == Cause::Interrupt {
        // Perhaps the monitor's own; the host's are still pending.
        exception::interrupt();
    }
}

/// A synchronous exit with this syndrome: what the host gets; `None` to resume
/// the guest.
fn decide(current: &mut Current, esr: u64, through_el2: bool) -> Option<Exit> {
    let privileged = current.context.frame.spsr & spsr::EL != 0;
    let mut syndrome = Syndrome { esr, ipa: Ipa(0), privileged, idx: current.idx };
    match syndrome.ec() {
        ec::FP if !through_el2 && !current.fp_loaded => {
            reg::cptr_el3::write(host::CPTR_EL3);
            barrier::isb();
            current.context.fp.load();
            current.fp_loaded = true;
            return None;
        }
        ec::DATA_ABORT | ec::INSTRUCTION_ABORT if through_el2 => {
            syndrome.ipa = exception::faulting_ipa(esr)?;
        }
        _ => {}
    }
    let (vm, idx) = (current.vm, current.idx);
    let place = |ipa| vm.lock().ram_or_device(ipa);
    let config = current.config;
    let action = exit::decide(&syndrome, &current.context.frame.x, &config, place, idreg::raw);
    let debug_loaded = current.debug_loaded;
    let context = &mut *current.context;
    match action {
        Action::Exit { exit, pending, step } => {
            if step {
                context.frame.step();
            }
            context.pending = pending;
            context.syndrome = (esr, reg::far_el2::read());
            return Some(exit);
        }
        Action::Sgi(exit, sgi) => {
            vm.lock().send_sgi(sgi);
            context.frame.step();
            context.pending = Pending::Sgi;
            return Some(exit);
        }
        Action::Hypercall => {
            let x = exit::shown_registers(ExitClass::Hvc, &context.frame.x);
            let random = || vms::RANDOM.lock().random().map(|bytes| words(&bytes));
            havmsi_core::left_out!(GuestCalls => if host_call_of_guest(&mut context.frame) { return None });
            match hypercall::call(current.world, &mut vm.lock(), idx, x, random) {
                Ok(results) => context.frame.x[..4].copy_from_slice(&results),
                Err(pending) => {
                    // The PC is behind the call: back, until it is answered.
                    context.frame.elr = context.frame.elr.wrapping_sub(4);
                    let exit = exit::call(&pending, x[1]);
                    if pending != Pending::Nothing {
                        context.pending = Pending::Hypercall;
                    }
                    return Some(exit);
                }
            }
        }
        // Tried again, with the vCPU's own registers.
        Action::Debug(_) if !debug_loaded => current.load_debug(),
        Action::Debug(rt) => context.frame.answer(rt, 0),
        Action::Fixed { rt, value } => context.frame.answer(rt, value),
        Action::Skip => context.frame.step(),
        Action::Inject(what) => {
            let far = if through_el2 { reg::far_el2::read() } else { reg::far_el3::read() };
            exception::inject(&mut context.frame, what, (esr, far));
        }
    }
    None
}

/// Back to the host, which learns why, and nothing else of the guest.
fn leave(host_el1: &El1State, current: &mut Current, why: &Exit) {
    let (used, fp, debug) = (current.used_lrs, current.fp_loaded, current.debug_loaded);
    let page = current.page;
    let context = &mut *current.context;
    let mut undelivered = 0;
    current.world.vgic.save(&mut context.vgic, used, |n, lr| {
        undelivered |= policy::pending_sgi(lr);
        page.tell(WORDS_EXIT_CAUSE + 1 + n, lr);
    });
    page.tell(WORDS_EXIT_CAUSE, context.vgic.vmcr);
    context.el1.save();
    reg::cptr_el3::write(host::CPTR_EL3);
    if fp {
        barrier::isb();
        context.fp.save();
        FpState::RESET.load();
        havmsi_core::left_out!(FpClear => context.fp.load());
    }
    if debug {
        context.debug.swap();
    }
    host::enter_again(host_el1);
    let shown = exit::shown_registers(why.class, &context.frame.x);
    for (n, word) in why.words(shown).into_iter().enumerate() {
        page.tell(n, word);
    }
    current.vm.lock().leave(current.idx, undelivered);
    let cpu = this_cpu();
    cpu.resume_host_next();
    cpu.with_host(|frame| frame.x[..4].copy_from_slice(&[0, why.class as u64, 0, 0]));
}
