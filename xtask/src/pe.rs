//! The conversion of the loader, a static-pie ELF file, to an EFI application:
//! PE32+ with a section for each loadable segment and base relocations
//! (Microsoft, "PE Format"; UEFI 2.10, 2.1.1).

use anyhow::{Context, Result, bail, ensure};
use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader, Rela};
use object::{Endianness, elf, pe};

/// Where the image begins: below are the headers.
const SHIFT: u64 = 0x1000;
const PAGE: u64 = 0x1000;
const FILE_ALIGNMENT: usize = 0x200;
const HEADERS: usize = 0x400;
/// Offset of the PE signature, right behind the DOS header.
const PE_OFFSET: usize = 64;

struct Section {
    name: &'static [u8],
    address: u64,
    size: u64,
    data: Vec<u8>,
    characteristics: pe::SectionFlags,
}

/// Makes an EFI application of the linked loader.
///
/// # Errors
/// When the file is not a position-independent ELF64 program for x86-64, or
/// has relocations other than `R_X86_64_RELATIVE`.
pub fn convert(file: &[u8]) -> Result<Vec<u8>> {
    let file = ElfFile64::<Endianness>::parse(file).context("the loader is not an ELF64 file")?;
    let (header, endian, data) = (file.elf_header(), file.endian(), file.data());
    ensure!(
        header.e_machine(endian) == elf::EM_X86_64 && header.e_type(endian) == elf::ET_DYN,
        "the loader is not a position-independent program for x86-64"
    );

    let mut image = Vec::new();
    let mut relocations = None;
    let segments = header.program_headers(endian, data)?;
    for segment in segments {
        match segment.p_type(endian) {
            elf::PT_LOAD => {
                let start = usize::try_from(segment.p_vaddr(endian))?;
                let end = start + usize::try_from(segment.p_memsz(endian))?;
                if image.len() < end {
                    image.resize(end, 0);
                }
                let bytes = segment
                    .data(endian, data)
                    .ok()
                    .context("a segment lies outside the file")?;
                image[start..start + bytes.len()].copy_from_slice(bytes);
            }
            elf::PT_DYNAMIC => {
                let mut table = (0, 0);
                for entry in segment.dynamic(endian, data)?.unwrap_or_default() {
                    match entry.tag(endian) {
                        elf::DT_RELA => table.0 = entry.d_val(endian),
                        elf::DT_RELASZ => table.1 = entry.d_val(endian),
                        elf::DT_REL | elf::DT_JMPREL => {
                            bail!("the loader has REL or PLT relocations")
                        }
                        _ => {}
                    }
                }
                relocations = Some(table);
            }
            _ => {}
        }
    }
    let places = relocate(&mut image, relocations.unwrap_or_default(), endian)?;

    let mut sections = Vec::new();
    for segment in segments {
        if segment.p_type(endian) != elf::PT_LOAD {
            continue;
        }
        let start = segment.p_vaddr(endian) / PAGE * PAGE;
        let end = segment.p_vaddr(endian) + segment.p_memsz(endian);
        let (name, characteristics) = match segment.p_flags(endian).0 {
            flags if flags & elf::PF_X.0 != 0 => (
                &b".text"[..],
                pe::IMAGE_SCN_CNT_CODE | pe::IMAGE_SCN_MEM_EXECUTE,
            ),
            flags if flags & elf::PF_W.0 != 0 => (
                &b".data"[..],
                pe::IMAGE_SCN_CNT_INITIALIZED_DATA | pe::IMAGE_SCN_MEM_WRITE,
            ),
            _ => (&b".rdata"[..], pe::IMAGE_SCN_CNT_INITIALIZED_DATA),
        };
        sections.push(Section {
            name,
            address: start + SHIFT,
            size: end - start,
            data: image[usize::try_from(start)?..usize::try_from(end)?].to_vec(),
            characteristics: characteristics | pe::IMAGE_SCN_MEM_READ,
        });
    }
    let blocks = base_relocations(&places);
    sections.push(Section {
        name: b".reloc",
        address: (image.len() as u64 + SHIFT).next_multiple_of(PAGE),
        size: blocks.len() as u64,
        data: blocks,
        characteristics: pe::IMAGE_SCN_CNT_INITIALIZED_DATA
            | pe::IMAGE_SCN_MEM_READ
            | pe::IMAGE_SCN_MEM_DISCARDABLE,
    });
    sections
        .iter()
        .zip(sections.iter().skip(1))
        .try_for_each(|(low, high)| {
            ensure!(
                low.address + low.size <= high.address,
                "two segments of the loader share a page"
            );
            Ok(())
        })?;
    write(&sections, header.e_entry(endian) + SHIFT)
}

