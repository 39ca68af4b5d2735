// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;

const RAM: u64 = 0x8000_0000;
const NOTHING: u64 = 0xa00_0000;

/// `x[n] = 0x1111_1111_1111_1111 * n` at first, then whatever distinguishes.
fn registers() -> [u64; 31] {
    let mut x = [0; 31];
    for (value, n) in x.iter_mut().zip(1..) {
        *value = 0xf0e0_d0c0_b0a0_9080_u64.rotate_left(n) ^ u64::from(n);
    }
    x
}

fn place(ipa: Ipa) -> Option<bool> {
    assert!(ipa.is_page());
    match ipa.0 {
        RAM..0x1_0000_0000 => Some(true),
        NOTHING => None,
        _ => Some(false),
    }
}

/// What an ID register holds: its place, and a one for each feature behind.
fn raw(crm: u8, op2: u8) -> u64 {
    0x1111_1111_1111_1100 | u64::from(crm << 4 | op2)
}

fn on(gic: u64, esr: u64, ipa: u64) -> Action {
    let s = Syndrome { esr, ipa: Ipa(ipa), privileged: true, idx: 1 };
    let config = Config { ipa_bits: 33, gic, max_vcpus: 1 };
    decide(&s, &registers(), &config, place, raw)
}

fn at(esr: u64, ipa: u64) -> Action {
    on(3, esr, ipa)
}

fn of(esr: u64) -> Action {
    at(esr, 0)
}

fn user(esr: u64) -> Action {
    let s = Syndrome { esr, ipa: Ipa(0), privileged: false, idx: 1 };
    let config = Config { ipa_bits: 33, gic: 3, max_vcpus: 1 };
    decide(&s, &registers(), &config, |_| Some(false), raw)
}

const UNDEF: Action = Action::Inject(Injection::Undefined);
const ABORT: Action = Action::Inject(Injection::ExternalAbort);

const fn msr(register: u32, rt: u64, read: bool) -> u64 {
    let r = register as u64;
    let (op0, op1, crn, crm, op2) = (r >> 14, r >> 11 & 7, r >> 7 & 15, r >> 3 & 15, r & 7);
    let iss = op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | rt << 5 | crm << 1 | read as u64;
    ec::SYSREG << 26 | IL | iss
}

/// ESR_ELx of an abort (Arm ARM D24.2.40), as far as others use it.
#[test]
fn bits_of_an_abort_are_where_the_manual_has_them() {
    assert_eq!((IL, FNV, CM, S1PTW, WNR), (1 << 25, 1 << 10, 1 << 8, 1 << 7, 1 << 6));
    assert_eq!((FSC_TYPE, FSC_PERMISSION), (0b11_1100, 0b00_1100));
}

#[test]
fn a_wait_shows_only_which_it_is() {
    let exit = |esr| Exit { class: ExitClass::Wfx, esr, mode: 1, ..Exit::default() };
    let wfi = Action::Exit { exit: exit(0x0600_0000), pending: Pending::Nothing, step: true };
    let wfe = Action::Exit { exit: exit(0x0600_0001), pending: Pending::Nothing, step: true };
    assert_eq!(of(0x0600_0000), wfi);
    // Condition codes, register numbers and the like go.
    assert_eq!(of(0x07ff_fffe), wfi);
    assert_eq!(of(0x0600_0001), wfe);
    assert_eq!(of(0x05ff_ffff | 0xff << 32), wfe);
    let Action::Exit { exit, .. } = user(0x0600_0000) else { panic!("no exit") };
    assert_eq!(exit.mode, 0);
}

#[test]
fn calls_come_from_el1() {
    assert_eq!(of(0x16 << 26 | IL), Action::Hypercall);
    assert_eq!(of(0x17 << 26 | IL | 0xffff), Action::Hypercall);
    assert_eq!(user(0x16 << 26 | IL), UNDEF);
    assert_eq!(user(0x17 << 26 | IL), UNDEF);
}

