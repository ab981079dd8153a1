//! A guest's console: what lies between its COM1 and the operator's line.
//!
//! Two bounded rings behind a short lock. The guest's vCPU moves bytes between COM1 and
//! them, whoever holds the operator's line moves them between here and there; neither waits
//! for the other. The ring of what the guest has sent is the scroll-back too:
//!
//! ```text
//! oldest                                    newest
//! | shown before, or never | to be sent yet |
//! ```
//!
//! While the console is shown, the second part grows until the ring is full, and then the
//! guest waits as for a slow line. While it is not, there is no second part: the guest
//! waits for nobody, and the oldest bytes make room. To show it again means to send again
//! all that is there.
//!
//! The locks are taken with interrupts off: the operator's line is served in an interrupt.

use super::mailbox::{Events, Mailbox};
use crate::host::console::Ring;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;

/// Bytes of the scroll-back, those that are to be sent included.
pub const OUTPUT: usize = 8 * 1024;
/// Bytes that wait for the guest to read them.
pub const INPUT: usize = 2 * 1024;
/// More than so many of them, and whoever types is to wait.
const STOP: usize = INPUT * 3 / 4;
/// No more than so many of them, and he may go on.
const RESUME: usize = INPUT / 2;

/// The console of one guest.
pub struct ConsolePort {
    rings: Mutex<Rings>,
    // Of these atomics no memory is read because of their values, but what is behind the
    // lock: relaxed accesses are enough. They are written with the lock held.
    /// What the guest sends can wait in COM1: nobody looks at this console, or the line has
    /// something to send and will tell when it has taken what is here. A CPU may see this
    /// set for a moment longer than it is: that is before it is told, and then it looks again.
    busy: AtomicBool,
    /// The input ring has something.
    has_input: AtomicBool,
}

struct Rings {
    output: Ring<OUTPUT>,
    /// How many of the newest bytes are to be sent.
    unsent: usize,
    shown: bool,
    input: Ring<INPUT>,
    /// The mailboxes of the guest's vCPUs, the first of which is told of what moves.
    vcpus: Option<Arc<[Arc<Mailbox>]>>,
    /// Whoever types was asked to wait.
    held: bool,
}

impl Default for ConsolePort {
    fn default() -> Self {
        Self::new()
    }
}

/// The guest's side.
impl ConsolePort {
    /// Empty, and not shown.
    pub const fn new() -> Self {
        Self {
            rings: Mutex::new(Rings {
                output: Ring::new(),
                unsent: 0,
                shown: false,
                input: Ring::new(),
                vcpus: None,
                held: false,
            }),
            busy: AtomicBool::new(true),
            has_input: AtomicBool::new(false),
        }
    }

    /// The first of these vCPUs is told from now on when there is input or room for output,
    /// and looks next; nobody is where there are none.
    pub fn attach(&self, vcpus: Option<Arc<[Arc<Mailbox>]>>) {
        let mut rings = self.rings.lock();
        rings.vcpus = vcpus;
        rings.tell();
    }

    /// Takes as many `bytes` as there is room for. True when the line has to be told of
    /// them ([`crate::host::console::attend`]), else it comes by itself.
    pub fn send(&self, mut bytes: impl Iterator<Item = u8>) -> bool {
        let mut rings = self.rings.lock();
        while !rings.is_full()
            && let Some(byte) = bytes.next()
        {
            rings.push(byte);
        }
        rings.unsent > 0 && !self.is_busy()
    }

    /// Offers what was typed to `accept`, until that refuses a byte, which is offered again. True
    /// when the line has to be told that there is room again.
    pub fn receive(&self, mut accept: impl FnMut(u8) -> bool) -> bool {
        if !self.has_input() {
            return false;
        }
        let mut rings = self.rings.lock();
        while let Some(byte) = rings.input.get(0)
            && accept(byte)
        {
            rings.input.pop();
        }
        let left = !rings.input.is_empty();
        self.has_input.store(left, Ordering::Relaxed);
        rings.held && rings.input.len() <= RESUME
    }

    /// Whether what the guest sends can be left in COM1 while there is room.
    #[inline]
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// Whether there is something for [`ConsolePort::receive`].
    #[inline]
    pub fn has_input(&self) -> bool {
        self.has_input.load(Ordering::Relaxed)
    }
}

/// The line's side.
impl ConsolePort {
    /// Shows this console, all its scroll-back first, or no longer does.
    pub fn show(&self, on: bool) {
        let mut rings = self.rings.lock();
        rings.shown = on;
        rings.unsent = if on { rings.output.len() } else { 0 };
        self.busy.store(!on, Ordering::Relaxed);
        // COM1 may have more.
        rings.tell();
    }

