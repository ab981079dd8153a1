//! An FPU instruction on a register of the I/O APIC.
#![no_std]
#![no_main]

use vireo_test_guests::{io_apic, report::say};

vireo_test_guests::guest!(run);

fn run() {
    say(format_args!("about to load a float from a device"));
    let _ = vireo_test_guests::execute!("fld dword ptr [{}]", in(reg) io_apic::BASE);
}
