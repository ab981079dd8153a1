//! The 8254.

use crate::port::{in8, out8};

/// Counts in a second.
pub const HZ: u64 = 1_193_182;
const COUNTER_0: u16 = 0x40;
const CONTROL: u16 = 0x43;
const SYSTEM_CONTROL: u16 = 0x61;

/// Starts `counter` in `mode` with `count` (0 is 65536).
pub fn start(counter: u8, mode: u8, count: u16) {
    out8(CONTROL, counter << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    out8(COUNTER_0 + u16::from(counter), low);
    out8(COUNTER_0 + u16::from(counter), high);
}

/// Sets `mode` for counts of one byte, each of which [`count_down`] starts.
pub fn set_short(counter: u8, mode: u8) {
    out8(CONTROL, counter << 6 | 0x10 | mode << 1);
}

/// Starts `counter`, whose mode [`set_short`] has set, with `count` (0 is 256).
pub fn count_down(counter: u8, count: u8) {
    out8(COUNTER_0 + u16::from(counter), count);
}

/// Sets the mode, and leaves the counter without a count: it stands still.
pub fn stop(counter: u8) {
    out8(CONTROL, counter << 6 | 0x30);
}

/// Latches and reads `counter`.
pub fn count(counter: u8) -> u16 {
    out8(CONTROL, counter << 6);
    let port = COUNTER_0 + u16::from(counter);
    u16::from_le_bytes([in8(port), in8(port)])
}

/// The status that the read-back command latches.
pub fn status(counter: u8) -> u8 {
    out8(CONTROL, 0xe0 | 2 << counter);
    in8(COUNTER_0 + u16::from(counter))
}

/// Opens or closes the gate of counter 2.
pub fn set_gate_2(open: bool) {
    let rest = in8(SYSTEM_CONTROL) & 0x0c;
    out8(SYSTEM_CONTROL, rest | u8::from(open));
}

/// The output of counter 2.
pub fn output_2() -> bool {
    in8(SYSTEM_CONTROL) & 0x20 != 0
}
