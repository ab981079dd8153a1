//! How fast the time-stamp counter runs, and what time it is.
//!
//! The counter is measured against a clock of known frequency: channel 2 of
//! the PIT, and the ACPI power-management timer where there is one. What CPUID
//! claims (leaves 0x15 and 0x16) is believed only when the measurement agrees
//! to 1 %, and is then the more exact figure: emulated CPUs claim the frequency
//! of the model they imitate.

pub mod rtc;

use super::acpi::PmTimer;
use super::local_apic;
use crate::arch::cpu::{self, rdtsc, without_interrupts};
use crate::arch::port::{inb, inl, outb};
use core::sync::atomic::{AtomicU64, Ordering};

/// Frequency of the PIT, in Hz.
const PIT_HZ: u64 = 1_193_182;
/// Frequency of the power-management timer, in Hz (ACPI 6.5, 4.8.3.3).
const PM_TIMER_HZ: u64 = 3_579_545;
/// Counts of the PIT in one measurement: 10 ms.
const PIT_COUNT: u16 = 11_932;
/// Counts of the power-management timer in one measurement: 10 ms.
const PM_TIMER_COUNT: u32 = 35_795;
/// Measurements until two agree.
const ATTEMPTS: usize = 4;
/// Ticks after which a clock is taken for dead: 10 ms at 20 GHz.
const PATIENCE: u64 = 200_000_000;
/// Polls below which a clock is taken for a port that nobody drives. Even
/// where a port access costs tens of thousands of ticks there are more in 10 ms.
const FEWEST_POLLS: u32 = 8;

const PORT_B: u16 = 0x61;
/// Port B: the gate of PIT channel 2.
const GATE_2: u8 = 1 << 0;
/// Port B: the speaker.
const SPEAKER: u8 = 1 << 1;
/// Port B: the output of PIT channel 2.
const OUT_2: u8 = 1 << 5;

/// Ticks a second. Written before other CPUs are started: relaxed.
static TSC_HZ: AtomicU64 = AtomicU64::new(0);

/// What the frequency was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// CPUID, confirmed by a measurement.
    CpuidConfirmed,
    /// CPUID, with no clock to measure against.
    CpuidOnly,
    /// A measurement that CPUID contradicts or says nothing about.
    Measured,
}

/// The time-stamp counter's frequency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFrequency {
    /// Ticks a second.
    pub hz: u64,
    pub source: Source,
    /// The CPUID figure that lost against the measurement, in Hz.
    pub refuted: Option<u64>,
}

/// Finds the frequency of the time-stamp counter, which takes some 20 ms;
/// `None` on a machine with no clock at all.
pub fn init(pm_timer: Option<PmTimer>) -> Option<TscFrequency> {
    let measured = without_interrupts(|| {
        let pit = measure(pit_ticks, PIT_HZ, PIT_COUNT.into());
        // The second opinion costs 20 ms, and decides when CPUID and PIT differ.
        let pm = pm_timer.and_then(|timer| {
            measure(|| pm_timer_ticks(timer), PM_TIMER_HZ, PM_TIMER_COUNT.into())
        });
        combine(pit, pm)
    });
    let frequency = choose(measured, cpuid_hz())?;
    TSC_HZ.store(frequency.hz, Ordering::Relaxed);
    Some(frequency)
}

/// Ticks a second, as [`init`] found; 0 before.
#[inline]
pub fn tsc_hz() -> u64 {
    TSC_HZ.load(Ordering::Relaxed)
}

/// Measures and prepares the calling CPU's local APIC timer. After [`init`].
pub fn init_timer() {
    let window = tsc_hz() / 100;
    let mut ticks = 0;
    let counted = without_interrupts(|| {
        local_apic::measure(|| {
            let start = rdtsc();
            while ticks < window {
                core::hint::spin_loop();
                ticks = rdtsc().wrapping_sub(start);
            }
        })
    });
    local_apic::init_timer(scale(counted.into(), tsc_hz(), ticks).unwrap_or(0));
}

/// Interrupts the calling CPU once, `ticks` of the time-stamp counter from now.
pub fn arm(ticks: u64) {
    local_apic::arm(ticks, tsc_hz());
}

