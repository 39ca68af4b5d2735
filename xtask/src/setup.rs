// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the machine must have: list what is missing, then install it.

use std::fs;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{Ctx, apt, sh, ui};

/// A group of prerequisites that a verb can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Rust targets for the monitor and the arm64 programs.
    Targets,
    /// objcopy for the monitor's flat image.
    Binutils,
    /// Cross compiler and tools for the kernel, and its source.
    Kernel,
    /// The emulator.
    Qemu,
    /// Fetching and unpacking arm64 packages.
    Debs,
    /// clippy and rustfmt.
    Lints,
    /// libFuzzer's compiler.
    Cxx,
    /// What reads the compiler's counters.
    LlvmTools,
    /// The tool chain that has Miri.
    Miri,
}

/// Everything.
pub const ALL: &[Need] =
    &[Need::Targets, Need::Binutils, Need::Kernel, Need::Qemu, Need::Debs, Need::Lints];

/// Rust targets: EL3 and payload; arm64 user programs.
pub const TARGETS: [&str; 2] = ["aarch64-unknown-none-softfloat", "aarch64-unknown-linux-musl"];

/// The kernel's source package and the file that it brings.
pub const LINUX_PACKAGE: &str = "linux-source-6.12";
/// What the package installs.
pub const LINUX_SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Oldest QEMU that the machine was tried with.
const QEMU_MAJOR: u32 = 10;

/// Packages of the release itself; those of the newer suite are QEMU and the kernel's source.
fn packages(need: Need) -> &'static [&'static str] {
    match need {
        Need::Targets | Need::Lints | Need::Qemu | Need::LlvmTools | Need::Miri => &[],
        Need::Binutils => &["binutils-aarch64-linux-gnu"],
        Need::Kernel => &[
            "gcc-aarch64-linux-gnu",
            "gcc",
            "libc6-dev",
            "make",
            "flex",
            "bison",
            "bc",
            "perl",
            "patch",
            "xz-utils",
            "libssl-dev",
            "libelf-dev",
            "ccache",
        ],
        Need::Cxx => &["g++"],
        Need::Debs => &["dpkg", "apt", "e2fsprogs", "tar", "zstd"],
    }
}

/// The emulator to use: `$HAVMSI_QEMU`, else the one in the search path.
pub fn qemu() -> PathBuf {
    std::env::var_os("HAVMSI_QEMU")
        .map_or_else(|| PathBuf::from("qemu-system-aarch64"), PathBuf::from)
}

/// The emulator's version as it prints it; an error names the way out when it is unknown or too old.
pub fn qemu_version() -> Result<String> {
    let program = qemu();
    let text = sh::output(Command::new(&program).arg("--version")).with_context(|| {
        let way_out = if std::env::var_os("HAVMSI_QEMU").is_some() {
            "HAVMSI_QEMU names it; without that, `cargo xtask setup` installs one"
        } else {
            "`cargo xtask setup` installs it"
        };
        format!("{} can't be run: {way_out}", program.display())
    })?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    check_qemu_version(&line)?;
    Ok(line)
}

fn check_qemu_version(line: &str) -> Result<()> {
    let major = line
        .strip_prefix("QEMU emulator version ")
        .and_then(|v| v.split('.').next())
        .and_then(|v| v.parse::<u32>().ok());
    match major {
        Some(m) if m >= QEMU_MAJOR => Ok(()),
        Some(m) => bail!(
            "QEMU {m} is too old: HA-VMSI needs QEMU {QEMU_MAJOR} or newer ({line:?}).\n\
             `cargo xtask setup` installs one from Debian's backports; HAVMSI_QEMU names another binary."
        ),
        None => bail!(
            "unknown QEMU: `{} --version` says {line:?}.\n\
             HA-VMSI needs QEMU {QEMU_MAJOR} or newer; set HAVMSI_QEMU to one, or remove it from PATH and run `cargo xtask setup`.",
            qemu().display()
        ),
    }
}

fn installed(package: &str) -> bool {
    sh::output(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]))
        .is_ok_and(|s| s == "installed")
}

/// The tool chain that Miri is of, as rustup names it; nothing that is shipped is built with it.
pub const MIRI_TOOLCHAIN: &str = "nightly-2026-05-20";

/// What is missing for the given needs.
#[derive(Debug, Default)]
struct Missing {
    targets: Vec<&'static str>,
    components: Vec<&'static str>,
    toolchains: Vec<&'static str>,
    release: Vec<&'static str>,
    new: Vec<&'static str>,
}

