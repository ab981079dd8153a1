//! The serial console at run time: two rings, moved by the UART's interrupt.
//!
//! Nobody waits here. [`write`] takes what fits and says how much that was;
//! the interrupt handler refills the transmitter's FIFO each time it runs
//! empty. Until [`start`], output is polled.
//!
//! Who has to do something each time that bytes have moved registers a function for it
//! ([`on_moved`]), since the users of this lie on higher floors.

use super::{interrupts, io_apic, local_apic, serial};
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

struct Console {
    transmit: Ring<TRANSMIT_BUFFER>,
    receive: Ring<RECEIVE_BUFFER>,
    /// Interrupts are routed: queue instead of polling.
    running: bool,
}

static CONSOLE: Mutex<Console> = Mutex::new(Console {
    transmit: Ring::new(),
    receive: Ring::new(),
    running: false,
});

/// Called when bytes have moved; null for nobody.
static ON_MOVED: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// The local APIC identifier of the CPU that the UART interrupts. Written before there are
/// others.
static CPU: AtomicU32 = AtomicU32::new(0);

/// The transmit interrupt is enabled, so the queue is being drained. Written
/// with the console locked.
static DRAINING: AtomicBool = AtomicBool::new(false);

fn set_draining(on: bool) {
    DRAINING.store(on, Ordering::Relaxed);
    serial::set_transmit_interrupt(on);
}

/// Whether an interrupt comes when the transmitter runs empty: who has output
/// can leave it until then.
pub fn is_draining() -> bool {
    DRAINING.load(Ordering::Relaxed)
}

/// Has `hook` called after each interrupt of the UART, on the CPU that it interrupts, with
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

/// Has the hook called, since there is output that it does not know of. On the UART's CPU it
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

/// Runs `f` with the console locked. Interrupts are off meanwhile, since the
/// handler takes the same lock.
fn with<R>(f: impl FnOnce(&mut Console) -> R) -> R {
    without_interrupts(|| f(&mut CONSOLE.lock()))
}

/// Turns from polling to interrupts. COM1's line must be routed to
/// [`interrupts::COM1`] ([`io_apic::init`]).
pub fn start() {
    CPU.store(local_apic::id(), Ordering::Relaxed);
    if !serial::present() {
        return;
    }
    interrupts::register(interrupts::COM1, |_| interrupt());
    with(|console| {
        console.running = true;
        serial::enable_receive_interrupt();
    });
    io_apic::unmask_isa(io_apic::COM1_IRQ);
}

/// Queues `bytes` for the serial port, as many as fit; how many that were. Without a
/// serial port all are taken, and vanish.
pub fn write(bytes: impl IntoIterator<Item = u8>) -> usize {
    let mut bytes = bytes.into_iter();
    if !serial::present() {
        return bytes.count();
    }
    with(|console| {
        if !console.running {
            return write_polled(bytes);
        }
        let mut taken = 0;
        while console.transmit.space() > 0
            && let Some(byte) = bytes.next()
        {
            console.transmit.push(byte);
            taken += 1;
        }
        // The first bytes go directly: few characters need no interrupt then, and not every UART
        // raises one when that of an empty transmitter is enabled.
        if !is_draining() {
            serial::refill(|| console.transmit.pop());
            if !console.transmit.is_empty() {
                set_draining(true);
            }
        }
        taken
    })
}

/// Sends all of `bytes`, and waits for that; how many they were.
fn write_polled(mut bytes: impl Iterator<Item = u8>) -> usize {
    let mut sent = 0;
    loop {
        let burst: ArrayVec<u8, FIFO_SIZE> = bytes.by_ref().take(FIFO_SIZE).collect();
        if burst.is_empty() {
            return sent;
        }
        serial::write_polled(&burst);
        sent += burst.len();
    }
}

/// How many bytes [`write`] would take now.
pub fn write_space() -> usize {
    if serial::present() {
        with(|console| console.transmit.space())
    } else {
        usize::MAX
    }
}

/// The next byte that came in.
pub fn read() -> Option<u8> {
    with(|console| console.receive.pop())
}

/// Bytes that wait for the transmitter now.
pub fn queued() -> usize {
    with(|console| console.transmit.len())
}

/// The UART's interrupt handler. Bounded, waits for nothing.
///
/// The I/O APIC takes the UART's line by its edges: it has to be low at the end, or no
/// interrupt would ever come again. It stays high when a cause comes while another is there. So
/// causes are looked for until there is none.
pub fn interrupt() {
    with(|console| {
        for _ in 0..CAUSES {
            let cause = serial::acknowledge();
            console.serve();
            if !cause {
                break;
            }
        }
    });
    moved();
}

impl Console {
    /// Takes what has come, and gives the transmitter what it has room for.
    fn serve(&mut self) {
        for _ in 0..RECEIVE_BURST {
            match serial::receive() {
                // A full queue loses what comes last, as a UART does.
                Some(byte) => self.receive.push(byte),
                None => break,
            };
        }
        if is_draining() {
            serial::refill(|| self.transmit.pop());
            if self.transmit.is_empty() {
                set_draining(false);
            }
        }
    }
}

/// Sends everything that is queued, by polling, but gives everybody else the console in
/// between. A transmitter that does not move is given up.
pub fn flush() {
    let mut idle = 0;
    while idle < serial::PATIENCE {
        let (before, after) = with(|console| {
            let before = console.transmit.len();
            serial::refill(|| console.transmit.pop());
            (before, console.transmit.len())
        });
        if after == 0 {
            return;
        }
        idle = if after < before { 0 } else { idle + 1 };
        // Another CPU that waits for the lock gets it.
        (0..PAUSES).for_each(|_| hint::spin_loop());
    }
    with(drain);
}

/// [`flush`] for a dying machine: does nothing when someone holds the lock,
/// because that may be the code which died.
pub fn flush_unless_locked() {
    without_interrupts(|| {
        if let Some(mut console) = CONSOLE.try_lock() {
            drain(&mut console);
        }
    });
}

fn drain(console: &mut Console) {
    while let Some(byte) = console.transmit.pop() {
        serial::write_polled(&[byte]);
    }
    serial::wait_until_sent();
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
