// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of the VMM's own that it gives to a guest, and goes on looking at.

use std::io::{Error, Read as _, Result, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

/// A mapping that is never unmapped. Others change it at any time, so there are no references to it.
pub struct Memory {
    start: *mut u8,
    size: u64,
}

/// A signal was taken instead of a store.
static SIGNAL: AtomicBool = AtomicBool::new(false);

/// Steps over the store.
extern "C" fn step(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SIGNAL.store(true, Ordering::Relaxed);
    let context: *mut libc::ucontext_t = context.cast();
    // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO.
    unsafe { (*context).uc_mcontext.pc += 4 };
}

impl Memory {
    /// Takes memory, which is zero.
    pub fn new(size: u64) -> std::result::Result<Self, String> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let len = usize::try_from(size).map_err(|e| e.to_string())?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            return Err(format!("mmap: {}", Error::last_os_error()));
        }
        Ok(Self { start: p.cast(), size })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(offset.is_multiple_of(8) && offset < self.size, "beyond the mapping");
        self.start.wrapping_add(usize::try_from(offset).unwrap_or(0)).cast()
    }

    /// Puts bytes at the start.
    pub fn copy(&self, bytes: &[u8]) {
        assert!(bytes.len() as u64 <= self.size, "beyond the mapping");
        // SAFETY: the mapping is larger than that, and there are no references to it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start, bytes.len()) };
    }

    /// Loads a word.
    pub fn load(&self, offset: u64) -> u64 {
        // SAFETY: an aligned word of the mapping.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Stores a word; false if a signal came instead.
    pub fn store(&self, offset: u64, value: u64) -> bool {
        // SAFETY: all zero is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction =
            step as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void)
                as libc::sighandler_t;
        for signal in [libc::SIGBUS, libc::SIGSEGV] {
            // SAFETY: a valid structure; the handler touches nothing but its context and a flag.
            unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        }
        SIGNAL.store(false, Ordering::Relaxed);
        let word = self.word(offset);
        // SAFETY: an aligned word of the mapping; a single instruction that the handler may step over.
        unsafe { std::arch::asm!("str {}, [{}]", in(reg) value, in(reg) word) };
        !SIGNAL.load(Ordering::Relaxed)
    }

    /// Has the kernel store a word: a pipe read into the mapping.
    pub fn store_by_call(&self, offset: u64, value: u64) -> Result<()> {
        let (reader, mut writer) = std::io::pipe()?;
        writer.write_all(&value.to_le_bytes())?;
        let word = self.word(offset).cast();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
        // SAFETY: eight bytes of the mapping, to which there are no references.
        let n = unsafe { libc::read(fd, word, 8) };
        if n == 8 { Ok(()) } else { Err(Error::last_os_error()) }
    }

    /// Has the kernel load a word: the mapping written to a pipe.
    pub fn load_by_call(&self, offset: u64) -> Result<u64> {
        let (mut reader, writer) = std::io::pipe()?;
        let word = self.word(offset).cast();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&writer);
        // SAFETY: eight bytes of the mapping.
        let n = unsafe { libc::write(fd, word, 8) };
        if n != 8 {
            return Err(Error::last_os_error());
        }
        let mut bytes = [0; 8];
        reader.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
