// SPDX-License-Identifier: MIT OR Apache-2.0
//! The reference: what the monitor promises, in maps and sets and without a
//! table, a lock or a bit of the hardware. Written from `docs/abi.md` and the
//! design's invariants, not from the monitor's code, so that both don't have the
//! same mistake.
//!
//! A call that must be refused gives all reasons that apply; which of them the
//! monitor names is its own choice. A call without a reason must succeed.

use std::collections::{BTreeMap, BTreeSet};

use havmsi_abi::Error::{self, Again, Busy, Denied, Integrity, Invalid, NoMemory, State};
use havmsi_abi::{
    Entry, EntryFlags, Exit, ExitClass, MAX_PAGES_PER_CALL, MAX_PAGES_PER_MAP, PAGE_SIZE,
};
use sha2::{Digest as _, Sha256};

/// A VM's handle.
pub type Handle = u64;
/// The first and the last word of a page: as much as is looked at.
pub type Content = [u64; 2];

/// Whose page it is (I1), and for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    Host,
    RunPage(Handle),
    Table(Handle),
    Private(Handle),
    /// A VM's, which lends it to the host.
    Shared(Handle),
    /// Another CPU has it in motion.
    Moving,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Open,
    Active,
    /// What came back for a page was not what was sealed.
    Stopped,
    Resetting,
    Destroying,
}

/// What the host took away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gone {
    /// A shared page: any may come in its place.
    Shared,
    /// What was sealed with this number, and what the guest had there.
    Sealed(usize, Content),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Power {
    Off,
    /// Starts at `pc` with `x0` to `x3`.
    Pending(u64, [u64; 4]),
    On,
}

const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;
const MMIO_GUARD: u64 = 0xc600_0007;
/// SMCCC's.
const INVALID_PARAMETER: u64 = (-3_i64).cast_unsigned();

/// What comes of a guest's call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Called {
    /// `x0` to `x3`.
    Answered([u64; 4]),
    /// The host hears of it, and may answer.
    Forwarded,
    /// This page must be mapped first.
    Missing(u64),
}

/// What the last exit lets the host answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question {
    Nothing,
    /// Register, bytes, sign extended, to 64 bits.
    Load(usize, u32, bool, bool),
    Store,
    SysregRead(usize),
    SysregWrite,
    /// An SGI was sent; the guest goes on.
    Sgi,
    Hypercall,
}

/// What a guest's CPU sees of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registers {
    pub x: [u64; 31],
    pub pc: u64,
}

#[derive(Clone, Debug)]
pub struct Vcpu {
    pub run_page: u64,
    boot: Option<(u64, [u64; 4])>,
    pub power: Power,
    pub running: bool,
    pub registers: Registers,
    pub question: Question,
    /// The vCPU that this one has turned on, until the host's answer.
    starting: Option<u64>,
    /// SGIs that were sent to it and not delivered.
    sgis: [u64; 16],
}

#[derive(Clone, Debug)]
pub struct Vm {
    pub phase: Phase,
    pub max_vcpus: u64,
    pub gic: u64,
    pub bits: u64,
    pub ram: Vec<(u64, u64)>,
    pub vcpus: BTreeMap<u64, Vcpu>,
    /// I4: where each private page is.
    pub private: BTreeMap<u64, u64>,
    /// Places whose page was taken away.
    pub gone: BTreeMap<u64, Gone>,
    pub devices: BTreeSet<u64>,
    /// Runs of pages where the guest wants devices: first page and end.
    guards: Vec<(u64, u64)>,
    /// The 2 MiB and 1 GiB regions that have a table.
    blocks: BTreeSet<u64>,
    gibs: BTreeSet<u64>,
    /// Table memory, spare or not.
    pub tables: BTreeSet<u64>,
    /// What was measured: IPA and content of the image's pages.
    image: Vec<(u64, Content)>,
    /// Calls since the teardown began.
    steps: u64,
}

impl Vm {
    pub fn is_ram(&self, ipa: u64) -> bool {
        self.ram.iter().any(|(base, size)| ipa >= *base && ipa - base < *size)
    }

    /// Whether the host may emulate what is at the page.
    pub fn emulated(&self, ipa: u64) -> bool {
        let page = ipa / PAGE_SIZE * PAGE_SIZE;
        self.guards.is_empty() || self.guards.iter().any(|(from, to)| (*from..*to).contains(&page))
    }

    fn running(&self) -> bool {
        self.vcpus.values().any(|v| v.running)
    }

    /// Tables that a leaf at `ipa` needs beyond those that are there.
    fn tables_missing(&self, ipa: u64) -> u64 {
        u64::from(!self.gibs.contains(&(ipa >> 30)))
            + u64::from(!self.blocks.contains(&(ipa >> 21)))
    }

    pub fn spare(&self) -> u64 {
        (self.tables.len() - self.gibs.len() - self.blocks.len()) as u64
    }

    fn add_tables(&mut self, ipa: u64) {
        self.gibs.insert(ipa >> 30);
        self.blocks.insert(ipa >> 21);
    }

    /// Whether a leaf can come to `ipa`.
    fn place(&self, ipa: u64, no: &mut Reasons) {
        if self.private.contains_key(&ipa) || self.devices.contains(&ipa) {
            no.because(Denied);
        } else if self.tables_missing(ipa) > self.spare() {
            no.because(NoMemory);
        }
    }

    fn forget_launch(&mut self) {
        self.image.clear();
        self.gone.clear();
        self.devices.clear();
        self.guards.clear();
        for vcpu in self.vcpus.values_mut() {
            vcpu.boot = None;
            vcpu.power = Power::Off;
            vcpu.starting = None;
            vcpu.sgis = [0; 16];
        }
    }
}

