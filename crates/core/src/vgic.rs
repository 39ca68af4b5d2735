// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host may put into the GICv3 virtual CPU interface (GIC
//! architecture specification, IHI 0069, chapter 12).

use havmsi_abi::{Error, MAX_LRS};

/// The only physical interrupt that a list register may name: the EL1 virtual
/// timer's PPI, which is the guest's own (BSA, DEN 0094, PPI assignments).
pub const VIRTUAL_TIMER_INTID: u64 = 27;

const LR_HW: u64 = 1 << 61;
const LR_PINTID_SHIFT: u32 = 32;
const LR_PINTID_MASK: u64 = 0x3ff;

/// `ICH_HCR_EL2` bits that the host sets: En, UIE, LRENPIE, NPIE, VGrp0EIE,
/// VGrp0DIE, VGrp1EIE, VGrp1DIE. The trap bits stay 0: the guest owns its CPU
/// interface.
pub const HCR_ALLOWED: u64 = 0xff;

/// Checks the list registers of an entry.
///
/// # Errors
/// [`Error::Invalid`] if there are more than the CPU has, or one is linked to a
/// physical interrupt other than the virtual timer's (T19).
pub fn check(lrs: &[u64; MAX_LRS], used: u64, implemented: usize) -> Result<usize, Error> {
    let used = crate::addr::index(used);
    if used > implemented.min(MAX_LRS) && !left_out!(LrCount) {
        return Err(Error::Invalid);
    }
    let foreign =
        |lr: &u64| lr & LR_HW != 0 && lr >> LR_PINTID_SHIFT & LR_PINTID_MASK != VIRTUAL_TIMER_INTID;
    left_out!(LrLink => return Ok(used));
    if lrs.iter().take(used).any(foreign) {
        return Err(Error::Invalid);
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_beyond_the_hardware_are_refused() {
        let lrs = [0; MAX_LRS];
        assert_eq!(check(&lrs, 4, 4), Ok(4));
        assert_eq!(check(&lrs, 5, 4), Err(Error::Invalid));
        assert_eq!(check(&lrs, u64::MAX, 16), Err(Error::Invalid));
        assert_eq!(check(&lrs, 17, 32), Err(Error::Invalid));
    }

    #[test]
    fn only_the_timer_may_be_linked() {
        let mut lrs = [0; MAX_LRS];
        lrs[1] = LR_HW | 27 << 32 | 27;
        assert_eq!(check(&lrs, 2, 4), Ok(2));
        lrs[1] = LR_HW | 30 << 32 | 27;
        assert_eq!(check(&lrs, 2, 4), Err(Error::Invalid));
        assert_eq!(check(&lrs, 1, 4), Ok(1));
        lrs[1] = 30 << 32 | 27;
        assert_eq!(check(&lrs, 2, 4), Ok(2));
    }
}
