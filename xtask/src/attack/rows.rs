// SPDX-License-Identifier: MIT OR Apache-2.0
//! The attacks as data: one row a threat of the threat model, each with one or more ways to try it.

use std::time::Duration;

/// The payload's share, which is its own table.
#[path = "../../../payload/src/attack/table.rs"]
mod payload;

/// Who attacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attacker {
    /// The host kernel, as a module or bare-metal code at EL1.
    Kernel,
    /// Host user space.
    User,
    /// The VMM of the VM.
    Vmm,
    /// Another guest, or the guest itself.
    Guest,
    /// A device, set up by the host kernel.
    Device,
}

impl Attacker {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "host kernel",
            Self::User => "host user space",
            Self::Vmm => "VMM",
            Self::Guest => "guest",
            Self::Device => "device",
        }
    }
}

/// Where an attack is made, and so what its control is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// Linux as the host. The control is the same kernel on plain KVM.
    Linux,
    /// The bare-metal payload as the host.
    Payload {
        /// The control is a monitor without this check,
        leave_out: &'static str,
        /// which in the control makes the monitor itself stop.
        stops: bool,
        /// The GIC version that it takes.
        gic: u32,
    },
}

impl Ground {
    /// The control, for people.
    pub fn control(self) -> String {
        match self {
            Self::Linux => "plain KVM".to_owned(),
            Self::Payload { leave_out, .. } => format!("monitor without `{leave_out}`"),
        }
    }
}

/// One way to try an attack. On the control it must succeed, under HA-VMSI it must be blocked.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// The agent's check, or the payload's attack.
    pub name: &'static str,
    /// Who attacks.
    pub attacker: Attacker,
    /// Where.
    pub ground: Ground,
    /// What is tried, and what success is.
    pub what: &'static str,
}

/// One threat.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its number in the threat model.
    pub id: &'static str,
    /// Its name.
    pub title: &'static str,
    /// The longest that its attacks may take, machines' boots included.
    pub limit: Duration,
    /// The attacks with Linux as the host.
    linux: &'static [Variant],
}

impl Row {
    /// All its attacks.
    pub fn variants(&self) -> Vec<Variant> {
        let ours = payload::TABLE.iter().filter(|a| a.id == self.id);
        let payload = ours.map(|a| Variant {
            name: a.name,
            attacker: match a.id {
                "T14" => Attacker::Device,
                "T23" => Attacker::Guest,
                _ => Attacker::Kernel,
            },
            ground: Ground::Payload {
                leave_out: a.leave_out,
                stops: a.stops,
                gic: if a.gic == 2 { 2 } else { 3 },
            },
            what: a.what,
        });
        self.linux.iter().copied().chain(payload).collect()
    }
}

const fn linux(name: &'static str, attacker: Attacker, what: &'static str) -> Variant {
    Variant { name, attacker, ground: Ground::Linux, what }
}

const fn row(id: &'static str, title: &'static str, linux: &'static [Variant]) -> Row {
    Row { id, title, limit: Duration::from_secs(120), linux }
}

use Attacker::{Device, Kernel, User, Vmm};

