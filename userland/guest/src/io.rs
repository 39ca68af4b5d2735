// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's virtio devices: what it writes to its disk and sends through its network comes
//! back as it was; a random source and a second console answer.

use crate::sys;
use havmsi_proto::{PAGE_WORDS, Seed};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

/// Of the disk nothing is known but that it has this many chunks.
const DISK: &str = "/dev/vda";
const CHUNKS: u64 = 64;
/// Where QEMU answers with what it is sent, and the address that its network gives us.
const ECHO: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 2, 100), 7);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const PATIENCE: Duration = Duration::from_secs(60);

/// Pages of one transfer; aligned for transfers past the page cache.
const PAGES: usize = 64;
#[repr(C, align(4096))]
struct Chunk([u8; PAGES * PAGE_WORDS * 8]);

impl Chunk {
    fn empty() -> Box<Self> {
        Box::new(Self([0; PAGES * PAGE_WORDS * 8]))
    }

    /// Pages of the stream, from number `first` on.
    fn fill(&mut self, seed: Seed, first: u64) {
        for (page, number) in self.0.chunks_exact_mut(PAGE_WORDS * 8).zip(first..) {
            for (word, value) in page.chunks_exact_mut(8).zip(seed.words(number)) {
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// What came back unchanged.
#[derive(Default)]
pub struct Done {
    /// Bytes to and from the disk.
    pub disk: u64,
    /// Bytes to and from the network.
    pub net: u64,
    /// Random bytes.
    pub random: u64,
    /// What the second console said.
    pub said: String,
}

/// The devices of a guest.
pub struct Devices {
    seed: Seed,
    disk: File,
    net: TcpStream,
    random: File,
    console: BufReader<File>,
    round: u64,
    /// What was done so far.
    pub done: Done,
}

fn open(path: &str, flags: i32) -> Result<File, String> {
    let mut options = OpenOptions::new();
    options.read(true).write(flags != 0).custom_flags(flags & !1);
    options.open(path).map_err(|e| format!("{path}: {e}"))
}

impl Devices {
    /// Opens them all; what is sent is the stream of `seed`, which whoever sees shared memory
    /// may find there.
    pub fn open(seed: Seed) -> Result<Self, String> {
        sys::set_address("eth0", ADDRESS).map_err(|e| format!("eth0: {e}"))?;
        let net = TcpStream::connect(ECHO).map_err(|e| format!("network: {e}"))?;
        net.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        Ok(Self {
            seed,
            disk: open(DISK, libc::O_DIRECT | 1)?,
            net,
            random: open("/dev/hwrng", 0)?,
            console: BufReader::new(open("/dev/hvc0", libc::O_NOCTTY | 1)?),
            round: 0,
            done: Done::default(),
        })
    }

    /// One round: all of them once.
    pub fn round(&mut self) -> Result<(), String> {
        let first = (self.round * 3) << 20;
        self.disk(first)?;
        self.net(first + (1 << 20))?;
        self.random()?;
        if self.round == 0 {
            self.console()?;
        }
        self.round += 1;
        Ok(())
    }

    fn disk(&mut self, first: u64) -> Result<(), String> {
        let (mut chunk, mut back) = (Chunk::empty(), Chunk::empty());
        let size = size_of::<Chunk>() as u64;
        let place = |n: u64| (self.round * 5 + n) % CHUNKS * size;
        let number = |n: u64| first + n * PAGES as u64;
        for n in 0..4 {
            chunk.fill(self.seed, number(n));
            self.disk.write_all_at(&chunk.0, place(n)).map_err(|e| format!("{DISK}: {e}"))?;
        }
        for n in 0..4 {
            chunk.fill(self.seed, number(n));
            self.disk.read_exact_at(&mut back.0, place(n)).map_err(|e| format!("{DISK}: {e}"))?;
            if chunk.0 != back.0 {
                return Err(format!("{DISK}: round {}: chunk {n} came back changed", self.round));
            }
            self.done.disk += 2 * size;
        }
        Ok(())
    }

    fn net(&mut self, first: u64) -> Result<(), String> {
        let (mut chunk, mut back) = (Chunk::empty(), Chunk::empty());
        chunk.fill(self.seed, first);
        for (out, back) in chunk.0.chunks(1 << 14).zip(back.0.chunks_mut(1 << 14)) {
            let echo = self.net.write_all(out).and_then(|()| self.net.read_exact(back));
            echo.map_err(|e| format!("network, round {}: {e}", self.round))?;
        }
        if chunk.0 != back.0 {
            return Err(format!("network: round {} came back changed", self.round));
        }
        self.done.net += 2 * chunk.0.len() as u64;
        Ok(())
    }

    fn random(&mut self) -> Result<(), String> {
        let (mut a, mut b) = ([0; 64], [0; 64]);
        for bytes in [&mut a, &mut b] {
            self.random.read_exact(bytes).map_err(|e| format!("/dev/hwrng: {e}"))?;
        }
        if a == b || a == [0; 64] || b == [0; 64] {
            return Err("/dev/hwrng: not random".to_owned());
        }
        self.done.random += 128;
        Ok(())
    }

    /// Asks on the second console and reads the answer.
    fn console(&mut self) -> Result<(), String> {
        let text = |e: std::io::Error| format!("/dev/hvc0: {e}");
        self.console.get_mut().write_all(b"who is there?\n").map_err(text)?;
        let mut line = String::new();
        self.console.read_line(&mut line).map_err(text)?;
        line.trim().clone_into(&mut self.done.said);
        Ok(())
    }
}
