//! What every operating system may expect of its PC.
#![no_std]
#![no_main]

mod control;
mod cpuid;
mod faults;
mod fw_cfg;
mod initial;
mod interrupts;
mod io_apic;
mod legacy;
mod local_apic;
mod mmio;
mod msr;
mod tables;
mod uart;

vireo_test_guests::guest!(run);

fn run() {
    initial::check_all();
    cpuid::check_all();
    tables::check_all();
    msr::check_all();
    control::check_all();
    faults::check_all();
    local_apic::check_all();
    interrupts::check_all();
    legacy::check_all();
    uart::check_all();
    io_apic::check_all();
    mmio::check_all();
    fw_cfg::check_all();
}
