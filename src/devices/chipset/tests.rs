use super::*;
use crate::devices::{DeliveryMode, Trigger};
use proptest::prelude::*;

const HZ: u64 = 1_000_000_000;
const NOW: Ticks = Ticks(1000);

fn chipset() -> Chipset {
    with_firmware(false)
}

fn with_firmware(firmware: bool) -> Chipset {
    Chipset::new(
        Clock::new(HZ),
        NOW,
        &ChipsetConfig {
            wall_clock: 1_735_689_598,
            ram_below_4g: 1 << 30,
            ram_above_4g: 0,
            io_apic_id: 1,
            test_device: true,
            fw_cfg: FwCfg::default(),
            as_by_bios: false,
            firmware,
        },
    )
}

fn write(chipset: &mut Chipset, now: Ticks, writes: &[(u16, u8)]) {
    for &(port, value) in writes {
        assert_eq!(
            chipset.port_write(now, port, Width::Byte, value.into()),
            None
        );
    }
}

/// The 8259s as Linux programs them, with every input open.
const PICS: [(u16, u8); 10] = [
    (0x20, 0x11),
    (0x21, 0x30),
    (0x21, 0x04),
    (0x21, 0x01),
    (0xa0, 0x11),
    (0xa1, 0x38),
    (0xa1, 0x02),
    (0xa1, 0x01),
    (0x21, 0x00),
    (0xa1, 0x00),
];

fn redirect(chipset: &mut Chipset, pin: u64, low: u64) {
    chipset.io_apic_write(0, Width::Dword, 0x11 + 2 * pin);
    chipset.io_apic_write(0x10, Width::Dword, 0);
    chipset.io_apic_write(0, Width::Dword, 0x10 + 2 * pin);
    chipset.io_apic_write(0x10, Width::Dword, low);
}

/// Channel 0 at 1 kHz.
const TIMER: [(u16, u8); 3] = [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)];

#[test]
fn the_timer_reaches_the_8259_as_input_0() {
    let mut chipset = chipset();
    write(&mut chipset, NOW, &PICS);
    write(&mut chipset, NOW, &TIMER);
    assert!(!chipset.intr());
    for _ in 0..3 {
        let deadline = chipset.deadline().unwrap();
        chipset.advance(deadline);
        assert!(chipset.intr());
        assert_eq!(chipset.acknowledge_pic(), 0x30);
        write(&mut chipset, deadline, &[(0x20, 0x20)]);
        assert!(!chipset.intr());
    }
}

#[test]
fn the_timer_reaches_the_io_apic_at_pin_2() {
    let mut chipset = chipset();
    redirect(&mut chipset, 2, 0x41);
    write(&mut chipset, NOW, &TIMER);
    assert_eq!(chipset.take_message(), None);
    chipset.advance(chipset.deadline().unwrap());
    let message = chipset.take_message().unwrap();
    assert_eq!((message.vector, message.trigger), (0x41, Trigger::Edge));
    assert_eq!(chipset.take_message(), None);
    // A second without a look is one interrupt.
    chipset.advance(Ticks(NOW.0 + HZ));
    assert!(chipset.take_message().is_some());
    assert_eq!(chipset.take_message(), None);
}

#[test]
fn intr_reaches_pin_0_as_extint() {
    let mut chipset = chipset();
    redirect(&mut chipset, 0, 0x700);
    write(&mut chipset, NOW, &PICS);
    // COM1: OUT2 and the transmitter's interrupt. Then the keyboard controller's.
    write(
        &mut chipset,
        NOW,
        &[(0x3fc, 0x08), (0x3f9, 0x02), (0x64, 0x60), (0x60, 0x45)],
    );
    assert_eq!(
        chipset.take_message().map(|message| message.mode),
        Some(DeliveryMode::ExtInt)
    );
    write(&mut chipset, NOW, &[(0x64, 0xaa)]);
    assert_eq!(chipset.take_message(), None);
    assert_eq!(chipset.acknowledge_pic(), 0x31);
    write(&mut chipset, NOW, &[(0x20, 0x20)]);
    assert!(chipset.take_message().is_some());
    assert_eq!(chipset.acknowledge_pic(), 0x34);
}

