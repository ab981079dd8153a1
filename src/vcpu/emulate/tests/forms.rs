//! What the comparison with this CPU does not show: other modes, faults, jumps, segments.

use super::machine::{BASE, DATA_16};
use super::*;
use crate::vcpu::emulate::alu::{CF, DF, ZF};
use crate::vcpu::fault::SegmentFault;

const RIP: u64 = 0x4_0000;
const FLAGS: u64 = 0x202;

struct Run {
    result: Result<Progress>,
    general: GeneralRegisters,
    rip: u64,
    rflags: u64,
}

fn start() -> GeneralRegisters {
    let mut registers = GeneralRegisters::default();
    for index in 0..16 {
        registers.set(index, BASE + 0x10 * u64::from(index));
    }
    registers.rsp = BASE + 0x800;
    registers
}

fn run_from(general: GeneralRegisters, rflags: u64, ram: &mut Ram, mode: Mode, code: &[u8]) -> Run {
    let mut run = Run {
        result: Err(EmulateError::Incomplete),
        general,
        rip: RIP,
        rflags,
    };
    let mut registers = Registers {
        general: &mut run.general,
        rip: RIP,
        rflags,
    };
    run.result =
        Decoded::new(code, mode, RIP).and_then(|decoded| decoded.emulate(&mut registers, ram, 4));
    (run.rip, run.rflags) = (registers.rip, registers.rflags);
    run
}

fn run(ram: &mut Ram, mode: Mode, code: &[u8]) -> Run {
    run_from(start(), FLAGS, ram, mode, code)
}

fn done(run: &Run, length: u64) {
    assert_eq!((run.result, run.rip), (Ok(Progress::Done), RIP + length));
}

fn fault(exception: Exception) -> Result<Progress> {
    Err(EmulateError::Fault(exception))
}

use Mode::{Bits16, Bits32, Bits64};

#[test]
fn operands_of_other_modes() {
    let mut ram = Ram::new(0x1000, Bits16);
    let mut registers = start();
    registers.rbx = 0x5_fff0;
    registers.rsi = 0x1234;
    // mov [bx + si], ax: the sum wraps at 16 bits.
    done(
        &run_from(registers, FLAGS, &mut ram, Bits16, &[0x89, 0x00]),
        2,
    );
    assert_eq!(ram.log, [(true, 0x1224, 2)]);
    // mov [bx + si], eax in 16-bit code; a base that is added behind.
    ram.segments[Segment::Ds as usize].base = 0xffff_0000;
    ram.base = 0xffff_1000;
    done(
        &run_from(registers, FLAGS, &mut ram, Bits16, &[0x66, 0x89, 0x00]),
        3,
    );
    assert_eq!(ram.log[1], (true, 0xffff_1224, 4));
    // mov eax, [moffs32].
    let mut ram = Ram::new(0x1000, Bits32);
    ram.put(0x1010, &[1, 2, 3, 4]);
    let load = run(&mut ram, Bits32, &[0xa1, 0x10, 0x10, 0, 0]);
    done(&load, 5);
    assert_eq!(load.general.rax, 0x0403_0201);
    // In 64-bit code the same bytes go by 64 bits; with a prefix by 32.
    let mut ram = Ram::new(0x1000, Bits64);
    done(&run(&mut ram, Bits64, &[0x67, 0xa1, 0x10, 0x10, 0, 0]), 6);
    assert_eq!(ram.log, [(false, 0x1010, 4)]);
    // gs: mov al, [rip + 0x10].
    ram.segments[Segment::Gs as usize].base = BASE.wrapping_sub(RIP);
    done(
        &run(&mut ram, Bits64, &[0x65, 0x8a, 0x05, 0x10, 0, 0, 0]),
        7,
    );
    assert_eq!(ram.log[1], (false, BASE + 0x17, 1));
    // xlat.
    let registers = GeneralRegisters {
        rax: 0xff05,
        ..start()
    };
    done(&run_from(registers, FLAGS, &mut ram, Bits64, &[0xd7]), 1);
    assert_eq!(ram.log[2], (false, BASE + 0x35, 1));
}

