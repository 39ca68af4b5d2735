// SPDX-License-Identifier: MIT OR Apache-2.0
//! The exposure policy: what an exit of a guest shows to the host, what the
//! monitor answers itself, and what the host may give back. See `docs/abi.md`
//! for the table.

use havmsi_abi::{Entry, EntryFlags, Error, Exit, ExitClass};

use crate::addr::{Ipa, low32};
use crate::idreg::{self, World};
use crate::launch::Config;
use crate::psci::id;
use crate::vgic::Sgi;

/// Exception classes of `ESR_ELx.EC` (Arm ARM D19.2 "ESR_EL2").
pub mod ec {
    /// FP or SIMD instruction.
    pub const FP: u64 = 0x07;
    /// WFI or WFE.
    pub const WFX: u64 = 0x01;
    /// HVC from AArch64.
    pub const HVC64: u64 = 0x16;
    /// SMC from AArch64.
    pub const SMC64: u64 = 0x17;
    /// MSR, MRS or system instruction from AArch64.
    pub const SYSREG: u64 = 0x18;
    /// Instruction abort from a lower exception level.
    pub const INSTRUCTION_ABORT: u64 = 0x20;
    /// Data abort from a lower exception level.
    pub const DATA_ABORT: u64 = 0x24;
}

/// `ESR_ELx.EC`.
pub const EC_SHIFT: u32 = 26;
/// 32-bit instruction.
pub const IL: u64 = 1 << 25;
const ISV: u64 = 1 << 24;
const SAS_SHIFT: u32 = 22;
const SSE: u64 = 1 << 21;
const SRT_SHIFT: u32 = 16;
const SF: u64 = 1 << 15;
/// `FAR_EL2` is not valid.
pub const FNV: u64 = 1 << 10;
/// Cache maintenance.
pub const CM: u64 = 1 << 8;
/// Abort on a stage-1 walk.
pub const S1PTW: u64 = 1 << 7;
/// Abort of a write.
pub const WNR: u64 = 1 << 6;
const FSC: u64 = 0x3f;
/// Fault status: its kind without the level.
pub const FSC_TYPE: u64 = 0x3c;
const FSC_TRANSLATION: u64 = 0x04;
const FSC_TRANSLATION_L3: u64 = 0x07;
/// Permission faults.
pub const FSC_PERMISSION: u64 = 0x0c;
const FSC_ACCESS_FLAG: u64 = 0x08;
/// What the host sees of an MMIO access's syndrome: all that describes the
/// access, without the register's number.
const MMIO_ESR: u64 = 0x3f << EC_SHIFT | IL | ISV | 0b11 << SAS_SHIFT | SSE | SF | WNR | FSC;
/// The same for a system register access: all but the register's number.
const SYSREG_ESR: u64 = 0xffff_ffff & !(31 << 5);
const WFX_IS_WFE: u64 = 1;
/// Where a GICv2's guest sends SGIs: the offset of GICD_SGIR in the distributor,
/// which lies at a 4 KiB boundary that only the host knows. A store there to
/// another device passes for one too.
const GICD_SGIR: u64 = 0xf00;

/// A trapped system register access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SysregAccess {
    /// `op0, op1, CRn, CRm, op2` as in [`sysreg`].
    pub register: u32,
    /// The general register, 31 for `xzr`.
    pub rt: u8,
    /// A read (MRS).
    pub read: bool,
}

