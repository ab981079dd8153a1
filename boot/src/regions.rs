//! Physical memory as the hypervisor is told of it.

use alloc::vec::Vec;
use core::ops::Range;
use vireo_handoff::{MemoryKind, MemoryRegion};

/// The hypervisor uses no memory below this (`host::memory::frames`).
const LOWEST: u64 = 1 << 20;

/// Collects the firmware's memory map around the regions that the loader has filled.
#[derive(Debug)]
pub struct Regions {
    list: Vec<MemoryRegion>,
    /// The first of `list` are the loader's, sorted and disjoint.
    kept: usize,
}

impl Regions {
    /// A map with only the regions `kept`, which win over what the firmware
    /// calls the same memory. At most `room` more can be added; nothing is
    /// allocated later.
    pub fn new(mut kept: Vec<MemoryRegion>, room: usize) -> Self {
        kept.sort_unstable_by_key(|region| region.start);
        kept.reserve_exact(room);
        Self {
            kept: kept.len(),
            list: kept,
        }
    }

    /// The most regions that there can be.
    pub fn capacity(&self) -> usize {
        self.list.capacity()
    }

    /// Adds what no kept region covers of `region`. A map too fragmented for
    /// the room loses its tail, which then stays unused.
    pub fn add(&mut self, region: MemoryRegion) {
        let (mut start, end) = (region.start, end(&region));
        for index in 0..self.kept {
            let kept = self.list[index];
            if self::end(&kept) > start && kept.start < end {
                self.push(start..kept.start, region.kind);
                start = self::end(&kept);
            }
        }
        self.push(start..end, region.kind);
    }

    fn push(&mut self, range: Range<u64>, kind: MemoryKind) {
        if range.is_empty() {
            return;
        }
        if let Some(last) = self.list[self.kept..].last_mut()
            && last.kind == kind
            && end(last) == range.start
        {
            last.len += range.end - range.start;
        } else if self.list.len() < self.list.capacity() {
            self.list.push(MemoryRegion {
                start: range.start,
                len: range.end - range.start,
                kind,
            });
        }
    }

    /// The regions, sorted and disjoint as far as the firmware's were.
    pub fn finish(mut self) -> Vec<MemoryRegion> {
        self.list.sort_unstable_by_key(|region| region.start);
        self.list
    }
}

fn end(region: &MemoryRegion) -> u64 {
    region.start.saturating_add(region.len)
}