/// `count` times `numerator` over `denominator`, where that is a number.
fn scale(count: u64, numerator: u64, denominator: u64) -> Option<u64> {
    let product = u128::from(count) * u128::from(numerator);
    u64::try_from(product.checked_div(u128::from(denominator))?).ok()
}

/// Whether two frequencies differ by at most 1 %.
fn agree(a: u64, b: u64) -> bool {
    u128::from(a.abs_diff(b)) * 100 <= u128::from(a.max(b))
}

/// The frequency in Hz, from `attempt`s that each give ticks in `count`
/// periods of a clock of `clock_hz`.
fn measure(mut attempt: impl FnMut() -> Option<u64>, clock_hz: u64, count: u64) -> Option<u64> {
    let mut best: Option<u64> = None;
    for _ in 0..ATTEMPTS {
        let Some(hz) = attempt()
            .and_then(|ticks| scale(ticks, clock_hz, count))
            .filter(|&hz| hz > 0)
        else {
            continue;
        };
        match best {
            // What disturbs a measurement (an SMI) makes it longer, so of two the smaller is right.
            Some(before) if agree(before, hz) => return Some(before.min(hz)),
            _ => best = Some(best.map_or(hz, |before| before.min(hz))),
        }
    }
    best
}

/// One figure from the two clocks. Where they differ, the power-management
/// timer is believed: its counter is read, while the PIT's end is waited for.
fn combine(pit: Option<u64>, pm_timer: Option<u64>) -> Option<u64> {
    match (pit, pm_timer) {
        (Some(pit), Some(pm)) if !agree(pit, pm) => {
            log::warn!(
                "time-stamp counter: {pit} Hz by the PIT, {pm} Hz by the power-management timer"
            );
            Some(pm)
        }
        (Some(pit), _) => Some(pit),
        (None, pm) => pm,
    }
}

/// What CPUID says, against what was measured.
fn choose(measured: Option<u64>, cpuid: Option<u64>) -> Option<TscFrequency> {
    let frequency = |hz, source, refuted| {
        Some(TscFrequency {
            hz,
            source,
            refuted,
        })
    };
    match (measured, cpuid) {
        (Some(measured), Some(cpuid)) if agree(measured, cpuid) => {
            frequency(cpuid, Source::CpuidConfirmed, None)
        }
        (Some(measured), cpuid) => frequency(measured, Source::Measured, cpuid),
        (None, Some(cpuid)) => frequency(cpuid, Source::CpuidOnly, None),
        (None, None) => None,
    }
}

/// The frequency that CPUID claims (SDM volume 3, 19.7.3): leaf 0x15, whose
/// crystal may be left out, else the base frequency of leaf 0x16.
fn cpuid_hz() -> Option<u64> {
    let cpuid = cpu::cpuid();
    let base = cpuid
        .get_processor_frequency_info()
        .map_or(0, |leaf| leaf.processor_base_frequency());
    let ratio = cpuid.get_tsc_info().map_or((0, 0, 0), |leaf| {
        (
            leaf.denominator(),
            leaf.numerator(),
            leaf.nominal_frequency(),
        )
    });
    claimed_hz(ratio, base)
}

/// `ratio` is EAX, EBX, ECX of leaf 0x15; `base_mhz` is EAX of leaf 0x16.
fn claimed_hz((denominator, numerator, crystal): (u32, u32, u32), base_mhz: u16) -> Option<u64> {
    let exact = scale(crystal.into(), numerator.into(), denominator.into());
    let base = u64::from(base_mhz) * 1_000_000;
    exact
        .filter(|&hz| hz > 0)
        .or(Some(base))
        .filter(|&hz| hz > 0)
}

/// Polls until `done`; the ticks from `start` to then. `None` when that comes
/// too early or never.
fn wait(start: u64, mut done: impl FnMut() -> bool) -> Option<u64> {
    let mut polls = 0u32;
    loop {
        let over = done();
        let ticks = rdtsc().wrapping_sub(start);
        if over {
            return (polls >= FEWEST_POLLS).then_some(ticks);
        }
        if ticks > PATIENCE {
            return None;
        }
        polls = polls.saturating_add(1);
    }
}

