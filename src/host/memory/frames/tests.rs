use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn region(start: u64, len: u64, kind: MemoryKind) -> MemoryRegion {
    MemoryRegion { start, len, kind }
}

fn usable(start: u64, len: u64) -> MemoryRegion {
    region(start, len, MemoryKind::Usable)
}

#[test]
fn the_first_megabyte_is_left_alone() {
    let mut frames =
        FrameAllocator::from_regions(&[usable(0, 0xa_0000), usable(0x10_0000 - 4096, 8192)]);
    assert_eq!(frames.total(), 1);
    assert_eq!(
        frames.allocate(1, ALIGN_4K),
        Some(FrameRange {
            start: Hpa(0x10_0000),
            count: 1
        })
    );
    assert_eq!(frames.allocate(1, ALIGN_4K), None);
}

#[test]
fn small_holes_are_used_before_large_ones() {
    let mut frames =
        FrameAllocator::from_regions(&[usable(2 * MIB, 64 * MIB), usable(100 * MIB, MIB)]);
    assert_eq!(frames.allocate(1, ALIGN_4K).unwrap().start, Hpa(100 * MIB));
    assert_eq!(frames.allocate(512, ALIGN_2M).unwrap().start, Hpa(2 * MIB));
}

#[test]
fn nonsense_is_refused() {
    let mut frames = FrameAllocator::from_regions(&[usable(MIB, MIB)]);
    assert_eq!(frames.allocate(0, ALIGN_4K), None);
    assert_eq!(frames.allocate(u64::MAX, ALIGN_4K), None);
    assert_eq!(frames.allocate(1, 3 * 4096), None);
    assert_eq!(frames.allocate(1, 1 << 63), None);
    let range = |start, count| FrameRange {
        start: Hpa(start),
        count,
    };
    assert_eq!(frames.free(range(MIB, 1)), Err(FrameError::AlreadyFree));
    assert_eq!(frames.free(range(MIB, 0)), Err(FrameError::NotUsable));
    assert_eq!(frames.free(range(8 * MIB, 1)), Err(FrameError::NotUsable));
    assert_eq!(
        frames.free(range(u64::MAX, u64::MAX)),
        Err(FrameError::NotUsable)
    );
    let all = frames.allocate(256, ALIGN_4K).unwrap();
    assert_eq!(frames.free(range(MIB + 5, 1)), Err(FrameError::NotUsable));
    assert_eq!(frames.free(range(MIB, 257)), Err(FrameError::NotUsable));
    assert_eq!(frames.free(all), Ok(()));
}

fn regions() -> impl Strategy<Value = Vec<MemoryRegion>> {
    let kind = prop_oneof![
        3 => Just(MemoryKind::Usable),
        1 => Just(MemoryKind::Reserved),
        1 => Just(MemoryKind::RuntimeData),
    ];
    prop::collection::vec((0u64..2048, 0u64..700, kind), 1..8).prop_map(|regions| {
        regions
            .into_iter()
            .map(|(start, pages, kind)| region(start * 4096, pages * 4096, kind))
            .collect()
    })
}

fn covers(region: &MemoryRegion, frame: u64) -> bool {
    region.start <= frame && frame < region.start + region.len
}

fn check_lists(frames: &FrameAllocator) {
    for list in [&frames.free, &frames.usable] {
        assert!(list.iter().all(|run| run.start < run.end));
        assert!(
            list.windows(2).all(|pair| pair[0].end < pair[1].start),
            "{list:?}"
        );
    }
}

#[test]
fn adopted_memory_joins_what_is_there_and_is_never_taken_twice() {
    let mut frames = FrameAllocator::from_regions(&[usable(1 << 20, 1 << 20)]);
    let behind = FrameRange {
        start: Hpa(2 << 20),
        count: 256,
    };
    frames.adopt(behind).unwrap();
    assert_eq!((frames.total(), frames.free_count()), (512, 512));
    assert!(frames.allocate(512, ALIGN_4K).is_some());
    assert_eq!(frames.adopt(behind), Err(FrameError::AlreadyFree));
    assert_eq!((frames.total(), frames.free_count()), (512, 0));
}

proptest! {
    #[test]
    fn hands_out_usable_memory_once_and_takes_all_of_it_back(
        regions in regions(),
        operations in prop::collection::vec((any::<bool>(), 1u64..600, 0u32..11, any::<prop::sample::Index>()), 0..60),
    ) {
        let mut frames = FrameAllocator::from_regions(&regions);
        check_lists(&frames);
        let pristine = frames.usable.clone();
        let mut held: Vec<FrameRange> = Vec::new();
        for (release, count, shift, index) in operations {
            if release && !held.is_empty() {
                let range = held.swap_remove(index.index(held.len()));
                prop_assert_eq!(frames.free(range), Ok(()));
                prop_assert_eq!(frames.free(range), Err(FrameError::AlreadyFree));
            } else if let Some(range) = frames.allocate(count, ALIGN_4K << shift) {
                prop_assert_eq!(range.count, count);
                prop_assert!(range.start.is_aligned(ALIGN_4K << shift));
                prop_assert!(held.iter().all(|other| range.end() <= other.start || other.end() <= range.start));
                for frame in (range.start.0..range.end().0).step_by(4096) {
                    prop_assert!(frame >= LOWEST);
                    prop_assert!(regions.iter().any(|r| r.kind == MemoryKind::Usable && covers(r, frame)));
                    prop_assert!(!regions.iter().any(|r| r.kind != MemoryKind::Usable && covers(r, frame)));
                }
                held.push(range);
            }
            check_lists(&frames);
            let out: u64 = held.iter().map(|range| range.count).sum();
            prop_assert_eq!(frames.free_count() + out, frames.total());
        }
        for range in held {
            prop_assert_eq!(frames.free(range), Ok(()));
        }
        prop_assert_eq!(frames.free, pristine);
    }

    #[test]
    fn fails_only_when_no_place_exists(regions in regions(), count in 1u64..600, shift in 0u32..11) {
        let mut frames = FrameAllocator::from_regions(&regions);
        let align = ALIGN_4K << shift;
        let possible = frames.free.iter().any(|run| {
            (run.start..run.end).step_by(4096).any(|start| start % align == 0 && start + count * 4096 <= run.end)
        });
        prop_assert_eq!(frames.allocate(count, align).is_some(), possible);
    }
}
