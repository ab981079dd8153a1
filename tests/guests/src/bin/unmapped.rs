//! A jump to an address where there is neither memory nor a device, or to the one of the command
//! line's `at=NUMBER`.
#![no_std]
#![no_main]

use vireo_test_guests::report::say;
use vireo_test_guests::start_info::option;

vireo_test_guests::guest!(run);

/// In the hole below the devices.
const NOWHERE: u64 = 0xd000_0000;

fn run() {
    say(format_args!("about to run into nothing"));
    let place = option("at").unwrap_or(NOWHERE);
    let _ = vireo_test_guests::execute!("call {}", in(reg) place, clobber_abi("C"));
}
