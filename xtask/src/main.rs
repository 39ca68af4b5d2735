// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask`: builds, runs and tests HA-VMSI on an emulated Arm machine.

mod apt;
mod assurance;
mod attack;
mod bench;
mod build;
mod cache;
mod cli_rows;
mod coverage;
mod cpio;
mod debian;
mod debs;
mod deny;
mod digest;
mod dtb;
mod failure;
mod fuzz;
mod fuzz_host;
mod fuzz_target;
mod image;
mod job;
mod kernel;
mod machine;
mod miri;
mod model;
mod mutants;
mod operate;
mod report;
mod rows;
mod run;
mod setup;
mod sh;
mod tcb;
mod test;
mod tool;
mod ui;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Builds, runs and tests HA-VMSI.
///
/// Every verb first makes sure that the machine has what it needs: it lists what is missing
/// and installs it (Debian packages as root or through sudo, Rust targets through rustup).
/// What is slow to build is kept in a cache folder: $HAVMSI_CACHE, else
/// $XDG_CACHE_HOME/havmsi, else ~/.cache/havmsi. $HAVMSI_QEMU names another QEMU,
/// $HAVMSI_KERNEL_DIR the folder of a kernel that is built already, which is then used as it is.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    /// Folder for logs and consoles [default: target/havmsi/logs/NNNN-VERB, also `latest`]
    #[arg(long, global = true, value_name = "DIR")]
    log: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Check this machine: list what is missing, then install it
    Setup {
        /// Only list; exit 1 if something is missing
        #[arg(long)]
        check: bool,
    },
    /// Build the monitor's image and the arm64 programs
    Build,
    /// Build the kernel (Debian's source, our series, one image for host and guests)
    Kernel {
        /// Only count the lines that the series touches
        #[arg(long)]
        stat: bool,
        /// Build the one that `bench` compares with: Debian's newest Linux 7.x, for pKVM
        #[arg(long, conflicts_with = "stat")]
        pkvm: bool,
    },
    /// Write the C header for Linux from crates/abi
    Header,
    /// Build the kernel and the root file systems of host and guest
    Image,
    /// Boot the emulated machine, start guests, attack them, compare with plain KVM
    Run(run::Args),
    /// Try every threat of the threat model, on a control and under HA-VMSI
    Attack(attack::Args),
    /// Count what operations of a VM cost, on plain KVM and under HA-VMSI
    Bench(bench::Args),
    /// Show where the instructions of operations are executed
    Profile(bench::profile::Args),
    /// Run all tests; the last line is `N passed, N failed`
    Test(test::Args),
    /// Look for what breaks, with random operations: calls of the real monitor, with an audit
    /// after each batch, or the pure crate beside its model
    Fuzz(fuzz::Args),
    /// Break the pure crate in a thousand ways, one at a time: some test must notice
    Mutants(mutants::Args),
    /// Explore every interleaving of the pure crate's transitions in small worlds
    Model(model::Args),
    /// Interpret the pure crate's unit tests with Miri
    Miri(miri::Args),
    /// See which lines of the pure crate its unit tests execute
    Coverage(coverage::Args),
    /// Check the licences and origins of all that is built with
    Deny(deny::Args),
    /// Compute the launch digest of a guest from its files and configuration
    Digest(digest::Args),
    /// Count what runs at EL3: lines of Rust and assembly, unsafe blocks, by crate, and the stack
    Tcb(tcb::Args),
    /// Take results of other verbs into docs/assurance.json; write docs/assurance.md
    Assurance(assurance::Args),
    /// Remove what was built
    Clean {
        /// Also empty the cache folder (kernel, images, downloads)
        #[arg(long)]
        cache: bool,
    },
}

impl Verb {
    fn name(&self) -> &'static str {
        match self {
            Self::Setup { .. } => "setup",
            Self::Build => "build",
            Self::Kernel { .. } => "kernel",
            Self::Header => "header",
            Self::Image => "image",
            Self::Run(_) => "run",
            Self::Attack(_) => "attack",
            Self::Bench(_) => "bench",
            Self::Profile(_) => "profile",
            Self::Test(_) => "test",
            Self::Fuzz(_) => "fuzz",
            Self::Mutants(_) => "mutants",
            Self::Model(_) => "model",
            Self::Miri(_) => "miri",
            Self::Coverage(_) => "coverage",
            Self::Deny(_) => "deny",
            Self::Digest(_) => "digest",
            Self::Tcb(_) => "tcb",
            Self::Assurance(_) => "assurance",
            Self::Clean { .. } => "clean",
        }
    }
}

/// What every verb gets.
#[derive(Debug)]
pub struct Ctx {
    /// The checkout.
    pub root: PathBuf,
    /// The cache folder.
    pub cache: cache::Cache,
    /// Where logs go.
    pub log_dir: PathBuf,
}

