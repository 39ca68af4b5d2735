// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the identification registers tell the normal world.
//!
//! An allow-list, field by field: a feature is shown if it needs nothing of
//! the monitor, or something that the monitor switches. A field that a later
//! architecture adds is hidden until someone looked at it. All are registers
//! `S3_0_C0_C<crm>_<op2>` (Arm ARM D24.2).

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum World {
    /// The host, at EL1.
    Host,
    /// A VM.
    Guest,
}

// How each 4-bit field is shown, one hexadecimal digit a field, at its place:
// 0 hidden, f as it is, else the largest value.

/// EL0 and EL1 (in both states at most; a VM's EL1 is AArch64), FP, AdvSIMD, GIC, DIT, CSV2 (without SCXTNUM), CSV3.
/// Not: EL2, EL3, RAS, SVE, SEL2, MPAM, AMU, RME.
const PFR0: u64 = 0xf10f_0000_0fff_0012;
/// BT, SSBS. Not: MTE, RAS_frac, SME, RNDR_trap, CSV2_frac, NMI, GCS, THE, PFAR...
const PFR1: u64 = 0x0000_0000_0000_00ff;
/// DebugVer (up to Armv8.4: later ones have more breakpoints, behind a switch),
/// BRPs, WRPs, CTX_CMPs, DoubleLock. Not: PMU, trace, SPE, TRBE, BRBE.
const DFR0: u64 = 0x0000_00f0_f0f0_f009;
/// All instructions but TME.
const ISAR0: u64 = 0xffff_ffff_f0ff_fff0;
/// DPB, JSCVT, FCMA, LRCPC, FRINTTS, SB, SPECRES, BF16, DGH, I8MM.
/// Not: pointer authentication, XS, LS64.
const ISAR1: u64 = 0x00ff_ffff_00ff_f00f;
/// RPRES, BC, CLRBHB, PRFMSLC, RPRFM, CSSC. Not: WFxT (its timeout would be the
/// host's to emulate), pointer authentication, MOPS (HCRX_EL2), 128-bit, ATS1A.
const ISAR2: u64 = 0x00ff_0f00_f0f0_00f0;
/// PARange, ASIDBits, BigEnd, SNSMem, BigEndEL0, TGran16, TGran64, TGran4.
/// Not: stage-2 granules (0: as at stage 1), ExS, FGT, ECV.
const MMFR0: u64 = 0x0000_0000_ffff_ffff;
/// HAFDBS (without HAFT), HPDS, PAN, SpecSEI, ETS, AFP, nTLBPA, ECBHB.
/// Not: VMID bits, VHE, LOR, XNX, TWED, HCX, TIDCP1, CMOW.
const MMFR1: u64 = 0xf00f_f0f0_0ff0_f002;
/// CnP, UAO, LSM, VARange, CCIDX, ST, AT, IDS, TTL, BBM, E0PD.
/// Not: IESB (RAS), NV, FWB, EVT.
const MMFR2: u64 = 0xf0ff_001f_f0ff_0fff;

/// AArch32: ID_PFR0 without RAS, AMU; ID_DFR0 with CopDbg, CopSDbg and MProfDbg only.
const PFR0_32: u64 = 0x0000_0000_0f0f_ffff;
const DFR0_32: u64 = 0x0000_0000_00f0_0099;

