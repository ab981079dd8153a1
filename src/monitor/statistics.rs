//! What a guest has cost, in one line.

use crate::vmx::exit_reason;
use core::fmt;

/// How many reasons are named; the rest is summed up.
const NAMED: usize = 6;

/// VM exits by basic reason, printed with the most frequent first.
pub struct Exits<'a>(pub &'a [u64]);

impl fmt::Display for Exits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.0.iter().sum();
        write!(f, "{total} exits")?;
        let mut before = None;
        let mut rest = total;
        for _ in 0..NAMED {
            let Some(reason) = next(self.0, before) else {
                return Ok(());
            };
            let count = self.0[reason];
            let separator = if before.is_none() { ": " } else { ", " };
            write!(f, "{separator}{} {count}", exit_reason::name(reason))?;
            #[cfg(feature = "count-vmcs")]
            write_means(f, reason)?;
            before = Some(reason);
            rest -= count;
        }
        if rest > 0 {
            write!(f, ", others {rest}")?;
        }
        Ok(())
    }
}

/// The VMREADs and VMWRITEs of an exit.
#[cfg(feature = "count-vmcs")]
fn write_means(f: &mut fmt::Formatter<'_>, reason: usize) -> fmt::Result {
    let Some([reads, writes]) = crate::vmx::count::means(reason) else {
        return Ok(());
    };
    let tenths = |count| (count / 10, count % 10);
    let ((read, read_tenths), (write, write_tenths)) = (tenths(reads), tenths(writes));
    write!(
        f,
        " ({read}.{read_tenths} VMREADs, {write}.{write_tenths} VMWRITEs)"
    )
}

/// The most frequent reason after `before`, in the order of falling counts and
/// rising reasons; those that never happened are left out.
fn next(counts: &[u64], before: Option<usize>) -> Option<usize> {
    let rank = |reason: usize| (counts[reason], usize::MAX - reason);
    (0..counts.len())
        .filter(|reason| counts[*reason] > 0)
        .filter(|reason| before.is_none_or(|before| rank(*reason) < rank(before)))
        .max_by_key(|reason| rank(*reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn the_most_frequent_comes_first_and_nothing_is_lost() {
        let mut counts = [0; exit_reason::REASONS];
        assert_eq!(Exits(&counts).to_string(), "0 exits");
        counts[12] = 5;
        counts[30] = 70;
        counts[10] = 5;
        assert_eq!(
            Exits(&counts).to_string(),
            "80 exits: I/O 70, CPUID 5, HLT 5"
        );
        counts[40..45].fill(1);
        assert_eq!(
            Exits(&counts).to_string(),
            "85 exits: I/O 70, CPUID 5, HLT 5, PAUSE 1, \
             entry failure: machine check 1, unknown 1, others 2"
        );
    }
}
