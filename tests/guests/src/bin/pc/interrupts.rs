//! When interrupts come: shadows, HLT, NMI, and delivery through pages that
//! the hypervisor has not mapped yet.

use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, msr, rdmsr};
use vireo_test_guests::descriptors::{self, SPARE_STACK_INDEX, selector};
use vireo_test_guests::exceptions::{self, Frame, is_gp, vector};
use vireo_test_guests::{Shared, check, check_equal, execute, time};

/// A vector for interrupts to ourselves.
const IPI: u8 = 0x41;
const LATER: u8 = 0x42;
/// So many ticks are more than an exit takes.
const DEADLINES: u64 = 1500;

static RIP: Shared<u64> = Shared::new(0);
static DEPTH: Shared<u64> = Shared::new(0);
static DEEPEST: Shared<u64> = Shared::new(0);

fn note_rip(frame: &mut Frame) {
    RIP.set(frame.rip);
    apic::eoi();
}

pub fn check_all() {
    shadows();
    shadows_across_exits();
    trap_beside_interrupt();
    halt();
    // From here on NMIs have a handler: one that comes late fails its check, and not the guest.
    nmi();
    delivery_to_new_pages();
    interrupt_beside_exception();
}

/// An interrupt waits, whose handler notes where it came.
fn request() {
    exceptions::on(IPI, note_rip);
    RIP.set(0);
    apic::send(0, entry::TO_SELF | u32::from(IPI));
}

/// An interrupt waits while `$first` is executed; it must come where 2 is.
macro_rules! taken_after {
    ($name:literal, $($code:literal),*) => {{
        request();
        let mut after = 0u64;
        execute!(
            "mov r8, rbx",
            "lea {after}, [rip + 2f]",
            $($code,)*
            "2: nop",
            "cli",
            "mov rbx, r8",
            after = out(reg) after,
            inout("rax") 0u64 => _,
            inout("rcx") 0u64 => _,
            inout("rdx") 0x80u64 => _,
            out("r8") _,
            inout("r9") u64::from(selector::DATA) => _,
        );
        check_equal($name, RIP.get(), after);
        check_equal(concat!($name, ": once"), exceptions::count(IPI), 1);
    }};
}

fn shadows() {
    taken_after!("STI holds an interrupt back over NOP", "sti", "nop");
    taken_after!("STI holds an interrupt back over CPUID", "sti", "cpuid");
    taken_after!("STI holds an interrupt back over IN", "sti", "in al, dx");
    taken_after!(
        "MOV SS holds an interrupt back over NOP",
        "sti",
        "mov ss, r9d",
        "nop"
    );
    taken_after!(
        "MOV SS holds an interrupt back over CPUID",
        "sti",
        "mov ss, r9d",
        "cpuid"
    );
    taken_after!(
        "POPF lets an interrupt in at once",
        "pushfq",
        "or qword ptr [rsp], 0x200",
        "popfq"
    );

    held_for_one_iteration();

    request();
    execute!("sti", "cli");
    check_equal("STI and CLI let no interrupt in", exceptions::count(IPI), 0);
    cpu::interrupt_window();
    check_equal("an open window lets it in", exceptions::count(IPI), 1);
}

/// An instruction is stepped through that makes an interrupt due: its trap comes first, and the
/// interrupt behind it (SDM 3, table 7-2).
fn trap_beside_interrupt() {
    static ORDER: Shared<u64> = Shared::new(0);
    const TRAP_FLAG: u64 = 1 << 8;
    exceptions::on(vector::DEBUG, |frame| {
        frame.rflags &= !TRAP_FLAG;
        ORDER.set(ORDER.get() * 10 + 1);
    });
    exceptions::on(IPI, |_| {
        ORDER.set(ORDER.get() * 10 + 2);
        apic::eoi();
    });
    execute!(
        "sti",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "mov [rdi], eax",
        "nop",
        "cli",
        in("rdi") apic::BASE + u64::from(register::ICR),
        in("eax") entry::TO_SELF | u32::from(IPI),
    );
    exceptions::off(vector::DEBUG);
    check_equal("a trap comes before an interrupt", ORDER.get(), 12);
}

/// The shadow of STI ends behind the first iteration of a string instruction; what exits may do
/// some at once.
fn held_for_one_iteration() {
    /// Where nobody answers.
    const NOWHERE: u64 = 0xd000_0000;
    const SCRATCH: u64 = 0x3ff;
    macro_rules! interrupted {
        ($name:literal, $code:literal) => {
            request();
            let mut at = 0u64;
            execute!(
                "lea {at}, [rip + 2f]",
                "sti",
                concat!("2: ", $code),
                "cli",
                at = out(reg) at,
                inout("rcx") 1000u64 => _,
                inout("rsi") NOWHERE => _,
                inout("rdi") NOWHERE => _,
                in("rdx") SCRATCH,
            );
            check_equal($name, RIP.get(), at);
        };
    }
    interrupted!(
        "an interrupt comes between the iterations of REP STOSB",
        "rep stosb"
    );
    interrupted!(
        "an interrupt comes between the iterations of REP OUTSB",
        "rep outsb"
    );
}

