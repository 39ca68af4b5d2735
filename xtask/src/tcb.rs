// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counts what runs at EL3: the files that the compiler really read for the monitor and for
//! each crate that is linked into it. Blank lines, comments and tests don't count.

pub mod docs;
pub mod history;
pub mod stack;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::setup::{self, Need, TARGETS};
use crate::{Ctx, sh};

/// Options of `tcb`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Also each source file of ours
    #[arg(long)]
    pub files: bool,
    /// Write today's figures to docs/assurance.json, and what is made of them: docs/tcb.md,
    /// docs/assurance.md
    #[arg(long)]
    pub docs: bool,
}

/// Counted lines of one crate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Rust without blanks, comments, tests and inline assembly.
    pub rust: usize,
    /// Assembly: `.S` files and the text of `asm!` and its kin.
    pub assembly: usize,
    /// `unsafe { }` blocks.
    pub unsafe_blocks: usize,
    /// `unsafe fn`, `unsafe impl`, `unsafe extern` and `unsafe(...)` attributes.
    pub unsafe_items: usize,
}

impl Count {
    fn add(&mut self, other: &Self) {
        self.rust += other.rust;
        self.assembly += other.assembly;
        self.unsafe_blocks += other.unsafe_blocks;
        self.unsafe_items += other.unsafe_items;
    }
}

/// One crate that is linked into the monitor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Crate {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// In this repository.
    pub own: bool,
    /// Its size.
    #[serde(flatten)]
    pub count: Count,
    /// By source file.
    pub files: BTreeMap<String, Count>,
}

/// The whole.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Rust and assembly of ours.
    pub own_lines: usize,
    /// Of which Rust.
    pub own_rust: usize,
    /// Of which assembly.
    pub own_assembly: usize,
    /// `unsafe` blocks of ours.
    pub own_unsafe_blocks: usize,
    /// Lines of linked dependencies.
    pub dependency_lines: usize,
    /// By crate.
    pub crates: Vec<Crate>,
    /// Size of the loaded image in bytes.
    pub image_bytes: u64,
    /// What it needs of its stacks.
    pub stack: stack::Stack,
}

