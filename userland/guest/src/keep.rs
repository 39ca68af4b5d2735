// SPDX-License-Identifier: MIT OR Apache-2.0
//! `keep FILE`, a service of a whole distribution: a stream that nobody else knows, in memory and
//! in a file, made at the first start and looked for at each.

use crate::{say, sys};
use havmsi_proto::json::Object;
use havmsi_proto::{PAGE_WORDS, Seed};
use std::fs::{self, File};
use std::io::Write;
use std::sync::atomic::Ordering;

const PAGES: usize = 1024;

fn bytes(seed: Seed) -> Vec<u8> {
    (0..PAGES as u64).flat_map(|page| seed.words(page)).flat_map(u64::to_le_bytes).collect()
}

fn write(path: &str, content: &[u8]) -> Result<(), String> {
    let result = File::create(path).and_then(|mut f| {
        f.write_all(content)?;
        f.sync_all()
    });
    result.map_err(|e| format!("{path}: {e}"))
}

/// The stream's seed, and whether the file holds what it should.
fn look(path: &str) -> Result<(Seed, u64), String> {
    let seed_path = format!("{path}.seed");
    let seed = if let Ok(text) = fs::read_to_string(&seed_path) {
        Seed::from_hex(&text).ok_or_else(|| format!("{seed_path} holds no seed"))?
    } else {
        let seed = Seed::from_bytes(&sys::random()?);
        write(path, &bytes(seed))?;
        write(&seed_path, seed.to_hex().as_bytes())?;
        seed
    };
    let (found, wanted) = (fs::read(path).map_err(|e| format!("{path}: {e}"))?, bytes(seed));
    let size = PAGE_WORDS * 8;
    let mut right = found.chunks(size).zip(wanted.chunks(size)).filter(|(a, b)| a == b);
    let wrong = PAGES - right.by_ref().count();
    Ok((seed, wrong as u64))
}

/// Says what the file holds, and keeps the stream in memory from then on.
pub fn run(path: &str) -> ! {
    let cpus = sys::cpus().len();
    say(Object::event("boot").value("vcpus", cpus).text("mode", "keep"));
    let kept = look(path).and_then(|(seed, wrong)| {
        let memory = sys::memory(PAGES * PAGE_WORDS)?;
        let words = (0..PAGES as u64).flat_map(|page| seed.words(page));
        memory.iter().zip(words).for_each(|(to, word)| to.store(word, Ordering::Relaxed));
        Ok((seed, wrong))
    });
    let verdict = Object::event("verdict").value("vcpus", cpus).value("rounds", 1);
    say(match kept {
        Ok((seed, wrong)) => {
            say(Object::event("seed").text("seed", &seed.to_hex()).hex_list("targets", &[]));
            verdict
                .value("ok", wrong == 0)
                .value("verified_mib", (PAGES * PAGE_WORDS * 8) >> 20)
                .value("corrupt", wrong)
        }
        Err(e) => verdict.value("ok", false).text("text", &e),
    });
    loop {
        std::thread::park();
    }
}
