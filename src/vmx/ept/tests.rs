use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BOCHS: EptVpidCapabilities = EptVpidCapabilities(0x0f01_0633_4141);
const ALL: Permissions = Permissions::all();
const GIB: u64 = 1 << 30;
const MIB2: u64 = 1 << 21;
use MemoryType::WriteBack as WB;
use PageSize::{Size1G, Size2M, Size4K};

/// Memory that remembers every write, and every frame that was freed.
#[derive(Default)]
struct Recorder {
    entries: BTreeMap<u64, u64>,
    writes: Vec<(u64, u64)>,
    used: BTreeSet<u64>,
    freed: Vec<u64>,
    next: u64,
    limit: Option<usize>,
}

impl TableMemory for Recorder {
    fn allocate(&mut self) -> Option<Hpa> {
        if self.limit.is_some_and(|limit| self.used.len() >= limit) {
            return None;
        }
        self.next += PAGE_SIZE;
        self.used.insert(self.next);
        Some(Hpa(self.next))
    }
    fn free(&mut self, frame: Hpa) {
        assert!(self.used.remove(&frame.0), "{frame} freed twice");
        self.freed.push(frame.0);
    }
    fn read(&self, entry: Hpa) -> u64 {
        assert!(
            self.used.contains(&entry.align_down(PAGE_SIZE).0),
            "read of a free frame"
        );
        self.entries.get(&entry.0).copied().unwrap_or(0)
    }
    fn write(&mut self, entry: Hpa, value: u64) {
        assert!(
            self.used.contains(&entry.align_down(PAGE_SIZE).0),
            "write to a free frame"
        );
        self.entries.insert(entry.0, value);
        self.writes.push((entry.0, value));
    }
}

/// What a CPU finds: a walk written anew from SDM vol. 3, 29.3.2, with leaf bits as they are.
fn walk(entries: &BTreeMap<u64, u64>, root: u64, gpa: u64) -> Option<(u64, u64)> {
    let mut table = root;
    for shift in [39, 30, 21, 12] {
        let entry = entries
            .get(&(table + (gpa >> shift) % 512 * 8))
            .copied()
            .unwrap_or(0);
        if entry & 7 == 0 {
            return None;
        }
        if shift == 12 || entry & 0x80 != 0 {
            let offset = (1u64 << shift) - 1;
            assert_eq!(entry & 0x000f_ffff_ffff_f000 & offset, 0, "reserved bits");
            return Some((entry & 0x000f_ffff_ffff_f000 | gpa & offset, entry & 0x3f));
        }
        assert_eq!(entry & 0xff8, 0, "reserved bits of a table reference");
        table = entry & 0x000f_ffff_ffff_f000;
    }
    None
}

fn ept() -> Ept<Recorder> {
    Ept::new(Recorder::default(), BOCHS, 39).unwrap()
}

/// Runs `change`, then replays its writes one by one: at each step, each of
/// `probes` must translate as before all of them or as after all of them.
fn replay<T>(
    ept: &mut Ept<Recorder>,
    probes: &[u64],
    change: impl FnOnce(&mut Ept<Recorder>) -> T,
) -> T {
    let root = ept.root.base.0;
    let mut entries = ept.memory.entries.clone();
    ept.memory.writes.clear();
    ept.memory.freed.clear();
    let outcome = change(ept);
    assert!(
        ept.memory.freed.is_empty(),
        "a frame was freed before INVEPT"
    );
    let old: Vec<_> = probes
        .iter()
        .map(|gpa| walk(&entries, root, *gpa))
        .collect();
    let new: Vec<_> = probes
        .iter()
        .map(|gpa| walk(&ept.memory.entries, root, *gpa))
        .collect();
    for (address, value) in &ept.memory.writes {
        entries.insert(*address, *value);
        for (index, gpa) in probes.iter().enumerate() {
            let now = walk(&entries, root, *gpa);
            assert!(
                now == old[index] || now == new[index],
                "{gpa:#x}: {now:x?} on the way"
            );
        }
    }
    outcome
}

