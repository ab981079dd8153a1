//! An interrupt whose stack lies where there is neither memory nor a device.
#![no_std]
#![no_main]

use vireo_test_guests::descriptors::{self, SPARE_STACK_INDEX};
use vireo_test_guests::{exceptions, report::say};

vireo_test_guests::guest!(run);

/// In the hole below the devices.
const NOWHERE: u64 = 0xd000_0000;
const VECTOR: u8 = 0x80;

fn run() {
    say(format_args!("about to be interrupted"));
    descriptors::set_interrupt_stack(descriptors::SPARE_STACK_INDEX, NOWHERE + 0x1000);
    exceptions::set_interrupt_stack(VECTOR, SPARE_STACK_INDEX);
    let _ = vireo_test_guests::execute!("int 0x80");
}
