// SPDX-License-Identifier: MIT OR Apache-2.0
//! Links the monitor where it runs.

fn main() {
    println!("cargo::rerun-if-changed=monitor.ld");
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        let juno = std::env::var_os("CARGO_FEATURE_BOARD_JUNO").is_some();
        // Of QEMU's virt: secure RAM. Of Juno: DRAM that the TZC keeps secure.
        let secure_ram = if juno { "0xff000000" } else { "0x0e000000" };
        println!("cargo::rustc-link-arg-bins=--defsym=SECURE_RAM={secure_ram}");
        if juno {
            println!("cargo::rustc-link-arg-bins=--fix-cortex-a53-843419");
        }
        println!("cargo::rustc-link-arg-bins=-T{dir}/monitor.ld");
        println!("cargo::rustc-link-arg-bins=--no-rosegment");
    }
}
