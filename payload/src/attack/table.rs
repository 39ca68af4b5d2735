// SPDX-License-Identifier: MIT OR Apache-2.0
//! The payload's attacks as data; xtask includes this file too.

/// An attack and its control.
pub struct Attack {
    /// Module and function below `attack::`.
    pub name: &'static str,
    /// Its row of the list of threats.
    pub id: &'static str,
    /// The check without which it succeeds, by its name in
    /// `crates/core/src/leave_out.rs`.
    pub leave_out: &'static str,
    /// The GIC version that it needs; 0 for any.
    pub gic: u32,
    /// In the control the monitor stops, so that there is no line of the result.
    pub stops: bool,
    /// What the attacker does.
    pub what: &'static str,
}

const fn attack(
    id: &'static str,
    name: &'static str,
    leave_out: &'static str,
    what: &'static str,
) -> Attack {
    Attack { name, id, leave_out, gic: 0, stops: false, what }
}

impl Attack {
    const fn gic(self, gic: u32) -> Self {
        Self { gic, ..self }
    }

    const fn stops(self) -> Self {
        Self { stops: true, ..self }
    }
}

/// All of them.
#[rustfmt::skip]
pub const TABLE: &[Attack] = &[
    attack("T04", "t04::other_vm", "Owner", "the victim's page is given to another VM, content and all"),
    attack("T04", "t04::two_places", "Owner", "the victim's page is mapped at a second address of the victim"),
    attack("T04", "t04::exchanged", "Occupied", "a fresh page is mapped where the victim has one"),
    attack("T05", "t05::monitor_page", "Owner", "the root of the victim's stage-2, in the monitor's carve-out, is given to a VM"),
    attack("T05", "t05::vector_page", "Owner", "the page of EL2's vectors is given to a VM, which writes there"),
    attack("T05", "t05::table_page", "Owner", "a table of the victim's stage-2 is given to a VM, which swaps two of the victim's pages"),
    attack("T05", "t05::secure_ram", "Ram", "a page of secure RAM is given to a VM, which makes the monitor wipe it"),
    attack("T05", "t05::mmio", "Ram", "a device's registers are given to a VM as RAM"),
    attack("T05", "t05::as_device", "DeviceList", "the victim's page is mapped into another VM as a device").gic(2),
    attack("T06", "t06::host_tables", "Carveout", "the host writes its own stage-2 so that it shows the victim's page"),
    attack("T06", "t06::vectors", "Carveout", "the host writes the page of EL2's vectors"),
    attack("T06", "t06::table_written", "Hide", "the host writes the victim's stage-2 table in memory that it donated"),
    attack("T06", "t06::forged_table", "ScrubIn", "the host donates table memory with entries in it"),
    attack("T07", "t07::narrow_store", "StoreWidth", "a guest stores a byte; the host sees the register"),
    attack("T07", "t07::fp_registers", "FpClear", "the host reads FP registers after a guest used them"),
    attack("T07", "t07::interface", "CloseGic", "a VM without interrupt controller reads the registers of another VM's").gic(3),
    attack("T08", "t08::skipped", "Answer", "the host completes an instruction that did not exit"),
    attack("T08", "t08::answered_twice", "AnswerOnce", "the host completes a load twice, with an interrupt in between"),
    attack("T09", "t09::wide_answer", "LoadWidth", "the host answers the load of a byte with more"),
    attack("T10", "t10::ram_as_mmio", "RamFault", "the host lets RAM unmapped, to emulate a guest's accesses to it"),
    attack("T10", "t10::page_for_device", "DeclaredRam", "the host maps a page where a guest has a device"),
    attack("T10", "t10::device_in_ram", "DeviceInRam", "the host maps a device where a guest has RAM").gic(2),
    attack("T10", "t10::unguarded", "Guard", "the host emulates a device where the guest has none"),
    attack("T11", "t11::image", "Hide", "an image page is changed between its measurement and the run"),
    attack("T11", "t11::content", "ScrubIn", "a page that no measurement covers comes with content"),
    attack("T11", "t11::after_launch", "Phase", "a page with content comes after the launch was closed"),
    attack("T12", "t12::taken_back", "Seal", "a page is taken back and read"),
    attack("T12", "t12::replaced", "Lost", "a page is taken back and a fresh one given in its place"),
    attack("T12", "t12::tampered", "Tag", "a bit of a sealed page is changed before it comes back"),
    attack("T12", "t12::replayed", "Version", "an older sealed form of a page comes back"),
    attack("T12", "t12::moved", "Tag", "two sealed pages come back each in the other's place"),
    attack("T12", "t12::of_another", "Tag", "a sealed page of another VM's comes back"),
    attack("T12", "t12::among_others", "LostRun", "fresh pages are given all at once, one of them where a page was taken back"),
    attack("T13", "t13::host", "HostTlb", "a CPU of the host's goes on storing to a page while it is donated"),
    attack("T13", "t13::guest", "GuestTlb", "a guest goes on storing to a page that was taken from it"),
    attack("T14", "t14::fw_cfg", "HostDevices", "fw_cfg's DMA register writes over the victim's page"),
    attack("T14", "t14::dma_write", "DevicesStage2", "a PCI device writes to the victim's page"),
    attack("T14", "t14::dma_read", "DevicesStage2", "a PCI device reads the victim's page"),
    attack("T14", "t14::stale_dma", "DevicesTlb", "a PCI device goes on writing to a page that it used before it was donated"),
    attack("T14", "t14::unshared", "DevicesTlb", "a PCI device goes on writing to a page that was shared"),
    attack("T14", "t14::pending_table", "HostDevices", "the victim's page becomes a redistributor's table of pending LPIs").gic(3),
    attack("T16", "t16::cpu_on", "HostStage2", "a CPU that was turned on reads the victim's page"),
    attack("T17", "t17::entry_point", "GuestEntry", "the host says where a vCPU starts that the guest turned on"),
    attack("T17", "t17::off", "VcpuOff", "the host runs a vCPU that turned itself off"),
    attack("T17", "t17::twice", "VcpuBusy", "the host runs one vCPU on two CPUs at once"),
    attack("T19", "t19::link", "LrLink", "a virtual interrupt is linked to a physical one that isn't the guest's, which then ends it").gic(3),
    attack("T20", "t20::pool", "Owner", "the victim's page is donated as table memory"),
    attack("T20", "t20::config", "Config", "a VM with an address space of 64 bits declares RAM").stops(),
    attack("T21", "t21::run_page", "CopyOnce", "another CPU changes a list register while the monitor reads the run page").gic(3),
    attack("T22", "t22::destroy", "VmBusy", "a VM is destroyed while it runs"),
    attack("T22", "t22::two_owners", "ClaimOnce", "two CPUs give one page to two VMs at once"),
    attack("T23", "t23::host_call", "GuestCalls", "a guest calls PAGE_UNMAP for the victim's page"),
    attack("T23", "t23::share_other", "ShareAddress", "a guest shares the victim's page with the host, by its physical address"),
    attack("T23", "t23::unshare_at_once", "UnshareAsked", "a guest unshares a page while a device of the host's writes to it"),
    attack("T23", "t23::after_unshare", "Hide", "the host reads a page after the guest has unshared it"),
    attack("T24", "t24::destroyed", "ScrubOut", "the pages of a VM that was destroyed are read"),
    attack("T24", "t24::registers", "ContextReset", "a new vCPU shows a register of a dead one"),
    attack("T25", "t25::vcpus", "Contexts", "vCPUs are made until there are none left, and one more"),
    attack("T26", "t26::run_page", "Owner", "the run page of a vCPU is the victim's page (as CVE-2026-64286)"),
    attack("T26", "t26::lent_run_page", "RunPage", "a run page is given to a VM while the monitor uses it (as CVE-2026-64286)"),
    attack("T26", "t26::used_lrs", "LrCount", "more list registers than there are (as CVE-2026-64287)").gic(3).stops(),
    attack("T26", "t26::flag_without_state", "DebugState", "a guest arms breakpoints and gets the host's (as CVE-2026-98928)"),
    attack("T26", "t26::overflow", "CallBound", "a number of pages whose size overflows (as CVE-2026-0028)"),
    attack("T26", "t26::beyond_the_space", "RamSpace", "RAM beyond the address space, where its tables wrap (as CVE-2026-0028)"),
    attack("T26", "t26::range", "EveryPage", "a donated range of which only the first page is the host's"),
    attack("T27", "t27::abort", "Inject", "an external abort at an instruction that made no access"),
    attack("T27", "t27::sgi", "SgiSent", "an SGI that no vCPU has sent").gic(3),
    attack("T27", "t27::lpi", "LrLink", "an LPI for a VM that has none").gic(3),
    attack("T28", "t28::offset", "CounterOffset", "the host loads another counter offset between two runs"),
    attack("T28", "t28::other_cpu", "CounterOffset", "the vCPU moves to a CPU with another counter offset"),
];
