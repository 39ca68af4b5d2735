// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest shares pages with this VMM and takes them back, also while a disk writes there past the
//! page cache. `exposed` if the VMM sees what is not shared; an error if the disk fails.

use crate::Finding;
use crate::memory::Memory;
use crate::obey::{self, order};
use crate::vm::{DATA, Reply, Vm};
use kvm_bindings::{
    KVM_CAP_ARM_MTE, KVM_CAP_ARM_PMU_V3, KVM_CAP_COUNTER_OFFSET, KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_ONE_REG,
    KVM_CAP_READONLY_MEM, KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_STEAL_TIME, KVM_CAP_USER_MEMORY,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

const SHARE: u64 = 0xc600_0003;
const UNSHARE: u64 = 0xc600_0004;
const DISK: &str = "/dev/vdb";
const SECRET: u64 = 0x5ec2_e7ed_5a4e_0001;
const ROUNDS: u64 = 40;
/// How often one transfer writes the page, in as many system calls as are one request of the block
/// layer each.
const TIMES: usize = 1024;
const CALLS: usize = 4;
/// Where the page is in the data slot.
const PLACE: u64 = 0x8000;

/// What became of a transfer.
#[derive(Clone, Copy, PartialEq)]
enum Transfer {
    Whole,
    /// The page was gone before all of it was under way.
    Refused,
}

/// Reads from the disk into the page at this address, [`TIMES`] times.
fn transfer(disk: &File, page: u64) -> Result<Transfer, String> {
    let part = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(usize::try_from(page).unwrap_or(0)),
        iov_len: 4096,
    };
    let parts = vec![part; TIMES / CALLS];
    let count = libc::c_int::try_from(parts.len()).unwrap_or(0);
    for _ in 0..CALLS {
        // SAFETY: each part is a page of a mapping, which is not unmapped before the end, and to
        // which there are no references.
        let n = unsafe { libc::preadv(disk.as_raw_fd(), parts.as_ptr(), count, 0) };
        let error = std::io::Error::last_os_error();
        match usize::try_from(n) {
            Ok(n) if n == parts.len() * 4096 => {}
            // Refused after some pins; the rest went through the page cache, as far as it could.
            Ok(1..) => return Ok(Transfer::Refused),
            Ok(_) => return Err(format!("{DISK}: nothing was read")),
            Err(_) if error.raw_os_error() == Some(libc::EFAULT) => return Ok(Transfer::Refused),
            Err(_) => return Err(format!("{DISK}: {error}")),
        }
    }
    Ok(Transfer::Whole)
}

/// A disk past the page cache, and memory of the VMM's own to see that it works.
struct Disk {
    file: File,
    own: Memory,
}

impl Disk {
    fn open() -> Result<Self, String> {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_DIRECT).open(DISK);
        let file = file.map_err(|e| format!("{DISK}: {e}"))?;
        Ok(Self { file, own: Memory::new(4096)? })
    }

    fn works(&self) -> Result<(), String> {
        match transfer(&self.file, self.own.address())? {
            Transfer::Whole => Ok(()),
            Transfer::Refused => Err(format!("{DISK} works no more")),
        }
    }
}

fn call(vm: &mut Vm, function: u64) -> Result<u64, String> {
    match vm.order(order::HVC, function, DATA + PLACE) {
        Reply::Value(value) => Ok(value),
        other => Err(format!("call {function:#x}: {other}")),
    }
}

/// A guest's store and a look at it.
fn seen(vm: &mut Vm, value: u64) -> Result<bool, String> {
    vm.must(order::WRITE, DATA + PLACE, value)?;
    Ok(vm.data.load(PLACE) == value)
}

/// The log of dirty pages has the page if it is shared, and nothing else.
fn logged(vm: &Vm, shared: bool) -> Result<(), String> {
    let (dirty, wanted) = (vm.dirty(1)?, if shared { vec![PLACE >> 12] } else { vec![] });
    if dirty == wanted { Ok(()) } else { Err(format!("pages {dirty:?} are dirty, not {wanted:?}")) }
}

/// KVM offers what can work, and nothing else.
fn capabilities(vm: &Vm) -> Result<(), String> {
    for (capability, name, wanted) in [
        (KVM_CAP_USER_MEMORY, "user memory", true),
        (KVM_CAP_ONE_REG, "ONE_REG", true),
        (KVM_CAP_READONLY_MEM, "read-only slots", false),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "a log that is cleared by hand", false),
        (KVM_CAP_DIRTY_LOG_RING, "a dirty ring", false),
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, "a dirty ring", false),
        (KVM_CAP_SET_GUEST_DEBUG, "guest debugging", false),
        (KVM_CAP_STEAL_TIME, "steal time", false),
        (KVM_CAP_COUNTER_OFFSET, "counter offsets", false),
        (KVM_CAP_ARM_PMU_V3, "a PMU", false),
        (KVM_CAP_ARM_MTE, "memory tags", false),
    ] {
        if (vm.vm.check_extension_raw(capability.into()) > 0) != wanted {
            let what = if wanted { "does not offer" } else { "offers" };
            return Err(format!("KVM {what} {name}"));
        }
    }
    Ok(())
}