/// The encoding of a system register as one number.
pub const fn sysreg(op0: u32, op1: u32, crn: u32, crm: u32, op2: u32) -> u32 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// System registers that the policy names.
mod reg {
    use super::sysreg;
    /// The ID registers that HCR_EL2.TID3 traps, from the first to the last.
    pub const ID_FIRST: u32 = sysreg(3, 0, 0, 1, 0);
    pub const ID_LAST: u32 = sysreg(3, 0, 0, 7, 7);
    pub const MDRAR_EL1: u32 = sysreg(2, 0, 1, 0, 0);
    pub const OSLAR_EL1: u32 = sysreg(2, 0, 1, 0, 4);
    pub const OSLSR_EL1: u32 = sysreg(2, 0, 1, 1, 4);
    pub const OSDLR_EL1: u32 = sysreg(2, 0, 1, 3, 4);
    pub const DBGPRCR_EL1: u32 = sysreg(2, 0, 1, 4, 4);
    pub const ACTLR_EL1: u32 = sysreg(3, 0, 1, 0, 1);
    pub const ICC_SGI1R_EL1: u32 = sysreg(3, 0, 12, 11, 5);
    pub const ICC_ASGI1R_EL1: u32 = sysreg(3, 0, 12, 11, 6);
    pub const ICC_SGI0R_EL1: u32 = sysreg(3, 0, 12, 11, 7);
    pub const ICC_SRE_EL1: u32 = sysreg(3, 0, 12, 12, 5);
    pub const CNTP_TVAL_EL0: u32 = sysreg(3, 3, 14, 2, 0);
    pub const CNTP_CTL_EL0: u32 = sysreg(3, 3, 14, 2, 1);
    pub const CNTP_CVAL_EL0: u32 = sysreg(3, 3, 14, 2, 2);
}

impl SysregAccess {
    /// What a read gives of a register that no world has for itself; a write is
    /// ignored. The OS lock is open (another one's would keep breakpoints from acting),
    /// GICv3's system registers are on, ACTLR_EL1 holds nothing. ID registers can only be
    /// read: `raw` gives what the CPU has there, by CRm and op2.
    pub fn fixed(&self, world: World, raw: impl FnOnce(u8, u8) -> u64) -> Option<u64> {
        match self.register {
            reg::ID_FIRST..=reg::ID_LAST if self.read => {
                let [low, ..] = self.register.to_le_bytes();
                let (crm, op2) = (low >> 3 & 15, low & 7);
                Some(idreg::visible(crm, op2, raw(crm, op2), world))
            }
            reg::ICC_SRE_EL1 => Some(ICC_SRE),
            reg::OSLSR_EL1 => Some(OSLSR),
            reg::ACTLR_EL1 | reg::OSDLR_EL1 | reg::OSLAR_EL1 => Some(0),
            reg::DBGPRCR_EL1 | reg::MDRAR_EL1 => Some(0),
            _ => None,
        }
    }

    /// Decodes the ISS of an `MSR`/`MRS` trap.
    pub fn decode(esr: u64) -> Self {
        let field = |shift: u32, mask: u64| u32::try_from(esr >> shift & mask).unwrap_or(0);
        Self {
            register: sysreg(field(20, 3), field(14, 7), field(10, 15), field(1, 15), field(17, 7)),
            rt: register_number(esr >> 5),
            read: esr & 1 != 0,
        }
    }

    /// The general register that its value goes to: that of a read, 31 of a write.
    pub const fn target(&self) -> u8 {
        if self.read { self.rt } else { 31 }
    }
}

fn register_number(bits: u64) -> u8 {
    bits.to_le_bytes()[0] & 31
}

/// The general register `rt` as a value; 31 is `xzr`.
pub fn read_register(x: &[u64; 31], rt: u8) -> u64 {
    x.get(usize::from(rt)).copied().unwrap_or(0)
}

/// Sets the general register `rt`; 31 is `xzr`.
pub fn write_register(x: &mut [u64; 31], rt: u8, value: u64) {
    if let Some(register) = x.get_mut(usize::from(rt)) {
        *register = value;
    }
}

/// A load or store by a single register, as a data abort's syndrome tells. It
/// fills a word, and is copied as one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(align(8))]
pub struct Access {
    /// The general register, 31 for `xzr`.
    pub rt: u8,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u32,
    /// A load is sign extended.
    pub signed: bool,
    /// The register is 64 bits wide.
    pub wide: bool,
    /// A store.
    pub write: bool,
}

