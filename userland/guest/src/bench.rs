// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mode `bench`: work that applications do, between marks for QEMU's plugin. The list, in its order, is
//! `havmsi_operations::APPLICATIONS`.

use havmsi_operations::{APPLICATIONS, mark};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

/// Word by which a program of ours is told that it has nothing to do.
pub const NOTHING: &str = "nothing";

const SENDERS: usize = 4;
const MESSAGES: usize = 100;
const MESSAGE: usize = 100;
const PROCESSES: usize = 8;
const MIB: usize = 4;

/// Threads send messages to others.
fn messages() -> Result<(), String> {
    let failed = |e: std::io::Error| e.to_string();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..SENDERS {
            let (mut from, mut to) = UnixStream::pair().map_err(failed)?;
            threads.push(scope.spawn(move || {
                (0..MESSAGES).try_for_each(|_| to.write_all(&[1; MESSAGE])).map_err(failed)
            }));
            threads.push(scope.spawn(move || {
                (0..MESSAGES).try_for_each(|_| from.read_exact(&mut [0; MESSAGE])).map_err(failed)
            }));
        }
        threads.into_iter().try_for_each(|t| t.join().map_err(|_| "a thread died")?)
    })
}

fn processes() -> Result<(), String> {
    for _ in 0..PROCESSES {
        let status = Command::new("/proc/self/exe").arg(NOTHING).status();
        let status = status.map_err(|e| e.to_string())?;
        if !status.success() {
            return Err(format!("a process ended with {status}"));
        }
    }
    Ok(())
}

/// Memory is kept: the next one is new again.
fn memory() -> Result<(), String> {
    let words = crate::sys::memory(MIB << 17)?;
    for word in words.iter().step_by(512) {
        word.store(1, std::sync::atomic::Ordering::Relaxed);
    }
    Ok(())
}

/// Ends the record that the host began, then carries out all others.
pub fn run() -> Result<(), String> {
    mark::put::<{ mark::STOP }>();
    for (name, _, records) in &APPLICATIONS[1..] {
        mark::put::<{ mark::NEXT }>();
        // The first one is not like the others: code and caches of the kernel come in.
        for record in 0..=*records {
            if record > 0 {
                mark::put::<{ mark::START }>();
            }
            match *name {
                "linux-messages" => messages(),
                "linux-process" => processes(),
                "linux-memory" => memory(),
                _ => Err("unknown".to_owned()),
            }
            .map_err(|e| format!("{name}: {e}"))?;
            mark::put::<{ mark::STOP }>();
        }
    }
    Ok(())
}
