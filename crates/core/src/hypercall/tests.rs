// SPDX-License-Identifier: MIT OR Apache-2.0
use std::sync::LazyLock;

use super::*;
use crate::addr::{Pa, words};
use crate::fake::{FakeMachine, host_page, records, root};
use crate::launch::Config;
use crate::page::VmSlot;

const NOT_SUPPORTED: u64 = u64::MAX;
const INVALID: u64 = u64::MAX - 1;
/// SMCCC's.
const INVALID_PARAMETER: u64 = u64::MAX - 2;
const RAM: u64 = 0x8000_0000;

/// A VM with vCPUs 0 (running) and 1 (off) of three, and 2 MiB of RAM.
fn vm_on(m: &FakeMachine<'_>) -> Vm {
    let mut vm = Vm::FREE;
    let config = Config { ipa_bits: 32, gic: 3, max_vcpus: 3 };
    vm.create(VmSlot(0), root(VmSlot(0)), config, 0, [1; 32]).unwrap();
    vm.add_ram(RAM, 0x20_0000).unwrap();
    vm.create_vcpu(m, 0, host_page(0).0, 0).unwrap();
    vm.create_vcpu(m, 1, host_page(1).0, 1).unwrap();
    vm.set_boot(0, Boot::default()).unwrap();
    vm.activate(m).unwrap();
    vm.enter(0).unwrap();
    vm
}

fn vm() -> Vm {
    vm_on(&FakeMachine::new(&records()))
}

/// A call that touches no page; `None` if the host acts on it.
fn call(vm: &mut Vm, caller: u64, x: [u64; 4]) -> Option<[u64; 4]> {
    static MACHINE: LazyLock<FakeMachine<'static>> =
        LazyLock::new(|| FakeMachine::new(records().leak()));
    match super::call(&*MACHINE, vm, caller, x, || Some([u64::MAX; 4])) {
        Ok(results) => Some(results),
        Err(host) => {
            assert_eq!(host, Pending::Hypercall);
            None
        }
    }
}

fn ask(vm: &mut Vm, x: [u64; 4]) -> u64 {
    match call(vm, 0, x) {
        Some([x0, 0, 0, 0]) => x0,
        reply => panic!("{reply:?}"),
    }
}

#[test]
fn the_monitor_answers_what_it_can() {
    let vm = &mut vm();
    for (x, expected) in [
        ([0x8000_0000, 0, 0, 0], 0x1_0002),
        ([0x8000_0001, 0x8000_0000, 0, 0], 0),
        ([0x8000_0001, 0x8000_0001, 0, 0], 0),
        ([0x8000_0001, 0xffff_ffff_8000_0001, 0, 0], 0),
        ([0x8000_0001, 0x8000_8000, 0, 0], NOT_SUPPORTED),
        ([0x8000_0001, 0x8000_7fff, 0, 0], NOT_SUPPORTED),
        ([0x8400_0000, 0, 0, 0], 0x1_0001),
        ([0x8400_0006, 0, 0, 0], 2),
        ([0x8400_0050, 0, 0, 0], 0x1_0000),
        // Not there, or not in this convention.
        ([0, 0, 0, 0], NOT_SUPPORTED),
        ([0xc400_0000, 0, 0, 0], NOT_SUPPORTED),
        ([0xc400_0002, 0, 0, 0], NOT_SUPPORTED),
        ([0x8400_0005, 0, 0, 0], NOT_SUPPORTED),
        ([0x8400_000b, 0, 0, 0], NOT_SUPPORTED),
        ([0xc400_000e, 0, 0, 0], NOT_SUPPORTED),
        ([0x8400_0054, 0, 0, 0], NOT_SUPPORTED),
        ([0x8600_0001, 0, 0, 0], NOT_SUPPORTED),
        ([0x8600_0005, 0, 0, 0], NOT_SUPPORTED),
        ([0xc600_0000, 0, 0, 0], NOT_SUPPORTED),
        ([0xc600_0001, 0, 0, 0], NOT_SUPPORTED),
        ([0xc600_0006, 0, 0, 0], NOT_SUPPORTED),
        ([0xc600_ff01, 0, 0, 0], NOT_SUPPORTED),
        // The host's calls are not the guest's.
        ([0xc200_0000, 0, 0, 0], NOT_SUPPORTED),
        ([0xc200_0012, 1, 0, 0], NOT_SUPPORTED),
        ([0x8200_ff01, 0, 0, 0], NOT_SUPPORTED),
        ([u64::MAX, 0, 0, 0], NOT_SUPPORTED),
        // Only the low half names the call.
        ([0xffff_ffff_8400_0000, 0, 0, 0], 0x1_0001),
    ] {
        assert_eq!(ask(vm, x), expected, "{x:x?}");
    }
    for f in havmsi_abi::Function::ALL {
        assert_eq!(ask(vm, [u64::from(f.id()), 1, 1, 1]), NOT_SUPPORTED);
    }
}