impl Missing {
    fn find(needs: &[Need]) -> Result<Self> {
        let mut missing = Self::default();
        if needs.contains(&Need::Targets) {
            let sysroot = sh::output(Command::new("rustc").args(["--print", "sysroot"]))
                .context("no Rust compiler in PATH: install rustup (https://rustup.rs)")?;
            for target in TARGETS {
                if !PathBuf::from(sysroot.trim())
                    .join("lib/rustlib")
                    .join(target)
                    .join("lib")
                    .is_dir()
                {
                    missing.targets.push(target);
                }
            }
        }
        if needs.contains(&Need::Lints) {
            for (component, words) in
                [("clippy", ["clippy", "--version"]), ("rustfmt", ["fmt", "--version"])]
            {
                if sh::output(Command::new("cargo").args(words)).is_err() {
                    missing.components.push(component);
                }
            }
        }
        if needs.contains(&Need::LlvmTools) && !crate::coverage::have_tools() {
            missing.components.push("llvm-tools");
        }
        if needs.contains(&Need::Miri) {
            let miri = ["run", MIRI_TOOLCHAIN, "cargo", "miri", "--version"];
            if sh::output(Command::new("rustup").args(miri)).is_err() {
                missing.toolchains.push(MIRI_TOOLCHAIN);
            }
        }
        missing
            .release
            .extend(needs.iter().flat_map(|&n| packages(n)).copied().filter(|p| !installed(p)));
        missing.release.sort_unstable();
        missing.release.dedup();
        if needs.contains(&Need::Kernel) && !PathBuf::from(LINUX_SOURCE).is_file() {
            missing.new.push(LINUX_PACKAGE);
        }
        if needs.contains(&Need::Qemu) {
            let here = sh::have("qemu-system-aarch64") || std::env::var_os("HAVMSI_QEMU").is_some();
            let debian = installed("qemu-system-arm");
            // A QEMU that is too old is replaced if it is Debian's, and refused otherwise.
            if !here
                || (debian && qemu_version().is_err() && std::env::var_os("HAVMSI_QEMU").is_none())
            {
                missing.new.push("qemu-system-arm");
            }
        }
        Ok(missing)
    }

    fn is_empty(&self) -> bool {
        self.targets.is_empty()
            && self.components.is_empty()
            && self.toolchains.is_empty()
            && self.release.is_empty()
            && self.new.is_empty()
    }
}

