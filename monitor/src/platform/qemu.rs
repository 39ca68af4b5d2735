// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's `virt` machine with `secure=on,virtualization=on` (hw/arm/virt.c of
//! QEMU 10, `base_memmap`), GICv2 or GICv3.

use havmsi_core::ram::{Ram, Range};
use havmsi_core::stage2::Attributes;
use havmsi_hal::fw_cfg::FwCfg;
use havmsi_hal::gic::{Gic, Kind, REDISTRIBUTOR_SIZE};
use havmsi_hal::mmio::Registers;
use havmsi_hal::pl011::Uart;
use havmsi_hal::pl061::Gpio;
use havmsi_hal::smmu::Smmu;
use havmsi_hal::sysreg::id_aa64pfr0_el1;

use super::Facts;

/// Most CPUs; GICv2 has no more either.
pub const MAX_CPUS: usize = 8;
/// Affinity of each CPU, by number: up to 8 (GICv2) or 16 in a cluster.
pub static AFFINITIES: [u64; MAX_CPUS] = [0, 1, 2, 3, 4, 5, 6, 7];

/// All CPUs start at reset, and wait in the pen.
pub const PEN: bool = true;

/// First byte of the normal world's RAM.
const RAM_BASE: u64 = 0x4000_0000;

/// Windows of devices that EL3 uses, in 2 MiB steps: the interrupt controller
/// (all of 8 CPUs' redistributors), then UARTs, fw_cfg, SMMU and GPIO.
pub const EL3_DEVICES: [Range; 2] =
    [Range { base: 0x0800_0000, size: 2 << 20 }, Range { base: 0x0900_0000, size: 2 << 20 }];

/// Registers in those windows: for the devices below.
const fn registers(base: usize, size: usize) -> Registers {
    // SAFETY: what each constant is given is where the virt machine has that device.
    unsafe { Registers::new(base, size) }
}

const DISTRIBUTOR: Registers = registers(0x0800_0000, 0x1_0000);
const GICC: usize = 0x0801_0000;
const GICH: Registers = registers(0x0803_0000, 0x1000);
/// The virtual CPU interface of a GICv2.
pub const GICV: u64 = 0x0804_0000;
const REDISTRIBUTORS: usize = 0x080a_0000;
const FW_CFG: FwCfg = FwCfg(registers(0x0902_0000, 0x1000));
/// The monitor's console.
pub const UART: Uart = Uart(registers(0x0904_0000, 0x1000));
const SMMU: Registers = registers(0x0905_0000, 0x1_0000);
const GPIO: Gpio = Gpio(registers(0x090b_0000, 0x1000));
const PIN_POWER_OFF: u32 = 0;
const PIN_RESET: u32 = 1;
/// Files of fw_cfg: entropy; the secret that keys are made from; RAM in MiB (the `virt` machine tells its size
/// nowhere but in the device tree); bytes that QEMU loads.
const SEED_FILE: &str = "opt/org.havmsi/seed";
const SECRET_FILE: &str = "opt/org.havmsi/secret";
const RAM_FILE: &str = "opt/org.havmsi/ram-mib";
const IMAGES_FILE: &str = "opt/org.havmsi/images";

/// The interrupt controller.
pub fn gic() -> Gic {
    // ID_AA64PFR0_EL1.GIC [27:24]: the system register interface is there. QEMU
    // sets the field for GICv3 only.
    let kind = if id_aa64pfr0_el1::read() >> 24 & 15 != 0 {
        Kind::V3(registers(REDISTRIBUTORS, MAX_CPUS * REDISTRIBUTOR_SIZE))
    } else {
        Kind::V2 { cpu_interface: registers(GICC, 0x2000), gich: GICH }
    };
    Gic { distributor: DISTRIBUTOR, kind }
}

/// Takes the SMMU over that all of PCI is behind (`iommu=smmuv3`); without it the
/// first access aborts, and the machine stays where it is.
pub fn smmu() -> Option<Smmu> {
    Some(Smmu::take(SMMU))
}

/// Asks the board.
pub fn facts() -> Facts {
    let Some(mib) = FW_CFG.read_number(RAM_FILE).filter(|&mib| mib < 1 << 20) else {
        panic!("QEMU needs -fw_cfg name={RAM_FILE},string=N, N being the MiB of -m");
    };
    assert!(mib.is_multiple_of(2), "-m must be a multiple of 2 MiB");
    let read = |file| {
        let mut bytes = [0; 32];
        (FW_CFG.read_file(file, &mut bytes) == Some(bytes.len())).then_some(bytes)
    };
    Facts {
        ram: Ram::new([Range { base: RAM_BASE, size: mib << 20 }, Range::default()]),
        cpus: usize::from(FW_CFG.cpu_count()).min(MAX_CPUS),
        seed: read(SEED_FILE),
        secret: read(SECRET_FILE),
        images: FW_CFG.read_number(IMAGES_FILE).unwrap_or(0),
    }
}

/// The name of the check that a test monitor leaves out; its length.
#[cfg(feature = "leave-out")]
pub fn left_out(name: &mut [u8]) -> Option<usize> {
    FW_CFG.read_file("opt/org.havmsi/leave-out", name)
}

/// What else the host's map gets without the check `HostDevices`: fw_cfg, the
/// first pages of the redistributors.
#[cfg(feature = "leave-out")]
pub fn hidden_devices(cpus: usize) -> impl Iterator<Item = (Range, Attributes)> {
    let redistributors = (0..cpus).map(|cpu| REDISTRIBUTORS + cpu * REDISTRIBUTOR_SIZE);
    let all = core::iter::once(0x0902_0000).chain(redistributors);
    let pages = all.map(|base| (Range { base: base as u64, size: 0x1000 }, Attributes::Device));
    pages.filter(|_| havmsi_core::left_out!(HostDevices))
}

/// On each CPU, with the MMU off. Nothing to do.
pub const fn early(_cpu: usize) {}

/// Turns a CPU on that is off at reset: none is.
pub const fn power_on(_cpu: usize, _entry: u64) {}

/// Resets the machine, or turns it off.
pub fn end(reset: bool) {
    GPIO.raise(if reset { PIN_RESET } else { PIN_POWER_OFF });
}

/// The devices that the host may use. Nothing here can write memory but what is
/// on PCI, behind the SMMU: no fw_cfg (its DMA register), no virtio-mmio, and of
/// each redistributor the page with PROPBASER and PENDBASER only to read.
pub fn host_devices(cpus: usize, gic: u64) -> impl Iterator<Item = (Range, Attributes)> {
    let device = |base, size| (Range { base, size }, Attributes::Device);
    let common = [
        device(0x0800_0000, 0x1_0000),    // distributor
        device(0x0900_0000, 0x1000),      // UART
        device(0x0901_0000, 0x1000),      // clock
        device(0x1000_0000, 0x3000_0000), // PCI: memory, ports, configuration
    ];
    let v2 = (gic == 2).then_some(device(GICC as u64, 0x2000));
    let redistributor = move |cpu| {
        let base = (REDISTRIBUTORS + cpu * REDISTRIBUTOR_SIZE) as u64;
        let first = (Range { base, size: 0x1000 }, Attributes::DeadDevice);
        [first, device(base + 0x1000, REDISTRIBUTOR_SIZE as u64 - 0x1000)]
    };
    let v3 = (0..cpus).filter(move |_| gic == 3).flat_map(redistributor);
    common.into_iter().chain(v2).chain(v3)
}
