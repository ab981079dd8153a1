//! Several CPUs: how they start, and what they send each other.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::exceptions::{self, Frame, vector};
use vireo_test_guests::memory::{read8, read32};
use vireo_test_guests::processors::{self, MOST, wait};
use vireo_test_guests::report::{check_named, say};
use vireo_test_guests::{acpi, check, check_equal, io_apic, pit, start_info, time};

vireo_test_guests::guest!(run);

const VECTOR: u8 = 0x61;
const PIT: u8 = 0x62;
const PONG: u8 = 0x63;
/// Flags of the DFR.
const FLAT: u32 = u32::MAX;
const CLUSTER: u32 = 0x0fff_ffff;
/// An identifier that no CPU has.
const NOBODY: u32 = 77;
const STORM: u32 = 20_000;
const ROUNDS: u64 = 500;

/// Interrupts that each CPU has taken.
static HITS: [AtomicU32; MOST] = [const { AtomicU32::new(0) }; MOST];
static NMIS: [AtomicU32; MOST] = [const { AtomicU32::new(0) }; MOST];
static STOP: AtomicBool = AtomicBool::new(false);
static CLOCK: AtomicU64 = AtomicU64::new(0);
static BACKWARDS: AtomicU32 = AtomicU32::new(0);

fn hit(_: &mut Frame) {
    HITS[apic::own_id() as usize % MOST].fetch_add(1, SeqCst);
    apic::eoi();
}

fn nmi(_: &mut Frame) {
    NMIS[apic::own_id() as usize % MOST].fetch_add(1, SeqCst);
}

fn run() {
    let count = listed();
    check_named(
        format_args!("the MADT lists several CPUs"),
        (2..=MOST as u32).contains(&count),
        format_args!("{count}"),
    );
    check_equal("the MP table lists as many", in_mp_table(), count);
    let [_, logical, _, id] = cpu::cpuid(0xb, 1);
    check_equal("CPUID counts as many", logical & 0xffff, count);
    check_equal("CPUID names this one", id, 0);
    exceptions::on(VECTOR, hit);
    exceptions::on(PIT, hit);
    exceptions::on(vector::NMI, nmi);
    apic::write(register::SVR, apic::SVR_ENABLED);
    cpu::enable_interrupts();
    processors::prepare();
    starting(count);
    Mode {
        name: "xAPIC",
        count,
    }
    .check();
    logical_xapic(count);
    everywhere(count, || set_x2apic(true));
    Mode {
        name: "x2APIC",
        count,
    }
    .check();
    logical_x2apic(count);
    everywhere(count, || set_x2apic(false));
    halting();
    nmis_at_once();
    hypercalls(count);
    clocks(count);
    devices();
    storms(count);
    costs();
    stopping(count);
}

/// Local APICs in the MADT that are enabled.
fn listed() -> u32 {
    let xsdt = acpi::xsdt(start_info::rsdp());
    let Some(madt) = acpi::find(xsdt, b"APIC") else {
        return 0;
    };
    let (mut at, end) = (madt + 44, madt + u64::from(acpi::length(madt)));
    let mut count = 0;
    while at < end {
        count += u32::from(read8(at) == 0 && read8(at + 4) & 1 != 0);
        at += u64::from(read8(at + 1).max(2));
    }
    count
}

/// Processors in the table of the MultiProcessor Specification; 0 where something is wrong
/// with it.
fn in_mp_table() -> u32 {
    let Some(pointer) = (0xf_0000u64..0x10_0000)
        .step_by(16)
        .find(|&at| acpi::signature(at) == *b"_MP_")
    else {
        return 0;
    };
    let table = u64::from(read32(pointer + 4));
    let length = read32(table + 4) & 0xffff;
    let whole = acpi::checksum_is_right(pointer, 16)
        && acpi::signature(table) == *b"PCMP"
        && acpi::checksum_is_right(table, length);
    let (mut at, mut count) = (table + 44, 0);
    while whole && at < table + u64::from(length) {
        let processor = read8(at) == 0;
        count += u32::from(processor && read8(at + 3) & 1 != 0);
        at += if processor { 20 } else { 8 };
    }
    count
}

fn set_x2apic(on: bool) {
    let base = cpu::rdmsr_unchecked(msr::APIC_BASE) & !(apic::X2APIC | apic::ENABLED);
    if on {
        cpu::wrmsr_unchecked(msr::APIC_BASE, base | apic::X2APIC | apic::ENABLED);
    } else {
        cpu::wrmsr_unchecked(msr::APIC_BASE, base);
        cpu::wrmsr_unchecked(msr::APIC_BASE, base | apic::ENABLED);
    }
    apic::write_unchecked(register::SVR, apic::SVR_ENABLED);
}

