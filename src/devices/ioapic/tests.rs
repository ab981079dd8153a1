use super::*;
use proptest::prelude::*;

fn write(io_apic: &mut IoApic, index: u8, value: u32) {
    io_apic.write(0x00, Width::Dword, index.into());
    io_apic.write(0x10, Width::Dword, value.into());
}

fn read(io_apic: &mut IoApic, index: u8) -> u32 {
    io_apic.write(0x00, Width::Dword, index.into());
    io_apic.read(0x10, Width::Dword) as u32
}

fn program(io_apic: &mut IoApic, pin: u8, low: u32, destination: u8) {
    write(io_apic, 0x11 + 2 * pin, u32::from(destination) << 24);
    write(io_apic, 0x10 + 2 * pin, low);
}

fn drain(io_apic: &mut IoApic) -> Vec<Message> {
    std::iter::from_fn(|| io_apic.take_message()).collect()
}

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;
const DELIVERY_STATUS: u32 = 1 << 12;

#[test]
fn registers_after_power_on() {
    let mut io_apic = IoApic::new(5);
    assert_eq!(read(&mut io_apic, 0), 0x0500_0000);
    assert_eq!(read(&mut io_apic, 1), 0x0017_0020);
    assert_eq!(read(&mut io_apic, 2), 0x0500_0000);
    for pin in 0..PINS {
        assert_eq!(read(&mut io_apic, 0x10 + 2 * pin), 0x0001_0000);
        assert_eq!(read(&mut io_apic, 0x11 + 2 * pin), 0);
    }
    for index in (3..0x10).chain(0x40..=0xff) {
        write(&mut io_apic, index, u32::MAX);
        assert_eq!(read(&mut io_apic, index), 0, "index {index:#x}");
    }
}

#[test]
fn what_software_can_write() {
    let mut io_apic = IoApic::new(0);
    write(&mut io_apic, 0, u32::MAX);
    assert_eq!(read(&mut io_apic, 0), 0x0f00_0000);
    assert_eq!(read(&mut io_apic, 2), 0x0f00_0000);
    write(&mut io_apic, 1, 0);
    assert_eq!(read(&mut io_apic, 1), 0x0017_0020);
    write(&mut io_apic, 0x10, u32::MAX);
    write(&mut io_apic, 0x11, u32::MAX);
    assert_eq!(read(&mut io_apic, 0x10), 0x0001_afff);
    assert_eq!(read(&mut io_apic, 0x11), 0xff00_0000);
}

#[test]
fn nmis_and_inits_reach_a_cpu_that_has_interrupts_off() {
    let mut io_apic = IoApic::new(0);
    for (mode, reaches) in [
        (0, false),
        (1, false),
        (2, false),
        (4, true),
        (5, true),
        (7, false),
    ] {
        program(&mut io_apic, 7, mode << 8, 0);
        assert_eq!(io_apic.sends_unmaskable(), reaches, "delivery mode {mode}");
        program(&mut io_apic, 7, mode << 8 | MASKED, 0);
        assert!(!io_apic.sends_unmaskable());
    }
}

#[test]
fn narrow_accesses_move_their_bytes() {
    let mut io_apic = IoApic::new(0);
    io_apic.write(0x00, Width::Byte, 0x10);
    io_apic.write(0x10, Width::Dword, 0x1_0931);
    io_apic.write(0x10, Width::Byte, 0x32);
    io_apic.write(0x12, Width::Word, 0);
    assert_eq!(io_apic.read(0x10, Width::Qword), 0x0932);
    assert_eq!(io_apic.read(0x10, Width::Byte), 0x32);
    assert_eq!(io_apic.read(0x11, Width::Word), 0x09);
    // Not the byte that selects.
    io_apic.write(0x01, Width::Byte, 0x01);
    assert_eq!(io_apic.read(0x00, Width::Dword), 0x10);
    assert_eq!(io_apic.read(0x40, Width::Dword), 0);
    assert_eq!(io_apic.read(0x20, Width::Dword), 0);
}

#[test]
fn an_edge_is_sent_once() {
    let mut io_apic = IoApic::new(0);
    program(&mut io_apic, 4, 0x0934, 0x0f);
    io_apic.set_line(4, true, true);
    assert_eq!(read(&mut io_apic, 0x18), 0x0934 | DELIVERY_STATUS);
    // A second edge before the first was sent is the same interrupt.
    io_apic.set_line(4, true, true);
    let message = Message {
        mode: DeliveryMode::LowestPriority,
        destination: Destination::Logical(0x0f),
        vector: 0x34,
        trigger: Trigger::Edge,
        assert: true,
    };
    assert_eq!(drain(&mut io_apic), [message]);
    assert_eq!(read(&mut io_apic, 0x18), 0x0934);
    io_apic.set_line(4, true, false);
    io_apic.eoi(0x34);
    assert_eq!(drain(&mut io_apic), []);
    // A pulse that is over.
    io_apic.set_line(4, false, true);
    assert_eq!(drain(&mut io_apic), [message]);
}

#[test]
fn an_edge_at_a_masked_pin_is_lost() {
    let mut io_apic = IoApic::new(0);
    program(&mut io_apic, 4, 0x34 | MASKED, 0);
    io_apic.set_line(4, true, true);
    write(&mut io_apic, 0x18, 0x34);
    assert_eq!(drain(&mut io_apic), []);
}

#[test]
fn masking_withdraws_what_was_not_sent() {
    let mut io_apic = IoApic::new(0);
    for low in [0x34, 0x34 | LEVEL] {
        program(&mut io_apic, 4, low, 0);
        io_apic.set_line(4, true, true);
        write(&mut io_apic, 0x18, low | MASKED);
        assert_eq!(drain(&mut io_apic), []);
        io_apic.set_line(4, false, false);
    }
}