impl Access {
    /// Decodes a data abort's syndrome; `None` if it does not tell.
    pub fn decode(esr: u64) -> Option<Self> {
        (esr & ISV != 0).then(|| Self {
            rt: register_number(esr >> SRT_SHIFT),
            size: 1 << (esr >> SAS_SHIFT & 0b11),
            signed: esr & SSE != 0,
            wide: esr & SF != 0,
            write: esr & WNR != 0,
        })
    }

    /// What a store of `value` puts out: no more than its size.
    pub fn stored(&self, value: u64) -> u64 {
        left_out!(StoreWidth => return value);
        value & (u64::MAX >> (64 - 8 * self.size))
    }

    /// What the register holds after a load of `data`: truncated to the size
    /// of the access and extended as the instruction says.
    pub fn loaded(&self, data: u64) -> u64 {
        left_out!(LoadWidth => return data);
        let unused = 64 - 8 * self.size;
        let value = if self.signed {
            (((data << unused).cast_signed()) >> unused).cast_unsigned()
        } else {
            data << unused >> unused
        };
        if self.wide { value } else { value & 0xffff_ffff }
    }
}

/// What the host may answer at the next run. `Nothing` is all zeros, so that a
/// static array of contexts needs no place in the monitor's image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Pending {
    /// Nothing.
    #[default]
    Nothing,
    /// A load's data, that a store is done, or an external abort.
    Mmio(Access),
    /// A system register's value, that it is written, or an undefined instruction.
    Sysreg(SysregAccess),
    /// A hypercall's results.
    Hypercall,
    /// That an SGI is sent: the guest does not wait for it.
    Sgi,
}

/// An exception that the guest takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Injection {
    /// Undefined Instruction (EC 0).
    Undefined,
    /// Synchronous external abort, for the access that exited.
    ExternalAbort,
}

/// What to do about an exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Report it to the host. `step` moves the PC on at once.
    Exit {
        /// What the host sees.
        exit: Exit,
        /// What it may answer.
        pending: Pending,
        /// Step over the instruction now.
        step: bool,
    },
    /// Note who may get the SGI, then step and report it to the host
    /// ([`Pending::Sgi`]): tried again, it would count twice.
    Sgi(Exit, Sgi),
    /// HVC or SMC: see [`crate::vm`].
    Hypercall,
    /// Give the guest its debug registers and let it try again; of one that traps
    /// even so, set this general register to 0 and step.
    Debug(u8),
    /// Set a general register, 31 for none, then step.
    Fixed {
        /// The general register.
        rt: u8,
        /// Its value.
        value: u64,
    },
    /// Step over the instruction.
    Skip,
    /// Give the guest an exception.
    Inject(Injection),
}

/// A synchronous exit as the hardware reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Syndrome {
    /// `ESR_EL2` (or `ESR_EL3`, for what traps there).
    pub esr: u64,
    /// The faulting IPA with its low 12 bits from `FAR_EL2`; for aborts.
    pub ipa: Ipa,
    /// The guest was at EL1 (not EL0).
    pub privileged: bool,
    /// The vCPU.
    pub idx: u64,
}

impl Syndrome {
    /// The exception class.
    pub const fn ec(&self) -> u64 {
        self.esr >> EC_SHIFT & 0x3f
    }
}

/// `ICC_SRE_EL1` as host and guests see it: SRE, DFB, DIB (the system register
/// interface, always).
const ICC_SRE: u64 = 0b111;
/// `OSLSR_EL1` as host and guests see it: the OS lock is implemented (OSLM) and open.
const OSLSR: u64 = 1 << 3;

