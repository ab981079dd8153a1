//! The MC146818 real-time clock with 128 bytes of CMOS memory (Motorola
//! MC146818 datasheet), as PCs have it at ports 0x70 and 0x71.
//!
//! Nothing ticks: date, flags and update cycle are computed from the time of
//! the access, in constant time however long nobody looked. The line stays
//! high until register C is read, so unserved interrupts coalesce by nature.

mod date;

use super::{Clock, Line, Ticks, pc};
pub use date::Date;

/// The time base, in Hz.
const RTC_HZ: u64 = 32_768;

/// Cycle number of power-on. Not 0, so that the divider chain may seem to have
/// been released before.
const FIRST_CYCLE: u64 = RTC_HZ;

/// How long before the end of a second the update-in-progress bit is set: 244
/// microseconds of warning and 1984 of update, in cycles of the time base.
const UPDATE_CYCLES: u64 = 73;

/// Indices of the registers.
mod index {
    pub const SECONDS: u8 = 0x00;
    pub const SECONDS_ALARM: u8 = 0x01;
    pub const MINUTES: u8 = 0x02;
    pub const MINUTES_ALARM: u8 = 0x03;
    pub const HOURS: u8 = 0x04;
    pub const HOURS_ALARM: u8 = 0x05;
    pub const WEEKDAY: u8 = 0x06;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
    /// Why the machine starts, for firmware.
    pub const SHUTDOWN: u8 = 0x0f;
    pub const CENTURY: u8 = super::pc::RTC_CENTURY;
}

/// Bits of register A.
mod a {
    pub const UPDATE_IN_PROGRESS: u8 = 0x80;
    /// With these two bits set the divider is held in reset.
    pub const DIVIDER_RESET: u8 = 0x60;
    pub const RATE: u8 = 0x0f;
    /// The 32.768 kHz time base, and 1024 periodic interrupts a second.
    pub const AT_RESET: u8 = 0x26;
}

/// Bits of register B. The interrupt enables lie as the flags of register C do.
mod b {
    pub const SET: u8 = 0x80;
    pub const UPDATE_INTERRUPT: u8 = 0x10;
    /// Binary, not BCD.
    pub const BINARY: u8 = 0x04;
    pub const HOURS_24: u8 = 0x02;
}

/// Bits of register C.
mod c {
    pub const ANY: u8 = 0x80;
    pub const PERIODIC: u8 = 0x40;
    pub const ALARM: u8 = 0x20;
    pub const UPDATE: u8 = 0x10;
    pub const FLAGS: u8 = PERIODIC | ALARM | UPDATE;
}

/// The shutdown byte after suspend to RAM, as QEMU's chipset has it.
const SHUTDOWN_RESUME: u8 = 0xfe;

/// Afternoon, in the hours of the 12-hour format.
const PM: u8 = 0x80;

/// How much memory the machine has, for the CMOS bytes that tell it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemorySize {
    /// Bytes of RAM from address 0 up, below 4 GiB.
    pub below_4g: u64,
    /// Bytes of RAM from 4 GiB up.
    pub above_4g: u64,
}

/// The clock and its memory.
#[derive(Clone, Debug)]
pub struct Rtc {
    clock: Clock,
    power_on: Ticks,
    /// The index port: bit 7 masks the NMI.
    index: u8,
    memory: [u8; 128],
    flags: u8,
    /// The cycle in which the divider chain was released; `None` while it is held in reset.
    divider: Option<u64>,
    /// Cycles since then that flags were computed for.
    seen: u64,
    /// The date in second `base` of the divider chain.
    date: Date,
    base: u64,
    line: Line,
    deadline: Option<Ticks>,
}

