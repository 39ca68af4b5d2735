// SPDX-License-Identifier: MIT OR Apache-2.0
//! docs/threats.md, written from a run's result.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use super::rows::ROWS;
use super::{Judged, Pair, Tries, Try, judge};
use crate::{Ctx, sh};

const HEAD: &str = "<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->
<!-- Written by `cargo xtask attack --docs` from the result of a run: don't edit. -->
# Attacks

Every threat is tried twice: on a control, where the attack has to succeed (or it would prove nothing), and under
HA-VMSI, where it has to be blocked, with the victim well and another VM started afterwards. The control is the same kernel
on plain KVM, or, where plain KVM has no such surface, a test build of the monitor with one check left out.
`cargo xtask attack` repeats all of it, `cargo xtask attack --only T14` one row.

";

/// Keeps what does not change from run to run: long numbers and addresses become an ellipsis.
fn steady(text: &str) -> String {
    let varies = |w: &str| {
        let digits = w.strip_prefix("0x").unwrap_or(w);
        !digits.is_empty()
            && (w.starts_with("0x") && digits.len() > 4 || digits.len() > 2)
            && digits.bytes().all(|b| b.is_ascii_hexdigit())
            && digits.bytes().any(|b| b.is_ascii_digit())
    };
    let mut out = String::new();
    let mut word = String::new();
    for c in text.chars().chain([' ']) {
        if c.is_ascii_alphanumeric() {
            word.push(c);
        } else {
            out.push_str(if varies(&word) { "…" } else { &word });
            word.clear();
            out.push(c);
        }
    }
    out.trim().replace('|', "\\|")
}

fn cell(pair: &Pair, evidence: bool) -> String {
    let side = |t: &Try| {
        if evidence { format!("{}: {}", t.result, steady(&t.evidence)) } else { t.result.clone() }
    };
    format!(
        "| `{}` | {} | {} | {} | {} | {} |\n",
        pair.name,
        pair.attacker,
        pair.what,
        pair.control_machine,
        side(&pair.control),
        side(&pair.havmsi)
    )
}

/// A row's line in the table at the top.
fn line(r: &Judged) -> String {
    let count = r.variants.len();
    format!("| {} | {} | {count} | {} | {} |\n", r.id, r.title, r.control, r.havmsi)
}

/// A row's section.
fn section(r: &Judged, evidence: bool) -> String {
    let mut out = format!("\n## {} {}\n\n", r.id, r.title);
    if let Some(reason) = &r.reason {
        out.push_str(&format!("Not run: {reason}.\n"));
        return out;
    }
    out.push_str(
        "| attack | by | what is tried | control | on the control | under HA-VMSI |\n|---|---|---|---|---|---|\n",
    );
    r.variants.iter().for_each(|p| out.push_str(&cell(p, evidence)));
    out
}

/// A row's line and section as an earlier run left them in the file.
fn earlier(file: &str, id: &str) -> Option<(String, String)> {
    let line = file.lines().find(|l| l.starts_with(&format!("| {id} |")))?;
    let from = file.find(&format!("\n## {id} "))?;
    let rest = file.get(from..)?;
    let to = rest.get(1..)?.find("\n## ").map_or(rest.len(), |i| i + 1);
    Some((format!("{line}\n"), rest.get(..to)?.to_owned()))
}

/// The text for all rows: what was run now, else what the file has.
fn text(rows: &[Judged], evidence: bool, file: &str) -> Result<String> {
    let mut out = HEAD.to_owned();
    out.push_str("| id | threat | attacks | control | HA-VMSI |\n|---|---|---|---|---|\n");
    let mut sections = String::new();
    for row in &ROWS {
        let (line, section) = match rows.iter().find(|r| r.id == row.id) {
            Some(r) => (line(r), section(r, evidence)),
            None => earlier(file, row.id).with_context(|| {
                format!("docs/threats.md has no {}, and it was not run now", row.id)
            })?,
        };
        out.push_str(&line);
        sections.push_str(&section);
    }
    Ok(out + &sections)
}

