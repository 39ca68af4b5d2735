// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything that comes to EL3: from the host, from a guest, or (never, if
//! all is well) from the monitor itself.

use core::fmt::Arguments;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use havmsi_abi::Function;
use havmsi_core::addr::{Ipa, low32};
use havmsi_core::exit::{
    EC_SHIFT, FNV, FSC_PERMISSION, FSC_TYPE, Injection, S1PTW, SysregAccess, ec,
};
use havmsi_core::idreg::World;
use havmsi_core::inject::{self, spsr};
use havmsi_hal::sysreg as reg;
use havmsi_hal::{barrier, idreg, tlb};

use crate::cpu::{Frame, this_cpu};
use crate::run::{self, Cause};
use crate::{boot, dispatch, host, host_abort, log, platform, psci};

static STOP: AtomicBool = AtomicBool::new(false);

/// An exception from a lower exception level; its state is in the current
/// frame. `cause` is numbered in vectors.S. The way out starts from an empty
/// stack, so nothing has to be kept for a return.
pub extern "C" fn exception_from_lower(cause: Cause) -> ! {
    let cpu = this_cpu();
    if !cpu.in_host() {
        run::guest_exit(cause);
    } else if cpu.with_host(|frame| frame.spsr & spsr::MODE == spsr::EL2H) {
        // In the EL2 vector, at its `smc` or ahead of it (an interrupt came
        // first and comes again): what counts is what brought it there.
        cpu.with_host(|frame| {
            frame.elr = reg::elr_el2::read();
            frame.spsr = reg::spsr_el2::read();
            from_host_el2(frame);
        });
    } else if cause == Cause::Synchronous {
        from_host();
    } else {
        // SError is not routed to EL3 while the host runs.
        interrupt();
    }
    boot::resume()
}

/// The monitor's own interrupt.
pub fn interrupt() {
    host::world().gic.acknowledge();
    stop_if_told();
}

/// Ends this CPU if another one broke.
pub fn stop_if_told() {
    if STOP.load(Ordering::Acquire) {
        halt();
    }
}

/// Traps of the host through the EL2 vector.
fn from_host_el2(frame: &mut Frame) {
    let esr = reg::esr_el2::read();
    let access = SysregAccess::decode(esr);
    match esr >> EC_SHIFT & 0x3f {
        ec::DATA_ABORT | ec::INSTRUCTION_ABORT => host_abort::handle(frame, esr),
        ec::SYSREG => match access.fixed(World::Host, idreg::raw) {
            Some(value) => frame.answer(access.target(), value),
            None => inject_undefined(frame),
        },
        _ => inject_undefined(frame),
    }
}

/// Exceptions of the host taken to EL3 itself.
fn from_host() {
    let cpu = this_cpu();
    // The PC is behind the SMC already.
    let call = reg::esr_el3::read() >> EC_SHIFT & 0x3f == ec::SMC64
        && cpu.with_host(|frame| frame.spsr & spsr::MODE != 0);
    if !call {
        cpu.with_host(inject_undefined);
        return;
    }
    // The identifier is 32 bits wide; of an SMC32, so are the arguments.
    let [function, handle, idx] = cpu.with_host(|f| [f.x[0], f.x[1], f.x[2]]);
    let function = low32(function);
    if function == Function::VcpuRun.id() {
        // If a guest is the current world now, the results come with its exit.
        if let Err(error) = cpu.with_local(|local| run::run(local, handle, idx)) {
            let refused = [error.code().cast_unsigned(), 0];
            cpu.with_host(|frame| frame.x[..2].copy_from_slice(&refused));
        }
        return;
    }
    other_call(function);
}

