//! `cargo xtask bench`: what VM exits cost, and a Linux guest beside the same
//! without Vireo, in instructions on the emulator.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`boot`] | the machines |
//! | [`exits`] | the small guest `bench`, once in each tier of the local APIC |
//! | [`workload`] | the program `tests/workload` in Linux, and the exits that it causes |
//! | [`budget`] | `tests/budgets.toml`, and how a measurement stands to it |
//! | [`table`] | what is printed |

mod boot;
mod budget;
mod exits;
mod table;
mod workload;

use crate::build;
use crate::exit_times::ExitTimes;
use crate::figures::Baseline;
use crate::guest;
use crate::machine::{Bare, Bochs, Rig};
use crate::paths;
use crate::progress::Progress;
use crate::provision::Provisioner;
use crate::run::{RunFolder, System, nonce};
use crate::volume::{Job, Single, Volume};
use anyhow::{Context, Error, Result, ensure};
use boot::{Boot, IPS, Seen};
use budget::{Budgets, Unit};
use clap::Args;
use exits::Tier;
use serde_json::{Value, json};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use vireo_handoff::config::{ApicMode, Statistics};
use workload::{Rate, SHARE, Workload};

/// `cargo xtask bench`
#[derive(Args, Debug)]
pub struct Options {
    /// Only the table of exits, without the Linux workload
    #[arg(long)]
    exits: bool,
    /// Only what exits cost where Vireo is nested in KVM, with KVM's exits for each; takes minutes
    #[arg(long, conflicts_with_all = ["exits", "cpu"])]
    nested: bool,
    /// Show and judge only rows whose name contains TEXT
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Write the same to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The emulator's CPU model, by the emulator's name for it
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Set the ceilings in tests/budgets.toml a little above what is measured, say why there, and
    /// put the tables into the README
    #[arg(long, value_name = "REASON", conflicts_with = "cpu")]
    accept: Option<String>,
}

/// What was measured.
struct Measured {
    tiers: Vec<Tier>,
    linux: Option<Linux>,
}

/// The workload.
struct Linux {
    vireo: Workload,
    bare: Workload,
    /// Its exits by reason.
    rates: Vec<Rate>,
}

/// Runs the command, and returns the exit code.
///
/// # Errors
/// When something cannot be measured, or takes more than its ceiling.
pub fn run(options: &Options) -> Result<u8> {
    let mut budgets = Budgets::load()?;
    if options.nested {
        return nested(options, budgets).map(|()| 0);
    }
    let measured = measure(options)?;
    let filter = options.filter.as_str();
    if let Some(reason) = &options.accept {
        budgets.accept_exits(&measured.tiers, filter, reason);
        if let Some(linux) = &measured.linux {
            budgets.accept_workload(&linux.vireo, &linux.bare, filter, reason);
        }
        budgets.save()?;
        measured.save_to_readme(&budgets)?;
    }
    print!("{}", measured.exit_text(&budgets, filter));
    if let Some(text) = measured.workload_text(&budgets, filter) {
        print!("\n{text}");
    }
    write_json(options, &measured.json(&budgets, options))?;
    fail(&measured.failures(&budgets, filter))?;
    Ok(0)
}

/// What is said with `--json`.
fn write_json(options: &Options, value: &Value) -> Result<()> {
    let Some(file) = &options.json else {
        return Ok(());
    };
    let text = serde_json::to_string_pretty(value)?;
    fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}

