use super::*;
use proptest::prelude::*;

const HZ: u64 = 1_000_000_000;
/// 2024-12-31 23:59:58, a Tuesday.
const TIME: u64 = 1_735_689_598;
const GIB: u64 = 1 << 30;

fn rtc() -> Rtc {
    let ram = MemorySize {
        below_4g: 3 * GIB,
        above_4g: 5 * GIB,
    };
    Rtc::new(Clock::new(HZ), Ticks(7), TIME, ram)
}

/// A moment after power-on.
fn at(milliseconds: u64) -> Ticks {
    Ticks(7 + milliseconds * HZ / 1000)
}

fn read(rtc: &mut Rtc, now: Ticks, index: u8) -> u8 {
    rtc.select(index);
    rtc.read(now)
}

fn write(rtc: &mut Rtc, now: Ticks, index: u8, value: u8) {
    rtc.select(index);
    rtc.write(now, value);
}

/// Century, year, month, day, weekday, hours, minutes, seconds.
fn date(rtc: &mut Rtc, now: Ticks) -> [u8; 8] {
    [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| read(rtc, now, index))
}

#[test]
fn it_shows_the_time_and_a_year_ends() {
    let mut rtc = rtc();
    let before = [0x20, 0x24, 0x12, 0x31, 3, 0x23, 0x59, 0x58];
    assert_eq!(date(&mut rtc, at(0)), before);
    let after = [0x20, 0x25, 0x01, 0x01, 4, 0x00, 0x00, 0x00];
    assert_eq!(date(&mut rtc, at(2000)), after);
}

#[test]
fn formats() {
    let mut rtc = rtc();
    write(&mut rtc, at(0), 0x0b, 0x06);
    assert_eq!(date(&mut rtc, at(0)), [20, 24, 12, 31, 3, 23, 59, 58]);
    write(&mut rtc, at(0), 0x0b, 0x04);
    assert_eq!(read(&mut rtc, at(0), 4), 0x80 | 11);
    write(&mut rtc, at(0), 0x0b, 0x00);
    assert_eq!(read(&mut rtc, at(0), 4), 0x91);
    assert_eq!(read(&mut rtc, at(2000), 4), 0x12);
}

/// Linux's mc146818_get_time: the time may be read while the update bit is
/// clear and is then good for at least 244 microseconds.
#[test]
fn the_update_bit_warns_in_time() {
    let mut rtc = rtc();
    assert_eq!(read(&mut rtc, at(0), 0x0a), 0x26);
    assert_eq!(read(&mut rtc, at(997), 0x0a), 0x26);
    assert_eq!(read(&mut rtc, at(998), 0x0a), 0xa6);
    assert_eq!(read(&mut rtc, at(999), 0), 0x58);
    assert_eq!(read(&mut rtc, at(1000), 0x0a), 0x26);
    assert_eq!(read(&mut rtc, at(1000), 0), 0x59);
    write(&mut rtc, at(1000), 0x0b, 0x82);
    assert_eq!(read(&mut rtc, at(1999), 0x0a), 0x26);
}

/// Linux's mc146818_set_time: SET, divider reset, the fields, and back.
#[test]
fn the_time_is_set_and_runs_on_half_a_second_later() {
    let mut rtc = rtc();
    write(&mut rtc, at(0), 0x0b, 0x82);
    write(&mut rtc, at(0), 0x0a, 0x76);
    for (index, value) in [
        (9, 0x00),
        (8, 0x02),
        (7, 0x28),
        (6, 2),
        (4, 0x23),
        (2, 0x59),
        (0, 0x59),
        (0x32, 0x20),
    ] {
        write(&mut rtc, at(100), index, value);
    }
    let set = [0x20, 0x00, 0x02, 0x28, 2, 0x23, 0x59, 0x59];
    assert_eq!(date(&mut rtc, at(5000)), set);
    write(&mut rtc, at(5000), 0x0b, 0x02);
    write(&mut rtc, at(5000), 0x0a, 0x26);
    assert_eq!(date(&mut rtc, at(5499)), set);
    let next = [0x20, 0x00, 0x02, 0x29, 3, 0x00, 0x00, 0x00];
    assert_eq!(date(&mut rtc, at(5501)), next);
}

#[test]
fn a_field_can_be_written_while_running() {
    let mut rtc = rtc();
    write(&mut rtc, at(300), 2, 0x10);
    assert_eq!(date(&mut rtc, at(300))[5..], [0x23, 0x10, 0x58]);
    assert_eq!(date(&mut rtc, at(1000))[5..], [0x23, 0x10, 0x59]);
}

#[test]
fn update_interrupts_come_at_the_second_until_register_c_is_read() {
    let mut rtc = rtc();
    assert_eq!(rtc.deadline(), None);
    write(&mut rtc, at(10), 0x0b, 0x12);
    assert_eq!(rtc.deadline(), Some(at(1000)));
    rtc.advance(at(1000));
    assert!(rtc.line().level() && rtc.line().take_edge());
    assert_eq!(rtc.deadline(), None);
    rtc.advance(at(5000));
    assert!(!rtc.line().take_edge());
    assert_eq!(read(&mut rtc, at(5000), 0x0c) & 0x90, 0x90);
    assert!(!rtc.line().level());
    assert_eq!(read(&mut rtc, at(5000), 0x0c), 0);
    assert_eq!(rtc.deadline(), Some(at(6000)));
}