#[test]
fn the_sci_is_a_level_until_it_is_served() {
    let mut chipset = chipset();
    redirect(&mut chipset, 9, 0x8050);
    write(&mut chipset, NOW, &PICS);
    write(
        &mut chipset,
        NOW,
        &[(pc::SMI_COMMAND, pc::ACPI_ENABLE), (0x603, 0x01)],
    );
    chipset.press_power_button();
    assert!(chipset.intr());
    assert_eq!(
        chipset.take_message().map(|message| message.trigger),
        Some(Trigger::Level)
    );
    chipset.eoi(0x50);
    assert!(chipset.take_message().is_some(), "nobody served it");
    chipset.port_write(NOW, pc::PM1A_EVENT, Width::Word, 0x100);
    assert!(!chipset.intr());
    chipset.eoi(0x50);
    assert_eq!(chipset.take_message(), None);
}

#[test]
fn com1_talks_both_ways() {
    let mut chipset = chipset();
    write(&mut chipset, NOW, &PICS);
    write(
        &mut chipset,
        NOW,
        &[
            (0x3fa, 0x01),
            (0x3fc, 0x08),
            (0x3f9, 0x01),
            (0x3f8, b'h'),
            (0x3f8, b'i'),
        ],
    );
    let sent: Vec<u8> = chipset.serial_output(|output| output.collect());
    assert_eq!(sent, b"hi");
    assert!(chipset.serial_input(NOW, b'x'));
    assert_eq!(chipset.acknowledge_pic(), 0x34);
    assert_eq!(chipset.port_read(NOW, 0x3f8, Width::Byte), u32::from(b'x'));
}

#[test]
fn ways_to_end() {
    let now = NOW;
    for (writes, last, request) in [
        (&[][..], (0x64, 0xfe), Request::Reset),
        (
            &[(0xcf9, 0x02)][..],
            (0xcf9, pc::RESET_VALUE),
            Request::Reset,
        ),
        (&[(0x92, 0x02)][..], (0x92, 0x03), Request::Reset),
        (
            &[][..],
            (0x605, 0x20 | pc::S5_SLEEP_TYPE << 2),
            Request::PowerOff,
        ),
    ] {
        let mut chipset = chipset();
        write(&mut chipset, now, writes);
        let (port, value) = last;
        assert_eq!(
            chipset.port_write(now, port, Width::Byte, value.into()),
            Some(request)
        );
    }
}

#[test]
fn where_nobody_is() {
    let mut chipset = chipset();
    assert_eq!(chipset.port_read(NOW, 0x1234, Width::Byte), 0xff);
    assert_eq!(chipset.port_read(NOW, 0xffff, Width::Dword), 0xffff_ffff);
    assert_eq!(chipset.port_write(NOW, 0x2e8, Width::Word, 5), None);
    assert_eq!(chipset.unclaimed(), 3);
    // An empty PCI slot is not unclaimed: the host bridge answered.
    chipset.port_write(NOW, 0xcf8, Width::Dword, 0x8000_0000);
    assert_eq!(chipset.port_read(NOW, 0xcf8, Width::Dword), 0x8000_0000);
    assert_eq!(chipset.port_read(NOW, 0xcfe, Width::Word), 0xffff);
    assert_eq!(chipset.unclaimed(), 3);
}

#[test]
fn wide_accesses_are_split_as_on_the_isa_bus() {
    let mut chipset = chipset();
    // OUT 0x70, AX: index and data.
    chipset.port_write(NOW, 0x70, Width::Word, 0x5a7f);
    assert_eq!(chipset.port_read(NOW, 0x71, Width::Byte), 0x5a);
    assert_eq!(chipset.port_read(NOW, 0x70, Width::Word), 0x5aff);
    // 0x92 answers, 0x93 does not.
    assert_eq!(chipset.port_read(NOW, 0x92, Width::Word), 0xff02);
    assert_eq!(chipset.unclaimed(), 0);
}

/// Linux's calibration: gate of channel 2 on, mode 0, poll bit 5 of port 0x61.
#[test]
fn channel_2_is_seen_in_port_0x61() {
    let mut chipset = chipset();
    let control = chipset.port_read(NOW, 0x61, Width::Byte) as u8;
    write(
        &mut chipset,
        NOW,
        &[
            (0x61, control & !2 | 1),
            (0x43, 0xb0),
            (0x42, 0x9b),
            (0x42, 0x2e),
        ],
    );
    let mut now = NOW;
    while chipset.port_read(now, 0x61, Width::Byte) & 0x20 == 0 {
        now.0 += 1000;
    }
    assert!((now.0 - NOW.0).abs_diff(HZ / 100) < 3000);
}