/// Ticks in [`PIT_COUNT`] periods of the PIT: channel 2 in mode 0, whose
/// output rises at the end (82C54 data sheet).
fn pit_ticks() -> Option<u64> {
    let [low, high] = PIT_COUNT.to_le_bytes();
    // SAFETY: channel 2 and its gate serve the speaker and nothing else; the
    // speaker is off.
    unsafe {
        let before = inb(PORT_B);
        outb(PORT_B, before & !(SPEAKER | GATE_2) | GATE_2);
        outb(0x43, 0b1011_0000); // channel 2, both bytes, mode 0, binary
        outb(0x42, low);
        outb(0x42, high); // counting starts
        let start = rdtsc();
        let ticks = wait(start, || inb(PORT_B) & OUT_2 != 0);
        outb(PORT_B, before & !SPEAKER);
        ticks
    }
}

/// Ticks in [`PM_TIMER_COUNT`] periods of the power-management timer, scaled
/// from those that passed.
fn pm_timer_ticks(timer: PmTimer) -> Option<u64> {
    let mask = if timer.wide { u32::MAX } else { 0xff_ffff };
    // SAFETY: reading the counter has no side effect.
    let read = || unsafe { inl(timer.port) } & mask;
    let first = read();
    let start = rdtsc();
    let mut passed = 0;
    let ticks = wait(start, || {
        passed = read().wrapping_sub(first) & mask;
        passed >= PM_TIMER_COUNT
    })?;
    scale(ticks, PM_TIMER_COUNT.into(), passed.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_claim_that_disagrees_by_more_than_a_percent_loses() {
        let measured = Some(400_000_000);
        let claim = choose(measured, Some(1_497_600_000)).unwrap();
        assert_eq!(
            claim,
            TscFrequency {
                hz: 400_000_000,
                source: Source::Measured,
                refuted: Some(1_497_600_000)
            }
        );
        let claim = choose(measured, Some(403_000_000)).unwrap();
        assert_eq!(
            claim,
            TscFrequency {
                hz: 403_000_000,
                source: Source::CpuidConfirmed,
                refuted: None
            }
        );
        assert_eq!(choose(measured, None).unwrap().source, Source::Measured);
        assert_eq!(choose(None, Some(5)).unwrap().source, Source::CpuidOnly);
        assert_eq!(choose(None, None), None);
    }

    #[test]
    fn leaf_15_is_used_when_complete_else_leaf_16() {
        assert_eq!(claimed_hz((2, 168, 24_000_000), 2100), Some(2_016_000_000));
        assert_eq!(claimed_hz((2, 168, 0), 2100), Some(2_100_000_000));
        assert_eq!(claimed_hz((0, 0, 0), 0), None);
        assert_eq!(claimed_hz((0, 7, 24_000_000), 0), None);
    }

    #[test]
    fn a_disturbed_measurement_is_repeated() {
        let mut ticks = [30_000_000, 24_000_100, 24_000_000].into_iter();
        assert_eq!(measure(|| ticks.next(), 100, 1), Some(2_400_000_000));
        let mut ticks = [None, Some(500), Some(500)].into_iter();
        assert_eq!(measure(|| ticks.next().flatten(), 100, 1), Some(50_000));
        assert_eq!(measure(|| None, 100, 1), None);
        assert_eq!(measure(|| Some(0), 100, 1), None);
    }

    #[test]
    fn the_clocks_are_checked_against_each_other() {
        assert_eq!(combine(Some(1000), Some(1005)), Some(1000));
        assert_eq!(combine(Some(1000), Some(1200)), Some(1200));
        assert_eq!(combine(None, Some(1200)), Some(1200));
        assert_eq!(combine(None, None), None);
    }

    #[test]
    fn a_port_that_nobody_drives_is_no_clock() {
        assert_eq!(wait(rdtsc(), || true), None);
        let mut polls = 0;
        let real = wait(rdtsc(), || {
            polls += 1;
            polls > 100
        });
        assert!(real.is_some());
        assert_eq!(wait(rdtsc().wrapping_sub(2 * PATIENCE), || false), None);
    }

    proptest! {
        #[test]
        fn agreement_is_symmetric_and_about_a_percent(a in 1u64..u64::MAX / 2, permille in 0u64..40) {
            let b = a - (u128::from(a) * u128::from(permille) / 1000) as u64;
            prop_assert_eq!(agree(a, b), agree(b, a));
            if permille <= 9 { prop_assert!(agree(a, b)); }
            if permille >= 11 && a > 100_000 { prop_assert!(!agree(a, b)); }
        }
    }
}
