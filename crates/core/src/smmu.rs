// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an `SMMUv3` reads in memory: stream table entries and commands (Arm IHI
//! 0070, chapters 4 and 5).

use crate::addr::{Ipa, Pa};
use crate::stage2::vtcr;

/// A stream table entry in 64-bit words (5.2): stage 1 is bypassed, stage 2
/// translates through the tables at `root` with VMID 0 and output addresses of
/// the given `PS`. What they refuse ends in an abort: no stall (S2S), no record
/// (S2R). ATS is off (EATS), so translated requests are refused too.
pub fn stream_table_entry(root: Pa, ps: u64) -> [u64; 8] {
    const VALID: u64 = 1;
    const STAGE2_ONLY: u64 = 0b110 << 1;
    /// SHCFG: shareability as the device says.
    const INCOMING: u64 = 1 << 44;
    const S2AA64: u64 = 1 << 51;
    // The fields from S2T0SZ to S2PS are laid out as in VTCR_EL2 [18:0].
    const VTCR: u64 = (1 << 19) - 1;
    left_out!(DevicesStage2 => return [VALID | 0b100 << 1, INCOMING, 0, 0, 0, 0, 0, 0]);
    [VALID | STAGE2_ONLY, INCOMING, (vtcr(ps) & VTCR) << 32 | S2AA64, root.0, 0, 0, 0, 0]
}

/// A command of the queue, 16 bytes.
pub type Command = [u64; 2];

/// `CMD_CFGI_ALL` (4.3): forget all stream table entries.
pub const FORGET_STREAMS: Command = [0x04, 31];
/// `CMD_TLBI_NSNH_ALL` (4.4): forget all translations of the normal world.
pub const FORGET_ALL: Command = [0x30, 0];
/// `CMD_SYNC` (4.7.3) without a signal: done when the queue's consumer has passed
/// it, and then all that came by what earlier commands removed has arrived (3.21.1).
pub const SYNC: Command = [0x46, 0];

/// `CMD_TLBI_S2_IPA` (4.4) for VMID 0: forget what `ipa` translates to, at
/// any level.
pub const fn forget(ipa: Ipa) -> Command {
    [0x2a, ipa.0 & 0x000f_ffff_ffff_f000]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(entry: &[u64; 8], high: usize, low: usize) -> u64 {
        entry[low / 64] >> (low % 64) & ((1 << (high - low + 1)) - 1)
    }

    #[test]
    fn streams_have_the_bits_of_the_manual() {
        let entry = stream_table_entry(Pa(0x4006_0000), 4);
        for (high, low, value) in [
            (0, 0, 1),      // V
            (3, 1, 0b110),  // Config: stage 2 only
            (93, 92, 0),    // EATS: no ATS
            (109, 108, 1),  // SHCFG: use incoming
            (143, 128, 0),  // S2VMID
            (165, 160, 24), // S2T0SZ: 40 bits
            (167, 166, 1),  // S2SL0: level 1
            (169, 168, 1),  // S2IR0: write-back
            (171, 170, 1),  // S2OR0
            (173, 172, 3),  // S2SH0: inner shareable
            (175, 174, 0),  // S2TG: 4 KiB
            (178, 176, 4),  // S2PS
            (179, 179, 1),  // S2AA64
            (180, 180, 0),  // S2ENDI
            (181, 181, 0),  // S2AFFD
            (182, 182, 0),  // S2PTW
            (184, 183, 0),  // S2HD, S2HA
            (185, 185, 0),  // S2S
            (186, 186, 0),  // S2R
            (191, 187, 0),
            (243, 196, 0x400_6000), // S2TTB
        ] {
            assert_eq!(bits(&entry, high, low), value, "[{high}:{low}]");
        }
        assert_eq!(entry[4..], [0; 4]);
    }

    #[test]
    fn commands_have_the_bits_of_the_manual() {
        assert_eq!(forget(Ipa(0x8_8000_1fff)), [0x2a, 0x8_8000_1000]);
        assert_eq!((FORGET_STREAMS, FORGET_ALL, SYNC), ([4, 31], [0x30, 0], [0x46, 0]));
    }
}