#[test]
fn what_was_not_offered_is_undefined() {
    for class in (0..64).filter(|c| ![0x01, 0x16, 0x17, 0x18, 0x20, 0x24].contains(c)) {
        assert_eq!(at(class << 26 | 0x1ff_ffff, RAM), UNDEF, "{class:#x}");
    }
}

#[test]
fn system_registers_are_decoded_field_by_field() {
    let access = SysregAccess::decode(ec::SYSREG << 26 | IL | 0x3f_ffff);
    assert_eq!(access.register, 0xffff);
    assert_eq!((access.rt, access.read), (31, true));
    for (register, esr) in [
        (sysreg(1, 0, 0, 0, 0), 1 << 20),
        (sysreg(0, 1, 0, 0, 0), 1 << 14),
        (sysreg(0, 0, 1, 0, 0), 1 << 10),
        (sysreg(0, 0, 0, 1, 0), 1 << 1),
        (sysreg(0, 0, 0, 0, 1), 1 << 17),
    ] {
        assert_eq!(SysregAccess::decode(esr).register, register);
        assert!(!SysregAccess::decode(esr).read);
    }
    assert_eq!(SysregAccess::decode(9 << 5).rt, 9);
    let target = |read| SysregAccess { register: 0, rt: 9, read }.target();
    assert_eq!((target(true), target(false)), (9, 31));
}

#[test]
fn id_registers_are_those_that_tid3_traps() {
    let id = |world, op0, op1, crn, crm, op2| {
        let esr = msr(sysreg(op0, op1, crn, crm, op2), 0, true);
        SysregAccess::decode(esr).fixed(world, raw)
    };
    for world in [World::Host, World::Guest] {
        for (crm, op2) in [(1, 0), (4, 0), (4, 1), (5, 0), (6, 1), (7, 2), (7, 7)] {
            let seen = idreg::visible(crm, op2, raw(crm, op2), world);
            assert_eq!(id(world, 3, 0, 0, crm.into(), op2.into()), Some(seen));
        }
        for (op0, op1, crn, crm, op2) in
            [(3, 0, 0, 0, 7), (3, 0, 0, 8, 0), (3, 1, 0, 1, 0), (2, 0, 0, 1, 0), (3, 0, 1, 1, 0)]
        {
            assert_eq!(id(world, op0, op1, crn, crm, op2), None);
        }
    }
}

#[test]
fn the_monitor_answers_registers_of_its_own() {
    let id = msr(sysreg(3, 0, 0, 4, 0), 3, true);
    let value = idreg::visible(4, 0, raw(4, 0), World::Guest);
    assert_eq!(of(id), Action::Fixed { rt: 3, value });
    assert_eq!(of(msr(sysreg(3, 0, 0, 4, 0), 3, false)), UNDEF);
    for read in [false, true] {
        let target = |rt| if read { rt } else { 31 };
        let debug = msr(sysreg(2, 0, 0, 2, 2), 3, read);
        assert_eq!(of(debug), Action::Debug(target(3)));
        let lock = msr(sysreg(2, 0, 1, 1, 4), 3, read);
        assert_eq!(of(lock), Action::Fixed { rt: target(3), value: 8 });
        let sre = msr(sysreg(3, 0, 12, 12, 5), 4, read);
        assert_eq!(of(sre), Action::Fixed { rt: target(4), value: 7 });
        let actlr = msr(sysreg(3, 0, 1, 0, 1), 4, read);
        assert_eq!(of(actlr), Action::Fixed { rt: target(4), value: 0 });
        // PMCR_EL0, LORC_EL1, CNTHCTL_EL2, DC ISW.
        for unknown in [
            sysreg(3, 3, 9, 12, 0),
            sysreg(3, 0, 10, 4, 3),
            sysreg(3, 4, 14, 1, 0),
            sysreg(1, 0, 7, 6, 2),
        ] {
            assert_eq!(of(msr(unknown, 0, read)), UNDEF);
        }
    }
}