impl Rtc {
    /// A clock that shows `unix_time` (seconds since 1970, UTC) at `now`, in
    /// BCD and 24-hour format as firmware leaves it.
    pub fn new(clock: Clock, now: Ticks, unix_time: u64, ram: MemorySize) -> Self {
        let mut rtc = Self {
            clock,
            power_on: now,
            index: 0,
            memory: [0; 128],
            flags: 0,
            divider: Some(FIRST_CYCLE),
            seen: 0,
            date: Date::from_unix(unix_time),
            base: 0,
            line: Line::default(),
            deadline: None,
        };
        rtc.set(index::A, a::AT_RESET);
        rtc.set(index::B, b::HOURS_24);
        rtc.describe_memory(ram);
        rtc
    }

    /// The interrupt output.
    #[inline]
    pub fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    /// When an enabled interrupt is due; `None` while one waits already.
    #[inline]
    pub const fn deadline(&self) -> Option<Ticks> {
        self.deadline
    }

    /// Whether the index port masks the NMI.
    pub const fn nmi_masked(&self) -> bool {
        self.index & 0x80 != 0
    }

    /// Writes the index port (0x70).
    pub const fn select(&mut self, index: u8) {
        self.index = index;
    }

    /// Tells firmware that the machine comes out of suspend to RAM, as chipsets for it do.
    pub fn show_resume(&mut self) {
        self.set(index::SHUTDOWN, SHUTDOWN_RESUME);
    }

    /// Reads the data port (0x71).
    pub fn read(&mut self, now: Ticks) -> u8 {
        self.advance(now);
        let index = self.index & 0x7f;
        match index {
            index::A => self.get(index::A) | self.updating(now),
            index::C => {
                let flags = self.flags();
                self.flags = 0;
                self.update();
                flags
            }
            // Battery and time are valid.
            index::D => 0x80,
            _ if self.frozen() => self.get(index),
            _ => self.shown(index).unwrap_or(self.get(index)),
        }
    }

    /// Writes the data port (0x71).
    pub fn write(&mut self, now: Ticks, value: u8) {
        self.advance(now);
        match self.index & 0x7f {
            index::A => self.set_mode(now, value & !a::UPDATE_IN_PROGRESS, self.get(index::B)),
            index::B => {
                // Setting the clock ends the update interrupts.
                let clear = if value & b::SET != 0 {
                    b::UPDATE_INTERRUPT
                } else {
                    0
                };
                self.set_mode(now, self.get(index::A), value & !clear);
            }
            index::C | index::D => {}
            index if self.shown(index).is_some() && !self.frozen() => {
                self.store_date();
                self.set(index, value);
                self.load_date();
            }
            index => self.set(index, value),
        }
        self.update();
    }

    /// Brings flags and line up to `now`.
    pub fn advance(&mut self, now: Ticks) {
        let Some(cycles) = self.divided(now) else {
            return;
        };
        let seen = self.seen;
        self.seen = cycles;
        if self
            .period()
            .is_some_and(|period| cycles / period != seen / period)
        {
            self.flags |= c::PERIODIC;
        }
        if !self.frozen() && cycles / RTC_HZ != seen / RTC_HZ {
            self.flags |= c::UPDATE;
            if self
                .next_alarm(seen / RTC_HZ)
                .is_some_and(|second| second <= cycles / RTC_HZ)
            {
                self.flags |= c::ALARM;
            }
        }
        self.update();
    }

