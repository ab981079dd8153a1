//! Extended page tables (SDM vol. 3, 29.3): guest physical to host physical.
//!
//! Four levels, each a type of its own, so that an entry of one level cannot
//! be written into a table of another. The code is generic over the memory
//! that holds the tables ([`TableMemory`]): the hypervisor passes its frame
//! allocator, the tests a memory that records each write and checks that no
//! intermediate state maps a page that neither the old nor the new tables map.
//!
//! Two rules keep that true for a CPU that walks the tables meanwhile: a table
//! is complete before the one write that makes it reachable, and a table that
//! was cut off is freed only by [`Ept::release_retired`], which the caller
//! calls after INVEPT.
//!
//! Calls that change an entry lose an accessed or dirty bit that a CPU sets at
//! that very moment: whoever collects dirty bits stops the guest's CPUs first.

use arrayvec::ArrayVec;
use bitflags::bitflags;

use super::memory_type::MemoryType;
use crate::addr::{Gpa, Hpa, PAGE_SIZE};

mod table;
#[cfg(test)]
mod tests;

use table::{
    ADDRESS, ENTRIES, Entry, Inner, LARGE, Leaf, Level, Pd, Pml4, Pt, Slot, Table, free_table,
};

/// Four levels translate 48 bits of guest physical address.
const GUEST_LIMIT: u64 = 1 << 48;
/// Tables that may wait for one INVEPT.
const RETIRED: usize = 16;

/// Where the tables live.
pub trait TableMemory {
    /// A frame of 4096 zero bytes, or `None` when there is none left.
    fn allocate(&mut self) -> Option<Hpa>;
    /// Takes back a frame that [`TableMemory::allocate`] gave out.
    fn free(&mut self, frame: Hpa);
    /// The entry at `entry`, an address that is a multiple of 8.
    fn read(&self, entry: Hpa) -> u64;
    /// Writes the entry at `entry` in one 64-bit store, after all earlier writes.
    fn write(&mut self, entry: Hpa, value: u64);
}

/// IA32_VMX_EPT_VPID_CAP (SDM vol. 3, A.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptVpidCapabilities(pub u64);

impl EptVpidCapabilities {
    const fn bit(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }
    /// Execute-only pages.
    pub const fn execute_only(self) -> bool {
        self.bit(0)
    }
    /// A page-walk length of 4.
    pub const fn four_levels(self) -> bool {
        self.bit(6)
    }
    /// The tables themselves may be accessed as uncacheable memory.
    pub const fn uncacheable_tables(self) -> bool {
        self.bit(8)
    }
    /// The tables themselves may be accessed as write-back memory.
    pub const fn write_back_tables(self) -> bool {
        self.bit(14)
    }
    /// INVVPID of a whole context, or of all.
    pub const fn drops_vpids(self) -> bool {
        self.bit(32) && (self.bit(41) || self.bit(42))
    }
    /// Accessed and dirty bits.
    pub const fn accessed_dirty(self) -> bool {
        self.bit(21)
    }
    /// Whether leaves of this size are allowed.
    pub const fn page_size(self, size: PageSize) -> bool {
        match size {
            PageSize::Size4K => true,
            PageSize::Size2M => self.bit(16),
            PageSize::Size1G => self.bit(17),
        }
    }
}

/// What one leaf entry maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PageSize {
    Size4K,
    Size2M,
    Size1G,
}

impl PageSize {
    /// All sizes, largest first: the order in which to try them.
    pub const LARGEST_FIRST: [Self; 3] = [Self::Size1G, Self::Size2M, Self::Size4K];

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size1G => 30,
        }
    }
}

bitflags! {
    /// What a guest may do with a page; bits 2:0 of an entry.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Permissions: u64 {
        const READ = 1;
        const WRITE = 2;
        const EXECUTE = 4;
    }
}

/// Why a request was refused. Large pages may have been split on the way; what
/// the guest sees of the range named in the request may have changed in part
/// only for [`EptError::OutOfFrames`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptError {
    /// The CPU's EPT has no four-level walk, or no memory type for its tables.
    Unsupported,
    /// The CPU's EPT has no pages of this size.
    PageSize(PageSize),
    /// An address or a length is not a multiple of the page size.
    Misaligned,
    /// A guest address above 48 bits, or a host address above the CPU's width.
    OutOfRange,
    /// No permission, write without read, or execute alone where the CPU has no such pages.
    Permissions(Permissions),
    /// No frame is left for a table.
    OutOfFrames,
    /// Too many tables wait: INVEPT, then [`Ept::release_retired`], then try again.
    FlushFirst,
}

