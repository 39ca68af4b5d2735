// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls of the agent that the standard library has no words for.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn done(result: libc::c_long) -> Result<libc::c_long> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// Mounts a file system without a device.
pub fn mount(kind: &CStr, target: &CStr) -> Result<()> {
    // SAFETY: three valid C strings; no data pointer.
    let r =
        unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    done(r.into()).map(drop)
}

/// Keeps kernel messages off the console.
pub fn quiet_console(level: libc::c_int) {
    const CONSOLE_LEVEL: libc::c_int = 8;
    // SAFETY: this action takes a number and no buffer.
    let _ = unsafe { libc::klogctl(CONSOLE_LEVEL, std::ptr::null_mut(), level) };
}

/// The kernel's messages.
pub fn kernel_log() -> String {
    const READ_ALL: libc::c_int = 3;
    let mut buffer = vec![0u8; 1 << 18];
    let len = libc::c_int::try_from(buffer.len()).unwrap_or(0);
    // SAFETY: the pointer and length are those of the buffer.
    let n = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), len) };
    buffer.truncate(usize::try_from(n).unwrap_or(0));
    String::from_utf8_lossy(&buffer).into_owned()
}

/// Swaps to a device.
pub fn swap_on(path: &CStr) -> Result<()> {
    // SAFETY: a valid C string, no flags.
    done(unsafe { libc::swapon(path.as_ptr(), 0) }.into()).map(drop)
}

/// How much memory this process and those that it starts may lock, if they are not root's.
pub fn limit_locked_memory(bytes: u64) -> Result<()> {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid structure.
    done(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }.into()).map(drop)
}

/// Loads a kernel module.
pub fn load_module(path: &str) -> Result<()> {
    let file = File::open(path)?;
    let none = CString::default();
    // SAFETY: an open file, an empty parameter string, no flags.
    let r = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), none.as_ptr(), 0) };
    done(r).map(drop)
}

/// The caller's own copy of another process's file descriptor.
pub fn take_fd(pid: u32, fd: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let process = done(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let process = i32::try_from(process).map_err(Error::other)?;
    // SAFETY: a new descriptor that nobody else owns.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    // SAFETY: no pointers.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    let copy = i32::try_from(done(copy)?).map_err(Error::other)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn iovec(base: *mut libc::c_void, len: usize) -> libc::iovec {
    libc::iovec { iov_base: base, iov_len: len }
}

fn at(address: u64) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}

/// Reads another process's memory.
pub fn process_read(pid: i32, address: u64, buffer: &mut [u8]) -> Result<()> {
    let local = iovec(buffer.as_mut_ptr().cast(), buffer.len());
    let remote = iovec(at(address), buffer.len());
    // SAFETY: `local` is the buffer; the kernel checks the remote range.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if usize::try_from(done(n as libc::c_long)?) == Ok(buffer.len()) {
        Ok(())
    } else {
        Err(Error::other("short read"))
    }
}

/// Writes another process's memory.
pub fn process_write(pid: i32, address: u64, data: &[u8]) -> Result<()> {
    let local = iovec(data.as_ptr().cast_mut().cast(), data.len());
    let remote = iovec(at(address), data.len());
    // SAFETY: `local` is the data, which is only read; the kernel checks the remote range.
    let n = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if usize::try_from(done(n as libc::c_long)?) == Ok(data.len()) {
        Ok(())
    } else {
        Err(Error::other("short write"))
    }
}

/// Reads another process's memory as a debugger: it is stopped meanwhile.
pub fn ptrace_read(pid: i32, address: u64, buffer: &mut [u8]) -> Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: no pointers of ours.
    done(unsafe { libc::ptrace(libc::PTRACE_ATTACH, pid, none, none) })?;
    let mut status = 0;
    // SAFETY: the pointer is to a number of ours.
    let stopped = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    let mut result = if stopped == pid { Ok(()) } else { Err(Error::last_os_error()) };
    for (i, bytes) in (0u64..).zip(buffer.chunks_exact_mut(8)) {
        if result.is_err() {
            break;
        }
        let mut word = 0u64;
        // SAFETY: the system call itself stores the word at its last argument.
        let r = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_PEEKDATA,
                pid,
                at(address + 8 * i),
                &raw mut word,
            )
        };
        result = done(r).map(drop);
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    // SAFETY: no pointers of ours.
    let detached = unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, none, none) };
    result.and(done(detached).map(drop))
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    done(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Powers the machine off, after the console has sent what it was given.
pub fn power_off() -> ! {
    // SAFETY: takes a file descriptor number only.
    let _ = unsafe { libc::tcdrain(1) };
    // SAFETY: no pointers; nothing is left to be saved.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    loop {
        std::thread::park();
    }
}

/// Collects ended children that nobody waits for, until `child` ends; its status.
pub fn wait_for(child: u32) -> i32 {
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to a number of ours.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if u32::try_from(pid) == Ok(child) || pid < 0 {
            return status;
        }
    }
}
