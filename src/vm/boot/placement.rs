//! Where the boot protocols put what belongs to a kernel.
//!
//! ```text
//! Linux, PVH   multiboot
//! 0x1000       0x8f000    GDT; the first stack ends below it
//! 0x2000       0x90000    the protocol's parameters
//! 0x3000       0x91000    page tables, where the protocol starts with paging; else a list of modules
//! 0x10000      0x94000    command line
//! 0x20000      0x95000    the modules' command lines
//! ```
//!
//! A multiboot kernel may be below these. Else kernels are at 1 MiB or higher; modules follow
//! them, and an initrd is as high as the kernel and 4 GiB allow.

use super::{BootError, Module, Segments};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::LOW_RAM_END;
use alloc::vec::Vec;
use core::ops::Range;

/// Places below 1 MiB.
pub(super) struct Places {
    pub gdt: Gpa,
    pub parameters: Gpa,
    /// Page tables, or a list of modules.
    pub tables: Range<u64>,
    pub command_line: Range<u64>,
    pub module_lines: Range<u64>,
    /// Where a kernel's segments may be below [`HIGH_RAM`].
    pub kernel: Range<u64>,
}

impl Places {
    pub const USUAL: Self = Self {
        gdt: Gpa(0x1000),
        parameters: Gpa(0x2000),
        tables: 0x3000..0xf000,
        command_line: 0x1_0000..0x2_0000,
        module_lines: 0x2_0000..LOW_RAM_END - 0x1000,
        kernel: 0..0,
    };
    pub const MULTIBOOT: Self = Self {
        gdt: Gpa(0x8_f000),
        parameters: Gpa(0x9_0000),
        tables: 0x9_1000..0x9_4000,
        command_line: 0x9_4000..0x9_5000,
        module_lines: 0x9_5000..LOW_RAM_END - 0x1000,
        kernel: 0x1000..0x8_e000,
    };

    /// The stack is the kernel's own matter; it starts with one below the GDT.
    pub const fn stack(&self) -> u64 {
        self.gdt.0
    }
}

/// Of the code and the data segment.
#[derive(Clone, Copy)]
pub(super) struct Selectors {
    pub code: u16,
    pub data: u16,
}

impl Selectors {
    /// Those that the Linux protocol names.
    pub const LINUX: Self = Self {
        code: 0x10,
        data: 0x18,
    };
    /// The first ones, where a protocol names none: some kernels have a GDT of their own that begins
    /// so, and never load CS.
    pub const FIRST: Self = Self {
        code: 0x08,
        data: 0x10,
    };
}

/// A flat code segment, as a GDT holds it (SDM volume 3, 3.4.5).
#[derive(Clone, Copy)]
#[repr(u64)]
pub(super) enum CodeSegment {
    Bits32 = 0x00cf_9b00_0000_ffff,
    Bits64 = 0x00af_9b00_0000_ffff,
}

const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;

/// Writes a GDT with the two selectors.
pub(super) fn write_gdt(
    memory: &GuestMemory,
    places: &Places,
    selectors: Selectors,
    code: CodeSegment,
) -> Result<Segments, OutOfSlot> {
    memory.fill(places.gdt, selectors.data.into(), 0)?;
    for (selector, entry) in [
        (selectors.code, code as u64),
        (selectors.data, DATA_SEGMENT),
    ] {
        let at = places.gdt.wrapping_add(selector.into());
        memory.write(at, &entry.to_le_bytes())?;
    }
    Ok(Segments {
        gdt_base: places.gdt,
        gdt_limit: selectors.data + 7,
        code_selector: selectors.code,
        data_selector: selectors.data,
    })
}

/// Writes the command line and its zero; the kernel takes `limit` bytes.
pub(super) fn write_command_line(
    memory: &GuestMemory,
    places: &Places,
    line: &str,
    limit: usize,
) -> Result<(), BootError> {
    let room = places.command_line.end - places.command_line.start;
    let limit = limit.min(room as usize - 1);
    if line.len() > limit {
        return Err(BootError::CommandLineTooLong {
            len: line.len(),
            limit,
        });
    }
    let at = Gpa(places.command_line.start);
    memory.write(at, line.as_bytes())?;
    memory.write(at.wrapping_add(line.len() as u64), &[0])?;
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
    places: &Places,
    modules: &[Module],
    room: Range<u64>,
    entry: u64,
) -> Result<Vec<PlacedModule>, BootError> {
    // One more, for the initrd.
    let limit = ((places.tables.end - places.tables.start) / entry - 1) as usize;
    if modules.len() > limit {
        return Err(BootError::TooManyModules {
            count: modules.len(),
            limit,
        });
    }
    let mut next = room.start;
    let mut line = places.module_lines.start;
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
        if after > places.module_lines.end {
            return Err(BootError::CommandLineTooLong {
                len: modules.iter().map(|module| module.cmdline.len()).sum(),
                limit: (places.module_lines.end - places.module_lines.start) as usize,
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
