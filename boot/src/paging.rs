//! The page tables that the kernel is entered with (SDM 3, 5.5).

use core::ops::Range;

/// Memory for tables.
pub trait TableMemory {
    /// A zeroed 4 KiB frame; `None` when memory runs out.
    fn allocate(&mut self) -> Option<u64>;
    fn read(&self, address: u64) -> u64;
    fn write(&mut self, address: u64, value: u64);
}

/// What may be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
    ReadExecute,
}

/// No frame is left for a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

const PAGE: u64 = 1 << 12;
const LARGE_PAGE: u64 = 1 << 21;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Access {
    const fn bits(self) -> u64 {
        PRESENT
            | match self {
                Self::Read => NO_EXECUTE,
                Self::ReadWrite => WRITABLE | NO_EXECUTE,
                Self::ReadExecute => 0,
            }
    }
}

/// Four-level page tables under construction.
pub struct PageTables<M: TableMemory> {
    memory: M,
    root: u64,
}

impl<M: TableMemory> PageTables<M> {
    /// Empty tables.
    ///
    /// # Errors
    /// When no frame is left.
    pub fn new(mut memory: M) -> Result<Self, OutOfMemory> {
        let root = memory.allocate().ok_or(OutOfMemory)?;
        Ok(Self { memory, root })
    }

    /// Physical address of the root, for CR3.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Gives back the memory that the tables are in.
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// Maps the 4 KiB pages of `len` bytes.
    ///
    /// # Errors
    /// When no frame is left for a table.
    pub fn map(
        &mut self,
        virt: u64,
        phys: u64,
        len: u64,
        access: Access,
    ) -> Result<(), OutOfMemory> {
        for offset in (0..len).step_by(PAGE as usize) {
            let entry = self.entry(virt + offset, 1)?;
            self.memory.write(entry, (phys + offset) | access.bits());
        }
        Ok(())
    }

    /// Maps the memory `ram` (sorted, disjoint, whole 4 KiB pages) at `base`,
    /// writable and not executable, without the pages of `hole`; with 2 MiB
    /// pages where nothing but that memory lies in one.
    ///
    /// # Errors
    /// When no frame is left for a table.
    pub fn map_direct(
        &mut self,
        base: u64,
        ram: &[Range<u64>],
        hole: Range<u64>,
    ) -> Result<(), OutOfMemory> {
        for range in ram {
            let below = range.start..range.end.min(hole.start);
            let above = range.start.max(hole.end)..range.end;
            for part in [below, above] {
                self.map_range(base, part)?;
            }
        }
        Ok(())
    }

    fn map_range(&mut self, base: u64, range: Range<u64>) -> Result<(), OutOfMemory> {
        let mut phys = range.start;
        while phys < range.end {
            if phys.is_multiple_of(LARGE_PAGE) && range.end - phys >= LARGE_PAGE {
                let entry = self.entry(base + phys, 2)?;
                self.memory
                    .write(entry, phys | Access::ReadWrite.bits() | LARGE);
                phys += LARGE_PAGE;
            } else {
                self.map(base + phys, phys, PAGE, Access::ReadWrite)?;
                phys += PAGE;
            }
        }
        Ok(())
    }

    /// The entry for `virt` in the table of `level`: 1 for 4 KiB pages, 2 for 2 MiB.
    fn entry(&mut self, virt: u64, level: u32) -> Result<u64, OutOfMemory> {
        let index = |level: u32| virt >> (9 * level) & 0xff8;
        let mut table = self.root;
        for upper in (level + 1..=4).rev() {
            let entry = table + index(upper);
            let value = self.memory.read(entry);
            table = if value & PRESENT != 0 {
                value & ADDRESS
            } else {
                let new = self.memory.allocate().ok_or(OutOfMemory)?;
                // The leaf decides; the way there allows everything.
                self.memory.write(entry, new | PRESENT | WRITABLE);
                new
            };
        }
        Ok(table + index(level))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[derive(Default)]
    struct Frames {
        next: u64,
        words: HashMap<u64, u64>,
    }

    impl TableMemory for Frames {
        fn allocate(&mut self) -> Option<u64> {
            self.next += PAGE;
            Some(self.next)
        }
        fn read(&self, address: u64) -> u64 {
            self.words.get(&address).copied().unwrap_or(0)
        }
        fn write(&mut self, address: u64, value: u64) {
            self.words.insert(address, value);
        }
    }

    impl PageTables<Frames> {
        /// The leaf for `virt`, and the physical address.
        fn walk(&self, virt: u64) -> Option<(u64, u64)> {
            let mut table = self.root;
            for level in (1..=4).rev() {
                let value = self.memory.read(table + (virt >> (9 * level) & 0xff8));
                if value & PRESENT == 0 {
                    return None;
                }
                if level == 1 || value & LARGE != 0 {
                    let size = if level == 1 { PAGE } else { LARGE_PAGE };
                    return Some((value, (value & ADDRESS & !(size - 1)) | virt & (size - 1)));
                }
                table = value & ADDRESS;
            }
            None
        }
    }

    #[test]
    fn only_memory_is_mapped_and_never_writable_and_executable() {
        const BASE: u64 = 0xffff_8000_0000_0000;
        const KERNEL: u64 = 0xffff_ffff_8000_0000;
        let hole = 0x40_3000..0x61_5000;
        let ram = [0..0xa_0000, 0x10_0000..0xfe_f000];
        let mut tables = PageTables::new(Frames::default()).unwrap();
        tables.map_direct(BASE, &ram, hole.clone()).unwrap();
        tables
            .map(KERNEL, hole.start, 0x2000, Access::ReadExecute)
            .unwrap();
        tables
            .map(KERNEL + 0x2000, hole.start + 0x2000, 0x1000, Access::Read)
            .unwrap();
        tables
            .map(0x7000, 0x7000, PAGE, Access::ReadExecute)
            .unwrap();
        let mapped =
            |phys: u64| ram.iter().any(|range| range.contains(&phys)) && !hole.contains(&phys);
        for phys in (0..18u64 << 20).step_by(PAGE as usize) {
            match tables.walk(BASE + phys) {
                None => assert!(!mapped(phys), "{phys:#x}"),
                Some((leaf, target)) => {
                    assert!(mapped(phys), "{phys:#x}");
                    assert_eq!(target, phys);
                    assert_eq!(leaf & (WRITABLE | NO_EXECUTE), WRITABLE | NO_EXECUTE);
                }
            }
        }
        let (text, target) = tables.walk(KERNEL + 0x1000).unwrap();
        assert_eq!(
            (text & (WRITABLE | NO_EXECUTE), target),
            (0, hole.start + 0x1000)
        );
        let (rodata, _) = tables.walk(KERNEL + 0x2000).unwrap();
        assert_eq!(rodata & (WRITABLE | NO_EXECUTE), NO_EXECUTE);
        assert!(tables.walk(KERNEL + 0x3000).is_none());
        assert_eq!(tables.walk(0x7123).unwrap().1, 0x7123);
    }
}