/// What `world` reads in the register with this CRm and op2, which holds `raw`.
#[must_use]
pub fn visible(crm: u8, op2: u8, raw: u64, world: World) -> u64 {
    let largest = match (crm, op2) {
        // A VM's EL0 is AArch64 only: its AArch32 state would not be switched.
        (4, 0) if world == World::Guest => PFR0 & !0xf | 1,
        (4, 0) => PFR0,
        (4, 1) => PFR1,
        (5, 0) => DFR0,
        (6, 0) => ISAR0,
        (6, 1) => ISAR1,
        (6, 2) => ISAR2,
        (7, 0) => MMFR0,
        (7, 1) => MMFR1,
        (7, 2) => MMFR2,
        // AArch32 is the host's EL0 only.
        _ if world == World::Guest => 0,
        (1, 0) => PFR0_32,
        (1, 2) => DFR0_32,
        // ID_PFR1, MMFR0 to 3, ISAR0 to 5, MMFR4, ISAR6, MVFR0 to 2.
        (1, 1 | 4..=7) | (2, 0..=7) | (3, 0..=2) => u64::MAX,
        _ => 0,
    };
    (0..64).step_by(4).fold(0, |value, shift| {
        let all = 15 << shift;
        let (field, largest) = (raw & all, largest & all);
        // Where 15 says "not implemented" (FP, AdvSIMD, TGran, DoubleLock...), it stays.
        let shown = if field == all && largest != 0 { field } else { field.min(largest) };
        value | shown
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORLDS: [World; 2] = [World::Host, World::Guest];

    fn field(crm: u8, op2: u8, raw: u64, shift: u32) -> u64 {
        visible(crm, op2, raw, World::Host) >> shift & 15
    }

    #[test]
    fn what_is_not_switched_is_hidden() {
        let ones = 0x1111_1111_1111_1111;
        for (crm, op2, shift, name) in [
            (4, 0, 8, "EL2"),
            (4, 0, 12, "EL3"),
            (4, 0, 28, "RAS"),
            (4, 0, 32, "SVE"),
            (4, 0, 36, "SEL2"),
            (4, 0, 40, "MPAM"),
            (4, 0, 44, "AMU"),
            (4, 0, 52, "RME"),
            (4, 1, 8, "MTE"),
            (4, 1, 24, "SME"),
            (4, 1, 36, "NMI"),
            (4, 1, 44, "GCS"),
            (5, 0, 4, "TraceVer"),
            (5, 0, 8, "PMUVer"),
            (5, 0, 32, "PMSVer"),
            (5, 0, 40, "TraceFilt"),
            (5, 0, 44, "TraceBuffer"),
            (5, 0, 52, "BRBE"),
            (6, 1, 4, "APA"),
            (6, 1, 8, "API"),
            (6, 1, 24, "GPA"),
            (6, 1, 28, "GPI"),
            (6, 1, 60, "LS64"),
            (6, 2, 8, "GPA3"),
            (6, 2, 12, "APA3"),
            (6, 2, 16, "MOPS"),
            (7, 0, 56, "FGT"),
            (7, 0, 60, "ECV"),
            (7, 1, 8, "VH"),
            (7, 1, 16, "LO"),
            (7, 1, 40, "HCX"),
            (7, 2, 24, "NV"),
            (7, 2, 40, "FWB"),
        ] {
            assert_eq!(field(crm, op2, ones, shift), 0, "{name}");
            assert_eq!(field(crm, op2, u64::MAX, shift), 0, "{name}");
        }
        for (crm, op2) in [(4, 2), (4, 4), (4, 5), (4, 7), (5, 1), (6, 3), (7, 3), (7, 4)] {
            for world in WORLDS {
                assert_eq!(visible(crm, op2, u64::MAX, world), 0);
            }
        }
    }

    #[test]
    fn cortex_a57_stays_what_it_is() {
        // QEMU's values for the core.
        let host = |crm, op2, raw| visible(crm, op2, raw, World::Host);
        assert_eq!(host(4, 0, 0x0100_2222), 0x0100_0012);
        assert_eq!(host(6, 0, 0x0001_1120), 0x0001_1120);
        assert_eq!(host(7, 0, 0x0000_1124), 0x0000_1124);
        assert_eq!(host(5, 0, 0x1030_5106), 0x1030_5006);
        assert_eq!(visible(4, 0, 0x0100_2222, World::Guest), 0x0100_0011);
    }

    /// For each register that is shown, a field of it, and one that has a limit.
    #[test]
    fn what_needs_nothing_is_shown() {
        let ones = 0x1111_1111_1111_1111;
        for (crm, op2, shown) in [
            (4, 0, 0x1101_0000_0111_0011),
            (4, 1, 0x0000_0000_0000_0011),
            (5, 0, 0x0000_0010_1010_1001),
            (6, 0, 0x1111_1111_1011_1110),
            (6, 1, 0x0011_1111_0011_1001),
            (6, 2, 0x0011_0100_1010_0010),
            (7, 0, 0x0000_0000_1111_1111),
            (7, 1, 0x1001_1010_0110_1001),
            (7, 2, 0x1011_0011_1011_0111),
            (1, 0, 0x0000_0000_0101_1111),
            (1, 2, 0x0000_0000_0010_0011),
            (2, 3, ones),
        ] {
            assert_eq!(visible(crm, op2, ones, World::Host), shown, "CRm {crm}, op2 {op2}");
        }
        for (crm, op2, shown) in [(6, 1, 0x0011_1111_0011_1001), (7, 2, 0x1011_0011_1011_0111)] {
            assert_eq!(visible(crm, op2, ones, World::Guest), shown);
        }
    }

    #[test]
    fn larger_values_are_capped() {
        assert_eq!(field(4, 0, 3 << 56, 56), 1);
        assert_eq!(field(5, 0, 11, 0), 9);
        assert_eq!(field(7, 1, 3, 0), 2);
        // No floating point at all.
        assert_eq!(field(4, 0, 15 << 16, 16), 15);
    }

    #[test]
    fn aarch32_is_for_the_host_only() {
        assert_eq!(visible(2, 0, 0x0210_1110, World::Host), 0x0210_1110);
        assert_eq!(visible(2, 0, 0x0210_1110, World::Guest), 0);
        assert_eq!(visible(1, 2, 0x0301_0066, World::Host), 0x66);
        for op2 in 3..8 {
            assert_eq!(visible(3, op2, u64::MAX, World::Host), 0);
        }
    }
}