/// Decides about a synchronous exit.
///
/// `x` are the guest's general registers, `place` says whether the page at an IPA is
/// RAM or a device's, or neither ([`crate::vm::Vm::ram_or_device`]), `raw` what an ID
/// register of the CPU holds.
#[must_use]
#[inline]
pub fn decide(
    s: &Syndrome,
    x: &[u64; 31],
    config: &Config,
    place: impl FnOnce(Ipa) -> Option<bool>,
    raw: impl FnOnce(u8, u8) -> u64,
) -> Action {
    let base = Exit { mode: u64::from(s.privileged), ..Exit::default() };
    match s.ec() {
        ec::WFX => {
            let esr = ec::WFX << EC_SHIFT | IL | s.esr & WFX_IS_WFE;
            let exit = Exit { class: ExitClass::Wfx, esr, ..base };
            Action::Exit { exit, pending: Pending::Nothing, step: true }
        }
        ec::HVC64 | ec::SMC64 if s.privileged => Action::Hypercall,
        ec::SYSREG => decide_sysreg(s, x, config, raw, base),
        ec::DATA_ABORT | ec::INSTRUCTION_ABORT => decide_abort(s, x, config, place, base),
        // A feature that the guest was not offered.
        _ => Action::Inject(Injection::Undefined),
    }
}

fn decide_sysreg(
    s: &Syndrome,
    x: &[u64; 31],
    config: &Config,
    raw: impl FnOnce(u8, u8) -> u64,
    base: Exit,
) -> Action {
    let access = SysregAccess::decode(s.esr);
    let esr = s.esr & SYSREG_ESR;
    let data = read_register(x, access.rt);
    let write = Exit { class: ExitClass::SysregWrite, esr, data, ..base };
    match access.register {
        reg::ICC_SGI1R_EL1 | reg::ICC_ASGI1R_EL1 | reg::ICC_SGI0R_EL1
            if !access.read && config.gic == 3 =>
        {
            Action::Sgi(write, Sgi::by_register(s.idx, data))
        }
        reg::CNTP_TVAL_EL0 | reg::CNTP_CTL_EL0 | reg::CNTP_CVAL_EL0 => {
            let read = Exit { class: ExitClass::SysregRead, esr, ..base };
            let exit = if access.read { read } else { write };
            Action::Exit { exit, pending: Pending::Sysreg(access), step: false }
        }
        _ => match access.fixed(World::Guest, raw) {
            Some(value) => Action::Fixed { rt: access.target(), value },
            // op0 = 2: the debug and trace space.
            None if access.register >> 14 == 2 => Action::Debug(access.target()),
            None => Action::Inject(Injection::Undefined),
        },
    }
}

fn decide_abort(
    s: &Syndrome,
    x: &[u64; 31],
    config: &Config,
    place: impl FnOnce(Ipa) -> Option<bool>,
    base: Exit,
) -> Action {
    let fetch = s.ec() == ec::INSTRUCTION_ABORT;
    let abort = Action::Inject(Injection::ExternalAbort);
    let stage2 = matches!(s.esr & FSC_TYPE, FSC_TRANSLATION | FSC_PERMISSION | FSC_ACCESS_FLAG);
    if !stage2 || s.ipa.0 >> config.ipa_bits != 0 {
        return abort;
    }
    let place = place(s.ipa.page());
    if place == Some(true) && !left_out!(RamFault) {
        // A walk of stage-1 tables counts as a read: what it would write is
        // the hardware's access flag, which a page mapped RWX permits.
        let write = !fetch && s.esr & WNR != 0 && s.esr & (S1PTW | CM) == 0;
        let exit = Exit { mode: base.mode, ..fault(s.ec(), write, s.ipa) };
        return Action::Exit { exit, pending: Pending::Nothing, step: false };
    }
    if fetch || s.esr & S1PTW != 0 || place.is_none() {
        return abort;
    }
    if s.esr & CM != 0 {
        // Cache maintenance of what is not memory.
        return Action::Skip;
    }
    let Some(access) = Access::decode(s.esr) else {
        return abort;
    };
    let (class, data) = if access.write {
        (ExitClass::MmioWrite, access.stored(read_register(x, access.rt)))
    } else {
        (ExitClass::MmioRead, 0)
    };
    let exit = Exit { class, esr: s.esr & MMIO_ESR, ipa: s.ipa.0, data, ..base };
    if access.write && config.gic == 2 && access.size == 4 && s.ipa.0 & 0xfff == GICD_SGIR {
        return Action::Sgi(exit, Sgi::by_distributor(s.idx, data));
    }
    Action::Exit { exit, pending: Pending::Mmio(access), step: false }
}

