//! ACPI tables, found from the root pointer.

use crate::memory::{read8, read32, read64};

/// Whether the bytes add up to 0.
pub fn checksum_is_right(address: u64, length: u32) -> bool {
    (0..u64::from(length)).fold(0u8, |sum, at| sum.wrapping_add(read8(address + at))) == 0
}

/// The four letters at `address`.
pub fn signature(address: u64) -> [u8; 4] {
    read32(address).to_le_bytes()
}

/// Length of the table at `address`.
pub fn length(address: u64) -> u32 {
    read32(address + 4)
}

/// The XSDT's address in the root pointer.
pub fn xsdt(rsdp: u64) -> u64 {
    read64(rsdp + 24)
}

/// The RSDT's.
pub fn rsdt(rsdp: u64) -> u64 {
    read32(rsdp + 16).into()
}

/// The addresses in the RSDT.
pub fn rsdt_tables(rsdt: u64) -> impl Iterator<Item = u64> {
    let count = u64::from(length(rsdt).saturating_sub(36)) / 4;
    (0..count).map(move |index| read32(rsdt + 36 + 4 * index).into())
}

/// The addresses in the XSDT.
pub fn tables(xsdt: u64) -> impl Iterator<Item = u64> {
    let count = u64::from(length(xsdt).saturating_sub(36)) / 8;
    (0..count).map(move |index| read64(xsdt + 36 + 8 * index))
}

/// The table with this signature.
pub fn find(xsdt: u64, wanted: &[u8; 4]) -> Option<u64> {
    tables(xsdt).find(|&table| signature(table) == *wanted)
}
