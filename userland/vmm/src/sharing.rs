// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest shares pages with this VMM and takes them back, also while a disk writes there past the
//! page cache. `exposed` if the VMM sees what is not shared, or a transfer fails.

use crate::Finding;
use crate::obey::{self, order};
use crate::vm::{DATA, Reply, Vm};
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
/// How often one transfer writes the page.
const TIMES: usize = 1024;
/// Where the page is in the data slot.
const PLACE: u64 = 0x8000;

/// Reads from the disk into the page, [`TIMES`] times in one go.
fn transfer(disk: &File, page: u64) -> Result<(), String> {
    let part = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(usize::try_from(page).unwrap_or(0)),
        iov_len: 4096,
    };
    let parts = vec![part; TIMES];
    let count = libc::c_int::try_from(TIMES).unwrap_or(0);
    // SAFETY: each part is a page of the mapping, which is never unmapped, and to which there are
    // no references.
    let n = unsafe { libc::preadv(disk.as_raw_fd(), parts.as_ptr(), count, 0) };
    match usize::try_from(n) {
        Ok(n) if n == TIMES * 4096 => Ok(()),
        Ok(n) => Err(format!("{DISK}: {n} bytes")),
        Err(_) => Err(format!("{DISK}: {}", std::io::Error::last_os_error())),
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

/// The page goes back and forth; whether the VMM saw more or less than it should.
fn there_and_back(vm: &mut Vm) -> Result<Option<&'static str>, String> {
    if seen(vm, SECRET)? {
        return Ok(Some("the VMM sees memory that was never shared"));
    }
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
        if call(vm, UNSHARE)? != 0 {
            return Err("the guest does not get its page back".to_owned());
        }
        if seen(vm, SECRET)? || vm.data.store(PLACE, n) {
            return Ok(Some("the VMM reads or writes a page after it was unshared"));
        }
        if vm.must(order::READ, DATA + PLACE, 0)? != SECRET {
            return Ok(Some("the guest's page changed after it was unshared"));
        }
    }
    Ok(None)
}

/// The guest takes the page back while the disk writes to it.
fn with_transfers(vm: &mut Vm) -> Result<Option<String>, String> {
    let mut options = OpenOptions::new();
    let disk = options.read(true).custom_flags(libc::O_DIRECT).open(DISK);
    let disk = disk.map_err(|e| format!("{DISK}: {e}"))?;
    let page = vm.data.address() + PLACE;
    let (start, end, stop) = (Barrier::new(2), Barrier::new(2), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let transfers = scope.spawn(|| {
            let mut failed = None;
            loop {
                start.wait();
                if stop.load(Ordering::SeqCst) {
                    return failed;
                }
                failed = failed.or(transfer(&disk, page).err());
                end.wait();
            }
        });
        let mut result = Ok(());
        for round in 0..ROUNDS {
            result = result.and_then(|()| {
                (call(vm, SHARE)? == 0).then_some(()).ok_or_else(|| "MEM_SHARE".to_owned())
            });
            start.wait();
            // A little into the transfer, each time another bit.
            std::thread::sleep(std::time::Duration::from_micros(round * 100));
            let back = call(vm, UNSHARE);
            end.wait();
            result = result
                .and_then(|()| (back? == 0).then_some(()).ok_or_else(|| "MEM_UNSHARE".to_owned()));
        }
        stop.store(true, Ordering::SeqCst);
        start.wait();
        let failed =
            transfers.join().map_err(|_| "the thread with the transfers died".to_owned())?;
        result.map(|()| failed)
    })
}

/// See above.
pub fn check() -> Result<Finding, String> {
    let mut vm = Vm::new(obey::image())?;
    if let Some(what) = there_and_back(&mut vm)? {
        return Ok(Finding { exposed: true, evidence: what.to_owned() });
    }
    if let Some(error) = with_transfers(&mut vm)? {
        return Ok(Finding { exposed: true, evidence: format!("a transfer failed: {error}") });
    }
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
            "{ROUNDS} pages taken back during a transfer of {} MiB each; {left:#x} is left after a reset",
            TIMES >> 8
        ),
    })
}
