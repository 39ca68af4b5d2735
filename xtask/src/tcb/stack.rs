// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much of a CPU's stack the monitor can use: from the instructions of the image itself, so
//! that nothing depends on what a compiler says of its own code. A function's frame is all that
//! its instructions take off the stack pointer; the bound is the longest way through the calls.
//!
//! Calls through a pointer may lead to each function whose address is taken somewhere, those
//! through a table of a trait's methods (by the last load of the register above the call) to each
//! whose address lies in data. What the image can't show is how often a function is entered again: [`AGAIN`] says it, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _, SectionKind};
use serde::{Deserialize, Serialize};

use crate::{build, sh};

/// A function that is entered again before it has returned.
struct Again {
    name: &'static str,
    /// How often it can be on the stack at once.
    times: u64,
    why: &'static str,
}

/// All of them: another one makes the bound an error.
const AGAIN: [Again; 1] = [Again {
    name: "core::fmt::write",
    times: 5,
    why: "a line, its text and a number in it; and if that panics, the epitaph and its text",
}];

/// Labels of the assembly code where the stack is not in use yet, or begins anew: they take nothing
/// off it, jump to one another, and nobody calls them.
const HOMES: [&str; 6] = ["__image_start", "park", "secondary", "home", "resume", "broken"];
/// Where it begins again at the emergency stack's end.
const EMERGENCY: &str = "havmsi_monitor::exception::exception_from_self";
/// Offset of the first method in a trait's table.
const FIRST_METHOD: u64 = 24;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// Bytes that a CPU needs at most.
    pub bound: u64,
    /// Bytes that it has: without guard page and emergency stack.
    pub size: u64,
    /// The same for the end of a CPU whose stack may be what broke.
    pub emergency_bound: u64,
    /// Bytes of that.
    pub emergency_size: u64,
    /// The longest way: functions and their frames.
    pub way: Vec<(String, u64)>,
    /// Functions that are entered again, how often at most, and why no more.
    pub again: Vec<(String, u64, String)>,
}

impl Stack {
    /// Fails if a stack may be too small.
    pub fn verdict(&self) -> Result<()> {
        for (what, bound, size) in [
            ("a CPU's stack", self.bound, self.size),
            ("the emergency stack", self.emergency_bound, self.emergency_size),
        ] {
            if bound == 0 || bound > size {
                bail!("{what} has {size} bytes, and {bound} may be needed");
            }
        }
        Ok(())
    }
}

/// Whom an instruction may go to, but for a known function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Through {
    /// A pointer.
    Pointer,
    /// A table of methods.
    Methods,
}

#[derive(Default)]
struct Function {
    name: String,
    frame: u64,
    targets: BTreeSet<u64>,
    /// It calls itself, rather than going back to its start.
    again: bool,
    through: BTreeSet<Through>,
    /// Addresses that it computes.
    takes: BTreeSet<u64>,
}

/// A hexadecimal number at the start of a word.
fn hex(text: &str) -> Option<u64> {
    let text = text.trim_start_matches('#').trim_start_matches("0x");
    let end = text.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(text.len());
    u64::from_str_radix(text.get(..end)?, 16).ok()
}

/// An immediate, `#16` or `#0x10`.
fn immediate(text: &str) -> Option<u64> {
    let text = text.trim().strip_prefix('#')?;
    if text.starts_with("0x") { hex(text) } else { text.parse().ok() }
}

/// The functions of a disassembly.
#[derive(Default)]
struct Code(BTreeMap<u64, Function>);

