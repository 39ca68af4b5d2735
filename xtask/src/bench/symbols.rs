// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an address is: a function of the monitor, of KVM's EL2 half, of the kernel, of a program.

use std::path::{Path, PathBuf};

use addr2line::Loader;
use anyhow::{Context as _, Result};

use super::{Parts, System};

/// Where Linux 6.12 has its image, with 48 bits of addresses.
const KERNEL: u64 = 0xffff_8000_8000_0000;
/// Where that image lies behind the start of RAM: QEMU puts its own start-up code below.
const KERNEL_OFFSET: u64 = 0x20_0000;
/// Names of nVHE's EL2 half.
const NVHE: &str = "__kvm_nvhe_";

/// Whose functions are named although they are inlined into others.
const OURS: &str = "havmsi";

/// A place in the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Who: `EL3 monitor`, `EL2 KVM`, ...
    pub part: &'static str,
    /// The function that was compiled as one.
    pub symbol: String,
    /// That function's start.
    pub start: bool,
    /// The innermost function of ours, if there is one, else the symbol.
    pub function: String,
    /// The innermost function, whoever's.
    pub inlined: String,
    /// The line of the source that belongs to `function`, where it is known.
    pub line: String,
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
    /// Reads the symbols of all that runs on a system.
    /// `kernel`: which, if not ours.
    pub fn read(parts: &Parts, system: System, kernel: Option<PathBuf>) -> Result<Self> {
        let kernel = kernel.unwrap_or_else(|| parts.images.kernel.dir.join("vmlinux"));
        let monitor = (system == System::Havmsi).then(|| load(&parts.monitor.elf)).transpose()?;
        Ok(Self {
            monitor,
            kernel: load(&kernel).context("the kernel's symbols")?,
            vmm: load(&parts.vmm)?,
            guest: load(&parts.guest)?,
        })
    }

    /// What is at an address that is executed at this exception level.
    pub fn place(&self, level: usize, address: u64) -> Place {
        let (part, loader, at) = match level {
            3 => ("EL3 monitor", self.monitor.as_ref(), address),
            2 if self.monitor.is_some() => ("EL2 vectors", None, address),
            2 => ("EL2 KVM", Some(&self.kernel), image_of_hyp(address)),
            1 if address >> 63 != 0 => ("EL1 kernel", Some(&self.kernel), address),
            1 => ("EL1 guest", Some(&self.guest), address),
            _ => ("EL0 VMM", Some(&self.vmm), address),
        };
        loader.and_then(|l| lookup(part, l, at)).unwrap_or_else(|| {
            let name = format!("{address:#x}");
            Place {
                part,
                symbol: name.clone(),
                start: false,
                function: name.clone(),
                inlined: name.clone(),
                line: name,
            }
        })
    }
}

/// The symbol that an address belongs to, and whether it is its start.
fn symbol(loader: &Loader, address: u64) -> Option<(String, bool)> {
    let mut probe = address;
    loop {
        let found = loader.find_symbol_info(probe)?;
        // A mark of the assembler's between code and data.
        if !found.name().starts_with('$') {
            return Some((clean(found.name()), found.address() == address));
        }
        probe = found.address().checked_sub(1)?;
    }
}

fn lookup(part: &'static str, loader: &Loader, address: u64) -> Option<Place> {
    let (symbol, start) = symbol(loader, address)?;
    let mut place = Place {
        part,
        start,
        function: symbol.clone(),
        inlined: symbol.clone(),
        line: symbol.clone(),
        symbol,
    };
    let Ok(mut frames) = loader.find_frames(address) else { return Some(place) };
    let mut first = true;
    while let Ok(Some(frame)) = frames.next() {
        let name = frame.function.and_then(|f| f.demangle().ok().map(|n| clean(&n)));
        let Some(name) = name else { continue };
        if first {
            place.inlined.clone_from(&name);
            first = false;
        }
        if name.contains(OURS) {
            let line = frame.location.and_then(|l| {
                let file = l.file?;
                let file = file.rsplit_once("/src/").map_or(file, |(_, file)| file);
                Some(format!("{name}  {file}:{}", l.line?))
            });
            place.line = line.unwrap_or_else(|| name.clone());
            place.function = name;
            break;
        }
    }
    Some(place)
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
