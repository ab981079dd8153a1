//! When the guest must exit at the latest: the earliest deadline of its devices.
//!
//! The VMX-preemption timer counts in the guest only, from where the last exit
//! left it (SDM 3, 26.5.1 and 28.3.4). So it needs no write at an exit that
//! moves no deadline, but falls behind by the time of each such exit; after
//! [`LIGHT_EXITS`] of them it is set again. A CPU that cannot save the timer gets it
//! set at each exit, and one without it has the host's local APIC interrupt.

use super::{Attention, Vcpu};
use crate::devices::Ticks;
use crate::host::time;
use crate::vmx::vmcs::guest;

/// Exits in a row that may leave the timer alone. An exit costs a few hundred
/// nanoseconds on silicon, so that the guest's timers are late by a few
/// microseconds at most.
const LIGHT_EXITS: u32 = 16;

/// How often a guest that does not exit is interrupted, for host interrupts that the
/// emulator keeps back (see the preemption timer's exit).
const SLICES_A_SECOND: u64 = 20;

/// The timer as it was last set.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryTimer {
    /// Nothing is due before; [`NEVER`] where nothing is.
    deadline: Ticks,
    /// Exits until it must be set again.
    light_exits: u32,
}

const NEVER: Ticks = Ticks(u64::MAX);

impl EntryTimer {
    /// Whether `deadline` comes before the one that this is set for.
    #[inline]
    pub(super) fn is_after(&self, deadline: Option<Ticks>) -> bool {
        deadline.is_some_and(|deadline| deadline < self.deadline)
    }

    pub(super) const UNSET: Self = Self {
        deadline: NEVER,
        light_exits: 0,
    };
}

impl Vcpu {
    /// Counts an exit, and asks for the timer to be set after too many.
    #[inline(always)]
    pub(super) fn count_light_exit(&mut self) {
        let (left, none) = self.timer.light_exits.overflowing_sub(1);
        self.timer.light_exits = left;
        if none {
            self.attention |= Attention::TIMER;
        }
    }

    /// The earliest deadline of the local APIC and the chipset.
    pub(super) fn next_deadline(&self) -> Option<Ticks> {
        let chipset = self.vm.chipset.lock().deadline();
        match (self.apic.deadline(), chipset) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Makes the guest exit at the next deadline.
    pub(super) fn set_timer(&mut self, now: Ticks) {
        self.timer.deadline = self.next_deadline().unwrap_or(NEVER);
        self.write_timer(now);
    }

    /// Sets it for the deadline that is known.
    pub(super) fn write_timer(&mut self, now: Ticks) {
        let controls = self.vmx.controls;
        let deadline = self.timer.deadline;
        let ticks = deadline.0.saturating_sub(now.0);
        if controls.has_preemption_timer() {
            self.timer.light_exits = if controls.saves_preemption_timer() {
                LIGHT_EXITS
            } else {
                0
            };
            let ticks = ticks.min(self.clock.hz() / SLICES_A_SECOND);
            // Rounded up: an exit before the deadline would only come back.
            let shift = self.vmx.capabilities.preemption_timer_shift();
            let count = (ticks >> shift).saturating_add(1);
            self.vmcs.write(
                guest::PREEMPTION_TIMER,
                u32::try_from(count).unwrap_or(u32::MAX),
            );
        } else {
            // The host's timer goes on meanwhile.
            self.timer.light_exits = u32::MAX;
            if deadline != NEVER {
                time::arm(ticks);
            }
        }
    }
}
