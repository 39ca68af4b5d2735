// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hostile kernel module's device. The structures repeat `linux/attacker/havmsi_attacker.h`.

use havmsi_proto::Seed;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

const SEEDS: usize = 8;
const FRAMES: usize = 8;
const SLOTS: usize = 8;

/// What a scan found of one stream.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Hits {
    /// Pages of which every word is the stream's.
    pub whole: u64,
    /// Pages that begin like the stream's.
    pub partial: u64,
    /// Where the first ones lie.
    pub pfn: [u64; FRAMES],
}

/// A scan of all System RAM.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Scan {
    seeds: u64,
    fresh: u64,
    seed: [[u64; 4]; SEEDS],
    /// Pages looked at.
    pub pages: u64,
    /// Pages that couldn't be read.
    pub faults: u64,
    /// The first of those.
    pub fault_pfn: [u64; FRAMES],
    /// Of each stream.
    pub hits: [Hits; SEEDS],
}

#[repr(C)]
struct Mem {
    pa: u64,
    len: u64,
    flags: u64,
    buffer: u64,
}

#[repr(C)]
struct Page {
    pid: u64,
    va: u64,
    pa: u64,
}

/// A memory slot.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Slot {
    /// Guest-physical address.
    pub ipa: u64,
    /// Bytes.
    pub size: u64,
    /// Where the VMM maps it.
    pub va: u64,
}

/// What the kernel knows about a VM.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Vm {
    fd: u64,
    /// The first stage-2 table of KVM's.
    pub pgd_pa: u64,
    /// Its input address size.
    pub ia_bits: u64,
    /// Its level.
    pub start_level: u64,
    /// vCPUs.
    pub vcpus: u64,
    /// Slots in use.
    pub slots: u64,
    /// The slots.
    pub slot: [Slot; SLOTS],
    /// The monitor's name of the VM, 0 if there is none.
    pub handle: u64,
    /// Page frames that KVM gave the monitor for tables, 0 for none.
    pub pool: [u64; FRAMES],
}

/// A stage-2 descriptor.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Stage2 {
    fd: u64,
    ipa: u64,
    write: u64,
    /// The descriptor found.
    pub desc: u64,
    /// Where it lies.
    pub desc_pa: u64,
    /// Its level.
    pub level: u64,
}

/// A vCPU's registers as KVM keeps them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Regs {
    fd: u64,
    write: u64,
    /// x0..x30.
    pub x: [u64; 31],
    /// `SP_EL0`.
    pub sp: u64,
    /// Program counter.
    pub pc: u64,
    /// PSTATE.
    pub pstate: u64,
    /// v0..v31, low half first.
    pub v: [u64; 64],
    /// Some EL1 system registers.
    pub sys: [u64; 8],
}

#[repr(C)]
struct OneReg {
    fd: u64,
    id: u64,
    write: u64,
    value: [u64; 2],
    result: i64,
}

#[repr(C)]
struct Smc {
    x: [u64; 18],
}

#[repr(C)]
struct Io {
    pa: u64,
    width: u64,
    write: u64,
    value: u64,
}

#[repr(C)]
struct Dma {
    pa: u64,
    write: u64,
    data: [u64; 8],
}

/// What code of ours found on a CPU that it was given.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Cpu {
    cpu: u64,
    pa: u64,
    marker: u64,
    /// What PSCI `CPU_ON` answered.
    pub status: u64,
    /// The exception level that it came up at.
    pub el: u64,
    /// 1: it has read, 2: written too, 3: an exception.
    pub state: u64,
    /// The syndrome of that.
    pub esr: u64,
    /// The words that it read.
    pub read: [u64; 8],
}

/// General registers looked for in [`Watch`].
pub const GENERAL: usize = 25;

/// What was seen at all exits of all guests.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    start: u64,
    reg: [u64; GENERAL],
    general: [u64; GENERAL],
    fp: [u64; 64],
    /// How many.
    pub exits: u64,
    /// Bits by exception class; bit 0: interrupts.
    pub classes: u64,
    /// General registers that are right in KVM's structure, at best.
    pub best_general: u64,
    /// FP words that are right there.
    pub best_fp: u64,
    /// FP words that are right in the CPU's own registers.
    pub best_live: u64,
}

