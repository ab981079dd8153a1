//! What VM exits cost, counted in ticks of the time-stamp counter around many
//! rounds of each; on an emulator whose counter counts instructions, that is
//! instructions, the guest's loop included. One line for each:
//!
//! ```text
//! bench: NAME: TICKS in ROUNDS
//! bench: NAME: TICKS in ROUNDS, EXITS exits, READS VMREADs, WRITES VMWRITEs
//! ```
//!
//! The second form is that of a hypervisor which counts (`vmx::count`); its ticks
//! include the counting. With the command line `pause`, each line is followed by a
//! pause, in which somebody outside can look at counters of his own, and nothing is
//! measured three times, the second time with a longer line.
//!
//! With `apart` or `together` it measures two CPUs ([`pair`]).
#![no_std]
#![no_main]

mod pair;

use core::arch::{asm, naked_asm};
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;
use vireo_test_guests::apic::{self, DIVIDE_BY_1, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::memory::{read32, write32};
use vireo_test_guests::time::{microseconds, spin as pause};
use vireo_test_guests::{Shared, exceptions, report, serial, start_info};

vireo_test_guests::guest!(run);

/// Rounds of what is quick.
const ROUNDS: u64 = 2000;
/// Rounds of what waits for a timer.
const WAITS: u64 = 100;
/// Microseconds of a pause.
const PAUSE: u64 = 20_000;
/// Vector of the interrupts that are measured.
const VECTOR: u8 = 0x60;
/// Vector of the timer whose handler looks at the clock.
const TIMER: u8 = 0x61;
/// Pages that nobody has touched: 512 of 4 KiB, and the rest of the memory in
/// steps of 2 MiB.
const UNTOUCHED: u64 = 0x0300_0000;
const UNTOUCHED_LARGE: u64 = 0x0400_0000;
const SMALL: u64 = 4096;
const LARGE: u64 = 2 << 20;
/// Pages of 2 MiB from [`UNTOUCHED_LARGE`] to the end of 128 MiB.
const LARGE_PAGES: u64 = 31;
/// I/O APIC: index and data.
const IO_APIC: u64 = 0xfec0_0000;
/// A register of an emulated device: the first 8259's mask.
const PIC_MASK: u16 = 0x21;

/// One instruction or a few, without checks around them.
macro_rules! raw {
    ($($asm:tt)*) => {{
        // SAFETY: the guest's own machine, and the operands say what is changed.
        unsafe { asm!($($asm)*) }
    }};
}

fn run() {
    if start_info::command_line_is("apart") {
        apic::set_x2apic(true);
        pair::apart();
    } else if start_info::command_line_is("together") {
        apic::set_x2apic(true);
        pair::together();
    } else {
        alone();
    }
    (0..NUMBER.get())
        .filter_map(|at| MEASURED.at(at))
        .for_each(print);
    report::finish();
}

/// All that one CPU can measure.
fn alone() {
    instructions();
    registers();
    memory();
    apic::set_x2apic(true);
    exceptions::set_raw(VECTOR, end_x2apic);
    exceptions::set_raw(TIMER, time_x2apic);
    interrupts::<X2Apic>();
    timers();
    apic::set_x2apic(false);
    exceptions::set_raw(VECTOR, end_xapic);
    interrupts::<XApic>();
}

/// What a hypervisor that counts has counted, in the order of the output.
type Counts = [u64; 3];

/// Asks for the counts.
fn counts() -> Option<Counts> {
    /// The hypercall, and what says that there is none.
    const NUMBER: u64 = u64::from_le_bytes(*b"vmcounts");
    const NO_SUCH_HYPERCALL: i64 = -1000;
    let (exits, reads, writes): (i64, u64, u64);
    raw!("vmcall", inout("rax") NUMBER => exits, out("rcx") reads, out("rdx") writes, options(nomem, nostack));
    (exits != NO_SUCH_HYPERCALL).then_some([exits as u64, reads, writes])
}

/// Measures `rounds` of `body`, after one that does not count.
#[inline(always)]
fn measure(name: &'static str, rounds: u64, body: impl FnMut()) {
    measure_in("", name, rounds, body);
}

/// The same where one call of `body` is not a round: [`ROUNDS`] of it are `rounds`.
#[inline(always)]
fn measure_rounds(name: &'static str, rounds: u64, mut body: impl FnMut()) {
    body();
    let start = rdtsc();
    for _ in 0..ROUNDS {
        body();
    }
    let ticks = rdtsc() - start;
    keep("", name, ticks, rounds, None);
}

/// The same with the APIC's mode in front of the name.
#[inline(always)]
fn measure_in(mode: &'static str, name: &'static str, rounds: u64, mut body: impl FnMut()) {
    body();
    let before = counts();
    let start = rdtsc();
    for _ in 0..rounds {
        body();
    }
    let ticks = rdtsc() - start;
    keep(mode, name, ticks, rounds, before.zip(counts()));
}

/// One line of the output.
#[derive(Clone, Copy)]
struct Measured {
    /// In front of the name.
    mode: &'static str,
    name: &'static str,
    ticks: u64,
    rounds: u64,
    /// Before and after.
    counts: Option<(Counts, Counts)>,
}

/// More lines than there are.
const LINES: usize = 64;
/// What was measured, said at the end: while a console sends what a guest has said, its
/// interrupts come in between what is measured.
static MEASURED: Shared<[Option<Measured>; LINES]> = Shared::new([None; LINES]);
static NUMBER: Shared<usize> = Shared::new(0);

fn keep(
    mode: &'static str,
    name: &'static str,
    ticks: u64,
    rounds: u64,
    counts: Option<(Counts, Counts)>,
) {
    let measured = Measured {
        mode,
        name,
        ticks,
        rounds,
        counts,
    };
    if start_info::command_line_is("pause") {
        print(measured);
        serial::flush();
        pause(microseconds(PAUSE));
    } else {
        MEASURED.put(NUMBER.get(), Some(measured));
        NUMBER.set(NUMBER.get() + 1);
    }
}

fn print(measured: Measured) {
    let Measured {
        mode,
        name,
        ticks,
        rounds,
        counts,
    } = measured;
    let Some((before, after)) = counts else {
        report::say(format_args!("bench: {mode}{name}: {ticks} in {rounds}"));
        return;
    };
    // What asking takes: the rest of the first question and the beginning of the second.
    let (Some(first), Some(second)) = (self::counts(), self::counts()) else {
        return;
    };
    let [exits, reads, writes] =
        [0, 1, 2].map(|at: usize| (after[at] - before[at]).wrapping_sub(second[at] - first[at]));
    report::say(format_args!(
        "bench: {mode}{name}: {ticks} in {rounds}, {exits} exits, {reads} VMREADs, {writes} VMWRITEs"
    ));
}

#[inline(always)]
fn write_msr(number: u32, value: u64) {
    raw!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
}

#[inline(always)]
fn read_msr(number: u32) {
    raw!("rdmsr", in("ecx") number, out("eax") _, out("edx") _, options(nomem, nostack));
}

fn instructions() {
    let nothing = |name| measure(name, ROUNDS, || raw!("", options(nomem, nostack)));
    if start_info::command_line_is("pause") {
        nothing("nothing");
        nothing("nothing, but in a line that is longer");
    }
    nothing("nothing");
    measure("CPUID", ROUNDS, || {
        raw!("push rbx", "cpuid", "pop rbx", inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
    });
    measure("VMCALL, null call", ROUNDS, || {
        raw!("vmcall", inout("rax") -1i64 => _, options(nomem, nostack));
    });
    measure("PAUSE", ROUNDS, || raw!("pause", options(nomem, nostack)));
    measure("WBINVD", ROUNDS, || raw!("wbinvd", options(nomem, nostack)));
    measure("INVD", ROUNDS, || raw!("invd", options(nomem, nostack)));
}

fn registers() {
    measure("RDMSR TSC_ADJUST", ROUNDS, || read_msr(msr::TSC_ADJUST));
    measure("WRMSR TSC_ADJUST", ROUNDS, || write_msr(msr::TSC_ADJUST, 0));
    measure("WRMSR KERNEL_GS_BASE", ROUNDS, || {
        write_msr(msr::KERNEL_GS_BASE, 0);
    });
    let (set, clear) = (cpu::cr0() | cpu::cr0::WP, cpu::cr0() & !cpu::cr0::WP);
    measure("CR0.WP toggled, two writes", ROUNDS, || {
        raw!("mov cr0, {}", "mov cr0, {}", in(reg) clear, in(reg) set, options(nostack));
    });
    let (set, clear) = (cpu::cr4() | 1 << 7, cpu::cr4() & !(1 << 7));
    measure("CR4.PGE toggled, two writes", ROUNDS, || {
        raw!("mov cr4, {}", "mov cr4, {}", in(reg) clear, in(reg) set, options(nostack));
    });
    measure("MOV DR", ROUNDS, || {
        raw!("mov dr0, {}", in(reg) 0u64, options(nostack));
    });
    measure("IN from an emulated register", ROUNDS, || {
        raw!("in al, dx", in("dx") PIC_MASK, out("al") _, options(nomem, nostack));
    });
    measure("OUT to an emulated register", ROUNDS, || {
        raw!("out dx, al", in("dx") PIC_MASK, in("al") 0xffu8, options(nomem, nostack));
    });
    measure("OUT to port 0x80", ROUNDS, || {
        raw!("out dx, al", in("dx") 0x80u16, in("al") 0u8, options(nomem, nostack));
    });
}

fn memory() {
    measure("I/O APIC read", ROUNDS, || {
        read32(IO_APIC);
    });
    measure("I/O APIC written", ROUNDS, || write32(IO_APIC, 0));
    measure("I/O APIC read by 32-bit code", ROUNDS, read_by_32_bit_code);
    measure("I/O APIC modified by OR", ROUNDS, || {
        raw!("or dword ptr [{}], 0", in(reg) IO_APIC, options(nostack));
    });
    // The page before does not count, and is of another large page.
    touch(
        "page of 4 KiB touched",
        UNTOUCHED - SMALL,
        SMALL,
        LARGE / SMALL,
    );
    touch(
        "EPT violation that maps a page",
        UNTOUCHED_LARGE,
        LARGE,
        LARGE_PAGES,
    );
}

/// A MOV in 32-bit code, with two far returns around it.
#[inline(never)]
fn read_by_32_bit_code() {
    raw!(
        "push 0x18",
        "lea {at}, [rip + 2f]",
        "push {at}",
        "lea rsi, [rip + 3f]",
        "retfq",
        ".code32",
        "2: mov ecx, [edi]",
        "push 0x08",
        "push esi",
        "retf",
        ".code64",
        "3:",
        at = out(reg) _,
        out("rsi") _,
        out("rcx") _,
        in("rdi") IO_APIC,
    );
}

/// Writes to `pages` pages for the first time.
fn touch(name: &'static str, first: u64, step: u64, pages: u64) {
    let mut page = first;
    measure(name, pages, || {
        write32(page, 0);
        page += step;
    });
}

/// The shortest handler: end of interrupt by MSR.
#[unsafe(naked)]
unsafe extern "C" fn end_x2apic() {
    naked_asm!(
        "push rax",
        "push rcx",
        "push rdx",
        "xor eax, eax",
        "xor edx, edx",
        "mov ecx, 0x80b",
        "wrmsr",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "iretq",
    )
}

/// The same by the APIC's page.
#[unsafe(naked)]
unsafe extern "C" fn end_xapic() {
    naked_asm!(
        "push rax",
        "mov eax, 0xfee000b0",
        "mov dword ptr [rax], 0",
        "pop rax",
        "iretq",
    )
}

/// When [`time_x2apic`] began, and that it has.
static AT: Shared<u64> = Shared::new(0);
static FIRED: AtomicU32 = AtomicU32::new(0);

/// [`end_x2apic`], but first of all it looks at the clock.
#[unsafe(naked)]
unsafe extern "C" fn time_x2apic() {
    naked_asm!(
        "push rax",
        "push rdx",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov [{at}], rax",
        "mov dword ptr [{fired}], 1",
        "pop rdx",
        "pop rax",
        "jmp {end}",
        at = sym AT,
        fired = sym FIRED,
        end = sym end_x2apic,
    )
}

/// How the registers of the local APIC are reached.
trait Mode {
    /// In front of the names of what is measured.
    const NAME: &'static str;
    fn read(register: u32);
    fn write(register: u32, value: u32);
    /// Sends [`VECTOR`] to the APIC with the identifier `own`, by the ICR.
    fn send(own: u32);
}

/// By MSRs.
struct X2Apic;
/// By its page.
struct XApic;

impl Mode for X2Apic {
    const NAME: &'static str = "x2APIC ";

    #[inline(always)]
    fn read(register: u32) {
        read_msr(msr::X2APIC + register / 16);
    }

    #[inline(always)]
    fn write(register: u32, value: u32) {
        write_msr(msr::X2APIC + register / 16, value.into());
    }

    #[inline(always)]
    fn send(own: u32) {
        write_msr(
            msr::X2APIC + register::ICR / 16,
            u64::from(own) << 32 | u64::from(VECTOR),
        );
    }
}

impl Mode for XApic {
    const NAME: &'static str = "xAPIC ";

    #[inline(always)]
    fn read(register: u32) {
        read32(apic::BASE + u64::from(register));
    }

    #[inline(always)]
    fn write(register: u32, value: u32) {
        write32(apic::BASE + u64::from(register), value);
    }

    #[inline(always)]
    fn send(_: u32) {
        Self::write(register::ICR, entry::TO_SELF | u32::from(VECTOR));
    }
}

/// Local APIC and its interrupts.
fn interrupts<M: Mode>() {
    let own = apic::read(register::ID);
    measure_in(M::NAME, "EOI", ROUNDS, || M::write(register::EOI, 0));
    measure_in(M::NAME, "TPR read", ROUNDS, || M::read(register::TPR));
    measure_in(M::NAME, "TPR written", ROUNDS, || {
        M::write(register::TPR, 0)
    });
    measure_in(M::NAME, "CR8 read", ROUNDS, || {
        raw!("mov {}, cr8", out(reg) _, options(nomem, nostack));
    });
    measure_in(M::NAME, "CR8 written", ROUNDS, || {
        raw!("mov cr8, {}", in(reg) 0u64, options(nostack));
    });
    measure_in(M::NAME, "ICR written, interrupts off", ROUNDS, || {
        M::send(own);
    });
    cpu::interrupt_window();
    measure_in(M::NAME, "self-IPI, then STI and HLT", ROUNDS, || {
        M::send(own);
        raw!("sti", "hlt", "cli", options(nostack));
    });
    cpu::enable_interrupts();
    measure_in(M::NAME, "self-IPI, handler, EOI", ROUNDS, || M::send(own));
    if apic::is_x2apic() {
        measure_in(
            M::NAME,
            "self-IPI by SELF_IPI, handler, EOI",
            ROUNDS,
            || M::write(register::SELF_IPI, VECTOR.into()),
        );
    }
    measure_in(
        M::NAME,
        "self-IPI under a raised TPR, handler, EOI",
        ROUNDS,
        || {
            raw!("mov cr8, {}", in(reg) 15u64, options(nostack));
            M::send(own);
            raw!("mov cr8, {}", in(reg) 0u64, options(nostack));
        },
    );
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(VECTOR));
    measure_in(
        M::NAME,
        "TSC deadline at once, handler, EOI",
        ROUNDS,
        || write_msr(msr::TSC_DEADLINE, 1),
    );
    cpu::disable_interrupts();
}

/// The timer, in x2APIC mode.
fn timers() {
    let far = u64::MAX / 2;
    apic::write(register::DIVIDE, DIVIDE_BY_1);
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(TIMER));
    measure("WRMSR TSC deadline", ROUNDS, || {
        write_msr(msr::TSC_DEADLINE, far)
    });
    wait("timer interrupt, lateness of the handler", || {
        let deadline = arm();
        spin();
        AT.get() - deadline
    });
    wait("timer interrupt, taken from a loop", || {
        arm();
        let start = rdtsc();
        let rounds = spin();
        rdtsc() - start - SPIN * rounds
    });
    wait("HLT, lateness of the timer's handler", || {
        let deadline = arm();
        raw!("sti", "hlt", "cli", options(nostack));
        AT.get() - deadline
    });
    write_msr(msr::TSC_DEADLINE, 0);
}

/// Sets the timer, and says for when.
fn arm() -> u64 {
    FIRED.store(0, Relaxed);
    let deadline = rdtsc() + microseconds(50);
    write_msr(msr::TSC_DEADLINE, deadline);
    deadline
}

/// Instructions of one round of [`spin`].
const SPIN: u64 = 3;

/// Spins until the timer's handler has run; how many rounds.
#[inline(always)]
fn spin() -> u64 {
    let mut rounds = 0u64;
    raw!(
        "sti",
        "2: inc {}",
        "test dword ptr [{}], 1",
        "jz 2b",
        "cli",
        inout(reg) rounds,
        in(reg) FIRED.as_ptr(),
        options(nostack)
    );
    rounds
}

/// The median of what [`WAITS`] rounds of `body` say, as if all had said it: what came
/// in between in a round, an interrupt for the hypervisor's console, is not measured.
fn wait(name: &'static str, mut body: impl FnMut() -> u64) {
    body();
    let before = counts();
    let mut ticks = [0; WAITS as usize];
    ticks.iter_mut().for_each(|ticks| *ticks = body());
    let counts = before.zip(counts());
    ticks.sort_unstable();
    keep("", name, ticks[ticks.len() / 2] * WAITS, WAITS, counts);
}
