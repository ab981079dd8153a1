//! What each CPU has to run guests with: its VT-x, switched on before it is given anything to
//! do, and its place among the schedulers.

use super::scheduler::{Job, Scheduler};
use crate::arch::cpu::without_interrupts;
use crate::host::cpus::Cpu;
use crate::vm::mailbox::Place;
use crate::vmx::operation::{self, Unusable, Vmx};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use spin::Mutex;

/// A CPU that runs guests, as all others see it.
pub struct Processor {
    pub cpu: &'static Cpu,
    pub vmx: Vmx,
    pub place: Place,
    jobs: Mutex<VecDeque<Job>>,
}

static PROCESSORS: Mutex<BTreeMap<usize, &'static Processor>> = Mutex::new(BTreeMap::new());

/// Switches VT-x on for the calling CPU, `cpu`.
///
/// # Errors
/// Why it cannot run guests.
///
/// # Safety
/// Once on each CPU, with interrupts off.
pub unsafe fn start(cpu: &'static Cpu) -> Result<&'static Processor, Unusable> {
    // SAFETY: the caller's.
    let vmx = unsafe { operation::start(cpu.tables) }?;
    let processor = &*Box::leak(Box::new(Processor {
        cpu,
        vmx,
        place: Place::new(cpu.number, cpu.apic_id),
        jobs: Mutex::new(VecDeque::new()),
    }));
    PROCESSORS.lock().insert(cpu.number, processor);
    Ok(processor)
}

/// [`start`] on one of the CPUs that [`crate::host::cpus::start`] starts.
///
/// # Errors
/// Why it cannot run guests.
pub fn prepare(cpu: &'static Cpu) -> Result<(), String> {
    // SAFETY: called once, before interrupts are on.
    match unsafe { start(cpu) } {
        Ok(_) => Ok(()),
        Err(reason) => Err(reason.to_string()),
    }
}

/// What such a CPU does then.
pub fn serve(cpu: &'static Cpu) -> ! {
    if let Some(processor) = get(cpu.number) {
        Scheduler::new(processor).run(|| false);
    }
    // Not reached: it was prepared, and runs for ever.
    crate::arch::cpu::halt_forever()
}

/// The CPU with this number, if it runs guests. With interrupts off or on.
pub fn get(number: usize) -> Option<&'static Processor> {
    without_interrupts(|| PROCESSORS.lock().get(&number).copied())
}

/// Their numbers.
pub fn numbers() -> Vec<usize> {
    without_interrupts(|| PROCESSORS.lock().keys().copied().collect())
}

impl Processor {
    /// Has its scheduler do this next. Waits for nothing.
    pub fn give(&self, job: Job) {
        without_interrupts(|| self.jobs.lock().push_back(job));
        self.place.tell();
    }

    /// The next that was given.
    pub(super) fn take_job(&self) -> Option<Job> {
        without_interrupts(|| self.jobs.lock().pop_front())
    }
}
