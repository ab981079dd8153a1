//! Code that nobody has written, in all modes that are not 64-bit at level 0: at level 3, compatibility, real and unreal, protected with
//! 16 and 32 bits, at level 3 too, virtual-8086, without paging, with paging of 32 bits and with
//! PAE. Whatever it raises leads back.

use crate::code::{self, Code};
use crate::machine;
use crate::random::Random;
use core::arch::global_asm;
use vireo_test_guests::cpu::{cr0, cr4};
use vireo_test_guests::descriptors::{self, TableRegister, selector};
use vireo_test_guests::entry::TABLES;
use vireo_test_guests::memory::{write_code, write16, write32, write64};
use vireo_test_guests::paging::PAGE;
use vireo_test_guests::report::say;
use vireo_test_guests::{Shared, apic, io_apic};

const VECTORS: usize = 256;
/// Pages of memory below 64 KiB: code with 16 bits, stack, code of the round.
const LOW: u64 = 0x8000;
const LOW_STACK: u64 = LOW + 0x1800;
const CODE: u64 = LOW + 0x2000;
/// 32-bit words of a TSS, and its fields.
const TSS: usize = 26;
const ESP0: usize = 1;
const SS0: usize = 2;
const CR3: usize = 7;
const EIP: usize = 8;
const EFLAGS: usize = 9;
const ESP: usize = 14;
const ES: usize = 18;
const CS: usize = 19;
/// Registers from EDI to EAX as POPAD has them, then what IRET takes: EIP, CS, EFLAGS, ESP, SS, ES,
/// DS, FS, GS.
const STATE: usize = 17;
const STACK: usize = 4096;

#[repr(C, align(4096))]
struct Page([u32; 1024]);

static IDT: Shared<[u64; VECTORS]> = Shared::new([0; VECTORS]);
static IDTR: Shared<TableRegister<[u64; VECTORS]>> = Shared::new(TableRegister {
    limit: 8 * VECTORS as u16 - 1,
    base: IDT.pointer(),
});
/// What an NMI finds between two modes: the same table has a gate of 64-bit mode, which goes on,
/// and, each at its place, a gate of protected mode and a vector of real mode, which lead back: on
/// the way from one to the other there is no IRET.
static BETWEEN: Shared<[u64; 6]> = Shared::new([0; 6]);
static BETWEEN_REGISTER: Shared<TableRegister<[u64; 6]>> = Shared::new(TableRegister {
    limit: 47,
    base: BETWEEN.pointer(),
});
static TASK_A: Shared<[u32; TSS]> = Shared::new([0; TSS]);
static TASK_B: Shared<[u32; TSS]> = Shared::new([0; TSS]);
static STACKS: Shared<[u8; 2 * STACK]> = Shared::new([0; 2 * STACK]);
/// A page directory, and the four entries of PAE.
static DIRECTORY: Shared<Page> = Shared::new(Page([0; 1024]));
static POINTERS: Shared<Page> = Shared::new(Page([0; 1024]));
/// What the code below takes: state behind some room for a stack, control registers, and whether
/// to go on to real mode, with which limits of segments.
static ROOM: Shared<[u32; 128 + STATE]> = Shared::new([0; 128 + STATE]);
static WANTED: Shared<[u32; 5]> = Shared::new([0; 5]);
static STACK_POINTER: Shared<u64> = Shared::new(0);

unsafe extern "C" {
    fn modes_enter();
    static modes_back: u8;
    static modes_low: u8;
    static modes_low_end: u8;
    static modes_low_back: u8;
    static modes_nmi_64: u8;
}

