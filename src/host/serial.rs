//! The first serial port, a 16550: its registers and polled output.
//!
//! Polling is for early boot and for last words. Everything else goes through
//! [`super::console`], because a character takes as long as tens of thousands
//! of instructions.
//!
//! Set up here and not by a crate: those at hand choose 38400 baud, and what
//! the firmware and the emulator speak is 115200.

use crate::arch::port::{inb, outb};
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

/// I/O base of COM1.
const BASE: u16 = 0x3f8;
/// What the FIFO takes when the transmitter is empty, in bytes.
pub const FIFO: usize = 16;
/// Iterations to wait for the transmitter: at 115200 baud a character needs
/// under 100 us, which no machine spends on fewer port reads than this.
const PATIENCE: u32 = 200_000;

/// The registers, by offset from the base (PC16550D data sheet, table II).
#[derive(Clone, Copy)]
#[repr(u16)]
enum Register {
    /// Receive buffer, transmit holding; divisor low while DLAB is set.
    Data = 0,
    /// Interrupt enable; divisor high while DLAB is set.
    InterruptEnable = 1,
    /// Read: interrupt identification. Write: FIFO control.
    InterruptIdentification = 2,
    LineControl = 3,
    ModemControl = 4,
    LineStatus = 5,
    ModemStatus = 6,
}

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TRANSMIT_EMPTY: u8 = 1 << 5;
/// IER: received data available.
pub(super) const IER_RECEIVE: u8 = 1 << 0;
/// IER: transmit holding register empty.
pub(super) const IER_TRANSMIT: u8 = 1 << 1;

static PRESENT: AtomicBool = AtomicBool::new(false);

fn read(register: Register) -> u8 {
    // SAFETY: the eight ports of COM1 belong to this module; where there is no
    // UART, reads give all ones.
    unsafe { inb(BASE + register as u16) }
}

fn write(register: Register, value: u8) {
    // SAFETY: as for `read`; a UART does not touch memory.
    unsafe { outb(BASE + register as u16, value) }
}

/// Sets the port to 115200 8N1 with FIFOs, interrupts off. Whether there is one.
pub fn init() -> bool {
    let present = probe();
    if present {
        write(Register::InterruptEnable, 0);
        write(Register::LineControl, 0x80); // DLAB
        write(Register::Data, 1); // 115200 / 1
        write(Register::InterruptEnable, 0);
        write(Register::LineControl, 0x03); // 8N1
        write(Register::InterruptIdentification, 0xc7); // FIFOs on and cleared, receive trigger at 14
        write(Register::ModemControl, 0x0b); // DTR, RTS, OUT2: the interrupt output is gated by OUT2
    }
    PRESENT.store(present, Ordering::Relaxed);
    present
}

/// Whether [`init`] found a UART.
pub fn present() -> bool {
    PRESENT.load(Ordering::Relaxed)
}

/// Looks for a UART by its modem loopback: with MCR.LOOP set, RTS and OUT2
/// come back as CTS and DCD. Nothing is sent.
fn probe() -> bool {
    if read(Register::LineStatus) == 0xff {
        return false;
    }
    let before = read(Register::ModemControl);
    write(Register::ModemControl, 0x1a);
    let status = read(Register::ModemStatus) & 0xf0;
    write(Register::ModemControl, before);
    status == 0x90
}

/// Chooses which interrupts the UART raises.
pub(super) fn set_interrupts(enable: u8) {
    write(Register::InterruptEnable, enable);
}

/// Reads the cause register, which acknowledges a transmit interrupt.
pub(super) fn acknowledge() {
    read(Register::InterruptIdentification);
}

/// Whether the FIFO takes [`FIFO`] bytes.
pub(super) fn transmitter_empty() -> bool {
    read(Register::LineStatus) & LSR_TRANSMIT_EMPTY != 0
}

/// A received byte, when there is one.
pub(super) fn receive() -> Option<u8> {
    (read(Register::LineStatus) & LSR_DATA_READY != 0).then(|| read(Register::Data))
}

/// Puts a byte into the transmitter, which the caller knows to have room.
pub(super) fn send_now(byte: u8) {
    write(Register::Data, byte);
}

/// Sends, waiting for the transmitter each time it is full; gives up on a
/// transmitter that does not move. Takes no lock.
pub fn write_polled(bytes: &[u8]) {
    if !present() {
        return;
    }
    for chunk in bytes.chunks(FIFO) {
        if !(0..PATIENCE).any(|_| transmitter_empty()) {
            return;
        }
        chunk.iter().copied().for_each(send_now);
    }
}

/// Formats to the port with [`write_polled`]; lines end with CR LF.
pub struct Polled;

impl fmt::Write for Polled {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    write_polled(line.as_bytes());
                    write_polled(b"\r\n");
                }
                None => write_polled(line.as_bytes()),
            }
        }
        Ok(())
    }
}
