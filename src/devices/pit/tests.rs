use super::*;
use proptest::prelude::*;

const HZ: u64 = 2_000_000_000;

fn pit() -> Pit {
    Pit::new(Clock::new(HZ), Ticks(5))
}

/// The first tick in which `cycles` cycles have passed.
fn at(cycles: u64) -> Ticks {
    Ticks(5 + Clock::new(HZ).ticks(cycles, PIT_HZ))
}

fn start(pit: &mut Pit, channel: u8, mode: u8, count: u16) {
    pit.write(at(0), 3, channel << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    pit.write(at(0), channel, low);
    pit.write(at(0), channel, high);
    pit.line().take_edge();
}

fn count(pit: &mut Pit, now: Ticks, channel: u8) -> u16 {
    pit.write(now, 3, channel << 6);
    u16::from_le_bytes([pit.read(now, channel), pit.read(now, channel)])
}

/// The levels of channel 2's output in the cycles of `range`.
fn wave(pit: &mut Pit, range: core::ops::Range<u64>) -> String {
    range
        .map(|cycle| if pit.output2(at(cycle)) { '#' } else { '_' })
        .collect()
}

#[test]
fn mode_0_rises_once_when_the_count_is_over() {
    let mut pit = pit();
    start(&mut pit, 0, 0, 100);
    assert_eq!(pit.deadline(), Some(at(101)));
    assert_eq!(count(&mut pit, at(51), 0), 50);
    pit.advance(at(100));
    assert!(!pit.line().level());
    pit.advance(at(101));
    assert!(pit.line().level() && pit.line().take_edge());
    assert_eq!(pit.deadline(), None);
    // The count goes on past zero.
    assert_eq!(count(&mut pit, at(102), 0), 0xffff);
}

#[test]
fn mode_0_is_stopped_by_the_first_byte_of_a_new_count() {
    let mut pit = pit();
    start(&mut pit, 0, 0, 100);
    pit.write(at(50), 0, 0x10);
    pit.advance(at(1000));
    assert!(!pit.line().level());
    pit.write(at(1000), 0, 0x00);
    pit.advance(at(1017));
    assert!(pit.line().take_edge());
}

#[test]
fn mode_2_is_periodic_and_an_hour_is_one_edge() {
    let mut pit = pit();
    start(&mut pit, 0, 2, 11932);
    assert_eq!(pit.deadline(), Some(at(11933)));
    pit.advance(at(11932));
    assert!(!pit.line().level());
    pit.advance(at(11933));
    assert!(pit.line().take_edge() && pit.line().level());
    assert_eq!(pit.deadline(), Some(at(2 * 11932 + 1)));
    let later = at(PIT_HZ * 3600);
    pit.advance(later);
    assert!(pit.line().take_edge());
    assert!(!pit.line().take_edge());
    assert!(pit.deadline() > Some(later) && pit.deadline() <= Some(at(PIT_HZ * 3600 + 11932)));
}

#[test]
fn the_waves_are_those_of_the_datasheet() {
    for (mode, want) in [
        (2, "###_###_###_"),
        (3, "##__##__##__"),
        (4, "####_#######"),
    ] {
        let mut pit = pit();
        pit.set_gate2(at(0), true);
        start(&mut pit, 2, mode, 4);
        assert_eq!(wave(&mut pit, 1..13), want, "mode {mode}");
    }
    for (mode, want) in [(1, "#____#######"), (5, "#####_######")] {
        let mut pit = pit();
        start(&mut pit, 2, mode, 4);
        let before = wave(&mut pit, 4..5);
        pit.set_gate2(at(4), true);
        assert_eq!(before + &wave(&mut pit, 5..16), want, "mode {mode}");
    }
    let mut pit = pit();
    pit.set_gate2(at(0), true);
    start(&mut pit, 2, 3, 5);
    assert_eq!(wave(&mut pit, 1..11), "###__###__");
}

#[test]
fn a_new_count_takes_over_at_the_end_of_the_period() {
    let mut pit = pit();
    pit.set_gate2(at(0), true);
    start(&mut pit, 2, 2, 4);
    assert_eq!(wave(&mut pit, 1..3), "##");
    pit.write(at(2), 2, 2);
    pit.write(at(2), 2, 0);
    assert_eq!(wave(&mut pit, 3..9), "#_#_#_");

    // In mode 3 at the end of the half.
    start_at(&mut pit, 20, 3, 8);
    pit.write(at(22), 2, 4);
    pit.write(at(22), 2, 0);
    assert_eq!(wave(&mut pit, 22..33), "###__##__##");
}

fn start_at(pit: &mut Pit, cycle: u64, mode: u8, count: u8) {
    pit.write(at(cycle), 3, 0xb0 | mode << 1);
    pit.write(at(cycle), 2, count);
    pit.write(at(cycle), 2, 0);
}

#[test]
fn the_gate_stops_and_restarts() {
    let mut pit = pit();
    pit.set_gate2(at(0), true);
    start(&mut pit, 2, 0, 100);
    pit.set_gate2(at(41), false);
    assert_eq!(count(&mut pit, at(1000), 2), 60);
    pit.set_gate2(at(1000), true);
    assert!(!pit.output2(at(1059)));
    assert!(pit.output2(at(1060)));
    start_at(&mut pit, 2000, 2, 10);
    pit.set_gate2(at(2008), false);
    assert!(pit.output2(at(2010)));
    pit.set_gate2(at(3000), true);
    assert_eq!(count(&mut pit, at(3002), 2), 9);
}

/// Linux's quick_pit_calibrate: mode 0 on channel 2 with 0xffff, then the most
/// significant byte is polled for as long as it stays.
#[test]
fn linux_calibrates_against_channel_2() {
    let mut pit = pit();
    pit.set_gate2(at(0), true);
    pit.write(at(0), 3, 0xb0);
    pit.write(at(0), 2, 0xff);
    pit.write(at(0), 2, 0xff);
    let mut now = at(1);
    let mut high = 0xff;
    let mut changes = Vec::new();
    while changes.len() < 4 {
        now.0 += 3000;
        pit.read(now, 2);
        let read = pit.read(now, 2);
        if read != high {
            assert_eq!(read, high - 1);
            high = read;
            changes.push(now.0);
        }
    }
    let ticks = (changes[3] - changes[0]) as i64;
    let expected = (3 * 256 * HZ / PIT_HZ) as i64;
    assert!((ticks - expected).abs() <= 3000, "{ticks} {expected}");
}

/// Linux's pit_calibrate_tsc: the output of channel 2 in mode 0 after 10 ms.
#[test]
fn linux_calibrates_by_the_output() {
    let mut pit = pit();
    pit.set_gate2(at(0), true);
    start(&mut pit, 2, 0, 11931);
    assert!(!pit.output2(at(11931)));
    assert!(pit.output2(at(11932)));
}

#[test]
fn read_back_latches_status_then_count() {
    let mut pit = pit();
    start(&mut pit, 0, 3, 1000);
    pit.write(at(11), 3, 0xc2);
    assert_eq!(pit.read(at(600), 0), 0xb6);
    assert_eq!(pit.read(at(600), 0), (1000 - 20) as u8);
    assert_eq!(pit.read(at(600), 0), ((1000 - 20) >> 8) as u8);
    // A new count is not in the counting element before the half is over.
    pit.write(at(601), 0, 8);
    pit.write(at(601), 0, 8);
    pit.write(at(601), 3, 0xe2);
    assert_eq!(pit.read(at(601), 0), 0x76);
}

#[test]
fn a_latch_stays_until_it_was_read() {
    let mut pit = pit();
    start(&mut pit, 0, 2, 1000);
    pit.write(at(101), 3, 0x00);
    pit.write(at(501), 3, 0x00);
    assert_eq!(pit.read(at(502), 0), (900 & 0xff) as u8);
    assert_eq!(pit.read(at(503), 0), (900 >> 8) as u8);
}

#[test]
fn bcd_counts_in_decimal() {
    let mut pit = pit();
    pit.write(at(0), 3, 0x31);
    pit.write(at(0), 0, 0x00);
    pit.write(at(0), 0, 0x10);
    assert_eq!(count(&mut pit, at(2), 0), 0x0999);
    assert_eq!(pit.deadline(), Some(at(1001)));
    assert_eq!(count(&mut pit, at(1002), 0), 0x9999);
}

#[test]
fn short_periods_are_coalesced() {
    for reload in [1, 2, 3] {
        for mode in [2, 3] {
            let mut pit = pit();
            start(&mut pit, 0, mode, reload);
            let mut now = at(1);
            let mut edges = 0;
            while let Some(deadline) = pit.deadline().filter(|&t| t < at(PIT_HZ / 1000)) {
                assert!(deadline > now);
                now = deadline;
                pit.advance(now);
                edges += u64::from(pit.line().take_edge());
            }
            assert!(edges <= MAX_PERIODIC_HZ / 1000 + 1, "{edges}");
            assert_eq!(edges > 40, reload > 1, "{edges}");
        }
    }
}

proptest! {
    #[test]
    fn nothing_a_guest_does_goes_wrong(
        hz in prop_oneof![1..1000u64, 1_000_000..4_000_000_000u64],
        steps in prop::collection::vec((0..7u8, any::<u8>(), prop_oneof![0..100u64, 0..10_000_000u64, any::<u64>()]), 0..100),
    ) {
        let mut now = Ticks(0);
        let mut pit = Pit::new(Clock::new(hz), now);
        for (what, value, pause) in steps {
            now = Ticks(now.0.saturating_add(pause));
            match what {
                0..=3 => pit.write(now, what, value),
                4 => { pit.read(now, value & 3); }
                5 => pit.set_gate2(now, value & 1 != 0),
                _ => pit.advance(now),
            }
            prop_assert!(pit.deadline().is_none_or(|t| t > now || now.0 == u64::MAX));
        }
    }

    #[test]
    fn a_periodic_count_stays_within_its_reload(reload in 1..=u16::MAX, mode in 2..4u8, cycles in 1..1u64 << 40) {
        let mut pit = pit();
        start(&mut pit, 0, mode, reload);
        prop_assert!(count(&mut pit, at(cycles), 0) <= reload);
    }

    #[test]
    fn waiting_in_one_or_many_steps_is_the_same(mode in 0..6u8, reload in 2..50u16, next in 2..50u16, at_cycle in 1..60u64, end in 60..200u64) {
        let program = |pit: &mut Pit| {
            pit.set_gate2(at(0), true);
            start(pit, 2, mode, reload);
        };
        let rewrite = |pit: &mut Pit| {
            pit.write(at(at_cycle), 2, next as u8);
            pit.write(at(at_cycle), 2, 0);
        };
        let (mut patient, mut busy) = (pit(), pit());
        program(&mut patient);
        program(&mut busy);
        wave(&mut busy, 0..at_cycle);
        rewrite(&mut patient);
        rewrite(&mut busy);
        wave(&mut busy, at_cycle..end);
        prop_assert_eq!(patient.output2(at(end)), busy.output2(at(end)));
        prop_assert_eq!(count(&mut patient, at(end), 2), count(&mut busy, at(end), 2));
    }
}
