//! The local APIC in both modes.

use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, cpuid, msr, rdmsr, rdtsc, wrmsr};
use vireo_test_guests::exceptions::{self, Frame, is_gp};
use vireo_test_guests::report::check_named;
use vireo_test_guests::{Shared, check, check_detail, check_equal, memory, time};

const LOW: u8 = 0x51;
const HIGH: u8 = 0x91;
const TIMER: u8 = 0x61;

static ORDER: Shared<[u8; 2]> = Shared::new([0; 2]);
static WHEN: Shared<u64> = Shared::new(0);

fn end(_: &mut Frame) {
    WHEN.set(rdtsc());
    apic::eoi();
}

pub fn check_all() {
    xapic_page();
    mode("xAPIC");
    moved();
    switching();
    apic::set_x2apic(true);
    mode("x2APIC");
    x2apic_only();
    apic::set_x2apic(false);
}

fn xapic_page() {
    check_equal(
        "xAPIC identifier is 0",
        memory::read32(apic::BASE + 0x20),
        0,
    );
    check(
        "xAPIC registers are no MSRs",
        is_gp(rdmsr(msr::X2APIC + 2).err()),
    );
}

/// A name of a check for the mode.
struct Named<'a>(&'a str);

impl Named<'_> {
    fn is(&self, what: &str, ok: bool, detail: core::fmt::Arguments<'_>) {
        check_named(format_args!("{} {what}", self.0), ok, detail);
    }

    fn equal<T: PartialEq + core::fmt::Debug>(&self, what: &str, actual: T, expected: T) {
        let ok = actual == expected;
        self.is(
            what,
            ok,
            format_args!("{actual:x?} instead of {expected:x?}"),
        );
    }
}

fn mode(name: &str) {
    let name = Named(name);
    let version = apic::read(register::VERSION);
    name.is(
        "version is an integrated APIC's, with six LVT entries at least",
        (0x10..=0x1f).contains(&(version & 0xff)) && version >> 16 & 0xff >= 5,
        format_args!("{version:#x}"),
    );
    apic::write(register::SVR, apic::SVR_ENABLED);
    name.equal(
        "SVR keeps what is written",
        apic::read(register::SVR),
        apic::SVR_ENABLED,
    );
    interrupts_to_self(&name);
    priorities(&name);
    errors(&name);
    one_shot(&name);
    periodic(&name);
    tsc_deadline(&name);
    masked_timer(&name);
}

fn interrupts_to_self(name: &Named) {
    exceptions::on(LOW, end);
    apic::send(0, entry::TO_SELF | u32::from(LOW));
    name.is(
        "IRR shows a requested vector",
        apic::has_vector(register::IRR, LOW),
        format_args!("it does not"),
    );
    cpu::interrupt_window();
    name.equal(
        "an IPI to ourselves by shorthand comes",
        exceptions::count(LOW),
        1,
    );
    name.is(
        "IRR is empty again",
        !apic::has_vector(register::IRR, LOW),
        format_args!("it is not"),
    );
    apic::send(
        apic::read(register::ID) >> if apic::is_x2apic() { 0 } else { 24 },
        LOW.into(),
    );
    cpu::interrupt_window();
    name.equal(
        "an IPI by physical destination comes",
        exceptions::count(LOW),
        2,
    );
    apic::send(if apic::is_x2apic() { u32::MAX } else { 0xff }, LOW.into());
    cpu::interrupt_window();
    name.equal("a broadcast IPI comes", exceptions::count(LOW), 3);
    apic::send(7, LOW.into());
    apic::send(0, entry::TO_OTHERS | u32::from(LOW));
    cpu::interrupt_window();
    name.equal("IPIs to others do not come", exceptions::count(LOW), 3);

    exceptions::on(LOW, |_| {});
    apic::send(0, entry::TO_SELF | u32::from(LOW));
    cpu::interrupt_window();
    name.is(
        "ISR shows a vector in service",
        apic::has_vector(register::ISR, LOW),
        format_args!("it does not"),
    );
    name.equal(
        "PPR follows it",
        apic::read(register::PPR) & 0xf0,
        u32::from(LOW) & 0xf0,
    );
    apic::send(0, entry::TO_SELF | u32::from(LOW));
    cpu::interrupt_window();
    name.equal(
        "a vector in service holds its like back",
        exceptions::count(LOW),
        1,
    );
    apic::eoi();
    cpu::interrupt_window();
    name.equal("EOI lets it in", exceptions::count(LOW), 2);
    apic::eoi();
    name.equal("PPR is 0 after the last EOI", apic::read(register::PPR), 0);
}

