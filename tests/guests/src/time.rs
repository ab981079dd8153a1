//! The time-stamp counter as a clock.

use crate::apic::{self, entry, register};
use crate::cpu::{self, cpuid, msr, rdtsc};
use crate::exceptions;

/// Vector of the timer that ends a wait in HLT.
const GUARD: u8 = 0xe0;

/// Ticks of the time-stamp counter in a second, as the hypervisor's CPUID leaf says.
pub fn tsc_hz() -> u64 {
    u64::from(cpuid(0x4000_0010, 0)[0]) * 1000
}

/// Ticks of the local APIC timer's input in a second, as the same leaf says.
pub fn apic_hz() -> u64 {
    u64::from(cpuid(0x4000_0010, 0)[1]) * 1000
}

/// Ticks in so many microseconds.
pub fn microseconds(count: u64) -> u64 {
    count * tsc_hz() / 1_000_000
}

/// Ticks that one VM exit takes: what a machine needs to answer is no mistake of
/// its clocks, and where the hypervisor is nested it is a lot.
pub fn exit_cost() -> u64 {
    (0..8).fold(u64::MAX, |least, _| {
        let start = rdtsc();
        core::hint::black_box(cpuid(0, 0));
        least.min(rdtsc().wrapping_sub(start))
    })
}

/// Lets time pass.
pub fn spin(ticks: u64) {
    let start = rdtsc();
    while rdtsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Waits until `done`, for at most so many ticks; says how many it took.
pub fn wait(limit: u64, done: impl Fn() -> bool) -> Option<u64> {
    let start = rdtsc();
    loop {
        let passed = rdtsc().wrapping_sub(start);
        if done() {
            return Some(passed);
        }
        if passed > limit {
            return None;
        }
    }
}

/// Waits in HLT until `done`, for at most so many ticks; says how many it took.
/// It uses the local APIC's timer.
pub fn halt_until(limit: u64, done: impl Fn() -> bool) -> Option<u64> {
    let start = rdtsc();
    exceptions::on(GUARD, |_| apic::eoi());
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(GUARD));
    cpu::wrmsr(msr::TSC_DEADLINE, start.wrapping_add(limit));
    while !done() && exceptions::count(GUARD) == 0 {
        cpu::halt();
    }
    let passed = rdtsc().wrapping_sub(start);
    cpu::wrmsr(msr::TSC_DEADLINE, 0);
    done().then_some(passed)
}

/// Whether `actual` is `expected`, give or take `percent`.
pub fn is_near(actual: u64, expected: u64, percent: u64) -> bool {
    actual.abs_diff(expected) * 100 <= expected * percent
}
