//! The serial ports at run time: two rings each, moved by the UART's interrupt.
//!
//! Nobody waits here. [`Line::write`] takes what fits and says how much that was;
//! the interrupt handler refills the transmitter's FIFO each time it runs
//! empty. Until [`start`], output is polled.
//!
//! Before the receiving ring is full, and while the reader wants nothing more
//! ([`Line::hold`]), RTS asks the other side to wait. A UART that lowers RTS by itself (auto-flow)
//! would look at CTS too, which many cables do not have.
//!
//! Who has to do something each time that bytes have moved registers a function for it
//! ([`on_moved`]), since the users of this lie on higher floors.

use super::serial::{self, Port, Received};
use super::{interrupts, io_apic, local_apic};
use crate::arch::cpu::without_interrupts;
use arrayvec::ArrayVec;
use core::hint;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use local_apic::{Command, Target};
use spin::Mutex;
use uart_16550::spec::FIFO_SIZE;

/// Bytes that wait for the transmitter.
pub const TRANSMIT_BUFFER: usize = 16 * 1024;
/// Bytes that wait for a reader.
pub const RECEIVE_BUFFER: usize = 1024;
/// More received bytes than this, and the other side is asked to wait: those that it sends before
/// it does fit too.
const STOP: usize = RECEIVE_BUFFER * 3 / 4;
/// It goes on when no more than this are left.
const RESUME: usize = RECEIVE_BUFFER / 2;
/// Received bytes taken in one interrupt; more come with the next one.
const RECEIVE_BURST: usize = 64;
/// Causes that one interrupt looks for: on a line that works the second look finds none.
const CAUSES: usize = 64;

/// PAUSEs between two looks at the transmitter.
const PAUSES: u32 = 50;

/// A byte queue of fixed capacity.
pub struct Ring<const N: usize> {
    bytes: [u8; N],
    start: usize,
    len: usize,
}

impl<const N: usize> Default for Ring<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Ring<N> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self {
            bytes: [0; N],
            start: 0,
            len: 0,
        }
    }

    /// Bytes queued.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is queued.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that still fit.
    pub const fn space(&self) -> usize {
        N - self.len
    }

    /// Appends one byte; whether it fitted.
    pub fn push(&mut self, byte: u8) -> bool {
        let fits = self.len < N;
        if fits {
            self.bytes[(self.start + self.len) % N] = byte;
            self.len += 1;
        }
        fits
    }

    /// Appends one byte; the oldest one makes room.
    pub fn push_over(&mut self, byte: u8) {
        if self.space() == 0 {
            self.pop();
        }
        self.push(byte);
    }

    /// Takes the oldest byte.
    pub fn pop(&mut self) -> Option<u8> {
        if self.len == 0 {
            return None;
        }
        let byte = self.bytes[self.start];
        self.start = (self.start + 1) % N;
        self.len -= 1;
        Some(byte)
    }

    /// The byte before which `index` others were queued that still are.
    pub fn get(&self, index: usize) -> Option<u8> {
        (index < self.len).then(|| self.bytes[(self.start + index) % N])
    }

    /// The queued bytes, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..self.len).map(|i| self.bytes[(self.start + i) % N])
    }
}

/// A serial port that is run by interrupts.
pub struct Line {
    port: &'static Port,
    /// Its ISA interrupt.
    irq: u8,
    queues: Mutex<Queues>,
    /// The transmit interrupt is enabled, so the queue is being drained. Written with the queues
    /// locked, and no other memory is read because of it.
    draining: AtomicBool,
    /// A break has come in. No other memory is read because of it.
    has_break: AtomicBool,
}

struct Queues {
    transmit: Ring<TRANSMIT_BUFFER>,
    receive: Ring<RECEIVE_BUFFER>,
    /// Interrupts are routed: queue instead of polling.
    running: bool,
    /// The reader has no use for more at the moment.
    held: bool,
    /// The other side was asked to wait.
    stopped: bool,
}

/// The first serial port, the operator's.
pub static OPERATOR: Line = Line::new(&serial::COM1, io_apic::COM1_IRQ);
/// The second one, which a guest may have for itself.
pub static SECOND: Line = Line::new(&serial::COM2, io_apic::COM2_IRQ);

/// Called when bytes have moved; null for nobody. What the function uses was there before it was
/// stored: release and acquire.
static ON_MOVED: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// The local APIC identifier of the CPU that the UARTs interrupt. Written before there are
/// others, which their start orders behind it: relaxed.
static CPU: AtomicU32 = AtomicU32::new(0);

