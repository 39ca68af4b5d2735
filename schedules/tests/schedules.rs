// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several CPUs in the shipped transitions, in schedules that shuttle picks: at
//! each access to an ownership record, each lock and each access to the hardware
//! another CPU may go on. The tests' machine sees to I3, I5 and I6 all the time;
//! when all is quiet an audit walks all tables.
//!
//! What `monitor/src/dispatch.rs`, `run.rs` and `host_abort.rs` do above the pure
//! crate is here in a few lines (`Board`): which call holds which lock. The last
//! tests break a lock or leave a check out, and this must be found.
//!
//! `cargo xtask test --only schedules` runs both; `SHUTTLE_RANDOM_SEED` tries other
//! schedules.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use havmsi_abi::{Error, PAGE_SIZE};
use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::audit::Audit;
use havmsi_core::fake::{BASE, CARVEOUT, FakeMachine, PAGES, host_page, records, root};
use havmsi_core::host_map::Resolution;
use havmsi_core::launch::{Boot, Config};
use havmsi_core::leave_out::{self, Check};
use havmsi_core::page::{Census, Owner, VmSlot};
use havmsi_core::stage2::{Entry, level1_index, level2_index, level3_index};
use havmsi_core::vm::{Machine as _, Vm, handle_slot};
use shuttle::rand::{Rng as _, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::Mutex;
use shuttle::{Config as Shuttle, FailurePersistence, Runner, thread};

const RAM: u64 = 0x8000_0000;
const RAM_SIZE: u64 = 0x40_0000;
const CONFIG: Config = Config { ipa_bits: 32, gic: 0, max_vcpus: 2 };
/// Schedules of each kind for one scenario.
const SCHEDULES: usize = 400;
/// Places where the CPU that runs is changed, at most, in a schedule of the second kind.
const DEPTH: usize = 3;
/// How often a CPU repeats a call that another one is in the way of.
const TRIES: usize = 40;
/// What a guest writes; no page that the host sees may hold it.
const SECRET: u64 = 0x5ec0;

type Called<T = ()> = Result<T, Error>;

/// What all CPUs share.
struct Board<'a> {
    m: FakeMachine<'a>,
    vms: [Mutex<Vm>; 2],
    census: Census,
    /// Contexts that are taken.
    contexts: [AtomicUsize; 4],
}

impl<'a> Board<'a> {
    fn new(m: FakeMachine<'a>) -> Self {
        let census = m.pages.census();
        let vms = [Mutex::new(Vm::FREE), Mutex::new(Vm::FREE)];
        Self { m, vms, census, contexts: Default::default() }
    }

    /// A call about a VM: its lock, its handle, the call.
    fn call<T, E: Into<Error>>(
        &self,
        handle: u64,
        f: impl FnOnce(&mut Vm) -> Result<T, E>,
    ) -> Called<T> {
        let slot = handle_slot(handle).ok_or(Error::Invalid)?;
        let mut vm = self.vms[usize::from(slot.0)].lock().unwrap();
        vm.check_handle(handle)?;
        f(&mut vm).map_err(Into::into)
    }

    fn create(&self) -> Called<u64> {
        for (n, vm) in (0..).zip(&self.vms) {
            let slot = VmSlot(n);
            match vm.lock().unwrap().create(slot, root(slot), CONFIG, 0, [1; 32]) {
                Err(Error::Busy) => {}
                result => return result,
            }
        }
        Err(Error::NoMemory)
    }

    fn take_context(&self) -> Option<u16> {
        let free = self.contexts.iter().position(|taken| taken.swap(1, Relaxed) == 0);
        free.and_then(|n| u16::try_from(n).ok())
    }

    fn free_context(&self, context: u16) {
        assert_eq!(self.contexts[usize::from(context)].swap(0, Relaxed), 1, "freed twice");
    }

