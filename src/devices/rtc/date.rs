//! Calendar arithmetic, for years 0 to 9999.

const SECONDS_A_DAY: u64 = 86_400;

/// Days in the 400 years after which the Gregorian calendar repeats, a whole
/// number of weeks.
const DAYS_IN_400_YEARS: u64 = 146_097;

/// Days from 1 March of the year 0 to 1 January 1970.
const UNIX_EPOCH: u64 = 719_468;

/// The last second of the year 9999, from 1970.
const LAST: u64 = 253_402_300_799;

/// A moment of the Gregorian calendar. Days are counted from 1 March of the
/// year 0, so that the leap day is a year's last; a date in January or February
/// of the year 0 is reckoned as one of the year 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    seconds: u64,
    /// Added to the day of the week, which can be set on its own.
    weekday_shift: u8,
}

impl Date {
    /// From seconds since 1970; a time after the year 9999 is its end.
    pub const fn from_unix(seconds: u64) -> Self {
        let seconds = if seconds > LAST { LAST } else { seconds };
        Self {
            seconds: seconds + UNIX_EPOCH * SECONDS_A_DAY,
            weekday_shift: 0,
        }
    }

    /// From a year, a month (1 to 12), a day (1 to 31) and hours, minutes and
    /// seconds; each is brought into its range.
    pub fn new(year: u32, month: u8, day: u8, time: [u8; 3]) -> Self {
        let year = u64::from(year.min(9999));
        let month = u64::from(month.clamp(1, 12));
        let day = u64::from(day.clamp(1, 31));
        let [hours, minutes, seconds] = time.map(u64::from);
        // The year that begins in March.
        let (year, month) = match (month, year) {
            (3.., _) => (year, month - 3),
            (_, 0) => (399, month + 9),
            _ => (year - 1, month + 9),
        };
        let days = year * 365 + year / 4 - year / 100 + year / 400 + month_start(month) + day - 1;
        let time = hours.min(23) * 3600 + minutes.min(59) * 60 + seconds.min(59);
        Self {
            seconds: days * SECONDS_A_DAY + time,
            weekday_shift: 0,
        }
    }

    /// The same moment, called weekday `weekday` (1 is Sunday).
    pub const fn with_weekday(self, weekday: u8) -> Self {
        let plain = Self {
            weekday_shift: 0,
            ..self
        };
        Self {
            weekday_shift: (weekday % 7 + 7 - plain.weekday() % 7) % 7,
            ..self
        }
    }

    /// `seconds` later.
    pub const fn after(self, seconds: u64) -> Self {
        Self {
            seconds: self.seconds.saturating_add(seconds),
            ..self
        }
    }

    /// Hours, minutes and seconds.
    pub const fn time(self) -> [u8; 3] {
        let time = self.seconds % SECONDS_A_DAY;
        [
            (time / 3600) as u8,
            (time / 60 % 60) as u8,
            (time % 60) as u8,
        ]
    }

    /// The day of the week, 1 is Sunday.
    pub const fn weekday(self) -> u8 {
        // 1 March of the year 0 was a Wednesday.
        let days = self.seconds / SECONDS_A_DAY + 3 + self.weekday_shift as u64;
        (days % 7) as u8 + 1
    }

