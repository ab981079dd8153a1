//! The devices of every PC: 8259s, 8254, real-time clock, keyboard controller,
//! system ports, PCI configuration ports, power management, and nothing elsewhere.

use vireo_test_guests::cpu::{self, rdtsc};
use vireo_test_guests::exceptions::{self, Frame};
use vireo_test_guests::port::{in8, in16, in32, out8, out16, out32};
use vireo_test_guests::{apic, check, check_detail, check_equal, pic, pit, report, time};

/// First vector of the 8259s.
pub const PIC_VECTOR: u8 = 0x20;
const RTC_VECTOR: u8 = PIC_VECTOR + 8;
const PM_TIMER: u16 = 0x608;
const PM_TIMER_HZ: u64 = 3_579_545;

pub fn check_all() {
    nothing();
    pic::init(PIC_VECTOR);
    timer_counters();
    timer_interrupts();
    controllers();
    clock();
    keyboard();
    system_ports();
    pci();
    power_management();
}

fn nothing() {
    for (name, port) in [
        ("a port without a device reads ones (0x1234)", 0x1234),
        ("a port without a device reads ones (0xe000)", 0xe000),
    ] {
        check_equal(
            name,
            (in8(port), in16(port), in32(port)),
            (0xff, 0xffff, 0xffff_ffff),
        );
    }
    check_equal("the last port reads ones", in32(0xffff), 0xffff_ffff);
    let mut rax = u64::MAX;
    vireo_test_guests::execute!("in eax, dx", in("dx") 0x1234u16, inout("rax") rax);
    check_equal("IN EAX clears the upper half", rax, 0xffff_ffff);
    let mut rax = 0x1111_2222_3333_4444u64;
    vireo_test_guests::execute!("in al, dx", in("dx") 0x1234u16, inout("rax") rax);
    check_equal("IN AL leaves the rest", rax, 0x1111_2222_3333_44ff);
}

/// Ticks of the time-stamp counter in so many counts of the 8254.
fn ticks(counts: u64) -> u64 {
    counts * time::tsc_hz() / pit::HZ
}

fn timer_counters() {
    pit::set_gate_2(true);
    pit::start(2, 0, 20_000);
    let low = !pit::output_2();
    let waited = time::wait(ticks(40_000), pit::output_2);
    check("8254 mode 0: the output is low while it counts", low);
    check_detail(
        "8254 mode 0: the output is high after the count",
        waited.is_some_and(|waited| time::is_near(waited, ticks(20_000), 3)),
        format_args!("after {waited:?} ticks instead of {}", ticks(20_000)),
    );
    pit::start(2, 0, 0);
    let first = pit::count(2);
    time::spin(ticks(10_000));
    let passed = first.wrapping_sub(pit::count(2));
    check_detail(
        "8254 counts down",
        time::is_near(passed.into(), 10_000, 5),
        format_args!("by {passed}"),
    );
    pit::set_gate_2(false);
    let first = pit::count(2);
    time::spin(ticks(1_000));
    check_equal("8254 stands while its gate is low", pit::count(2), first);
    pit::set_gate_2(true);

    pit::start(2, 3, 10_000);
    time::spin(ticks(1_000));
    let first = pit::count(2);
    time::spin(ticks(1_000));
    let second = pit::count(2);
    check_detail(
        "8254 mode 3 counts down in twos",
        time::is_near(first.wrapping_sub(second).into(), 2_000, 15),
        format_args!("{first} then {second}"),
    );
    check(
        "8254 mode 3 counts even numbers",
        first & 1 == 0 && second & 1 == 0,
    );
    check_equal(
        "8254 status shows access and mode",
        pit::status(2) & 0x3f,
        0x36,
    );
    let start = rdtsc();
    let (mut edges, mut last) = (0, pit::output_2());
    while rdtsc().wrapping_sub(start) < ticks(100_000) {
        let now = pit::output_2();
        edges += u64::from(now && !last);
        last = now;
    }
    check_detail(
        "8254 mode 3 makes a square wave",
        edges.abs_diff(10) <= 1,
        format_args!("{edges} periods instead of 10"),
    );
}

fn end_pic(frame: &mut Frame) {
    pic::eoi(frame.vector as u8 >= PIC_VECTOR + 8);
}

