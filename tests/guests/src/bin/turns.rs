//! CPUs that leave each other their turns; one more, which has the same processor, measures what
//! they leave it.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::report::{check_named, finish, say};
use vireo_test_guests::time::microseconds;
use vireo_test_guests::{check, exceptions, processors};

const TIMER: u8 = 0x40;
/// How long each works: less than a slice.
const TURN: u64 = 2_000;
const TURNS: u64 = 210;
/// How many work by turns, and how many spin.
const WORKERS: u64 = 3;
const SPINNERS: u64 = 2;

/// When the first turn begins, and when there are no more.
static START: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);
/// Whose turn it is among those that spin: the turns up to now.
static SPINS: AtomicU64 = AtomicU64::new(0);

vireo_test_guests::guest!(run);

fn run() {
    processors::prepare();
    exceptions::on(TIMER, |_| apic::eoi());
    for id in 1..=WORKERS as u32 {
        check("another CPU starts", processors::start(id));
    }
    leave("that work by turns", WORKERS, work_in_turn, 20);
    leave("that spin in turn", SPINNERS, spin_in_turn, 33);
    finish()
}

/// Has so many CPUs do `work`; they and this one are equals, and it has at least this much left.
fn leave(what: &str, cpus: u64, work: fn(), least_percent: u64) {
    let start = rdtsc() + microseconds(TURN);
    let end = start + TURNS * microseconds(TURN);
    START.store(start, SeqCst);
    END.store(end, SeqCst);
    for id in 1..=cpus as u32 {
        processors::give(id, work);
    }
    let gap = microseconds(40);
    let (mut had, mut last) = (0, rdtsc());
    while last < end {
        let now = rdtsc();
        if last >= start && now - last < gap {
            had += now - last;
        }
        last = now;
    }
    let percent = 100 * had / (end - start);
    say(format_args!("turns: {cpus} CPUs {what} leave {percent} %"));
    check_named(
        format_args!("CPUs {what} leave another its share"),
        percent >= least_percent,
        format_args!("{percent} %"),
    );
    for id in 1..=cpus as u32 {
        check("they end", processors::wait(|| processors::is_idle(id)));
    }
}

/// Works in every third turn, beginning with the one of its number.
fn work_in_turn() {
    // They come in HLT alone.
    cpu::disable_interrupts();
    apic::write_unchecked(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(TIMER));
    let first = apic::own_id() as usize - 1;
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
    cpu::enable_interrupts();
}

/// Waits for its turn and gives it away at once, and never sleeps.
fn spin_in_turn() {
    let own = u64::from(apic::own_id()) - 1;
    let end = END.load(SeqCst);
    while rdtsc() < end {
        if SPINS.load(SeqCst) % SPINNERS == own {
            SPINS.fetch_add(1, SeqCst);
        }
        core::hint::spin_loop();
    }
}
