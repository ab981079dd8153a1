//! The other CPUs: started through a page below 1 MiB, and given functions to run.

use crate::entry::TABLES;
use crate::{Shared, apic, descriptors, exceptions, time};
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The most that there may be.
pub const MOST: usize = 16;
/// The page that they start at: of memory below 1 MiB that nothing else uses.
const PAGE: u8 = 0x20;
/// The start-up interrupt that has a CPU begin there.
pub const START_UP: u32 = apic::entry::START_UP | PAGE as u32;
/// Bytes of a stack.
const STACK: usize = 8192;

#[repr(C, align(16))]
struct Stacks([[u8; STACK]; MOST]);

static STACKS: Shared<Stacks> = Shared::new(Stacks([[0; STACK]; MOST]));
/// The end of the stack of the one that starts next, and its number.
static NEXT_STACK: Shared<u64> = Shared::new(0);
static NEXT: Shared<usize> = Shared::new(0);
static RUNS: [AtomicBool; MOST] = [const { AtomicBool::new(false) }; MOST];
/// What each has to run, 0 for nothing.
static WORK: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];

global_asm!(
    ".pushsection .text.processors, \"ax\", @progbits",
    ".balign 16",
    ".code16",
    "processor_begin:",
    "cli",
    "cld",
    "mov ax, cs",
    "mov ds, ax",
    // LGDT with a base of 32 bits, by its offset in this segment.
    ".byte 0x66, 0x0f, 0x01, 0x16",
    ".word processor_gdtr - processor_begin",
    "mov eax, 0x20", // CR4.PAE
    "mov cr4, eax",
    "mov eax, offset {tables}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080", // IA32_EFER.LME and NXE
    "mov eax, 0x900",
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80010033", // PG, WP, NE, ET, MP, PE
    "mov cr0, eax",
    // A far jump with an offset of 32 bits.
    ".byte 0x66, 0xea",
    ".long processor_long",
    ".word 0x08",
    "processor_gdtr:",
    // As `descriptors::GDTR`, which is the guest's first data.
    ".word 95",
    ".long {gdt}",
    "processor_end:",
    ".code64",
    "processor_long:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov rsp, [{stack}]",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    ".popsection",
    tables = sym TABLES,
    gdt = sym descriptors::GDT,
    stack = sym NEXT_STACK,
    main = sym main,
);

unsafe extern "C" {
    static processor_begin: u8;
    static processor_end: u8;
}

/// Puts the code that they start with into its page.
pub fn prepare() {
    let begin = &raw const processor_begin;
    let length = (&raw const processor_end) as usize - begin as usize;
    // SAFETY: the page is nobody's, and both are mapped one to one.
    unsafe { begin.copy_to((usize::from(PAGE) << 12) as *mut u8, length) };
}

/// INIT for the CPU with this local APIC identifier. It runs nothing after that.
pub fn init(id: u32) {
    if let Some(runs) = RUNS.get(id as usize) {
        runs.store(false, Ordering::SeqCst);
    }
    apic::send(id, apic::entry::INIT | apic::entry::LEVEL_ASSERT);
}

/// A start-up interrupt for it.
pub fn start_up(id: u32) {
    NEXT.set(id as usize);
    NEXT_STACK.set(STACKS.address() + (id as usize + 1) as u64 * STACK as u64);
    apic::send(id, START_UP);
}

/// INIT and a start-up interrupt; whether it runs soon after that.
pub fn start(id: u32) -> bool {
    start_within(id, a_while())
}

/// The same; whether it runs within so many TSC ticks.
pub fn start_within(id: u32, ticks: u64) -> bool {
    init(id);
    start_up(id);
    wait_for(ticks, || runs(id))
}

/// Whether it has come to run.
pub fn runs(id: u32) -> bool {
    RUNS.get(id as usize)
        .is_some_and(|runs| runs.load(Ordering::SeqCst))
}

/// Has it run `work`, with interrupts on.
pub fn give(id: u32, work: fn()) {
    if let Some(place) = WORK.get(id as usize) {
        place.store(work as usize, Ordering::SeqCst);
    }
}

/// Has it run `work`, and waits until it has; whether it has.
pub fn run(id: u32, work: fn()) -> bool {
    give(id, work);
    wait(|| is_idle(id))
}

/// Whether it has run what it was given.
pub fn is_idle(id: u32) -> bool {
    WORK.get(id as usize)
        .is_some_and(|work| work.load(Ordering::SeqCst) == 0)
}

/// Waits a while for something that another CPU does.
pub fn wait(done: impl Fn() -> bool) -> bool {
    wait_for(a_while(), done)
}

/// Two seconds, in TSC ticks.
fn a_while() -> u64 {
    time::tsc_hz() * 2
}

/// As [`wait`], for so many TSC ticks.
pub fn wait_for(ticks: u64, done: impl Fn() -> bool) -> bool {
    let is_done = || {
        core::hint::spin_loop();
        done()
    };
    time::wait(ticks, is_done).is_some()
}

extern "C" fn main() -> ! {
    let own = NEXT.get();
    exceptions::load();
    apic::write_unchecked(apic::register::SVR, apic::SVR_ENABLED);
    crate::cpu::enable_interrupts();
    let (Some(runs), Some(work)) = (RUNS.get(own), WORK.get(own)) else {
        crate::report::stop()
    };
    work.store(0, Ordering::SeqCst);
    runs.store(true, Ordering::SeqCst);
    loop {
        let function = work.load(Ordering::SeqCst);
        if function == 0 {
            core::hint::spin_loop();
            continue;
        }
        // SAFETY: `give` has stored a function of this type.
        let function = unsafe { core::mem::transmute::<usize, fn()>(function) };
        function();
        work.store(0, Ordering::SeqCst);
    }
}
