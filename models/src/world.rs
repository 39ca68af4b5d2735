// SPDX-License-Identifier: MIT OR Apache-2.0
//! The model that stateright explores: scenarios, actions, properties.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use havmsi_abi::Error;
use havmsi_core::audit::{Audit, Violation};
use havmsi_core::fake;
use havmsi_core::vm::Vm;
use stateright::{Model, Property};

use crate::call::{Op, page, place, with_bench};
use crate::memory::Memory;
use crate::state::{Broken, CPUS, Cpu, Known, State};
use crate::tlb::Trees;

/// What the host may do, and from where on.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub what: &'static str,
    /// Done before the exploration begins.
    pub before: Vec<Op>,
    /// What each CPU may ask for, at any time.
    pub calls: Vec<Op>,
    /// Hosts, devices and guests write as soon as they can, instead of by steps of
    /// their own: the same dangers, fewer states.
    pub eager: bool,
    /// VMs that may be created in a slot, one after the other.
    pub generations: u64,
    /// Pages of each VM that may be sealed.
    pub seals: u8,
    /// CPUs.
    pub cpus: usize,
    /// Pages that hosts and devices write to, if not eagerly to all: from 0 on.
    pub pages: u8,
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// A CPU begins a call.
    Start(usize, Op),
    /// A CPU does what its call has stopped for.
    Step(usize),
    /// The host, or a device, writes to a page.
    HostStores(u8),
    /// A guest writes: VM, place.
    GuestStores(u8, u8),
}

/// All states of VMs that were met, by number.
#[derive(Debug, Default)]
struct Vms {
    numbers: HashMap<Arc<Vm>, u32>,
    all: Vec<Arc<Vm>>,
}

/// The model of a scenario.
#[derive(Debug)]
pub struct Small {
    /// The scenario.
    pub scenario: Scenario,
    trees: Trees,
    vms: Mutex<Vms>,
    /// How calls ended, and how often.
    ends: Mutex<BTreeMap<String, u64>>,
    /// Nothing new is begun after this.
    deadline: Option<Instant>,
    /// Nor with more of the process in memory.
    bytes: u64,
    late: AtomicBool,
    looks: AtomicU64,
}

impl Known for Small {
    fn trees(&self) -> &Trees {
        &self.trees
    }

    fn vm(&self, number: u32) -> Arc<Vm> {
        let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&vms.all[havmsi_core::addr::index(u64::from(number))])
    }

    fn number(&self, vm: Vm) -> u32 {
        let mut vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = vms.numbers.get(&vm) {
            return *number;
        }
        let (number, vm) = (u32::try_from(vms.all.len()).unwrap_or(u32::MAX), Arc::new(vm));
        vms.all.push(Arc::clone(&vm));
        vms.numbers.insert(vm, number);
        number
    }

    fn eager(&self) -> bool {
        self.scenario.eager
    }

    fn ended(&self, op: Op, result: &Result<(), Error>) {
        let name = format!("{op:?}");
        let name = name.split('(').next().unwrap_or_default();
        let end = match result {
            Ok(()) => "done".to_owned(),
            Err(error) => format!("{error:?}"),
        };
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        *ends.entry(format!("{name}: {end}")).or_default() += 1;
    }
}

impl Small {
    /// The model of a scenario; nothing new is begun after `deadline`, or with more
    /// than so many `bytes` in memory.
    #[must_use]
    pub fn new(scenario: Scenario, deadline: Option<Instant>, bytes: u64) -> Self {
        #[cfg(feature = "leave-out")]
        havmsi_core::leave_out::on_pause(crate::call::pause);
        let trees =
            with_bench(|bench| Trees::new(Arc::clone(bench.boot()), &bench.host_map().borrow()));
        Self {
            scenario,
            trees,
            vms: Mutex::default(),
            ends: Mutex::default(),
            deadline,
            bytes,
            late: AtomicBool::new(false),
            looks: AtomicU64::new(0),
        }
    }