fn frees_everything(mut ept: Ept<Recorder>) -> bool {
    ept.free();
    let everything = ept.memory.used.is_empty();
    std::mem::forget(ept);
    everything
}

#[test]
fn each_size_translates_with_its_offset() {
    let mut ept = ept();
    let sizes = [
        (Size4K, 0x1000, 0x7000),
        (Size2M, MIB2, 5 * MIB2),
        (Size1G, GIB, 3 * GIB),
    ];
    for (size, gpa, hpa) in sizes {
        let outcome = ept.map(Gpa(gpa), Hpa(hpa), size, ALL, WB);
        assert_eq!(outcome, Ok(Invalidation::NotNeeded));
        let last = size.bytes() - 1;
        let found = ept.translate(Gpa(gpa + last)).unwrap();
        assert_eq!((found.hpa, found.size), (Hpa(hpa + last), size));
        assert_eq!((found.permissions, found.memory_type), (ALL, Some(WB)));
    }
    assert_eq!(ept.translate(Gpa(0)), None);
    assert_eq!(ept.translate(Gpa(1 << 48)), None);
}

#[test]
fn entries_have_the_bits_of_the_manual() {
    let mut ept = ept();
    let _ = ept
        .map(
            Gpa(0),
            Hpa(GIB),
            Size1G,
            Permissions::READ,
            MemoryType::Uncacheable,
        )
        .unwrap();
    let _ = ept.map(Gpa(GIB), Hpa(0x5000), Size4K, ALL, WB).unwrap();
    let written: Vec<u64> = ept.memory.writes.iter().map(|write| write.1).collect();
    assert_eq!(written, [0x2007, 0x4000_0081, 0x3007, 0x4007, 0x5037]);
    assert_eq!(ept.pointer().map(EptPointer::bits), Ok(0x1000 | 3 << 3 | 6));
}

#[test]
fn a_large_page_becomes_small_ones_for_code() {
    let data = Permissions::READ | Permissions::WRITE;
    let mut ept = ept();
    let _ = ept.map(Gpa(0), Hpa(GIB), Size1G, data, WB).unwrap();
    assert_eq!(
        ept.protect_small(Gpa(0x40_1234), ALL),
        Ok(Invalidation::Needed)
    );
    for (at, size, permissions) in [
        (0x3f_ffff, Size2M, data),
        (0x40_0000, Size4K, ALL),
        (0x5f_ffff, Size4K, ALL),
        (0x60_0000, Size2M, data),
    ] {
        let found = ept.translate(Gpa(at)).unwrap();
        assert_eq!((found.size, found.permissions), (size, permissions));
        assert_eq!(found.hpa, Hpa(GIB + at));
    }
}

#[test]
fn the_pointer_follows_the_capabilities() {
    let pointer = |bits| EptPointer::new(Hpa(0x1000), EptVpidCapabilities(bits));
    assert_eq!(pointer(1 << 6 | 1 << 14).map(EptPointer::bits), Ok(0x101e));
    assert_eq!(pointer(1 << 6 | 1 << 8).map(EptPointer::bits), Ok(0x1018));
    assert_eq!(pointer(1 << 6), Err(EptError::Unsupported));
    assert_eq!(pointer(1 << 14), Err(EptError::Unsupported));
    assert_eq!(
        EptPointer::new(Hpa(0x800), BOCHS),
        Err(EptError::Misaligned)
    );
}

