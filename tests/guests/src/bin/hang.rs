//! HLT with interrupts off, from which nothing wakes.
#![no_std]
#![no_main]

use vireo_test_guests::report::{say, stop};

vireo_test_guests::guest!(run);

fn run() {
    say(format_args!("about to halt for good"));
    stop()
}
