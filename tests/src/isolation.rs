//! One guest's loops are no other guest's: what a guest measures of its own latency beside
//! hostile ones.

use crate::harness::{Case, Ending, Input, Outcome, Suite};
use anyhow::Result;
use std::collections::BTreeMap;
use xtask::{build, paths};

pub fn add(suite: &mut Suite) {
    suite.add("isolation::hostile_guests", hostile_guests);
    suite.add("isolation::fuzzing_guests", fuzzing_guests);
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
/// be or an exit end: in the median of the rounds' means, and at the most. An exit that is in the
/// way is some hundreds; one such in a round, which is no more than what two maxima may differ by,
/// moves the mean of its fifty timers by twenty.
const MEANS: u64 = 15;
const MAXIMA: u64 = 1000;

const MEASURING: &str = r#"
[[vm]]
name = "latency"
memory = "8M"
kernel = "latency"
cpus = [1]
"#;

/// Guests that do random things, by the numbers that they begin with; between two that wait.
const SEEDS: [&str; 5] = ["idle", "seed=1", "seed=2", "seed=3", "idle"];
/// Rounds of each.
const ROUNDS: u32 = 1000;

/// A guest beside the one that measures.
struct Neighbour {
    name: String,
    kernel: &'static str,
    cmdline: String,
    vcpus: u32,
}

impl Neighbour {
    fn hostile(way: &str) -> Self {
        Self {
            name: way.into(),
            kernel: "hostile",
            cmdline: way.into(),
            vcpus: 1,
        }
    }

    /// Its section, which starts when the guest `before` has ended.
    fn section(&self, before: Option<&Self>) -> String {
        let Self {
            name,
            kernel,
            cmdline,
            vcpus,
        } = self;
        let after = before.map_or_else(String::new, |before| {
            format!("after = \"{}\"\n", before.name)
        });
        format!(
            "[[vm]]\nname = \"{name}\"\nmemory = \"8M\"\nkernel = \"{kernel}\"\ncmdline = \"{cmdline}\"\nvcpus = {vcpus}\n{after}"
        )
    }
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
    neighbours: &[Neighbour],
    typed: Vec<(&'static str, &'static str)>,
) -> Result<Outcome> {
    let before = [None].into_iter().chain(neighbours.iter().map(Some));
    let pairs = neighbours.iter().zip(before);
    let sections: Vec<String> = pairs.map(|(own, before)| own.section(before)).collect();
    let mut files = Vec::new();
    for name in ["latency", "hostile", "fuzz"] {
        files.push((name, paths::read(&build::guest(name)?)?));
    }
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, file)| (*name, &**file)).collect();
    case.machine()
        .volume(&[MEASURING, &sections.concat()].concat(), &files)?
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
        &WAYS.map(Neighbour::hostile),
        vec![("vm latency: started", "\x141"), (last, "x")],
    )?;
    case.check_equal(
        "the guest that measures has ended",
        &seen.ending,
        &Ending::Status(0),
    );
    compare(case, &seen, &WAYS);
    Ok(())
}

/// Likewise guests that do whatever there is, some of which may die of it.
fn fuzzing_guests(case: &mut Case) -> Result<()> {
    let neighbours = [0, 1, 2, 3, 4].map(|index| match SEEDS[index] {
        way @ "idle" => Neighbour {
            name: format!("{way}-{index}"),
            ..Neighbour::hostile(way)
        },
        seed => Neighbour {
            name: format!("fuzz-{index}"),
            kernel: "fuzz",
            cmdline: format!("{seed} rounds={ROUNDS}"),
            vcpus: 2,
        },
    });
    let last = "vm idle-4: powered off";
    let seen = run(
        case,
        &neighbours,
        vec![("vm latency: started", "\x141"), (last, "x")],
    )?;
    case.check(
        "the hypervisor lives",
        !matches!(seen.ending, Ending::Hang | Ending::Crash | Ending::Restart),
        format!("{:?}", seen.ending),
    );
    let names = neighbours.each_ref().map(|own| own.name.as_str());
    for name in names {
        let ends: Vec<&str> = ["powered off", "reset", "stopped: "]
            .into_iter()
            .flat_map(|end| {
                seen.console
                    .matches(&format!("vm {name}: {end}"))
                    .collect::<Vec<_>>()
            })
            .collect();
        case.check_equal(
            &format!("{name} ends, by its own fault if at all"),
            ends.len(),
            1,
        );
    }
    compare(case, &seen, &names);
    Ok(())
}

/// A figure of what was measured beside a guest.
struct Compared {
    what: &'static str,
    of: fn(&Round) -> [u64; 2],
    /// TSC ticks by which it may be greater than beside an idle guest.
    noise: u64,
    /// The figure among those of all rounds, which are sorted.
    rank: fn(&[u64]) -> Option<u64>,
}

/// Checks that what was measured beside each of the guests is what was measured beside the first.
fn compare(case: &mut Case, seen: &Outcome, names: &[&str]) {
    let mut beside: BTreeMap<&str, Vec<Round>> = BTreeMap::new();
    let mut now = None;
    for line in seen.console.lines() {
        for name in names {
            if line.contains(&format!("vm {name}: started")) {
                now = Some(*name);
            } else if [": powered off", ": stopped"]
                .iter()
                .any(|end| line.contains(&format!("vm {name}{end}")))
            {
                now = None;
            }
        }
        if let (Some(name), Some(round)) = (now, Round::parse(line)) {
            beside.entry(name).or_default().push(round);
        }
    }
    let sorted = |name: &str, of: fn(&Round) -> [u64; 2], index: usize| {
        let rounds = beside.get(name).map_or(&[][..], Vec::as_slice);
        let mut ticks: Vec<u64> = rounds.iter().map(|round| of(round)[index]).collect();
        ticks.sort_unstable();
        ticks
    };
    let compared = [
        Compared {
            what: "means",
            of: |round| round.means,
            noise: MEANS,
            rank: median,
        },
        Compared {
            what: "maxima",
            of: |round| round.maxima,
            noise: MAXIMA,
            rank: |sorted| sorted.last().copied(),
        },
    ];
    for Compared {
        what,
        of,
        noise,
        rank,
    } in compared
    {
        let figures = |name| [0, 1].map(|index| rank(&sorted(name, of, index)).unwrap_or(u64::MAX));
        let quiet = figures(names[0]);
        for name in names {
            let seen = figures(name);
            let limits = quiet.map(|ticks| ticks.saturating_add(noise));
            case.check(
                &format!("beside {name} the {what} are as beside an idle guest"),
                seen.iter().zip(limits).all(|(seen, limit)| *seen <= limit),
                format!("{seen:?} ticks instead of {quiet:?}"),
            );
        }
    }
}

fn median(sorted: &[u64]) -> Option<u64> {
    sorted.get(sorted.len() / 2).copied()
}

/// The line is busy with what a guest sends without end, and the other one does not notice.
fn flood_that_is_shown(case: &mut Case) -> Result<()> {
    let ended = ("vm console: powered off", "x");
    let seen = run(
        case,
        &["idle", "console"].map(Neighbour::hostile),
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
    let median = median(&maxima).unwrap_or_default();
    let worst = maxima.last().copied().unwrap_or(u64::MAX);
    case.check(
        "no round stands out",
        // When its console is shown again, the line takes 256 bytes of it at a time.
        worst <= median + 4 * MAXIMA,
        format!("{worst} ticks where {median} are the median's"),
    );
    Ok(())
}