/// The exit of an access from EL1 to a page of RAM that is not mapped.
const fn fault(ec: u64, write: bool, ipa: Ipa) -> Exit {
    let esr = ec << EC_SHIFT | IL | if write { WNR } else { 0 } | FSC_TRANSLATION_L3;
    Exit { class: ExitClass::Fault, esr, ipa: ipa.page().0, data: 0, mode: 1 }
}

/// The exit of a call with this `x1`: the host sees it if it may answer. Else it has to
/// map the page at `x1` first, as if the guest had written there.
#[inline]
pub const fn call(pending: &Pending, x1: u64) -> Exit {
    if matches!(pending, Pending::Nothing) {
        return fault(ec::DATA_ABORT, true, Ipa(x1));
    }
    Exit { class: ExitClass::Hvc, esr: ec::HVC64 << EC_SHIFT | IL, ipa: 0, data: 0, mode: 1 }
}

/// The general registers that an exit shows: a hypercall's first four, or the first
/// where it has no arguments: what else is there is the guest's.
#[inline]
pub fn shown_registers(class: ExitClass, x: &[u64; 31]) -> [u64; 4] {
    let bare = matches!(low32(x[0]), id::CPU_OFF | id::SYSTEM_OFF | id::SYSTEM_RESET);
    let shown = |i| class == ExitClass::Hvc && (i == 0 || !bare);
    core::array::from_fn(|i| if shown(i) { x[i] } else { 0 })
}

/// What an answer does to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nothing: the instruction, if one is pending, is tried again.
    Nothing,
    /// Sets a register and steps.
    Set {
        /// The general register, 31 for none.
        rt: u8,
        /// Its value.
        value: u64,
    },
    /// Sets `x0` to `x3` and steps.
    Results([u64; 4]),
    /// An exception.
    Inject(Injection),
}

/// Checks what the host answers against what it may answer.
///
/// # Errors
/// [`Error::Invalid`] for unknown or several answers, or one that the last exit
/// does not allow (T08, T09).
#[inline]
pub fn answer(pending: &Pending, entry: &Entry) -> Result<Answer, Error> {
    let flags = entry.flags.0;
    if flags & !EntryFlags::ALL != 0 {
        return Err(Error::Invalid);
    }
    let abort = Injection::ExternalAbort;
    match (flags & EntryFlags::ANSWERS, pending) {
        (0, _) => Ok(Answer::Nothing),
        (EntryFlags::COMPLETE, Pending::Mmio(Access { write: true, .. })) => {
            Ok(Answer::Set { rt: 31, value: 0 })
        }
        (EntryFlags::COMPLETE, Pending::Mmio(access)) => {
            Ok(Answer::Set { rt: access.rt, value: access.loaded(entry.data) })
        }
        (EntryFlags::COMPLETE, Pending::Sysreg(access)) => {
            Ok(Answer::Set { rt: access.target(), value: entry.data })
        }
        (EntryFlags::COMPLETE, Pending::Sgi) => Ok(Answer::Nothing),
        (EntryFlags::COMPLETE, Pending::Hypercall) => Ok(Answer::Results(entry.gpr)),
        (EntryFlags::INJECT_SEA, Pending::Mmio(_)) => Ok(Answer::Inject(abort)),
        (EntryFlags::INJECT_UNDEF, Pending::Sysreg(_)) => Ok(Answer::Inject(Injection::Undefined)),
        #[cfg(feature = "leave-out")]
        (EntryFlags::COMPLETE, _) if left_out!(Answer) => Ok(Answer::Set { rt: 31, value: 0 }),
        #[cfg(feature = "leave-out")]
        (EntryFlags::INJECT_SEA, _) if left_out!(Inject) => Ok(Answer::Inject(abort)),
        _ => Err(Error::Invalid),
    }
}

#[cfg(test)]
mod tests;
