//! Started by multiboot, by address fields: what its loader tells.
#![no_std]
#![no_main]

use core::arch::global_asm;
use vireo_test_guests::memory::{read8, read32, read64};
use vireo_test_guests::{Shared, check, check_detail, check_equal, report};

vireo_test_guests::guest!(run);

static MAGIC: Shared<u32> = Shared::new(0);
static INFO: Shared<u32> = Shared::new(0);

global_asm!(
    ".pushsection .multiboot, \"a\"",
    ".balign 4",
    "multiboot_header:",
    ".long 0x1badb002, 0x10007, -(0x1badb002 + 0x10007)",
    ".long multiboot_header, __start, 0, __end, multiboot_entry",
    // Text.
    ".long 1, 80, 25, 0",
    ".popsection",
    ".pushsection .text.entry, \"ax\", @progbits",
    ".code32",
    "multiboot_entry:",
    "mov [{magic}], eax",
    "mov [{info}], ebx",
    "jmp pvh_entry",
    ".code64",
    ".popsection",
    magic = sym MAGIC,
    info = sym INFO,
);

fn run() {
    let info = u64::from(INFO.get());
    let field = |offset: u64| u64::from(read32(info + offset));
    check_equal("the magic number", MAGIC.get(), 0x2bad_b002);
    check_equal("what there is", field(0), 0b1_0010_0100_1101);
    check_equal("KiB of lower memory", field(4), 640);
    check_equal("KiB of upper memory", field(8), 63 * 1024);
    check("the command line", is_text(field(16), b"multiboot a=b c"));
    check("the loader's name", is_text(field(64), b"Vireo"));

    check_equal("the screen's address", read64(info + 88), 0xb_8000);
    check_equal(
        "its pitch, columns and rows",
        [field(96), field(100), field(104)],
        [160, 80, 25],
    );
    check_equal("16 bits, and text", field(108) & 0xffff, 0x0210);

    check_equal("modules", field(20), 2);
    let module = |index: u64, word: u64| u64::from(read32(field(24) + 16 * index + 4 * word));
    for (index, line, len, first) in [(0, &b"first x=y"[..], 5000, b'1'), (1, b"second", 3, b'2')] {
        let (start, end) = (module(index, 0), module(index, 1));
        check_detail(
            "a module is at a page behind the kernel",
            start.is_multiple_of(4096) && start >= (&raw const __end).addr() as u64,
            format_args!("{start:#x}"),
        );
        check_equal("its length", end - start, len);
        check_equal(
            "its contents",
            (read8(start), read8(end - 1)),
            (first, first),
        );
        check("its command line", is_text(module(index, 2), line));
    }

    let (len, map) = (field(44), field(48));
    let mut at = map;
    let mut ram = 0;
    while at < map + len {
        let size = u64::from(read32(at));
        if read32(at + 20) == 1 {
            ram += read64(at + 12);
        }
        at += size + 4;
    }
    check_equal("the memory map ends where it says", at, map + len);
    check_equal("RAM in it", ram, (63 << 20) + 0xa_0000);
    report::finish();
}

unsafe extern "C" {
    static __end: u8;
}

fn is_text(address: u64, text: &[u8]) -> bool {
    (address..)
        .zip(text.iter().chain(&[0]))
        .all(|(at, byte)| read8(at) == *byte)
}
