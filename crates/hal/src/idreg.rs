// SPDX-License-Identifier: MIT OR Apache-2.0
//! The raw values of the identification registers that HCR_EL2.TID3 traps:
//! op0 = 3, op1 = 0, CRn = 0, CRm = 1 to 7 (Arm ARM D24.2, `S3_0_C0_C<m>_<op2>`).

use core::arch::asm;

macro_rules! table {
    ($crm:expr, $op2:expr; $($m:literal)*) => {
        match $crm {
            $($m => table!(@row $op2, $m; 0 1 2 3 4 5 6 7),)*
            _ => 0,
        }
    };
    (@row $op2:expr, $m:literal; $($o:literal)*) => {
        match $op2 {
            $($o => {
                let value: u64;
                // SAFETY: identification registers are constant; encodings in
                // this space that name none read as zero (D24.2).
                unsafe {
                    asm!(concat!("mrs {}, s3_0_c0_c", $m, "_", $o), out(reg) value,
                         options(nomem, nostack, preserves_flags));
                }
                value
            })*
            _ => 0,
        }
    };
}

/// The register `S3_0_C0_C<crm>_<op2>`; 0 outside the trapped group.
pub fn raw(crm: u8, op2: u8) -> u64 {
    table!(crm, op2; 1 2 3 4 5 6 7)
}
