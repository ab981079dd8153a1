//! What a guest has cost: its VM exits, in one line or as a table.
//!
//! ```text
//! vm linux: 1500 exits: CPUID 1000, I/O 500
//! vm linux: 2825000 ticks in root mode, of 400000000 a second
//!   reason  count   share  mean  maximum  2^6..2^14
//!   all      1500  100.0%  1883    30000  7     3 .
//!   CPUID    1000   66.7%    75       75  #
//!   I/O       500   33.3%  5500    30000        # .
//! ```
//!
//! The last column is a histogram: one character for the exits that took from 2^n to
//! 2^(n + 1) - 1 ticks. It is how many tenths of the reason's exits these are,
//! `.` where that rounds to none and `#` where it rounds to all. A `+` behind the
//! heading says that the last character stands for all longer ones too, since the
//! line has no room for more. A column "timed" is there where times were not
//! recorded for all exits. Great times are in thousands of ticks, `k`, or more.

use crate::vmx::exit_reason::{self, REASONS};
use crate::vmx::exit_times::{BUCKETS, ExitTimes, Times};
use alloc::vec::Vec;
use arrayvec::ArrayString;
use core::fmt::{self, Write};

/// How many reasons the short line names; the rest is summed up.
const NAMED: usize = 6;
/// Columns of a line of the table: 80 less those of the log's prefix.
const WIDTH: usize = 73;
/// The histogram has room for so many buckets, however wide the rest is.
const LEAST_BUCKETS: usize = 8;

/// The exits of a guest, as they were when this was made.
#[derive(Clone, Debug)]
pub struct Exits {
    /// The most frequent reason first, and none that never happened.
    reasons: Vec<Reason>,
    all: Row,
    /// Times were recorded.
    timed: bool,
}

/// The exits with one reason.
#[derive(Clone, Copy, Debug)]
struct Reason {
    /// The basic exit reason.
    number: usize,
    row: Row,
}

/// How many exits, and the times of those that were timed.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    count: u64,
    times: Times,
}

impl Exits {
    /// From the counts by basic reason and, where they were recorded, the times.
    pub fn new(counts: &[u64], times: Option<&ExitTimes>) -> Self {
        Self::sum(&[(counts, times)])
    }

    /// The same of several vCPUs together.
    pub fn sum(vcpus: &[(&[u64], Option<&ExitTimes>)]) -> Self {
        let mut reasons: Vec<Reason> = Vec::new();
        let mut all = Row::default();
        for number in 0..REASONS {
            let mut row = Row::default();
            for (counts, times) in vcpus {
                let count = counts.get(number).copied().unwrap_or(0);
                row.count = row.count.saturating_add(count);
                if let Some(times) = times {
                    row.times.add(&times.get(number));
                }
            }
            if row.count > 0 {
                let place = reasons.partition_point(|before| before.row.count >= row.count);
                reasons.insert(place, Reason { number, row });
                all.count = all.count.saturating_add(row.count);
                all.times.add(&row.times);
            }
        }
        Self {
            reasons,
            all,
            timed: vcpus.iter().any(|(_, times)| times.is_some()),
        }
    }

    /// How many exits.
    pub fn count(&self) -> u64 {
        self.all.count
    }

    /// Whether [`Exits::table`] says more than counts.
    pub fn timed(&self) -> bool {
        self.timed
    }

    /// Ticks in root mode, of the exits that were timed.
    pub fn ticks(&self) -> u64 {
        self.all.times.total
    }

    /// The number of exits and the most frequent reasons.
    pub fn line(&self) -> Line<'_> {
        Line(self)
    }

    /// All reasons, one a line.
    pub fn table(&self) -> Table<'_> {
        Table(self)
    }

    /// The members of a JSON object with the same: `exits` and `reasons`, each of these with
    /// `reason`, `count`, `share` and, where times were recorded, `timed`, `mean`, `maximum`
    /// (in ticks) and `histogram`, the counts from bucket 0 on.
    pub fn json(&self) -> Json<'_> {
        Json(self)
    }
}

/// See [`Exits::line`].
pub struct Line<'a>(&'a Exits);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exits { reasons, all, .. } = self.0;
        write!(f, "{} exits", all.count)?;
        let mut rest = all.count;
        let mut separator = ": ";
        for Reason { number, row } in reasons.iter().take(NAMED) {
            write!(f, "{separator}{} {}", exit_reason::name(*number), row.count)?;
            #[cfg(feature = "count-vmcs")]
            write_means(f, *number)?;
            separator = ", ";
            rest -= row.count;
        }
        if rest > 0 {
            write!(f, ", others {rest}")?;
        }
        Ok(())
    }
}

