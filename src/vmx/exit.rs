//! VM exits, decoded (SDM 3, 28.2 and appendix C).
//!
//! [`Exit::decode`] reads, of what the VMCS says about an exit, only what its reason has. The enum is exhaustive: who handles exits handles all of them.

use super::apic::ApicPageAccess;
use super::vmcs::{Vmcs, information};
use crate::addr::Gpa;

/// Bit 31 of the exit reason: the entry itself failed.
const ENTRY_FAILED: u32 = 1 << 31;

/// A VM exit with its decoded qualification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An exception that the bitmap names, or an NMI.
    ExceptionOrNmi(InterruptionInfo),
    /// A host interrupt; the CPU has acknowledged this vector.
    ExternalInterrupt(u8),
    TripleFault,
    Init,
    StartUp,
    InterruptWindow,
    NmiWindow,
    TaskSwitch(TaskSwitch),
    Cpuid,
    Hlt,
    /// INVD, or WBINVD and WBNOINVD.
    CacheInvalidation,
    Invlpg,
    Rdpmc,
    Vmcall,
    /// An instruction of VT-x or SMX, which the guest does not have.
    VmxInstruction,
    ControlRegister(ControlRegisterAccess),
    DebugRegister,
    Io(IoAccess),
    Rdmsr,
    Wrmsr,
    Mwait,
    Monitor,
    Pause,
    /// A CR8 write lowered the virtual TPR below the threshold.
    TprBelowThreshold,
    /// The APIC's page was accessed in a way that the CPU does not virtualize.
    ApicPage(ApicPageAccess),
    /// The CPU has ended the interrupt with this vector, which the EOI-exit bitmap names.
    VirtualizedEoi(u8),
    /// The register at this offset of the APIC's page has been written.
    ApicWrite(u16),
    EptViolation(EptViolation),
    EptMisconfiguration(Gpa),
    PreemptionTimer,
    Xsetbv,
    /// VM entry failed: basic reason 33, 34 or 41, and the qualification.
    EntryFailure {
        reason: u32,
        qualification: u64,
    },
    /// A reason of a control that is never switched on, or a new one.
    Unexpected {
        reason: u32,
        qualification: u64,
    },
}

/// VM-exit interruption information (25.9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    const ERROR_CODE: u32 = 1 << 11;
    const VALID: u32 = 1 << 31;

    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    pub const fn is_nmi(self) -> bool {
        self.0 >> 8 & 7 == 2
    }

    /// Software interrupts and exceptions need the instruction length at injection.
    pub const fn is_software(self) -> bool {
        matches!(self.0 >> 8 & 7, 4..=6)
    }

    /// An exception of the CPU's own, not of an INT instruction.
    pub const fn is_hardware_exception(self) -> bool {
        self.0 >> 8 & 7 == 3
    }

    /// The exception was raised by an IRET, which had ended the blocking of NMIs; not
    /// valid where the exit interrupted the delivery of an event.
    pub const fn unblocked_nmis(self) -> bool {
        self.0 & 1 << 12 != 0
    }

    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// The same event in real mode, which has no error codes: an entry refuses one there (SDM 3,
    /// 27.2.1.3), and Bochs reports one all the same.
    pub const fn in_real_mode(self) -> Self {
        Self(self.0 & !Self::ERROR_CODE)
    }

    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// As an event to inject: the bits that both formats share.
    pub const fn as_entry(self) -> u32 {
        self.0 & (Self::VALID | 0xfff)
    }

    /// An external interrupt, to be injected.
    pub const fn interrupt(vector: u8) -> Self {
        Self(Self::VALID | vector as u32)
    }

    pub const NMI: Self = Self(Self::VALID | 2 << 8 | 2);

    /// A hardware exception, to be injected.
    pub const fn exception(vector: u8, error_code: bool) -> Self {
        Self(Self::VALID | 3 << 8 | vector as u32 | if error_code { Self::ERROR_CODE } else { 0 })
    }
}

/// The exit qualification of a control-register access (28.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlRegisterAccess {
    /// MOV to CR`register` from general register `source`.
    Write {
        register: u8,
        source: u8,
    },
    /// MOV from CR`register` to general register `destination`.
    Read {
        register: u8,
        destination: u8,
    },
    Clts,
    /// LMSW with this source operand.
    Lmsw(u16),
}

impl ControlRegisterAccess {
    /// From the exit qualification.
    pub const fn decode(qualification: u64) -> Self {
        let register = (qualification & 15) as u8;
        let general = (qualification >> 8 & 15) as u8;
        match qualification >> 4 & 3 {
            0 => Self::Write {
                register,
                source: general,
            },
            1 => Self::Read {
                register,
                destination: general,
            },
            2 => Self::Clts,
            _ => Self::Lmsw((qualification >> 16) as u16),
        }
    }
}

/// The exit qualification of an I/O instruction (28.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    pub port: u16,
    /// 1, 2 or 4.
    pub bytes: u8,
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    pub repeated: bool,
}

impl IoAccess {
    /// From the exit qualification.
    #[inline]
    pub const fn decode(qualification: u64) -> Self {
        Self {
            port: (qualification >> 16) as u16,
            bytes: (qualification & 7) as u8 + 1,
            input: qualification & 1 << 3 != 0,
            string: qualification & 1 << 4 != 0,
            repeated: qualification & 1 << 5 != 0,
        }
    }
}

/// The exit qualification of a task switch (28.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Of the new task's TSS.
    pub selector: u16,
    pub source: TaskSwitchSource,
}

/// What has asked for a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitchSource {
    Call,
    Iret,
    Jump,
    /// A task gate in the IDT.
    Gate,
}