/// Runs `work` on the others, and then here.
fn everywhere(count: u32, work: fn()) {
    for id in 1..count {
        check_named(
            format_args!("CPU {id} does what it is given"),
            processors::run(id, work),
            format_args!("it does not"),
        );
    }
    work();
}

fn starting(count: u32) {
    processors::start_up(1);
    check(
        "a start-up interrupt after none or another one starts a CPU that waits",
        wait(|| processors::runs(1)),
    );
    for id in 1..count {
        check_named(
            format_args!("CPU {id} starts"),
            processors::start(id),
            format_args!("it does not"),
        );
    }
    static SEEN: AtomicU32 = AtomicU32::new(0);
    let look = || SEEN.store(apic::own_id(), SeqCst);
    for id in 1..count {
        processors::run(id, look);
        check_equal("it has its own identifier", SEEN.load(SeqCst), id);
    }
    processors::start_up(1);
    check(
        "a start-up interrupt does nothing to a CPU that runs",
        processors::run(1, look),
    );
    processors::start_up(NOBODY);
    processors::init(NOBODY);
    check("nor does one to nobody", processors::run(1, look));
}

/// What is alike in both modes.
struct Mode {
    name: &'static str,
    count: u32,
}

impl Mode {
    /// Sends `command`, and looks who takes it: those whose bit is set in `expected`.
    fn sends(&self, what: &str, destination: u32, command: u32, expected: u32) {
        reset();
        apic::send(destination, command);
        let taken = || (0..self.count).fold(0, |mask, id| mask | hits(id).min(1) << id);
        wait(|| taken() & expected == expected);
        // One that should not come has time to.
        let others = (1..self.count).all(|id| processors::run(id, || ()));
        let total: u32 = (0..self.count).map(hits).sum();
        check_named(
            format_args!("{} {what}", self.name),
            taken() == expected && total == expected.count_ones() && others,
            format_args!("{:#x} have it, {total} times, not {expected:#x}", taken()),
        );
    }

    fn check(&self) {
        let all = (1 << self.count) - 1;
        let fixed = u32::from(VECTOR);
        let everybody = if apic::is_x2apic() { u32::MAX } else { 0xff };
        for id in 0..self.count {
            self.sends("a physical destination", id, fixed, 1 << id);
        }
        self.sends("a physical broadcast", everybody, fixed, all);
        self.sends("to all", 0, fixed | entry::TO_ALL, all);
        self.sends("to others", 0, fixed | entry::TO_OTHERS, all & !1);
        self.sends("to itself", 0, fixed | entry::TO_SELF, 1);
        self.sends("to nobody", NOBODY, fixed, 0);
        processors::run(1, || apic::write_unchecked(register::SVR, 0xff));
        self.sends("to one that is disabled", 1, fixed, 0);
        processors::run(1, || {
            apic::write_unchecked(register::SVR, apic::SVR_ENABLED)
        });
        reset();
        apic::send(everybody, fixed | entry::LOWEST_PRIORITY);
        let total = || (0..self.count).map(hits).sum::<u32>();
        wait(|| total() > 0);
        processors::run(1, || ());
        check_named(
            format_args!("{} lowest priority goes to one", self.name),
            total() == 1,
            format_args!("to {}", total()),
        );
        reset();
        apic::send(1, entry::NMI);
        check_named(
            format_args!("{} an NMI comes", self.name),
            wait(|| NMIS[1].load(SeqCst) == 1),
            format_args!("it does not"),
        );
        apic::send(0, entry::NMI | entry::TO_OTHERS);
        check_named(
            format_args!("{} and to others, not here", self.name),
            wait(|| NMIS[1].load(SeqCst) == 2) && NMIS[0].load(SeqCst) == 0,
            format_args!("it does not"),
        );
    }
}

fn hits(id: u32) -> u32 {
    HITS[id as usize % MOST].load(SeqCst)
}

fn reset() {
    for (hits, nmis) in HITS.iter().zip(&NMIS) {
        hits.store(0, SeqCst);
        nmis.store(0, SeqCst);
    }
}

