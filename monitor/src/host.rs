// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's world: its RAM and map, and the registers that hold it in.

use core::sync::atomic::AtomicU16;

use havmsi_abi::PAGE_SIZE;
use havmsi_abi::layout::{carveout, carveout_size};
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::host_map::HostMap;
use havmsi_core::launch::Boot;
use havmsi_core::page::Pages;
use havmsi_core::stage2::{self, Entry};
use havmsi_core::vm::Machine as Transitions;
use havmsi_hal::debug::DebugState;
use havmsi_hal::fpsimd::FpState;
use havmsi_hal::gic::Gic;
use havmsi_hal::machine::Machine;
use havmsi_hal::smmu::Smmu;
use havmsi_hal::sysreg as reg;
use havmsi_hal::vgic::Vgic;
use havmsi_hal::world::{self, El1State};
use havmsi_hal::{bits, cache, phys, tlb};
use spin::Once;
use spin::mutex::SpinMutex;

use crate::cpu::this_cpu;
use crate::platform::{self, Facts, MAX_PAGES};

/// All that is shared between the CPUs.
pub struct World {
    /// What was found at boot.
    pub facts: Facts,
    /// The interrupt controller.
    pub gic: Gic,
    /// The virtual CPU interface.
    pub vgic: Vgic,
    /// FEAT_RAS is there: hidden, but it can't be turned off.
    pub ras: bool,
    /// The hardware, for the pure part.
    pub machine: Machine,
    /// Who owns which page.
    pub pages: Pages<'static>,
    /// The host's stage-2.
    map: SpinMutex<HostMap>,
}

impl Transitions for World {
    type Hw = Machine;

    fn hw(&self) -> &Machine {
        &self.machine
    }

    fn pages(&self) -> &Pages<'_> {
        &self.pages
    }

    fn secret(&self) -> Option<&[u8; 32]> {
        self.facts.secret.as_ref()
    }

    fn with_host_map<R>(&self, f: impl FnOnce(&mut HostMap) -> R) -> R {
        f(&mut self.map.lock())
    }
}

static WORLD: Once<World> = Once::new();

/// One ownership record a page.
static RECORDS: [AtomicU16; MAX_PAGES] = [const { AtomicU16::new(0) }; _];

/// What all CPUs share; built before the second one comes in.
pub fn world() -> &'static World {
    WORLD.get().expect("used before it was built")
}

/// `smc #0`.
pub const SMC: u64 = 0xd400_0003;

/// Builds the carve-out, the ownership records and the host's map.
pub fn build(facts: Facts, gic: Gic, mut smmu: Option<Smmu>) {
    let first = facts.ram.banks()[0];
    let reserved = carveout_size(facts.ram.page_count() * PAGE_SIZE);
    for at in (0..reserved).step_by(4096) {
        phys::zero_page(Pa(first.base + at));
    }
    // The hollow EL2: all sixteen vectors, and nothing else (EL2 could not
    // fetch from secure memory).
    let vectors = Pa(first.base + carveout::EL2_VECTORS);
    for vector in 0..16 {
        phys::write(vectors.offset(vector * 0x80), SMC);
    }
    phys::flush_page(vectors);
    cache::invalidate_icache_all();

    let root = Pa(first.base + carveout::HOST_ROOT);
    if let Some(smmu) = &mut smmu {
        smmu.start(Pa(first.base));
    }
    let machine = Machine { host_vttbr: stage2::vttbr(root, 0), smmu };
    let devices = platform::host_devices(facts.cpus, gic.version());
    #[cfg(feature = "leave-out")]
    let devices = devices.chain(platform::hidden_devices(facts.cpus));
    let map = HostMap::new(&machine, facts.ram, reserved, devices)
        .expect("the platform's RAM or devices can't be mapped");
    let pages =
        Pages::new(facts.ram, &RECORDS).expect("more RAM than secure RAM can hold records for");
    for (i, bank) in facts.ram.banks().iter().enumerate() {
        let skip = if i == 0 { reserved } else { 0 };
        for at in (skip..bank.size).step_by(4096) {
            pages.give_to_host(Pa(bank.base + at));
        }
    }
    let vgic = Vgic::new(&gic);
    let ras = reg::id_aa64pfr0_el1::read() >> 28 & 15 != 0;
    WORLD.call_once(|| World { facts, gic, vgic, ras, machine, pages, map: SpinMutex::new(map) });
}

