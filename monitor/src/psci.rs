// SPDX-License-Identifier: MIT OR Apache-2.0
//! PSCI for the host: acts on what `havmsi_core::psci` decides.

use havmsi_core::addr::low32;
use havmsi_core::psci::{self, Error, Power, id};
use havmsi_hal::barrier;
use spin::mutex::SpinMutex;

use crate::cpu::this_cpu;
use crate::platform::{self, AFFINITIES, MAX_CPUS};
use crate::{boot, exception, host};

/// Refuses everything until [`init`]: no CPU is present.
static POWER: SpinMutex<Power<MAX_CPUS>> = SpinMutex::new(Power::new(0));

/// Before the other CPUs come in.
pub fn init(cpus: usize) {
    *POWER.lock() = Power::new(cpus);
}

/// A call of the host, if it is PSCI's or the calling convention's own;
/// returns x0. CPU_OFF returns in the CPU's next life.
pub fn call(function: u32, args: &[u64; 8]) -> Option<u64> {
    let two_widths = function & !id::SMC64;
    let reply = match function {
        id::VERSION => Ok(psci::VERSION),
        id::SMCCC_VERSION => Ok(psci::SMCCC_VERSION),
        id::FEATURES => psci::features(low32(args[1])).ok_or(Error::NotSupported),
        id::SMCCC_ARCH_FEATURES => psci::arch_features(low32(args[1])).ok_or(Error::NotSupported),
        id::MIGRATE_INFO_TYPE => Ok(psci::MIGRATION_NOT_REQUIRED),
        id::CPU_OFF => return Some(cpu_off()),
        id::SYSTEM_OFF => {
            crate::log!("the host turns the machine off");
            platform::power_off();
            Err(Error::InternalFailure)
        }
        id::SYSTEM_RESET => {
            crate::log!("the host resets the machine");
            platform::reset();
            Err(Error::InternalFailure)
        }
        _ if two_widths == id::CPU_ON => cpu_on(args),
        _ if two_widths == id::AFFINITY_INFO => affinity_info(args),
        _ if two_widths == id::CPU_SUSPEND => {
            // Whatever state is asked for: standby is shallower, and allowed.
            barrier::wfi();
            Ok(0)
        }
        _ => return None,
    };
    Some(reply.unwrap_or_else(Error::code))
}

fn target(affinity: u64) -> Option<usize> {
    platform::cpu_number(psci::affinity(affinity)?)
}

fn cpu_on(args: &[u64; 8]) -> Result<u64, Error> {
    let [_, affinity, entry, context, ..] = *args;
    let cpu = target(affinity);
    if !host::is_executable(entry) {
        return Err(Error::InvalidAddress);
    }
    let cpu = POWER.lock().on(cpu, entry, context)?;
    // Out of the pen, if it is still there, and out of its sleep.
    boot::let_in(cpu);
    host::world().gic.send(AFFINITIES[cpu], cpu);
    Ok(0)
}

fn affinity_info(args: &[u64; 8]) -> Result<u64, Error> {
    let [_, affinity, lowest_level, ..] = *args;
    if lowest_level != 0 {
        return Err(Error::InvalidParameters);
    }
    POWER.lock().affinity_info(target(affinity))
}

fn cpu_off() -> u64 {
    let cpu = this_cpu().number();
    POWER.lock().off(cpu);
    sleep(cpu)
}

/// Keeps this CPU until the host turns it on, then makes it ready to enter the
/// host; returns its x0.
pub fn sleep(cpu: usize) -> u64 {
    let gic = host::world().gic;
    gic.mute_cpu();
    loop {
        let told = POWER.lock().take(cpu);
        if let Some((entry, context)) = told {
            gic.init_cpu(cpu);
            host::enter(entry, context);
            return context;
        }
        // Not lost if it comes in between: a pending interrupt ends WFI at once.
        barrier::wfi();
        gic.acknowledge();
        exception::stop_if_told();
    }
}