const WRITE: u64 = 1;
const FRESH: u64 = 2;

/// How to get at physical memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The kernel's linear map.
    Linear,
    /// A mapping made for the purpose.
    Fresh,
}

/// The module's device.
pub struct Attacker(File);

fn fd(fd: BorrowedFd<'_>) -> u64 {
    u64::try_from(fd.as_raw_fd()).unwrap_or(u64::MAX)
}

impl Attacker {
    /// Opens it.
    pub fn open() -> Result<Self> {
        File::options().read(true).write(true).open("/dev/havmsi_attacker").map(Self)
    }

    /// One call. `T` must be the structure of call `number`, all of whose fields are 64 bits wide.
    fn call<T>(&self, number: u64, data: &mut T) -> Result<()> {
        const READ_WRITE: u64 = 3 << 30;
        let request = READ_WRITE | (size_of::<T>() as u64) << 16 | u64::from(b'H') << 8 | number;
        // SAFETY: the module reads and writes exactly size_of::<T>() bytes at the pointer (the size
        // is part of the request); any bits are a valid T. Pointers inside are `mem`'s business.
        let r = unsafe {
            libc::syscall(libc::SYS_ioctl, self.0.as_raw_fd(), request, std::ptr::from_mut(data))
        };
        if r < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    }

    /// Looks for pages of the streams in all System RAM.
    pub fn scan(&self, seeds: &[Seed], via: Via) -> Result<Scan> {
        let mut scan = Scan {
            seeds: seeds.len().min(SEEDS) as u64,
            fresh: u64::from(via == Via::Fresh),
            ..Scan::default()
        };
        for (slot, seed) in scan.seed.iter_mut().zip(seeds) {
            *slot = seed.0;
        }
        self.call(1, &mut scan)?;
        Ok(scan)
    }

    fn mem(&self, pa: u64, buffer: *mut u8, len: usize, flags: u64) -> Result<()> {
        let buffer = buffer.expose_provenance() as u64;
        self.call(2, &mut Mem { pa, len: len as u64, flags, buffer })
    }

    /// Reads physical memory, within a page.
    pub fn read(&self, pa: u64, buffer: &mut [u8], via: Via) -> Result<()> {
        let flags = if via == Via::Fresh { FRESH } else { 0 };
        self.mem(pa, buffer.as_mut_ptr(), buffer.len(), flags)
    }

    /// Writes physical memory, within a page.
    pub fn write(&self, pa: u64, data: &[u8], via: Via) -> Result<()> {
        let flags = if via == Via::Fresh { FRESH | WRITE } else { WRITE };
        // The module only reads the buffer of a write.
        self.mem(pa, data.as_ptr().cast_mut(), data.len(), flags)
    }

    /// The physical address behind an address of a process.
    pub fn physical(&self, pid: u32, va: u64) -> Result<u64> {
        let mut page = Page { pid: pid.into(), va, pa: 0 };
        self.call(3, &mut page)?;
        Ok(page.pa)
    }

    /// What the kernel knows about a VM.
    pub fn vm(&self, vm: BorrowedFd<'_>) -> Result<Vm> {
        let mut data = Vm { fd: fd(vm), ..Vm::default() };
        self.call(4, &mut data)?;
        Ok(data)
    }

    /// The stage-2 descriptor of an address.
    pub fn descriptor(&self, vm: BorrowedFd<'_>, ipa: u64) -> Result<Stage2> {
        let mut data = Stage2 { fd: fd(vm), ipa, ..Stage2::default() };
        self.call(5, &mut data)?;
        Ok(data)
    }

    /// Overwrites it in the table page.
    pub fn set_descriptor(&self, vm: BorrowedFd<'_>, ipa: u64, desc: u64) -> Result<()> {
        let mut data = Stage2 { fd: fd(vm), ipa, write: 1, desc, ..Stage2::default() };
        self.call(5, &mut data)
    }

    /// A vCPU's registers; those in `write` (bit i: x[i]) are set first.
    pub fn regs(&self, vcpu: BorrowedFd<'_>, write: &[(usize, u64)]) -> Result<Regs> {
        let mut data = Regs {
            fd: fd(vcpu),
            write: 0,
            x: [0; 31],
            sp: 0,
            pc: 0,
            pstate: 0,
            v: [0; 64],
            sys: [0; 8],
        };
        for (i, value) in write {
            data.write |= 1 << i;
            data.x[*i] = *value;
        }
        self.call(6, &mut data)?;
        Ok(data)
    }

