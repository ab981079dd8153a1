//! The VT-x of each CPU, switched on before the CPU is given anything to do.

use crate::host::cpus::Cpu;
use crate::vmx::operation::{self, Unusable, Vmx};
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use spin::Mutex;

static READY: Mutex<BTreeMap<usize, Vmx>> = Mutex::new(BTreeMap::new());

/// Switches VT-x on for the calling CPU, `cpu`.
///
/// # Errors
/// Why it cannot run guests.
///
/// # Safety
/// Once on each CPU, with interrupts off.
pub unsafe fn start(cpu: &Cpu) -> Result<Vmx, Unusable> {
    // SAFETY: the caller's.
    let vmx = unsafe { operation::start(cpu.tables) }?;
    READY.lock().insert(cpu.number, vmx);
    Ok(vmx)
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

/// The VT-x of `cpu`.
pub fn vmx(cpu: &Cpu) -> Option<Vmx> {
    READY.lock().get(&cpu.number).copied()
}
