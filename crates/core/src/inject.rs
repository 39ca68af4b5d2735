// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exceptions that the monitor makes EL1 take, as if the hardware had
//! (Arm ARM D1.3, pseudocode `AArch64.TakeException`).

use crate::exit::{CM, EC_SHIFT, IL, WNR, ec};

/// PSTATE as SPSR_ELx holds it.
pub mod spsr {
    /// M[3:0] and M[4] (AArch32).
    pub const MODE: u64 = 0x1f;
    /// M[3:2]: the exception level; 0 is EL0, in AArch32 too.
    pub const EL: u64 = 0b11 << 2;
    /// EL1 with its own stack pointer.
    pub const EL1H: u64 = 0b0101;
    /// EL2 with its own stack pointer.
    pub const EL2H: u64 = 0b1001;
    /// All of D, A, I, F masked.
    pub const DAIF: u64 = 0xf << 6;
    /// Speculative store bypass safe.
    pub const SSBS: u64 = 1 << 12;
    /// Privileged access never.
    pub const PAN: u64 = 1 << 22;
    /// Data independent timing.
    pub const DIT: u64 = 1 << 24;
    /// BTYPE, software step: cleared when an instruction is stepped over.
    pub const STEP: u64 = 0b11 << 10 | 1 << 21;
    /// Condition flags.
    pub const NZCV: u64 = 0xf << 28;
}

/// SCTLR_EL1: PAN is left alone on exceptions; SSBS after an exception.
const SCTLR_SPAN: u64 = 1 << 23;
const SCTLR_DSSBS: u64 = 1 << 44;

/// ESR: synchronous external abort, not on a table walk.
const FSC_EXTERNAL: u64 = 0x10;
/// Of a data abort's syndrome, what is EL1's too: cache maintenance, write.
const ISS_CM_WNR: u64 = CM | WNR;

/// Entry into EL1's synchronous vector from `pstate`: where EL1 goes on, and its PSTATE.
pub const fn synchronous(pstate: u64, sctlr_el1: u64, vbar_el1: u64) -> (u64, u64) {
    let offset = match pstate & spsr::MODE {
        0b0000 => 0x400,
        0b0100 => 0,
        0b0101 => 0x200,
        _ => 0x600,
    };
    let mut kept = spsr::NZCV | spsr::DIT | spsr::PAN;
    if pstate & (1 << 4) != 0 {
        // AArch32 has DIT elsewhere, and GE flags.
        kept = spsr::NZCV | spsr::PAN;
    }
    let mut new = pstate & kept | spsr::EL1H | spsr::DAIF;
    if sctlr_el1 & SCTLR_SPAN == 0 {
        new |= spsr::PAN;
    }
    if sctlr_el1 & SCTLR_DSSBS != 0 {
        new |= spsr::SSBS;
    }
    // VBAR_EL1[10:0] are RES0: they may hold anything, and count as 0.
    (vbar_el1 & !0x7ff | offset, new)
}

/// `ESR_EL1` of an undefined instruction.
pub const UNDEFINED: u64 = IL;

/// `ESR_EL1` of a synchronous external abort, for a stage-2 abort with this
/// `ESR_EL2`, taken in `pstate`. `FAR_EL1` is valid.
pub const fn external_abort(esr_el2: u64, pstate: u64) -> u64 {
    let same = (pstate & spsr::MODE != 0 && pstate & (1 << 4) == 0) as u64;
    // Above EC there may be ISS2.
    let data = esr_el2 >> EC_SHIFT & 0x3f == ec::DATA_ABORT;
    let class = if data { ec::DATA_ABORT } else { ec::INSTRUCTION_ABORT };
    let iss = if data { esr_el2 & ISS_CM_WNR } else { 0 };
    // From the same level an abort has the next class.
    (class + same) << EC_SHIFT | esr_el2 & IL | iss | FSC_EXTERNAL
}

#[cfg(test)]
mod tests {
    use super::*;

    const VBAR: u64 = 0xffff_8000_0001_0000;

    #[test]
    fn the_vector_is_chosen_by_where_it_came_from() {
        for (mode, offset) in [(0b00000, 0x400), (0b00100, 0), (0b00101, 0x200), (0b10000, 0x600)] {
            assert_eq!(synchronous(mode, 0, VBAR).0, VBAR + offset);
        }
    }

    #[test]
    fn reserved_bits_of_the_vector_base_do_not_count() {
        assert_eq!(synchronous(0b00101, 0, VBAR | 0x7e0).0, VBAR + 0x200);
        assert_eq!(synchronous(0b10000, 0, u64::MAX).0, 0xffff_ffff_ffff_fe00);
    }

    /// Against the numbers of the manual (SPSR_EL1, SCTLR_EL1, ESR_EL1).
    #[test]
    fn bits_are_where_the_manual_has_them() {
        let (span, dssbs) = (1 << 23, 1 << 44);
        assert_eq!(synchronous(0, 0, VBAR).1, 0x3c5 | 1 << 22);
        assert_eq!(synchronous(0, span | dssbs, VBAR).1, 0x3c5 | 1 << 12);
        let kept = 0xf << 28 | 1 << 24 | 1 << 22;
        assert_eq!(synchronous(!0x1f, span, VBAR).1, 0x3c5 | kept);
        assert_eq!(spsr::STEP, 1 << 21 | 1 << 11 | 1 << 10);
        assert_eq!(UNDEFINED, 1 << 25);
    }

    #[test]
    fn pstate_is_what_the_architecture_makes_it() {
        let span = SCTLR_SPAN;
        assert_eq!(synchronous(0, span, VBAR).1, 0x3c5);
        assert_eq!(synchronous(0, 0, VBAR).1, 0x3c5 | spsr::PAN);
        assert_eq!(synchronous(0, span | SCTLR_DSSBS, VBAR).1, 0x3c5 | spsr::SSBS);
        // Single step, IL, BTYPE, UAO, TCO go; flags and DIT stay.
        let all = !spsr::MODE & !spsr::PAN;
        assert_eq!(synchronous(all, span, VBAR).1, 0x3c5 | spsr::NZCV | spsr::DIT);
        assert_eq!(synchronous(0x9000_0010, span, VBAR).1, 0x9000_03c5);
        // AArch32 has its DIT elsewhere: this bit is another one there.
        assert_eq!(synchronous(0x9100_0010, span, VBAR).1, 0x9000_03c5);
    }

    #[test]
    fn an_abort_keeps_only_what_concerns_el1() {
        // Write of 8 bytes, translation fault at level 3, syndrome valid.
        let esr = 0x24 << 26 | 1 << 25 | 1 << 24 | 3 << 22 | 0x45;
        assert_eq!(external_abort(esr, 0x3c5), 0x25 << 26 | 1 << 25 | 0x50);
        assert_eq!(external_abort(esr, 0), 0x24 << 26 | 1 << 25 | 0x50);
        assert_eq!(external_abort(1 << 36 | esr, 0), 0x24 << 26 | 1 << 25 | 0x50);
        assert_eq!(external_abort(0x20 << 26 | 1 << 25 | 0x87, 0x5), 0x21 << 26 | 1 << 25 | 0x10);
        assert_eq!(external_abort(0x20 << 26 | 7, 0x10), 0x20 << 26 | 0x10);
    }
}