/// The ranges of `map` that are memory and no device, sorted, neighbours merged.
pub fn ram(map: &[MemoryRegion]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = map
        .iter()
        .filter(|region| !matches!(region.kind, MemoryKind::Mmio | MemoryKind::Reserved))
        .map(|region| region.start..end(region))
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Whether blocks of these `sizes` find room in the free memory of `map`, each
/// contiguous and aligned to `align` bytes, placed as the hypervisor's
/// allocator does: in turn, each in the smallest run that holds it.
///
/// # Errors
/// The index of the first that does not, and the size in bytes of the largest
/// that would.
pub fn fit(map: &[MemoryRegion], sizes: &[u64], align: u64) -> Result<(), (usize, u64)> {
    let aligned = |range: &Range<u64>| {
        let start = range
            .start
            .max(LOWEST)
            .checked_next_multiple_of(align)
            .unwrap_or(u64::MAX);
        start..range.end.max(start)
    };
    let mut free: Vec<Range<u64>> = ram(&map
        .iter()
        .filter(|region| region.kind == MemoryKind::Usable)
        .copied()
        .collect::<Vec<_>>());
    for (index, &size) in sizes.iter().enumerate() {
        let rooms = || free.iter().map(aligned);
        let best = rooms()
            .enumerate()
            .filter(|(_, room)| room.end - room.start >= size)
            .min_by_key(|(run, _)| free[*run].end - free[*run].start);
        let Some((run, room)) = best else {
            let largest = rooms().map(|room| room.end - room.start).max();
            return Err((index, largest.unwrap_or(0)));
        };
        free.push(room.start + size..free[run].end);
        free[run].end = room.start;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    const MIB: u64 = 1 << 20;

    fn region(start: u64, end: u64, kind: MemoryKind) -> MemoryRegion {
        MemoryRegion {
            start,
            len: end - start,
            kind,
        }
    }

    fn usable(start: u64, end: u64) -> MemoryRegion {
        region(start, end, MemoryKind::Usable)
    }

    #[test]
    fn what_the_loader_keeps_is_cut_out_of_the_firmwares_map() {
        let kept = vec![
            region(50, 60, MemoryKind::File),
            region(20, 30, MemoryKind::Kernel),
        ];
        let mut regions = Regions::new(kept, 8);
        regions.add(usable(0, 25));
        regions.add(usable(25, 40));
        regions.add(region(40, 45, MemoryKind::Reserved));
        regions.add(usable(45, 100));
        regions.add(usable(100, 110));
        assert_eq!(
            regions.finish(),
            [
                usable(0, 20),
                region(20, 30, MemoryKind::Kernel),
                usable(30, 40),
                region(40, 45, MemoryKind::Reserved),
                usable(45, 50),
                region(50, 60, MemoryKind::File),
                usable(60, 110),
            ]
        );
    }

    #[test]
    fn a_full_map_keeps_what_the_loader_has_filled() {
        let mut regions = Regions::new(vec![region(50, 60, MemoryKind::Kernel)], 1);
        regions.add(usable(0, 10));
        regions.add(usable(20, 100));
        let expected = [usable(0, 10), region(50, 60, MemoryKind::Kernel)];
        assert_eq!(regions.finish(), expected);
    }

    proptest! {
        #[test]
        fn nothing_kept_is_ever_usable(
            kept in prop::collection::vec(0u64..50, 0..4),
            firmware in prop::collection::vec(1u64..20, 1..10),
        ) {
            let mut starts = kept;
            starts.sort_unstable();
            starts.dedup_by(|b, a| *b < *a + 3);
            let kept: Vec<_> = starts.iter().map(|&start| region(start, start + 3, MemoryKind::Kernel)).collect();
            let mut regions = Regions::new(kept.clone(), 100);
            let mut at = 0;
            for len in firmware {
                regions.add(usable(at, at + len));
                at += len;
            }
            let map = regions.finish();
            prop_assert!(map.windows(2).all(|pair| end(&pair[0]) <= pair[1].start));
            for byte in 0..at {
                let kind = map.iter().find(|region| (region.start..end(region)).contains(&byte)).map(|region| region.kind);
                let is_kept = kept.iter().any(|region| (region.start..end(region)).contains(&byte));
                prop_assert_eq!(kind, Some(if is_kept { MemoryKind::Kernel } else { MemoryKind::Usable }));
            }
        }
    }

    #[test]
    fn devices_and_reserved_ranges_are_no_memory() {
        let map = [
            usable(0, 10),
            region(10, 20, MemoryKind::RuntimeData),
            region(20, 30, MemoryKind::Reserved),
            region(30, 40, MemoryKind::Mmio),
            region(40, 50, MemoryKind::AcpiNvs),
        ];
        assert_eq!(ram(&map), [0..20, 40..50]);
    }

    #[test]
    fn guests_fit_or_the_first_that_does_not_is_named() {
        let map = [usable(0, 100 * MIB), usable(4096 * MIB, 4200 * MIB)];
        let fit = |sizes: &[u64]| fit(&map, sizes, 2 * MIB);
        assert_eq!(fit(&[104 * MIB, 98 * MIB]), Ok(()));
        assert_eq!(fit(&[106 * MIB]), Err((0, 104 * MIB)));
        assert_eq!(fit(&[50 * MIB, 48 * MIB, 104 * MIB, 2 * MIB]), Err((3, 0)));
        assert_eq!(super::fit(&[], &[2 * MIB], 2 * MIB), Err((0, 0)));
    }
}