/// `--nested`: the guest `bench` in Vireo in KVM.
fn nested(options: &Options, mut budgets: Budgets) -> Result<()> {
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let rig = Rig {
        counts: true,
        ..provisioner.rig()?
    };
    progress.clear();
    let folder = RunFolder::create(None)?;
    let tiers = [ApicMode::Auto];
    let guest = exit_guest(&folder.path, "pause", 1, &tiers)?;
    let boot = Boot {
        name: "nested",
        system: &System::Vireo(build::all()?),
        platform: &rig,
        volume: Volume::from_config(&guest, None, &provisioner)?,
        job: None,
        cpu: None,
        cpus: 1,
    };
    let seen = boot::run_all(vec![boot], &folder.path, &progress)?.pop();
    progress.clear();
    let tiers = self::tiers(&seen.context("the machine was not measured")?, &tiers)?;
    let all = exits::outer(&tiers[0]);
    let mut rows = all.clone();
    rows.retain(|(row, _)| row.name.contains(&options.filter));
    if let Some(reason) = &options.accept {
        budgets.accept_outer(&rows, reason);
        budgets.save()?;
        edit_readme(|readme| with_block(readme, README_NESTED, &table::nested(&all, &budgets)))?;
    }
    print!("{}", table::nested(&rows, &budgets));
    let values: Vec<Value> = rows
        .iter()
        .map(|(row, outer)| {
            json!({
                "name": row.name,
                "outer_exits": outer,
                "ceiling": budgets.exit(&row.name).outer,
                "instructions": row.instructions,
            })
        })
        .collect();
    write_json(options, &json!({ "nested": values }))?;
    let failures: Vec<String> = rows
        .iter()
        .filter_map(|(row, outer)| {
            let why = budgets.exit(&row.name).judge_outer(*outer).failure()?;
            Some(format!(
                "{} takes {outer:.1} of KVM's exits, {why}",
                row.name
            ))
        })
        .collect();
    fail(&failures)
}

/// One sentence for all that takes too much, where there is any.
fn fail(failures: &[String]) -> Result<()> {
    ensure!(
        failures.is_empty(),
        "{} (cargo xtask bench --accept REASON changes {})",
        failures.join("; "),
        budget::FILE
    );
    Ok(())
}

/// The README's blocks that are these tables, by their markers.
const README_EXITS: &str = "exits";
const README_WORKLOAD: &str = "workload";
const README_NESTED: &str = "nested";

impl Measured {
    /// The table of exits, for people.
    fn exit_text(&self, budgets: &Budgets, filter: &str) -> String {
        let mut text = format!(
            "Instructions for each round trip, the guest's own loop included; KVM without\n\
             mitigations; exits, VMREADs and VMWRITEs in the last tier in which it is an\n\
             exit.\n\n{}",
            table::exits(&self.tiers, budgets, filter)
        );
        for tier in &self.tiers {
            if let Some(reason) = &tier.refused {
                text += &format!("{}: not on this CPU: {reason}\n", tier.mode);
            }
        }
        text
    }

    /// The tables of the workload, for people.
    fn workload_text(&self, budgets: &Budgets, filter: &str) -> Option<String> {
        let linux = self.linux.as_ref()?;
        Some(format!(
            "{}\nInstructions for each operation of a Linux guest, and on the bare emulator.\n\n{}",
            table::rates(&linux.rates),
            table::workload(&linux.vireo, &linux.bare, budgets, filter)
        ))
    }

    /// Puts the tables into the README.
    fn save_to_readme(&self, budgets: &Budgets) -> Result<()> {
        edit_readme(|readme| {
            let readme = with_block(readme, README_EXITS, &self.exit_text(budgets, ""));
            match self.workload_text(budgets, "") {
                Some(workload) => with_block(&readme, README_WORKLOAD, &workload),
                None => readme,
            }
        })
    }
}

