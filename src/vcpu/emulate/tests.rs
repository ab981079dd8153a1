use super::alu::{AF, CF, DF, STATUS};
use super::*;
use core::arch::asm;
use proptest::prelude::*;

/// A device that answers `value`, and a memory of one cell; both keep what was done.
#[derive(Default)]
struct Recorder {
    value: u64,
    cell: u64,
    no_memory: bool,
    log: Vec<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Read(Width),
    Write(Width, u64),
    Load(Segment, u64, Width),
    Store(Segment, u64, Width, u64),
}

impl Bus for Recorder {
    fn read(&mut self, width: Width) -> u64 {
        self.log.push(Event::Read(width));
        self.value & width.mask()
    }

    fn write(&mut self, width: Width, value: u64) {
        self.log.push(Event::Write(width, value));
    }

    fn load(&mut self, segment: Segment, offset: u64, width: Width) -> Result<u64, EmulateError> {
        if self.no_memory {
            return Err(EmulateError::Memory);
        }
        self.log.push(Event::Load(segment, offset, width));
        Ok(self.cell & width.mask())
    }

    fn store(
        &mut self,
        segment: Segment,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Result<(), EmulateError> {
        if self.no_memory {
            return Err(EmulateError::Memory);
        }
        self.log.push(Event::Store(segment, offset, width, value));
        Ok(())
    }
}

const DEVICE: u64 = 0xfedc_ba98_8765_4321;
const FLAGS: u64 = 0x202;

struct Run {
    advance: u8,
    registers: GeneralRegisters,
    rflags: u64,
    log: Vec<Event>,
}

fn start() -> GeneralRegisters {
    let mut registers = GeneralRegisters::default();
    for i in 0..16 {
        registers.set(i, (0x1111_1111_1111_1111 * u64::from(i)) | 0xa0);
    }
    registers
}

fn emulate(
    bytes: &[u8],
    mode: Mode,
    access: Access,
    registers: &mut GeneralRegisters,
    rflags: &mut u64,
    bus: &mut impl Bus,
) -> Result<Outcome, EmulateError> {
    Decoded::new(bytes, mode)?.emulate(access, registers, rflags, bus)
}

fn run_from(
    registers: GeneralRegisters,
    rflags: u64,
    mode: Mode,
    access: Access,
    bytes: &[u8],
) -> Result<Run, EmulateError> {
    let mut run = Run {
        advance: 0,
        registers,
        rflags,
        log: Vec::new(),
    };
    let mut bus = Recorder {
        value: DEVICE,
        cell: 0x1122_3344_5566_7788,
        ..Default::default()
    };
    let outcome = emulate(
        bytes,
        mode,
        access,
        &mut run.registers,
        &mut run.rflags,
        &mut bus,
    )?;
    run.advance = outcome.advance;
    run.log = bus.log;
    Ok(run)
}

/// Runs `bytes` in 64-bit mode, followed by bytes of the next instruction.
fn run(access: Access, bytes: &[u8]) -> Run {
    let mut code = bytes.to_vec();
    code.resize(15, 0x90);
    let run = run_from(start(), FLAGS, Mode::Bits64, access, &code).unwrap();
    assert_eq!(usize::from(run.advance), bytes.len());
    run
}

use Access::{Read as R, Write as W};
use Width::{Byte, Dword, Qword, Word};

#[test]
fn stores_write_the_width_of_the_operand() {
    for (bytes, event) in [
        (&[0x89, 0x18][..], Event::Write(Dword, 0x3333_33b3)), // mov [rax], ebx
        (
            &[0x48, 0x89, 0x18],
            Event::Write(Qword, 0x3333_3333_3333_33b3),
        ),
        (&[0x66, 0x89, 0x18], Event::Write(Word, 0x33b3)),
        (&[0x88, 0x18], Event::Write(Byte, 0xb3)), // mov [rax], bl
        (&[0x88, 0x38], Event::Write(Byte, 0x33)), // mov [rax], bh
        (&[0x40, 0x88, 0x38], Event::Write(Byte, 0xf7)), // mov [rax], dil
        (&[0x44, 0x88, 0x38], Event::Write(Byte, 0xff)), // mov [rax], r15b
        (
            &[0xc7, 0x80, 0xb0, 0, 0, 0, 0, 0, 0, 0],
            Event::Write(Dword, 0),
        ), // mov dword [rax+0xb0], 0
        (
            &[0x48, 0xc7, 0x00, 0xfe, 0xff, 0xff, 0xff],
            Event::Write(Qword, u64::MAX - 1),
        ),
        (&[0x66, 0xc7, 0x00, 0x34, 0x12], Event::Write(Word, 0x1234)),
        (&[0xc6, 0x00, 0x80], Event::Write(Byte, 0x80)),
        (
            &[0x89, 0x04, 0x25, 0xb0, 0xe0, 0x5f, 0xff],
            Event::Write(Dword, 0xa0),
        ), // mov [abs], eax
        (&[0xa3, 1, 2, 3, 4, 5, 6, 7, 8], Event::Write(Dword, 0xa0)), // mov [moffs], eax
        (&[0x0f, 0x38, 0xf1, 0x18], Event::Write(Dword, 0xb333_3333)), // movbe [rax], ebx
        (&[0x66, 0x0f, 0x38, 0xf1, 0x18], Event::Write(Word, 0xb333)),
    ] {
        let run = run(W, bytes);
        assert_eq!(run.log, [event], "{bytes:x?}");
        assert_eq!((run.registers, run.rflags), (start(), FLAGS));
    }
}

#[test]
fn loads_leave_the_register_as_the_cpu_would() {
    let rbx = start().rbx;
    for (bytes, width, expected) in [
        (&[0x8b, 0x18][..], Dword, 0x8765_4321), // mov ebx, [rax]: upper half cleared
        (&[0x48, 0x8b, 0x18], Qword, DEVICE),
        (&[0x66, 0x8b, 0x18], Word, rbx & !0xffff | 0x4321),
        (&[0x8a, 0x18], Byte, rbx & !0xff | 0x21), // mov bl, [rax]
        (&[0x8a, 0x38], Byte, rbx & !0xff00 | 0x2100), // mov bh, [rax]
        (&[0x0f, 0xb6, 0x18], Byte, 0x21),         // movzx ebx, byte
        (&[0x66, 0x0f, 0xb6, 0x18], Byte, rbx & !0xffff | 0x21),
        (&[0x48, 0x0f, 0xb7, 0x18], Word, 0x4321),
        (&[0x48, 0x0f, 0xbe, 0x18], Byte, 0x21),
        (&[0x48, 0x63, 0x18], Dword, 0xffff_ffff_8765_4321), // movsxd rbx, dword
        (&[0x0f, 0x38, 0xf0, 0x18], Dword, 0x2143_6587),     // movbe ebx, [rax]
    ] {
        let run = run(R, bytes);
        assert_eq!(run.log, [Event::Read(width)], "{bytes:x?}");
        assert_eq!(
            run.registers,
            GeneralRegisters {
                rbx: expected,
                ..start()
            },
            "{bytes:x?}"
        );
    }
    let negative = run(R, &[0x4c, 0x0f, 0xbf, 0x38]); // movsx r15, word
    assert_eq!(negative.registers.r15, 0x4321);
}

#[test]
fn sixteen_and_thirty_two_bit_code() {
    let write = run_from(start(), FLAGS, Mode::Bits16, W, &[0x89, 0x07]).unwrap(); // mov [bx], ax
    assert_eq!(
        (write.advance, &write.log[..]),
        (2, &[Event::Write(Word, 0xa0)][..])
    );
    let write = run_from(start(), FLAGS, Mode::Bits16, W, &[0x66, 0x89, 0x07]).unwrap();
    assert_eq!(write.log, [Event::Write(Dword, 0xa0)]);
    let read = run_from(
        start(),
        FLAGS,
        Mode::Bits32,
        R,
        &[0xa1, 0x30, 0, 0xe0, 0xfe],
    )
    .unwrap();
    assert_eq!((read.advance, read.registers.rax), (5, 0x8765_4321));
}

#[test]
fn read_modify_write() {
    let or = run(W, &[0x09, 0x18]); // or [rax], ebx
    assert_eq!(
        or.log,
        [
            Event::Read(Dword),
            Event::Write(Dword, 0x8765_4321 | 0x3333_33b3)
        ]
    );
    let locked = run(W, &[0xf0, 0x83, 0x08, 0x80]); // lock or dword [rax], -128
    assert_eq!(
        locked.log,
        [Event::Read(Dword), Event::Write(Dword, 0xffff_ffa1)]
    );
    let xchg = run(W, &[0x87, 0x18]); // xchg [rax], ebx
    assert_eq!(
        xchg.log,
        [Event::Read(Dword), Event::Write(Dword, 0x3333_33b3)]
    );
    assert_eq!(xchg.registers.rbx, 0x8765_4321);
    let not = run(W, &[0xf7, 0x10]);
    assert_eq!(
        (&not.log[1..], not.rflags),
        (
            &[Event::Write(Dword, u64::from(!0x8765_4321u32))][..],
            FLAGS
        )
    );
    let test = run(R, &[0xf7, 0x00, 0x00, 0x10, 0, 0]); // test dword [rax], 0x1000
    assert_eq!(test.log, [Event::Read(Dword)]);
    assert_eq!(test.rflags & alu::ZF, alu::ZF);
    let cmp = run(R, &[0x3b, 0x18]); // cmp ebx, [rax]: a borrow
    assert_eq!((cmp.log.len(), cmp.rflags & CF), (1, CF));
    let sub = run(R, &[0x2b, 0x18]); // sub ebx, [rax]: to the register
    assert_eq!(
        sub.registers.rbx,
        0x3333_33b3u32.wrapping_sub(0x8765_4321).into()
    );
}

#[test]
fn string_instructions_do_one_iteration() {
    let store = run(W, &[0xab]); // stosd
    assert_eq!(store.log, [Event::Write(Dword, 0xa0)]);
    assert_eq!(store.registers.rdi, start().rdi + 4);

    let from = GeneralRegisters { rcx: 2, ..start() };
    let rep = [0xf3, 0x48, 0xa5]; // rep movsq
    let first = run_from(from, FLAGS, Mode::Bits64, W, &rep).unwrap();
    assert_eq!(
        first.log,
        [
            Event::Load(Segment::Ds, from.rsi, Qword),
            Event::Write(Qword, 0x1122_3344_5566_7788)
        ]
    );
    assert_eq!((first.advance, first.registers.rcx), (0, 1));
    assert_eq!(
        (first.registers.rsi, first.registers.rdi),
        (from.rsi + 8, from.rdi + 8)
    );
    let last = run_from(first.registers, FLAGS | DF, Mode::Bits64, R, &rep).unwrap();
    assert_eq!(
        last.log,
        [
            Event::Read(Qword),
            Event::Store(Segment::Es, from.rdi + 8, Qword, DEVICE)
        ]
    );
    assert_eq!((last.advance, last.registers.rcx), (3, 0));
    assert_eq!(
        (last.registers.rsi, last.registers.rdi),
        (from.rsi, from.rdi)
    );

    let done = run_from(last.registers, FLAGS, Mode::Bits64, W, &rep).unwrap();
    assert_eq!((done.advance, done.log.len()), (3, 0));
}

#[test]
fn string_instructions_keep_to_their_address_size() {
    let from = GeneralRegisters {
        rcx: 0x10002,
        rdi: 0x1234_ffff,
        rsi: 0x5678_0004,
        ..start()
    };
    let fs_movsb = [0xf3, 0x64, 0xa4]; // rep movsb es:[di], fs:[si]
    let run = run_from(from, FLAGS, Mode::Bits16, W, &fs_movsb).unwrap();
    assert_eq!(run.log[0], Event::Load(Segment::Fs, 4, Byte));
    assert_eq!(
        (run.registers.rcx, run.registers.rdi),
        (0x10001, 0x1234_0000)
    );
    let addr32 = [0x67, 0xaa]; // stosb [edi] in 64-bit mode clears the upper half
    let from = GeneralRegisters {
        rdi: 0x5_ffff_ffff,
        ..start()
    };
    let run = run_from(from, FLAGS, Mode::Bits64, W, &addr32).unwrap();
    assert_eq!(run.registers.rdi, 0);
}

#[test]
fn the_stack() {
    let push = run(R, &[0xff, 0x30]); // push qword [rax]
    assert_eq!(
        push.log,
        [
            Event::Read(Qword),
            Event::Store(Segment::Ss, start().rsp - 8, Qword, DEVICE)
        ]
    );
    assert_eq!(push.registers.rsp, start().rsp - 8);
    let pop = run(W, &[0x8f, 0x00]);
    assert_eq!(
        pop.log,
        [
            Event::Load(Segment::Ss, start().rsp, Qword),
            Event::Write(Qword, 0x1122_3344_5566_7788)
        ]
    );
    assert_eq!(pop.registers.rsp, start().rsp + 8);
}

#[test]
fn what_is_not_emulated_touches_nothing() {
    for (bytes, error) in [
        (&[0x0f, 0x0b][..], EmulateError::Unsupported), // ud2
        (&[0x8e, 0x18], EmulateError::Unsupported),     // mov ds, [rax]
        (&[0x0f, 0x6f, 0x00], EmulateError::Unsupported), // movq mm0, [rax]
        (&[0xf2, 0x0f, 0x10, 0x00], EmulateError::Unsupported), // SSE's movsd
        (&[0x89, 0xd8], EmulateError::Unsupported),     // mov eax, ebx: no memory
        (&[0x50], EmulateError::Unsupported),           // push rax, the stack itself is the device
        (&[0xff, 0x10], EmulateError::Unsupported),     // call [rax]
        (&[0x89], EmulateError::Undecodable),
        (&[], EmulateError::Undecodable),
        (&[0xf0, 0x89, 0x18], EmulateError::Undecodable), // lock mov
    ] {
        for access in [R, W] {
            let (mut registers, mut rflags) = (start(), FLAGS);
            let mut bus = Recorder::default();
            let result = emulate(
                bytes,
                Mode::Bits64,
                access,
                &mut registers,
                &mut rflags,
                &mut bus,
            );
            assert_eq!(result, Err(error), "{bytes:x?}");
            assert_eq!((registers, rflags, bus.log.len()), (start(), FLAGS, 0));
        }
    }
}

#[test]
fn a_fault_at_the_other_operand_leaves_the_registers() {
    for (access, bytes) in [
        (W, &[0xa5][..]),
        (R, &[0xa5]),
        (R, &[0xff, 0x30]),
        (W, &[0x8f, 0x00]),
    ] {
        let (mut registers, mut rflags) = (start(), FLAGS);
        let mut bus = Recorder {
            no_memory: true,
            ..Default::default()
        };
        let result = emulate(
            bytes,
            Mode::Bits64,
            access,
            &mut registers,
            &mut rflags,
            &mut bus,
        );
        assert_eq!((result, registers), (Err(EmulateError::Memory), start()));
    }
}

/// Executes one instruction on this CPU: the result, and the flags after it.
macro_rules! native {
    ($name:literal, $a:expr, $b:expr, $width:expr, $rflags:expr) => {{
        let (mut a, b, mut flags): (u64, u64, u64) = ($a, $b, $rflags & STATUS | 2);
        macro_rules! one {
            ($form:literal) => {
                // SAFETY: arithmetic on two registers, between loading and storing the status
                // flags through the stack, which the compiler is told about by default.
                unsafe {
                    asm!("push {f}", "popfq", concat!($name, $form), "pushfq", "pop {f}",
                        a = inout(reg) a, b = in(reg) b, f = inout(reg) flags)
                }
            };
        }
        match $width {
            Byte => {
                // SAFETY: as above.
                unsafe {
                    asm!("push {f}", "popfq", concat!($name, " al, cl"), "pushfq", "pop {f}",
                        inout("rax") a, in("rcx") b, f = inout(reg) flags)
                }
            }
            Word => one!(" {a:x}, {b:x}"),
            Dword => one!(" {a:e}, {b:e}"),
            Qword => one!(" {a}, {b}"),
        }
        (a & $width.mask(), flags & STATUS)
    }};
}

macro_rules! native_unary {
    ($name:literal, $a:expr, $width:expr, $rflags:expr) => {{
        let (mut a, mut flags): (u64, u64) = ($a, $rflags & STATUS | 2);
        macro_rules! one {
                    ($form:literal) => {
                        // SAFETY: as in `native`, on one register.
                        unsafe {
                            asm!("push {f}", "popfq", concat!($name, $form), "pushfq", "pop {f}",
                                inout("rax") a, f = inout(reg) flags)
                        }
                    };
                }
        match $width {
            Byte => one!(" al"),
            Word => one!(" ax"),
            Dword => one!(" eax"),
            Qword => one!(" rax"),
        }
        (a & $width.mask(), flags & STATUS)
    }};
}

fn operand() -> impl Strategy<Value = u64> {
    const CORNERS: &[u64] = &[
        0,
        1,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0x8000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
        !0,
    ];
    prop_oneof![any::<u64>(), proptest::sample::select(CORNERS), 0..32u64]
}

proptest! {
    #[test]
    fn arithmetic_is_this_cpus(
        a in operand(), b in operand(), rflags in any::<u64>(),
        width in proptest::sample::select(&[Byte, Word, Dword, Qword][..]),
    ) {
        let rflags = rflags & STATUS;
        for (operation, (value, flags)) in [
            (Binary::Add, native!("add", a, b, width, rflags)),
            (Binary::Adc, native!("adc", a, b, width, rflags)),
            (Binary::Sub, native!("sub", a, b, width, rflags)),
            (Binary::Sbb, native!("sbb", a, b, width, rflags)),
            (Binary::And, native!("and", a, b, width, rflags)),
            (Binary::Or, native!("or", a, b, width, rflags)),
            (Binary::Xor, native!("xor", a, b, width, rflags)),
            (Binary::Cmp, native!("cmp", a, b, width, rflags)),
            (Binary::Test, native!("test", a, b, width, rflags)),
        ] {
            let (ours, ours_flags) = operation.compute(a & width.mask(), b & width.mask(), width, rflags);
            if operation.stores() {
                prop_assert_eq!(ours, value, "{:?}", operation);
            }
            let is_logic = matches!(operation, Binary::And | Binary::Or | Binary::Xor | Binary::Test);
            let defined = if is_logic { STATUS & !AF } else { STATUS };
            prop_assert_eq!(ours_flags & defined, flags & defined, "{:?} {:?}", operation, width);
        }
        for (operation, (value, flags)) in [
            (Unary::Inc, native_unary!("inc", a, width, rflags)),
            (Unary::Dec, native_unary!("dec", a, width, rflags)),
            (Unary::Neg, native_unary!("neg", a, width, rflags)),
            (Unary::Not, native_unary!("not", a, width, rflags)),
        ] {
            let result = operation.compute(a & width.mask(), width, rflags);
            prop_assert_eq!(result, (value, flags), "{:?} {:?}", operation, width);
        }
    }

    /// No bytes make it panic, and every instruction reaches the device at most twice.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..16), write in any::<bool>()) {
        for mode in [Mode::Bits16, Mode::Bits32, Mode::Bits64] {
            let access = if write { W } else { R };
            if let Ok(run) = run_from(start(), FLAGS, mode, access, &bytes) {
                prop_assert!(usize::from(run.advance) <= bytes.len());
                prop_assert!(run.log.len() <= 2);
                prop_assert_eq!(run.rflags & !STATUS, FLAGS & !STATUS);
            }
        }
    }

