//! The last exits of a vCPU, always recorded.
//!
//! The exit stub stores the basic reason of each exit as one byte into a ring of as many as a
//! byte counts, so that the index wraps by itself: three instructions, and no memory but the
//! frame's. Where an exit was, and when, is too dear for that; those that a light handler has not
//! answered leave it in a second ring.
//!
//! One CPU records, and any CPU may look meanwhile.

use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicU8, AtomicU64};

/// Exits that are remembered.
pub const EXITS: usize = 256;
/// Of those the heavy ones, of which more is known.
const HEAVY: usize = 32;

/// In a reason's byte: the exit was heavy. Reasons have seven bits.
const MARK: u8 = 0x80;
const _: () = assert!(super::exit_reason::REASONS <= MARK as usize);

/// What is known of a heavy exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The guest's instruction pointer.
    pub rip: u64,
    /// The exit qualification.
    pub qualification: u64,
    /// The host's time-stamp counter when it was to be answered.
    pub ticks: u64,
}

/// An exit that was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traced {
    /// The basic reason.
    pub reason: usize,
    /// Known of heavy ones, as far as they are remembered.
    pub place: Option<Place>,
}

/// The rings. No memory is read because of what these atomics hold, so that relaxed accesses are
/// enough.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Recorder {
    /// Where the exit stub stores the next reason.
    pub(super) next: AtomicU8,
    pub(super) reasons: [AtomicU8; EXITS],
    next_heavy: AtomicU8,
    heavy: [Heavy; HEAVY],
}

#[derive(Debug)]
struct Heavy {
    /// Which of the reasons it belongs to.
    index: AtomicU8,
    rip: AtomicU64,
    qualification: AtomicU64,
    ticks: AtomicU64,
}

impl Recorder {
    /// Says more of the exit whose reason was recorded last. On the vCPU's own CPU.
    #[inline(always)]
    pub(super) fn heavy(&self, place: Place) {
        let index = self.next.load(Relaxed).wrapping_sub(1);
        let reason = &self.reasons[usize::from(index)];
        reason.store(reason.load(Relaxed) | MARK, Relaxed);
        let next = self.next_heavy.load(Relaxed);
        let heavy = &self.heavy[usize::from(next) % HEAVY];
        heavy.index.store(index, Relaxed);
        heavy.rip.store(place.rip, Relaxed);
        heavy.qualification.store(place.qualification, Relaxed);
        heavy.ticks.store(place.ticks, Relaxed);
        self.next_heavy.store(next.wrapping_add(1), Relaxed);
    }

    /// The last of the `total` exits so far, the oldest first. Of a vCPU that exits meanwhile the
    /// oldest are left out, and the newest may lack their places.
    pub(super) fn exits(&self, total: u64) -> Vec<Traced> {
        let next = self.next.load(Relaxed);
        let bytes = self.reasons.each_ref().map(|reason| reason.load(Relaxed));
        let byte = |age: usize| bytes[(usize::from(next) + age) % EXITS];
        let unused = (EXITS as u64).saturating_sub(total) as usize;
        let exit = |age| Traced {
            reason: usize::from(byte(age) & !MARK),
            place: None,
        };
        let mut exits: Vec<Traced> = (unused..EXITS).map(exit).collect();
        let newest = self.next_heavy.load(Relaxed);
        // Newer ones replace older ones of the same index.
        for back in (1..=HEAVY as u8).rev() {
            let heavy = &self.heavy[usize::from(newest.wrapping_sub(back)) % HEAVY];
            let age = usize::from(heavy.index.load(Relaxed).wrapping_sub(next));
            let exit = age.checked_sub(unused).and_then(|age| exits.get_mut(age));
            if let Some(exit) = exit.filter(|_| byte(age) & MARK != 0) {
                exit.place = Some(Place {
                    rip: heavy.rip.load(Relaxed),
                    qualification: heavy.qualification.load(Relaxed),
                    ticks: heavy.ticks.load(Relaxed),
                });
            }
        }
        let moved = self.next.load(Relaxed).wrapping_sub(next);
        exits.drain(..usize::from(moved).saturating_sub(unused));
        exits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Recorder {
        fn new() -> Self {
            Self {
                next: AtomicU8::new(0),
                reasons: [const { AtomicU8::new(0) }; EXITS],
                next_heavy: AtomicU8::new(0),
                heavy: core::array::from_fn(|_| Heavy {
                    index: AtomicU8::new(0),
                    rip: AtomicU64::new(0),
                    qualification: AtomicU64::new(0),
                    ticks: AtomicU64::new(0),
                }),
            }
        }

        /// What the exit stub does.
        fn light(&self, reason: u8) {
            let next = self.next.fetch_add(1, Relaxed);
            self.reasons[usize::from(next)].store(reason, Relaxed);
        }
    }

    proptest! {
        #[test]
        fn the_last_exits_are_known(
            exits in prop::collection::vec((0u8..128, prop::bool::weighted(0.2)), 0..700)
        ) {
            let recorder = Recorder::new();
            for (&(reason, heavy), number) in exits.iter().zip(0u64..) {
                recorder.light(reason);
                if heavy {
                    recorder.heavy(Place { rip: number, qualification: 2, ticks: 3 });
                }
            }
            let found = recorder.exits(exits.len() as u64);
            prop_assert_eq!(found.len(), exits.len().min(EXITS));
            let expected = exits.iter().enumerate().rev();
            let mut heavies = 0;
            for (found, (number, &(reason, heavy))) in found.iter().rev().zip(expected) {
                prop_assert_eq!(found.reason, usize::from(reason));
                heavies += usize::from(heavy);
                let rip = found.place.map(|place| place.rip);
                prop_assert_eq!(rip, (heavy && heavies <= HEAVY).then_some(number as u64));
            }
        }
    }
}
