//! The tables of the MultiProcessor Specification 1.4, chapter 4: what a kernel without ACPI
//! finds CPUs and interrupt controllers by.

use super::memory::{GuestMemory, OutOfSlot};
use crate::addr::Gpa;
use crate::devices::pc;
use alloc::vec::Vec;

/// Where the floating pointer is: at the beginning of the BIOS's 64 KiB, all of which are searched.
pub const POINTER: Gpa = Gpa(0xf_0000);
/// The configuration table follows it.
const TABLE: u64 = POINTER.0 + 16;
/// Bytes of the table's header.
const HEADER: usize = 44;
/// Versions of integrated local APICs and of this I/O APIC, as their registers say.
const LOCAL_APIC_VERSION: u8 = 0x15;
const IO_APIC_VERSION: u8 = 0x20;
const REVISION: u8 = 4;
/// The bus of all interrupt lines.
const ISA: u8 = 0;
/// Everybody, as a local APIC's identifier.
const ALL: u8 = 0xff;

/// Kinds of interrupts (4.3.4).
mod kind {
    pub const VECTORED: u8 = 0;
    pub const NMI: u8 = 1;
    pub const EXTINT: u8 = 3;
}

/// Active high and level triggered; 0 is as the bus has it.
const HIGH_LEVEL: u8 = 0b1101;

/// Writes the tables for `vcpus` processors, whose signature and features CPUID gives.
///
/// # Errors
/// When the guest has no memory there.
pub fn write(memory: &GuestMemory, vcpus: u32, signature: [u32; 2]) -> Result<(), OutOfSlot> {
    memory.write(Gpa(TABLE), &table(vcpus, signature))?;
    memory.write(POINTER, &pointer())
}

fn pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((TABLE as u32).to_le_bytes());
    // Length in sixteens; a table is there; virtual wire mode.
    bytes.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    make_sum(&mut bytes, 10);
    bytes
}

fn table(vcpus: u32, [signature, features]: [u32; 2]) -> Vec<u8> {
    let mut bytes = b"PCMP".to_vec();
    bytes.extend([0, 0, REVISION, 0]);
    bytes.extend(*b"VIREO   VIREO PC    ");
    // No table of the maker's; the number of entries comes later.
    bytes.extend([0; 8]);
    bytes.extend((pc::LOCAL_APIC_BASE as u32).to_le_bytes());
    bytes.extend([0; 4]);
    let mut count = 0u16;
    let mut entry = |bytes: &mut Vec<u8>, entry: &[u8]| {
        bytes.extend(entry);
        count += 1;
    };
    // Identifiers from 255 on are for x2APICs, which these tables do not know.
    let ids = 0..u8::try_from(vcpus).unwrap_or(ALL).min(ALL - 1);
    let io_apic = ids.end;
    for id in ids {
        let usable_and_first = 1 | u8::from(id == 0) << 1;
        let mut processor = alloc::vec![0, id, LOCAL_APIC_VERSION, usable_and_first];
        processor.extend(signature.to_le_bytes());
        processor.extend(features.to_le_bytes());
        processor.extend([0; 8]);
        entry(&mut bytes, &processor);
    }
    entry(&mut bytes, &[1, ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = (pc::IO_APIC_BASE as u32).to_le_bytes();
    entry(&mut bytes, &[2, io_apic, IO_APIC_VERSION, 1, a, b, c, d]);
    // The 8259s are on pin 0; the cascade is no line.
    let lines = (0..16u8).filter(|line| *line != 2);
    entry(&mut bytes, &[3, kind::EXTINT, 0, 0, ISA, 0, io_apic, 0]);
    for line in lines {
        let pin = if line == pc::PIT_IRQ {
            pc::PIT_PIN
        } else {
            line
        };
        let flags = if line == pc::SCI_IRQ { HIGH_LEVEL } else { 0 };
        entry(
            &mut bytes,
            &[3, kind::VECTORED, flags, 0, ISA, line, io_apic, pin],
        );
    }
    entry(&mut bytes, &[4, kind::EXTINT, 0, 0, ISA, 0, 0, 0]);
    entry(&mut bytes, &[4, kind::NMI, 0, 0, ISA, 0, ALL, 1]);
    let len = bytes.len() as u16;
    put(&mut bytes, 4, len);
    put(&mut bytes, HEADER - 10, count);
    make_sum(&mut bytes, 7);
    bytes
}

fn put(bytes: &mut [u8], offset: usize, value: u16) {
    if let Some(place) = bytes.get_mut(offset..offset + 2) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Makes all bytes add up to 0 by that at `offset`.
fn make_sum(bytes: &mut [u8], offset: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(place) = bytes.get_mut(offset) {
        *place = place.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_pointer_leads_to_the_table() {
        let pointer = pointer();
        assert_eq!((pointer.len(), sum(&pointer)), (16, 0));
        assert_eq!(pointer[4..8], 0xf_0010u32.to_le_bytes());
    }

    #[test]
    fn entries_are_as_long_as_their_kinds_and_as_many_as_the_header_says() {
        for vcpus in [1, 2, 64, 300] {
            let table = table(vcpus, [0x306a9, 0x1783_fbff]);
            assert_eq!(sum(&table), 0);
            assert_eq!(table[4..6], (table.len() as u16).to_le_bytes());
            assert_eq!(table[36..40], (pc::LOCAL_APIC_BASE as u32).to_le_bytes());
            let (mut at, mut kinds) = (HEADER, [0u32; 5]);
            while at < table.len() {
                let kind = usize::from(table[at]);
                kinds[kind] += 1;
                at += if kind == 0 { 20 } else { 8 };
            }
            assert_eq!(at, table.len());
            assert_eq!(kinds, [vcpus.min(254), 1, 1, 16, 2]);
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(u32::from(count), kinds.iter().sum());
            // The first is the bootstrap processor, and the timer is on pin 2.
            assert_eq!(table[HEADER + 3], 3);
            let timer = [3, 0, 0, 0, 0, 0];
            let found = table.windows(8).find(|entry| entry[..6] == timer);
            assert_eq!(found.unwrap()[7], 2);
        }
    }
}
