// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arm's Juno, r0 to r2: four Cortex-A53, two Cortex-A57 (r2: A72), GIC-400,
//! 8 GiB. Never run: nobody here has one.
//!
//! Addresses are those of the Juno TRM (DDI 0515), of Linux's
//! `arch/arm64/boot/dts/arm/juno-*.dtsi` and of Trusted Firmware-A's
//! `plat/arm/board/juno`, whose BL1 and BL2 come first: docs/porting.md.

use havmsi_core::ram::{Ram, Range};
use havmsi_core::stage2::Attributes;
use havmsi_hal::barrier;
use havmsi_hal::css::{self, Cci, Counter, Scp, System, Trng};
use havmsi_hal::gic::{Gic, Kind};
use havmsi_hal::mmio::Registers;
use havmsi_hal::pl011::Uart;
use havmsi_hal::smmu::Smmu;
use havmsi_hal::sysreg::cntfrq_el0;

use super::Facts;

/// CPUs.
pub const MAX_CPUS: usize = 6;
/// Affinity of each CPU, by number: the A53 first, one of which boots.
pub static AFFINITIES: [u64; MAX_CPUS] = [0x100, 0x101, 0x102, 0x103, 0x000, 0x001];
const FIRST_BIG: usize = 4;

/// CPUs are off at reset, and come in when they are turned on.
pub const PEN: bool = false;

const MIB2: u64 = 2 << 20;
/// Windows of devices that EL3 uses, in 2 MiB steps: secure SRAM; system
/// counter; mailbox; interrupt controller and interconnect; entropy and UARTs.
pub const EL3_DEVICES: [Range; 5] = [
    Range { base: 0x0400_0000, size: MIB2 },
    Range { base: 0x2a40_0000, size: MIB2 },
    Range { base: 0x2b00_0000, size: MIB2 },
    Range { base: 0x2c00_0000, size: MIB2 },
    Range { base: 0x7fe0_0000, size: MIB2 },
];

/// Registers in those windows: for the devices below.
const fn registers(base: usize, size: usize) -> Registers {
    // SAFETY: what each constant is given is where the TRM has that device.
    unsafe { Registers::new(base, size) }
}

const SCP: Scp = Scp { mhu: registers(0x2b1f_0000, 0x1000), sram: registers(0x0400_0000, 0x1000) };
const COUNTER: Counter = Counter(registers(0x2a43_0000, 0x1000));
const COUNTER_HZ: u64 = 50_000_000;
const GIC: Gic = Gic {
    distributor: registers(0x2c01_0000, 0x1000),
    kind: Kind::V2 {
        cpu_interface: registers(0x2c02_f000, 0x2000),
        gich: registers(0x2c04_f000, 0x1000),
    },
};
/// The virtual CPU interface of the GICv2.
pub const GICV: u64 = 0x2c06_f000;
const CCI: Cci = Cci(registers(0x2c09_0000, 0x1_0000));
/// The interconnect's ports of the A53 and of the A57.
const CCI_PORTS: [usize; 2] = [3, 4];
const TRNG: Trng = Trng(registers(0x7fe6_0000, 0x1000));
const UART1: Registers = registers(0x7ff7_0000, 0x1000);
/// The monitor's console: the UART that BL2 keeps secure.
pub const UART: Uart = Uart(UART1);

/// 7.2738 MHz / (16 * 115200), in 64ths.
const UART_DIVISOR: u32 = 253;
/// L2CTLR_EL1 of the big CPUs: data and tag RAM answer in 3 cycles, which is
/// slow enough for all revisions (r1 and r2 could have faster tags).
const L2_LATENCY: u64 = 2 << 6 | 2;
const L2_LATENCY_MASK: u64 = 7 << 6 | 7;

/// The interrupt controller.
pub const fn gic() -> Gic {
    GIC
}

/// There is none of version 3: docs/porting.md.
pub const fn smmu() -> Option<Smmu> {
    None
}

/// Asks the board.
pub fn facts() -> Facts {
    let seed = TRNG.seed();
    Facts {
        ram: Ram::new([
            Range { base: 0x8000_0000, size: 0x7f00_0000 },
            Range { base: 0x8_8000_0000, size: 6 << 30 },
        ]),
        cpus: MAX_CPUS,
        seed,
        // docs/porting.md.
        secret: None,
        images: 0,
    }
}

/// On each CPU, with the MMU off: what BL31 has to do here.
pub fn early(cpu: usize) {
    let big = cpu >= FIRST_BIG;
    let latency = css::l2ctlr_el1();
    if big && latency & L2_LATENCY_MASK != L2_LATENCY {
        // SAFETY: caches are off; it changes how long the L2's RAMs are waited for.
        unsafe { css::set_l2ctlr_el1(latency & !L2_LATENCY_MASK | L2_LATENCY) };
    }
    // With the MMU off, everything is device memory.
    CCI.join(CCI_PORTS[usize::from(big)]);
    if cpu == 0 {
        COUNTER.start();
        css::set_line(UART1, UART_DIVISOR);
    }
    cntfrq_el0::write(COUNTER_HZ);
}

/// Turns a CPU on that is off at reset; it comes in at `entry`. By the first
/// CPU, at boot: from then on a CPU that is off for the host waits in the monitor.
pub fn power_on(cpu: usize, entry: u64) {
    SCP.power_on(AFFINITIES[cpu], entry);
}

/// Resets the machine, or turns it off. Two CPUs that ask at a time may get one
/// another's wish, no more.
pub fn end(reset: bool) {
    if SCP.system(if reset { System::Reboot } else { System::Off }) {
        loop {
            barrier::wfi();
        }
    }
}

/// The devices that the host may use. None of them masters a bus: Ethernet and
/// the card reader are driven by their registers.
pub fn host_devices(_cpus: usize, _gic_version: u64) -> impl Iterator<Item = (Range, Attributes)> {
    [
        Range { base: 0x1800_0000, size: 0x1_0000 }, // Ethernet
        Range { base: 0x1c05_0000, size: 0x1000 },   // SD card
        Range { base: 0x1c17_0000, size: 0x1000 },   // clock
        Range { base: 0x2c01_0000, size: 0x1000 },   // distributor
        Range { base: 0x2c02_f000, size: 0x2000 },   // GICC
        Range { base: 0x7ff8_0000, size: 0x1000 },   // UART0
    ]
    .into_iter()
    .map(|window| (window, Attributes::Device))
}
