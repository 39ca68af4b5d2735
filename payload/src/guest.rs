// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs made of a page or two of position-independent assembly, and vCPUs as a
//! host drives them.
//!
//! A guest's program tells what it sees by stores to [`PORT`], which is no
//! RAM: each is an exit with the value. Its exceptions are told the same way by
//! [`VECTORS`], which skips the instruction.

use havmsi_abi::{EXIT_OFFSET, Entry, EntryFlags, ExitClass, Function, MAX_LRS};

use crate::gic;
use crate::harness::Failure;
use crate::memory::{self, read, write};
use crate::smc::{self, Refusal, host};

/// Where RAM and the program start.
pub const RAM: u64 = 0x4000_0000;
/// Bytes of RAM.
pub const RAM_SIZE: u64 = 16 << 20;
/// Where the exception vectors are.
pub const VECTORS_AT: u64 = RAM + 0x1000;
/// First page of RAM that no program occupies.
pub const FREE: u64 = RAM + 0x10_0000;
/// Where programs report to; no RAM.
pub const PORT: u64 = 0x0900_0000;
/// Bits of the address space.
pub const IPA_BITS: u64 = 36;

/// Makes a function that gives the bytes of a program. `x20` is [`PORT`] and
/// the vectors are set; `x28` is the vectors' own.
#[macro_export]
macro_rules! guest_program {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::guest_program!(raw $name,
            "movz x20, #0x0900, lsl #16",
            "movz x28, #0x4000, lsl #16",
            "orr x28, x28, #0x1000",
            "msr vbar_el1, x28",
            "isb",
            $($line,)+
            "movz x0, #0x0008",
            "movk x0, #0x8400, lsl #16",
            "hvc #0",
            "b ."
        );
    };
    (raw $name:ident, $($line:literal),+ $(,)?) => {
        core::arch::global_asm!(
            ".pushsection .rodata.guest, \"a\"",
            ".balign 4096",
            concat!("guest_", stringify!($name), ":"),
            $($line,)+
            ".ltorg",
            ".balign 8",
            concat!("guest_", stringify!($name), "_end:"),
            ".popsection"
        );
        pub fn $name() -> &'static [u8] {
            let (start, end): (*const u8, *const u8);
            // SAFETY: only forms the addresses.
            unsafe {
                core::arch::asm!(
                    concat!("ldr {0}, =guest_", stringify!($name)),
                    concat!("ldr {1}, =guest_", stringify!($name), "_end"),
                    out(reg) start, out(reg) end, options(nomem, nostack, preserves_flags)
                );
            }
            // SAFETY: the bytes between the two labels, which nobody writes.
            unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

// A program that only ends.
guest_program!(nothing, "nop");
// One that never exits.
guest_program!(raw spin, "1: add x1, x1, #1", "b 1b");

guest_program!(raw vectors,
    ".macro guest_vector target",
    ".balign 128",
    "b \\target",
    ".endm",
    ".irp origin, 0, 1, 2, 3",
    "guest_vector 91f",
    "guest_vector 92f",
    "guest_vector 92f",
    "guest_vector 93f",
    ".endr",
    ".balign 128",
    "91: mrs x28, esr_el1",
    "str x28, [x20, #0x100]",
    "mrs x28, elr_el1",
    "str x28, [x20, #0x108]",
    "mrs x28, far_el1",
    "str x28, [x20, #0x110]",
    "mrs x28, spsr_el1",
    "str x28, [x20, #0x118]",
    "mrs x28, elr_el1",
    "add x28, x28, #4",
    "msr elr_el1, x28",
    "eret",
    "92: mrs x28, S3_0_C12_C12_0",
    "str x28, [x20, #0x140]",
    "msr S3_0_C12_C12_1, x28",
    "isb",
    "eret",
    "93: str xzr, [x20, #0x180]",
    "b ."
);

/// An exception that a guest took.
#[derive(Clone, Copy, Debug)]
pub struct GuestFault {
    /// `ESR_EL1`.
    pub esr: u64,
    /// `ELR_EL1`.
    pub elr: u64,
    /// `FAR_EL1`.
    pub far: u64,
}

impl GuestFault {
    /// An Undefined Instruction exception.
    pub const fn is_undefined(&self) -> bool {
        self.esr >> 26 == 0
    }

    /// A synchronous external abort of a data access.
    pub const fn is_external_abort(&self) -> bool {
        self.esr >> 26 == 0x25 && self.esr & 0x3f == 0x10
    }
}

/// A VM.
#[derive(Clone, Copy)]
pub struct Vm {
    /// Its handle.
    pub handle: u64,
    /// Its counter offset.
    pub cntvoff: u64,
}

impl Vm {
    /// A VM without anything.
    pub fn new(max_vcpus: u64) -> Result<Self, Failure> {
        Self::with_gic(max_vcpus, gic::version())
    }

    /// A VM without anything, with this interrupt controller.
    pub fn with_gic(max_vcpus: u64, gic: u64) -> Result<Self, Failure> {
        let [handle, cntvoff, ..] = host(Function::VmCreate, &[max_vcpus, gic, IPA_BITS])?;
        Ok(Self { handle, cntvoff })
    }

    /// A call with the handle as first argument.
    pub fn call(&self, function: Function, args: &[u64]) -> Result<[u64; 4], Refusal> {
        let mut all = [0; 7];
        all[0] = self.handle;
        for (place, value) in all.iter_mut().skip(1).zip(args) {
            *place = *value;
        }
        host(function, &all)
    }

    /// Declares RAM and gives `pool` table pages.
    #[track_caller]
    pub fn furnish(&self, pool: u64) -> Result<(), Failure> {
        self.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
        let pages = memory::take(pool);
        self.call(Function::PoolDonate, &[pages, pool])?;
        Ok(())
    }

    /// Makes a vCPU.
    #[track_caller]
    pub fn vcpu(&self, idx: u64) -> Result<Vcpu, Failure> {
        let page = memory::take(1);
        memory::clear(page);
        self.call(Function::VcpuCreate, &[idx, page])?;
        Ok(Vcpu::new(self.handle, idx, page))
    }

    /// Puts bytes into RAM before the launch.
    #[track_caller]
    pub fn populate(&self, ipa: u64, bytes: &[u8]) -> Result<u64, Failure> {
        let page = memory::take(1);
        memory::put(page, bytes);
        self.call(Function::VmPopulate, &[ipa, page])?;
        Ok(page)
    }

    /// A VM ready to run `program` on its first vCPU, with these `x0` to `x3`;
    /// the second one is off.
    #[track_caller]
    pub fn launch(program: &[u8], x: [u64; 4]) -> Result<(Self, Vcpu), Failure> {
        let (vm, vcpu, _) = Self::launch_two(gic::version(), program, x)?;
        Ok((vm, vcpu))
    }

    /// As [`Self::launch`], with both vCPUs.
    #[track_caller]
    pub fn launch_two(
        gic: u64,
        program: &[u8],
        x: [u64; 4],
    ) -> Result<(Self, Vcpu, Vcpu), Failure> {
        let vm = Self::with_gic(2, gic)?;
        vm.furnish(8)?;
        let vcpus = (vm.vcpu(0)?, vm.vcpu(1)?);
        vm.boot(program, x)?;
        Ok((vm, vcpus.0, vcpus.1))
    }

    /// Fills and activates a furnished VM.
    #[track_caller]
    pub fn boot(&self, program: &[u8], x: [u64; 4]) -> Result<(), Failure> {
        self.call(Function::VcpuSetBoot, &[0, RAM, x[0], x[1], x[2], x[3]])?;
        self.populate(RAM, program)?;
        self.populate(VECTORS_AT, vectors())?;
        self.call(Function::VmActivate, &[])?;
        Ok(())
    }

    /// Maps a fresh page at `ipa`.
    #[track_caller]
    pub fn map(&self, ipa: u64) -> Result<u64, Failure> {
        let page = memory::take(1);
        self.call(Function::PageMap, &[ipa, page, 4096])?;
        Ok(page)
    }

    /// Takes the page at `ipa` back, sealed; gives the tag.
    #[track_caller]
    pub fn take_back(&self, ipa: u64) -> Result<[u64; 2], Failure> {
        let [done, low, high, _] = self.call(Function::PageUnmap, &[ipa, 1])?;
        crate::expect!(done, 1);
        Ok([low, high])
    }

    /// Gives `page` for `ipa`, with the tag of what it holds.
    pub fn give(&self, ipa: u64, page: u64, tag: [u64; 2]) -> Result<(), Refusal> {
        self.call(Function::PageMap, &[ipa, page, 4096, tag[0], tag[1]]).map(|_| ())
    }

    /// Destroys it.
    #[track_caller]
    pub fn destroy(&self) -> Result<(), Failure> {
        smc::until_done(Function::VmDestroy, &[self.handle], 100_000)?;
        Ok(())
    }
}

/// Why a vCPU stopped running, and what that shows, as its run page has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exit {
    /// Why.
    pub class: ExitClass,
    /// `ESR_EL2` with the register number masked to 0.
    pub esr: u64,
    /// The faulting IPA in bytes.
    pub ipa: u64,
    /// The guest's `x0` to `x3` of a hypercall.
    pub gpr: [u64; 4],
    /// The value of a store or of a system register write.
    pub data: u64,
    /// 1 if the guest was at EL1, 0 at EL0.
    pub mode: u64,
}

