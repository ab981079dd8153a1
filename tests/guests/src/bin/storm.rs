//! A CPU that waits with interrupts off, while a timer interrupts without end; the other, which has
//! the same processor, works.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};
use vireo_test_guests::report::{finish, say};
use vireo_test_guests::{check, cpu, pic, pit, processors, time};

/// The shortest period of the timer, in its ticks: 1.7 microseconds.
const PERIOD: u16 = 2;

static WAITS: AtomicBool = AtomicBool::new(false);

vireo_test_guests::guest!(run);

fn run() {
    processors::prepare();
    check("the second CPU starts", processors::start(1));
    processors::give(1, work);
    cpu::disable_interrupts();
    pic::init(0x30);
    pic::enable(1);
    pit::start(0, 2, PERIOD);
    WAITS.store(true, SeqCst);
    loop {
        // SAFETY: waits.
        unsafe { asm!("hlt", options(nostack)) };
    }
}

fn work() {
    while !WAITS.load(SeqCst) {
        core::hint::spin_loop();
    }
    for tenth in 1..=5 {
        time::wait(time::tsc_hz() / 10, || false);
        say(format_args!("tenth {tenth}"));
    }
    check("the other CPU works", true);
    finish()
}