fn edit_readme(edit: impl FnOnce(&str) -> String) -> Result<()> {
    let file = paths::root().join("README.md");
    let text = edit(&String::from_utf8(paths::read(&file)?)?);
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// `text` with the block called `name` replaced, which stands between two comments.
fn with_block(text: &str, name: &str, block: &str) -> String {
    let (start, end) = (
        format!("<!-- bench: {name} -->\n"),
        format!("<!-- end: {name} -->"),
    );
    match (text.split_once(&start), text.split_once(&end)) {
        (Some((before, _)), Some((_, after))) => {
            format!("{before}{start}```text\n{block}```\n{end}{after}")
        }
        _ => text.to_owned(),
    }
}

/// Builds what is needed, boots it, and reads what was said.
fn measure(options: &Options) -> Result<Measured> {
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let bochs = provisioner.bochs()?;
    let bare = if options.exits {
        None
    } else {
        Some(provisioner.bare()?)
    };
    progress.clear();
    let plain = System::Vireo(build::all()?);
    let counting = System::Vireo(build::counting()?);
    let folder = RunFolder::create(None)?;
    let cpu = options.cpu.as_deref();
    let exits = |name, system, cmdline, vcpus, cpus| -> Result<Boot> {
        let guest = exit_guest(&folder.path, cmdline, vcpus, &exits::TIERS)?;
        Ok(Boot {
            name,
            system,
            platform: &bochs,
            volume: Volume::from_config(&guest, None, &provisioner)?,
            job: None,
            cpu,
            cpus,
        })
    };
    let mut boots = vec![
        exits("exits", &plain, "", 1, 1)?,
        exits("vmcs", &counting, "", 1, 1)?,
        exits("apart", &plain, "apart", 2, 2)?,
        exits("together", &plain, "together", 2, 1)?,
    ];
    let linux = bare
        .map(|bare| LinuxGuest::new(&provisioner, &bochs, bare, cpu))
        .transpose()?;
    if let Some(linux) = &linux {
        boots.extend(linux.boots(&plain, cpu, &provisioner)?);
    }
    let mut seen = boot::run_all(boots, &folder.path, &progress)?.into_iter();
    progress.clear();
    let mut next = || seen.next().context("a machine was not measured");
    let mut tiers = tiers(&next()?, &exits::TIERS)?;
    if cpu.is_none() {
        exits::require_all(&tiers)?;
    }
    exits::add_counts(&mut tiers, &self::tiers(&next()?, &exits::TIERS)?);
    for _ in ["apart", "together"] {
        exits::add_rows(&mut tiers, self::tiers(&next()?, &exits::TIERS)?);
    }
    let linux = match linux {
        Some(guest) => Some(guest.measured(next()?, next()?, seen.next())?),
        None => None,
    };
    Ok(Measured { tiers, linux })
}

/// Puts the guest `bench` and its configuration into `folder`.
fn exit_guest(folder: &Path, cmdline: &str, vcpus: u32, tiers: &[ApicMode]) -> Result<PathBuf> {
    let name = "bench";
    let config = folder.join("vireo.toml");
    fs::copy(build::guest(name)?, folder.join(name))
        .and_then(|_| fs::write(&config, exits::configuration(name, cmdline, vcpus, tiers)))
        .with_context(|| format!("cannot write {}", folder.display()))?;
    Ok(config)
}

/// What the guest `bench` has said.
fn tiers(seen: &Seen, tiers: &[ApicMode]) -> Result<Vec<Tier>> {
    let end = seen.end.as_ref().err().map(|error| format!("{error:#}"));
    let tiers = exits::parse(&seen.console, tiers, end.as_deref())?;
    ensure!(
        exits::best(&tiers).is_some(),
        "no guest of the benchmark has started"
    );
    Ok(tiers)
}

/// The Linux guest, with Vireo and without.
struct LinuxGuest<'a> {
    bochs: &'a Bochs,
    bare: System,
    bare_platform: Bare,
    program: Vec<u8>,
    nonce: String,
    baseline: Baseline,
}

impl<'a> LinuxGuest<'a> {
    const COMMAND: &'static str = "workload";

    fn new(
        provisioner: &Provisioner,
        bochs: &'a Bochs,
        bare: Bare,
        cpu: Option<&str>,
    ) -> Result<Self> {
        let mut guest = Self {
            bochs,
            bare: System::Guest(bare.clone()),
            bare_platform: bare,
            program: paths::read(&build::workload()?)?,
            nonce: nonce()?,
            baseline: Baseline::new(0, IPS, cpu),
        };
        let mut hasher = DefaultHasher::new();
        (
            guest.volume(Statistics::Counts, provisioner)?.fingerprint,
            &guest.program,
        )
            .hash(&mut hasher);
        guest.baseline = Baseline::new(hasher.finish(), IPS, cpu);
        Ok(guest)
    }

