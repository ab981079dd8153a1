//! Memory slots: which guest addresses are memory, and where it is.

use crate::addr::{Gpa, Hpa};
use alloc::vec::Vec;
use core::fmt;

/// What a guest may do with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    Ram,
    /// Readable and executable.
    Rom,
}

/// A run of guest memory with one run of host memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub start: Gpa,
    /// Bytes, a multiple of 4 KiB.
    pub len: u64,
    pub backing: Hpa,
    pub kind: SlotKind,
}

impl Slot {
    fn end(&self) -> u64 {
        self.start.0.saturating_add(self.len)
    }
}

/// Two slots claim the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap(pub Slot, pub Slot);

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "guest memory {:#x}-{:#x} overlaps {:#x}-{:#x}",
            self.0.start.0,
            self.0.end(),
            self.1.start.0,
            self.1.end()
        )
    }
}

impl core::error::Error for Overlap {}

/// A page of guest memory that one entry of the EPT can map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub gpa: Gpa,
    pub hpa: Hpa,
    /// 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    pub kind: SlotKind,
}

/// The memory of a guest: a short sorted list that does not change.
#[derive(Clone, Debug, Default)]
pub struct Slots(Vec<Slot>);

impl Slots {
    /// The slots in any order.
    ///
    /// # Errors
    /// The first two that overlap.
    pub fn new(mut slots: Vec<Slot>) -> Result<Self, Overlap> {
        slots.retain(|slot| slot.len > 0);
        slots.sort_unstable_by_key(|slot| slot.start);
        for pair in slots.windows(2) {
            if let [low, high] = pair
                && low.end() > high.start.0
            {
                return Err(Overlap(*low, *high));
            }
        }
        Ok(Self(slots))
    }

    /// The slot that holds `gpa`.
    #[inline]
    pub fn find(&self, gpa: Gpa) -> Option<&Slot> {
        self.0
            .iter()
            .find(|slot| gpa >= slot.start && gpa.0 < slot.end())
    }

    /// All slots, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter()
    }

    /// The largest page of at most `largest` bytes around `gpa` that lies in
    /// one slot and is aligned on both sides.
    pub fn mapping(&self, gpa: Gpa, largest: u64) -> Option<Mapping> {
        let slot = self.find(gpa)?;
        [1 << 30, 1 << 21, 1 << 12]
            .into_iter()
            .filter(|size| *size <= largest)
            .find_map(|size| {
                let start = gpa.align_down(size);
                let offset = start.0.checked_sub(slot.start.0)?;
                let hpa = slot.backing.checked_add(offset)?;
                let inside = start.0.checked_add(size)? <= slot.end();
                (inside && hpa.is_aligned(size)).then_some(Mapping {
                    gpa: start,
                    hpa,
                    size,
                    kind: slot.kind,
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(start: u64, len: u64, backing: u64) -> Slot {
        Slot {
            start: Gpa(start),
            len,
            backing: Hpa(backing),
            kind: SlotKind::Ram,
        }
    }

    #[test]
    fn an_overlap_names_both_ranges() {
        let overlap =
            Slots::new(alloc::vec![slot(0x8000, 0x2000, 0), slot(0, 0x9000, 0)]).unwrap_err();
        assert_eq!(
            overlap.to_string(),
            "guest memory 0x0-0x9000 overlaps 0x8000-0xa000"
        );
    }

    proptest! {
        /// No page that would do is larger than the one that is given.
        #[test]
        fn a_mapping_is_the_largest_that_fits(
            start in 0..1u64 << 20, pages in 1..1u64 << 20, shift in 0..22u32, steps in 0..64u64,
            at in any::<prop::sample::Index>(),
        ) {
            // Host and guest are apart by a multiple of a power of two, so that each size occurs.
            let slot = slot(start << 12, pages << 12, (start + (steps << shift)) << 12);
            let slots = Slots::new(vec![slot]).unwrap();
            let gpa = Gpa(slot.start.0 + ((at.index(pages as usize) as u64) << 12));
            let given = slots.mapping(gpa, 1 << 30).unwrap();
            for size in [1u64 << 21, 1 << 30] {
                let page = gpa.0 - gpa.0 % size;
                let apart = slot.backing.0 - slot.start.0;
                let fits = page >= slot.start.0
                    && page + size <= slot.start.0 + slot.len
                    && apart.is_multiple_of(size);
                prop_assert_eq!(fits && size > given.size, false, "{:?} in {:?}", given, slot);
            }
        }

        /// An address is found in the slot that claims it, and nowhere else.
        #[test]
        fn what_no_slot_claims_is_not_found(
            gaps in prop::collection::vec((0..4u64, 1..4u64), 1..8), page in 0..64u64,
        ) {
            let mut next = 0;
            let mut list: Vec<Slot> = gaps.iter().map(|&(gap, pages)| {
                let start = next + gap;
                next = start + pages;
                slot(start << 12, pages << 12, 0)
            }).collect();
            list.reverse();
            let claims = |gpa: u64| {
                list.iter().find(|slot| (slot.start.0..slot.start.0 + slot.len).contains(&gpa))
            };
            let slots = Slots::new(list.clone()).unwrap();
            for gpa in [page << 12, (page << 12) + 4095] {
                prop_assert_eq!(slots.find(Gpa(gpa)), claims(gpa));
                prop_assert_eq!(slots.mapping(Gpa(gpa), 1 << 30).is_some(), claims(gpa).is_some());
            }
        }

        #[test]
        fn a_mapping_stays_in_its_slot(
            start in 0..1u64 << 20, pages in 1..1u64 << 19, backing in 0..1u64 << 24,
            offset: u64, largest in prop::sample::select(vec![1u64 << 12, 1 << 21, 1 << 30]),
        ) {
            let slot = slot(start << 12, pages << 12, backing << 12);
            let slots = Slots::new(alloc::vec![slot]).unwrap();
            let gpa = Gpa(slot.start.0 + offset % slot.len);
            let mapping = slots.mapping(gpa, largest).unwrap();
            prop_assert!(mapping.size <= largest);
            prop_assert!(mapping.gpa.is_aligned(mapping.size) && mapping.hpa.is_aligned(mapping.size));
            prop_assert!(mapping.gpa <= gpa && gpa.0 < mapping.gpa.0 + mapping.size);
            prop_assert!(mapping.gpa >= slot.start && mapping.gpa.0 + mapping.size <= slot.end());
            prop_assert_eq!(mapping.hpa.0 - slot.backing.0, mapping.gpa.0 - slot.start.0);
        }
    }
}