const PORTS: [u16; 27] = [
    0x20, 0x21, 0xa0, 0x40, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0x3f8, 0x3f9, 0x3fa,
    0x3fb, 0x3fc, 0x600, 0x602, 0xcf8, 0xe0, 0xe9, 0xf4, 0x200e, 0x510, 0x511, 0x518,
];

#[test]
fn the_end_has_a_code_of_any_width() {
    let mut chipset = chipset();
    for (width, code) in [
        (Width::Byte, 0x21),
        (Width::Word, 0x4321),
        (Width::Dword, 0x8765_4321),
    ] {
        let request = chipset.port_write(NOW, 0xf4, width, code);
        assert_eq!(request, Some(Request::Exit(code)));
    }
}

#[test]
fn the_debug_console_shows_all_or_says_that_it_is_full() {
    let mut chipset = chipset();
    assert_eq!(chipset.port_read(NOW, 0xe9, Width::Byte), 0xe9);
    let mut sent = 0;
    let print = |chipset: &mut Chipset| {
        chipset.port_write(NOW, 0xe9, Width::Byte, u32::from(b'x'))
            == Some(Request::Console { taken: true })
    };
    while print(&mut chipset) {
        sent += 1;
    }
    assert!(!print(&mut chipset));
    assert_eq!(chipset.serial_output(|output| output.count()), sent);
    assert!(print(&mut chipset));
}

#[test]
fn the_test_device_drives_lines_and_remembers() {
    let mut chipset = chipset();
    write(&mut chipset, NOW, &PICS);
    redirect(&mut chipset, 14, 0x51);
    redirect(&mut chipset, 20, 0x52);
    write(&mut chipset, NOW, &[(0x200e, 1)]);
    assert!(chipset.intr());
    assert_eq!(
        chipset.take_message().map(|message| message.vector),
        Some(0x51)
    );
    write(&mut chipset, NOW, &[(0x200e, 0), (0x2014, 1)]);
    assert_eq!(
        chipset.take_message().map(|message| message.vector),
        Some(0x52)
    );
    assert_eq!(
        chipset.port_write(NOW, 0xe0, Width::Dword, 0x1234_5678),
        None
    );
    assert_eq!(chipset.port_write(NOW, 0xe0, Width::Word, 0xabcd), None);
    assert_eq!(chipset.port_read(NOW, 0xe0, Width::Dword), 0x1234_abcd);
    assert_eq!(chipset.port_read(NOW, 0xe2, Width::Byte), 0x34);
    assert_eq!(
        chipset.port_write(NOW, 0xe4, Width::Dword, 0x12_3000),
        Some(Request::Unmap(Gpa(0x12_3000)))
    );
    chipset.memory_write(Gpa(0xff00_fffe), Width::Word, 0x1234);
    assert_eq!(chipset.memory_read(Gpa(0xff00_ffff), Width::Byte), 0x12);
    assert_eq!(chipset.memory_read(Gpa(0xff01_0000), Width::Byte), 0xff);
}

#[test]
fn fw_cfg_is_selected_by_a_word_and_asked_for_transfers_by_two() {
    let mut chipset = chipset();
    chipset.port_write(NOW, 0x510, Width::Word, 0);
    let mut byte = |port| chipset.port_read(NOW, port, Width::Byte);
    assert_eq!(
        [byte(0x511), byte(0x511)],
        [u32::from(b'Q'), u32::from(b'E')]
    );
    assert_eq!(
        chipset.port_read(NOW, 0x514, Width::Dword),
        u32::from_le_bytes(*b"QEMU")
    );
    chipset.port_write(NOW, 0x514, Width::Dword, 0x0100_0000);
    assert_eq!(
        chipset.port_write(NOW, 0x518, Width::Dword, 0x7856_3412),
        Some(Request::Transfer(Gpa(0x1_1234_5678)))
    );
}