impl Ctx {
    /// A file in the log folder.
    pub fn log(&self, name: &str) -> PathBuf {
        self.log_dir.join(name)
    }

    /// Cargo's target folder.
    pub fn target_dir(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }
}

/// The `header` verb: crates/abi is the only source of the numbers.
fn header(ctx: &Ctx) -> Result<()> {
    let path = ctx.root.join("linux/files/arch/arm64/include/asm/havmsi_abi.h");
    let mut text = String::new();
    havmsi_abi::header::write(&mut text).context("the header can't be formatted")?;
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        println!("{} is up to date", path.display());
    } else {
        sh::write(&path, text)?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

fn clean(ctx: &Ctx, cache: bool) -> Result<()> {
    let dir = ctx.target_dir().join("havmsi");
    if dir.is_dir() {
        fs::remove_dir_all(&dir)?;
    }
    println!("removed {}", dir.display());
    if cache {
        let bytes = ctx.cache.clean()?;
        println!("emptied {} ({} MiB)", ctx.cache.dir.display(), bytes >> 20);
    } else {
        println!(
            "kept {} (--cache empties it); `cargo clean` removes Cargo's own results",
            ctx.cache.dir.display()
        );
    }
    Ok(())
}

/// Log folders that are kept.
const LOGS_KEPT: usize = 30;

/// The next log folder, `NNNN-verb`; `latest` points to it, and the oldest ones go.
fn new_log_dir(logs: &Path, verb: &str) -> Result<PathBuf> {
    fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let mut old: Vec<(u32, PathBuf)> = fs::read_dir(logs)?
        .filter_map(|e| {
            let path = e.ok()?.path();
            let number = path.file_name()?.to_str()?.split_once('-')?.0.parse().ok()?;
            Some((number, path))
        })
        .collect();
    old.sort();
    let mut number = old.last().map_or(0, |o| o.0);
    let dir = loop {
        number += 1;
        let dir = logs.join(format!("{number:04}-{verb}"));
        match fs::create_dir(&dir) {
            Ok(()) => break dir,
            // Another run was quicker.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("cannot create {}", dir.display())),
        }
    };
    let surplus = (old.len() + 1).saturating_sub(LOGS_KEPT);
    for (_, path) in old.iter().take(surplus) {
        // Old logs and the shortcut are a courtesy.
        drop(fs::remove_dir_all(path));
    }
    let latest = logs.join("latest");
    drop(fs::remove_file(&latest));
    drop(std::os::unix::fs::symlink(&dir, &latest));
    Ok(dir)
}

fn real_main() -> Result<()> {
    let cli = Cli::parse();
    sh::install_signal_handler()?;
    let root =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().context("no workspace")?.to_path_buf();
    let mut ctx = Ctx { root, cache: cache::Cache::open()?, log_dir: PathBuf::new() };
    ctx.log_dir = match cli.log {
        Some(dir) => std::path::absolute(dir)?,
        None => new_log_dir(&ctx.target_dir().join("havmsi/logs"), cli.verb.name())?,
    };
    match cli.verb {
        Verb::Setup { check } => setup::main(&ctx, check),
        Verb::Build => build::main(&ctx),
        Verb::Kernel { pkvm: true, .. } => kernel::pkvm::main(&ctx),
        Verb::Kernel { stat, .. } => kernel::main(&ctx, stat),
        Verb::Header => header(&ctx),
        Verb::Image => image::main(&ctx),
        Verb::Run(args) => run::main(&ctx, &args),
        Verb::Attack(args) => attack::main(&ctx, &args),
        Verb::Bench(args) => bench::main(&ctx, &args),
        Verb::Profile(args) => bench::profile::main(&ctx, &args),
        Verb::Test(args) => test::main(&ctx, &args),
        Verb::Fuzz(args) => fuzz::main(&ctx, &args),
        Verb::Mutants(args) => mutants::main(&ctx, &args),
        Verb::Model(args) => model::main(&ctx, &args),
        Verb::Miri(args) => miri::main(&ctx, &args),
        Verb::Coverage(args) => coverage::main(&ctx, &args),
        Verb::Deny(args) => deny::main(&ctx, &args),
        Verb::Digest(args) => digest::main(&ctx, &args),
        Verb::Tcb(args) => tcb::main(&ctx, &args),
        Verb::Assurance(args) => assurance::main(&ctx, &args),
        Verb::Clean { cache } => clean(&ctx, cache),
    }
}

fn main() -> ExitCode {
    match real_main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let text = e.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n  because: ");
            eprintln!("\nerror: {text}");
            if text.contains("No space left on device") || text.contains("StorageFull") {
                eprintln!(
                    "the disk is full: free some space, run `cargo xtask clean --cache`, or set HAVMSI_CACHE to another disk"
                );
            }
            ExitCode::FAILURE
        }
    }
}