#[test]
fn what_the_cpu_cannot_do_is_refused() {
    let mut small = Ept::new(Recorder::default(), EptVpidCapabilities(0x4040), 39).unwrap();
    let refused = small.map(Gpa(0), Hpa(0), Size2M, ALL, WB);
    assert_eq!(refused, Err(EptError::PageSize(Size2M)));
    let execute = Permissions::EXECUTE;
    let refused = small.map(Gpa(0), Hpa(0), Size4K, execute, WB);
    assert_eq!(refused, Err(EptError::Permissions(execute)));
    let mut ept = ept();
    assert!(ept.map(Gpa(0), Hpa(0), Size4K, execute, WB).is_ok());
    for bad in [
        Permissions::empty(),
        Permissions::WRITE,
        Permissions::WRITE | execute,
    ] {
        let refused = ept.map(Gpa(0), Hpa(0), Size4K, bad, WB);
        assert_eq!(refused, Err(EptError::Permissions(bad)));
        assert_eq!(
            ept.protect(Gpa(0), 4096, bad),
            Err(EptError::Permissions(bad))
        );
    }
    for (gpa, hpa, error) in [
        (0x1000, 0, EptError::Misaligned),
        (0, 0x1000, EptError::Misaligned),
        (1 << 48, 0, EptError::OutOfRange),
        (0, 1 << 39, EptError::OutOfRange),
    ] {
        assert_eq!(ept.map(Gpa(gpa), Hpa(hpa), Size2M, ALL, WB), Err(error));
    }
    assert_eq!(ept.unmap(Gpa(0), 0x800), Err(EptError::Misaligned));
    assert_eq!(
        ept.unmap(Gpa(0), (1 << 48) + 0x1000),
        Err(EptError::OutOfRange)
    );
    assert_eq!(ept.unmap(Gpa(!0xfff), 0x2000), Err(EptError::OutOfRange));
}

#[test]
fn only_what_was_tightened_or_replaced_needs_invept() {
    use Invalidation::{Needed, NotNeeded};
    let mut ept = ept();
    let rx = Permissions::READ | Permissions::EXECUTE;
    let page = |ept: &mut Ept<Recorder>, hpa, permissions, kind| {
        ept.map(Gpa(0), Hpa(hpa), Size4K, permissions, kind)
            .unwrap()
    };
    assert_eq!(page(&mut ept, 0x1000, rx, WB), NotNeeded);
    assert_eq!(page(&mut ept, 0x1000, rx, WB), NotNeeded);
    assert_eq!(page(&mut ept, 0x1000, ALL, WB), NotNeeded);
    assert_eq!(page(&mut ept, 0x1000, rx, WB), Needed);
    assert_eq!(page(&mut ept, 0x2000, rx, WB), Needed);
    assert_eq!(page(&mut ept, 0x2000, rx, MemoryType::Uncacheable), Needed);
    assert_eq!(ept.protect(Gpa(0), 4096, ALL), Ok(NotNeeded));
    assert_eq!(ept.protect(Gpa(0), 4096, Permissions::READ), Ok(Needed));
    assert_eq!(ept.unmap(Gpa(0), 4096), Ok(Needed));
    assert_eq!(ept.unmap(Gpa(0), 4096), Ok(NotNeeded));
    assert_eq!(ept.unmap(Gpa(0), 1 << 48), Ok(NotNeeded));
}

#[test]
fn a_split_keeps_every_other_page_through_every_write() {
    let mut ept = ept();
    let _ = ept.map(Gpa(GIB), Hpa(2 * GIB), Size1G, ALL, WB).unwrap();
    let probes = [
        0,
        GIB,
        GIB + 0xfff,
        GIB + 0x1000,
        GIB + MIB2,
        2 * GIB - 1,
        2 * GIB,
    ];
    let outcome = replay(&mut ept, &probes, |ept| {
        ept.unmap(Gpa(GIB + 0x1000), 0x1000)
    });
    assert_eq!(outcome, Ok(Invalidation::Needed));
    assert_eq!(ept.translate(Gpa(GIB + 0x1000)), None);
    assert_eq!(ept.translate(Gpa(GIB + 0xfff)).unwrap().size, Size4K);
    assert_eq!(ept.translate(Gpa(GIB + MIB2)).unwrap().size, Size2M);
    assert_eq!(
        ept.translate(Gpa(2 * GIB - 1)).unwrap().hpa,
        Hpa(3 * GIB - 1)
    );
}

