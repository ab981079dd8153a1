//! Tables for people: what `cargo xtask bench` prints.

use super::budget::{Budgets, ExitBudget, PerTier, Verdict};
use super::exits::{Row, TIERS, Tier, best};
use super::workload::{Rate, Workload};
use vireo_handoff::config::ApicMode;

/// Columns, of which all but the first and the last are numbers: right-aligned.
fn layout(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let lengths = rows.iter().map(|row| row[column].chars().count());
            lengths.max().unwrap_or(0).max(header[column].len())
        })
        .collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                if column == 0 || column == header.len() - 1 {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    std::iter::once(&header).chain(rows).map(line).collect()
}

/// A cell for each tier in one: a single one where they are the same.
fn merged(cells: [String; 3]) -> String {
    if cells.iter().all(|cell| *cell == cells[0]) {
        cells[0].clone()
    } else {
        cells.join("|")
    }
}

/// The exits whose name contains `filter`.
pub fn exits(tiers: &[Tier], budgets: &Budgets, filter: &str) -> String {
    let Some(last) = best(tiers) else {
        return String::new();
    };
    let counted = tiers
        .iter()
        .flat_map(|tier| &tier.rows)
        .any(|row| row.counts.is_some());
    let rows: Vec<Vec<String>> = last
        .rows
        .iter()
        .filter(|row| row.name.contains(filter))
        .map(|row| {
            let budget = budgets.exit(&row.name);
            let found = TIERS.map(|mode| {
                let tier = tiers.iter().find(|tier| tier.mode == mode)?;
                tier.rows.iter().find(|other| other.name == row.name)
            });
            exit_row(row, &budget, found, counted)
        })
        .collect();
    let mut header = vec!["exit"];
    header.extend(TIERS.map(ApicMode::name));
    header.extend(["budget", "KVM", "KVM/Vireo"]);
    if counted {
        header.extend(["exits", "VMREAD/VMWRITE"]);
    }
    header.push("");
    layout(&header, &rows)
}

/// `found` is the row in each tier; `row` the one in the best.
fn exit_row(
    row: &Row,
    budget: &ExitBudget,
    found: [Option<&Row>; 3],
    counted: bool,
) -> Vec<String> {
    let figure =
        |row: Option<&Row>| row.map_or("-".into(), |row| format!("{:.1}", row.instructions));
    let first = figure(found[0]);
    let mut cells = vec![row.name.clone(), first.clone()];
    // What is the same everywhere is said once.
    let same = found.iter().all(|row| figure(*row) == first);
    cells.extend(
        found[1..]
            .iter()
            .map(|row| if same { String::new() } else { figure(*row) }),
    );
    cells.push(goal(budget));
    cells.push(budget.kvm.map_or(String::new(), |kvm| kvm.to_string()));
    cells.push(budget.kvm.map_or(String::new(), |kvm| {
        let digits = if kvm < row.instructions { 2 } else { 1 };
        format!("{:.digits$}", kvm / row.instructions)
    }));
    if counted {
        // In the last tier in which it is an exit.
        let exits = |row: &&Row| row.counts.is_some_and(|counts| counts.exits >= 0.5);
        let row = found.into_iter().flatten().rfind(exits).unwrap_or(row);
        let counts = row.counts.as_ref();
        cells.extend([
            counts.map_or("-".into(), |counts| format!("{:.1}", counts.exits)),
            counts.map_or("-".into(), |counts| {
                format!("{:.1}/{:.1}", counts.reads, counts.writes)
            }),
        ]);
    }
    let notes: Vec<String> = TIERS
        .iter()
        .zip(found)
        .filter_map(|(mode, row)| note(budget.judge(row?, *mode), budget.ceiling.get(*mode)))
        .collect();
    let mut named: Vec<String> = Vec::new();
    for note in notes {
        if !named.contains(&note) {
            named.push(note);
        }
    }
    cells.push(named.join("; "));
    cells
}

/// The goal as a cell: numbers, or no exit at all.
fn goal(budget: &ExitBudget) -> String {
    let [emulated, flexpriority, apicv] = TIERS.map(|mode| {
        if budget.no_exit.contains(&mode) {
            "no exit".into()
        } else {
            budget
                .goal
                .get(mode)
                .map_or("-".into(), |goal| goal.to_string())
        }
    });
    if budget.goal == PerTier::None && budget.no_exit.is_empty() {
        return String::new();
    }
    let mut text = merged([emulated, flexpriority, apicv]);
    if let Some([reads, writes]) = budget.fields {
        text += &format!(", {reads}/{writes}");
    }
    text
}

fn note(verdict: Verdict, ceiling: Option<f64>) -> Option<String> {
    match verdict {
        Verdict::Good => None,
        Verdict::OverGoal => Some(format!(
            "over goal, at most {}",
            ceiling.unwrap_or(f64::NAN)
        )),
        Verdict::OverCeiling(ceiling) => Some(format!("OVER ITS CEILING {ceiling}")),
        Verdict::New => Some("NO BUDGET".into()),
    }
}

