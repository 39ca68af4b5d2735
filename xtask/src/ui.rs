// SPDX-License-Identifier: MIT OR Apache-2.0
//! Progress: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One long step of the work.
#[derive(Debug)]
pub struct Step {
    name: String,
    bar: ProgressBar,
    start: Instant,
    terminal: bool,
}

impl Step {
    /// Starts a step; `total` is the number of units if it is known.
    pub fn new(name: &str, total: Option<u64>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if !terminal {
            eprintln!("     … {name}");
            ProgressBar::hidden()
        } else if let Some(total) = total {
            let style = ProgressStyle::with_template(
                "     {spinner} {msg} [{bar:30}] {pos}/{len} {elapsed}",
            );
            ProgressBar::new(total)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        } else {
            let style = ProgressStyle::with_template("     {spinner} {msg} {elapsed}");
            ProgressBar::new_spinner()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        };
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { name: name.to_owned(), bar, start: Instant::now(), terminal }
    }

    /// Starts a step that is nearly always short: a line is printed only if it was not.
    pub fn short(name: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { name: name.to_owned(), bar, start: Instant::now(), terminal: false }
    }

    /// Adds one unit; the total grows with it when the estimate was short.
    pub fn inc(&self) {
        self.bar.inc(1);
        if let Some(len) = self.bar.length()
            && self.bar.position() > len
        {
            self.bar.set_length(self.bar.position());
        }
    }

    /// Says what the step is busy with (terminal only).
    pub fn note(&self, text: &str) {
        self.bar.set_message(format!("{}: {text}", self.name));
    }

    /// Ends the step.
    pub fn done(self) {
        let seconds = self.start.elapsed().as_secs_f32();
        self.bar.finish_and_clear();
        if self.terminal || seconds > 2.0 {
            eprintln!("     ✓ {} ({seconds:.1} s)", self.name);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Prints one line of narration.
pub fn say(text: &str) {
    eprintln!("     {text}");
}
