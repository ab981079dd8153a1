//! What a kernel file is and whether it is whole: the loader asks before it
//! leaves the firmware, the hypervisor to choose the boot protocol.

pub mod multiboot;

use crate::config::Protocol;
use core::fmt;
use object::LittleEndian;
use object::elf::{FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

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
    (b"\x7fELF", Content::Elf),
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
/// Offset of the byte that tells 32-bit from 64-bit ELF files, and its value for 64-bit ones.
const ELF_CLASS: (usize, u8) = (4, 2);
/// Offset in Linux's set-up header: sectors of set-up code.
pub const SETUP_SECTORS: usize = 0x1f1;
/// Offset in Linux's set-up header: 16-byte paragraphs of what is loaded.
pub const SYSTEM_SIZE: usize = 0x1f4;
/// Offset in Linux's set-up header: version of the protocol.
pub const PROTOCOL_VERSION: usize = 0x206;
/// Offset in Linux's set-up header: which entry points there are.
pub const XLOADFLAGS: usize = 0x236;
/// The set-up header ends here at the latest.
const HEADER_END_LIMIT: u64 = 0x290;
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

/// Why a file cannot be booted, whatever the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// Of no boot protocol, but what looks like this.
    NotAKernel(Content),
    /// Of another boot protocol than the one that is asked for.
    NotOf(Protocol, Content),
    /// No multiboot kernel, or one that asks too much.
    Multiboot(multiboot::HeaderError),
    /// Of so many bytes no firmware can be.
    FirmwareSize { len: u64 },
    /// Lengths in bytes.
    Truncated { need: u64, have: u64 },
    /// Not an ELF file of this kind of CPU, or one that contradicts itself.
    DamagedElf(object::read::Error),
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAKernel(content) => write!(
                f,
                "the kernel image is neither a Linux bzImage nor an ELF file nor a multiboot kernel: it looks like {content}; name a kernel such as vmlinuz"
            ),
            Self::NotOf(protocol, content) => write!(
                f,
                "the kernel image is {content}, and the boot protocol \"{protocol}\" needs another kind of file; leave `protocol` away"
            ),
            Self::Multiboot(error) => error.fmt(f),
            Self::FirmwareSize { len } => write!(
                f,
                "the firmware has {len} bytes; expected a multiple of 4096, at most {FIRMWARE_MAX}, such as bios.bin or OVMF.fd"
            ),
            Self::Truncated { need, have } => write!(
                f,
                "the kernel image is truncated: its header promises {need} bytes and it has {have}; copy it again"
            ),
            Self::DamagedElf(error) => write!(
                f,
                "the kernel image is a damaged ELF file ({error}); copy it again"
            ),
        }
    }
}

impl core::error::Error for ImageError {}

/// The longest firmware, in bytes: the interrupt controllers are below.
const FIRMWARE_MAX: u64 = 16 << 20;

/// Checks that `file` may be firmware.
///
/// # Errors
/// Why not.
pub const fn check_firmware(file: &[u8]) -> Result<(), ImageError> {
    let len = file.len() as u64;
    if len == 0 || !len.is_multiple_of(4096) || len > FIRMWARE_MAX {
        return Err(ImageError::FirmwareSize { len });
    }
    Ok(())
}

/// Checks that `file` is a kernel of this protocol, and whole.
///
/// # Errors
/// Why it is not.
pub fn check(file: &[u8], protocol: Protocol) -> Result<(), ImageError> {
    match kind(file, protocol)? {
        Kind::BzImage => bzimage_payload(file).map(|_| ()),
        Kind::Elf if is_64_bit(file) => check_elf::<FileHeader64<LittleEndian>>(file),
        Kind::Elf => check_elf::<FileHeader32<LittleEndian>>(file),
        Kind::Multiboot(_) => Ok(()),
    }
}

/// How a kernel is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    BzImage,
    /// An ELF file: what is in it decides, where no protocol is asked for.
    Elf,
    /// Whatever the file is, this header counts.
    Multiboot(multiboot::Header),
}

/// How `file` is to be read, where `protocol` is asked for.
///
/// # Errors
/// When it is no such kernel.
pub fn kind(file: &[u8], protocol: Protocol) -> Result<Kind, ImageError> {
    let content = Content::of(file);
    let header = || multiboot::find(file).map(Kind::Multiboot);
    match (protocol, content) {
        (Protocol::Multiboot, _) => header().map_err(ImageError::Multiboot),
        (Protocol::Auto | Protocol::Linux, Content::BzImage) => Ok(Kind::BzImage),
        (Protocol::Auto | Protocol::Pvh, Content::Elf) => Ok(Kind::Elf),
        (Protocol::Auto, _) => header().map_err(|error| match error {
            multiboot::HeaderError::Missing => ImageError::NotAKernel(content),
            error => ImageError::Multiboot(error),
        }),
        _ => Err(ImageError::NotOf(protocol, content)),
    }
}

/// Whether this is a Linux kernel without a 64-bit entry point.
pub fn is_32_bit_linux(file: &[u8]) -> bool {
    /// The first version with these flags.
    const VERSION_2_12: u16 = 0x20c;
    const ENTRY_64: u16 = 1;
    let word = |offset: usize| match file.get(offset..offset + 2) {
        Some(&[low, high]) => u16::from_le_bytes([low, high]),
        _ => 0,
    };
    Content::of(file) == Content::BzImage
        && (word(PROTOCOL_VERSION) < VERSION_2_12 || word(XLOADFLAGS) & ENTRY_64 == 0)
}

/// Whether this is a 64-bit ELF file, if it is an ELF file.
pub fn is_64_bit(file: &[u8]) -> bool {
    file.get(ELF_CLASS.0) == Some(&ELF_CLASS.1)
}