/// Waits in HLT for so many interrupts, for up to two seconds; ticks that took.
fn halted(vector: u8, times: u64) -> u64 {
    time::halt_until(2 * time::tsc_hz(), || exceptions::count(vector) >= times).unwrap_or(0)
}

fn timer_interrupts() {
    // The 8259s' way to the CPU, as firmware leaves it.
    apic::write(apic::register::LVT_LINT0, apic::entry::EXTINT);
    exceptions::on(PIC_VECTOR, end_pic);
    pic::enable(1);
    pit::start(0, 2, 1193);
    let (waited, expected) = (halted(PIC_VECTOR, 20), ticks(20 * 1193));
    check_detail(
        "8254 mode 2 interrupts through the 8259",
        time::is_near(waited, expected, 6),
        format_args!("{waited} ticks instead of {expected}"),
    );
    exceptions::on(PIC_VECTOR, end_pic);
    pit::start(0, 3, 1193);
    let waited = halted(PIC_VECTOR, 20);
    check_detail(
        "8254 mode 3 interrupts through the 8259",
        time::is_near(waited, expected, 6),
        format_args!("{waited} ticks instead of {expected}"),
    );
    pit::start(0, 0, 5000);
    cpu::interrupt_window();
    exceptions::on(PIC_VECTOR, end_pic);
    let (waited, expected) = (halted(PIC_VECTOR, 1), ticks(5000));
    check_detail(
        "8254 mode 0 interrupts once",
        time::is_near(waited, expected, 6),
        format_args!("{waited} ticks instead of {expected}"),
    );
    time::spin(2 * expected);
    cpu::interrupt_window();
    check_equal(
        "8254 mode 0 interrupts only once",
        exceptions::count(PIC_VECTOR),
        1,
    );
}

fn controllers() {
    check_equal(
        "8259 masks read back",
        {
            pic::enable(0x0f05);
            u16::from_le_bytes([in8(pic::MASTER + 1), in8(pic::SLAVE + 1)])
        },
        !0x0f05,
    );
    pic::enable(0);
    pit::start(0, 0, 100);
    time::spin(ticks(200));
    check("8259 shows a masked request", pic::requests() & 1 != 0);
    exceptions::on(PIC_VECTOR, |_| {});
    cpu::interrupt_window();
    check_equal(
        "8259 holds a masked request back",
        exceptions::count(PIC_VECTOR),
        0,
    );
    pic::enable(1);
    cpu::interrupt_window();
    check_equal(
        "8259 lets it in when unmasked",
        exceptions::count(PIC_VECTOR),
        1,
    );
    check_equal("8259 shows it in service", pic::in_service(), 1);
    pic::eoi(false);
    check_equal(
        "8259 shows nothing in service after EOI",
        pic::in_service(),
        0,
    );
    pic::enable(0);
}

fn cmos(index: u8) -> u8 {
    out8(0x70, index);
    in8(0x71)
}

fn set_cmos(index: u8, value: u8) {
    out8(0x70, index);
    out8(0x71, value);
}

fn clock() {
    let b = cmos(0x0b);
    check_detail(
        "RTC is in BCD and 24-hour mode",
        b & 0x06 == 0x02,
        format_args!("register B {b:#x}"),
    );
    check("RTC power is good", cmos(0x0d) & 0x80 != 0);
    let fields = [
        (0x00, 0, 59),
        (0x02, 0, 59),
        (0x04, 0, 23),
        (0x06, 1, 7),
        (0x07, 1, 31),
        (0x08, 1, 12),
        (0x09, 0, 99),
        (0x32, 19, 21),
    ];
    let mut ok = true;
    for (index, low, high) in fields {
        let value = cmos(index);
        let number = (value >> 4) * 10 + (value & 15);
        ok &= value & 15 < 10 && value >> 4 < 10 && (low..=high).contains(&number);
    }
    check("RTC shows a date", ok);
    let (year, century) = (cmos(0x09), cmos(0x32));
    check_detail(
        "RTC shows the emulated year or later",
        century == 0x20 && year >= 0x24,
        format_args!("{century:x}{year:02x}"),
    );
    set_cmos(0x40, 0x5a);
    check_equal("CMOS memory keeps a byte", cmos(0x40), 0x5a);

    exceptions::on(RTC_VECTOR, end_rtc);
    pic::enable(1 << 8 | 1 << 2);
    cmos(0x0c);
    set_cmos(0x0b, b | 0x10);
    halted(RTC_VECTOR, 1);
    let second = cmos(0x00);
    let waited = halted(RTC_VECTOR, 2);
    let next = cmos(0x00);
    check_detail(
        "RTC update interrupts come every second",
        time::is_near(waited, time::tsc_hz(), 2),
        format_args!("{waited} ticks"),
    );
    check("RTC moves on by a second", next != second);
    set_cmos(0x0b, b | 0x40);
    // The flag was there before it was let through: the first comes at once, the second
    // within a period.
    exceptions::on(RTC_VECTOR, end_rtc);
    halted(RTC_VECTOR, 2);
    let (waited, expected) = (halted(RTC_VECTOR, 22), 20 * time::tsc_hz() / 1024);
    check_detail(
        "RTC periodic interrupts come at 1024 Hz",
        time::is_near(waited, expected, 2),
        format_args!("{waited} ticks instead of {expected}"),
    );
    set_cmos(0x0b, b);
    pic::enable(0);
}

