//! The timer (SDM 3, 12.5.4): one-shot and periodic on a clock of
//! [`input_hz`], and the deadline of the time-stamp counter.
//!
//! Nothing runs here: a count is computed from the time of its start, and an
//! expiry is noticed by [`Timer::expire`], in constant time however late.

use crate::devices::{Clock, Ticks};

/// The timer's input clock before the divider, in Hz, where the time-stamp counter is no slower.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;

/// The same beside a time-stamp counter of this rate: no CPU has one that is faster, since both are
/// multiples of the crystal's (SDM 3, 12.5.4 and 18.7.3).
pub const fn input_hz(tsc: Clock) -> u64 {
    if tsc.hz() < APIC_TIMER_HZ {
        tsc.hz()
    } else {
        APIC_TIMER_HZ
    }
}

/// A periodic timer expires at most this often a second, every 20 microseconds. A guest with a
/// shorter period would do nothing but take interrupts; it gets fewer of them, and a current count
/// as it expects.
const MOST_EXPIRIES: u64 = 50_000;

/// The shortest period, in cycles of [`APIC_TIMER_HZ`].
#[cfg(test)]
pub const MIN_PERIOD: u64 = APIC_TIMER_HZ / MOST_EXPIRIES;

/// The timer's mode in its entry of the local vector table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved encoding: nothing expires.
    Reserved,
}

impl TimerMode {
    /// From bits 18..17 of the entry.
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    /// Whether the initial count starts it.
    const fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// The timer.
#[derive(Clone, Debug)]
pub struct Timer {
    clock: Clock,
    mode: TimerMode,
    /// Input cycles per count: 1 shifted left by this.
    shift: u32,
    initial: u32,
    /// When the count was `first`.
    origin: Ticks,
    /// 0 when nothing counts.
    first: u32,
    /// The armed time-stamp, 0 when there is none.
    tsc_deadline: u64,
    /// The next expiry; [`NEVER`] without one.
    deadline: Ticks,
}

const NEVER: Ticks = Ticks(u64::MAX);

impl Timer {
    /// The timer after reset: one-shot, stopped, divided by 2.
    pub const fn new(clock: Clock) -> Self {
        Self {
            clock,
            mode: TimerMode::OneShot,
            shift: 1,
            initial: 0,
            origin: Ticks(0),
            first: 0,
            tsc_deadline: 0,
            deadline: NEVER,
        }
    }

    /// Puts the timer into its state after reset.
    pub const fn reset(&mut self) {
        *self = Self::new(self.clock);
    }

    /// The next expiry.
    #[inline]
    pub const fn deadline(&self) -> Option<Ticks> {
        if self.deadline.0 == NEVER.0 {
            None
        } else {
            Some(self.deadline)
        }
    }

    /// Whether [`Timer::expire`] has something to do.
    #[inline]
    pub const fn is_due(&self, now: Ticks) -> bool {
        self.deadline.0 <= now.0
    }

    /// Whether the next expiry is before `time`.
    #[inline(always)]
    pub const fn expires_before(&self, time: Ticks) -> bool {
        self.deadline.0 < time.0
    }

    /// Whether the timer expired since the last call. Arms the next period.
    #[inline]
    pub fn expire(&mut self, now: Ticks) -> bool {
        let due = self.is_due(now) && self.deadline.0 != NEVER.0;
        if due {
            self.tsc_deadline = 0;
            self.deadline = match self.mode {
                TimerMode::Periodic => self.next_period(now),
                _ => NEVER,
            };
        }
        due
    }

    /// Changes the mode. Between the counting modes the count goes on; any
    /// other change disarms the timer (SDM 3, 12.5.4.1).
    pub fn set_mode(&mut self, now: Ticks, mode: TimerMode) {
        if mode == self.mode {
            return;
        }
        if self.mode.counts() && mode.counts() {
            let count = self.current_count(now);
            self.mode = mode;
            self.start(now, count);
        } else {
            self.mode = mode;
            self.initial = 0;
            self.tsc_deadline = 0;
            self.start(now, 0);
        }
    }

