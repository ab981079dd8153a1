//! COM1, polled.

use crate::port::{in8, out8};
use core::fmt;

/// First port.
pub const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const HOLDING_EMPTY: u8 = 1 << 5;
const ALL_SENT: u8 = 1 << 6;

/// Writes to COM1.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                send(b'\r');
            }
            send(byte);
        }
        Ok(())
    }
}

fn send(byte: u8) {
    while in8(LINE_STATUS) & HOLDING_EMPTY == 0 {}
    out8(COM1, byte);
}

/// Waits until the last byte is out.
pub fn flush() {
    while in8(LINE_STATUS) & ALL_SENT == 0 {}
}
