//! What the rounds have to play with, a watch over them, and everything put back behind them.

use crate::random::Random;
use crate::warden;
use core::arch::asm;
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::descriptors::{self, NMI_STACK_INDEX, SPARE_STACK_INDEX, selector};
use vireo_test_guests::entry::TABLES;
use vireo_test_guests::exceptions::{self, Exception, Frame, vector};
use vireo_test_guests::memory::{read64, write32, write64};
use vireo_test_guests::paging::entry::{NO_EXECUTE, PRESENT, UNCACHEABLE, USER, WRITABLE};
use vireo_test_guests::paging::{self, PAGE, WINDOW};
use vireo_test_guests::port::out8;
use vireo_test_guests::serial::COM1;
use vireo_test_guests::{Shared, apic, execute, io_apic, pit};

/// Pages of the window: code first, with nothing behind it.
pub const CODE: u64 = WINDOW;
/// Pages that a round may do anything with, from here on; each is there or not.
pub const DATA: u64 = WINDOW + 8 * PAGE;
const DATA_PAGES: u64 = 6;
/// Pages of devices, holes and ROM, from here on.
pub const DEVICES: u64 = WINDOW + 16 * PAGE;
/// What they are: local APIC, I/O APIC, the test device's memory and its end, where an HPET would
/// be, ROM, tables, VGA memory, holes.
const PLACES: [u64; 12] = [
    apic::BASE,
    io_apic::BASE,
    0xff00_0000,
    0xff00_f000,
    0xff01_0000,
    0xfed0_0000,
    0xc_0000,
    0xe_0000,
    0xa_0000,
    0xb_8000,
    0xd000_0000,
    0xf_ffff_f000,
];
pub const DEVICE_PAGES: u64 = PLACES.len() as u64;
/// A page whose entry a round may change.
pub const LOOSE: u64 = WINDOW + 64 * PAGE;
pub const LOOSE_PAGES: u64 = 8;

const WATCH_COUNTER: u8 = 0;
/// When the watch looks again, in counts of the 8254.
const WATCH: u8 = 64;
/// Steps of a round that are traced, at most.
const STEPS: u64 = 40;
/// Looks of the watch in which code has to end, behind the first, which is at any time.
const PATIENCE: u64 = 2;
/// Bytes of the stacks that interrupts and exceptions have for themselves.
const STACK: usize = 16 * 1024;

#[repr(C, align(16))]
struct Stack([u8; STACK]);

static STACKS: Shared<[Stack; 2]> = Shared::new([const { Stack([0; STACK]) }; 2]);
/// Whether code runs that has to be watched.
static RUNS: Shared<bool> = Shared::new(false);
/// How often the watch has looked since it began.
static LOOKED: Shared<u64> = Shared::new(0);
static STEPPED: Shared<u64> = Shared::new(0);
/// The registers as they are to be at the start of a round.
static CR0: Shared<u64> = Shared::new(0);
static CR3: Shared<u64> = Shared::new(0);
static CR4: Shared<u64> = Shared::new(0);
static EFER: Shared<u64> = Shared::new(0);
static XCR0: Shared<u64> = Shared::new(0);
static APIC_BASE: Shared<u64> = Shared::new(0);

/// Sets everything up.
pub fn prepare() {
    CR0.set(cpu::cr0());
    CR3.set(cpu::cr3());
    CR4.set(cpu::cr4());
    EFER.set(cpu::rdmsr_unchecked(msr::EFER));
    APIC_BASE.set(apic::base());
    if cpu::cpuid(1, 0)[2] & 1 << 26 != 0 {
        cpu::set_cr4(CR4.get() | cpu::cr4::OSXSAVE | cpu::cr4::OSFXSR);
        CR4.set(cpu::cr4());
        XCR0.set(xcr0());
    }
    let ends = [1, 2].map(|count| STACKS.address() + count * STACK as u64);
    descriptors::set_interrupt_stack(SPARE_STACK_INDEX, ends[0]);
    descriptors::set_interrupt_stack(NMI_STACK_INDEX, ends[1]);
    for vector in 0..=u8::MAX {
        let index = match vector {
            vector::NMI => NMI_STACK_INDEX,
            vector::DOUBLE_FAULT => continue,
            _ => SPARE_STACK_INDEX,
        };
        exceptions::set_interrupt_stack(vector, index);
    }
    open_low_memory();
    unmap_holes();
    exceptions::on(vector::NMI, watch);
    exceptions::on(vector::DEBUG, step);
    map();
    arm_watch();
}