/// Whether CPUs may still hold a translation that is no longer true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Invalidation {
    /// Nothing that a CPU can have cached has become wrong.
    NotNeeded,
    /// INVEPT on every CPU that may have run with these tables.
    Needed,
}

impl Invalidation {
    fn when(needed: bool) -> Self {
        if needed {
            Self::Needed
        } else {
            Self::NotNeeded
        }
    }
}

/// What [`Ept::translate`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub hpa: Hpa,
    pub size: PageSize,
    pub permissions: Permissions,
    /// `None` for an encoding that is reserved, which these tables never hold.
    pub memory_type: Option<MemoryType>,
    pub accessed: bool,
    pub dirty: bool,
}

/// The value of the VMCS field EPT pointer (SDM vol. 3, 25.6.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct EptPointer(u64);

impl EptPointer {
    /// Page-walk length 4, write-back tables where the CPU can, uncacheable
    /// else, accessed and dirty bits where the CPU can.
    pub fn new(root: Hpa, capabilities: EptVpidCapabilities) -> Result<Self, EptError> {
        if root.0 & !ADDRESS != 0 {
            return Err(EptError::Misaligned);
        }
        let memory_type = if capabilities.write_back_tables() {
            MemoryType::WriteBack
        } else if capabilities.uncacheable_tables() {
            MemoryType::Uncacheable
        } else {
            return Err(EptError::Unsupported);
        };
        if !capabilities.four_levels() {
            return Err(EptError::Unsupported);
        }
        // Accessed and dirty bits stay off: with them a walk of the guest's page tables counts as a
        // write (SDM 3, 29.3.3.2), and some firmware has its tables in ROM.
        Ok(Self(root.0 | 3 << 3 | memory_type as u64))
    }

    /// The field's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// A table that a large page replaced, waiting for INVEPT.
enum Retired {
    Pd(Table<Pd>),
    Pt(Table<Pt>),
}

impl From<Table<Pd>> for Retired {
    fn from(table: Table<Pd>) -> Self {
        Self::Pd(table)
    }
}

impl From<Table<Pt>> for Retired {
    fn from(table: Table<Pt>) -> Self {
        Self::Pt(table)
    }
}

/// The extended page tables of one guest.
pub struct Ept<M: TableMemory> {
    memory: M,
    root: Table<Pml4>,
    capabilities: EptVpidCapabilities,
    host_limit: u64,
    retired: ArrayVec<Retired, RETIRED>,
}

/// Frees every table. Nobody enters a guest with them any more; what CPUs have cached of
/// them stays until INVEPT, which is due before a first entry with tables in the same frames.
impl<M: TableMemory> Drop for Ept<M> {
    fn drop(&mut self) {
        self.free();
    }
}

impl<M: TableMemory> Ept<M> {
    /// Empty tables. `address_width` is the CPU's physical-address width in
    /// bits (CPUID 80000008H:EAX\[7:0\]).
    pub fn new(
        mut memory: M,
        capabilities: EptVpidCapabilities,
        address_width: u32,
    ) -> Result<Self, EptError> {
        EptPointer::new(Hpa(0), capabilities)?;
        let root = Table::at(memory.allocate().ok_or(EptError::OutOfFrames)?);
        let host_limit = 1 << address_width.min(52);
        Ok(Self {
            memory,
            root,
            capabilities,
            host_limit,
            retired: ArrayVec::new(),
        })
    }

    /// Whether pages of this size can be mapped.
    #[inline]
    pub fn has_pages_of(&self, size: PageSize) -> bool {
        self.capabilities.page_size(size)
    }

    /// The value for the VMCS.
    pub fn pointer(&self) -> Result<EptPointer, EptError> {
        EptPointer::new(self.root.base, self.capabilities)
    }