/// Has `hook` called after each interrupt of a UART, on the CPU that it interrupts, with
/// interrupts off. It must not wait.
pub fn on_moved(hook: fn()) {
    ON_MOVED.store(hook as *mut (), Ordering::Release);
}

fn moved() {
    let hook = ON_MOVED.load(Ordering::Acquire);
    if !hook.is_null() {
        // SAFETY: `on_moved` has stored a function of this type.
        unsafe { mem::transmute::<*mut (), fn()>(hook)() };
    }
}

/// Has the hook called, since there is output that it does not know of. On the UARTs' CPU it
/// is called here; another CPU interrupts that one, and does not wait for it.
pub fn attend() {
    let cpu = CPU.load(Ordering::Relaxed);
    if local_apic::id() == cpu {
        without_interrupts(moved);
    } else {
        let command = Command::fixed(Target::Cpu(cpu), interrupts::COM1);
        // Where no interrupt can be sent, there is no other CPU either.
        local_apic::send(command);
    }
}

/// Turns from polling to interrupts, which come to the calling CPU.
pub fn start() {
    CPU.store(local_apic::id(), Ordering::Relaxed);
    interrupts::register(interrupts::COM1, |_| OPERATOR.interrupt());
    OPERATOR.start();
}

/// The same for the second port, which is set up first; false where there is none.
pub fn start_second() -> bool {
    if !SECOND.port.present() && SECOND.port.init() {
        interrupts::register(interrupts::COM2, |_| SECOND.interrupt());
        SECOND.start();
    }
    SECOND.port.present()
}

/// Whether [`start_second`] has found the second port.
pub fn has_second() -> bool {
    SECOND.port.present()
}

/// Sends everything that is queued ([`Line::flush`]).
pub fn flush() {
    OPERATOR.flush();
    if has_second() {
        SECOND.flush();
    }
}

/// [`Line::flush`] of the operator's line for a dying machine: does nothing when someone holds the
/// lock, because that may be the code which died.
pub fn flush_unless_locked() {
    without_interrupts(|| {
        if let Some(mut queues) = OPERATOR.queues.try_lock() {
            OPERATOR.drain(&mut queues);
        }
    });
}

impl Line {
    const fn new(port: &'static Port, irq: u8) -> Self {
        Self {
            port,
            irq,
            queues: Mutex::new(Queues {
                transmit: Ring::new(),
                receive: Ring::new(),
                running: false,
                held: false,
                stopped: false,
            }),
            draining: AtomicBool::new(false),
            has_break: AtomicBool::new(false),
        }
    }

    /// Its interrupt must be routed ([`io_apic::init`]).
    fn start(&self) {
        if !self.port.present() {
            return;
        }
        self.with(|queues| {
            queues.running = true;
            self.port.enable_receive_interrupt();
        });
        io_apic::unmask_isa(self.irq);
    }

    /// Runs `f` with the queues locked. Interrupts are off meanwhile, since the
    /// handler takes the same lock.
    fn with<R>(&self, f: impl FnOnce(&mut Queues) -> R) -> R {
        without_interrupts(|| f(&mut self.queues.lock()))
    }

