//! A jump to an address where there is neither memory nor a device.
#![no_std]
#![no_main]

use vireo_test_guests::report::say;

vireo_test_guests::guest!(run);

/// In the hole below the devices.
const NOWHERE: u64 = 0xd000_0000;

fn run() {
    say(format_args!("about to run into nothing"));
    let _ = vireo_test_guests::execute!("call {}", in(reg) NOWHERE, clobber_abi("C"));
}
