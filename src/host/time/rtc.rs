//! The wall clock: the battery-backed MC146818.

use crate::arch::cpu::without_interrupts;
use crate::arch::port::{inb, outb};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
/// Status A: the time is being advanced.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Status B: numbers are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Status B: hours count to 23.
const HOURS_24: u8 = 1 << 1;
/// Hours: in the afternoon, when they count to 12.
const PM: u8 = 1 << 7;
/// Reads until an update has passed (it takes 2 ms at most) or the part is taken for dead.
const PATIENCE: u32 = 100_000;
/// Readings until two are alike.
const ATTEMPTS: usize = 4;

/// The time registers as they stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    second: u8,
    minute: u8,
    hour: u8,
    day: u8,
    month: u8,
    year: u8,
    status_b: u8,
}

impl Reading {
    /// Seconds since 1970-01-01; `None` for what is no date. Years are of this century.
    fn unix_seconds(self) -> Option<u64> {
        let number = |raw: u8| {
            if self.status_b & BINARY != 0 {
                Some(raw)
            } else {
                (raw & 0xf < 10 && raw >> 4 < 10).then_some((raw >> 4) * 10 + (raw & 0xf))
            }
        };
        let hour = if self.status_b & HOURS_24 != 0 {
            number(self.hour)?
        } else {
            let hour = number(self.hour & !PM).filter(|hour| (1..=12).contains(hour))?;
            hour % 12 + if self.hour & PM != 0 { 12 } else { 0 }
        };
        let (second, minute) = (number(self.second)?, number(self.minute)?);
        let (day, month, year) = (number(self.day)?, number(self.month)?, number(self.year)?);
        let valid = second < 60
            && minute < 60
            && hour < 24
            && (1..=12).contains(&month)
            && year < 100
            && (1..=days_in(month, year)).contains(&day);
        let days = valid.then(|| days_to(year, month, day))?;
        Some(days * 86_400 + u64::from(hour) * 3600 + u64::from(minute) * 60 + u64::from(second))
    }
}

/// Days of a month of 2000 to 2099, in which every fourth year is a leap year.
const fn days_in(month: u8, year: u8) -> u8 {
    match month {
        2 if year.is_multiple_of(4) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date of 2000 to 2099.
fn days_to(year: u8, month: u8, day: u8) -> u64 {
    let leap_days = u64::from(year).div_ceil(4);
    let months: u64 = (1..month)
        .map(|month| u64::from(days_in(month, year)))
        .sum();
    // 10957 days to 2000-01-01.
    10_957 + u64::from(year) * 365 + leap_days + months + u64::from(day) - 1
}

fn read(register: u8) -> u8 {
    // SAFETY: the index port selects (bit 7 clear leaves NMI enabled), the
    // data port is read; registers C and D, which reading changes, are not asked for.
    unsafe {
        outb(INDEX, register);
        inb(DATA)
    }
}

fn reading() -> Option<Reading> {
    (0..PATIENCE).find(|_| read(0x0a) & UPDATE_IN_PROGRESS == 0)?;
    Some(Reading {
        second: read(0x00),
        minute: read(0x02),
        hour: read(0x04),
        day: read(0x07),
        month: read(0x08),
        year: read(0x09),
        status_b: read(0x0b),
    })
}

/// Seconds since 1970-01-01, as the clock stands (UTC is what a server's
/// clock holds); `None` without a working clock.
pub fn unix_seconds() -> Option<u64> {
    without_interrupts(|| {
        let mut before = reading()?;
        // An update may begin between two registers: two alike are one time.
        for _ in 0..ATTEMPTS {
            let now = reading()?;
            if now == before {
                return now.unix_seconds();
            }
            before = now;
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const READING: Reading = Reading {
        second: 0x56,
        minute: 0x34,
        hour: 0x12,
        day: 0x29,
        month: 0x02,
        year: 0x24,
        status_b: HOURS_24,
    };

    #[test]
    fn bcd_and_binary_and_both_kinds_of_hours() {
        // 2024-02-29 12:34:56 UTC
        assert_eq!(READING.unix_seconds(), Some(1_709_210_096));
        let binary = Reading {
            second: 56,
            minute: 34,
            hour: 12,
            day: 29,
            month: 2,
            year: 24,
            status_b: 0x06,
        };
        assert_eq!(binary.unix_seconds(), Some(1_709_210_096));
        let afternoon = Reading {
            hour: 0x12 | PM,
            status_b: 0,
            ..READING
        };
        assert_eq!(afternoon.unix_seconds(), Some(1_709_210_096));
        let midnight = Reading {
            hour: 0x12,
            status_b: 0,
            ..READING
        };
        assert_eq!(midnight.unix_seconds(), Some(1_709_210_096 - 12 * 3600));
    }

    #[test]
    fn what_is_no_date_is_none() {
        for broken in [
            Reading {
                second: 0x60,
                ..READING
            },
            Reading {
                minute: 0x0a,
                ..READING
            },
            Reading { day: 0, ..READING },
            Reading {
                day: 0x30,
                ..READING
            },
            Reading {
                year: 0x23,
                ..READING
            },
            Reading {
                month: 0x13,
                ..READING
            },
            Reading {
                second: 0xff,
                minute: 0xff,
                hour: 0xff,
                day: 0xff,
                month: 0xff,
                year: 0xff,
                status_b: 0xff,
            },
        ] {
            assert_eq!(broken.unix_seconds(), None, "{broken:?}");
        }
    }

    #[test]
    fn every_day_of_the_century_follows_the_one_before() {
        let mut expected = 10_957;
        for year in 0..100u8 {
            for month in 1..=12 {
                for day in 1..=days_in(month, year) {
                    assert_eq!(days_to(year, month, day), expected);
                    expected += 1;
                }
            }
        }
        assert_eq!(expected, 47_482, "2100-01-01");
    }
}
