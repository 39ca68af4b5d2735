// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest's time.

use havmsi_abi::Function;

use crate::guest::{Exit, Vcpu, Vm};
use crate::harness::{Failure, Outcome};
use crate::smc::host;
use crate::{cpu, ensure, exception, expect, guest_program, harness, mrs, msr, smc, test};

guest_program!(
    clock_reader,
    "1: isb",
    "mrs x1, cntvct_el0",
    "str x1, [x20]",
    "isb",
    "mrs x1, cntpct_el0",
    "str x1, [x20, #8]",
    "mrs x1, cntfrq_el0",
    "str x1, [x20, #0x10]",
    "b 1b"
);

/// What a guest reads: virtual counter, physical counter, frequency.
#[derive(Default)]
struct Reading {
    virtual_: u64,
    physical: u64,
    frequency: u64,
}

struct Look<'a> {
    vcpu: &'a mut Vcpu,
    outcome: Result<Reading, Failure>,
}

fn read(vcpu: &mut Vcpu) -> Result<Reading, Failure> {
    Ok(Reading {
        virtual_: vcpu.report(0)?,
        physical: vcpu.report(8)?,
        frequency: vcpu.report(0x10)?,
    })
}

extern "C" fn look(at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or(0);
    // SAFETY: the test that gives it waits for the end of this job.
    let look = unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Look<'_>>(at) };
    look.outcome = read(look.vcpu);
    0
}

/// The guest's clock on CPU `on`.
fn read_on(vcpu: &mut Vcpu, on: usize) -> Result<Reading, Failure> {
    if on == 0 {
        return read(vcpu);
    }
    let mut look_ = Look { vcpu, outcome: Ok(Reading::default()) };
    cpu::start(on, look, (&raw mut look_).expose_provenance() as u64)?;
    cpu::join(on)?;
    look_.outcome
}

/// All that a host can do to time before a run, on the CPU that it is on.
extern "C" fn disturb(handle: u64) -> u64 {
    let result = host(Function::TimerLoad, &[handle]);
    msr!("cntv_cval_el0", cpu::now() / 2);
    msr!("cntp_cval_el0", u64::MAX);
    msr!("cntkctl_el1", 0x3ff);
    u64::from(result.is_err())
}

/// A guest's counters go on from the VM's making: over runs, other VMs' runs,
/// moves to another CPU and resets, whatever the host has its own set to.
fn counters_go_on() -> Outcome {
    let (vm, mut vcpu) = Vm::launch(clock_reader(), [0; 4])?;
    let (other, mut busy) = Vm::launch(clock_reader(), [0; 4])?;
    let cpus = if harness::several_cpus() { 2 } else { 1 };
    let frequency = mrs!("cntfrq_el0");
    let mut last = Reading::default();
    for round in 0..36 {
        if round % 12 == 11 {
            smc::until_done(Function::VmReset, &[vm.handle], 100_000)?;
            vm.boot(clock_reader(), [0; 4])?;
            vcpu.exit = Exit::default();
        }
        let on = round / 3 % cpus;
        let handle = [0, other.handle, vm.handle][round % 3];
        let refused = if on == 0 {
            disturb(handle)
        } else {
            cpu::start(on, disturb, handle)?;
            cpu::join(on)?
        };
        expect!(refused, 0);
        if round % 4 == 0 {
            read(&mut busy)?;
        }
        let low = cpu::now();
        let now = read_on(&mut vcpu, on)?;
        let high = cpu::now();
        ensure!(
            now.virtual_ > last.virtual_ && now.physical > last.physical,
            "round {round}: from {} {} to {} {}",
            last.virtual_,
            last.physical,
            now.virtual_,
            now.physical
        );
        ensure!(
            (low..=high).contains(&(now.virtual_ + vm.cntvoff))
                && (low..=high).contains(&now.physical),
            "round {round}: {} {}, not in {low}..={high} with offset {}",
            now.virtual_,
            now.physical,
            vm.cntvoff
        );
        expect!(now.frequency, frequency);
        last = now;
    }
    msr!("cntkctl_el1", 0);
    host(Function::TimerLoad, &[0])?;
    other.destroy()?;
    vm.destroy()
}
test!(counters_go_on, "T28");

/// The host can change neither the counters nor what they are read through.
fn counters_are_out_of_reach() -> Outcome {
    let frequency = mrs!("cntfrq_el0");
    let refused = |fault: Option<exception::Fault>, what: &str| {
        ensure!(fault.is_some(), "{what} can be written");
        Ok::<_, Failure>(())
    };
    refused(crate::try_instruction!("msr cntfrq_el0, x9"), "CNTFRQ_EL0")?;
    refused(crate::try_instruction!("msr cntvoff_el2, x9"), "CNTVOFF_EL2")?;
    refused(crate::try_instruction!("msr cnthctl_el2, x9"), "CNTHCTL_EL2")?;
    // CNTPOFF_EL2, of FEAT_ECV.
    refused(crate::try_instruction!("msr s3_4_c14_c0_6, x9"), "CNTPOFF_EL2")?;
    // CNTPS_*: the secure timer.
    refused(crate::try_instruction!("msr cntps_cval_el1, x9"), "CNTPS_CVAL_EL1")?;
    expect!(mrs!("cntfrq_el0"), frequency);
    Ok(())
}
test!(counters_are_out_of_reach, "T28");
