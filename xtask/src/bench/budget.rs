//! What may be spent: `tests/budgets.toml`.
//!
//! A row has a *goal*, where one was set, and a *ceiling*, a little above what it
//! takes now. Beyond its ceiling a row has got worse, and the benchmark fails;
//! a row that has not reached its goal is shown as such. Each change of a
//! ceiling is made by `cargo xtask bench --accept REASON`.

use super::exits::{Row, TIERS, Tier};
use super::workload::Workload;
use crate::paths;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use vireo_handoff::config::ApicMode;

/// The budget file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budgets {
    /// What the file begins with, before the first section.
    #[serde(skip)]
    pub preface: String,
    #[serde(default, rename = "exit")]
    pub exits: Vec<ExitBudget>,
    #[serde(default, rename = "workload")]
    pub workloads: Vec<WorkloadBudget>,
}

/// What an exit may take, in instructions.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitBudget {
    pub name: String,
    /// What KVM takes.
    pub kvm: Option<f64>,
    #[serde(default)]
    pub goal: PerTier,
    /// The tiers in which it is to be no exit at all.
    #[serde(default)]
    pub no_exit: Vec<ApicMode>,
    /// The most VMREADs and VMWRITEs.
    pub fields: Option<[f64; 2]>,
    #[serde(default)]
    pub ceiling: PerTier,
    /// The ceiling of the outer KVM's exits, where Vireo is nested.
    pub outer: Option<f64>,
    /// Why that one was last changed.
    #[serde(default)]
    pub outer_reason: String,
    /// Why the other ceilings were last changed.
    #[serde(default)]
    pub reason: String,
}

/// As many exits in a round are none: they are of something else that went on meanwhile, such
/// as the slices that Bochs needs.
const FEW: f64 = 0.01;

/// A number for all tiers, or for each.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum PerTier {
    All(f64),
    Each(Each),
    #[default]
    None,
}

/// A number for each tier that has one.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Each {
    emulated: Option<f64>,
    flexpriority: Option<f64>,
    apicv: Option<f64>,
}

/// What an operation of the workload may take, beside the bare emulator.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadBudget {
    pub name: String,
    /// How the number is compared.
    #[serde(default)]
    pub unit: Unit,
    /// What KVM takes, as `goal` and `ceiling`.
    pub kvm: Option<f64>,
    pub goal: Option<f64>,
    pub ceiling: Option<f64>,
    #[serde(default)]
    pub reason: String,
}

/// How the number of a guest is compared with that of the bare emulator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// How often the second goes into the first.
    #[default]
    Ratio,
    /// How much more it is.
    More,
    /// Not at all: it is of Vireo's alone.
    Alone,
}

impl Unit {
    /// The comparison; none where the other number is missing.
    pub fn compare(self, vireo: f64, bare: Option<f64>) -> Option<f64> {
        match self {
            Self::Ratio => Some(vireo / bare?),
            Self::More => Some(vireo - bare?),
            Self::Alone => Some(vireo),
        }
    }

    /// What was compared, for people.
    pub fn show(self, compared: f64) -> String {
        match self {
            Self::Ratio => format!("{compared:.3}"),
            Self::More => format!("+{compared:.0}"),
            Self::Alone => format!("{compared:.2}"),
        }
    }

    /// As a value of the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ratio => "ratio",
            Self::More => "more",
            Self::Alone => "alone",
        }
    }
}

impl PerTier {
    /// The number for this tier.
    pub fn get(&self, mode: ApicMode) -> Option<f64> {
        match self {
            Self::All(number) => Some(*number),
            Self::Each(each) => match mode {
                ApicMode::Auto => None,
                ApicMode::Emulated => each.emulated,
                ApicMode::FlexPriority => each.flexpriority,
                ApicMode::ApicV => each.apicv,
            },
            Self::None => None,
        }
    }

    fn new(numbers: [Option<f64>; 3]) -> Self {
        match numbers {
            [None, None, None] => Self::None,
            [Some(first), second, third] if second == Some(first) && third == Some(first) => {
                Self::All(first)
            }
            [emulated, flexpriority, apicv] => Self::Each(Each {
                emulated,
                flexpriority,
                apicv,
            }),
        }
    }