#[test]
fn interrupts_between_vcpus_go_to_the_host() {
    let x = registers();
    for op2 in 5..8 {
        let register = sysreg(3, 0, 12, 11, op2);
        let exit = Exit {
            class: ExitClass::SysregWrite,
            esr: msr(register, 0, false),
            data: x[30],
            mode: 1,
            ..Exit::default()
        };
        let action = Action::Sgi(exit, Sgi::by_register(1, x[30]));
        assert_eq!(of(msr(register, 30, false) | 1 << 40), action);
        assert_eq!(of(msr(register, 30, true)), UNDEF);
        let Action::Sgi(exit, sgi) = of(msr(register, 31, false)) else { panic!("no SGI") };
        assert_eq!((exit.data, sgi), (0, Sgi::by_register(1, 0)));
        // Without a GICv3 there is no such register.
        for gic in [0, 2] {
            assert_eq!(on(gic, msr(register, 30, false), 0), UNDEF);
        }
    }
}

#[test]
fn a_gicv2_sends_by_a_store() {
    let x = registers();
    let sgir = 0x800_0f00;
    let word = DABT | ISV | 2 << 22 | WNR | 0x07;
    let exit = Exit {
        class: ExitClass::MmioWrite,
        esr: word,
        ipa: sgir,
        data: x[12] & 0xffff_ffff,
        mode: 1,
    };
    let sgi = Sgi::by_distributor(1, x[12] & 0xffff_ffff);
    assert_eq!(on(2, word | 12 << 16, sgir), Action::Sgi(exit, sgi));
    let store = |action| {
        matches!(action, Action::Exit { pending: Pending::Mmio(Access { write: true, .. }), .. })
    };
    // Another width, place or interrupt controller, RAM, a load.
    for sas in [0, 1, 3] {
        assert!(store(on(2, DABT | ISV | sas << 22 | WNR | 0x07, sgir)));
    }
    for ipa in [0x800_0efc, 0x800_0f04, 0x800_1f0, 0x800_0000] {
        assert!(store(on(2, word, ipa)));
    }
    assert!(store(on(3, word, sgir)) && store(on(0, word, sgir)));
    for action in [on(2, word, RAM + 0xf00), on(2, word & !WNR, sgir)] {
        assert!(matches!(action, Action::Exit { .. }) && !store(action));
    }
}

#[test]
fn the_physical_timer_is_the_hosts() {
    let x = registers();
    for op2 in 0..3 {
        let register = sysreg(3, 3, 14, 2, op2);
        let esr = msr(register, 0, true);
        let exit = Exit { class: ExitClass::SysregRead, esr, mode: 1, ..Exit::default() };
        let pending = Pending::Sysreg(SysregAccess { register, rt: 7, read: true });
        assert_eq!(of(msr(register, 7, true)), Action::Exit { exit, pending, step: false });
        let esr = msr(register, 0, false);
        let class = ExitClass::SysregWrite;
        let exit = Exit { class, esr, data: x[7], mode: 1, ..Exit::default() };
        let pending = Pending::Sysreg(SysregAccess { register, rt: 7, read: false });
        assert_eq!(of(msr(register, 7, false)), Action::Exit { exit, pending, step: false });
    }
    // CNTPCT_EL0 is not trapped, CNTV_* neither.
    assert_eq!(of(msr(sysreg(3, 3, 14, 3, 1), 0, true)), UNDEF);
}

const DABT: u64 = ec::DATA_ABORT << 26 | IL;
const IABT: u64 = ec::INSTRUCTION_ABORT << 26 | IL;