    /// Maps one page, replacing what was there, tables of smaller pages included.
    pub fn map(
        &mut self,
        gpa: Gpa,
        hpa: Hpa,
        size: PageSize,
        permissions: Permissions,
        memory_type: MemoryType,
    ) -> Result<Invalidation, EptError> {
        self.check_page(gpa, hpa, size, permissions)?;
        let pdpt = match self.root.entry_for(gpa).read(&self.memory).table() {
            Some(table) => table,
            None => self.new_table(self.root.entry_for(gpa))?,
        };
        if size == PageSize::Size1G {
            let page = Entry::page(hpa, permissions, memory_type);
            return self.replace_with_page(pdpt.entry_for(gpa), page);
        }
        let (pd, split_1g) = self.lower_table(pdpt.entry_for(gpa))?;
        if size == PageSize::Size2M {
            let page = Entry::page(hpa, permissions, memory_type);
            let outcome = self.replace_with_page(pd.entry_for(gpa), page)?;
            return Ok(if split_1g {
                Invalidation::Needed
            } else {
                outcome
            });
        }
        let (pt, split_2m) = self.lower_table(pd.entry_for(gpa))?;
        let page = Entry::page(hpa, permissions, memory_type);
        let outlived = self.replace(pt.entry_for(gpa), page);
        Ok(Invalidation::when(split_1g || split_2m || outlived))
    }

    /// Does the same where nothing is mapped and the tables on the way are there, which is
    /// the common case and takes no frame; in any other does nothing, and returns false.
    #[inline(always)]
    pub fn fill(
        &mut self,
        gpa: Gpa,
        hpa: Hpa,
        size: PageSize,
        permissions: Permissions,
        memory_type: MemoryType,
    ) -> bool {
        if self.check_page(gpa, hpa, size, permissions).is_err() {
            return false;
        }
        let Some(pdpt) = self.root.entry_for(gpa).read(&self.memory).table() else {
            return false;
        };
        let pdpte = pdpt.entry_for(gpa);
        if size == PageSize::Size1G {
            return self.fill_slot(pdpte, hpa, permissions, memory_type);
        }
        let Some(pd) = pdpte.read(&self.memory).table() else {
            return false;
        };
        let pde = pd.entry_for(gpa);
        if size == PageSize::Size2M {
            return self.fill_slot(pde, hpa, permissions, memory_type);
        }
        let Some(pt) = pde.read(&self.memory).table() else {
            return false;
        };
        self.fill_slot(pt.entry_for(gpa), hpa, permissions, memory_type)
    }

    #[inline(always)]
    fn fill_slot<L: Leaf>(
        &mut self,
        slot: Slot<L>,
        hpa: Hpa,
        permissions: Permissions,
        memory_type: MemoryType,
    ) -> bool {
        let free = !slot.read(&self.memory).is_present();
        if free {
            slot.write(&mut self.memory, Entry::page(hpa, permissions, memory_type));
        }
        free
    }

    /// Unmaps `bytes` bytes (a multiple of 4096) from `gpa` on, splitting large
    /// pages that the range cuts. What was not mapped stays so.
    pub fn unmap(&mut self, gpa: Gpa, bytes: u64) -> Result<Invalidation, EptError> {
        self.change_range(gpa, bytes, Change::Unmap)
    }

    /// Gives what is mapped in the range the permissions `permissions`,
    /// splitting large pages that the range cuts.
    pub fn protect(
        &mut self,
        gpa: Gpa,
        bytes: u64,
        permissions: Permissions,
    ) -> Result<Invalidation, EptError> {
        self.check_permissions(permissions)?;
        self.change_range(gpa, bytes, Change::Protect(permissions))
    }

    /// Gives what is mapped in the 2 MiB around `gpa` the permissions `permissions`, by pages of
    /// 4 KiB.
    pub fn protect_small(
        &mut self,
        gpa: Gpa,
        permissions: Permissions,
    ) -> Result<Invalidation, EptError> {
        let (large, small) = (PageSize::Size2M.bytes(), PageSize::Size4K.bytes());
        let start = gpa.align_down(large);
        // A part first, which splits the page.
        let split = self.protect(start, small, permissions)?;
        let rest = self.protect(Gpa(start.0 + small), large - small, permissions)?;
        Ok(Invalidation::when(
            [split, rest].contains(&Invalidation::Needed),
        ))
    }