/// All rows.
pub const ROWS: [Row; 28] = [
    row(
        "T01",
        "The host kernel reads guest memory",
        &[
            linux(
                "linear-map-read",
                Kernel,
                "read a known page of a guest through the linear map and a mapping made for it",
            ),
            linux(
                "scan-physmem",
                Kernel,
                "look for pages of the guests' streams in all of RAM, through the linear map",
            ),
            linux("scan-fresh-map", Kernel, "the same through mappings made for it"),
            linux("kcore-read", User, "read the page through /proc/kcore"),
            linux("devmem-read", User, "read the page through /dev/mem"),
        ],
    ),
    row(
        "T02",
        "The host kernel writes guest memory",
        &[
            linux(
                "linear-map-write",
                Kernel,
                "change a word of a guest's page through the linear map; the guest finds it changed",
            ),
            linux("fresh-map-write", Kernel, "the same through a mapping made for it"),
        ],
    ),
    row(
        "T03",
        "The VMM reads and writes guest memory",
        &[
            linux(
                "vmm-read",
                User,
                "read a page of a guest in QEMU's memory: process_vm_readv, /proc/PID/mem, ptrace",
            ),
            linux("vmm-write", User, "change a word there; the guest finds it changed"),
            linux(
                "own-mapping-read",
                Vmm,
                "load from the mapping that is the guest's RAM; write(2) from it",
            ),
            linux(
                "own-mapping-write",
                Vmm,
                "store to it; read(2) into it; the guest loads another value",
            ),
        ],
    ),
    row(
        "T04",
        "Pages mapped twice, moved or exchanged",
        &[
            linux(
                "map-into-other-vm",
                Kernel,
                "map a page of one guest into the other (stage-2 descriptor; PAGE_MAP)",
            ),
            linux("map-twice", Kernel, "map a page of a guest at a second address of it"),
            linux(
                "slot-alias",
                Vmm,
                "a second memory slot over the same memory; the guest reads its data there",
            ),
            linux(
                "slot-of-two-vms",
                Vmm,
                "a second VM over the same memory; its guest reads the first one's data",
            ),
        ],
    ),
    row("T05", "Memory that is not the host's mapped into a VM", &[]),
    row(
        "T06",
        "Page tables and the monitor's memory written",
        &[linux(
            "stage2-table-write",
            Kernel,
            "point a stage-2 descriptor at a page of the attacker's; write to pages that hold tables, EL2's vectors, the monitor's memory",
        )],
    ),
    row(
        "T07",
        "Guest registers read",
        &[
            linux(
                "regs-read",
                Vmm,
                "KVM_GET_ONE_REG after a store, a load and an interrupt: values that the guest keeps in general, FP and system registers",
            ),
            linux(
                "regs-at-exits",
                Kernel,
                "look at each exit of each guest, right behind the switch: KVM's structure, the CPU's FP registers",
            ),
            linux(
                "regs-read-qemu",
                Kernel,
                "KVM's structure and KVM_GET_ONE_REG for a running QEMU's vCPUs",
            ),
        ],
    ),
    row(
        "T08",
        "Guest registers changed",
        &[
            linux(
                "regs-write",
                Vmm,
                "KVM_SET_ONE_REG after an exit: general, FP and system registers, PC; the guest runs on with them",
            ),
            linux(
                "regs-write-qemu",
                Kernel,
                "KVM's structure and KVM_SET_ONE_REG for a running QEMU's vCPUs; the guest notices",
            ),
            linux(
                "inject-abort",
                Vmm,
                "KVM_SET_VCPU_EVENTS: an external abort after an interrupt; the guest takes it",
            ),
        ],
    ),
    row("T09", "Exits answered with more than they ask for", &[]),
    row(
        "T10",
        "RAM taken for a device",
        &[linux(
            "slot-delete",
            Vmm,
            "delete the memory slot; the guest's next store to its RAM comes out with its value",
        )],
    ),
    row(
        "T11",
        "Content that was not measured",
        &[
            linux(
                "image-change",
                Vmm,
                "change code of the launch image while the guest runs; the guest runs it",
            ),
            linux(
                "late-fill",
                Vmm,
                "put content into RAM that the guest has not touched; the guest reads it",
            ),
            linux("slot-replace", Vmm, "other memory in place of the guest's; the guest reads it"),
        ],
    ),
    row(
        "T12",
        "Pages taken back",
        &[
            linux("take-back", Vmm, "delete the memory slot and read what the guest left there"),
            linux(
                "replay",
                Vmm,
                "delete the slot, put earlier content there, make it again; the guest reads that",
            ),
        ],
    ),
    row("T13", "Stale translations", &[]),
    row(
        "T14",
        "Device DMA",
        &[
            linux("dma-read", Device, "a PCI device reads a guest's page"),
            linux(
                "dma-write",
                Device,
                "a PCI device writes a guest's page; the guest finds it changed",
            ),
            linux(
                "dma-table",
                Device,
                "a PCI device writes a stage-2 descriptor; it reads and writes the monitor's tables and EL2's vectors",
            ),
            linux(
                "fw-cfg-dma",
                Device,
                "QEMU's configuration device copies over a guest's page; the guest finds it changed",
            ),
            linux(
                "virtio-mmio",
                Device,
                "reach a virtio-mmio transport, whose queues lie wherever its registers say",
            ),
            linux(
                "lpi-tables",
                Device,
                "make a guest's page the table in which a redistributor of the GIC clears bits",
            ),
        ],
    ),
    row(
        "T15",
        "The SMMU, the GIC's secure side, flash and secure UART",
        &[
            linux(
                "flash",
                Kernel,
                "program a word of the first flash, where the monitor's image is",
            ),
            linux("second-uart", Kernel, "write to the second UART, the monitor's console"),
            linux("gic-groups", Kernel, "give an interrupt to the GIC's secure group"),
            linux("smmu-registers", Kernel, "change what becomes of traffic when the SMMU is off"),
        ],
    ),
    row(
        "T16",
        "CPUs brought up by the host",
        &[linux(
            "cpu-on",
            Kernel,
            "take a CPU from Linux and turn it on with code of the attacker's, MMU off; that reads and writes a guest's page",
        )],
    ),
    row(
        "T17",
        "Guest vCPUs brought up or run by the host",
        &[linux(
            "vcpu-entry",
            Vmm,
            "start a vCPU that the guest has not turned on, at a place of the VMM's choice",
        )],
    ),
    row(
        "T18",
        "Debug, trace and counters",
        &[linux(
            "guest-debug",
            Vmm,
            "KVM_SET_GUEST_DEBUG: single step and a breakpoint; the guest stops for the VMM",
        )],
    ),
    row("T19", "List registers and interrupts of others", &[]),
    row("T20", "Malformed calls", &[]),
    row("T21", "Shared structures changed while they are read", &[]),
    row("T22", "Races between calls", &[]),
    row("T23", "Guests that attack", &[]),
    row(
        "T24",
        "What a dead VM leaves",
        &[
            linux(
                "dead-vm-scan",
                Kernel,
                "look for the guests' streams in all of RAM after they ended",
            ),
            linux("reset-read", Vmm, "reset the vCPU and read the guest's memory"),
        ],
    ),
    row("T25", "Exhaustion", &[]),
    row("T26", "Known classes of bugs of such monitors", &[]),
    row(
        "T27",
        "Hostile injection",
        &[linux(
            "forged-sgi",
            Vmm,
            "make an SGI pending that no vCPU of the guest sent; the guest takes it",
        )],
    ),
    row(
        "T28",
        "The guest's time turned back",
        &[linux(
            "time-back",
            Vmm,
            "set the guest's counter through its register and KVM_ARM_SET_COUNTER_OFFSET; the guest sees it go back",
        )],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What a test monitor can leave out an attack must notice, or a row of
    /// `cargo xtask test` that resets or breaks the machine (failure.rs), or, for
    /// `OwnerLate`, `cargo xtask model`.
    #[test]
    fn each_check_has_an_attack() {
        let source = include_str!("../../../crates/core/src/leave_out.rs");
        let (_, list) = source.split_once("\nchecks! {").unwrap();
        let (list, _) = list.split_once("\n}").unwrap();
        let names = list.lines().filter_map(|l| l.trim().strip_suffix(','));
        let elsewhere = ["///", "Panic", "Wipe", "OwnerLate"];
        let checks: Vec<&str> =
            names.filter(|n| !elsewhere.iter().any(|e| n.starts_with(e))).collect();
        assert!(checks.len() > 40, "{checks:?}");
        let left = |check: &&&str| !payload::TABLE.iter().any(|a| a.leave_out == **check);
        assert_eq!(checks.iter().filter(left).collect::<Vec<_>>(), Vec::<&&str>::new());
        let unknown = payload::TABLE.iter().filter(|a| !checks.contains(&a.leave_out));
        assert_eq!(unknown.map(|a| a.leave_out).collect::<Vec<_>>(), [""; 0]);
    }

    #[test]
    fn rows_are_numbered_and_variants_are_named_once() {
        let mut names = Vec::new();
        for (i, row) in ROWS.iter().enumerate() {
            assert_eq!(row.id, format!("T{:02}", i + 1));
            names.extend(row.variants().iter().map(|v| v.name));
        }
        let count = names.len();
        let payload = payload::TABLE.iter().filter(|a| names.contains(&a.name));
        assert_eq!(payload.count(), payload::TABLE.len(), "an id that is none");
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
