//! The first serial port: the driver of the crate `uart_16550`, and polled output.
//!
//! Polling is for early boot and for last words. Everything else goes through
//! [`super::console`], because a character takes as long as tens of thousands
//! of instructions.
//!
//! Nothing here waits for ever: not for a transmitter that does not move, nor
//! for the driver's lock, whose holder may be what died. Where there is no
//! UART, output vanishes.

use crate::arch::cpu::without_interrupts;
use arrayvec::ArrayVec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::spec::FIFO_SIZE;
use uart_16550::spec::registers::{IER, ISR, LSR};
use uart_16550::{BaudRate, Config, Uart16550};

/// I/O base of COM1.
const BASE: u16 = 0x3f8;
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

/// The driver before [`init`]: it sends one byte at a time.
const COM1: Uart =
    // SAFETY: the eight ports of COM1 belong to this module; a UART does not
    // touch memory, and where there is none, reads give all ones.
    match unsafe { Uart16550::new_port(BASE) } {
        Ok(uart) => uart,
        Err(_) => panic!("COM1 has eight ports"),
    };

static UART: Mutex<Uart> = Mutex::new(COM1);
static PRESENT: AtomicBool = AtomicBool::new(false);

/// Runs `f` with the driver. A lock that is not given back in time belongs to
/// code that died; a driver as before [`init`] can do what last words need.
fn with<R>(f: impl FnOnce(&mut Uart) -> R) -> R {
    without_interrupts(|| {
        let mut free = (0..PATIENCE).filter_map(|_| UART.try_lock());
        match free.next() {
            Some(mut uart) => f(&mut uart),
            None => f(&mut { COM1 }),
        }
    })
}

/// Sets the port up, with interrupts off. Whether there is one.
pub fn init() -> bool {
    let present = with(|uart| {
        // The driver waits for what the firmware left in the transmitter, without a limit.
        uart.check_present()
            && (0..PATIENCE).any(|_| uart.lsr().contains(LSR::TRANSMITTER_EMPTY))
            && uart.init(CONFIG).is_ok()
    });
    PRESENT.store(present, Ordering::Relaxed);
    present
}

/// Whether [`init`] found a UART.
pub fn present() -> bool {
    PRESENT.load(Ordering::Relaxed)
}

/// Lets the UART interrupt when a byte has come in.
pub(super) fn enable_receive_interrupt() {
    with(|uart| uart.enable_interrupts(IER::DATA_READY));
}

/// Lets the UART interrupt when the transmitter has run empty, or no longer.
pub(super) fn set_transmit_interrupt(on: bool) {
    with(|uart| {
        if on {
            uart.enable_interrupts(IER::THR_EMPTY);
        } else {
            uart.disable_interrupts(IER::THR_EMPTY);
        }
    });
}

/// Reads the cause register, which acknowledges a transmit interrupt where that is the cause that
/// it names. Whether there was any cause.
pub(super) fn acknowledge() -> bool {
    !with(Uart::isr).contains(ISR::INTERRUPT_STATUS)
}

/// A received byte, when there is one.
pub(super) fn receive() -> Option<u8> {
    with(|uart| uart.try_receive_byte().ok())
}

/// Fills the transmitter with what `next` gives, if it is empty.
pub(super) fn refill(mut next: impl FnMut() -> Option<u8>) {
    with(|uart| {
        if uart.ready_to_send().is_err() {
            return;
        }
        let room = if uart.fifo_enabled() { FIFO_SIZE } else { 1 };
        let bytes: ArrayVec<u8, FIFO_SIZE> = core::iter::from_fn(&mut next).take(room).collect();
        uart.send_bytes(&bytes);
    });
}

/// Sends, waiting for the transmitter each time it is full. One that does not
/// move is given up for good: waiting for it with each byte would take hours.
pub fn write_polled(mut bytes: &[u8]) {
    if !present() {
        return;
    }
    while !bytes.is_empty() {
        let sent = with(|uart| {
            (0..PATIENCE)
                .map(|_| uart.send_bytes(bytes))
                .find(|&sent| sent > 0)
        });
        let Some(rest) = sent.and_then(|sent| bytes.get(sent..)) else {
            PRESENT.store(false, Ordering::Relaxed);
            return;
        };
        bytes = rest;
    }
}

/// Waits until the last bit is on the line: what is in the transmitter when
/// the power goes is lost.
pub fn wait_until_sent() {
    if present() {
        with(|uart| (0..PATIENCE).any(|_| uart.lsr().contains(LSR::TRANSMITTER_EMPTY)));
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
