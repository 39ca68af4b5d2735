// SPDX-License-Identifier: MIT OR Apache-2.0
//! Links the guest to the start of its RAM.

fn main() {
    println!("cargo::rerun-if-changed=guest.ld");
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-T{dir}/guest.ld");
        println!("cargo::rustc-link-arg-bins=--defsym=RAM={:#x}", havmsi_operations::RAM);
    }
}