/// How to become root for apt, or why not.
fn as_root() -> Result<Vec<&'static str>> {
    if rustix::process::geteuid().is_root() {
        return Ok(vec![]);
    }
    if sh::have("sudo") {
        let quiet = Command::new("sudo")
            .args(["-n", "true"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if quiet.is_ok_and(|s| s.success()) {
            return Ok(vec!["sudo", "-n"]);
        }
        if std::io::stdin().is_terminal() {
            return Ok(vec!["sudo"]);
        }
    }
    bail!(
        "packages are missing and this user can't install them (not root, and no sudo without a password here)"
    )
}

fn root_command(prefix: &[&'static str], args: &[&str]) -> Command {
    let mut words = prefix.iter().copied().chain(args.iter().copied());
    let mut command = Command::new(words.next().unwrap_or("true"));
    command.args(words);
    command
}

/// Makes sure that the machine has what is needed; says what is missing before installing it.
pub fn ensure(ctx: &Ctx, needs: &[Need]) -> Result<()> {
    let missing = Missing::find(needs)?;
    if !missing.is_empty() {
        install(ctx, &missing)?;
    }
    if needs.contains(&Need::Qemu) {
        qemu_version()?;
    }
    Ok(())
}

fn install(ctx: &Ctx, missing: &Missing) -> Result<()> {
    ui::say("missing on this machine:");
    for target in &missing.targets {
        ui::say(&format!("  Rust target {target}"));
    }
    for component in &missing.components {
        ui::say(&format!("  Rust component {component}"));
    }
    for toolchain in &missing.toolchains {
        ui::say(&format!("  Rust tool chain {toolchain} with Miri"));
    }
    for package in missing.release.iter().chain(&missing.new) {
        ui::say(&format!("  Debian package {package}"));
    }
    if !missing.targets.is_empty() {
        let mut command = Command::new("rustup");
        command.args(["target", "add"]).args(&missing.targets).current_dir(&ctx.root);
        let step = ui::Step::new("rustup target add", None);
        sh::run(&mut command, &ctx.log("setup.log")).context(
            "the Rust targets can't be added by rustup; with another tool chain manager install them by its own means",
        )?;
        step.done();
    }
    if !missing.components.is_empty() {
        let mut command = Command::new("rustup");
        command.args(["component", "add"]).args(&missing.components).current_dir(&ctx.root);
        sh::run(&mut command, &ctx.log("setup.log"))
            .context("the Rust components can't be added by rustup")?;
    }
    for toolchain in &missing.toolchains {
        let step = ui::Step::new(&format!("rustup toolchain install {toolchain}"), None);
        let mut command = Command::new("rustup");
        command.args(["toolchain", "install", toolchain, "--profile", "minimal"]);
        command.args(["-c", "miri", "-c", "rust-src", "--no-self-update"]);
        sh::run(&mut command, &ctx.log("setup.log"))
            .context("rustup can't install the tool chain that has Miri")?;
        step.done();
    }
    if missing.release.is_empty() && missing.new.is_empty() {
        return Ok(());
    }
    let codename = apt::codename()?;
    let suite = apt::new_suite(&codename);
    let entry = if missing.new.is_empty() {
        None
    } else {
        apt::backports_entry(&apt::machine_sources()?, &codename)?
    };
    let root = as_root().with_context(|| by_hand(missing, &suite, entry.as_deref()))?;
    let log = ctx.log("setup.log");
    if let Some(entry) = &entry {
        let place = "/etc/apt/sources.list.d/havmsi-backports.sources";
        ui::say(&format!("adding the suite {suite} as {place}"));
        let tmp = ctx.log_dir.join("havmsi-backports.sources");
        fs::create_dir_all(&ctx.log_dir)?;
        sh::write(&tmp, entry)?;
        sh::run(root_command(&root, &["install", "-m", "644"]).arg(&tmp).arg(place), &log)?;
    }
    let attached = root == ["sudo"];
    let apt_get = |args: &[&str]| -> Result<()> {
        let mut all = vec!["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"];
        all.extend(args);
        let mut command = root_command(&root, &all);
        if attached { sh::run_attached(&mut command) } else { sh::run(&mut command, &log) }
    };
    let step = ui::Step::new("apt-get update", None);
    apt_get(&["update"])?;
    step.done();
    let base = ["install", "-y", "--no-install-recommends"];
    if !missing.release.is_empty() {
        let step = ui::Step::new("apt-get install", None);
        apt_get(&[&base[..], &missing.release[..]].concat())?;
        step.done();
    }
    if !missing.new.is_empty() {
        let step = ui::Step::new(&format!("apt-get install from {suite}"), None);
        apt_get(&[&base[..], &["-t", &suite], &missing.new[..]].concat())?;
        step.done();
    }
    Ok(())
}

fn by_hand(missing: &Missing, suite: &str, entry: Option<&str>) -> String {
    let mut text = String::from("run this as root, then try again:\n");
    if let Some(entry) = entry {
        text.push_str(&format!(
            "  cat > /etc/apt/sources.list.d/havmsi-backports.sources <<'END'\n{entry}END\n"
        ));
    }
    text.push_str("  apt-get update\n");
    if !missing.release.is_empty() {
        text.push_str(&format!(
            "  apt-get install --no-install-recommends {}\n",
            missing.release.join(" ")
        ));
    }
    if !missing.new.is_empty() {
        text.push_str(&format!(
            "  apt-get install --no-install-recommends -t {suite} {}\n",
            missing.new.join(" ")
        ));
    }
    text
}

/// The `setup` verb: report, then install.
pub fn main(ctx: &Ctx, check_only: bool) -> Result<()> {
    let missing = Missing::find(ALL)?;
    let mark = |ok: bool| if ok { "ok     " } else { "MISSING" };
    for target in TARGETS {
        println!("{} Rust target {target}", mark(!missing.targets.contains(&target)));
    }
    for package in ALL.iter().flat_map(|&n| packages(n)) {
        println!("{} package {}", mark(!missing.release.contains(package)), package);
    }
    println!("{} package {LINUX_PACKAGE}", mark(!missing.new.contains(&LINUX_PACKAGE)));
    match qemu_version() {
        Ok(version) => println!("ok      {version}"),
        Err(e) => println!("MISSING qemu-system-aarch64: {e}"),
    }
    println!("        cache folder {}", ctx.cache.dir.display());
    if missing.is_empty() {
        qemu_version()?;
        println!("nothing is missing");
        return Ok(());
    }
    if check_only {
        bail!("something is missing: `cargo xtask setup` installs it");
    }
    install(ctx, &missing)?;
    qemu_version()?;
    println!("everything is installed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_versions() {
        assert!(check_qemu_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)").is_ok());
        assert!(check_qemu_version("QEMU emulator version 11.1.0").is_ok());
        let old = check_qemu_version("QEMU emulator version 7.2.9").unwrap_err().to_string();
        assert!(old.contains("too old"), "{old}");
        let odd = check_qemu_version("hello").unwrap_err().to_string();
        assert!(odd.contains("unknown QEMU"), "{odd}");
    }

    #[test]
    fn by_hand_names_the_commands() {
        let missing =
            Missing { release: vec!["make"], new: vec!["qemu-system-arm"], ..Missing::default() };
        let text = by_hand(&missing, "bookworm-backports", Some("Types: deb\n"));
        assert!(text.contains("apt-get install --no-install-recommends make"), "{text}");
        assert!(text.contains("-t bookworm-backports qemu-system-arm"), "{text}");
    }
}