/// Why a call must be refused; empty if it must not.
#[derive(Default, Debug)]
pub struct Reasons(pub Vec<Error>);

impl Reasons {
    fn because(&mut self, error: Error) {
        self.0.push(error);
    }

    /// The VM must be in one of these phases.
    fn unless(&mut self, phases: &[Phase], vm: &Vm) {
        let error = if vm.phase == Phase::Stopped { Integrity } else { State };
        self.when(!phases.contains(&vm.phase), error);
    }

    fn when(&mut self, bad: bool, error: Error) {
        if bad {
            self.because(error);
        }
    }

    pub fn none(&self) -> bool {
        self.0.is_empty()
    }
}

fn is_page(n: u64) -> bool {
    n.is_multiple_of(PAGE_SIZE)
}

/// The machine as the host and the guests know it.
pub struct Model {
    /// The host's RAM at boot; all else is the monitor's or no RAM.
    pub owners: BTreeMap<u64, Owner>,
    /// Of pages of the host and of VMs that are not zero.
    pub contents: BTreeMap<u64, Content>,
    pub vms: BTreeMap<Handle, Vm>,
    /// Every handle that ever was.
    pub handles: Vec<Handle>,
}

pub struct Stats {
    pub vms: u64,
    pub vcpus: u64,
    pub private: u64,
    pub table: u64,
    pub shared: u64,
    pub host: u64,
}

impl Model {
    pub fn new(host: impl Iterator<Item = u64>) -> Self {
        Self {
            owners: host.map(|pa| (pa, Owner::Host)).collect(),
            contents: BTreeMap::new(),
            vms: BTreeMap::new(),
            handles: Vec::new(),
        }
    }

    pub fn content(&self, pa: u64) -> Content {
        self.contents.get(&pa).copied().unwrap_or_default()
    }

    fn own(&mut self, pa: u64, owner: Owner) {
        self.owners.insert(pa, owner);
    }

    fn wipe(&mut self, pa: u64) {
        self.contents.remove(&pa);
    }

    /// Whether the host can give the page away.
    fn hosts(&self, pa: u64, no: &mut Reasons) {
        no.when(!is_page(pa), Invalid);
        match self.owners.get(&pa) {
            Some(Owner::Host) => {}
            Some(Owner::Moving) => no.because(Again),
            _ => no.because(Denied),
        }
    }

    /// The VM, or why there is none.
    fn vm(&mut self, handle: Handle) -> Result<(&mut Vm, Reasons), Reasons> {
        match self.vms.get_mut(&handle) {
            Some(vm) => Ok((vm, Reasons::default())),
            None => Err(Reasons(vec![Invalid])),
        }
    }

    pub fn create(&mut self, slots: usize, max_vcpus: u64, gic: u64, bits: u64) -> Reasons {
        let mut no = Reasons::default();
        no.when(!(1..=64).contains(&max_vcpus), Invalid);
        no.when(![0, 2, 3].contains(&gic), Invalid);
        no.when(!(32..=40).contains(&bits), Invalid);
        no.when(self.vms.len() >= slots, NoMemory);
        no
    }

    pub fn created(&mut self, handle: Handle, max_vcpus: u64, gic: u64, bits: u64) {
        assert!(!self.handles.contains(&handle), "handle {handle:#x} is given a second time");
        self.handles.push(handle);
        let vm = Vm {
            phase: Phase::Open,
            max_vcpus,
            gic,
            bits,
            ram: vec![],
            vcpus: BTreeMap::new(),
            private: BTreeMap::new(),
            gone: BTreeMap::new(),
            devices: BTreeSet::new(),
            guards: vec![],
            blocks: BTreeSet::new(),
            gibs: BTreeSet::new(),
            tables: BTreeSet::new(),
            image: vec![],
            steps: 0,
        };
        self.vms.insert(handle, vm);
    }

