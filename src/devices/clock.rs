//! Time as devices see it: ticks of the guest's time-stamp counter, and the
//! conversion to a device's own frequency.

/// A moment, in ticks of the guest's time-stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(transparent)]
pub struct Ticks(pub u64);

/// Nanoseconds in a second.
pub const NANOS: u64 = 1_000_000_000;

/// The rate of the time-stamp counter, and conversions from and to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Ticks per second, never 0.
    hz: u64,
}

impl Clock {
    /// A clock of `hz` ticks a second; 0 is taken as 1.
    pub const fn new(hz: u64) -> Self {
        Self {
            hz: if hz == 0 { 1 } else { hz },
        }
    }

    /// Ticks per second.
    pub const fn hz(self) -> u64 {
        self.hz
    }

    /// How many whole cycles of a clock of `hz` fit into `ticks`, rounded
    /// down, saturating.
    #[inline]
    pub const fn cycles(self, ticks: u64, hz: u64) -> u64 {
        saturate(ticks as u128 * hz as u128 / self.hz as u128)
    }

    /// The least number of ticks in which `cycles` cycles of a clock of `hz`
    /// have passed, saturating: `cycles(ticks(n, hz), hz) == n` for a clock
    /// that is not faster than this one.
    #[inline]
    pub const fn ticks(self, cycles: u64, hz: u64) -> u64 {
        if hz == 0 {
            return u64::MAX;
        }
        saturate((cycles as u128 * self.hz as u128).div_ceil(hz as u128))
    }
}

const fn saturate(value: u128) -> u64 {
    if value > u64::MAX as u128 {
        u64::MAX
    } else {
        value as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ticks_is_the_least_that_reaches_the_cycle(n in 0..1u64 << 40, hz in 1..4_000_000_000u64, base in 1..5_000_000_000u64) {
            let clock = Clock::new(base);
            let ticks = clock.ticks(n, hz);
            prop_assert!(clock.cycles(ticks, hz) >= n);
            prop_assert!(ticks == 0 || clock.cycles(ticks - 1, hz) < n);
        }
    }
}