#[test]
fn limits_and_types_fault_before_anything_is_accessed() {
    let mut ram = Ram::new(0x1000, Bits32);
    let segment = |ram: &mut Ram, segment: Segment, limit, rights| {
        ram.segments[segment as usize] = SegmentRegister {
            limit,
            rights,
            ..ram.segments[segment as usize]
        };
    };
    let gp = fault(Exception::GeneralProtection);
    segment(&mut ram, Segment::Ds, 0x1002, machine::DATA_32);
    // mov [eax], ebx; or [eax], bl.
    assert_eq!(run(&mut ram, Bits32, &[0x89, 0x18]).result, gp);
    done(&run(&mut ram, Bits32, &[0x08, 0x18]), 2);
    // cs: mov [eax], ebx: code is not written to, but read.
    assert_eq!(run(&mut ram, Bits32, &[0x2e, 0x89, 0x18]).result, gp);
    done(&run(&mut ram, Bits32, &[0x2e, 0x8b, 0x18]), 3);
    ram.addressing = Addressing::Real;
    done(&run(&mut ram, Bits32, &[0x2e, 0x89, 0x18]), 3);
    ram.addressing = Addressing::Protected;
    // mov [ebp], ebx is the stack's.
    segment(&mut ram, Segment::Ss, 0x10, DATA_16);
    let stack = run(&mut ram, Bits32, &[0x89, 0x5d, 0]);
    assert_eq!(stack.result, fault(Exception::STACK));
    let mut ram = Ram::new(0x1000, Bits64);
    let registers = GeneralRegisters {
        rax: 1 << 47,
        rbp: 1 << 47,
        ..start()
    };
    let far = run_from(registers, FLAGS, &mut ram, Bits64, &[0x89, 0x18]);
    assert_eq!(far.result, gp);
    let far = run_from(registers, FLAGS, &mut ram, Bits64, &[0x89, 0x5d, 0]);
    assert_eq!(far.result, fault(Exception::STACK));
    assert!(ram.log.is_empty());
}

#[test]
fn faults_leave_everything() {
    let missing = Exception::PageFault {
        error_code: 2,
        address: 0x9000,
    };
    let registers = GeneralRegisters {
        rax: 0x9000,
        rdi: 0x9000,
        rdx: 5,
        rcx: 3,
        ..start()
    };
    for code in [
        &[0x89, 0x18][..],         // mov [rax], ebx
        &[0x01, 0x18],             // add [rax], ebx: writing is asked for first
        &[0xf0, 0x0f, 0xc1, 0x18], // lock xadd [rax], ebx
        &[0x87, 0x18],             // xchg
        &[0x0f, 0xc7, 0x08],       // cmpxchg8b [rax]
        &[0x8f, 0x00],             // pop [rax]
        &[0xa4],                   // movsb
        &[0xf3, 0xaa],             // rep stosb
        &[0xf7, 0x18],             // neg
        &[0xd1, 0x18],             // rcr
        &[0x0f, 0xab, 0x18],       // bts [rax], ebx: of the bit string
    ] {
        let mut ram = Ram::new(0x1000, Bits64);
        let registers = GeneralRegisters {
            rbx: 0,
            ..registers
        };
        let run = run_from(registers, FLAGS, &mut ram, Bits64, code);
        assert_eq!(run.result, fault(missing), "{code:x?}");
        assert_eq!((run.general, run.rflags, run.rip), (registers, FLAGS, RIP));
    }
    // div dword [rcx] by zero, and with a quotient of more than 32 bits; bound.
    let mut ram = Ram::new(0x1000, Bits64);
    let zero = run(&mut ram, Bits64, &[0xf7, 0x31]);
    assert_eq!(zero.result, fault(Exception::DivideError));
    ram.put(BASE + 0x10, &[1]);
    let large = run(&mut ram, Bits64, &[0xf7, 0x31]);
    assert_eq!(large.result, fault(Exception::DivideError));
    let mut ram = Ram::new(0x1000, Bits32);
    let bound = run(&mut ram, Bits32, &[0x62, 0x01]);
    assert_eq!(bound.result, fault(Exception::BoundRange));
    // An operand that is not aligned, at level 3, for who asked.
    let mut ram = Ram::new(0x1000, Bits64);
    (ram.cr0, ram.cpl) = (1 << 18 | 1, 3);
    let unaligned = &[0x8b, 0x58, 0x02]; // mov ebx, [rax + 2]
    let asked = run_from(start(), FLAGS | 1 << 18, &mut ram, Bits64, unaligned);
    assert_eq!(asked.result, fault(Exception::AlignmentCheck));
    done(&run(&mut ram, Bits64, unaligned), 3);
    ram.cpl = 0;
    done(
        &run_from(start(), FLAGS | 1 << 18, &mut ram, Bits64, unaligned),
        3,
    );
    // movaps [rax + 8], xmm0.
    let unaligned = run(&mut ram, Bits64, &[0x0f, 0x29, 0x40, 0x08]);
    assert_eq!(unaligned.result, fault(Exception::GeneralProtection));
}