#[test]
fn a_fault_in_ram_shows_its_page_only() {
    let fault = |esr| {
        let ipa = RAM + 0x5000;
        let exit = Exit { class: ExitClass::Fault, esr, ipa, mode: 1, ..Exit::default() };
        Action::Exit { exit, pending: Pending::Nothing, step: false }
    };
    let ipa = RAM + 0x5a5f;
    let read = DABT | FSC_TRANSLATION_L3;
    // Size, sign, register, width, acquire and the level that missed: all hidden.
    assert_eq!(at(DABT | ISV | 3 << 22 | SSE | 9 << 16 | SF | 1 << 14 | 0x05, ipa), fault(read));
    assert_eq!(at(DABT | ISV | WNR | 9 << 16 | 0x06, ipa), fault(read | WNR));
    assert_eq!(at(DABT | 0x0f, ipa), fault(read));
    assert_eq!(at(DABT | 0x0b, ipa), fault(read));
    // Walks and cache maintenance are no writes.
    assert_eq!(at(DABT | WNR | S1PTW | 0x07, ipa), fault(read));
    assert_eq!(at(DABT | WNR | CM | 0x07, ipa), fault(read));
    assert_eq!(at(IABT | 0x07, ipa), fault(IABT | FSC_TRANSLATION_L3));
    assert_eq!(at(IABT | WNR | 0x07, ipa), fault(IABT | FSC_TRANSLATION_L3));
    // At EL0 as well.
    let s = Syndrome { esr: DABT | 0x07, ipa: Ipa(ipa), privileged: false, idx: 0 };
    let config = Config { ipa_bits: 33, gic: 3, max_vcpus: 1 };
    let Action::Exit { exit, .. } = decide(&s, &registers(), &config, place, raw) else {
        panic!("no exit")
    };
    assert_eq!((exit.class, exit.mode), (ExitClass::Fault, 0));
}

#[test]
fn registers_that_nobody_has_read_the_same_for_all() {
    let fixed = |op0, op1, crn, crm, op2| {
        let register = sysreg(op0, op1, crn, crm, op2);
        SysregAccess { register, rt: 0, read: true }.fixed(World::Host, raw)
    };
    // OSLSR_EL1, ICC_SRE_EL1.
    assert_eq!((fixed(2, 0, 1, 1, 4), fixed(3, 0, 12, 12, 5)), (Some(1 << 3), Some(7)));
    // OSLAR, OSDLR, DBGPRCR, MDRAR, ACTLR.
    for (op0, crm, op2) in [(2, 0, 4), (2, 3, 4), (2, 4, 4), (2, 0, 0), (3, 0, 1)] {
        assert_eq!(fixed(op0, 0, 1, crm, op2), Some(0));
    }
    // MDSCR_EL1, TRCPRGCTLR.
    assert_eq!((fixed(2, 0, 0, 2, 2), fixed(2, 1, 0, 1, 0)), (None, None));
}

#[test]
fn aborts_that_are_no_stage_2_faults_are_the_guests() {
    for fsc in (0..64).filter(|fsc| !(0x04..0x10).contains(fsc)) {
        assert_eq!(at(DABT | ISV | fsc, RAM), ABORT, "{fsc:#x}");
        assert_eq!(at(IABT | fsc, RAM), ABORT, "{fsc:#x}");
    }
    // Beyond its address space.
    assert_eq!(at(DABT | ISV | 0x04, 1 << 33), ABORT);
    assert_eq!(at(DABT | ISV | 0x04, u64::MAX), ABORT);
    assert!(matches!(at(DABT | ISV | 0x04, (1 << 33) - 1), Action::Exit { .. }));
    // Code or tables in MMIO, and accesses without a syndrome.
    assert_eq!(at(IABT | ISV | 0x07, 0x900_0000), ABORT);
    assert_eq!(at(DABT | ISV | S1PTW | 0x07, 0x900_0000), ABORT);
    assert_eq!(at(DABT | 0x07, 0x900_0000), ABORT);
    assert_eq!(at(DABT | WNR | 0x07, 0x900_0000), ABORT);
    // Cache maintenance of it is nothing.
    assert_eq!(at(DABT | CM | WNR | 0x07, 0x900_0000), Action::Skip);
    assert_eq!(at(DABT | CM | WNR | S1PTW | 0x07, 0x900_0000), ABORT);
}