fn path(ctx: &Ctx) -> PathBuf {
    ctx.root.join("docs/threats.md")
}

/// Writes the file; rows that were not run stay as they are.
pub fn write(ctx: &Ctx, rows: &[Judged]) -> Result<()> {
    let file = fs::read_to_string(path(ctx)).unwrap_or_default();
    sh::write(&path(ctx), text(rows, true, &file)?)?;
    println!("wrote {}", path(ctx).display());
    Ok(())
}

/// Takes the evidence out of a committed file.
fn without_evidence(file: &str) -> String {
    let bare = |line: &str| {
        if !line.starts_with("| `") {
            return line.to_owned();
        }
        let cells: Vec<&str> = line.split(" | ").collect();
        let Some((rest, results)) = cells.split_last_chunk::<2>() else { return line.to_owned() };
        let word =
            |c: &str| c.split(':').next().unwrap_or_default().trim_end_matches(" |").to_owned();
        format!("{} | {} | {} |", rest.join(" | "), word(results[0]), word(results[1]))
    };
    file.lines().map(bare).collect::<Vec<_>>().join("\n") + "\n"
}

/// Compares the committed file with the rows, as they are when all is well.
pub fn check(ctx: &Ctx) -> Result<String> {
    let well = |result: &str| Try {
        result: result.to_owned(),
        victim_ok: true,
        new_vm_ok: true,
        ..Try::default()
    };
    let all = ROWS.iter().flat_map(|r| r.variants());
    let tries: Tries = all.map(|v| (v.name, (well("succeeded"), well("blocked")))).collect();
    let rows: Vec<Judged> = ROWS.iter().map(|r| judge(r, &tries)).collect();
    let wanted = text(&rows, false, "")?;
    let file = fs::read_to_string(path(ctx)).context("docs/threats.md")?;
    let found = without_evidence(&file);
    if let Some((w, f)) = wanted.lines().zip(found.lines()).find(|(w, f)| w != f) {
        bail!(
            "docs/threats.md has {f:?} where the rows have {w:?}: `cargo xtask attack --docs` writes it anew"
        );
    }
    if wanted.lines().count() != found.lines().count() {
        bail!(
            "docs/threats.md is longer or shorter than the rows: `cargo xtask attack --docs` writes it anew"
        );
    }
    Ok(format!("{} rows, {} attacks", ROWS.len(), tries.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_varies_is_left_out() {
        assert_eq!(
            steady(
                "1048576 pages looked at: 4096 + 0 pages, at PFN 0x487f2; x20 of EL1 is 0x66, 20 of 20"
            ),
            "… pages looked at: … + 0 pages, at PFN …; x20 of EL1 is 0x66, 20 of 20"
        );
        assert_eq!(
            steady("PAGE_MAP|process_vm_readv: EFAULT"),
            "PAGE_MAP\\|process_vm_readv: EFAULT"
        );
    }

    #[test]
    fn evidence_can_be_taken_out_again() {
        let t = |result: &str, evidence: &str| Try {
            result: result.to_owned(),
            evidence: evidence.to_owned(),
            victim_ok: true,
            new_vm_ok: true,
        };
        let tries: Tries = ROWS
            .iter()
            .flat_map(|r| r.variants())
            .map(|v| (v.name, (t("succeeded", "a: b | c"), t("blocked", "zeros; x: y"))))
            .collect();
        let rows: Vec<Judged> = ROWS.iter().map(|r| judge(r, &tries)).collect();
        let file = text(&rows, true, "").unwrap();
        assert_eq!(without_evidence(&file), text(&rows, false, "").unwrap());
        // A run of one row leaves the others as they are.
        assert_eq!(text(&rows[13..14], true, &file).unwrap(), file);
        assert!(text(&rows[13..14], true, "").is_err());
    }
}