#[test]
fn what_is_no_instruction_is_undefined_and_what_is_not_emulated_touches_nothing() {
    let undefined = fault(Exception::InvalidOpcode);
    for (code, result) in [
        (&[0xf0, 0x89, 0x18][..], undefined), // lock mov
        (&[0xf0, 0x3b, 0x18], undefined),     // lock cmp
        (&[0x8e, 0x08], undefined),           // mov cs, [rax]
        (&[0x89], Err(EmulateError::Incomplete)),
        (&[], Err(EmulateError::Incomplete)),
        (&[0x66; 15], undefined),                              // too long
        (&[0x0f, 0x58, 0x00], Err(EmulateError::Unsupported)), // addps
        (
            &[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x00],
            Err(EmulateError::Unsupported),
        ), // zmm
        (&[0x0f, 0x05], Err(EmulateError::Unsupported)),       // syscall
        (&[0x74, 0x05], Err(EmulateError::Unsupported)),       // je
    ] {
        let mut ram = Ram::new(0x1000, Bits64);
        let run = run(&mut ram, Bits64, code);
        assert_eq!(run.result, result, "{code:x?}");
        assert_eq!((run.general, run.rflags, run.rip), (start(), FLAGS, RIP));
        assert!(ram.log.is_empty());
    }
}

#[test]
fn long_repetitions_go_on_later() {
    let mut ram = Ram::new(0x1000, Bits64);
    let rep_stosd = [0xf3, 0xab];
    let from = GeneralRegisters {
        rcx: 6,
        rdi: BASE,
        ..start()
    };
    let first = run_from(from, FLAGS, &mut ram, Bits64, &rep_stosd);
    assert_eq!((first.result, first.rip), (Ok(Progress::Repeats), RIP));
    assert_eq!((first.general.rcx, first.general.rdi), (2, BASE + 16));
    let second = run_from(first.general, FLAGS, &mut ram, Bits64, &rep_stosd);
    done(&second, 2);
    assert_eq!((second.general.rcx, second.general.rdi), (0, BASE + 24));
    // With nothing left it is done, and with the trap flag each iteration is an end.
    done(
        &run_from(second.general, FLAGS, &mut ram, Bits64, &rep_stosd),
        2,
    );
    let stepped = run_from(from, FLAGS | 1 << 8, &mut ram, Bits64, &rep_stosd);
    assert_eq!(
        (stepped.result, stepped.general.rcx),
        (Ok(Progress::Repeats), 5)
    );
    // A fault in between keeps what is done.
    let end = BASE + 0x1000;
    let over = GeneralRegisters {
        rcx: 4,
        rdi: end - 8,
        ..start()
    };
    let over = run_from(over, FLAGS, &mut ram, Bits64, &rep_stosd);
    let missing = Exception::PageFault {
        error_code: 2,
        address: end,
    };
    assert_eq!(over.result, fault(missing));
    assert_eq!((over.general.rcx, over.general.rdi), (2, end));
    // repe cmpsb ends where the bytes differ; repne scasb where they are equal.
    ram.memory.fill(7);
    ram.put(BASE + 0x102, &[9]);
    let compare = GeneralRegisters {
        rcx: 4,
        rsi: BASE,
        rdi: BASE + 0x100,
        rax: 9,
        ..start()
    };
    let compared = run_from(compare, FLAGS, &mut ram, Bits64, &[0xf3, 0xa6]);
    done(&compared, 2);
    assert_eq!((compared.general.rcx, compared.rflags & (ZF | CF)), (1, CF));
    let scanned = run_from(compare, FLAGS, &mut ram, Bits64, &[0xf2, 0xae]);
    assert_eq!((scanned.general.rcx, scanned.rflags & ZF), (1, ZF));
}

