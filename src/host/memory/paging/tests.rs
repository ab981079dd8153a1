use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// Tables in a map, with a journal of the writes.
#[derive(Default)]
struct Memory {
    entries: HashMap<(u64, usize), u64>,
    tables: u64,
    limit: u64,
    journal: Vec<(u64, usize, u64)>,
}

impl TableMemory for Memory {
    fn read(&self, table: Hpa, index: usize) -> u64 {
        self.entries.get(&(table.0, index)).copied().unwrap_or(0)
    }

    fn write(&mut self, table: Hpa, index: usize, entry: u64) {
        self.entries.insert((table.0, index), entry);
        self.journal.push((table.0, index, entry));
    }

    fn allocate(&mut self) -> Option<Hpa> {
        self.tables += 1;
        (self.tables <= self.limit).then_some(Hpa(0x10_0000 + self.tables * PAGE_SIZE))
    }
}

fn tables() -> PageTables<Memory> {
    PageTables {
        root: Hpa(0x10_0000),
        memory: Memory {
            limit: 1000,
            ..Memory::default()
        },
    }
}

fn dynamic(limit: u64) -> Dynamic<Memory> {
    let memory = Memory {
        limit,
        ..Memory::default()
    };
    Dynamic {
        tables: PageTables {
            root: Hpa(0x10_0000),
            memory,
        },
        next: Hva(layout::DYNAMIC),
    }
}

#[test]
fn a_device_page_has_the_bits_of_the_manual() {
    let mut tables = tables();
    tables
        .map(Hva(0xffff_c000_0020_1000), Hpa(0xfee0_0000), DEVICE)
        .unwrap();
    assert_eq!(
        tables.memory.journal,
        [
            (0x10_0000, 384, 0x10_1003),
            (0x10_1000, 0, 0x10_2003),
            (0x10_2000, 1, 0x10_3003),
            (0x10_3000, 1, 0x8000_0000_fee0_001b),
        ]
    );
}

#[test]
fn large_pages_are_translated_and_not_mapped_over() {
    let mut tables = tables();
    let address = Hva(0xffff_8000_4060_0123);
    tables
        .memory
        .write(tables.root, index(address, 4), 0x20_0000 | PRESENT);
    tables
        .memory
        .write(Hpa(0x20_0000), index(address, 3), 0x20_1000 | PRESENT);
    tables.memory.write(
        Hpa(0x20_1000),
        index(address, 2),
        0x4060_0000 | PRESENT | LARGE | NO_EXECUTE,
    );
    assert_eq!(tables.translate(address), Some(Hpa(0x4060_0123)));
    assert_eq!(
        tables.map(Hva(address.0 & !0xfff), Hpa(0), DATA),
        Err(MapError::Occupied)
    );
    assert_eq!(tables.unmap(Hva(address.0 & !0xfff)), None);
    // 1 GiB, with the PAT bit (12) set, which is no address bit there.
    tables.memory.write(
        Hpa(0x20_0000),
        index(address, 3),
        0x4000_1000 | PRESENT | LARGE,
    );
    assert_eq!(tables.translate(address), Some(Hpa(0x4060_0123)));
}

#[test]
fn every_mapping_has_an_unmapped_page_on_each_side() {
    let mut dynamic = dynamic(1000);
    let first = dynamic.map(Hpa(0x50_0000), 3, DATA).unwrap();
    let second = dynamic.map(Hpa(0x60_0000), 1, DATA).unwrap();
    for page in [
        first.0 - 4096,
        first.0 + 3 * 4096,
        second.0 - 4096,
        second.0 + 4096,
    ] {
        assert_eq!(dynamic.tables.translate(Hva(page)), None);
    }
    assert_eq!(
        dynamic.tables.translate(Hva(first.0 + 0x2abc)),
        Some(Hpa(0x50_2abc))
    );
    assert_eq!(dynamic.tables.translate(second), Some(Hpa(0x60_0000)));
}

#[test]
fn a_mapping_that_fails_half_way_leaves_nothing() {
    // Three tables carry the first 511 pages (one page is the guard); the next needs a fourth.
    let mut dynamic = dynamic(3);
    let base = layout::DYNAMIC + PAGE_SIZE;
    assert_eq!(
        dynamic.map(Hpa(0x100_0000), 512, DATA),
        Err(MapError::OutOfMemory)
    );
    assert!((0..512).all(|page| {
        dynamic
            .tables
            .translate(Hva(base + page * PAGE_SIZE))
            .is_none()
    }));
}

#[test]
fn ranges_that_wrap_or_do_not_fit_are_refused() {
    let mut dynamic = dynamic(1000);
    for (start, pages) in [
        (0u64, u64::MAX),
        (!0xfff, 1),
        (0, (layout::KERNEL - layout::DYNAMIC) / 4096),
        (ADDRESS, 2),
    ] {
        assert_eq!(
            dynamic.map(Hpa(start), pages, DEVICE),
            Err(MapError::OutOfAddresses)
        );
    }
    assert!(dynamic.tables.memory.journal.is_empty());
}

proptest! {
    #[test]
    fn pages_translate_to_what_was_mapped_last(
        operations in prop::collection::vec((any::<bool>(), 0u64..2000, 0u64..1 << 30), 0..80),
    ) {
        let mut tables = tables();
        let mut model = HashMap::new();
        for (map, page, frame) in operations {
            let address = Hva(layout::DYNAMIC + page * 37 * PAGE_SIZE);
            if map {
                let result = tables.map(address, Hpa(frame * PAGE_SIZE), DATA);
                prop_assert_eq!(result.is_ok(), !model.contains_key(&address));
                model.entry(address).or_insert(Hpa(frame * PAGE_SIZE));
            } else {
                prop_assert_eq!(tables.unmap(address), model.remove(&address));
            }
        }
        for page in 0..2000 {
            let address = Hva(layout::DYNAMIC + page * 37 * PAGE_SIZE);
            prop_assert_eq!(tables.translate(address), model.get(&address).copied());
        }
    }
}

#[test]
fn the_direct_map_is_its_own_inverse() {
    assert_eq!(to_virt(Hpa(0x1234)), Hva(0xffff_8000_0000_1234));
    assert_eq!(
        to_phys(to_virt(Hpa(0x12_3456_7000))),
        Some(Hpa(0x12_3456_7000))
    );
}

#[test]
fn every_mapped_page_is_visited_with_what_it_allows() {
    let mut tables = tables();
    tables
        .map(Hva(layout::KERNEL), Hpa(0x7000), PRESENT)
        .unwrap();
    tables.map(Hva(0x5000), Hpa(0x5000), DATA).unwrap();
    let large = Hva(layout::DIRECT_MAP + (6 << 20));
    tables.map(large, Hpa(0), DATA).unwrap();
    let (table, slot, _) = tables.memory.journal[tables.memory.journal.len() - 2];
    tables
        .memory
        .write(Hpa(table), slot, 6 << 20 | LARGE | DATA);
    let mut pages = Vec::new();
    tables.for_each_page(&mut |page| pages.push(page));
    let page = |virt, phys, len, writable| Page {
        virt,
        phys: Hpa(phys),
        len,
        writable,
        executable: !writable,
    };
    assert_eq!(
        pages,
        [
            page(Hva(0x5000), 0x5000, 4096, true),
            page(large, 6 << 20, 2 << 20, true),
            page(Hva(layout::KERNEL), 0x7000, 4096, false),
        ]
    );
}
