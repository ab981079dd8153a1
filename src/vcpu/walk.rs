//! The guest's page tables, walked as the CPU walks them (SDM 3, chapter 5).
//!
//! Needed where the hypervisor follows a guest's linear address itself: to fetch
//! an instruction that is emulated, for its operands, and for a debugger, for
//! which accessed and dirty bits stay as they are.
//! With PAE paging the four page-directory-pointer entries are read from memory,
//! not from the copies that the CPU made when CR3 was loaded.

#[cfg(test)]
mod tests;

use crate::addr::{Gpa, Gva};
use arrayvec::ArrayVec;

/// Memory that holds page tables.
pub trait PhysicalRead {
    /// The eight bytes at `gpa`, a multiple of 8; `None` where there is no memory.
    fn read_u64(&self, gpa: Gpa) -> Option<u64>;

    /// The four bytes at `gpa`, a multiple of 4; `None` where there is no memory.
    fn read_u32(&self, gpa: Gpa) -> Option<u32>;
}

/// Memory that holds page tables whose accessed and dirty bits are set.
pub trait PhysicalMark: PhysicalRead {
    /// Replaces the entry at `gpa`, of 4 or 8 bytes, if it is still `old`; false where it is not.
    fn replace(&self, gpa: Gpa, bytes: usize, old: u64, new: u64) -> bool;
}

/// The registers that decide how a linear address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// RFLAGS, of which AC counts: it lifts SMAP.
    pub rflags: u64,
    /// MAXPHYADDR.
    pub physical_bits: u32,
}

/// What is done at the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Execute,
}

/// An access to be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub operation: Operation,
    /// At privilege level 3.
    pub user: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub gpa: Gpa,
    /// Bytes in the page: 4 K, 2 M, 4 M or 1 G. Without paging 4 K.
    pub page_size: u64,
    /// Every entry allows user mode, writes, and instruction fetches.
    pub user: bool,
    pub writable: bool,
    pub executable: bool,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// The guest gets #PF with this error code (SDM 3, 5.7).
    PageFault(u32),
    /// The guest gets #GP or #SS: not an address that linear addresses can have.
    NonCanonical,
    /// A table lies where the guest has no memory.
    NoMemory(Gpa),
}

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// Error code bits.
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_USER: u32 = 1 << 2;
const FAULT_RESERVED: u32 = 1 << 3;
const FAULT_FETCH: u32 = 1 << 4;

/// Translates `gva` and checks that `access` is allowed there.
pub fn walk(
    memory: &impl PhysicalRead,
    paging: &Paging,
    gva: Gva,
    access: Access,
) -> Result<Translation, WalkError> {
    Walker::new(memory, paging, access).translate(gva)
}

/// The same for an access that is made: sets accessed bits, and for a write the dirty bit.
pub fn walk_and_mark(
    memory: &impl PhysicalMark,
    paging: &Paging,
    gva: Gva,
    access: Access,
) -> Result<Translation, WalkError> {
    /// Walks that an entry which changes at the same time may spoil.
    const TRIES: usize = 16;
    let mut tries = 0;
    loop {
        let mut walker = Walker::new(memory, paging, access);
        let translation = walker.translate(gva)?;
        tries += 1;
        if walker.mark() || tries == TRIES {
            return Ok(translation);
        }
    }
}

/// An entry that was read on the way.
#[derive(Clone, Copy)]
struct Visited {
    slot: Gpa,
    value: u64,
}

struct Walker<'a, M> {
    memory: &'a M,
    paging: &'a Paging,
    access: Access,
    /// Those with an accessed bit, the last of which has a dirty bit.
    visited: ArrayVec<Visited, 5>,
    /// Bytes of each.
    entry_bytes: usize,
}

impl<M: PhysicalMark> Walker<'_, M> {
    /// Sets the bits; false where an entry is not what it was.
    fn mark(&self) -> bool {
        let last = self.visited.len().saturating_sub(1);
        (0..).zip(&self.visited).all(|(index, visited)| {
            let mut new = visited.value | ACCESSED;
            if index == last && self.access.operation == Operation::Write {
                new |= DIRTY;
            }
            new == visited.value
                || self
                    .memory
                    .replace(visited.slot, self.entry_bytes, visited.value, new)
        })
    }
}