/// All calls of the host but VCPU_RUN: not inlined, for what they need of the
/// stack would be set up for each exit of a guest.
#[inline(never)]
fn other_call(function: u32) {
    let cpu = this_cpu();
    let mut args: [u64; 8] = cpu.with_host(|f| core::array::from_fn(|i| f.x[i]));
    if function & havmsi_core::psci::id::SMC64 == 0 {
        args = args.map(|arg| u64::from(low32(arg)));
    }
    if Function::from_id(function).is_none()
        && let Some(result) = psci::call(function, &args)
    {
        cpu.with_host(|frame| frame.x[0] = result);
    } else {
        let results = dispatch::host_call(function, &args);
        // x4 on belong to the caller unless they hold a result (SMCCC 1.2, 2.6).
        let used = results.iter().rposition(|&x| x != 0).map_or(0, |last| last + 1).max(4);
        let used = if results[0].cast_signed() < 0 { 2 } else { used };
        cpu.with_host(|frame| frame.x[..used].copy_from_slice(&results[..used]));
    }
}

/// The IPA of the stage-2 abort that `ESR_EL2` describes, with the offset in
/// its page (a walk's is lost). `None` if stage 1 does not translate the address
/// any more: then the access is tried again.
///
/// `HPFAR_EL2` is not valid for permission faults that are no walk's (Arm ARM
/// D24.2 "HPFAR_EL2"), nor on Cortex-A57 for any (erratum 834220: an access
/// that stage 1 refuses may be reported, with a wrong address). So for those
/// stage 1 is asked again.
pub fn faulting_ipa(esr: u64) -> Option<Ipa> {
    const MIDR_PART: u64 = 0xff00_fff0;
    const CORTEX_A57: u64 = 0x4100_d070;
    let far = reg::far_el2::read();
    let permission = esr & FSC_TYPE == FSC_PERMISSION;
    let unreliable =
        permission || esr & FNV == 0 && reg::midr_el1::read() & MIDR_PART == CORTEX_A57;
    let page = if esr & S1PTW == 0 && unreliable {
        tlb::stage1_page(far)?
    } else {
        // FIPA [43:4] is IPA [51:12].
        (reg::hpfar_el2::read() & 0x0fff_ffff_fff0) << 8
    };
    Some(Ipa(page | far & 0xfff))
}

/// The current world takes an exception at EL1: for an abort, the access that
/// stage 2 refused with this `ESR_EL2` and `FAR_EL2`.
pub fn inject(frame: &mut Frame, what: Injection, (esr, far): (u64, u64)) {
    let syndrome = match what {
        Injection::Undefined => inject::UNDEFINED,
        Injection::ExternalAbort => {
            reg::far_el1::write(far);
            inject::external_abort(esr, frame.spsr)
        }
    };
    reg::esr_el1::write(syndrome);
    reg::elr_el1::write(frame.elr);
    reg::spsr_el1::write(frame.spsr);
    let (sctlr, vbar) = (reg::sctlr_el1::read(), reg::vbar_el1::read());
    (frame.elr, frame.spsr) = inject::synchronous(frame.spsr, sctlr, vbar);
}

fn inject_undefined(frame: &mut Frame) {
    inject(frame, Injection::Undefined, (0, 0));
}

/// An exception of the monitor's own code: it is broken. No register of
/// anyone is shown but EL3's own syndrome.
pub extern "C" fn exception_from_self(kind: u64) -> ! {
    broken(format_args!(
        "exception {kind} at EL3, ESR {:#x}, ELR {:#x}, FAR {:#x}",
        reg::esr_el3::read(),
        reg::elr_el3::read(),
        reg::far_el3::read()
    ))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    broken(format_args!("{info}"))
}

fn broken(how: Arguments<'_>) -> ! {
    stop_others();
    log::last_words(format_args!("broken on CPU {}: {how}", this_cpu().number()));
    halt()
}

/// Fetches all other CPUs out of the normal world, for good.
fn stop_others() {
    if STOP.swap(true, Ordering::AcqRel) {
        halt();
    }
    let gic = platform::gic();
    for (cpu, &affinity) in platform::AFFINITIES.iter().enumerate() {
        if cpu != this_cpu().number() {
            gic.send(affinity, cpu);
        }
    }
}

fn halt() -> ! {
    loop {
        barrier::wfi();
    }
}
