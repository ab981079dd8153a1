//! The checks that a CPU makes on VM entry (SDM vol. 3, 27.2 and 27.3.1), in software.
//!
//! A CPU that refuses an entry says only that some control, host or guest
//! field was wrong. [`check`] reads the same fields and says which, by which
//! rule. It runs after a failed entry, and in tests of whatever builds a VMCS.
//!
//! Not checked, because that takes more than VMCS fields: the TPR threshold
//! against the virtual-APIC page, the revision identifier behind the VMCS link
//! pointer, the contents of MSR-load areas, the reserved bits of
//! IA32_PERF_GLOBAL_CTRL and IA32_RTIT_CTL, and everything about SMM, SGX, CET
//! state and FRED.

use alloc::vec::Vec;
use core::fmt;

use super::ept::EptVpidCapabilities;

mod control;
mod fields;
mod guest;
mod host;
mod segments;
#[cfg(test)]
mod tests;

use fields::Field;

/// Where the VMCS fields come from: VMREAD, or a table in a test.
pub trait FieldReader {
    /// The field with this encoding (SDM vol. 3, appendix B), zero-extended.
    /// A field that the CPU does not have reads as zero.
    fn read(&self, encoding: u32) -> u64;
}

/// What the checks need to know of the CPU: capability MSRs as they read (SDM
/// vol. 3, appendix A; the TRUE variants of control MSRs where the CPU has them).
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    pub basic: u64,
    pub pin_based: u64,
    pub primary: u64,
    /// Zero where the CPU has no secondary controls.
    pub secondary: u64,
    pub exit: u64,
    pub entry: u64,
    pub misc: u64,
    pub cr0_fixed0: u64,
    pub cr0_fixed1: u64,
    pub cr4_fixed0: u64,
    pub cr4_fixed1: u64,
    pub ept_vpid: EptVpidCapabilities,
    /// Zero where the CPU has no VM functions.
    pub vm_functions: u64,
    /// CPUID 80000008H:EAX\[7:0\]; 1 to 52.
    pub physical_address_width: u32,
    /// CPUID 80000008H:EAX\[15:8\]; 48 or 57.
    pub linear_address_width: u32,
}

/// A field that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The name of the field.
    pub field: &'static str,
    /// What it holds.
    pub value: u64,
    /// What the SDM demands.
    pub rule: &'static str,
    /// The section of SDM vol. 3 that demands it.
    pub section: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field,
            value,
            rule,
            section,
        } = self;
        write!(f, "{field} is {value:#x}: {rule} (SDM vol. 3, {section})")
    }
}

/// All rules that the fields break, in the SDM's order: controls, host, guest.
pub fn check(reader: &dyn FieldReader, capabilities: &Capabilities) -> Vec<Violation> {
    let mut checker = Checker::new(reader, capabilities);
    control::check(&mut checker);
    host::check(&mut checker);
    guest::check(&mut checker);
    checker.violations
}

/// The fields, the controls among them read once, and what was found wrong.
struct Checker<'a> {
    reader: &'a dyn FieldReader,
    capabilities: &'a Capabilities,
    pin_based: u64,
    primary: u64,
    /// Zero unless the primary controls activate it, as the CPU has it.
    secondary: u64,
    exit: u64,
    entry: u64,
    section: &'static str,
    violations: Vec<Violation>,
}

impl<'a> Checker<'a> {
    fn new(reader: &'a dyn FieldReader, capabilities: &'a Capabilities) -> Self {
        let read = |field: Field| reader.read(field.encoding);
        let primary = read(fields::PRIMARY);
        let activated = primary & control::SECONDARY_CONTROLS != 0;
        Self {
            reader,
            capabilities,
            pin_based: read(fields::PIN_BASED),
            primary,
            secondary: if activated {
                read(fields::SECONDARY)
            } else {
                0
            },
            exit: read(fields::EXIT),
            entry: read(fields::ENTRY),
            section: "",
            violations: Vec::new(),
        }
    }

    fn read(&self, field: Field) -> u64 {
        self.reader.read(field.encoding)
    }

    /// The section that the requirements after this call come from.
    fn section(&mut self, section: &'static str) {
        self.section = section;
    }

    /// Notes a violation by `field` unless `holds`.
    fn require(&mut self, field: Field, holds: bool, rule: &'static str) {
        if !holds {
            let value = self.read(field);
            let section = self.section;
            self.violations.push(Violation {
                field: field.name,
                value,
                rule,
                section,
            });
        }
    }

    fn require_canonical(&mut self, field: Field) {
        let shift = 64 - self.capabilities.linear_address_width.clamp(1, 64);
        let value = self.read(field) as i64;
        self.require(field, value << shift >> shift == value, "must be canonical");
    }

    fn require_physical(&mut self, field: Field, alignment: u64, rule: &'static str) {
        let value = self.read(field);
        self.require(field, value & (alignment - 1) == 0, rule);
        self.require_physical_width(field);
    }

    fn require_physical_width(&mut self, field: Field) {
        let value = self.read(field);
        self.require(
            field,
            self.is_physical(value),
            "must not set bits beyond the physical-address width",
        );
    }

    /// Whether `address` is within the physical-address width.
    fn is_physical(&self, address: u64) -> bool {
        address
            .checked_shr(self.capabilities.physical_address_width)
            .unwrap_or(0)
            == 0
    }

    /// Every byte of IA32_PAT is one of the types 0, 1, 4, 5, 6, 7.
    fn require_pat(&mut self, field: Field) {
        let valid = self
            .read(field)
            .to_le_bytes()
            .iter()
            .all(|kind| matches!(kind, 0 | 1 | 4..=7));
        self.require(field, valid, "each byte must be 0, 1, 4, 5, 6 or 7");
    }

    /// The event that the VM-entry interruption information injects.
    fn injected(&self) -> Option<Event> {
        let information = self.read(fields::ENTRY_INTERRUPTION_INFORMATION);
        (information >> 31 & 1 != 0).then_some(Event {
            vector: information as u8,
            kind: (information >> 8 & 7) as u8,
            delivers_error_code: information >> 11 & 1 != 0,
        })
    }
}

/// An event to inject (SDM vol. 3, 25.8.3).
#[derive(Clone, Copy)]
struct Event {
    vector: u8,
    kind: u8,
    delivers_error_code: bool,
}

impl Event {
    const EXTERNAL_INTERRUPT: u8 = 0;
    const RESERVED: u8 = 1;
    const NMI: u8 = 2;
    const HARDWARE_EXCEPTION: u8 = 3;
    const SOFTWARE_INTERRUPT: u8 = 4;
    const SOFTWARE_EXCEPTION: u8 = 6;
    const OTHER: u8 = 7;
}

/// Bits of the guest's and the host's registers that rules name.
mod bits {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_CET: u64 = 1 << 23;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    /// SCE, LME, LMA, NXE.
    pub const EFER_DEFINED: u64 = 1 | EFER_LME | EFER_LMA | 1 << 11;
    pub const RFLAGS_TF: u64 = 1 << 8;
    pub const RFLAGS_IF: u64 = 1 << 9;
    pub const RFLAGS_VM: u64 = 1 << 17;
    pub const DEBUGCTL_BTF: u64 = 1 << 1;
}