fn end_rtc(_: &mut Frame) {
    cmos(0x0c);
    pic::eoi(true);
}

fn keyboard() {
    check_equal("8042 is idle", in8(0x64) & 3, 0);
    out8(0x64, 0xaa);
    check("8042 answers", in8(0x64) & 1 != 0);
    check_equal("8042 passes its self-test", in8(0x60), 0x55);
    out8(0x64, 0x20);
    let command = in8(0x60);
    out8(0x64, 0x60);
    out8(0x60, command & !1);
    check_equal("8042 is idle again", in8(0x64) & 1, 0);
}

fn system_ports() {
    check_equal("port 0x92 has A20 open", in8(0x92) & 3, 2);
    let old = in8(0xcf9);
    out8(0xcf9, 0x02);
    check_equal(
        "port 0xcf9 keeps the kind of reset",
        in8(0xcf9) & 0x0e,
        0x02,
    );
    out8(0xcf9, old);
    let first = in8(0x61) & 0x10;
    check(
        "port 0x61 shows the refresh toggle",
        time::wait(time::microseconds(200), || in8(0x61) & 0x10 != first).is_some(),
    );
    out8(0x80, 0x12);
    check("port 0x80 may be written", true);
}

fn pci() {
    let old = in32(0xcf8);
    out32(0xcf8, 0x8000_f800);
    check_equal(
        "PCI configuration address reads back",
        in32(0xcf8),
        0x8000_f800,
    );
    check_equal(
        "PCI device 31 is not there",
        (in32(0xcfc), in16(0xcfe), in8(0xcfd)),
        (u32::MAX, u16::MAX, u8::MAX),
    );
    out32(0xcf8, 0x7f00_0000);
    check_equal(
        "PCI configuration address has reserved bits",
        in32(0xcf8),
        0,
    );
    check_equal(
        "PCI configuration data is not there without the enable bit",
        in32(0xcfc),
        u32::MAX,
    );
    out32(0xcf8, old);
}

fn power_management() {
    let (start, first) = (rdtsc(), in32(PM_TIMER));
    time::spin(time::microseconds(20_000));
    let (end, last) = (rdtsc(), in32(PM_TIMER));
    let counted = u64::from(last.wrapping_sub(first) & 0xff_ffff);
    let expected = end.wrapping_sub(start) * PM_TIMER_HZ / time::tsc_hz();
    check_detail(
        "the PM timer runs at 3.579545 MHz",
        time::is_near(counted, expected, 1),
        format_args!("{counted} counts instead of {expected}"),
    );
    let old = in16(report::PM1A_CONTROL);
    out8(0xb2, 0xf1);
    check_equal(
        "ACPI mode can be switched on",
        in16(report::PM1A_CONTROL) & 1,
        1,
    );
    out16(report::PM1A_CONTROL, 1 << 13 | 3 << 10);
    check("a sleep state that is not there does nothing", true);
    out8(0xb2, 0xf0);
    check_equal(
        "ACPI mode can be switched off",
        in16(report::PM1A_CONTROL) & 1,
        0,
    );
    out16(report::PM1A_CONTROL, old);
}
