//! The device for test suites, the debug console, and an end with a code.
#![no_std]
#![no_main]

use vireo_test_guests::exceptions::{self, Frame};
use vireo_test_guests::io_apic::{self, entry};
use vireo_test_guests::memory::{read8, read32, read64, write8, write16, write64};
use vireo_test_guests::port::{in8, in16, in32, out8, out16, out32};
use vireo_test_guests::{apic, check, check_equal, cpu, execute, pic, report, serial, time};

vireo_test_guests::guest!(run);

const ECHO: u16 = 0xe0;
const UNMAP: u16 = 0xe4;
const CONSOLE: u16 = 0xe9;
const EXIT: u16 = 0xf4;
const LINES: u16 = 0x2000;
const MEMORY: u64 = 0xff00_0000;
const VECTOR: u8 = 0x75;
const CODE: u32 = 0x21;
/// More than Vireo keeps for a console.
const FLOOD: u32 = 12_000;

fn run() {
    out32(ECHO, 0x1234_5678);
    out16(ECHO, 0xabcd);
    check_equal("the echo of 32 bits", in32(ECHO), 0x1234_abcd);
    out8(ECHO, 0xef);
    check_equal("the echo of 16 bits", in16(ECHO), 0xabef);
    check_equal("the echo of 8 bits", in8(ECHO), 0xef);
    memory();
    unmapped();
    lines();
    check_equal("the debug console is there", in8(CONSOLE), CONSOLE as u8);
    serial::flush();
    for byte in b"check: the debug console: ok\nflood " {
        out8(CONSOLE, *byte);
    }
    for number in 0..FLOOD {
        out8(CONSOLE, b'a' + (number % 26) as u8);
    }
    out8(CONSOLE, b'\n');
    report::say(format_args!("over"));
    serial::flush();
    out32(EXIT, CODE);
    check("port 0xf4 ends the machine", false);
}

fn memory() {
    write64(MEMORY, 0x1122_3344_5566_7788);
    write16(MEMORY + 7, 0xaabb);
    check_equal("memory that exits", read64(MEMORY), 0xbb22_3344_5566_7788);
    write8(MEMORY + 0xffff, 0x5a);
    check_equal("its last byte", read8(MEMORY + 0xffff), 0x5a);
    check_equal("behind its end", read32(MEMORY + 0x1_0000), u32::MAX);
}

/// A page that is taken away comes back as it was, for data and for code.
fn unmapped() {
    let place = 0x200_0000;
    write64(place, 0x0123_4567_89ab_cdef);
    out32(UNMAP, place as u32);
    check_equal(
        "a page that was unmapped",
        read64(place),
        0x0123_4567_89ab_cdef,
    );
    // More often than page tables can wait to be freed.
    let stays = (0..100).all(|number| {
        let page = place + (number % 8) * 0x1000;
        out32(UNMAP, page as u32);
        write64(page, number);
        read64(page) == number
    });
    check("pages that were unmapped a hundred times", stays);
    let code = run as *const () as u64;
    out32(UNMAP, code as u32);
    check_equal("code that was unmapped", execute!("nop"), None);
    // No memory, and the local APIC.
    out32(UNMAP, 0xd000_0000);
    out32(UNMAP, 0xfee0_0000);
    check(
        "the local APIC is still there",
        apic::read(0x30) != u32::MAX,
    );
}

fn end(_: &mut Frame) {
    apic::eoi();
}

fn lines() {
    pic::enable(0);
    apic::write(0xf0, 0x1ff);
    exceptions::on(VECTOR, end);
    for line in [5, 14, 20] {
        let before = exceptions::count(VECTOR);
        io_apic::redirect(line, VECTOR.into());
        out8(LINES + line as u16, 1);
        out8(LINES + line as u16, 0);
        time::halt_until(time::microseconds(1000), || {
            exceptions::count(VECTOR) > before
        });
        cpu::interrupt_window();
        check_equal(
            "one edge, one interrupt",
            exceptions::count(VECTOR) - before,
            1,
        );
        io_apic::redirect(line, entry::MASKED);
    }
}