#[test]
fn strings_keep_to_their_address_size() {
    let mut ram = Ram::new(0x1000, Bits16);
    let from = GeneralRegisters {
        rcx: 0x1_0001,
        rdi: 0x1234_1fff,
        rsi: 0x5678_1004,
        ..start()
    };
    // rep movsb es:[di], fs:[si].
    let moved = run_from(from, FLAGS, &mut ram, Bits16, &[0xf3, 0x64, 0xa4]);
    done(&moved, 3);
    assert_eq!(ram.log, [(false, 0x1004, 1), (true, 0x1fff, 1)]);
    assert_eq!(
        (moved.general.rcx, moved.general.rdi, moved.general.rsi),
        (0x1_0000, 0x1234_2000, 0x5678_1005)
    );
    let back = run_from(from, FLAGS | DF, &mut ram, Bits16, &[0xaa]);
    assert_eq!(back.general.rdi, 0x1234_1ffe);
    // stosb [edi] in 64-bit code clears the upper half.
    let mut ram = Ram::new(0x1000, Bits64);
    let from = GeneralRegisters {
        rdi: 0x5_0000_1fff,
        ..start()
    };
    let stored = run_from(from, FLAGS, &mut ram, Bits64, &[0x67, 0xaa]);
    assert_eq!(stored.general.rdi, 0x2000);
}

#[test]
fn the_port_without_exits_has_strings() {
    let mut ram = Ram::new(0x1000, Bits64);
    ram.put(BASE, &[1, 2, 3]);
    let from = GeneralRegisters {
        rcx: 3,
        rsi: BASE,
        rdi: BASE + 8,
        rdx: 0x12_0080,
        ..start()
    };
    let output = run_from(from, FLAGS, &mut ram, Bits64, &[0xf3, 0x6e]); // rep outsb
    done(&output, 2);
    assert_eq!((ram.post_code, output.general.rsi), (3, BASE + 3));
    let input = run_from(from, FLAGS, &mut ram, Bits64, &[0x6c]); // insb
    done(&input, 1);
    assert_eq!((ram.at(BASE + 8, 2), input.general.rdi), (3, BASE + 9));
    let other = GeneralRegisters { rdx: 0x60, ..from };
    for code in [0x6c, 0x6e] {
        let other = run_from(other, FLAGS, &mut ram, Bits64, &[code]);
        assert_eq!(other.result, Err(EmulateError::Unsupported));
    }
}

#[test]
fn the_stack_in_its_width() {
    let mut ram = Ram::new(0x1000, Bits16);
    // push word [bx]: SP alone moves.
    let registers = GeneralRegisters {
        rsp: 0x7_1800,
        ..start()
    };
    let push = run_from(registers, FLAGS, &mut ram, Bits16, &[0xff, 0x37]);
    done(&push, 2);
    assert_eq!(push.general.rsp, 0x7_17fe);
    assert_eq!(ram.log, [(false, 0x1030, 2), (true, 0x17fe, 2)]);
    let mut ram = Ram::new(0x1000, Bits32);
    // pusha and popa.
    let pushed = run(&mut ram, Bits32, &[0x60]);
    done(&pushed, 1);
    assert_eq!(pushed.general.rsp, BASE + 0x800 - 32);
    assert_eq!(ram.at(BASE + 0x7fc, 4), start().rax);
    assert_eq!(ram.at(BASE + 0x7ec, 4), BASE + 0x800);
    let popped = run_from(
        GeneralRegisters {
            rsp: pushed.general.rsp,
            ..Default::default()
        },
        FLAGS,
        &mut ram,
        Bits32,
        &[0x61],
    );
    assert_eq!(
        (popped.general.rdi, popped.general.rax, popped.general.rsp),
        (start().rdi, start().rax, start().rsp)
    );
    // pop [esp + 4] finds ESP moved; pop into a segment register.
    ram.put(BASE + 0x800, &[0x11, 0x22, 0, 0]);
    done(&run(&mut ram, Bits32, &[0x8f, 0x44, 0x24, 0x04]), 4);
    assert_eq!(ram.at(BASE + 0x808, 4), 0x2211);
    // enter 0x20, 2 and leave.
    let mut ram = Ram::new(0x1000, Bits64);
    ram.put(start().rbp - 8, &[0x77]);
    let entered = run(&mut ram, Bits64, &[0xc8, 0x20, 0, 2]);
    done(&entered, 4);
    let top = BASE + 0x800;
    assert_eq!(entered.general.rbp, top - 8);
    assert_eq!(entered.general.rsp, top - 24 - 0x20);
    assert_eq!(ram.at(top - 8, 8), start().rbp);
    assert_eq!(ram.at(top - 16, 8), 0x77);
    assert_eq!(ram.at(top - 24, 8), top - 8);
    let left = run_from(entered.general, FLAGS, &mut ram, Bits64, &[0xc9]);
    assert_eq!(
        (left.general.rsp, left.general.rbp),
        (start().rsp, start().rbp)
    );
    // popfq at level 0 and 3: IF and IOPL are not everybody's.
    ram.put(top, &0x3602u64.to_le_bytes());
    assert_eq!(
        run_from(start(), 2, &mut ram, Bits64, &[0x9d]).rflags,
        0x3602
    );
    ram.cpl = 3;
    assert_eq!(
        run_from(start(), 2, &mut ram, Bits64, &[0x9d]).rflags,
        0x402
    );
}

