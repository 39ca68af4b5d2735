// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM with a guest of ours in it: code in one memory slot, data in another.

use crate::gic;
use crate::memory::Memory;
use crate::obey::{self, order};
use crate::tiny;
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, kvm_regs, kvm_userspace_memory_region,
    kvm_vcpu_init,
};
use kvm_ioctls::{DeviceFd, Kvm, VcpuExit, VcpuFd, VmFd};
use std::mem::offset_of;
use std::rc::Rc;

/// Bytes of a slot.
pub const SLOT: u64 = 1 << 20;
/// Where the data slot begins.
pub const DATA: u64 = tiny::RAM + SLOT;
const CORE: u64 = 0x6030_0000_0010_0000;
const CORE_128: u64 = 0x6040_0000_0010_0000;
const SYSTEM: u64 = 0x6030_0000_0013_0000;

/// A register, by the names of KVM's user API.
#[derive(Clone, Copy, Debug)]
pub enum Reg {
    /// A general register.
    X(u8),
    /// The low half of an FP/SIMD register.
    D(u8),
    /// The program counter.
    Pc,
    /// A system register.
    TpidrEl1,
    /// A system register.
    TpidrEl0,
    /// The virtual counter.
    Counter,
}

impl Reg {
    /// Its number in the user API.
    pub fn id(self) -> u64 {
        let core = |offset: usize| (offset / 4) as u64;
        match self {
            Self::X(i) => CORE | core(offset_of!(kvm_regs, regs.regs) + 8 * usize::from(i)),
            Self::D(i) => {
                CORE_128 | core(offset_of!(kvm_regs, fp_regs.vregs) + 16 * usize::from(i))
            }
            Self::Pc => CORE | core(offset_of!(kvm_regs, regs.pc)),
            // op0, op1, CRn, CRm, op2 in 2, 3, 4, 4, 3 bits.
            Self::TpidrEl1 => SYSTEM | 3 << 14 | 13 << 7 | 4,
            Self::TpidrEl0 => SYSTEM | 3 << 14 | 3 << 11 | 13 << 7 | 2,
            // KVM_REG_ARM_TIMER_CNT: its number is CVAL's, by an old mistake of the user API.
            Self::Counter => SYSTEM | 3 << 14 | 3 << 11 | 14 << 7 | 3 << 3 | 2,
        }
    }

    fn size(self) -> usize {
        if matches!(self, Self::D(_)) { 16 } else { 8 }
    }
}

/// Why the vCPU stopped.
#[derive(Debug)]
pub enum Stop {
    /// A store to a device.
    Store(u64, u64),
    /// A load from one; it was answered.
    Load(u64),
    /// A signal of ours.
    Interrupt,
    /// A debug exception came to us.
    Debug,
    /// The guest powered off.
    Off,
    /// KVM doesn't run it, and why.
    Failed(String),
}

/// What came of an order to the guest of `obey.rs`.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// The result.
    Value(u64),
    /// The guest took an exception; its syndrome.
    Fault(u64),
    /// It stopped elsewhere or can't go on.
    Stopped(String),
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Value(value) => write!(f, "{value:#x}"),
            Self::Fault(esr) => write!(f, "an exception in the guest (class {:#x})", esr >> 26),
            Self::Stopped(why) => f.write_str(why),
        }
    }
}