#[test]
fn the_timer_of_a_bios_interrupts_at_its_vector() {
    let config = ChipsetConfig {
        as_by_bios: true,
        ..ChipsetConfig::default()
    };
    let mut chipset = Chipset::new(Clock::new(HZ), NOW, &config);
    let due = chipset.deadline().unwrap();
    assert!((due.0 - NOW.0).abs_diff(HZ * 10 / 182) < HZ / 1000);
    assert!(!chipset.intr());
    chipset.advance(due);
    assert!(chipset.intr());
    assert_eq!(chipset.acknowledge_pic(), 8);
}

#[test]
fn an_alarm_of_the_clock_ends_a_suspend() {
    let mut chipset = chipset();
    // An alarm each second.
    for (index, value) in [(1, 0xc0), (3, 0xc0), (5, 0xc0), (0xb, 0x22)] {
        write(&mut chipset, NOW, &[(0x70, index), (0x71, value)]);
    }
    chipset.port_write(NOW, 0x602, Width::Word, 0x400);
    let asked = chipset.port_write(NOW, 0x604, Width::Word, 1 << 10 | 1 << 13);
    assert_eq!(asked, Some(Request::Suspend));
    assert!(!chipset.take_wake());
    let due = chipset.deadline().unwrap();
    assert!(due.0 <= NOW.0 + HZ);
    chipset.advance(due);
    assert!(chipset.take_wake());
    write(&mut chipset, due, &[(0x70, 0xf)]);
    assert_eq!(chipset.port_read(due, 0x71, Width::Byte), 0xfe);
}

#[test]
fn firmware_moves_power_management_and_it_stays_where_it_was_too() {
    let mut chipset = with_firmware(true);
    let timer = |chipset: &mut Chipset, port| chipset.port_read(NOW, port, Width::Dword);
    assert_eq!(timer(&mut chipset, 0xb008), u32::MAX);
    for (address, value) in [(0x8000_0b40, 0xb001), (0x8000_0b80, 1)] {
        chipset.port_write(NOW, 0xcf8, Width::Dword, address);
        chipset.port_write(NOW, 0xcfc, Width::Dword, value);
    }
    let usual = timer(&mut chipset, 0x608);
    assert_eq!(timer(&mut chipset, 0xb008), usual);
    assert_ne!(usual, u32::MAX);
    let off = chipset.port_write(NOW, 0xb004, Width::Word, 5 << 10 | 1 << 13);
    assert_eq!(off, Some(Request::PowerOff));
}

#[test]
fn without_the_test_device_nobody_is_there() {
    let mut chipset = Chipset::new(Clock::new(HZ), NOW, &ChipsetConfig::default());
    write(&mut chipset, NOW, &PICS);
    write(&mut chipset, NOW, &[(0x200e, 1), (0xe0, 0)]);
    assert!(!chipset.intr());
    assert_eq!(chipset.port_write(NOW, 0xe4, Width::Dword, 0), None);
    assert_eq!(chipset.port_read(NOW, 0xe0, Width::Byte), 0xff);
    assert_eq!(chipset.memory_read(Gpa(0xff00_0000), Width::Byte), 0xff);
}

proptest! {
    #[test]
    fn nothing_a_guest_does_goes_wrong(
        steps in prop::collection::vec((0..8u8, prop_oneof![prop::sample::select(&PORTS[..]), any::<u16>()], 0..3u8, any::<u32>(), prop_oneof![0..1000u64, 0..1u64 << 50]), 0..150),
    ) {
        let mut chipset = with_firmware(true);
        let mut now = NOW;
        for (what, port, width, value, pause) in steps {
            now = Ticks(now.0 + pause);
            let width = Width::from_bytes(1 << width).unwrap();
            match what {
                0..=2 => { chipset.port_write(now, port, width, value); }
                3 | 4 => prop_assert!(u64::from(chipset.port_read(now, port, width)) <= width.mask()),
                5 => { chipset.serial_input(now, value as u8); }
                6 => { chipset.acknowledge_pic(); }
                _ => chipset.io_apic_write(u64::from(port & 0x1f), width, value.into()),
            }
            chipset.serial_output(|output| output.count());
            while chipset.take_message().is_some() {}
            chipset.advance(now);
            prop_assert!(chipset.deadline().is_none_or(|t| t > now));
        }
    }
}
