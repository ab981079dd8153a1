//! Registers of a device in memory, reached by all kinds of moves, again and again: a
//! hypervisor that remembers an instruction is to notice that it has become another one.
//!
//! The device is the I/O APIC's index register, of eight bits.

use core::arch::asm;
use vireo_test_guests::io_apic::BASE;
use vireo_test_guests::memory::{self, read32, write32};
use vireo_test_guests::paging::{self, entry};
use vireo_test_guests::report::check_named;
use vireo_test_guests::{check_equal, cpu};

pub fn check_all() {
    registers();
    let expected = [0xffff_ffff_ffff_3411, 0xffff_ffff_ffff_0056, 0x78, 0x9a, 0];
    for time in ["first", "second", "third"] {
        check_named(
            format_args!("moves of all widths, the {time} time"),
            forms() == expected,
            format_args!("{:x?}", forms()),
        );
    }
    other_code();
    other_page();
    write32(BASE, 0);
}

/// Writes 8 bits through a register, sets it to all ones, and reads it back: what it is then.
macro_rules! through {
    ($r64:tt, $r32:tt, $address:tt, $value:tt) => {{
        fn through(value: u64) -> u64 {
            let read;
            // SAFETY: a device is accessed, and the register is as it was.
            unsafe {
                asm!(
                    concat!("push ", $r64),
                    concat!("mov ", $r64, ", ", $value),
                    concat!("mov [", $address, "], ", $r32),
                    concat!("mov ", $r64, ", -1"),
                    concat!("mov ", $r32, ", [", $address, "]"),
                    concat!("mov ", $value, ", ", $r64),
                    concat!("pop ", $r64),
                    in($address) BASE,
                    inout($value) value => read,
                );
            }
            read
        }
        ($r64, through as fn(u64) -> u64)
    }};
}

fn registers() {
    let all = [
        through!("rax", "eax", "r8", "r9"),
        through!("rcx", "ecx", "r8", "r9"),
        through!("rdx", "edx", "r8", "r9"),
        through!("rbx", "ebx", "r8", "r9"),
        through!("rbp", "ebp", "r8", "r9"),
        through!("rsi", "esi", "r8", "r9"),
        through!("rdi", "edi", "r8", "r9"),
        through!("r8", "r8d", "rsi", "rdi"),
        through!("r9", "r9d", "rsi", "rdi"),
        through!("r10", "r10d", "rsi", "rdi"),
        through!("r11", "r11d", "rsi", "rdi"),
        through!("r12", "r12d", "rsi", "rdi"),
        through!("r13", "r13d", "rsi", "rdi"),
        through!("r14", "r14d", "rsi", "rdi"),
        through!("r15", "r15d", "rsi", "rdi"),
    ];
    // By pointers, so that each is the same code five times.
    let wrong = all.iter().find(|(_, through)| {
        (0x21..0x26).any(|value| through(0xffff_ffff_0000_0000 | value) != value)
    });
    check_equal(
        "each register goes to a device and comes back, five times over",
        wrong.map(|(name, _)| *name),
        None,
    );
}

/// Other moves than that of a 32-bit register: what is read.
#[inline(never)]
fn forms() -> [u64; 5] {
    let (high, word, zero, whole, between);
    // SAFETY: a device is accessed.
    unsafe {
        asm!(
            "mov dword ptr [{at}], 0x8234",
            "mov {high}, -1",
            "mov ah, [{at}]",
            "mov {high:x}, ax",
            "mov byte ptr [{at}], 0x56",
            "mov {word}, -1",
            "mov {word:x}, [{at}]",
            "mov al, 0x78",
            "mov [{at}], al",
            "movzx {zero:e}, byte ptr [{at}]",
            "mov rax, 0x9a",
            "mov [{at}], rax",
            "mov {whole}, [{at}]",
            "mov eax, -1",
            "mov eax, [{at} + 4]",
            at = in(reg) BASE,
            high = out(reg) high,
            word = out(reg) word,
            zero = out(reg) zero,
            whole = out(reg) whole,
            inout("rax") 0x11u64 => between,
            options(nostack, preserves_flags),
        );
    }
    [high, word, zero, whole, between]
}

/// MOV \[RDI\], ESI and MOV \[RDI\], EDX, and RET.
const FROM_ESI: [u8; 3] = [0x89, 0x37, 0xc3];
const FROM_EDX: [u8; 3] = [0x89, 0x17, 0xc3];
const ESI: u32 = 0x31;
const EDX: u32 = 0x32;

/// Calls one of these at `code`, a few times: what the device has then.
fn call(code: u64) -> u32 {
    for _ in 0..3 {
        // SAFETY: the code is one of the two.
        unsafe {
            asm!("call {}", in(reg) code, in("rdi") BASE, in("esi") ESI, in("edx") EDX, clobber_abi("C"));
        }
    }
    read32(BASE)
}

fn other_code() {
    let code = paging::scratch(0);
    memory::write_code(code, &FROM_ESI);
    check_equal("code that writes to a device", call(code), ESI);
    memory::write_code(code, &FROM_EDX);
    check_equal("other code at the same address", call(code), EDX);
}

fn other_page() {
    let (a, b) = (paging::scratch(0), paging::scratch(1));
    memory::write_code(a, &FROM_ESI);
    memory::write_code(b, &FROM_EDX);
    let page = paging::map(0, a, entry::PRESENT);
    check_equal("code in a page that writes to a device", call(page), ESI);
    paging::map(0, b, entry::PRESENT);
    check_equal("code in another page there", call(page), EDX);
    paging::map(0, a, entry::PRESENT);
    check_equal("and in the first again", call(page), ESI);
    let (tables, other) = (cpu::cr3(), paging::scratch(2));
    // The same tables by another root, but for this page.
    memory::write64(other, memory::read64(tables & !0xfff));
    cpu::set_cr3(other);
    let fault = vireo_test_guests::execute!("call {}", in(reg) page, clobber_abi("C"));
    cpu::set_cr3(tables);
    check_equal(
        "it is not there in other tables",
        fault.map(|fault| (fault.vector, fault.cr2)),
        Some((vireo_test_guests::exceptions::vector::PAGE_FAULT, page)),
    );
    paging::map(0, 0, 0);
}