/// The VM.
pub struct Vm {
    vcpus: Vec<VcpuFd>,
    /// Its first slot, with the image at the start.
    pub code: Memory,
    /// Its second slot.
    pub data: Rc<Memory>,
    order: [u64; 3],
    /// KVM's descriptor.
    pub vm: VmFd,
    _kvm: Kvm,
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Lets a signal interrupt KVM_RUN after a while.
fn interrupt_in(ms: i32) -> Result<(), String> {
    // SAFETY: all zero is a valid sigaction (no flags: KVM_RUN isn't restarted).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: a valid structure; the handler does nothing.
    let first = unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let timer = libc::itimerval {
        it_interval: none,
        it_value: libc::timeval { tv_sec: (ms / 1000).into(), tv_usec: (ms % 1000 * 1000).into() },
    };
    // SAFETY: a valid structure; the old timer isn't asked for.
    let second =
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    if first == 0 && second == 0 {
        Ok(())
    } else {
        Err(format!("timer: {}", std::io::Error::last_os_error()))
    }
}

/// An error with the name of what failed.
pub fn text(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> String {
    move |e| format!("{what}: {e}")
}

impl Vm {
    /// Makes a VM with one vCPU, which stands at the image's first instruction.
    pub fn new(image: &[u8]) -> Result<Self, String> {
        Self::with(image, 1, Rc::new(Memory::new(SLOT)?))
    }

    /// Makes a VM with this data slot; vCPUs but the first are off.
    pub fn with(image: &[u8], vcpus: u64, data: Rc<Memory>) -> Result<Self, String> {
        let kvm = Kvm::new().map_err(text("/dev/kvm"))?;
        let vm = kvm.create_vm().map_err(text("KVM_CREATE_VM"))?;
        let code = Memory::new(SLOT)?;
        code.copy(image);
        let mut this = Self { vcpus: Vec::new(), code, data, order: [0; 3], vm, _kvm: kvm };
        this.slot(0, tiny::RAM, SLOT, &this.code)?;
        this.slot(1, DATA, SLOT, &this.data)?;
        for i in 0..vcpus {
            let vcpu = this.vm.create_vcpu(i).map_err(text("KVM_CREATE_VCPU"))?;
            this.vcpus.push(vcpu);
            this.init(usize::try_from(i).unwrap_or(0))?;
        }
        this.set(Reg::Pc, tiny::RAM)?;
        Ok(this)
    }

    /// `KVM_ARM_VCPU_INIT`: to the state after a reset.
    pub fn init(&self, vcpu: usize) -> Result<(), String> {
        let mut init = kvm_vcpu_init::default();
        self.vm.get_preferred_target(&mut init).map_err(text("preferred target"))?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        if vcpu > 0 {
            init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        self.vcpus[vcpu].vcpu_init(&init).map_err(text("KVM_ARM_VCPU_INIT"))
    }

    /// Sets a memory slot; size 0 deletes it.
    pub fn slot(&self, slot: u32, ipa: u64, size: u64, memory: &Memory) -> Result<(), String> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: ipa,
            memory_size: size,
            userspace_addr: memory.address(),
        };
        // SAFETY: a mapping that is never unmapped, and never reached through a reference.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(text("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Sets a slot's flags; the rest must be as it is.
    pub fn flags(
        &self,
        slot: u32,
        ipa: u64,
        memory: &Memory,
        flags: u32,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: ipa,
            memory_size: SLOT,
            userspace_addr: memory.address(),
        };
        // SAFETY: a mapping that is never unmapped, and never reached through a reference.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// Pages of a slot that are dirty.
    pub fn dirty(&self, slot: u32) -> Result<Vec<u64>, String> {
        let bytes = usize::try_from(SLOT).unwrap_or(0);
        let words = self.vm.get_dirty_log(slot, bytes).map_err(text("KVM_GET_DIRTY_LOG"))?;
        let bits = |(i, word): (u64, u64)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| i * 64 + bit)
        };
        Ok((0..).zip(words).flat_map(bits).collect())
    }

    /// Gives the VM a GICv3; before the first run, after its vCPUs.
    pub fn gic(&self) -> Result<DeviceFd, String> {
        gic::create(&self.vm, 3)
    }

    /// The descriptor of a vCPU.
    pub fn vcpu(&self, i: usize) -> &VcpuFd {
        &self.vcpus[i]
    }