/// The key of a VM that starts at `pc`, as it asks for it.
fn key_of(m: &FakeMachine<'_>, slot: u8, pc: u64) -> Option<[u64; 4]> {
    let mut vm = Vm::FREE;
    let config = Config { ipa_bits: 32, gic: 3, max_vcpus: 1 };
    vm.create(VmSlot(slot), root(VmSlot(slot)), config, 0, [1; 32]).unwrap();
    vm.create_vcpu(m, 0, host_page(u64::from(slot)).0, 0).unwrap();
    vm.set_boot(0, Boot { pc, ..Boot::default() }).unwrap();
    let digest = vm.activate(m).unwrap();
    let mut ask = |half| super::call(m, &mut vm, 0, [GUEST_KEY, half, 0, 0], || None).unwrap();
    for half in [2, 3, 1 << 32, u64::MAX] {
        assert_eq!(ask(half), [NOT_SUPPORTED, 0, 0, 0]);
    }
    let [[status, a, b, _], [also, c, d, _]] = [ask(0), ask(1)];
    assert_eq!(status, also);
    let key = m.secret.map(|secret| words(&crate::launch::key(&secret, &digest)));
    assert_eq!(key, (status == 0).then_some([a, b, c, d]));
    key
}

const GUEST_KEY: u64 = havmsi_abi::GUEST_KEY_CALL as u64;

#[test]
fn a_key_is_that_of_the_launch_and_the_platform() {
    let (own, others) = (records(), records());
    let (m, mut other) = (FakeMachine::new(&own), FakeMachine::new(&others));
    let key = key_of(&m, 0, 0x8000_0000);
    assert!(key.is_some());
    assert_eq!(key_of(&m, 1, 0x8000_0000), key);
    assert_ne!(key_of(&m, 2, 0x8000_0004), key);
    other.secret = Some([8; 32]);
    assert_ne!(key_of(&other, 0, 0x8000_0000), key);
    other.secret = None;
    assert_eq!(key_of(&other, 1, 0x8000_0000), None);
    // Not by SMC32.
    assert_eq!(ask(&mut vm(), [GUEST_KEY & !0x4000_0000, 0, 0, 0]), NOT_SUPPORTED);
}

#[test]
fn a_key_is_final_and_a_reset_makes_another() {
    let m = FakeMachine::new(records().leak());
    let mut vm = Vm::FREE;
    let config = Config { ipa_bits: 32, gic: 2, max_vcpus: 1 };
    vm.create(VmSlot(0), root(VmSlot(0)), config, 0, [1; 32]).unwrap();
    vm.create_vcpu(&m, 0, host_page(0).0, 0).unwrap();
    vm.donate_pool(&m, host_page(1).0, 4).unwrap();
    vm.set_boot(0, Boot::default()).unwrap();
    vm.activate(&m).unwrap();
    let key = vm.key(&m, 0);
    // What the launch measured, changed after it.
    vm.map_device(&m, 0x802_0000, Pa(0x804_0000)).unwrap();
    assert_eq!(vm.key(&m, 0), key);
    while vm.reset(&m).is_err() {}
    vm.set_boot(0, Boot { pc: 4, ..Boot::default() }).unwrap();
    vm.activate(&m).unwrap();
    assert_ne!(vm.key(&m, 0), key);
}

