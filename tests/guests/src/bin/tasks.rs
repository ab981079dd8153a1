//! Task switches in 32-bit protected mode without paging, into which the guest goes for
//! them: by CALL, JMP, IRET and task gates, and with what can be wrong.
#![no_std]
#![no_main]

use core::arch::global_asm;
use vireo_test_guests::descriptors::{self, TableRegister, selector};
use vireo_test_guests::{Shared, check_equal, exceptions};

vireo_test_guests::guest!(run);

const VECTORS: usize = 65;
/// The gate that INT uses.
const GATE: usize = 0x40;
const INVALID_TSS: usize = 10;
const GENERAL_PROTECTION: usize = 13;
/// 32-bit words of a TSS.
const TSS: usize = 26;
const STACK: usize = 1024;
const RESULTS: usize = 16;

#[repr(C, align(32))]
struct Pointers([u64; 4]);

static IDT: Shared<[u64; VECTORS]> = Shared::new([0; VECTORS]);
static IDTR: Shared<TableRegister<[u64; VECTORS]>> = Shared::new(TableRegister {
    limit: 8 * VECTORS as u16 - 1,
    base: IDT.pointer(),
});
static TASK_A: Shared<[u32; TSS]> = Shared::new([0; TSS]);
static TASK_B: Shared<[u32; TSS]> = Shared::new([0; TSS]);
static STACK_B: Shared<[u8; STACK]> = Shared::new([0; STACK]);
/// Page-directory pointers, of which the first says that it is writable.
static POINTERS: Shared<Pointers> = Shared::new(Pointers([3, 0, 0, 0]));
/// What the code below has seen.
static SEEN: Shared<[u32; RESULTS]> = Shared::new([0; RESULTS]);
static STACK_POINTER: Shared<u64> = Shared::new(0);

/// Indices of words in a TSS.
mod word {
    pub const ESP: usize = 14;
    pub const EIP: usize = 8;
    pub const EFLAGS: usize = 9;
    pub const ES: usize = 18;
    pub const CS: usize = 19;
}

unsafe extern "C" {
    fn switch_tasks();
    static task_by_call: u8;
    static invalid_tss: u8;
}

global_asm!(
    // Results go to [SEEN], one after another.
    ".macro seen index, value",
    "mov dword ptr [{seen} + 4 * \\index], \\value",
    ".endm",
    "switch_tasks:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov [{stack_pointer}], rsp",
    "push {code_32}",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    ".code32",
    "2: mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "lidt [{idtr}]",
    "mov eax, {task_a}",
    "ltr ax",
    "clts",
    // CALL, twice: the task goes on behind its IRET.
    "mov ebx, 0x1234",
    ".byte 0x9a; .long 0; .word {task_b}",
    "seen 2, ebx",
    "mov eax, cr0",
    "seen 3, eax",
    "clts",
    ".byte 0x9a; .long 0xf4f4f4f4; .word {task_b}",
    // A task gate in the IDT.
    "int 0x40",
    "pushfd",
    "pop eax",
    "seen 5, eax",
    // JMP there and back.
    "mov dword ptr [{b} + 4 * {eip}], offset task_by_jump",
    ".byte 0xea; .long 0; .word {task_b}",
    "str ax",
    "movzx eax, ax",
    "seen 7, eax",
    // A fault with an error code, for which a task is the handler; it skips the instruction.
    "mov dword ptr [{b} + 4 * {eip}], offset task_by_fault",
    "mov eax, 0x1234",
    "mov es, eax",
    // A task whose ES is none.
    "mov dword ptr [{b} + 4 * {es}], 0x3458",
    "mov dword ptr [{b} + 4 * {eip}], offset task_by_jump",
    "mov dword ptr [{b} + 4 * {eflags}], 2",
    ".byte 0xea; .long 0; .word {task_b}",
    "seen 12, 1",
    // A busy TSS: its own.
    "mov dword ptr [{idt} + 8 * 13 + 4], 0",
    "lea eax, [3f]",
    "mov [{idt} + 8 * 13], ax",
    "mov word ptr [{idt} + 8 * 13 + 2], {code_32}",
    "shr eax, 16",
    "mov [{idt} + 8 * 13 + 6], ax",
    "mov word ptr [{idt} + 8 * 13 + 4], 0x8e00",
    ".byte 0xea; .long 0; .word {task_a}",
    "3: pop eax",
    "seen 13, eax",
    "add esp, 12",
    // PAE paging with an entry that has a reserved bit.
    "lea eax, [5f]",
    "mov [{idt} + 8 * 13], ax",
    "shr eax, 16",
    "mov [{idt} + 8 * 13 + 6], ax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "and eax, 0xfffffeff",
    "wrmsr",
    "mov ebx, cr3",
    "mov eax, offset {pointers}",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "5: mov eax, cr0",
    "seen 14, eax",
    "add esp, 16",
    "mov cr3, ebx",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    // Back to 64-bit mode.
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "push {code}",
    "lea eax, [4f]",
    "push eax",
    "retf",
    ".code64",
    "4: mov rsp, [{stack_pointer}]",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    // The other task.
    ".code32",
    "task_by_call:",
    "pushfd",
    "pop eax",
    "seen 0, eax",
    "movzx eax, word ptr [{b}]",
    "seen 1, eax",
    "mov ebx, 0x5678",
    "iretd",
    "seen 4, 1",
    "iretd",
    "inc dword ptr [{seen} + 4 * 6]",
    "iretd",
    "task_by_jump:",
    "inc dword ptr [{seen} + 4 * 8]",
    ".byte 0xea; .long 0; .word {task_a}",
    "task_by_fault:",
    "pop eax",
    "seen 9, eax",
    "add dword ptr [{a} + 4 * {eip}], 2",
    "iretd",
    "invalid_tss:",
    "pop eax",
    "seen 10, eax",
    "str ax",
    "movzx eax, ax",
    "seen 11, eax",
    "add esp, 12",
    "mov dword ptr [{b} + 4 * {es}], {data}",
    ".byte 0xea; .long 0; .word {task_a}",
    ".code64",
    seen = sym SEEN,
    pointers = sym POINTERS,
    stack_pointer = sym STACK_POINTER,
    idtr = sym IDTR,
    idt = sym IDT,
    a = sym TASK_A,
    b = sym TASK_B,
    code = const selector::CODE,
    code_32 = const selector::CODE_32,
    data = const selector::DATA,
    task_a = const selector::TASK_A,
    task_b = const selector::TASK_B,
    eip = const word::EIP,
    eflags = const word::EFLAGS,
    es = const word::ES,
);

