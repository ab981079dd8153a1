//! Memory slots: which guest addresses are memory, and where it is.

use crate::addr::{Gpa, Hpa};
use alloc::vec::Vec;
use core::cmp::Reverse;
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

    /// Bytes from the start of the slot to `gpa`; `None` where that is not in it.
    #[inline(always)]
    pub fn offset_of(&self, gpa: Gpa) -> Option<u64> {
        gpa.0
            .checked_sub(self.start.0)
            .filter(|offset| *offset < self.len)
    }

    /// The page of `size` bytes around `gpa`, if it lies in the slot and is aligned on
    /// both sides: where it is in the guest and in the host.
    #[inline(always)]
    pub fn page(&self, gpa: Gpa, size: u64) -> Option<(Gpa, Hpa)> {
        let gpa = gpa.align_down(size);
        let offset = gpa.0.checked_sub(self.start.0)?;
        let hpa = self.backing.wrapping_add(offset);
        let inside = offset < self.len && self.len - offset >= size;
        (inside && hpa.is_aligned(size)).then_some((gpa, hpa))
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

/// The memory of a guest: a short list that does not change. The largest slot is first, since
/// it is looked for most often.
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
        slots.sort_by_key(|slot| Reverse(slot.len));
        Ok(Self(slots))
    }

    /// The slot that holds `gpa`.
    #[inline]
    pub fn find(&self, gpa: Gpa) -> Option<&Slot> {
        self.0.iter().find(|slot| slot.offset_of(gpa).is_some())
    }

    /// All slots.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter()
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
        /// A page of each size is given where it lies in the slot and is aligned, and only there.
        #[test]
        fn a_page_is_what_fits(
            start in 0..1u64 << 20, pages in 1..1u64 << 20, shift in 0..22u32, steps in 0..64u64,
            at in any::<prop::sample::Index>(),
        ) {
            // Host and guest are apart by a multiple of a power of two, so that each size occurs.
            let slot = slot(start << 12, pages << 12, (start + (steps << shift)) << 12);
            let gpa = Gpa(slot.start.0 + ((at.index(pages as usize) as u64) << 12) + 123);
            let apart = slot.backing.0 - slot.start.0;
            for size in [1u64 << 12, 1 << 21, 1 << 30] {
                let page = gpa.0 - gpa.0 % size;
                let fits = page >= slot.start.0
                    && page + size <= slot.start.0 + slot.len
                    && apart.is_multiple_of(size);
                let expected = fits.then_some((Gpa(page), Hpa(page + apart)));
                prop_assert_eq!(slot.page(gpa, size), expected, "{:?}", slot);
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
            }
        }
    }
}