#[test]
fn a_level_is_sent_once_per_eoi() {
    let mut io_apic = IoApic::new(0);
    program(&mut io_apic, 9, 0x59 | LEVEL, 0);
    io_apic.set_line(9, true, true);
    let message = Message {
        mode: DeliveryMode::Fixed,
        destination: Destination::Physical(0),
        vector: 0x59,
        trigger: Trigger::Level,
        assert: true,
    };
    assert_eq!(drain(&mut io_apic), [message]);
    assert_eq!(read(&mut io_apic, 0x22), 0x59 | LEVEL | REMOTE_IRR);
    io_apic.set_line(9, true, true);
    write(&mut io_apic, 0x22, 0x59 | LEVEL);
    assert_eq!(drain(&mut io_apic), []);
    io_apic.eoi(0x58);
    assert_eq!(drain(&mut io_apic), []);
    // The line is still high.
    io_apic.write(0x40, Width::Dword, 0x59);
    assert_eq!(drain(&mut io_apic), [message]);
    io_apic.set_line(9, false, false);
    io_apic.eoi(0x59);
    assert_eq!(drain(&mut io_apic), []);
    assert_eq!(read(&mut io_apic, 0x22), 0x59 | LEVEL);
}

#[test]
fn a_level_that_falls_before_it_was_sent_is_withdrawn() {
    let mut io_apic = IoApic::new(0);
    program(&mut io_apic, 9, 0x59 | LEVEL, 0);
    io_apic.set_line(9, true, true);
    io_apic.set_line(9, false, false);
    assert_eq!(drain(&mut io_apic), []);
}

#[test]
fn a_level_that_was_masked_is_sent_when_unmasked() {
    let mut io_apic = IoApic::new(0);
    program(&mut io_apic, 9, 0x59 | LEVEL | MASKED, 0);
    io_apic.set_line(9, true, true);
    assert_eq!(drain(&mut io_apic), []);
    write(&mut io_apic, 0x22, 0x59 | LEVEL);
    assert_eq!(drain(&mut io_apic).len(), 1);
    // An EOI while masked: due when unmasked.
    write(&mut io_apic, 0x22, 0x59 | LEVEL | MASKED);
    io_apic.eoi(0x59);
    assert_eq!(drain(&mut io_apic), []);
    write(&mut io_apic, 0x22, 0x59 | LEVEL);
    assert_eq!(drain(&mut io_apic).len(), 1);
}

#[test]
fn switching_to_edge_and_back_ends_a_level_interrupt() {
    let mut io_apic = IoApic::new(0);
    program(&mut io_apic, 9, 0x59 | LEVEL, 0);
    io_apic.set_line(9, true, true);
    assert_eq!(drain(&mut io_apic).len(), 1);
    write(&mut io_apic, 0x22, 0x59 | MASKED);
    assert_eq!(read(&mut io_apic, 0x22), 0x59 | MASKED);
    write(&mut io_apic, 0x22, 0x59 | LEVEL);
    assert_eq!(drain(&mut io_apic).len(), 1);
}

#[test]
fn modes_without_a_vector_are_edge_triggered() {
    let mut io_apic = IoApic::new(0);
    for (bits, mode) in [
        (2, DeliveryMode::Smi),
        (4, DeliveryMode::Nmi),
        (5, DeliveryMode::Init),
        (7, DeliveryMode::ExtInt),
    ] {
        program(&mut io_apic, 0, bits << 8 | LEVEL, 0xff);
        for _ in 0..2 {
            io_apic.set_line(0, true, true);
            let messages = drain(&mut io_apic);
            assert_eq!(messages.len(), 1);
            assert_eq!(messages[0].mode, mode);
            assert_eq!(messages[0].trigger, Trigger::Edge);
            assert_eq!(messages[0].destination, Destination::All);
            io_apic.set_line(0, false, false);
        }
    }
    for reserved in [3, 6] {
        program(&mut io_apic, 0, reserved << 8, 0);
        io_apic.set_line(0, true, true);
        assert_eq!(drain(&mut io_apic), []);
    }
}

proptest! {
    /// Whatever a guest writes and devices drive: nothing panics, what is due is
    /// finite, and a level-triggered vector goes out at most once between two EOIs.
    #[test]
    fn messages_are_finite(steps in prop::collection::vec((0u8..4, 0u64..0x50, 0..4usize, any::<u64>()), 0..200)) {
        let widths = [Width::Byte, Width::Word, Width::Dword, Width::Qword];
        let mut io_apic = IoApic::new(0);
        for (kind, offset, width, value) in steps {
            match kind {
                0 => io_apic.write(offset, widths[width], value),
                1 => write(&mut io_apic, 0x10 + value as u8 % 0x30, (value >> 8) as u32),
                2 => io_apic.set_line(value as u8 % 32, value & 0x100 != 0, value & 0x300 == 0x100),
                _ => io_apic.eoi(value as u8),
            }
            io_apic.read(offset, widths[width]);
            prop_assert!(drain(&mut io_apic).len() <= usize::from(PINS));
            prop_assert_eq!(io_apic.waiting, 0);
            for (pin, entry) in io_apic.entries.iter().enumerate() {
                let high = io_apic.lines & 1 << pin != 0;
                let deliverable = entry.is_level() && !entry.has(Entry::MASKED);
                prop_assert!(!(high && deliverable) || entry.has(Entry::REMOTE_IRR), "pin {} is forgotten", pin);
                prop_assert!(entry.is_level() || !entry.has(Entry::REMOTE_IRR));
            }
        }
    }
}
