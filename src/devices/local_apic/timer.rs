//! The local APIC's timer: one-shot, periodic and TSC-deadline (SDM 3, 12.5.4).

use crate::devices::{Clock, Ticks};

/// Frequency of the timer's clock before the divider, in Hz.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;

/// No period is shorter, in cycles of [`APIC_TIMER_HZ`]: 20 microseconds. A
/// guest cannot slow the host with a timer that does nothing but expire.
const SHORTEST_PERIOD: u64 = 20_000;

/// How the timer counts: bits 18:17 of its local vector table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    pub const fn from_lvt(entry: u32) -> Self {
        match entry >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            // 3 is reserved; it does not count either way.
            _ => Self::TscDeadline,
        }
    }
}

/// The counter, which is computed from the time it was started.
#[derive(Clone, Debug)]
pub struct Timer {
    clock: Clock,
    mode: TimerMode,
    initial: u32,
    divisor: u64,
    started: Ticks,
    deadline: Option<Ticks>,
}

impl Timer {
    pub const fn new(clock: Clock) -> Self {
        Self {
            clock,
            mode: TimerMode::OneShot,
            initial: 0,
            divisor: 2,
            started: Ticks(0),
            deadline: None,
        }
    }

    /// When the timer expires next.
    #[inline]
    pub const fn deadline(&self) -> Option<Ticks> {
        self.deadline
    }

    /// A change between TSC-deadline and the counting modes disarms.
    pub fn set_mode(&mut self, mode: TimerMode) {
        if (mode == TimerMode::TscDeadline) != (self.mode == TimerMode::TscDeadline) {
            self.initial = 0;
            self.deadline = None;
        }
        self.mode = mode;
    }

    /// The divide configuration register: bits 3, 1 and 0.
    pub fn set_divide(&mut self, now: Ticks, register: u32) {
        let code = register >> 1 & 4 | register & 3;
        let count = self.current(now);
        self.divisor = if code == 7 { 1 } else { 2 << code };
        if self.deadline.is_some() && self.mode != TimerMode::TscDeadline {
            // What is left is counted at the new rate.
            let passed = u64::from(self.initial - count.min(self.initial));
            let ticks = self
                .clock
                .ticks(passed.saturating_mul(self.divisor), APIC_TIMER_HZ);
            self.started = Ticks(now.0.saturating_sub(ticks));
            self.arm();
        }
    }

    fn period(&self) -> u64 {
        let mut cycles = u64::from(self.initial).saturating_mul(self.divisor);
        if self.mode == TimerMode::Periodic {
            cycles = cycles.max(SHORTEST_PERIOD);
        }
        self.clock.ticks(cycles, APIC_TIMER_HZ).max(1)
    }

    fn arm(&mut self) {
        self.deadline = Some(Ticks(self.started.0.saturating_add(self.period())));
    }

    /// Writes the initial-count register, which starts the timer; 0 stops it.
    pub fn set_initial(&mut self, now: Ticks, count: u32) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = count;
        self.started = now;
        if count == 0 {
            self.deadline = None;
        } else {
            self.arm();
        }
    }

    /// The current-count register.
    pub fn current(&self, now: Ticks) -> u32 {
        match self.deadline {
            Some(deadline) if self.mode != TimerMode::TscDeadline && deadline > now => {
                let cycles = self.clock.cycles(deadline.0 - now.0, APIC_TIMER_HZ);
                u32::try_from(cycles / self.divisor)
                    .unwrap_or(u32::MAX)
                    .min(self.initial)
            }
            _ => 0,
        }
    }

    /// IA32_TSC_DEADLINE: 0 when not armed, or in another mode.
    pub fn tsc_deadline(&self, now: Ticks) -> u64 {
        match self.deadline {
            Some(deadline) if self.mode == TimerMode::TscDeadline && deadline > now => deadline.0,
            _ => 0,
        }
    }

    /// Arms at `deadline`; 0 disarms. Ignored in other modes.
    #[inline]
    pub fn set_tsc_deadline(&mut self, deadline: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.deadline = (deadline != 0).then_some(Ticks(deadline));
        }
    }

    /// Whether the timer expired; a periodic one is armed for the first
    /// expiry after `now`, however many were missed.
    #[inline]
    pub fn expire(&mut self, now: Ticks) -> bool {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now) else {
            return false;
        };
        self.deadline = None;
        if self.mode == TimerMode::Periodic && self.initial != 0 {
            let period = self.period();
            let missed = (now.0 - deadline.0) / period;
            self.started = Ticks(deadline.0.saturating_add(missed.saturating_mul(period)));
            self.arm();
        }
        true
    }
}