/// The VMREADs and VMWRITEs of an exit.
#[cfg(feature = "count-vmcs")]
fn write_means(f: &mut fmt::Formatter<'_>, reason: usize) -> fmt::Result {
    let Some([reads, writes]) = crate::vmx::count::means(reason) else {
        return Ok(());
    };
    let tenths = |count| (count / 10, count % 10);
    let ((read, read_tenths), (write, write_tenths)) = (tenths(reads), tenths(writes));
    write!(
        f,
        " ({read}.{read_tenths} VMREADs, {write}.{write_tenths} VMWRITEs)"
    )
}

/// See [`Exits::json`].
pub struct Json<'a>(&'a Exits);

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exits {
            reasons,
            all,
            timed,
        } = self.0;
        write!(f, "\"exits\":{},\"reasons\":[", all.count)?;
        let mut separator = "";
        for Reason { number, row } in reasons {
            let (name, count) = (exit_reason::name(*number), row.count);
            let share = portion(count, all.count, 1000);
            write!(
                f,
                "{separator}{{\"reason\":\"{name}\",\"count\":{count},\"share\":{}.{:03}",
                share / 1000,
                share % 1000
            )?;
            if *timed {
                row.write_times(f)?;
            }
            write!(f, "}}")?;
            separator = ",";
        }
        write!(f, "]")
    }
}

impl Row {
    /// For [`Json`].
    fn write_times(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Times {
            maximum, histogram, ..
        } = self.times;
        let (timed, mean) = (self.times.count(), self.times.mean().unwrap_or(0));
        write!(f, ",\"timed\":{timed},\"mean\":{mean},")?;
        write!(f, "\"maximum\":{maximum},\"histogram\":[")?;
        let used = histogram.iter().rposition(|count| *count > 0);
        let used = &histogram[..used.map_or(0, |last| last + 1)];
        let mut separator = "";
        for count in used {
            write!(f, "{separator}{count}")?;
            separator = ",";
        }
        write!(f, "]")
    }
}

/// See [`Exits::table`].
pub struct Table<'a>(&'a Exits);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exits = self.0;
        let layout = Layout::new(exits);
        layout.write_heading(f)?;
        layout.write_row(f, "all", &exits.all)?;
        for Reason { number, row } in &exits.reasons {
            layout.write_row(f, exit_reason::name(*number), row)?;
        }
        Ok(())
    }
}

/// The columns of a table.
struct Layout {
    total: u64,
    reason: usize,
    count: usize,
    times: Option<TimeColumns>,
}

struct TimeColumns {
    /// Not every exit was timed.
    timed: Option<usize>,
    mean: usize,
    maximum: usize,
    histogram: Span,
}

/// The columns of the histograms: what buckets they show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    first: usize,
    last: usize,
    /// The last one stands for all behind it too.
    cut: bool,
}

/// Columns of the share, its separator included: "  100.0%".
const SHARE: usize = 8;

impl Layout {
    fn new(exits: &Exits) -> Self {
        let rows = || core::iter::once(&exits.all).chain(exits.reasons.iter().map(|r| &r.row));
        let widest = |heading: &str, width: &dyn Fn(&Row) -> usize| {
            rows().map(width).fold(heading.len(), usize::max)
        };
        let reason = exits
            .reasons
            .iter()
            .map(|reason| exit_reason::name(reason.number).len())
            .fold("reason".len(), usize::max);
        let count = widest("count", &|row| digits(row.count));
        let times = exits.timed.then(|| {
            let timed = rows()
                .any(|row| row.times.count() != row.count)
                .then(|| widest("timed", &|row| digits(row.times.count())));
            let mean = widest("mean", &|row| mean(row).len());
            let maximum = widest("maximum", &|row| maximum(row).len());
            let used = reason + 2 + count + SHARE + 2 + mean + 2 + maximum + 2;
            let used = used + timed.map_or(0, |width| width + 2);
            TimeColumns {
                timed,
                mean,
                maximum,
                histogram: Span::new(&exits.all.times, WIDTH.saturating_sub(used)),
            }
        });
        Self {
            total: exits.all.count,
            reason,
            count,
            times,
        }
    }