    /// As a value of the file.
    fn text(&self) -> Option<String> {
        match self {
            Self::All(number) => Some(number.to_string()),
            Self::Each(_) => {
                let parts: Vec<String> = TIERS
                    .iter()
                    .filter_map(|tier| Some(format!("{tier} = {}", self.get(*tier)?)))
                    .collect();
                Some(format!("{{ {} }}", parts.join(", ")))
            }
            Self::None => None,
        }
    }
}

/// How a measurement stands to its budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// It has reached the goal, or has none.
    Good,
    /// It has not reached the goal, and is no worse than it was.
    OverGoal,
    /// It is worse than it was: this is the ceiling.
    OverCeiling(f64),
    /// It has no ceiling yet.
    New,
}

impl Verdict {
    fn of(measured: f64, goal: Option<f64>, ceiling: Option<f64>) -> Self {
        match (goal, ceiling) {
            (_, None) => Self::New,
            (_, Some(ceiling)) if measured > ceiling => Self::OverCeiling(ceiling),
            (Some(goal), _) if measured > goal => Self::OverGoal,
            _ => Self::Good,
        }
    }

    /// The end of a sentence about a row that makes the benchmark fail.
    pub fn failure(self) -> Option<String> {
        match self {
            Self::OverCeiling(ceiling) => Some(format!("the budget is {ceiling}")),
            Self::New => Some(format!("{FILE} has no budget for it")),
            Self::Good | Self::OverGoal => None,
        }
    }
}

impl ExitBudget {
    /// How `row`, measured in the tier `mode`, stands to this.
    pub fn judge(&self, row: &Row, mode: ApicMode) -> Verdict {
        let verdict = Verdict::of(
            row.instructions,
            self.goal.get(mode),
            self.ceiling.get(mode),
        );
        let Some(counts) = row.counts.filter(|_| verdict == Verdict::Good) else {
            return verdict;
        };
        let exits = self.no_exit.contains(&mode) && counts.exits >= FEW;
        let fields = self
            .fields
            .is_some_and(|[reads, writes]| counts.reads > reads || counts.writes > writes);
        if exits || fields {
            Verdict::OverGoal
        } else {
            Verdict::Good
        }
    }
}

impl ExitBudget {
    /// How the outer KVM's exits stand to this.
    pub fn judge_outer(&self, outer: f64) -> Verdict {
        Verdict::of(outer, None, self.outer)
    }
}

impl WorkloadBudget {
    /// How a comparison with the bare emulator stands to this.
    pub fn judge(&self, compared: f64) -> Verdict {
        Verdict::of(compared, self.goal, self.ceiling)
    }
}

/// The file's name for people.
pub const FILE: &str = "tests/budgets.toml";

impl Budgets {
    fn path() -> PathBuf {
        paths::root().join(FILE)
    }

    /// Reads the file.
    ///
    /// # Errors
    /// When it is not there or malformed.
    pub fn load() -> Result<Self> {
        let text =
            fs::read_to_string(Self::path()).with_context(|| format!("cannot read {FILE}"))?;
        Self::parse(&text).with_context(|| format!("{FILE} is malformed"))
    }

