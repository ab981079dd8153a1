//! Two CPUs: an interrupt from one to the other, both on processors of their own, or both on
//! one, where the second comes to run when the first waits.

use super::{ROUNDS, VECTOR, end_x2apic, measure_rounds, wait, write_msr};
use core::arch::{asm, naked_asm};
use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use vireo_test_guests::apic::register;
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::{apic, check, exceptions, processors};

/// Interrupts that the other has taken.
static TAKEN: AtomicU32 = AtomicU32::new(0);
static READY: AtomicBool = AtomicBool::new(false);
static STOP: AtomicBool = AtomicBool::new(false);
/// The time-stamp counter when the second CPU has last looked.
static LOOKED: AtomicU64 = AtomicU64::new(0);

/// The shortest handler that tells: counts, and ends the interrupt.
#[unsafe(naked)]
unsafe extern "C" fn take() {
    naked_asm!(
        "inc dword ptr [{taken}]",
        "jmp {end}",
        taken = sym TAKEN,
        end = sym end_x2apic,
    )
}

#[inline(always)]
fn send(id: u32) {
    write_msr(
        msr::X2APIC + register::ICR / 16,
        u64::from(id) << 32 | u64::from(VECTOR),
    );
}

#[inline(always)]
fn halt() {
    // SAFETY: waits; the interrupt has a handler.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// The second CPU, in x2APIC mode as the first is.
fn start() {
    processors::prepare();
    check("the second CPU starts", processors::start(1));
    processors::run(1, || {
        let base = cpu::rdmsr_unchecked(msr::APIC_BASE);
        cpu::wrmsr_unchecked(msr::APIC_BASE, base | apic::X2APIC);
        apic::write_unchecked(register::SVR, apic::SVR_ENABLED);
    });
    exceptions::set_raw(VECTOR, take);
}

/// Each on its own processor.
pub fn apart() {
    start();
    processors::give(1, || {
        while !STOP.load(SeqCst) {
            core::hint::spin_loop();
        }
    });
    let mut round = 0;
    measure_rounds("IPI to a running CPU, taken, EOI, seen", ROUNDS, || {
        round += 1;
        send(1);
        while TAKEN.load(SeqCst) != round {
            core::hint::spin_loop();
        }
    });
    STOP.store(true, SeqCst);
}

/// Both on one.
pub fn together() {
    start();
    processors::give(1, || {
        cpu::disable_interrupts();
        READY.store(true, SeqCst);
        while !STOP.load(SeqCst) {
            halt();
            send(0);
        }
        cpu::enable_interrupts();
    });
    check(
        "the other is there",
        processors::wait(|| READY.load(SeqCst)),
    );
    cpu::disable_interrupts();
    // There and back are two.
    measure_rounds(
        "IPI to a vCPU of the same CPU, HLT, switch, EOI",
        2 * ROUNDS,
        || {
            send(1);
            halt();
        },
    );
    STOP.store(true, SeqCst);
    send(1);
    turns();
}

/// Both on one, and neither waits: they take turns, by slices of their time.
fn turns() {
    check(
        "the other has ended",
        processors::wait(|| processors::is_idle(1)),
    );
    STOP.store(false, SeqCst);
    processors::give(1, || {
        while !STOP.load(Relaxed) {
            LOOKED.store(rdtsc(), Relaxed);
        }
    });
    // Whatever it is interrupted at, the next look sees that the other has looked since.
    let mut seen = LOOKED.load(Relaxed);
    wait("end of a slice, switch, next instruction", || {
        loop {
            let (other, now) = (LOOKED.load(Relaxed), rdtsc());
            if core::mem::replace(&mut seen, other) != other {
                return now - other;
            }
        }
    });
    STOP.store(true, SeqCst);
}