global_asm!(
    "modes_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov [{stack_pointer}], rsp",
    "lidt [{between_register}]",
    "push {code_32}",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    ".code32",
    "2: mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "mov eax, [{wanted} + 4]",
    "mov cr4, eax",
    "mov eax, [{wanted} + 8]",
    "mov cr3, eax",
    "mov eax, {task_a}",
    "ltr ax",
    "cmp dword ptr [{wanted} + 12], 0",
    "jne 3f",
    "lidt [{idtr}]",
    "mov eax, [{wanted}]",
    "mov cr0, eax",
    "mov esp, offset {room} + 4 * 128",
    "popad",
    "iretd",
    "3: mov eax, [{wanted} + 16]",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov ss, eax",
    // A far jump to selector 0x20.
    ".byte 0xea; .long {low}; .word {code_16}",
    // Whatever has come: the way back, from any state of the segments.
    "modes_back:",
    "cli",
    "cld",
    "lgdt cs:[{gdtr}]",
    "lidt cs:[{between_register}]",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov esp, offset {room} + 4 * 64",
    // No NT, which a task gate has set.
    "push 2",
    "popfd",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov eax, offset {tables}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "mov eax, 0x900",
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80010033",
    "mov cr0, eax",
    ".byte 0xea; .long 4f; .word {code}",
    ".code64",
    "4: mov rsp, [{stack_pointer}]",
    // An NMI may have led here: IRET lets the next one in.
    "mov rax, rsp",
    "push {data}",
    "push rax",
    "pushfq",
    "push {code}",
    "lea rax, [rip + 5f]",
    "push rax",
    "iretq",
    "5: pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    "modes_nmi_64: iretq",
    // This is copied to memory below 64 KiB.
    ".code16",
    "modes_low:",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea; .word {low} + 6f - modes_low, 0",
    "6: xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    // LIDT with the vector table at 0.
    ".byte 0x0f, 0x01, 0x1e; .word {low} + 7f - modes_low",
    "mov sp, {low_stack}",
    ".byte 0x66; popa",
    "iret",
    "7: .word 0x3ff; .long 0",
    "modes_low_back:",
    "cli",
    // LGDT CS:[...].
    ".byte 0x2e, 0x66, 0x0f, 0x01, 0x16; .word {low} + 8f - modes_low",
    // LIDT CS:[...].
    ".byte 0x2e, 0x66, 0x0f, 0x01, 0x1e; .word {low} + 9f - modes_low",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea; .long modes_back; .word {code_32}",
    "8: .word 95; .long {gdt}",
    "9: .word 47; .long {between}",
    "modes_low_end:",
    ".code64",
    stack_pointer = sym STACK_POINTER,
    wanted = sym WANTED,
    room = sym ROOM,
    idtr = sym IDTR,
    between = sym BETWEEN,
    between_register = sym BETWEEN_REGISTER,
    gdtr = sym descriptors::GDTR,
    gdt = sym descriptors::GDT,
    tables = sym TABLES,
    code = const selector::CODE,
    code_16 = const selector::CODE_16,
    code_32 = const selector::CODE_32,
    data = const selector::DATA,
    task_a = const selector::TASK_A,
    low = const LOW,
    low_stack = const LOW_STACK,
);

/// What may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    User,
    Virtual8086,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paging {
    None,
    Bits32,
    Pae,
}

/// Executes what looks like instructions in one of the modes.
pub fn run(random: &mut Random) {
    if random.once_in(2) {
        run_in_long_mode(random);
    } else {
        run_in_legacy_mode(random);
    }
}

/// At level 3, or what 32- and 16-bit code is there.
fn run_in_long_mode(random: &mut Random) {
    let (code, data) = random.pick(&[
        (selector::USER_CODE, selector::USER_DATA),
        (selector::CODE_32, selector::DATA),
        (selector::CODE_16, selector::DATA_16),
    ]);
    let mut state = code::registers(random);
    if code != selector::USER_CODE {
        for register in state.iter_mut().take(code::RIP) {
            *register = value(random).into();
        }
    }
    state[code::RIP] = CODE;
    state[code::CS] = code.into();
    state[code::RSP] = LOW_STACK;
    state[code::SS] = data.into();
    let code = any_code(random);
    code::place(random, code, CODE);
    code::execute(&state);
}

