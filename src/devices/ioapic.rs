//! The I/O APIC: the 82093AA (Intel datasheet 290566) with the EOI register
//! of its successors (version 0x20; Intel ICH, 5.8 and 13.5).
//!
//! Lines are active-high inside; the polarity bit is kept and has no effect,
//! as on every virtual PC. A pin whose interrupt is due is a bit in a map;
//! [`IoApic::take_message`] turns it into a message when somebody has time to
//! deliver it. A level-triggered pin is due again only after its vector's EOI,
//! so a line that stays high costs one message per EOI and never a loop here.

use super::{DeliveryMode, Destination, Message, Trigger, Width};

/// Inputs, and so redirection entries.
pub const PINS: u8 = 24;

/// Version 0x20 (there is an EOI register) and, in bits 23..16, the highest entry.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// Offsets in the I/O APIC's page.
mod offset {
    pub const SELECT: u64 = 0x00;
    pub const WINDOW: u64 = 0x10;
    pub const EOI: u64 = 0x40;
}

/// Values of the register select register.
mod index {
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    pub const REDIRECTION: u8 = 0x10;
}

/// The bits of the identifier in its register.
const ID: u32 = 0xf << 24;

/// One entry of the redirection table.
#[derive(Clone, Copy, Debug)]
struct Entry(u64);

impl Entry {
    const LOGICAL: u64 = 1 << 11;
    const DELIVERY_STATUS: u64 = 1 << 12;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    const DESTINATION_SHIFT: u32 = 56;
    /// Everything that software can write.
    const WRITABLE: u64 =
        0xff << Self::DESTINATION_SHIFT | (0x1_ffff & !(Self::DELIVERY_STATUS | Self::REMOTE_IRR));

    const RESET: Self = Self(Self::MASKED);

    const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    const fn vector(self) -> u8 {
        self.0 as u8
    }

    const fn mode(self) -> Option<DeliveryMode> {
        DeliveryMode::from_bits((self.0 >> 8) as u32)
    }

    /// Level-triggered. Only interrupts with a vector can be: nothing ends an
    /// NMI, SMI, INIT or ExtINT with an EOI that comes back here.
    const fn is_level(self) -> bool {
        self.has(Self::LEVEL)
            && matches!(
                self.mode(),
                Some(DeliveryMode::Fixed | DeliveryMode::LowestPriority)
            )
    }

    /// What is sent; `None` for a reserved delivery mode.
    fn message(self) -> Option<Message> {
        let mode = self.mode().filter(|&mode| mode != DeliveryMode::StartUp)?;
        let destination = (self.0 >> Self::DESTINATION_SHIFT) as u32;
        Some(Message {
            mode,
            destination: if self.has(Self::LOGICAL) {
                Destination::Logical(destination)
            } else if destination == 0xff {
                Destination::All
            } else {
                Destination::Physical(destination)
            },
            vector: self.vector(),
            trigger: if self.is_level() {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            assert: true,
        })
    }
}

/// The I/O APIC.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u32,
    arbitration: u32,
    select: u8,
    entries: [Entry; PINS as usize],
    /// Levels of the lines, by pin.
    lines: u32,
    /// Pins whose interrupt is due.
    waiting: u32,
}

impl IoApic {
    /// The I/O APIC at power-on, every pin masked. `id` is its identifier (0 to 15).
    pub const fn new(id: u8) -> Self {
        let id = (id as u32) << 24 & ID;
        Self {
            id,
            arbitration: id,
            select: 0,
            entries: [Entry::RESET; PINS as usize],
            lines: 0,
            waiting: 0,
        }
    }

    /// Drives `pin` to `level`; `rose` says whether it rose since the last
    /// call, even if it fell again. An edge at a masked pin is lost, as on
    /// silicon (datasheet 3.2.4, "Interrupt Mask").
    #[inline]
    pub fn set_line(&mut self, pin: u8, level: bool, rose: bool) {
        let Some(&entry) = self.entries.get(usize::from(pin)) else {
            return;
        };
        let bit = 1 << pin;
        self.lines = if level {
            self.lines | bit
        } else {
            self.lines & !bit
        };
        if entry.is_level() {
            self.evaluate(pin);
        } else if rose && !entry.has(Entry::MASKED) {
            self.waiting |= bit;
        }
    }

    /// The end of a level-triggered interrupt: a local APIC's broadcast, or a
    /// write to the EOI register. A line that is still high is due again.
    pub fn eoi(&mut self, vector: u8) {
        for (pin, entry) in (0..).zip(&mut self.entries) {
            if !entry.has(Entry::REMOTE_IRR) || entry.vector() != vector {
                continue;
            }
            entry.0 &= !Entry::REMOTE_IRR;
            let due = entry.is_level() && !entry.has(Entry::MASKED);
            if due && self.lines & 1 << pin != 0 {
                self.waiting |= 1 << pin;
            }
        }
    }

    /// Whether a pin may have a message to the local APICs.
    #[inline]
    pub const fn has_message(&self) -> bool {
        self.waiting != 0
    }

