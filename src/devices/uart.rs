//! The 16550A serial port (National Semiconductor PC16550D datasheet).
//!
//! The line behind it is whoever holds the device: bytes that the guest sends
//! are fetched with [`Uart::output`], and bytes for the guest are offered
//! with [`Uart::receive`]. Sending takes no time as long as the holder fetches;
//! when it does not, the transmitter stays full and the guest waits as it
//! would for a slow line. A byte that finds no room is refused, not lost.

use super::fifo::Fifo;
use super::{Clock, Line, Ticks};

/// Bytes in each of the part's FIFOs.
const FIFO_DEPTH: usize = 16;

/// Bytes that may leave the part before anyone fetches them, so that a guest
/// which sends a line does not wait for the holder at each byte.
const OUTPUT_DEPTH: usize = 512;

/// Input clock divided by 16: the baud rate at divisor 1.
const BASE_BAUD: u64 = 115_200;

/// Interrupt enable register.
mod ier {
    pub const RECEIVED: u8 = 0x01;
    pub const TRANSMITTER_EMPTY: u8 = 0x02;
    pub const LINE_STATUS: u8 = 0x04;
    pub const MODEM_STATUS: u8 = 0x08;
    pub const ALL: u8 = 0x0f;
}

/// Interrupt identification register.
mod iir {
    pub const MODEM_STATUS: u8 = 0x00;
    pub const NONE: u8 = 0x01;
    pub const TRANSMITTER_EMPTY: u8 = 0x02;
    pub const RECEIVED: u8 = 0x04;
    pub const LINE_STATUS: u8 = 0x06;
    pub const TIMEOUT: u8 = 0x0c;
    pub const FIFOS_ENABLED: u8 = 0xc0;
}

/// FIFO control register.
mod fcr {
    pub const ENABLE: u8 = 0x01;
    pub const CLEAR_RECEIVER: u8 = 0x02;
    pub const CLEAR_TRANSMITTER: u8 = 0x04;
}

/// Line control register.
mod lcr {
    pub const DIVISOR_LATCH: u8 = 0x80;
}

/// Modem control register.
mod mcr {
    pub const DTR: u8 = 0x01;
    pub const RTS: u8 = 0x02;
    pub const OUT1: u8 = 0x04;
    /// Lets the interrupt output through to the bus, on a PC.
    pub const OUT2: u8 = 0x08;
    pub const LOOPBACK: u8 = 0x10;
    pub const ALL: u8 = 0x1f;
}

/// Line status register.
mod lsr {
    pub const DATA_READY: u8 = 0x01;
    pub const OVERRUN: u8 = 0x02;
    pub const HOLDING_EMPTY: u8 = 0x20;
    pub const TRANSMITTER_EMPTY: u8 = 0x40;
}

/// Modem status register: the inputs in the high half; what changed in the low half.
mod msr {
    pub const CTS: u8 = 0x10;
    pub const DSR: u8 = 0x20;
    pub const RI: u8 = 0x40;
    pub const DCD: u8 = 0x80;
    /// Ring indicator's change counts only when it goes away.
    pub const RING_ENDED: u8 = 0x04;
}

/// A 16550A.
#[derive(Clone, Debug)]
pub struct Uart {
    clock: Clock,
    interrupt_enable: u8,
    /// Trigger bits and enable bit of the FIFO control register.
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    /// The modem inputs as last seen, and what changed since the last read.
    modem_status: u8,
    scratch: u8,
    divisor: u16,
    receiver: Fifo<FIFO_DEPTH>,
    /// What the receiver buffer register shows when nothing is new.
    last_received: u8,
    overrun: bool,
    transmitter: Fifo<FIFO_DEPTH>,
    output: Fifo<OUTPUT_DEPTH>,
    /// The transmitter became empty, and nobody was told.
    empty_pending: bool,
    /// When the receiver has been idle for four characters.
    timeout: Option<Ticks>,
    timed_out: bool,
    line: Line,
}

