// SPDX-License-Identifier: MIT OR Apache-2.0
//! The operations that are measured: a table, which the guest, the VMM and the build tool read, so
//! that a new row is a line here. And what they and QEMU's plugin agree on.
#![no_std]
#![deny(unsafe_code)]

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
    /// A page shared with the host (MEM_SHARE) and taken back (MEM_UNSHARE), if there are such calls.
    Share,
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
    row(
        "share",
        "a page shared with the host and taken back; plain KVM has neither, and refuses both calls",
        Kind::Share,
        16,
        24,
    ),
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

/// What there is beside a VM that is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Load {
    /// Nothing.
    None,
    /// So many VMs in all: the others have run, and stand still.
    Vms(u32),
    /// So many vCPUs: the others are off.
    Vcpus(u32),
    /// So many MiB of RAM more, in which the guest has touched a page in each [`STRIDE`].
    Ram(u32),
}

/// The guest touches one page of so many bytes of the RAM that it has more.
pub const STRIDE: u64 = 256 << 10;

/// An operation, and what there is beside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Task {
    /// Its place in the table.
    pub index: usize,
    /// What else there is.
    pub load: Load,
}

impl Task {
    /// The operation as it is.
    #[must_use]
    pub const fn plain(index: usize) -> Self {
        Self { index, load: Load::None }
    }

    /// `NAME`, `NAME+vms=N`, `NAME+vcpus=N`, `NAME+ram=MIB`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (name, load) = match text.split_once('+') {
            None => (text, Load::None),
            Some((name, load)) => {
                let (what, n) = load.split_once('=')?;
                let n = n.parse().ok()?;
                let load = match what {
                    "vms" => Load::Vms(n),
                    "vcpus" => Load::Vcpus(n),
                    "ram" => Load::Ram(n),
                    _ => return None,
                };
                (name, load)
            }
        };
        Some(Self { index: find(name)?, load })
    }

    /// The operation.
    #[must_use]
    pub const fn operation(&self) -> &'static Operation {
        &OPERATIONS[self.index]
    }

    /// How many records: fewer where each takes a VM with much to set up.
    #[must_use]
    pub const fn records(&self) -> u32 {
        match self.load {
            Load::None => self.operation().records,
            _ if self.operation().kind.is_of_host() => 3,
            _ => self.operation().records,
        }
    }
}

impl core::fmt::Display for Task {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.operation().name)?;
        match self.load {
            Load::None => Ok(()),
            Load::Vms(n) => write!(f, "+vms={n}"),
            Load::Vcpus(n) => write!(f, "+vcpus={n}"),
            Load::Ram(n) => write!(f, "+ram={n}"),
        }
    }
}

/// What a Linux guest with one vCPU under QEMU is measured at: name, what it is, and how many records.
/// In the order in which they are carried out.
pub const APPLICATIONS: &[(&str, &str, u32)] = &[
    ("linux-boot", "QEMU's start to the first program of a Linux guest (1 vCPU, 256 MiB)", 1),
    (
        "linux-messages",
        "in that guest: 4 threads send 100 messages each of 100 bytes to 4 others (sockets, after hackbench)",
        5,
    ),
    ("linux-process", "in that guest: 8 processes started and waited for, one after the other", 5),
    ("linux-memory", "in that guest: 4 MiB of memory are taken and written to", 5),
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

    /// Executes a mark.
    #[cfg(target_arch = "aarch64")]
    #[inline(always)]
    #[expect(unsafe_code, reason = "an instruction that no compiler uses")]
    pub fn put<const MARK: u16>() {
        // SAFETY: does nothing; no memory access may move across it.
        unsafe {
            core::arch::asm!("movz xzr, #{}", const MARK, options(nostack, preserves_flags));
        }
    }

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
extern crate std;

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
    fn tasks_have_a_text() {
        for text in ["touch-4k", "hypercall+vms=64", "vm-start+vcpus=8", "vm-teardown+ram=8192"] {
            let task = Task::parse(text).unwrap();
            assert_eq!(std::format!("{task}"), text);
        }
        for text in ["walk", "hypercall+cats=3", "hypercall+vms", "hypercall+vms=x"] {
            assert_eq!(Task::parse(text), None, "{text}");
        }
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