    pub fn add_ram(&mut self, handle: Handle, ipa: u64, size: u64) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.unless(&[Phase::Open], vm);
        let end = u128::from(ipa) + u128::from(size);
        no.when(!is_page(ipa) || !is_page(size) || size == 0, Invalid);
        no.when(end > 1 << vm.bits, Invalid);
        if no.none() && vm.ram.contains(&(ipa, size)) {
            return no;
        }
        // Around all device pages no RAM comes any more.
        let first = vm.devices.first().copied().unwrap_or(0);
        let last = vm.devices.last().map_or(0, |d| d + PAGE_SIZE);
        let meets = |base: u64, to: u64| u128::from(base) < end && ipa < to;
        no.when(vm.ram.iter().any(|(base, size)| meets(*base, base + size)), Invalid);
        no.when(!vm.devices.is_empty() && meets(first, last), Invalid);
        no.when(vm.ram.len() >= 8, NoMemory);
        if no.none() {
            vm.ram.push((ipa, size));
        }
        no
    }

    pub fn vcpu_create(&mut self, handle: Handle, idx: u64, page: u64) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.when(idx >= vm.max_vcpus, Invalid);
        no.unless(&[Phase::Open], vm);
        no.when(vm.vcpus.contains_key(&idx), State);
        self.hosts(page, &mut no);
        if no.none() {
            self.own(page, Owner::RunPage(handle));
            let vcpu = Vcpu {
                run_page: page,
                boot: None,
                power: Power::Off,
                running: false,
                registers: Registers { x: [0; 31], pc: 0 },
                question: Question::Nothing,
                starting: None,
                sgis: [0; 16],
            };
            self.vm(handle).expect("it is there").0.vcpus.insert(idx, vcpu);
        }
        no
    }

    pub fn set_boot(&mut self, handle: Handle, idx: u64, pc: u64, x: [u64; 4]) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.unless(&[Phase::Open], vm);
        no.when(!vm.vcpus.contains_key(&idx), Invalid);
        if no.none()
            && let Some(vcpu) = vm.vcpus.get_mut(&idx)
        {
            vcpu.boot = Some((pc, x));
        }
        no
    }

    /// POPULATE (`image`) and PAGE_MAP: pages come in (I5, I7), all or none. The page holds
    /// what was sealed with the number `given`, and its tag comes along.
    pub fn donate(
        &mut self,
        handle: Handle,
        ipa: u64,
        (pa, size): (u64, u64),
        image: bool,
        given: Option<usize>,
    ) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.unless(&[if image { Phase::Open } else { Phase::Active }], vm);
        no.when(!is_page(ipa), Invalid);
        no.when(image && vm.image.last().is_some_and(|(last, _)| ipa <= *last), Invalid);
        no.when(!is_page(size) || size / PAGE_SIZE > MAX_PAGES_PER_MAP || size == 0, Invalid);
        if no.0.contains(&Invalid) {
            return no;
        }
        // What lies in one range of RAM and has one table.
        no.when(ipa >> 21 != ipa.saturating_add(size - 1) >> 21, Invalid);
        let whole = |(base, bytes): &(u64, u64)| {
            ipa >= *base && size <= *bytes && ipa - base <= bytes - size
        };
        no.when(!vm.ram.iter().any(whole), Denied);
        let pages = (0..size).step_by(PAGE_SIZE as usize);
        let pages = pages.map(|at| (ipa.wrapping_add(at), pa.wrapping_add(at)));
        pages.clone().for_each(|(ipa, _)| vm.place(ipa, &mut no));
        // What was taken away comes back alone.
        no.when(size > PAGE_SIZE && vm.gone.range(ipa..ipa + size).next().is_some(), Denied);
        pages.clone().for_each(|(_, pa)| self.hosts(pa, &mut no));
        if !no.none() {
            // A lack of tables is told only about pages that could come.
            if no.0.iter().any(|error| *error != NoMemory) {
                no.0.retain(|error| *error != NoMemory);
            }
            return no;
        }
        let (vm, _) = self.vm(handle).expect("it is there");
        let gone = vm.gone.get(&ipa).copied();
        if let Some(Gone::Sealed(number, _)) = gone
            && given != Some(number)
        {
            vm.phase = Phase::Stopped;
            no.because(Integrity);
            return no;
        }
        vm.gone.remove(&ipa);
        let shared = gone == Some(Gone::Shared);
        for (ipa, pa) in pages {
            let content = self.content(pa);
            match gone {
                None if image => {}
                None => self.wipe(pa),
                Some(Gone::Shared) => {}
                Some(Gone::Sealed(_, content)) => drop(self.contents.insert(pa, content)),
            }
            self.own(pa, if shared { Owner::Shared(handle) } else { Owner::Private(handle) });
            let (vm, _) = self.vm(handle).expect("it is there");
            vm.add_tables(ipa);
            vm.private.insert(ipa, pa);
            if image {
                vm.image.push((ipa, content));
            }
        }
        no
    }

    /// The digest that an owner would compute.
    fn digest(vm: &Vm) -> [u8; 32] {
        let mut pages = Sha256::new();
        for (ipa, [first, last]) in &vm.image {
            if [*first, *last] != [0, 0] {
                pages.update(ipa.to_le_bytes());
                pages.update(first.to_le_bytes());
                pages.update([0; 4080]);
                pages.update(last.to_le_bytes());
            }
        }
        let mut ram = vm.ram.clone();
        ram.sort_unstable();
        let mut numbers = vec![vm.bits, vm.gic, vm.max_vcpus, ram.len() as u64];
        numbers.extend(ram.into_iter().flat_map(|(base, size)| [base, size]));
        let first = vm.devices.first().copied().unwrap_or(0);
        numbers.extend([first, vm.devices.last().map_or(0, |last| last + PAGE_SIZE - first)]);
        for (idx, vcpu) in &vm.vcpus {
            if let Some((pc, x)) = vcpu.boot {
                numbers.extend([*idx, pc]);
                numbers.extend(x);
            }
        }
        let mut all = Sha256::new();
        all.update(b"HA-VMSI launch 1");
        numbers.into_iter().for_each(|n| all.update(n.to_le_bytes()));
        all.update(pages.finalize());
        all.finalize().into()
    }

    pub fn activate(&mut self, handle: Handle) -> Result<[u8; 32], Reasons> {
        let (vm, mut no) = self.vm(handle)?;
        no.unless(&[Phase::Open], vm);
        no.when(vm.vcpus.values().all(|v| v.boot.is_none()), State);
        if !no.none() {
            return Err(no);
        }
        vm.phase = Phase::Active;
        for vcpu in vm.vcpus.values_mut() {
            vcpu.power = vcpu.boot.map_or(Power::Off, |(pc, x)| Power::Pending(pc, x));
        }
        Ok(Self::digest(vm))
    }

    /// PAGE_UNMAP: where, in which page, and whether it was shared; if it is sealed it
    /// gets this number.
    pub fn unmap(
        &mut self,
        handle: Handle,
        ipa: u64,
        n: u64,
        number: usize,
    ) -> Result<Option<(u64, u64, Gone)>, Reasons> {
        let (vm, mut no) = self.vm(handle)?;
        no.when(n > MAX_PAGES_PER_CALL || !is_page(ipa), Invalid);
        no.when(u128::from(ipa) + u128::from(n) * 4096 > 1 << vm.bits, Invalid);
        if !no.none() {
            return Err(no);
        }
        let first = vm.private.range(ipa..ipa + n * PAGE_SIZE).next().map(|(ipa, pa)| (*ipa, *pa));
        let Some((ipa, pa)) = first else { return Ok(None) };
        let content = self.content(pa);
        let gone = match self.owners[&pa] {
            Owner::Shared(_) => Gone::Shared,
            _ => Gone::Sealed(number, content),
        };
        let (vm, _) = self.vm(handle)?;
        vm.private.remove(&ipa);
        vm.gone.insert(ipa, gone);
        self.own(pa, Owner::Host);
        Ok(Some((ipa, pa, gone)))
    }

    pub fn map_device(&mut self, handle: Handle, ipa: u64) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.unless(&[Phase::Open, Phase::Active], vm);
        no.when(!is_page(ipa) || ipa >> vm.bits != 0, Invalid);
        no.when(vm.gic != 2 || vm.is_ram(ipa), Denied);
        vm.place(ipa, &mut no);
        if no.none() {
            vm.add_tables(ipa);
            vm.devices.insert(ipa);
        }
        no
    }

    pub fn donate_pool(&mut self, handle: Handle, pa: u64, n: u64) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.unless(&[Phase::Open, Phase::Active], vm);
        no.when(!(1..=MAX_PAGES_PER_CALL).contains(&n), Invalid);
        let pages: Vec<u64> = (0..n.min(33)).map(|i| pa.wrapping_add(i * PAGE_SIZE)).collect();
        pages.iter().for_each(|page| self.hosts(*page, &mut no));
        if no.none() {
            for page in pages {
                self.wipe(page);
                self.own(page, Owner::Table(handle));
                self.vm(handle).expect("it is there").0.tables.insert(page);
            }
        }
        no
    }

    /// One call of VM_RESET or VM_DESTROY. `result` is what the monitor said,
    /// `back` are the VM's pages that are the host's now: how much one call
    /// does is the monitor's choice, within bounds.
    pub fn teardown(
        &mut self,
        handle: Handle,
        destroy: bool,
        result: Result<(), Error>,
        back: &[u64],
    ) {
        let Ok((vm, _)) = self.vm(handle) else {
            assert_eq!(result, Err(Invalid), "teardown of no VM");
            assert!(back.is_empty());
            return;
        };
        let refused = if vm.running() {
            Some(Busy)
        } else if !destroy && vm.phase == Phase::Destroying {
            Some(State)
        } else {
            None
        };
        if let Some(why) = refused {
            // A reset of a running VM that is being destroyed can't be.
            assert_eq!(result, Err(why));
            assert!(back.is_empty(), "a refused teardown took pages");
            return;
        }
        vm.phase = if destroy { Phase::Destroying } else { Phase::Resetting };
        vm.steps += 1;
        // 32 private pages or one table a call, then 32 tables a call.
        let most = vm.blocks.len() + (vm.private.len() + vm.tables.len()) / 32 + 4;
        assert!(
            result == Ok(()) || (result == Err(Again) && vm.steps <= 200 + most as u64),
            "teardown does not end: {result:?}"
        );
        vm.private.retain(|_, pa| !back.contains(pa));
        vm.tables.retain(|pa| !back.contains(pa));
        let mut private = back.len();
        for pa in back {
            let table = self.owners[pa] == Owner::Table(handle);
            assert!(!table || destroy, "a reset gave table memory away");
            private -= usize::from(table);
            let (Owner::Table(h) | Owner::Private(h) | Owner::Shared(h)) = self.owners[pa] else {
                panic!("{pa:#x} comes back from {:?}", self.owners[pa]);
            };
            assert_eq!(h, handle);
            self.wipe(*pa);
            self.own(*pa, Owner::Host);
        }
        assert!(private <= 32 && back.len() <= 64, "too many pages in one call");
        if result.is_err() {
            return;
        }
        let (vm, _) = self.vm(handle).expect("it is there");
        assert!(vm.private.is_empty(), "private pages survive a teardown");
        vm.blocks.clear();
        vm.gibs.clear();
        vm.forget_launch();
        vm.steps = 0;
        vm.phase = Phase::Open;
        if destroy {
            assert!(vm.tables.is_empty(), "table memory survives its VM");
            let vm = self.vms.remove(&handle).expect("it is there");
            for vcpu in vm.vcpus.values() {
                self.own(vcpu.run_page, Owner::Host);
            }
        }
    }

    /// Pages of the VM that a teardown may give back.
    pub fn pages_of(&self, handle: Handle) -> Vec<u64> {
        let vm = self.vms.get(&handle);
        vm.map_or(vec![], |vm| vm.private.values().chain(&vm.tables).copied().collect())
    }

    pub fn stats(&self) -> Stats {
        let (mut private, mut table, mut shared) = (0, 0, 0);
        for owner in self.owners.values() {
            private += u64::from(matches!(owner, Owner::Private(_)));
            table += u64::from(matches!(owner, Owner::Table(_)));
            shared += u64::from(matches!(owner, Owner::Shared(_)));
        }
        Stats {
            vms: self.vms.len() as u64,
            vcpus: self.vms.values().map(|vm| vm.vcpus.len() as u64).sum(),
            private,
            table,
            shared,
            host: self.owners.len() as u64 - private - table - shared,
        }
    }

    /// VCPU_RUN with this entry half of the run page, on a CPU with `lrs` list
    /// registers.
    pub fn run(&mut self, handle: Handle, idx: u64, entry: &Entry, lrs: u64) -> Reasons {
        let (vm, mut no) = match self.vm(handle) {
            Ok(found) => found,
            Err(no) => return no,
        };
        no.unless(&[Phase::Active], vm);
        let gic = vm.gic;
        // A page that is to be unshared and is not there: the guest calls again.
        let again = vm.vcpus.get(&idx).is_some_and(|vcpu| {
            let [function, ipa, ..] = vcpu.registers.x;
            function & 0xffff_ffff == MEM_UNSHARE
                && entry.gpr[0] == 0
                && is_page(ipa)
                && vm.is_ram(ipa)
                && !vm.private.contains_key(&ipa)
        });
        let Some(vcpu) = vm.vcpus.get_mut(&idx) else {
            no.because(Invalid);
            return no;
        };
        no.when(vcpu.running, Busy);
        no.when(vcpu.power == Power::Off, State);
        if !no.none() {
            // Whoever may not run it learns nothing about its last exit.
            return no;
        }
        // A vCPU that starts has asked nothing.
        let question = match vcpu.power {
            Power::On => vcpu.question,
            _ => Question::Nothing,
        };
        let flags = entry.flags.0;
        let answer = flags & EntryFlags::ANSWERS;
        no.when(flags & !EntryFlags::ALL != 0 || answer.count_ones() > 1, Invalid);
        let allowed = match question {
            Question::Nothing => 0,
            Question::Load(..) | Question::Store => EntryFlags::COMPLETE | EntryFlags::INJECT_SEA,
            Question::SysregRead(_) | Question::SysregWrite => {
                EntryFlags::COMPLETE | EntryFlags::INJECT_UNDEF
            }
            Question::Hypercall | Question::Sgi => EntryFlags::COMPLETE,
        };
        no.when(answer & !allowed != 0, Invalid);
        no.when(!lrs_allowed(gic, entry, if gic == 0 { 0 } else { lrs }), Invalid);
        if !no.none() {
            return no;
        }
        // SGIs that were not sent.
        let used = entry.nr_lr as usize;
        let pending = pending_sgis(&entry.lr[..used]);
        no.when(pending.iter().any(|id| vcpu.sgis[*id] == 0), Invalid);
        if !no.none() {
            return no;
        }
        pending.iter().for_each(|id| vcpu.sgis[*id] -= 1);
        vcpu.running = true;
        vcpu.question = Question::Nothing;
        if let Power::Pending(pc, x) = vcpu.power {
            vcpu.registers = Registers { x: [0; 31], pc };
            vcpu.registers.x[..4].copy_from_slice(&x);
            vcpu.power = Power::On;
        }
        let again = again && question == Question::Hypercall;
        let complete = answer == EntryFlags::COMPLETE && !again;
        let mut unshared = None;
        let x = &mut vcpu.registers.x;
        match question {
            Question::Load(rt, size, signed, wide) if complete && rt != 31 => {
                x[rt] = extended(entry.data, size, signed, wide);
            }
            Question::SysregRead(rt) if complete && rt != 31 => x[rt] = entry.data,
            Question::Hypercall if complete => {
                let called = [x[0] & 0xffff_ffff, x[1]];
                x[..4].copy_from_slice(&entry.gpr);
                if called[0] == MEM_UNSHARE && entry.gpr[0] == 0 {
                    unshared = Some(called[1]);
                }
            }
            _ => {}
        }
        // Without an answer the call comes again; an SGI was sent at once.
        if complete && question != Question::Sgi {
            vcpu.registers.pc += 4;
        }
        if question == Question::Hypercall
            && let Some(target) = vcpu.starting.take()
            && complete
            && entry.gpr[0] != 0
        {
            // Not carried out: the target is off again.
            let target = vm.vcpus.get_mut(&target).expect("a vCPU that was turned on");
            if matches!(target.power, Power::Pending(..)) && !target.running {
                target.power = Power::Off;
            }
        }
        if let Some(ipa) = unshared {
            // The host agrees, if there is anything to agree to.
            let page = self.vms[&handle].private.get(&ipa).copied();
            let page = page.filter(|pa| self.owners[pa] == Owner::Shared(handle));
            match page {
                Some(pa) => self.own(pa, Owner::Private(handle)),
                None => self.vcpu(handle, idx).registers.x[0] = INVALID_PARAMETER,
            }
        }
        no
    }

    /// MEM_SHARE and MMIO_GUARD by a guest: `x0`, or that the host has to map a page.
    fn kvm_call(&mut self, handle: Handle, [function, ipa, x2, x3]: [u64; 4]) -> Option<u64> {
        let vm = self.vms.get_mut(&handle).expect("a running VM");
        let bad = x2 != 0 || x3 != 0 || !is_page(ipa) || ipa >> vm.bits != 0;
        if function == MMIO_GUARD {
            if bad || vm.is_ram(ipa) {
                return Some(INVALID_PARAMETER);
            }
            // The first place that it is in, or just behind.
            if let Some(run) = vm.guards.iter_mut().find(|(from, to)| (*from..=*to).contains(&ipa))
            {
                run.1 = run.1.max(ipa + PAGE_SIZE);
            } else if vm.guards.len() == 64 {
                return Some(INVALID_PARAMETER);
            } else {
                vm.guards.push((ipa, ipa + PAGE_SIZE));
            }
            return Some(0);
        }
        if bad || !vm.is_ram(ipa) {
            return Some(INVALID_PARAMETER);
        }
        let pa = vm.private.get(&ipa).copied()?;
        if self.owners[&pa] == Owner::Shared(handle) {
            return Some(INVALID_PARAMETER);
        }
        self.own(pa, Owner::Shared(handle));
        Some(0)
    }

    /// The vCPU stops running; `question` is what its exit asks, `sgis` are still
    /// pending.
    pub fn stopped(&mut self, handle: Handle, idx: u64, question: Question, sgis: &[usize]) {
        let vcpu = self.vcpu(handle, idx);
        sgis.iter().for_each(|id| vcpu.sgis[*id] += 1);
        vcpu.running = false;
        vcpu.question = question;
    }

    /// vCPU `idx` sends an SGI: `value` of ICC_SGI1R_EL1 and its like, or of a
    /// GICv2's GICD_SGIR.
    pub fn sent(&mut self, handle: Handle, idx: u64, distributor: bool, value: u64) {
        let byte = |n: u64| value >> n & 0xff;
        let (id, all_others) = if distributor {
            (value & 15, value >> 24 & 3 == 1)
        } else {
            (byte(24) & 15, value >> 40 & 1 == 1)
        };
        let vm = self.vms.get_mut(&handle).expect("a running VM");
        for (target, vcpu) in &mut vm.vcpus {
            let named = if distributor {
                match value >> 24 & 3 {
                    0 => *target < 8 && byte(16) >> target & 1 == 1,
                    2 => *target == idx,
                    _ => false,
                }
            } else {
                let cluster = [byte(48), byte(32), byte(16)] == [0, 0, target / 16];
                cluster && value & 0xffff & 1 << (target % 16) != 0
            };
            if if all_others { *target != idx } else { named } {
                let sgis = &mut vcpu.sgis[id as usize];
                *sgis = (*sgis + 1).min(255);
            }
        }
    }

    pub fn vcpu(&mut self, handle: Handle, idx: u64) -> &mut Vcpu {
        let vm = self.vms.get_mut(&handle).expect("a running VM");
        vm.vcpus.get_mut(&idx).expect("a running vCPU")
    }

    /// What a running guest's HVC or SMC comes to.
    pub fn guest_call(&mut self, handle: Handle, idx: u64) -> Called {
        let x = self.vcpu(handle, idx).registers.x;
        let function = x[0] & 0xffff_ffff;
        match function {
            0x8600_ff01 => {
                return Called::Answered([0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d]);
            }
            0x8600_0000 => return Called::Answered([0x9d, 0, 0, 0]),
            0xc600_0002 => {
                let good = [x[1], x[2], x[3]] == [0; 3];
                let x0 = if good { PAGE_SIZE } else { INVALID_PARAMETER };
                return Called::Answered([x0, 0, 0, 0]);
            }
            MEM_SHARE | MMIO_GUARD => {
                return match self.kvm_call(handle, [function, x[1], x[2], x[3]]) {
                    Some(x0) => Called::Answered([x0, 0, 0, 0]),
                    None => Called::Missing(x[1]),
                };
            }
            MEM_UNSHARE if x[2] | x[3] != 0 => {
                return Called::Answered([INVALID_PARAMETER, 0, 0, 0]);
            }
            MEM_UNSHARE => return Called::Forwarded,
            _ => {}
        }
        self.psci_call(handle, idx).map_or(Called::Forwarded, Called::Answered)
    }

    /// Its `x0` to `x3`, or `None` if the host hears of it.
    fn psci_call(&mut self, handle: Handle, idx: u64) -> Option<[u64; 4]> {
        const NOT_SUPPORTED: u64 = u64::MAX;
        const INVALID_PARAMETERS: u64 = u64::MAX - 1;
        const ALREADY_ON: u64 = u64::MAX - 3;
        const ON_PENDING: u64 = u64::MAX - 4;
        let x = self.vcpu(handle, idx).registers.x;
        let vm = self.vms.get_mut(&handle).expect("a running VM");
        let function = x[0] & 0xffff_ffff;
        let narrow = function & 1 << 30 == 0;
        let arg = |n: usize| if narrow { x[n] & 0xffff_ffff } else { x[n] };
        // 16 vCPUs a cluster.
        let affinity = |idx: u64| (idx % 16) | ((idx / 16) << 8);
        let find = |vm: &Vm, wanted: u64| vm.vcpus.keys().copied().find(|i| affinity(*i) == wanted);
        let known = |f: u64| match f & 0xffff_ffff {
            0x8400_0000 | 0x8400_0001 | 0xc400_0001 | 0x8400_0002 | 0x8400_0003 | 0xc400_0003
            | 0x8400_0004 | 0xc400_0004 | 0x8400_0006 | 0x8400_0008 | 0x8400_0009 | 0x8400_000a
            | 0x8400_0012 | 0xc400_0012 | 0x8000_0000 => 0,
            _ => NOT_SUPPORTED,
        };
        let x0 = match function {
            0x8000_0000 => 0x1_0002,
            0x8000_0001 => match x[1] & 0xffff_ffff {
                0x8000_0000 | 0x8000_0001 => 0,
                _ => NOT_SUPPORTED,
            },
            0x8400_0000 => 0x1_0001,
            0x8400_000a => known(x[1]),
            0x8400_0006 => 2,
            0x8400_0004 | 0xc400_0004 => {
                let target = find(vm, arg(1) & 0xff_00ff_ffff);
                match target.and_then(|t| vm.vcpus.get(&t)) {
                    Some(vcpu) if arg(2) == 0 => match vcpu.power {
                        Power::On => 0,
                        Power::Off => 1,
                        Power::Pending(..) => 2,
                    },
                    _ => INVALID_PARAMETERS,
                }
            }
            0x8400_0003 | 0xc400_0003 => {
                let Some(target) = find(vm, arg(1) & 0xff_00ff_ffff) else {
                    return Some([INVALID_PARAMETERS, 0, 0, 0]);
                };
                let power = &mut vm.vcpus.get_mut(&target).expect("found").power;
                match power {
                    Power::On => ALREADY_ON,
                    Power::Pending(..) => ON_PENDING,
                    Power::Off => {
                        *power = Power::Pending(arg(2), [arg(3), 0, 0, 0]);
                        vm.vcpus.get_mut(&idx).expect("it runs").starting = Some(target);
                        return None;
                    }
                }
            }
            0x8400_0002 => {
                vm.vcpus.get_mut(&idx).expect("it runs").power = Power::Off;
                return None;
            }
            0x8400_0001 | 0xc400_0001 | 0x8400_0008 | 0x8400_0009 | 0x8400_0012 | 0xc400_0012 => {
                return None;
            }
            _ => NOT_SUPPORTED,
        };
        Some([x0, 0, 0, 0])
    }

    /// What a host's access finds: `None` is an abort.
    pub fn host_sees(&self, pa: u64, write: bool, fetch: bool) -> Option<Content> {
        let page = pa / PAGE_SIZE * PAGE_SIZE;
        match self.owners.get(&page)? {
            Owner::Host | Owner::RunPage(_) | Owner::Shared(_) | Owner::Moving => {
                Some(self.content(page))
            }
            Owner::Table(_) | Owner::Private(_) => (!write && !fetch).then_some([0, 0]),
        }
    }
}

