//! The PVH boot protocol (Xen, `docs/misc/pvh.pandoc` and
//! `xen/include/public/arch-x86/hvm/start_info.h`).
//!
//! An ELF file with a note that names a 32-bit entry point. An uncompressed
//! Linux kernel (`vmlinux`) is one, which saves the guest from unpacking
//! itself; so are several unikernels and the BSDs.
//!
//! ```text
//! 0x2000     hvm_start_info, whose address is in EBX
//! 0x2040     hvm_modlist_entry: the initrd
//! 0x2080     hvm_memmap_table_entry: the memory map
//! ```

use super::placement::{self, CODE_SELECTOR, CodeSegment, DATA_SELECTOR, Initrd, PARAMETERS};
use super::{BootError, EntryMode, EntryState};
use crate::addr::Gpa;
use crate::vm::memory::GuestMemory;
use crate::vm::memory_map::{HIGH_RAM, MemoryMap};
use object::LittleEndian;
use object::elf::{FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use vireo_handoff::image::ImageError;

/// Offset of the byte that tells 32-bit from 64-bit files, and its value for 64-bit ones.
const CLASS: usize = 4;
const CLASS_64: u8 = 2;

const NOTE_NAME: &[u8] = b"Xen";
/// XEN_ELFNOTE_PHYS32_ENTRY.
const NOTE_ENTRY: u32 = 18;

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Version 1 is the first with a memory map.
const START_INFO_VERSION: u32 = 1;
const MODULES: Gpa = Gpa(PARAMETERS.0 + 0x40);
const MEMORY_MAP: Gpa = Gpa(PARAMETERS.0 + 0x80);
const MEMORY_MAP_ENTRY: u64 = 24;
/// The protocol sets no limit; this is Linux's COMMAND_LINE_SIZE less its zero.
const COMMAND_LINE_LIMIT: usize = 2047;

/// What loading the ELF file's segments told.
struct Loaded {
    /// Physical address of the 32-bit entry point.
    entry: u64,
    /// End of the highest segment.
    end: u64,
}

/// Loads an ELF file with a PVH entry point.
///
/// # Errors
/// Why the image cannot be booted in this guest.
pub fn load(
    image: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    memory: &GuestMemory,
    map: &MemoryMap,
    rsdp: Gpa,
) -> Result<EntryState, BootError> {
    let ram_end = map.ram_below_4g();
    let kernel = if image.get(CLASS) == Some(&CLASS_64) {
        load_segments::<FileHeader64<LittleEndian>>(image, memory, ram_end)?
    } else {
        load_segments::<FileHeader32<LittleEndian>>(image, memory, ram_end)?
    };
    placement::write_command_line(memory, cmdline, COMMAND_LINE_LIMIT)?;
    let initrd = match initrd {
        None => None,
        Some(initrd) => Some(placement::write_initrd(
            memory, initrd, kernel.end, ram_end,
        )?),
    };
    write_start_info(initrd, memory, map, rsdp)?;
    let (gdt_base, gdt_limit) = placement::write_gdt(memory, CodeSegment::Bits32)?;
    Ok(EntryState {
        mode: EntryMode::Protected32,
        rip: kernel.entry,
        rsp: placement::STACK,
        rsi: 0,
        rbx: PARAMETERS.0,
        gdt_base,
        gdt_limit,
        code_selector: CODE_SELECTOR,
        data_selector: DATA_SELECTOR,
    })
}

/// Copies the segments to their physical addresses, once all are known to fit.
fn load_segments<Elf: FileHeader<Endian = LittleEndian>>(
    image: &[u8],
    memory: &GuestMemory,
    ram_end: u64,
) -> Result<Loaded, BootError> {
    let headers = Elf::parse(image)?.program_headers(LittleEndian, image)?;
    let entry = entry_point(headers, image)?;
    let segments = || {
        headers
            .iter()
            .filter(|header| header.p_type(LittleEndian) == PT_LOAD)
            .map(|header| Segment::read(header, image))
            .filter(|segment| !matches!(segment, Ok(Segment { size: 0, .. })))
    };

    let mut end = HIGH_RAM;
    let mut entry_is_loaded = false;
    for segment in segments() {
        let segment = segment?;
        if segment.start < HIGH_RAM {
            return Err(BootError::LoadsTooLow {
                start: segment.start,
            });
        }
        end = end.max(segment.start.saturating_add(segment.size));
        entry_is_loaded |=
            entry >= segment.start && entry - segment.start < segment.bytes.len() as u64;
    }
    if end > ram_end {
        return Err(BootError::TooLittleMemory {
            need: end,
            have: ram_end,
        });
    }
    if !entry_is_loaded {
        return Err(BootError::EntryNotLoaded { entry });
    }
    for segment in segments() {
        let segment = segment?;
        let filled = segment.bytes.len() as u64;
        memory.write(Gpa(segment.start), segment.bytes)?;
        memory.fill(
            Gpa(segment.start).wrapping_add(filled),
            segment.size - filled,
            0,
        )?;
    }
    Ok(Loaded { entry, end })
}

struct Segment<'a> {
    /// Guest physical address.
    start: u64,
    /// Bytes in memory; what is beyond `bytes` is zero.
    size: u64,
    bytes: &'a [u8],
}