/// SCR_EL3 in the host (Arm ARM D24.2.146): non-secure, EL2 and EL1 AArch64,
/// FIQ (group 0: the monitor's) to EL3, no HVC, no fetch from non-secure memory
/// at EL3 (SIF); limited ordering regions and error records trap (bits that a
/// CPU without them ignores). All that later versions gate here stays off:
/// pointer authentication, MTE, FGT, HCRX, TCR2, SCXTNUM and the rest trap.
pub const SCR: u64 = bits!(NS 0, FIQ 2, RES1 4, RES1 5, SIF 9, RW 10, TLOR 14, TERR 15);

/// SCR_EL3 in a guest: all interrupts and external aborts come to EL3, and HVC
/// goes to EL2.
pub const SCR_GUEST: u64 = SCR | bits!(IRQ 1, EA 3, HCE 8);

/// HCR_EL2 in the host (D24.2.56): stage-2 on, set/way invalidation cleans too,
/// ID registers, ACTLR and implementation-defined ones trap, EL1 is AArch64. A stage-1
/// walk that hits a device faults (PTW): the monitor has the host's addresses
/// translated (AT), and a device that answers with an error would abort EL3.
pub const HCR: u64 = bits!(VM 0, SWIO 1, PTW 2, TID3 18, TIDCP 20, TACR 21, RW 31);

/// CPTR_EL3: trace (TTA) and activity monitors (TAM) trap; SVE and SME are off
/// (EZ and ESM are 0).
pub const CPTR_EL3: u64 = bits!(TTA 20, TAM 30);

/// CPTR_EL2: RES1 bits, among them those that trap SVE and SME; trace traps.
const CPTR_EL2: u64 = 0x33ff | bits!(TTA 20);

/// MDCR_EL3: no secure debug (SPD32 is 0b10, SDD), no external access to the debug and
/// PMU registers (EDAD, EPMAD), PMU and trace filters trap (TPM, TTRF). The
/// buffers of SPE, TRBE and BRBE are the secure world's: their registers trap.
const MDCR_EL3: u64 = bits!(TPM 6, SPD32 15, SDD 16, TTRF 19, EDAD 20, EPMAD 21);

/// MDCR_EL2: the PMU traps (TPM, TPMCR), and the OS lock and ROM address
/// registers (TDOSA, TDRA); HPMN, which splits the counters that nobody gets, is
/// not 0 (not allowed before FEAT_HPMN0).
pub const MDCR_EL2: u64 = bits!(HPMN 0, TPMCR 5, TPM 6, TDOSA 10, TDRA 11);

/// CNTHCTL_EL2: EL1 may use the physical counter and timer.
const CNTHCTL: u64 = bits!(EL1PCTEN 0, EL1PCEN 1);

/// Puts what holds lower levels in, and is the same for the host and guests,
/// into force on this CPU: whatever the registers held after power-off.
fn set_up_cpu() {
    reg::cptr_el3::write(CPTR_EL3);
    reg::mdcr_el3::write(MDCR_EL3);
    reg::cptr_el2::write(CPTR_EL2);
    reg::hstr_el2::write(0);
    reg::cnthp_ctl_el2::write(0);
    reg::cntvoff_el2::write(0);
    reg::vpidr_el2::write(reg::midr_el1::read());
    // EL2: MMU off; nothing runs there but the vectors.
    reg::sctlr_el2::write(0x30c5_0830);
    let base = world().facts.ram.banks()[0].base;
    reg::vbar_el2::write(base + carveout::EL2_VECTORS);
    reg::vtcr_el2::write(stage2::vtcr((reg::id_aa64mmfr0_el1::read() & 15).min(5)));
    world().vgic.init_cpu();
    world::open_os_lock();
}

