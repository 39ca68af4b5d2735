// SPDX-License-Identifier: MIT OR Apache-2.0
//! The operations that are measured: a table, which the guest, the VMM and the build tool read, so
//! that a new row is a line here. And what they and QEMU's plugin agree on.
#![no_std]
#![forbid(unsafe_code)]

/// What is measured: one row of the result.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Its name in results and on command lines.
    pub name: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    /// How it is done.
    pub kind: Kind,
    /// How often between two marks: a *record*. So few that the host's tick falls into few records.
    pub times: u32,
    /// How many records; the smallest one counts.
    pub records: u32,
}

/// Ways to do something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// HVC with these `x0` and `x1`; the low half of `x0` must come back as `answer`, if there is one.
    Call {
        /// `x0` and `x1`.
        x: [u64; 2],
        /// What must come back.
        answer: Option<u32>,
    },
    /// A load of 32 bits.
    Load(u64),
    /// A read of `ID_AA64PFR0_EL1`.
    IdRegister,
    /// An SGI to the other vCPU, until its handler has run.
    Ipi {
        /// The other vCPU's thread sleeps.
        sleeping: bool,
    },
    /// The virtual timer set to a time that has passed, until the handler has run.
    Timer,
    /// A store to each page of this many bytes that nothing has touched yet.
    Touch(u64),
    /// From before `KVM_CREATE_VM` to the guest's first instruction.
    Start,
    /// The VM's descriptors closed, and its memory unmapped.
    End,
    /// No VM at all: what the host itself pays.
    Host(Work),
}

/// Work of the host's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// A process is started, and waited for.
    Process,
    /// A byte to a thread on the other CPU, and back.
    Pipe,
    /// 64 pages of memory are taken, stored to, and given back.
    Memory,
}

impl Kind {
    /// vCPUs that it takes.
    #[must_use]
    pub const fn vcpus(self) -> u64 {
        if matches!(self, Self::Ipi { .. }) { 2 } else { 1 }
    }

    /// The VMM measures it; all else is measured in the guest.
    #[must_use]
    pub const fn is_of_host(self) -> bool {
        matches!(self, Self::Start | Self::End | Self::Host(_))
    }

    /// CPUs may all sleep in it, which makes the clock jump: it tells nothing then.
    #[must_use]
    pub const fn may_idle(self) -> bool {
        self.is_of_host() || matches!(self, Self::Ipi { sleeping: true })
    }
}

/// One page.
pub const PAGE: u64 = 4096;
/// A block of a level 2 table.
pub const BLOCK: u64 = 2 << 20;

const fn row(
    name: &'static str,
    what: &'static str,
    kind: Kind,
    times: u32,
    records: u32,
) -> Operation {
    Operation { name, what, kind, times, records }
}

const SYSTEM_RESET2: u64 = 0x8400_0012;
const SMCCC_VERSION: u64 = 0x8000_0000;
const INVALID_PARAMETERS: u32 = 0xffff_fffe;
const GICD_TYPER: u64 = DISTRIBUTOR + 4;

/// All operations, in the order of the table.
pub const OPERATIONS: &[Operation] = &[
    row(
        "hypercall",
        "HVC that KVM answers: PSCI SYSTEM_RESET2 with a type of reset that is reserved",
        Kind::Call { x: [SYSTEM_RESET2, 1], answer: Some(INVALID_PARAMETERS) },
        64,
        24,
    ),
    row(
        "hypercall-monitor",
        "HVC that needs no KVM: SMCCC_VERSION",
        Kind::Call { x: [SMCCC_VERSION, 0], answer: None },
        64,
        24,
    ),
    row("mmio-kernel", "load from GICD_TYPER, which KVM answers", Kind::Load(GICD_TYPER), 64, 24),
    row("mmio-user", "load from a device of the VMM's", Kind::Load(port::ANSWER), 64, 24),
    row("sysreg", "read of ID_AA64PFR0_EL1, which traps", Kind::IdRegister, 64, 24),
    row(
        "ipi-running",
        "SGI to a vCPU that runs, until its handler has run",
        Kind::Ipi { sleeping: false },
        16,
        48,
    ),
    row(
        "ipi-sleeping",
        "SGI to a vCPU whose thread sleeps, until its handler has run",
        Kind::Ipi { sleeping: true },
        1,
        96,
    ),
    row("timer", "virtual timer interrupt: armed, taken, ended", Kind::Timer, 32, 24),
    row("touch-4k", "first store to a 4 KiB page", Kind::Touch(PAGE), 64, 48),
    row("touch-2m", "first stores to all of a 2 MiB block (huge page)", Kind::Touch(BLOCK), 1, 12),
    row(
        "vm-start",
        "1 vCPU, 128 MiB: KVM_CREATE_VM to the guest's first instruction",
        Kind::Start,
        1,
        12,
    ),
    row("vm-teardown", "all descriptors closed and its memory unmapped", Kind::End, 1, 12),
    row(
        "host-process",
        "no VM: the host starts a process (busybox) and waits for it",
        Kind::Host(Work::Process),
        1,
        48,
    ),
    row(
        "host-pipe",
        "no VM: a byte through a pipe to a thread on the other CPU, and one back",
        Kind::Host(Work::Pipe),
        4,
        48,
    ),
    row(
        "host-memory",
        "no VM: the host takes 64 pages of memory, stores to each, gives them back",
        Kind::Host(Work::Memory),
        1,
        24,
    ),
];

