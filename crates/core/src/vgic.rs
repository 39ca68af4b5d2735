// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host may put into a virtual CPU interface: list registers as GICv3
//! has them (IHI 0069H, 12.4 "ICH_LR<n>_EL2"), for a GICv2 too, and SGIs only as
//! often as the VM's vCPUs sent them. `docs/abi.md` has the table.

use havmsi_abi::{Error, MAX_LRS};

/// The only physical interrupt that a list register may name, and the virtual
/// one that it stands for: the EL1 virtual timer's PPI, which is the guest's
/// own (BSA, DEN 0094, PPI assignments).
const TIMER: u64 = 27;

/// `ICH_HCR_EL2` and `GICH_HCR` bits that the host sets: En and UIE. What KVM
/// does not use stays 0, above all the traps: the guest owns its CPU interface.
pub const HCR_ALLOWED: u64 = 0b11;

/// Pending, active: both at once is for interrupts without HW.
const PENDING: u64 = 1 << 62;
const STATE: u64 = 0b11 << 62;
const GROUP: u64 = 1 << 60;
const PRIORITY: u64 = 0xff << 48;
/// Without HW: maintenance interrupt at its end.
const EOI: u64 = 1 << 41;
/// HW, physical and virtual INTID of the timer.
const TIMER_LINK: u64 = 1 << 61 | TIMER << 32 | TIMER;
/// The sender that a GICv2's guest reads with an SGI.
const SOURCE: u64 = 7 << 10;
/// SGIs below 16, PPIs and SPIs up to 1019; no LPIs or extended ranges.
const INTID: u64 = 0x3ff;
const FIRST_PPI: u64 = 16;
const FIRST_SPECIAL: u64 = 1020;

/// Whether a guest may find this in a list register.
const fn allowed(gic: u64, lr: u64) -> bool {
    let id = lr & INTID;
    let source = if gic == 2 && id < FIRST_PPI { SOURCE } else { 0 };
    let plain = STATE | GROUP | PRIORITY | EOI | source | INTID;
    let linked = lr & !(STATE | GROUP | PRIORITY) == TIMER_LINK && lr & STATE != STATE;
    linked || lr & !plain == 0 && id < FIRST_SPECIAL
}

/// Checks the list registers of an entry; gives how many are in use.
///
/// # Errors
/// [`Error::Invalid`] if there are more than the CPU has, one holds what the
/// guest can't expect (T19, T27), or two hold the same interrupt, which is
/// unpredictable.
#[inline]
pub fn check(gic: u64, lrs: &[u64; MAX_LRS], nr: u64, implemented: usize) -> Result<usize, Error> {
    let used = crate::addr::index(nr);
    if used > implemented.min(MAX_LRS) && !left_out!(LrCount) {
        return Err(Error::Invalid);
    }
    left_out!(LrLink => return Ok(used));
    let live = || lrs.iter().take(used).filter(|lr| **lr & STATE != 0);
    let twice = |lr: &u64| live().filter(|other| *other & INTID == lr & INTID).count() > 1;
    if !lrs.iter().take(used).all(|lr| allowed(gic, *lr)) || live().any(twice) {
        return Err(Error::Invalid);
    }
    Ok(used)
}

/// The SGIs that are pending in the list registers in use, a bit each.
pub fn pending_sgis(lrs: &[u64; MAX_LRS], used: usize) -> u16 {
    lrs.iter().take(used).fold(0, |set, lr| set | pending_sgi(*lr))
}

/// The SGI that is pending in a list register, as a bit.
pub const fn pending_sgi(lr: u64) -> u16 {
    if lr & PENDING != 0 && lr & INTID < FIRST_PPI { 1 << (lr & INTID) } else { 0 }
}

/// An SGI that a vCPU sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sgi {
    /// Which it is: a bit.
    pub id: u16,
    /// The vCPUs that it goes to: a bit each.
    pub targets: u64,
}

impl Sgi {
    /// A write of ICC_SGI1R_EL1, ICC_ASGI1R_EL1 or ICC_SGI0R_EL1 by vCPU
    /// `sender`. RS, which would name CPUs beyond the 16 of a cluster, is RES0:
    /// KVM's GICD_TYPER.RSS is 0.
    pub const fn by_register(sender: u64, value: u64) -> Self {
        let (aff3, aff2, aff1) = (value >> 48 & 0xff, value >> 32 & 0xff, value >> 16 & 0xff);
        let cluster = aff3 << 16 | aff2 << 8 | aff1;
        let targets = match value >> 40 & 1 {
            1 => !(1 << sender),
            _ if cluster < 4 => (value & 0xffff) << (16 * cluster),
            _ => 0,
        };
        Self { id: 1 << (value >> 24 & 15), targets }
    }

    /// A write of GICD_SGIR (IHI 0048B, 4.3.15).
    pub const fn by_distributor(sender: u64, value: u64) -> Self {
        let targets = match value >> 24 & 3 {
            0 => value >> 16 & 0xff,
            1 => !(1 << sender),
            2 => 1 << sender,
            _ => 0,
        };
        Self { id: 1 << (value & 15), targets }
    }
}

/// How often each SGI was sent to a vCPU and not yet delivered. The host may
/// merge, delay or drop SGIs, but never deliver more than were sent.
///
/// A send counts before the host hears of it, a delivery when the list register
/// is loaded; so a host that gives on what it was told is never refused. What it
/// merges stays here. The count ends at 255: with 64 vCPUs no more than 64 sends
/// are on the way at once, and 9 (a sender's bit each, and a list register) wait
/// at the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SentSgis([u8; 16]);

impl SentSgis {
    /// None.
    pub const NONE: Self = Self([0; 16]);

    /// One more of each in the set was sent, or is still pending after a run.
    pub fn add(&mut self, set: u16) {
        for id in bits(set.into()) {
            self.0[id] = self.0[id].saturating_add(1);
        }
    }

    /// Takes one of each in the set, for a run.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one was not sent; then none is taken.
    pub fn take(&mut self, set: u16) -> Result<(), Error> {
        if bits(set.into()).any(|id| self.0[id] == 0) {
            return Err(Error::Invalid);
        }
        bits(set.into()).for_each(|id| self.0[id] -= 1);
        Ok(())
    }
}

/// The bits that are set, lowest first.
pub(crate) fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = (set != 0).then_some(set.trailing_zeros() as usize);
        set &= set.wrapping_sub(1);
        bit
    })
}

#[cfg(test)]
mod tests;