    /// Year (0 to 9999, then from 0 again), month and day.
    pub fn calendar(self) -> (u32, u8, u8) {
        let days = self.seconds / SECONDS_A_DAY;
        let (eras, day) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
        // Take the leap days out, of which every fourth year, but not every
        // hundredth, has one as its last day; the era's last day is one too.
        let year = (day - day / 1460 + day / 36_524 - day / (DAYS_IN_400_YEARS - 1)) / 365;
        let day = day - (year * 365 + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - month_start(month) + 1;
        let (carry, month) = if month < 10 {
            (0, month + 3)
        } else {
            (1, month - 9)
        };
        let year = (eras % 25 * 400 + year + carry) % 10_000;
        (year as u32, month as u8, day as u8)
    }

    /// Seconds from this moment until the first, this one included, in which
    /// hours, minutes and seconds match; `None` matches every value. Values
    /// are in their ranges.
    pub fn seconds_until(self, [hours, minutes, seconds]: [Option<u8>; 3]) -> u64 {
        let [hour, minute, second] = self.time();
        let matches = |wanted: Option<u8>, value| wanted.is_none_or(|wanted| wanted == value);
        // The first value above `value`, if the field gets there.
        let above = |wanted: Option<u8>, value: u8, limit| match wanted {
            Some(wanted) => (wanted > value).then_some(wanted),
            None => (value + 1 < limit).then_some(value + 1),
        };
        let at = |hour: u8, minute: u8, second: u8| {
            u64::from(hour) * 3600 + u64::from(minute) * 60 + u64::from(second)
        };
        let first = |wanted: Option<u8>| wanted.unwrap_or(0);
        let now = at(hour, minute, second);

        if matches(hours, hour) {
            if matches(minutes, minute) {
                if matches(seconds, second) {
                    return 0;
                }
                if let Some(second) = above(seconds, second, 60) {
                    return at(hour, minute, second).saturating_sub(now);
                }
            }
            if let Some(minute) = above(minutes, minute, 60) {
                return at(hour, minute, first(seconds)).saturating_sub(now);
            }
        }
        match above(hours, hour, 24) {
            Some(hour) => at(hour, first(minutes), first(seconds)).saturating_sub(now),
            None => (at(first(hours), first(minutes), first(seconds)) + SECONDS_A_DAY)
                .saturating_sub(now),
        }
    }
}

/// Days before the month in a year that begins with March (month 0).
const fn month_start(month: u64) -> u64 {
    (153 * month + 2) / 5
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        for (unix, date, weekday) in [
            (0, (1970, 1, 1), 5),
            (951_782_400, (2000, 2, 29), 3),
            (951_868_800, (2000, 3, 1), 4),
            (1_735_603_200, (2024, 12, 31), 3),
            (4_107_456_000, (2100, 2, 28), 1),
            (4_107_542_400, (2100, 3, 1), 2),
            (LAST, (9999, 12, 31), 6),
        ] {
            let moment = Date::from_unix(unix);
            assert_eq!(moment.calendar(), date);
            assert_eq!(moment.weekday(), weekday, "{date:?}");
        }
    }

    proptest! {
        #[test]
        fn a_date_survives_its_fields(unix in 0..=LAST) {
            let date = Date::from_unix(unix);
            let (year, month, day) = date.calendar();
            prop_assert_eq!(Date::new(year, month, day, date.time()), date);
        }

        #[test]
        fn any_fields_are_some_date(year: u32, month: u8, day: u8, time: [u8; 3], weekday: u8, later: u64) {
            let date = Date::new(year, month, day, time).with_weekday(weekday);
            prop_assert_eq!(date.weekday() % 7, weekday % 7);
            let (year, month, day) = date.after(later).calendar();
            prop_assert!(year < 10_000 && (1..=12).contains(&month) && (1..=31).contains(&day));
        }

        #[test]
        fn a_day_later_is_another_day(unix in 0..LAST - SECONDS_A_DAY) {
            let (date, next) = (Date::from_unix(unix), Date::from_unix(unix + SECONDS_A_DAY));
            let ((year, month, day), (next_year, next_month, next_day)) = (date.calendar(), next.calendar());
            if next_day != 1 {
                prop_assert_eq!((year, month, day + 1), (next_year, next_month, next_day));
            } else {
                prop_assert!(day >= 28);
                prop_assert_eq!(u32::from(next_month) + next_year * 12, u32::from(month) + year * 12 + 1);
            }
        }

        #[test]
        fn the_match_is_the_first(unix in 0..LAST, h in prop::option::of(0..24u8), m in prop::option::of(0..60u8), s in prop::option::of(0..60u8)) {
            let date = Date::from_unix(unix);
            let matching = |seconds| {
                let [hour, minute, second] = date.after(seconds).time();
                h.is_none_or(|h| h == hour) && m.is_none_or(|m| m == minute) && s.is_none_or(|s| s == second)
            };
            let first = (0..=SECONDS_A_DAY).find(|&seconds| matching(seconds));
            prop_assert_eq!(Some(date.seconds_until([h, m, s])), first);
        }
    }
}