#[test]
fn a_load_shows_no_register() {
    let kept = DABT | ISV | 2 << 22 | SSE | SF | 0x07;
    let hidden = 12 << 16 | 1 << 14 | 1 << 13 | 3 << 11 | 1 << 10 | 1 << 9 | 0xff << 32;
    let exit =
        Exit { class: ExitClass::MmioRead, esr: kept, ipa: 0x900_0abc, mode: 1, ..Exit::default() };
    let access = Access { rt: 12, size: 4, signed: true, wide: true, write: false };
    let pending = Pending::Mmio(access);
    assert_eq!(at(kept | hidden, 0x900_0abc), Action::Exit { exit, pending, step: false });
}

#[test]
fn a_store_shows_no_more_than_it_stores() {
    let x = registers();
    for (sas, mask) in [(0, 0xff), (1, 0xffff), (2, 0xffff_ffff), (3, u64::MAX)] {
        let kept = DABT | ISV | sas << 22 | SF | WNR | 0x07;
        let exit = Exit {
            class: ExitClass::MmioWrite,
            esr: kept,
            ipa: 0x900_0001,
            data: x[12] & mask,
            mode: 1,
        };
        let access = Access { rt: 12, size: 1 << sas, signed: false, wide: true, write: true };
        let action = Action::Exit { exit, pending: Pending::Mmio(access), step: false };
        assert_eq!(at(kept | 12 << 16, 0x900_0001), action);
        let Action::Exit { exit, .. } = at(kept | 31 << 16, 0) else { panic!("no exit") };
        assert_eq!(exit.data, 0);
    }
}

#[test]
fn a_hypercall_shows_its_arguments() {
    let mut x = registers();
    let exit = call(&Pending::Hypercall, x[1]);
    let expected = Exit { class: ExitClass::Hvc, esr: 0x16 << 26 | IL, mode: 1, ..Exit::default() };
    assert_eq!(exit, expected);
    for (function, [a, b, c]) in [
        (0xc400_0003, [x[1], x[2], x[3]]),
        (0xc400_0001, [x[1], x[2], x[3]]),
        (0xc600_0004, [x[1], x[2], x[3]]),
        (0x8400_0003, [x[1], x[2], x[3]]),
        (0x8400_0002, [0; 3]),
        (0x8400_0008, [0; 3]),
        (0x8400_0009, [0; 3]),
    ] {
        x[0] = 1 << 32 | function;
        assert_eq!(shown_registers(exit.class, &x), [x[0], a, b, c]);
        assert_eq!(shown_registers(ExitClass::MmioWrite, &x), [0; 4]);
    }
}

#[test]
fn an_unmapped_page_can_be_named_by_a_call() {
    let esr = 0x24 << 26 | IL | WNR | 7;
    let ipa = RAM + 0x5000;
    let expected = Exit { class: ExitClass::Fault, esr, ipa, mode: 1, ..Exit::default() };
    assert_eq!(call(&Pending::Nothing, ipa + 8), expected);
    assert_eq!(shown_registers(ExitClass::Fault, &registers()), [0; 4]);
}

#[test]
fn where_the_guest_has_no_device_the_host_sees_no_access() {
    for at in [NOTHING, NOTHING + 0xfff] {
        for esr in [DABT | ISV, DABT | ISV | WNR, DABT | ISV | WNR | 2 << 22, IABT, DABT | S1PTW] {
            assert_eq!(on(2, esr | 0x07, at), ABORT, "{esr:#x}");
        }
        assert_eq!(self::at(DABT | CM | WNR | 0x07, at), ABORT);
    }
    // Nor an SGI.
    assert_eq!(on(2, DABT | ISV | WNR | 2 << 22 | 0x07, NOTHING + 0xf00), ABORT);
    for at in [NOTHING - 1, NOTHING + 0x1000] {
        assert!(matches!(self::at(DABT | ISV | 0x07, at), Action::Exit { .. }));
    }
}

#[test]
fn the_zero_register_reads_zero_and_keeps_nothing() {
    let mut x = registers();
    assert_eq!(read_register(&x, 31), 0);
    assert_eq!(read_register(&x, 30), x[30]);
    write_register(&mut x, 31, 5);
    assert_eq!(x, registers());
    write_register(&mut x, 30, 5);
    assert_eq!((x[30], x[29]), (5, registers()[29]));
}