    /// A plain move does what the instruction does without its short way.
    #[test]
    fn plain_moves_do_the_same(code in code(), mode in any_mode()) {
        let Ok(decoded) = Decoded::new(&code, mode) else {
            return Ok(());
        };
        let Some(plain) = decoded.plain_move() else {
            return Ok(());
        };
        let access = if plain.store { W } else { R };
        let long = run_from(start(), FLAGS, mode, access, &code).unwrap();
        let mut bus = Recorder { value: DEVICE, ..Default::default() };
        let mut registers = start();
        if plain.store {
            bus.write(plain.width, plain.stored(&registers));
        } else {
            let value = bus.read(plain.width);
            plain.load(&mut registers, value & plain.width.mask());
        }
        prop_assert_eq!((registers, bus.log), (long.registers, long.log));
        prop_assert_eq!((plain.length, FLAGS), (long.advance, long.rflags));
    }
}

fn any_mode() -> impl Strategy<Value = Mode> {
    proptest::sample::select(&[Mode::Bits16, Mode::Bits32, Mode::Bits64][..])
}

/// Fifteen bytes that begin with a move, often; else with anything.
fn code() -> impl Strategy<Value = Vec<u8>> {
    const PREFIXES: &[&[u8]] = &[
        &[],
        &[0x66],
        &[0x67],
        &[0x40],
        &[0x48],
        &[0x4c],
        &[0x66, 0x45],
    ];
    const MOVES: &[&[u8]] = &[
        &[0x88],
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
        &[],
    ];
    let head = (
        proptest::sample::select(PREFIXES),
        proptest::sample::select(MOVES),
    );
    (head, prop::collection::vec(any::<u8>(), 15)).prop_map(|((prefix, opcode), rest)| {
        let mut code = [prefix, opcode, &rest].concat();
        code.truncate(15);
        code
    })
}
