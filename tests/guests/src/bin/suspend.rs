//! Suspend to RAM, ended by the real-time clock: the machine goes on in real mode at the waking
//! vector, and ends with a code that is in memory.
#![no_std]
#![no_main]

use vireo_test_guests::memory::{read32, write_code, write32};
use vireo_test_guests::port::{out8, out16};
use vireo_test_guests::report::PM1A_CONTROL;
use vireo_test_guests::{acpi, check, report, serial, start_info};

vireo_test_guests::guest!(run);

/// Code segment 0x700, offset 8.
const VECTOR: u32 = 0x7008;
const MARKER: u64 = 0x7100;
const CODE: u32 = 0x15;
const PM1A_ENABLE: u16 = PM1A_CONTROL - 2;
const RTC_ENABLE: u16 = 1 << 10;
/// SLP_TYP of S3, and SLP_EN.
const SUSPEND: u16 = 1 << 10 | 1 << 13;
/// An alarm register that every value matches.
const ANY: u8 = 0xc0;

/// mov eax, cs:[0x100]; mov dx, 0xf4; out dx, eax; hlt
const WAKE: [u8; 11] = [
    0x2e, 0x66, 0xa1, 0x00, 0x01, 0xba, 0xf4, 0x00, 0x66, 0xef, 0xf4,
];

fn run() {
    let fadt = acpi::find(acpi::xsdt(start_info::rsdp()), b"FACP").unwrap_or(0);
    let facs = u64::from(read32(fadt + 36));
    check("there is a FACS", acpi::signature(facs) == *b"FACS");
    write32(facs + 12, VECTOR);
    write_code(VECTOR.into(), &WAKE);
    write32(MARKER, CODE);
    // 24 hours, and an alarm each second.
    for (index, value) in [(1, ANY), (3, ANY), (5, ANY), (0xb, 0x22)] {
        out8(0x70, index);
        out8(0x71, value);
    }
    out16(PM1A_ENABLE, RTC_ENABLE);
    report::say(format_args!("about to sleep"));
    serial::flush();
    out16(PM1A_CONTROL, SUSPEND);
    check("the machine sleeps", false);
}