#[test]
fn features_are_those_that_answer() {
    let vm = &mut vm();
    let there = [
        0x8000_0000,
        0x8400_0000,
        0x8400_0001,
        0xc400_0001,
        0x8400_0002,
        0x8400_0003,
        0xc400_0003,
        0x8400_0004,
        0xc400_0004,
        0x8400_0006,
        0x8400_0008,
        0x8400_0009,
        0x8400_000a,
        0x8400_0012,
        0xc400_0012,
    ];
    for function in (0x8400_0000..0x8400_0020).chain(0xc400_0000..0xc400_0020).chain([0x8000_0000])
    {
        let expected = if there.contains(&function) { 0 } else { NOT_SUPPORTED };
        assert_eq!(ask(vm, [0x8400_000a, function, 0, 0]), expected, "{function:#x}");
        assert_eq!(ask(vm, [0x8400_000a, 0xff << 32 | function, 0, 0]), expected);
    }
    for function in (0x8400_0050..0x8400_0058).chain(0xc400_0050..0xc400_0058) {
        let there = matches!(function, 0x8400_0050..=0x8400_0053 | 0xc400_0053);
        let expected = if there { 0 } else { NOT_SUPPORTED };
        assert_eq!(ask(vm, [0x8400_0051, function, 0, 0]), expected, "{function:#x}");
    }
}

#[test]
fn what_the_host_must_do_is_forwarded() {
    for function in [0x8400_0001, 0xc400_0001, 0x8400_0008, 0x8400_0009, 0x8400_0012, 0xc400_0012] {
        let mut vm = vm();
        assert_eq!(call(&mut vm, 0, [function, 1, 2, 3]), None, "{function:#x}");
        assert_eq!(vm.power(0), Some(Power::On));
    }
}

#[test]
fn a_vcpu_turns_itself_off() {
    let mut vm = vm();
    assert_eq!(call(&mut vm, 0, [0x8400_0002, 0, 0, 0]), None);
    assert_eq!((vm.power(0), vm.power(1)), (Some(Power::Off), Some(Power::Off)));
}

#[test]
fn cpu_on_has_three_refusals() {
    let mut vm = vm();
    let on = |target| [0xc400_0003, target, 0x1_2345_6000, 0x2_0000_0001];
    assert_eq!(ask(&mut vm, on(0)), u64::MAX - 3);
    assert_eq!(ask(&mut vm, on(2)), INVALID);
    assert_eq!(ask(&mut vm, on(0x101)), INVALID);
    assert_eq!(ask(&mut vm, on(1 << 32 | 1)), INVALID);
    // What is no affinity in an MPIDR does not count: MT, U, RES1.
    assert_eq!(call(&mut vm, 0, on(0xff00_0000_c100_0001)), None);
    let boot = Boot { pc: 0x1_2345_6000, x: [0x2_0000_0001, 0, 0, 0] };
    assert_eq!(vm.power(1), Some(Power::Pending(boot)));
    assert_eq!(ask(&mut vm, on(1)), u64::MAX - 4);
    vm.cpu_on_answered(0, 1);
    assert_eq!(vm.power(1), Some(Power::Off));
}

#[test]
fn thirty_two_bit_calls_have_thirty_two_bit_arguments() {
    let mut vm = vm();
    let high = 0xf_0000_0000;
    let on = [0x8400_0003, high | 1, high | 0x2000, high | 3];
    assert_eq!(call(&mut vm, 0, on), None);
    let boot = Boot { pc: 0x2000, x: [3, 0, 0, 0] };
    assert_eq!(vm.power(1), Some(Power::Pending(boot)));
    assert_eq!(ask(&mut vm, [0x8400_0004, high | 1, high, 0]), 2);
    let word = 0xffff_ffff;
    let random = Some([0, word, word, word]);
    assert_eq!(call(&mut vm, 0, [0x8400_0053, high | 96, 0, 0]), random);
    assert_eq!(ask(&mut vm, [0xc400_0004, high | 1, 0, 0]), INVALID);
    assert_eq!(ask(&mut vm, [0xc400_0053, high | 96, 0, 0]), INVALID);
}

#[test]
fn affinity_info_tells_each_state() {
    let mut vm = vm();
    let info = |vm: &mut Vm, target, level| ask(vm, [0xc400_0004, target, level, 0]);
    assert_eq!(info(&mut vm, 0, 0), 0);
    assert_eq!(info(&mut vm, 1, 0), 1);
    assert_eq!(info(&mut vm, 0x8000_0001, 0), 1);
    assert_eq!(info(&mut vm, 2, 0), INVALID);
    assert_eq!(info(&mut vm, 1, 1), INVALID);
    vm.cpu_on(0, 1, Boot::default()).unwrap();
    assert_eq!(info(&mut vm, 1, 0), 2);
}

