//! The two 8259s.

use crate::port::{in8, out8};

pub const MASTER: u16 = 0x20;
pub const SLAVE: u16 = 0xa0;
/// Non-specific end of interrupt.
const EOI: u8 = 0x20;

/// Initializes both: vectors from `first` on, the second on input 2, all masked.
pub fn init(first: u8) {
    for (port, vectors, cascade) in [(MASTER, first, 4), (SLAVE, first + 8, 2)] {
        out8(port, 0x11);
        out8(port + 1, vectors);
        out8(port + 1, cascade);
        out8(port + 1, 0x01);
        out8(port + 1, 0xff);
    }
}

/// Masks all inputs but those with a bit here.
pub fn enable(inputs: u16) {
    let [master, slave] = (!inputs).to_le_bytes();
    out8(MASTER + 1, master);
    out8(SLAVE + 1, slave);
}

/// Ends the interrupt in service: the second's too, for one of its own.
pub fn eoi(from_slave: bool) {
    if from_slave {
        out8(SLAVE, EOI);
    }
    out8(MASTER, EOI);
}

/// The interrupt-request registers.
pub fn requests() -> u16 {
    registers(0x0a)
}

/// The in-service registers.
pub fn in_service() -> u16 {
    registers(0x0b)
}

fn registers(command: u8) -> u16 {
    out8(MASTER, command);
    out8(SLAVE, command);
    u16::from_le_bytes([in8(MASTER), in8(SLAVE)])
}
