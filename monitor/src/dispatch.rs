// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls of the host that are the monitor's own (`docs/abi.md`).

use havmsi_abi::{Error, Function, MAX_IPA_BITS, SUCCESS, UID, UID_CALL, VERSION};
use havmsi_core::guest_map::MapError;
use havmsi_core::launch::{Boot, Config};
use havmsi_core::vm::{Machine, Vm};
use havmsi_hal::sysreg::{cntpct_el0, cntvoff_el2};
use havmsi_hal::vgic;

use crate::host::{self, World};
use crate::{log, platform, run, vms};

/// What a call gives back in `x0` to `x5`.
type Results = [u64; 6];

const UNKNOWN: Results = [Error::NotSupported.code().cast_unsigned(), 0, 0, 0, 0, 0];

/// A call that is not PSCI's. Returns `x0` on, or `None` if a guest is the
/// current world now and the results come with its exit.
pub fn host_call(function: u32, args: &[u64; 8]) -> Option<Results> {
    if function == UID_CALL {
        let [a, b, c, d] = UID.map(u64::from);
        return Some([a, b, c, d, 0, 0]);
    }
    #[cfg(feature = "audit")]
    if function == havmsi_abi::AUDIT_CALL {
        return Some([crate::audit::call(args[1]), 0, 0, 0, 0, 0]);
    }
    let Some(function) = Function::from_id(function) else {
        return Some(UNKNOWN);
    };
    if function == Function::VcpuRun {
        return match run::run(args[1], args[2]) {
            Ok(()) => None,
            Err(error) => Some(refusal(error.into())),
        };
    }
    Some(match call(host::world(), function, args) {
        Ok([a, b, c, d, e]) => [SUCCESS.cast_unsigned(), a, b, c, d, e],
        Err(error) => refusal(error),
    })
}

/// Why a call was refused, and the pages that are short.
fn refusal(error: MapError) -> Results {
    let (error, pages) = match error {
        MapError::Tables(pages) => (Error::NoMemory, pages),
        MapError::Other(error) => (error, 0),
    };
    [error.code().cast_unsigned(), pages, 0, 0, 0, 0]
}

fn call(world: &World, function: Function, args: &[u64; 8]) -> Result<[u64; 5], MapError> {
    let [_, a1, a2, a3, a4, a5, a6, a7] = *args;
    let done = [0; 5];
    match function {
        Function::Version => Ok([VERSION, 0, 0, 0, 0]),
        Function::CpuInfo => Ok([vgic::vtr(&world.gic), world.gic.version(), MAX_IPA_BITS, 0, 0]),
        Function::HostReset => {
            for (_, vm) in vms::all() {
                let mut vm = vm.lock();
                if vm.exists() {
                    vm.destroy(world, vms::free_context)?;
                }
            }
            Ok(done)
        }
        Function::VmCreate => {
            let config = Config { max_vcpus: a1, gic: a2, ipa_bits: a3 };
            if config.gic != 0 && config.gic != world.gic.version() {
                return Err(Error::Invalid.into());
            }
            create(config)
        }
        Function::VcpuCreate => with_vm(a1, |vm| {
            let context = vms::take_context().ok_or(Error::NoMemory)?;
            let result = vm.create_vcpu(world, a2, a3, context);
            if result.is_err() {
                vms::free_context(context);
            }
            Ok(result.map(|()| done)?)
        }),
        Function::VmAddRam => with_vm(a1, |vm| Ok(vm.add_ram(a2, a3).map(|()| done)?)),
        Function::VcpuSetBoot => with_vm(a1, |vm| {
            Ok(vm.set_boot(a2, Boot { pc: a3, x: [a4, a5, a6, a7] }).map(|()| done)?)
        }),
        Function::VmPopulate => with_vm(a1, |vm| {
            let mut buffer = [0; 4096];
            vm.populate(world, a2, a3, &mut buffer).map(|()| done)
        }),
        Function::VmActivate => with_vm(a1, |vm| {
            let digest = vm.activate(world)?;
            log!("VM {a1:#x} launched, digest {}", Hex(&digest));
            let mut words =
                digest.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
            Ok(core::array::from_fn(|_| words.next().unwrap_or(0)))
        }),
        Function::TimerLoad => {
            let offset = if a1 == 0 { 0 } else { with_vm(a1, |vm| Ok(vm.cntvoff()))? };
            cntvoff_el2::write(offset);
            Ok(done)
        }
        Function::PageMap => {
            if a4 != havmsi_abi::PAGE_SIZE {
                return Err(Error::Invalid.into());
            }
            with_vm(a1, |vm| vm.map_page(world, a2, a3).map(|()| done))
        }
        Function::PageUnmap => with_vm(a1, |vm| {
            vm.unmap_pages(world, a2, a3)?;
            Ok([a3, 0, 0, 0, 0])
        }),
        Function::MapDev => {
            if !platform::is_virtual_cpu_interface(a3, world.gic.version())
                && !havmsi_core::left_out!(DeviceList)
            {
                return Err(Error::Denied.into());
            }
            let pa = havmsi_core::addr::Pa(a3);
            with_vm(a1, |vm| vm.map_device(world, a2, pa).map(|()| done))
        }
        Function::PoolDonate => {
            with_vm(a1, |vm| Ok(vm.donate_pool(world, a2, a3).map(|()| done)?))
        }
        Function::VmReset => with_vm(a1, |vm| Ok(vm.reset(world).map(|()| done)?)),
        Function::VmDestroy => {
            with_vm(a1, |vm| Ok(vm.destroy(world, vms::free_context).map(|()| done)?))
        }
        Function::Stats => Ok(stats(world)),
        // Handled by the caller, as it has no results to give.
        Function::VcpuRun => Err(Error::NotSupported.into()),
    }
}

fn with_vm<T>(handle: u64, f: impl FnOnce(&mut Vm) -> Result<T, MapError>) -> Result<T, MapError> {
    let (_, vm) = vms::by_handle(handle)?;
    let mut vm = vm.lock();
    vm.check_handle(handle)?;
    f(&mut vm)
}

fn create(config: Config) -> Result<[u64; 5], MapError> {
    // The guest's counter starts at 0 with its VM.
    let cntvoff = cntpct_el0::read();
    for (slot, vm) in vms::all() {
        match vm.lock().create(slot, vms::root(slot), config, cntvoff) {
            Ok(handle) => return Ok([handle, cntvoff, 0, 0, 0]),
            Err(Error::Busy) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::NoMemory.into())
}

fn stats(world: &World) -> [u64; 5] {
    let census = world.pages().census();
    let (mut count, mut vcpus) = (0, 0);
    for (_, vm) in vms::all() {
        let vm = vm.lock();
        if vm.exists() {
            count += 1;
            vcpus += vm.vcpu_count() as u64;
        }
    }
    [count, vcpus, census.private, census.table, census.host]
}

/// A digest in hexadecimal.
struct Hex<'a>(&'a [u8]);

impl core::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
