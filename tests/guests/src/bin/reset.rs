//! A reset by the keyboard controller.
#![no_std]
#![no_main]

use vireo_test_guests::{port, report, serial};

vireo_test_guests::guest!(run);

const KEYBOARD_COMMAND: u16 = 0x64;
/// Pulse the CPU's reset line.
const RESET: u8 = 0xfe;

fn run() {
    report::say(format_args!("about to reset"));
    serial::flush();
    port::out8(KEYBOARD_COMMAND, RESET);
    report::check("the keyboard controller resets", false);
}
