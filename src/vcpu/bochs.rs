//! What Bochs 2.7 does wrong with interrupts, privilege levels and segments, and how guests are kept
//! from it there.
//!
//! - A host interrupt does not end a guest that was entered with interrupts off and
//!   leaves them off. So it is taken whenever the entry timer is set, which is many
//!   times a second at the least.
//! - While a host interrupt is pending it delivers the guest's virtual interrupt even
//!   when the guest's IF is 0. So none is pending while a guest of the tier APICv runs:
//!   the host's task priority holds them all back but then, and other CPUs' kicks are NMIs; so
//!   are they where a later Bochs processes posted interrupts, which has this mistake too.
//! - An EPT violation in the delivery of a virtual interrupt is not reported as one that
//!   interrupted it, and the interrupt is lost. So all memory of such a guest is mapped
//!   before it starts.
//! - VM entry takes the privilege level from the selector of CS, and not from SS (SDM 3, 27.3.1.2).
//!   Where a guest has just left real mode, that is a paragraph. So its lowest bits are 0 until
//!   the guest loads CS or goes back.
//! - A segment register that was null and is loaded in real mode is usable and has no type, in
//!   protected mode too, which the next VM entry refuses. It gets one when that has happened.
//!
//! Bochs is told by the rate of its preemption timer, that of the time-stamp counter:
//! IA32_VMX_MISC gives 5 or more on silicon. A CPU without that timer is taken for it.

use super::segmentation::{Rights, Segment};
use super::{SetupError, Vcpu};
use crate::arch::cpu;
use crate::devices::Ticks;
use crate::vmx::vmcs::guest;

/// How often a guest exits at the least, for the host interrupts that it may have missed.
const SLICES_A_SECOND: u64 = 20;
/// The same where it misses all of them: the UART's FIFO holds its characters of more
/// than a millisecond.
const HELD_SLICES_A_SECOND: u64 = 1000;

/// The highest task priority: no interrupt is above it.
const NONE: u8 = 15;
const ALL: u8 = 0;

impl Vcpu {
    /// Keeps the guest from all that, where it has to be.
    pub(super) fn prepare_for_bochs(&mut self) -> Result<(), SetupError> {
        let controls = self.vmx.controls;
        if controls.posts_interrupts() {
            self.mailbox.is_processed_by_cpu();
        }
        self.misses_interrupts =
            !controls.has_preemption_timer() || self.vmx.capabilities.preemption_timer_shift() == 0;
        if !self.misses_interrupts {
            return Ok(());
        }
        self.holds_interrupts = self.tier.delivers();
        let slices = if self.holds_interrupts {
            HELD_SLICES_A_SECOND
        } else {
            SLICES_A_SECOND
        };
        self.timer.set_slice(Ticks(self.clock.hz() / slices));
        if self.holds_interrupts {
            self.mailbox.tell_by_nmi();
            self.vm.map_all().map_err(SetupError::Ept)?;
        }
        Ok(())
    }

    /// Takes the host interrupts that the guest did not exit for.
    pub(super) fn take_missed_interrupts(&mut self) {
        self.admit_interrupts(cpu::interrupt_window);
        self.look_at_mail();
    }

    /// From here on no host interrupt is taken but in [`Vcpu::admit_interrupts`].
    pub(super) fn hold_interrupts(&self, hold: bool) {
        if !self.holds_interrupts {
            return;
        }
        if hold {
            cpu::set_task_priority(NONE);
            // One that came just before is still pending: Bochs withdraws none.
            cpu::interrupt_window();
        } else {
            cpu::set_task_priority(ALL);
        }
    }

    /// The guest enters protected mode, or real mode: see to the selector of CS.
    pub(super) fn correct_code_selector(&mut self, protected: bool) {
        const PRIVILEGE: u16 = 3;
        if !self.misses_interrupts {
            return;
        }
        let selector = self.vmcs.read(guest::CS_SELECTOR);
        let correct = if protected {
            self.paragraph = selector;
            selector & !PRIVILEGE
        } else if self.paragraph & !PRIVILEGE == selector {
            self.paragraph
        } else {
            selector
        };
        self.vmcs.write(guest::CS_SELECTOR, correct);
    }

    /// Makes writable data of the segments that have no type; false where none is so, and an entry
    /// was refused for another reason.
    #[cold]
    pub(super) fn give_segments_a_type(&mut self) -> bool {
        use Segment::{Ds, Es, Fs, Gs, Ss};
        let mut any = false;
        for segment in [Es, Ss, Ds, Fs, Gs] {
            let mut register = self.segment(segment);
            if register.rights.has_no_type() {
                register.rights.0 |= Rights::WRITABLE_OR_READABLE | Rights::ACCESSED;
                self.set_segment(segment, register);
                any = true;
            }
        }
        any
    }

    /// Lets host interrupts in while `wait` runs, which takes them.
    #[inline]
    pub(super) fn admit_interrupts(&self, wait: fn()) {
        self.hold_interrupts(false);
        wait();
        self.hold_interrupts(true);
    }
}