    fn parse(text: &str) -> Result<Self> {
        let preface = text.find("\n[[").map_or(text, |at| &text[..at]);
        Ok(Self {
            preface: preface.to_owned(),
            ..toml::from_str(text)?
        })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<()> {
        fs::write(Self::path(), self.text()).with_context(|| format!("cannot write {FILE}"))
    }

    /// The budget of an exit.
    pub fn exit(&self, name: &str) -> ExitBudget {
        let found = self.exits.iter().find(|budget| budget.name == name);
        found.cloned().unwrap_or_default()
    }

    /// The budget of a row of the workload.
    pub fn workload(&self, name: &str) -> WorkloadBudget {
        let found = self.workloads.iter().find(|budget| budget.name == name);
        found.cloned().unwrap_or_default()
    }

    /// A row of the workload compared with the same on the bare emulator, and its budget.
    pub fn compare(
        &self,
        name: &str,
        vireo: f64,
        bare: &Workload,
    ) -> Option<(f64, WorkloadBudget)> {
        let budget = self.workload(name);
        Some((budget.unit.compare(vireo, bare.get(name))?, budget))
    }

    /// Sets the ceilings of what was measured a little above it, for this
    /// `reason`, where the name contains `filter`. Those that fit are left as they are.
    pub fn accept_exits(&mut self, tiers: &[Tier], filter: &str, reason: &str) {
        let names = tiers.iter().flat_map(|tier| &tier.rows);
        for name in names.map(|row| &row.name) {
            if !name.contains(filter) {
                continue;
            }
            let mut budget = self.exit(name);
            let ceiling = TIERS.map(|mode| {
                let old = budget.ceiling.get(mode);
                let tier = tiers.iter().find(|tier| tier.mode == mode);
                let row = tier.and_then(|tier| tier.rows.iter().find(|row| row.name == *name));
                match row {
                    None => old,
                    Some(row) => Some(accepted(
                        old,
                        row.instructions,
                        row.instructions * 1.02 + 1.0,
                        1.0,
                    )),
                }
            });
            let ceiling = PerTier::new(ceiling);
            if ceiling == budget.ceiling {
                continue;
            }
            budget.name.clone_from(name);
            budget.ceiling = ceiling;
            reason.clone_into(&mut budget.reason);
            self.put_exit(budget);
        }
    }

    /// The same for the exits of the KVM in which Vireo is nested.
    pub fn accept_outer(&mut self, rows: &[(&Row, f64)], reason: &str) {
        for (row, outer) in rows {
            let mut budget = self.exit(&row.name);
            let ceiling = Some(accepted(budget.outer, *outer, outer + 0.1, 10.0));
            if ceiling == budget.outer {
                continue;
            }
            budget.name.clone_from(&row.name);
            budget.outer = ceiling;
            reason.clone_into(&mut budget.outer_reason);
            self.put_exit(budget);
        }
    }

    fn put_exit(&mut self, budget: ExitBudget) {
        match self.exits.iter_mut().find(|old| old.name == budget.name) {
            Some(old) => *old = budget,
            None => self.exits.push(budget),
        }
    }

    /// The same for the workload. A row's figure depends a little on when timer
    /// interrupts come.
    pub fn accept_workload(
        &mut self,
        vireo: &Workload,
        bare: &Workload,
        filter: &str,
        reason: &str,
    ) {
        for (name, number) in vireo.rows.iter().filter(|row| row.0.contains(filter)) {
            let Some((compared, mut budget)) = self.compare(name, *number, bare) else {
                continue;
            };
            let ceiling = match budget.unit {
                Unit::Alone => accepted(budget.ceiling, compared, compared * 1.05, 100.0),
                Unit::Ratio => accepted(budget.ceiling, compared, compared * 1.02, 1000.0),
                Unit::More => accepted(budget.ceiling, compared, compared * 1.05 + 50.0, 1.0),
            };
            if budget.ceiling == Some(ceiling) {
                continue;
            }
            budget.name.clone_from(name);
            budget.ceiling = Some(ceiling);
            reason.clone_into(&mut budget.reason);
            match self.workloads.iter_mut().find(|old| old.name == *name) {
                Some(old) => *old = budget,
                None => self.workloads.push(budget),
            }
        }
    }

    /// The file.
    fn text(&self) -> String {
        let mut text = self.preface.trim_end().to_owned();
        let quoted = |text: &str| toml::Value::from(text).to_string();
        let mut put = |section: &str, lines: &[(&str, Option<String>)]| {
            let _ = write!(text, "\n\n[[{section}]]");
            for (key, value) in lines {
                if let Some(value) = value {
                    let _ = write!(text, "\n{key} = {value}");
                }
            }
        };
        for budget in &self.exits {
            let modes: Vec<String> = budget.no_exit.iter().map(|m| quoted(m.name())).collect();
            let fields = budget.fields;
            put(
                "exit",
                &[
                    ("name", Some(quoted(&budget.name))),
                    ("kvm", budget.kvm.map(|number| number.to_string())),
                    ("goal", budget.goal.text()),
                    (
                        "no_exit",
                        (!modes.is_empty()).then(|| format!("[{}]", modes.join(", "))),
                    ),
                    ("fields", fields.map(|[r, w]| format!("[{r}, {w}]"))),
                    ("ceiling", budget.ceiling.text()),
                    ("reason", Some(quoted(&budget.reason))),
                    ("outer", budget.outer.map(|number| number.to_string())),
                    (
                        "outer_reason",
                        budget.outer.map(|_| quoted(&budget.outer_reason)),
                    ),
                ],
            );
        }
        for budget in &self.workloads {
            put(
                "workload",
                &[
                    ("name", Some(quoted(&budget.name))),
                    (
                        "unit",
                        (budget.unit != Unit::default()).then(|| quoted(budget.unit.name())),
                    ),
                    ("kvm", budget.kvm.map(|number| number.to_string())),
                    ("goal", budget.goal.map(|number| number.to_string())),
                    ("ceiling", budget.ceiling.map(|number| number.to_string())),
                    ("reason", Some(quoted(&budget.reason))),
                ],
            );
        }
        text.push('\n');
        text
    }
}

/// The ceiling for what was measured: `most`, rounded up to a part of 1 in `parts`, or
/// the old one where that is as tight.
fn accepted(old: Option<f64>, measured: f64, most: f64, parts: f64) -> f64 {
    let ceiling = (most * parts).ceil() / parts;
    old.filter(|old| *old >= measured && *old <= ceiling)
        .unwrap_or(ceiling)
}

#[cfg(test)]
mod tests {
    use super::super::exits::Counts;
    use super::*;

