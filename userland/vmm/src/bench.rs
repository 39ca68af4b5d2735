// SPDX-License-Identifier: MIT OR Apache-2.0
//! What operations cost: a VM for each, with the bare-metal guest of `bench/guest` in it, which
//! measures; its start and its end are measured here. QEMU's plugin (`bench/plugin`) counts between
//! the marks that are executed.

use crate::gic;
use crate::vm::{Reg, text};
use havmsi_operations::{
    BLOCK, Kind, Load, OPERATIONS, PAGE, RAM, RAM_SIZE, Task, Work, mark, port,
};
use havmsi_proto::VMM_PREFIX;
use havmsi_proto::json::Object;
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, kvm_userspace_memory_region, kvm_vcpu_init,
};
use kvm_ioctls::{DeviceFd, Kvm, VcpuExit, VcpuFd, VmFd};
use std::io::{Error, Read as _, Write as _};
use std::process::Command;

/// Where the guest's image is on the host.
const IMAGE: &str = "/havmsi/bench.bin";

/// pKVM's type of VM, since Linux 7.x.
const PROTECTED: u64 = 1 << 31;

/// The guest's memory, which is at the start of a block.
struct Ram {
    mapping: *mut libc::c_void,
    size: usize,
    start: *mut u8,
}

impl Ram {
    fn new(size: u64, huge: bool) -> Result<Self, String> {
        let failed = |what| move || format!("{what}: {}", Error::last_os_error());
        let number = |n: u64| usize::try_from(n).map_err(|e| e.to_string());
        let (all, block) = (number(size + BLOCK)?, number(BLOCK)?);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let mapping = unsafe { libc::mmap(std::ptr::null_mut(), all, prot, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(failed("mmap")());
        }
        let start = mapping.cast::<u8>();
        let start = start.wrapping_add(start.align_offset(block));
        let this = Self { mapping, size: all, start };
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: memory of ours that nothing lies in yet.
        if unsafe { libc::madvise(mapping, all, advice) } != 0 {
            return Err(failed("madvise: no transparent huge pages?")());
        }
        Ok(this)
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: there are no references to it, and its VM is gone.
        unsafe { libc::munmap(self.mapping, self.size) };
    }
}

/// A VM. Fields are dropped in this order: memory at last.
struct Machine {
    vcpus: Vec<VcpuFd>,
    /// So many of them are turned on at some time.
    running: usize,
    _gic: DeviceFd,
    _vm: VmFd,
    _ram: Ram,
}

/// What is the same for all VMs.
struct Setting {
    kvm: Kvm,
    /// KVM's type of VM.
    kind: u64,
    image: Vec<u8>,
    gic: u64,
}

impl Machine {
    fn new(setting: &Setting, Task { index, load }: Task) -> Result<Self, String> {
        let operation = &OPERATIONS[index];
        let more_ram = if let Load::Ram(mib) = load { u64::from(mib) << 20 } else { 0 };
        let size = RAM_SIZE + more_ram;
        let (image, gic) = (&setting.image, setting.gic);
        let vm = setting.kvm.create_vm_with_type(setting.kind).map_err(text("KVM_CREATE_VM"))?;
        let ram = Ram::new(size, operation.kind == Kind::Touch(BLOCK))?;
        // SAFETY: the mapping is larger than that, and there are no references to it.
        unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), ram.start, image.len()) };
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: RAM,
            memory_size: size,
            userspace_addr: ram.start.expose_provenance() as u64,
        };
        // SAFETY: a mapping that outlives the VM, and is never reached through a reference.
        unsafe { vm.set_user_memory_region(region) }.map_err(text("KVM_SET_USER_MEMORY_REGION"))?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).map_err(text("preferred target"))?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        let mut vcpus = Vec::new();
        let count = if let Load::Vcpus(n) = load { n.into() } else { operation.kind.vcpus() };
        for i in 0..count {
            let vcpu = vm.create_vcpu(i).map_err(text("KVM_CREATE_VCPU"))?;
            vcpu.vcpu_init(&init).map_err(text("KVM_ARM_VCPU_INIT"))?;
            init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
            vcpus.push(vcpu);
        }
        let device = gic::create(&vm, gic)?;
        let registers =
            [(Reg::Pc, RAM), (Reg::X(0), index as u64), (Reg::X(1), gic), (Reg::X(2), more_ram)];
        for (reg, value) in registers {
            let set = vcpus[0].set_one_reg(reg.id(), &value.to_le_bytes());
            set.map_err(text("KVM_SET_ONE_REG"))?;
        }
        let running = usize::try_from(operation.kind.vcpus()).unwrap_or(1);
        Ok(Self { vcpus, running, _gic: device, _vm: vm, _ram: ram })
    }
}

/// This thread stays on one CPU.
fn pin(cpu: usize) -> Result<(), String> {
    // SAFETY: all zero is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: a number below 1024.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: a valid set; 0 is this thread.
    let r = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if r == 0 { Ok(()) } else { Err(format!("CPU {cpu}: {}", Error::last_os_error())) }
}

/// Runs a vCPU until it says that it is done; the ticks that it tells.
fn run(vcpu: &mut VcpuFd) -> Result<Vec<u64>, String> {
    let mut ticks = Vec::new();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(port::ANSWER, data)) => data.fill(0x5a),
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let mut word = [0; 8];
                word[..data.len()].copy_from_slice(data);
                let value = u64::from_le_bytes(word);
                match address {
                    port::TICKS => ticks.push(value),
                    port::DONE | port::OTHER_DONE => return Ok(ticks),
                    port::WRONG => return Err(format!("the guest got {value:#x}")),
                    port::FAULT => return Err(format!("an exception in the guest: {value:#x}")),
                    _ => return Err(format!("a store of {value:#x} to {address:#x}")),
                }
            }
            Ok(other) => return Err(format!("KVM_RUN ends with {other:?}")),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(format!("KVM_RUN: {e}")),
        }
    }
}