#[test]
fn replaced_tables_are_freed_after_invept_only() {
    let mut ept = ept();
    let _ = ept.map(Gpa(0x3000), Hpa(0x9000), Size4K, ALL, WB).unwrap();
    let used = ept.memory.used.len();
    let outcome = replay(&mut ept, &[0, 0x3000, MIB2], |ept| {
        ept.map(Gpa(0), Hpa(GIB), Size1G, ALL, WB)
    });
    assert_eq!(outcome, Ok(Invalidation::Needed));
    assert_eq!(ept.memory.used.len(), used);
    ept.release_retired();
    assert_eq!(ept.memory.used.len(), used - 2);
    assert!(frees_everything(ept));
}

#[test]
fn too_many_retired_tables_want_a_flush() {
    let mut ept = ept();
    for index in 0..=RETIRED as u64 {
        let _ = ept.map(Gpa(index * MIB2), Hpa(0), Size4K, ALL, WB).unwrap();
    }
    let large =
        |ept: &mut Ept<Recorder>, index| ept.map(Gpa(index * MIB2), Hpa(0), Size2M, ALL, WB);
    for index in 0..RETIRED as u64 {
        assert_eq!(large(&mut ept, index), Ok(Invalidation::Needed));
    }
    assert_eq!(large(&mut ept, RETIRED as u64), Err(EptError::FlushFirst));
    ept.release_retired();
    assert_eq!(large(&mut ept, RETIRED as u64), Ok(Invalidation::Needed));
}

#[test]
fn running_out_of_frames_leaves_the_mapping_and_leaks_nothing() {
    let memory = Recorder {
        limit: Some(3),
        ..Recorder::default()
    };
    let mut ept = Ept::new(memory, BOCHS, 39).unwrap();
    let _ = ept.map(Gpa(0), Hpa(GIB), Size1G, ALL, WB).unwrap();
    assert_eq!(ept.unmap(Gpa(0), 0x1000), Err(EptError::OutOfFrames));
    assert_eq!(ept.translate(Gpa(0x123)).unwrap().hpa, Hpa(GIB + 0x123));
    assert!(frees_everything(ept));
}

#[test]
fn a_page_is_filled_in_only_where_nothing_else_has_to_change() {
    const LIMIT: u64 = 1 << 39;
    let mut ept = ept();
    let fill =
        |ept: &mut Ept<Recorder>, gpa, size| ept.fill(Gpa(gpa), Hpa(gpa % LIMIT), size, ALL, WB);
    let map = |ept: &mut Ept<Recorder>, gpa, size| {
        assert_eq!(
            ept.map(Gpa(gpa), Hpa(gpa % LIMIT), size, ALL, WB),
            Ok(Invalidation::NotNeeded)
        );
    };
    for (size, first) in [(Size4K, 0), (Size2M, GIB), (Size1G, 1 << 39)] {
        let next = first + size.bytes();
        assert!(!fill(&mut ept, next, size), "{size:?}: a table is missing");
        map(&mut ept, first, size);
        let written = ept.memory.writes.len();
        assert!(!fill(&mut ept, first, size), "{size:?}: a page is there");
        assert!(
            !fill(&mut ept, next + 1, size),
            "{size:?}: not an address of a page"
        );
        assert_eq!(ept.memory.writes.len(), written);
        assert!(fill(&mut ept, next, size), "{size:?}");
        assert_eq!(ept.memory.writes.len(), written + 1);
        let found = ept.translate(Gpa(next)).unwrap();
        assert_eq!((found.hpa, found.size), (Hpa(next % LIMIT), size));
    }
    assert!(!fill(&mut ept, 0, Size2M), "a table is there");
    assert!(!fill(&mut ept, GIB, Size4K), "a larger page is there");
    assert!(!fill(&mut ept, 1 << 48, Size1G), "beyond all addresses");
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, PageSize, Permissions),
    Unmap(u64, u64),
    Protect(u64, u64, Permissions),
}

