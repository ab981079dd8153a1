//! What a Linux guest says about its workload, and the hypervisor about the
//! guest's exits.

use super::boot::{IPS, Seen};
use anyhow::{Context, Result};

/// The row of the boot, which the workload itself does not see.
const BOOT: &str = "kernel start to /init";
/// The row of the time-stamp counter at the end.
const END: &str = "end";

/// What is hidden from the guest because the bare emulator's Linux does not use
/// it either (see [`crate::machine::bare`]): the two are to execute the same.
pub const OPTIONS: &str = "clearcpuid=erms,fsrm,pku,xsaves,xsavec";

/// The rows and the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Name, and ticks for each operation, or what the name says.
    pub rows: Vec<(String, f64)>,
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
        let (name, end) = rows.pop()?;
        (name == END).then_some(Self { rows, end })
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

/// How often a guest has exited, by reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exits {
    pub total: u64,
    /// In the hypervisor's order.
    pub reasons: Vec<(String, u64)>,
}

impl Exits {
    /// From the hypervisor's line about the guest `vm`:
    /// `vireo: vm VM: TOTAL exits: REASON COUNT, REASON COUNT`.
    pub fn parse(console: &str, vm: &str) -> Option<Self> {
        let start = format!("vireo: vm {vm}: ");
        console.lines().find_map(|line| {
            let text = line.trim_end().strip_prefix(&start)?;
            let (total, list) = text.split_once(" exits: ")?;
            let reasons = list.split(", ").filter_map(|item| {
                let (reason, count) = item.rsplit_once(' ')?;
                Some((reason.to_owned(), count.parse().ok()?))
            });
            Some(Self {
                total: total.parse().ok()?,
                reasons: reasons.collect(),
            })
        })
    }

    /// All of them and each reason, a second in which the counter advances by [`IPS`].
    pub fn per_second(&self, ticks: f64) -> Vec<(String, f64)> {
        let seconds = ticks / IPS as f64;
        [("all".to_owned(), self.total)]
            .into_iter()
            .chain(self.reasons.clone())
            .map(|(reason, count)| (reason, count as f64 / seconds))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::End;

    #[test]
    fn a_workload_is_its_rows_and_its_end() {
        let seen = Seen {
            output: "workload: a b, ns: 2.5\nnoise: 1\nworkload: end: 800\n".into(),
            console: String::new(),
            init: Some(400),
            end: Ok(End::Status(0)),
        };
        let workload = Workload::parse(&text(seen).unwrap()).unwrap();
        assert_eq!(workload.get("kernel start to /init"), Some(400.0));
        assert_eq!(workload.get("a b, ns"), Some(2.5));
        assert_eq!((workload.rows.len(), workload.end), (2, 800.0));
        assert_eq!(Workload::parse("workload: a: 1\n"), None);
    }

    #[test]
    fn exits_are_counted_for_each_second() {
        let console = "vireo: vm linux: started, 1 MiB\r\n\
            vireo: vm linux: 30 exits: I/O 20, entry failure: machine check 4, others 6\r\n";
        let exits = Exits::parse(console, "linux").unwrap();
        assert_eq!(exits.reasons[1], ("entry failure: machine check".into(), 4));
        assert_eq!(Exits::parse(console, "other"), None);
        let rates = exits.per_second(IPS as f64 / 2.0);
        assert_eq!(rates[0], ("all".into(), 60.0));
        assert_eq!(rates[1], ("I/O".into(), 40.0));
    }
}
