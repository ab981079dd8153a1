//! What Bochs 2.7 does wrong when it delivers virtual interrupts, and how guests of
//! the tier APICv are kept from it there.
//!
//! - While a host interrupt is pending it delivers the guest's virtual interrupt even
//!   when the guest's IF is 0. So none is pending while the guest runs: the host's
//!   task priority holds them all back, and many times a second the
//!   preemption timer lets them in.
//! - An EPT violation in the delivery is not reported as one that interrupted it, and
//!   the interrupt is lost. So all memory is mapped before the guest starts.
//!
//! It is told by the rate of its preemption timer, that of the time-stamp counter:
//! IA32_VMX_MISC gives 5 or more on silicon.

use super::{SetupError, Vcpu};
use crate::arch::cpu;

/// How often host interrupts are let in then: the UART's FIFO holds its characters of
/// more than a millisecond.
const SLICES_A_SECOND: u64 = 1000;

/// The highest task priority: no interrupt is above it.
const NONE: u8 = 15;
const ALL: u8 = 0;

impl Vcpu {
    /// Keeps the guest from the two, where it has to be.
    pub(super) fn prepare_for_bochs(&mut self) -> Result<(), SetupError> {
        self.holds_interrupts =
            self.tier.delivers() && self.vmx.capabilities.preemption_timer_shift() == 0;
        if !self.holds_interrupts {
            return Ok(());
        }
        self.timer.set_slice(self.clock.hz() / SLICES_A_SECOND);
        self.vm.map_all().map_err(SetupError::Ept)
    }

    /// From here on no host interrupt is taken but in [`Vcpu::admit_interrupts`].
    pub(super) fn hold_interrupts(&self, hold: bool) {
        if self.holds_interrupts {
            cpu::set_task_priority(if hold { NONE } else { ALL });
        }
    }

    /// Lets host interrupts in while `wait` runs, which takes them.
    #[inline]
    pub(super) fn admit_interrupts(&self, wait: fn()) {
        self.hold_interrupts(false);
        wait();
        self.hold_interrupts(true);
    }
}
