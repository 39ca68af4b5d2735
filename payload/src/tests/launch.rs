// SPDX-License-Identifier: MIT OR Apache-2.0
//! Populate, measure, activate.

use havmsi_abi::Function;
use sha2::{Digest, Sha256};

use super::vgic::{GICC, GICV};
use crate::guest::{FREE, IPA_BITS, RAM, RAM_SIZE, Vm, nothing};
use crate::harness::{Failure, Outcome};
use crate::memory::{self, PATTERN, fill, first_change, peek, poke, read, take};
use crate::smc::{DENIED, INTEGRITY, INVALID, STATE, until_done};
use crate::{ensure, expect, gic, guest_program, test};

fn populate_bad() -> Outcome {
    let vm = Vm::new(2)?;
    vm.furnish(8)?;
    let vcpu = vm.vcpu(0)?;
    let page = take(2);
    for (args, why) in [
        ([RAM + 1, page], INVALID),
        ([RAM + 0x800, page], INVALID),
        ([RAM, page + 1], INVALID),
        ([RAM, page + 0x800], INVALID),
        ([RAM - 4096, page], DENIED),
        ([RAM + RAM_SIZE, page], DENIED),
        ([RAM | 1 << 40, page], DENIED),
        ([!0xfff, page], DENIED),
        ([RAM, vcpu.page], DENIED),
        ([RAM, 0], DENIED),
        ([RAM, memory::RAM_BASE], DENIED),
        ([RAM, 0x0e00_0000], DENIED),
        ([RAM, 0x0900_0000], DENIED),
        ([RAM, memory::RAM_BASE + memory::RAM_SIZE], DENIED),
        ([RAM, !0xfff], DENIED),
    ] {
        let result = vm.call(Function::VmPopulate, &args);
        ensure!(result == Err(why), "{args:x?}: {result:x?}");
    }
    expect!(vm.call(Function::PageMap, &[RAM, page, 4096]), Err(STATE));
    expect!(vm.call(Function::VcpuRun, &[0]), Err(STATE));
    expect!(first_change(page, PATTERN), None);
    // In rising order, each once.
    vm.call(Function::VmPopulate, &[FREE, page])?;
    expect!(vm.call(Function::VmPopulate, &[FREE - 4096, page + 4096]), Err(INVALID));
    expect!(vm.call(Function::VmPopulate, &[FREE, page + 4096]), Err(INVALID));
    expect!(vm.call(Function::VmPopulate, &[FREE + 4096, page]), Err(DENIED));
    expect!(first_change(page + 4096, PATTERN), None);
    vm.call(Function::VmPopulate, &[FREE + 4096, page + 4096])?;
    // Out of the host's hands at once.
    expect!(peek(page)?, 0);
    ensure!(poke(page, 1).is_err(), "written after it was measured");
    // No vCPU is on.
    expect!(vm.call(Function::VmActivate, &[]), Err(STATE));
    vm.call(Function::VcpuSetBoot, &[0, RAM])?;
    vm.call(Function::VmActivate, &[])?;
    expect!(vm.call(Function::VmActivate, &[]), Err(STATE));
    expect!(vm.call(Function::VmPopulate, &[FREE + 8192, take(1)]), Err(STATE));
    expect!(vm.call(Function::VmAddRam, &[0, 4096]), Err(STATE));
    expect!(vm.call(Function::VmAddRam, &[RAM, RAM_SIZE]), Err(STATE));
    expect!(vm.call(Function::VcpuCreate, &[1, take(1)]), Err(STATE));
    expect!(vm.call(Function::VcpuSetBoot, &[0, RAM + 4]), Err(STATE));
    vm.destroy()
}
test!(populate_bad, "T05 T11 T20");

/// A page that was taken back while the launch is open can't come back below the
/// cursor but as what was sealed, so what was measured is what runs, or is missing.
fn no_swap_behind_the_measurement() -> Outcome {
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM, 0, 0, 0, 0])?;
    let page = vm.populate(RAM, nothing())?;
    let tag = vm.take_back(RAM)?;
    ensure!(memory::is_sealed(page), "the image page came back with its content");
    let sealed = take(1);
    memory::copy(page, sealed);
    fill(page, 1);
    expect!(vm.call(Function::VmPopulate, &[RAM, page]), Err(INVALID));
    expect!(vm.give(RAM, sealed, tag), Err(STATE));
    vm.call(Function::VmActivate, &[])?;
    vm.give(RAM, sealed, tag)?;
    vm.take_back(RAM)?;
    expect!(vm.give(RAM, page, tag), Err(INTEGRITY));
    expect!(first_change(page, 1), None);
    vm.destroy()
}
test!(no_swap_behind_the_measurement, "T11");

struct Image {
    hash: Sha256,
    pages: Sha256,
}