#[test]
fn the_periodic_interrupt_has_its_rate() {
    for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
        let mut rtc = rtc();
        write(&mut rtc, at(0), 0x0a, 0x20 | rate);
        write(&mut rtc, at(0), 0x0b, 0x42);
        let mut edges = 0;
        while let Some(deadline) = rtc.deadline().filter(|&t| t <= at(1000)) {
            rtc.advance(deadline);
            edges += u64::from(rtc.line().take_edge());
            assert_eq!(read(&mut rtc, deadline, 0x0c) & 0xc0, 0xc0);
        }
        assert_eq!(edges, hz);
    }
}

#[test]
fn the_alarm_rings_at_its_time() {
    let mut rtc = rtc();
    for (index, value) in [(5, 0x00), (3, 0x00), (1, 0x03), (0x0b, 0x22)] {
        write(&mut rtc, at(0), index, value);
    }
    assert_eq!(rtc.deadline(), Some(at(5000)));
    rtc.advance(at(4999));
    assert!(!rtc.line().level());
    rtc.advance(at(5000));
    assert!(rtc.line().level());
    assert_eq!(read(&mut rtc, at(5000), 0x0c) & 0xa0, 0xa0);
    assert_eq!(rtc.deadline(), Some(at(5000 + 86_400_000)));
    // Every second, and never.
    for index in [1, 3, 5] {
        write(&mut rtc, at(5000), index, 0xff);
    }
    assert_eq!(rtc.deadline(), Some(at(6000)));
    write(&mut rtc, at(5000), 3, 0x60);
    assert_eq!(rtc.deadline(), None);
}

#[test]
fn an_alarm_that_nobody_looked_at_is_noticed() {
    let mut rtc = rtc();
    for (index, value) in [(5, 0x00), (3, 0x01), (1, 0x00)] {
        write(&mut rtc, at(0), index, value);
    }
    rtc.advance(at(61_999));
    assert_eq!(rtc.flags & c::ALARM, 0);
    rtc.advance(at(86_000_000));
    assert_ne!(rtc.flags & c::ALARM, 0);
}

#[test]
fn memory_sizes_are_where_firmware_looks() {
    let mut rtc = rtc();
    let mut word =
        |low| u16::from_le_bytes([read(&mut rtc, at(0), low), read(&mut rtc, at(0), low + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x17), 0xffff);
    assert_eq!(word(0x30), 0xffff);
    assert_eq!(u64::from(word(0x34)) << 16, 3 * GIB - (16 << 20));
    assert_eq!(u64::from(word(0x5b)) << 16 | 1 << 32, 5 * GIB);
    assert_eq!(read(&mut rtc, at(0), 0x5d), 1);
    let sum: u16 = (0x10..=0x2d)
        .map(|index| u16::from(read(&mut rtc, at(0), index)))
        .sum();
    assert_eq!(read(&mut rtc, at(0), 0x2e), (sum >> 8) as u8);
    assert_eq!(read(&mut rtc, at(0), 0x2f), sum as u8);
}

#[test]
fn the_index_port_masks_the_nmi_and_memory_keeps() {
    let mut rtc = rtc();
    write(&mut rtc, at(0), 0x80 | 0x7f, 0x5a);
    assert!(rtc.nmi_masked());
    assert_eq!(read(&mut rtc, at(0), 0x7f), 0x5a);
    assert!(!rtc.nmi_masked());
    assert_eq!(read(&mut rtc, at(0), 0x0d), 0x80);
}

proptest! {
    #[test]
    fn nothing_a_guest_does_goes_wrong(
        time in any::<u64>(),
        hz in prop_oneof![1..1000u64, 1_000_000..4_000_000_000u64],
        steps in prop::collection::vec((0..3u8, prop_oneof![0..16u8, any::<u8>()], any::<u8>(), prop_oneof![0..1000u64, 0..10 * HZ, any::<u64>()]), 0..100),
    ) {
        let mut now = Ticks(0);
        let mut rtc = Rtc::new(Clock::new(hz), now, time, MemorySize { below_4g: time, above_4g: time });
        for (what, index, value, pause) in steps {
            now = Ticks(now.0.saturating_add(pause));
            rtc.select(index);
            match what {
                0 => { rtc.read(now); }
                1 => rtc.write(now, value),
                _ => rtc.advance(now),
            }
            // Unless time itself ends.
            prop_assert!(rtc.deadline().is_none_or(|t| t > now || t.0 == u64::MAX || rtc.cycle(now) > u64::MAX >> 1));
        }
    }

    #[test]
    fn the_running_clock_never_goes_back(steps in prop::collection::vec(0..3 * HZ, 1..50)) {
        let mut rtc = rtc();
        let (mut now, mut last) = (at(0), [0; 8]);
        for step in steps {
            now.0 += step;
            let mut shown = date(&mut rtc, now);
            shown[4] = 0;
            prop_assert!(shown >= last);
            last = shown;
        }
    }
}