fn any_code(random: &mut Random) -> Code {
    if random.once_in(2) {
        Code::any(random)
    } else {
        Code::likely(random)
    }
}

fn run_in_legacy_mode(random: &mut Random) {
    use Mode::{Protected, Real, User, Virtual8086};
    let mode = random.pick(&[Real, Real, Protected, Protected, User, Virtual8086]);
    let paging = random.pick(&[Paging::None, Paging::Bits32, Paging::Pae]);
    // Of what may be paged, level 3 has nothing.
    let paging = if matches!(mode, Real | User | Virtual8086) {
        Paging::None
    } else {
        paging
    };
    let code = any_code(random);
    prepare(random, mode, paging);
    code::place(random, code, CODE);
    if code::TRACED.get() {
        let wanted = [0, 1, 2, 3, 4].map(|index| WANTED.at(index));
        let state: [u32; STATE] = core::array::from_fn(|index| ROOM.at(128 + index));
        say(format_args!(
            "fuzz: {mode:?} {paging:?} {wanted:x?} {state:x?}"
        ));
    }
    machine::look_soon();
    // SAFETY: it comes back as it was called, but for what is put back now.
    unsafe { modes_enter() };
    // The task register first: the stacks of the IDT's gates are in the TSS.
    descriptors::init();
    machine::restore();
}

fn prepare(random: &mut Random, mode: Mode, paging: Paging) {
    const NE_ET: u64 = 1 << 5 | 1 << 4;
    const PSE: u64 = 1 << 4;
    let mut cr0 = cr0::PE | NE_ET;
    for bit in [cr0::MP, cr0::EM, cr0::TS, cr0::WP, cr0::AM, cr0::CD] {
        if random.once_in(4) {
            cr0 |= bit;
        }
    }
    // VME, PVI, TSD, DE, PGE, OSFXSR.
    let mut cr4 = random.next() & random.next() & 0x28f;
    let mut cr3 = DIRECTORY.address();
    match paging {
        Paging::None => {}
        Paging::Bits32 => {
            cr0 |= cr0::PG;
            cr4 |= PSE;
        }
        Paging::Pae => {
            cr0 |= cr0::PG;
            cr4 |= cr4::PAE;
            cr3 = POINTERS.address();
        }
    }
    let limits = random.pick(&[selector::DATA, selector::DATA_16]);
    let wanted = [
        cr0 as u32,
        cr4 as u32,
        cr3 as u32,
        u32::from(mode == Mode::Real),
        limits.into(),
    ];
    for (index, value) in wanted.into_iter().enumerate() {
        WANTED.put(index, value);
    }
    prepare_tables(random, cr3 as u32);
    prepare_state(random, mode);
    prepare_low();
}