/// Makes the host the world of this CPU, with `el1` in its registers: the one
/// way there (I10), from power-off and from a guest. A guest's counter offset
/// stays until the host has it changed: it serves that guest's timer.
pub fn enter_again(el1: &El1State) {
    let world = world();
    // SAFETY: lower levels get the normal world only, and EL3 stays secure.
    unsafe { reg::write_scr_el3(SCR) };
    reg::mdcr_el2::write(MDCR_EL2);
    reg::cnthctl_el2::write(CNTHCTL);
    reg::vmpidr_el2::write(reg::mpidr_el1::read());
    world::switch_to(el1, world.machine.host_vttbr, HCR);
}

/// This CPU enters the host at `boot` when the monitor is left: at EL1, as
/// after reset.
pub fn enter(boot: &Boot) {
    set_up_cpu();
    enter_again(&El1State::RESET);
    havmsi_core::left_out!(HostStage2 => if this_cpu().number() != 0 { havmsi_hal::sysreg::hcr_el2::write(HCR & !1) });
    reg::cntv_ctl_el0::write(0);
    reg::cntp_ctl_el0::write(0);
    // A warm reset need not clear these: a guest may have had them.
    FpState::RESET.load();
    let mut debug = DebugState::RESET;
    debug.swap();
    // Nothing of before the reset is left in the TLB or instruction cache.
    tlb::invalidate_local_all();
    cache::invalidate_icache_all();
    let cpu = this_cpu();
    cpu.resume_host_next();
    cpu.with_host(|frame| frame.start(boot));
}

/// A register of this CPU's that does not hold the host in, as [`set_up_cpu`]
/// and [`enter_again`] left it: its name and value.
#[cfg(feature = "audit")]
pub fn changed() -> Option<(&'static str, u64)> {
    use havmsi_hal::sysreg::{hcr_el2, icc_sre_el2, vttbr_el2};
    let world = world();
    let vectors = world.facts.ram.banks()[0].base + carveout::EL2_VECTORS;
    let vtcr = stage2::vtcr((reg::id_aa64mmfr0_el1::read() & 15).min(5));
    // Its Enable bit may be fixed at 1 (IHI 0069H, 12.4).
    let sre = if world.gic.version() == 3 { icc_sre_el2::read() & !8 } else { 7 };
    // TLOR and TERR, TAM, TTRF: a CPU without what they trap reads 0.
    let optional = [0b11 << 14, 1 << 30, 1 << 19];
    [
        ("SCR_EL3", reg::scr_el3::read() | optional[0], SCR),
        ("CPTR_EL3", reg::cptr_el3::read() | optional[1], CPTR_EL3),
        ("MDCR_EL3", reg::mdcr_el3::read() | optional[2], MDCR_EL3),
        ("HCR_EL2", hcr_el2::read(), HCR),
        ("VTTBR_EL2", vttbr_el2::read(), world.machine.host_vttbr),
        ("VTCR_EL2", reg::vtcr_el2::read(), vtcr),
        ("VBAR_EL2", reg::vbar_el2::read(), vectors),
        ("SCTLR_EL2", reg::sctlr_el2::read(), 0x30c5_0830),
        ("MDCR_EL2", reg::mdcr_el2::read(), MDCR_EL2),
        ("CNTHCTL_EL2", reg::cnthctl_el2::read(), CNTHCTL),
        ("CNTHP_CTL_EL2", reg::cnthp_ctl_el2::read(), 0),
        ("VMPIDR_EL2", reg::vmpidr_el2::read(), reg::mpidr_el1::read()),
        ("VPIDR_EL2", reg::vpidr_el2::read(), reg::midr_el1::read()),
        ("ICC_SRE_EL2", sre, 7),
    ]
    .into_iter()
    .find(|(_, is, should)| is != should)
    .map(|(name, is, _)| (name, is))
}

/// Whether the host may run code at `address`.
pub fn is_executable(address: u64) -> bool {
    let world = world();
    let leaf = world.with_host_map(|map| map.lookup(&world.machine, Ipa(address).page()));
    address.is_multiple_of(4) && leaf.is_some_and(Entry::is_executable)
}