fn in_order(frame: &mut Frame) {
    let at = usize::from(ORDER.at(0) != 0);
    ORDER.put(at, frame.vector as u8);
    apic::eoi();
}

fn priorities(name: &Named) {
    exceptions::on(LOW, in_order);
    exceptions::on(HIGH, in_order);
    ORDER.set([0; 2]);
    apic::send(0, entry::TO_SELF | u32::from(LOW));
    apic::send(0, entry::TO_SELF | u32::from(HIGH));
    cpu::interrupt_window();
    cpu::interrupt_window();
    name.equal("the higher vector comes first", ORDER.get(), [HIGH, LOW]);

    apic::write(register::TPR, 0x50);
    name.equal("TPR shows in CR8", cpu::cr8(), 5);
    apic::send(0, entry::TO_SELF | u32::from(LOW));
    apic::send(0, entry::TO_SELF | u32::from(HIGH));
    cpu::interrupt_window();
    name.equal(
        "TPR holds its class back",
        (exceptions::count(LOW), exceptions::count(HIGH)),
        (1, 2),
    );
    cpu::set_cr8(4);
    name.equal("CR8 shows in TPR", apic::read(register::TPR), 0x40);
    cpu::interrupt_window();
    name.equal("a lower TPR lets it in", exceptions::count(LOW), 2);
    cpu::set_cr8(0);

    cpu::enable_interrupts();
    cpu::set_cr8(15);
    apic::send(0, entry::TO_SELF | u32::from(HIGH));
    let held = exceptions::count(HIGH);
    cpu::set_cr8(0);
    let free = exceptions::count(HIGH);
    cpu::disable_interrupts();
    name.equal(
        "MOV to CR8 lets an interrupt in at once",
        (held, free),
        (2, 3),
    );
}

fn errors(name: &Named) {
    apic::write(register::LVT_ERROR, entry::MASKED);
    apic::write(register::ESR, 0);
    apic::send(0, entry::TO_SELF | 5);
    apic::write(register::ESR, 0);
    let errors = apic::read(register::ESR);
    name.is(
        "an IPI with an illegal vector is an error",
        errors & 0x20 != 0,
        format_args!("ESR {errors:#x}"),
    );
    apic::write(register::ESR, 0);
    name.equal("ESR is 0 when read again", apic::read(register::ESR), 0);
}

/// Input ticks of the timer in so many microseconds.
fn counts(microseconds: u64) -> u32 {
    (microseconds * time::apic_hz() / 1_000_000) as u32
}

/// Waits in HLT until the timer has come `times` times; ticks that took.
fn halted(times: u64) -> u64 {
    let start = rdtsc();
    while exceptions::count(TIMER) < times {
        cpu::halt();
    }
    WHEN.get().wrapping_sub(start)
}

fn one_shot(name: &Named) {
    exceptions::on(TIMER, end);
    apic::write(register::DIVIDE, apic::DIVIDE_BY_1);
    apic::write(register::LVT_TIMER, TIMER.into());
    let expected = time::microseconds(10_000);
    let start = rdtsc();
    apic::write(register::INITIAL_COUNT, counts(10_000));
    let first = apic::read(register::CURRENT_COUNT);
    time::spin(expected / 4);
    let second = apic::read(register::CURRENT_COUNT);
    halted(1);
    let waited = WHEN.get().wrapping_sub(start);
    name.is(
        "the timer counts down",
        second < first && second > first / 2,
        format_args!("{first} then {second}"),
    );
    name.is(
        "the one-shot timer fires after its time in HLT",
        (expected..expected + expected / 20 + 20 * time::exit_cost()).contains(&waited),
        format_args!("{waited} ticks instead of {expected}"),
    );
    name.equal(
        "the one-shot timer stands at 0",
        apic::read(register::CURRENT_COUNT),
        0,
    );

    let start = rdtsc();
    apic::write(register::INITIAL_COUNT, counts(10_000));
    cpu::enable_interrupts();
    time::wait(2 * expected, || exceptions::count(TIMER) == 2);
    cpu::disable_interrupts();
    let waited = WHEN.get().wrapping_sub(start);
    name.is(
        "the one-shot timer interrupts a loop",
        (expected..expected + expected / 20 + 20 * time::exit_cost()).contains(&waited),
        format_args!("{waited} ticks instead of {expected}"),
    );

    apic::write(register::DIVIDE, 0b0011); // by 16
    apic::write(register::INITIAL_COUNT, counts(10_000) / 16);
    exceptions::on(TIMER, end);
    let waited = halted(1);
    name.is(
        "the divider works",
        time::is_near(waited, expected, 5),
        format_args!("{waited} ticks instead of {expected}"),
    );
    apic::write(register::DIVIDE, apic::DIVIDE_BY_1);
    time::spin(expected * 2);
    name.equal("the one-shot timer fires once", exceptions::count(TIMER), 1);
}