    fn get(&self, index: u8) -> u8 {
        self.memory.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn set(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    /// Whether the date stands still in the registers, to be set.
    fn frozen(&self) -> bool {
        self.get(index::B) & b::SET != 0 || self.divider.is_none()
    }

    /// Cycles since the divider chain was released.
    fn divided(&self, now: Ticks) -> Option<u64> {
        Some(self.cycle(now).saturating_sub(self.divider?))
    }

    fn cycle(&self, now: Ticks) -> u64 {
        self.clock
            .cycles(now.0.saturating_sub(self.power_on.0), RTC_HZ)
            .saturating_add(FIRST_CYCLE)
    }

    fn ticks_at(&self, cycle: u64) -> Ticks {
        let cycles = cycle.saturating_sub(FIRST_CYCLE);
        let ticks = self.clock.ticks(cycles, RTC_HZ);
        Ticks(self.power_on.0.saturating_add(ticks))
    }

    /// Changes registers A and B, and what stops or goes with them.
    fn set_mode(&mut self, now: Ticks, mode_a: u8, mode_b: u8) {
        let was_frozen = self.frozen();
        if !was_frozen {
            self.store_date();
        }
        self.set(index::A, mode_a);
        self.set(index::B, mode_b);
        if mode_a & a::DIVIDER_RESET == a::DIVIDER_RESET {
            self.divider = None;
        } else if self.divider.is_none() {
            // The first update comes half a second after the release.
            self.divider = Some(self.cycle(now).saturating_sub(RTC_HZ / 2));
            self.seen = RTC_HZ / 2;
        }
        if was_frozen && !self.frozen() {
            self.load_date();
        }
    }

    /// Puts the running date into its registers.
    fn store_date(&mut self) {
        for index in (index::SECONDS..=index::YEAR).chain([index::CENTURY]) {
            if let Some(value) = self.shown(index) {
                self.set(index, value);
            }
        }
    }

    /// Takes the date from its registers; fields that mean nothing are taken
    /// as the nearest that do.
    fn load_date(&mut self) {
        let field = |index| self.number(self.get(index));
        self.date = Date::new(
            u32::from(field(index::CENTURY)) * 100 + u32::from(field(index::YEAR)),
            field(index::MONTH),
            field(index::DAY),
            [
                self.hours(self.get(index::HOURS)),
                field(index::MINUTES),
                field(index::SECONDS),
            ],
        )
        .with_weekday(field(index::WEEKDAY));
        self.base = self.seen / RTC_HZ;
    }

    /// The date in second `second` of the divider chain.
    fn date_at(&self, second: u64) -> Date {
        self.date.after(second.saturating_sub(self.base))
    }

    /// What a register of the running date shows; `None` for the others.
    fn shown(&self, index: u8) -> Option<u8> {
        if !matches!(
            index,
            index::SECONDS
                | index::MINUTES
                | index::HOURS
                | index::WEEKDAY
                | index::DAY
                | index::MONTH
                | index::YEAR
                | index::CENTURY
        ) {
            return None;
        }
        let date = self.date_at(self.seen / RTC_HZ);
        let [hours, minutes, seconds] = date.time();
        let (year, month, day) = date.calendar();
        let value = match index {
            index::SECONDS => seconds,
            index::MINUTES => minutes,
            index::HOURS => return Some(self.shown_hours(hours)),
            index::WEEKDAY => date.weekday(),
            index::DAY => day,
            index::MONTH => month,
            index::YEAR => (year % 100) as u8,
            _ => (year / 100 % 100) as u8,
        };
        Some(self.format(value))
    }

    fn shown_hours(&self, hours: u8) -> u8 {
        if self.get(index::B) & b::HOURS_24 != 0 {
            return self.format(hours);
        }
        let twelve = match hours % 12 {
            0 => 12,
            hours => hours,
        };
        self.format(twelve) | if hours >= 12 { PM } else { 0 }
    }

    /// Hours of the day, from a register in the format that is set.
    fn hours(&self, value: u8) -> u8 {
        if self.get(index::B) & b::HOURS_24 != 0 {
            return self.number(value);
        }
        self.number(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    /// A number up to 99 as a register shows it.
    fn format(&self, value: u8) -> u8 {
        if self.get(index::B) & b::BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        }
    }

    /// The number that a register means; nonsense gives some number.
    fn number(&self, value: u8) -> u8 {
        if self.get(index::B) & b::BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    }

    /// Bit 7 of register A.
    fn updating(&self, now: Ticks) -> u8 {
        match self.divided(now) {
            Some(cycles) if !self.frozen() && cycles % RTC_HZ >= RTC_HZ - UPDATE_CYCLES => {
                a::UPDATE_IN_PROGRESS
            }
            _ => 0,
        }
    }

    /// Cycles between two periodic interrupts.
    fn period(&self) -> Option<u64> {
        match self.get(index::A) & a::RATE {
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The first second of the divider chain after `second` that matches the alarm.
    fn next_alarm(&self, second: u64) -> Option<u64> {
        // Two high bits set match every value.
        let field = |index, limit| match self.get(index) {
            value if value >= 0xc0 => Some(None),
            value if index == index::HOURS_ALARM => {
                Some(Some(self.hours(value))).filter(|value| *value < Some(limit))
            }
            value => Some(Some(self.number(value))).filter(|value| *value < Some(limit)),
        };
        let alarm = [
            field(index::HOURS_ALARM, 24)?,
            field(index::MINUTES_ALARM, 60)?,
            field(index::SECONDS_ALARM, 60)?,
        ];
        let next = second.saturating_add(1);
        Some(next.saturating_add(self.date_at(next).seconds_until(alarm)))
    }

    /// Register C.
    fn flags(&self) -> u8 {
        let wanted = self.flags & self.get(index::B) & c::FLAGS != 0;
        self.flags | if wanted { c::ANY } else { 0 }
    }

    fn update(&mut self) {
        let asserted = self.flags() & c::ANY != 0;
        self.line.set(asserted);
        self.deadline = match (asserted, self.divider) {
            (false, Some(divider)) => self
                .next_event()
                .map(|cycles| self.ticks_at(divider.saturating_add(cycles))),
            _ => None,
        };
    }

    /// The next cycle of the divider chain that raises an enabled interrupt.
    fn next_event(&self) -> Option<u64> {
        let enabled = self.get(index::B);
        let periodic = self
            .period()
            .filter(|_| enabled & c::PERIODIC != 0)
            .map(|period| {
                (self.seen / period)
                    .saturating_add(1)
                    .saturating_mul(period)
            });
        if self.frozen() {
            return periodic;
        }
        let second = self.seen / RTC_HZ;
        let update = (enabled & c::UPDATE != 0).then(|| second.saturating_add(1));
        let alarm = (enabled & c::ALARM != 0)
            .then(|| self.next_alarm(second))
            .flatten();
        let seconds = [update, alarm].into_iter().flatten().min();
        let seconds = seconds.map(|second| second.saturating_mul(RTC_HZ));
        [periodic, seconds].into_iter().flatten().min()
    }

    /// The bytes in which a PC's firmware leaves the memory size.
    fn describe_memory(&mut self, ram: MemorySize) {
        let kibibytes = |bytes: u64| u16::try_from(bytes >> 10).unwrap_or(u16::MAX);
        let chunks = |bytes: u64| bytes >> 16;
        let base = kibibytes(ram.below_4g.min(640 << 10));
        let extended = kibibytes(ram.below_4g.saturating_sub(1 << 20));
        let above_16m = chunks(ram.below_4g.saturating_sub(16 << 20));
        let above_16m = u16::try_from(above_16m).unwrap_or(u16::MAX);
        let above_4g = chunks(ram.above_4g).min(0xff_ffff) as u32;
        // Equipment: a coprocessor; no display, keyboard or floppy drive.
        self.set(0x14, 0x02);
        for (first, bytes) in [
            (0x15, base.to_le_bytes()),
            (0x17, extended.to_le_bytes()),
            (0x30, extended.to_le_bytes()),
            (0x34, above_16m.to_le_bytes()),
        ] {
            for (index, byte) in (first..).zip(bytes) {
                self.set(index, byte);
            }
        }
        for (index, byte) in (0x5b..=0x5d).zip(above_4g.to_le_bytes()) {
            self.set(index, byte);
        }
        // The checksum over 0x10 to 0x2d, high byte first.
        let sum = (0x10..=0x2d).fold(0u16, |sum, index| sum + u16::from(self.get(index)));
        let [high, low] = sum.to_be_bytes();
        self.set(0x2e, high);
        self.set(0x2f, low);
    }
}

#[cfg(test)]
mod tests;