impl Code {
    /// Of what objdump prints.
    fn parse(text: &str) -> Result<Self> {
        let mut code = Self::default();
        let mut at = None;
        let mut pages: BTreeMap<String, u64> = BTreeMap::new();
        // What was last done to a register.
        let mut last: BTreeMap<String, (String, String)> = BTreeMap::new();
        for line in text.lines() {
            if let Some((address, name)) = line.strip_suffix(">:").and_then(|l| l.split_once(" <"))
            {
                let address = u64::from_str_radix(address, 16).context("an address")?;
                code.0.insert(address, Function { name: name.to_owned(), ..Function::default() });
                at = Some(address);
                pages.clear();
                last.clear();
                continue;
            }
            let Some((_, instruction)) = line.split_once(":\t") else { continue };
            let Some(start) = at else { continue };
            let Some(function) = code.0.get_mut(&start) else { continue };
            let instruction = instruction.split("//").next().unwrap_or_default().trim();
            let (op, args) = instruction.split_once('\t').unwrap_or((instruction, ""));
            let args = args.trim();
            let (first, rest) = args.split_once(", ").unwrap_or((args, ""));
            function.stack(op, first, rest)?;
            match op {
                "bl" | "b" | "cbz" | "cbnz" | "tbz" | "tbnz" => {
                    let target = args.rsplit_once(" <").map_or(args, |(t, _)| t);
                    let target = target.rsplit(' ').next().and_then(hex).context("a branch")?;
                    function.targets.insert(target);
                    function.again |= op == "bl" && target == start;
                }
                _ if op.starts_with("b.") => {
                    function.targets.insert(hex(args).context("a branch")?);
                }
                "br" if HOMES.contains(&function.name.as_str()) => {}
                "blr" | "br" => match last.get(first) {
                    // A `match`: the place in the table is added to where the code is.
                    Some((by, from)) if op == "br" && by == "add" && !from.contains('#') => {}
                    Some((by, from)) if by == "ldr" && method(from) => {
                        function.through.insert(Through::Methods);
                    }
                    _ => {
                        function.through.insert(Through::Pointer);
                    }
                },
                "adrp" => {
                    pages.insert(first.to_owned(), hex(rest).context("a page")?);
                }
                "adr" => {
                    function.takes.insert(hex(rest).context("an address")?);
                }
                "add" => {
                    if let Some((base, n)) = rest.split_once(", ")
                        && let (Some(page), Some(n)) = (pages.get(base), immediate(n))
                    {
                        function.takes.insert(page + n);
                    }
                }
                _ => {}
            }
            let reads = ["b", "bl", "br", "blr", "cbz", "cbnz", "tbz", "tbnz", "tst"].contains(&op)
                || ["b.", "st", "cmp"].iter().any(|o| op.starts_with(o));
            if !reads {
                last.insert(first.to_owned(), (op.to_owned(), rest.to_owned()));
                if op == "ldp"
                    && let Some((second, from)) = rest.split_once(", ")
                {
                    last.insert(second.to_owned(), (op.to_owned(), from.to_owned()));
                }
            }
        }
        Ok(code)
    }

    /// The function that an address is in.
    fn at(&self, address: u64) -> Option<u64> {
        self.0.range(..=address).next_back().map(|(start, _)| *start)
    }

    fn named(&self, name: &str) -> Result<u64> {
        let found = self.0.iter().find(|(_, f)| f.name == name);
        found.map(|(at, _)| *at).with_context(|| format!("the image has no {name}"))
    }
}

/// Whether a load is one of a method: `[x1, #24]` and up.
fn method(from: &str) -> bool {
    let inside = from.strip_prefix('[').and_then(|f| f.strip_suffix(']'));
    let offset = inside.and_then(|f| f.split_once(", ")).and_then(|(_, n)| immediate(n));
    offset.is_some_and(|n| n >= FIRST_METHOD)
}

impl Function {
    /// What an instruction takes off the stack pointer.
    fn stack(&mut self, op: &str, first: &str, rest: &str) -> Result<()> {
        if first == "sp" {
            let by = rest.strip_prefix("sp, ");
            match (op, by) {
                ("sub", Some(n)) => {
                    let (n, shift) = n.split_once(", lsl #").unwrap_or((n, "0"));
                    let n =
                        immediate(n).with_context(|| format!("{}: sub sp, {rest}", self.name))?;
                    self.frame += n << shift.parse::<u32>()?;
                }
                // What is given back; what is compared.
                ("add", Some(n)) if n.starts_with('#') => {}
                ("cmp", _) => {}
                _ if HOMES.contains(&self.name.as_str()) => {}
                _ => bail!("{}: a stack of no fixed size ({op} sp, {rest})", self.name),
            }
        } else if let Some((_, at)) = rest.split_once("[sp, #-")
            && let Some(n) = at.strip_suffix("]!")
        {
            self.frame += n.parse::<u64>()?;
        }
        Ok(())
    }
}

/// Calls, resolved.
struct Calls<'a> {
    code: &'a Code,
    of: BTreeMap<u64, BTreeSet<u64>>,
    again: BTreeMap<u64, u64>,
}

/// The longest way from a function: its bytes, and the first step.
type Known = BTreeMap<(u64, Vec<u64>), (u64, Option<u64>)>;

