//! Says back what is typed on COM1, a line at a time: `echo: "LINE"`. Some lines are
//! commands:
//!
//! | line | what it does |
//! | --- | --- |
//! | `flood` | sends numbered lines, until a byte comes in |
//! | `quit` | powers the machine off |
#![no_std]
#![no_main]

use vireo_test_guests::port::in8;
use vireo_test_guests::report::{power_off, say};
use vireo_test_guests::serial::COM1;
use vireo_test_guests::time::{microseconds, spin};

vireo_test_guests::guest!(run);

const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1;
const LONGEST: usize = 64;

fn run() {
    say(format_args!("echo: ready"));
    let mut line = [0; LONGEST];
    let mut len = 0;
    loop {
        let byte = receive();
        if byte != b'\r' {
            if let Some(place) = line.get_mut(len) {
                *place = byte;
                len += 1;
            }
            continue;
        }
        let text = line.get(..len).unwrap_or_default();
        len = 0;
        match text {
            b"quit" => power_off(),
            b"flood" => flood(),
            _ => say(format_args!("echo: \"{}\"", text.escape_ascii())),
        }
    }
}

fn has_input() -> bool {
    in8(LINE_STATUS) & DATA_READY != 0
}

fn receive() -> u8 {
    while !has_input() {
        spin(microseconds(200));
    }
    in8(COM1)
}

fn flood() {
    for number in 0u32.. {
        if has_input() {
            break;
        }
        say(format_args!("flood {number}"));
    }
    receive();
    say(format_args!("\nflood: over"));
}
