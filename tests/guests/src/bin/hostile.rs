//! Does for 60 ms what its command line says, as often as it can, and powers off.
#![no_std]
#![no_main]

use core::fmt::Write;
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, cpuid, msr, rdtsc};
use vireo_test_guests::exceptions::{self, vector};
use vireo_test_guests::memory::{read32, write32};
use vireo_test_guests::port::{in8, out8};
use vireo_test_guests::report::{abort, power_off};
use vireo_test_guests::serial::{COM1, Serial};
use vireo_test_guests::start_info::command_line_is;
use vireo_test_guests::time::microseconds;

vireo_test_guests::guest!(run);

const TIMER: u8 = 0x40;
const IPI: u8 = 0x41;

const I_O_APIC: u64 = 0xfec0_0000;
/// Ports whose reads change nothing that this guest needs: the whole PC's.
const PORTS: core::ops::Range<u16> = 0..0x1000;
/// Selects a register of the RTC.
const RTC_INDEX: u16 = 0x70;

/// What it does, by command line.
const WAYS: [(&str, fn()); 9] = [
    // For comparison.
    ("idle", || halt_for(microseconds(1000))),
    ("spin", core::hint::spin_loop),
    ("console", || (0..64).for_each(|_| out8(COM1, b'#'))),
    ("cpuid", || {
        core::hint::black_box(cpuid(0, 0));
    }),
    ("ports", || {
        PORTS.for_each(|port| {
            core::hint::black_box(in8(port));
            out8(RTC_INDEX, port as u8);
        });
    }),
    ("memory", || {
        write32(I_O_APIC, 1);
        core::hint::black_box(read32(I_O_APIC + 0x10));
    }),
    // Its deadline has passed when it is set.
    ("timer", || {
        cpu::wrmsr(msr::TSC_DEADLINE, 1);
        cpu::interrupt_window();
    }),
    ("halt", || halt_for(1)),
    ("interrupts", || {
        apic::send(0, entry::TO_SELF | u32::from(IPI));
        apic::send(0, entry::NMI);
        cpu::interrupt_window();
    }),
];

fn run() {
    let Some((name, way)) = WAYS.iter().find(|(name, _)| command_line_is(name)) else {
        abort(format_args!("the command line names no way"));
    };
    let _ = writeln!(Serial, "hostile: {name}");
    apic::set_x2apic(true);
    exceptions::on(TIMER, |_| apic::eoi());
    exceptions::on(IPI, |_| apic::eoi());
    exceptions::on(vector::NMI, |_| {});
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(TIMER));
    let (start, duration) = (rdtsc(), microseconds(60_000));
    while rdtsc().wrapping_sub(start) < duration {
        way();
    }
    power_off()
}

fn halt_for(ticks: u64) {
    cpu::wrmsr(msr::TSC_DEADLINE, rdtsc() + ticks);
    cpu::halt();
}
