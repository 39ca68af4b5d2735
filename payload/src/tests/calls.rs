// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calling convention, and calls that only tell.

use havmsi_abi::{
    AUDIT_CALL, Error, FUNCTION_BASE, Function, MAX_IPA_BITS, UID, UID_CALL, VERSION,
};

use crate::harness::Outcome;
use crate::smc::{self, call, host, psci};
use crate::{ensure, expect, test};

fn version() -> Outcome {
    let [v, features, ..] = host(Function::Version, &[])?;
    expect!(v, VERSION);
    expect!(features, 0);
    Ok(())
}
test!(version, "");

fn uid() -> Outcome {
    let r = call([u64::from(UID_CALL), 1, 2, 3, 4, 5, 6, 7]);
    expect!(r[..4], UID.map(u64::from)[..]);
    Ok(())
}
test!(uid, "");

fn cpu_info() -> Outcome {
    let [vtr, gic, bits, ..] = host(Function::CpuInfo, &[])?;
    ensure!(gic == 2 || gic == 3, "GIC version {gic}");
    expect!(bits, MAX_IPA_BITS);
    // PRIbits - 1 is at least 4 on both.
    ensure!(vtr >> 29 & 7 >= 4, "VTR is {vtr:#x}");
    Ok(())
}
test!(cpu_info, "");

fn unknown_functions() -> Outcome {
    for id in [
        0x8000_0000 | 0x7fff,
        u64::from(FUNCTION_BASE) + 18,
        u64::from(FUNCTION_BASE) + 0x100,
        u64::from(FUNCTION_BASE) + 0xffff,
        0x8200_0000,
        0x8200_ff00,
        0x8200_ff03,
        u64::from(AUDIT_CALL),
        0xc200_ff01,
        0xc600_0000,
        0x8600_ff01,
        0xbf00_ff01,
        0xb200_0000,
        0x3200_0000,
        0,
        1,
        0xffff_ffff,
    ] {
        let [status, ..] = call([id, 1, 2, 3, 4, 5, 6, 7]);
        ensure!(status == Error::NotSupported.code().cast_unsigned(), "{id:#x} gives {status:#x}");
    }
    Ok(())
}
test!(unknown_functions, "T20");

/// The same numbers in the 32-bit convention are no calls of the host's.
fn smc32_variants() -> Outcome {
    for f in Function::ALL {
        let id = u64::from(f.id()) & !(1 << 30);
        let [status, ..] = call([id, 1, 2, 3, 4, 5, 6, 7]);
        ensure!(status == Error::NotSupported.code().cast_unsigned(), "{id:#x} gives {status:#x}");
    }
    Ok(())
}
test!(smc32_variants, "T20");

/// Only the low 32 bits of x0 are the identifier.
fn upper_half_of_identifier() -> Outcome {
    let r = call([u64::from(Function::Version.id()) | 0xdead_beef << 32, 0, 0, 0, 0, 0, 0, 0]);
    expect!(r[..2], [0, VERSION][..]);
    Ok(())
}
test!(upper_half_of_identifier, "T20");

/// x7 to x30 are kept by a call; x1 to x6 hold nothing but results.
fn registers_over_a_call() -> Outcome {
    for function in [
        u64::from(Function::Version.id()),
        psci::VERSION,
        u64::from(Function::Stats.id()),
        0x8200_0000,
    ] {
        let mut x: [u64; 31] = core::array::from_fn(|i| 0x1111_0000_0000_0000 + i as u64);
        x[0] = function;
        let before = x;
        smc::call_with_all(&mut x);
        expect!(x[7..], before[7..]);
    }
    Ok(())
}
test!(registers_over_a_call, "T20");
