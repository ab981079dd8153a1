//! Checked copies of firmware tables, for the crate `acpi`.
//!
//! Asked for physical memory, the crate must be given some, takes lengths in
//! it for granted and walks the entries of a MADT without a look at its end.
//! It multiplies a register's length without a look at the product, too.
//! So it gets copies: zeros for what cannot be read or contradicts itself,
//! which it refuses by the signature, and always with room behind.

use acpi::{AcpiHandler, PhysicalMapping};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::{self, NonNull};

/// Copies physical memory (address, length in bytes); `None` for what cannot be memory.
pub trait ReadPhysical: Fn(u64, usize) -> Option<Vec<u8>> + Clone {}

impl<F: Fn(u64, usize) -> Option<Vec<u8>> + Clone> ReadPhysical for F {}

/// No sane table is longer, in bytes.
const LONGEST: usize = 4 << 20;
/// Length of the header common to all tables (5.2.6), in bytes.
pub(super) const HEADER: usize = 36;
/// Length of a root pointer (5.2.5.3), in bytes.
const ROOT_POINTER: usize = 36;
/// Where the entries of a MADT begin (5.2.12).
const MADT_ENTRIES: usize = 44;
/// Where the FADT says how long PM1 control is (5.2.9), and the most bytes that make sense.
const PM1_CONTROL_LENGTH: (usize, u8) = (89, 4);
/// Zeros behind a copy: more than any structure that the crate lays over one.
const ROOM: usize = 1024;

/// Gives the crate copies of physical memory.
#[derive(Clone)]
pub struct Copies<R>(pub R);

impl<R: ReadPhysical> AcpiHandler for Copies<R> {
    unsafe fn map_physical_region<T>(
        &self,
        physical_address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        const { assert!(size_of::<T>() <= ROOM && align_of::<T>() == 1) };
        let size = size.min(LONGEST);
        let mut copy = (self.0)(physical_address as u64, size)
            .filter(|copy| is_sound(copy))
            .unwrap_or_else(|| vec_of_zeros(size));
        copy.resize(size + ROOM, 0);
        let copy = NonNull::from(Box::leak(copy.into_boxed_slice())).cast();
        // SAFETY: `size` bytes and the room behind them are readable as any `T`, which is made of
        // integers, until `unmap_physical_region` frees them.
        unsafe { PhysicalMapping::new(physical_address, copy, size, size, self.clone()) }
    }

    fn unmap_physical_region<T>(region: &PhysicalMapping<Self, T>) {
        let start = region.virtual_start().cast::<u8>().as_ptr();
        let copy = ptr::slice_from_raw_parts_mut(start, region.mapped_length() + ROOM);
        // SAFETY: the box that `map_physical_region` leaked, of that length; the crate calls this
        // once for each.
        drop(unsafe { Box::from_raw(copy) });
    }
}

fn vec_of_zeros(len: usize) -> Vec<u8> {
    alloc::vec![0; len]
}

/// Whether the lengths in what begins as a table, or as a root pointer, stay
/// inside it. Of a table's header alone only the length can be judged.
fn is_sound(copy: &[u8]) -> bool {
    let number = |at: usize| {
        let bytes = copy.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes) as usize)
    };
    if copy.starts_with(b"RSD PTR ") {
        return copy.get(15) == Some(&0) || number(20) == Some(ROOT_POINTER);
    }
    let Some(len) = number(4) else {
        return false;
    };
    let is_madt = copy.starts_with(b"APIC");
    let least = if is_madt { MADT_ENTRIES } else { HEADER };
    if !(least..=LONGEST).contains(&len) || len > copy.len() && copy.len() != HEADER {
        return false;
    }
    let (at, most) = PM1_CONTROL_LENGTH;
    match copy.get(MADT_ENTRIES..len) {
        Some(entries) if is_madt => entries_are_sound(entries),
        _ if copy.starts_with(b"FACP") => copy.get(at).is_none_or(|&length| length <= most),
        _ => true,
    }
}

/// Whether the entries of a MADT fill it exactly, and are as long as the crate
/// takes the two kinds that are looked at.
fn entries_are_sound(mut entries: &[u8]) -> bool {
    while let [kind, len, ..] = *entries {
        let least = match kind {
            1 => 12,
            2 => 10,
            _ => 2,
        };
        match entries.split_at_checked(usize::from(len)) {
            Some((_, rest)) if len >= least => entries = rest,
            _ => return false,
        }
    }
    entries.is_empty()
}