    /// Gives the next bytes that are to be sent to `sink`, at most `room`.
    pub fn take(&self, room: usize, mut sink: impl FnMut(u8)) {
        let mut rings = self.rings.lock();
        let first = rings.output.len() - rings.unsent;
        let count = rings.unsent.min(room);
        (first..first + count)
            .filter_map(|index| rings.output.get(index))
            .for_each(&mut sink);
        rings.unsent -= count;
    }

    /// How many bytes are to be sent.
    pub fn unsent(&self) -> usize {
        self.rings.lock().unsent
    }

    /// After the line has taken what it could: whether it still has something to send, and
    /// so comes again. True when it has to take more at once.
    pub fn settle(&self, busy: bool) -> bool {
        let rings = self.rings.lock();
        let was_busy = self.busy.swap(busy, Ordering::Relaxed);
        if was_busy && rings.unsent == 0 {
            rings.tell();
        }
        rings.unsent > 0 && !busy
    }

    /// Whether whoever types is to wait, so that nothing is lost.
    pub fn holds(&self) -> bool {
        let mut rings = self.rings.lock();
        let limit = if rings.held { RESUME } else { STOP };
        rings.held = rings.input.len() > limit;
        rings.held
    }

    /// A byte for the guest; false when there is no room, and the byte is lost.
    pub fn type_in(&self, byte: u8) -> bool {
        let mut rings = self.rings.lock();
        let fits = rings.input.push(byte);
        self.has_input.store(true, Ordering::Relaxed);
        rings.tell();
        fits
    }
}

impl Rings {
    /// Has the guest look here.
    fn tell(&self) {
        if let Some(first) = self.vcpus.as_ref().and_then(|vcpus| vcpus.first()) {
            first.post(Events::CONSOLE);
        }
    }

    /// Whether the guest has to wait.
    const fn is_full(&self) -> bool {
        self.unsent == OUTPUT
    }