#[test]
fn jumps() {
    let mut ram = Ram::new(0x1000, Bits64);
    ram.put(BASE, &0x1234_5678u64.to_le_bytes());
    // jmp [rax]; call [rax]; ret 8.
    assert_eq!(run(&mut ram, Bits64, &[0xff, 0x20]).rip, 0x1234_5678);
    let call = run(&mut ram, Bits64, &[0xff, 0x10]);
    assert_eq!(
        (call.rip, call.general.rsp),
        (0x1234_5678, BASE + 0x800 - 8)
    );
    assert_eq!(ram.at(BASE + 0x7f8, 8), RIP + 2);
    let back = run_from(call.general, FLAGS, &mut ram, Bits64, &[0xc2, 8, 0]);
    assert_eq!((back.rip, back.general.rsp), (RIP + 2, BASE + 0x808));
    // call +0x10.
    let call = run(&mut ram, Bits64, &[0xe8, 0x10, 0, 0, 0]);
    assert_eq!(call.rip, RIP + 0x15);
    ram.put(BASE, &(1u64 << 47).to_le_bytes());
    for code in [&[0xff, 0x20][..], &[0xff, 0x10]] {
        let far = run(&mut ram, Bits64, code);
        assert_eq!(far.result, fault(Exception::GeneralProtection));
        assert_eq!((far.rip, far.general), (RIP, start()));
    }
    let mut ram = Ram::new(0x1000, Bits32);
    ram.segments[Segment::Cs as usize].limit = 0x5_0000;
    ram.put(BASE, &0x5_0001u32.to_le_bytes());
    assert_eq!(
        run(&mut ram, Bits32, &[0xff, 0x20]).result,
        fault(Exception::GeneralProtection)
    );
    // With 16 bits of it.
    assert_eq!(run(&mut ram, Bits32, &[0x66, 0xff, 0x20]).rip, 1);
}

/// Descriptors at [`BASE`] + 0x400: data of level 0, code of level 0, data of level 3 that is not
/// present, an LDT, a TSS, 64-bit code.
fn with_tables(mode: Mode) -> Ram {
    let mut ram = Ram::new(0x1000, mode);
    let table = [
        0u64,
        0x00cf_9200_0000_ffff,
        0x00cf_9a00_0000_ffff,
        0x00cf_7200_0000_ffff,
        0x0000_8200_1000_0017,
        0x0000_8900_2000_0067,
        0x00af_9a00_0000_ffff,
    ];
    ram.put(BASE + 0x400, table.map(u64::to_le_bytes).as_flattened());
    ram.tables[0] = TableRegister {
        base: BASE + 0x400,
        limit: 0x37,
    };
    ram
}