    const TEXT: &str = "# About [[exit]].\n\n[[exit]]\nname = \"CPUID\"\nkvm = 1112\ngoal = 90\nfields = [4, 1]\nceiling = 94\nreason = \"first\"\nouter = 2.1\nouter_reason = \"first\"\n\n\
        [[exit]]\nname = \"EOI\"\ngoal = { apicv = 40 }\nno_exit = [\"apicv\"]\nceiling = { emulated = 200, apicv = 50 }\nreason = \"it's\"\n\n\
        [[workload]]\nname = \"late\"\nunit = \"more\"\ngoal = 2000\nceiling = 1500\nreason = \"first\"\n\n\
        [[workload]]\nname = \"share\"\nunit = \"alone\"\nceiling = 1.4\nreason = \"first\"\n";

    #[test]
    fn a_row_is_judged_by_its_tiers_numbers() {
        let budgets = Budgets::parse(TEXT).unwrap();
        let cpuid = budgets.exit("CPUID");
        let judge = |number| cpuid.judge(&Row::new("CPUID", number), ApicMode::Emulated);
        assert_eq!(judge(90.0), Verdict::Good);
        assert_eq!(judge(90.1), Verdict::OverGoal);
        assert_eq!(judge(94.1), Verdict::OverCeiling(94.0));
        assert_eq!(judge(94.1).failure().unwrap(), "the budget is 94");
        let eoi = budgets.exit("EOI");
        let judge = |number, mode| eoi.judge(&Row::new("EOI", number), mode);
        assert_eq!(judge(199.0, ApicMode::Emulated), Verdict::Good);
        assert_eq!(judge(41.0, ApicMode::ApicV), Verdict::OverGoal);
        assert_eq!(judge(1.0, ApicMode::FlexPriority), Verdict::New);
        let unknown = budgets
            .exit("x")
            .judge(&Row::new("x", 1.0), ApicMode::ApicV);
        assert!(unknown.failure().unwrap().contains("no budget"));
        assert_eq!(cpuid.judge_outer(1.9), Verdict::Good);
        assert_eq!(cpuid.judge_outer(3.0), Verdict::OverCeiling(2.1));
        let bare = Workload {
            rows: vec![("late".into(), 2000.0)],
            idle: 0.0,
            end: 0.0,
        };
        let (late, budget) = budgets.compare("late", 3500.0, &bare).unwrap();
        assert_eq!((late, budget.judge(late)), (1500.0, Verdict::Good));
        let (share, budget) = budgets.compare("share", 1.5, &bare).unwrap();
        assert_eq!(
            (share, budget.judge(share)),
            (1.5, Verdict::OverCeiling(1.4))
        );
        assert_eq!(budgets.compare("other", 1.0, &bare), None);
    }