#[test]
fn a_load_takes_its_size_and_extends_as_the_instruction_says() {
    let load =
        |size, signed, wide, data| Access { rt: 0, size, signed, wide, write: false }.loaded(data);
    let data = 0x8899_aabb_ccdd_eeff;
    assert_eq!(load(1, false, true, data), 0xff);
    assert_eq!(load(1, true, true, data), u64::MAX);
    assert_eq!(load(1, true, false, data), 0xffff_ffff);
    assert_eq!(load(1, true, true, 0x7f), 0x7f);
    assert_eq!(load(2, false, true, data), 0xeeff);
    assert_eq!(load(2, true, false, data), 0xffff_eeff);
    assert_eq!(load(2, true, true, data), 0xffff_ffff_ffff_eeff);
    assert_eq!(load(4, false, false, data), 0xccdd_eeff);
    assert_eq!(load(4, true, true, data), 0xffff_ffff_ccdd_eeff);
    assert_eq!(load(8, false, true, data), data);
}

#[test]
fn accesses_are_decoded_field_by_field() {
    assert_eq!(Access::decode(!ISV), None);
    let plain = Access { rt: 0, size: 1, signed: false, wide: false, write: false };
    for (bits, access) in [
        (0, plain),
        (17 << 16, Access { rt: 17, ..plain }),
        (1 << 22, Access { size: 2, ..plain }),
        (2 << 22, Access { size: 4, ..plain }),
        (3 << 22, Access { size: 8, ..plain }),
        (SSE, Access { signed: true, ..plain }),
        (SF, Access { wide: true, ..plain }),
        (WNR, Access { write: true, ..plain }),
    ] {
        assert_eq!(Access::decode(ISV | bits), Some(access));
    }
}

#[test]
fn only_what_was_asked_is_answered() {
    let load = Access { rt: 3, size: 2, signed: true, wide: false, write: false };
    let results = [1, 2, 3, 4];
    let data = 0xffff_8001;
    let abort = Answer::Inject(Injection::ExternalAbort);
    let undef = Answer::Inject(Injection::Undefined);
    let store = Access { write: true, ..load };
    let sysreg = |read| SysregAccess { register: 0, rt: 9, read };
    let set = |rt, value| Some(Answer::Set { rt, value });
    // COMPLETE, INJECT_SEA, INJECT_UNDEF for each.
    let table = [
        (Pending::Nothing, [None, None, None]),
        (Pending::Mmio(load), [set(3, 0xffff_8001), Some(abort), None]),
        (Pending::Mmio(store), [set(31, 0), Some(abort), None]),
        (Pending::Sysreg(sysreg(true)), [set(9, data), None, Some(undef)]),
        (Pending::Sysreg(sysreg(false)), [set(31, data), None, Some(undef)]),
        (Pending::Hypercall, [Some(Answer::Results(results)), None, None]),
        (Pending::Sgi, [Some(Answer::Nothing), None, None]),
    ];
    for (pending, answers) in table {
        let give = |flags| {
            let flags = EntryFlags(flags);
            answer(&pending, &Entry { flags, gpr: results, data, ..Entry::default() })
        };
        for (flags, expected) in [1, 2, 4].into_iter().zip(answers) {
            assert_eq!(give(flags), expected.ok_or(Error::Invalid), "{pending:?} {flags}");
            // The traps of WFI and WFE are another matter.
            assert_eq!(give(flags | 0x18), expected.ok_or(Error::Invalid));
        }
        assert_eq!(give(0), Ok(Answer::Nothing));
        assert_eq!(give(0x18), Ok(Answer::Nothing));
        for bad in [3, 5, 6, 7, 0x20, 0x21, 1 << 63] {
            assert_eq!(give(bad), Err(Error::Invalid), "{pending:?} {bad:#x}");
        }
    }
    assert_eq!(Pending::default(), Pending::Nothing);
}
