//! The segments of an ELF kernel, and the way to their physical addresses.

use super::BootError;
use crate::addr::Gpa;
use crate::vm::memory::GuestMemory;
use crate::vm::memory_map::HIGH_RAM;
use alloc::vec::Vec;
use core::ops::Range;
use object::LittleEndian;
use object::elf::{FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use vireo_handoff::image::{self, ImageError};

/// What is loaded of a file, of whatever kind it is: each segment has its place.
pub(super) struct Segments<'a>(Vec<Segment<'a>>);

/// Bytes of the file for one run of memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    /// Guest physical address.
    pub start: u64,
    /// Bytes in memory; what is beyond `bytes` is zero.
    pub size: u64,
    pub bytes: &'a [u8],
}

impl Segment<'_> {
    /// One past its last address.
    const fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// An ELF file, as far as it is loaded.
pub(super) struct Kernel<'a> {
    pub segments: Segments<'a>,
    /// The physical address of its header's entry point.
    pub entry: u64,
    /// What its note of the name "Xen" and the type 18 says.
    pub pvh_entry: Option<u64>,
}

/// Reads an ELF file of either class.
///
/// # Errors
/// When it is damaged.
pub(super) fn read(image: &[u8]) -> Result<Kernel<'_>, BootError> {
    if image::is_64_bit(image) {
        read_class::<FileHeader64<LittleEndian>>(image)
    } else {
        read_class::<FileHeader32<LittleEndian>>(image)
    }
}

fn read_class<Elf: FileHeader<Endian = LittleEndian>>(
    image: &[u8],
) -> Result<Kernel<'_>, BootError> {
    let file = Elf::parse(image)?;
    let headers = file.program_headers(LittleEndian, image)?;
    let mut segments = Vec::new();
    let mut entry: u64 = file.e_entry(LittleEndian).into();
    let mut translated = false;
    for header in headers
        .iter()
        .filter(|header| header.p_type(LittleEndian) == PT_LOAD)
    {
        let (offset, len) = header.file_range(LittleEndian);
        let bytes = header
            .data(LittleEndian, image)
            .map_err(|()| ImageError::Truncated {
                need: offset.saturating_add(len),
                have: image.len() as u64,
            })?;
        let size = u64::max(header.p_memsz(LittleEndian).into(), len);
        let start: u64 = header.p_paddr(LittleEndian).into();
        // The header names the entry as the linker does, which may give other addresses.
        let address: u64 = header.p_vaddr(LittleEndian).into();
        if !translated
            && let Some(inside) = entry.checked_sub(address)
            && inside < size
        {
            entry = start.saturating_add(inside);
            translated = true;
        }
        if size > 0 {
            segments.push(Segment { start, size, bytes });
        }
    }
    Ok(Kernel {
        segments: Segments(segments),
        entry,
        pvh_entry: pvh_entry(headers, image)?,
    })
}

/// The address in the note: as many bytes as the file's addresses have, and below 4 GiB.
fn pvh_entry<H: ProgramHeader<Endian = LittleEndian>>(
    headers: &[H],
    image: &[u8],
) -> Result<Option<u64>, BootError> {
    const NAME: &[u8] = b"Xen";
    /// XEN_ELFNOTE_PHYS32_ENTRY.
    const ENTRY: u32 = 18;
    for header in headers {
        let Some(notes) = header.notes(LittleEndian, image)? else {
            continue;
        };
        for note in notes {
            let note = note?;
            if note.name() != NAME || note.n_type(LittleEndian).0 != ENTRY {
                continue;
            }
            return Ok(match *note.desc() {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0, ..] => {
                    Some(u32::from_le_bytes([a, b, c, d]).into())
                }
                _ => None,
            });
        }
    }
    Ok(None)
}

impl<'a> Segments<'a> {
    /// A single one.
    pub fn one(segment: Segment<'a>) -> Self {
        Self(alloc::vec![segment])
    }

    /// Copies them to their places, once all are known to fit, and `entry` to be in what the
    /// file fills; where the highest ends. Below [`HIGH_RAM`] they may be in `low`.
    ///
    /// # Errors
    /// What does not fit.
    pub fn load(
        mut self,
        entry: u64,
        memory: &GuestMemory,
        low: &Range<u64>,
        ram_end: u64,
    ) -> Result<u64, BootError> {
        self.0.sort_unstable_by_key(|segment| segment.start);
        let too_low = |segment: &&Segment| {
            segment.start < HIGH_RAM && (segment.start < low.start || segment.end() > low.end)
        };
        if let Some(&Segment { start, .. }) = self.0.iter().find(too_low) {
            return Err(BootError::LoadsTooLow { start });
        }
        let need = self.0.iter().map(Segment::end).max();
        let need = need.unwrap_or(HIGH_RAM).max(HIGH_RAM);
        if need > ram_end {
            return Err(BootError::TooLittleMemory {
                need,
                have: ram_end,
            });
        }
        for pair in self.0.windows(2) {
            if let [low, high] = pair
                && low.end() > high.start
            {
                return Err(BootError::OverlappingSegments {
                    first: low.start,
                    end: low.end(),
                    second: high.start,
                });
            }
        }
        let fills = |segment: &Segment| {
            let inside = entry.checked_sub(segment.start);
            inside.is_some_and(|inside| inside < segment.bytes.len() as u64)
        };
        if !self.0.iter().any(fills) {
            return Err(BootError::EntryNotLoaded { entry });
        }
        for Segment { start, size, bytes } in self.0 {
            let filled = bytes.len() as u64;
            memory.write(Gpa(start), bytes)?;
            memory.fill(Gpa(start).wrapping_add(filled), size - filled, 0)?;
        }
        Ok(need)
    }
}