    /// Whether a limit cut the exploration short.
    #[must_use]
    pub fn was_late(&self) -> bool {
        self.late.load(Ordering::Relaxed)
    }

    /// Looks at the limits now and then: they are seconds and GiBs.
    fn is_late(&self) -> bool {
        const SELDOM: u64 = 1024;
        if self.looks.fetch_add(1, Ordering::Relaxed).is_multiple_of(SELDOM)
            && (self.deadline.is_some_and(|deadline| Instant::now() > deadline)
                || self.bytes != u64::MAX && resident() > self.bytes)
        {
            self.late.store(true, Ordering::Relaxed);
        }
        self.was_late()
    }

    /// How calls ended.
    #[must_use]
    pub fn ends(&self) -> BTreeMap<String, u64> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// States of VMs that were met.
    #[must_use]
    pub fn vm_states(&self) -> usize {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).all.len()
    }

    /// Carries a call out with nothing in between.
    fn alone(&self, state: &mut State, op: Op) {
        state.start(self, 0, op);
        state.settle(self, None);
        while state.can_step(0) {
            state.step(self, 0);
            state.settle(self, None);
        }
    }

    fn may_start(&self, state: &State, cpu: usize, op: Op) -> bool {
        let here = match (&state.cpus[cpu], op) {
            (Cpu::Guest(vm, idx), Op::Leave(of, number)) => (*vm, *idx) == (of, number),
            (Cpu::Host, Op::Leave(..)) | (Cpu::Guest(..) | Cpu::Monitor(_) | Cpu::Absent, _) => {
                false
            }
            (Cpu::Host, Op::Create(vm)) => {
                let vm = self.vm(state.vms[usize::from(vm)]);
                vm.exists() || vm.handle() >> 16 < self.scenario.generations
            }
            (Cpu::Host, Op::Return(..)) => state.returned(op).is_some(),
            (Cpu::Host, Op::Unmap(vm, ..) | Op::UnmapSwapped(vm, ..)) => {
                state.seals(vm) < self.scenario.seals
            }
            (Cpu::Host, _) => true,
        };
        here && state.can_start(op)
    }

    /// The audit of debug builds finds nothing either, while no call is under way.
    fn audit(&self, state: &State) -> Result<(), Violation> {
        if state.cpus.iter().any(|cpu| matches!(cpu, Cpu::Monitor(_))) {
            return Ok(());
        }
        let vms = state.vms.map(|vm| self.vm(vm));
        let hardware = Reader { memory: &state.memory, trees: &self.trees };
        with_bench(|bench| {
            bench.set_records(&state.records);
            let mut scratch = [0; fake::PAGES / 64];
            let mut audit = Audit::new(&hardware, bench.shipped_pages(), &mut scratch)?;
            let map = bench.host_map().borrow();
            audit.host(&map)?;
            audit.devices(&map)?;
            vms.iter().try_for_each(|vm| audit.vm(vm))
        })
    }

    /// Why a state is none that should be.
    #[must_use]
    pub fn why(&self, state: &State) -> Option<String> {
        let audit = || self.audit(state).err().map(|found| format!("the audit finds {found:x?}"));
        state.why.as_deref().map(str::to_owned).or_else(audit)
    }

    /// A step in words.
    #[must_use]
    pub fn tell(&self, state: &State, action: &Action) -> String {
        match *action {
            Action::Start(cpu, op) => format!("CPU {cpu} begins {op:?}"),
            Action::Step(cpu) => match &state.cpus[cpu] {
                Cpu::Monitor(call) => format!("CPU {cpu} in {:?}: {:x?}", call.op, call.next),
                Cpu::Host | Cpu::Guest(..) | Cpu::Absent => format!("CPU {cpu}"),
            },
            Action::HostStores(n) => format!("the host writes to page {n} ({:x?})", page(n)),
            Action::GuestStores(vm, at) => format!("VM {vm} writes to {:x?}", place(at)),
        }
    }
}