impl Image {
    fn number(&mut self, n: u64) {
        self.hash.update(n.to_le_bytes());
    }

    /// The page at `pa`, to be populated at `ipa`.
    fn page(&mut self, ipa: u64, pa: u64) {
        if memory::is_zero(pa) {
            return;
        }
        self.pages.update(ipa.to_le_bytes());
        for at in (pa..pa + 4096).step_by(8) {
            self.pages.update(read(at).to_le_bytes());
        }
    }

    fn digest(mut self) -> [u64; 4] {
        let pages = self.pages.finalize();
        self.hash.update(pages);
        let digest = self.hash.finalize();
        core::array::from_fn(|i| {
            let mut word = [0; 8];
            word.copy_from_slice(&digest[8 * i..8 * i + 8]);
            u64::from_le_bytes(word)
        })
    }
}

/// The digest is that of the configuration, the GICv2's CPU interface and the
/// non-zero pages, whatever the order of the declarations; the same at a second launch.
fn digest() -> Outcome {
    let vm = Vm::new(5)?;
    let low = 0x1000_0000;
    vm.call(Function::VmAddRam, &[RAM, RAM_SIZE])?;
    vm.call(Function::VmAddRam, &[low, 0x4000])?;
    vm.call(Function::PoolDonate, &[take(8), 8])?;
    for idx in [4, 1, 0] {
        vm.call(Function::VcpuCreate, &[idx, take(1)])?;
    }
    let mut digests = [[0; 4]; 3];
    for (round, digest) in (0..).zip(&mut digests) {
        let mut image = Image { hash: Sha256::new(), pages: Sha256::new() };
        image.hash.update(b"HA-VMSI launch 1");
        for n in [IPA_BITS, gic::version(), 5, 2, low, 0x4000, RAM, RAM_SIZE] {
            image.number(n);
        }
        // The last round has no CPU interface.
        let devices = if gic::version() == 2 && round < 2 { [GICC, 0x2000] } else { [0; 2] };
        if devices[1] != 0 {
            vm.call(Function::MapDev, &[GICC, GICV])?;
            vm.call(Function::MapDev, &[GICC + 0x1000, GICV + 0x1000])?;
        }
        devices.into_iter().for_each(|n| image.number(n));
        let boots = [(0, RAM, [1, 2, 3, 4]), (4, RAM + 0x100, [u64::MAX, 6, 7, round & 2])];
        for (idx, pc, x) in boots.iter().rev() {
            vm.call(Function::VcpuSetBoot, &[*idx, *pc, x[0], x[1], x[2], x[3]])?;
        }
        for (idx, pc, x) in boots {
            image.number(idx);
            image.number(pc);
            x.into_iter().for_each(|n| image.number(n));
        }
        for (ipa, zero) in [(low + 0x1000, false), (RAM, true), (RAM + 0x5000, false)] {
            let page = take(1);
            fill(page, ipa);
            // So that it does not depend on where the page lies.
            for at in (page..page + 4096).step_by(8) {
                memory::write(at, if zero { 0 } else { ipa ^ (at & 0xfff) });
            }
            image.page(ipa, page);
            vm.call(Function::VmPopulate, &[ipa, page])?;
        }
        let got = vm.call(Function::VmActivate, &[])?;
        let want = image.digest();
        if got != want {
            return Err(Failure::new(format_args!("round {round}: {got:016x?}, not {want:016x?}")));
        }
        *digest = got;
        until_done(Function::VmReset, &[vm.handle], 1000)?;
    }
    expect!(digests[0], digests[1]);
    ensure!(digests[1] != digests[2], "another x3 gives the same digest");
    vm.destroy()
}
test!(digest, "T11");

/// The host tries to change an image page between the measurement and the run.
fn image_is_what_runs() -> Outcome {
    let vm = Vm::new(1)?;
    vm.furnish(8)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.call(Function::VcpuSetBoot, &[0, RAM, 0, 0, 0, 0])?;
    let page = vm.populate(RAM, report_page())?;
    vm.populate(RAM + 0x2000, &0x1234_5678_9abc_def0_u64.to_le_bytes())?;
    for at in [page, page + 0x100] {
        let f = poke(at, u64::MAX).err();
        ensure!(f.is_some_and(|f| f.is_external_abort(at, true)), "{f:x?}");
    }
    vm.call(Function::VmActivate, &[])?;
    let f = poke(page, u64::MAX).err();
    ensure!(f.is_some_and(|f| f.is_external_abort(page, true)), "{f:x?}");
    expect!(vcpu.report(0)?, 0x1234_5678_9abc_def0);
    vcpu.end()?;
    vm.destroy()
}
test!(image_is_what_runs, "T02 T11");

guest_program!(
    report_page,
    "movz x1, #0x4000, lsl #16",
    "orr x1, x1, #0x2000",
    "ldr x2, [x1]",
    "str x2, [x20]"
);
