//! Multiboot 1 (Multiboot Specification 0.6.96): an ELF file, or any file whose header says
//! where it belongs.
//!
//! ```text
//! 0x90000    the boot information, whose address is in EBX
//! 0x90080    the memory map
//! 0x90f00    this loader's name
//! 0x91000    the list of modules
//! ```
//!
//! The specification wants the rest of the machine as a BIOS leaves it (3.2), for kernels that go
//! back to real mode. Of a BIOS there are the interrupt controllers' and the timer's state, and
//! interrupt vectors, which end at once.
//!
//! A kernel that wishes for graphics gets text all the same: a wish is all that it is (3.1.4). It
//! is told of no framebuffer, since some take any for one of pixels.
//!
//! Command lines begin with the file's name, as other loaders have it. Modules follow the
//! kernel, each at a page of its own, whether it asks for that or not.

use super::elf::{self, Segment, Segments};
use super::placement::{self, CodeSegment, PlacedModule, Places, Selectors};
use super::{BootError, EntryMode, EntryState, Images, Machine, Module};
use crate::addr::Gpa;
use crate::devices::vga::TextMode;
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::{HIGH_RAM, LOW_RAM_END, TEXT_MEMORY};
use alloc::borrow::Cow;
use vireo_handoff::image::multiboot::{Addresses, Header};
use vireo_handoff::image::{Content, ImageError};

const PLACES: Places = Places::MULTIBOOT;
const PARAMETERS: Gpa = PLACES.parameters;
/// What EAX holds at entry.
const LOADER_MAGIC: u64 = 0x2bad_b002;
const LOADER_NAME: &[u8; 6] = b"Vireo\0";
const LOADER_NAME_AT: Gpa = Gpa(PARAMETERS.0 + 0xf00);
const MEMORY_MAP: Gpa = Gpa(PARAMETERS.0 + 0x80);
const MODULES: Gpa = Gpa(PLACES.tables.start);
const MODULE_ENTRY: u64 = 16;
/// Bytes of a memory-map entry behind its first field, which says so.
const MEMORY_MAP_ENTRY: u32 = 20;
/// There is room for a page of it.
const COMMAND_LINE_LIMIT: usize = 4095;

/// What of the boot information is there.
mod flag {
    pub const MEMORY: u32 = 1 << 0;
    pub const COMMAND_LINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
    pub const FRAMEBUFFER: u32 = 1 << 12;
}

/// Offsets in the boot information (3.3).
mod info {
    pub const FLAGS: u64 = 0;
    pub const MEMORY_LOWER: u64 = 4;
    pub const MEMORY_UPPER: u64 = 8;
    pub const COMMAND_LINE: u64 = 16;
    pub const MODULE_COUNT: u64 = 20;
    pub const MODULES: u64 = 24;
    pub const MEMORY_MAP_LENGTH: u64 = 44;
    pub const MEMORY_MAP: u64 = 48;
    pub const LOADER_NAME: u64 = 64;
    pub const FRAMEBUFFER: u64 = 88;
    pub const FRAMEBUFFER_PITCH: u64 = 96;
    pub const FRAMEBUFFER_WIDTH: u64 = 100;
    pub const FRAMEBUFFER_HEIGHT: u64 = 104;
    /// Bits of a cell and, in the next byte, what the cells are.
    pub const FRAMEBUFFER_CELLS: u64 = 108;
    /// Up to where a loader may know it.
    pub const LENGTH: u64 = 120;
}

/// Loads a kernel with this header.
///
/// # Errors
/// Why the image cannot be booted in this guest.
pub fn load(header: &Header, images: &Images, machine: &Machine) -> Result<EntryState, BootError> {
    let memory = machine.memory;
    let ram_end = machine.map.ram_below_4g();
    let (segments, entry) = match header.addresses {
        Some(addresses) => {
            let segment = placed(&addresses, header.offset, images.kernel)?;
            (Segments::one(segment), addresses.entry.into())
        }
        None => match Content::of(images.kernel) {
            Content::Elf => {
                let kernel = elf::read(images.kernel)?;
                (kernel.segments, kernel.entry)
            }
            content => return Err(ImageError::NotOf(images.protocol, content).into()),
        },
    };
    let end = segments.load(entry, memory, &PLACES.kernel, ram_end)?;

    let line = with_name(images.name, images.cmdline);
    placement::write_command_line(memory, &PLACES, &line, COMMAND_LINE_LIMIT)?;
    let initrd = images.initrd.map(|bytes| Module {
        bytes,
        cmdline: Cow::Borrowed(""),
    });
    let all: alloc::vec::Vec<Module> = initrd
        .into_iter()
        .chain(images.modules.iter().cloned())
        .collect();
    let modules = placement::write_modules(memory, &PLACES, &all, end..ram_end, MODULE_ENTRY)?;
    write_info(&modules, machine, header.graphics)?;
    write_vectors(memory)?;
    Ok(EntryState {
        mode: EntryMode::Protected32,
        rip: entry,
        rsp: PLACES.stack(),
        rax: LOADER_MAGIC,
        rsi: 0,
        rbx: PARAMETERS.0,
        segments: placement::write_gdt(memory, &PLACES, Selectors::FIRST, CodeSegment::Bits32)?,
        as_by_bios: true,
    })
}

/// A command line behind the name of the file that it is for.
pub fn with_name<'a>(name: &'a str, line: &'a str) -> Cow<'a, str> {
    match (name, line) {
        (name, "") => Cow::Borrowed(name),
        ("", line) => Cow::Borrowed(line),
        _ => Cow::Owned([name, line].join(" ")),
    }
}

