// SPDX-License-Identifier: GPL-2.0-or-later
//! A TCG plugin of QEMU: counts the instructions between two marks (`havmsi_operations::mark`) that
//! all CPUs execute, each at its exception level, and the changes of level.
//!
//! `-plugin FILE,out=RESULT` writes `RESULT` when QEMU ends: the groups that NEXT begins, in each the
//! numbers of instructions of its records, and all about the smallest one. Needs `-icount`: one
//! thread runs all CPUs.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use havmsi_operations::mark;
use qemu_plugin::install::{Args, Info, Value};
use qemu_plugin::sys::qemu_plugin_cb_flags as Flags;
use qemu_plugin::{
    HasCallbacks, PluginId, Register, RegisterDescriptor, Result, TranslationBlock, VCPUIndex,
    qemu_plugin_get_registers, qemu_plugin_register_atexit_cb, register,
};
use serde::Serialize;

/// A translated block. Its exception level never changes: it is part of what QEMU finds blocks by.
struct Block {
    /// `UNKNOWN` until it is executed between marks.
    level: AtomicUsize,
    /// Of its first and its last instruction.
    first: u64,
    last: u64,
}

const UNKNOWN: usize = usize::MAX;

/// An instruction of a block.
struct Instruction {
    block: &'static Block,
    address: u64,
    word: u32,
    /// How often it was executed in the record `record`.
    count: AtomicU64,
    record: AtomicU64,
}

/// One line of a record: an instruction at an exception level.
#[derive(Serialize, Clone, Copy)]
struct Line {
    level: usize,
    address: u64,
    word: u32,
    count: u64,
}

/// What a group gave.
#[derive(Serialize, Default)]
struct Group {
    /// Instructions of each record.
    instructions: Vec<u64>,
    /// Changes of exception level of the smallest record: from, to, how often.
    changes: Vec<(usize, usize, u64)>,
    /// Its instructions.
    lines: Vec<Line>,
    /// Ways from the end of a block to the start of another at the same level: level, from, to, how often.
    ways: Vec<(usize, u64, u64, u64)>,
}

#[derive(Default)]
struct State {
    groups: Vec<Group>,
    /// Instructions that were executed in the open record.
    touched: Vec<&'static Instruction>,
    /// The block that each CPU was last seen in, in the open record.
    blocks: BTreeMap<Vec<u8>, &'static Block>,
    changes: BTreeMap<(usize, usize), u64>,
    ways: HashMap<(usize, u64, u64), u64>,
}

impl State {
    fn start(&mut self) {
        self.touched.clear();
        self.blocks.clear();
        self.changes.clear();
        self.ways.clear();
        RECORD.fetch_add(1, Ordering::Relaxed);
    }

    fn stop(&mut self) {
        if !OPEN.load(Ordering::Relaxed) {
            return;
        }
        let total = self.touched.iter().map(|i| i.count.load(Ordering::Relaxed)).sum();
        if self.groups.is_empty() {
            self.groups.push(Group::default());
        }
        let Some(group) = self.groups.last_mut() else { return };
        if group.instructions.iter().all(|other| total < *other) {
            let line = |i: &&Instruction| Line {
                level: i.block.level.load(Ordering::Relaxed),
                address: i.address,
                word: i.word,
                count: i.count.load(Ordering::Relaxed),
            };
            group.lines = self.touched.iter().map(line).collect();
            group.changes = self.changes.iter().map(|((a, b), n)| (*a, *b, *n)).collect();
            group.ways = self.ways.iter().map(|((l, a, b), n)| (*l, *a, *b, *n)).collect();
        }
        group.instructions.push(total);
    }
}

static STATE: Mutex<Option<State>> = Mutex::new(None);
/// The number of the last record, and whether it is open. (QEMU could look at a condition of its own
/// ahead of a callback, but 10.0 translates wrongly with one.)
static RECORD: AtomicU64 = AtomicU64::new(0);
static OPEN: AtomicBool = AtomicBool::new(false);
static CPSR: OnceLock<RegisterDescriptor<'static>> = OnceLock::new();
/// What tells CPUs apart: the monitor or KVM's EL2 half keeps its own record of the CPU there. (The
/// index that callbacks get is the translating CPU's, when one thread runs all.)
static IDENTITY: OnceLock<RegisterDescriptor<'static>> = OnceLock::new();

fn state() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with<T: Default>(f: impl FnOnce(&mut State) -> T) -> T {
    state().as_mut().map(f).unwrap_or_default()
}