/// Tables for all of it, most of which stay as they are.
fn prepare_tables(random: &mut Random, cr3: u32) {
    const LARGE: u64 = 0x83;
    for index in [0, 1, apic::BASE >> 22] {
        write32(
            DIRECTORY.address() + 4 * index,
            (index << 22 | LARGE) as u32,
        );
    }
    for index in 0..4 {
        let directory = TABLES.address() + PAGE * (2 + index);
        write64(POINTERS.address() + 8 * index, directory | 1);
    }
    let low_half = |target: u64, code: u16| {
        target & 0xffff | u64::from(code) << 16 | 0x8e << 40 | (target >> 16 & 0xffff) << 48
    };
    let back = (&raw const modes_back) as u64;
    for vector in 0..VECTORS {
        let privilege = if random.once_in(2) { 3 << 45 } else { 0 };
        IDT.put(vector, low_half(back, selector::CODE_32) | privilege);
    }
    let nmi = (&raw const modes_nmi_64) as u64;
    BETWEEN.put(1, low_back());
    BETWEEN.put(2, low_half(back, selector::CODE_32));
    BETWEEN.put(4, low_half(nmi, selector::CODE));
    BETWEEN.put(5, nmi >> 32);
    let task_gate = 0x85 << 40 | u64::from(selector::TASK_B) << 16;
    const DOUBLE_FAULT: usize = 8;
    IDT.put(DOUBLE_FAULT, task_gate);
    if random.once_in(4) {
        IDT.put(random.below(32) as usize, task_gate);
    }
    for (selector, task, stack) in [
        (selector::TASK_A, &TASK_A, 1),
        (selector::TASK_B, &TASK_B, 2),
    ] {
        const AVAILABLE: u8 = 0x89;
        let end = STACKS.address() as u32 + stack * STACK as u32;
        descriptors::set_system_segment(selector, task.address(), 4 * TSS as u32 - 1, AVAILABLE);
        for (word, value) in [
            (ESP0, end),
            (SS0, selector::DATA.into()),
            (CR3, cr3),
            (EIP, back as u32),
            (EFLAGS, 2),
            (ESP, end),
            (CS, selector::CODE_32.into()),
            (CS + 1, selector::DATA.into()),
            (CS + 2, selector::DATA.into()),
            (ES, selector::DATA.into()),
        ] {
            task.put(word, value);
        }
    }
}

/// An address, or a number.
fn value(random: &mut Random) -> u32 {
    let place = random.pick(&[
        LOW_STACK,
        LOW + 0x3000,
        0xf000,
        0xb_8000,
        0xc_0000,
        apic::BASE,
        io_apic::BASE,
        0xff00_0000,
    ]);
    match random.below(4) {
        0 => random.number() as u32,
        1 => random.below(0x1_0000) as u32,
        _ => (place + machine::offset(random) % PAGE) as u32,
    }
}

fn prepare_state(random: &mut Random, mode: Mode) {
    const VIRTUAL_8086: u32 = 1 << 17;
    let mut flags = code::flags(random) as u32;
    let (code, data): (u16, u16) = match mode {
        Mode::Real => (0, 0),
        Mode::Protected => (
            random.pick(&[selector::CODE_16, selector::CODE_32]),
            selector::DATA,
        ),
        Mode::User => (selector::USER_CODE, selector::USER_DATA),
        Mode::Virtual8086 => {
            flags |= VIRTUAL_8086;
            (0, 0)
        }
    };
    // IRET with NT is to another task.
    flags &= !(1 << 14);
    let mut state = [0u32; STATE];
    for value in state.iter_mut().take(8) {
        *value = self::value(random);
    }
    state[8] = CODE as u32;
    state[9] = code.into();
    state[10] = flags;
    state[11] = LOW_STACK as u32;
    for selector in state.iter_mut().skip(12) {
        *selector = data.into();
    }
    for (index, &value) in state.iter().enumerate() {
        ROOM.put(128 + index, value);
    }
    for (index, &value) in (0..).zip(state.iter().take(8)) {
        write32(LOW_STACK + 4 * index, value);
    }
    for (index, value) in [CODE as u16, 0, flags as u16].into_iter().enumerate() {
        write16(LOW_STACK + 32 + 2 * index as u64, value);
    }
}

/// The way back from real mode, as a vector has it.
fn low_back() -> u64 {
    LOW + ((&raw const modes_low_back) as u64 - (&raw const modes_low) as u64)
}

/// Copies what has to be below 64 KiB, and has all vectors of real mode lead back.
fn prepare_low() {
    let (begin, end) = (&raw const modes_low, &raw const modes_low_end);
    let length = end as usize - begin as usize;
    // SAFETY: the code lies there.
    let bytes = unsafe { core::slice::from_raw_parts(begin, length) };
    write_code(LOW, bytes);
    for vector in 0..VECTORS as u64 {
        write32(4 * vector, low_back() as u32);
    }
}
