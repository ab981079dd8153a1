//! VMREADs and VMWRITEs, counted: a build for the benchmark (feature `count-vmcs`).
//!
//! What is counted from one exit to the next belongs to the first one's reason. A
//! guest may ask for the sums by a hypercall, [`HYPERCALL`].

use super::exit_reason::REASONS;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

/// RAX of the hypercall that returns the sums in RAX, RCX and RDX.
pub const HYPERCALL: u64 = u64::from_le_bytes(*b"vmcounts");

/// Exits, VMREADs and VMWRITEs.
type Counts = [AtomicU64; 3];

const EXITS: usize = 0;
const READS: usize = 1;
const WRITES: usize = 2;

// One vCPU runs where this is built in, and counts: relaxed.
/// Since [`reset`].
static SUMS: Counts = [const { AtomicU64::new(0) }; 3];
/// [`SUMS`] at the last exit, and its reason.
static BEFORE: Counts = [const { AtomicU64::new(0) }; 3];
static LAST: AtomicUsize = AtomicUsize::new(REASONS);
static BY_REASON: [Counts; REASONS] = [const { [const { AtomicU64::new(0) }; 3] }; REASONS];

/// A VMREAD.
#[inline(always)]
pub fn read() {
    SUMS[READS].fetch_add(1, Relaxed);
}

/// A VMWRITE.
#[inline(always)]
pub fn write() {
    SUMS[WRITES].fetch_add(1, Relaxed);
}

/// An exit for this reason, which the stub has read by a VMREAD.
pub extern "C" fn exit(reason: usize) {
    settle(reason);
    SUMS[EXITS].fetch_add(1, Relaxed);
    read();
}

/// Gives what was counted since the last exit to its reason; the next has `reason`.
fn settle(reason: usize) {
    let last = LAST.swap(reason, Relaxed);
    let Some(counts) = BY_REASON.get(last) else {
        return;
    };
    for ((sum, before), count) in SUMS.iter().zip(&BEFORE).zip(counts) {
        let now = sum.load(Relaxed);
        count.fetch_add(now - before.swap(now, Relaxed), Relaxed);
    }
}

/// Begins again with the counts by reason: another guest is to run.
pub fn reset() {
    settle(REASONS);
    BY_REASON
        .iter()
        .flatten()
        .for_each(|count| count.store(0, Relaxed));
}

/// Exits, VMREADs and VMWRITEs so far.
pub fn sums() -> [u64; 3] {
    SUMS.each_ref().map(|sum| sum.load(Relaxed))
}

/// The mean numbers of VMREADs and VMWRITEs for each exit with this reason, in tenths.
pub fn means(reason: usize) -> Option<[u64; 2]> {
    let [exits, reads, writes] = BY_REASON
        .get(reason)?
        .each_ref()
        .map(|count| count.load(Relaxed));
    (exits > 0).then(|| [reads, writes].map(|count| (count * 10 + exits / 2) / exits))
}