/// Bytes of this process in memory; 0 where the system does not say.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.as_ref().and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// A state's memory for the audit, which only reads.
struct Reader<'a> {
    memory: &'a Memory,
    trees: &'a Trees,
}

mod reader {
    use havmsi_core::addr::{Ipa, Pa};
    use havmsi_core::hw::Hardware;

    use super::Reader;
    use crate::memory::word;

    impl Hardware for Reader<'_> {
        fn read_entry(&self, table: Pa, index: usize) -> u64 {
            self.memory.get(self.trees.boot(), word(table, index))
        }
        fn write_entry(&self, _: Pa, _: usize, _: u64) {
            unreachable!("the audit writes nothing");
        }
        fn zero_page(&self, _: Pa) {
            unreachable!("the audit wipes nothing");
        }
        fn flush_page(&self, _: Pa) {
            unreachable!("the audit measures nothing");
        }
        fn invalidate_icache(&self) {}
        fn invalidate_host(&self, _: Ipa, _: u64) {}
        fn invalidate_devices(&self, _: Ipa, _: u64) {}
        fn invalidate_guest(&self, _: u64, _: Ipa, _: u64) {}
        fn invalidate_guest_all(&self, _: u64) {}
    }
}

impl Model for Small {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State::new(self, self.scenario.cpus);
        for op in &self.scenario.before {
            self.alone(&mut state, *op);
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken != 0 {
            return;
        }
        if self.is_late() {
            return;
        }
        for cpu in 0..CPUS {
            if cpu != 0 && state.cpus[cpu] == state.cpus[cpu - 1] {
                continue; // CPUs are alike
            }
            if state.can_step(cpu) {
                actions.push(Action::Step(cpu));
            }
            let calls = self.scenario.calls.iter().filter(|op| self.may_start(state, cpu, **op));
            actions.extend(calls.map(|op| Action::Start(cpu, *op)));
        }
        if self.scenario.eager {
            return;
        }
        let pages = state.stores_of_host(self, self.scenario.pages);
        actions.extend(pages.into_iter().map(Action::HostStores));
        for vm in 0..2 {
            let places = (0..3).filter(|at| state.guest_can_store(self, vm, *at));
            actions.extend(places.map(|at| Action::GuestStores(vm, at)));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Start(cpu, op) => state.start(self, cpu, op),
            Action::Step(cpu) => state.step(self, cpu),
            Action::HostStores(n) => state.host_stores(self, n),
            Action::GuestStores(vm, at) => state.guest_stores(self, vm, at),
        }
        let refused = state.cpus == last.cpus && state.vms == last.vms && state.broken == 0;
        if refused && matches!(action, Action::Start(..)) {
            return None;
        }
        state.settle(self, Some(last));
        state.order_cpus();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn holds<const BIT: u16>(_: &Small, state: &State) -> bool {
            state.broken & BIT == 0
        }
        vec![
            Property::always("I1: one owner a page", holds::<{ Broken::I1 }>),
            Property::always("I2: mapped for the owner only", holds::<{ Broken::I2 }>),
            Property::always("I3: tables lie in monitor memory", holds::<{ Broken::I3 }>),
            Property::always("I4: a VM's page stays at its place", holds::<{ Broken::I4 }>),
            Property::always("I5: a page leaves a VM wiped", holds::<{ Broken::I5 }>),
            Property::always("I6: no translation of the old owner", holds::<{ Broken::I6 }>),
            Property::always("I7: new memory is zero, or measured", holds::<{ Broken::I7 }>),
            Property::always("I9: no panic, nothing half done", holds::<{ Broken::I9 }>),
            Property::always("tables are used under their lock", holds::<{ Broken::LOCKS }>),
            Property::always("no deadlock", holds::<{ Broken::DEADLOCK }>),
            Property::always("the audit agrees", |model: &Small, state: &State| {
                model.audit(state).is_ok()
            }),
        ]
    }
}
