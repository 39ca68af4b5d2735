// SPDX-License-Identifier: MIT OR Apache-2.0
//! The change to a guest's device tree: a pool of RAM that all of PCI's transfers go through.

use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node as _, Property as _};

/// The pool starts and ends at a multiple of this.
const STEP: u64 = 2 << 20;

fn cells(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_be_bytes()).collect()
}

fn set(node: &mut DeviceTreeNode, name: &str, value: &[u8]) -> Result<(), String> {
    let property = DeviceTreeProperty::new(name, value).map_err(|e| format!("{name}: {e:?}"))?;
    node.remove_property(name);
    node.add_property(property);
    Ok(())
}

fn node(name: &str) -> Result<DeviceTreeNode, String> {
    DeviceTreeNode::new(name).map_err(|e| format!("{name}: {e:?}"))
}

fn number(node: &DeviceTreeNode, name: &str) -> Option<u32> {
    let value = node.property(name)?.value().to_vec();
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// The largest phandle.
fn last_phandle(node: &DeviceTreeNode) -> u32 {
    let below = node.children().map(last_phandle).max().unwrap_or(0);
    number(node, "phandle").unwrap_or(0).max(below)
}

/// The last run of RAM: its first byte, and the first behind it.
fn memory(root: &DeviceTreeNode) -> Option<(u64, u64)> {
    if [number(root, "#address-cells")?, number(root, "#size-cells")?] != [2, 2] {
        return None;
    }
    let banks = root.children().filter(|child| child.name().split('@').next() == Some("memory"));
    let runs = banks.filter_map(|bank| {
        let reg = bank.property("reg")?.value().to_vec();
        let (base, size) = reg.split_at_checked(8)?;
        let base = u64::from_be_bytes(base.try_into().ok()?);
        Some((base, base + u64::from_be_bytes(size.try_into().ok()?)))
    });
    runs.max()
}

/// Puts a pool of `size` bytes at the end of RAM into QEMU's tree, and has all PCI devices use it.
pub fn with_pool(blob: &[u8], size: u64) -> Result<Vec<u8>, String> {
    let fdt = Fdt::new(blob).map_err(|e| format!("QEMU's device tree can't be read: {e:?}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let root = &mut tree.root;
    let (start, end) = memory(root).ok_or("QEMU's device tree tells of no memory")?;
    let end = end / STEP * STEP;
    // Where QEMU puts kernel, initrd and tree is the lower half, or the first 128 MiB and more.
    let base = end.checked_sub(size).filter(|base| *base >= start + (end - start) / 2);
    let base = base.ok_or(format!("a pool of {} MiB leaves too little RAM", size >> 20))?;
    let phandle = (last_phandle(root) + 1).to_be_bytes();

    let mut pool = node(&format!("dma@{base:x}"))?;
    set(&mut pool, "compatible", b"restricted-dma-pool\0")?;
    set(&mut pool, "reg", &cells(&[base, size]))?;
    set(&mut pool, "phandle", &phandle)?;
    let mut reserved = node("reserved-memory")?;
    set(&mut reserved, "#address-cells", &2_u32.to_be_bytes())?;
    set(&mut reserved, "#size-cells", &2_u32.to_be_bytes())?;
    set(&mut reserved, "ranges", &[])?;
    reserved.add_child(pool);
    root.add_child(reserved);

    let mut bridges = 0;
    for pcie in root.children_mut().filter(|child| child.name().starts_with("pcie@")) {
        set(pcie, "memory-region", &phandle)?;
        bridges += 1;
    }
    if bridges == 0 {
        return Err("QEMU's machine has no PCI".to_owned());
    }
    Ok(tree.to_dtb())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(ram: &[u64], pci: bool) -> Vec<u8> {
        let mut tree = DeviceTree::new();
        for name in ["#address-cells", "#size-cells"] {
            set(&mut tree.root, name, &2_u32.to_be_bytes()).unwrap();
        }
        for run in ram.chunks(2) {
            let mut memory = node(&format!("memory@{:x}", run[0])).unwrap();
            set(&mut memory, "reg", &cells(run)).unwrap();
            tree.root.add_child(memory);
        }
        let mut gic = node("intc@8000000").unwrap();
        let mut its = node("its@8080000").unwrap();
        set(&mut its, "phandle", &0x8005_u32.to_be_bytes()).unwrap();
        gic.add_child(its);
        tree.root.add_child(gic);
        if pci {
            tree.root.add_child(node("pcie@10000000").unwrap());
        }
        tree.to_dtb()
    }

    #[test]
    fn the_pool_is_at_the_end_of_ram_and_pcis() {
        let out = with_pool(&tree(&[0x4000_0000, 0x1000_0000], true), 16 << 20).unwrap();
        let tree = DeviceTree::from_fdt(&Fdt::new(&out).unwrap());
        let pool = tree.root.child("reserved-memory").unwrap().child("dma@4f000000").unwrap();
        let value = |node: &DeviceTreeNode, name| node.property(name).unwrap().value().to_vec();
        assert_eq!(value(pool, "reg"), cells(&[0x4f00_0000, 16 << 20]));
        assert_eq!(value(pool, "compatible"), b"restricted-dma-pool\0");
        assert_eq!(value(pool, "phandle"), 0x8006_u32.to_be_bytes());
        let pcie = tree.root.child("pcie@10000000").unwrap();
        assert_eq!(value(pcie, "memory-region"), 0x8006_u32.to_be_bytes());
    }

    #[test]
    fn the_last_bank_counts_and_odd_ends_are_cut() {
        let ram = [0x4000_0000, 0x1000_0000, 0x8000_0000, 0x1010_1000];
        let out = with_pool(&tree(&ram, true), 2 << 20).unwrap();
        let tree = DeviceTree::from_fdt(&Fdt::new(&out).unwrap());
        assert!(tree.root.child("reserved-memory").unwrap().child("dma@8fe00000").is_some());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ram = [0x4000_0000, 0x400_0000];
        assert!(with_pool(&tree(&ram, true), 32 << 20).is_ok());
        for (blob, what) in [
            (tree(&ram, false), "no PCI"),
            (tree(&[], true), "no memory"),
            (b"no tree".to_vec(), "can't be read"),
        ] {
            let error = with_pool(&blob, 2 << 20).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
        assert!(with_pool(&tree(&ram, true), 34 << 20).unwrap_err().contains("too little"));
        assert!(with_pool(&tree(&ram, true), 128 << 20).unwrap_err().contains("too little"));
    }
}