impl Calls<'_> {
    /// The most that is on the stack from here on. `left`: how often the functions that are
    /// entered again still may be; `on`: those on the way here.
    fn from(&self, at: u64, left: &[u64], on: &mut Vec<u64>, known: &mut Known) -> Result<u64> {
        if let Some((bytes, _)) = known.get(&(at, left.to_vec())) {
            return Ok(*bytes);
        }
        let name = |at: &u64| self.code.0.get(at).map_or("", |f| f.name.as_str());
        let mut left_now = left.to_vec();
        if let Some(i) = self.again.keys().position(|f| *f == at) {
            left_now[i] -= 1;
            // Whoever is on the way may come again now.
            on.push(u64::MAX);
        }
        let since = on.iter().rposition(|f| *f == u64::MAX).map_or(0, |i| i + 1);
        if let Some(i) = on.iter().skip(since).position(|f| *f == at) {
            let round = on.get(since + i..).unwrap_or_default();
            let frame = |at: &u64| self.code.0.get(at).map_or(0, |f| f.frame);
            // A loop over labels of the assembly code takes nothing.
            if round.iter().map(frame).sum::<u64>() == 0 {
                return Ok(0);
            }
            let way: Vec<&str> = round.iter().map(name).collect();
            bail!("entered again, and nothing says how often: {} in {way:?}", name(&at));
        }
        on.push(at);
        let mut most = (0, None);
        for next in self.of.get(&at).into_iter().flatten() {
            let last = self.again.keys().position(|f| f == next).is_some_and(|i| left_now[i] == 0);
            if last {
                continue;
            }
            let bytes = self.from(*next, &left_now, on, known)?;
            if bytes > most.0 || most.1.is_none() {
                most = (bytes, Some(*next));
            }
        }
        on.pop();
        if on.last() == Some(&u64::MAX) {
            on.pop();
        }
        let bytes = most.0 + self.code.0.get(&at).map_or(0, |f| f.frame);
        known.insert((at, left.to_vec()), (bytes, most.1));
        Ok(bytes)
    }

    /// The way that [`Self::from`] found the longest.
    fn way(&self, from: u64, left: &[u64], known: &Known) -> Vec<(String, u64)> {
        let (mut at, mut left, mut way) = (Some(from), left.to_vec(), Vec::new());
        while let Some(here) = at {
            if let Some(f) = self.code.0.get(&here).filter(|f| f.frame > 0) {
                way.push((f.name.clone(), f.frame));
            }
            at = known.get(&(here, left.clone())).and_then(|(_, next)| *next);
            if let Some(i) = self.again.keys().position(|f| *f == here) {
                left[i] -= 1;
            }
        }
        way
    }
}

/// Sees whom each function may call. `data`: words of the image that are no instructions.
fn calls<'a>(code: &'a Code, data: &BTreeSet<u64>, again: &[Again]) -> Result<Calls<'a>> {
    let is_function = |at: &&u64| code.0.get(at).is_some_and(|f| !HOMES.contains(&f.name.as_str()));
    let methods: BTreeSet<u64> = data.iter().filter(is_function).copied().collect();
    let mut pointers = methods.clone();
    for f in code.0.values() {
        pointers.extend(f.takes.iter().filter(is_function));
    }
    let mut of = BTreeMap::new();
    for (start, f) in &code.0 {
        let mut next: BTreeSet<u64> = f.targets.iter().filter_map(|t| code.at(*t)).collect();
        if !f.again {
            next.remove(start);
        }
        for through in &f.through {
            next.extend(if *through == Through::Methods { &methods } else { &pointers });
        }
        of.insert(*start, next);
    }
    let again = again.iter().map(|a| Ok((code.named(a.name)?, a.times)));
    Ok(Calls { code, of, again: again.collect::<Result<_>>()? })
}

/// Bytes that a function and what it calls need, for a disassembly; and the way.
fn needs(calls: &Calls<'_>, start: u64) -> Result<(u64, Vec<(String, u64)>)> {
    let left: Vec<u64> = calls.again.values().copied().collect();
    let mut known = Known::new();
    let bytes = calls.from(start, &left, &mut Vec::new(), &mut known)?;
    Ok((bytes, calls.way(start, &left, &known)))
}

/// A constant of the monitor's source.
fn constant(source: &str, name: &str) -> Result<u64> {
    let line = source.split_once(&format!("const {name}: usize = ")).map(|(_, rest)| rest);
    let value = line.and_then(|l| l.split_once(';')).map(|(value, _)| value);
    let product = value.and_then(|v| {
        v.split('*').map(|n| n.trim().parse::<u64>().ok()).try_fold(1, |a, n| Some(a * n?))
    });
    product.with_context(|| format!("the monitor has no {name}"))
}