fn periodic(name: &Named) {
    exceptions::on(TIMER, end);
    apic::write(register::LVT_TIMER, entry::PERIODIC | u32::from(TIMER));
    apic::write(register::INITIAL_COUNT, counts(2_000));
    let (waited, expected) = (halted(10), time::microseconds(20_000));
    name.is(
        "the periodic timer fires ten times in ten periods",
        time::is_near(waited, expected, 3),
        format_args!("{waited} ticks instead of {expected}"),
    );
    apic::write(register::INITIAL_COUNT, 0);
    let count = exceptions::count(TIMER);
    time::spin(time::microseconds(5_000));
    cpu::interrupt_window();
    name.is(
        "an initial count of 0 stops it",
        exceptions::count(TIMER) <= count + 1,
        format_args!("{count}"),
    );
}

fn tsc_deadline(name: &Named) {
    if cpuid(1, 0)[2] & 1 << 24 == 0 {
        return;
    }
    exceptions::on(TIMER, end);
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(TIMER));
    // Showing a result takes longer than the time is.
    let deadline = rdtsc() + time::microseconds(10_000);
    wrmsr(msr::TSC_DEADLINE, deadline);
    let shown = rdmsr(msr::TSC_DEADLINE);
    halted(1);
    let late = WHEN.get().wrapping_sub(deadline);
    name.equal("TSC_DEADLINE shows what was written", shown, Ok(deadline));
    name.is(
        "the TSC deadline is met",
        late < time::microseconds(200) + 20 * time::exit_cost(),
        format_args!("{late} ticks late"),
    );
    name.equal(
        "TSC_DEADLINE is 0 after that",
        rdmsr(msr::TSC_DEADLINE),
        Ok(0),
    );
    wrmsr(msr::TSC_DEADLINE, rdtsc() - 1000);
    cpu::interrupt_window();
    name.equal(
        "a deadline in the past fires at once",
        exceptions::count(TIMER),
        2,
    );
    wrmsr(msr::TSC_DEADLINE, rdtsc() + time::microseconds(1_000));
    wrmsr(msr::TSC_DEADLINE, 0);
    time::spin(time::microseconds(2_000));
    cpu::interrupt_window();
    name.equal("a deadline of 0 disarms", exceptions::count(TIMER), 2);
}

fn masked_timer(name: &Named) {
    apic::write(register::LVT_TIMER, entry::MASKED | u32::from(TIMER));
    exceptions::on(TIMER, end);
    apic::write(register::INITIAL_COUNT, counts(1_000));
    time::spin(time::microseconds(2_000));
    cpu::interrupt_window();
    name.equal("a masked timer is silent", exceptions::count(TIMER), 0);
    apic::write(register::INITIAL_COUNT, 0);
}

