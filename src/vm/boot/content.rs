//! What a file is, by its first bytes: to choose the boot protocol, and to tell
//! whoever named the wrong file what it is.

use super::pvh;
use core::fmt;

/// What a file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    BzImage,
    Elf,
    Empty,
    Gzip,
    Xz,
    Zstd,
    Lz4,
    Cpio,
    EfiApplication,
    BootSector,
    Text,
    /// Nothing known; its first bytes.
    Unknown([u8; 4]),
}

const MAGICS: [(&[u8], Content); 8] = [
    (pvh::MAGIC, Content::Elf),
    (b"\x1f\x8b", Content::Gzip),
    (b"\xfd7zXZ\0", Content::Xz),
    (b"\x28\xb5\x2f\xfd", Content::Zstd),
    (b"\x02\x21\x4c\x18", Content::Lz4),
    (b"070701", Content::Cpio),
    (b"070702", Content::Cpio),
    (b"MZ", Content::EfiApplication),
];
/// The end of a boot sector, and Linux's set-up header behind it.
const BOOT_FLAG: (usize, &[u8]) = (0x1fe, &[0x55, 0xaa]);
const HEADER_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
/// Bytes that are looked at to tell text.
const SAMPLE: usize = 256;

impl Content {
    /// Looks at the first sectors of `file`.
    pub fn of(file: &[u8]) -> Self {
        let at = |(offset, magic): (usize, &[u8])| {
            file.get(offset..)
                .is_some_and(|rest| rest.starts_with(magic))
        };
        // Before the others: most bzImages are EFI applications too.
        if at(BOOT_FLAG) && at(HEADER_MAGIC) {
            return Self::BzImage;
        }
        for (magic, content) in MAGICS {
            if at((0, magic)) {
                return content;
            }
        }
        if at(BOOT_FLAG) {
            return Self::BootSector;
        }
        let sample = file.get(..SAMPLE).unwrap_or(file);
        let printable = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~');
        match *file {
            [] => Self::Empty,
            _ if sample.iter().all(printable) => Self::Text,
            [a, b, c, d, ..] => Self::Unknown([a, b, c, d]),
            _ => Self::Unknown([0; 4]),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BzImage => "a Linux bzImage",
            Self::Elf => "an ELF file",
            Self::Empty => "an empty file",
            Self::Gzip => "gzip data (an initrd, or a kernel to be unpacked)",
            Self::Xz => "xz data (an initrd, or a kernel to be unpacked)",
            Self::Zstd => "zstd data (an initrd, or a kernel to be unpacked)",
            Self::Lz4 => "lz4 data (an initrd, or a kernel to be unpacked)",
            Self::Cpio => "a cpio archive (an initrd)",
            Self::EfiApplication => "an EFI or DOS program, or the start of a kernel",
            Self::BootSector => "a boot sector or disk image",
            Self::Text => "text",
            Self::Unknown([a, b, c, d]) => {
                return write!(
                    f,
                    "no known kind of file (it begins {a:02x} {b:02x} {c:02x} {d:02x})"
                );
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_sentence_says_what_the_file_is() {
        let error = crate::vm::boot::BootError::NotAKernel(Content::of(b"\x1f\x8b\x08\0"));
        assert_eq!(
            error.to_string(),
            "the kernel image is neither a Linux bzImage nor an ELF file: it looks like gzip data (an initrd, or a kernel to be unpacked); name a kernel such as vmlinuz"
        );
    }

    #[test]
    fn files_that_are_named_by_mistake_are_recognized() {
        let mut sector = vec![0; 1024];
        sector[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        let mut kernel = sector.clone();
        kernel[..2].copy_from_slice(b"MZ");
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        for (file, expected) in [
            (&b""[..], Content::Empty),
            (b"#!/bin/sh\n", Content::Text),
            (b"\x1f\x8b\x08\x00", Content::Gzip),
            (b"07070100", Content::Cpio),
            (b"\x7fELF\x02", Content::Elf),
            (&[0; 4096], Content::Unknown([0; 4])),
            (&sector, Content::BootSector),
            (&kernel, Content::BzImage),
            (&kernel[..512], Content::EfiApplication),
        ] {
            assert_eq!(Content::of(file), expected);
        }
    }

    proptest! {
        #[test]
        fn only_a_boot_sector_with_the_header_is_a_bzimage(file in prop::collection::vec(any::<u8>(), 0..1024)) {
            let header = file.len() >= 0x206 && file[0x1fe..0x200] == [0x55, 0xaa] && &file[0x202..0x206] == b"HdrS";
            prop_assert_eq!(Content::of(&file) == Content::BzImage, header);
        }
    }
}
