//! Returns to other segments: to the same level and outer ones, in all modes.

use super::machine::BASE;
use super::*;
use crate::vcpu::fault::SegmentFault;

const STACK: u64 = BASE + 0x800;
const RETF: &[u8] = &[0xcb];
const IRET: &[u8] = &[0xcf];
const IRETQ: &[u8] = &[0x48, 0xcf];

/// Descriptors: data and code of level 0, the same of level 3, 64-bit code of level 0 and 3.
const DATA: u64 = 0x08;
const CODE: u64 = 0x10;
const USER_DATA: u64 = 0x1b;
const USER_CODE: u64 = 0x23;
const CODE_64: u64 = 0x28;
const USER_CODE_64: u64 = 0x33;
const NOT_PRESENT: u64 = 0x38;

fn machine(mode: Mode, width: usize, stack: &[u64]) -> Ram {
    let mut ram = Ram::new(0x1000, mode);
    let table = [
        0u64,
        0x00cf_9200_0000_ffff,
        0x00cf_9a00_0000_ffff,
        0x00cf_f200_0000_ffff,
        0x00cf_fa00_0000_ffff,
        0x00af_9a00_0000_ffff,
        0x00af_fa00_0000_ffff,
        0x00cf_1a00_0000_ffff,
    ];
    ram.put(BASE + 0x400, table.map(u64::to_le_bytes).as_flattened());
    ram.tables[0] = TableRegister {
        base: BASE + 0x400,
        limit: 0x3f,
    };
    for (index, value) in stack.iter().enumerate() {
        let at = STACK + (index * width) as u64;
        ram.put(at, &value.to_le_bytes()[..width]);
    }
    ram
}

struct After {
    result: Result<Progress>,
    rip: u64,
    rsp: u64,
    rflags: u64,
}

fn run(ram: &mut Ram, mode: Mode, rflags: u64, code: &[u8]) -> After {
    let mut general = GeneralRegisters {
        rsp: STACK,
        ..Default::default()
    };
    let mut registers = Registers {
        general: &mut general,
        rip: 0x4_0000,
        rflags,
    };
    let result = Decoded::new(code, mode, 0x4_0000)
        .and_then(|decoded| decoded.emulate(&mut registers, ram, 1));
    let (rip, rflags) = (registers.rip, registers.rflags);
    After {
        result,
        rip,
        rsp: general.rsp,
        rflags,
    }
}

fn selectors(ram: &Ram) -> (u64, u64) {
    let of = |segment: Segment| ram.segments[segment as usize].selector.into();
    (of(Segment::Cs), of(Segment::Ss))
}

const DONE: Result<Progress> = Ok(Progress::Done);
use Mode::{Bits16, Bits32, Bits64};

#[test]
fn retf_to_the_same_level_and_an_outer_one() {
    let mut ram = machine(Bits32, 4, &[0x1234, CODE]);
    let same = run(&mut ram, Bits32, 2, &[0xca, 0x10, 0]); // retf 0x10
    assert_eq!((same.result, same.rip), (DONE, 0x1234));
    assert_eq!((same.rsp, selectors(&ram)), (STACK + 24, (CODE, 0x10)));
    // Four bytes of arguments, then the other stack, which loses as many.
    let frame = [0x1234, USER_CODE, 0, 0x9000, USER_DATA];
    let mut ram = machine(Bits32, 4, &frame);
    ram.segments[Segment::Ds as usize].selector = 8;
    ram.segments[Segment::Es as usize].rights.0 |= 3 << 5;
    let outer = run(&mut ram, Bits32, 2, &[0xca, 4, 0]);
    assert_eq!((outer.result, outer.rip, outer.rsp), (DONE, 0x1234, 0x9004));
    assert_eq!(selectors(&ram), (USER_CODE, USER_DATA));
    assert!(!ram.segments[Segment::Ds as usize].rights.is_usable());
    assert!(ram.segments[Segment::Es as usize].rights.is_usable());
    assert_eq!(ram.segments[Segment::Ss as usize].rights.dpl(), 3);
    // From 64-bit code to 32-bit code of level 3, and to 64-bit code.
    for (code, rsp) in [(USER_CODE, 0x9000), (USER_CODE_64, 0x1_0000_9000)] {
        let mut ram = machine(Bits64, 8, &[0x1234, code, 0x1_0000_9000, USER_DATA]);
        let outer = run(&mut ram, Bits64, 2, &[0x48, 0xcb]);
        assert_eq!((outer.result, outer.rip, outer.rsp), (DONE, 0x1234, rsp));
        assert_eq!(selectors(&ram), (code, USER_DATA));
    }
}

