//! The data area of a BIOS, as kernels look into it that a BIOS has not booted: how much memory
//! is below 1 MiB, and what the screen is.

use crate::addr::Gpa;
use crate::devices::pc;
use crate::devices::vga::TextMode;
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::LOW_RAM_END;

/// An 80x87, a screen with 80 columns in colour, one serial port.
const EQUIPMENT: u16 = 1 << 1 | 0b10 << 4 | 1 << 9;
/// Port of the CRT controller in colour modes.
const CRTC: u16 = 0x3d4;

/// Words, by their addresses.
const WORDS: [(u64, u16); 9] = [
    (0x400, pc::COM1),
    (0x410, EQUIPMENT),
    // In KiB; there is no extended data area at its end.
    (0x413, (LOW_RAM_END >> 10) as u16),
    // The screen: text mode 3, columns, bytes of a page, the cursor's shape, rows less one with
    // scan lines of a row.
    (0x449, 3),
    (0x44a, TextMode::FIRST.columns),
    (0x44c, 0x1000),
    (0x460, 0x0d0e),
    (0x463, CRTC),
    (0x484, 16 << 8 | (TextMode::FIRST.rows - 1)),
];

/// Writes what is not 0.
///
/// # Errors
/// Where there is no memory.
pub fn write(memory: &GuestMemory) -> Result<(), OutOfSlot> {
    WORDS
        .into_iter()
        .try_for_each(|(at, word)| memory.write(Gpa(at), &word.to_le_bytes()))
}
