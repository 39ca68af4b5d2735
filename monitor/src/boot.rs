// SPDX-License-Identifier: MIT OR Apache-2.0
//! From the entry code to the host: the first CPU builds everything, the
//! others come in behind it and wait for the host to turn them on.

use core::arch::global_asm;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use havmsi_abi::{PAGE_SIZE, layout};
use havmsi_core::addr::Pa;
use havmsi_core::launch::Boot;
use havmsi_core::ram::Range;
use havmsi_hal::sysreg;
use havmsi_hal::{barrier, cache, phys};

use crate::cpu::{self, PER_CPU, PerCpu, this_cpu};
use crate::platform::{self, AFFINITIES, Facts, MAX_CPUS};
use crate::{exception, host, log, mmu, psci, vms};

/// log2 of the bytes between two CPUs' words in the pen: more than a cache
/// line, so that cleaning one writes over no other.
const PEN_SHIFT: usize = 8;
/// In a pen: the CPU may come in.
const PEN_GO: u64 = 0x60;
/// In the pen behind the last CPU's, which no reset clears: VMs ran since
/// power-on. A random number. The next word counts starts.
const VMS_RAN: u64 = 0x93d6_1c5f_a07e_4b28;
type Pen = [AtomicU64; 1 << (PEN_SHIFT - 3)];

global_asm!(
    include_str!("entry.S"),
    affinities = sym AFFINITIES,
    max_cpus = const MAX_CPUS,
    pen = const platform::PEN as usize,
    pen_shift = const PEN_SHIFT,
    pen_go = const PEN_GO,
    stack_stride = const mmu::STACK_STRIDE,
    emergency_stack = const mmu::EMERGENCY_STACK,
    per_cpu = sym PER_CPU,
    per_cpu_size = const size_of::<PerCpu>(),
    per_cpu_stack = const cpu::STACK_OFFSET,
    early = sym early,
    root = sym mmu::TABLES,
    start = sym start,
);

global_asm!(
    include_str!("vectors.S"),
    per_cpu_frame = const cpu::FRAME_OFFSET,
    per_cpu_stack = const cpu::STACK_OFFSET,
    emergency_stack = const mmu::EMERGENCY_STACK,
    frame_spsr = const cpu::FRAME_SPSR,
    from_lower = sym exception::exception_from_lower,
    from_self = sym exception::exception_from_self,
);

unsafe extern "C" {
    static PENS: [Pen; MAX_CPUS + 1];
    /// The way out: resumes the current frame, which [`PerCpu`] always has; nothing on
    /// this stack is needed any more.
    pub safe fn resume() -> !;
}

/// Called by entry.S on each CPU, with the MMU off.
extern "C" fn early(number: usize) {
    platform::early(number);
    if number == 0 {
        mmu::build_tables();
    }
}

/// Called by entry.S on each CPU, with MMU and caches on.
extern "C" fn start(number: usize) -> ! {
    this_cpu().resume_host_next();
    // SAFETY: the value keeps EL3 secure and gives lower levels the normal
    // world only.
    unsafe { sysreg::write_scr_el3(host::SCR) };
    barrier::isb();
    if number == 0 { first() } else { other() }
}

fn first() -> ! {
    log::init();
    #[cfg(feature = "leave-out")]
    crate::leave_out::init();
    // Before anything else: devices may be awake.
    let smmu = platform::smmu();
    let facts = platform::facts();
    mmu::map_ram(&facts.ram);
    // SAFETY: just mapped so; all of the monitor's objects lie in secure RAM.
    unsafe { phys::set_ram(&facts.ram) };
    let gic = platform::gic();
    gic.init_distributor();
    gic.init_cpu(0);
    let size = facts.ram.page_count() * PAGE_SIZE;
    let base = facts.ram.banks()[0].base;
    let (pc, dtb) = (layout::host_kernel(base, size), layout::host_dtb(base, size));
    crate::log!(
        "version {}, {} MiB of RAM, {} CPUs, GICv{}, {}",
        env!("CARGO_PKG_VERSION"),
        size >> 20,
        facts.cpus,
        gic.version(),
        if facts.seed.is_some() { "seeded" } else { "no seed" }
    );
    // QEMU gives the same seed after each reset: the number of the start makes it
    // another, or the host could see beforehand what a guest will draw.
    let starts = pen(MAX_CPUS)[1].load(Ordering::Relaxed).wrapping_add(1);
    set_pen(MAX_CPUS, 1, starts);
    if let Some(seed) = &facts.seed {
        vms::RANDOM.lock().seed(seed, starts);
    }
    if pen(MAX_CPUS)[0].load(Ordering::Relaxed) == VMS_RAN {
        wipe(&facts, Range { base: dtb, size: facts.images });
    }
    host::build(facts, gic, smmu);
    for cpu in 1..facts.cpus {
        let_in(cpu);
        platform::power_on(cpu, mmu::image_start());
    }
    host::enter(&Boot { pc, x: [dtb, 0, 0, 0] });
    resume()
}

fn other() -> ! {
    let number = this_cpu().number();
    host::world().gic.init_cpu(number);
    psci::sleep(number);
    resume()
}

fn pen(number: usize) -> &'static Pen {
    // SAFETY: `PENS` lies in secure RAM, mapped like .data; entry.S makes these
    // elements, and accesses are atomic.
    unsafe { &PENS[number] }
}

/// Sets a word for those that read it with caches off, and after a reset.
fn set_pen(number: usize, word: usize, value: u64) {
    let pen = pen(number);
    pen[word].store(value, Ordering::Release);
    cache::clean_invalidate(ptr::from_ref(pen).addr(), size_of_val(pen));
}

/// Opens the pen of a CPU that was there at reset. No effect once it is in.
pub fn let_in(cpu: usize) {
    if platform::PEN {
        set_pen(cpu, 0, PEN_GO);
        barrier::sev();
    }
}

/// A VM is made: should a reset come before it is destroyed, RAM holds what it left.
pub fn vms_ran() {
    set_pen(MAX_CPUS, 0, VMS_RAN);
}

/// Clears what VMs of an earlier life left in RAM: all but the images, which the
/// loader has put there again. Devices and other CPUs wait.
fn wipe(facts: &Facts, images: Range) {
    havmsi_core::left_out!(Wipe => return);
    crate::log!("VMs ran before this reset: RAM is cleared");
    assert!(images.size != 0, "the board does not say where its images are");
    for bank in facts.ram.banks() {
        let pages = (bank.base..bank.base + bank.size).step_by(4096);
        let left = pages.filter(|page| !images.contains(*page, PAGE_SIZE));
        left.for_each(|page| phys::zero_page(Pa(page)));
    }
    set_pen(MAX_CPUS, 0, 0);
}
