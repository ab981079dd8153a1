//! Measures, round by round until a byte comes in on COM1, how late the handler of its timer is
//! after HLT, and how long a VM exit takes. In ticks of the time-stamp counter:
//!
//! ```text
//! latency: round N timer MEAN MAXIMUM exit MEAN MAXIMUM
//! ```
#![no_std]
#![no_main]

use core::fmt;
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, cpuid, msr, rdtsc};
use vireo_test_guests::port::in8;
use vireo_test_guests::report::{power_off, say};
use vireo_test_guests::serial::COM1;
use vireo_test_guests::time::microseconds;
use vireo_test_guests::{Shared, exceptions};

vireo_test_guests::guest!(run);

const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1;

const TIMER: u8 = 0x40;
/// Of each, in a round.
const TIMERS: u64 = 50;
const EXITS: u64 = 200;

/// The time-stamp counter in the timer's handler.
static AT: Shared<u64> = Shared::new(0);

fn run() {
    apic::set_x2apic(true);
    exceptions::on(TIMER, |_| {
        AT.set(rdtsc());
        apic::eoi();
    });
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(TIMER));
    let ahead = microseconds(100);
    for round in 0u32.. {
        if in8(LINE_STATUS) & DATA_READY != 0 {
            break;
        }
        let mut timer = Figures::default();
        for _ in 0..TIMERS {
            let deadline = rdtsc() + ahead;
            cpu::wrmsr(msr::TSC_DEADLINE, deadline);
            AT.set(0);
            while AT.get() == 0 {
                cpu::halt();
            }
            timer.add(AT.get().saturating_sub(deadline));
        }
        let mut exit = Figures::default();
        for _ in 0..EXITS {
            let start = rdtsc();
            core::hint::black_box(cpuid(0, 0));
            exit.add(rdtsc() - start);
        }
        say(format_args!(
            "latency: round {round} timer {timer} exit {exit}"
        ));
    }
    power_off()
}

#[derive(Default)]
struct Figures {
    count: u64,
    sum: u64,
    maximum: u64,
}

impl Figures {
    fn add(&mut self, ticks: u64) {
        self.count += 1;
        self.sum += ticks;
        self.maximum = self.maximum.max(ticks);
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.sum / self.count.max(1), self.maximum)
    }
}