impl Uart {
    /// A port after reset, with a peer that is ready.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            modem_status: msr::CTS | msr::DSR | msr::DCD,
            scratch: 0,
            // As firmware leaves it.
            divisor: 1,
            receiver: Fifo::default(),
            last_received: 0,
            overrun: false,
            transmitter: Fifo::default(),
            output: Fifo::default(),
            empty_pending: false,
            timeout: None,
            timed_out: false,
            line: Line::default(),
        }
    }

    /// The interrupt output. The gate that OUT2 is on a PC is always open: kernels that have only seen
    /// emulators do not open it.
    #[inline]
    pub fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    /// When the receiver's time-out interrupt is due.
    #[inline]
    pub const fn deadline(&self) -> Option<Ticks> {
        self.timeout
    }

    /// What the guest has sent: it is gone when the iterator has given it.
    #[inline]
    pub const fn output(&mut self) -> Output<'_> {
        Output { uart: self }
    }

    /// Sends a byte past the registers; false when it has no room, and is to be offered again
    /// later.
    pub fn print(&mut self, byte: u8) -> bool {
        let has_room = self.output.len() < OUTPUT_DEPTH;
        if has_room {
            self.output.push(byte);
        }
        has_room
    }

    /// Whether the transmitter waits for its output to be fetched.
    #[inline]
    pub const fn output_waits(&self) -> bool {
        !self.transmitter.is_empty()
    }

    /// Offers a byte to the receiver; false when it has no room or is looped
    /// back, and the byte is to be offered again later.
    pub fn receive(&mut self, now: Ticks, byte: u8) -> bool {
        self.advance(now);
        if self.loops_back() || self.receiver.len() >= self.receiver_room() {
            return false;
        }
        self.accept(now, byte);
        self.update();
        true
    }

    /// Raises the receiver's time-out interrupt when it is due.
    pub fn advance(&mut self, now: Ticks) {
        if self.timeout.is_some_and(|due| due <= now) {
            self.timeout = None;
            self.timed_out = true;
            self.update();
        }
    }

    /// Reads register `offset` (0 to 7).
    pub fn read(&mut self, now: Ticks, offset: u8) -> u8 {
        self.advance(now);
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        let divisor_latch = self.line_control & lcr::DIVISOR_LATCH != 0;
        match offset {
            0 if divisor_latch => divisor_low,
            0 => self.take_received(now),
            1 if divisor_latch => divisor_high,
            1 => self.interrupt_enable,
            2 => self.identify(),
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let value = self.line_status();
                if core::mem::take(&mut self.overrun) {
                    self.update();
                }
                value
            }
            6 => {
                let value = self.modem_status;
                self.modem_status &= 0xf0;
                self.update();
                value
            }
            7 => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes register `offset` (0 to 7).
    pub fn write(&mut self, now: Ticks, offset: u8, value: u8) {
        self.advance(now);
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        let divisor_latch = self.line_control & lcr::DIVISOR_LATCH != 0;
        match offset {
            0 if divisor_latch => self.divisor = u16::from_le_bytes([value, divisor_high]),
            0 => self.transmit(now, value),
            1 if divisor_latch => self.divisor = u16::from_le_bytes([divisor_low, value]),
            1 => self.enable_interrupts(value & ier::ALL),
            2 => self.control_fifos(value),
            3 => self.line_control = value,
            4 => self.control_modem(value & mcr::ALL),
            7 => self.scratch = value,
            // Line and modem status are not for writing.
            _ => {}
        }
        self.update();
    }

    const fn loops_back(&self) -> bool {
        self.modem_control & mcr::LOOPBACK != 0
    }

    const fn has_fifos(&self) -> bool {
        self.fifo_control & fcr::ENABLE != 0
    }

    /// Bytes that the receiver holds at most.
    const fn receiver_room(&self) -> usize {
        if self.has_fifos() { FIFO_DEPTH } else { 1 }
    }

    /// Bytes in the receiver that raise its interrupt.
    const fn trigger(&self) -> usize {
        match (self.has_fifos(), self.fifo_control >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    /// Four characters on the line, in ticks.
    fn four_characters(&self) -> u64 {
        let divisor = match self.divisor {
            0 => 0x1_0000,
            divisor => u64::from(divisor),
        };
        // Start bit, 5 to 8 data bits, parity, one or two stop bits.
        let control = self.line_control;
        let bits = 7 + (control & 3) + (control >> 3 & 1) + (control >> 2 & 1);
        self.clock.ticks(4 * u64::from(bits) * divisor, BASE_BAUD)
    }

    fn restart_timeout(&mut self, now: Ticks) {
        self.timeout = (self.has_fifos() && !self.receiver.is_empty())
            .then(|| Ticks(now.0.saturating_add(self.four_characters().max(1))));
    }

    /// A byte arrives in the receiver. Without FIFOs an unread one is overwritten,
    /// with full ones the new one is dropped.
    fn accept(&mut self, now: Ticks, byte: u8) {
        if self.receiver.len() >= self.receiver_room() {
            self.overrun = true;
            if self.has_fifos() {
                return;
            }
            self.receiver.clear();
        }
        self.receiver.push(byte);
        self.restart_timeout(now);
    }

    fn take_received(&mut self, now: Ticks) -> u8 {
        if let Some(byte) = self.receiver.pop() {
            self.last_received = byte;
            self.timed_out = false;
            self.restart_timeout(now);
            self.update();
        }
        self.last_received
    }

    fn transmit(&mut self, now: Ticks, byte: u8) {
        self.empty_pending = false;
        // The line goes down before it may go up again: one edge per byte or burst.
        self.update();
        if self.loops_back() {
            self.accept(now, byte);
            self.empty_pending = true;
            return;
        }
        // A guest that did not wait loses the byte, as with the real part.
        let room = if self.has_fifos() { FIFO_DEPTH } else { 1 };
        if self.transmitter.len() < room {
            self.transmitter.push(byte);
        }
        self.drain();
    }

    /// Moves what was sent to where the holder fetches it.
    fn drain(&mut self) {
        if self.transmitter.is_empty() {
            return;
        }
        while self.output.len() < OUTPUT_DEPTH {
            let Some(byte) = self.transmitter.pop() else {
                break;
            };
            self.output.push(byte);
        }
        if self.transmitter.is_empty() {
            self.empty_pending = true;
        }
    }

    fn enable_interrupts(&mut self, value: u8) {
        let enabled = value & !self.interrupt_enable;
        self.interrupt_enable = value;
        if enabled & ier::TRANSMITTER_EMPTY != 0 && self.transmitter.is_empty() {
            self.empty_pending = true;
        }
    }

    fn control_fifos(&mut self, value: u8) {
        let switched = (value ^ self.fifo_control) & fcr::ENABLE != 0;
        if switched || value & fcr::CLEAR_RECEIVER != 0 {
            self.receiver.clear();
            self.timeout = None;
            self.timed_out = false;
        }
        if (switched || value & fcr::CLEAR_TRANSMITTER != 0) && !self.transmitter.is_empty() {
            self.transmitter.clear();
            self.empty_pending = true;
        }
        // The other bits count only together with the enable bit.
        self.fifo_control = if value & fcr::ENABLE != 0 {
            value & (iir::FIFOS_ENABLED | fcr::ENABLE)
        } else {
            0
        };
    }

    fn control_modem(&mut self, value: u8) {
        self.modem_control = value;
        let inputs = if self.loops_back() {
            let wired = [
                (mcr::RTS, msr::CTS),
                (mcr::DTR, msr::DSR),
                (mcr::OUT1, msr::RI),
                (mcr::OUT2, msr::DCD),
            ];
            let set = |(output, input)| if value & output != 0 { input } else { 0 };
            wired.into_iter().fold(0, |all, pair| all | set(pair))
        } else {
            msr::CTS | msr::DSR | msr::DCD
        };
        let mut changed = (inputs ^ self.modem_status) >> 4;
        if inputs & msr::RI != 0 {
            changed &= !msr::RING_ENDED;
        }
        self.modem_status = inputs | self.modem_status & 0x0f | changed;
    }

    fn line_status(&self) -> u8 {
        let mut value = 0;
        if !self.receiver.is_empty() {
            value |= lsr::DATA_READY;
        }
        if self.overrun {
            value |= lsr::OVERRUN;
        }
        if self.transmitter.is_empty() {
            value |= lsr::HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY;
        }
        value
    }

    /// The interrupt with the highest priority that is enabled and pending.
    fn source(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(ier::LINE_STATUS) && self.overrun {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED) && self.receiver.len() >= self.trigger() {
            iir::RECEIVED
        } else if enabled(ier::RECEIVED) && self.timed_out {
            iir::TIMEOUT
        } else if enabled(ier::TRANSMITTER_EMPTY) && self.empty_pending {
            iir::TRANSMITTER_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.modem_status & 0x0f != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn identify(&mut self) -> u8 {
        let source = self.source();
        if source == iir::TRANSMITTER_EMPTY {
            self.empty_pending = false;
            self.update();
        }
        let fifos = if self.has_fifos() {
            iir::FIFOS_ENABLED
        } else {
            0
        };
        source | fifos
    }

    fn update(&mut self) {
        self.line
            .set(!self.loops_back() && self.source() != iir::NONE);
    }
}

/// Takes out of a [`Uart`] what the guest has sent.
#[derive(Debug)]
pub struct Output<'a> {
    uart: &'a mut Uart,
}

impl Iterator for Output<'_> {
    type Item = u8;

    #[inline]
    fn next(&mut self) -> Option<u8> {
        let byte = self.uart.output.pop()?;
        self.uart.drain();
        self.uart.update();
        Some(byte)
    }
}

#[cfg(test)]
mod tests;