    /// Sets the divide configuration register's value: bits 3, 1 and 0 (SDM 3, figure 12-10).
    pub fn set_divide(&mut self, now: Ticks, value: u32) {
        let count = self.current_count(now);
        let encoding = value >> 1 & 4 | value & 3;
        self.shift = (encoding + 1) & 7;
        if self.mode.counts() {
            self.start(now, count);
        }
    }

    /// The initial count.
    pub const fn initial_count(&self) -> u32 {
        self.initial
    }

    /// Starts counting down from `count`; 0 stops. Without effect in the other modes.
    pub fn set_initial_count(&mut self, now: Ticks, count: u32) {
        if self.mode.counts() {
            self.initial = count;
            self.start(now, count);
        }
    }

    /// The current count.
    pub fn current_count(&self, now: Ticks) -> u32 {
        if self.first == 0 {
            return 0;
        }
        let elapsed = self.elapsed(now);
        match elapsed.checked_sub(self.cycles(self.first)) {
            None => count_after(self.first, elapsed >> self.shift),
            Some(beyond) => match beyond.checked_rem(self.period()) {
                Some(phase) => count_after(self.initial, phase >> self.shift),
                None => 0,
            },
        }
    }

    /// The armed time-stamp; 0 when there is none, or when it has passed.
    pub const fn tsc_deadline(&self, now: Ticks) -> u64 {
        if self.tsc_deadline > now.0 {
            self.tsc_deadline
        } else {
            0
        }
    }

    /// Arms the timer for the time-stamp `value`; 0 disarms it. Without effect in the other modes.
    #[inline]
    pub const fn set_tsc_deadline(&mut self, value: u64) {
        if matches!(self.mode, TimerMode::TscDeadline) {
            self.tsc_deadline = value;
            self.deadline = if value == 0 { NEVER } else { Ticks(value) };
        }
    }

    /// [`Timer::set_tsc_deadline`] where both this deadline and the one before are still to
    /// come; false, and nothing is done, in any other case.
    #[inline(always)]
    pub const fn arm_tsc_deadline(&mut self, now: Ticks, deadline: Ticks) -> bool {
        let arms =
            matches!(self.mode, TimerMode::TscDeadline) && !self.is_due(now) && now.0 < deadline.0;
        if arms {
            self.tsc_deadline = deadline.0;
            self.deadline = deadline;
        }
        arms
    }

    fn start(&mut self, now: Ticks, count: u32) {
        self.origin = now;
        self.first = count;
        self.deadline = if count == 0 {
            NEVER
        } else {
            self.after_origin(self.cycles(count))
        };
    }

    /// The first expiry of the periodic timer after `now`, of [`MOST_EXPIRIES`] a second. They
    /// stay at multiples of the period, so lateness does not add up.
    #[inline(never)]
    fn next_period(&self, now: Ticks) -> Ticks {
        let first = self.cycles(self.first);
        let period = self.period();
        let shortest = input_hz(self.clock) / MOST_EXPIRIES;
        let pause = if period < shortest { shortest } else { 1 };
        // The least multiple of the period, counted from `first`, that is not before this.
        let earliest = self.elapsed(now).saturating_add(pause);
        let after_first = earliest.saturating_sub(first);
        let next = match after_first.checked_rem(period) {
            None => return NEVER,
            Some(0) => earliest,
            Some(past) => earliest.saturating_add(period - past),
        };
        let next = self.after_origin(next);
        // A saturated sum must not expire over and over.
        next.max(Ticks(now.0.saturating_add(1)))
    }

    /// Input cycles of a period; 0 when the timer is not periodic.
    const fn period(&self) -> u64 {
        if matches!(self.mode, TimerMode::Periodic) {
            self.cycles(self.initial)
        } else {
            0
        }
    }

    const fn cycles(&self, count: u32) -> u64 {
        (count as u64) << self.shift
    }

    const fn elapsed(&self, now: Ticks) -> u64 {
        self.clock
            .cycles(now.0.saturating_sub(self.origin.0), input_hz(self.clock))
    }

    const fn after_origin(&self, cycles: u64) -> Ticks {
        let ticks = self.clock.ticks(cycles, input_hz(self.clock));
        Ticks(self.origin.0.saturating_add(ticks))
    }
}

/// `from` less `counts`, which is at most `from`.
const fn count_after(from: u32, counts: u64) -> u32 {
    (from as u64).saturating_sub(counts) as u32
}
