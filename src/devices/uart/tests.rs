use super::*;
use proptest::prelude::*;

const NOW: Ticks = Ticks(1_000);
const HZ: u64 = 1_000_000_000;

fn uart() -> Uart {
    Uart::new(Clock::new(HZ))
}

/// As a driver leaves it: 115200 8N1, FIFOs with trigger 8, interrupts on.
fn opened(interrupts: u8) -> Uart {
    let mut uart = uart();
    for (offset, value) in [
        (3, 0x83),
        (0, 1),
        (1, 0),
        (3, 0x03),
        (2, 0x87),
        (4, 0x0b),
        (1, interrupts),
    ] {
        uart.write(NOW, offset, value);
    }
    uart
}

fn output(uart: &mut Uart) -> Vec<u8> {
    uart.output().collect()
}

/// The steps of Linux's autoconfig().
#[test]
fn linux_takes_it_for_a_16550a() {
    let mut uart = uart();
    uart.write(NOW, 1, 0);
    assert_eq!(uart.read(NOW, 1) & 0x0f, 0);
    uart.write(NOW, 1, 0x0f);
    assert_eq!(uart.read(NOW, 1) & 0x0f, 0x0f);
    uart.write(NOW, 1, 0);
    uart.write(NOW, 4, 0x10 | 0x0a);
    assert_eq!(uart.read(NOW, 6) & 0xf0, 0x90);
    uart.write(NOW, 4, 0);
    uart.write(NOW, 3, 0);
    uart.write(NOW, 2, 0x01);
    assert_eq!(uart.read(NOW, 2) >> 6, 3);
    // No enhanced feature register of a 16650 behind the divisor latch bit.
    uart.write(NOW, 3, 0x80);
    assert_ne!(uart.read(NOW, 2), 0);
    // No 64-byte FIFO of a 16750.
    uart.write(NOW, 2, 0x21);
    assert_eq!(uart.read(NOW, 2) >> 5, 6);
    uart.write(NOW, 3, 0);
    // No UART unit enable bit of an XScale.
    uart.write(NOW, 1, 0x40);
    assert_eq!(uart.read(NOW, 1) & 0x40, 0);
    uart.write(NOW, 7, 0x5a);
    assert_eq!(uart.read(NOW, 7), 0x5a);
}

/// Linux's size_fifo().
#[test]
fn the_fifo_has_sixteen_bytes() {
    let mut uart = uart();
    uart.write(NOW, 2, 0x07);
    uart.write(NOW, 4, 0x10);
    for byte in 0..=255 {
        uart.write(NOW, 0, byte);
    }
    let mut count = 0;
    while uart.read(NOW, 5) & 1 != 0 {
        assert_eq!(uart.read(NOW, 0), count);
        count += 1;
    }
    assert_eq!(count, 16);
    assert_eq!(uart.output().next(), None, "looped back, not sent");
}

#[test]
fn looped_back_bytes_that_find_no_room_overrun() {
    let mut uart = uart();
    uart.write(NOW, 4, 0x10);
    uart.write(NOW, 0, b'a');
    uart.write(NOW, 0, b'b');
    assert_eq!(uart.read(NOW, 5), 0x63);
    assert_eq!(uart.read(NOW, 5), 0x61);
    assert_eq!(uart.read(NOW, 0), b'b');
    assert!(!uart.receive(NOW, b'c'));
}

/// Linux's test for the missing THRE interrupt: enabling it again raises it again.
#[test]
fn enabling_the_empty_interrupt_raises_it() {
    let mut uart = opened(0);
    for _ in 0..2 {
        uart.write(NOW, 1, 0x02);
        assert!(uart.line().take_edge());
        assert_eq!(uart.read(NOW, 2), 0xc2);
        assert!(!uart.line().level(), "identified is served");
        assert_eq!(uart.read(NOW, 2), 0xc1);
        uart.write(NOW, 1, 0);
    }
}

#[test]
fn each_burst_sent_raises_one_edge() {
    let mut uart = opened(0x02);
    uart.read(NOW, 2);
    uart.line().take_edge();
    for byte in b"hello" {
        uart.write(NOW, 0, *byte);
        assert!(uart.line().take_edge());
    }
    assert_eq!(output(&mut uart), b"hello");
}

#[test]
fn a_holder_that_does_not_fetch_stops_the_guest() {
    let mut uart = opened(0x02);
    let mut sent = 0;
    while uart.read(NOW, 5) & 0x20 != 0 {
        uart.write(NOW, 0, sent as u8);
        sent += 1;
    }
    assert_eq!(sent, OUTPUT_DEPTH + 1);
    assert!(uart.output_waits());
    for more in 0..FIFO_DEPTH - 1 {
        uart.write(NOW, 0, (sent + more) as u8);
    }
    assert!(!uart.line().level());
    uart.line().take_edge();
    for _ in 0..FIFO_DEPTH - 1 {
        uart.output().next();
        assert!(!uart.line().level());
    }
    uart.output().next();
    assert!(uart.line().take_edge());
    let rest = output(&mut uart);
    assert_eq!(rest.len(), OUTPUT_DEPTH);
    assert_eq!(rest.last(), Some(&((OUTPUT_DEPTH + FIFO_DEPTH - 1) as u8)));
}

