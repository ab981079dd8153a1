//! What test suites expect of their machine: QEMU's `pc-testdev` as kvm-unit-tests uses it
//! (QEMU, `hw/misc/pc-testdev.c`). A guest has it where its configuration says
//! `test_device = true`.
//!
//! | where | what it does |
//! | --- | --- |
//! | ports 0x2000 + n | drive interrupt line n |
//! | ports 0xe0 to 0xe3 | read as they were last written |
//! | port 0xe4 | unmaps the page whose address is written |
//! | 64 KiB at 0xff000000 | memory, of which each access exits |

use super::{Line, Width, ioapic, pc};
use alloc::vec::Vec;

/// The device.
#[derive(Clone, Debug)]
pub struct TestDevice {
    lines: [Line; ioapic::PINS as usize],
    echo: [u8; 4],
    memory: Vec<u8>,
}

impl Default for TestDevice {
    fn default() -> Self {
        Self {
            lines: [Line::default(); ioapic::PINS as usize],
            echo: [0; 4],
            memory: alloc::vec![0; pc::TEST_MEMORY_LENGTH as usize],
        }
    }
}

impl TestDevice {
    /// Drives interrupt line `number`, which is returned; `None` where there is none.
    pub fn drive(&mut self, number: u8, level: bool) -> Option<&mut Line> {
        let line = self.lines.get_mut(usize::from(number))?;
        line.set(level);
        Some(line)
    }

    /// Byte `offset` (0 to 3) of the port that remembers.
    pub fn echo(&mut self, offset: u16) -> &mut u8 {
        let [first, second, third, fourth] = &mut self.echo;
        match offset & 3 {
            0 => first,
            1 => second,
            2 => third,
            _ => fourth,
        }
    }

    /// Reads the memory at byte `offset`. What is behind its end reads as all ones.
    pub fn read(&self, offset: u64, width: Width) -> u64 {
        let mut bytes = [0xff; 8];
        let from = self.memory.iter().skip(offset as usize);
        for (byte, value) in bytes.iter_mut().zip(from) {
            *byte = *value;
        }
        u64::from_le_bytes(bytes) & width.mask()
    }

    /// Writes the memory at byte `offset`.
    pub fn write(&mut self, offset: u64, width: Width, value: u64) {
        let to = self.memory.iter_mut().skip(offset as usize);
        let bytes = value.to_le_bytes();
        for (byte, value) in to.zip(bytes).take(width.bytes() as usize) {
            *byte = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_remembers_its_edge() {
        let mut device = TestDevice::default();
        let line = device.drive(23, true).unwrap();
        assert!(line.level() && line.take_edge());
        assert!(!device.drive(23, false).unwrap().level());
        assert!(device.drive(24, true).is_none());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            offset in 0..pc::TEST_MEMORY_LENGTH, width in 0..4u32, value: u64,
        ) {
            let width = Width::from_bytes(1 << width).unwrap();
            let mut device = TestDevice::default();
            device.write(offset, width, value);
            let inside = width.bytes().min(pc::TEST_MEMORY_LENGTH - offset);
            let mask = u64::MAX >> (64 - 8 * inside);
            prop_assert_eq!(device.read(offset, width) & mask, value & mask);
            prop_assert_eq!(device.read(offset, width) | mask, width.mask() | mask);
            if offset > 0 {
                prop_assert_eq!(device.read(offset - 1, Width::Byte), 0);
            }
        }
    }
}
