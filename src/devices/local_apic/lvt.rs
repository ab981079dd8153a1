//! The local vector table (SDM 3, 12.5.1), and what interrupts through it: the
//! LINT pins and the APIC's own errors. (The timer is in its own module; nothing
//! here drives the entries of the thermal sensor and the performance counters.)

use super::page::register;
use super::{Event, LocalApic, Mode, registers};
use crate::devices::{DeliveryMode, Trigger};

/// The entries, by offset.
pub const ENTRIES: [u16; 6] = [
    register::LVT_TIMER,
    register::LVT_THERMAL,
    register::LVT_PERFORMANCE,
    register::LVT_LINT0,
    register::LVT_LINT1,
    register::LVT_ERROR,
];

/// The entries of the LINT pins, by pin.
const LINT: [u16; 2] = [register::LVT_LINT0, register::LVT_LINT1];

/// One entry's value.
#[derive(Clone, Copy, Debug)]
pub struct Entry(pub u32);

impl Entry {
    /// Delivery status: always idle, since a message is delivered at once.
    const DELIVERY_STATUS: u32 = 1 << 12;
    const POLARITY: u32 = 1 << 13;
    pub const REMOTE_IRR: u32 = 1 << 14;
    const LEVEL: u32 = 1 << 15;
    pub const MASKED: u32 = 1 << 16;
    const TIMER_MODE_SHIFT: u32 = 17;
    const VECTOR: u32 = 0xff;
    const MODE: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    const EXT_INT: u32 = 7 << 8;

    /// What software can write to the entry at `offset`.
    pub const fn writable(offset: u16) -> u32 {
        let common = Self::VECTOR | Self::MASKED;
        match offset {
            register::LVT_TIMER => common | 3 << Self::TIMER_MODE_SHIFT,
            register::LVT_ERROR => common,
            register::LVT_LINT0 | register::LVT_LINT1 => {
                common | Self::MODE | Self::POLARITY | Self::LEVEL
            }
            _ => common | Self::MODE,
        }
    }

    /// What is not reserved in the entry at `offset`: also what software can
    /// only read, so that it may write back what it has read.
    pub const fn defined(offset: u16) -> u32 {
        let read_only = match offset {
            register::LVT_LINT0 | register::LVT_LINT1 => Self::DELIVERY_STATUS | Self::REMOTE_IRR,
            _ => Self::DELIVERY_STATUS,
        };
        Self::writable(offset) | read_only
    }

    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    pub const fn is_masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    /// `None` for a reserved encoding.
    pub const fn mode(self) -> Option<DeliveryMode> {
        DeliveryMode::from_bits(self.0 >> 8)
    }

    /// Level-triggered: only a LINT pin's fixed interrupt can be.
    const fn is_level(self) -> bool {
        self.0 & Self::LEVEL != 0 && matches!(self.mode(), Some(DeliveryMode::Fixed))
    }

    const fn has_remote_irr(self) -> bool {
        self.0 & Self::REMOTE_IRR != 0
    }

    /// The two bits of the timer's mode.
    pub const fn timer_mode(self) -> u32 {
        self.0 >> Self::TIMER_MODE_SHIFT & 3
    }
}

impl LocalApic {
    #[inline]
    pub(super) const fn entry(&self, offset: u16) -> Entry {
        Entry(self.page.get(offset))
    }

    /// Writes an entry. While software has the APIC disabled it stays masked
    /// (SDM 3, 12.4.7.2).
    pub(super) fn set_entry(&mut self, offset: u16, value: u32) {
        let mut value = value & Entry::writable(offset);
        if !self.is_enabled() {
            value |= Entry::MASKED;
        }
        if Entry(value).is_level() {
            value |= self.page.get(offset) & Entry::REMOTE_IRR;
        }
        self.page.set(offset, value);
        if let Some(pin) = LINT.iter().position(|&entry| entry == offset) {
            self.request_level(pin);
        }
    }

    /// LINT0 passes the 8259s' interrupts on, LINT1 the NMI (MP specification
    /// 1.4, 3.6.2.2 and example B-1).
    pub(super) fn enter_virtual_wire_mode(&mut self) {
        let spurious = self.page.get(register::SVR);
        self.page
            .set(register::SVR, spurious | registers::SVR_ENABLED);
        self.set_entry(register::LVT_LINT0, Entry::EXT_INT);
        self.set_entry(register::LVT_LINT1, Entry::NMI);
    }

