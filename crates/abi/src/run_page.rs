// SPDX-License-Identifier: MIT OR Apache-2.0
//! The run page: one 4 KiB page of host memory a vCPU. The monitor copies the
//! entry half once before it looks at it, and writes the exit half once.

/// List registers that the page has room for (GICv3 implements at most 16).
pub const MAX_LRS: usize = 16;
/// Offset of the entry half in bytes.
pub const ENTRY_OFFSET: usize = 0;
/// Offset of the exit half in bytes.
pub const EXIT_OFFSET: usize = 0x800;
/// 64-bit words of the entry half.
pub const WORDS_ENTRY: usize = 8 + MAX_LRS;
/// 64-bit words of the exit half.
pub const WORDS_EXIT: usize = WORDS_EXIT_CAUSE + 1 + MAX_LRS;

/// Bits of [`Entry::flags`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EntryFlags(pub u64);

impl EntryFlags {
    /// The access that the last exit reported is done: take the result, step the PC.
    pub const COMPLETE: u64 = 1 << 0;
    /// Answer the MMIO access with a synchronous external abort.
    pub const INJECT_SEA: u64 = 1 << 1;
    /// Answer the system register access with an Undefined Instruction exception.
    pub const INJECT_UNDEF: u64 = 1 << 2;
    /// Trap WFI.
    pub const TRAP_WFI: u64 = 1 << 3;
    /// Trap WFE.
    pub const TRAP_WFE: u64 = 1 << 4;
    /// Bits that answer an exit; at most one may be set.
    pub const ANSWERS: u64 = Self::COMPLETE | Self::INJECT_SEA | Self::INJECT_UNDEF;
    /// All bits that mean something.
    pub const ALL: u64 = Self::ANSWERS | Self::TRAP_WFI | Self::TRAP_WFE;
}

/// What the host gives for one run of a vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Entry {
    /// See [`EntryFlags`].
    pub flags: EntryFlags,
    /// Results of a hypercall: the guest's `x0` to `x3`.
    pub gpr: [u64; 4],
    /// Result of an MMIO or system register read.
    pub data: u64,
    /// `ICH_HCR_EL2` or `GICH_HCR`.
    pub ich_hcr: u64,
    /// List registers in use.
    pub nr_lr: u64,
    /// `ICH_LR<n>_EL2`; for a GICv2 in the same format, with the sender of an SGI
    /// in bits 12 to 10.
    pub lr: [u64; MAX_LRS],
}

impl Entry {
    /// Reads the entry half, each word once by its number. List registers that
    /// are not in use are not read, and 0.
    #[inline]
    pub fn read(word: impl Fn(usize) -> u64) -> Self {
        let mut lr = [0; MAX_LRS];
        let nr_lr = word(7);
        let used = usize::try_from(nr_lr).unwrap_or(usize::MAX);
        for (n, lr) in lr.iter_mut().enumerate().take(used) {
            *lr = word(8 + n);
        }
        Self {
            flags: EntryFlags(word(0)),
            gpr: [word(1), word(2), word(3), word(4)],
            data: word(5),
            ich_hcr: word(6),
            nr_lr,
            lr,
        }
    }
}

/// Why the guest stopped running.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u64)]
pub enum ExitClass {
    /// An interrupt for the host; nothing is exposed.
    #[default]
    Irq = 0,
    /// A load outside declared RAM.
    MmioRead = 1,
    /// A store outside declared RAM.
    MmioWrite = 2,
    /// A read of a system register that the host emulates.
    SysregRead = 3,
    /// A write of a system register that the host emulates.
    SysregWrite = 4,
    /// A PSCI call that the host must act on, or MEM_UNSHARE that it must agree to.
    Hvc = 5,
    /// A trapped WFI or WFE.
    Wfx = 6,
    /// A stage-2 fault in declared RAM; resolved by PAGE_MAP and another run.
    Fault = 7,
    /// A physical SError interrupt.
    SError = 8,
}

/// Why a guest stopped running, and what that shows of it. What an exit class
/// does not expose is 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exit {
    /// Why the guest stopped.
    pub class: ExitClass,
    /// `ESR_EL2` with the register number masked to 0.
    pub esr: u64,
    /// The faulting IPA in bytes (the page for [`ExitClass::Fault`]).
    pub ipa: u64,
    /// The value of a store or of a system register write.
    pub data: u64,
    /// 1 if the guest was at EL1, 0 at EL0.
    pub mode: u64,
}

/// Words of the exit half that tell why. Behind them are
/// `ICH_VMCR_EL2` or `GICH_VMCR` (which interrupts the guest would take) and the
/// list registers that were in use: state and virtual INTID.
pub const WORDS_EXIT_CAUSE: usize = 9;

impl Exit {
    /// The first words of the exit half, in order; `gpr` are the guest's `x0` to
    /// `x3` of a hypercall.
    #[inline]
    pub const fn words(&self, gpr: [u64; 4]) -> [u64; WORDS_EXIT_CAUSE] {
        let [g0, g1, g2, g3] = gpr;
        [self.class as u64, self.esr, self.ipa, g0, g1, g2, g3, self.data, self.mode]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_words_land_in_their_fields() {
        let mut words = [0; WORDS_ENTRY];
        for (word, n) in words.iter_mut().zip(100..) {
            *word = n;
        }
        words[7] = 16;
        let e = Entry::read(|i| words[i]);
        assert_eq!(e.flags.0, 100);
        assert_eq!(e.gpr, [101, 102, 103, 104]);
        assert_eq!((e.data, e.ich_hcr, e.nr_lr), (105, 106, 16));
        assert_eq!((e.lr[0], e.lr[15]), (108, 123));
        for used in [0, 1, 17, u64::MAX] {
            words[7] = used;
            let e = Entry::read(|i| words[i]);
            assert_eq!((e.nr_lr, e.lr[0] != 0, e.lr[15] != 0), (used, used > 0, used > 15));
        }
    }

    #[test]
    fn exit_words_follow_the_documented_offsets() {
        let exit = Exit { class: ExitClass::Wfx, esr: 1, ipa: 2, data: 7, mode: 8 };
        assert_eq!(exit.words([3, 4, 5, 6]), [6, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
