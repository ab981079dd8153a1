//! Where the boot protocols put what belongs to a kernel.
//!
//! ```text
//! 0x1000     GDT; the first stack ends below it
//! 0x2000     the protocol's parameters
//! 0x3000     page tables, where the protocol starts with paging; else a list of modules
//! 0x10000    command line
//! 0x20000    the modules' command lines
//! 0x100000   the kernel, here or higher; modules follow
//! initrd     as high as the kernel and 4 GiB allow
//! ```

use super::{BootError, Module};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::LOW_RAM_END;
use alloc::vec::Vec;
use core::ops::Range;

const GDT: Gpa = Gpa(0x1000);
pub(super) const PARAMETERS: Gpa = Gpa(0x2000);
pub(super) const PAGE_TABLES: Gpa = Gpa(0x3000);
/// Where protocols without page tables put a list of modules.
pub(super) const TABLES: Gpa = PAGE_TABLES;
const TABLES_END: Gpa = Gpa(0xf000);
pub(super) const COMMAND_LINE: Gpa = Gpa(0x1_0000);
/// The stack is the kernel's own matter; it starts with one below the GDT.
pub(super) const STACK: u64 = GDT.0;
const MODULE_COMMAND_LINES: Range<u64> = 0x2_0000..LOW_RAM_END - 0x1000;
/// Bytes of command line, without its zero, that there is room for.
const COMMAND_LINE_ROOM: usize = 0xffff;

/// The selectors that the Linux protocol names; the others name none.
pub(super) const CODE_SELECTOR: u16 = 0x10;
pub(super) const DATA_SELECTOR: u16 = 0x18;

/// A flat code segment, as a GDT holds it (SDM volume 3, 3.4.5).
#[derive(Clone, Copy)]
#[repr(u64)]
pub(super) enum CodeSegment {
    Bits32 = 0x00cf_9b00_0000_ffff,
    Bits64 = 0x00af_9b00_0000_ffff,
}

const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;

/// Writes a GDT with the two selectors; its base and limit.
pub(super) fn write_gdt(memory: &GuestMemory, code: CodeSegment) -> Result<(Gpa, u16), OutOfSlot> {
    let entries = [0, 0, code as u64, DATA_SEGMENT];
    for (gpa, entry) in (GDT.0..).step_by(8).zip(entries) {
        memory.write(Gpa(gpa), &entry.to_le_bytes())?;
    }
    Ok((GDT, (entries.len() * 8 - 1) as u16))
}

/// Writes the command line and its zero to [`COMMAND_LINE`]; the kernel takes `limit` bytes.
pub(super) fn write_command_line(
    memory: &GuestMemory,
    line: &str,
    limit: usize,
) -> Result<(), BootError> {
    let limit = limit.min(COMMAND_LINE_ROOM);
    if line.len() > limit {
        return Err(BootError::CommandLineTooLong {
            len: line.len(),
            limit,
        });
    }
    memory.write(COMMAND_LINE, line.as_bytes())?;
    memory.write(COMMAND_LINE.wrapping_add(line.len() as u64), &[0])?;
    Ok(())
}

/// A module in guest memory, below 4 GiB.
#[derive(Clone, Copy)]
pub(super) struct PlacedModule {
    pub start: u32,
    pub len: u32,
    /// Where its command line is; 0 without one.
    pub cmdline: u32,
}

/// Writes the modules into `room`, each at the next page, and their command lines; the list
/// of them will have entries of `entry` bytes.
pub(super) fn write_modules(
    memory: &GuestMemory,
    modules: &[Module],
    room: Range<u64>,
    entry: u64,
) -> Result<Vec<PlacedModule>, BootError> {
    // One more, for the initrd.
    let limit = ((TABLES_END.0 - TABLES.0) / entry - 1) as usize;
    if modules.len() > limit {
        return Err(BootError::TooManyModules {
            count: modules.len(),
            limit,
        });
    }
    let mut next = room.start;
    let mut line = MODULE_COMMAND_LINES.start;
    let mut placed = Vec::new();
    for module in modules {
        let start = next.next_multiple_of(PAGE_SIZE);
        let len = module.bytes.len() as u64;
        next = start.saturating_add(len);
        if next > room.end {
            return Err(BootError::ModulesTooLarge {
                size: modules.iter().map(|module| module.bytes.len() as u64).sum(),
                room: room.end.saturating_sub(room.start),
            });
        }
        memory.write(Gpa(start), module.bytes)?;
        let text = module.cmdline.as_bytes();
        let after = line + text.len() as u64 + 1;
        if after > MODULE_COMMAND_LINES.end {
            return Err(BootError::CommandLineTooLong {
                len: modules.iter().map(|module| module.cmdline.len()).sum(),
                limit: (MODULE_COMMAND_LINES.end - MODULE_COMMAND_LINES.start) as usize,
            });
        }
        memory.write(Gpa(line), text)?;
        memory.write(Gpa(after - 1), &[0])?;
        placed.push(PlacedModule {
            start: start as u32,
            len: len as u32,
            cmdline: line as u32,
        });
        line = after;
    }
    Ok(placed)
}

/// An initrd in guest memory, below 4 GiB.
#[derive(Clone, Copy)]
pub(super) struct Initrd {
    pub start: u32,
    pub len: u32,
}

/// Writes the initrd between `kernel_end` and `end`, as high as it fits.
pub(super) fn write_initrd(
    memory: &GuestMemory,
    initrd: &[u8],
    kernel_end: u64,
    end: u64,
) -> Result<Initrd, BootError> {
    let size = initrd.len() as u64;
    let room = end.saturating_sub(kernel_end);
    let start = Gpa(end.saturating_sub(size)).align_down(PAGE_SIZE);
    if size > room || start.0 < kernel_end {
        return Err(BootError::InitrdTooLarge { size, room });
    }
    memory.write(start, initrd)?;
    // RAM below the hole ends below 4 GiB.
    Ok(Initrd {
        start: start.0 as u32,
        len: size as u32,
    })
}
