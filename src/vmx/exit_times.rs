//! How long exits keep the CPU in root mode, in ticks of the time-stamp counter:
//! total, maximum and a histogram by power of two, for each basic reason.
//!
//! One CPU records, the one that the vCPU runs on, and any CPU may read meanwhile:
//! what it reads of one reason may then be an exit apart. [`super::entry`] says
//! what is measured, and from where to where.

use super::exit_reason::REASONS;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// Buckets of a histogram. Bucket n has the times from 2^n to 2^(n + 1) - 1 ticks, the
/// first one also 0, the last one also all that are longer.
pub const BUCKETS: usize = 32;

/// The bucket of a time.
pub const fn bucket(ticks: u64) -> usize {
    let log = (ticks | 1).ilog2() as usize;
    if log < BUCKETS { log } else { BUCKETS - 1 }
}

/// The times of the exits with one reason, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub total: u64,
    pub maximum: u64,
    /// Exits by [`bucket`]; all of them together are those that were timed.
    pub histogram: [u64; BUCKETS],
}

impl Times {
    /// How many exits were timed.
    pub fn count(&self) -> u64 {
        self.histogram.iter().copied().fold(0, u64::saturating_add)
    }

    /// The mean, rounded down; `None` where no exit was timed.
    pub fn mean(&self) -> Option<u64> {
        self.total.checked_div(self.count())
    }

    /// Adds the times of other exits.
    pub fn add(&mut self, other: &Self) {
        self.total = self.total.saturating_add(other.total);
        self.maximum = self.maximum.max(other.maximum);
        for (own, other) in self.histogram.iter_mut().zip(other.histogram) {
            *own = own.saturating_add(other);
        }
    }
}

/// [`Times`], recorded by one CPU and read by people on any: relaxed.
#[derive(Debug, Default)]
struct Recorder {
    total: AtomicU64,
    maximum: AtomicU64,
    histogram: [AtomicU64; BUCKETS],
}

/// Adds without a locked instruction: only one CPU writes.
#[inline(always)]
fn add(sum: &AtomicU64, number: u64) {
    sum.store(sum.load(Relaxed).saturating_add(number), Relaxed);
}

/// The times of a vCPU's exits, by basic reason.
#[derive(Debug)]
pub struct ExitTimes(Vec<Recorder>);

impl ExitTimes {
    /// Without any exit.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new() -> Result<Self, TryReserveError> {
        let mut reasons = Vec::new();
        reasons.try_reserve_exact(REASONS)?;
        reasons.resize_with(REASONS, Recorder::default);
        Ok(Self(reasons))
    }

    /// An exit with this reason took so many ticks. For the vCPU's own CPU only.
    #[inline(always)]
    pub fn record(&self, reason: usize, ticks: u64) {
        let Some(times) = self.0.get(reason) else {
            return;
        };
        add(&times.total, ticks);
        if ticks > times.maximum.load(Relaxed) {
            times.maximum.store(ticks, Relaxed);
        }
        add(&times.histogram[bucket(ticks)], 1);
    }

    /// What was recorded for this reason so far.
    pub fn get(&self, reason: usize) -> Times {
        self.0
            .get(reason)
            .map_or_else(Times::default, |times| Times {
                total: times.total.load(Relaxed),
                maximum: times.maximum.load(Relaxed),
                histogram: times.histogram.each_ref().map(|count| count.load(Relaxed)),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_begin_at_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4].map(bucket), [0, 0, 1, 1, 2]);
        for n in 1..BUCKETS {
            assert_eq!(bucket((1 << n) - 1), n - 1);
            assert_eq!(bucket(1 << n), n);
        }
        assert_eq!(bucket(1 << BUCKETS), BUCKETS - 1);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn sums_saturate() {
        let times = ExitTimes::new().unwrap();
        times.record(10, u64::MAX);
        times.record(10, 1);
        let found = times.get(10);
        assert_eq!((found.total, found.maximum), (u64::MAX, u64::MAX));
        assert_eq!(found.count(), 2);
        let mut all = found;
        all.add(&found);
        assert_eq!((all.total, all.count()), (u64::MAX, 4));
    }

    #[test]
    fn no_exit_has_no_mean_and_an_unknown_reason_no_place() {
        let times = ExitTimes::new().unwrap();
        times.record(REASONS, 5);
        assert_eq!(times.get(REASONS), Times::default());
        assert!((0..REASONS).all(|reason| times.get(reason).mean().is_none()));
    }

    proptest! {
        #[test]
        fn each_exit_is_in_one_bucket(
            exits in prop::collection::vec((0..REASONS, 0u64..1 << 40), 1..200)
        ) {
            let times = ExitTimes::new().unwrap();
            for &(reason, ticks) in &exits {
                times.record(reason, ticks);
            }
            for reason in 0..REASONS {
                let mine: Vec<u64> = exits
                    .iter()
                    .filter(|exit| exit.0 == reason)
                    .map(|exit| exit.1)
                    .collect();
                let found = times.get(reason);
                prop_assert_eq!(found.total, mine.iter().sum::<u64>());
                prop_assert_eq!(found.maximum, mine.iter().copied().max().unwrap_or(0));
                prop_assert_eq!(found.count(), mine.len() as u64);
                prop_assert!(found.mean().is_none_or(|mean| mean <= found.maximum));
                for (n, &count) in found.histogram.iter().enumerate() {
                    let inside = mine.iter().filter(|ticks| bucket(**ticks) == n).count();
                    prop_assert_eq!(count, inside as u64);
                }
            }
        }
    }
}