    fn vcpu(&self, handle: u64, idx: u64, page: Pa) -> Called {
        self.call(handle, |vm| {
            let context = self.take_context().ok_or(Error::NoMemory)?;
            vm.create_vcpu(&self.m, idx, page.0, context)
                .inspect_err(|_| self.free_context(context))
        })
    }

    fn map(&self, handle: u64, ipa: u64, page: Pa) -> Called {
        self.call(handle, |vm| vm.map_page(&self.m, ipa, page.0, [0; 2]))
    }

    fn unmap(&self, handle: u64, ipa: u64, n: u64) -> Called {
        self.call(handle, |vm| vm.unmap_pages(&self.m, ipa, n).map(|_| ()))
    }

    fn pool(&self, handle: u64, page: Pa, n: u64) -> Called {
        self.call(handle, |vm| vm.donate_pool(&self.m, page.0, n))
    }

    fn reset(&self, handle: u64) -> Called {
        self.call(handle, |vm| vm.reset(&self.m))
    }

    fn destroy(&self, handle: u64) -> Called {
        self.call(handle, |vm| vm.destroy(&self.m, |context| self.free_context(context)))
    }

    /// HOST_RESET: a step of one VM.
    fn host_reset(&self) -> Called {
        for vm in &self.vms {
            let mut vm = vm.lock().unwrap();
            if vm.exists() {
                vm.destroy(&self.m, |context| self.free_context(context))?;
                return Err(Error::Again);
            }
        }
        Ok(())
    }

    /// The host touches a page that its map may not show.
    fn fault(&self, page: Pa, write: bool) -> Resolution {
        self.m.with_host_map(|map| {
            let verdict = map.resolve(&self.m.hw, Ipa(page.0), write, false);
            // What it finds there, if anything, was wiped or sealed.
            let leaf = map.lookup(&self.m.hw, Ipa(page.0)).filter(|leaf| !leaf.is_block());
            let clean = leaf.is_none_or(|leaf| self.is_wiped_or_sealed(leaf.address()));
            assert!(clean, "the host reads on");
            verdict
        })
    }

    /// VCPU_RUN, what the guest does meanwhile, and its exit.
    fn run(&self, handle: u64, idx: u64, guest: impl FnOnce(u64)) -> Called {
        let slot = handle_slot(handle).ok_or(Error::Invalid)?;
        let run = self.call(handle, |vm| {
            vm.runnable(idx)?;
            vm.take_sgis(idx, 0)?;
            vm.enter(idx)
        })?;
        self.m.hw.load(run.vttbr);
        guest(run.vttbr);
        self.m.hw.unload(run.vttbr);
        self.vms[usize::from(slot.0)].lock().unwrap().leave(idx, 0);
        Ok(())
    }

    /// Where the guest with this stage-2 finds `ipa`.
    fn guest_page(&self, vttbr: u64, ipa: u64) -> Option<Pa> {
        let mut table = Pa(vttbr & 0xffff_ffff_f000);
        for slot in [level1_index(Ipa(ipa)), level2_index(Ipa(ipa))] {
            let entry = Entry(self.m.hw.peek(table, slot));
            if !entry.is_valid() {
                return None;
            }
            table = entry.address();
        }
        let entry = Entry(self.m.hw.peek(table, level3_index(Ipa(ipa))));
        entry.is_valid().then(|| entry.address())
    }

    /// An open VM with RAM, a vCPU that is on, four spare tables of its own.
    fn open(&self) -> u64 {
        let handle = self.create().unwrap();
        let n = u64::from(handle_slot(handle).unwrap().0);
        self.call(handle, |vm| vm.add_ram(RAM, RAM_SIZE)).unwrap();
        self.vcpu(handle, 0, host_page(200 + n)).unwrap();
        self.call(handle, |vm| vm.set_boot(0, Boot::default())).unwrap();
        self.pool(handle, Pa(BASE + CARVEOUT + 0x10_0000 + n * 0x4000), 4).unwrap();
        handle
    }