#[test]
fn the_receiver_interrupts_at_its_trigger_and_falls_below_it() {
    let mut uart = opened(0x01);
    for byte in 0..7 {
        assert!(uart.receive(NOW, byte));
    }
    assert!(!uart.line().level());
    assert!(uart.receive(NOW, 7));
    assert!(uart.line().level());
    assert_eq!(uart.read(NOW, 2), 0xc4);
    assert_eq!(uart.read(NOW, 0), 0);
    assert!(!uart.line().level());
}

#[test]
fn the_rest_is_told_after_four_characters() {
    let mut uart = opened(0x01);
    uart.receive(NOW, b'x');
    let due = uart.deadline().unwrap();
    assert_eq!(due.0 - NOW.0, (40 * HZ).div_ceil(115_200));
    uart.advance(Ticks(due.0 - 1));
    assert!(!uart.line().level());
    uart.advance(due);
    assert!(uart.line().level());
    assert_eq!(uart.deadline(), None);
    assert_eq!(uart.read(due, 2), 0xcc);
    assert_eq!(uart.read(due, 0), b'x');
    assert_eq!(uart.read(due, 2), 0xc1);
    assert!(!uart.line().level());
}

#[test]
fn a_full_receiver_refuses() {
    let mut uart = opened(0x01);
    for byte in 0..16 {
        assert!(uart.receive(NOW, byte));
    }
    assert!(!uart.receive(NOW, 16));
    assert_eq!(uart.read(NOW, 5) & 0x02, 0);
    uart.read(NOW, 0);
    assert!(uart.receive(NOW, 16));
    let mut without = Uart::new(Clock::new(HZ));
    assert!(without.receive(NOW, 1));
    assert!(!without.receive(NOW, 2));
}

#[test]
fn priorities_are_line_status_data_empty_modem() {
    let mut uart = opened(0x0f);
    uart.write(NOW, 4, 0x1b);
    uart.write(NOW, 2, 0x01);
    for _ in 0..17 {
        uart.write(NOW, 0, 0);
    }
    uart.write(NOW, 4, 0x19);
    uart.write(NOW, 4, 0x08);
    assert_eq!(uart.read(NOW, 2), 0xc6);
    uart.read(NOW, 5);
    assert_eq!(uart.read(NOW, 2), 0xc4);
    for _ in 0..16 {
        uart.read(NOW, 0);
    }
    assert_eq!(uart.read(NOW, 2), 0xc2);
    assert_eq!(uart.read(NOW, 2), 0xc0);
    assert_ne!(uart.read(NOW, 6) & 0x0f, 0);
    assert_eq!(uart.read(NOW, 2), 0xc1);
}

#[test]
fn the_interrupt_needs_no_out2() {
    let mut uart = opened(0x02);
    for (modem_control, level) in [(0x03, true), (0x1b, false), (0x0b, true)] {
        uart.write(NOW, 4, modem_control);
        assert_eq!(uart.line().level(), level);
    }
}

#[test]
fn a_receiver_that_has_timed_out_has_until_it_is_read() {
    let mut uart = opened(0x01);
    uart.write(NOW, 2, 0xc1);
    uart.receive(NOW, b'a');
    let late = Ticks(u64::MAX / 2);
    uart.advance(late);
    assert_eq!(uart.read(late, 2), 0xcc);
    uart.receive(late, b'b');
    assert_eq!(uart.read(late, 2), 0xcc);
    uart.read(late, 0);
    assert_eq!(uart.read(late, 2), 0xc1);
}

#[test]
fn the_line_is_as_fast_as_firmware_leaves_it() {
    let mut uart = uart();
    uart.write(NOW, 3, 0x80);
    assert_eq!((uart.read(NOW, 0), uart.read(NOW, 1)), (1, 0));
}

#[test]
fn ring_is_noted_when_it_ends() {
    let mut uart = uart();
    uart.write(NOW, 4, 0x10);
    uart.read(NOW, 6);
    uart.write(NOW, 4, 0x14);
    assert_eq!(uart.read(NOW, 6), 0x40);
    uart.write(NOW, 4, 0x10);
    assert_eq!(uart.read(NOW, 6), 0x04);
}

proptest! {
    #[test]
    fn nothing_a_guest_does_goes_wrong(
        steps in prop::collection::vec((0..4u8, any::<u8>(), any::<u8>(), prop_oneof![0..1000u64, any::<u64>()]), 0..300),
    ) {
        let mut now = Ticks(0);
        let mut uart = uart();
        for (what, offset, value, pause) in steps {
            now = Ticks(now.0.saturating_add(pause));
            match what {
                0 => uart.write(now, offset & 7, value),
                1 => { uart.read(now, offset & 7); }
                2 => { uart.receive(now, value); }
                _ => { uart.output().next(); }
            }
            uart.advance(now);
            prop_assert!(uart.deadline().is_none_or(|t| t > now));
        }
    }

    #[test]
    fn a_guest_that_waits_loses_nothing(text in prop::collection::vec(any::<u8>(), 0..2000), lazy in 1..700usize) {
        let mut uart = opened(0);
        let mut got = Vec::new();
        for (index, byte) in text.iter().enumerate() {
            if index % lazy == 0 || uart.read(NOW, 5) & 0x20 == 0 {
                got.extend(output(&mut uart));
            }
            prop_assert!(uart.read(NOW, 5) & 0x20 != 0);
            uart.write(NOW, 0, *byte);
        }
        got.extend(output(&mut uart));
        prop_assert_eq!(got, text);
    }
}