#[test]
fn returns_that_must_not_be() {
    let gp = |selector: u64| SegmentFault::GeneralProtection.of(selector as u16);
    let absent = SegmentFault::NotPresent.of(NOT_PRESENT as u16);
    for (cpl, frame, expected) in [
        (0, [0, 0, 0, 0], gp(0)),
        (0, [0, 0x80, 0, 0], gp(0x80)),
        (0, [0, DATA, 0, 0], gp(DATA)),
        (3, [0, CODE, 0, 0], gp(CODE)),
        (0, [0, USER_CODE & !3, 0, 0], gp(USER_CODE)),
        (0, [0, NOT_PRESENT, 0, 0], absent),
        (0, [0, USER_CODE, 0, 0], gp(0)),
        (0, [0, USER_CODE, 0, DATA], gp(DATA)),
        (0, [0, USER_CODE, 0, USER_CODE], gp(USER_CODE)),
    ] {
        let mut ram = machine(Bits32, 4, &frame);
        ram.cpl = cpl;
        let before = ram.segments;
        let refused = run(&mut ram, Bits32, 2, RETF);
        assert_eq!(refused.result, Err(EmulateError::Fault(expected)));
        assert_eq!((refused.rip, refused.rsp), (0x4_0000, STACK));
        assert_eq!(ram.segments, before);
    }
    let mut ram = machine(Bits64, 8, &[1 << 47, CODE_64, 2, STACK, DATA]);
    let fault = Err(EmulateError::Fault(Exception::GeneralProtection));
    assert_eq!(run(&mut ram, Bits64, 2, IRETQ).result, fault);
    assert!(!ram.nmis_blocked, "unblocked even where it faults");
    // To another task.
    const NT: u64 = 1 << 14;
    let mut ram = machine(Bits64, 8, &[0; 5]);
    assert_eq!(run(&mut ram, Bits64, NT, IRETQ).result, fault);
    let mut ram = machine(Bits32, 4, &[0; 5]);
    let refused = run(&mut ram, Bits32, NT, IRET).result;
    assert_eq!(refused, Err(EmulateError::Unsupported));
    // In virtual-8086 mode, to who may not.
    ram.addressing = Addressing::Virtual8086;
    ram.cpl = 3;
    assert_eq!(run(&mut ram, Bits32, 2, IRET).result, fault);
}

#[test]
fn iret_loads_the_flags_that_the_level_may_change() {
    const ALL: u64 = 0x3f_7fd7;
    const FLAGS: u64 = 0x25_7fd7;
    // 64-bit code takes the stack at its own level too, which may be none.
    for (selector, kept) in [(DATA, DATA), (0, 0)] {
        let frame = [0x1234, CODE_64, ALL & !(1 << 17), 0x9000, selector];
        let mut ram = machine(Bits64, 8, &frame);
        let same = run(&mut ram, Bits64, 2, IRETQ);
        assert_eq!((same.result, same.rip, same.rsp), (DONE, 0x1234, 0x9000));
        assert_eq!(selectors(&ram), (CODE_64, kept));
        assert_eq!(same.rflags, ALL & !(1 << 17));
        assert!(!ram.nmis_blocked);
    }
    // Level 3 changes neither IF nor IOPL, and 16 bits not the upper ones.
    let mut ram = machine(Bits64, 8, &[0x1234, USER_CODE_64, FLAGS, 0x9000, USER_DATA]);
    ram.cpl = 3;
    let user = run(&mut ram, Bits64, 2, IRETQ);
    assert_eq!((user.result, user.rflags), (DONE, FLAGS & !0x3200));
    let mut ram = machine(Bits32, 2, &[0x1234, CODE, 0x7fd7]);
    let short = run(&mut ram, Bits32, 0x20_0002, &[0x66, 0xcf]);
    assert_eq!((short.result, short.rip), (DONE, 0x1234));
    assert_eq!((short.rflags, short.rsp), (0x20_7fd7, STACK + 6));
    // To an outer level, with a stack of its own.
    let mut ram = machine(Bits32, 4, &[0x1234, USER_CODE, 0x202, 0x9000, USER_DATA]);
    let outer = run(&mut ram, Bits32, 2, IRET);
    assert_eq!((outer.result, outer.rsp), (DONE, 0x9000));
    assert_eq!(
        (outer.rflags, selectors(&ram)),
        (0x202, (USER_CODE, USER_DATA))
    );
}

#[test]
fn iret_in_real_and_to_virtual_8086_mode() {
    const VM: u64 = 1 << 17;
    let mut ram = machine(Bits16, 2, &[0x1234, 0xf000, 0x7fd7]);
    ram.addressing = Addressing::Real;
    let real = run(&mut ram, Bits16, 2, IRET);
    assert_eq!((real.result, real.rip), (DONE, 0x1234));
    assert_eq!((real.rsp, real.rflags), (STACK + 6, 0x7fd7));
    let cs = ram.segments[Segment::Cs as usize];
    assert_eq!((cs.selector, cs.base), (0xf000, 0xf_0000));
    // Beyond the limit, which has not changed.
    let mut ram = machine(Bits16, 4, &[0x1_0000, 0xf000]);
    ram.addressing = Addressing::Real;
    let beyond = run(&mut ram, Bits16, 2, &[0x66, 0xcb]);
    let fault = Err(EmulateError::Fault(Exception::GeneralProtection));
    assert_eq!(beyond.result, fault);
    let frame = [
        0x1234,
        0xf000,
        VM | 0x3202,
        0x9000,
        0x100,
        0x200,
        0x300,
        0x400,
        0x500,
    ];
    let mut ram = machine(Bits32, 4, &frame);
    let away = run(&mut ram, Bits32, 2, IRET);
    assert_eq!((away.result, away.rip, away.rsp), (DONE, 0x1234, 0x9000));
    assert_eq!(away.rflags, VM | 0x3202);
    let bases = ram.segments.map(|segment| segment.base);
    assert_eq!(bases, [0x2000, 0xf_0000, 0x1000, 0x3000, 0x4000, 0x5000]);
    // And within it.
    let mut ram = machine(Bits16, 2, &[0x1234, 0x8000, 0x0202]);
    (ram.addressing, ram.cpl) = (Addressing::Virtual8086, 3);
    let within = run(&mut ram, Bits16, VM | 0x3202, IRET);
    assert_eq!((within.result, within.rflags), (DONE, VM | 0x3202));
    assert_eq!(
        ram.segments[Segment::Cs as usize],
        SegmentRegister::paragraph(0x8000)
    );
}