    fn volume(&self, statistics: Statistics, provisioner: &Provisioner) -> Result<Volume> {
        let job = Job {
            vm: None,
            nonce: &self.nonce,
            command: Some(Self::COMMAND),
            programs: &[(Self::COMMAND, &self.program)],
        };
        let cmdline = format!("{} {}", guest::CMDLINE, workload::OPTIONS);
        let single = Single {
            cmdline: Some(&cmdline),
            statistics,
            ..Single::default()
        };
        Volume::single(&single, Some(&job), None, provisioner)
    }

    /// With Vireo, with Vireo that times its exits, and without where that was not
    /// measured before.
    fn boots<'b>(
        &'b self,
        vireo: &'b System,
        cpu: Option<&'b str>,
        provisioner: &Provisioner,
    ) -> Result<Vec<Boot<'b>>> {
        let boot = |name, statistics| -> Result<Boot> {
            Ok(Boot {
                name,
                system: vireo,
                platform: self.bochs,
                volume: self.volume(statistics, provisioner)?,
                job: Some(&self.nonce),
                cpu,
                cpus: 1,
            })
        };
        let mut boots = vec![
            boot("workload", Statistics::Counts)?,
            boot("workload-timed", Statistics::Times)?,
        ];
        if self.known().is_none() {
            boots.push(Boot {
                system: &self.bare,
                platform: &self.bare_platform,
                ..boot("workload-bare", Statistics::Counts)?
            });
        }
        Ok(boots)
    }

    /// What was measured before on the bare emulator.
    fn known(&self) -> Option<Workload> {
        Workload::parse(&self.baseline.read_text()?)
    }

    fn measured(&self, vireo: Seen, timed: Seen, bare: Option<Seen>) -> Result<Linux> {
        let parse = |seen: Seen| {
            let text = workload::text(seen)?;
            let workload = Workload::parse(&text);
            let workload = workload.with_context(|| format!("the workload says: {text}"))?;
            Ok::<_, Error>((text, workload))
        };
        let (_, mut vireo) = parse(vireo)?;
        let times = ExitTimes::parse(&timed.console, "linux");
        let (_, timed) = parse(timed)?;
        let times = times.context("the hypervisor has not said what exits took")?;
        let rates = workload::rates(&times, &timed);
        let bare = match bare {
            Some(seen) => {
                let (text, workload) = parse(seen).context("on the bare emulator")?;
                self.baseline.write_text(&text)?;
                workload
            }
            None => self.known().context("there is no baseline")?,
        };
        let share = rates.first().map(|all| (SHARE.to_owned(), all.share));
        vireo.rows.extend(share);
        Ok(Linux { vireo, bare, rates })
    }
}

impl Measured {
    /// A sentence for each row that takes more than it may.
    fn failures(&self, budgets: &Budgets, filter: &str) -> Vec<String> {
        let mut failures = Vec::new();
        for tier in &self.tiers {
            for row in tier.rows.iter().filter(|row| row.name.contains(filter)) {
                let verdict = budgets.exit(&row.name).judge(row, tier.mode);
                if let Some(why) = verdict.failure() {
                    failures.push(format!(
                        "{} takes {:.2} instructions in the tier {}, {why}",
                        row.name, row.instructions, tier.mode
                    ));
                }
            }
        }
        for (name, compared, budget) in self.compared(budgets, filter) {
            if let Some(why) = budget.judge(compared).failure() {
                let than = match budget.unit {
                    Unit::Ratio => "times the bare emulator's",
                    Unit::More => "more than on the bare emulator",
                    Unit::Alone => "in all",
                };
                failures.push(format!("{name}: {compared:.3} {than}, {why}"));
            }
        }
        failures
    }