#[test]
fn random_numbers_have_their_limits() {
    let vm = &mut vm();
    for (function, bits, good) in [
        (0x8400_0053, 0, false),
        (0x8400_0053, 1, true),
        (0x8400_0053, 96, true),
        (0x8400_0053, 97, false),
        (0xc400_0053, 0, false),
        (0xc400_0053, 97, true),
        (0xc400_0053, 192, true),
        (0xc400_0053, 193, false),
        (0xc400_0053, u64::MAX, false),
    ] {
        let reply = call(vm, 0, [function, bits, 0, 0]);
        let wide = function == 0xc400_0053;
        let random = random_answer(Some([u64::MAX; 4]), bits, wide);
        let expected = if good { random } else { [INVALID, 0, 0, 0] };
        assert_eq!(reply, Some(expected), "{function:#x} {bits}");
    }
    let uuid = havmsi_abi::UID.map(u64::from);
    assert_eq!(call(vm, 0, [0x8400_0052, 0, 0, 0]), Some(uuid));
}

#[test]
fn random_bits_fill_from_the_lowest_word() {
    let ones = Some([u64::MAX; 4]);
    assert_eq!(random_answer(None, 192, true), [u64::MAX - 2, 0, 0, 0]);
    assert_eq!(random_answer(ones, 192, true), [0, u64::MAX, u64::MAX, u64::MAX]);
    assert_eq!(random_answer(ones, 191, true), [0, u64::MAX >> 1, u64::MAX, u64::MAX]);
    assert_eq!(random_answer(ones, 129, true), [0, 1, u64::MAX, u64::MAX]);
    assert_eq!(random_answer(ones, 128, true), [0, 0, u64::MAX, u64::MAX]);
    assert_eq!(random_answer(ones, 65, true), [0, 0, 1, u64::MAX]);
    assert_eq!(random_answer(ones, 1, true), [0, 0, 0, 1]);
    let word = 0xffff_ffff;
    assert_eq!(random_answer(ones, 96, false), [0, word, word, word]);
    assert_eq!(random_answer(ones, 33, false), [0, 0, 1, word]);
    assert_eq!(random_answer(ones, 32, false), [0, 0, 0, word]);
    assert_eq!(random_answer(Some([1, 2, 3, 4]), 192, true), [0, 1, 2, 3]);
    assert_eq!(random_answer(Some([1, 2, 3, 4]), 96, false), [0, 1, 2, 3]);
}

#[test]
fn kvms_calls_are_found_by_their_owner_and_features() {
    let vm = &mut vm();
    let uid = Some([0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d]);
    assert_eq!(call(vm, 0, [0x8600_ff01, 1, 2, 3]), uid);
    // Features, meminfo, share, unshare, guard; not PTP.
    assert_eq!(call(vm, 0, [0x8600_0000, 1, 2, 3]), Some([0x9d, 0, 0, 0]));
    assert_eq!(call(vm, 0, [0xc600_0002, 0, 0, 0]), Some([4096, 0, 0, 0]));
    // They are SMC64, and what is reserved must be zero.
    for function in [2, 3, 4, 7] {
        assert_eq!(ask(vm, [0x8600_0000 | function, 0, 0, 0]), NOT_SUPPORTED);
        for x in [[0, 1, 0], [0, 0, 1], [0, 1 << 63, 0]] {
            let x = [0xc600_0000 | function, RAM + x[0], x[1], x[2]];
            assert_eq!(ask(vm, x), INVALID_PARAMETER, "{x:x?}");
        }
    }
    assert_eq!(ask(vm, [0xc600_0002, 0x1000, 0, 0]), INVALID_PARAMETER);
}

