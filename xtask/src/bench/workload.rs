//! What a Linux guest says about its workload, and the hypervisor about the
//! guest's exits.

use super::boot::{IPS, Seen};
use crate::exit_times::ExitTimes;
use anyhow::{Context, Result};

/// The row of the boot, which the workload itself does not see.
const BOOT: &str = "kernel start to /init";
/// The row of the idle seconds, and that of the time-stamp counter at the end.
const IDLE: &str = "idle";
const END: &str = "end";
/// The row of what the hypervisor takes, in hundredths.
pub const SHARE: &str = "instructions of Vireo, %";

/// What is hidden from the guest because the bare emulator's Linux does not use
/// it either (see [`crate::machine::bare`]): the two are to execute the same. Nor are
/// addresses random, on which it depends how many page tables a process takes.
pub const OPTIONS: &str = "clearcpuid=erms,fsrm,pku,xsaves,xsavec norandmaps";

/// The rows and the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Name, and ticks for each operation, or what the name says.
    pub rows: Vec<(String, f64)>,
    /// Seconds in which the guest's CPU was idle.
    pub idle: f64,
    /// The guest's time-stamp counter.
    pub end: f64,
}

impl Workload {
    /// From the lines of [`text`].
    pub fn parse(text: &str) -> Option<Self> {
        let mut rows: Vec<(String, f64)> = text
            .lines()
            .filter_map(|line| {
                let (name, number) = line.strip_prefix("workload: ")?.rsplit_once(": ")?;
                Some((name.to_owned(), number.trim().parse().ok()?))
            })
            .collect();
        let mut last = |expected| {
            let (name, number) = rows.pop()?;
            (name == expected).then_some(number)
        };
        let (end, idle) = (last(END)?, last(IDLE)?);
        Some(Self { rows, idle, end })
    }

    /// The row `name`.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|row| row.0 == name).map(|row| row.1)
    }
}

/// The lines of a run: the boot's, and the workload's own.
///
/// # Errors
/// When the run has not come to its end.
pub fn text(seen: Seen) -> Result<String> {
    seen.end.context("the workload has not run to its end")?;
    let init = seen
        .init
        .context("the guest has not said when its first process started")?;
    Ok(format!("workload: {BOOT}: {init}\n{}", seen.output))
}

/// The exits of a reason in a run of the workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    pub reason: String,
    /// In a second of the guest's time.
    pub per_second: f64,
    /// Of one exit: the mean.
    pub instructions: f64,
    /// Of all exits, in hundredths of all instructions, the guest's and the hypervisor's.
    pub share: f64,
}

/// All exits of a run whose exits were timed, and those of each reason. What an idle CPU
/// waits is time, but no instructions.
pub fn rates(times: &ExitTimes, run: &Workload) -> Vec<Rate> {
    let seconds = run.end / IPS as f64;
    let instructions = run.end - run.idle * IPS as f64;
    let rate = |reason: &str, count: u64, ticks: f64| Rate {
        reason: reason.to_owned(),
        per_second: count as f64 / seconds,
        instructions: ticks / count as f64,
        share: ticks / instructions * 100.0,
    };
    let reasons = times.reasons.iter().map(|row| {
        let ticks = row.count as f64 * row.mean as f64;
        rate(&row.reason, row.count, ticks)
    });
    let all = &times.all;
    std::iter::once(rate(&all.reason, all.count, times.ticks as f64))
        .chain(reasons)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::End;

    #[test]
    fn a_workload_is_its_rows_and_its_end() {
        let seen = Seen {
            output: "workload: a b, ns: 2.5\nnoise: 1\nworkload: idle: 0.5\nworkload: end: 800\n"
                .into(),
            console: String::new(),
            init: Some(400),
            end: Ok(End::Status(0)),
        };
        let workload = Workload::parse(&text(seen).unwrap()).unwrap();
        assert_eq!(workload.get("kernel start to /init"), Some(400.0));
        assert_eq!(workload.get("a b, ns"), Some(2.5));
        assert_eq!((workload.rows.len(), workload.end), (2, 800.0));
        assert_eq!(workload.idle, 0.5);
        assert_eq!(Workload::parse("workload: a: 1\n"), None);
        assert_eq!(Workload::parse("workload: a: 1\nworkload: end: 2\n"), None);
    }

    #[test]
    fn exits_are_counted_for_each_second_and_as_a_share_of_what_is_executed() {
        let console = "vireo: vm linux: 2000000 ticks in root mode, of 400000000 a second\r\n\
            vireo: reason  count   share   mean  maximum  2^6..2^14\r\n\
            vireo: all        30  100.0%  66666  1000000  7     3 .\r\n\
            vireo: I/O        20   66.7%  75000  1000000  #\r\n\
            vireo: HLT        10   33.3%  50000    50000        #\r\n";
        let run = Workload {
            rows: Vec::new(),
            idle: 0.25,
            end: IPS as f64 / 2.0,
        };
        let rates = rates(&ExitTimes::parse(console, "linux").unwrap(), &run);
        let rate = |reason: &str, per_second, instructions, share| Rate {
            reason: reason.into(),
            per_second,
            instructions,
            share,
        };
        assert_eq!(rates[0].share, 2.0);
        assert_eq!(rates[0].per_second, 60.0);
        assert_eq!(
            rates[1..],
            [
                rate("I/O", 40.0, 75000.0, 1.5),
                rate("HLT", 20.0, 50000.0, 0.5),
            ]
        );
    }
}
