//! What the small guest `bench` says about the cost of exits, in each tier of
//! the local APIC.

use crate::machine::rig::COUNT;
use anyhow::{Result, bail};
use vireo_handoff::config::ApicMode;

/// The tiers, by the name of the guest that measures each.
pub const TIERS: [ApicMode; 3] = [ApicMode::Emulated, ApicMode::FlexPriority, ApicMode::ApicV];

/// The configuration that measures these tiers in one boot: `kernel` is the guest.
pub fn configuration(kernel: &str, cmdline: &str, tiers: &[ApicMode]) -> String {
    tiers
        .iter()
        .map(|tier| {
            format!(
                "[[vm]]\nname = \"{tier}\"\nmemory = \"128M\"\nkernel = \"{kernel}\"\ncmdline = \"{cmdline}\"\napic = \"{tier}\"\n"
            )
        })
        .collect()
}

/// What one tier has measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Tier {
    pub mode: ApicMode,
    /// Why the guest did not run, where it did not.
    pub refused: Option<String>,
    pub rows: Vec<Row>,
}

/// One exit, or whatever else the guest measures.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub name: String,
    /// Per round.
    pub instructions: f64,
    pub counts: Option<Counts>,
    /// Exits of the KVM in which Vireo is nested, as counted at the end of the
    /// row's line.
    pub outer: Option<f64>,
    /// How often it was done.
    pub rounds: f64,
    /// Characters of its line.
    pub length: f64,
}

/// Per round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counts {
    pub exits: f64,
    pub reads: f64,
    pub writes: f64,
}

/// Reads the console: which of `tiers` have run, and what they have measured.
///
/// # Errors
/// When a guest has neither run to its end nor was refused.
pub fn parse(console: &str, tiers: &[ApicMode]) -> Result<Vec<Tier>> {
    let mut measured = Vec::new();
    for &mode in tiers {
        let started = format!("vireo: vm {mode}: started");
        let refused = format!("vm {mode}: ");
        let lines = || console.lines().map(str::trim_end);
        let mut rows: Vec<Row> = Vec::new();
        let refused = match lines().position(|line| line.starts_with(&started)) {
            Some(first) => {
                let mut ended = false;
                for line in lines().skip(first) {
                    ended = line.starts_with("checks: 0 passed, 0 failed");
                    if ended {
                        break;
                    }
                    if let Some((row, count)) = rows.last_mut().zip(line.strip_prefix(COUNT)) {
                        row.outer = row.outer.or(count.parse().ok());
                    }
                    rows.extend(Row::parse(line));
                }
                if !ended {
                    bail!("the guest of the tier {mode} has not run to its end");
                }
                None
            }
            None => lines().find_map(|line| {
                let text = line.strip_prefix("vireo: error: ")?;
                Some(text.strip_prefix(&refused)?.to_owned())
            }),
        };
        if rows.is_empty() && refused.is_none() {
            bail!("the guest of the tier {mode} has not started");
        }
        measured.push(Tier {
            mode,
            refused,
            rows,
        });
    }
    Ok(measured)
}

impl Row {
    /// One of these figures alone.
    #[cfg(test)]
    pub fn new(name: &str, instructions: f64) -> Self {
        Self {
            name: name.into(),
            instructions,
            counts: None,
            outer: None,
            rounds: 1.0,
            length: 0.0,
        }
    }

    /// From a line of the guest's.
    fn parse(line: &str) -> Option<Self> {
        let (name, figures) = line.strip_prefix("bench: ")?.rsplit_once(": ")?;
        let mut parts = figures.split(", ");
        let (ticks, rounds) = parts.next()?.split_once(" in ")?;
        let (ticks, rounds): (f64, f64) = (ticks.parse().ok()?, rounds.parse().ok()?);
        let mut count = |unit| -> Option<f64> {
            let number: f64 = parts.next()?.strip_suffix(unit)?.parse().ok()?;
            Some(number / rounds)
        };
        let counts = count(" exits").and_then(|exits| {
            Some(Counts {
                exits,
                reads: count(" VMREADs")?,
                writes: count(" VMWRITEs")?,
            })
        });
        Some(Self {
            name: name.to_owned(),
            instructions: ticks / rounds,
            counts,
            outer: None,
            rounds,
            length: line.len() as f64,
        })
    }
}

/// Each row's exits of the outer KVM, per round: what was counted since the row before,
/// without what a row of nothing takes, and each character of its line.
pub fn outer(tier: &Tier) -> Vec<(&Row, f64)> {
    let rows: Vec<(&Row, f64)> = tier
        .rows
        .windows(2)
        .filter_map(|pair| Some((&pair[1], pair[1].outer? - pair[0].outer?)))
        .collect();
    // Behind the first row, whose beginning was not counted, comes nothing in a longer line,
    // and then nothing again in the guest's own words.
    let [(longer, more), (nothing, less), ..] = rows[..] else {
        return Vec::new();
    };
    let character = (more - less) / (longer.length - nothing.length);
    rows[1..]
        .iter()
        .map(|(row, counted)| {
            let line = less + (row.length - nothing.length) * character;
            (*row, (counted - line) / row.rounds)
        })
        .collect()
}

