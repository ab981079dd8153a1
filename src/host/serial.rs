//! The first two serial ports: the driver of the crate `uart_16550`, and polled output.
//!
//! Polling is for early boot and for last words, on the first one. Everything else goes
//! through [`super::console`], because a character takes as long as tens of thousands
//! of instructions.
//!
//! Nothing here waits for ever: not for a transmitter that does not move, nor
//! for the driver's lock, whose holder may be what died. Where there is no
//! UART, output vanishes.

use crate::arch::cpu::without_interrupts;
use crate::arch::port::{inb, outb};
use arrayvec::ArrayVec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::spec::FIFO_SIZE;
use uart_16550::spec::registers::{IER, ISR, LSR, MCR};
use uart_16550::{BaudRate, Config, Uart16550};

/// The modem control register, from the base on.
const MODEM_CONTROL: u16 = 4;
/// 115200 8N1 with FIFOs, which is what firmware and emulators speak; the
/// driver raises no interrupt until it is asked to.
const CONFIG: Config = Config {
    baud_rate: BaudRate::Baud115200,
    ..Config::DEFAULT
};
/// Iterations to wait for the transmitter: at 115200 baud a character needs
/// under 100 us, which no machine spends on fewer port reads than this.
pub(super) const PATIENCE: u32 = 200_000;

type Uart = Uart16550<PioBackend>;

/// A serial port.
pub struct Port {
    base: u16,
    uart: Mutex<Uart>,
    /// Set at the start, and taken back when the transmitter does not move; no other memory is
    /// read because of it.
    present: AtomicBool,
}

/// The first one.
pub static COM1: Port = Port::new(0x3f8);
/// The second one.
pub static COM2: Port = Port::new(0x2f8);

/// The driver before [`Port::init`]: it sends one byte at a time.
const fn driver(base: u16) -> Uart {
    // SAFETY: the eight ports of each serial port belong to this module; a UART does not
    // touch memory, and where there is none, reads give all ones.
    match unsafe { Uart16550::new_port(base) } {
        Ok(uart) => uart,
        Err(_) => panic!("a serial port has eight ports"),
    }
}

/// What has come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Byte(u8),
    /// The line was held longer than a character takes.
    Break,
}

/// Sets the first port up, with interrupts off. Whether there is one.
pub fn init() -> bool {
    COM1.init()
}

impl Port {
    const fn new(base: u16) -> Self {
        Self {
            base,
            uart: Mutex::new(driver(base)),
            present: AtomicBool::new(false),
        }
    }

    /// Runs `f` with the driver. A lock that is not given back in time belongs to
    /// code that died; a driver as before [`Port::init`] can do what last words need.
    fn with<R>(&self, f: impl FnOnce(&mut Uart) -> R) -> R {
        without_interrupts(|| {
            let mut free = (0..PATIENCE).filter_map(|_| self.uart.try_lock());
            match free.next() {
                Some(mut uart) => f(&mut uart),
                None => f(&mut driver(self.base)),
            }
        })
    }

    /// Sets the port up, with interrupts off. Whether there is one.
    pub(super) fn init(&self) -> bool {
        let present = self.with(|uart| {
            // The driver waits for what the firmware left in the transmitter, without a limit.
            uart.check_present()
                && (0..PATIENCE).any(|_| uart.lsr().contains(LSR::TRANSMITTER_EMPTY))
                && uart.init(CONFIG).is_ok()
        });
        self.present.store(present, Ordering::Relaxed);
        present
    }

    /// Whether [`Port::init`] found a UART.
    pub fn present(&self) -> bool {
        self.present.load(Ordering::Relaxed)
    }

    /// Lets the UART interrupt when a byte has come in.
    pub(super) fn enable_receive_interrupt(&self) {
        self.with(|uart| uart.enable_interrupts(IER::DATA_READY));
    }

    /// Lets the UART interrupt when the transmitter has run empty, or no longer.
    pub(super) fn set_transmit_interrupt(&self, on: bool) {
        self.with(|uart| {
            if on {
                uart.enable_interrupts(IER::THR_EMPTY);
            } else {
                uart.disable_interrupts(IER::THR_EMPTY);
            }
        });
    }

    /// Asks the other side to send (RTS), or to wait.
    pub(super) fn set_request_to_send(&self, on: bool) {
        self.with(|_| {
            let register = self.base + MODEM_CONTROL;
            // SAFETY: the port's modem control register, behind the driver's lock; a UART does not
            // touch memory.
            unsafe {
                let others = inb(register) & !MCR::RTS.bits();
                outb(register, if on { others | MCR::RTS.bits() } else { others });
            }
        });
    }

    /// Reads the cause register, which acknowledges a transmit interrupt where that is the cause
    /// that it names. Whether there was any cause.
    pub(super) fn acknowledge(&self) -> bool {
        !self.with(Uart::isr).contains(ISR::INTERRUPT_STATUS)
    }

    /// What has come in, when something has.
    pub(super) fn receive(&self) -> Option<Received> {
        self.with(|uart| {
            // The flags are of the oldest byte, which is 0 with a break.
            let is_break = uart.lsr().contains(LSR::BREAK_INTERRUPT);
            let byte = uart.try_receive_byte().ok()?;
            Some(if is_break {
                Received::Break
            } else {
                Received::Byte(byte)
            })
        })
    }

    /// Fills the transmitter with what `next` gives, if it is empty.
    pub(super) fn refill(&self, mut next: impl FnMut() -> Option<u8>) {
        self.with(|uart| {
            if uart.ready_to_send().is_err() {
                return;
            }
            let room = if uart.fifo_enabled() { FIFO_SIZE } else { 1 };
            let bytes: ArrayVec<u8, FIFO_SIZE> =
                core::iter::from_fn(&mut next).take(room).collect();
            uart.send_bytes(&bytes);
        });
    }

    /// Sends, waiting for the transmitter each time it is full. One that does not
    /// move is given up for good: waiting for it with each byte would take hours.
    pub(super) fn write_polled(&self, mut bytes: &[u8]) {
        if !self.present() {
            return;
        }
        while !bytes.is_empty() {
            let sent = self.with(|uart| {
                (0..PATIENCE)
                    .map(|_| uart.send_bytes(bytes))
                    .find(|&sent| sent > 0)
            });
            let Some(rest) = sent.and_then(|sent| bytes.get(sent..)) else {
                self.present.store(false, Ordering::Relaxed);
                return;
            };
            bytes = rest;
        }
    }

    /// Waits until the last bit is on the line: what is in the transmitter when
    /// the power goes is lost.
    pub(super) fn wait_until_sent(&self) {
        if self.present() {
            self.with(|uart| (0..PATIENCE).any(|_| uart.lsr().contains(LSR::TRANSMITTER_EMPTY)));
        }
    }
}

/// Formats to the first port, polling; lines end with CR LF.
pub struct Polled;

impl fmt::Write for Polled {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    COM1.write_polled(line.as_bytes());
                    COM1.write_polled(b"\r\n");
                }
                None => COM1.write_polled(line.as_bytes()),
            }
        }
        Ok(())
    }
}