/// Where the address fields put the file (3.1.3).
fn placed<'a>(
    addresses: &Addresses,
    offset: u32,
    image: &'a [u8],
) -> Result<Segment<'a>, BootError> {
    let wrong = |reason| Err(BootError::MultibootAddresses { reason });
    let Some(before) = addresses.header.checked_sub(addresses.load) else {
        return wrong("the header is to be below what is loaded");
    };
    let Some(first) = offset.checked_sub(before) else {
        return wrong("what is loaded begins before the file");
    };
    let rest = image.get(first as usize..).unwrap_or_default();
    let bytes = match addresses.load_end {
        0 => rest,
        end => match end.checked_sub(addresses.load) {
            None => return wrong("what is loaded ends before it begins"),
            Some(len) => rest.get(..len as usize).ok_or(ImageError::Truncated {
                need: u64::from(first) + u64::from(len),
                have: image.len() as u64,
            })?,
        },
    };
    let start = u64::from(addresses.load);
    let filled = start + bytes.len() as u64;
    let end = match addresses.bss_end {
        0 => filled,
        end if u64::from(end) < filled => return wrong("what is cleared ends before it begins"),
        end => end.into(),
    };
    Ok(Segment {
        start,
        size: end - start,
        bytes,
    })
}

/// Writes real mode's interrupt vectors: of the timer, and of all else.
fn write_vectors(memory: &GuestMemory) -> Result<(), OutOfSlot> {
    const TIMER: usize = 8;
    /// Offsets in the segment 0xf000, where BIOSes have these.
    const TIMER_HANDLER: u16 = 0xfea5;
    const RETURN: u16 = 0xff53;
    const SEGMENT: u16 = 0xf000;
    /// push ax; mov al, 0x20; out 0x20, al; pop ax; iret
    const END_OF_INTERRUPT: [u8; 7] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
    const IRET: [u8; 1] = [0xcf];

    for vector in 0..256 {
        let offset = if vector == TIMER {
            TIMER_HANDLER
        } else {
            RETURN
        };
        let entry = u32::from(SEGMENT) << 16 | u32::from(offset);
        memory.write(Gpa(4 * vector as u64), &entry.to_le_bytes())?;
    }
    let at = |offset: u16| Gpa((u64::from(SEGMENT) << 4) + u64::from(offset));
    memory.write(at(TIMER_HANDLER), &END_OF_INTERRUPT)?;
    memory.write(at(RETURN), &IRET)
}

fn write_info(
    modules: &[PlacedModule],
    machine: &Machine,
    wants_graphics: bool,
) -> Result<(), OutOfSlot> {
    let memory = machine.memory;
    memory.fill(PARAMETERS, info::LENGTH, 0)?;
    let put = |at: Gpa, value: u32| memory.write(at, &value.to_le_bytes());
    let field = |offset: u64, value: u32| put(PARAMETERS.wrapping_add(offset), value);

    let ranges = machine.map.ranges();
    let mut at = MEMORY_MAP;
    for range in &ranges {
        put(at, MEMORY_MAP_ENTRY)?;
        memory.write(at.wrapping_add(4), &range.start.0.to_le_bytes())?;
        memory.write(at.wrapping_add(12), &range.len.to_le_bytes())?;
        put(at.wrapping_add(20), range.kind as u32)?;
        at = at.wrapping_add(u64::from(MEMORY_MAP_ENTRY) + 4);
    }
    for (entry, module) in (MODULES.0..).step_by(MODULE_ENTRY as usize).zip(modules) {
        let fields = [
            module.start,
            module.start.saturating_add(module.len),
            module.cmdline,
            0,
        ];
        for (at, value) in (entry..).step_by(4).zip(fields) {
            put(Gpa(at), value)?;
        }
    }
    memory.write(LOADER_NAME_AT, LOADER_NAME)?;

    let flags =
        flag::MEMORY | flag::COMMAND_LINE | flag::MODULES | flag::MEMORY_MAP | flag::LOADER_NAME;
    // In KiB, from 0 and from 1 MiB up.
    let below_4g = machine.map.ram_below_4g();
    field(info::MEMORY_LOWER, (LOW_RAM_END.min(below_4g) >> 10) as u32)?;
    field(
        info::MEMORY_UPPER,
        (below_4g.saturating_sub(HIGH_RAM) >> 10) as u32,
    )?;
    field(info::COMMAND_LINE, PLACES.command_line.start as u32)?;
    field(info::MODULE_COUNT, modules.len() as u32)?;
    field(info::MODULES, MODULES.0 as u32)?;
    field(info::MEMORY_MAP_LENGTH, (at.0 - MEMORY_MAP.0) as u32)?;
    field(info::MEMORY_MAP, MEMORY_MAP.0 as u32)?;
    field(info::LOADER_NAME, LOADER_NAME_AT.0 as u32)?;
    if wants_graphics {
        return field(info::FLAGS, flags);
    }

    // Cells of 16 bits, which are text (type 2).
    let TextMode {
        pitch,
        columns,
        rows,
        ..
    } = TextMode::FIRST;
    field(info::FRAMEBUFFER, TEXT_MEMORY as u32)?;
    field(info::FRAMEBUFFER_PITCH, u32::from(pitch) * 2)?;
    field(info::FRAMEBUFFER_WIDTH, columns.into())?;
    field(info::FRAMEBUFFER_HEIGHT, rows.into())?;
    field(info::FRAMEBUFFER_CELLS, 16 | 2 << 8)?;
    field(info::FLAGS, flags | flag::FRAMEBUFFER)
}

#[cfg(test)]
mod tests;
