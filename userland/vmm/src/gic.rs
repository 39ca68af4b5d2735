// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM's interrupt controllers.

use crate::vm::text;
use havmsi_operations::{CPU_INTERFACE, DISTRIBUTOR, REDISTRIBUTOR};
use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// Gives a VM a GICv2 or GICv3; before the first run, after its vCPUs.
pub fn create(vm: &VmFd, version: u64) -> Result<DeviceFd, String> {
    let v2 = (
        kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
        KVM_VGIC_V2_ADDR_TYPE_DIST,
        (KVM_VGIC_V2_ADDR_TYPE_CPU, CPU_INTERFACE),
    );
    let v3 = (
        kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
        KVM_VGIC_V3_ADDR_TYPE_DIST,
        (KVM_VGIC_V3_ADDR_TYPE_REDIST, REDISTRIBUTOR),
    );
    let (type_, distributor, (second, address)) = if version == 2 { v2 } else { v3 };
    let mut device = kvm_create_device { type_, fd: 0, flags: 0 };
    let gic = vm.create_device(&mut device).map_err(text("GIC"))?;
    let set = |group, attr: u32, value: u64| {
        let attr = kvm_device_attr {
            group,
            attr: attr.into(),
            addr: (&raw const value).expose_provenance() as u64,
            flags: 0,
        };
        gic.set_device_attr(&attr).map_err(text("the GIC's attributes"))
    };
    set(KVM_DEV_ARM_VGIC_GRP_ADDR, distributor, DISTRIBUTOR)?;
    set(KVM_DEV_ARM_VGIC_GRP_ADDR, second, address)?;
    set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, 0)?;
    Ok(gic)
}
