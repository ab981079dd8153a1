//! The timer through the registers. The counter has 4 GHz and the timer's
//! clock 1 GHz, so a millisecond is 4,000,000 ticks and 1,000,000 cycles.

use super::*;

const ONE_SHOT: u64 = 0xec;
const PERIODIC: u64 = 0x2_00ec;
const TSC_DEADLINE: u64 = 0x4_00ec;
const MASKED: u64 = 0x1_0000;

fn counting(mode: u64, count: u64) -> LocalApic {
    let mut apic = xapic();
    set(&mut apic, 0x320, mode);
    set(&mut apic, 0x3e0, 0xb);
    set(&mut apic, 0x380, count);
    apic
}

fn count(apic: &mut LocalApic, now: u64) -> u64 {
    apic.mmio_read(Ticks(now), 0x390, Width::Dword)
}

fn set_at(apic: &mut LocalApic, now: u64, offset: u64, value: u64) {
    apic.mmio_write(Ticks(now), offset, Width::Dword, value);
}

#[test]
fn one_shot_counts_down_and_expires_once() {
    let mut apic = counting(ONE_SHOT, 1_000_000);
    assert_eq!(apic.deadline(), Some(Ticks(4_000_000)));
    assert_eq!(count(&mut apic, 0), 1_000_000);
    assert_eq!(count(&mut apic, 1_000_000), 750_000);
    apic.advance(Ticks(3_999_999));
    assert_eq!(apic.pending(), None);
    apic.advance(Ticks(4_000_000));
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.deadline(), None);
    assert_eq!(count(&mut apic, 5_000_000), 0);
    assert_eq!(get(&mut apic, 0x380), 1_000_000);
    apic.advance(Ticks(u64::MAX));
    assert_eq!(highest(apic.page(), register::IRR), None);
}

#[test]
fn a_slow_counter_is_as_fast_as_the_timer() {
    let clock = Clock::new(50_000_000);
    assert_eq!(input_hz(clock), 50_000_000);
    let mut apic = LocalApic::new(3, false, clock);
    set(&mut apic, 0xf0, 0x1ff);
    set(&mut apic, 0x320, PERIODIC);
    set(&mut apic, 0x3e0, 0xb);
    set(&mut apic, 0x380, 0x1_0000);
    assert_eq!(apic.deadline(), Some(Ticks(0x1_0000)));
    assert_eq!(count(&mut apic, 0x8000), 0x8000);
    // 20 microseconds between two at the least.
    set(&mut apic, 0x380, 1);
    apic.advance(Ticks(1));
    assert_eq!(apic.deadline(), Some(Ticks(1001)));
}

#[test]
fn the_divider() {
    for (value, divisor) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        let mut apic = xapic();
        set(&mut apic, 0x320, ONE_SHOT);
        set(&mut apic, 0x3e0, value);
        set(&mut apic, 0x380, 1000);
        assert_eq!(apic.deadline(), Some(Ticks(4000 * divisor)), "{value:#b}");
    }
}

#[test]
fn a_new_divider_takes_the_count_from_where_it_is() {
    let mut apic = counting(ONE_SHOT, 1_000_000);
    set_at(&mut apic, 1_000_000, 0x3e0, 0);
    assert_eq!(count(&mut apic, 1_000_000), 750_000);
    assert_eq!(apic.deadline(), Some(Ticks(7_000_000)));
    assert_eq!(count(&mut apic, 3_000_000), 500_000);
}

#[test]
fn zero_stops() {
    for mode in [ONE_SHOT, PERIODIC] {
        let mut apic = counting(mode, 1_000_000);
        set_at(&mut apic, 5, 0x380, 0);
        assert_eq!(apic.deadline(), None);
        assert_eq!(count(&mut apic, 6), 0);
    }
}

#[test]
fn periods_do_not_drift() {
    let mut apic = counting(PERIODIC, 1_000_000);
    for period in 1..10 {
        assert_eq!(apic.deadline(), Some(Ticks(4_000_000 * period)));
        apic.advance(Ticks(4_000_000 * period + 123));
        assert_eq!(apic.acknowledge(), Some(0xec));
        apic.eoi();
    }
    assert_eq!(count(&mut apic, 4_000_000 * 9 + 1_000_000), 750_000);
}

#[test]
fn periods_that_were_missed_are_one_interrupt() {
    let mut apic = counting(PERIODIC, 1_000_000);
    apic.advance(Ticks(4_000_000 * 1000 + 5));
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.deadline(), Some(Ticks(4_000_000 * 1001)));
    assert_eq!(highest(apic.page(), register::IRR), None);
}

