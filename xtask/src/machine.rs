// SPDX-License-Identifier: MIT OR Apache-2.0
//! The emulated machine: QEMU's command line, its consoles, and its end.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use havmsi_abi::layout;

use crate::dtb::{self, RAM_BASE};
use crate::{setup, sh};

/// The two machines that a run compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The kernel at EL2, plain KVM, no monitor.
    Control,
    /// The monitor at EL3, the kernel at EL1.
    Havmsi,
    /// The kernel at EL1 and nothing above: no virtualisation at all.
    Bare,
}

impl Kind {
    /// Short name, for logs and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Havmsi => "havmsi",
            Self::Bare => "bare",
        }
    }
}

/// The DMA engine of the tests: it reaches 40 bits of addresses.
pub const EDU: &str = "edu,dma_mask=0xffffffffff";
/// Virtio 1 only, with addresses as any other device has them.
pub const VIRTIO: &str = "iommu_platform=on,disable-legacy=on";
/// Bytes of the disk that the host writes to.
const SCRATCH: u64 = 4 << 30;

/// What machine to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// With or without the monitor.
    pub kind: Kind,
    /// CPUs of the host.
    pub cpus: u32,
    /// RAM of the host.
    pub mem_mib: u64,
    /// GIC version, 2 or 3.
    pub gic: u32,
    /// QEMU's CPU model.
    pub cpu: String,
    /// Kernel image, or a bare-metal payload.
    pub kernel: PathBuf,
    /// The root of a Linux host: a disk image, which is only read.
    pub root: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// The monitor's image (`Kind::Havmsi`).
    pub monitor: Option<PathBuf>,
    /// What lies behind the kernel, from a page's start on, as if it were part of it.
    pub behind: Vec<u8>,
    /// The platform's secret, which VMs' keys are made from; without one the machine is new.
    pub secret: Option<[u8; 32]>,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

impl Config {
    /// Machine, CPU and memory; `more` is appended to the machine's options.
    pub fn machine_args(&self, command: &mut Command, more: &str) {
        let levels = match self.kind {
            Kind::Control => "virtualization=on",
            // All of PCI behind the SMMU, which is the monitor's.
            Kind::Havmsi => "secure=on,virtualization=on,iommu=smmuv3",
            Kind::Bare => "virtualization=off",
        };
        // PCI's windows below RAM only, where the host's stage-2 has blocks for them.
        let pci = "highmem-ecam=off,highmem-mmio=off";
        command
            .arg("-M")
            .arg(format!("virt,{levels},{pci},gic-version={}{more}", self.gic))
            .args(["-cpu", &self.cpu])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &format!("{}M", self.mem_mib)])
            .args(["-nic", "none"]);
    }

    /// The whole command, except for the consoles.
    fn command(&self, dir: &Path) -> Result<Command> {
        // QEMU ends when we do, even if we are killed without warning.
        let mut command = if sh::have("setpriv") {
            let mut c = Command::new("setpriv");
            c.args(["--pdeathsig", "KILL", "--"]).arg(setup::qemu());
            c
        } else {
            Command::new(setup::qemu())
        };
        self.machine_args(&mut command, "");
        command.args(["-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"]);
        match self.kind {
            Kind::Control | Kind::Bare => {
                command.arg("-kernel").arg(&self.kernel).args(["-append", &self.append]);
            }
            Kind::Havmsi => {
                let monitor =
                    self.monitor.as_ref().context("no monitor image for the protected machine")?;
                let dtb = dtb::build(self, dir)?;
                let ram = self.mem_mib << 20;
                command.arg("-bios").arg(monitor);
                let mut load = |file: &Path, address: u64| {
                    command
                        .arg("-device")
                        .arg(format!("loader,file={},addr={address:#x},force-raw=on", comma(file)));
                };
                // The loader writes all of the range that the monitor keeps after a reset,
                // gaps too, or a VM's data could be left in one.
                let (dtb_at, kernel_at) =
                    (layout::host_dtb(RAM_BASE, ram), layout::host_kernel(RAM_BASE, ram));
                let dtb_end = dtb_at + fs::metadata(&dtb)?.len();
                let kernel_end = kernel_at + fs::metadata(&self.kernel)?.len();
                let gap = kernel_end.next_multiple_of(4096) - kernel_end;
                let mut rest = vec![0; usize::try_from(gap)?];
                rest.extend(&self.behind);
                let images_end = (kernel_end + rest.len() as u64).next_multiple_of(4096);
                rest.resize(usize::try_from(images_end - kernel_end)?, 0);
                load(&dtb, dtb_at);
                load(&self.kernel, kernel_at);
                for (name, bytes, at) in [
                    ("dtb.pad", vec![0; usize::try_from(kernel_at - dtb_end)?], dtb_end),
                    ("kernel.pad", rest, kernel_end),
                ] {
                    if !bytes.is_empty() {
                        let file = dir.join(name);
                        fs::write(&file, bytes)?;
                        load(&file, at);
                    }
                }
                let seed = dir.join("seed.bin");
                fs::write(&seed, random::<64>()?)?;
                let secret = dir.join("secret.bin");
                fs::write(&secret, self.secret.map_or_else(random, Ok)?)?;
                command
                    .arg("-fw_cfg")
                    .arg(format!("name=opt/org.havmsi/ram-mib,string={}", self.mem_mib))
                    .arg("-fw_cfg")
                    .arg(format!("name=opt/org.havmsi/images,string={}", images_end - dtb_at))
                    .arg("-fw_cfg")
                    .arg(format!("name=opt/org.havmsi/seed,file={}", comma(&seed)))
                    .arg("-fw_cfg")
                    .arg(format!("name=opt/org.havmsi/secret,file={}", comma(&secret)));
            }
        }
        self.devices(&mut command, dir)?;
        command.args(&self.extra);
        Ok(command)
    }

    /// What is on PCI: a device whose DMA goes wherever it is told (QEMU's `edu`); for Linux
    /// its root, a disk to write to, and a network on which an echo answers and nobody else.
    /// `iommu_platform`: the device's addresses go through the SMMU, where there is one.
    fn devices(&self, command: &mut Command, dir: &Path) -> Result<()> {
        command.args(["-device", EDU]);
        let Some(root) = &self.root else { return Ok(()) };
        let scratch = dir.join("scratch.img");
        File::create(&scratch)?.set_len(SCRATCH)?;
        for (id, options, file) in [("root", ",readonly=on", root), ("scratch", "", &scratch)] {
            let file = comma(file);
            command.args(["-drive", &format!("if=none,id={id},format=raw{options},file={file}")]);
            command.args(["-device", &format!("virtio-blk-pci,drive={id},{VIRTIO}")]);
        }
        let echo = "user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:cat";
        command.args(["-netdev", echo]);
        command.args(["-device", &format!("virtio-net-pci,netdev=net,romfile=,{VIRTIO}")]);
        Ok(())
    }
}