fn any_permissions() -> impl Strategy<Value = Permissions> {
    prop::sample::select(vec![1u64, 3, 4, 5, 7]).prop_map(Permissions::from_bits_truncate)
}

fn any_step() -> impl Strategy<Value = Step> {
    // A few pages on each side of a 2-MiB and of a 1-GiB border.
    let page = prop_oneof![508u64..516, 262_140u64..262_148].boxed();
    let size = prop::sample::select(PageSize::LARGEST_FIRST.to_vec());
    let map = (page.clone(), 0u64..512, size, any_permissions()).prop_map(
        |(page, frame, size, permissions)| {
            let gpa = Gpa(page << 12).align_down(size.bytes()).0;
            Step::Map(
                gpa,
                (frame << 30 | page << 12) & !(size.bytes() - 1),
                size,
                permissions,
            )
        },
    );
    let length = prop_oneof![1u64..6, Just(512u64), Just(600u64), Just(262_144u64)].boxed();
    let unmap = (page.clone(), length.clone()).prop_map(|(p, n)| Step::Unmap(p << 12, n << 12));
    let protect = (page, length, any_permissions())
        .prop_map(|(page, count, permissions)| Step::Protect(page << 12, count << 12, permissions));
    prop_oneof![3 => map, 1 => unmap, 1 => protect]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The tables against a list of (start, end, offset, permissions) looked up
    /// from the latest backwards, with each write replayed.
    #[test]
    fn tables_agree_with_a_list_of_requests(
        steps in prop::collection::vec(any_step(), 1..10), may_fill: bool,
    ) {
        let mut ept = ept();
        let probes: Vec<u64> =
            [0, 1, 508, 510, 511, 512, 513, 515, 516, 520, 1023, 1024, 262_139, 262_140, 262_143,
             262_144, 262_145, 262_656, 524_287, 524_288].iter().map(|page| page << 12).collect();
        let mut model: BTreeMap<u64, (u64, Permissions)> = BTreeMap::new();
        for step in steps {
            let before = model.clone();
            for gpa in &probes {
                match step {
                    Step::Map(start, hpa, size, permissions)
                        if (start..start + size.bytes()).contains(gpa) =>
                    {
                        model.insert(*gpa, (hpa + gpa - start, permissions));
                    }
                    Step::Unmap(start, bytes) if (start..start + bytes).contains(gpa) => {
                        model.remove(gpa);
                    }
                    Step::Protect(start, bytes, permissions)
                        if (start..start + bytes).contains(gpa) =>
                    {
                        model.entry(*gpa).and_modify(|page| page.1 = permissions);
                    }
                    _ => {}
                }
            }
            let outcome = replay(&mut ept, &probes, |ept| match step {
                Step::Map(gpa, hpa, size, permissions) => {
                    let (gpa, hpa) = (Gpa(gpa), Hpa(hpa));
                    if may_fill && ept.fill(gpa, hpa, size, permissions, WB) {
                        Ok(Invalidation::NotNeeded)
                    } else {
                        ept.map(gpa, hpa, size, permissions, WB)
                    }
                }
                Step::Unmap(gpa, bytes) => ept.unmap(Gpa(gpa), bytes),
                Step::Protect(gpa, bytes, permissions) => ept.protect(Gpa(gpa), bytes, permissions),
            });
            let tightened = before.iter().any(|(gpa, old)| {
                model.get(gpa).is_none_or(|new| new.0 != old.0 || !new.1.contains(old.1))
            });
            prop_assert!(!tightened || outcome == Ok(Invalidation::Needed));
            ept.release_retired();
            for gpa in &probes {
                let found = ept.translate(Gpa(*gpa)).map(|page| (page.hpa.0, page.permissions));
                prop_assert_eq!(found, model.get(gpa).copied(), "{:#x}", gpa);
            }
        }
        prop_assert!(frees_everything(ept));
    }
}