    /// `KVM_GET_ONE_REG`.
    pub fn get(&self, reg: Reg) -> Result<u64, String> {
        let mut bytes = [0; 16];
        let part = &mut bytes[..reg.size()];
        self.vcpus[0].get_one_reg(reg.id(), part).map_err(|e| format!("{reg:?}: {e}"))?;
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[..8]);
        Ok(u64::from_le_bytes(word))
    }

    /// `KVM_SET_ONE_REG` of the first vCPU.
    pub fn set(&self, reg: Reg, value: u64) -> Result<(), String> {
        self.set_of(0, reg, value)
    }

    /// `KVM_SET_ONE_REG`.
    pub fn set_of(&self, vcpu: usize, reg: Reg, value: u64) -> Result<(), String> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&value.to_le_bytes());
        let part = &bytes[..reg.size()];
        let vcpu = &self.vcpus[vcpu];
        vcpu.set_one_reg(reg.id(), part).map(drop).map_err(|e| format!("{reg:?}: {e}"))
    }

    /// Lets a signal end a run after that many milliseconds.
    pub fn timer(&self, ms: i32) -> Result<(), String> {
        interrupt_in(ms)
    }

    /// Runs the first vCPU to its next stop; `interrupt`: a signal comes soon.
    pub fn run(&mut self, interrupt: bool) -> Result<Stop, String> {
        if interrupt {
            interrupt_in(20)?;
        }
        Ok(self.run_of(0))
    }

    /// Runs a vCPU to its next stop.
    pub fn run_of(&mut self, vcpu: usize) -> Stop {
        let order = self.order;
        match self.vcpus[vcpu].run() {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let mut word = [0; 8];
                word[..data.len()].copy_from_slice(data);
                Stop::Store(address, u64::from_le_bytes(word))
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                let place = obey::ORDER.iter().position(|a| *a == address);
                let value = place.map_or(tiny::ANSWER_VALUE.into(), |i| order[i]);
                let size = data.len();
                data.copy_from_slice(&value.to_le_bytes()[..size]);
                Stop::Load(address)
            }
            Ok(VcpuExit::SystemEvent(..)) => Stop::Off,
            Ok(VcpuExit::Debug(_)) => Stop::Debug,
            Ok(other) => Stop::Failed(format!("KVM_RUN ends with {other:?}")),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Stop::Interrupt,
            Err(e) => Stop::Failed(format!("KVM_RUN: {e}")),
        }
    }

    /// Has the guest of `obey.rs` carry out an order.
    pub fn order(&mut self, number: u64, a: u64, b: u64) -> Reply {
        self.order = [number, a, b];
        if let Err(e) = interrupt_in(5000) {
            return Reply::Stopped(e);
        }
        loop {
            match self.run_of(0) {
                Stop::Load(address) if obey::ORDER.contains(&address) => {}
                Stop::Store(obey::RESULT, value) => return Reply::Value(value),
                Stop::Store(obey::FAULT, esr) => return Reply::Fault(esr),
                Stop::Interrupt => return Reply::Stopped("no answer for 5 s".to_owned()),
                Stop::Failed(why) => return Reply::Stopped(why),
                other => return Reply::Stopped(format!("{other:x?}")),
            }
        }
    }

    /// An order that the guest must be able to carry out.
    pub fn must(&mut self, number: u64, a: u64, b: u64) -> Result<u64, String> {
        match self.order(number, a, b) {
            Reply::Value(value) => Ok(value),
            other => Err(format!("the guest doesn't carry out order {number}: {other}")),
        }
    }

    /// Has the guest count in its registers until a signal interrupts it.
    pub fn interrupted(&mut self) -> Result<(), String> {
        self.order = [order::SPIN, 1 << 40, 0];
        loop {
            match self.run(true)? {
                Stop::Load(address) if obey::ORDER.contains(&address) => {}
                Stop::Interrupt => return Ok(()),
                other => return Err(format!("no interrupt but {other:x?}")),
            }
        }
    }
}
