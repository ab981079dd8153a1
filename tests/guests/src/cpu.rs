//! Registers and instructions of the CPU.

use crate::exceptions::Exception;
use crate::execute;
use core::arch::asm;

/// Bits of RFLAGS.
pub mod rflags {
    pub const CARRY: u64 = 1 << 0;
    pub const TRAP: u64 = 1 << 8;
    pub const INTERRUPT: u64 = 1 << 9;
}

/// Bits of CR0.
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub mod cr4 {
    pub const DE: u64 = 1 << 3;
    pub const PAE: u64 = 1 << 5;
    pub const OSFXSR: u64 = 1 << 9;
    pub const VMXE: u64 = 1 << 13;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
}

/// Numbers of MSRs.
pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const BIOS_UPDATE: u32 = 0x79;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const VMX_BASIC: u32 = 0x480;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC: u32 = 0x800;
    pub const EFER: u32 = 0xc000_0080;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// RDMSR.
pub fn rdmsr(number: u32) -> Result<u64, Exception> {
    let (mut low, mut high) = (0u32, 0u32);
    match execute!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nomem, nostack))
    {
        None => Ok(u64::from(high) << 32 | u64::from(low)),
        Some(exception) => Err(exception),
    }
}

/// WRMSR, and what it raised.
pub fn wrmsr(number: u32, value: u64) -> Option<Exception> {
    execute!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
}

/// RDMSR of a register that is there.
pub fn rdmsr_unchecked(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register.
    unsafe { asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR of a register that is there and takes `value`.
pub fn wrmsr_unchecked(number: u32, value: u64) {
    // SAFETY: the guest's own machine.
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// RDTSC, not before what comes before it.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

macro_rules! register {
    ($read:ident $write:ident = $name:literal) => {
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reads a register.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }

        /// Writes it, and returns what that raised.
        pub fn $write(value: u64) -> Option<Exception> {
            execute!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags))
        }
    };
}

register!(cr0 set_cr0 = "cr0");
register!(cr2 set_cr2 = "cr2");
register!(cr3 set_cr3 = "cr3");
register!(cr4 set_cr4 = "cr4");
register!(cr8 set_cr8 = "cr8");
register!(dr0 set_dr0 = "dr0");
register!(dr6 set_dr6 = "dr6");
register!(dr7 set_dr7 = "dr7");

/// RFLAGS.
pub fn flags() -> u64 {
    let value;
    // SAFETY: pushes and pops.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) };
    value
}

pub fn enable_interrupts() {
    // SAFETY: every vector has a handler.
    unsafe { asm!("sti") };
}

pub fn disable_interrupts() {
    // SAFETY: changes a flag.
    unsafe { asm!("cli") };
}

/// Lets interrupts in for one instruction.
pub fn interrupt_window() {
    // SAFETY: every vector has a handler.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Waits for an interrupt, with no moment between enabling and waiting; they
/// are disabled after.
pub fn halt() {
    // SAFETY: every vector has a handler.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Invalidates the TLB's entry for `address`.
pub fn invlpg(address: u64) {
    // SAFETY: it is filled again on use.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}
