// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an address is: a function of the monitor, of KVM's EL2 half, of the kernel, of a program.

use std::path::Path;

use addr2line::Loader;
use anyhow::{Context as _, Result};

use super::Parts;
use super::counts::Line;

/// Where Linux 6.12 has its image, with 48 bits of addresses.
const KERNEL: u64 = 0xffff_8000_8000_0000;
/// Where that image lies behind the start of RAM: QEMU puts its own start-up code below.
const KERNEL_OFFSET: u64 = 0x20_0000;
/// Names of nVHE's EL2 half.
const NVHE: &str = "__kvm_nvhe_";

/// A place in the code.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Who: `EL3 monitor`, `EL2 KVM`, ...
    pub part: &'static str,
    /// The function.
    pub function: String,
    /// The line of the source, where it is known.
    pub source: String,
}

/// Knows the code that runs.
pub struct Symbols {
    monitor: Option<Loader>,
    kernel: Loader,
    vmm: Loader,
    guest: Loader,
}

fn load(path: &Path) -> Result<Loader> {
    Loader::new(path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

impl Symbols {
    /// Reads the symbols of all that runs.
    pub fn read(parts: &Parts) -> Result<Self> {
        let kernel = parts.images.kernel.dir.join("vmlinux");
        Ok(Self {
            monitor: parts.monitor.as_ref().map(|m| load(&m.elf)).transpose()?,
            kernel: load(&kernel).context("the kernel's symbols")?,
            vmm: load(&parts.vmm)?,
            guest: load(&parts.guest)?,
        })
    }

    /// What a line of the plugin's result is.
    pub fn place(&self, line: &Line) -> Place {
        let address = line.address;
        let (part, loader, at) = match line.level {
            3 => ("EL3 monitor", self.monitor.as_ref(), address),
            2 if self.monitor.is_some() => ("EL2 vectors", None, address),
            2 => ("EL2 KVM", Some(&self.kernel), image_of_hyp(address)),
            1 if address >> 63 != 0 => ("EL1 kernel", Some(&self.kernel), address),
            1 => ("EL1 guest", Some(&self.guest), address),
            _ => ("EL0 VMM", Some(&self.vmm), address),
        };
        let found = loader.and_then(|l| lookup(l, at));
        let (function, source) = found.unwrap_or_else(|| (format!("{address:#x}"), String::new()));
        Place { part, function, source }
    }
}

/// The innermost inlined function at an address, and the line.
fn lookup(loader: &Loader, address: u64) -> Option<(String, String)> {
    let outer = loader.find_symbol(address).map(clean);
    let mut frames = loader.find_frames(address).ok()?;
    let Ok(Some(frame)) = frames.next() else { return outer.map(|o| (o, String::new())) };
    let inner = frame.function.and_then(|f| f.demangle().ok().map(|n| clean(&n)));
    let source = frame.location.and_then(|l| {
        let file = l.file?.rsplit_once("/src/").map_or(l.file?, |(_, file)| file);
        Some(format!("{file}:{}", l.line?))
    });
    Some((inner.or(outer)?, source.unwrap_or_default()))
}

/// A name without what tells nothing: the hash, and nVHE's prefix.
fn clean(name: &str) -> String {
    let name = addr2line::demangle_auto(name.into(), None).into_owned();
    let name = name.strip_prefix(NVHE).unwrap_or(&name);
    match name.rsplit_once("::h") {
        Some((head, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            head.to_owned()
        }
        _ => name.to_owned(),
    }
}

/// Where nVHE's EL2 code lies in the kernel's image: EL2 has it at the low bits of its address in the
/// linear map, which is its distance from the start of RAM.
fn image_of_hyp(address: u64) -> u64 {
    (KERNEL - KERNEL_OFFSET) + (address & 0x3fff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned() {
        assert_eq!(clean("__kvm_nvhe___guest_enter"), "__guest_enter");
        assert_eq!(clean("_ZN4core3fmt5write17h0123456789abcdefE"), "core::fmt::write");
    }

    #[test]
    fn code_of_el2_is_found_in_the_image() {
        assert_eq!(image_of_hyp(0x8000_0074_5ff8), 0xffff_8000_8054_5ff8);
    }
}
