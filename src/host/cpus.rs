//! The machine's CPUs: all that the firmware lists are started here.
//!
//! One after the other is sent INIT and a start-up interrupt (SDM 3, 10.4), comes through
//! the [`trampoline`] into [`main`], makes itself ready, says so and serves. One that does
//! not answer is left out; its number stays, so that a CPU's is always that in the
//! firmware's list, of which the bootstrap processor is number 0.

mod trampoline;

use super::descriptors::{self, CpuTables};
use super::local_apic::{self, Command, Target};
use super::memory::paging::MapError;
use super::memory::stack::Stack;
use super::{interrupts, time};
use crate::arch::cpu;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use spin::Once;
use trampoline::Trampoline;
use vireo_handoff::BootInfo;

/// Pages of a CPU's stack.
const STACK_PAGES: u64 = 16;
/// Microseconds from INIT to the first start-up interrupt, and from there to the second (SDM 3,
/// 10.4.4.1).
const AFTER_INIT: u64 = 10_000;
const AFTER_START_UP: u64 = 200;
/// Microseconds in which a CPU is to be ready.
const PATIENCE: u64 = 500_000;

/// What each CPU does before it is ready; why it cannot be used.
pub type Prepare = fn(&'static Cpu) -> Result<(), String>;

/// What each CPU does from then on: on its own stack, with interrupts off.
pub type Serve = fn(&'static Cpu) -> !;

/// One CPU.
pub struct Cpu {
    /// Its number in the firmware's list.
    pub number: usize,
    /// The identifier of its local APIC.
    pub apic_id: u32,
    pub tables: &'static CpuTables,
    prepare: Prepare,
    serve: Serve,
    /// What came of `prepare`.
    prepared: Once<Result<(), String>>,
}

/// Why a CPU is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The firmware calls it disabled or broken.
    Unusable,
    Memory(MapError),
    /// The interrupt could not be sent.
    NotSent,
    /// It was sent INIT and start-up interrupts, and was not ready in time.
    NoAnswer,
    /// It has started, and cannot be used.
    Refused(String),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable => f.write_str("the firmware calls it unusable"),
            Self::Memory(error) => write!(f, "no stacks for it: {error:?}"),
            Self::NotSent => f.write_str("INIT could not be sent to it"),
            Self::Refused(reason) => f.write_str(reason),
            Self::NoAnswer => f.write_str("it does not answer INIT and start-up interrupts"),
        }
    }
}

/// By number; empty where it does not answer.
static CPUS: Once<Vec<Option<&'static Cpu>>> = Once::new();

/// The CPU with this number, if it answers.
pub fn get(number: usize) -> Option<&'static Cpu> {
    CPUS.get()?.get(number).copied().flatten()
}

/// The machine's CPUs that answer, the bootstrap processor first.
pub fn all() -> impl Iterator<Item = &'static Cpu> {
    CPUS.get().into_iter().flatten().copied().flatten()
}

/// The bootstrap processor's number.
pub const BOOTSTRAP: usize = 0;

/// Starts all CPUs of the firmware's list; `prepare` and then `serve` run on each but the
/// calling one. `missing` is told which did not come, and why.
///
/// # Safety
/// Once, on the bootstrap processor, after all else of the host has been set up.
pub unsafe fn start(
    boot: &BootInfo,
    prepare: Prepare,
    serve: Serve,
    mut missing: impl FnMut(u32, Missing),
) {
    let new = |number, apic_id, tables| {
        &*Box::leak(Box::new(Cpu {
            number,
            apic_id,
            tables,
            prepare,
            serve,
            prepared: Once::new(),
        }))
    };
    interrupts::register(interrupts::KICK, |_| {});
    interrupts::register(interrupts::NOTIFY, |_| {});
    let mut cpus = Vec::new();
    // SAFETY: the caller's; memory below 1 MiB is nobody's else.
    let mut trampoline = (boot.cpus.len() > 1).then(|| unsafe { Trampoline::new(boot) });
    for (number, listed) in boot.cpus.iter().enumerate() {
        if number == BOOTSTRAP {
            let tables = descriptors::bootstrap();
            cpus.push(Some(new(number, listed.apic_id, tables)));
            continue;
        }
        let started = match &mut trampoline {
            Some(Ok(trampoline)) if listed.usable => descriptors::for_another_cpu()
                .map_err(Missing::Memory)
                .and_then(|tables| start_one(trampoline, new(number, listed.apic_id, tables))),
            Some(Err(error)) if listed.usable => Err(Missing::Memory(*error)),
            _ => Err(Missing::Unusable),
        };
        cpus.push(match started {
            Ok(cpu) => Some(cpu),
            Err(reason) => {
                missing(listed.apic_id, reason);
                None
            }
        });
    }
    CPUS.call_once(|| cpus);
}

fn start_one(trampoline: &mut Trampoline, cpu: &'static Cpu) -> Result<&'static Cpu, Missing> {
    let stack = Stack::new(STACK_PAGES).map_err(Missing::Memory)?.leak();
    trampoline.aim(cpu, stack);

    let target = Target::Cpu(cpu.apic_id);
    let start_up = Command::start_up(target, trampoline.page());
    if !local_apic::send(Command::init(target)) {
        return Err(Missing::NotSent);
    }
    wait(AFTER_INIT, || false);
    // A CPU that has started ignores the second.
    for patience in [AFTER_START_UP, PATIENCE] {
        if !local_apic::send(start_up) {
            return Err(Missing::NotSent);
        }
        wait(patience, || cpu.prepared.is_completed());
        match cpu.prepared.get() {
            Some(Ok(())) => return Ok(cpu),
            Some(Err(reason)) => return Err(Missing::Refused(reason.clone())),
            None => {}
        }
    }
    // It must not come when the trampoline is gone: INIT has it wait for ever.
    local_apic::send(Command::init(target));
    Err(Missing::NoAnswer)
}

/// Waits `microseconds` or until `done`.
fn wait(microseconds: u64, mut done: impl FnMut() -> bool) {
    let ticks = time::tsc_hz() / 1_000_000 * microseconds;
    let start = cpu::rdtsc();
    while cpu::rdtsc().wrapping_sub(start) < ticks && !done() {
        core::hint::spin_loop();
    }
}

/// Where a started CPU comes out of the trampoline, on its own stack.
extern "C" fn main(own: &'static Cpu) -> ! {
    // SAFETY: nobody else loads this CPU's tables, and interrupts are off since INIT.
    unsafe { own.tables.load() };
    cpu::enable_machine_checks();
    // SAFETY: the bootstrap processor has chosen the mode.
    unsafe { local_apic::init_this_cpu() };
    time::init_timer();
    if own.prepared.call_once(|| (own.prepare)(own)).is_err() {
        cpu::halt_forever();
    }
    (own.serve)(own)
}