fn task_gate(vector: usize) {
    const PRESENT_TASK_GATE: u64 = 0x85 << 40;
    IDT.put(
        vector,
        PRESENT_TASK_GATE | u64::from(selector::TASK_B) << 16,
    );
}

fn interrupt_gate(vector: usize, target: u64) {
    const PRESENT_GATE: u64 = 0x8e << 40;
    let offset = target & 0xffff | (target >> 16 & 0xffff) << 48;
    let code = u64::from(selector::CODE_32) << 16;
    IDT.put(vector, PRESENT_GATE | code | offset);
}

fn run() {
    const BYTES: u32 = 4 * TSS as u32;
    const AVAILABLE: u8 = 0x89;
    descriptors::set_system_segment(selector::TASK_A, TASK_A.address(), BYTES - 1, AVAILABLE);
    descriptors::set_system_segment(selector::TASK_B, TASK_B.address(), BYTES - 1, AVAILABLE);
    TASK_B.put(word::EIP, (&raw const task_by_call) as u32);
    TASK_B.put(word::EFLAGS, 2);
    TASK_B.put(word::ESP, STACK_B.address() as u32 + STACK as u32);
    for segment in 0..4 {
        TASK_B.put(word::ES + segment, selector::DATA.into());
    }
    TASK_B.put(word::CS, selector::CODE_32.into());
    task_gate(GATE);
    task_gate(GENERAL_PROTECTION);
    interrupt_gate(INVALID_TSS, (&raw const invalid_tss) as u64);
    // SAFETY: it comes back as it was called, but for IDTR and TR.
    unsafe { switch_tasks() };
    exceptions::load();
    descriptors::init();
    results();
}

fn results() {
    const NESTED: u32 = 1 << 14;
    const TASK_SWITCHED: u32 = 1 << 3;
    let seen = |index| SEEN.at(index);
    let (a, b) = (u32::from(selector::TASK_A), u32::from(selector::TASK_B));
    check_equal(
        "CALL of a task: NT and the link",
        (seen(0) & NESTED, seen(1)),
        (NESTED, a),
    );
    check_equal("each task has its registers", seen(2), 0x1234);
    check_equal("CR0.TS is set", seen(3) & TASK_SWITCHED, TASK_SWITCHED);
    check_equal("the task goes on behind its IRET", seen(4), 1);
    check_equal(
        "INT through a task gate",
        (seen(6), seen(5) & NESTED),
        (1, 0),
    );
    check_equal("JMP to a task and back", (seen(8), seen(7)), (1, a));
    check_equal("the error code is on the task's stack", seen(9), 0x1234);
    check_equal(
        "a task with a segment that is none gets #TS itself",
        (seen(10), seen(11)),
        (0x3458, b),
    );
    check_equal("and the first goes on", seen(12), 1);
    check_equal("a busy task raises #GP", seen(13), a);
    check_equal(
        "PAE paging with a reserved bit raises #GP, and stays off",
        (seen(14) >> 31, seen(14) & 1),
        (0, 1),
    );
    let task_a = descriptors::descriptor(selector::TASK_A);
    let task_b = descriptors::descriptor(selector::TASK_B);
    check_equal(
        "who was left by JMP is not busy",
        (task_a >> 40 & 0xff, task_b >> 40 & 0xff),
        (0x8b, 0x89),
    );
}