    /// The workload's rows, compared with the bare emulator's.
    fn compared<'a>(
        &'a self,
        budgets: &'a Budgets,
        filter: &'a str,
    ) -> impl Iterator<Item = (&'a str, f64, budget::WorkloadBudget)> {
        self.linux
            .iter()
            .flat_map(|linux| linux.vireo.rows.iter().map(move |row| (linux, row)))
            .filter(move |(_, row)| row.0.contains(filter))
            .filter_map(|(linux, (name, number))| {
                let (compared, budget) = budgets.compare(name, *number, &linux.bare)?;
                Some((name.as_str(), compared, budget))
            })
    }

    fn json(&self, budgets: &Budgets, options: &Options) -> Value {
        let filter = options.filter.as_str();
        let exits: Vec<Value> = self
            .tiers
            .iter()
            .flat_map(|tier| tier.rows.iter().map(move |row| (tier.mode, row)))
            .filter(|(_, row)| row.name.contains(filter))
            .map(|(mode, row)| {
                let budget = budgets.exit(&row.name);
                json!({
                    "name": row.name,
                    "tier": mode.name(),
                    "instructions": row.instructions,
                    "goal": budget.goal.get(mode),
                    "no_exit": budget.no_exit.contains(&mode),
                    "ceiling": budget.ceiling.get(mode),
                    "fields": budget.fields,
                    "reason": budget.reason,
                    "kvm": budget.kvm,
                    "ratio": budget.kvm.map(|kvm| kvm / row.instructions),
                    "exits": row.counts.map(|counts| counts.exits),
                    "vmreads": row.counts.map(|counts| counts.reads),
                    "vmwrites": row.counts.map(|counts| counts.writes),
                    "verdict": format!("{:?}", budget.judge(row, mode)),
                })
            })
            .collect();
        let refused: serde_json::Map<String, Value> = self
            .tiers
            .iter()
            .filter_map(|tier| Some((tier.mode.name().to_owned(), json!(tier.refused.clone()?))))
            .collect();
        let workload: Vec<Value> = self
            .compared(budgets, filter)
            .map(|(name, compared, budget)| {
                let numbers = self.linux.as_ref();
                json!({
                    "name": name,
                    "vireo": numbers.and_then(|linux| linux.vireo.get(name)),
                    "bare": numbers.and_then(|linux| linux.bare.get(name)),
                    "compared": compared,
                    "unit": budget.unit.name(),
                    "goal": budget.goal,
                    "ceiling": budget.ceiling,
                    "reason": budget.reason,
                    "kvm": budget.kvm,
                    "verdict": format!("{:?}", budget.judge(compared)),
                })
            })
            .collect();
        let rates: Vec<Value> = self
            .linux
            .iter()
            .flat_map(|linux| &linux.rates)
            .map(|rate| {
                json!({
                    "reason": rate.reason,
                    "per_second": rate.per_second,
                    "instructions": rate.instructions,
                    "percent": rate.share,
                })
            })
            .collect();
        json!({
            "cpu": options.cpu,
            "exits": exits,
            "not_on_this_cpu": refused,
            "workload_exits": rates,
            "workload": workload,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_the_readme_is_replaced_and_nothing_else() {
        let text = "a\n<!-- bench: x -->\nold\n<!-- end: x -->\nb\n";
        let new = "a\n<!-- bench: x -->\n```text\nnew\n```\n<!-- end: x -->\nb\n";
        assert_eq!(with_block(text, "x", "new\n"), new);
        assert_eq!(with_block(new, "x", "new\n"), new);
        assert_eq!(with_block(text, "y", "new\n"), text);
    }

    #[test]
    fn what_takes_more_than_it_may_is_named_with_both_numbers() {
        let budgets = Budgets::load().unwrap();
        let row = exits::Row::new;
        let measured = Measured {
            tiers: vec![Tier {
                mode: exits::TIERS[0],
                refused: None,
                rows: vec![
                    row("CPUID", 1.0),
                    row("VMCALL, null call", 1e6),
                    row("y", 1.0),
                ],
            }],
            linux: None,
        };
        let failures = measured.failures(&budgets, "");
        assert_eq!(failures.len(), 2);
        let ceiling = budgets.exit("VMCALL, null call").ceiling;
        assert_eq!(
            failures[0],
            format!(
                "VMCALL, null call takes 1000000.00 instructions in the tier emulated, the budget is {}",
                ceiling.get(exits::TIERS[0]).unwrap()
            )
        );
        assert!(failures[1].contains("y takes 1.00") && failures[1].contains("no budget"));
        assert!(measured.failures(&budgets, "CPU").is_empty());
    }
}