/// The virtual CPU interface after a run.
#[derive(Clone, Copy, Default)]
pub struct VgicExit {
    /// Priority mask and group enables.
    pub vmcr: u64,
    /// The list registers.
    pub lr: [u64; MAX_LRS],
}

/// A vCPU, its run page, and what the next run takes in.
pub struct Vcpu {
    /// Its VM's handle.
    pub vm: u64,
    /// Its index.
    pub idx: u64,
    /// Its run page.
    pub page: u64,
    /// The entry half for the next run. Answers are cleared by a run.
    pub entry: Entry,
    /// Why the last run ended.
    pub exit: Exit,
    /// The virtual CPU interface after it.
    pub vgic: VgicExit,
}

impl Vcpu {
    /// For a vCPU that was created.
    pub fn new(vm: u64, idx: u64, page: u64) -> Self {
        Self {
            vm,
            idx,
            page,
            entry: Entry::default(),
            exit: Exit::default(),
            vgic: VgicExit::default(),
        }
    }

    /// Writes the entry half.
    pub fn write_entry(&self) {
        let e = &self.entry;
        let head = [e.flags.0, e.gpr[0], e.gpr[1], e.gpr[2], e.gpr[3], e.data, e.ich_hcr, e.nr_lr];
        for (at, word) in (self.page..).step_by(8).zip(head.iter().chain(&e.lr)) {
            write(at, *word);
        }
    }

