// SPDX-License-Identifier: MIT OR Apache-2.0
//! Registers, caches, TLBs, physical memory and devices: how things are done,
//! never what is to be done. The only crate besides the monitor's entry code
//! that holds assembly.
//!
//! "Arm ARM" is DDI 0487; section numbers are those of issue K.a.
#![no_std]
#![cfg(target_arch = "aarch64")]

pub mod barrier;
pub mod cache;
#[cfg(feature = "juno")]
pub mod css;
pub mod debug;
pub mod fpsimd;
#[cfg(feature = "qemu")]
pub mod fw_cfg;
pub mod gic;
pub mod idreg;
pub mod machine;
pub mod mmio;
pub mod phys;
pub mod pl011;
#[cfg(feature = "qemu")]
pub mod pl061;
pub mod smmu;
pub mod sysreg;
pub mod tlb;
pub mod vgic;
pub mod world;