/// Rights gathered on the way down: the flags of all entries ANDed, NX ORed.
#[derive(Clone, Copy)]
struct Rights {
    allowed: u64,
    no_execute: bool,
}

impl Rights {
    const ALL: Self = Self {
        allowed: WRITABLE | USER,
        no_execute: false,
    };

    fn and(self, entry: u64) -> Self {
        Self {
            allowed: self.allowed & entry,
            no_execute: self.no_execute || entry & NO_EXECUTE != 0,
        }
    }

    fn translation(self, frame: u64, offset: u64, page_size: u64) -> Translation {
        Translation {
            gpa: Gpa(frame | offset),
            page_size,
            user: self.allowed & USER != 0,
            writable: self.allowed & WRITABLE != 0,
            executable: !self.no_execute,
        }
    }
}

impl<'a, M: PhysicalRead> Walker<'a, M> {
    fn new(memory: &'a M, paging: &'a Paging, access: Access) -> Self {
        Self {
            memory,
            paging,
            access,
            visited: ArrayVec::new(),
            entry_bytes: 8,
        }
    }

    fn translate(&mut self, gva: Gva) -> Result<Translation, WalkError> {
        let paging = self.paging;
        if paging.cr0 & CR0_PG == 0 {
            return Ok(Translation {
                gpa: Gpa(gva.0 & 0xffff_ffff),
                page_size: 4096,
                user: true,
                writable: true,
                executable: true,
            });
        }
        let translation = if paging.efer & EFER_LMA != 0 {
            let levels = if paging.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
            let unused = 64 - (12 + 9 * levels);
            if ((gva.0 << unused) as i64 >> unused) as u64 != gva.0 {
                return Err(WalkError::NonCanonical);
            }
            self.wide(gva.0, levels, Gpa(paging.cr3 & self.address_mask()))
        } else if paging.cr4 & CR4_PAE != 0 {
            self.pae(gva.0 & 0xffff_ffff)
        } else {
            self.narrow(gva.0 & 0xffff_ffff)
        }?;
        self.check(translation)
    }

    fn visit(&mut self, slot: Gpa, value: u64) {
        // Five levels are the most there are.
        let _ = self.visited.try_push(Visited { slot, value });
    }

    /// Bits 12 and up of an address in an entry.
    fn address_mask(&self) -> u64 {
        ((1 << self.paging.physical_bits.min(52)) - 1) & !0xfff
    }

    fn fault(&self, cause: u32) -> WalkError {
        let no_execute = self.paging.efer & EFER_NXE != 0 && self.paging.cr4 & CR4_PAE != 0;
        let mut code = cause;
        match self.access.operation {
            Operation::Read => {}
            Operation::Write => code |= FAULT_WRITE,
            // Told apart from a read only where fetches can be forbidden.
            Operation::Execute if no_execute || self.paging.cr4 & CR4_SMEP != 0 => {
                code |= FAULT_FETCH
            }
            Operation::Execute => {}
        }
        if self.access.user {
            code |= FAULT_USER;
        }
        WalkError::PageFault(code)
    }

    /// The present bit first, then the reserved ones.
    fn check_entry(&self, entry: u64, reserved: u64) -> Result<(), WalkError> {
        if entry & PRESENT == 0 {
            Err(self.fault(0))
        } else if entry & reserved != 0 {
            Err(self.fault(FAULT_PRESENT | FAULT_RESERVED))
        } else {
            Ok(())
        }
    }

