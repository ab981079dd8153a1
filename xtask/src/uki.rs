//! A unified kernel image: a Linux kernel, its initial RAM disk and its command
//! line as sections of one EFI application, which the firmware starts like any
//! other (UAPI Group, "Unified Kernel Image").
//!
//! The application is systemd's stub, which finds the sections by their names.

use anyhow::{Context, Result, ensure};
use object::pe;

/// The stub with these sections (name and contents) behind its own.
///
/// # Errors
/// When the stub is not a PE32+ file, or its headers have no room.
pub fn build(stub: &[u8], sections: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut image = stub.to_vec();
    let pe = number(&image, 0x3c, 4)?;
    ensure!(
        image.get(pe..pe + 4) == Some(b"PE\0\0") && number(&image, pe + 24, 2)? == 0x20b,
        "the stub for kernel images is not a PE32+ file"
    );
    // The COFF header follows the signature, the optional header that (Microsoft, "PE Format").
    let count = number(&image, pe + 6, 2)?;
    let optional = pe + 24;
    let table = optional + number(&image, pe + 20, 2)?;
    let section_alignment = number(&image, optional + 32, 4)?;
    let file_alignment = number(&image, optional + 36, 4)?;
    let headers = number(&image, optional + 60, 4)?;
    let mut end = number(&image, optional + 56, 4)?;
    ensure!(
        table + SECTION * (count + sections.len()) <= headers
            && section_alignment > 0
            && file_alignment > 0,
        "the stub for kernel images has no room for {} more sections",
        sections.len()
    );
    for (index, (name, contents)) in sections.iter().enumerate() {
        let address = end.next_multiple_of(section_alignment);
        let place = image.len().next_multiple_of(file_alignment);
        image.resize(place, 0);
        image.extend_from_slice(contents);
        image.resize(image.len().next_multiple_of(file_alignment), 0);
        let stored = image.len() - place;
        let flags = pe::IMAGE_SCN_CNT_INITIALIZED_DATA | pe::IMAGE_SCN_MEM_READ;
        let header = table + SECTION * (count + index);
        ensure!(name.len() <= 8, "{name} is too long for a section's name");
        image[header..header + SECTION].fill(0);
        image[header..header + name.len()].copy_from_slice(name.as_bytes());
        for (offset, value) in [
            (8, contents.len()),
            (12, address),
            (16, stored),
            (20, place),
            (36, flags.0 as usize),
        ] {
            set(&mut image, header + offset, value)?;
        }
        end = address + contents.len();
    }
    image[pe + 6..pe + 8].copy_from_slice(&u16::try_from(count + sections.len())?.to_le_bytes());
    set(
        &mut image,
        optional + 56,
        end.next_multiple_of(section_alignment),
    )?;
    Ok(image)
}

/// Bytes of a section's header.
const SECTION: usize = 40;

fn number(bytes: &[u8], offset: usize, length: usize) -> Result<usize> {
    let field = bytes
        .get(offset..offset + length)
        .context("the stub for kernel images is cut off")?;
    Ok(field
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | usize::from(byte)))
}

fn set(image: &mut [u8], offset: usize, value: usize) -> Result<()> {
    let value = u32::try_from(value).context("a kernel image of 4 GiB")?;
    image[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{Object, ObjectSection};

    /// The headers of an application with one section of 16 bytes.
    fn stub() -> Vec<u8> {
        let mut image = vec![0; 0x600];
        image[..2].copy_from_slice(b"MZ");
        image[0x3c] = 0x40;
        image[0x40..0x44].copy_from_slice(b"PE\0\0");
        image[0x44..0x46].copy_from_slice(&0x8664_u16.to_le_bytes());
        image[0x46] = 1;
        image[0x54] = 240;
        let optional = 0x58;
        image[optional..optional + 2].copy_from_slice(&0x20b_u16.to_le_bytes());
        image[optional + 108] = 16;
        let table = optional + 240;
        image[table..table + 5].copy_from_slice(b".text");
        for (offset, value) in [
            (optional + 32, 0x1000),
            (optional + 36, 0x200),
            (optional + 56, 0x2000),
            (optional + 60, 0x400),
            (table + 8, 16),
            (table + 12, 0x1000),
            (table + 16, 0x200),
            (table + 20, 0x400),
        ] {
            set(&mut image, offset, value).unwrap();
        }
        image
    }

    #[test]
    fn a_reader_of_pe_finds_the_sections() {
        let large = vec![7; 0x1234];
        let built = build(&stub(), &[(".cmdline", b"quiet"), (".linux", &large)]).unwrap();
        let file = object::read::pe::PeFile64::parse(&*built).unwrap();
        let found: Vec<_> = file
            .sections()
            .map(|section| {
                let contents = section.data().unwrap();
                (
                    section.name().unwrap().to_owned(),
                    section.address(),
                    contents.len(),
                )
            })
            .collect();
        assert_eq!(found[0].0, ".text");
        assert_eq!(found[1], (".cmdline".into(), 0x2000, 5));
        assert_eq!(found[2], (".linux".into(), 0x3000, 0x1234));
        let linux = file.section_by_name(".linux").unwrap();
        assert!(linux.data().unwrap() == large);
        assert_eq!(
            number(&built, 0x58 + 56, 4).unwrap(),
            0x5000,
            "the image's size"
        );
    }

    #[test]
    fn a_stub_that_cannot_take_them_is_refused() {
        let many = vec![(".x", &b"1"[..]); 20];
        let error = build(&stub(), &many).unwrap_err();
        assert!(error.to_string().contains("no room for 20"), "{error}");
        assert!(build(b"MZ", &[]).is_err());
        assert!(build(&[0; 0x600], &[]).is_err());
    }
}