    /// Whether there are tables for smaller pages in the page of `size` around `gpa`.
    #[inline]
    pub fn is_divided(&self, gpa: Gpa, size: PageSize) -> bool {
        let pdpt = self.root.entry_for(gpa).read(&self.memory).table();
        let pd = pdpt.and_then(|pdpt| pdpt.entry_for(gpa).read(&self.memory).table());
        match size {
            PageSize::Size1G => pd.is_some(),
            PageSize::Size2M => {
                pd.is_some_and(|pd| pd.entry_for(gpa).read(&self.memory).table().is_some())
            }
            PageSize::Size4K => false,
        }
    }

    /// What `gpa` is mapped to, as a CPU would find it.
    pub fn translate(&self, gpa: Gpa) -> Option<Translation> {
        if gpa.0 >= GUEST_LIMIT {
            return None;
        }
        let pdpt = self.root.entry_for(gpa).read(&self.memory).table()?;
        let pdpte = pdpt.entry_for(gpa).read(&self.memory);
        let Some(pd) = pdpte.table() else {
            return pdpte.translation(gpa);
        };
        let pde = pd.entry_for(gpa).read(&self.memory);
        let Some(pt) = pde.table() else {
            return pde.translation(gpa);
        };
        pt.entry_for(gpa).read(&self.memory).translation(gpa)
    }

    /// Frees the tables that large pages replaced. Only after INVEPT on every
    /// CPU that may have run with these tables.
    pub fn release_retired(&mut self) {
        for table in self.retired.drain(..) {
            match table {
                Retired::Pd(table) => free_table(table, &mut self.memory),
                Retired::Pt(table) => free_table(table, &mut self.memory),
            }
        }
    }

    fn free(&mut self) {
        self.release_retired();
        free_table(self.root, &mut self.memory);
    }

    /// Whether the CPU allows such a page.
    #[inline]
    fn check_page(
        &self,
        gpa: Gpa,
        hpa: Hpa,
        size: PageSize,
        permissions: Permissions,
    ) -> Result<(), EptError> {
        if !self.capabilities.page_size(size) {
            return Err(EptError::PageSize(size));
        }
        self.check_permissions(permissions)?;
        check_guest_range(gpa, size.bytes(), size.bytes())?;
        if !hpa.is_aligned(size.bytes()) {
            return Err(EptError::Misaligned);
        }
        if hpa.0 >= self.host_limit {
            return Err(EptError::OutOfRange);
        }
        Ok(())
    }

    fn check_permissions(&self, permissions: Permissions) -> Result<(), EptError> {
        let readable = permissions.contains(Permissions::READ);
        let execute_only = permissions == Permissions::EXECUTE && self.capabilities.execute_only();
        if readable || execute_only {
            Ok(())
        } else {
            Err(EptError::Permissions(permissions))
        }
    }

    /// An empty table below `slot`, which is not present.
    fn new_table<L: Inner>(&mut self, slot: Slot<L>) -> Result<Table<L::Lower>, EptError> {
        let table = Table::at(self.memory.allocate().ok_or(EptError::OutOfFrames)?);
        slot.write(&mut self.memory, Entry::refer(table));
        Ok(table)
    }

    /// The table below `slot`, made if there is none, by splitting if a large
    /// page is there; whether it was split. Splitting changes no translation,
    /// but it changes the page size, which wants an INVEPT too (SDM vol. 3,
    /// 29.4.3.4, and the page-size-change erratum of several families).
    fn lower_table<L: Inner + Leaf>(
        &mut self,
        slot: Slot<L>,
    ) -> Result<(Table<L::Lower>, bool), EptError> {
        let entry = slot.read(&self.memory);
        if let Some(table) = entry.table() {
            return Ok((table, false));
        }
        if !entry.is_page() {
            return Ok((self.new_table(slot)?, false));
        }
        let table: Table<L::Lower> =
            Table::at(self.memory.allocate().ok_or(EptError::OutOfFrames)?);
        let keep = entry.bits
            & !ADDRESS
            & !if L::Lower::SHIFT == Pt::SHIFT {
                LARGE
            } else {
                0
            };
        let first = entry.address().0 & !(L::SIZE.bytes() - 1);
        for index in 0..ENTRIES {
            let part = Entry::from_bits(keep | (first + index * L::Lower::SIZE.bytes()));
            table.entry(index).write(&mut self.memory, part);
        }
        slot.write(&mut self.memory, Entry::refer(table));
        Ok((table, true))
    }

