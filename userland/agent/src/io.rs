// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's ordinary I/O: what is written to a disk and sent through a network comes back as
//! it was. Both devices work by DMA, behind the monitor's SMMU where there is one.

use havmsi_proto::stream::mix;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The second disk; the first one holds the root.
const DISK: &str = "/dev/vdb";
/// Where QEMU answers with what it is sent, and the address that its network gives us.
const ECHO: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 2, 100), 7);
const ADDRESS: &str = "10.0.2.15";

/// One transfer; aligned for transfers past the page cache.
#[repr(C, align(4096))]
struct Chunk([u8; 1 << 18]);

impl Chunk {
    fn empty() -> Box<Self> {
        Box::new(Self([0; 1 << 18]))
    }

    /// Words that tell of their number and place.
    fn fill(&mut self, number: u64) {
        for (word, place) in self.0.chunks_exact_mut(8).zip(0..) {
            word.copy_from_slice(&mix(number << 32 | place).to_le_bytes());
        }
    }
}

/// What went out and came back unchanged.
#[derive(Default)]
pub struct Done {
    pub disk_mib: u64,
    pub net_mib: u64,
}

fn at(n: u64) -> u64 {
    n * size_of::<Chunk>() as u64
}

/// Writes 4 MiB in another place each round and reads them back, past the page cache.
fn disk(file: &File, round: u64) -> Result<u64, String> {
    let (mut chunk, mut back) = (Chunk::empty(), Chunk::empty());
    let all = round % 16 * 16..(round % 16 + 1) * 16;
    for n in all.clone() {
        chunk.fill(round << 16 | n);
        file.write_all_at(&chunk.0, at(n)).map_err(|e| format!("{DISK}: {e}"))?;
    }
    for n in all {
        chunk.fill(round << 16 | n);
        file.read_exact_at(&mut back.0, at(n)).map_err(|e| format!("{DISK}: {e}"))?;
        if chunk.0 != back.0 {
            return Err(format!("{DISK}: round {round}: chunk {n} came back changed"));
        }
    }
    Ok(4)
}

/// Sends 1 MiB and compares the echo.
fn net(stream: &mut TcpStream, round: u64) -> Result<u64, String> {
    let (mut chunk, mut back) = (Chunk::empty(), Chunk::empty());
    for n in 0..4 {
        chunk.fill(round << 16 | n);
        for (out, back) in chunk.0.chunks(1 << 14).zip(back.0.chunks_mut(1 << 14)) {
            let echo = stream.write_all(out).and_then(|()| stream.read_exact(back));
            echo.map_err(|e| format!("network, round {round}: {e}"))?;
        }
        if chunk.0 != back.0 {
            return Err(format!("network: round {round}: chunk {n} came back changed"));
        }
    }
    Ok(1)
}

/// Disk and network, until told to stop, and at least once.
pub fn work(stop: &AtomicBool) -> Result<Done, String> {
    let up = Command::new("/bin/busybox").args(["ifconfig", "eth0", ADDRESS, "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        return Err("there is no network device eth0".to_owned());
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let file = options.open(DISK).map_err(|e| format!("{DISK}: {e}"))?;
    let mut stream = TcpStream::connect(ECHO).map_err(|e| format!("network: {e}"))?;
    let patience = Some(Duration::from_secs(60));
    stream.set_read_timeout(patience).map_err(|e| e.to_string())?;
    let mut done = Done::default();
    for round in 1.. {
        done.disk_mib += disk(&file, round)?;
        done.net_mib += net(&mut stream, round)?;
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(done)
}