fn run_all(machine: &mut Machine) -> Result<Vec<u64>, String> {
    let (first, others) = machine.vcpus.split_at_mut(1);
    let others = &mut others[..machine.running - 1];
    std::thread::scope(|scope| {
        let others: Vec<_> = others
            .iter_mut()
            .zip(1..)
            .map(|(vcpu, cpu)| scope.spawn(move || pin(cpu).and_then(|()| run(vcpu))))
            .collect();
        let ticks = run(&mut first[0]);
        // The guest's end doesn't come if its first vCPU failed: leave the others where they are.
        let ticks = ticks.inspect_err(|e| {
            eprintln!("havmsi-vmm: {e}");
            std::process::exit(1);
        });
        for other in others {
            other.join().map_err(|_| "a vCPU's thread died")??;
        }
        ticks
    })
}

/// Carries out records of something the host does.
fn records(task: Task, mut once: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    // The first one is not like the others: code and caches of the kernel come in.
    for record in 0..=task.records() {
        if record > 0 {
            mark::put::<{ mark::START }>();
        }
        for _ in 0..task.operation().times {
            once()?;
        }
        mark::put::<{ mark::STOP }>();
    }
    Ok(())
}

/// What the host itself pays: no VM.
fn host(task: Task, work: Work) -> Result<(), String> {
    let failed = |e: Error| e.to_string();
    match work {
        Work::Process => records(task, || {
            let status = Command::new("/bin/busybox").arg("true").status().map_err(failed)?;
            if status.success() { Ok(()) } else { Err(format!("busybox: {status}")) }
        }),
        Work::Pipe => {
            let (mut there, mut out) = std::io::pipe().map_err(failed)?;
            let (mut back, mut answer) = std::io::pipe().map_err(failed)?;
            let other = std::thread::spawn(move || -> Result<(), String> {
                pin(1)?;
                let mut byte = [0];
                while there.read(&mut byte).map_err(failed)? == 1 {
                    answer.write_all(&byte).map_err(failed)?;
                }
                Ok(())
            });
            records(task, || {
                out.write_all(&[1]).map_err(failed)?;
                back.read_exact(&mut [0]).map_err(failed)
            })?;
            drop(out);
            other.join().map_err(|_| "the other thread died")?
        }
        Work::Memory => records(task, || {
            let ram = Ram::new(64 * PAGE, false)?;
            for page in 0..64 {
                // SAFETY: inside the mapping, to which there are no references.
                unsafe { ram.start.wrapping_add(page * 4096).write_volatile(1) };
            }
            Ok(())
        }),
    }
}

fn measure(setting: &Setting, task: Task) -> Result<Vec<u64>, String> {
    let operation = task.operation();
    let new = || Machine::new(setting, task);
    mark::put::<{ mark::NEXT }>();
    let mut others = Vec::new();
    if let Load::Vms(n) = task.load {
        // A guest that does nothing but say that it was there.
        let start = OPERATIONS.iter().position(|o| o.kind == Kind::Start);
        let start = Task::plain(start.ok_or("no such operation")?);
        for _ in 1..n {
            let mut other = Machine::new(setting, start)?;
            run_all(&mut other)?;
            others.push(other);
        }
    }
    match operation.kind {
        Kind::Host(work) => host(task, work).map(|()| vec![]),
        Kind::Start | Kind::End => {
            // The first one is not like the others: code and caches of the kernel come in.
            for record in 0..=task.records() {
                let measured = |kind| record > 0 && operation.kind == kind;
                if measured(Kind::Start) {
                    mark::put::<{ mark::START }>();
                }
                let mut machine = new()?;
                run_all(&mut machine)?;
                if measured(Kind::End) {
                    mark::put::<{ mark::START }>();
                }
                drop(machine);
                if measured(Kind::End) {
                    mark::put::<{ mark::STOP }>();
                }
            }
            Ok(vec![])
        }
        _ => run_all(&mut new()?),
    }
}

fn line(task: Task, ticks: &[u64]) {
    let ticks: Vec<String> = ticks.iter().map(u64::to_string).collect();
    let object = Object::event("bench")
        .text("operation", &task.to_string())
        .value("ticks", format!("[{}]", ticks.join(",")));
    println!("{VMM_PREFIX}{}", object.finish());
}

/// `havmsi-vmm bench GIC plain|protected NAME`: measures an operation (a `Task`'s text). `protected`: in a VM of pKVM's.
pub fn main(args: &[String]) -> Result<(), String> {
    const USAGE: &str = "usage: havmsi-vmm bench 2|3 plain|protected NAME";
    let [gic, kind, name] = args else { return Err(USAGE.to_owned()) };
    let gic = gic.parse().ok().filter(|g| [2, 3].contains(g)).ok_or(USAGE)?;
    let kind = match kind.as_str() {
        "plain" => 0,
        "protected" => PROTECTED,
        _ => return Err(USAGE.to_owned()),
    };
    let task = Task::parse(name).ok_or(format!("no operation `{name}`"))?;
    pin(0)?;
    let image = std::fs::read(IMAGE).map_err(|e| format!("{IMAGE}: {e}"))?;
    let kvm = Kvm::new().map_err(text("/dev/kvm"))?;
    let ticks = measure(&Setting { kvm, kind, image, gic }, task)?;
    line(task, &ticks);
    Ok(())
}