impl<'a> Segment<'a> {
    fn read(
        header: &impl ProgramHeader<Endian = LittleEndian>,
        image: &'a [u8],
    ) -> Result<Self, BootError> {
        let (offset, len) = header.file_range(LittleEndian);
        let bytes = header
            .data(LittleEndian, image)
            .map_err(|()| ImageError::Truncated {
                need: offset.saturating_add(len),
                have: image.len() as u64,
            })?;
        let size: u64 = header.p_memsz(LittleEndian).into();
        Ok(Self {
            start: header.p_paddr(LittleEndian).into(),
            size: size.max(len),
            bytes,
        })
    }
}

/// The address in the note: as many bytes as the file's addresses have.
fn entry_point<H: ProgramHeader<Endian = LittleEndian>>(
    headers: &[H],
    image: &[u8],
) -> Result<u64, BootError> {
    for header in headers {
        let Some(notes) = header.notes(LittleEndian, image)? else {
            continue;
        };
        for note in notes {
            let note = note?;
            if note.name() != NOTE_NAME || note.n_type(LittleEndian).0 != NOTE_ENTRY {
                continue;
            }
            return match *note.desc() {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0, ..] => {
                    Ok(u32::from_le_bytes([a, b, c, d]).into())
                }
                _ => Err(BootError::NoPvhEntry),
            };
        }
    }
    Err(BootError::NoPvhEntry)
}

fn write_start_info(
    initrd: Option<Initrd>,
    memory: &GuestMemory,
    map: &MemoryMap,
    rsdp: Gpa,
) -> Result<(), BootError> {
    let ranges = map.ranges();
    let modules = if initrd.is_some() { MODULES.0 } else { 0 };
    let mut at = PARAMETERS;
    let mut put = |field: &[u8]| {
        let here = at;
        at = at.wrapping_add(field.len() as u64);
        memory.write(here, field)
    };
    put(&START_INFO_MAGIC.to_le_bytes())?;
    put(&START_INFO_VERSION.to_le_bytes())?;
    put(&0u32.to_le_bytes())?; // flags: neither privileged nor the initial domain
    put(&u32::from(initrd.is_some()).to_le_bytes())?;
    put(&modules.to_le_bytes())?;
    put(&placement::COMMAND_LINE.0.to_le_bytes())?;
    put(&rsdp.0.to_le_bytes())?;
    put(&MEMORY_MAP.0.to_le_bytes())?;
    put(&(ranges.len() as u32).to_le_bytes())?;
    put(&0u32.to_le_bytes())?;

    if let Some(initrd) = initrd {
        // Address, size, no command line, reserved.
        let fields = [initrd.start.into(), initrd.len.into(), 0, 0];
        for (gpa, field) in (MODULES.0..).step_by(8).zip(fields) {
            memory.write(Gpa(gpa), &u64::to_le_bytes(field))?;
        }
    }
    for (gpa, range) in (MEMORY_MAP.0..)
        .step_by(MEMORY_MAP_ENTRY as usize)
        .zip(&ranges)
    {
        memory.write(Gpa(gpa), &range.start.0.to_le_bytes())?;
        memory.write(Gpa(gpa + 8), &range.len.to_le_bytes())?;
        // The type, and a reserved word.
        memory.write(Gpa(gpa + 16), &u64::from(range.kind as u32).to_le_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
