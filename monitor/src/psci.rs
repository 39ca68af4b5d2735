// SPDX-License-Identifier: MIT OR Apache-2.0
//! PSCI for the host: acts on what `havmsi_core::psci` decides.

use havmsi_core::addr::low32;
use havmsi_core::launch::Boot;
use havmsi_core::psci::{self, Error, Power, id};
use havmsi_hal::barrier;
use spin::mutex::SpinMutex;

use crate::cpu::this_cpu;
use crate::platform::{self, AFFINITIES, MAX_CPUS};
use crate::{boot, exception, host};

/// The first CPU is on from reset.
static POWER: SpinMutex<[Power; MAX_CPUS]> = {
    let mut power = [Power::Off; MAX_CPUS];
    power[0] = Power::On;
    SpinMutex::new(power)
};

/// A call of the host, if it is PSCI's or the calling convention's own;
/// returns x0. CPU_OFF returns in the CPU's next life.
pub fn call(function: u32, args: &[u64; 8]) -> Option<u64> {
    let reply = match (function & !id::SMC64, function & id::SMC64 != 0) {
        (id::CPU_ON, _) => cpu_on(args),
        (id::AFFINITY_INFO, _) if args[2] != 0 => Err(Error::InvalidParameters),
        (id::AFFINITY_INFO, _) => target(args[1]).map(|cpu| POWER.lock()[cpu].info()),
        (id::CPU_SUSPEND, _) => {
            // Whatever state is asked for: standby is shallower, and allowed.
            barrier::wfi();
            Ok(0)
        }
        (id::CPU_OFF, false) => {
            let cpu = this_cpu().number();
            POWER.lock()[cpu] = Power::Off;
            Ok(sleep(cpu))
        }
        (id::SYSTEM_OFF | id::SYSTEM_RESET, false) => {
            let reset = function == id::SYSTEM_RESET;
            crate::log!("the host {} the machine", if reset { "resets" } else { "turns off" });
            platform::end(reset);
            Err(Error::InternalFailure)
        }
        _ => return psci::discovery(function, low32(args[1])),
    };
    Some(reply.unwrap_or_else(Error::code))
}

fn target(affinity: u64) -> Result<usize, Error> {
    platform::cpu_number(affinity)
        .filter(|&cpu| cpu < host::world().facts.cpus)
        .ok_or(Error::InvalidParameters)
}

fn cpu_on(args: &[u64; 8]) -> Result<u64, Error> {
    let [_, affinity, entry, context, ..] = *args;
    if !host::is_executable(entry) {
        return Err(Error::InvalidAddress);
    }
    let cpu = target(affinity)?;
    POWER.lock()[cpu].turn_on(Boot { pc: entry, x: [context, 0, 0, 0] })?;
    // Out of the pen, if it is still there, and out of its sleep.
    boot::let_in(cpu);
    host::world().gic.send(AFFINITIES[cpu], cpu);
    Ok(0)
}

/// Keeps this CPU until the host turns it on, then makes it ready to enter the
/// host; returns its x0.
pub fn sleep(cpu: usize) -> u64 {
    let gic = host::world().gic;
    gic.mute_cpu();
    loop {
        let told = POWER.lock()[cpu].start();
        if let Some(boot) = told {
            gic.init_cpu(cpu);
            host::enter(&boot);
            return boot.x[0];
        }
        // Not lost if it comes in between: a pending interrupt ends WFI at once.
        barrier::wfi();
        gic.acknowledge();
        exception::stop_if_told();
    }
}
