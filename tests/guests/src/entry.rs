//! From the PVH entry point (32-bit protected mode without paging) to a Rust
//! function in 64-bit mode: the first 4 GiB mapped one to one in pages of 2 MiB,
//! registers of devices (from 3 GiB up) uncacheable.

use crate::cell::Shared;
use crate::{descriptors, exceptions, report, start_info};
use core::arch::global_asm;

/// Bytes of the stack.
const STACK: usize = 64 * 1024;

#[repr(C, align(4096))]
struct Stack([u8; STACK]);

/// Page map (512 entries), page-directory pointers, four page directories.
#[repr(C, align(4096))]
pub struct Tables(pub [[u64; 512]; 6]);

static BOOT_STACK: Shared<Stack> = Shared::new(Stack([0; STACK]));
/// The flat map.
pub static TABLES: Shared<Tables> = Shared::new(Tables([[0; 512]; 6]));

global_asm!(
    // XEN_ELFNOTE_PHYS32_ENTRY.
    ".pushsection .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long pvh_entry",
    ".popsection",
    ".pushsection .text.entry, \"ax\", @progbits",
    ".code32",
    ".globl pvh_entry",
    "pvh_entry:",
    "cli",
    "cld",
    "mov edi, offset {tables}",
    // The page map, then the page-directory pointers.
    "lea eax, [edi + 0x1003]",
    "mov [edi], eax",
    "xor ecx, ecx",
    "2: lea eax, [edi + 0x2003]",
    "mov edx, ecx",
    "shl edx, 12",
    "add eax, edx",
    "mov [edi + 0x1000 + ecx * 8], eax",
    "inc ecx",
    "cmp ecx, 4",
    "jne 2b",
    // 2048 pages of 2 MiB: present, writable, large; uncacheable from 3 GiB up.
    "xor ecx, ecx",
    "3: mov eax, ecx",
    "shl eax, 21",
    "or eax, 0x83",
    "cmp ecx, 1536",
    "jb 4f",
    "or eax, 0x18",
    "4: mov [edi + 0x2000 + ecx * 8], eax",
    "inc ecx",
    "cmp ecx, 2048",
    "jne 3b",
    "mov eax, 0x20", // CR4.PAE
    "mov cr4, eax",
    "mov cr3, edi",
    "mov ecx, 0xc0000080", // IA32_EFER.LME and NXE
    "mov eax, 0x900",
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80010033", // PG, WP, NE, ET, MP, PE
    "mov cr0, eax",
    "lgdt [{gdtr}]",
    // A far jump to the 64-bit code segment: selector 0x08.
    "push 0x08",
    "mov eax, offset pvh_long_mode",
    "push eax",
    "retf",
    ".code64",
    "pvh_long_mode:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "lea rsp, [rip + {stack} + {size}]",
    "xor ebp, ebp",
    "mov edi, ebx",
    "call {start}",
    "ud2",
    ".popsection",
    tables = sym TABLES,
    gdtr = sym descriptors::GDTR,
    stack = sym BOOT_STACK,
    size = const STACK,
    start = sym start,
);

unsafe extern "C" {
    /// What [`crate::guest!`] makes.
    safe fn guest_main();
}

extern "C" fn start(info: u64) -> ! {
    start_info::set(info);
    descriptors::init();
    exceptions::init();
    guest_main();
    report::finish()
}
