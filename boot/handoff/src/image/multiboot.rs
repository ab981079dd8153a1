//! The multiboot header (Multiboot Specification 0.6.96, 3.1), which may be in any kind of file.

use core::fmt;

/// The header is in so many bytes of the file's start.
const SEARCHED: usize = 8192;
const MAGIC: u32 = 0x1bad_b002;
/// Bytes up to and with the checksum, and up to and with the address fields.
const SHORT: usize = 12;
const WITH_ADDRESSES: usize = 32;
/// Offsets of the wanted video mode's type, which is 0 for graphics, and of its last field.
const VIDEO_TYPE: usize = 32;
const VIDEO_DEPTH: usize = 44;

/// Bits of the header's flags.
pub mod flag {
    /// Modules begin at pages.
    pub const ALIGN_MODULES: u32 = 1 << 0;
    /// The kernel is to be told its memory.
    pub const MEMORY: u32 = 1 << 1;
    /// There is a wish for a video mode.
    pub const VIDEO: u32 = 1 << 2;
    /// The header says where the file belongs.
    pub const ADDRESSES: u32 = 1 << 16;
    /// A loader has to refuse a kernel that sets one of these and that it does not know.
    pub const REQUIRED: u32 = 0xffff;
}

/// A header, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where it is in the file.
    pub offset: u32,
    /// Its place in memory and that of all else, where it gives one.
    pub addresses: Option<Addresses>,
    /// It wishes for a graphics mode.
    pub graphics: bool,
}

/// The address fields: physical addresses, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Where the header belongs.
    pub header: u32,
    /// Where what is loaded starts.
    pub load: u32,
    /// Where it ends; 0 is the end of the file.
    pub load_end: u32,
    /// Where what is to be cleared behind it ends; 0 is nothing.
    pub bss_end: u32,
    /// Where the kernel starts.
    pub entry: u32,
}

/// Why a file is no multiboot kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    Missing,
    /// The magic number is here, but the three first words do not add up to 0.
    Checksum {
        offset: u32,
    },
    /// The file, or what is searched of it, ends inside.
    Cut {
        offset: u32,
    },
    /// What it asks of its loader is not there.
    Flags {
        unknown: u32,
    },
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str(
                "the kernel has no multiboot header (magic number 1badb002, at a multiple of 4 in its first 8 KiB)",
            ),
            Self::Checksum { offset } => write!(
                f,
                "the kernel's multiboot header at {offset:#x} has a wrong checksum; magic number, flags and checksum must add up to 0"
            ),
            Self::Cut { offset } => write!(
                f,
                "the kernel's multiboot header at {offset:#x} is cut off; all of it must be in the first 8 KiB of the file"
            ),
            Self::Flags { unknown } => write!(
                f,
                "the kernel's multiboot header asks for what Vireo does not know (flags {unknown:#x})"
            ),
        }
    }
}

impl core::error::Error for HeaderError {}

/// Looks for the header of `file`.
///
/// # Errors
/// Why there is none that can be obeyed.
pub fn find(file: &[u8]) -> Result<Header, HeaderError> {
    let searched = file.get(..SEARCHED).unwrap_or(file);
    let mut error = HeaderError::Missing;
    for (offset, rest) in (0u32..).step_by(4).zip(
        (0..searched.len())
            .step_by(4)
            .filter_map(|at| searched.get(at..)),
    ) {
        if word(rest, 0) != Some(MAGIC) {
            continue;
        }
        let (Some(flags), Some(checksum)) = (word(rest, 4), word(rest, SHORT - 4)) else {
            error = HeaderError::Cut { offset };
            break;
        };
        if MAGIC.wrapping_add(flags).wrapping_add(checksum) != 0 {
            // The magic number may stand in code; a later one may be the header's.
            error = HeaderError::Checksum { offset };
            continue;
        }
        return read(rest, offset, flags);
    }
    Err(error)
}

