//! What VM exits cost, counted in ticks of the time-stamp counter around many
//! rounds of each; on an emulator whose counter counts instructions, that is
//! instructions, the guest's loop included. One line for each:
//!
//! ```text
//! bench: NAME: TICKS in ROUNDS
//! ```
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use vireo_test_guests::apic::{self, DIVIDE_BY_1, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::exceptions;
use vireo_test_guests::memory::{read32, write32};
use vireo_test_guests::report;
use vireo_test_guests::time::microseconds;

vireo_test_guests::guest!(run);

/// Rounds of what is quick.
const ROUNDS: u64 = 2000;
/// Vector of the interrupts that are measured.
const VECTOR: u8 = 0x60;
/// Where nothing else is: pages that nobody has touched.
const UNTOUCHED: u64 = 0x0300_0000;
/// I/O APIC: index and data.
const IO_APIC: u64 = 0xfec0_0000;
/// A register of an emulated device: the first 8259's mask.
const PIC_MASK: u16 = 0x21;

fn run() {
    instructions();
    registers();
    memory();
    apic::set_x2apic(true);
    exceptions::set_raw(VECTOR, end_x2apic);
    interrupts("x2APIC");
    timers();
    apic::set_x2apic(false);
    exceptions::set_raw(VECTOR, end_xapic);
    interrupts("xAPIC");
    report::finish();
}

/// Measures `rounds` of `body`, after one that does not count.
#[inline(always)]
fn measure(name: &str, rounds: u64, mut body: impl FnMut()) {
    body();
    let start = rdtsc();
    for _ in 0..rounds {
        body();
    }
    say(name, rdtsc() - start, rounds);
}

fn say(name: &str, ticks: u64, rounds: u64) {
    report::say(format_args!("bench: {name}: {ticks} in {rounds}"));
}

/// One instruction or a few, without checks around them.
macro_rules! raw {
    ($($asm:tt)*) => {{
        // SAFETY: the guest's own machine, and the operands say what is changed.
        unsafe { asm!($($asm)*) }
    }};
}

fn write_msr(number: u32, value: u64) {
    raw!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
}

fn instructions() {
    measure("nothing", ROUNDS, || raw!("", options(nomem, nostack)));
    measure("CPUID", ROUNDS, || {
        raw!("push rbx", "cpuid", "pop rbx", inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
    });
    measure("VMCALL, null call", ROUNDS, || {
        raw!("vmcall", inout("rax") -1i64 => _, options(nomem, nostack));
    });
    measure("PAUSE", ROUNDS, || raw!("pause", options(nomem, nostack)));
    measure("WBINVD", ROUNDS, || raw!("wbinvd", options(nomem, nostack)));
}

fn registers() {
    measure("RDMSR TSC_ADJUST", ROUNDS, || {
        raw!("rdmsr", in("ecx") msr::TSC_ADJUST, out("eax") _, out("edx") _, options(nomem, nostack));
    });
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
    measure("CR8 read", ROUNDS, || {
        raw!("mov {}, cr8", out(reg) _, options(nomem, nostack));
    });
    measure("CR8 written", ROUNDS, || {
        raw!("mov cr8, {}", in(reg) 0u64, options(nostack));
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
    measure("MMIO read of the I/O APIC", ROUNDS, || {
        read32(IO_APIC);
    });
    measure("MMIO write to the I/O APIC", ROUNDS, || write32(IO_APIC, 0));
    let mut page = UNTOUCHED;
    measure("page touched for the first time", 512, || {
        write32(page, 0);
        page += 4096;
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

/// Local APIC and its interrupts, with the mode's name in front.
fn interrupts(mode: &str) {
    let named = |what: &str, body: &mut dyn FnMut()| {
        let mut rounds = ROUNDS;
        body();
        let start = rdtsc();
        while rounds > 0 {
            body();
            rounds -= 1;
        }
        let ticks = rdtsc() - start;
        report::say(format_args!("bench: {mode} {what}: {ticks} in {ROUNDS}"));
    };
    let own = apic::read(register::ID);
    let x2apic = apic::is_x2apic();
    let send = move || {
        if x2apic {
            write_msr(
                msr::X2APIC + register::ICR / 16,
                u64::from(own) << 32 | u64::from(VECTOR),
            );
        } else {
            write32(
                apic::BASE + u64::from(register::ICR),
                entry::TO_SELF | u32::from(VECTOR),
            );
        }
    };
    let write = move |register: u32, value: u32| {
        if x2apic {
            write_msr(msr::X2APIC + register / 16, value.into());
        } else {
            write32(apic::BASE + u64::from(register), value);
        }
    };
    named("EOI without an interrupt", &mut || write(register::EOI, 0));
    named("TPR written", &mut || write(register::TPR, 0));
    cpu::enable_interrupts();
    named("self-IPI, handler, EOI", &mut || send());
    cpu::disable_interrupts();
    if x2apic {
        named(
            "self-IPI by the SELF_IPI register, interrupts off",
            &mut || {
                write(register::SELF_IPI, VECTOR.into());
            },
        );
        named("ICR written, interrupts off", &mut || send());
        cpu::interrupt_window();
    }
    named("self-IPI, then STI and HLT", &mut || {
        send();
        cpu::halt();
    });
}

/// The timer, in x2APIC mode.
fn timers() {
    let far = u64::MAX / 2;
    apic::write(register::DIVIDE, DIVIDE_BY_1);
    apic::write(register::LVT_TIMER, entry::TSC_DEADLINE | u32::from(VECTOR));
    measure("WRMSR TSC deadline", ROUNDS, || {
        write_msr(msr::TSC_DEADLINE, far)
    });
    cpu::enable_interrupts();
    measure("TSC deadline that is over, handler, EOI", ROUNDS, || {
        write_msr(msr::TSC_DEADLINE, 1);
    });
    cpu::disable_interrupts();
    late("timer to the handler, lateness", || {
        raw!("sti", "2: test dword ptr [{}], 1", "jz 2b", "cli", in(reg) FIRED.as_ptr(), options(nostack));
    });
    late("HLT to wake-up by timer, lateness", || {
        raw!("sti", "hlt", "cli", options(nostack));
    });
    write_msr(msr::TSC_DEADLINE, 0);
}

static FIRED: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// How late the handler starts after a deadline for which `wait` waits.
fn late(name: &str, wait: impl Fn()) {
    use core::sync::atomic::Ordering::Relaxed;
    static AT: vireo_test_guests::Shared<u64> = vireo_test_guests::Shared::new(0);
    exceptions::on(VECTOR + 1, |_| {
        AT.set(rdtsc());
        FIRED.store(1, Relaxed);
        apic::eoi();
    });
    apic::write(
        register::LVT_TIMER,
        entry::TSC_DEADLINE | u32::from(VECTOR + 1),
    );
    let rounds = 100;
    let mut sum = 0;
    for _ in 0..rounds {
        FIRED.store(0, Relaxed);
        let deadline = rdtsc() + microseconds(50);
        write_msr(msr::TSC_DEADLINE, deadline);
        wait();
        sum += AT.get() - deadline;
    }
    say(name, sum, rounds);
}
