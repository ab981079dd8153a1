//! Guest-physical address space: where RAM is, and how the guest is told.

use super::slots::{Slot, SlotKind, Slots};
use crate::addr::{Gpa, Hpa};
use alloc::vec::Vec;

/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// Memory that a VGA shows as text, up to [`ADAPTER_ROMS`].
pub const TEXT_MEMORY: u64 = 0xb_8000;
/// Start of the area where firmware puts the ROMs of adapters. It reads as all
/// ones, as without any; Linux looks for tables in it byte by byte, so it is
/// memory: a device would cost an exit for each.
pub const ADAPTER_ROMS: u64 = 0xc_0000;
/// Start of the area that holds the tables which a guest finds by looking.
pub const TABLES_START: u64 = 0xe_0000;
/// Start of extended memory.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Where memory below 4 GiB ends at the latest: devices follow.
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// Where memory goes on behind the devices.
pub const FOUR_GIB: u64 = 1 << 32;

/// A kind of address range, with its number in an E820 map (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// An entry of the memory map that the guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: Gpa,
    pub len: u64,
    pub kind: RangeKind,
}

/// The address space of a guest with one block of host memory behind it.
///
/// Below the hole, guest and host addresses differ by a constant, so that with
/// an aligned block large pages can map nearly all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    block: Hpa,
    ram: u64,
    /// Where the firmware's memory is in the host, and its bytes.
    firmware: Option<(Hpa, u64)>,
}

impl MemoryMap {
    /// `ram` bytes (a multiple of 2 MiB) at `block`.
    pub fn new(block: Hpa, ram: u64) -> Self {
        Self {
            block,
            ram,
            firmware: None,
        }
    }

    /// With ROM of `len` bytes below 4 GiB, which is at `backing` in the host. Firmware finds RAM
    /// where adapters and tables are else.
    pub const fn with_firmware(self, backing: Hpa, len: u64) -> Self {
        Self {
            firmware: Some((backing, len)),
            ..self
        }
    }

    /// Bytes of address space below the hole that memory is behind.
    pub fn ram_below_4g(&self) -> u64 {
        self.ram.min(LOW_RAM_LIMIT)
    }

    /// Bytes of memory from 4 GiB up.
    pub fn ram_above_4g(&self) -> u64 {
        self.ram - self.ram_below_4g()
    }

    fn slot(&self, start: u64, end: u64, block_offset: u64) -> Slot {
        Slot {
            start: Gpa(start),
            len: end.saturating_sub(start),
            backing: Hpa(self.block.0 + block_offset),
            kind: SlotKind::Ram,
        }
    }

    /// The slots. Of the VGA's window, only what it shows as text is memory.
    pub fn slots(&self) -> Slots {
        let low = self.ram_below_4g();
        let mut slots = alloc::vec![
            self.slot(0, LOW_RAM_END.min(low), 0),
            self.slot(TEXT_MEMORY, ADAPTER_ROMS.min(low), TEXT_MEMORY),
            self.slot(FOUR_GIB, FOUR_GIB + self.ram_above_4g(), low),
        ];
        if let Some((backing, len)) = self.firmware {
            slots.push(self.slot(ADAPTER_ROMS, low, ADAPTER_ROMS));
            slots.push(Slot {
                start: Gpa(FOUR_GIB - len),
                len,
                backing,
                kind: SlotKind::Rom,
            });
        } else {
            slots.push(self.slot(TABLES_START, low, TABLES_START));
            slots.push(Slot {
                kind: SlotKind::Rom,
                ..self.slot(ADAPTER_ROMS, TABLES_START.min(low), ADAPTER_ROMS)
            });
        }
        // Disjoint by construction.
        Slots::new(slots).unwrap_or_default()
    }

    /// What the guest is told, lowest first.
    pub fn ranges(&self) -> Vec<Range> {
        let range = |start, end: u64, kind| Range {
            start: Gpa(start),
            len: end.saturating_sub(start),
            kind,
        };
        let low = self.ram_below_4g();
        let mut ranges = alloc::vec![
            range(0, LOW_RAM_END.min(low), RangeKind::Ram),
            range(TABLES_START, HIGH_RAM, RangeKind::Reserved),
            range(HIGH_RAM, low, RangeKind::Ram),
            range(FOUR_GIB, FOUR_GIB + self.ram_above_4g(), RangeKind::Ram),
        ];
        ranges.retain(|range| range.len > 0);
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::pc;
    use proptest::prelude::*;

    #[test]
    fn five_gigabytes_are_split_around_the_hole() {
        let map = MemoryMap::new(Hpa(1 << 33), 5 << 30);
        let told: Vec<_> = map
            .ranges()
            .iter()
            .map(|range| (range.start.0, range.start.0 + range.len, range.kind as u32))
            .collect();
        assert_eq!(
            told,
            [
                (0, 0xa_0000, 1),
                (0xe_0000, 0x10_0000, 2),
                (0x10_0000, 0xc000_0000, 1),
                (0x1_0000_0000, 0x1_8000_0000, 1),
            ]
        );
        let slots = map.slots();
        let backing = |gpa| {
            let slot = slots.find(Gpa(gpa))?;
            [1 << 30, 1 << 21, 1 << 12]
                .into_iter()
                .find_map(|size| Some((slot.page(Gpa(gpa), size)?.1.0, size)))
        };
        // One host page of 1 GiB each, the block's first in 4 KiB pages around the VGA window.
        assert_eq!(backing(0x9_f000), Some(((1 << 33) + 0x9_f000, 1 << 12)));
        assert_eq!(backing(0x20_0000), Some(((1 << 33) + 0x20_0000, 1 << 21)));
        assert_eq!(backing(1 << 30), Some(((1 << 33) + (1 << 30), 1 << 30)));
        assert_eq!(backing(1 << 32), Some(((1 << 33) + (3 << 30), 1 << 30)));
        assert_eq!(backing(0xa_0000), None);
        assert_eq!(backing(0xb_7000), None);
        assert_eq!(backing(0xb_f000), Some(((1 << 33) + 0xb_f000, 1 << 12)));
    }

    proptest! {
        #[test]
        fn what_the_guest_is_told_is_memory(megabytes in 1..4096u64) {
            let map = MemoryMap::new(Hpa(1 << 30), megabytes << 21);
            let slots = map.slots();
            for range in map.ranges() {
                for gpa in [range.start, Gpa(range.start.0 + range.len - 1)] {
                    let slot = slots.find(gpa);
                    prop_assert!(slot.is_some(), "{gpa}");
                }
            }
            prop_assert!(slots.find(Gpa(LOW_RAM_END)).is_none());
            prop_assert!(slots.find(Gpa(LOW_RAM_LIMIT)).is_none());
            for slot in slots.iter() {
                prop_assert!(
                    slot.start.0 + slot.len <= pc::IO_APIC_BASE
                        || slot.start.0 >= pc::INTERRUPT_CONTROLLERS_END
                );
            }
        }

        #[test]
        fn no_slot_reaches_outside_its_block(megabytes in 1..4096u64) {
            let block = 1 << 30;
            let ram = megabytes << 21;
            for slot in MemoryMap::new(Hpa(block), ram).slots().iter() {
                prop_assert!(slot.backing.0 >= block);
                prop_assert!(slot.backing.0 + slot.len <= block + ram);
            }
        }
    }
}
