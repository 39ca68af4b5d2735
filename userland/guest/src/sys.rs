// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls of the workload.

use havmsi_proto::Seed;
use std::ffi::CStr;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;

/// How the guest ends.
pub enum End {
    /// Power off.
    PowerOff,
    /// Reset.
    Reboot,
}

fn mount(kind: &CStr, target: &CStr) {
    // A mount that fails shows where its files are missed; /dev may be mounted already.
    let _ = std::fs::create_dir(target.to_string_lossy().as_ref());
    // SAFETY: three valid C strings; no data pointer.
    let _ =
        unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

/// What an `/init` has to set up: file systems, and a console that only we write to.
pub fn mount_all() {
    mount(c"proc", c"/proc");
    mount(c"devtmpfs", c"/dev");
    const CONSOLE_LEVEL: libc::c_int = 8;
    // SAFETY: this action takes a number and no buffer.
    let _ = unsafe { libc::klogctl(CONSOLE_LEVEL, std::ptr::null_mut(), 1) };
    let mut t = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the pointer is to a termios that the call fills.
    if unsafe { libc::tcgetattr(0, t.as_mut_ptr()) } == 0 {
        // SAFETY: filled by the successful call above.
        let mut t = unsafe { t.assume_init() };
        t.c_lflag &= !libc::ECHO;
        // SAFETY: a valid termios; without effect the console echoes, which does no harm.
        let _ = unsafe { libc::tcsetattr(0, libc::TCSANOW, &raw const t) };
    }
}

/// The CPUs that this process may run on.
pub fn cpus() -> Vec<usize> {
    // SAFETY: a cpu_set_t is plain bits; all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer and size are those of the set.
    unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    // SAFETY: the index is within the set's size.
    (0..1024).filter(|i| unsafe { libc::CPU_ISSET(*i, &set) }).collect()
}

/// Keeps the calling thread on one CPU.
pub fn pin(cpu: usize) {
    // SAFETY: as in `cpus`.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` came from `cpus`, so it is within the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and size are those of the set.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

/// 32 random bytes of the kernel's.
pub fn random() -> Result<[u8; 32], String> {
    let mut bytes = [0; 32];
    // SAFETY: the pointer and length are those of the array.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(n) {
        Ok(32) => Ok(bytes),
        _ => Err(format!("getrandom: {}", std::io::Error::last_os_error())),
    }
}

/// Fresh memory that lives as long as the process.
pub fn memory(words: usize) -> Result<&'static [AtomicU64], String> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), words * 8, prot, flags, -1, 0) };
    if p == libc::MAP_FAILED {
        return Err(format!("mmap: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: page-aligned, zeroed, `words` long, never unmapped, and only reached through atomics.
    Ok(unsafe { std::slice::from_raw_parts(p.cast::<AtomicU64>(), words) })
}

/// The guest-physical address behind an address of ours, 0 if the kernel doesn't say.
pub fn physical(address: u64) -> u64 {
    let mut entry = [0; 8];
    let read = File::open("/proc/self/pagemap")
        .and_then(|f| f.read_exact_at(&mut entry, (address >> 12) * 8));
    let entry = u64::from_le_bytes(entry);
    if read.is_err() || entry >> 63 == 0 {
        return 0;
    }
    (entry & ((1 << 55) - 1)) << 12
}

/// Looks for pages of a stream in all of RAM: their number, and the bytes looked at.
pub fn scan_ram(seed: Seed) -> Result<(u64, u64), String> {
    let map = std::fs::read_to_string("/proc/iomem").map_err(|e| format!("/proc/iomem: {e}"))?;
    let mem = File::open("/dev/mem").map_err(|e| format!("/dev/mem: {e}"))?;
    let mut chunk = vec![0; 1 << 20];
    let (mut pages, mut bytes) = (0, 0);
    for line in map.lines() {
        let Some((range, "System RAM")) = line.split_once(" : ") else {
            continue;
        };
        let ends = range.split_once('-').and_then(|(a, b)| {
            Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?))
        });
        let Some((mut at, last)) = ends else { continue };
        while at < last {
            let len = usize::try_from(last + 1 - at).unwrap_or(chunk.len()).min(chunk.len());
            let part = &mut chunk[..len];
            mem.read_exact_at(part, at).map_err(|e| format!("/dev/mem at {at:#x}: {e}"))?;
            let tag = seed.tag().to_le_bytes();
            for page in part.chunks_exact(4096).filter(|page| page.starts_with(&tag)) {
                let words: Vec<u64> = page
                    .chunks_exact(8)
                    .filter_map(|w| w.try_into().ok().map(u64::from_le_bytes))
                    .collect();
                pages += u64::from(seed.identify(&words).is_some());
            }
            bytes += len as u64;
            at += len as u64;
        }
    }
    Ok((pages, bytes))
}

/// Gives a network interface its address, and turns it on.
pub fn set_address(interface: &str, address: Ipv4Addr) -> std::io::Result<()> {
    // SAFETY: plain bits; all zero is an empty request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *place = byte;
    }
    // SAFETY: no pointers.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) };
    let ioctl = |number: libc::c_ulong, request: &libc::ifreq| {
        let number = number.try_into().unwrap_or_default();
        // SAFETY: both calls read a request of this type.
        let result = unsafe { libc::ioctl(socket, number, std::ptr::from_ref(request)) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: plain bits.
    let mut place: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    place.sin_family = libc::AF_INET.try_into().unwrap_or_default();
    place.sin_addr.s_addr = u32::from_ne_bytes(address.octets());
    // SAFETY: a sockaddr_in is as large as a sockaddr, and plain bits.
    request.ifr_ifru.ifru_addr =
        unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(place) };
    ioctl(libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_flags = libc::IFF_UP.try_into().unwrap_or_default();
    let result = ioctl(libc::SIOCSIFFLAGS, &request);
    // SAFETY: ours, and closed once.
    unsafe { libc::close(socket) };
    result
}

/// Waits until the console has sent what it was given.
pub fn drain_console() {
    // SAFETY: takes a file descriptor number only.
    let _ = unsafe { libc::tcdrain(1) };
}

/// Ends the guest.
pub fn end(end: End) -> ! {
    let how = match end {
        End::PowerOff => libc::RB_POWER_OFF,
        End::Reboot => libc::RB_AUTOBOOT,
    };
    // SAFETY: no pointers; as process 1 of a guest that has nothing left to do.
    unsafe { libc::reboot(how) };
    loop {
        std::thread::park();
    }
}
