// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TCB's size at each commit, out of git's objects: nothing is built for it. Which files belong
//! to the monitor is seen by its `mod` lines, as the compiler does; today's commit is counted both
//! ways, and both must agree.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{Count, count_assembly, count_rust, shipped};
use crate::{Ctx, sh};

/// Roots of the crates that are ours.
const ROOTS: [&str; 4] = [
    "monitor/src/main.rs",
    "crates/abi/src/lib.rs",
    "crates/core/src/lib.rs",
    "crates/hal/src/lib.rs",
];
/// What the image of the `virt` machine has not.
const NOT_HERE: [&str; 3] = [
    "#[cfg(feature = \"juno\")]",
    "#[cfg(feature = \"board-juno\")]",
    "#[cfg(any(test, feature = \"header\"))]",
];

/// One commit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Its short name.
    pub commit: String,
    /// Its day.
    pub date: String,
    /// Lines of Rust of ours.
    pub rust: usize,
    /// Of assembly.
    pub assembly: usize,
    /// `unsafe` blocks.
    pub unsafe_blocks: usize,
    /// Size of the image, where it was built for the table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_bytes: Option<u64>,
}

/// The files that `mod` lines and `include_str!` name, beside or below a file.
fn names(path: &str, text: &str) -> Vec<Vec<String>> {
    let folder = path.rsplit_once('/').map_or("", |(f, _)| f);
    let stem = path.strip_suffix(".rs").unwrap_or(path);
    let below = if stem.ends_with("/main") || stem.ends_with("/lib") { folder } else { stem };
    let source =
        NOT_HERE.iter().fold(text.to_owned(), |text, cfg| text.replace(cfg, "#[cfg(test)]"));
    let code = String::from_utf8_lossy(&shipped(&source)).into_owned();
    let mut found = Vec::new();
    for (line, original) in code.lines().zip(source.lines()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [.., "mod", name] = words.as_slice()
            && let Some(name) = name.strip_suffix(';')
        {
            found.push(vec![format!("{below}/{name}.rs"), format!("{below}/{name}/mod.rs")]);
        }
        // The inside of a string is blank in `code`.
        if line.contains("include_str!(\"")
            && let Some((_, rest)) = original.split_once("include_str!(\"")
            && let Some((name, _)) = rest.split_once('"')
        {
            found.push(vec![format!("{folder}/{name}")]);
        }
    }
    found
}

/// Counts a tree; `read` gives a file's text.
fn count_tree(mut read: impl FnMut(&str) -> Result<Option<String>>) -> Result<Count> {
    let mut todo: Vec<Vec<String>> = ROOTS.iter().map(|r| vec![(*r).to_owned()]).collect();
    let mut total = Count::default();
    while let Some(places) = todo.pop() {
        for path in places {
            let Some(text) = read(&path)? else { continue };
            if path.ends_with(".rs") {
                todo.extend(names(&path, &text));
                total.add(&count_rust(&text));
            } else {
                total.add(&Count { assembly: count_assembly(&text), ..Count::default() });
            }
            break;
        }
    }
    Ok(total)
}

/// Counts the files as they lie there now.
pub fn count_here(ctx: &Ctx) -> Result<Count> {
    count_tree(|path| {
        let path = ctx.root.join(path);
        path.is_file().then(|| std::fs::read_to_string(&path).context("a source")).transpose()
    })
}

fn git(ctx: &Ctx, args: &[&str]) -> Result<String> {
    sh::output(Command::new("git").args(args).current_dir(&ctx.root))
}

/// The commits of the first line of parents, the oldest first. `known` ones are not counted again.
pub fn history(ctx: &Ctx, known: &[Commit]) -> Result<Vec<Commit>> {
    let log = git(ctx, &["log", "--first-parent", "--reverse", "--format=%h %cs", "--abbrev=12"])?;
    let mut texts: BTreeMap<String, String> = BTreeMap::new();
    let mut all = Vec::new();
    for (commit, date) in log.lines().filter_map(|line| line.split_once(' ')) {
        if let Some(old) = known.iter().find(|c| c.commit == commit) {
            all.push(old.clone());
            continue;
        }
        let tree = git(ctx, &["ls-tree", "-r", commit, "monitor", "crates"])?;
        let blobs: BTreeMap<&str, &str> = tree
            .lines()
            .filter_map(|line| {
                let (head, path) = line.split_once('\t')?;
                Some((path, head.rsplit_once(' ')?.1))
            })
            .collect();
        let count = count_tree(|path| {
            let Some(blob) = blobs.get(path) else { return Ok(None) };
            if !texts.contains_key(*blob) {
                texts.insert((*blob).to_owned(), git(ctx, &["cat-file", "blob", blob])?);
            }
            Ok(texts.get(*blob).cloned())
        })?;
        all.push(Commit {
            commit: commit.to_owned(),
            date: date.to_owned(),
            rust: count.rust,
            assembly: count.assembly,
            unsafe_blocks: count.unsafe_blocks,
            image_bytes: None,
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_followed_as_the_compiler_does() {
        let files = BTreeMap::from([
            (
                "monitor/src/main.rs",
                "mod a;\n#[cfg(feature = \"board-juno\")]\nmod juno;\n#[cfg(test)]\nmod t;\n",
            ),
            ("monitor/src/a.rs", "mod b;\nglobal_asm!(include_str!(\"x.S\"));\n"),
            ("monitor/src/a/b.rs", "fn f() {\n    unsafe { g() }\n}\n"),
            ("monitor/src/x.S", "nop\n// comment\nret\n"),
            ("monitor/src/juno.rs", "fn not() {}\n"),
            ("crates/core/src/lib.rs", "const A: u8 = 1;\n"),
        ]);
        let count = count_tree(|path| Ok(files.get(path).map(|t| (*t).to_owned()))).unwrap();
        // 3 of main.rs, 1 of a.rs, 3 of b.rs, 1 of lib.rs.
        assert_eq!((count.rust, count.assembly, count.unsafe_blocks), (8, 3, 1));
    }
}
