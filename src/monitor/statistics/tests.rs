use super::*;
use crate::vmx::exit_reason::{REASONS, number};
use proptest::prelude::*;

/// Counts and times of these exits: reason and ticks.
fn recorded(exits: &[(usize, u64)]) -> Exits {
    let mut counts = [0; REASONS];
    let times = ExitTimes::new().unwrap();
    for &(reason, ticks) in exits {
        counts[reason] += 1;
        times.record(reason, ticks);
    }
    Exits::new(&counts, Some(&times))
}

#[test]
fn the_most_frequent_comes_first_and_nothing_is_lost() {
    let mut counts = [0; REASONS];
    let line = |counts: &[u64]| Exits::new(counts, None).line().to_string();
    assert_eq!(line(&counts), "0 exits");
    counts[number::HLT] = 5;
    counts[number::IO] = 70;
    counts[number::CPUID] = 5;
    assert_eq!(line(&counts), "80 exits: I/O 70, CPUID 5, HLT 5");
    counts[40..45].fill(1);
    assert_eq!(
        line(&counts),
        "85 exits: I/O 70, CPUID 5, HLT 5, PAUSE 1, \
         entry failure: machine check 1, unknown 1, others 2"
    );
}

#[test]
fn a_table_of_counts() {
    let mut counts = [0; REASONS];
    counts[number::IO] = 2;
    counts[number::EXTERNAL_INTERRUPT] = 1;
    let expected = [
        "reason              count   share",
        "all                     3  100.0%",
        "I/O                     2   66.7%",
        "external interrupt      1   33.3%",
    ];
    let text = Exits::new(&counts, None).table().to_string();
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn json_has_the_same() {
    let exits = recorded(&[(number::CPUID, 75), (number::IO, 5), (number::CPUID, 64)]);
    let expected = concat!(
        r#""exits":3,"reasons":[{"reason":"CPUID","count":2,"share":0.667,"timed":2,"mean":69,"#,
        r#""maximum":75,"histogram":[0,0,0,0,0,0,2]},{"reason":"I/O","count":1,"share":0.333,"#,
        r#""timed":1,"mean":5,"maximum":5,"histogram":[0,0,1]}]"#
    );
    assert_eq!(exits.json().to_string(), expected);
}

#[test]
fn a_table_of_times() {
    let mut exits = Vec::new();
    exits.resize(1000, (number::CPUID, 75));
    exits.resize(1490, (number::IO, 5000));
    exits.resize(1500, (number::IO, 30000));
    let expected = [
        "reason  count   share  mean  maximum  2^6..2^14",
        "all      1500  100.0%  1883    30000  7     3 .",
        "CPUID    1000   66.7%    75       75  #",
        "I/O       500   33.3%  5500    30000        # .",
    ];
    let exits = recorded(&exits);
    let text = exits.table().to_string();
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    assert_eq!(exits.ticks(), 1000 * 75 + 490 * 5000 + 10 * 30000);
}

#[test]
fn exits_before_times_were_recorded_are_told_apart() {
    let mut counts = [0; REASONS];
    counts[number::CPUID] = 12;
    counts[number::HLT] = 3;
    let times = ExitTimes::new().unwrap();
    times.record(number::CPUID, 10);
    times.record(number::CPUID, 21);
    let expected = [
        "reason  count   share  timed  mean  maximum  2^3..2^4",
        "all        15  100.0%      2    15       21  55",
        "CPUID      12   80.0%      2    15       21  55",
        "HLT         3   20.0%      0     -        -",
    ];
    let text = Exits::new(&counts, Some(&times)).table().to_string();
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn what_has_no_room_is_in_the_last_column() {
    let mut times = Times::default();
    times.histogram[4] = 1;
    times.histogram[5..].fill(2);
    let span = Span::new(&times, 10);
    assert_eq!(
        span,
        Span {
            first: 4,
            last: 13,
            cut: true
        }
    );
    struct Cells(Span, Times);
    impl fmt::Display for Cells {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.write(f, &self.1)
        }
    }
    assert_eq!(Cells(span, times).to_string(), "  .........7");
    assert!(!Span::new(&times, BUCKETS).cut);
}

#[test]
fn no_exit_has_a_table_too() {
    let text = recorded(&[]).table().to_string();
    assert_eq!(text.lines().count(), 2);
}

#[test]
fn the_greatest_numbers_are_no_overflow() {
    let times = ExitTimes::new().unwrap();
    times.record(number::CPUID, u64::MAX);
    times.record(number::HLT, u64::MAX);
    let exits = Exits::new(&[u64::MAX; REASONS], Some(&times));
    assert_eq!(exits.ticks(), u64::MAX);
    assert!(exits.table().to_string().contains("100.0%"));
    let numbers = [0, 999_999, 1_000_000, 99_999_999, 100_000_000, u64::MAX];
    assert_eq!(
        numbers.map(|ticks| cell(Some(ticks)).to_string()),
        ["0", "999999", "1000k", "99999k", "100M", "18446P"]
    );
    assert_eq!(portion(u64::MAX, u64::MAX, 1000), 1000);
    assert_eq!(portion(1, 0, 10), 10);
    assert_eq!([0, 9, 10, u64::MAX].map(digits), [1, 1, 2, 20]);
}

proptest! {
    #[test]
    fn lines_are_short_and_the_counts_add_up(
        exits in prop::collection::vec((0..76usize, 0u32..64), 1..300)
    ) {
        let exits: Vec<_> = exits.iter().map(|&(reason, log)| (reason, 1 << log)).collect();
        let text = recorded(&exits).table().to_string();
        let names: Vec<_> = exits.iter().map(|exit| exit_reason::name(exit.0).len()).collect();
        let widest = names.iter().max().unwrap();
        let counts: Vec<u64> = text
            .lines()
            .skip(1)
            .map(|line| line[(*widest).max(6)..].split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        prop_assert_eq!(counts[0], exits.len() as u64);
        prop_assert_eq!(counts[1..].iter().sum::<u64>(), counts[0]);
        prop_assert!(counts[1..].is_sorted_by(|a, b| a >= b));
        prop_assert!(text.lines().all(|line| line.len() <= WIDTH), "{}", text);
    }
}
