//! One guest's loops are no other guest's: what a guest measures of its own latency beside
//! hostile ones.

use crate::harness::{Case, Ending, Input, Outcome, Suite};
use anyhow::Result;
use std::collections::BTreeMap;
use xtask::{build, paths};

pub fn add(suite: &mut Suite) {
    suite.add("isolation::hostile_guests", hostile_guests);
    suite.add(
        "isolation::console_flood_that_is_shown",
        flood_that_is_shown,
    );
}

/// What the guest `hostile` does, the harmless first.
const WAYS: [&str; 9] = [
    "idle",
    "spin",
    "console",
    "cpuid",
    "ports",
    "memory",
    "timer",
    "halt",
    "interrupts",
];

/// How much later than beside an idle guest, in ticks, of which 50 are a microsecond, a timer may
/// be or an exit end: on the average, and at the most. An exit that is in the way is some hundreds.
const MEANS: u64 = 15;
const MAXIMA: u64 = 1000;

const MEASURING: &str = r#"
[[vm]]
name = "latency"
memory = "8M"
kernel = "latency"
cpus = [1]
"#;

/// The section of a hostile guest, which starts when the one that does `before` has ended.
fn section(way: &str, before: Option<&str>) -> String {
    let after = before.map_or_else(String::new, |before| format!("after = \"{before}\"\n"));
    format!(
        "[[vm]]\nname = \"{way}\"\nmemory = \"8M\"\nkernel = \"hostile\"\ncmdline = \"{way}\"\n{after}"
    )
}

/// What one round has measured: means and maxima, in ticks.
#[derive(Clone, Copy, Debug)]
struct Round {
    number: u64,
    /// Of the timer, and of an exit.
    means: [u64; 2],
    maxima: [u64; 2],
}

impl Round {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.strip_prefix("latency: round ")?.split(' ').collect();
        let [number, "timer", timer, latest, "exit", exit, longest] = words[..] else {
            return None;
        };
        let ticks = |word: &str| word.trim().parse().ok();
        let number = ticks(number)?;
        // The first one fills tables.
        (number > 0).then_some(Self {
            number,
            means: [ticks(timer)?, ticks(exit)?],
            maxima: [ticks(latest)?, ticks(longest)?],
        })
    }
}

fn run(
    case: &mut Case,
    ways: &[&str],
    typed: Vec<(&'static str, &'static str)>,
) -> Result<Outcome> {
    let before = [None].into_iter().chain(ways.iter().map(|way| Some(*way)));
    let pairs = ways.iter().zip(before);
    let sections: Vec<String> = pairs.map(|(way, before)| section(way, before)).collect();
    let latency = paths::read(&build::guest("latency")?)?;
    let hostile = paths::read(&build::guest("hostile")?)?;
    case.machine()
        .volume(
            &[MEASURING, &sections.concat()].concat(),
            &[("latency", &latency), ("hostile", &hostile)],
        )?
        .options(["--smp", "2"])
        .input(Input::Typed(typed))
        .limit(240)
        .run()
}

/// On CPU 0 one hostile guest after the other, on CPU 1 the one that measures.
fn hostile_guests(case: &mut Case) -> Result<()> {
    let last = "vm interrupts: powered off";
    let seen = run(
        case,
        &WAYS,
        vec![("vm latency: started", "\x141"), (last, "x")],
    )?;
    case.check_equal(
        "the guest that measures has ended",
        &seen.ending,
        &Ending::Status(0),
    );
    let mut beside: BTreeMap<&str, Vec<Round>> = BTreeMap::new();
    let mut now = None;
    for line in seen.console.lines() {
        for way in WAYS {
            if line.contains(&format!("vm {way}: started")) {
                now = Some(way);
            } else if line.contains(&format!("vm {way}: powered off")) {
                now = None;
            }
        }
        if let (Some(way), Some(round)) = (now, Round::parse(line)) {
            beside.entry(way).or_default().push(round);
        }
    }
    let worst = |way: &str, of: fn(&Round) -> [u64; 2]| {
        let rounds = beside.get(way).map_or(&[][..], Vec::as_slice);
        let worst = |index: usize| rounds.iter().map(|round| of(round)[index]).max();
        [0, 1].map(|index| worst(index).unwrap_or(u64::MAX))
    };
    for (what, of, noise) in [
        ("means", (|round| round.means) as fn(&Round) -> _, MEANS),
        ("maxima", |round| round.maxima, MAXIMA),
    ] {
        let quiet = worst(WAYS[0], of);
        for way in WAYS {
            let worst = worst(way, of);
            let limits = quiet.map(|ticks| ticks.saturating_add(noise));
            case.check(
                &format!("beside {way} the {what} are as beside an idle guest"),
                worst
                    .iter()
                    .zip(limits)
                    .all(|(worst, limit)| *worst <= limit),
                format!("{worst:?} ticks instead of {quiet:?}"),
            );
        }
    }
    Ok(())
}

/// The line is busy with what a guest sends without end, and the other one does not notice.
fn flood_that_is_shown(case: &mut Case) -> Result<()> {
    let ended = ("vm console: powered off", "x");
    let seen = run(
        case,
        &["idle", "console"],
        vec![("vm console: started", "\x143"), ended],
    )?;
    case.check_equal(
        "the guest that measures has ended",
        &seen.ending,
        &Ending::Status(0),
    );
    let mut rounds: Vec<Round> = seen.console.lines().filter_map(Round::parse).collect();
    rounds.sort_by_key(|round| round.number);
    let mut maxima: Vec<u64> = rounds.iter().map(|round| round.maxima[0]).collect();
    maxima.sort_unstable();
    let median = maxima.get(maxima.len() / 2).copied().unwrap_or_default();
    let worst = maxima.last().copied().unwrap_or(u64::MAX);
    case.check(
        "no round stands out",
        // When its console is shown again, the line takes 256 bytes of it at a time.
        worst <= median + 4 * MAXIMA,
        format!("{worst} ticks where {median} are the median's"),
    );
    Ok(())
}
