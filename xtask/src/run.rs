// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `run` verb.

use std::time::Duration;

use anyhow::Result;
use clap::{Args as ClapArgs, ValueEnum};

use crate::machine::{self, Config, Kind, Machine};
use crate::setup::{self, Need};
use crate::{Ctx, build, image};

/// CPU models that the machine was tried with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cpu {
    /// The paper's core: Armv8.0, no VHE
    CortexA57,
    /// Armv8.2
    NeoverseN1,
    /// Everything that QEMU emulates; features that are not switched are hidden
    Max,
}

impl Cpu {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CortexA57 => "cortex-a57",
            Self::NeoverseN1 => "neoverse-n1",
            Self::Max => "max",
        }
    }
}

/// Options of `run`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Guests side by side
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub guests: u32,
    /// vCPUs of each guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub vcpus: u32,
    /// CPUs of the host
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: u32,
    /// RAM of the host in MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1024..=16384))]
    pub mem: u64,
    /// Interrupt controller
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub gic: u32,
    /// CPU model
    #[arg(long, value_enum, default_value_t = Cpu::CortexA57)]
    pub cpu: Cpu,
    /// Don't boot the control machine (plain KVM) for comparison
    #[arg(long, conflicts_with = "control")]
    pub no_control: bool,
    /// Boot only the control machine (plain KVM, no monitor)
    #[arg(long)]
    pub control: bool,
    /// A shell on the host instead of the guests and attacks (Ctrl-A X ends the machine)
    #[arg(long)]
    pub shell: bool,
    /// Another job for the host's agent (userland/README.md lists them)
    #[arg(long, default_value = "run")]
    pub job: String,
    /// More words for the host's kernel command line
    #[arg(long, default_value = "", value_name = "WORDS")]
    pub append: String,
}

impl Args {
    fn config(
        &self,
        kind: Kind,
        images: &image::Images,
        monitor: Option<&build::Monitor>,
        job: &str,
    ) -> Config {
        let append = format!(
            "console=ttyAMA0 panic=-1 {} havmsi.job={job} havmsi.guests={} havmsi.vcpus={} havmsi.gic={} {}",
            if kind == Kind::Havmsi { "kvm-arm.mode=havmsi" } else { "kvm-arm.mode=nvhe" },
            self.guests,
            self.vcpus,
            self.gic,
            self.append
        );
        Config {
            kind,
            cpus: self.cpus,
            mem_mib: self.mem,
            gic: self.gic,
            cpu: self.cpu.name().to_owned(),
            kernel: images.kernel.image(),
            initrd: images.host.clone(),
            append: append.trim_end().to_owned(),
            monitor: monitor.map(|m| m.image.clone()),
            extra: vec![],
        }
    }
}

/// The `run` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    setup::ensure(ctx, &[Need::Qemu, Need::Targets])?;
    let images = image::all(ctx)?;
    let kind = if args.control { Kind::Control } else { Kind::Havmsi };
    let monitor = if kind == Kind::Havmsi { Some(build::monitor(ctx)?) } else { None };
    let dir = ctx.log_dir.join(kind.name());
    if args.shell {
        return machine::shell(&args.config(kind, &images, monitor.as_ref(), "shell"), &dir);
    }
    let mut machine =
        Machine::start(&args.config(kind, &images, monitor.as_ref(), &args.job), &dir)?;
    machine.wait_for("the job's last event", Duration::from_secs(600), |line| {
        println!("{line}");
        line.starts_with("@havmsi ")
            .then(|| line.contains(r#""event":"done""#).then_some(()))
            .flatten()
    })
}
