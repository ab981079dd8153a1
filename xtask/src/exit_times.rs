//! The hypervisor's table of what a guest's VM exits took, as its module
//! `monitor::statistics` prints it where the guest wants `statistics = "times"`:
//!
//! ```text
//! vireo: vm linux: 2825000 ticks in root mode, of 400000000 a second
//! vireo: reason  count   share  mean  maximum  2^6..2^14
//! vireo: all      1500  100.0%  1883    30000  7     3 .
//! vireo: CPUID    1000   66.7%    75       75  #
//! vireo: I/O       500   33.3%  5500    30000        # .
//! ```

use crate::verdict::PREFIX;

/// The table of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitTimes {
    /// Ticks in root mode.
    pub ticks: u64,
    /// The exits of all reasons.
    pub all: Row,
    /// Those of each, the most frequent first.
    pub reasons: Vec<Row>,
}

/// The exits of a reason. Times are in ticks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub reason: String,
    pub count: u64,
    pub mean: u64,
    /// Rounded down where it is great.
    pub maximum: u64,
    /// The histogram, a character for each power of two.
    pub histogram: String,
}

impl ExitTimes {
    /// Finds the table of the guest `vm` on a console; none where not all of its exits were
    /// timed.
    pub fn parse(console: &str, vm: &str) -> Option<Self> {
        let title = format!("{PREFIX}vm {vm}: ");
        let mut lines = console.lines().map(str::trim_end);
        let ticks = lines.find_map(|line| {
            let text = line.strip_prefix(&title)?;
            text.split_once(" ticks in root mode, ")?.0.parse().ok()
        })?;
        lines.next().filter(|heading| !heading.contains("timed"))?;
        let mut rows = lines.map_while(Row::parse);
        Some(Self {
            ticks,
            all: rows.next()?,
            reasons: rows.collect(),
        })
    }
}

impl Row {
    /// From a line; none where no exit was timed.
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim_end().strip_prefix(PREFIX)?;
        // The share is the first with a percent sign; before it is the count.
        let (left, right) = line.split_once('%')?;
        let (left, _share) = left.trim_end().rsplit_once(' ')?;
        let (reason, count) = left.trim_end().rsplit_once(' ')?;
        let right = right.trim_start();
        let (mean, right) = right.split_once(' ')?;
        let (maximum, histogram) = right.trim_start().split_once("  ")?;
        Some(Self {
            reason: reason.trim_end().to_owned(),
            count: count.parse().ok()?,
            mean: ticks(mean)?,
            maximum: ticks(maximum)?,
            histogram: histogram.to_owned(),
        })
    }
}

/// A time as in the table: `12`, `1234k` or in greater units.
fn ticks(text: &str) -> Option<u64> {
    let units = ["", "k", "M", "G", "T", "P"];
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = units
        .iter()
        .position(|unit| *unit == &text[number.len()..])?;
    let factor = 1000_u64.checked_pow(u32::try_from(power).ok()?)?;
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_its_rows_and_nothing_of_other_guests() {
        let console = "vireo: vm a: 1 exits: HLT 1\r\n\
            vireo: vm a: 70 ticks in root mode, of 9 a second\r\n\
            vireo: reason             count   share  mean  maximum  2^6..2^8\r\n\
            vireo: all                   13  100.0%     7    1000k  .# 1\r\n\
            vireo: entry failure: x      12   92.3%     7    1000k  .# 1\r\n\
            vireo: HLT                    1    7.7%     5        5    #\r\n\
            vireo: vm a: powered off\r\n\
            vireo: vm b: 1 ticks in root mode, of 9 a second\r\n";
        let times = ExitTimes::parse(console, "a").unwrap();
        assert_eq!((times.ticks, times.all.count), (70, 13));
        let reasons: Vec<&str> = times.reasons.iter().map(|row| &*row.reason).collect();
        assert_eq!(reasons, ["entry failure: x", "HLT"]);
        let row = &times.reasons[0];
        assert_eq!((row.count, row.mean, row.maximum), (12, 7, 1_000_000));
        assert_eq!(
            (&*row.histogram, &*times.reasons[1].histogram),
            (".# 1", "  #")
        );
        assert_eq!(ExitTimes::parse(console, "b"), None);
        assert_eq!(ExitTimes::parse(console, "c"), None);
    }

    #[test]
    fn exits_that_were_not_timed_are_no_row() {
        assert_eq!(Row::parse("vireo: HLT  3   20.0%     -        -"), None);
        assert_eq!(Row::parse("vireo: vm a: powered off"), None);
    }

    #[test]
    fn great_times_are_in_thousands_or_more() {
        assert_eq!(ticks("12"), Some(12));
        assert_eq!(ticks("34G"), Some(34_000_000_000));
        for wrong in ["", "k", "3x", "99999999P"] {
            assert_eq!(ticks(wrong), None);
        }
    }
}