impl TaskSwitch {
    /// From the exit qualification.
    pub const fn decode(qualification: u64) -> Self {
        Self {
            selector: qualification as u16,
            source: match qualification >> 30 & 3 {
                0 => TaskSwitchSource::Call,
                1 => TaskSwitchSource::Iret,
                2 => TaskSwitchSource::Jump,
                _ => TaskSwitchSource::Gate,
            },
        }
    }
}

/// The exit qualification of an EPT violation (28.2.1), and its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation {
    pub gpa: Gpa,
    pub write: bool,
    pub execute: bool,
    /// The access was to what a linear address translates to, not to a paging structure.
    pub final_access: bool,
    /// The access was an IRET's, which had ended the blocking of NMIs; not valid
    /// where the exit interrupted the delivery of an event.
    pub unblocked_nmis: bool,
}

impl EptViolation {
    const WRITE: u64 = 1 << 1;

    /// Whether the exit that just happened is of a write.
    #[inline(always)]
    pub fn is_write(vmcs: &Vmcs) -> bool {
        vmcs.read_basic(information::EXIT_QUALIFICATION) & Self::WRITE != 0
    }

    /// The exit that just happened.
    #[inline(always)]
    pub fn decode(vmcs: &Vmcs) -> Self {
        const LINEAR_AND_FINAL: u64 = 1 << 7 | 1 << 8;
        let qualification = vmcs.read_basic(information::EXIT_QUALIFICATION);
        Self {
            gpa: Gpa(vmcs.read_basic(information::GUEST_PHYSICAL_ADDRESS)),
            write: qualification & Self::WRITE != 0,
            execute: qualification & 1 << 2 != 0,
            final_access: qualification & LINEAR_AND_FINAL == LINEAR_AND_FINAL,
            unblocked_nmis: qualification & 1 << 12 != 0,
        }
    }
}

impl Exit {
    /// The exit that just happened, whose reason field is `reason`.
    #[inline(always)]
    pub fn decode(reason: u32, vmcs: &Vmcs) -> Self {
        let qualification = || vmcs.read(information::EXIT_QUALIFICATION);
        let interruption = || InterruptionInfo(vmcs.read(information::INTERRUPTION_INFO));
        if reason & ENTRY_FAILED != 0 {
            return Self::EntryFailure {
                reason: reason & 0xffff,
                qualification: qualification(),
            };
        }
        match reason & 0xffff {
            0 => Self::ExceptionOrNmi(interruption()),
            1 => Self::ExternalInterrupt(interruption().vector()),
            2 => Self::TripleFault,
            3 => Self::Init,
            4 => Self::StartUp,
            7 => Self::InterruptWindow,
            8 => Self::NmiWindow,
            9 => Self::TaskSwitch(TaskSwitch::decode(qualification())),
            10 => Self::Cpuid,
            12 => Self::Hlt,
            13 | 54 => Self::CacheInvalidation,
            14 => Self::Invlpg,
            15 => Self::Rdpmc,
            18 => Self::Vmcall,
            11 | 17 | 19..=27 | 50 | 53 | 59 => Self::VmxInstruction,
            28 => Self::ControlRegister(ControlRegisterAccess::decode(qualification())),
            29 => Self::DebugRegister,
            30 => Self::Io(IoAccess::decode(qualification())),
            31 => Self::Rdmsr,
            32 => Self::Wrmsr,
            36 => Self::Mwait,
            39 => Self::Monitor,
            40 => Self::Pause,
            43 => Self::TprBelowThreshold,
            44 => Self::ApicPage(ApicPageAccess::decode(qualification())),
            45 => Self::VirtualizedEoi(qualification() as u8),
            56 => Self::ApicWrite(qualification() as u16 & 0xfff),
            48 => Self::EptViolation(EptViolation::decode(vmcs)),
            49 => Self::EptMisconfiguration(Gpa(vmcs.read(information::GUEST_PHYSICAL_ADDRESS))),
            52 => Self::PreemptionTimer,
            55 => Self::Xsetbv,
            reason => Self::Unexpected {
                reason,
                qualification: qualification(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualifications_of_the_manual() {
        // OUT DX, AL to 0x3f8.
        assert_eq!(
            IoAccess::decode(0x03f8_0000),
            IoAccess {
                port: 0x3f8,
                bytes: 1,
                input: false,
                string: false,
                repeated: false
            }
        );
        // REP INSD from 0x1f0.
        assert_eq!(
            IoAccess::decode(0x01f0_003b),
            IoAccess {
                port: 0x1f0,
                bytes: 4,
                input: true,
                string: true,
                repeated: true
            }
        );
        assert_eq!(
            ControlRegisterAccess::decode(0x0300),
            ControlRegisterAccess::Write {
                register: 0,
                source: 3
            }
        );
        assert_eq!(
            ControlRegisterAccess::decode(0x0118),
            ControlRegisterAccess::Read {
                register: 8,
                destination: 1
            }
        );
        assert_eq!(
            ControlRegisterAccess::decode(0x0001_0030),
            ControlRegisterAccess::Lmsw(1)
        );
        let switch = TaskSwitch::decode(0x4000_0058);
        assert_eq!(
            (switch.selector, switch.source),
            (0x58, TaskSwitchSource::Iret)
        );
    }

    #[test]
    fn events_to_inject() {
        assert_eq!(InterruptionInfo::exception(13, true).0, 0x8000_0b0d);
        assert_eq!(InterruptionInfo::interrupt(0x20).0, 0x8000_0020);
        assert_eq!(InterruptionInfo::NMI.0, 0x8000_0202);
        assert!(InterruptionInfo::NMI.is_nmi());
    }
}
