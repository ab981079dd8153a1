//! Punctual timers: the guest is interrupted a little before its deadline, by as much as
//! the way from there to its handler takes, and what is left is waited for.
//!
//! How much that is depends on the CPU, on its caches and on what is underneath, so it is
//! found out: each time that was late adds to it, each wait takes away from it.

use crate::devices::{Clock, Ticks};

/// The most that is waited for, as a part of a second: 20 microseconds. A way that takes
/// longer is not the rule, and the guest's time is not to be waited away for it.
const PARTS_OF_A_SECOND: u64 = 50_000;

/// How much earlier than a deadline something is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lead {
    ticks: u64,
    most: u64,
}

impl Lead {
    /// None yet.
    pub(super) const fn new(clock: Clock) -> Self {
        Self {
            ticks: 0,
            most: clock.hz() / PARTS_OF_A_SECOND,
        }
    }

    /// When to ask for what is due at `deadline`.
    #[inline]
    pub(super) const fn before(&self, deadline: Ticks) -> Ticks {
        Ticks(deadline.0.saturating_sub(self.ticks))
    }

    /// Whether `now` is as late as was asked for.
    #[inline]
    pub(super) const fn has_come(&self, deadline: Ticks, now: Ticks) -> bool {
        now.0 >= self.before(deadline).0
    }

    /// Waits until `deadline`, which [has come](Self::has_come), and learns from how long that
    /// took, or from how late it is: half of that is made good the next time, while what was waited
    /// is shortened slowly.
    #[inline]
    pub(super) fn wait(&mut self, deadline: Ticks, mut now: impl FnMut() -> Ticks) {
        let mut at = now();
        if at > deadline {
            let late = (at.0 - deadline.0).min(self.most);
            self.ticks = (self.ticks + late / 2).min(self.most);
            return;
        }
        self.ticks -= (deadline.0 - at.0).min(self.ticks) / 8;
        while at < deadline {
            core::hint::spin_loop();
            at = now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CLOCK: Clock = Clock::new(1_000_000_000);
    const MOST: u64 = 20_000;

    /// Asks for `deadline`, and comes back `way` ticks after that, ready at the time that is
    /// returned.
    fn round(lead: &mut Lead, deadline: u64, way: u64) -> u64 {
        let deadline = Ticks(deadline);
        let asked = lead.before(deadline);
        assert!(lead.has_come(deadline, asked));
        let mut time = asked.0 + way;
        lead.wait(deadline, || {
            time += 1;
            Ticks(time)
        });
        time
    }

    #[test]
    fn a_way_that_takes_as_long_each_time_is_on_time_soon() {
        let mut lead = Lead::new(CLOCK);
        for number in 1..100 {
            let deadline = number * 1_000_000;
            let late = round(&mut lead, deadline, 500) - deadline;
            assert!(number < 12 || late <= 1, "round {number} is {late} late");
        }
        // And soon little is waited.
        let asked = lead.before(Ticks(1_000_000)).0;
        assert!(
            (1_000_000 - 520..1_000_000 - 495).contains(&asked),
            "{asked}"
        );
    }

    proptest! {
        /// Never before the deadline, and never more waited than the most.
        #[test]
        fn nothing_is_early(ways in prop::collection::vec(0..100_000u64, 1..50)) {
            let mut lead = Lead::new(CLOCK);
            for (number, way) in (1..).zip(ways) {
                let deadline = number * 1_000_000;
                let asked = lead.before(Ticks(deadline)).0;
                prop_assert!(deadline - asked <= MOST);
                let ready = round(&mut lead, deadline, way);
                prop_assert!(ready >= deadline);
                prop_assert!(ready <= deadline.max(asked + way) + 1);
            }
        }
    }
}
