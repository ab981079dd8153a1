//! A loop with interrupts off.
#![no_std]
#![no_main]

use vireo_test_guests::report::say;

vireo_test_guests::guest!(run);

fn run() {
    say(format_args!("about to spin for good"));
    loop {
        core::hint::spin_loop();
    }
}
