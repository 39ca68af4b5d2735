// SPDX-License-Identifier: MIT OR Apache-2.0
//! Power of the host's CPUs: what PSCI 1.1 (Arm DEN 0022F) answers, and the
//! state of each CPU. What is done to a CPU is the caller's.

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
pub const VERSION: u64 = 0x1_0001;
/// SMCCC 1.2.
pub const SMCCC_VERSION: u64 = 0x1_0002;
/// MIGRATE_INFO_TYPE: there is no trusted OS that would have to move.
pub const MIGRATION_NOT_REQUIRED: u64 = 2;
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
    /// Not allowed.
    Denied = -3,
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
    #[must_use]
    pub const fn code(self) -> u64 {
        (self as i64).cast_unsigned()
    }
}

/// State of a CPU (DEN 0022F 6.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Waits in the monitor.
    Off,
    /// Was told to enter the host at `entry` with `context` in x0.
    Pending {
        /// Address of its first instruction.
        entry: u64,
        /// Its x0.
        context: u64,
    },
    /// In the host.
    On,
}

/// The state of up to `N` CPUs.
pub struct Power<const N: usize> {
    cpus: [State; N],
    present: usize,
}

impl<const N: usize> Power<N> {
    /// `present` CPUs, all off but the first.
    #[must_use]
    pub const fn new(present: usize) -> Self {
        let mut cpus = [State::Off; N];
        cpus[0] = State::On;
        Self { cpus, present: if present < N { present } else { N } }
    }

    fn cpu(&mut self, cpu: usize) -> Option<&mut State> {
        self.cpus.get_mut(..self.present)?.get_mut(cpu)
    }

    /// CPU_ON of `cpu` (`None`: no CPU has that affinity).
    ///
    /// # Errors
    /// As PSCI has it; nothing changes then.
    pub fn on(&mut self, cpu: Option<usize>, entry: u64, context: u64) -> Result<usize, Error> {
        let number = cpu.ok_or(Error::InvalidParameters)?;
        let state = self.cpu(number).ok_or(Error::InvalidParameters)?;
        match state {
            State::On => Err(Error::AlreadyOn),
            State::Pending { .. } => Err(Error::OnPending),
            State::Off => {
                *state = State::Pending { entry, context };
                Ok(number)
            }
        }
    }

    /// `cpu` asks whether it was turned on: entry and context, once.
    pub fn take(&mut self, cpu: usize) -> Option<(u64, u64)> {
        let state = self.cpu(cpu)?;
        let State::Pending { entry, context } = *state else { return None };
        *state = State::On;
        Some((entry, context))
    }

    /// CPU_OFF by `cpu` itself.
    pub fn off(&mut self, cpu: usize) {
        if let Some(state) = self.cpu(cpu) {
            *state = State::Off;
        }
    }

    /// AFFINITY_INFO of a single CPU: 0 on, 1 off, 2 being turned on.
    ///
    /// # Errors
    /// [`Error::InvalidParameters`] if there is no such CPU.
    pub fn affinity_info(&mut self, cpu: Option<usize>) -> Result<u64, Error> {
        match cpu.and_then(|cpu| self.cpu(cpu)) {
            Some(State::On) => Ok(0),
            Some(State::Off) => Ok(1),
            Some(State::Pending { .. }) => Ok(2),
            None => Err(Error::InvalidParameters),
        }
    }
}

/// PSCI_FEATURES: 0 if `function` is there. CPU_SUSPEND: original power state
/// format, platform coordinated, as its feature flags are 0 too.
#[must_use]
pub const fn features(function: u32) -> Option<u64> {
    let both = function & !id::SMC64;
    match function {
        id::VERSION
        | id::CPU_OFF
        | id::MIGRATE_INFO_TYPE
        | id::SYSTEM_OFF
        | id::SYSTEM_RESET
        | id::FEATURES
        | id::SMCCC_VERSION => Some(0),
        _ if matches!(both, id::CPU_SUSPEND | id::CPU_ON | id::AFFINITY_INFO) => Some(0),
        _ => None,
    }
}

/// SMCCC_ARCH_FEATURES: 0 if `function` is there.
#[must_use]
pub const fn arch_features(function: u32) -> Option<u64> {
    match function {
        id::SMCCC_VERSION | id::SMCCC_ARCH_FEATURES => Some(0),
        _ => None,
    }
}

/// The affinity fields that CPU_ON and AFFINITY_INFO name a CPU by: Aff3 in
/// [39:32], Aff2 to Aff0 in [23:0]; all else must be zero (DEN 0022F 5.1.4).
#[must_use]
pub const fn affinity(target: u64) -> Option<u64> {
    if target & !AFFINITY_MASK == 0 { Some(target) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_goes_on_once_and_off_again() {
        let mut p = Power::<4>::new(2);
        assert_eq!(p.on(Some(0), 1, 2), Err(Error::AlreadyOn));
        assert_eq!(p.on(Some(1), 1, 2), Ok(1));
        assert_eq!(p.affinity_info(Some(1)), Ok(2));
        assert_eq!(p.on(Some(1), 3, 4), Err(Error::OnPending));
        assert_eq!(p.take(1), Some((1, 2)));
        assert_eq!(p.take(1), None);
        assert_eq!(p.on(Some(1), 3, 4), Err(Error::AlreadyOn));
        assert_eq!(p.affinity_info(Some(1)), Ok(0));
        p.off(1);
        assert_eq!(p.affinity_info(Some(1)), Ok(1));
        assert_eq!(p.on(Some(1), 5, 6), Ok(1));
        assert_eq!(p.take(1), Some((5, 6)));
    }

    #[test]
    fn absent_cpus_stay_absent() {
        let mut p = Power::<4>::new(2);
        for cpu in [None, Some(2), Some(3), Some(4), Some(usize::MAX)] {
            assert_eq!(p.on(cpu, 0, 0), Err(Error::InvalidParameters));
            assert_eq!(p.affinity_info(cpu), Err(Error::InvalidParameters));
        }
        assert_eq!(p.take(3), None);
        assert_eq!(Power::<4>::new(9).present, 4);
    }

    #[test]
    fn features_know_both_conventions() {
        assert_eq!(features(id::CPU_ON | id::SMC64), Some(0));
        assert_eq!(features(id::CPU_ON), Some(0));
        assert_eq!(features(id::CPU_OFF | id::SMC64), None);
        assert_eq!(features(0x8400_000e), None);
        assert_eq!(arch_features(0x8000_8000), None);
        assert_eq!(Error::Denied.code(), u64::MAX - 2);
    }

    #[test]
    fn an_affinity_has_no_other_bits() {
        assert_eq!(affinity(0x1_0000_0203), Some(0x1_0000_0203));
        assert_eq!(affinity(0x8000_0000), None);
        assert_eq!(affinity(1 << 40), None);
    }
}
