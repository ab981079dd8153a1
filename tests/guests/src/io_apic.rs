//! The I/O APIC.

use crate::memory::{read32, write32};

pub const BASE: u64 = 0xfec0_0000;
const PINS: u32 = 24;
const DATA: u64 = BASE + 0x10;

/// Bits of a redirection entry.
pub mod entry {
    pub const EXTINT: u64 = 7 << 8;
    pub const NMI: u64 = 4 << 8;
    pub const ACTIVE_LOW: u64 = 1 << 13;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
}

pub fn read(index: u32) -> u32 {
    write32(BASE, index);
    read32(DATA)
}

pub fn write(index: u32, value: u32) {
    write32(BASE, index);
    write32(DATA, value);
}

/// The redirection entry of `pin`.
pub fn redirection(pin: u32) -> u64 {
    u64::from(read(0x11 + 2 * pin)) << 32 | u64::from(read(0x10 + 2 * pin))
}

/// Writes the redirection entry of `pin`, the mask last.
pub fn redirect(pin: u32, entry: u64) {
    write(0x10 + 2 * pin, entry::MASKED as u32);
    write(0x11 + 2 * pin, (entry >> 32) as u32);
    write(0x10 + 2 * pin, entry as u32);
}

/// Masks all pins.
pub fn mask_all() {
    for pin in 0..PINS {
        write(0x10 + 2 * pin, entry::MASKED as u32);
    }
}
