//! The guest's time-stamp counter, and what is counted with it.
//!
//! Devices, and the local APIC's timer among them, live in ticks since the VM
//! was switched on, which no guest can change. The counter that the guest
//! reads is that plus IA32_TSC_ADJUST, which it can (SDM 3, 18.17.3): a write
//! to either moves both by as much.

use super::pvclock::{self, Scale, SystemTime, TimeInfo};
use super::{Attention, Vcpu};
use crate::devices::Ticks;
use crate::devices::clock::NANOS;
use crate::vmx::vmcs::control;

impl Vcpu {
    /// Ticks since the VM was switched on.
    #[inline]
    pub(super) fn now(&self) -> Ticks {
        ticks_since(self.vm.started)
    }

    /// What RDTSC gives the guest at `now`.
    pub(super) fn tsc(&self, now: Ticks) -> u64 {
        now.0.wrapping_add(self.tsc_adjust)
    }

    /// What the CPU adds to its own counter while the guest runs.
    pub(super) fn tsc_offset(&self) -> u64 {
        self.tsc_adjust.wrapping_sub(self.vm.started)
    }

    /// Writes IA32_TSC_ADJUST.
    #[inline]
    pub(super) fn set_tsc_adjust(&mut self, value: u64) {
        let change = value.wrapping_sub(self.tsc_adjust);
        if change != 0 {
            self.shift_tsc(self.now(), change);
        }
    }

    /// Moves the guest's counter. A deadline stays at its value, and so comes
    /// sooner or later.
    pub(super) fn shift_tsc(&mut self, now: Ticks, change: u64) {
        let deadline = self.tsc_deadline(now);
        self.tsc_adjust = self.tsc_adjust.wrapping_add(change);
        let offset = self.tsc_offset();
        self.vmcs.write(control::TSC_OFFSET, offset);
        if deadline != 0 {
            self.set_tsc_deadline(now, deadline);
        }
        self.write_system_time(now);
    }

    /// IA32_TSC_DEADLINE: 0 when the timer is not armed.
    pub(super) fn tsc_deadline(&self, now: Ticks) -> u64 {
        match self.apic.tsc_deadline(now) {
            0 => 0,
            deadline => deadline.wrapping_add(self.tsc_adjust),
        }
    }

    #[inline]
    pub(super) fn set_tsc_deadline(&mut self, now: Ticks, value: u64) {
        self.apic
            .set_tsc_deadline(now, to_ticks(value, self.tsc_adjust));
        self.look_at_apic_timer();
    }

    /// What [`Vcpu::set_tsc_deadline`] does where nothing has expired, nor does with this,
    /// and the guest has not moved its counter: mostly. Else false, and nothing is done.
    #[inline(always)]
    pub(super) fn arm_tsc_deadline(&mut self, value: u64) -> bool {
        let armed = self.tsc_adjust == 0 && self.apic.arm_tsc_deadline(self.now(), Ticks(value));
        if armed && self.apic.expires_before(self.timer.deadline()) {
            self.attend_to(Attention::DEVICES);
        }
        armed
    }

    /// Fills the guest's paravirtual clock, if it asked for one.
    pub(super) fn write_system_time(&mut self, now: Ticks) {
        let Ok(SystemTime::At(address)) = SystemTime::from_msr(self.system_time) else {
            return;
        };
        self.system_time_version = pvclock::next_version(self.system_time_version);
        let info = TimeInfo {
            version: self.system_time_version,
            tsc_timestamp: self.tsc(now),
            system_time: self.clock.cycles(now.0, NANOS),
            scale: Scale::new(self.clock.hz()),
        };
        // An address without memory is the guest's mistake and gets nothing.
        let _ = self.vm.memory.write(address, &info.to_bytes());
    }
}

/// Ticks since the host's counter was `start`.
#[inline]
pub(super) fn ticks_since(start: u64) -> Ticks {
    Ticks(crate::arch::cpu::rdtsc().wrapping_sub(start))
}

/// A deadline of the guest's counter in ticks since the start. One that was
/// reached before the start is due at once; 0 disarms.
#[inline]
fn to_ticks(value: u64, adjust: u64) -> u64 {
    if value == 0 || adjust == 0 {
        value
    } else {
        to_ticks_adjusted(value, adjust)
    }
}

#[inline(never)]
fn to_ticks_adjusted(value: u64, adjust: u64) -> u64 {
    let ticks = i128::from(value) - i128::from(adjust.cast_signed());
    u64::try_from(ticks.max(1)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_deadline_before_the_start_is_due_and_zero_disarms() {
        assert_eq!(to_ticks(0, 7), 0);
        assert_eq!(to_ticks(5, 7), 1);
        assert_eq!(to_ticks(7, 7), 1);
        assert_eq!(to_ticks(u64::MAX, (-1_i64).cast_unsigned()), u64::MAX);
    }

    proptest! {
        #[test]
        fn a_deadline_fires_when_the_guests_counter_reaches_it(
            now in 0..1u64 << 62,
            adjust in any::<u64>(),
            ahead in 1..1u64 << 61,
        ) {
            let counter = now.wrapping_add(adjust);
            let value = counter.wrapping_add(ahead);
            // A counter that wraps on the way never reaches a lower value.
            prop_assume!(value > counter && value != 0);
            prop_assume!((counter as i128) == now as i128 + adjust.cast_signed() as i128);
            prop_assert_eq!(to_ticks(value, adjust), now + ahead);
        }
    }
}