    #[test]
    fn exits_and_fields_are_goals_too() {
        let budgets = Budgets::parse(TEXT).unwrap();
        let counted = |name, exits, reads, writes| Row {
            counts: Some(Counts {
                exits,
                reads,
                writes,
            }),
            ..Row::new(name, 1.0)
        };
        let judge = |row: Row| budgets.exit(&row.name).judge(&row, ApicMode::ApicV);
        assert_eq!(judge(counted("CPUID", 1.0, 4.0, 1.0)), Verdict::Good);
        assert_eq!(judge(counted("CPUID", 1.0, 4.5, 1.0)), Verdict::OverGoal);
        assert_eq!(judge(counted("CPUID", 1.0, 1.0, 2.0)), Verdict::OverGoal);
        assert_eq!(judge(counted("EOI", 0.0, 0.0, 0.0)), Verdict::Good);
        assert_eq!(judge(counted("EOI", 1.0, 1.0, 0.0)), Verdict::OverGoal);
    }

    #[test]
    fn the_file_is_written_as_it_is_read() {
        assert_eq!(Budgets::parse(TEXT).unwrap().text(), TEXT);
    }

    #[test]
    fn accepted_ceilings_are_a_little_above_and_only_change_where_they_must() {
        let mut budgets = Budgets::parse(TEXT).unwrap();
        let tier = |mode, rows| Tier {
            mode,
            refused: None,
            rows,
        };
        let tiers = [
            tier(
                ApicMode::Emulated,
                vec![Row::new("CPUID", 93.0), Row::new("new", 10.0)],
            ),
            tier(ApicMode::FlexPriority, vec![Row::new("CPUID", 93.0)]),
            tier(ApicMode::ApicV, vec![Row::new("CPUID", 93.0)]),
        ];
        budgets.accept_exits(&tiers, "", "second");
        assert_eq!(budgets.exit("CPUID").reason, "first");
        assert_eq!(
            budgets.exit("new").ceiling.get(ApicMode::Emulated),
            Some(12.0)
        );
        assert_eq!(budgets.exit("new").reason, "second");
        assert_eq!(
            budgets.exit("EOI").ceiling.get(ApicMode::Emulated),
            Some(200.0)
        );
        let faster = [tier(ApicMode::Emulated, vec![Row::new("CPUID", 50.0)])];
        budgets.accept_exits(&faster, "EOI", "no such row");
        assert_eq!(budgets.exit("CPUID").reason, "first");
        budgets.accept_exits(&faster, "CPU", "third");
        let ceiling = budgets.exit("CPUID").ceiling;
        assert_eq!(ceiling.get(ApicMode::Emulated), Some(52.0));
        assert_eq!(ceiling.get(ApicMode::ApicV), Some(94.0));
        let slow = [
            (&Row::new("CPUID", 1.0), 3.0),
            (&Row::new("EOI", 1.0), 2.04),
        ];
        budgets.accept_outer(&slow, "fourth");
        assert_eq!(budgets.exit("CPUID").outer, Some(3.1));
        assert_eq!(budgets.exit("EOI").outer, Some(2.2));
        assert_eq!(budgets.exit("EOI").outer_reason, "fourth");
        assert_eq!(budgets.exit("EOI").reason, "it's");
        let number = |number| Workload {
            rows: vec![("late".into(), number), ("ratio".into(), number)],
            idle: 0.0,
            end: 0.0,
        };
        budgets.accept_workload(&number(3000.0), &number(2000.0), "", "third");
        assert_eq!(budgets.workload("late").ceiling, Some(1100.0));
        assert_eq!(budgets.workload("ratio").ceiling, Some(1.53));
    }
}
