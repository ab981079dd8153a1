//! Says back what is typed on COM1, a line at a time: `echo: "LINE"`. Some lines are
//! commands:
//!
//! | line | what it does |
//! | --- | --- |
//! | `flood` | sends numbered lines, until a byte comes in |
//! | `draw` | draws on the screen |
//! | `graphics` | has it show graphics |
//! | `roam` | moves its local APIC to thousands of places |
//! | `quit` | powers the machine off |
#![no_std]
#![no_main]

use vireo_test_guests::apic;
use vireo_test_guests::check_equal;
use vireo_test_guests::cpu::{self, msr};
use vireo_test_guests::memory::{read16, write16};
use vireo_test_guests::port::{in8, out16};
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
            b"draw" => draw(),
            b"graphics" => graphics(),
            b"flood" => flood(),
            b"roam" => roam(),
            _ => say(format_args!("echo: \"{}\"", text.escape_ascii())),
        }
    }
}

/// The first cell that the screen shows, and where it is in memory.
const SHOWN: u16 = 0x123;
const SCREEN: u64 = 0xb_8000 + 2 * SHOWN as u64;
const COLUMNS: u64 = 80;
const CRTC: u16 = 0x3d4;
const INPUT_STATUS: u16 = 0x3da;
const VERTICAL_RETRACE: u8 = 1 << 3;
const GRAPHICS_CONTROLLER: u16 = 0x3ce;

/// A frame around what is typed, as code page 437 has it, behind a retrace.
fn draw() {
    let [high, low] = SHOWN.to_be_bytes();
    out16(CRTC, u16::from_le_bytes([0x0c, high]));
    out16(CRTC, u16::from_le_bytes([0x0d, low]));
    while in8(INPUT_STATUS) & VERTICAL_RETRACE != 0 {}
    while in8(INPUT_STATUS) & VERTICAL_RETRACE == 0 {}
    for (row, text) in (0..).zip([b"\xc9\xcd\xcd\xbb", b"\xbah\x82\xba", b"\xc8\xcd\xcd\xbc"]) {
        for (column, &character) in (38..).zip(text) {
            let cell = u16::from_le_bytes([character, 0x1f]);
            write16(SCREEN + 2 * (row * COLUMNS + column), cell);
        }
    }
    write16(SCREEN + 2 * (25 * COLUMNS - 1), 0x0703);
    check_equal("the screen is memory", read16(SCREEN + 2 * 38), 0x1fc9);
    say(format_args!("drawn"));
}

fn graphics() {
    out16(GRAPHICS_CONTROLLER, 0x0506);
    say(format_args!("painted"));
}

fn roam() {
    const PLACES: u64 = 4096;
    let home = apic::base();
    for place in 1..=PLACES {
        let base = (1 << 32) + (place << 21);
        cpu::wrmsr(msr::APIC_BASE, base | home & 0xfff);
    }
    cpu::wrmsr(msr::APIC_BASE, home);
    say(format_args!("roamed"));
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