fn logical_xapic(count: u32) {
    let mode = Mode {
        name: "flat",
        count,
    };
    everywhere(count, || {
        apic::write_unchecked(register::DFR, FLAT);
        apic::write_unchecked(register::LDR, 1 << (24 + apic::own_id()));
    });
    let logical = entry::LOGICAL | u32::from(VECTOR);
    mode.sends("one", 2, logical, 2);
    mode.sends("two", 3, logical, 3);
    mode.sends("one that is not there", 0x80, logical, 0);
    let mode = Mode {
        name: "cluster",
        count,
    };
    everywhere(count, || {
        apic::write_unchecked(register::DFR, CLUSTER);
        // Two in a cluster.
        let own = apic::own_id();
        apic::write_unchecked(register::LDR, ((own / 2) << 4 | 1 << (own % 2)) << 24);
    });
    mode.sends("one", 0x02, logical, 2);
    mode.sends("both of the first", 0x03, logical, 3);
    mode.sends("one of a cluster that is not there", 0x91, logical, 0);
    mode.sends("all", 0xff, logical, (1 << count) - 1);
    let third = if count > 2 { 4 } else { 0 };
    mode.sends("the first of the second", 0x11, logical, third);
}

fn logical_x2apic(count: u32) {
    let mode = Mode {
        name: "x2APIC logical",
        count,
    };
    let logical = entry::LOGICAL | u32::from(VECTOR);
    mode.sends("one", 2, logical, 2);
    mode.sends("two", 3, logical, 3);
    mode.sends("another cluster", 1 << 16 | 2, logical, 0);
    check(
        "reserved bits of the ICR fault",
        exceptions::is_gp(cpu::wrmsr(msr::X2APIC + 0x30, 1 << 13)),
    );
    check(
        "and so does an illegal mode's bit of another register",
        exceptions::is_gp(cpu::wrmsr(msr::X2APIC + 0x3f, 1 << 9)),
    );
}

/// CPUs that wait are woken.
fn halting() {
    reset();
    static AWAKE: AtomicU32 = AtomicU32::new(0);
    for round in 1..=3 {
        processors::give(1, || {
            cpu::halt();
            cpu::enable_interrupts();
            AWAKE.fetch_add(1, SeqCst);
        });
        time::spin(time::microseconds(300));
        apic::send(1, VECTOR.into());
        check(
            "an interrupt ends another CPU's HLT",
            wait(|| AWAKE.load(SeqCst) == round),
        );
    }
    processors::give(1, || {
        cpu::disable_interrupts();
        // SAFETY: waits; an NMI has a handler.
        unsafe { core::arch::asm!("hlt") };
        cpu::enable_interrupts();
    });
    time::spin(time::microseconds(300));
    apic::send(1, entry::NMI);
    check(
        "an NMI ends a HLT with interrupts off",
        wait(|| processors::is_idle(1)),
    );
}

/// Two NMIs that one CPU sends another are both handled there, however close they come, and also
/// where the other does not have the machine's CPU just then.
fn nmis_at_once() {
    reset();
    for round in 1..=10 {
        processors::run(1, || {
            apic::send(0, entry::NMI);
            apic::send(0, entry::NMI);
            // Behind them, so that it is known when they have come.
            apic::send(0, VECTOR.into());
        });
        wait(|| hits(0) == round);
        check_equal(
            "two NMIs at once both come",
            NMIS[0].load(SeqCst),
            2 * round,
        );
    }
}

/// A hypercall with four arguments.
fn hypercall(number: u64, [a, b, c, d]: [u64; 4]) -> i64 {
    let result;
    // SAFETY: it touches RAX and nothing else of the guest; RBX is the compiler's.
    unsafe {
        core::arch::asm!(
            "xchg rbx, {a}",
            "vmcall",
            "xchg rbx, {a}",
            a = inout(reg) a => _,
            inlateout("rax") number => result,
            in("rcx") b,
            in("rdx") c,
            in("rsi") d,
        );
    }
    result
}

/// KVM's hypercall that sends to many at once.
fn hypercalls(count: u32) {
    const SEND_IPI: u64 = 10;
    let fixed = u64::from(VECTOR);
    let all = (1 << count) - 1;
    for (what, arguments, number, expected) in [
        (
            "to all",
            [u64::MAX, u64::MAX, 0, fixed],
            i64::from(count),
            all,
        ),
        ("to the second", [0b10, 0, 0, fixed], 1, 0b10),
        (
            "to those from the second on",
            [u64::MAX, 0, 1, fixed],
            i64::from(count) - 1,
            all & !1,
        ),
        ("to nobody", [u64::MAX, 0, u64::from(NOBODY), fixed], 0, 0),
        ("with a vector that is illegal", [0b11, 0, 0, 5], 0, 0),
        (
            "with a logical destination",
            [0b11, 0, 0, fixed | 1 << 11],
            -22,
            0,
        ),
    ] {
        reset();
        let result = hypercall(SEND_IPI, arguments);
        let taken = || (0..count).fold(0, |mask, id| mask | hits(id).min(1) << id);
        wait(|| taken() & expected == expected);
        let others = (1..count).all(|id| processors::run(id, || ()));
        check_named(
            format_args!("the hypercall that sends, {what}"),
            (result, taken()) == (number, expected) && others,
            format_args!("{result}, and {:#x} have it", taken()),
        );
    }
    reset();
    let nmi = hypercall(SEND_IPI, [0b10, 0, 0, entry::NMI.into()]);
    check(
        "it sends NMIs",
        nmi == 1 && wait(|| NMIS[1].load(SeqCst) == 1),
    );
    check_equal("another one does not exist", hypercall(77, [0; 4]), -1000);
}