/// What a slot of a running VM may be: logged, not read-only.
fn flags(vm: &Vm) -> Result<(), String> {
    let set = |flags| vm.flags(1, DATA, &vm.data, flags);
    if set(KVM_MEM_READONLY).is_ok() {
        return Err("a read-only slot is accepted".to_owned());
    }
    set(KVM_MEM_LOG_DIRTY_PAGES).map_err(|e| format!("KVM_MEM_LOG_DIRTY_PAGES: {e}"))
}

/// The page goes back and forth; whether the VMM saw more or less than it should.
fn there_and_back(vm: &mut Vm) -> Result<Option<&'static str>, String> {
    if seen(vm, SECRET)? {
        return Ok(Some("the VMM sees memory that was never shared"));
    }
    capabilities(vm)?;
    flags(vm)?;
    logged(vm, false)?;
    for n in 0..3 {
        if call(vm, SHARE)? != 0 {
            return Err("the guest can't share a page".to_owned());
        }
        if !seen(vm, SECRET + n)? || !vm.data.store(PLACE, n) {
            return Err("the VMM does not see what is shared".to_owned());
        }
        if vm.must(order::READ, DATA + PLACE, 0)? != n {
            return Err("the guest does not see what the VMM wrote".to_owned());
        }
        // Each time again: it may have changed by then.
        logged(vm, true)?;
        logged(vm, true)?;
        if call(vm, UNSHARE)? != 0 {
            return Err("the guest does not get its page back".to_owned());
        }
        if seen(vm, SECRET)? || vm.data.store(PLACE, n) {
            return Ok(Some("the VMM reads or writes a page after it was unshared"));
        }
        if vm.must(order::READ, DATA + PLACE, 0)? != SECRET {
            return Ok(Some("the guest's page changed after it was unshared"));
        }
        logged(vm, false)?;
    }
    vm.flags(1, DATA, &vm.data, 0).map_err(|e| format!("no dirty log any more: {e}"))?;
    Ok(None)
}

/// The guest takes the page back while the disk writes to it: how many transfers were met, and how
/// many came too late.
fn with_transfers(vm: &mut Vm, disk: &Disk) -> Result<(u64, u64), String> {
    let (page, file) = (vm.data.address() + PLACE, &disk.file);
    let (start, end) = (Barrier::new(2), Barrier::new(2));
    let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let transfers = scope.spawn(|| {
            let mut results = vec![];
            loop {
                start.wait();
                if stop.load(Ordering::SeqCst) {
                    return results;
                }
                results.push(transfer(file, page));
                done.store(true, Ordering::SeqCst);
                end.wait();
            }
        });
        let mut result = Ok(());
        let mut under_way = vec![];
        for round in 0..ROUNDS {
            let shared = call(vm, SHARE);
            done.store(false, Ordering::SeqCst);
            start.wait();
            // A little into the transfer, each time another bit.
            std::thread::sleep(std::time::Duration::from_micros(round * 100));
            under_way.push(!done.load(Ordering::SeqCst));
            let back = call(vm, UNSHARE);
            end.wait();
            if result.is_ok() && (&shared, &back) != (&Ok(0), &Ok(0)) {
                result = Err(format!("MEM_SHARE {shared:?}, MEM_UNSHARE {back:?}"));
            }
        }
        stop.store(true, Ordering::SeqCst);
        start.wait();
        let results =
            transfers.join().map_err(|_| "the thread with the transfers died".to_owned())?;
        result?;
        let (mut met, mut late) = (0, 0);
        for (result, under_way) in results.into_iter().zip(under_way) {
            match result? {
                Transfer::Whole => met += u64::from(under_way),
                Transfer::Refused => late += 1,
            }
        }
        Ok((met, late))
    })
}

/// See above.
pub fn check() -> Result<Finding, String> {
    let mut vm = Vm::new(obey::image())?;
    if let Some(what) = there_and_back(&mut vm)? {
        return Ok(Finding { exposed: true, evidence: what.to_owned() });
    }
    let disk = Disk::open()?;
    disk.works()?;
    // A guest has only to name its memory in a descriptor.
    if transfer(&disk.file, vm.data.address() + PLACE)? == Transfer::Whole {
        let evidence = "a disk wrote to a page that is not shared".to_owned();
        return Ok(Finding { exposed: true, evidence });
    }
    disk.works()?;
    let (met, late) = with_transfers(&mut vm, &disk)?;
    if met == 0 {
        return Err(format!("no transfer was under way when the page was to go, {late} came late"));
    }
    disk.works()?;
    if seen(&mut vm, SECRET)? {
        let evidence = "the VMM sees the page after all transfers".to_owned();
        return Ok(Finding { exposed: true, evidence });
    }
    // Shared to the end of this life: wiped.
    call(&mut vm, SHARE)?;
    vm.must(order::WRITE, DATA + PLACE, SECRET)?;
    vm.init(0)?;
    let left = vm.data.load(PLACE);
    Ok(Finding {
        exposed: left != 0,
        evidence: format!(
            "{ROUNDS} times taken back, {met} times during a transfer of {} MiB; {late} transfers came late; {left:#x} is left after a reset",
            TIMES >> 8
        ),
    })
}