    fn write_heading(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, count, .. } = *self;
        write!(f, "{:reason$}  {:>count$}   share", "reason", "count")?;
        if let Some(columns) = &self.times {
            let TimeColumns { mean, maximum, .. } = *columns;
            if let Some(timed) = columns.timed {
                write!(f, "  {:>timed$}", "timed")?;
            }
            write!(f, "  {:>mean$}  {:>maximum$}", "mean", "maximum")?;
            let Span { first, last, cut } = columns.histogram;
            write!(f, "  2^{first}..2^{last}{}", if cut { "+" } else { "" })?;
        }
        writeln!(f)
    }

    fn write_row(&self, f: &mut fmt::Formatter<'_>, name: &str, row: &Row) -> fmt::Result {
        let Self { reason, count, .. } = *self;
        let share = portion(row.count, self.total, 1000);
        let share = (share / 10, share % 10);
        write!(f, "{name:reason$}  {:count$}", row.count)?;
        write!(f, "  {:3}.{}%", share.0, share.1)?;
        if let Some(columns) = &self.times {
            let TimeColumns { mean, maximum, .. } = *columns;
            if let Some(timed) = columns.timed {
                write!(f, "  {:timed$}", row.times.count())?;
            }
            write!(f, "  {:>mean$}", &*self::mean(row))?;
            write!(f, "  {:>maximum$}", &*self::maximum(row))?;
            columns.histogram.write(f, &row.times)?;
        }
        writeln!(f)
    }
}

impl Span {
    /// From the first bucket that has an exit to the last one, and as many as there is room for.
    fn new(times: &Times, room: usize) -> Self {
        let used = |bucket: &usize| times.histogram[*bucket] > 0;
        let first = (0..BUCKETS).find(used).unwrap_or(0);
        let wanted = (0..BUCKETS).rfind(used).unwrap_or(0);
        let last = wanted.min(first + room.max(LEAST_BUCKETS) - 1);
        Self {
            first,
            last,
            cut: last < wanted,
        }
    }

    /// With a separator where it is not empty.
    fn write(self, f: &mut fmt::Formatter<'_>, times: &Times) -> fmt::Result {
        let total = times.count();
        let Self { first, last, .. } = self;
        let cell = |bucket| match bucket {
            _ if bucket < last => times.histogram[bucket],
            _ => times.histogram[last..]
                .iter()
                .copied()
                .fold(0, u64::saturating_add),
        };
        // Nothing behind the last exit.
        let Some(end) = (first..=last).rfind(|bucket| cell(*bucket) > 0) else {
            return Ok(());
        };
        write!(f, "  ")?;
        (first..=end).try_for_each(|bucket| {
            let character = match (cell(bucket), portion(cell(bucket), total, 10)) {
                (0, _) => ' ',
                (_, 0) => '.',
                (_, tenths @ 1..=9) => char::from(b'0' + tenths as u8),
                _ => '#',
            };
            write!(f, "{character}")
        })
    }
}

/// A time in the table.
type Cell = ArrayString<8>;

/// The mean of a row's times.
fn mean(row: &Row) -> Cell {
    cell(row.times.mean())
}

/// The longest of a row's times.
fn maximum(row: &Row) -> Cell {
    cell(row.times.mean().and(Some(row.times.maximum)))
}

/// Ticks in six characters at most, rounded down; `-` where there are none.
fn cell(ticks: Option<u64>) -> Cell {
    let mut cell = Cell::new();
    // It has room for more than six.
    let _ = match ticks {
        None => write!(cell, "-"),
        Some(ticks @ ..1_000_000) => write!(cell, "{ticks}"),
        Some(ticks) => {
            let mut units = ["k", "M", "G", "T", "P"].iter();
            let (mut number, mut unit) = (ticks / 1000, units.next());
            while number >= 100_000 {
                (number, unit) = (number / 1000, units.next());
            }
            write!(cell, "{number}{}", unit.unwrap_or(&""))
        }
    };
    cell
}

/// How many parts of `total` a `count` is where `total` is so many `parts`; rounded.
fn portion(count: u64, total: u64, parts: u64) -> u64 {
    let total = u128::from(total.max(1));
    let portion = (u128::from(count) * u128::from(parts) + total / 2) / total;
    u64::try_from(portion).unwrap_or(u64::MAX)
}

/// Decimal digits of a number.
fn digits(number: u64) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

#[cfg(test)]
mod tests;