/// The table "What the host may inject" of `docs/abi.md`.
fn lrs_allowed(gic: u64, entry: &Entry, lrs: u64) -> bool {
    if entry.nr_lr > lrs {
        return false;
    }
    let used = &entry.lr[..entry.nr_lr as usize];
    let mut ids = BTreeSet::new();
    used.iter().all(|lr| {
        let bit = |n: u32| lr >> n & 1 == 1;
        let id = lr & 0xffff_ffff;
        let linked = bit(61);
        let known = if linked {
            // The virtual timer; pending and active at once without HW only.
            id == 27 && lr >> 32 & 0x1fff == 27 && !(bit(62) && bit(63))
        } else {
            // Of bits 44 to 32 all but the EOI bit, 41, are reserved.
            let sender = if gic == 2 && id & 0x3ff < 16 { 7 << 10 } else { 0 };
            id & !sender < 1020 && lr >> 32 & 0x1fff & !(1 << 9) == 0
        };
        // Priority 55 to 48, group 60, HW 61, state 63 to 62: what lies between is NMI
        // or reserved.
        let reserved = lr >> 45 & 7 != 0 || lr >> 56 & 0xf != 0;
        let live = bit(62) || bit(63);
        known && !reserved && (!live || ids.insert(id & 0x3ff))
    })
}