/// The stack of the monitor as it is built now.
pub fn stack(ctx: &crate::Ctx, monitor: &build::Monitor) -> Result<Stack> {
    let mut objdump = Command::new("aarch64-linux-gnu-objdump");
    objdump.args(["-d", "-C", "--no-show-raw-insn"]).arg(&monitor.elf);
    let code = Code::parse(&sh::output(&mut objdump)?)?;
    let elf = std::fs::read(&monitor.elf)?;
    let elf = object::File::parse(&*elf).context("the monitor's image")?;
    let mut data = BTreeSet::new();
    for section in elf.sections() {
        if matches!(section.kind(), SectionKind::ReadOnlyData | SectionKind::Data) {
            let (words, _) = section.data()?.as_chunks::<8>();
            data.extend(words.iter().map(|w| u64::from_le_bytes(*w)));
        }
    }
    let calls = calls(&code, &data, &AGAIN)?;
    let emergency = code.named(EMERGENCY)?;
    let mut most = (0, Vec::new());
    for start in code.0.keys().filter(|at| **at != emergency) {
        let found = needs(&calls, *start)?;
        if found.0 > most.0 {
            most = found;
        }
    }
    let source = std::fs::read_to_string(ctx.root.join("monitor/src/mmu.rs"))?;
    let (stride, emergency_size) =
        (constant(&source, "STACK_STRIDE")?, constant(&source, "EMERGENCY_STACK")?);
    Ok(Stack {
        bound: most.0,
        size: stride - emergency_size - havmsi_abi::PAGE_SIZE,
        emergency_bound: needs(&calls, emergency)?.0,
        emergency_size,
        way: most.1,
        again: AGAIN.iter().map(|a| (a.name.to_owned(), a.times, a.why.to_owned())).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
0000000000001000 <a>:\n\
    1000:\tstp\tx29, x30, [sp, #-32]!\n\
    1004:\tsub\tsp, sp, #0x10\n\
    1008:\tbl\t2000 <b>\n\
    100c:\tldp\tx29, x30, [sp], #32\n\
    1010:\tb\t3000 <c>\n\
0000000000002000 <b>:\n\
    2000:\tsub\tsp, sp, #0x1, lsl #12\n\
    2004:\tldr\tx8, [x1, #24]\n\
    2008:\tblr\tx8\n\
0000000000003000 <c>:\n\
    3000:\tadr\tx1, 4000 <d>\n\
    3004:\tldp\tx0, x8, [x8]\n\
    3008:\tblr\tx8\n\
0000000000004000 <d>:\n\
    4000:\tsub\tsp, sp, #0x100\n\
    4004:\tret\n\
0000000000005000 <e>:\n\
    5000:\tsub\tsp, sp, #0x40\n";

    fn bound(text: &str, data: u64, again: &[Again]) -> Result<u64> {
        let code = Code::parse(text)?;
        let calls = calls(&code, &BTreeSet::from([data]), again)?;
        Ok(needs(&calls, 0x1000)?.0)
    }

    #[test]
    fn frames_add_up_along_the_longest_way() {
        // b through a method is e, c through a pointer is d or e.
        assert_eq!(bound(TEXT, 0x5000, &[]).unwrap(), 48 + 4096 + 64);
        // Nothing in data: c's pointer alone.
        assert_eq!(bound(TEXT, 0, &[]).unwrap(), 48 + 4096);
        let without_b = TEXT.replace("bl\t2000 <b>", "nop");
        assert_eq!(bound(&without_b, 0, &[]).unwrap(), 48 + 256);
    }

    #[test]
    fn what_is_entered_again_needs_a_number() {
        let text = TEXT.replace("4004:\tret", "4004:\tbl\t4000 <d>").replace("bl\t2000 <b>", "nop");
        let error = bound(&text, 0, &[]).unwrap_err().to_string();
        assert!(error.contains("entered again"), "{error}");
        let again = |times| [Again { name: "d", times, why: "" }];
        assert_eq!(bound(&text, 0, &again(3)).unwrap(), 48 + 3 * 256);
        assert!(bound(&text, 0, &[Again { name: "x", times: 1, why: "" }]).is_err());
        // The same through two functions, none of which is named.
        let text = TEXT.replace("5000:\tsub\tsp, sp, #0x40", "5000:\tb\t2000 <b>");
        assert!(bound(&text, 0x5000, &[]).is_err());
    }

    #[test]
    fn a_frame_of_no_fixed_size_is_refused() {
        for odd in ["sub\tsp, sp, x1", "mov\tsp, x0", "add\tsp, x1, #0x10"] {
            assert!(Code::parse(&TEXT.replace("sub\tsp, sp, #0x40", odd)).is_err(), "{odd}");
        }
    }

    #[test]
    fn sizes_are_the_monitors() {
        let source = "pub const STACK_STRIDE: usize = 32 * 1024;\npub const E: usize = 2048;\n";
        assert_eq!(constant(source, "STACK_STRIDE").unwrap(), 32768);
        assert_eq!(constant(source, "E").unwrap(), 2048);
        assert!(constant(source, "X").is_err());
    }

    #[test]
    fn a_small_stack_is_a_failure() {
        let well =
            Stack { bound: 9, size: 9, emergency_bound: 1, emergency_size: 2, ..Stack::default() };
        assert!(well.verdict().is_ok());
        assert!(Stack { bound: 10, ..well.clone() }.verdict().is_err());
        assert!(Stack { emergency_bound: 3, ..well }.verdict().is_err());
    }
}
