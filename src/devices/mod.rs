//! What a guest finds on its buses.
//!
//! A device is a plain object: it is read and written at an offset with a
//! [`Width`], told the time, and drives its interrupt outputs, [`Line`]s, which
//! whoever holds the device looks at afterwards. It knows neither the CPU nor
//! VT-x nor another device, so it runs in `cargo test` unchanged.
//! [`chipset::Chipset`] wires the devices of one PC together.

pub mod chipset;
pub mod clock;
pub mod fifo;
pub mod fw_cfg;
pub mod i440fx;
pub mod i8042;
pub mod ioapic;
pub mod line;
pub mod local_apic;
pub mod message;
pub mod pc;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod rtc;
pub mod system;
pub mod test;
pub mod uart;
pub mod vga;

pub use clock::{Clock, Ticks};
pub use line::Line;
pub use message::{DeliveryMode, Destination, Message, Trigger};

use crate::addr::Gpa;

/// What a register write asks of whoever runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Soft-off (ACPI S5).
    PowerOff,
    /// Suspend to RAM (ACPI S3).
    Suspend,
    /// A reset of the whole machine.
    Reset,
    /// The end, with this code.
    Exit(u32),
    /// The guest's console has more to show. Where `taken` is false there was no room for
    /// the byte: it is to be written again.
    Console { taken: bool },
    /// [`fw_cfg`] has a transfer to do, which is described here.
    Transfer(Gpa),
    /// The page at this address is to be unmapped.
    Unmap(Gpa),
}

/// How many bytes one access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Width {
    Byte = 1,
    Word = 2,
    Dword = 4,
    Qword = 8,
}

impl Width {
    /// The number of bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    /// All ones in this width: what a read of nothing returns.
    #[inline]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }

    /// The width of `bytes` bytes; `None` unless that is 1, 2, 4 or 8.
    #[inline]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            8 => Some(Self::Qword),
            _ => None,
        }
    }
}