/// Offset of the part of a bzImage that is loaded, which reaches to the end of
/// the file (Linux, `Documentation/arch/x86/boot.rst`).
///
/// # Errors
/// When `file` is no bzImage or ends too early.
pub fn bzimage_payload(file: &[u8]) -> Result<usize, ImageError> {
    let content = Content::of(file);
    if content != Content::BzImage {
        return Err(ImageError::NotAKernel(content));
    }
    let have = file.len() as u64;
    let (Some(&sectors), Some(&[a, b, c, d])) = (
        file.get(SETUP_SECTORS),
        file.get(SYSTEM_SIZE..SYSTEM_SIZE + 4),
    ) else {
        let need = HEADER_END_LIMIT;
        return Err(ImageError::Truncated { need, have });
    };
    // 0 means 4, for old kernels.
    let sectors = if sectors == 0 { 4 } else { sectors };
    let payload = (usize::from(sectors) + 1) * 512;
    let size = u64::from(u32::from_le_bytes([a, b, c, d])) * 16;
    // The checksum may stand behind the last whole paragraph; what is promised must be there.
    let need = (payload as u64 + size).max(HEADER_END_LIMIT);
    if have + 15 < need || have <= payload as u64 {
        return Err(ImageError::Truncated { need, have });
    }
    Ok(payload)
}

fn check_elf<Elf: FileHeader<Endian = LittleEndian>>(file: &[u8]) -> Result<(), ImageError> {
    let segments = Elf::parse(file)
        .and_then(|header| header.program_headers(LittleEndian, file))
        .map_err(ImageError::DamagedElf)?;
    let have = file.len() as u64;
    let need = segments
        .iter()
        .filter(|segment| segment.p_type(LittleEndian) == PT_LOAD)
        .map(|segment| {
            let (offset, len) = segment.file_range(LittleEndian);
            offset.saturating_add(len)
        })
        .max()
        .unwrap_or(0);
    if have < need {
        return Err(ImageError::Truncated { need, have });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;
    use std::vec;

    #[test]
    fn the_sentence_says_what_the_file_is() {
        let error = ImageError::NotAKernel(Content::of(b"\x1f\x8b\x08\0"));
        assert_eq!(
            error.to_string(),
            "the kernel image is neither a Linux bzImage nor an ELF file nor a multiboot kernel: it looks like gzip data (an initrd, or a kernel to be unpacked); name a kernel such as vmlinuz"
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

    #[test]
    fn a_kernel_that_is_cut_off_says_how_long_it_should_be() {
        let mut file = vec![0; 512 * 3 + 64];
        file[SETUP_SECTORS] = 2;
        file[SYSTEM_SIZE] = 4;
        file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(bzimage_payload(&file), Ok(1536));
        let (need, have) = (1600, 1546);
        assert_eq!(
            check(&file[..1546], Protocol::Auto),
            Err(ImageError::Truncated { need, have })
        );
        assert!(matches!(
            check(&file[..520], Protocol::Auto),
            Err(ImageError::Truncated { have: 520, .. })
        ));
        assert!(matches!(
            check(b"\x7fELF\x02\x01\x01", Protocol::Auto),
            Err(ImageError::DamagedElf(_))
        ));
    }

    #[test]
    fn an_elf_file_is_as_long_as_its_segments() {
        let mut file = vec![0; 0x200];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[18] = 62; // x86-64
        file[32] = 64; // program headers behind the file header
        file[54] = 56; // of this size
        file[56] = 1; // one
        file[64] = 1; // PT_LOAD
        file[64 + 8] = 0x80; // offset
        file[64 + 33] = 1; // length 0x100
        assert_eq!(check(&file, Protocol::Auto), Ok(()));
        let error = check(&file[..0x17f], Protocol::Auto).unwrap_err();
        let (need, have) = (0x180, 0x17f);
        assert_eq!(error, ImageError::Truncated { need, have });
    }

    #[test]
    fn the_protocol_decides_how_a_file_is_read() {
        let mut file = vec![0; 1024];
        file[..4].copy_from_slice(b"\x7fELF");
        assert_eq!(kind(&file, Protocol::Auto), Ok(Kind::Elf));
        assert_eq!(kind(&file, Protocol::Pvh), Ok(Kind::Elf));
        assert_eq!(
            kind(&file, Protocol::Linux),
            Err(ImageError::NotOf(Protocol::Linux, Content::Elf))
        );
        let missing = multiboot::HeaderError::Missing;
        assert_eq!(
            kind(&file, Protocol::Multiboot),
            Err(ImageError::Multiboot(missing))
        );
        file[16..20].copy_from_slice(&0x1bad_b002_u32.to_le_bytes());
        file[24..28].copy_from_slice(&0xe452_4ffe_u32.to_le_bytes());
        let header = multiboot::find(&file).unwrap();
        assert_eq!(
            kind(&file, Protocol::Multiboot),
            Ok(Kind::Multiboot(header))
        );
        assert_eq!(kind(&file, Protocol::Auto), Ok(Kind::Elf));
        file[..4].copy_from_slice(&[0xeb, 0x3e, 0, 0]);
        assert_eq!(kind(&file, Protocol::Auto), Ok(Kind::Multiboot(header)));
    }

    proptest! {
        #[test]
        fn only_a_boot_sector_with_the_header_is_a_bzimage(file in prop::collection::vec(any::<u8>(), 0..1024)) {
            let header = file.len() >= 0x206 && file[0x1fe..0x200] == [0x55, 0xaa] && &file[0x202..0x206] == b"HdrS";
            prop_assert_eq!(Content::of(&file) == Content::BzImage, header);
        }
    }
}