    /// What was sent or is not to be shown makes room.
    fn push(&mut self, byte: u8) {
        self.output.push_over(byte);
        self.unsent += usize::from(self.shown);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::mailbox::Place;
    use core::sync::atomic::AtomicUsize;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::thread;
    use std::time::{Duration, Instant};

    /// A console and the vCPU that it belongs to.
    fn attached() -> (ConsolePort, Arc<[Arc<Mailbox>]>) {
        let place = Box::leak(Box::new(Place::new(0, 0)));
        let vcpus: Arc<[Arc<Mailbox>]> = [Arc::new(Mailbox::new(place, 0))].into();
        let port = ConsolePort::new();
        port.attach(Some(Arc::clone(&vcpus)));
        assert!(has_moved(&vcpus));
        (port, vcpus)
    }

    fn has_moved(vcpus: &[Arc<Mailbox>]) -> bool {
        !vcpus[0].take(Events::CONSOLE).is_empty()
    }

    fn taken(port: &ConsolePort, room: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        port.take(room, |byte| bytes.push(byte));
        bytes
    }

    #[test]
    fn a_shown_console_is_a_slow_line() {
        let (port, vcpus) = attached();
        port.show(true);
        assert!(has_moved(&vcpus), "COM1 may have more");
        let mut flood = (0..).map(|n: usize| n as u8);
        assert!(port.send(&mut flood), "an idle line is to be told");
        assert!(!port.settle(true));
        assert_eq!(port.unsent(), OUTPUT);
        assert!(!port.send(&mut flood), "a busy one comes by itself");
        assert_eq!(flood.next(), Some(OUTPUT as u8), "nothing is lost");
        assert!(!has_moved(&vcpus));
        assert_eq!(taken(&port, OUTPUT + 1).len(), OUTPUT);
        port.settle(true);
        assert!(has_moved(&vcpus), "there is room again");
        assert!(!has_moved(&vcpus));
    }

    #[test]
    fn a_hidden_console_waits_for_nobody() {
        let port = ConsolePort::new();
        assert!(!port.send((0..OUTPUT + 10).map(|n| (n / 256) as u8)));
        assert_eq!(port.unsent(), 0);
        port.show(true);
        assert_eq!(port.unsent(), OUTPUT);
        port.show(false);
        assert_eq!(taken(&port, 1), []);
    }

    #[test]
    fn what_the_line_has_not_seen_is_told() {
        let port = ConsolePort::new();
        port.show(true);
        port.settle(true);
        assert!(
            !port.send(b"a".iter().copied()),
            "the line comes by itself, as it has said"
        );
        assert!(port.settle(false), "and it may not go without looking");
    }

    #[test]
    fn a_byte_that_is_refused_is_offered_again() {
        let (port, vcpus) = attached();
        for byte in *b"abc" {
            assert!(port.type_in(byte));
        }
        assert!(has_moved(&vcpus) && port.has_input());
        let mut seen = Vec::new();
        port.receive(|byte| {
            seen.push(byte);
            byte != b'b'
        });
        assert!(port.has_input());
        port.receive(|byte| {
            seen.push(byte);
            true
        });
        assert_eq!(seen, b"abbc");
        assert!(!port.has_input());
        assert_eq!((0..INPUT + 1).filter(|_| port.type_in(0)).count(), INPUT);
    }

    #[test]
    fn who_types_waits_until_half_is_read() {
        let port = ConsolePort::new();
        (0..STOP).for_each(|_| assert!(port.type_in(b'x') && !port.holds()));
        assert!(port.type_in(b'x') && port.holds());
        let read = |count: usize| {
            let mut left = count;
            port.receive(|_| {
                left = left.saturating_sub(1);
                left > 0
            })
        };
        assert!(!read(STOP - RESUME), "one is offered again");
        assert!(port.holds());
        assert!(read(3), "the line is told");
        assert!(!port.holds());
        assert!(!read(1));
    }

    /// A guest's CPU that only looks when it is told, and a line on another: neither waits
    /// for something that the other has forgotten to say.
    #[test]
    fn two_cpus_do_not_lose_each_other() {
        const BYTES: usize = 300_000;
        let (port, vcpus) = attached();
        port.show(true);
        let attend = AtomicBool::new(false);
        let seen = AtomicUsize::new(0);
        let start = Instant::now();
        let in_time = || start.elapsed() < Duration::from_secs(20);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut queue = 0;
                while seen.load(Ordering::Relaxed) < BYTES && in_time() {
                    if queue == 0 && !attend.swap(false, Ordering::Relaxed) {
                        continue;
                    }
                    queue -= queue.min(16);
                    loop {
                        let bytes = taken(&port, 64 - queue);
                        for (byte, n) in bytes.iter().zip(seen.load(Ordering::Relaxed)..) {
                            assert_eq!(*byte, n as u8);
                        }
                        queue += bytes.len();
                        seen.fetch_add(bytes.len(), Ordering::Relaxed);
                        if !port.settle(queue > 0) {
                            break;
                        }
                    }
                }
            });
            let mut com1 = VecDeque::new();
            let pump = |com1: &mut VecDeque<u8>| {
                if port.send(core::iter::from_fn(|| com1.pop_front())) {
                    attend.store(true, Ordering::Relaxed);
                }
            };
            for n in 0..BYTES {
                while com1.len() == 500 && in_time() {
                    if has_moved(&vcpus) {
                        pump(&mut com1);
                    }
                }
                com1.push_back(n as u8);
                if !port.is_busy() || has_moved(&vcpus) {
                    pump(&mut com1);
                }
            }
            while !com1.is_empty() && in_time() {
                if has_moved(&vcpus) {
                    pump(&mut com1);
                }
            }
        });
        assert_eq!(seen.load(Ordering::Relaxed), BYTES);
    }

    proptest! {
        /// Whatever the order: what is shown is what was sent, without a gap, and the
        /// scroll-back is its end.
        #[test]
        fn nothing_is_lost_or_doubled(
            steps in prop::collection::vec((0..3u8, 0..6000usize), 1..40)
        ) {
            let port = ConsolePort::new();
            port.show(true);
            let mut flood = (0..).map(|n: usize| (n % 251) as u8);
            let (mut sent, mut seen) = (0, 0);
            for (step, count) in steps {
                match step {
                    0 => {
                        let before = port.unsent();
                        port.send(flood.by_ref().take(count.min(OUTPUT - before)));
                        sent += port.unsent() - before;
                    }
                    1 => {
                        let bytes = taken(&port, count);
                        for byte in bytes {
                            prop_assert_eq!(byte, (seen % 251) as u8);
                            seen += 1;
                        }
                    }
                    _ => {
                        port.show(false);
                        port.show(true);
                        prop_assert_eq!(port.unsent(), sent.min(OUTPUT));
                        seen = sent - port.unsent();
                    }
                }
                prop_assert_eq!(sent - seen, port.unsent());
            }
        }
    }
}