/// The SGIs that are pending in these list registers.
pub fn pending_sgis(lrs: &[u64]) -> Vec<usize> {
    let pending = lrs.iter().filter(|lr| *lr >> 62 & 1 == 1 && *lr & 0x3ff < 16);
    pending.map(|lr| (lr & 15) as usize).collect()
}

/// A load of `size` bytes, as the instruction extends it.
fn extended(data: u64, size: u32, signed: bool, wide: bool) -> u64 {
    let narrow = |value: i64| if wide { value } else { value & 0xffff_ffff };
    let [a, b, c, d, ..] = data.to_le_bytes();
    let value = match (size, signed) {
        (1, true) => i64::from(a.cast_signed()),
        (1, false) => i64::from(a),
        (2, true) => i64::from(i16::from_le_bytes([a, b])),
        (2, false) => i64::from(u16::from_le_bytes([a, b])),
        (4, true) => i64::from(i32::from_le_bytes([a, b, c, d])),
        (4, false) => i64::from(u32::from_le_bytes([a, b, c, d])),
        _ => data.cast_signed(),
    };
    narrow(value).cast_unsigned()
}

/// A guest's instruction that comes to the monitor, before it is a syndrome.
#[derive(Clone, Copy, Debug)]
pub enum Trap {
    Wfx {
        wfe: bool,
    },
    /// At an address in bytes; `known` if the syndrome describes the access.
    Data {
        ipa: u64,
        rt: usize,
        size: u32,
        signed: bool,
        wide: bool,
        write: bool,
        known: bool,
    },
    Fetch {
        ipa: u64,
    },
    /// A stage-1 walk.
    Walk {
        ipa: u64,
        fetch: bool,
        write: bool,
    },
    /// Cache maintenance by address.
    Cache {
        ipa: u64,
    },
    /// An abort that is not stage 2's doing.
    External {
        ipa: u64,
        fetch: bool,
    },
    Sysreg {
        op: [u64; 5],
        rt: usize,
        read: bool,
    },
    Call {
        smc: bool,
    },
    /// What the guest was not offered.
    Other {
        ec: u64,
    },
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The host sees this, with a fault's syndrome checked apart, and may answer.
    Shown {
        exit: Exit,
        question: Question,
        step: bool,
    },
    /// Undefined, or a synchronous external abort.
    Injected {
        undefined: bool,
    },
    /// The guest goes on behind the instruction.
    Stepped,
    /// The monitor emulates a register: the host sees nothing.
    Emulated,
    Call,
}