#[test]
fn segments_are_loaded_with_their_checks() {
    let mut ram = with_tables(Bits32);
    let mut load = |selector: u16, code: &[u8]| {
        ram.put(BASE, &selector.to_le_bytes());
        let run = run(&mut ram, Bits32, code);
        (run.result, ram.segments[Segment::Es as usize], ram.held)
    };
    let (mov_es, mov_ss) = (&[0x8e, 0x00][..], &[0x8e, 0x10][..]);
    let gp = |selector| fault(SegmentFault::GeneralProtection.with(selector));
    let (result, es, held) = load(8, mov_es);
    assert_eq!((result, held), (Ok(Progress::Done), false));
    assert_eq!(
        (es.selector, es.limit, es.rights.0),
        (8, 0xffff_ffff, 0xc093)
    );
    assert_eq!(load(9, mov_es).0, gp(8), "RPL 1 for level 0");
    assert_eq!(load(0x10, mov_es).0, Ok(Progress::Done), "readable code");
    assert_eq!(load(0x10, mov_ss).0, gp(0x10));
    assert_eq!(
        load(0x1b, mov_es).0,
        fault(SegmentFault::NotPresent.with(0x18))
    );
    assert_eq!(load(0x20, mov_es).0, gp(0x20), "an LDT");
    assert_eq!(load(0x38, mov_es).0, gp(0x38), "beyond the limit");
    assert_eq!(load(0xc, mov_es).0, gp(0xc), "no LDT");
    let (result, es, _) = load(3, mov_es);
    assert_eq!((result, es.rights.is_usable()), (Ok(Progress::Done), false));
    assert_eq!(load(0, mov_ss).0, gp(0));
    let (result, _, held) = load(8, mov_ss);
    assert_eq!((result, held), (Ok(Progress::Done), true));
    // lldt, ltr: the TSS becomes busy, and then is not available.
    let (lldt, ltr) = (&[0x0f, 0x00, 0x10][..], &[0x0f, 0x00, 0x18][..]);
    assert_eq!(load(0x28, lldt).0, gp(0x28));
    assert_eq!(load(0x20, lldt).0, Ok(Progress::Done));
    assert_eq!(load(0x28, ltr).0, Ok(Progress::Done));
    assert_eq!(load(0x28, ltr).0, gp(0x28));
    assert_eq!(ram.system[0].base, 0x1000);
    assert_eq!((ram.system[1].limit, ram.system[1].rights.0), (0x67, 0x8b));
    // The descriptor has become an accessed one.
    assert_eq!(ram.at(BASE + 0x40d, 1), 0x93);
    // les ecx, [eax]; mov [eax], es; real mode.
    ram.put(BASE, &[0x44, 0x33, 0x22, 0x11, 8, 0]);
    let les = run(&mut ram, Bits32, &[0xc4, 0x08]);
    assert_eq!(les.general.rcx, 0x1122_3344);
    done(&run(&mut ram, Bits32, &[0x8c, 0x00]), 2);
    assert_eq!(ram.at(BASE, 2), 8);
    ram.addressing = Addressing::Real;
    done(&run(&mut ram, Bits32, &[0x8e, 0x00]), 2);
    assert_eq!(ram.segments[Segment::Es as usize].base, 0x80);
}

#[test]
fn selectors_are_asked_about() {
    let mut ram = with_tables(Bits32);
    let mut ask = |selector: u16, code: &[u8]| {
        ram.put(BASE, &selector.to_le_bytes());
        let run = run(&mut ram, Bits32, code);
        done(&run, 3);
        (run.rflags & ZF != 0).then_some(run.general.rcx as u32)
    };
    let (lar, lsl) = (&[0x0f, 0x02, 0x08][..], &[0x0f, 0x03, 0x08][..]);
    let (verr, verw) = (&[0x0f, 0x00, 0x20][..], &[0x0f, 0x00, 0x28][..]);
    let before = start().rcx as u32;
    for (selector, rights, limit, readable, writable) in [
        (8, Some(0x00cf_9200), Some(u32::MAX), true, true),
        (0x10, Some(0x00cf_9a00), Some(u32::MAX), true, false),
        (0x1b, Some(0x00cf_7200), Some(u32::MAX), true, true),
        (0x20, Some(0x8200), Some(0x17), false, false),
        (0x28, Some(0x8900), Some(0x67), false, false),
        // Null, RPL 1 for level 0, beyond the limit, and no LDT.
        (0, None, None, false, false),
        (9, None, None, false, false),
        (0x38, None, None, false, false),
        (0xc, None, None, false, false),
    ] {
        assert_eq!(ask(selector, lar), rights, "{selector:#x}");
        assert_eq!(ask(selector, lsl), limit, "{selector:#x}");
        assert_eq!(
            ask(selector, verr),
            readable.then_some(before),
            "{selector:#x}"
        );
        assert_eq!(
            ask(selector, verw),
            writable.then_some(before),
            "{selector:#x}"
        );
    }
    ram.addressing = Addressing::Virtual8086;
    let real = run(&mut ram, Bits32, verr).result;
    assert_eq!(real, fault(Exception::InvalidOpcode));
}