    /// Tables of 512 entries of eight bytes, from `level` (4 is the PML4, 1 the page table) down.
    fn wide(&mut self, gva: u64, level: u32, table: Gpa) -> Result<Translation, WalkError> {
        let long = self.paging.efer & EFER_LMA != 0;
        let address_mask = self.address_mask();
        // Above MAXPHYADDR up to bit 51; PAE paging reserves all up to bit 62.
        let top = if long { 1 << 52 } else { 1 << 63 };
        let mut reserved_always = (top - 1) & !0xfff & !address_mask;
        if self.paging.efer & EFER_NXE == 0 {
            reserved_always |= NO_EXECUTE;
        }
        let mut rights = Rights::ALL;
        let mut table = table;
        let mut level = level;
        loop {
            let shift = 12 + 9 * (level - 1);
            let slot = table.wrapping_add(((gva >> shift) & 0x1ff) * 8);
            let entry = self
                .memory
                .read_u64(slot)
                .ok_or(WalkError::NoMemory(slot))?;
            let page_size = 1u64 << shift;
            let large = (2..=3).contains(&level) && entry & LARGE != 0;
            let reserved = match level {
                _ if large => (page_size - 1) & !0x1fff, // bit 12 is the PAT's
                4.. => LARGE,
                _ => 0,
            };
            self.check_entry(entry, reserved | reserved_always)?;
            self.visit(slot, entry);
            rights = rights.and(entry);
            if large || level == 1 {
                let frame = entry & address_mask & !(page_size - 1);
                return Ok(rights.translation(frame, gva & (page_size - 1), page_size));
            }
            table = Gpa(entry & address_mask);
            level -= 1;
        }
    }

    /// PAE paging: four entries without rights of their own, then two levels as in long mode.
    fn pae(&mut self, gva: u64) -> Result<Translation, WalkError> {
        let slot = Gpa((self.paging.cr3 & 0xffff_ffe0) + (gva >> 30) * 8);
        let entry = self
            .memory
            .read_u64(slot)
            .ok_or(WalkError::NoMemory(slot))?;
        // Reserved bits fault when CR3 is loaded, not here (SDM 3, 5.4.1).
        self.check_entry(entry, 0)?;
        self.wide(gva, 2, Gpa(entry & self.address_mask()))
    }

    /// 32-bit paging: two levels of 1024 entries of four bytes.
    fn narrow(&mut self, gva: u64) -> Result<Translation, WalkError> {
        const LARGE_PAGE: u64 = 4 << 20;
        self.entry_bytes = 4;
        let memory = self.memory;
        let entry = |table: u64, index: u64| {
            let slot = Gpa(table + index * 4);
            let entry = memory.read_u32(slot);
            let entry = entry.map(u64::from).ok_or(WalkError::NoMemory(slot))?;
            Ok((slot, entry))
        };
        let (slot, directory) = entry(self.paging.cr3 & 0xffff_f000, gva >> 22)?;
        if directory & LARGE != 0 && self.paging.cr4 & CR4_PSE != 0 {
            // PSE-36: bits 13 to 20 are bits 32 to 39 of the address, as far as MAXPHYADDR goes.
            let above = self.paging.physical_bits.clamp(32, 40) - 32;
            let reserved = 1 << 21 | (0xff & !((1 << above) - 1)) << 13;
            self.check_entry(directory, reserved)?;
            self.visit(slot, directory);
            let frame = (directory & 0xffc0_0000) | ((directory >> 13) & 0xff) << 32;
            return Ok(Rights::ALL.and(directory).translation(
                frame,
                gva & (LARGE_PAGE - 1),
                LARGE_PAGE,
            ));
        }
        self.check_entry(directory, 0)?;
        self.visit(slot, directory);
        let (slot, page) = entry(directory & 0xffff_f000, (gva >> 12) & 0x3ff)?;
        self.check_entry(page, 0)?;
        self.visit(slot, page);
        let rights = Rights::ALL.and(directory).and(page);
        Ok(rights.translation(page & 0xffff_f000, gva & 0xfff, 4096))
    }

    /// The rights of the translation against the access (SDM 3, 5.6.1).
    fn check(&self, translation: Translation) -> Result<Translation, WalkError> {
        let Paging {
            cr0, cr4, rflags, ..
        } = *self.paging;
        let Translation {
            user,
            writable,
            executable,
            ..
        } = translation;
        let allowed = if self.access.user {
            user && match self.access.operation {
                Operation::Read => true,
                Operation::Write => writable,
                Operation::Execute => executable,
            }
        } else {
            let smap = user && cr4 & CR4_SMAP != 0 && rflags & RFLAGS_AC == 0;
            match self.access.operation {
                Operation::Read => !smap,
                Operation::Write => !smap && (writable || cr0 & CR0_WP == 0),
                Operation::Execute => executable && !(user && cr4 & CR4_SMEP != 0),
            }
        };
        if allowed {
            Ok(translation)
        } else {
            Err(self.fault(FAULT_PRESENT))
        }
    }
}
