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

/// The command line, byte by byte.
pub fn command_line() -> impl Iterator<Item = u8> {
    let start = read64(ADDRESS.get() + 24);
    let bytes = (start..).map(read8).take_while(|&byte| byte != 0);
    bytes.take(if start == 0 { 0 } else { usize::MAX })
}

/// The decimal number of the command line's word `name=NUMBER`.
pub fn option(name: &str) -> Option<u64> {
    let starts = (0..command_line().count()).find(|&at| {
        let mut word = command_line().skip(at);
        let is_first = at == 0 || command_line().nth(at - 1) == Some(b' ');
        is_first
            && name
                .bytes()
                .chain([b'='])
                .all(|byte| word.next() == Some(byte))
    })?;
    let digits = command_line().skip(starts + name.len() + 1);
    let digits = digits.take_while(u8::is_ascii_digit);
    Some(digits.fold(0u64, |number, digit| {
        number
            .wrapping_mul(10)
            .wrapping_add(u64::from(digit - b'0'))
    }))
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
