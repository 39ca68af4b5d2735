// SPDX-License-Identifier: MIT OR Apache-2.0
//! What Linux says of the VMs: KVM's folders under debugfs.

use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Bytes of a page; other kernels don't run on the monitor.
pub const PAGE: u64 = havmsi_abi::PAGE_SIZE;

/// Why there is no answer.
#[derive(Debug)]
pub enum Trouble {
    /// This kernel uses no monitor: that file is missing.
    NoMonitor(PathBuf),
    /// There is nothing in that folder.
    NotMounted(PathBuf),
    /// Nobody listens any more.
    Unheard,
    /// Something else.
    Other(String),
}

impl Trouble {
    /// The exit status.
    pub fn code(&self) -> u8 {
        match self {
            Self::NoMonitor(_) => 3,
            Self::NotMounted(_) => 4,
            Self::Unheard | Self::Other(_) => 1,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMonitor(path) => write!(
                f,
                "this kernel uses no HA-VMSI monitor: there is no {} (boot on the monitor with kvm-arm.mode=havmsi; `dmesg | grep havmsi` tells more)",
                path.display()
            ),
            Self::NotMounted(path) => write!(
                f,
                "debugfs is not mounted: nothing in {} (mount -t debugfs none /sys/kernel/debug)",
                path.display()
            ),
            Self::Unheard => write!(f, "nobody reads the output"),
            Self::Other(text) => write!(f, "{text}"),
        }
    }
}

/// A file that could not be read.
fn unread(path: &Path, e: &std::io::Error) -> Trouble {
    let hint = if e.kind() == ErrorKind::PermissionDenied { " (are you root?)" } else { "" };
    Trouble::Other(format!("{}: {e}{hint}", path.display()))
}

/// Lines of a name and a number; what is no number is left out.
fn counts(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// Whose memory a run of pages of a VM's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The VM's alone.
    Private,
    /// The VM's, which the host may read and write as well.
    Shared,
    /// Table memory that the monitor has for the VM.
    Table,
}

/// Memory in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub start: u64,
    /// The byte behind the last.
    pub end: u64,
    /// Whose.
    pub kind: Kind,
    /// Where the guest has it; tables are nowhere.
    pub guest: Option<u64>,
}

/// A line of `havmsi_pages`.
fn run(line: &str) -> Option<Run> {
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_whitespace();
    let (start, last) = words.next()?.split_once('-')?;
    let kind = match words.next()? {
        "private" => Kind::Private,
        "shared" => Kind::Shared,
        "table" => Kind::Table,
        _ => return None,
    };
    let (start, end) = (hex(start)?, hex(last)?.checked_add(1)?);
    let guest = words.next().map(hex);
    if end <= start || guest == Some(None) || (kind == Kind::Table) != guest.is_none() {
        return None;
    }
    Some(Run { start, end, kind, guest: guest.flatten() })
}

/// As text of hexadecimal digits.
pub fn hex<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{value:#x}"))
}

/// A VM.
#[derive(Debug, Clone, Serialize)]
pub struct Vm {
    /// The monitor's name of it; 0 until its first vCPU runs.
    #[serde(serialize_with = "hex")]
    pub vm: u64,
    /// The process that made it.
    pub pid: u64,
    /// Whether it was launched (and not reset since).
    pub launched: bool,
    /// Of its launch, as the monitor told the host.
    pub digest: Option<String>,
    /// All that the kernel counts: what is [`NEEDED`], and what later kernels add.
    #[serde(flatten)]
    pub counts: BTreeMap<String, u64>,
    #[serde(skip)]
    folder: PathBuf,
}

/// What the kernel counts of a VM.
const NEEDED: [&str; 10] = [
    "vcpus",
    "private_pages",
    "shared_pages",
    "sealed_pages",
    "pool_pages",
    "faults",
    "seals",
    "unseals",
    "integrity_failures",
    "launches",
];