/// The workload beside the same on the bare emulator.
pub fn workload(vireo: &Workload, bare: &Workload, budgets: &Budgets, filter: &str) -> String {
    let rows: Vec<Vec<String>> = vireo
        .rows
        .iter()
        .filter(|row| row.0.contains(filter))
        .filter_map(|(name, number)| {
            let (compared, budget) = budgets.compare(name, *number, bare)?;
            let show = |number| budget.unit.show(number);
            let plain = |number: f64| format!("{number:.1}");
            Some(vec![
                name.clone(),
                plain(*number),
                bare.get(name).map_or(String::new(), plain),
                show(compared),
                budget.goal.map_or(String::new(), show),
                budget.kvm.map_or(String::new(), show),
                note(budget.judge(compared), budget.ceiling).unwrap_or_default(),
            ])
        })
        .collect();
    layout(
        &["workload", "Vireo", "bare", "ratio", "budget", "KVM", ""],
        &rows,
    )
}

/// Exits of the KVM in which Vireo is nested, and what they take.
pub fn nested(rows: &[(&Row, f64)], budgets: &Budgets) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(row, outer)| {
            let budget = budgets.exit(&row.name);
            vec![
                row.name.clone(),
                format!("{outer:.1}"),
                format!("{:.0}", row.instructions),
                note(budget.judge_outer(*outer), budget.outer).unwrap_or_default(),
            ]
        })
        .collect();
    layout(&["nested in KVM", "KVM's exits", "instructions", ""], &rows)
}

/// The exits of the workload by reason.
pub fn rates(rates: &[Rate]) -> String {
    let rows: Vec<Vec<String>> = rates
        .iter()
        .map(|rate| {
            vec![
                rate.reason.clone(),
                format!("{:.1}", rate.per_second),
                format!("{:.0}", rate.instructions),
                format!("{:.3}", rate.share),
                String::new(),
            ]
        })
        .collect();
    let header = [
        "exits of the workload",
        "per second",
        "instructions",
        "% of all",
        "",
    ];
    layout(&header, &rows)
}

#[cfg(test)]
mod tests {
    use super::super::budget::{Unit, WorkloadBudget};
    use super::super::exits::Counts;
    use super::*;

    fn tier(mode: ApicMode, figures: &[(&str, f64)]) -> Tier {
        Tier {
            mode,
            refused: None,
            rows: figures
                .iter()
                .map(|(name, instructions)| Row::new(name, *instructions))
                .collect(),
        }
    }

    #[test]
    fn what_is_the_same_in_all_tiers_is_said_once() {
        let tiers = [
            tier(ApicMode::Emulated, &[("CPUID", 92.04), ("EOI", 190.0)]),
            tier(ApicMode::FlexPriority, &[("CPUID", 92.04), ("EOI", 190.0)]),
            tier(ApicMode::ApicV, &[("CPUID", 92.04), ("EOI", 8.0)]),
        ];
        let cpuid = ExitBudget {
            name: "CPUID".into(),
            kvm: Some(1104.0),
            goal: PerTier::All(90.0),
            ceiling: PerTier::All(94.0),
            ..Default::default()
        };
        let eoi = ExitBudget {
            name: "EOI".into(),
            no_exit: vec![ApicMode::ApicV],
            ceiling: PerTier::All(100.0),
            ..Default::default()
        };
        let budgets = Budgets {
            exits: vec![cpuid, eoi],
            ..Default::default()
        };
        assert_eq!(
            exits(&tiers, &budgets, ""),
            "exit   emulated  flexpriority  apicv       budget   KVM  KVM/Vireo\n\
             CPUID      92.0                                90  1104       12.0  over goal, at most 94\n\
             EOI       190.0         190.0    8.0  -|-|no exit                   OVER ITS CEILING 100\n"
        );
        assert!(!exits(&tiers, &budgets, "EOI").contains("CPUID"));
    }

    #[test]
    fn a_workload_is_compared_by_ratio_or_difference_or_stands_alone() {
        let late = |ratio, late| vec![("hash".to_owned(), ratio), ("late, ns".to_owned(), late)];
        let run = |rows| Workload {
            rows,
            idle: 0.0,
            end: 0.0,
        };
        let mut vireo = run(late(102.0, 4500.0));
        vireo.rows.push(("share".into(), 0.25));
        let budget = |name: &str, unit, goal, kvm, ceiling| WorkloadBudget {
            name: name.into(),
            unit,
            goal: Some(goal),
            kvm,
            ceiling: Some(ceiling),
            ..Default::default()
        };
        let budgets = Budgets {
            workloads: vec![
                budget("late, ns", Unit::More, 2000.0, Some(20_300.0), 3000.0),
                budget("share", Unit::Alone, 1.0, None, 1.0),
            ],
            ..Default::default()
        };
        assert_eq!(
            workload(&vireo, &run(late(100.0, 2000.0)), &budgets, ""),
            "workload   Vireo    bare  ratio  budget     KVM\n\
             hash       102.0   100.0  1.020                  NO BUDGET\n\
             late, ns  4500.0  2000.0  +2500   +2000  +20300  over goal, at most 3000\n\
             share        0.2           0.25    1.00\n"
        );
    }

    #[test]
    fn counts_are_those_of_the_last_tier_in_which_it_is_an_exit() {
        let mut tiers = TIERS.map(|mode| tier(mode, &[("EOI", 80.0)]));
        for (tier, exits) in tiers.iter_mut().zip([1.0, 1.0, 0.001]) {
            tier.rows[0].counts = Some(Counts {
                exits,
                reads: 5.0 * exits,
                writes: exits,
            });
        }
        let text = exits(&tiers, &Budgets::default(), "");
        assert!(text.contains("  1.0         5.0/1.0  NO BUDGET"), "{text}");
    }
}