/// A clock that is handed around never goes back.
fn clocks(count: u32) {
    static TURN: AtomicU32 = AtomicU32::new(0);
    fn hand_around(own: u32, next: u32) {
        for _ in 0..100 {
            while TURN.load(SeqCst) != own {
                if STOP.load(SeqCst) {
                    return;
                }
                core::hint::spin_loop();
            }
            let now = rdtsc();
            if now < CLOCK.swap(now, SeqCst) {
                BACKWARDS.fetch_add(1, SeqCst);
            }
            TURN.store(next, SeqCst);
        }
    }
    for id in 1..count {
        TURN.store(0, SeqCst);
        static OTHER: AtomicU32 = AtomicU32::new(0);
        OTHER.store(id, SeqCst);
        processors::give(id, || hand_around(OTHER.load(SeqCst), 0));
        hand_around(0, id);
        check(
            "the clock has been handed around",
            wait(|| processors::is_idle(id)),
        );
    }
    check_equal("it never went back", BACKWARDS.load(SeqCst), 0);
}

/// Any CPU may program a device, and any gets its interrupts.
fn devices() {
    reset();
    io_apic::redirect(2, 1 << 56 | u64::from(PIT));
    pit::start(0, 0, 1000);
    check(
        "a device's interrupt goes to another CPU",
        wait(|| hits(1) == 1) && hits(0) == 0,
    );
    reset();
    io_apic::redirect(2, u64::from(PIT));
    processors::run(1, || pit::start(0, 0, 1000));
    check(
        "a device that another CPU has set interrupts this one",
        wait(|| hits(0) == 1) && hits(1) == 0,
    );
    io_apic::redirect(2, io_apic::entry::MASKED);
}

fn storms(count: u32) {
    reset();
    for _ in 0..STORM {
        apic::send(1, entry::NMI);
    }
    check(
        "a storm of NMIs leaves a CPU that works",
        processors::run(1, || ()),
    );
    check(
        "of which it has taken some",
        (1..=STORM).contains(&NMIS[1].load(SeqCst)),
    );
    for _ in 0..STORM {
        apic::send(NOBODY, VECTOR.into());
        apic::send(0, entry::TO_OTHERS | u32::from(VECTOR));
    }
    for id in 1..count {
        check("and so does one of interrupts", processors::run(id, || ()));
    }
}

/// What an interrupt from one CPU to another that runs costs, there and back.
fn costs() {
    static PONGS: AtomicU32 = AtomicU32::new(0);
    exceptions::on(PONG, |_| {
        PONGS.fetch_add(1, SeqCst);
        apic::eoi();
    });
    STOP.store(false, SeqCst);
    processors::give(1, || {
        while !STOP.load(SeqCst) {
            core::hint::spin_loop();
        }
    });
    let start = rdtsc();
    for round in 1..=ROUNDS as u32 {
        apic::send(1, PONG.into());
        if !wait(|| PONGS.load(SeqCst) == round) {
            break;
        }
    }
    let ticks = rdtsc() - start;
    STOP.store(true, SeqCst);
    check(
        "each interrupt is taken",
        PONGS.load(SeqCst) == ROUNDS as u32,
    );
    say(format_args!("IPI to a CPU that runs: {ticks} in {ROUNDS}"));
}

fn stopping(count: u32) {
    for id in 1..count {
        processors::init(id);
        // It is under way for a moment.
        time::spin(time::microseconds(3000));
        check(
            "INIT stops a CPU",
            !processors::runs(id) && !processors::run(id, || ()),
        );
        check("and it starts again", processors::start(id));
    }
    static WENT_ON: AtomicBool = AtomicBool::new(false);
    processors::give(1, || {
        apic::send(apic::own_id(), entry::INIT | entry::LEVEL_ASSERT);
        time::spin(time::microseconds(300));
        WENT_ON.store(true, SeqCst);
    });
    time::spin(time::microseconds(3000));
    check("INIT to itself stops a CPU", !WENT_ON.load(SeqCst));
    check("and it starts again", processors::start(1));
    everywhere(count, cpu::disable_interrupts);
}