#[test]
fn far_jumps_and_tables() {
    let mut ram = with_tables(Bits64);
    // rex64 jmp far [rax]: 64 bits and a selector.
    ram.put(BASE, &0x1234u64.to_le_bytes());
    ram.put(BASE + 8, &[0x30, 0]);
    let jump = run(&mut ram, Bits64, &[0x48, 0xff, 0x28]);
    assert_eq!((jump.result, jump.rip), (Ok(Progress::Done), 0x1234));
    assert_eq!(ram.segments[Segment::Cs as usize].selector, 0x30);
    ram.put(BASE + 8, &[0x08, 0]);
    let data = run(&mut ram, Bits64, &[0x48, 0xff, 0x28]);
    assert_eq!(data.result, fault(SegmentFault::GeneralProtection.with(8)));
    // call far [rax] in 32-bit code.
    let mut ram = with_tables(Bits32);
    ram.put(BASE, &[0x78, 0x56, 0x34, 0x12, 0x10, 0]);
    let call = run(&mut ram, Bits32, &[0xff, 0x18]);
    assert_eq!((call.result, call.rip), (Ok(Progress::Done), 0x1234_5678));
    assert_eq!(ram.at(BASE + 0x7fc, 2), 0x10);
    assert_eq!(ram.at(BASE + 0x7f8, 4), RIP + 2);
    // lgdt [rax], of ten bytes; not for level 3.
    let mut ram = Ram::new(0x1000, Bits64);
    ram.put(BASE, &[0xff, 0x0f, 1, 2, 3, 4, 5, 0, 0, 0]);
    done(&run(&mut ram, Bits64, &[0x0f, 0x01, 0x10]), 3);
    let loaded = TableRegister {
        base: 0x05_0403_0201,
        limit: 0xfff,
    };
    assert_eq!(ram.tables[Table::Gdt as usize], loaded);
    done(&run(&mut ram, Bits64, &[0x0f, 0x01, 0x40, 0x20]), 4); // sgdt
    assert_eq!(ram.at(BASE + 0x22, 8), loaded.base);
    ram.cpl = 3;
    for code in [
        &[0x0f, 0x01, 0x10][..],
        &[0x0f, 0x01, 0x18],
        &[0x0f, 0x01, 0x30],
    ] {
        let refused = run(&mut ram, Bits64, code);
        assert_eq!(refused.result, fault(Exception::GeneralProtection));
    }
    // smsw and lmsw.
    ram.cpl = 0;
    ram.cr0 = 0x8005_0033;
    done(&run(&mut ram, Bits64, &[0x0f, 0x01, 0x20]), 3);
    assert_eq!(ram.at(BASE, 4), 0x0201_0033);
    ram.put(BASE, &[0x0a]);
    done(&run(&mut ram, Bits64, &[0x0f, 0x01, 0x30]), 3);
    assert_eq!(ram.cr0 & 0xf, 0xb);
}

/// An instruction that begins with these bytes, its mode, and what it is, if it is one.
fn random_instruction(
    random: &mut crate::fuzz::Random,
    start: &[u8],
) -> Option<(Vec<u8>, Mode, Decoded)> {
    let mut code = start.to_vec();
    code.extend((0..15).map(|_| random.next() as u8));
    code.truncate(15);
    let mode = random.pick(&[Bits16, Bits32, Bits64]);
    let decoded = Decoded::new(&code, mode, RIP).ok()?;
    Some((code, mode, decoded))
}

/// Memory from 0 and registers that lead there.
fn random_state(random: &mut crate::fuzz::Random, mode: Mode) -> (Ram, GeneralRegisters) {
    let mut ram = Ram::new(0x400, mode);
    ram.base = 0;
    ram.memory.fill_with(|| random.next() as u8);
    let mut general = GeneralRegisters::default();
    (0..16).for_each(|index| general.set(index, random.below(0x100)));
    (ram, general)
}