/// Puts the counts of one run beside the instructions of another.
pub fn add_counts(tiers: &mut [Tier], counted: &[Tier]) {
    for (tier, counted) in tiers.iter_mut().zip(counted) {
        for row in &mut tier.rows {
            row.counts = counted
                .rows
                .iter()
                .find(|other| other.name == row.name)
                .and_then(|other| other.counts);
        }
    }
}

/// The tier that a guest gets without a wish: the last one that ran.
pub fn best(tiers: &[Tier]) -> Option<&Tier> {
    tiers.iter().rev().find(|tier| tier.refused.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "vireo: error: vm apicv: the CPU has no virtual-interrupt delivery\r\n\
        vireo: vm emulated: started, 128 MiB\r\n\
        bench: VMCALL, null call: 1500 in 20\r\n\
        bench: x: y: 10 in 4, 8 exits, 16 VMREADs, 0 VMWRITEs\r\n\
        checks: 0 passed, 0 failed\r\n\
        vireo: vm emulated: 7 exits: VMCALL 7\r\n\
        vireo: vm emulated: powered off\r\n\
        vireo: vm flexpriority: started, 128 MiB\r\n\
        bench: VMCALL, null call: 40 in 20\r\n\
        checks: 0 passed, 0 failed\r\n";

    #[test]
    fn a_console_has_a_list_for_each_tier() {
        let tiers = parse(CONSOLE, &TIERS).unwrap();
        let names: Vec<&str> = tiers[0].rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["VMCALL, null call", "x: y"]);
        assert_eq!(tiers[0].rows[0].instructions, 75.0);
        assert_eq!(tiers[0].rows[0].counts, None);
        let counts = Counts {
            exits: 2.0,
            reads: 4.0,
            writes: 0.0,
        };
        assert_eq!(tiers[0].rows[1].counts, Some(counts));
        assert_eq!(tiers[1].rows.len(), 1);
        let reason = "the CPU has no virtual-interrupt delivery";
        assert_eq!(tiers[2].refused.as_deref(), Some(reason));
        assert_eq!(best(&tiers).unwrap().mode, ApicMode::FlexPriority);
    }

    #[test]
    fn a_guest_that_dies_is_no_measurement() {
        let dead = CONSOLE.replacen("checks: 0 passed, 0 failed", "vireo: panic: no", 2);
        assert!(parse(&dead, &TIERS).is_err());
        let silent = CONSOLE.replacen("vireo: error: vm apicv", "vireo: x", 1);
        let error = parse(&silent, &TIERS).unwrap_err().to_string();
        assert!(error.contains("apicv has not started"), "{error}");
    }

    #[test]
    fn exits_of_the_outer_kvm_are_those_that_nothing_does_not_take() {
        // Each character takes 2, each line 100 besides.
        let console = "vireo: vm auto: started, 128 MiB\r\n\
            bench: nothing: 40 in 10\r\nkvm: exits: 1000\r\n\
            bench: nothing long: 40 in 10\r\nkvm: exits: 1158\r\n\
            bench: nothing: 40 in 10\r\nkvm: exits: 1306\r\n\
            bench: CPUID: 40 in 10\r\nkvm: exits: 1480\r\n\
            checks: 0 passed, 0 failed\r\n";
        let tiers = parse(console, &[ApicMode::Auto]).unwrap();
        let outer = outer(&tiers[0]);
        assert_eq!(outer.len(), 2);
        assert_eq!((outer[1].0.name.as_str(), outer[1].1), ("CPUID", 3.0));
        assert_eq!(outer[0].1, 0.0);
    }

    #[test]
    fn counts_come_from_another_run() {
        let mut tiers = parse(CONSOLE, &TIERS).unwrap();
        let mut counted = tiers.clone();
        counted[0].rows[0].counts = counted[0].rows[1].counts;
        add_counts(&mut tiers, &counted);
        assert_eq!(tiers[0].rows[0].counts.unwrap().reads, 4.0);
        assert_eq!(tiers[0].rows[0].instructions, 75.0);
    }

    #[test]
    fn the_configuration_names_each_tier() {
        let config =
            vireo_handoff::Config::parse("x", &configuration("bench", "pause", &TIERS)).unwrap();
        let modes: Vec<ApicMode> = config.vm.iter().map(|vm| vm.apic).collect();
        assert_eq!(modes, TIERS);
    }
}