/// Its page is elsewhere for a while.
fn moved() {
    const ELSEWHERE: u64 = 0xfd00_0000;
    const HELD_BACK: u32 = 0xf0;
    let home = apic::base();
    let register = |register: u32| ELSEWHERE + u64::from(register);
    wrmsr(msr::APIC_BASE, ELSEWHERE | home & 0xfff);
    check_equal(
        "a moved xAPIC's registers are there",
        memory::read32(register(register::VERSION)) & 0xf0,
        0x10,
    );
    check_equal(
        "and where it was is nobody",
        memory::read32(apic::BASE + u64::from(register::VERSION)),
        u32::MAX,
    );
    exceptions::on(LOW, |_| {
        memory::write32(ELSEWHERE + u64::from(register::EOI), 0);
    });
    for round in 1..=2 {
        memory::write32(register(register::TPR), HELD_BACK);
        memory::write32(register(register::ICR), entry::TO_SELF | u32::from(LOW));
        cpu::interrupt_window();
        check_equal(
            "its TPR holds an interrupt back",
            exceptions::count(LOW),
            round - 1,
        );
        memory::write32(register(register::TPR), 0);
        cpu::interrupt_window();
        check_equal("which comes then", exceptions::count(LOW), round);
        check_equal(
            "and is ended",
            memory::read32(register(register::ISR + u32::from(LOW) / 32 * 16)),
            0,
        );
    }
    memory::write32(register(register::TPR), HELD_BACK);
    memory::write32(register(register::ICR), entry::TO_SELF | u32::from(LOW));
    wrmsr(msr::APIC_BASE, home & !apic::ENABLED);
    cpu::interrupt_window();
    check_equal(
        "what it holds back is gone when it is off",
        exceptions::count(LOW),
        2,
    );
    wrmsr(msr::APIC_BASE, home);
    apic::write(register::SVR, apic::SVR_ENABLED);
    check_equal("it is at home again", apic::read(register::TPR), 0);
}

fn switching() {
    let base = apic::base();
    apic::set_x2apic(true);
    check_equal(
        "APIC_BASE shows x2APIC mode",
        apic::base(),
        base | apic::X2APIC,
    );
    check(
        "x2APIC cannot go back to xAPIC at once",
        is_gp(wrmsr(msr::APIC_BASE, base)),
    );
    check_equal("x2APIC identifier is 0", rdmsr(msr::X2APIC + 2), Ok(0));
    check_equal(
        "in x2APIC mode nobody is at the page",
        memory::read32(apic::BASE + 0x30),
        u32::MAX,
    );
    let disabled = base & !apic::ENABLED;
    check_equal(
        "the APIC can be disabled",
        wrmsr(msr::APIC_BASE, disabled),
        None,
    );
    check("CPUID shows no APIC then", cpuid(1, 0)[3] & 1 << 9 == 0);
    check(
        "its registers are no MSRs then",
        is_gp(rdmsr(msr::X2APIC + 2).err()),
    );
    check(
        "the disabled APIC cannot go to x2APIC at once",
        is_gp(wrmsr(msr::APIC_BASE, base | apic::X2APIC)),
    );
    check_equal("it can be enabled again", wrmsr(msr::APIC_BASE, base), None);
    check_equal(
        "the page is back",
        memory::read32(apic::BASE + 0x30) & 0xf0,
        0x10,
    );
}

fn x2apic_only() {
    exceptions::on(LOW, end);
    wrmsr(msr::X2APIC + 0x3f, LOW.into());
    cpu::interrupt_window();
    check_equal("x2APIC self IPI comes", exceptions::count(LOW), 1);
    check(
        "x2APIC self IPI is not readable",
        is_gp(rdmsr(msr::X2APIC + 0x3f).err()),
    );
    check(
        "x2APIC EOI is not readable",
        is_gp(rdmsr(msr::X2APIC + 0x0b).err()),
    );
    check(
        "x2APIC EOI of 1 raises #GP",
        is_gp(wrmsr(msr::X2APIC + 0x0b, 1)),
    );
    check(
        "x2APIC identifier is not writable",
        is_gp(wrmsr(msr::X2APIC + 0x02, 1)),
    );
    check("x2APIC has no DFR", is_gp(rdmsr(msr::X2APIC + 0x0e).err()));
    check(
        "x2APIC TPR of 0x100 raises #GP",
        is_gp(wrmsr(msr::X2APIC + 0x08, 0x100)),
    );
    check(
        "x2APIC SVR with a high bit raises #GP",
        is_gp(wrmsr(msr::X2APIC + 0x0f, 1 << 40)),
    );
    check("x2APIC version is readable", rdmsr(msr::X2APIC + 3).is_ok());
    check(
        "x2APIC register 4 is not there",
        is_gp(rdmsr(msr::X2APIC + 4).err()),
    );
    check_detail(
        "x2APIC logical identifier is derived",
        rdmsr(msr::X2APIC + 0x0d) == Ok(1),
        format_args!("it is not"),
    );
}
