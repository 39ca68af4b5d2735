// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls of the host that are the monitor's own (`docs/abi.md`).

use havmsi_abi::{Error, Function, MAX_IPA_BITS, SUCCESS, UID, UID_CALL, VERSION};
use havmsi_core::addr::{Pa, words};
use havmsi_core::launch::{Boot, Config};
use havmsi_core::page::{Owner, VmSlot};
use havmsi_core::vm::Vm;
use havmsi_hal::sysreg::{cntpct_el0, cntvoff_el2};

use crate::host::{self, World};
use crate::{boot, log, platform, vms};

/// What a call gives back in `x0` to `x6`.
type Results = [u64; 7];

/// A call that is neither PSCI's nor VCPU_RUN. Returns `x0` on.
pub fn host_call(function: u32, args: &[u64; 8]) -> Results {
    if function == UID_CALL {
        let [a, b, c, d] = UID.map(u64::from);
        return [a, b, c, d, 0, 0, 0];
    }
    #[cfg(feature = "audit")]
    if function == havmsi_abi::AUDIT_CALL {
        return [crate::audit::call(args[1]), 0, 0, 0, 0, 0, 0];
    }
    let known = Function::from_id(function);
    let result = known.map_or(Err(Error::NotSupported), |known| call(host::world(), known, args));
    // What a call maps lacks a table of level 2 and one of level 3 at most.
    let maps = matches!(known, Some(Function::VmPopulate | Function::PageMap | Function::MapDev));
    match result {
        Ok([a, b, c, d, e, f]) => [SUCCESS.cast_unsigned(), a, b, c, d, e, f],
        Err(error) => {
            let wanted = if maps && error == Error::NoMemory { 2 } else { 0 };
            [error.code().cast_unsigned(), wanted, 0, 0, 0, 0, 0]
        }
    }
}

/// All calls but VCPU_RUN, with `x1` on if they return something there.
fn call(world: &World, function: Function, args: &[u64; 8]) -> Result<[u64; 6], Error> {
    let [_, a1, a2, a3, a4, a5, a6, a7] = *args;
    match function {
        Function::Version => return Ok([VERSION, 0, 0, 0, 0, 0]),
        Function::CpuInfo => {
            return Ok([world.vgic.vtr, world.gic.version(), MAX_IPA_BITS, 0, 0, 0]);
        }
        Function::HostReset => {
            for (_, vm) in vms::all() {
                match vm.lock().destroy(world, vms::free_context) {
                    // No VM in this slot.
                    Err(Error::State) => {}
                    step => return Err(step.err().unwrap_or(Error::Again)),
                }
            }
        }
        Function::VmCreate => {
            let config = Config { max_vcpus: a1, gic: a2, ipa_bits: a3 };
            if config.gic != 0 && config.gic != world.gic.version() {
                return Err(Error::Invalid);
            }
            return create(config);
        }
        Function::VcpuCreate => with_vm(a1, |vm| {
            let context = vms::take_context().ok_or(Error::NoMemory)?;
            vm.create_vcpu(world, a2, a3, context).inspect_err(|_| vms::free_context(context))
        })?,
        Function::VmAddRam => with_vm(a1, |vm| vm.add_ram(a2, a3))?,
        Function::VcpuSetBoot => {
            with_vm(a1, |vm| vm.set_boot(a2, Boot { pc: a3, x: [a4, a5, a6, a7] }))?;
        }
        Function::VmPopulate => with_vm(a1, |vm| vm.populate(world, a2, a3, &mut [0; 4096]))?,
        Function::VmActivate => {
            let digest = words(&with_vm(a1, |vm| vm.activate(world))?);
            let [a, b, c, d] = digest.map(u64::to_be);
            log!("VM {a1:#x} launched, digest {a:016x}{b:016x}{c:016x}{d:016x}");
            let [a, b, c, d] = digest;
            return Ok([a, b, c, d, 0, 0]);
        }
        Function::TimerLoad => {
            havmsi_core::left_out!(Panic => assert!(a1 != u64::MAX, "told to"));
            let offset = if a1 == 0 { 0 } else { with_vm(a1, |vm| Ok::<_, Error>(vm.cntvoff()))? };
            cntvoff_el2::write(offset);
        }
        Function::PageMap => {
            let result = with_vm(a1, |vm| vm.map_pages(world, a2, a3, a4, [a5, a6]));
            if result == Err(Error::Integrity) {
                log!("VM {a1:#x} stopped: what came back at {a2:#x} is not what was sealed");
            }
            result?;
        }
        Function::PageUnmap => {
            let (done, [low, high]) = with_vm(a1, |vm| vm.unmap_pages(world, a2, a3))?;
            return Ok([done, low, high, 0, 0, 0]);
        }
        Function::MapDev => {
            if !platform::is_virtual_cpu_interface(a3, world.gic.version())
                && !havmsi_core::left_out!(DeviceList)
            {
                return Err(Error::Denied);
            }
            with_vm(a1, |vm| vm.map_device(world, a2, Pa(a3)))?;
        }
        Function::PoolDonate => with_vm(a1, |vm| vm.donate_pool(world, a2, a3))?,
        Function::VmReset => with_vm(a1, |vm| vm.reset(world))?,
        Function::VmDestroy => with_vm(a1, |vm| vm.destroy(world, vms::free_context))?,
        Function::Stats => return Ok(stats(world)),
        // Of a guest whose calls a test monitor takes for the host's.
        Function::VcpuRun => return Err(Error::NotSupported),
    }
    Ok([0; 6])
}

fn with_vm<T>(handle: u64, f: impl FnOnce(&mut Vm) -> Result<T, Error>) -> Result<T, Error> {
    let (_, vm) = vms::by_handle(handle)?;
    let mut vm = vm.lock();
    vm.check_handle(handle)?;
    f(&mut vm)
}

fn create(config: Config) -> Result<[u64; 6], Error> {
    // The guest's counter starts at 0 with its VM.
    let cntvoff = cntpct_el0::read();
    let key = vms::RANDOM.lock().random().ok_or(Error::NotSupported)?;
    boot::vms_ran();
    for (slot, vm) in vms::all() {
        match vm.lock().create(slot, vms::root(slot), config, cntvoff, key) {
            Ok(handle) => return Ok([handle, cntvoff, 0, 0, 0, 0]),
            Err(Error::Busy) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Error::NoMemory)
}

fn stats(world: &World) -> [u64; 6] {
    let n = |owner| world.pages.count(owner);
    let (private, shared) = (Owner::Private(VmSlot(0)), Owner::Shared(VmSlot(0)));
    let (mut count, mut vcpus) = (0, 0);
    for (_, vm) in vms::all() {
        let vm = vm.lock();
        count += u64::from(vm.exists());
        vcpus += vm.vcpu_count() as u64;
    }
    [count, vcpus, n(private), n(Owner::Table(VmSlot(0))), n(Owner::Host), n(shared)]
}