/// The shadow of STI holds wherever an exit falls: a timer's deadline comes in each of the
/// instructions once.
fn shadows_across_exits() {
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(LATER));
    let (mut early, mut late) = (0, 0);
    for ticks in 0..DEADLINES {
        exceptions::on(IPI, note_rip);
        exceptions::on(LATER, note_rip);
        apic::send(0, entry::TO_SELF | u32::from(IPI));
        cpu::wrmsr(msr::TSC_DEADLINE, cpu::rdtsc() + ticks);
        execute!(".rept 64", "sti", "cli", ".endr");
        let taken = || exceptions::count(IPI) + exceptions::count(LATER);
        early += taken();
        time::wait(time::microseconds(1000), || {
            apic::has_vector(register::IRR, LATER)
        });
        cpu::interrupt_window();
        late += taken();
    }
    check_equal("STI and CLI let no interrupt in at any exit", early, 0);
    check_equal("they come after it", late, 2 * DEADLINES);
}

fn halt() {
    request();
    cpu::halt();
    check_equal(
        "HLT wakes by an interrupt that waited",
        exceptions::count(IPI),
        1,
    );
    exceptions::on(vector::NMI, |_| {});
    apic::send(0, entry::TO_SELF | entry::NMI);
    check_equal(
        "an NMI to ourselves comes",
        exceptions::count(vector::NMI),
        1,
    );
}

fn nested_nmi(_: &mut Frame) {
    DEPTH.set(DEPTH.get() + 1);
    DEEPEST.set(DEEPEST.get().max(DEPTH.get()));
    if exceptions::count(vector::NMI) < 3 {
        apic::send(0, entry::TO_SELF | entry::NMI);
        core::hint::black_box(cpu::cpuid(0, 0));
    }
    DEPTH.set(DEPTH.get() - 1);
}

fn nmi() {
    exceptions::on(vector::NMI, nested_nmi);
    DEPTH.set(0);
    DEEPEST.set(0);
    apic::send(0, entry::TO_SELF | entry::NMI);
    time::wait(time::microseconds(2000), || {
        exceptions::count(vector::NMI) >= 3
    });
    check_equal(
        "an NMI in the NMI's handler comes after it",
        exceptions::count(vector::NMI),
        3,
    );
    check_equal(
        "an NMI's handler is not interrupted by another",
        DEEPEST.get(),
        1,
    );
}

/// Memory that nobody has touched: 2 MiB each, so that no page of the EPT
/// reaches from one to the next.
fn untouched(index: u64) -> u64 {
    (16 + 2 * index) << 20
}

fn delivery_to_new_pages() {
    let stack_of = |vector: u8, index: u64| {
        descriptors::set_interrupt_stack(descriptors::SPARE_STACK_INDEX, untouched(index) + 0x1000);
        exceptions::set_interrupt_stack(vector, SPARE_STACK_INDEX);
        exceptions::on(vector, |frame| RIP.set(frame.rip));
    };
    let done = |vector: u8| {
        exceptions::set_interrupt_stack(vector, 0);
        exceptions::off(vector);
        exceptions::count(vector)
    };

    stack_of(0x80, 0);
    let mut after = 0u64;
    execute!("lea {}, [rip + 2f]", "int 0x80", "2:", out(reg) after);
    check_equal("INT n is delivered to a new page", done(0x80), 1);
    check_equal("INT n to a new page returns behind it", RIP.get(), after);

    stack_of(vector::BREAKPOINT, 1);
    execute!("lea {}, [rip + 2f]", "int3", "2:", out(reg) after);
    check_equal(
        "INT3 is delivered to a new page",
        done(vector::BREAKPOINT),
        1,
    );
    check_equal("INT3 to a new page returns behind it", RIP.get(), after);

    descriptors::set_interrupt_stack(descriptors::SPARE_STACK_INDEX, untouched(2) + 0x1000);
    exceptions::set_interrupt_stack(vector::GENERAL_PROTECTION, SPARE_STACK_INDEX);
    check(
        "an injected #GP is delivered to a new page",
        is_gp(rdmsr(0x1234_5678).err()),
    );
    exceptions::set_interrupt_stack(vector::GENERAL_PROTECTION, 0);

    stack_of(IPI, 3);
    request();
    cpu::interrupt_window();
    check_equal("an interrupt is delivered to a new page", done(IPI), 1);

    stack_of(vector::NMI, 4);
    apic::send(0, entry::TO_SELF | entry::NMI);
    time::spin(time::microseconds(100));
    check_equal("an NMI is delivered to a new page", done(vector::NMI), 1);
    exceptions::on(vector::NMI, |_| {});
    apic::send(0, entry::TO_SELF | entry::NMI);
    time::spin(time::microseconds(100));
    check_equal(
        "another NMI comes after that",
        exceptions::count(vector::NMI),
        1,
    );
}

/// The timer expires while an exception is injected: neither is lost.
fn interrupt_beside_exception() {
    use apic::register::{DIVIDE, INITIAL_COUNT, LVT_TIMER};
    apic::write(DIVIDE, apic::DIVIDE_BY_1);
    apic::write(LVT_TIMER, LATER.into());
    exceptions::on(LATER, note_rip);
    let per_tick = time::apic_hz() / time::tsc_hz();
    let mut lost = 0;
    let mut faults = 0;
    for step in 0..80 {
        let before = exceptions::count(LATER);
        apic::write(INITIAL_COUNT, (100 + 50 * step) * per_tick as u32);
        cpu::enable_interrupts();
        faults += u32::from(rdmsr(0x1234_5678).is_err());
        let came = time::wait(20_000, || exceptions::count(LATER) != before);
        cpu::disable_interrupts();
        lost += u32::from(came.is_none());
    }
    check_equal("an interrupt beside an exception is not lost", lost, 0);
    check_equal("an exception beside an interrupt is not lost", faults, 80);
    apic::write(INITIAL_COUNT, 0);
}
