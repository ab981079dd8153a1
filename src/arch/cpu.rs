//! The CPU itself: interrupt flag, control registers, time-stamp counter, XCR0, CPUID.

use crate::addr::Hva;
use core::arch::asm;
use x86_64::VirtAddr;
use x86_64::instructions::{hlt, interrupts, nop, tlb};
use x86_64::registers::control::{Cr2, Cr3, Cr4, Cr4Flags, Cr8};

pub use x86_64::instructions::interrupts::{
    are_enabled as interrupts_enabled, disable as disable_interrupts, enable as enable_interrupts,
    without_interrupts,
};

/// The CPU's identification, read from the CPU when asked.
pub type CpuId = raw_cpuid::CpuId<raw_cpuid::CpuIdReaderNative>;

/// A reader of this CPU's CPUID leaves.
pub fn cpuid() -> CpuId {
    raw_cpuid::CpuId::new()
}

/// Stops this CPU for good; only NMI and SMI still run on it.
pub fn halt_forever() -> ! {
    loop {
        interrupts::disable();
        hlt();
    }
}

/// Enables interrupts and halts until one arrives, without a window between
/// the two (STI blocks for one instruction); disables them again.
pub fn wait_for_interrupt() {
    interrupts::enable_and_hlt();
    interrupts::disable();
}

/// Makes machine checks exceptions, where the CPU has them; without that they
/// shut it down.
pub fn enable_machine_checks() {
    let has_machine_checks = cpuid()
        .get_feature_info()
        .is_some_and(|features| features.has_mce());
    if has_machine_checks {
        // SAFETY: the CPU has the bit, which changes nothing else.
        unsafe { Cr4::update(|flags| flags.insert(Cr4Flags::MACHINE_CHECK_EXCEPTION)) };
    }
}

/// Lets in what interrupts wait; they are off before and after.
pub fn interrupt_window() {
    interrupts::enable();
    // STI takes effect behind the next instruction.
    nop();
    interrupts::disable();
}

/// Holds back interrupts whose class (the upper four bits of the vector) is not above
/// `class`, up to 15.
pub fn set_task_priority(class: u8) {
    Cr8::write_raw(u64::from(class & 15));
}

/// Ends the blocking of NMIs that a VM exit by one of them leaves behind: IRET does, and nothing
/// else (SDM 3, 7.7.1 and 28.3.5).
pub fn unblock_nmis() {
    // SAFETY: returns to the next instruction, with the stack and the flags as they were.
    unsafe {
        asm!(
            "mov {old}, rsp",
            "mov {segment:e}, ss",
            "push {segment}",
            "push {old}",
            "pushfq",
            "mov {segment:e}, cs",
            "push {segment}",
            "lea {old}, [rip + 2f]",
            "push {old}",
            "iretq",
            "2:",
            old = out(reg) _,
            segment = out(reg) _,
        );
    }
}

/// EAX, EBX, ECX and EDX of a CPUID leaf, as they are.
pub fn leaf(number: u32, subleaf: u32) -> [u32; 4] {
    let result = core::arch::x86_64::__cpuid_count(number, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// The time-stamp counter, in ticks. Not serialized.
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC reads a counter; CR4.TSD does not apply at ring 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The page-fault linear address.
#[inline]
pub fn cr2() -> u64 {
    Cr2::read_raw()
}

/// The physical address of this CPU's top page table.
#[inline]
pub fn page_table_root() -> crate::addr::Hpa {
    crate::addr::Hpa(Cr3::read().0.start_address().as_u64())
}

/// Drops this CPU's translation of the page at `address`.
#[inline]
pub fn invalidate_page(address: Hva) {
    tlb::flush(VirtAddr::new_truncate(address.0));
}

/// The conditions of debug exceptions.
#[inline]
pub fn dr6() -> u64 {
    let value;
    // SAFETY: reads a register; CPL 0, and DR7.GD is clear after a VM exit.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// DR0 to DR3: the guest's.
pub fn breakpoints() -> [u64; 4] {
    let mut breakpoints = [0; 4];
    // SAFETY: as in `dr6`.
    unsafe {
        asm!(
            "mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
            out(reg) breakpoints[0],
            out(reg) breakpoints[1],
            out(reg) breakpoints[2],
            out(reg) breakpoints[3],
            options(nomem, nostack, preserves_flags)
        );
    }
    breakpoints
}

/// Writes DR6, of which only conditions that were met may be given.
#[inline]
pub fn set_dr6(value: u64) {
    // SAFETY: it only tells what has happened.
    unsafe {
        asm!("mov dr6, {}", in(reg) value & 0xffff_ffff, options(nomem, nostack, preserves_flags))
    };
}

/// Extended control register 0. Needs CR4.OSXSAVE.
///
/// # Safety
/// CR4.OSXSAVE must be set, else #UD.
#[inline]
pub unsafe fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller answers for CR4.OSXSAVE; the instruction only reads.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes extended control register 0.
///
/// # Safety
/// CR4.OSXSAVE must be set and `value` must be a combination that this CPU
/// accepts (SDM volume 1, 13.3), else #UD or #GP.
#[inline]
pub unsafe fn set_xcr0(value: u64) {
    // SAFETY: the caller answers for OSXSAVE and the value; the kernel itself
    // keeps nothing in the registers that XCR0 governs.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nomem, nostack, preserves_flags));
    }
}

/// Replaces CR2, which is the guest's while one runs.
pub fn set_cr2(address: u64) {
    // SAFETY: the hypervisor reads CR2 only in its own page-fault handler, which the CPU sets anew.
    unsafe {
        core::arch::asm!("mov cr2, {}", in(reg) address, options(nomem, nostack, preserves_flags))
    };
}

/// Quotient and remainder of `high` above `low`; `None` by 0, or where the quotient has
/// more than 64 bits. (The compiler's division of 128 bits is a call into a library that the
/// kernel is not linked with.)
#[inline]
pub fn divide(high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    if high >= divisor {
        return None;
    }
    let (quotient, remainder);
    // SAFETY: the divisor is larger than the upper half, so that the quotient fits.
    unsafe {
        asm!("div {}", in(reg) divisor, inout("rax") low => quotient,
            inout("rdx") high => remainder, options(nomem, nostack, pure));
    }
    Some((quotient, remainder))
}