/// Opens the flat map's first 2 MiB to level 3, where modes have their code.
fn open_low_memory() {
    let tables = TABLES.address();
    for entry in [tables, tables + PAGE, tables + 2 * PAGE] {
        write64(entry, read64(entry) | USER);
    }
}

/// Takes what is neither memory nor an interrupt controller out of the flat map: code that goes
/// astray gets a page fault there, and no end.
fn unmap_holes() {
    const LARGE_PAGE: u64 = 2 << 20;
    const MEMORY: u64 = 8 << 20;
    let tables = TABLES.address();
    for page in (MEMORY..1 << 32).step_by(LARGE_PAGE as usize) {
        let within = |place: u64| place & !(LARGE_PAGE - 1) == page;
        if !within(apic::BASE) && !within(io_apic::BASE) {
            write64(tables + 2 * PAGE + 8 * (page / LARGE_PAGE), 0);
        }
    }
    cpu::set_cr3(CR3.get());
}

/// Maps the window as it is to be.
pub fn map() {
    paging::map(0, paging::scratch(0), PRESENT | WRITABLE);
    for index in 1..16 {
        paging::map(index, 0, 0);
    }
    // The second is missing, the fourth may not be written; the last are followed by a device.
    for (page, (frame, bits)) in (DATA..).step_by(PAGE as usize).zip([
        (1, PRESENT | WRITABLE),
        (1, 0),
        (2, PRESENT | WRITABLE),
        (1, PRESENT),
        (3, PRESENT | WRITABLE),
        (3, PRESENT | WRITABLE),
    ]) {
        paging::map((page - WINDOW) / PAGE, paging::scratch(frame), bits);
    }
    for (page, place) in (DEVICES..).step_by(PAGE as usize).zip(PLACES) {
        let bits = PRESENT | WRITABLE | UNCACHEABLE | NO_EXECUTE;
        paging::map((page - WINDOW) / PAGE, place, bits);
    }
    (0..LOOSE_PAGES).for_each(map_loose);
    // RAM behind the last device.
    paging::map(16 + DEVICE_PAGES, paging::scratch(2), PRESENT | WRITABLE);
}

/// Where the entry of some page of [`LOOSE`] lies.
pub fn loose_entry(random: &mut Random) -> u64 {
    paging::table_entry((LOOSE - WINDOW) / PAGE + random.below(LOOSE_PAGES))
}

/// Has a page of [`LOOSE`] be as it is to be: what level 3 may access.
pub fn map_loose(number: u64) {
    let place = match number % 4 {
        0 => apic::BASE,
        1 => io_apic::BASE,
        2 => 0xff00_0000,
        _ => paging::scratch(2),
    };
    let bits = PRESENT | WRITABLE | USER | NO_EXECUTE;
    paging::map((LOOSE - WINDOW) / PAGE + number, place, bits);
}

/// An address that an instruction may like.
pub fn pointer(random: &mut Random) -> u64 {
    let (first, pages) = match random.below(4) {
        0 => (DATA, DATA_PAGES),
        1 => (LOOSE, LOOSE_PAGES),
        _ => (DEVICES, DEVICE_PAGES),
    };
    let page = first + PAGE * random.below(pages);
    page + offset(random)
}

/// An offset in a page, as devices have registers, or near its end.
pub fn offset(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => PAGE - random.below(33),
        1 => random.below(PAGE),
        _ => 16 * random.below(0x42) + random.pick(&[0, 0, 0, 0, 4, 8, 2, 1]),
    }
}

/// Has the 8254 and the I/O APIC look by NMI whether a round ends, each time that it is started.
fn arm_watch() {
    const PIN: u32 = 2;
    const ONCE: u8 = 0;
    io_apic::redirect(PIN, io_apic::entry::NMI);
    pit::set_short(WATCH_COUNTER, ONCE);
}

fn watch(frame: &mut Frame) {
    LOOKED.set(LOOKED.get() + 1);
    if !RUNS.get() {
        return;
    }
    if LOOKED.get() <= PATIENCE && !warden::has_called() {
        pit::count_down(WATCH_COUNTER, WATCH);
    } else {
        let exception = Exception {
            vector: vector::NMI,
            error: 0,
            rip: frame.rip,
            cr2: 0,
        };
        exceptions::throw(frame, exception);
    }
}