/// `ESR_EL2` of a trap (Arm ARM D24.2 "ESR_EL2").
pub fn syndrome(trap: &Trap, noise: u64) -> u64 {
    let il = 1 << 25;
    let abort = |fetch| if fetch { 0x20 } else { 0x24 };
    let data = |iss: u64| 0x24 << 26 | il | iss | 0x04 | noise & 3;
    match *trap {
        Trap::Wfx { wfe } => 0x01 << 26 | il | 1 << 24 | 0xe << 20 | u64::from(wfe),
        Trap::Data { rt, size, signed, wide, write, known, .. } => {
            let access = 1 << 24
                | u64::from(size.trailing_zeros()) << 22
                | u64::from(signed) << 21
                | (rt as u64) << 16
                | u64::from(wide) << 15;
            data(if known { access } else { 0 } | u64::from(write) << 6)
        }
        Trap::Fetch { .. } => 0x20 << 26 | il | 0x04 | noise & 3,
        Trap::Walk { fetch, write, .. } => {
            abort(fetch) << 26 | il | 1 << 7 | u64::from(write) << 6 | 0x0c | noise & 3
        }
        Trap::Cache { .. } => data(1 << 8 | 1 << 6),
        Trap::External { fetch, .. } => abort(fetch) << 26 | il | 0x10,
        Trap::Sysreg { op: [op0, op1, crn, crm, op2], rt, read } => {
            let place = op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | crm << 1;
            0x18 << 26 | il | place | (rt as u64) << 5 | u64::from(read)
        }
        Trap::Call { smc } => (0x16 + u64::from(smc)) << 26 | il | noise & 0xffff,
        Trap::Other { ec } => ec << 26 | il | noise & 0x1ff_ffff,
    }
}

