// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel command line asks for.

use havmsi_proto::cmdline::{number, value};

/// The words of `userland/README.md`, section "Jobs".
#[derive(Clone)]
pub struct Params {
    pub job: String,
    pub guests: u64,
    pub vcpus: u64,
    pub gmem: u64,
    pub gic: u64,
    pub mib: u64,
    pub seconds: u64,
    pub timeout: u64,
    pub checks: String,
    pub rounds: u64,
    pub machine: String,
    pub thp: String,
    /// The guests' kernel.
    pub kernel: String,
    pub operations: String,
    pub protected: bool,
}

const JOBS: [&str; 19] = [
    "run",
    "attack",
    "smp4",
    "reboot",
    "rounds",
    "hotplug",
    "io",
    "devices",
    "memlock",
    "overcommit",
    "hugepages",
    "operate",
    "nokvm",
    "boot",
    "shell",
    "bench",
    "applications",
    "debian",
    "debian-again",
];

impl Params {
    /// Reads a command line.
    pub fn parse(line: &str) -> Result<Self, String> {
        let job = value(line, "job").unwrap_or("run");
        if !JOBS.contains(&job) {
            return Err(format!("havmsi.job={job}: want one of {}", JOBS.join(", ")));
        }
        let word = |key, default: &str| value(line, key).unwrap_or(default).to_owned();
        let params = Self {
            job: job.to_owned(),
            guests: number(line, "guests", 2, 1, 8)?,
            vcpus: number(line, "vcpus", if job == "smp4" { 4 } else { 2 }, 1, 64)?,
            gmem: number(line, "gmem", 256, 64, 65_536)?,
            gic: number(line, "gic", 3, 2, 3)?,
            mib: number(line, "mib", 16, 1, 65_536)?,
            seconds: number(line, "seconds", 120, 1, 86_400)?,
            timeout: number(line, "timeout", 300, 1, 86_400)?,
            checks: word("checks", "all"),
            rounds: number(line, "rounds", 20, 1, 10_000)?,
            machine: word("machine", ""),
            thp: word("thp", "never"),
            kernel: word("kernel", "/havmsi/Image"),
            operations: word("operations", ""),
            protected: number(line, "protected", 0, 0, 1)? == 1,
        };
        if params.mib + 48 > params.gmem {
            return Err(format!(
                "havmsi.mib={}: a guest of {} MiB has no room for it (48 MiB are for its system)",
                params.mib, params.gmem
            ));
        }
        Ok(params)
    }

    /// Whether a check was asked for.
    pub fn wants(&self, id: &str) -> bool {
        self.checks == "all" || self.checks.split(',').any(|c| c == id)
    }

    /// The words of a guest's kernel command line.
    pub fn guest_cmdline(&self, mode: &str, seconds: u64) -> String {
        format!(
            "console=ttyAMA0 quiet loglevel=1 panic=-1 havmsi.mib={} havmsi.seconds={seconds} havmsi.mode={mode}",
            self.mib
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_is_the_default_job() {
        let p = Params::parse("console=ttyAMA0").expect("defaults are valid");
        assert_eq!((p.job.as_str(), p.guests, p.vcpus), ("run", 2, 2));
        assert!(p.wants("scan-physmem"));
    }

    #[test]
    fn bad_words_are_named() {
        for (line, text) in [
            ("havmsi.job=walk", "havmsi.job=walk"),
            ("havmsi.guests=0", "from 1 to 8"),
            ("havmsi.gic=4", "from 2 to 3"),
            ("havmsi.mib=250", "no room"),
        ] {
            let e = Params::parse(line).err().expect("refused");
            assert!(e.contains(text), "{e}");
        }
    }
}