    /// Whether an interrupt comes when the transmitter runs empty: who has output
    /// can leave it until then.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn set_draining(&self, on: bool) {
        self.draining.store(on, Ordering::Relaxed);
        self.port.set_transmit_interrupt(on);
    }

    /// Queues `bytes` for the serial port, as many as fit; how many that were. Without a
    /// serial port all are taken, and vanish.
    pub fn write(&self, bytes: impl IntoIterator<Item = u8>) -> usize {
        let mut bytes = bytes.into_iter();
        if !self.port.present() {
            return bytes.count();
        }
        self.with(|queues| {
            if !queues.running {
                return self.write_polled(bytes);
            }
            let mut taken = 0;
            while queues.transmit.space() > 0
                && let Some(byte) = bytes.next()
            {
                queues.transmit.push(byte);
                taken += 1;
            }
            // The first bytes go directly: few characters need no interrupt then, and not every
            // UART raises one when that of an empty transmitter is enabled.
            if !self.is_draining() {
                self.port.refill(|| queues.transmit.pop());
                if !queues.transmit.is_empty() {
                    self.set_draining(true);
                }
            }
            taken
        })
    }

    /// Sends all of `bytes`, and waits for that; how many they were.
    fn write_polled(&self, mut bytes: impl Iterator<Item = u8>) -> usize {
        let mut sent = 0;
        loop {
            let burst: ArrayVec<u8, FIFO_SIZE> = bytes.by_ref().take(FIFO_SIZE).collect();
            if burst.is_empty() {
                return sent;
            }
            self.port.write_polled(&burst);
            sent += burst.len();
        }
    }

    /// How many bytes [`Line::write`] would take now.
    pub fn write_space(&self) -> usize {
        if self.port.present() {
            self.with(|queues| queues.transmit.space())
        } else {
            usize::MAX
        }
    }

    /// The next byte that came in.
    pub fn read(&self) -> Option<u8> {
        self.with(|queues| {
            let byte = queues.receive.pop();
            self.control_flow(queues);
            byte
        })
    }

    /// Whether a break has come in since the last call.
    pub fn take_break(&self) -> bool {
        self.has_break.load(Ordering::Relaxed) && self.has_break.swap(false, Ordering::Relaxed)
    }

    /// Whether the other side is to wait, since the reader has no use for more.
    pub fn hold(&self, on: bool) {
        self.with(|queues| {
            queues.held = on;
            self.control_flow(queues);
        });
    }

    /// Bytes that wait for the transmitter now.
    pub fn queued(&self) -> usize {
        self.with(|queues| queues.transmit.len())
    }

    /// The UART's interrupt handler. Bounded, waits for nothing.
    ///
    /// The I/O APIC takes the UART's line by its edges: it has to be low at the end, or no
    /// interrupt would ever come again. It stays high when a cause comes while another is there. So
    /// causes are looked for until there is none.
    fn interrupt(&self) {
        self.with(|queues| {
            for _ in 0..CAUSES {
                let cause = self.port.acknowledge();
                self.serve(queues);
                if !cause {
                    break;
                }
            }
        });
        moved();
    }

    /// Takes what has come, and gives the transmitter what it has room for.
    fn serve(&self, queues: &mut Queues) {
        for _ in 0..RECEIVE_BURST {
            match self.port.receive() {
                // A full queue loses what comes last, as a UART does.
                Some(Received::Byte(byte)) => queues.receive.push(byte),
                Some(Received::Break) => {
                    self.has_break.store(true, Ordering::Relaxed);
                    continue;
                }
                None => break,
            };
        }
        self.control_flow(queues);
        if self.is_draining() {
            self.port.refill(|| queues.transmit.pop());
            if queues.transmit.is_empty() {
                self.set_draining(false);
            }
        }
    }

    /// Asks the other side to wait before anything is lost, or to go on.
    fn control_flow(&self, queues: &mut Queues) {
        let limit = if queues.stopped { RESUME } else { STOP };
        let stop = queues.held || queues.receive.len() > limit;
        if stop != queues.stopped {
            queues.stopped = stop;
            self.port.set_request_to_send(!stop);
        }
    }

    /// Sends everything that is queued, by polling, but gives everybody else the queues in
    /// between. A transmitter that does not move is given up.
    pub fn flush(&self) {
        let mut idle = 0;
        while idle < serial::PATIENCE {
            let (before, after) = self.with(|queues| {
                let before = queues.transmit.len();
                self.port.refill(|| queues.transmit.pop());
                (before, queues.transmit.len())
            });
            if after == 0 {
                return;
            }
            idle = if after < before { 0 } else { idle + 1 };
            // Another CPU that waits for the lock gets it.
            (0..PAUSES).for_each(|_| hint::spin_loop());
        }
        self.with(|queues| self.drain(queues));
    }

    fn drain(&self, queues: &mut Queues) {
        while let Some(byte) = queues.transmit.pop() {
            self.port.write_polled(&[byte]);
        }
        self.port.wait_until_sent();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn a_ring_is_a_bounded_queue(operations in prop::collection::vec(prop::option::of(any::<u8>()), 0..200)) {
            let mut ring = Ring::<7>::new();
            let mut model = VecDeque::new();
            for operation in operations {
                match operation {
                    Some(byte) => {
                        let fits = model.len() < 7;
                        if fits { model.push_back(byte); }
                        prop_assert_eq!(ring.push(byte), fits);
                    }
                    None => prop_assert_eq!(ring.pop(), model.pop_front()),
                }
                prop_assert_eq!(ring.len(), model.len());
                prop_assert_eq!(ring.space(), 7 - model.len());
                prop_assert!(ring.iter().eq(model.iter().copied()));
            }
        }

        #[test]
        fn an_overwritten_ring_keeps_the_newest(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut ring = Ring::<5>::new();
            bytes.iter().for_each(|&byte| ring.push_over(byte));
            let kept = &bytes[bytes.len().saturating_sub(5)..];
            prop_assert!(ring.iter().eq(kept.iter().copied()));
        }
    }
}