/// Random bytes.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}

/// QEMU's options separate by commas: one in a file name is doubled.
pub fn comma(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A machine that is running.
#[derive(Debug)]
pub struct Machine {
    group: sh::Group,
    lines: Receiver<String>,
    dir: PathBuf,
}

/// Why waiting for a line ended.
#[derive(Debug)]
pub enum Event {
    /// A line of the host's console.
    Line(String),
    /// QEMU is gone; whether it ended well.
    End(bool),
    /// Nothing came in time.
    Silence,
}

impl Machine {
    /// Starts a machine with its console read by us; logs go to `dir`.
    pub fn start(config: &Config, dir: &Path) -> Result<Self> {
        setup::qemu_version()?;
        fs::create_dir_all(dir)?;
        let mut command = config.command(dir)?;
        command.args(["-chardev", "stdio,id=ns,signal=off", "-serial", "chardev:ns"]);
        command.arg("-serial").arg(format!("file:{}", comma(&Self::monitor_log_path(dir))));
        sh::write(&dir.join("command.txt"), format!("{}\n", sh::display(&command)))?;
        let errors = File::create(dir.join("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let start = Instant::now();
        let mut group = sh::Group::spawn(&mut command)?;
        let output = group.child.stdout.take().context("no pipe from QEMU")?;
        let mut log = File::create(dir.join("console.log"))?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                // A full disk must not stop the machine: the log is an extra.
                drop(writeln!(log, "[{:8.3}] {line}", start.elapsed().as_secs_f64()));
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { group, lines, dir: dir.to_path_buf() })
    }

    /// Where the secure console goes.
    pub fn monitor_log_path(dir: &Path) -> PathBuf {
        dir.join("monitor.log")
    }

    /// Waits for the next line or the end.
    pub fn next(&mut self, timeout: Duration) -> Result<Event> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => Ok(Event::Line(line)),
            Err(RecvTimeoutError::Timeout) => Ok(Event::Silence),
            Err(RecvTimeoutError::Disconnected) => {
                Ok(Event::End(self.group.child.wait()?.success()))
            }
        }
    }

    /// The secure console so far.
    pub fn monitor_log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("monitor.log")).unwrap_or_default())
            .into_owned()
    }

    /// An error that shows the last of all consoles.
    pub fn report(&self, what: &str) -> anyhow::Error {
        let mut text = format!("{what}\nlogs: {}", self.dir.display());
        for (title, name) in
            [("host console", "console.log"), ("monitor", "monitor.log"), ("QEMU", "qemu.log")]
        {
            let tail = sh::tail(&self.dir.join(name), 8);
            if !tail.trim().is_empty() {
                text.push_str(&format!("\n  last of {title}:\n{tail}"));
            }
        }
        anyhow::anyhow!(text)
    }
}

/// The line in which the monitor says that it stopped, if it did.
pub fn epitaph(log: &str) -> Option<&str> {
    log.lines().find(|l| l.contains("broken on CPU"))
}

/// Runs a machine on the user's own terminal (Ctrl-A X ends it).
pub fn shell(config: &Config, dir: &Path) -> Result<()> {
    setup::qemu_version()?;
    fs::create_dir_all(dir)?;
    let mut command = config.command(dir)?;
    // QEMU's monitor is multiplexed onto the console: Ctrl-A X ends QEMU.
    command.args([
        "-chardev",
        "stdio,id=ns,mux=on,signal=off",
        "-serial",
        "chardev:ns",
        "-mon",
        "chardev=ns,mode=readline",
    ]);
    command.arg("-serial").arg(format!("file:{}", comma(&dir.join("monitor.log"))));
    sh::write(&dir.join("command.txt"), format!("{}\n", sh::display(&command)))?;
    let status = command.status().context("cannot start QEMU")?;
    if !status.success() {
        bail!("QEMU failed ({status}); command line in {}", dir.join("command.txt").display());
    }
    Ok(())
}
