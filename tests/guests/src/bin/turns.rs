//! CPUs that work by turns, each while the others wait; one more, which has the same processor,
//! measures what they leave it.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::report::{finish, say};
use vireo_test_guests::time::microseconds;
use vireo_test_guests::{check, exceptions, processors};

const TIMER: u8 = 0x40;
/// How long each works: less than a slice.
const TURN: u64 = 2_000;
const TURNS: u64 = 210;
/// How many work by turns.
const WORKERS: u64 = 3;
/// Of four equals each should have a quarter.
const LEAST_PERCENT: u64 = 20;

/// When the first turn begins.
static START: AtomicU64 = AtomicU64::new(0);

vireo_test_guests::guest!(run);

fn run() {
    processors::prepare();
    exceptions::on(TIMER, |_| apic::eoi());
    for id in 1..=WORKERS as u32 {
        check("another CPU starts", processors::start(id));
    }
    let start = rdtsc() + microseconds(TURN);
    START.store(start, SeqCst);
    for id in 1..=WORKERS as u32 {
        processors::give(id, take_turns);
    }
    let (end, gap) = (start + TURNS * microseconds(TURN), microseconds(40));
    let (mut had, mut last) = (0, rdtsc());
    while last < end {
        let now = rdtsc();
        if last >= start && now - last < gap {
            had += now - last;
        }
        last = now;
    }
    let percent = 100 * had / (end - start);
    say(format_args!("turns: {percent} % are left"));
    check(
        "those that work by turns leave the other its share",
        percent >= LEAST_PERCENT,
    );
    finish()
}

/// Works in every third turn, beginning with the one of its number.
fn take_turns() {
    let first = apic::own_id() as usize - 1;
    // They come in HLT alone.
    cpu::disable_interrupts();
    apic::write_unchecked(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(TIMER));
    let (start, turn) = (START.load(SeqCst), microseconds(TURN));
    for number in (0..TURNS).skip(first).step_by(WORKERS as usize) {
        let begins = start + number * turn;
        while rdtsc() < begins {
            cpu::wrmsr_unchecked(msr::TSC_DEADLINE, begins);
            cpu::halt();
        }
        // Without PAUSE, which would let the others go first.
        while rdtsc() < begins + turn {}
    }
}
