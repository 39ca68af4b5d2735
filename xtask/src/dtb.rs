// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device tree of the protected host: what QEMU prints, minus what the monitor keeps,
//! plus PSCI.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use dtoolkit::Node as _;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use havmsi_abi::layout;

use crate::machine::Config;
use crate::sh;

/// RAM starts here on QEMU's `virt`.
pub const RAM_BASE: u64 = 0x4000_0000;

/// Names (up to the `@`) of nodes that the host must not see: bus masters, the monitor's
/// devices, and what QEMU's emulation has but the monitor does not hand out.
const REMOVED: [&str; 13] = [
    "fw-cfg",
    "flash",
    "secflash",
    "secram",
    "gpio-keys",
    "gpio-restart",
    "gpio-poweroff",
    "virtio_mmio",
    "smmuv3",
    "pmu",
    "platform-bus",
    "secure-chosen",
    "psci",
];
/// Nodes at these exact places: secure UART, secure GPIO, and the GPIO that QEMU tells of but
/// doesn't have once it is given firmware (`-bios`).
const REMOVED_EXACT: [&str; 3] = ["pl011@9040000", "pl061@90b0000", "pl061@9030000"];

fn property(name: &str, value: impl Into<Vec<u8>>) -> Result<DeviceTreeProperty> {
    let value: Vec<u8> = value.into();
    DeviceTreeProperty::new(name, value.as_slice())
        .map_err(|e| anyhow::anyhow!("device tree property {name}: {e:?}"))
}

fn set(node: &mut DeviceTreeNode, name: &str, value: impl Into<Vec<u8>>) -> Result<()> {
    node.remove_property(name);
    node.add_property(property(name, value)?);
    Ok(())
}

fn cells(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_be_bytes()).collect()
}

/// Asks QEMU for the tree of a machine.
pub fn dump(config: &Config, to: &Path) -> Result<()> {
    let mut command = Command::new(crate::setup::qemu());
    config.machine_args(&mut command, &format!(",dumpdtb={}", to.display()));
    command.args(["-display", "none"]);
    sh::output(&mut command).context("QEMU could not print its device tree")?;
    Ok(())
}

/// Edits QEMU's tree into the host's.
pub fn edit(blob: &[u8], ram: u64, bootargs: &str) -> Result<Vec<u8>> {
    let fdt =
        Fdt::new(blob).map_err(|e| anyhow::anyhow!("QEMU's device tree can't be read: {e:?}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let root = &mut tree.root;
    let names: Vec<String> = root.children().map(|c| c.name().to_owned()).collect();
    for name in names {
        let base = name.split('@').next().unwrap_or(&name);
        if REMOVED.contains(&base) || REMOVED_EXACT.contains(&name.as_str()) || base == "memory" {
            root.remove_child(&name);
        }
    }
    let base = layout::host_dtb(RAM_BASE, ram);
    let mut memory =
        DeviceTreeNode::new(format!("memory@{base:x}")).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    set(&mut memory, "device_type", *b"memory\0")?;
    set(&mut memory, "reg", cells(&[base, ram - layout::carveout_size(ram)]))?;
    root.add_child(memory);
    let mut psci = DeviceTreeNode::new("psci").map_err(|e| anyhow::anyhow!("{e:?}"))?;
    set(&mut psci, "compatible", *b"arm,psci-1.0\0arm,psci-0.2\0")?;
    set(&mut psci, "method", *b"smc\0")?;
    root.add_child(psci);
    if let Some(cpus) = root.child_mut("cpus") {
        for cpu in cpus.children_mut().filter(|c| c.name().starts_with("cpu@")) {
            set(cpu, "enable-method", *b"psci\0")?;
        }
    }
    if let Some(aliases) = root.child_mut("aliases") {
        aliases.remove_property("serial1");
    }
    // Interrupts of PCI come by wire: docs/decisions/0006.
    for pcie in root.children_mut().filter(|c| c.name().starts_with("pcie@")) {
        for name in ["iommu-map", "msi-map", "msi-parent"] {
            pcie.remove_property(name);
        }
    }
    for gic in root.children_mut().filter(|c| c.name().starts_with("intc@")) {
        let children: Vec<String> = gic.children().map(|c| c.name().to_owned()).collect();
        for name in children.iter().filter(|n| n.starts_with("its@") || n.starts_with("v2m@")) {
            gic.remove_child(name);
        }
    }
    let chosen = match root.child_mut("chosen") {
        Some(c) => c,
        None => {
            root.add_child_mut(DeviceTreeNode::new("chosen").map_err(|e| anyhow::anyhow!("{e:?}"))?)
        }
    };
    set(chosen, "bootargs", [bootargs.as_bytes(), b"\0"].concat())?;
    Ok(tree.to_dtb())
}

/// Makes the host's tree for a configuration; returns the file.
pub fn build(config: &Config, dir: &Path) -> Result<PathBuf> {
    let raw = dir.join("qemu.dtb");
    dump(config, &raw)?;
    let blob = edit(&std::fs::read(&raw)?, config.mem_mib << 20, &config.append)?;
    let path = dir.join("host.dtb");
    sh::write(&path, blob)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use dtoolkit::Property as _;

    use super::*;

    #[test]
    fn unwanted_nodes_go_and_psci_comes() {
        let mut tree = DeviceTree::new();
        for name in [
            "fw-cfg@9020000",
            "pl011@9000000",
            "pl011@9040000",
            "virtio_mmio@a000000",
            "memory@40000000",
            "smmuv3@9050000",
        ] {
            tree.root.add_child(DeviceTreeNode::new(name).unwrap());
        }
        let mut pcie = DeviceTreeNode::new("pcie@10000000").unwrap();
        for name in ["dma-coherent", "iommu-map", "msi-map", "interrupt-map"] {
            set(&mut pcie, name, cells(&[1])).unwrap();
        }
        tree.root.add_child(pcie);
        let out = edit(&tree.to_dtb(), 1 << 30, "console=ttyAMA0").unwrap();
        let fdt = Fdt::new(&out).unwrap();
        let tree = DeviceTree::from_fdt(&fdt);
        let names: Vec<_> = tree.root.children().map(|c| c.name().to_owned()).collect();
        assert_eq!(names, ["pl011@9000000", "pcie@10000000", "memory@40400000", "psci", "chosen"]);
        let pcie = tree.root.child("pcie@10000000").unwrap();
        let left: Vec<_> = pcie.properties().map(|p| p.name().to_owned()).collect();
        assert_eq!(left, ["dma-coherent", "interrupt-map"]);
    }
}
