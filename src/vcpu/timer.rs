//! When the guest must exit at the latest: the earliest deadline of its devices.
//!
//! The VMX-preemption timer counts in the guest only, from where the last exit
//! left it (SDM 3, 26.5.1 and 28.3.4). So it needs no write at an exit that
//! moves no deadline, but falls behind by the time of each such exit; after
//! [`LIGHT_EXITS`] of them it is set again. A CPU that cannot save the timer gets it
//! set at each exit, and one without it has the host's local APIC interrupt.

use super::lead::Lead;
use super::{Leave, Vcpu};
use crate::devices::{Clock, Ticks};
use crate::host::time;
use crate::vmx::vmcs::guest;

/// Exits in a row that may leave the timer alone. An exit costs a few hundred
/// nanoseconds on silicon, so that the guest's timers are late by a few
/// microseconds at most. An exit that is followed by a look around counts for half of
/// those that were left.
const LIGHT_EXITS: u32 = 32;

/// The timer as it was last set.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryTimer {
    /// Nothing is due before; [`NEVER`] where nothing is.
    deadline: Ticks,
    /// Light exits until the next look around; less than none is left when this wraps.
    light_exits: u32,
    /// What that was after the last look around; 0 where the timer must be set again.
    budget: u32,
    /// The guest exits after as many ticks at the latest.
    slice: Ticks,
    lead: Lead,
}

pub(super) const NEVER: Ticks = Ticks(u64::MAX);

impl EntryTimer {
    /// What it is set for.
    #[inline(always)]
    pub(super) const fn deadline(&self) -> Ticks {
        self.deadline
    }

    /// Whether `deadline` comes before the one that this is set for.
    #[inline]
    pub(super) fn is_after(&self, deadline: Ticks) -> bool {
        deadline < self.deadline
    }

    /// Not set yet.
    pub(super) const fn new(clock: Clock) -> Self {
        Self {
            deadline: NEVER,
            light_exits: 0,
            budget: 0,
            slice: NEVER,
            lead: Lead::new(clock),
        }
    }

    /// Makes the guest exit after `slice` ticks at the latest.
    pub(super) const fn set_slice(&mut self, slice: Ticks) {
        self.slice = slice;
    }

    /// Makes this exit the last light one before a look around.
    #[inline(always)]
    pub(super) const fn settle_now(&mut self) {
        self.light_exits = 0;
    }

    /// Counts a light exit; whether it was the last.
    #[inline(always)]
    pub(super) const fn count_light_exit(&mut self) -> bool {
        let (left, none) = self.light_exits.overflowing_sub(1);
        self.light_exits = left;
        none
    }
}

/// For a CPU without the preemption timer; this one goes on meanwhile.
#[cold]
#[inline(never)]
fn arm_host_timer(ticks: u64) {
    time::arm(ticks);
}

impl Vcpu {
    /// The earliest deadline of the local APIC and the chipset; [`NEVER`] where there is none.
    #[inline]
    pub(super) fn next_deadline(&self) -> Ticks {
        let chipset = self.chipset_deadline();
        self.apic.deadline().map_or(chipset, |own| own.min(chipset))
    }

    /// When this vCPU has to look after the chipset: the first does.
    #[inline(always)]
    pub(super) fn chipset_deadline(&self) -> Ticks {
        Ticks(self.vm.signals.deadline().0 | self.not_first)
    }

    /// When to ask for what is due at `deadline`: earlier by `lead`, if that is the local
    /// APIC's timer.
    #[inline]
    pub(super) fn ask_before(&self, deadline: Ticks, lead: Lead) -> Ticks {
        if self.apic.expires_by(deadline) {
            lead.before(deadline)
        } else {
            deadline
        }
    }

    /// Makes the guest exit at the next deadline.
    #[inline]
    pub(super) fn set_timer(&mut self, now: Ticks) {
        self.timer.deadline = self.next_deadline();
        self.write_timer(now);
    }

    /// The guest has exited for the deadline, perhaps a little before it: where all that is
    /// due is the local APIC's timer, delivers that and waits for the rest; where it is the end of
    /// the turn, leaves; false where it is neither, and nothing done.
    #[inline]
    pub(super) fn deliver_timer(&mut self) -> bool {
        let due = self.timer.deadline;
        let now = self.now();
        let expected = self.attention.is_empty()
            && self.apic.expires_by(due)
            && self.timer.lead.has_come(due, now);
        if !expected {
            if now < self.turn_ends {
                return false;
            }
            self.leave_for(Leave::Turn);
            return true;
        }
        self.apic.advance(due);
        // Before the injection: it may look at mail.
        self.set_timer(now);
        self.inject();
        let started = self.vm.started;
        self.timer
            .lead
            .wait(due, || super::tsc::ticks_since(started));
        true
    }

    /// After a look around that has not set it: sets it when too many exits have left it alone.
    #[inline]
    pub(super) fn correct_timer(&mut self) {
        self.timer.budget /= 2;
        if self.timer.budget == 0 {
            self.write_timer(self.now());
        } else {
            self.timer.light_exits = self.timer.budget;
        }
    }

    /// Sets it for the deadline that is known.
    #[inline(never)]
    pub(super) fn write_timer(&mut self, now: Ticks) {
        let controls = self.vmx.controls;
        let deadline = self.timer.deadline;
        let asked = self.ask_before(deadline, self.timer.lead);
        let ticks = asked.min(self.turn_ends).0.saturating_sub(now.0);
        let mut budget = LIGHT_EXITS;
        if controls.has_preemption_timer() {
            if !controls.saves_preemption_timer() {
                budget = 0;
            }
            let ticks = ticks.min(self.timer.slice.0);
            // Rounded up: an exit before the deadline would only come back.
            let shift = self.vmx.capabilities.preemption_timer_shift();
            let count = (ticks >> shift).saturating_add(1);
            self.vmcs.write(
                guest::PREEMPTION_TIMER,
                u32::try_from(count).unwrap_or(u32::MAX),
            );
        } else if deadline.min(self.turn_ends) != NEVER {
            arm_host_timer(ticks);
        }
        self.timer.light_exits = budget;
        self.timer.budget = budget;
        if self.misses_interrupts {
            self.take_missed_interrupts();
        }
    }
}