    /// Writes a leaf; whether CPUs may hold more than it allows.
    fn replace<L: Leaf>(&mut self, slot: Slot<L>, new: Entry<L>) -> bool {
        let old = slot.read(&self.memory);
        slot.write(&mut self.memory, new);
        old.outlived_by(new)
    }

    /// Writes a leaf in a place that may hold a table, which is then retired.
    fn replace_with_page<L>(
        &mut self,
        slot: Slot<L>,
        new: Entry<L>,
    ) -> Result<Invalidation, EptError>
    where
        L: Inner + Leaf,
        Retired: From<Table<L::Lower>>,
    {
        let Some(table) = slot.read(&self.memory).table() else {
            return Ok(Invalidation::when(self.replace(slot, new)));
        };
        self.retired
            .try_push(table.into())
            .map_err(|_| EptError::FlushFirst)?;
        slot.write(&mut self.memory, new);
        Ok(Invalidation::Needed)
    }

    fn change_range(
        &mut self,
        gpa: Gpa,
        bytes: u64,
        change: Change,
    ) -> Result<Invalidation, EptError> {
        let end = check_guest_range(gpa, bytes, PAGE_SIZE)?;
        let mut range = Range {
            at: gpa,
            end,
            outlived: false,
        };
        while range.at < range.end {
            let Some(pdpt) = self.root.entry_for(range.at).read(&self.memory).table() else {
                range.skip::<Pml4>();
                continue;
            };
            let Some(pd) = self.change_or_descend(pdpt.entry_for(range.at), &mut range, change)?
            else {
                continue;
            };
            let Some(pt) = self.change_or_descend(pd.entry_for(range.at), &mut range, change)?
            else {
                continue;
            };
            self.change_leaf(pt.entry_for(range.at), &mut range, change);
        }
        Ok(Invalidation::when(range.outlived))
    }

    /// Deals with all that `slot` maps, or gives the table below it.
    fn change_or_descend<L: Inner + Leaf>(
        &mut self,
        slot: Slot<L>,
        range: &mut Range,
        change: Change,
    ) -> Result<Option<Table<L::Lower>>, EptError> {
        let entry = slot.read(&self.memory);
        if let Some(table) = entry.table() {
            return Ok(Some(table));
        }
        if entry.is_present() && !range.covers(L::SIZE) {
            let (table, split) = self.lower_table(slot)?;
            range.outlived |= split;
            return Ok(Some(table));
        }
        self.change_leaf(slot, range, change);
        Ok(None)
    }

    fn change_leaf<L: Leaf>(&mut self, slot: Slot<L>, range: &mut Range, change: Change) {
        let old = slot.read(&self.memory);
        if old.is_present() {
            let new = match change {
                Change::Unmap => Entry::NOT_PRESENT,
                Change::Protect(permissions) => old.with_permissions(permissions),
            };
            range.outlived |= self.replace(slot, new);
        }
        range.skip::<L>();
    }
}

#[derive(Clone, Copy)]
enum Change {
    Unmap,
    Protect(Permissions),
}

/// What is left of a range to change.
struct Range {
    at: Gpa,
    end: Gpa,
    outlived: bool,
}

impl Range {
    fn covers(&self, size: PageSize) -> bool {
        self.at.is_aligned(size.bytes()) && self.end.0 - self.at.0 >= size.bytes()
    }

    /// Goes on behind what one entry of level `L` covers. No overflow: `at` is below 2^48.
    fn skip<L: Level>(&mut self) {
        self.at = Gpa(((self.at.0 >> L::SHIFT) + 1) << L::SHIFT);
    }
}

/// The end of the range, when it is aligned and below 2^48.
fn check_guest_range(gpa: Gpa, bytes: u64, alignment: u64) -> Result<Gpa, EptError> {
    if !gpa.is_aligned(alignment) || !bytes.is_multiple_of(alignment) {
        return Err(EptError::Misaligned);
    }
    gpa.checked_add(bytes)
        .filter(|end| end.0 <= GUEST_LIMIT)
        .ok_or(EptError::OutOfRange)
}