/// A step, or a breakpoint: the round goes on for a while.
fn step(frame: &mut Frame) {
    STEPPED.set(STEPPED.get() + 1);
    if STEPPED.get() > STEPS {
        let exception = Exception {
            vector: vector::DEBUG,
            error: 0,
            rip: frame.rip,
            cr2: 0,
        };
        exceptions::throw(frame, exception);
    }
    frame.rflags |= 1 << 16;
}

/// Code that has to be watched begins.
pub fn begin() {
    LOOKED.set(0);
    STEPPED.set(0);
    RUNS.set(true);
    look_soon();
}

/// Has an NMI come at any time: within what exits, delivers or executes.
pub fn look_soon() {
    pit::count_down(WATCH_COUNTER, 1 + rdtsc() as u8 % WATCH);
}

/// Puts back what code may have changed in the CPU, and watches no longer.
pub fn restore() {
    RUNS.set(false);
    // SAFETY: what the program was started with.
    unsafe {
        asm!(
            "cli",
            "cld",
            "lgdt [{gdtr}]",
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "mov ss, {data:e}",
            "mov fs, {none:e}",
            "mov gs, {none:e}",
            "lldt {none:x}",
            gdtr = sym descriptors::GDTR,
            data = in(reg) u32::from(selector::DATA),
            none = in(reg) 0u32,
        );
    }
    exceptions::load();
    // With DR7.GD the first access is its own end.
    for _ in 0..2 {
        execute!("mov {0}, dr7", "mov {0:e}, 0x400", "mov dr7, {0}", out(reg) _);
    }
    if cpu::cr4() != CR4.get() {
        cpu::set_cr4(CR4.get());
    }
    if cpu::cr0() != CR0.get() {
        cpu::set_cr0(CR0.get());
    }
    if cpu::cr3() != CR3.get() {
        cpu::set_cr3(CR3.get());
    }
    if cpu::rdmsr_unchecked(msr::EFER) != EFER.get() {
        cpu::wrmsr(msr::EFER, EFER.get());
    }
    if XCR0.get() != 0 && xcr0() != XCR0.get() {
        set_xcr0(XCR0.get());
    }
    cpu::set_cr8(0);
    let task: u16;
    // SAFETY: reads a register.
    unsafe { asm!("str {:x}", out(reg) task, options(nomem, nostack)) };
    if task != selector::TSS {
        descriptors::init();
    }
}

/// What a round may have changed beside the CPU.
#[derive(Clone, Copy)]
pub struct Touched {
    /// What has ports.
    pub ports: bool,
    /// The interrupt controllers in memory, or by MSRs.
    pub apics: bool,
}

impl Touched {
    pub const NOTHING: Self = Self {
        ports: false,
        apics: false,
    };
    pub const PORTS: Self = Self {
        ports: true,
        ..Self::NOTHING
    };
    pub const APICS: Self = Self {
        apics: true,
        ..Self::NOTHING
    };
    pub const ALL: Self = Self {
        ports: true,
        apics: true,
    };
}

/// Puts that back.
pub fn restore_devices(touched: Touched) {
    if touched.apics {
        restore_local_apic();
    }
    if touched.ports {
        restore_ports();
    }
    if touched.apics || touched.ports {
        arm_watch();
    }
}

fn restore_local_apic() {
    use apic::register::{EOI, LVT_LINT0, LVT_TIMER, SVR};
    let base = cpu::rdmsr_unchecked(msr::APIC_BASE);
    if base != APIC_BASE.get() {
        if base & apic::X2APIC != 0 {
            apic::set_x2apic(false);
        }
        cpu::wrmsr(msr::APIC_BASE, APIC_BASE.get());
    }
    for (register, value) in [
        (SVR, apic::SVR_ENABLED),
        (EOI, 0),
        (EOI, 0),
        (LVT_TIMER, apic::entry::MASKED),
        (LVT_LINT0, apic::entry::MASKED),
    ] {
        write32(apic::BASE + u64::from(register), value);
    }
}

fn restore_ports() {
    // 115200 baud, 8 bits, no interrupts, FIFOs.
    for (register, value) in [(3, 0x83), (0, 1), (1, 0), (3, 3), (1, 0), (2, 1), (4, 3)] {
        out8(COM1 + register, value);
    }
    const RTC_INDEX: u16 = 0x70;
    out8(RTC_INDEX, 0);
}

fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: CR4.OSXSAVE is set.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

fn set_xcr0(value: u64) {
    execute!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32);
}