    fn active(&self) -> u64 {
        let handle = self.open();
        self.call(handle, |vm| vm.activate(&self.m)).unwrap();
        handle
    }

    /// An active VM with a page at the start of its RAM, which holds a secret.
    fn with_page(&self, page: Pa) -> u64 {
        let handle = self.active();
        self.map(handle, RAM, page).unwrap();
        self.m.hw.poke(page, 5, SECRET);
        handle
    }

    /// No page is in motion: all that must hold does.
    fn check(&self) {
        let mut scratch = [0; PAGES / 64];
        let mut audit = Audit::new(&self.m.hw, &self.m.pages, &mut scratch).unwrap();
        self.m.with_host_map(|map| audit.host(map).and_then(|()| audit.devices(map))).unwrap();
        for (n, vm) in (0..).zip(&self.vms) {
            let vm = vm.lock().unwrap();
            audit.at_rest(VmSlot(n), &vm).unwrap();
            audit.vm(&vm).unwrap();
        }
        let mut taken = [0; 8];
        for (n, context) in self.contexts.iter().enumerate() {
            taken[0] |= (context.load(Relaxed) as u64) << n;
        }
        audit.contexts(&taken).unwrap();
        audit.finish().unwrap();
        assert!(self.m.hw.stale().is_empty());
    }

    /// Zero, or sealed: then no word is what it was, neither zero nor the secret.
    fn is_wiped_or_sealed(&self, page: Pa) -> bool {
        let word = |i| self.m.hw.peek(page, i);
        self.m.hw.is_zero(page) || (0..512).all(|i| ![0, SECRET].contains(&word(i)))
    }

    /// And after the end of all VMs the host has every page back, wiped or sealed.
    fn end(&self) {
        self.m.hw.crowded.0.store(false, Relaxed);
        self.check();
        while let Err(error) = self.host_reset() {
            assert_eq!(error, Error::Again);
        }
        self.check();
        assert_eq!(self.m.pages.census(), self.census);
        for n in 0..256 {
            assert!(self.is_wiped_or_sealed(host_page(n)));
        }
    }
}

/// Repeats a call while it says AGAIN or BUSY, a few times.
fn patient<T>(mut f: impl FnMut() -> Called<T>) -> Called<T> {
    for _ in 1..TRIES {
        match f() {
            Err(Error::Again | Error::Busy) => {}
            result => return result,
        }
    }
    f()
}

/// Two CPUs at once.
fn both<A: Send, B: Send>(
    board: &Board<'_>,
    a: impl FnOnce() -> A + Send,
    b: impl FnOnce() -> B + Send,
) -> (A, B) {
    board.m.hw.crowded.0.store(true, Relaxed);
    thread::scope(|scope| {
        let b = scope.spawn(b);
        let a = scope.spawn(a);
        (a.join().unwrap(), b.join().unwrap())
    })
}

