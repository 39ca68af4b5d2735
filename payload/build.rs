// SPDX-License-Identifier: MIT OR Apache-2.0
//! Links the payload where the monitor enters it on a machine with 1 GiB of RAM.

use havmsi_abi::layout;

/// QEMU's `virt` machine with `-m 1G`.
const RAM_BASE: u64 = 0x4000_0000;
const RAM_SIZE: u64 = 1 << 30;

fn main() {
    println!("cargo::rerun-if-changed=payload.ld");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=PAYLOAD_RAM_BASE={RAM_BASE}");
    println!("cargo::rustc-env=PAYLOAD_RAM_SIZE={RAM_SIZE}");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        let home = layout::host_kernel(RAM_BASE, RAM_SIZE);
        println!("cargo::rustc-link-arg-bins=-T{dir}/payload.ld");
        println!("cargo::rustc-link-arg-bins=--defsym=HOME={home:#x}");
    }
}