/// The place of an operation in the table.
#[must_use]
pub fn find(name: &str) -> Option<usize> {
    OPERATIONS.iter().position(|o| o.name == name)
}

/// Where the guest's RAM begins, and its image.
pub const RAM: u64 = 0x4000_0000;
/// Bytes of RAM.
pub const RAM_SIZE: u64 = 128 << 20;
/// What nothing touches before it is measured: from here to the end of RAM.
pub const FRESH: u64 = RAM + (16 << 20);
/// The distributor.
pub const DISTRIBUTOR: u64 = 0x0800_0000;
/// The GICv2's CPU interface.
pub const CPU_INTERFACE: u64 = 0x0801_0000;
/// The first redistributor.
pub const REDISTRIBUTOR: u64 = 0x080a_0000;
/// Bytes of a redistributor.
pub const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;

/// A device of the VMM's, through which the guest reports.
pub mod port {
    const BASE: u64 = 0x0a00_0000;
    /// Where it is loaded from to be answered, and nothing else.
    pub const ANSWER: u64 = BASE;
    /// A store: counter ticks of a record.
    pub const TICKS: u64 = BASE + 8;
    /// A store: all records are told.
    pub const DONE: u64 = BASE + 0x10;
    /// A store: a wrong result.
    pub const WRONG: u64 = BASE + 0x18;
    /// A store: `ESR_EL1` of an exception that nobody expected.
    pub const FAULT: u64 = BASE + 0x20;
    /// A store: the second vCPU is done.
    pub const OTHER_DONE: u64 = BASE + 0x28;
}

/// Marks that the plugin knows: the instruction `movz xzr, #MARK`, which does nothing and which no
/// compiler uses.
pub mod mark {
    /// A record begins.
    pub const START: u16 = 0xb001;
    /// It ends.
    pub const STOP: u16 = 0xb002;
    /// Another operation comes.
    pub const NEXT: u16 = 0xb003;

    /// The mark that an instruction is.
    #[must_use]
    pub const fn of(word: u32) -> Option<u16> {
        const MOVZ_XZR: u32 = 0xd280_001f;
        let [low, high, ..] = (word >> 5).to_le_bytes();
        match u16::from_le_bytes([low, high]) {
            mark @ (START | STOP | NEXT) if word & !(0xffff << 5) == MOVZ_XZR => Some(mark),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_from_all_else() {
        assert_eq!(mark::of(0xd296_003f), Some(mark::START));
        assert_eq!(mark::of(0xd296_007f), Some(mark::NEXT));
        assert_eq!(mark::of(0xd296_0020), None); // movz x0
        assert_eq!(mark::of(0xd296_009f), None); // another number
        assert_eq!(mark::of(0xd503_201f), None); // nop
    }

    #[test]
    fn what_is_touched_fits_into_ram() {
        for o in OPERATIONS {
            let Kind::Touch(bytes) = o.kind else { continue };
            // One more record goes ahead.
            let all = u64::from(o.times) * u64::from(o.records + 1) * bytes;
            assert!(FRESH + all <= RAM + RAM_SIZE, "{}", o.name);
        }
        for (i, o) in OPERATIONS.iter().enumerate() {
            assert_eq!(find(o.name), Some(i), "a name twice");
        }
    }
}
