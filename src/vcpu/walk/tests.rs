use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// Memory in units of four bytes.
#[derive(Clone, Debug, Default)]
struct Memory(HashMap<u64, u32>);

impl Memory {
    fn put(&mut self, at: u64, entry: u64) {
        self.0.insert(at, entry as u32);
        self.0.insert(at + 4, (entry >> 32) as u32);
    }
}

impl PhysicalRead for Memory {
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        assert!(gpa.is_aligned(8));
        let low = self.read_u32(gpa)?;
        Some(u64::from(low) | u64::from(self.read_u32(Gpa(gpa.0 + 4))?) << 32)
    }

    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        assert!(gpa.is_aligned(4));
        self.0.get(&gpa.0).copied()
    }
}

const READ: Access = Access {
    operation: Operation::Read,
    user: false,
};

fn long() -> Paging {
    Paging {
        cr0: CR0_PG | CR0_WP,
        cr3: 0x1000,
        cr4: CR4_PAE,
        efer: EFER_LMA | EFER_NXE,
        rflags: 2,
        physical_bits: 40,
    }
}

fn legacy(cr4: u64) -> Paging {
    Paging {
        cr4,
        efer: 0,
        ..long()
    }
}

/// Tables for `gva` from `levels` down to a page at `leaf_level`, with `flags`
/// in each entry from the top; the frame is at 0x12_0000_0000.
fn map(levels: u32, leaf_level: u32, gva: u64, flags: &[u64]) -> Memory {
    let mut memory = Memory::default();
    for (level, flags) in (leaf_level..=levels).rev().zip(flags) {
        let table = 0x1000 * u64::from(levels - level + 1);
        let index = gva >> (12 + 9 * (level - 1)) & 0x1ff;
        let target = if level == leaf_level {
            0x12_0000_0000 | if level > 1 { LARGE } else { 0 }
        } else {
            table + 0x1000
        };
        memory.put(table + index * 8, target | flags);
    }
    memory
}

const OPEN: u64 = PRESENT | WRITABLE | USER;

#[test]
fn every_page_size_of_long_mode() {
    let gva = 0xffff_8123_4567_89ab;
    for (level, size) in [(1, 1u64 << 12), (2, 1 << 21), (3, 1 << 30)] {
        let found = walk(&map(4, level, gva, &[OPEN; 4]), &long(), Gva(gva), READ).unwrap();
        assert_eq!(found.gpa, Gpa(0x12_0000_0000 | gva & (size - 1)));
        assert_eq!(found.page_size, size);
    }
    let five = Paging {
        cr4: CR4_PAE | CR4_LA57,
        ..long()
    };
    let gva = 0x00ab_8123_4567_89ab;
    let found = walk(&map(5, 1, gva, &[OPEN; 5]), &five, Gva(gva), READ);
    assert_eq!(found.unwrap().gpa, Gpa(0x12_0000_09ab));
    assert_eq!(
        walk(&Memory::default(), &long(), Gva(gva), READ),
        Err(WalkError::NonCanonical)
    );
}

#[test]
fn no_paging() {
    let real = Paging {
        cr0: 0,
        ..legacy(0)
    };
    let found = walk(&Memory::default(), &real, Gva(0x1_1234_5678), READ).unwrap();
    assert_eq!(found.gpa, Gpa(0x1234_5678));
}

#[test]
fn pae_paging() {
    let gva = 0xc123_4567u64;
    let mut memory = map(2, 1, gva, &[OPEN, OPEN]);
    memory.put(0x5000 + 0x20 + 3 * 8, 0x1000 | PRESENT);
    // CR3 is aligned to 32 bytes; a PDPTE takes no part in the rights.
    let paging = Paging {
        cr3: 0x5020,
        ..legacy(CR4_PAE)
    };
    let user = Access {
        operation: Operation::Write,
        user: true,
    };
    let found = walk(&memory, &paging, Gva(gva), user).unwrap();
    assert_eq!(found.gpa, Gpa(0x12_0000_0567));
    // Bit 62 is ignored in long mode and reserved here.
    let mut memory = map(2, 2, gva, &[OPEN | 1 << 62]);
    memory.put(0x5038, 0x1000 | PRESENT);
    assert_eq!(
        walk(&memory, &paging, Gva(gva), READ),
        Err(WalkError::PageFault(9))
    );
    memory.put(0x5038, 0x1000);
    assert_eq!(
        walk(&memory, &paging, Gva(gva), READ),
        Err(WalkError::PageFault(0))
    );
}

#[test]
fn thirty_two_bit_paging() {
    let gva = 0xc040_3abc_u64;
    let mut memory = Memory::default();
    memory
        .0
        .insert(0x1000 + (gva >> 22) * 4, 0x2000 | OPEN as u32);
    memory.0.insert(0x2000 + 3 * 4, 0xabcd_e000 | OPEN as u32);
    let found = walk(&memory, &legacy(0), Gva(gva), READ).unwrap();
    assert_eq!((found.gpa, found.page_size), (Gpa(0xabcd_eabc), 4096));

    let large = |entry: u32| {
        let mut memory = Memory::default();
        memory.0.insert(0x1000 + (gva >> 22) * 4, entry | 0x87);
        walk(&memory, &legacy(CR4_PSE), Gva(gva), READ)
    };
    let found = large(0x8000_0000 | 0x12 << 13).unwrap();
    assert_eq!((found.gpa, found.page_size), (Gpa(0x12_8000_3abc), 4 << 20));
    assert_eq!(large(1 << 21), Err(WalkError::PageFault(9)));
    // Without CR4.PSE the bit means nothing, and the entry names a table.
    memory.0.insert(0x1000 + (gva >> 22) * 4, 0x2087);
    let found = walk(&memory, &legacy(0), Gva(gva), READ).unwrap();
    assert_eq!(found.gpa, Gpa(0xabcd_eabc));
}

