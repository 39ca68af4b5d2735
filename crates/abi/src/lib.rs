// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interface between the host and the monitor: the only source of its
//! numbers. The C header for Linux is generated from here (`header`).
//!
//! Calls are SMC64 fast calls in the SiP range (SMC Calling Convention,
//! Arm DEN 0028): the function identifier in `x0`, arguments from `x1`;
//! on return the [`Status`] in `x0` and results from `x1`. All addresses are
//! physical or intermediate physical byte addresses and 4 KiB aligned.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "header"))]
pub mod header;
pub mod layout;
mod run_page;

pub use run_page::{
    ENTRY_OFFSET, EXIT_OFFSET, Entry, EntryFlags, Exit, ExitClass, MAX_LRS, WORDS_ENTRY,
    WORDS_EXIT, WORDS_EXIT_CAUSE,
};

/// Major version; a host must refuse a monitor with another one.
pub const VERSION_MAJOR: u32 = 1;
/// Minor version; grows when calls or exits are added.
pub const VERSION_MINOR: u32 = 2;
/// What [`Function::Version`] returns in `x1`.
pub const VERSION: u64 = ((VERSION_MAJOR as u64) << 16) | VERSION_MINOR as u64;

/// The answer to [`UID_CALL`], in `w0` to `w3` (SMCCC "Call UID query").
pub const UID: [u32; 4] = [0x4b2f_7d1c, 0x96e3_a85d, 0x5e0b_41c2, 0xd719_4f3a];
/// SMCCC SiP service "Call UID query" (SMC32).
pub const UID_CALL: u32 = 0x8200_ff01;
/// A call that exists only in a monitor built with the feature `audit`, for
/// tests: `0` checks what must always hold, `1` the calling CPU's registers
/// only. SUCCESS, or INTEGRITY with the violation on the monitor's console.
/// No vCPU may run meanwhile, and no other CPU call.
pub const AUDIT_CALL: u32 = 0xc200_ff00;
/// A guest's call (SMC64), not the host's: `half (0, 1) -> 16 bytes of its key`.
pub const GUEST_KEY_CALL: u32 = 0xc200_0100;
/// First function identifier of the host ABI.
pub const FUNCTION_BASE: u32 = 0xc200_0000;

/// Size of a page (granule) in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// VMs that can exist at once. One VMID each; VMID 0 is the host's and 8 bits
/// are all that a Cortex-A57 has.
pub const MAX_VMS: usize = 128;
/// vCPUs that can exist at once, over all VMs.
pub const MAX_VCPUS: usize = 512;
/// vCPUs of one VM.
pub const MAX_VCPUS_PER_VM: usize = 64;
/// RAM ranges of one VM.
pub const MAX_RAM_RANGES: usize = 8;
/// Pages that one call may name, PAGE_MAP excepted.
pub const MAX_PAGES_PER_CALL: u64 = 32;
/// Pages that one PAGE_MAP may name: interrupts are off until all are wiped.
pub const MAX_PAGES_PER_MAP: u64 = 128;
/// Bits of the largest guest physical address space.
pub const MAX_IPA_BITS: u64 = 40;
/// Bits of the smallest guest physical address space.
pub const MIN_IPA_BITS: u64 = 32;

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// The calls of the host ABI. Arguments and results are listed in
        /// `docs/abi.md`.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Function {
            $($(#[$doc])* $name = $number,)*
        }

        impl Function {
            /// All calls, in the order of their numbers.
            pub const ALL: [Self; 18] = [$(Self::$name,)*];
        }
    };
}

functions! {
    /// `-> version, features`
    Version = 0,
    /// `-> ICH_VTR_EL2 or GICH_VTR, GIC version, largest IPA bits`
    CpuInfo = 1,
    /// Destroys every VM; [`Status::Again`] until done.
    HostReset = 2,
    /// `max_vcpus, gic (0, 2, 3), ipa_bits -> handle, CNTVOFF`
    VmCreate = 3,
    /// `vm, ipa, size`: declares guest RAM.
    VmAddRam = 4,
    /// `vm, idx, run_pa`
    VcpuCreate = 5,
    /// `vm, idx, pc, x0, x1, x2, x3`: the vCPU is on at launch.
    VcpuSetBoot = 6,
    /// `vm, ipa, pa`: donates a page with its content, measured.
    VmPopulate = 7,
    /// `vm -> digest (4 x u64)`
    VmActivate = 8,
    /// `vm, idx -> exit class`
    VcpuRun = 9,
    /// `vm or 0`: loads CNTVOFF_EL2 for the host's use.
    TimerLoad = 10,
    /// `vm, ipa, pa, size, tag (2 x u64)`: donates pages; their content is zeroed. Where one
    /// page was sealed it comes back alone, with the tag.
    PageMap = 11,
    /// `vm, ipa, n -> done, tag (2 x u64)`: the first page comes back to the host, sealed.
    PageUnmap = 12,
    /// `vm, ipa, pa`: maps a page of the GICv2 virtual CPU interface.
    MapDev = 13,
    /// `vm, pa, n`: donates table memory.
    PoolDonate = 14,
    /// `vm`: scrubs and returns all private pages, opens the launch again;
    /// [`Status::Again`] until done.
    VmReset = 15,
    /// `vm`: as reset, then everything else; [`Status::Again`] until done.
    VmDestroy = 16,
    /// `-> VMs, vCPUs, private pages, pool pages, host pages, shared pages`
    Stats = 17,
}

impl Function {
    /// The function identifier for `x0`.
    pub const fn id(self) -> u32 {
        FUNCTION_BASE + self as u32
    }

    /// The call with this identifier, if there is one. As in the SMC Calling
    /// Convention only the low 32 bits of the register count.
    pub fn from_id(id: u32) -> Option<Self> {
        let index = usize::try_from(id.checked_sub(FUNCTION_BASE)?).ok()?;
        Self::ALL.get(index).copied()
    }
}

/// Why a call was refused. A refused call has changed nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i64)]
pub enum Error {
    /// No such call.
    NotSupported = -1,
    /// The page, the range or the VM is not the caller's to use so.
    Denied = -2,
    /// An argument is malformed.
    Invalid = -3,
    /// Table memory is short; `x1` = pages that suffice. Or no slot is free (`x1` = 0).
    NoMemory = -4,
    /// In use on another CPU.
    Busy = -5,
    /// Not finished or raced: call again with the same arguments.
    Again = -6,
    /// Content failed its authentication.
    Integrity = -7,
    /// Not possible in the present state of the VM or vCPU.
    State = -8,
}

impl Error {
    /// The value of `x0`.
    pub const fn code(self) -> i64 {
        self as i64
    }
}

/// `x0` of a call that was carried out.
pub const SUCCESS: i64 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_ids_round_trip() {
        for f in Function::ALL {
            assert_eq!(Function::from_id(f.id()), Some(f));
        }
        assert_eq!(Function::from_id(FUNCTION_BASE + 18), None);
        assert_eq!(Function::from_id(FUNCTION_BASE - 1), None);
        assert_eq!(Function::from_id(0), None);
    }

    #[test]
    fn error_codes_are_distinct_and_negative() {
        for (i, a) in Error::ALL.iter().enumerate() {
            assert!(a.code() < 0);
            assert!(Error::ALL.iter().skip(i + 1).all(|b| b.code() != a.code()));
        }
    }
}
