//! The local APIC, by its page or by its MSRs.

use crate::cpu::{self, msr};
use crate::memory::{read32, write32};

/// The page's address after a reset.
pub const BASE: u64 = 0xfee0_0000;
/// Bits of IA32_APIC_BASE.
pub const X2APIC: u64 = 1 << 10;
pub const ENABLED: u64 = 1 << 11;

/// Offsets in the page; the MSR is 0x800 plus a sixteenth.
pub mod register {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Bits of an entry of the local vector table, and of the ICR.
pub mod entry {
    pub const EXTINT: u32 = 7 << 8;
    pub const NMI: u32 = 4 << 8;
    pub const LOWEST_PRIORITY: u32 = 1 << 8;
    pub const INIT: u32 = 5 << 8;
    pub const START_UP: u32 = 6 << 8;
    pub const LOGICAL: u32 = 1 << 11;
    pub const LEVEL_ASSERT: u32 = 1 << 14;
    pub const MASKED: u32 = 1 << 16;
    pub const PERIODIC: u32 = 1 << 17;
    pub const TSC_DEADLINE: u32 = 2 << 17;
    pub const TO_SELF: u32 = 1 << 18;
    pub const TO_ALL: u32 = 2 << 18;
    pub const TO_OTHERS: u32 = 3 << 18;
}

/// Enabled in the SVR, spurious vector 0xff.
pub const SVR_ENABLED: u32 = 0x1ff;
/// Divide configuration: by 1.
pub const DIVIDE_BY_1: u32 = 0xb;

/// Whether the APIC is in x2APIC mode.
pub fn is_x2apic() -> bool {
    base() & X2APIC != 0
}

/// IA32_APIC_BASE.
pub fn base() -> u64 {
    cpu::rdmsr(msr::APIC_BASE).unwrap_or(0)
}

/// Goes to x2APIC mode, or through the disabled state back to xAPIC mode.
pub fn set_x2apic(on: bool) {
    let old = base();
    let disabled = old & !(X2APIC | ENABLED);
    if on {
        cpu::wrmsr(msr::APIC_BASE, old | X2APIC | ENABLED);
    } else {
        cpu::wrmsr(msr::APIC_BASE, disabled);
        cpu::wrmsr(msr::APIC_BASE, disabled | ENABLED);
    }
    write(register::SVR, SVR_ENABLED);
}

/// Reads a register in the mode that the APIC is in.
pub fn read(register: u32) -> u32 {
    if is_x2apic() {
        cpu::rdmsr(msr::X2APIC + register / 16).map_or(u32::MAX, |value| value as u32)
    } else {
        read32(BASE + u64::from(register))
    }
}

/// Writes a register in the mode that the APIC is in.
pub fn write(register: u32, value: u32) {
    if is_x2apic() {
        cpu::wrmsr(msr::X2APIC + register / 16, value.into());
    } else {
        write32(BASE + u64::from(register), value);
    }
}

/// The same without looking for what it raises, which only one CPU at a time can do.
pub fn write_unchecked(register: u32, value: u32) {
    if is_x2apic_unchecked() {
        cpu::wrmsr_unchecked(msr::X2APIC + register / 16, value.into());
    } else {
        write32(BASE + u64::from(register), value);
    }
}

fn is_x2apic_unchecked() -> bool {
    cpu::rdmsr_unchecked(msr::APIC_BASE) & X2APIC != 0
}

/// The identifier of this CPU, in either mode.
pub fn own_id() -> u32 {
    if is_x2apic_unchecked() {
        cpu::rdmsr_unchecked(msr::X2APIC + register::ID / 16) as u32
    } else {
        read32(BASE + u64::from(register::ID)) >> 24
    }
}

/// Ends the interrupt in service.
pub fn eoi() {
    write_unchecked(register::EOI, 0);
}

/// Sends an interrupt command to the local APIC with this identifier.
pub fn send(destination: u32, command: u32) {
    if is_x2apic() {
        let value = u64::from(destination) << 32 | u64::from(command);
        cpu::wrmsr(msr::X2APIC + register::ICR / 16, value);
    } else {
        write(register::ICR_HIGH, destination << 24);
        write(register::ICR, command);
    }
}

/// Whether `vector` is in the 256-bit register that starts at `first`.
pub fn has_vector(first: u32, vector: u8) -> bool {
    let word = read(first + 16 * u32::from(vector / 32));
    word & 1 << (vector % 32) != 0
}
