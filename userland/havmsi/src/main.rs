// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shows on a HA-VMSI host which VMs there are and who owns which memory, by what Linux says under
//! debugfs and in its device tree. That is hearsay: a compromised host says what it likes. The
//! digests that count are those on the monitor's own console.
#![forbid(unsafe_code)]

mod list;
mod map;
mod picture;
mod state;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use state::Trouble;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const CODES: &str = "Exit status: 0 done; 1 something could not be read or written; 2 wrong usage;
3 this kernel uses no HA-VMSI monitor; 4 debugfs is not mounted.

All of it is the host kernel's word. A launch digest that is to be trusted is on the monitor's console.";

/// VMs of a HA-VMSI host, and who owns which memory.
#[derive(Parser)]
#[command(name = "havmsi", version, after_help = CODES)]
struct Cli {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    list: ListArgs,
    /// Where the host's /sys and /proc are, if not in /
    #[arg(long, global = true, default_value = "/", value_name = "DIR")]
    root: PathBuf,
}

#[derive(Subcommand)]
enum What {
    /// All VMs: digest, vCPUs, pages by state, faults (also without this word)
    List(ListArgs),
    /// Physical memory by owner
    Map(MapArgs),
}

#[derive(Args)]
struct ListArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Again and again, every 2 or so many seconds; with --json a line each time
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

#[derive(Args)]
struct MapArgs {
    /// As a picture, to this file or to standard output
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with = "json")]
    svg: Option<Option<PathBuf>>,
    /// As JSON: all pieces of memory that are not the host's
    #[arg(long)]
    json: bool,
}

/// To standard output, in one piece.
fn say(text: &str) -> Result<(), Trouble> {
    let mut out = std::io::stdout().lock();
    let said = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    said.map_err(|e| match e.kind() {
        ErrorKind::BrokenPipe => Trouble::Unheard,
        _ => Trouble::Other(format!("standard output: {e}")),
    })
}

fn list(root: &Path, args: &ListArgs) -> Result<(), Trouble> {
    let clear = args.watch.is_some() && !args.json && std::io::stdout().is_terminal();
    loop {
        let state = state::State::read(root)?;
        let text = if args.json { list::json(&state)? } else { list::table(&state) };
        say(&format!("{}{text}", if clear { "\x1b[H\x1b[2J" } else { "" }))?;
        match args.watch {
            Some(seconds) => std::thread::sleep(Duration::from_secs(seconds)),
            None => return Ok(()),
        }
    }
}

fn show_map(root: &Path, args: &MapArgs) -> Result<(), Trouble> {
    let state = state::State::read(root)?;
    let map = map::Map::read(root, &state)?;
    match &args.svg {
        Some(Some(file)) => std::fs::write(file, picture::draw(&map, &state))
            .map_err(|e| Trouble::Other(format!("{}: {e}", file.display()))),
        Some(None) => say(&picture::draw(&map, &state)),
        None if args.json => say(&map.json(&state)?),
        None => say(&map.text(&state)),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.what.is_some() && (cli.list.json || cli.list.watch.is_some()) {
        let text = "options of a command come behind it";
        Cli::command().error(clap::error::ErrorKind::ArgumentConflict, text).exit();
    }
    let result = match &cli.what {
        None => list(&cli.root, &cli.list),
        Some(What::List(args)) => list(&cli.root, args),
        Some(What::Map(args)) => show_map(&cli.root, args),
    };
    match result {
        Ok(()) | Err(Trouble::Unheard) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("havmsi: {trouble}");
            trouble.code().into()
        }
    }
}