/// Applies the relocations to the image at [`SHIFT`]; where they are, from
/// there, ascending.
fn relocate(image: &mut [u8], (table, size): (u64, u64), endian: Endianness) -> Result<Vec<u64>> {
    let table = usize::try_from(table)?;
    let bytes = image
        .get(table..table + usize::try_from(size)?)
        .context("the relocation table lies outside the image")?
        .to_vec();
    let entry = size_of::<elf::Rela64<Endianness>>();
    let entries: &[elf::Rela64<Endianness>] =
        object::pod::slice_from_all_bytes(&bytes[..bytes.len() / entry * entry])
            .ok()
            .context("the relocation table cannot be read")?;
    let mut places = Vec::with_capacity(entries.len());
    for relocation in entries {
        let kind = relocation.r_type(endian, false);
        ensure!(
            kind == elf::R_X86_64_RELATIVE,
            "the loader has a relocation of type {kind}, and only R_X86_64_RELATIVE can be converted"
        );
        let place = usize::try_from(relocation.r_offset(endian))?;
        let value = relocation.r_addend(endian) as u64 + SHIFT;
        image
            .get_mut(place..place + 8)
            .context("a relocation lies outside the image")?
            .copy_from_slice(&value.to_le_bytes());
        places.push(place as u64 + SHIFT);
    }
    places.sort_unstable();
    Ok(places)
}

/// Blocks of 64-bit base relocations, one for each page.
fn base_relocations(places: &[u64]) -> Vec<u8> {
    let mut blocks = Vec::new();
    for page in places.chunk_by(|a, b| a / PAGE == b / PAGE) {
        let mut entries: Vec<u16> = page
            .iter()
            .map(|place| pe::IMAGE_REL_BASED_DIR64.0 << 12 | (place % PAGE) as u16)
            .collect();
        // Blocks are multiples of four bytes; an absolute entry is padding.
        if entries.len() % 2 == 1 {
            entries.push(pe::IMAGE_REL_BASED_ABSOLUTE.0 << 12);
        }
        blocks.extend(((page[0] / PAGE * PAGE) as u32).to_le_bytes());
        blocks.extend((8 + 2 * entries.len() as u32).to_le_bytes());
        blocks.extend(entries.iter().flat_map(|entry| entry.to_le_bytes()));
    }
    blocks
}

