// SPDX-License-Identifier: MIT OR Apache-2.0
//! One VM with one vCPU and the guest of `tiny.rs` in it.

use crate::tiny;
use kvm_bindings::{KVM_ARM_VCPU_PSCI_0_2, kvm_regs, kvm_userspace_memory_region, kvm_vcpu_init};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::mem::offset_of;

const RAM_SIZE: usize = 2 << 20;
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
}

impl Reg {
    fn id(self) -> u64 {
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
        }
    }

    fn size(self) -> usize {
        if matches!(self, Self::D(_)) { 16 } else { 8 }
    }
}

/// Why the vCPU stopped.
#[derive(Debug)]
pub enum Stop {
    /// A store to the device.
    Store(u64, u64),
    /// A load from it; it was answered.
    Load(u64),
    /// A signal of ours.
    Interrupt,
    /// The guest powered off.
    Off,
    /// Anything else; standard error says what.
    Other,
}

/// The VM.
pub struct Vm {
    vcpu: VcpuFd,
    // Keep what the vCPU lives in.
    _vm: VmFd,
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
        it_value: libc::timeval { tv_sec: 0, tv_usec: (ms * 1000).into() },
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

/// Memory for the guest, with its image at the start.
fn ram() -> Result<u64, String> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), RAM_SIZE, prot, flags, -1, 0) };
    if p == libc::MAP_FAILED {
        return Err(format!("mmap: {}", std::io::Error::last_os_error()));
    }
    let image = tiny::image();
    // SAFETY: the mapping is larger than the image, and nobody else knows it yet.
    unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), p.cast(), image.len()) };
    Ok(p.expose_provenance() as u64)
}

impl Vm {
    /// Makes the VM; the vCPU stands at the guest's first instruction.
    pub fn new() -> Result<Self, String> {
        let text = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
        let kvm = Kvm::new().map_err(text("/dev/kvm"))?;
        let vm = kvm.create_vm().map_err(text("KVM_CREATE_VM"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: tiny::RAM,
            memory_size: RAM_SIZE as u64,
            userspace_addr: ram()?,
        };
        // SAFETY: the mapping is never unmapped and never reached through a reference again.
        unsafe { vm.set_user_memory_region(region) }.map_err(text("memory region"))?;
        let vcpu = vm.create_vcpu(0).map_err(text("KVM_CREATE_VCPU"))?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).map_err(text("preferred target"))?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        vcpu.vcpu_init(&init).map_err(text("KVM_ARM_VCPU_INIT"))?;
        let this = Self { vcpu, _vm: vm, _kvm: kvm };
        this.set(Reg::Pc, tiny::RAM)?;
        Ok(this)
    }

    /// `KVM_GET_ONE_REG`.
    pub fn get(&self, reg: Reg) -> Result<u64, String> {
        let mut bytes = [0; 16];
        let part = &mut bytes[..reg.size()];
        self.vcpu.get_one_reg(reg.id(), part).map_err(|e| format!("{reg:?}: {e}"))?;
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[..8]);
        Ok(u64::from_le_bytes(word))
    }

    /// `KVM_SET_ONE_REG`.
    pub fn set(&self, reg: Reg, value: u64) -> Result<(), String> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&value.to_le_bytes());
        let part = &bytes[..reg.size()];
        self.vcpu.set_one_reg(reg.id(), part).map(drop).map_err(|e| format!("{reg:?}: {e}"))
    }

    /// Runs to the next stop; `interrupt`: a signal comes soon.
    pub fn run(&mut self, interrupt: bool) -> Result<Stop, String> {
        if interrupt {
            interrupt_in(20)?;
        }
        match self.vcpu.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let mut word = [0; 8];
                word[..data.len()].copy_from_slice(data);
                Ok(Stop::Store(address, u64::from_le_bytes(word)))
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                let value = tiny::ANSWER_VALUE.to_le_bytes();
                if let Some(place) = data.first_chunk_mut() {
                    *place = value;
                }
                Ok(Stop::Load(address))
            }
            Ok(VcpuExit::SystemEvent(..)) => Ok(Stop::Off),
            Ok(other) => {
                eprintln!("havmsi-vmm: exit {other:?}");
                Ok(Stop::Other)
            }
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(Stop::Interrupt),
            Err(e) => Err(format!("KVM_RUN: {e}")),
        }
    }
}