    fn word(&self, n: usize) -> u64 {
        read(self.page + (EXIT_OFFSET + 8 * n) as u64)
    }

    /// Reads the exit half.
    pub fn read_exit(&mut self) -> Exit {
        let class = self.word(0);
        for (known, _) in ExitClass::ALL {
            if known as u64 == class {
                self.exit.class = known;
            }
        }
        self.exit.esr = self.word(1);
        self.exit.ipa = self.word(2);
        self.exit.gpr = core::array::from_fn(|i| self.word(3 + i));
        self.exit.data = self.word(7);
        self.exit.mode = self.word(8);
        self.vgic =
            VgicExit { vmcr: self.word(9), lr: core::array::from_fn(|i| self.word(10 + i)) };
        self.exit
    }

    /// One VCPU_RUN with the entry as it is.
    pub fn run_once(&mut self) -> Result<Exit, Refusal> {
        self.write_entry();
        let [class, ..] = host(Function::VcpuRun, &[self.vm, self.idx])?;
        self.entry.flags.0 &= !EntryFlags::ANSWERS;
        self.read_exit();
        if class != self.exit.class as u64 {
            return Err(Refusal::Unknown(class));
        }
        Ok(self.exit)
    }

    /// Runs until something else than an interrupt ends it. A store that was
    /// reported is completed.
    #[track_caller]
    pub fn run(&mut self) -> Result<Exit, Failure> {
        if self.exit.class == ExitClass::MmioWrite && self.entry.flags.0 & EntryFlags::ANSWERS == 0
        {
            self.entry.flags.0 |= EntryFlags::COMPLETE;
        }
        gic::alarm(20_000);
        let exit = loop {
            let exit = match self.run_once() {
                Ok(exit) => exit,
                Err(refusal) => {
                    gic::quiet();
                    return Err(refusal.into());
                }
            };
            if exit.class != ExitClass::Irq {
                break exit;
            }
            if gic::alarm_fired() {
                gic::quiet();
                return Err(Failure::new(format_args!("the guest does not come to an end")));
            }
        };
        gic::quiet();
        Ok(exit)
    }

    /// Runs to an exit of this class.
    #[track_caller]
    pub fn expect(&mut self, class: ExitClass) -> Result<Exit, Failure> {
        let exit = self.run()?;
        if exit.class == class {
            Ok(exit)
        } else {
            Err(Failure::new(format_args!("exit {exit:x?} where {class:?} was expected")))
        }
    }

    /// Runs to the program's report at [`PORT`] + `offset`; its value.
    #[track_caller]
    pub fn report(&mut self, offset: u64) -> Result<u64, Failure> {
        let exit = self.run()?;
        if exit.class == ExitClass::MmioWrite && exit.ipa == PORT + offset {
            Ok(exit.data)
        } else {
            Err(Failure::new(format_args!("exit {exit:x?} where report {offset:#x} was expected")))
        }
    }

    /// Runs to an exception that the guest takes.
    #[track_caller]
    pub fn fault(&mut self) -> Result<GuestFault, Failure> {
        let fault = GuestFault {
            esr: self.report(0x100)?,
            elr: self.report(0x108)?,
            far: self.report(0x110)?,
        };
        self.report(0x118)?;
        Ok(fault)
    }

    /// Runs to the end of the program.
    #[track_caller]
    pub fn end(&mut self) -> Result<(), Failure> {
        let exit = self.expect(ExitClass::Hvc)?;
        if exit.gpr[0] == smc::psci::SYSTEM_OFF {
            Ok(())
        } else {
            Err(Failure::new(format_args!("call {:x?} where the end was expected", exit.gpr)))
        }
    }

    /// The next run completes the access with this result.
    pub fn complete(&mut self, data: u64) {
        self.entry.flags.0 |= EntryFlags::COMPLETE;
        self.entry.data = data;
    }

    /// The next run completes the call with these results.
    pub fn answer(&mut self, gpr: [u64; 4]) {
        self.entry.flags.0 |= EntryFlags::COMPLETE;
        self.entry.gpr = gpr;
    }

    /// The list registers of the next runs.
    pub fn list(&mut self, lrs: &[u64]) {
        self.entry.lr = [0; MAX_LRS];
        self.entry.nr_lr = lrs.len() as u64;
        for (place, lr) in self.entry.lr.iter_mut().zip(lrs) {
            *place = *lr;
        }
        self.entry.ich_hcr = 1;
    }
}
