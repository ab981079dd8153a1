//! What the PVH boot protocol tells (`hvm_start_info`).

use crate::cell::Shared;
use crate::memory::{read8, read32, read64};

static ADDRESS: Shared<u64> = Shared::new(0);

/// Value of the first field.
pub const MAGIC: u32 = 0x336e_c578;

pub(crate) fn set(address: u64) {
    ADDRESS.set(address);
}

/// The first field.
pub fn magic() -> u32 {
    read32(ADDRESS.get())
}

/// Whether the command line is `text`.
pub fn command_line_is(text: &str) -> bool {
    let start = read64(ADDRESS.get() + 24);
    start != 0
        && text
            .bytes()
            .chain([0])
            .zip(start..)
            .all(|(byte, at)| read8(at) == byte)
}

/// Address of the ACPI root pointer.
pub fn rsdp() -> u64 {
    read64(ADDRESS.get() + 32)
}

/// Start, length and type (1 is RAM) of the ranges of the memory map.
pub fn memory_map() -> impl Iterator<Item = (u64, u64, u32)> {
    let (first, count) = (read64(ADDRESS.get() + 40), read32(ADDRESS.get() + 48));
    (0..u64::from(count)).map(move |index| {
        let at = first + 24 * index;
        (read64(at), read64(at + 8), read32(at + 16))
    })
}