impl Vm {
    fn parse(folder: PathBuf, text: &str) -> Result<Self, Trouble> {
        let bad = |what: &str| Trouble::Other(format!("{}/havmsi: {what}", folder.display()));
        let word =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let pid = name.split_once('-').and_then(|(pid, _)| pid.parse().ok());
        let handle = word("vm").ok_or_else(|| bad("no line `vm`"))?;
        let handle = u64::from_str_radix(handle.trim_start_matches("0x"), 16);
        let mut counts = counts(text);
        let launched = counts.remove("launched") == Some(1);
        // The name may look like a number, and so may a digest.
        counts.remove("vm");
        counts.remove("digest");
        for name in NEEDED {
            if !counts.contains_key(name) {
                return Err(bad(&format!("no line `{name}`")));
            }
        }
        Ok(Self {
            vm: handle.map_err(|e| bad(&format!("`vm`: {e}")))?,
            pid: pid.ok_or_else(|| bad("the folder's name has no PID"))?,
            launched,
            digest: word("digest").map(str::to_owned),
            counts,
            folder,
        })
    }

    /// A count, which is there if the kernel gives it.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// The physical memory that is the VM's; none if it has just ended.
    pub fn runs(&self) -> Result<Vec<Run>, Trouble> {
        let path = self.folder.join("havmsi_pages");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if gone(&e) => return Ok(vec![]),
            Err(e) => return Err(unread(&path, &e)),
        };
        let line =
            |line| run(line).ok_or_else(|| Trouble::Other(format!("{}: {line:?}", path.display())));
        text.lines().map(line).collect()
    }
}

/// Whether a VM has ended while it was looked at: a file that was removed, before or after it was
/// opened.
fn gone(e: &std::io::Error) -> bool {
    e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(5)
}

/// All VMs, and what the monitor counts.
#[derive(Debug, Serialize)]
pub struct State {
    /// By the monitor's names.
    pub vms: Vec<Vm>,
    /// The monitor's STATS.
    pub monitor: BTreeMap<String, u64>,
}

impl State {
    /// Asks the kernel.
    pub fn read(root: &Path) -> Result<Self, Trouble> {
        let debug = root.join("sys/kernel/debug");
        let stats = debug.join("havmsi_stats");
        let monitor = match std::fs::read_to_string(&stats) {
            Ok(text) => counts(&text),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let empty = std::fs::read_dir(&debug).map_or(true, |mut dir| dir.next().is_none());
                let trouble = if empty { Trouble::NotMounted } else { Trouble::NoMonitor };
                return Err(trouble(if empty { debug } else { stats }));
            }
            Err(e) => return Err(unread(&stats, &e)),
        };
        let kvm = debug.join("kvm");
        let mut vms = vec![];
        for entry in std::fs::read_dir(&kvm).map_err(|e| unread(&kvm, &e))? {
            let folder = entry.map_err(|e| unread(&kvm, &e))?.path();
            let file = folder.join("havmsi");
            match std::fs::read_to_string(&file) {
                Ok(text) => vms.push(Vm::parse(folder, &text)?),
                // KVM's own counters, which are files; or a VM that has ended.
                Err(e) if gone(&e) || e.kind() == ErrorKind::NotADirectory => {}
                Err(e) => return Err(unread(&file, &e)),
            }
        }
        vms.sort_by_key(|vm| (vm.vm, vm.pid));
        Ok(Self { vms, monitor })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A host with two VMs, in a folder of its own.
    pub struct Fake(pub PathBuf);