/// Counts the monitor as it is built now.
pub fn count(ctx: &Ctx) -> Result<Summary> {
    setup::ensure(ctx, &[Need::Targets])?;
    let monitor = crate::build::monitor(ctx)?;
    let image_bytes = fs::metadata(&monitor.image)?.len();
    let stack = stack::stack(ctx, &monitor)?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(&ctx.root)
        .args([
            "build",
            "--release",
            "-p",
            "havmsi-monitor",
            "--message-format=json",
            "--target",
            TARGETS[0],
        ])
        .stderr(Stdio::null());
    let messages = sh::output(&mut command).context("the monitor does not build")?;
    let mut crates: BTreeMap<(bool, String), Crate> = BTreeMap::new();
    for message in messages.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()) {
        let kinds: Vec<&str> = message["target"]["kind"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        if message["reason"] != "compiler-artifact"
            || !kinds.iter().any(|k| matches!(*k, "lib" | "rlib" | "bin"))
        {
            continue;
        }
        let Some(file) = message["filenames"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .find(|f| f.contains(TARGETS[0]))
        else {
            continue; // built for this machine: a build script's dependency
        };
        let name = message["target"]["name"].as_str().unwrap_or_default().to_owned();
        let manifest = PathBuf::from(message["manifest_path"].as_str().unwrap_or_default());
        let mut total = Count::default();
        let mut files = BTreeMap::new();
        for source in dep_info(Path::new(file), &name, &ctx.root)? {
            let text = fs::read_to_string(&source)
                .with_context(|| format!("cannot read {}", source.display()))?;
            let count = match source.extension().and_then(|e| e.to_str()) {
                Some("rs") => count_rust(&text),
                Some("S" | "s" | "asm") => {
                    Count { assembly: count_assembly(&text), ..Count::default() }
                }
                _ => continue,
            };
            total.add(&count);
            let short = source.strip_prefix(&ctx.root).unwrap_or(&source);
            files.insert(short.display().to_string(), count);
        }
        let own = manifest.starts_with(&ctx.root);
        let version = message["package_id"]
            .as_str()
            .and_then(|id| id.rsplit(['@', '#']).next())
            .unwrap_or_default()
            .to_owned();
        crates.insert((!own, name.clone()), Crate { name, version, own, count: total, files });
    }
    if !crates.values().any(|c| c.name == "havmsi-monitor") {
        bail!("Cargo did not report the monitor's own files");
    }
    let mut summary = Summary {
        image_bytes,
        stack,
        crates: crates.into_values().collect(),
        ..Summary::default()
    };
    for c in &summary.crates {
        if c.own {
            summary.own_rust += c.count.rust;
            summary.own_assembly += c.count.assembly;
            summary.own_unsafe_blocks += c.count.unsafe_blocks;
        } else {
            summary.dependency_lines += c.count.rust + c.count.assembly;
        }
    }
    summary.own_lines = summary.own_rust + summary.own_assembly;
    Ok(summary)
}

/// The source files that went into an artefact, from the compiler's own dependency file.
fn dep_info(artifact: &Path, name: &str, root: &Path) -> Result<BTreeSet<PathBuf>> {
    let dir = artifact.parent().context("artefact without a folder")?;
    let file = if artifact.extension().is_none() {
        // Cargo links a binary out of deps/, where its name ends in a hash. Builds with other
        // features lie there too: it is the one that is the same file.
        let deps = dir.join("deps");
        let prefix = format!("{}-", name.replace('-', "_"));
        let whole = fs::read(artifact)?;
        let mut found = None;
        for entry in fs::read_dir(&deps).with_context(|| format!("no {}", deps.display()))? {
            let path = entry?.path();
            let ours = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix));
            if ours && path.extension().is_none() && fs::read(&path)? == whole {
                found = Some(path.with_extension("d"));
                break;
            }
        }
        found.with_context(|| format!("no file in {} is {name}", deps.display()))?
    } else {
        let stem = artifact.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        let stem = stem.strip_prefix("lib").unwrap_or(stem);
        [dir.to_path_buf(), dir.join("deps")]
            .into_iter()
            .map(|d| d.join(format!("{stem}.d")))
            .find(|p| p.is_file())
            .with_context(|| format!("no dependency file for {name}"))?
    };
    let text = fs::read_to_string(file)?;
    let mut sources = BTreeSet::new();
    for line in text.lines() {
        // `path:` lines without prerequisites name each source once.
        if let Some(path) = line.strip_suffix(':') {
            sources.insert(root.join(path.replace("\\ ", " ")));
        }
    }
    Ok(sources)
}

fn count_assembly(text: &str) -> usize {
    let clean = strip(text, true);
    clean.lines().filter(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#')).count()
}

/// What a character of the source is part of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum In {
    Code,
    Line,
    Block(u32),
    Str,
    Raw(usize),
}

/// Blanks out comments; the inside of string literals becomes `~`.
fn strip(text: &str, assembly: bool) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut state = In::Code;
    let mut i = 0;
    while i < chars.len() {
        let (c, next) = (at(i), at(i + 1));
        match state {
            In::Code => match (c, next) {
                ('/', '/') => state = In::Line,
                ('/', '*') => {
                    state = In::Block(1);
                    i += 1;
                }
                ('"', _) => {
                    state = In::Str;
                    out.push('"');
                }
                ('r', '"' | '#') if !assembly && !ident(at(i.wrapping_sub(1))) => {
                    let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
                    out.push(c);
                    if at(i + 1 + hashes) == '"' {
                        state = In::Raw(hashes);
                        i += 1 + hashes;
                        out.push('"');
                    }
                }
                ('\'', _) if !assembly => {
                    // A character literal, not a lifetime: 'x' or '\...'.
                    let end = if next == '\\' {
                        (i + 3..i + 14).find(|&j| at(j) == '\'')
                    } else {
                        Some(i + 2).filter(|&j| at(j) == '\'')
                    };
                    match end {
                        Some(end) => {
                            out.push('~');
                            i = end;
                        }
                        None => out.push(c),
                    }
                }
                _ => out.push(c),
            },
            In::Line if c == '\n' => {
                state = In::Code;
                out.push(c);
            }
            In::Line => {}
            In::Block(depth) => match (c, next) {
                ('*', '/') => {
                    i += 1;
                    state = if depth == 1 { In::Code } else { In::Block(depth - 1) };
                }
                ('/', '*') => {
                    i += 1;
                    state = In::Block(depth + 1);
                }
                ('\n', _) => out.push(c),
                _ => {}
            },
            In::Str => match c {
                '\\' => {
                    out.push('~');
                    if next == '\n' {
                        out.push('\n');
                    }
                    i += 1;
                }
                '"' => {
                    state = In::Code;
                    out.push(c);
                }
                '\n' => out.push(c),
                _ => out.push('~'),
            },
            In::Raw(hashes) => {
                if c == '"' && (0..hashes).all(|k| at(i + 1 + k) == '#') {
                    i += hashes;
                    state = In::Code;
                    out.push('"');
                } else {
                    out.push(if c == '\n' { c } else { '~' });
                }
            }
        }
        i += 1;
    }
    out
}

