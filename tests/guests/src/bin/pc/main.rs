//! What every operating system may expect of its PC.
#![no_std]
#![no_main]

mod cpuid;

vireo_test_guests::guest!(run);

fn run() {
    cpuid::check_all();
}
