//! A vector instruction on a register of the I/O APIC.
#![no_std]
#![no_main]

use vireo_test_guests::{cpu, io_apic, report::say};

vireo_test_guests::guest!(run);

fn run() {
    cpu::set_cr4(cpu::cr4() | cpu::cr4::OSFXSR);
    say(format_args!("about to add a vector from a device"));
    let _ = vireo_test_guests::execute!("addps xmm0, [{}]", in(reg) io_apic::BASE);
}