fn marked(mark: u16, block: &'static Block) {
    with(|state| match mark {
        mark::START => state.start(),
        mark::STOP => state.stop(),
        _ => state.groups.push(Group::default()),
    });
    OPEN.store(mark == mark::START, Ordering::Relaxed);
    // The rest of the mark's own block belongs to the record.
    block_executed(block);
}

fn read(register: &OnceLock<RegisterDescriptor<'static>>) -> Vec<u8> {
    register.get().and_then(|r| r.read().ok()).unwrap_or_default()
}

/// The exception level that the CPU is at.
fn level() -> usize {
    read(&CPSR).first().map_or(UNKNOWN, |b| usize::from(b >> 2 & 3))
}

fn block_executed(block: &'static Block) {
    if !OPEN.load(Ordering::Relaxed) {
        return;
    }
    if block.level.load(Ordering::Relaxed) == UNKNOWN {
        block.level.store(level(), Ordering::Relaxed);
    }
    let now = block.level.load(Ordering::Relaxed);
    with(|state| {
        let Some(before) = state.blocks.insert(read(&IDENTITY), block) else { return };
        let level = before.level.load(Ordering::Relaxed);
        if level == now {
            *state.ways.entry((now, before.last, block.first)).or_default() += 1;
        } else {
            *state.changes.entry((level, now)).or_default() += 1;
        }
    });
}

fn executed(instruction: &'static Instruction) {
    if !OPEN.load(Ordering::Relaxed) {
        return;
    }
    let record = RECORD.load(Ordering::Relaxed);
    if instruction.record.swap(record, Ordering::Relaxed) == record {
        instruction.count.fetch_add(1, Ordering::Relaxed);
    } else {
        instruction.count.store(1, Ordering::Relaxed);
        with(|state| state.touched.push(instruction));
    }
}

struct Plugin;

impl HasCallbacks for Plugin {
    fn on_vcpu_init(&mut self, _: PluginId, _: VCPUIndex) -> Result<()> {
        // They are the same for all CPUs.
        let mut all = qemu_plugin_get_registers()?;
        for (place, names) in [(&CPSR, ["cpsr", ""]), (&IDENTITY, ["TPIDR_EL3", "TPIDR_EL2"])] {
            let found = names.iter().find_map(|name| all.iter().position(|r| r.name == *name));
            if let Some(found) = found {
                let _known_already = place.set(all.swap_remove(found));
            }
        }
        Ok(())
    }

    fn on_translation_block_translate(&mut self, _: PluginId, tb: TranslationBlock) -> Result<()> {
        let last = tb.instructions().last().map_or(0, |insn| insn.vaddr());
        let block: &'static Block = Box::leak(Box::new(Block {
            level: AtomicUsize::new(UNKNOWN),
            first: tb.vaddr(),
            last,
        }));
        let executed_once = move |_| block_executed(block);
        tb.register_execute_callback_flags(executed_once, Flags::QEMU_PLUGIN_CB_R_REGS);
        for insn in tb.instructions() {
            let mut word = [0; 4];
            insn.read_data(&mut word);
            let word = u32::from_le_bytes(word);
            let instruction: &'static Instruction = Box::leak(Box::new(Instruction {
                block,
                address: insn.vaddr(),
                word,
                count: AtomicU64::new(0),
                record: AtomicU64::new(0),
            }));
            if let Some(mark) = mark::of(word) {
                let marked = move |_| marked(mark, block);
                insn.register_execute_callback_flags(marked, Flags::QEMU_PLUGIN_CB_R_REGS);
            } else {
                insn.register_execute_callback(move |_| executed(instruction));
            }
        }
        Ok(())
    }
}

impl Register for Plugin {
    fn register(&mut self, id: PluginId, args: &Args, _: &Info) -> Result<()> {
        let out = match args.parsed.get("out") {
            Some(Value::String(out)) => PathBuf::from(out),
            _ => panic!("havmsi-plugin: where to? out=FILE"),
        };
        *state() = Some(State::default());
        qemu_plugin_register_atexit_cb(id, move |_| {
            let groups = state().take().unwrap_or_default().groups;
            let text = serde_json::to_string(&groups).expect("numbers have a text");
            if let Err(e) = fs::write(&out, text) {
                eprintln!("havmsi-plugin: {}: {e}", out.display());
            }
        })
    }
}

register!(Plugin);
