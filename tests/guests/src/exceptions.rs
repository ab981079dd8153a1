//! The IDT: exceptions are caught or end the guest with a word, interrupts are
//! counted.

use crate::cell::Shared;
use crate::descriptors::{FAULT_STACK_INDEX, TableRegister, selector};
use crate::report;
use core::arch::{asm, global_asm, naked_asm};
use core::fmt;

/// Registers at an exception or interrupt, as the stubs push them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// An exception that was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: u64,
    pub rip: u64,
    /// Of a page fault.
    pub cr2: u64,
}

/// Vectors.
pub mod vector {
    pub const DIVIDE: u8 = 0;
    pub const DEBUG: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BREAKPOINT: u8 = 3;
    pub const INVALID_OPCODE: u8 = 6;
    pub const DEVICE_NOT_AVAILABLE: u8 = 7;
    pub const DOUBLE_FAULT: u8 = 8;
    pub const NOT_PRESENT: u8 = 11;
    pub const STACK: u8 = 12;
    pub const GENERAL_PROTECTION: u8 = 13;
    pub const PAGE_FAULT: u8 = 14;
    pub const FLOATING_POINT: u8 = 16;
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.vector {
            vector::DIVIDE => "#DE",
            vector::DEBUG => "#DB",
            vector::NMI => "NMI",
            vector::BREAKPOINT => "#BP",
            vector::INVALID_OPCODE => "#UD",
            vector::DEVICE_NOT_AVAILABLE => "#NM",
            vector::DOUBLE_FAULT => "#DF",
            vector::NOT_PRESENT => "#NP",
            vector::STACK => "#SS",
            vector::GENERAL_PROTECTION => "#GP",
            vector::PAGE_FAULT => "#PF",
            vector::FLOATING_POINT => "#MF",
            _ => "exception",
        };
        write!(
            f,
            "{name} (vector {}, error {:#x}) at {:#x}",
            self.vector, self.error, self.rip
        )?;
        if self.vector == vector::PAGE_FAULT {
            write!(f, ", CR2 {:#x}", self.cr2)?;
        }
        Ok(())
    }
}

/// What a handler may do: look, and change where execution goes on.
pub type Handler = fn(&mut Frame);

const VECTORS: usize = 256;
/// Bytes from stub to stub.
const STUB: u64 = 16;

static IDT: Shared<[u64; 2 * VECTORS]> = Shared::new([0; 2 * VECTORS]);
static HANDLERS: Shared<[Option<Handler>; VECTORS]> = Shared::new([None; VECTORS]);
static COUNTS: Shared<[u64; VECTORS]> = Shared::new([0; VECTORS]);
/// The stack pointer in the innermost [`catch`], or 0.
static CATCHER: Shared<u64> = Shared::new(0);
static CAUGHT: Shared<Option<Exception>> = Shared::new(None);

global_asm!(
    ".pushsection .text.stubs, \"ax\", @progbits",
    ".balign 16",
    "exception_stubs:",
    ".set i, 0",
    ".rept 256",
    ".balign 16",
    // Exceptions with an error code: 8, 10 to 14, 17, 21.
    ".if !((i == 8) || ((i >= 10) && (i <= 14)) || (i == 17) || (i == 21))",
    "push 0",
    ".endif",
    "push i",
    "jmp exception_common",
    ".set i, i + 1",
    ".endr",
    "exception_common:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rdi, rsp",
    "mov rbp, rsp",
    "and rsp, -16",
    "cld",
    "call {taken}",
    "mov rsp, rbp",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
    taken = sym taken,
);

unsafe extern "C" {
    static exception_stubs: u8;
}

/// Fills and loads the IDT.
pub fn init() {
    for vector in 0..=u8::MAX {
        let stack = if vector == vector::DOUBLE_FAULT {
            FAULT_STACK_INDEX
        } else {
            0
        };
        set_gate(vector, stub(vector), stack);
    }
    load();
}

/// Loads the IDT.
pub fn load() {
    let register = TableRegister {
        limit: 16 * VECTORS as u16 - 1,
        base: IDT.pointer().cast::<u64>().cast_const(),
    };
    // SAFETY: all entries are valid.
    unsafe { asm!("lidt [{}]", in(reg) &raw const register) };
}

/// Loads an IDT without entries: the next exception is the last.
pub fn load_empty() {
    let register = TableRegister {
        limit: 0,
        base: core::ptr::null::<u64>(),
    };
    // SAFETY: what follows is wanted.
    unsafe { asm!("lidt [{}]", in(reg) &raw const register) };
}

fn stub(vector: u8) -> u64 {
    (&raw const exception_stubs) as u64 + STUB * u64::from(vector)
}

