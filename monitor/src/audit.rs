// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must always hold, checked on the running machine: in test builds only
//! (feature `audit`). The caller sees to it that nothing else goes on meanwhile.

#[cfg(not(debug_assertions))]
compile_error!("a release has no audit call; `--profile leave-out` builds a test monitor");

use havmsi_abi::layout::carveout;
use havmsi_abi::{Error, SUCCESS};
use havmsi_core::addr::Pa;
use havmsi_core::audit::{Audit, Violation};
use havmsi_core::vm::Machine as _;
use havmsi_hal::phys;
use spin::mutex::SpinMutex;

use crate::{host, log, vms};

/// A bit a page: enough for 8 GiB of RAM.
const SCRATCH: usize = (8 << 30) / 4096 / 64;
static SEEN: SpinMutex<[u64; SCRATCH]> = SpinMutex::new([0; SCRATCH]);

/// What does not hold.
#[derive(Debug)]
#[expect(dead_code, reason = "read by Debug only")]
enum Broken {
    /// Tables, records, VMs.
    Invariant(Violation),
    /// EL2's vectors are not what was put there, at this offset.
    Vectors(u64),
    /// This register of the CPU's does not hold the host in (I10).
    Register(&'static str, u64),
}

/// The audit, or of `what` = 1 only this CPU's registers; gives the status of
/// the call.
pub fn call(what: u64) -> u64 {
    match if what == 1 { registers() } else { audit() } {
        Ok(()) => SUCCESS.cast_unsigned(),
        Err(broken) => {
            log!("audit: {broken:x?}");
            Error::Integrity.code().cast_unsigned()
        }
    }
}

fn registers() -> Result<(), Broken> {
    host::changed().map_or(Ok(()), |(name, value)| Err(Broken::Register(name, value)))
}

fn audit() -> Result<(), Broken> {
    registers()?;
    let world = host::world();
    let vectors = Pa(world.facts.ram.banks()[0].base + carveout::EL2_VECTORS);
    for at in (0..0x1000).step_by(8) {
        let expected = if at < 0x800 && at % 0x80 == 0 { host::SMC } else { 0 };
        if phys::read(vectors.offset(at)) != expected {
            return Err(Broken::Vectors(at));
        }
    }
    tables().map_err(Broken::Invariant)
}

fn tables() -> Result<(), Violation> {
    let world = host::world();
    let mut seen = SEEN.lock();
    let mut audit = Audit::new(&world.machine, &world.pages, &mut *seen)?;
    world.with_host_map(|map| audit.host(map).and_then(|()| audit.devices(map)))?;
    for (slot, vm) in vms::all() {
        let vm = vm.lock();
        audit.at_rest(slot, &vm)?;
        audit.vm(&vm)?;
    }
    audit.contexts(&vms::contexts())?;
    audit.finish()
}