/// The file: headers, then the sections' data.
fn write(sections: &[Section], entry: u64) -> Result<Vec<u8>> {
    let size_of_image = sections
        .iter()
        .map(|section| (section.address + section.size).next_multiple_of(PAGE))
        .max()
        .unwrap_or(0);
    let reloc = sections.last().context("no section")?;

    let mut out = vec![0; PE_OFFSET];
    out[..2].copy_from_slice(b"MZ");
    out[0x3c..0x40].copy_from_slice(&(PE_OFFSET as u32).to_le_bytes());
    out.extend(b"PE\0\0");
    // COFF header.
    out.extend(pe::IMAGE_FILE_MACHINE_AMD64.0.to_le_bytes());
    out.extend((sections.len() as u16).to_le_bytes());
    out.extend([0; 12]);
    out.extend(240u16.to_le_bytes());
    let flags = pe::IMAGE_FILE_EXECUTABLE_IMAGE | pe::IMAGE_FILE_LARGE_ADDRESS_AWARE;
    out.extend(flags.0.to_le_bytes());
    // Optional header.
    out.extend(pe::IMAGE_NT_OPTIONAL_HDR64_MAGIC.to_le_bytes());
    out.extend([0; 14]);
    out.extend(u32::try_from(entry)?.to_le_bytes());
    out.extend((SHIFT as u32).to_le_bytes());
    out.extend(0u64.to_le_bytes()); // image base
    out.extend((PAGE as u32).to_le_bytes());
    out.extend((FILE_ALIGNMENT as u32).to_le_bytes());
    out.extend([0; 16]);
    out.extend(u32::try_from(size_of_image)?.to_le_bytes());
    out.extend((HEADERS as u32).to_le_bytes());
    out.extend(0u32.to_le_bytes()); // checksum
    out.extend(pe::IMAGE_SUBSYSTEM_EFI_APPLICATION.0.to_le_bytes());
    out.extend(pe::IMAGE_DLLCHARACTERISTICS_NX_COMPAT.0.to_le_bytes());
    out.extend([0; 36]);
    out.extend(16u32.to_le_bytes());
    for directory in 0..16 {
        let (address, size) = if directory == pe::IMAGE_DIRECTORY_ENTRY_BASERELOC {
            (u32::try_from(reloc.address)?, u32::try_from(reloc.size)?)
        } else {
            (0, 0)
        };
        out.extend(address.to_le_bytes());
        out.extend(size.to_le_bytes());
    }
    let mut offset = HEADERS;
    for section in sections {
        let mut name = [0; 8];
        name[..section.name.len()].copy_from_slice(section.name);
        let raw = section.data.len().next_multiple_of(FILE_ALIGNMENT);
        out.extend(name);
        out.extend(u32::try_from(section.size)?.to_le_bytes());
        out.extend(u32::try_from(section.address)?.to_le_bytes());
        out.extend(u32::try_from(raw)?.to_le_bytes());
        out.extend(u32::try_from(offset)?.to_le_bytes());
        out.extend([0; 12]);
        out.extend(section.characteristics.0.to_le_bytes());
        offset += raw;
    }
    ensure!(out.len() <= HEADERS, "the loader has too many segments");
    out.resize(HEADERS, 0);
    for section in sections {
        out.extend(&section.data);
        out.resize(out.len().next_multiple_of(FILE_ALIGNMENT), 0);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::read::pe::PeFile64;
    use object::{Object, ObjectSection};

    /// A static-pie file: text at 0x1000, data at 0x2000 with a pointer to the
    /// text at 0x2010 and the relocation that makes it one.
    fn elf(kind: u64) -> Vec<u8> {
        let mut file = vec![0u8; 0x3000];
        let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &3u16.to_le_bytes());
        put(18, &62u16.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(24, &0x1004u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(52, &[64, 0, 56, 0, 3, 0, 64, 0]);
        for (index, (kind, flags, at, size)) in [
            (1u32, 5u32, 0x1000u64, 16u64),
            (1, 6, 0x2000, 0x100),
            (2, 6, 0x2040, 48),
        ]
        .into_iter()
        .enumerate()
        {
            let entry = 64 + 56 * index;
            put(entry, &kind.to_le_bytes());
            put(entry + 4, &flags.to_le_bytes());
            for field in [8, 16, 24] {
                put(entry + field, &at.to_le_bytes());
            }
            put(entry + 32, &size.to_le_bytes());
            put(entry + 40, &size.to_le_bytes());
        }
        put(0x1000, &[0xc3; 16]);
        for (at, value) in [
            (0x2040, 7),
            (0x2048, 0x2080u64),
            (0x2050, 8),
            (0x2058, 24),
            (0x2080, 0x2010),
            (0x2088, kind),
            (0x2090, 0x1008),
        ] {
            put(at, &value.to_le_bytes());
        }
        file
    }

    #[test]
    fn segments_become_sections_and_pointers_are_relocated() {
        let application = convert(&elf(8)).unwrap();
        let file = PeFile64::parse(&*application).unwrap();
        assert_eq!(file.entry(), 0x2004);
        let section = |name| file.section_by_name(name).unwrap();
        assert_eq!(section(".text").address(), 0x2000);
        assert_eq!(&section(".text").data().unwrap()[..16], &[0xc3; 16]);
        let data = section(".data").data().unwrap();
        assert_eq!(data[0x10..0x18], 0x2008u64.to_le_bytes());
        let mut blocks = file
            .data_directories()
            .relocation_blocks(file.data(), &file.section_table())
            .unwrap()
            .unwrap();
        let places: Vec<_> = blocks.next().unwrap().unwrap().collect();
        assert_eq!(
            (places[0].virtual_address, places[0].typ),
            (0x3010, pe::IMAGE_REL_BASED_DIR64)
        );
    }

    #[test]
    fn no_section_is_writable_and_executable() {
        let application = convert(&elf(8)).unwrap();
        let file = PeFile64::parse(&*application).unwrap();
        for section in file.section_table().iter() {
            let flags = section.characteristics.get(object::LittleEndian);
            let both = pe::IMAGE_SCN_MEM_WRITE | pe::IMAGE_SCN_MEM_EXECUTE;
            assert_ne!(flags & both, both);
        }
    }

    #[test]
    fn what_cannot_be_converted_is_refused() {
        let reason = |file: &[u8]| convert(file).unwrap_err().to_string();
        assert!(reason(b"MZ").contains("not an ELF64 file"));
        assert!(reason(&elf(6)).contains("relocation of type 6"));
        let mut fixed = elf(8);
        fixed[16] = 2;
        assert!(reason(&fixed).contains("position-independent"));
    }
}
