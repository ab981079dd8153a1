//! What the small guest `bench` says about the cost of exits, in each tier of
//! the local APIC.

use crate::machine::rig::COUNT;
use crate::verdict::{PREFIX, Verdict};
use anyhow::{Result, anyhow, bail};
use vireo_handoff::config::ApicMode;

/// The tiers, by the name of the guest that measures each.
pub const TIERS: [ApicMode; 3] = [ApicMode::Emulated, ApicMode::FlexPriority, ApicMode::ApicV];

/// The configuration that measures these tiers in one boot, one after the other: `kernel` is
/// the guest, with so many vCPUs.
pub fn configuration(kernel: &str, cmdline: &str, vcpus: u32, tiers: &[ApicMode]) -> String {
    let mut sections = String::new();
    let mut before = None;
    for tier in tiers {
        sections.push_str(&format!(
            "[[vm]]\nname = \"{tier}\"\nmemory = \"128M\"\nkernel = \"{kernel}\"\ncmdline = \"{cmdline}\"\napic = \"{tier}\"\nvcpus = {vcpus}\nslice_us = 100\n"
        ));
        if let Some(before) = before.replace(tier) {
            sections.push_str(&format!("after = \"{before}\"\n"));
        }
    }
    sections
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

/// Reads the console: which of `tiers` have run, and what they have measured. `end` is
/// why the machine has not ended well, if it has not.
///
/// # Errors
/// Names the tier whose guest has neither run to its end nor was refused.
pub fn parse(console: &str, tiers: &[ApicMode], end: Option<&str>) -> Result<Vec<Tier>> {
    let mut measured = Vec::new();
    for &mode in tiers {
        measured.push(Tier::parse(console, mode).map_err(|why| {
            let why = why.as_deref().or(end);
            let why = why.unwrap_or("its guest has not run to its end");
            anyhow!("the tier {mode} was not measured: {why}")
        })?);
    }
    match end {
        // A guest that is refused is no good end, but is known already.
        Some(end) if measured.iter().all(|tier| tier.refused.is_none()) => {
            bail!("the tiers were measured, but then: {end}")
        }
        _ => Ok(measured),
    }
}

/// The guest that a line of the hypervisor's is about: `vm NAME: ...`.
fn subject(line: &str) -> Option<(&str, &str)> {
    let text = line.strip_prefix(PREFIX)?;
    let text = text.strip_prefix("error: ").unwrap_or(text);
    text.strip_prefix("vm ")?.split_once(": ")
}

impl Tier {
    /// What the guest named `mode` has said: no line of another guest's is taken for it.
    ///
    /// The error is why the guest has died, where the hypervisor says that.
    fn parse(console: &str, mode: ApicMode) -> Result<Self, Option<String>> {
        // Behind the beginning of a line, at which a guest may have died.
        let lines = console.lines().map(|line| {
            let line = line.trim_end();
            line.find(PREFIX).map_or(line, |at| &line[at..])
        });
        let mut tier = Self {
            mode,
            refused: None,
            rows: Vec::new(),
        };
        let (mut started, mut complete) = (false, false);
        for line in lines {
            match subject(line) {
                Some((vm, what)) if vm == mode.name() => {
                    if what.starts_with("started") {
                        started = true;
                    } else if !started && line.contains("error: ") {
                        tier.refused = Some(what.to_owned());
                        return Ok(tier);
                    }
                }
                Some(_) if started => break,
                _ if !started => continue,
                _ => {}
            }
            if let Some(why) = Verdict::parse(line).and_then(|verdict| verdict.failure()) {
                return Err(Some(why));
            }
            if complete {
                continue;
            }
            complete = line.starts_with("checks: ") && line.ends_with(" 0 failed");
            if let Some((row, count)) = tier.rows.last_mut().zip(line.strip_prefix(COUNT)) {
                row.outer = row.outer.or(count.parse().ok());
            }
            tier.rows.extend(Row::parse(line));
        }
        if complete && !tier.rows.is_empty() {
            Ok(tier)
        } else {
            Err(None)
        }
    }
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

/// For a CPU that has all tiers.
///
/// # Errors
/// When one of them was refused.
pub fn require_all(tiers: &[Tier]) -> Result<()> {
    tiers.iter().try_for_each(|tier| match &tier.refused {
        Some(reason) => bail!("the tier {} was not measured: {reason}", tier.mode),
        None => Ok(()),
    })
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

/// Puts rows behind those that the same tiers have measured in another boot.
pub fn add_rows(tiers: &mut [Tier], others: Vec<Tier>) {
    for (tier, other) in tiers.iter_mut().zip(others) {
        tier.rows.extend(other.rows);
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
        let tiers = parse(CONSOLE, &TIERS, None).unwrap();
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
        assert!(require_all(&tiers[..2]).is_ok());
        assert_eq!(
            require_all(&tiers).unwrap_err().to_string(),
            format!("the tier apicv was not measured: {reason}")
        );
    }

    /// The sentence that says why this console has no measurement of all tiers.
    fn failure(console: &str, end: Option<&str>) -> String {
        parse(console, &TIERS, end).unwrap_err().to_string()
    }

    #[test]
    fn a_guest_that_dies_is_named_and_no_other_tier_takes_its_place() {
        let stopped = "vireo: vm emulated: stopped: triple fault, rip 0x10\r\n\
            vireo: vm emulated: 3 exits: HLT 3";
        for last_words in [stopped.to_owned(), format!("bench: x: 10 i{stopped}")] {
            let dead = CONSOLE.replacen("checks: 0 passed, 0 failed", &last_words, 1);
            assert_eq!(
                failure(&dead, None),
                "the tier emulated was not measured: \
                 the guest emulated was stopped: triple fault, rip 0x10"
            );
        }
        let off = CONSOLE.replacen("checks: 0 passed, 0 failed\r\n", "", 1);
        assert_eq!(
            failure(&off, None),
            "the tier emulated was not measured: its guest has not run to its end"
        );
    }

    #[test]
    fn a_guest_that_hangs_is_named_with_how_the_machine_ended() {
        let (start, _) = CONSOLE.rsplit_once("checks: ").unwrap();
        let end = "the machine has not ended within 900 s";
        assert_eq!(
            failure(start, Some(end)),
            format!("the tier flexpriority was not measured: {end}")
        );
        let early = &CONSOLE[..CONSOLE.find("bench: VMCALL").unwrap()];
        let emulated = format!("the tier emulated was not measured: {end}");
        assert_eq!(failure(early, Some(end)), emulated);
        assert_eq!(failure("vireo: loader\r\n", Some(end)), emulated);
    }

    #[test]
    fn a_hypervisor_that_dies_behind_its_guests_has_not_measured_either() {
        let panic = format!("{CONSOLE}vireo: panic: no\r\n");
        let why = failure(&panic, Some("x"));
        assert!(why.starts_with("the tier flexpriority was not measured: "));
        assert!(why.ends_with("the hypervisor has panicked: no"), "{why}");
        let (_, measured) = CONSOLE.split_once("\r\n").unwrap();
        let all = measured.to_owned() + &measured.replace("emulated", "apicv");
        assert_eq!(parse(&all, &TIERS, None).unwrap().len(), 3);
        let why = failure(&all, Some("no power-off"));
        assert_eq!(why, "the tiers were measured, but then: no power-off");
    }

    #[test]
    fn a_guest_that_neither_started_nor_was_refused_is_named() {
        let silent = CONSOLE.replacen("vireo: error: vm apicv", "vireo: x", 1);
        let why = failure(&silent, None);
        assert!(
            why.starts_with("the tier apicv was not measured: "),
            "{why}"
        );
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
        let tiers = parse(console, &[ApicMode::Auto], None).unwrap();
        let outer = outer(&tiers[0]);
        assert_eq!(outer.len(), 2);
        assert_eq!((outer[1].0.name.as_str(), outer[1].1), ("CPUID", 3.0));
        assert_eq!(outer[0].1, 0.0);
    }

    #[test]
    fn counts_come_from_another_run() {
        let mut tiers = parse(CONSOLE, &TIERS, None).unwrap();
        let mut counted = tiers.clone();
        counted[0].rows[0].counts = counted[0].rows[1].counts;
        add_counts(&mut tiers, &counted);
        assert_eq!(tiers[0].rows[0].counts.unwrap().reads, 4.0);
        assert_eq!(tiers[0].rows[0].instructions, 75.0);
    }

    #[test]
    fn the_configuration_names_each_tier() {
        let config =
            vireo_handoff::Config::parse("x", &configuration("bench", "pause", 1, &TIERS)).unwrap();
        let modes: Vec<ApicMode> = config.vm.iter().map(|vm| vm.apic).collect();
        assert_eq!(modes, TIERS);
    }
}