type Scenario = fn(&Board<'_>);

/// Two VMs want one page: one gets it.
fn one_page_for_two(board: &Board<'_>) {
    let (a, b) = (board.active(), board.active());
    let page = host_page(0);
    let (at_a, at_b) = both(board, || board.map(a, RAM, page), || board.map(b, RAM, page));
    let error = match (at_a, at_b) {
        (Ok(()), Err(error)) | (Err(error), Ok(())) => error,
        both => panic!("{both:?}"),
    };
    assert!(matches!(error, Error::Again | Error::Denied), "{error:?}");
}

/// One VM wants one page at two places: it gets one.
fn two_places_for_one(board: &Board<'_>) {
    let a = board.active();
    let map = |ipa| move || board.map(a, ipa, host_page(0));
    let (here, there) = both(board, map(RAM), map(RAM + 0x20_0000));
    assert!(here.is_ok() != there.is_ok(), "{here:?} {there:?}");
}

/// A page goes from one VM to the host, and on to the next; the host looks at it
/// all the while.
fn handed_on(board: &Board<'_>) {
    let page = host_page(0);
    let (a, b) = (board.with_page(page), board.active());
    let (_, (unmapped, mapped)) = both(
        board,
        || (0..4).for_each(|n| _ = board.fault(page, n == 2)),
        || {
            both(
                board,
                || board.unmap(a, RAM, 1),
                || {
                    (0..TRIES).any(|_| {
                        let result = board.map(b, RAM, page);
                        assert!(matches!(result, Ok(()) | Err(Error::Again | Error::Denied)));
                        result.is_ok()
                    })
                },
            )
        },
    );
    assert_eq!(unmapped, Ok(()));
    assert!(if mapped { board.m.hw.is_zero(page) } else { board.is_wiped_or_sealed(page) });
    let owner = if mapped { Owner::Private(VmSlot(1)) } else { Owner::Host };
    assert_eq!(board.m.pages.owner(page), Some(owner));
}

/// A guest works in its page while its VM is destroyed: it finds what it wrote
/// until it is out, and then nothing is left.
fn destroyed_while_it_runs(board: &Board<'_>) {
    let page = host_page(0);
    let a = board.with_page(page);
    let guest = |vttbr| {
        for n in 0..3 {
            assert_eq!(board.guest_page(vttbr, RAM), Some(page), "a running guest's page is gone");
            assert_eq!(board.m.hw.peek(page, 5), SECRET + n);
            board.m.hw.poke(page, 5, SECRET + n + 1);
        }
    };
    let (ran, destroyed) = both(board, || board.run(a, 0, guest), || patient(|| board.destroy(a)));
    assert!(matches!(ran, Ok(()) | Err(Error::State | Error::Invalid)), "{ran:?}");
    if destroyed.is_ok() {
        assert!(board.m.hw.is_zero(page));
        assert_eq!(board.m.pages.owner(page), Some(Owner::Host));
    } else {
        assert_eq!(destroyed, Err(Error::Busy));
    }
}

/// The same with a reset, which keeps the VM.
fn reset_while_it_runs(board: &Board<'_>) {
    let page = host_page(0);
    let a = board.with_page(page);
    let guest = |vttbr| assert_eq!(board.guest_page(vttbr, RAM), Some(page));
    let (ran, reset) = both(board, || board.run(a, 0, guest), || patient(|| board.reset(a)));
    assert!(matches!(ran, Ok(()) | Err(Error::State)), "{ran:?}");
    assert!(matches!(reset, Ok(()) | Err(Error::Busy)), "{reset:?}");
    assert_eq!(board.m.hw.is_zero(page), reset.is_ok());
}

/// Two CPUs want to run one vCPU.
fn one_vcpu_on_two(board: &Board<'_>) {
    let a = board.active();
    let inside = AtomicUsize::new(0);
    let guest = |_| {
        assert_eq!(inside.fetch_add(1, Relaxed), 0, "one vCPU runs twice");
        board.m.hw.peek(host_page(0), 0);
        inside.fetch_sub(1, Relaxed);
    };
    let run = || patient(|| board.run(a, 0, guest));
    let results: (Called, Called) = both(board, run, run);
    assert!([results.0, results.1].iter().all(|r| matches!(r, Ok(()) | Err(Error::Busy))));
}

/// A call with the handle of a VM that ends meanwhile, whose slot the next one gets.
fn stale_handle(board: &Board<'_>) {
    let a = board.active();
    let (b, mapped) = both(
        board,
        || patient(|| board.destroy(a)).ok().map(|()| board.active()),
        || board.map(a, RAM, host_page(0)),
    );
    if let Some(b) = b {
        assert_eq!(handle_slot(a), handle_slot(b));
        assert_ne!(a, b);
        assert_eq!(board.m.pages.census().private, 0, "the old handle reached the new VM");
    }
    assert!(matches!(mapped, Ok(()) | Err(Error::State | Error::Invalid)));
}

/// A VM gets pages and loses pages at once, at places that share tables.
fn map_against_unmap(board: &Board<'_>) {
    let a = board.with_page(host_page(0));
    let (mapped, unmapped) = both(
        board,
        || [1, 2].map(|n| board.map(a, RAM + n * PAGE_SIZE, host_page(n))),
        || board.unmap(a, RAM, 3),
    );
    assert_eq!((mapped, unmapped), ([Ok(()); 2], Ok(())));
    assert_eq!(board.m.pages.owner(host_page(0)), Some(Owner::Host));
}

/// A VM is reset while it gets a page: the page comes back, or stays the host's,
/// or (after the reset it is open) is refused.
fn map_against_reset(board: &Board<'_>) {
    let a = board.with_page(host_page(0));
    let (mapped, reset) =
        both(board, || board.map(a, RAM + PAGE_SIZE, host_page(1)), || patient(|| board.reset(a)));
    assert!(matches!(mapped, Ok(()) | Err(Error::State)));
    assert_eq!(reset, Ok(()));
    assert_eq!(board.m.pages.census().private, 0);
}

/// Two VMs are given table memory in ranges that overlap: all or nothing.
fn pools_overlap(board: &Board<'_>) {
    let (a, b) = (board.active(), board.active());
    let pool = |vm, n: u64| move || board.pool(vm, Pa(BASE + CARVEOUT + n * PAGE_SIZE), 3);
    let before = board.m.pages.census().table;
    let (at_a, at_b) = both(board, pool(a, 0), pool(b, 2));
    let got = [at_a, at_b].iter().filter(|r| r.is_ok()).count() as u64;
    assert!(got <= 1);
    assert_eq!(board.m.pages.census().table, before + 3 * got);
}

/// A page is lent as a run page and wanted as memory.
fn run_page_or_memory(board: &Board<'_>) {
    let (a, b) = (board.active(), board.open());
    let page = host_page(0);
    let (mapped, lent) = both(board, || board.map(a, RAM, page), || board.vcpu(b, 1, page));
    assert!(mapped.is_ok() != lent.is_ok(), "{mapped:?} {lent:?}");
}

/// Two CPUs end everything, while a third makes a new VM.
fn two_host_resets(board: &Board<'_>) {
    board.with_page(host_page(0));
    board.with_page(host_page(1));
    let end = || patient(|| board.host_reset());
    let (_, made) = both(board, || both(board, end, end), || patient(|| board.create()));
    assert!(matches!(made, Ok(_) | Err(Error::NoMemory)));
}

/// Three CPUs do anything to two VMs with few pages.
fn anything(board: &Board<'_>) {
    let vms = [board.active(), board.active()];
    let cpu = || {
        let mut rng = thread_rng();
        for _ in 0..6 {
            let vm = vms[rng.gen_range(0..2)];
            let page = host_page(rng.gen_range(0..4));
            let ipa = RAM + rng.gen_range(0..2) * 0x20_0000 + rng.gen_range(0..2) * PAGE_SIZE;
            let result = match rng.gen_range(0..12) {
                0..4 => board.map(vm, ipa, page),
                4..6 => board.unmap(vm, ipa, rng.gen_range(0..3)),
                6 => board.pool(vm, page, 1 + rng.gen_range(0..2)),
                7 => board.reset(vm).and_then(|()| {
                    board.call(vm, |vm| {
                        vm.set_boot(0, Boot::default())?;
                        vm.activate(&board.m)
                    })?;
                    Ok(())
                }),
                8 => {
                    board.fault(page, rng.r#gen());
                    Ok(())
                }
                9 if rng.gen_range(0..3) == 0 => board.destroy(vm),
                _ => board.run(vm, 0, |vttbr| _ = board.guest_page(vttbr, ipa)),
            };
            assert!(
                matches!(
                    result,
                    Ok(())
                        | Err(Error::NoMemory
                            | Error::Again
                            | Error::Busy
                            | Error::Denied
                            | Error::Invalid
                            | Error::Integrity
                            | Error::State)
                ),
                "{result:?}"
            );
        }
    };
    both(board, || both(board, cpu, cpu), cpu);
}

/// Which check is left out is told to the whole program.
static ONE_AT_A_TIME: StdMutex<()> = StdMutex::new(());
/// A check that the pure crate doesn't make: nothing is left out there.
const NOTHING: Check = Check::Panic;

fn explore_with(scheduler: impl Scheduler + 'static, scenario: Scenario) {
    let mut config = Shuttle::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = FailurePersistence::None;
    Runner::new(scheduler, config).run(move || {
        let records = records();
        let board = Board::new(FakeMachine::new(&records));
        scenario(&board);
        board.end();
    });
}

/// Tries schedules of both kinds: CPUs take turns at random; or one goes on until
/// it waits, but for a few places.
fn explore(left_out: Check, scenario: Scenario) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    leave_out::leave_out(left_out);
    explore_with(RandomScheduler::new_from_seed(1, SCHEDULES), scenario);
    explore_with(PctScheduler::new_from_seed(2, DEPTH, SCHEDULES), scenario);
}

/// What is wrong is found.
fn found(left_out: Check, scenario: Scenario) -> String {
    let result = catch_unwind(AssertUnwindSafe(|| explore(left_out, scenario)));
    let why = result.expect_err("it was not found");
    let text = why.downcast_ref::<String>().cloned();
    text.or_else(|| why.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}

macro_rules! scenarios {
    ($($name:ident)*) => { $(
        mod $name {
            #[test]
            fn keeps_what_must_hold() {
                super::explore(super::NOTHING, super::$name);
            }
        }
    )* };
}

scenarios! {
    one_page_for_two two_places_for_one handed_on destroyed_while_it_runs reset_while_it_runs
    one_vcpu_on_two stale_handle map_against_unmap map_against_reset pools_overlap
    run_page_or_memory two_host_resets anything
}

/// The locks the wrong way round: the host's map, and under it a VM.
fn locks_the_wrong_way_round(board: &Board<'_>) {
    let a = board.with_page(host_page(0));
    both(
        board,
        || board.m.with_host_map(|_| board.vms[0].lock().unwrap().is_ram(Ipa(RAM))),
        || board.unmap(a, RAM, 1),
    )
    .1
    .unwrap();
}

/// The handle is looked at, then the lock is taken once more.
fn handle_before_the_lock(board: &Board<'_>) {
    let a = board.active();
    let (ended, _) = both(
        board,
        || patient(|| board.destroy(a)).map(|()| board.active()),
        || {
            board.call(a, |_| Ok::<_, Error>(()))?;
            board.vms[0].lock().unwrap().map_page(&board.m, RAM, host_page(0).0, [0; 2])
        },
    );
    if ended.is_ok() {
        assert_eq!(board.m.pages.census().private, 0, "the old handle reached the new VM");
    }
}

#[test]
fn locks_that_are_swapped_are_found() {
    assert!(found(NOTHING, locks_the_wrong_way_round).contains("deadlock"));
}

#[test]
fn a_handle_checked_outside_the_lock_is_found() {
    assert!(found(NOTHING, handle_before_the_lock).contains("the old handle"));
}

#[test]
fn a_claim_in_two_steps_is_found() {
    found(Check::ClaimOnce, one_page_for_two);
    found(Check::ClaimOnce, pools_overlap);
    found(Check::ClaimOnce, run_page_or_memory);
    found(Check::ClaimOnce, anything);
}

#[test]
fn a_vcpu_on_two_cpus_is_found() {
    found(Check::VcpuBusy, one_vcpu_on_two);
}

#[test]
fn the_end_of_a_vm_that_runs_is_found() {
    found(Check::VmBusy, destroyed_while_it_runs);
    found(Check::VmBusy, reset_while_it_runs);
}
