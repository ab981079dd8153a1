//! What the small guest `bench` says about the cost of exits, in each tier of
//! the local APIC.

use anyhow::{Result, bail};
use vireo_handoff::config::ApicMode;

/// The tiers, by the name of the guest that measures each.
pub const TIERS: [ApicMode; 3] = [ApicMode::Emulated, ApicMode::FlexPriority, ApicMode::ApicV];

/// The configuration that measures all tiers in one boot: `kernel` is the guest.
pub fn configuration(kernel: &str) -> String {
    TIERS
        .map(|tier| {
            format!(
                "[[vm]]\nname = \"{tier}\"\nmemory = \"128M\"\nkernel = \"{kernel}\"\napic = \"{tier}\"\n"
            )
        })
        .concat()
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
}

/// Per round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counts {
    pub exits: f64,
    pub reads: f64,
    pub writes: f64,
}

/// Reads the console: which tiers have run, and what they have measured.
///
/// # Errors
/// When a guest has neither run to its end nor was refused.
pub fn parse(console: &str) -> Result<Vec<Tier>> {
    let mut tiers = Vec::new();
    for mode in TIERS {
        let started = format!("vireo: vm {mode}: started");
        let refused = format!("vm {mode}: ");
        let lines = || console.lines().map(str::trim_end);
        let mut rows = Vec::new();
        let refused = match lines().position(|line| line.starts_with(&started)) {
            Some(first) => {
                let mut ended = false;
                for line in lines().skip(first) {
                    ended = line.starts_with("checks: 0 passed, 0 failed");
                    if ended {
                        break;
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
        tiers.push(Tier {
            mode,
            refused,
            rows,
        });
    }
    Ok(tiers)
}

impl Row {
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
        })
    }
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
        let tiers = parse(CONSOLE).unwrap();
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
        assert!(parse(&dead).is_err());
        let silent = CONSOLE.replacen("vireo: error: vm apicv", "vireo: x", 1);
        let error = parse(&silent).unwrap_err().to_string();
        assert!(error.contains("apicv has not started"), "{error}");
    }

    #[test]
    fn counts_come_from_another_run() {
        let mut tiers = parse(CONSOLE).unwrap();
        let mut counted = tiers.clone();
        counted[0].rows[0].counts = counted[0].rows[1].counts;
        add_counts(&mut tiers, &counted);
        assert_eq!(tiers[0].rows[0].counts.unwrap().reads, 4.0);
        assert_eq!(tiers[0].rows[0].instructions, 75.0);
    }

    #[test]
    fn the_configuration_names_each_tier() {
        let config = vireo_handoff::Config::parse("x", &configuration("bench")).unwrap();
        let modes: Vec<ApicMode> = config.vm.iter().map(|vm| vm.apic).collect();
        assert_eq!(modes, TIERS);
    }
}