    impl Fake {
        /// Makes it.
        pub fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("havmsi-{name}-{}", std::process::id()));
            let fake = Self(root);
            fake.file(
                "sys/kernel/debug/havmsi_stats",
                "vms 2\nvcpus 3\nprivate_pages 514\npool_pages 8\nshared_pages 1\nhost_pages 100\n",
            );
            fake.file("sys/kernel/debug/kvm/exits", "7\n");
            fake.vm("70-11", "0x10001", &"ab".repeat(32), [2, 513, 1, 8]);
            fake.vm("71-11", "0x10002", &"12".repeat(32), [1, 1, 0, 0]);
            fake.file(
                "sys/kernel/debug/kvm/70-11/havmsi_pages",
                "48000000-481fffff private 40000000\n48200000-48200fff private 40200000\n48201000-48201fff shared 40201000\n50000000-50007fff table\n",
            );
            fake.file(
                "sys/kernel/debug/kvm/71-11/havmsi_pages",
                "58000000-58000fff private 40000000\n",
            );
            for node in ["", "reserved-memory"] {
                fake.node(node, &[("#address-cells", &[2]), ("#size-cells", &[2])]);
            }
            // 512 MiB, of which 4 MiB are the monitor's.
            fake.node("memory@40400000", &[("reg", &[0, 0x4040_0000, 0, 0x1fc0_0000])]);
            fake.node(
                "reserved-memory/fw@5f000000",
                &[("reg", &[0, 0x5f00_0000, 0, 0x10_0000]), ("no-map", &[])],
            );
            fake.node("reserved-memory/cma@5e000000", &[("reg", &[0, 0x5e00_0000, 0, 0x10_0000])]);
            fake
        }

        fn vm(&self, folder: &str, vm: &str, digest: &str, counts: [u64; 4]) {
            let [vcpus, private, shared, pool] = counts;
            self.file(
                &format!("sys/kernel/debug/kvm/{folder}/havmsi"),
                format!("vm {vm}\nlaunched 1\ndigest {digest}\nvcpus {vcpus}\nprivate_pages {private}\nshared_pages {shared}\nsealed_pages 7\npool_pages {pool}\nfaults 9\nseals 8\nunseals 1\nintegrity_failures 0\nlaunches 1\nlater 4\n"),
            );
        }

        /// Writes a file.
        pub fn file(&self, path: &str, text: impl AsRef<[u8]>) {
            let path = self.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn node(&self, path: &str, properties: &[(&str, &[u32])]) {
            for (name, cells) in properties {
                let bytes: Vec<u8> = cells.iter().flat_map(|c| c.to_be_bytes()).collect();
                self.file(&format!("proc/device-tree/{path}/{name}"), bytes);
            }
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn vms_and_counts_are_read() {
        let fake = Fake::new("state");
        let state = State::read(&fake.0).unwrap();
        assert_eq!(
            state.vms.iter().map(|vm| (vm.vm, vm.pid)).collect::<Vec<_>>(),
            [(0x10001, 70), (0x10002, 71)]
        );
        let vm = &state.vms[0];
        assert_eq!((vm.launched, vm.count("private_pages"), vm.count("later")), (true, 513, 4));
        assert_eq!(vm.digest.as_deref(), Some("ab".repeat(32).as_str()));
        // All digits are decimal: still no count.
        assert!(!state.vms[1].counts.contains_key("digest"));
        assert_eq!(state.monitor["shared_pages"], 1);
        let runs = vm.runs().unwrap();
        assert_eq!(
            runs[2],
            Run {
                start: 0x4820_1000,
                end: 0x4820_2000,
                kind: Kind::Shared,
                guest: Some(0x4020_1000)
            }
        );
        assert_eq!((runs.len(), runs[3].guest), (4, None));
    }

    #[test]
    fn what_is_missing_has_its_own_status() {
        let fake = Fake::new("missing");
        let code = || State::read(&fake.0).err().map(|t| t.code());
        fake.file("sys/kernel/debug/kvm/70-11/havmsi", "vm 0x1\n");
        assert_eq!(code(), Some(1));
        std::fs::remove_file(fake.0.join("sys/kernel/debug/havmsi_stats")).unwrap();
        assert_eq!(code(), Some(3));
        std::fs::remove_dir_all(fake.0.join("sys/kernel/debug")).unwrap();
        assert_eq!(code(), Some(4));
    }

    #[test]
    fn broken_lines_are_no_runs() {
        for line in [
            "",
            "48000000 private 0",
            "48000fff-48000000 private 0",
            "48000000-48000fff private",
            "48000000-48000fff table 0",
            "48000000-48000fff mine 0",
            "48000000-ffffffffffffffff private 0",
            "x-48000fff private 0",
        ] {
            assert_eq!(run(line), None, "{line}");
        }
    }
}
