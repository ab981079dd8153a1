//! VMXON without a handler for the #UD that a guest without VT-x gets.
#![no_std]
#![no_main]

use vireo_test_guests::{exceptions, paging, report::say};

vireo_test_guests::guest!(run);

fn run() {
    say(format_args!("about to execute VMXON"));
    exceptions::load_empty();
    let region = paging::scratch(0);
    let _ = vireo_test_guests::execute!("vmxon [{}]", in(reg) &raw const region);
}