#[test]
fn a_tiny_period_is_no_flood() {
    // A cycle; 7 cycles; a cycle less than the shortest period.
    for period in [1, 7, MIN_PERIOD - 1] {
        let mut apic = counting(PERIODIC, period);
        let mut last = apic.deadline().unwrap();
        for _ in 0..100 {
            apic.advance(last);
            let next = apic.deadline().unwrap();
            assert!(next.0 - last.0 >= 80_000, "20 microseconds");
            assert!(next.0 - last.0 <= 160_000);
            last = next;
        }
        let value = count(&mut apic, last.0 + 1);
        assert!((1..=period).contains(&value));
    }
}

#[test]
fn a_masked_timer_counts_without_a_deadline_and_without_an_interrupt_later() {
    for mode in [ONE_SHOT, PERIODIC] {
        let mut apic = counting(mode | MASKED, 1_000_000);
        assert_eq!(apic.deadline(), None);
        assert_eq!(count(&mut apic, 1_000_000), 750_000);
        set_at(&mut apic, 5_000_000, 0x320, mode);
        assert_eq!(apic.pending(), None);
        let next = (mode == PERIODIC).then_some(Ticks(8_000_000));
        assert_eq!(apic.deadline(), next);
    }
}

#[test]
fn what_expired_is_delivered_before_it_is_masked() {
    let mut apic = counting(ONE_SHOT, 1_000_000);
    set_at(&mut apic, 4_000_000, 0x320, ONE_SHOT | MASKED);
    assert_eq!(apic.acknowledge(), Some(0xec));
}

#[test]
fn one_shot_becomes_periodic_and_back() {
    let mut apic = counting(ONE_SHOT, 1_000_000);
    set_at(&mut apic, 1_000_000, 0x320, PERIODIC);
    assert_eq!(count(&mut apic, 1_000_000), 750_000);
    apic.advance(Ticks(4_000_000));
    assert_eq!(apic.deadline(), Some(Ticks(8_000_000)));
    set_at(&mut apic, 5_000_000, 0x320, ONE_SHOT);
    apic.advance(Ticks(8_000_000));
    assert_eq!(apic.deadline(), None);
}

#[test]
fn a_tsc_deadline() {
    let mut apic = xapic();
    apic.set_tsc_deadline(NOW, 1000);
    assert_eq!(apic.tsc_deadline(NOW), 0, "another mode");
    assert_eq!(apic.deadline(), None);
    set(&mut apic, 0x320, TSC_DEADLINE);
    apic.set_tsc_deadline(NOW, 1000);
    assert_eq!(apic.deadline(), Some(Ticks(1000)));
    assert_eq!(apic.tsc_deadline(Ticks(5)), 1000);
    set(&mut apic, 0x380, 77);
    assert_eq!(get(&mut apic, 0x380), 0, "no count in this mode");
    assert_eq!(count(&mut apic, 5), 0);
    apic.advance(Ticks(1000));
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.tsc_deadline(Ticks(1001)), 0);
    assert_eq!(apic.deadline(), None);
    apic.eoi();

    apic.set_tsc_deadline(Ticks(2000), 1999);
    assert_eq!(apic.acknowledge(), Some(0xec), "in the past: at once");
    apic.eoi();
    apic.set_tsc_deadline(Ticks(2000), 3000);
    apic.set_tsc_deadline(Ticks(2000), 0);
    assert_eq!(apic.deadline(), None);
}

#[test]
fn a_change_from_or_to_tsc_deadline_disarms() {
    let mut apic = counting(ONE_SHOT, 1_000_000);
    set(&mut apic, 0x320, TSC_DEADLINE);
    assert_eq!(apic.deadline(), None);
    assert_eq!(get(&mut apic, 0x380), 0);
    apic.set_tsc_deadline(NOW, 1000);
    set(&mut apic, 0x320, PERIODIC);
    assert_eq!(apic.deadline(), None);
    set(&mut apic, 0x320, TSC_DEADLINE);
    assert_eq!(apic.tsc_deadline(NOW), 0);
    // The reserved mode.
    apic.set_tsc_deadline(NOW, 1000);
    set(&mut apic, 0x320, 0x6_00ec);
    set(&mut apic, 0x380, 1000);
    assert_eq!(apic.deadline(), None);
}

#[test]
fn an_illegal_vector_of_the_timer_is_an_error() {
    let mut apic = counting(0x0c, 1000);
    apic.advance(Ticks(4000));
    assert_eq!(errors(&mut apic), 1 << 6);
    assert_eq!(apic.pending(), None);
}
