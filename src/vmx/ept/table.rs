//! One entry, one table, one level: each level is a type, and an entry belongs
//! to the level that it is an entry of (SDM vol. 3, tables 29-1 to 29-7).

use core::marker::PhantomData;

use super::{PageSize, Permissions, TableMemory, Translation};
use crate::addr::{Gpa, Hpa};
use crate::vmx::memory_type::MemoryType;

pub(super) const ENTRIES: u64 = 512;
const PERMISSIONS: u64 = 0b111;
const MEMORY_TYPE_SHIFT: u32 = 3;
const MEMORY_TYPE: u64 = 0b111 << MEMORY_TYPE_SHIFT;
pub(super) const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
/// Bits 51:12, the widest frame number that an entry can hold.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A level of the tables.
pub(super) trait Level: Copy {
    /// Bits of the guest address below this level's index.
    const SHIFT: u32;
    /// Frees all tables below `table`.
    fn free_below<M: TableMemory>(table: Table<Self>, memory: &mut M);
}

/// A level whose entries may refer to tables of the next.
pub(super) trait Inner: Level {
    type Lower: Leaf;
}

/// A level whose entries may map pages.
pub(super) trait Leaf: Level {
    const SIZE: PageSize;
}

macro_rules! levels {
    ($($(#[$doc:meta])* $name:ident, $shift:literal, $lower:ty;)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name;
        impl Level for $name {
            const SHIFT: u32 = $shift;
            fn free_below<M: TableMemory>(table: Table<Self>, memory: &mut M) {
                for index in 0..ENTRIES {
                    if let Some(lower) = table.entry(index).read(memory).table() {
                        free_table(lower, memory);
                    }
                }
            }
        }
        impl Inner for $name {
            type Lower = $lower;
        }
    )* };
}

levels! {
    /// Page-map level 4: an entry for each 512 GiB.
    Pml4, 39, Pdpt;
    /// Page-directory-pointer table: an entry for each 1 GiB.
    Pdpt, 30, Pd;
    /// Page directory: an entry for each 2 MiB.
    Pd, 21, Pt;
}

/// Page table: an entry for each 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pt;

impl Level for Pt {
    const SHIFT: u32 = 12;
    fn free_below<M: TableMemory>(_: Table<Self>, _: &mut M) {}
}

impl Leaf for Pdpt {
    const SIZE: PageSize = PageSize::Size1G;
}

impl Leaf for Pd {
    const SIZE: PageSize = PageSize::Size2M;
}

impl Leaf for Pt {
    const SIZE: PageSize = PageSize::Size4K;
}

pub(super) fn free_table<L: Level, M: TableMemory>(table: Table<L>, memory: &mut M) {
    L::free_below(table, memory);
    memory.free(table.base);
}

/// A table of level `L`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<L> {
    pub(super) base: Hpa,
    level: PhantomData<L>,
}

/// Where an entry of level `L` lies.
#[derive(Clone, Copy)]
pub(super) struct Slot<L> {
    pub(super) address: Hpa,
    level: PhantomData<L>,
}

/// The value of an entry of level `L`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<L> {
    pub(super) bits: u64,
    level: PhantomData<L>,
}

impl<L: Level> Table<L> {
    pub(super) const fn at(base: Hpa) -> Self {
        Self {
            base,
            level: PhantomData,
        }
    }

    /// The slot number `index`, modulo the size of a table.
    pub(super) const fn entry(self, index: u64) -> Slot<L> {
        let address = Hpa(self.base.0 | (index % ENTRIES) << 3);
        Slot {
            address,
            level: PhantomData,
        }
    }

    pub(super) const fn entry_for(self, gpa: Gpa) -> Slot<L> {
        self.entry(gpa.0 >> L::SHIFT)
    }
}

impl<L: Level> Slot<L> {
    pub(super) fn read<M: TableMemory>(self, memory: &M) -> Entry<L> {
        Entry::from_bits(memory.read(self.address))
    }

    pub(super) fn write<M: TableMemory>(self, memory: &mut M, entry: Entry<L>) {
        memory.write(self.address, entry.bits);
    }
}

impl<L: Level> Entry<L> {
    pub(super) const NOT_PRESENT: Self = Self::from_bits(0);

    pub(super) const fn from_bits(bits: u64) -> Self {
        Self {
            bits,
            level: PhantomData,
        }
    }

    pub(super) const fn is_present(self) -> bool {
        self.bits & PERMISSIONS != 0
    }

    pub(super) const fn is_large(self) -> bool {
        self.bits & LARGE != 0
    }

    pub(super) const fn address(self) -> Hpa {
        Hpa(self.bits & ADDRESS)
    }
}

impl<L: Inner> Entry<L> {
    pub(super) fn refer(table: Table<L::Lower>) -> Self {
        Self::from_bits(table.base.0 | PERMISSIONS)
    }

    /// The table that this entry refers to, if it refers to one.
    pub(super) const fn table(self) -> Option<Table<L::Lower>> {
        if self.is_present() && !self.is_large() {
            Some(Table::at(self.address()))
        } else {
            None
        }
    }
}

impl<L: Leaf> Entry<L> {
    pub(super) fn page(hpa: Hpa, permissions: Permissions, memory_type: MemoryType) -> Self {
        let large = if L::SHIFT == Pt::SHIFT { 0 } else { LARGE };
        Self::from_bits(
            hpa.0 | permissions.bits() | (memory_type as u64) << MEMORY_TYPE_SHIFT | large,
        )
    }

    pub(super) fn is_page(self) -> bool {
        self.is_present() && (self.is_large() || L::SHIFT == Pt::SHIFT)
    }

    pub(super) const fn permissions(self) -> Permissions {
        Permissions::from_bits_truncate(self.bits)
    }

    pub(super) fn with_permissions(self, permissions: Permissions) -> Self {
        Self::from_bits(self.bits & !PERMISSIONS | permissions.bits())
    }

    /// Whether a CPU that still uses `self` after it became `new` does what `new` forbids.
    pub(super) fn outlived_by(self, new: Self) -> bool {
        const SAME: u64 = ADDRESS | MEMORY_TYPE;
        self.is_present()
            && (self.bits & SAME != new.bits & SAME
                || !new.permissions().contains(self.permissions()))
    }

    pub(super) fn translation(self, gpa: Gpa) -> Option<Translation> {
        self.is_page().then(|| Translation {
            hpa: Hpa(self.address().0 & !(L::SIZE.bytes() - 1) | gpa.offset_in(L::SIZE.bytes())),
            size: L::SIZE,
            permissions: self.permissions(),
            memory_type: MemoryType::from_encoding((self.bits & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT),
            accessed: self.bits & ACCESSED != 0,
            dirty: self.bits & DIRTY != 0,
        })
    }
}