    /// Masks all entries, as disabling by software does.
    pub(super) fn mask_entries(&mut self) {
        for offset in ENTRIES {
            self.page.set(offset, self.page.get(offset) | Entry::MASKED);
        }
    }

    /// Drives LINT0, which is INTR while the APIC is globally disabled. An
    /// 8259's INTR needs no call: see [`LocalApic::lint0_takes_extint`].
    pub fn set_lint0(&mut self, level: bool) -> Event {
        self.set_lint(0, level)
    }

    /// Drives LINT1, which is NMI while the APIC is globally disabled.
    pub fn set_lint1(&mut self, level: bool) -> Event {
        if self.mode == Mode::Disabled {
            let rose = level && !self.lint[1];
            self.lint[1] = level;
            return if rose { Event::Nmi } else { Event::None };
        }
        self.set_lint(1, level)
    }

    fn set_lint(&mut self, pin: usize, level: bool) -> Event {
        let was_high = core::mem::replace(&mut self.lint[pin & 1], level);
        let rose = level && !was_high;
        let entry = self.entry(LINT[pin & 1]);
        if entry.is_level() {
            self.request_level(pin);
            return Event::None;
        }
        if !rose || entry.is_masked() {
            return Event::None;
        }
        match entry.mode() {
            Some(DeliveryMode::Fixed) => {
                self.request(entry.vector(), Trigger::Edge);
                Event::None
            }
            Some(DeliveryMode::Nmi) => Event::Nmi,
            Some(DeliveryMode::Smi) => Event::Smi,
            Some(DeliveryMode::ExtInt) => Event::ExtInt,
            Some(DeliveryMode::Init) => {
                self.init();
                Event::Init
            }
            Some(DeliveryMode::LowestPriority | DeliveryMode::StartUp) | None => Event::None,
        }
    }

    /// Whether the 8259s' INTR reaches the CPU through LINT0: it is programmed as
    /// ExtINT (virtual wire mode), or the APIC is off and out of the way.
    #[inline]
    pub fn lint0_takes_extint(&self) -> bool {
        let entry = self.entry(register::LVT_LINT0);
        self.mode == Mode::Disabled
            || !entry.is_masked() && entry.mode() == Some(DeliveryMode::ExtInt)
    }

    /// Requests the interrupt of a level-triggered LINT pin that is high, unless
    /// the last one has not ended.
    fn request_level(&mut self, pin: usize) {
        let offset = LINT[pin & 1];
        let entry = self.entry(offset);
        if self.lint[pin & 1] && entry.is_level() && !entry.is_masked() && !entry.has_remote_irr() {
            if entry.vector() >= registers::LEAST_VECTOR {
                self.page.set(offset, entry.0 | Entry::REMOTE_IRR);
            }
            self.request(entry.vector(), Trigger::Level);
        }
    }

    /// The end of a level-triggered interrupt: a LINT pin's, if it has that
    /// vector, and perhaps one of the I/O APIC, which is to be told if this is true.
    #[inline(never)]
    pub(super) fn end_level_interrupt(&mut self, vector: u8) -> bool {
        for (pin, offset) in LINT.into_iter().enumerate() {
            let entry = self.entry(offset);
            if entry.has_remote_irr() && entry.vector() == vector {
                self.page.set(offset, entry.0 & !Entry::REMOTE_IRR);
                self.request_level(pin);
            }
        }
        self.page.get(register::SVR) & registers::SVR_SUPPRESS_BROADCAST == 0
    }

    /// Notes an error for the ESR and, when it is new since the last write
    /// there, raises the error interrupt (SDM 3, 12.5.3).
    #[cold]
    pub(super) fn record_error(&mut self, error: u32) {
        if self.errors & error != 0 {
            return;
        }
        self.errors |= error;
        let entry = self.entry(register::LVT_ERROR);
        if entry.is_masked() {
            return;
        }
        if entry.vector() >= registers::LEAST_VECTOR {
            self.request(entry.vector(), Trigger::Edge);
        } else {
            self.errors |= registers::RECEIVED_ILLEGAL_VECTOR;
        }
    }
}
