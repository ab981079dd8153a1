//! Which function answers which external interrupt vector.
//!
//! [`dispatch`] has two callers: the interrupt stub, when an interrupt arrives
//! while the hypervisor itself runs, and the VM-exit path, which learns the
//! vector from the exit (acknowledge interrupt on exit). Both have interrupts off.

use super::{local_apic, panic};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// Vectors below this are exceptions.
pub const FIRST: u8 = 32;
/// Where ISA interrupt 0 would be; the sixteen follow one another.
pub const ISA: u8 = 0x30;
/// The first serial port.
pub const COM1: u8 = ISA + 4;
/// The second one.
pub const COM2: u8 = ISA + 3;
/// The local APIC timer.
pub const TIMER: u8 = 0xe0;
/// An interrupt between CPUs whose only purpose is to cause a VM exit.
pub const KICK: u8 = 0xe1;
/// Tells a CPU of posted interrupts (SDM 3, 30.6); taken outside its guest it does nothing.
pub const NOTIFY: u8 = 0xe2;
/// The local APIC's spurious vector, which is not acknowledged.
pub const SPURIOUS: u8 = 0xff;

/// A handler; it is passed its vector. It must not wait.
pub type Handler = fn(u8);

/// By vector; null for none. What a handler uses was there before it was registered: release and
/// acquire.
static HANDLERS: [AtomicPtr<()>; 256] = [const { AtomicPtr::new(ptr::null_mut()) }; 256];
/// A number for people: relaxed.
static UNEXPECTED: AtomicU64 = AtomicU64::new(0);
/// As [`HANDLERS`].
static NMI: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

fn load(slot: &AtomicPtr<()>) -> Option<Handler> {
    let handler = slot.load(Ordering::Acquire);
    // SAFETY: a slot holds null or a `Handler` that `register` or `on_nmi` stored.
    (!handler.is_null()).then(|| unsafe { mem::transmute::<*mut (), Handler>(handler) })
}

/// Makes `handler` answer `vector` on every CPU.
pub fn register(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as *mut (), Ordering::Release);
}

/// Makes `handler` answer non-maskable interrupts. It must take no lock.
pub fn on_nmi(handler: Handler) {
    NMI.store(handler as *mut (), Ordering::Release);
}

/// Answers an external interrupt and acknowledges it at the local APIC.
pub fn dispatch(vector: u8) {
    if vector == SPURIOUS {
        return;
    }
    match load(&HANDLERS[usize::from(vector)]) {
        Some(handler) => handler(vector),
        None => {
            UNEXPECTED.fetch_add(1, Ordering::Relaxed);
        }
    }
    local_apic::end_of_interrupt();
}

/// Answers a non-maskable interrupt, whether it arrived here or as a VM exit.
pub fn nmi() {
    if panic::elsewhere() {
        crate::arch::cpu::halt_forever();
    }
    if panic::here() {
        return;
    }
    match load(&NMI) {
        Some(handler) => handler(2),
        None => {
            UNEXPECTED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// How many interrupts came that nobody had registered for.
pub fn unexpected() -> u64 {
    UNEXPECTED.load(Ordering::Relaxed)
}