#[test]
fn pse36_stops_at_the_physical_width() {
    let mut memory = Memory::default();
    memory.0.insert(0x1000, 0x87 | 0x10 << 13);
    let narrow = Paging {
        physical_bits: 36,
        ..legacy(CR4_PSE)
    };
    assert_eq!(
        walk(&memory, &narrow, Gva(0), READ),
        Err(WalkError::PageFault(9))
    );
    assert!(walk(&memory, &legacy(CR4_PSE), Gva(0), READ).is_ok());
}

#[test]
fn reserved_bits() {
    let fault = |level, at: usize, bits: u64, paging: Paging| {
        let mut flags = [OPEN; 4];
        flags[at] |= bits;
        walk(&map(4, level, 0x1000, &flags), &paging, Gva(0x1000), READ).err()
    };
    let reserved = Some(WalkError::PageFault(9));
    assert_eq!(fault(1, 0, LARGE, long()), reserved, "PML4E bit 7");
    assert_eq!(fault(1, 3, LARGE, long()), None, "PTE bit 7 is the PAT's");
    assert_eq!(fault(1, 2, 1 << 40, long()), reserved, "above MAXPHYADDR");
    assert_eq!(
        fault(2, 2, 1 << 13, long()),
        reserved,
        "inside a 2 MiB frame"
    );
    assert_eq!(
        fault(2, 2, 1 << 12, long()),
        None,
        "the large page's PAT bit"
    );
    assert_eq!(
        fault(3, 1, 1 << 29, long()),
        reserved,
        "inside a 1 GiB frame"
    );
    assert_eq!(fault(1, 1, 0x7ff << 52, long()), None, "ignored");
    let no_nx = Paging {
        efer: EFER_LMA,
        ..long()
    };
    assert_eq!(fault(1, 3, NO_EXECUTE, no_nx), reserved);
}

#[test]
fn a_table_outside_memory_is_no_page_fault() {
    let found = walk(&Memory::default(), &long(), Gva(0x1000), READ);
    assert_eq!(found, Err(WalkError::NoMemory(Gpa(0x1000))));
}

proptest! {
    /// The rights, said as the SDM's table says them: each entry may take a right away.
    #[test]
    fn rights(
        leaf in 1..4u32,
        entries in prop::array::uniform4((any::<bool>(), any::<bool>(), any::<bool>(), 0..20u8)),
        gva in 0..1u64 << 47,
        (wp, smep, smap, ac, user) in any::<(bool, bool, bool, bool, bool)>(),
        operation in prop::sample::select(&[Operation::Read, Operation::Write, Operation::Execute][..]),
    ) {
        let used = 5 - leaf as usize;
        let flags: Vec<u64> = entries[..used].iter().map(|&(write, user, nx, absent)| {
            u64::from(absent != 0) | u64::from(write) << 1 | u64::from(user) << 2 | u64::from(nx) << 63
        }).collect();
        let present = entries[..used].iter().all(|e| e.3 != 0);
        let writable = entries[..used].iter().all(|e| e.0);
        let user_page = entries[..used].iter().all(|e| e.1);
        let executable = entries[..used].iter().all(|e| !e.2);
        let paging = Paging {
            cr0: CR0_PG | if wp { CR0_WP } else { 0 },
            cr4: CR4_PAE | u64::from(smep) << 20 | u64::from(smap) << 21,
            rflags: u64::from(ac) << 18,
            ..long()
        };
        let denied = match (user, operation) {
            (true, _) if !user_page => true,
            (true, Operation::Write) => !writable,
            (false, Operation::Write) if wp && !writable => true,
            (false, Operation::Execute) if smep && user_page => true,
            (_, Operation::Execute) => !executable,
            (false, _) => smap && !ac && user_page,
            (true, Operation::Read) => false,
        };
        let what = match operation {
            Operation::Read => 0,
            Operation::Write => 2,
            Operation::Execute => 16,
        };
        let code = u32::from(present) | what | u32::from(user) << 2;
        let found = walk(&map(4, leaf, gva, &flags), &paging, Gva(gva), Access { operation, user });
        if !present || denied {
            prop_assert_eq!(found, Err(WalkError::PageFault(code)));
        } else {
            let size = 1 << (12 + 9 * (leaf - 1));
            prop_assert_eq!(found, Ok(Translation {
                gpa: Gpa(0x12_0000_0000 | gva & (size - 1)),
                page_size: size, user: user_page, writable, executable,
            }));
        }
    }

    /// Whatever lies in memory, a walk ends, inside the physical address width.
    #[test]
    fn arbitrary_tables(
        entries in prop::collection::vec(any::<u64>(), 8),
        gva in any::<u64>(), cr4 in any::<u64>(), efer in any::<u64>(), bits in 32..52u32,
    ) {
        struct Noise(Vec<u64>);
        impl PhysicalRead for Noise {
            fn read_u64(&self, gpa: Gpa) -> Option<u64> {
                Some(self.0[(gpa.0 >> 3) as usize % 8] | 1)
            }
            fn read_u32(&self, gpa: Gpa) -> Option<u32> {
                self.read_u64(gpa).map(|entry| entry as u32)
            }
        }
        let paging = Paging { cr4, efer, physical_bits: bits, ..long() };
        let mut entries = entries;
        for entry in entries.iter_mut().step_by(2) {
            *entry &= (1 << bits) - 1; // so that some walks get further
        }
        if let Ok(found) = walk(&Noise(entries), &paging, Gva(gva), READ) {
            prop_assert!(found.gpa.0 >> bits.max(32) == 0);
        }
    }
}