fn ident(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// End of the bracketed group that opens at or after `from`, or of the item at a `;`. A match
/// arm ends at its comma, a `let` or `use` at its semicolon only.
fn item_end(text: &[u8], from: usize) -> usize {
    let rest = text.get(from..).unwrap_or_default().trim_ascii_start();
    let is = |words: &[&str]| words.iter().any(|w| rest.starts_with(w.as_bytes()));
    let (is_let, is_fn) = (is(&["let ", "use "]), is(&["fn ", "pub ", "pub(", "const "]));
    let mut depth = 0_i32;
    for (i, c) in text.iter().enumerate().skip(from) {
        match c {
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => {
                depth -= 1;
                if depth <= 0 && *c == b'}' && !is_let {
                    return i + 1;
                }
            }
            b';' if depth == 0 => return i + 1,
            b',' if depth == 0 && !is_let && !is_fn => return i + 1,
            _ => {}
        }
    }
    text.len()
}

fn blank(text: &mut [u8], from: usize, to: usize) {
    for c in text.iter_mut().take(to).skip(from).filter(|c| **c != b'\n') {
        *c = b' ';
    }
}

fn find_all(text: &str, word: &str) -> Vec<usize> {
    text.match_indices(word).map(|(i, _)| i).collect()
}

/// What only test monitors have, or the crate of `schedules/`.
const TEST_BUILDS: [&str; 6] = [
    "#[cfg(feature = \"leave-out\")]",
    "#[cfg(feature = \"audit\")]",
    "#[cfg(any(test, feature = \"audit\"))]",
    "#[cfg(feature = \"loom\")]",
    "#[cfg(feature = \"shuttle\")]",
    "#[cfg(any(test, feature = \"fake\"))]",
];

/// An attribute, a line of its own, that only test builds have.
const TEST_ATTRIBUTE: &str = "#[cfg_attr(any(test, feature = \"fake\"),";

/// A Rust file with blanks for what is no code, or none of the monitor's: comments, tests, what
/// only test monitors have ([`TEST_BUILDS`], and `left_out!(Check => ...);`, which is nothing
/// elsewhere). Lines stay where they are.
fn shipped(source: &str) -> Vec<u8> {
    let source =
        TEST_BUILDS.iter().fold(source.to_owned(), |text, cfg| text.replace(cfg, "#[cfg(test)]"));
    let source =
        source.lines().map(|line| if line.starts_with(TEST_ATTRIBUTE) { "" } else { line });
    let source: String = source.flat_map(|line| [line, "\n"]).collect();
    let mut text = strip(&source, false).into_bytes();
    text.iter_mut().filter(|c| !c.is_ascii()).for_each(|c| *c = b'~');
    let view = String::from_utf8_lossy(&text).into_owned();
    for start in find_all(&view, "#[cfg(test)]").into_iter().chain(find_all(&view, "#[test]")) {
        if text.get(start) != Some(&b'#') {
            continue; // inside of what is blank already
        }
        let end =
            item_end(&text, start + view.get(start..).and_then(|v| v.find(']')).unwrap_or(0) + 1);
        blank(&mut text, start, end);
    }
    for start in find_all(&view, "left_out!(") {
        let statement = view.get(start..).unwrap_or_default();
        // Its own name is all that is between the bracket and the arrow.
        let name = statement.get("left_out!(".len()..).unwrap_or_default();
        if name.trim_start_matches(ident).starts_with(" =>") {
            let from = view.get(..start).and_then(|v| v.rfind('\n')).map_or(0, |i| i + 1);
            let end = item_end(&text, start);
            let end = if text.get(end) == Some(&b';') { end + 1 } else { end };
            blank(&mut text, from, end);
        }
    }
    text
}

/// The numbers of the lines that the monitor has of a file.
pub fn shipped_lines(source: &str) -> BTreeSet<u32> {
    let text = String::from_utf8_lossy(&shipped(source)).into_owned();
    (1..).zip(text.lines()).filter(|(_, l)| !l.trim().is_empty()).map(|(n, _)| n).collect()
}

/// Counts one Rust file.
fn count_rust(source: &str) -> Count {
    let mut text = shipped(source);
    let mut count = Count::default();
    let view = String::from_utf8_lossy(&text).into_owned();
    for start in find_all(&view, "asm!") {
        let before = start.checked_sub(1).and_then(|i| text.get(i)).copied().unwrap_or(b' ');
        let Some(open) = view.get(start..).and_then(|v| v.find(['(', '{'])).map(|i| start + i)
        else {
            continue;
        };
        let mut depth = 0_i32;
        let mut end = open;
        for (i, c) in text.iter().enumerate().skip(open) {
            match c {
                b'(' | b'{' => depth += 1,
                b')' | b'}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                end = i + 1;
                break;
            }
        }
        let from = if before == b'_' || ident(char::from(before)) {
            start.saturating_sub(7)
        } else {
            start
        };
        let lines: Vec<&str> = view.get(from..end).unwrap_or_default().lines().collect();
        count.assembly += lines.iter().filter(|l| !l.trim().is_empty()).count();
        // One-line asm keeps its line as assembly only.
        let line_start = view.get(..from).and_then(|v| v.rfind('\n')).map_or(0, |i| i + 1);
        let line_end = view.get(end..).and_then(|v| v.find('\n')).map_or(view.len(), |i| end + i);
        let rest_is_empty = view
            .get(end..line_end)
            .unwrap_or_default()
            .chars()
            .all(|c| matches!(c, ';' | ' ' | '}' | ')' | ','));
        let head = view.get(line_start..from).unwrap_or_default();
        let head_is_small =
            head.trim().is_empty() || head.trim() == "unsafe {" || head.trim() == "core::arch::";
        count.unsafe_blocks += usize::from(head.trim() == "unsafe {");
        blank(
            &mut text,
            if head_is_small { line_start } else { from },
            if rest_is_empty { line_end } else { end },
        );
    }
    let view = String::from_utf8_lossy(&text).into_owned();
    for start in find_all(&view, "unsafe") {
        let before = start.checked_sub(1).and_then(|i| text.get(i)).copied().unwrap_or(b' ');
        let rest = view.get(start + 6..).unwrap_or_default();
        if ident(char::from(before)) || rest.starts_with(ident) {
            continue;
        }
        match rest.trim_start().chars().next() {
            Some('{') => count.unsafe_blocks += 1,
            Some(_) => count.unsafe_items += 1,
            None => {}
        }
    }
    count.rust = view.lines().filter(|l| !l.trim().is_empty()).count();
    count
}

/// The table for people.
pub fn table(s: &Summary, by_file: bool) -> String {
    let mut text = format!(
        "{:24} {:>8} {:>9} {:>14} {:>13}\n",
        "crate", "Rust", "assembly", "unsafe blocks", "unsafe items"
    );
    let mut line = |name: &str, c: &Count| {
        text.push_str(&format!(
            "{name:24} {:>8} {:>9} {:>14} {:>13}\n",
            c.rust, c.assembly, c.unsafe_blocks, c.unsafe_items
        ));
    };
    for own in [true, false] {
        let mut sum = Count::default();
        for c in s.crates.iter().filter(|c| c.own == own) {
            line(&format!("{} {}", c.name, if own { "" } else { &c.version }), &c.count);
            sum.add(&c.count);
            for (file, count) in c.files.iter().filter(|_| by_file && own) {
                line(
                    &format!("  {}", file.rsplit_once("src/").map_or(file.as_str(), |f| f.1)),
                    count,
                );
            }
        }
        line(if own { "= our own" } else { "= linked dependencies" }, &sum);
    }
    text.push_str(&format!(
        "\nown lines at EL3: {} (Rust {} + assembly {}); image: {} bytes\n\
         Not counted: blank lines, comments, tests; Rust's `core` and compiler-builtins.\n\
         Dependencies count every line of their files that were compiled, used or not.\n",
        s.own_lines, s.own_rust, s.own_assembly, s.image_bytes
    ));
    text.push_str(&format!(
        "stack: at most {} of {} bytes a CPU; {} of {} after an exception of EL3's own\n",
        s.stack.bound, s.stack.size, s.stack.emergency_bound, s.stack.emergency_size
    ));
    text
}

/// The `tcb` verb.
pub fn main(ctx: &Ctx, args: &Args) -> Result<()> {
    if args.docs {
        return crate::assurance::write(ctx, vec![], None);
    }
    let summary = count(ctx)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{}", table(&summary, args.files));
    }
    summary.stack.verdict()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_tests_counts() {
        let source = "#[cfg(test)]\nmod tests {\n    #[test]\n    fn t() {}\n}\nconst A: u8 = 1;\n";
        assert_eq!(count_rust(source).rust, 1);
    }

    #[test]
    fn blanks_comments_and_tests_do_not_count() {
        let source = "//! doc\n\n/* a\n b */\nfn a() {\n    let c = '\"'; // x\n    let s = \"// no { comment\";\n}\n\n\
            #[cfg(test)]\nmod tests {\n    fn t() { unsafe {} }\n}\n";
        assert_eq!(count_rust(source), Count { rust: 4, ..Count::default() });
    }

    #[test]
    fn what_only_test_monitors_have_does_not_count() {
        let source = "fn a() -> bool {\n    left_out!(A => return true);\n    crate::left_out!(B => if c { return d(1); });\n    \
            left_out!(C => {\n        e();\n    });\n    x() && !left_out!(D)\n}\n\
            #[cfg(feature = \"leave-out\")]\nfn f() -> R<(), E> {\n}\n#[cfg(feature = \"leave-out\")]\nlet a = if b { c } else {\n    d\n};\n#[cfg(feature = \"loom\")]\nuse a::{b, c};\n#[cfg(feature = \"other-one\")]\nfn g() {}\n\
            #[cfg_attr(any(test, feature = \"fake\"), derive(Clone))]\nstruct S;\n";
        assert_eq!(count_rust(source).rust, 6);
    }

    #[test]
    fn unsafe_and_assembly_are_counted_apart() {
        let source = "unsafe fn f() {\n    // SAFETY: x\n    unsafe {\n        core::arch::asm!(\n            \"msr x, {}\",\n            in(reg) 1,\n        );\n    }\n}\n\
            fn g() {\n    unsafe { asm!(\"isb\") }\n}\n";
        let c = count_rust(source);
        assert_eq!((c.unsafe_blocks, c.unsafe_items), (2, 1), "{c:?}");
        assert_eq!(c.assembly, 5, "{c:?}");
        assert_eq!(c.rust, 6, "{c:?}");
    }

    #[test]
    fn lifetimes_and_raw_strings() {
        let source = "fn f<'a>(x: &'a str) -> &'a str { x }\nconst S: &str = r#\"\n// in a string \"\n\"#;\n";
        assert_eq!(count_rust(source).rust, 4);
        assert_eq!(count_assembly("/* c */\n.globl x // y\n#include <z>\nx: ret\n\n"), 2);
    }
}