    /// Whether a pin's message would reach a CPU that has interrupts off: an NMI or INIT.
    pub fn sends_unmaskable(&self) -> bool {
        self.entries.iter().any(|entry| {
            let unmaskable = matches!(entry.mode(), Some(DeliveryMode::Nmi | DeliveryMode::Init));
            unmaskable && !entry.has(Entry::MASKED)
        })
    }

    /// The next message to the local APICs, lowest pin first.
    #[inline]
    pub fn take_message(&mut self) -> Option<Message> {
        while self.waiting != 0 {
            let pin = self.waiting.trailing_zeros();
            self.waiting &= self.waiting - 1;
            let Some(entry) = self.entries.get_mut(pin as usize) else {
                continue;
            };
            let Some(message) = entry.message() else {
                continue;
            };
            if entry.is_level() {
                entry.0 |= Entry::REMOTE_IRR;
            }
            return Some(message);
        }
        None
    }

    /// Whether a level-triggered or masked pin's interrupt is due: it follows
    /// line, mask and remote IRR, until it was sent.
    fn evaluate(&mut self, pin: u8) {
        let Some(entry) = self.entries.get(usize::from(pin)) else {
            return;
        };
        let bit = 1 << pin;
        if entry.has(Entry::MASKED) {
            self.waiting &= !bit;
        } else if entry.is_level() {
            let due = self.lines & bit != 0 && !entry.has(Entry::REMOTE_IRR);
            self.waiting = if due {
                self.waiting | bit
            } else {
                self.waiting & !bit
            };
        }
    }

    /// The register that is selected.
    fn window(&self) -> u32 {
        match self.select {
            index::ID => self.id,
            index::VERSION => VERSION,
            index::ARBITRATION => self.arbitration,
            _ => match self.selected_entry() {
                Some((pin, high)) => self.entry_half(pin, high),
                None => 0,
            },
        }
    }

    fn set_window(&mut self, value: u32) {
        match self.select {
            // Loading the identifier loads the arbitration identifier (datasheet 3.2.3).
            index::ID => {
                self.id = value & ID;
                self.arbitration = self.id;
            }
            _ => {
                if let Some((pin, high)) = self.selected_entry() {
                    self.set_entry_half(pin, high, value);
                }
            }
        }
    }

    /// The pin of the selected redirection entry, and whether its upper half is meant.
    fn selected_entry(&self) -> Option<(u8, bool)> {
        let half = self.select.checked_sub(index::REDIRECTION)?;
        let pin = half / 2;
        (pin < PINS).then_some((pin, half & 1 != 0))
    }

    fn entry_half(&self, pin: u8, high: bool) -> u32 {
        let Some(entry) = self.entries.get(usize::from(pin)) else {
            return 0;
        };
        if high {
            return (entry.0 >> 32) as u32;
        }
        let waiting = self.waiting & 1 << pin != 0;
        let status = if waiting { Entry::DELIVERY_STATUS } else { 0 };
        (entry.0 | status) as u32
    }

    fn set_entry_half(&mut self, pin: u8, high: bool, value: u32) {
        let Some(entry) = self.entries.get_mut(usize::from(pin)) else {
            return;
        };
        let was_level = entry.is_level();
        let (shift, half) = if high {
            (32, u64::from(u32::MAX) << 32)
        } else {
            (0, u64::from(u32::MAX))
        };
        let replaced = Entry::WRITABLE & half;
        entry.0 = entry.0 & !replaced | u64::from(value) << shift & replaced;
        if !entry.is_level() {
            // Making an entry edge-triggered ends its level-triggered interrupt:
            // the EOI of software for version 0x1x, which has no EOI register.
            entry.0 &= !Entry::REMOTE_IRR;
            if was_level {
                self.waiting &= !(1 << pin);
            }
        }
        self.evaluate(pin);
    }

    /// The value of the register at `offset` in the page, in the low bits. Registers are
    /// 32 bits wide. A narrower access moves those bytes of one, as the bus's byte
    /// enables say; bytes beyond it do not exist.
    #[inline]
    pub fn read(&self, offset: u64, width: Width) -> u64 {
        let register = match offset & !3 {
            offset::SELECT => u32::from(self.select),
            offset::WINDOW => self.window(),
            // The EOI register cannot be read, and nothing else is there.
            _ => 0,
        };
        u64::from(register) >> (8 * (offset & 3)) & width.mask()
    }

    /// Writes the low bits of `value` to the register at `offset` in the page.
    #[inline]
    pub fn write(&mut self, offset: u64, width: Width, value: u64) {
        let shift = 8 * (offset & 3);
        let lanes = (width.mask() << shift) as u32;
        let value = (value << shift) as u32 & lanes;
        match offset & !3 {
            offset::SELECT if lanes & 0xff != 0 => self.select = value as u8,
            offset::WINDOW => self.set_window(self.window() & !lanes | value),
            offset::EOI if lanes & 0xff != 0 => self.eoi(value as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