/// Uses another stack of the interrupt stack table, or none (0), for `vector`.
pub fn set_interrupt_stack(vector: u8, index: u8) {
    set_gate(vector, stub(vector), index);
}

fn set_gate(vector: u8, target: u64, stack: u8) {
    // An interrupt gate; level 3 may use INT 3 and the vectors above 31.
    let access: u64 = if vector == vector::BREAKPOINT || vector >= 32 {
        0xee
    } else {
        0x8e
    };
    let low = target & 0xffff
        | u64::from(selector::CODE) << 16
        | u64::from(stack) << 32
        | access << 40
        | (target >> 16 & 0xffff) << 48;
    IDT.put(2 * usize::from(vector), low);
    IDT.put(2 * usize::from(vector) + 1, target >> 32);
}

/// Jumps to `handler`, which must keep all registers and return by IRETQ, at every
/// `vector` from now on, without anything between.
pub fn set_raw(vector: u8, handler: unsafe extern "C" fn()) {
    set_gate(vector, handler as *const () as u64, 0);
}

/// Calls `handler` at every `vector` from now on, and forgets how often there were any.
pub fn on(vector: u8, handler: Handler) {
    HANDLERS.put(vector.into(), Some(handler));
    COUNTS.put(vector.into(), 0);
}

/// Only counts `vector` from now on: as an exception it is caught, as an interrupt ignored.
pub fn off(vector: u8) {
    HANDLERS.put(vector.into(), None);
}

/// How often `vector` came since [`on`].
pub fn count(vector: u8) -> u64 {
    COUNTS.at(vector.into())
}

extern "C" fn taken(frame: &mut Frame) {
    let vector = frame.vector as u8;
    COUNTS.put(vector.into(), COUNTS.at(vector.into()) + 1);
    if let Some(handler) = HANDLERS.at(vector.into()) {
        handler(frame);
        return;
    }
    if vector >= 32 {
        return;
    }
    let cr2;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) cr2) };
    let exception = Exception {
        vector,
        error: frame.error,
        rip: frame.rip,
        cr2: if vector == vector::PAGE_FAULT { cr2 } else { 0 },
    };
    if !throw(frame, exception) {
        report::abort(format_args!("{exception}"));
    }
}

/// Has execution go on behind the innermost [`catch`], which returns `exception`; false
/// where there is none. For handlers.
pub fn throw(frame: &mut Frame, exception: Exception) -> bool {
    let stack = CATCHER.get();
    if stack == 0 {
        return false;
    }
    CAUGHT.set(Some(exception));
    frame.rip = land as *const () as u64;
    frame.cs = selector::CODE.into();
    frame.ss = selector::DATA.into();
    frame.rsp = stack;
    // No trap, no alignment check, no nested task, forward.
    frame.rflags &= !0x4_4500;
    true
}

/// Calls `f`, and returns the exception that ended it early. A handler of
/// [`on`] comes first.
pub fn catch<F: FnOnce()>(f: F) -> Option<Exception> {
    extern "C" fn call<F: FnOnce()>(f: &mut Option<F>) {
        if let Some(f) = f.take() {
            f();
        }
    }
    // An interrupt's handler may catch too, between an exception and its being looked at here.
    let (outer, outer_caught) = (CATCHER.get(), CAUGHT.get());
    CAUGHT.set(None);
    let mut f = Some(f);
    // SAFETY: `call` takes exactly this argument. `f` owns nothing to drop that matters.
    unsafe {
        protected(
            call::<F> as *const (),
            (&raw mut f).cast(),
            CATCHER.pointer(),
        );
    }
    CATCHER.set(outer);
    let caught = CAUGHT.get();
    CAUGHT.set(outer_caught);
    caught
}

/// Calls `function` with `argument`, and returns when it does or when an
/// exception lands. `catcher` is told the stack to land on.
#[unsafe(naked)]
unsafe extern "C" fn protected(function: *const (), argument: *mut (), catcher: *mut u64) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "sub rsp, 8",
        "mov [rdx], rsp",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "jmp {land}",
        land = sym land,
    )
}

/// The end of [`protected`].
#[unsafe(naked)]
unsafe extern "C" fn land() {
    naked_asm!(
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// The faults that checks expect, told from others by vector and error code.
pub fn is_gp(exception: Option<Exception>) -> bool {
    matches!(
        exception,
        Some(Exception {
            vector: vector::GENERAL_PROTECTION,
            error: 0,
            ..
        })
    )
}

/// An invalid opcode.
pub fn is_ud(exception: Option<Exception>) -> bool {
    matches!(
        exception,
        Some(Exception {
            vector: vector::INVALID_OPCODE,
            ..
        })
    )
}