    /// `KVM_GET_ONE_REG` of a general register of a stopped vCPU of another process.
    pub fn get_reg(&self, vcpu: BorrowedFd<'_>, x: u64) -> Result<u64> {
        self.one_reg(vcpu, x, None)
    }

    /// `KVM_SET_ONE_REG`.
    pub fn set_reg(&self, vcpu: BorrowedFd<'_>, x: u64, value: u64) -> Result<u64> {
        self.one_reg(vcpu, x, Some(value))
    }

    fn one_reg(&self, vcpu: BorrowedFd<'_>, x: u64, value: Option<u64>) -> Result<u64> {
        const CORE: u64 = 0x6030_0000_0010_0000;
        let mut data = OneReg {
            fd: fd(vcpu),
            id: CORE | (2 * x),
            write: u64::from(value.is_some()),
            value: [value.unwrap_or(0), 0],
            result: 0,
        };
        self.call(7, &mut data)?;
        match data.result {
            0 => Ok(data.value[0]),
            e => Err(Error::from_raw_os_error(i32::try_from(-e).unwrap_or(0))),
        }
    }

    /// An SMC with its arguments; x0..x7 of the answer.
    pub fn smc(&self, arguments: &[u64]) -> Result<[u64; 8]> {
        let mut data = Smc { x: [0; 18] };
        for (x, argument) in data.x.iter_mut().zip(arguments) {
            *x = *argument;
        }
        self.call(8, &mut data)?;
        let mut answer = [0; 8];
        answer.copy_from_slice(&data.x[..8]);
        Ok(answer)
    }

    /// A register of a device; loads `width` bytes.
    pub fn io_read(&self, pa: u64, width: u64) -> Result<u64> {
        let mut data = Io { pa, width, write: 0, value: 0 };
        self.call(9, &mut data)?;
        Ok(data.value)
    }

    /// A register of a device; stores `width` bytes.
    pub fn io_write(&self, pa: u64, width: u64, value: u64) -> Result<()> {
        self.call(9, &mut Io { pa, width, write: 1, value })
    }

    /// A device reads 64 bytes. What it holds then; if it reaches nothing that may be `held`.
    pub fn dma_read(&self, pa: u64, held: [u64; 8]) -> Result<[u64; 8]> {
        let mut data = Dma { pa, write: 0, data: held };
        self.call(10, &mut data)?;
        Ok(data.data)
    }

    /// A device writes a word.
    pub fn dma_write(&self, pa: u64, value: u64) -> Result<()> {
        self.call(10, &mut Dma { pa, write: 1, data: [value; 8] })
    }

    /// Turns a CPU on that is off, with code that reads a page, and writes its last word.
    pub fn cpu_on(&self, cpu: u64, pa: u64, marker: u64) -> Result<Cpu> {
        let mut data = Cpu { cpu, pa, marker, ..Cpu::default() };
        self.call(11, &mut data)?;
        Ok(data)
    }

    /// Looks for these values in all exits of all guests while `f` runs.
    pub fn watch(
        &self,
        general: &[(usize, u64)],
        fp: &[u64; 64],
        f: impl FnOnce(),
    ) -> Result<Watch> {
        let mut data = Watch {
            start: 1,
            reg: [u64::MAX; GENERAL],
            general: [0; GENERAL],
            fp: *fp,
            exits: 0,
            classes: 0,
            best_general: 0,
            best_fp: 0,
            best_live: 0,
        };
        for (i, (register, value)) in general.iter().enumerate().take(GENERAL) {
            (data.reg[i], data.general[i]) = (*register as u64, *value);
        }
        self.call(12, &mut data)?;
        f();
        data.start = 0;
        self.call(12, &mut data)?;
        Ok(data)
    }

    /// Whether the monitor answers.
    pub fn monitor(&self) -> bool {
        let Ok(answer) = self.smc(&[havmsi_abi::UID_CALL.into()]) else { return false };
        answer.iter().zip(havmsi_abi::UID).all(|(x, word)| x & 0xffff_ffff == u64::from(word))
    }
}