/// A plain move does what the instruction does without its short way.
#[test]
fn plain_moves_do_the_same() {
    let mut random = crate::fuzz::Random(3);
    let (mut plain, mut aligned) = (0, 0);
    for _ in 0..20_000 {
        let prefix = random.pick(&[&[][..], &[0x66], &[0x40], &[0x48], &[0x4c], &[0x66, 0x45]]);
        let opcode = random.pick(&[
            &[0x88][..],
            &[0x89],
            &[0x8a],
            &[0x8b],
            &[0xc6],
            &[0xc7],
            &[0xa0],
            &[0xa1],
            &[0xa2],
            &[0xa3],
            &[0x0f, 0xb6],
            &[0x0f, 0xb7],
            &[0x0f, 0xbe],
            &[0x8c],
        ]);
        let Some((code, mode, decoded)) =
            random_instruction(&mut random, &[prefix, opcode].concat())
        else {
            continue;
        };
        let Some(short) = decoded.plain_move() else {
            continue;
        };
        let (mut ram, mut general) = random_state(&mut random, mode);
        let (memory, before) = (ram.memory.clone(), general);
        let mut registers = Registers {
            general: &mut general,
            rip: RIP,
            rflags: FLAGS,
        };
        if decoded.emulate(&mut registers, &mut ram, 1).is_err() {
            continue;
        }
        assert_eq!(registers.rip, RIP + u64::from(short.length));
        let [(store, at, bytes)] = ram.log[..] else {
            panic!("{code:x?}");
        };
        assert_eq!((store, bytes as u64), (short.store, short.width.bytes()));
        if short.alignment.is_given(&before) {
            assert_eq!(at & (bytes as u64 - 1), 0, "{code:x?}");
            aligned += 1;
        }
        let mut expected = before;
        if store {
            assert_eq!(
                ram.at(at, bytes),
                short.stored(&before) & short.width.mask()
            );
        } else {
            let mut value = [0; 8];
            value[..bytes].copy_from_slice(&memory[at as usize..][..bytes]);
            short.load(&mut expected, u64::from_le_bytes(value));
        }
        assert_eq!(general, expected, "{code:x?}");
        plain += 1;
    }
    assert!(plain > 1000 && aligned > plain / 4, "{plain} {aligned}");
}

/// Arithmetic that is worked out in advance does what the instruction does.
#[test]
fn arithmetic_is_what_the_instruction_does() {
    let mut random = crate::fuzz::Random(11);
    let (mut known, mut aligned, mut stored) = (0, 0, 0);
    for _ in 0..60_000 {
        let prefixes: &[&[u8]] = &[&[], &[0x66], &[0x48], &[0x67], &[0x45], &[0xf0]];
        let prefix = random.pick(prefixes);
        // ADD to CMP in four forms, with immediates, TEST in three forms with NOT and NEG, XCHG, INC
        // and DEC.
        let opcode = match random.below(4) {
            0 => (random.below(8) << 3 | random.below(4)) as u8,
            1 => random.pick(&[0x80, 0x81, 0x83]),
            2 => random.pick(&[0x84, 0x85, 0xf6, 0xf7]),
            _ => random.pick(&[0x86, 0x87, 0xfe, 0xff]),
        };
        let start = [prefix, &[opcode]].concat();
        let Some((code, mode, decoded)) = random_instruction(&mut random, &start) else {
            continue;
        };
        let Some(plan) = decoded.arithmetic() else {
            continue;
        };
        assert_eq!(plan.locked, decoded.is_locked(), "{code:x?}");
        let (mut ram, mut general) = random_state(&mut random, mode);
        let (memory, before) = (ram.memory.clone(), general);
        let rflags = FLAGS | random.next() & 0x8d5;
        let mut registers = Registers {
            general: &mut general,
            rip: RIP,
            rflags,
        };
        if decoded.emulate(&mut registers, &mut ram, 1).is_err() {
            continue;
        }
        let after = registers.rflags;
        assert_eq!(registers.rip, RIP + u64::from(plan.length));
        let &(_, at, bytes) = ram.log.first().unwrap();
        assert_eq!(bytes as u64, plan.width.bytes());
        if plan.alignment.is_given(&before) {
            assert_eq!(at & (bytes as u64 - 1), 0, "{code:x?}");
            aligned += 1;
        }
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&memory[at as usize..][..bytes]);
        let mut expected = before;
        let computed = plan.compute(&mut expected, u64::from_le_bytes(value), rflags);
        assert_eq!(general, expected, "{code:x?}");
        assert_eq!(computed.rflags, after, "{code:x?}");
        assert_eq!(computed.stored.is_some(), plan.stores);
        assert_eq!(ram.log.len(), 1 + usize::from(plan.stores), "{code:x?}");
        if let Some(value) = computed.stored {
            assert_eq!(ram.at(at, bytes), value, "{code:x?}");
            stored += 1;
        }
        known += 1;
    }
    assert!(
        known > 1000 && aligned > known / 8 && stored > known / 8,
        "{known} {aligned} {stored}"
    );
}