#[test]
fn a_page_is_shared_once_it_is_there_and_unshared_when_the_host_agrees() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = vm_on(&m);
    let call = |vm: &mut Vm, f, ipa| super::call(&m, vm, 0, [f, ipa, 0, 0], || None);
    let (share, unshare) = (0xc600_0003, 0xc600_0004);
    for ipa in [RAM + 8, RAM - 0x1000, RAM + 0x20_0000, 0, u64::MAX, u64::MAX - 0xfff, 1 << 32] {
        assert_eq!(call(&mut vm, share, ipa), Ok([INVALID_PARAMETER, 0, 0, 0]), "{ipa:#x}");
    }
    for _ in 0..2 {
        assert_eq!(call(&mut vm, share, RAM + 0x3000), Err(Pending::Nothing));
    }
    vm.donate_pool(&m, host_page(2).0, 2).unwrap();
    vm.map_page(&m, RAM + 0x3000, host_page(8).0, [0; 2]).unwrap();
    assert_eq!(call(&mut vm, share, RAM + 0x3000), Ok([0; 4]));
    assert_eq!(call(&mut vm, share, RAM + 0x3000), Ok([INVALID_PARAMETER, 0, 0, 0]));
    assert_eq!(m.pages.census().shared, 1);
    // The host hears of it, whatever it is about.
    for ipa in [RAM + 0x3000, RAM, 8] {
        assert_eq!(call(&mut vm, unshare, ipa), Err(Pending::Hypercall));
    }
    let mut answered = |f: u64, ipa, mut answer| {
        super::answered(&m, &mut vm, 0, [f, ipa], &mut answer);
        (answer, m.pages.census().shared)
    };
    let results = |x0| Answer::Results([x0, 7, 8, 9]);
    // No answer, no; an answer to another call; no such page; yes; twice.
    assert_eq!(answered(unshare, RAM + 0x3000, Answer::Nothing), (Answer::Nothing, 1));
    assert_eq!(answered(unshare, RAM + 0x3000, results(5)), (results(5), 1));
    assert_eq!(answered(0x8400_0001, RAM + 0x3000, results(0)), (results(0), 1));
    assert_eq!(answered(0x8600_0004, RAM + 0x3000, results(0)), (results(0), 1));
    // No page is there, or not any more: the call is made again.
    assert_eq!(answered(unshare, RAM + 0x2000, results(0)), (Answer::Nothing, 1));
    for ipa in [RAM + 0x3008, 0, u64::MAX] {
        assert_eq!(answered(unshare, ipa, results(0)), (results(INVALID_PARAMETER), 1));
    }
    assert_eq!(answered(0xff_0000_0000 | unshare, RAM + 0x3000, results(0)), (results(0), 0));
    let again = answered(unshare, RAM + 0x3000, results(0));
    assert_eq!(again, (results(INVALID_PARAMETER), 0));
}

#[test]
fn an_answer_is_also_that_of_a_cpu_on() {
    let records = records();
    let m = FakeMachine::new(&records);
    let mut vm = vm_on(&m);
    let on = [0xc400_0003, 1];
    vm.cpu_on(0, 1, Boot::default()).unwrap();
    // Not answered, the guest calls again: the target stays on.
    answered(&m, &mut vm, 0, on, &mut Answer::Nothing);
    answered(&m, &mut vm, 0, on, &mut Answer::Results([1, 0, 0, 0]));
    assert_eq!(vm.power(1), Some(Power::Pending(Boot::default())));
    assert_eq!(super::call(&m, &mut vm, 0, [on[0], 1, 0, 0], || None), Ok([u64::MAX - 4, 0, 0, 0]));
    vm.enter(1).unwrap();
    vm.cpu_off(1);
    vm.leave(1, 0);
    vm.cpu_on(0, 1, Boot::default()).unwrap();
    answered(&m, &mut vm, 0, on, &mut Answer::Results([1, 0, 0, 0]));
    assert_eq!(vm.power(1), Some(Power::Off));
}

#[test]
fn a_guarded_place_is_a_page_outside_ram() {
    let vm = &mut vm();
    for at in [0x900_0008, RAM, RAM + 0x1f_f000, 1 << 32, u64::MAX - 0xfff] {
        assert_eq!(ask(vm, [0xc600_0007, at, 0, 0]), INVALID_PARAMETER, "{at:#x}");
    }
    assert_eq!(vm.ram_or_device(Ipa(0x900_0000)), Some(false));
    for at in [0x800_0000, 0x800_0000, RAM + 0x20_0000, (1 << 32) - 0x1000] {
        assert_eq!(ask(vm, [0xc600_0007, at, 0, 0]), 0, "{at:#x}");
    }
    assert_eq!(vm.ram_or_device(Ipa(0x900_0000)), None);
}
