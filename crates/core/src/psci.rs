// SPDX-License-Identifier: MIT OR Apache-2.0
//! Power of CPUs and vCPUs: what PSCI 1.1 (Arm DEN 0022F) answers, and their
//! state. What is done to a CPU is the caller's.

use crate::launch::Boot;

/// Function identifiers (DEN 0022F 5.1, SMCCC DEN 0028 7.1).
pub mod id {
    /// PSCI_VERSION.
    pub const VERSION: u32 = 0x8400_0000;
    /// CPU_SUSPEND, SMC32 and SMC64.
    pub const CPU_SUSPEND: u32 = 0x8400_0001;
    /// CPU_OFF.
    pub const CPU_OFF: u32 = 0x8400_0002;
    /// CPU_ON.
    pub const CPU_ON: u32 = 0x8400_0003;
    /// AFFINITY_INFO.
    pub const AFFINITY_INFO: u32 = 0x8400_0004;
    /// MIGRATE_INFO_TYPE.
    pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    /// SYSTEM_OFF.
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    /// SYSTEM_RESET.
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
    /// PSCI_FEATURES.
    pub const FEATURES: u32 = 0x8400_000a;
    /// SYSTEM_RESET2, SMC32 and SMC64.
    pub const SYSTEM_RESET2: u32 = 0x8400_0012;
    /// SMCCC_VERSION.
    pub const SMCCC_VERSION: u32 = 0x8000_0000;
    /// SMCCC_ARCH_FEATURES.
    pub const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
    /// The bit that makes a call SMC64: arguments are 64 bits wide.
    pub const SMC64: u32 = 1 << 30;
}

/// PSCI 1.1.
const VERSION: u64 = 0x1_0001;
/// SMCCC 1.2.
const SMCCC_VERSION: u64 = 0x1_0002;
/// MIGRATE_INFO_TYPE: there is no trusted OS that would have to move.
const MIGRATION_NOT_REQUIRED: u64 = 2;
/// `Aff3:Aff2:Aff1:Aff0` of an MPIDR: [39:32], [23:0].
pub const AFFINITY_MASK: u64 = 0xff_00ff_ffff;

/// Return codes (DEN 0022F 5.2.2), as a register holds them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum Error {
    /// Unknown function.
    NotSupported = -1,
    /// Arguments that name nothing.
    InvalidParameters = -2,
    /// The CPU is on.
    AlreadyOn = -4,
    /// The CPU is being turned on.
    OnPending = -5,
    /// The CPU does not answer.
    InternalFailure = -6,
    /// An entry point outside the host's memory.
    InvalidAddress = -9,
}

impl Error {
    /// The value for x0.
    pub const fn code(self) -> u64 {
        (self as i64).cast_unsigned()
    }
}

/// State of a CPU or vCPU (DEN 0022F 6.6).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Power {
    /// Off.
    Off,
    /// Turned on by CPU_ON or at launch; starts here at its next run.
    Pending(Boot),
    /// On.
    On,
}

impl Power {
    /// CPU_ON: it will start at `boot`.
    ///
    /// # Errors
    /// As PSCI has it; nothing changes then.
    pub const fn turn_on(&mut self, boot: Boot) -> Result<(), Error> {
        match self {
            Self::On => Err(Error::AlreadyOn),
            Self::Pending(_) => Err(Error::OnPending),
            Self::Off => {
                *self = Self::Pending(boot);
                Ok(())
            }
        }
    }

    /// Where it has to start, if it was turned on and has not been told yet.
    pub const fn start(&mut self) -> Option<Boot> {
        let Self::Pending(boot) = *self else { return None };
        *self = Self::On;
        Some(boot)
    }

    /// What AFFINITY_INFO says of it.
    pub const fn info(self) -> u64 {
        match self {
            Self::On => 0,
            Self::Off => 1,
            Self::Pending(_) => 2,
        }
    }
}

/// Answers what has the same answer for the host and for guests: the versions,
/// and what there is. `None` if `function` is none of these.
pub const fn discovery(function: u32, argument: u32) -> Option<u64> {
    match function {
        id::VERSION => Some(VERSION),
        id::SMCCC_VERSION => Some(SMCCC_VERSION),
        id::MIGRATE_INFO_TYPE => Some(MIGRATION_NOT_REQUIRED),
        id::FEATURES => Some(features(argument)),
        id::SMCCC_ARCH_FEATURES => Some(match argument {
            id::SMCCC_VERSION | id::SMCCC_ARCH_FEATURES => 0,
            _ => Error::NotSupported.code(),
        }),
        _ => None,
    }
}

/// PSCI_FEATURES: 0 if `function` is there. CPU_SUSPEND: original power state
/// format, platform coordinated, as its feature flags are 0 too.
const fn features(function: u32) -> u64 {
    match (function & !id::SMC64, function & id::SMC64 != 0) {
        (id::CPU_SUSPEND | id::CPU_ON | id::AFFINITY_INFO, _)
        | (id::VERSION | id::CPU_OFF | id::MIGRATE_INFO_TYPE | id::FEATURES, false)
        | (id::SYSTEM_OFF | id::SYSTEM_RESET | id::SMCCC_VERSION, false) => 0,
        _ => Error::NotSupported.code(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_goes_on_once_and_off_again() {
        let at = |pc| Boot { pc, x: [1, 2, 3, 4] };
        let mut cpu = Power::Off;
        assert_eq!((cpu.info(), cpu.start()), (1, None));
        assert_eq!(cpu.turn_on(at(1)), Ok(()));
        assert_eq!(cpu.info(), 2);
        assert_eq!(cpu.turn_on(at(2)), Err(Error::OnPending));
        assert_eq!(cpu.start(), Some(at(1)));
        assert_eq!(cpu.start(), None);
        assert_eq!(cpu.turn_on(at(2)), Err(Error::AlreadyOn));
        assert_eq!(cpu.info(), 0);
        cpu = Power::Off;
        assert_eq!(cpu.turn_on(at(3)), Ok(()));
        assert_eq!(cpu, Power::Pending(at(3)));
    }

    #[test]
    fn features_know_both_conventions() {
        let no = u64::MAX;
        assert_eq!(features(id::CPU_ON | id::SMC64), 0);
        assert_eq!(features(id::CPU_ON), 0);
        assert_eq!(features(id::CPU_OFF | id::SMC64), no);
        assert_eq!(features(0x8400_000e), no);
        assert_eq!(discovery(id::SMCCC_ARCH_FEATURES, 0x8000_8000), Some(no));
        assert_eq!(discovery(id::CPU_ON, 0), None);
        let codes = [
            (Error::NotSupported, -1_i64),
            (Error::InvalidParameters, -2),
            (Error::AlreadyOn, -4),
            (Error::OnPending, -5),
            (Error::InternalFailure, -6),
            (Error::InvalidAddress, -9),
        ];
        for (error, code) in codes {
            assert_eq!(error.code(), code.cast_unsigned());
        }
    }
}