/// The table of `docs/abi.md`: what an exit shows, and what may come back.
pub fn exit(trap: &Trap, vm: &Vm, x: &[u64; 31], el1: bool, esr: u64) -> Outcome {
    let shown = |class, exit: Exit, question| Outcome::Shown {
        exit: Exit { class, mode: u64::from(el1), ..exit },
        question,
        // Tried again, an SGI would count twice.
        step: question == Question::Sgi,
    };
    let register = |rt: usize| x.get(rt).copied().unwrap_or(0);
    let abort = Outcome::Injected { undefined: false };
    let fault = |ipa: u64, keep: u64| {
        let ipa = ipa / PAGE_SIZE * PAGE_SIZE;
        let exit = Exit { ipa, esr: esr & (0x3f << 26 | 1 << 25 | keep) | 7, ..Exit::default() };
        shown(ExitClass::Fault, exit, Question::Nothing)
    };
    let outside = |ipa: u64| ipa >> vm.bits != 0;
    match *trap {
        Trap::Wfx { wfe } => Outcome::Shown {
            exit: Exit {
                class: ExitClass::Wfx,
                mode: u64::from(el1),
                esr: 1 << 26 | 1 << 25 | u64::from(wfe),
                ..Exit::default()
            },
            question: Question::Nothing,
            step: true,
        },
        Trap::Data { ipa, .. } if outside(ipa) => abort,
        Trap::Data { ipa, .. } if vm.is_ram(ipa) => fault(ipa, 1 << 6),
        Trap::Data { ipa, .. } if !vm.emulated(ipa) => abort,
        Trap::Data { known: false, .. } => abort,
        Trap::Data { ipa, rt, size, signed, wide, write, .. } => {
            let esr = esr & !(0x1f << 16);
            if write {
                let all = u64::MAX >> (64 - 8 * size);
                let exit = Exit { esr, ipa, data: register(rt) & all, ..Exit::default() };
                let sgi = vm.gic == 2 && size == 4 && ipa % PAGE_SIZE == 0xf00;
                let question = if sgi { Question::Sgi } else { Question::Store };
                shown(ExitClass::MmioWrite, exit, question)
            } else {
                let exit = Exit { esr, ipa, ..Exit::default() };
                shown(ExitClass::MmioRead, exit, Question::Load(rt, size, signed, wide))
            }
        }
        Trap::Fetch { ipa } | Trap::Walk { ipa, .. } => {
            if !outside(ipa) && vm.is_ram(ipa) {
                fault(ipa, 0)
            } else {
                abort
            }
        }
        Trap::Cache { ipa } => {
            if outside(ipa) {
                abort
            } else if vm.is_ram(ipa) {
                fault(ipa, 0)
            } else if !vm.emulated(ipa) {
                abort
            } else {
                Outcome::Stepped
            }
        }
        Trap::External { .. } => abort,
        Trap::Sysreg { op, rt, read } => {
            let timer = matches!(op, [3, 3, 14, 2, 0..=2]);
            let sgi = vm.gic == 3 && matches!(op, [3, 0, 12, 11, 5..=7]) && !read;
            let esr = esr & !(0x1f << 5);
            match op {
                _ if timer && read => {
                    let exit = Exit { esr, ..Exit::default() };
                    shown(ExitClass::SysregRead, exit, Question::SysregRead(rt))
                }
                _ if timer || sgi => {
                    let exit = Exit { esr, data: register(rt), ..Exit::default() };
                    let question = if sgi { Question::Sgi } else { Question::SysregWrite };
                    shown(ExitClass::SysregWrite, exit, question)
                }
                // Debug registers.
                [2, ..] => Outcome::Emulated,
                // Identification registers can be read only.
                [3, 0, 0, 1..=7, _] if read => Outcome::Emulated,
                // ICC_SRE_EL1, ACTLR_EL1.
                [3, 0, 12, 12, 5] | [3, 0, 1, 0, 1] => Outcome::Emulated,
                _ => Outcome::Injected { undefined: true },
            }
        }
        Trap::Call { .. } if el1 => Outcome::Call,
        Trap::Call { .. } | Trap::Other { .. } => Outcome::Injected { undefined: true },
    }
}