/// Reads the header at the start of `rest`.
fn read(rest: &[u8], offset: u32, flags: u32) -> Result<Header, HeaderError> {
    use flag::{ADDRESSES, ALIGN_MODULES, MEMORY, REQUIRED, VIDEO};
    let unknown = flags & REQUIRED & !(ALIGN_MODULES | MEMORY | VIDEO);
    if unknown != 0 {
        return Err(HeaderError::Flags { unknown });
    }
    let cut = HeaderError::Cut { offset };
    let graphics = flags & VIDEO != 0 && {
        word(rest, VIDEO_DEPTH).ok_or(cut)?;
        word(rest, VIDEO_TYPE) == Some(0)
    };
    let addresses = if flags & ADDRESSES == 0 {
        None
    } else if rest.len() < WITH_ADDRESSES {
        return Err(cut);
    } else {
        let field = |index: usize| word(rest, SHORT + 4 * index).ok_or(cut);
        Some(Addresses {
            header: field(0)?,
            load: field(1)?,
            load_end: field(2)?,
            bss_end: field(3)?,
            entry: field(4)?,
        })
    };
    Ok(Header {
        offset,
        addresses,
        graphics,
    })
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Words, behind `before` zeros.
    fn file(before: usize, words: &[u32]) -> Vec<u8> {
        let mut file = std::vec![0; before];
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        file
    }

    fn header(flags: u32) -> [u32; 12] {
        let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
        [MAGIC, flags, checksum, 1, 2, 3, 4, 5, 0, 80, 25, 0]
    }

    #[test]
    fn a_header_is_found_where_it_may_be() {
        for offset in [0, 4, 8192 - 48] {
            let found = find(&file(offset, &header(3))).unwrap();
            assert_eq!((found.offset as usize, found.addresses), (offset, None));
        }
        let addresses = find(&file(64, &header(1 << 16 | 7)))
            .unwrap()
            .addresses
            .unwrap();
        assert_eq!(
            (addresses.header, addresses.load, addresses.load_end),
            (1, 2, 3)
        );
        assert_eq!((addresses.bss_end, addresses.entry), (4, 5));
        for offset in [2, 8192, 8196] {
            assert_eq!(find(&file(offset, &header(0))), Err(HeaderError::Missing));
        }
    }

    #[test]
    fn what_only_looks_like_a_header_is_passed() {
        let words: Vec<u32> = [MAGIC, 1, 2].into_iter().chain(header(0)).collect();
        assert_eq!(find(&file(0, &words)).unwrap().offset, 12);
        assert_eq!(
            find(&file(8, &[MAGIC, 1, 2])),
            Err(HeaderError::Checksum { offset: 8 })
        );
    }

    #[test]
    fn a_header_that_is_cut_or_asks_too_much_is_refused() {
        let offset = 8192 - 28;
        let cut = Err(HeaderError::Cut {
            offset: offset as u32,
        });
        assert_eq!(find(&file(offset, &header(1 << 16))), cut);
        assert_eq!(
            find(&file(0, &header(1 << 16)[..7])),
            Err(HeaderError::Cut { offset: 0 })
        );
        assert_eq!(
            find(&file(0, &[MAGIC, 0])),
            Err(HeaderError::Cut { offset: 0 })
        );
        assert_eq!(
            find(&file(0, &header(4)[..11])),
            Err(HeaderError::Cut { offset: 0 })
        );
        let unknown = 1 << 15 | 1 << 3;
        assert_eq!(
            find(&file(0, &header(unknown | 3))),
            Err(HeaderError::Flags { unknown })
        );
        assert!(find(&file(0, &header(4))).unwrap().graphics);
        let mut text = header(4);
        text[8] = 1;
        assert!(!find(&file(0, &text)).unwrap().graphics);
        assert!(!find(&file(0, &header(3))).unwrap().graphics);
        // The upper half of the flags is for who knows them.
        assert!(find(&file(0, &header(1 << 31 | 1 << 17))).is_ok());
    }

    proptest! {
        #[test]
        fn no_file_is_a_disaster(
            before in 0..8300usize, flags: u32, len in 0..48usize, noise in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut bytes = noise;
            bytes.extend(file(before / 4 * 4, &header(flags & 0x1_0007)));
            bytes.truncate(bytes.len() - len);
            if let Ok(found) = find(&bytes) {
                prop_assert!(found.offset as usize + SHORT <= bytes.len().min(SEARCHED));
            }
        }
    }
}
