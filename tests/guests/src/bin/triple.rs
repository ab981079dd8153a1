//! A triple fault: an exception while the IDT is empty.
#![no_std]
#![no_main]

use vireo_test_guests::{exceptions, report::say};

vireo_test_guests::guest!(run);

fn run() {
    say(format_args!("about to fault three times"));
    exceptions::load_empty();
    let _ = vireo_test_guests::execute!("ud2");
}
