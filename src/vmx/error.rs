//! What VMX instructions and VM entries report when they fail, as text for the
//! operator (SDM vol. 3, "VM-instruction error numbers" and "VM-entry failures
//! during or after loading guest state").

use core::fmt;

/// The VMCS field VM-instruction error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmInstructionError(pub u32);

impl VmInstructionError {
    /// The SDM's name of the error; `None` for a number that it does not list.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            1 => "VMCALL executed in VMX root operation",
            2 => "VMCLEAR with invalid physical address",
            3 => "VMCLEAR with VMXON pointer",
            4 => "VMLAUNCH with non-clear VMCS",
            5 => "VMRESUME with non-launched VMCS",
            6 => "VMRESUME after VMXOFF",
            7 => "VM entry with invalid control field(s)",
            8 => "VM entry with invalid host-state field(s)",
            9 => "VMPTRLD with invalid physical address",
            10 => "VMPTRLD with VMXON pointer",
            11 => "VMPTRLD with incorrect VMCS revision identifier",
            12 => "VMREAD/VMWRITE from/to unsupported VMCS component",
            13 => "VMWRITE to read-only VMCS component",
            15 => "VMXON executed in VMX root operation",
            16 => "VM entry with invalid executive-VMCS pointer",
            17 => "VM entry with non-launched executive VMCS",
            18 => "VM entry with executive-VMCS pointer not VMXON pointer",
            19 => "VMCALL with non-clear VMCS",
            20 => "VMCALL with invalid VM-exit control fields",
            22 => "VMCALL with incorrect MSEG revision identifier",
            23 => "VMXOFF under dual-monitor treatment of SMIs and SMM",
            24 => "VMCALL with invalid SMM-monitor features",
            25 => "VM entry with invalid VM-execution control fields in executive VMCS",
            26 => "VM entry with events blocked by MOV SS",
            28 => "Invalid operand to INVEPT/INVVPID",
            _ => return None,
        })
    }
}

impl fmt::Display for VmInstructionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().unwrap_or("not listed in the SDM");
        write!(f, "VM-instruction error {}: {name}", self.0)
    }
}

/// A VM entry that failed after the checks of controls and host state: the
/// host got an exit, and the guest did not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryFailure {
    /// Basic exit reason 33: a check of guest state failed.
    GuestState(GuestStateFailure),
    /// Basic exit reason 34: an entry of the VM-entry MSR-load area was
    /// refused; the first is number 1.
    MsrLoading { entry: u64 },
    /// Basic exit reason 41: a machine check happened during the entry.
    MachineCheck,
    /// A basic exit reason for which the SDM has no entry failure.
    Unknown { reason: u16 },
}

/// The exit qualification of basic exit reason 33.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStateFailure {
    /// 0: some field of the guest-state area.
    Field,
    /// 2: loading the PDPTEs.
    Pdptes,
    /// 3: an NMI was to be injected while blocking by STI is in effect.
    NmiWhileBlockingBySti,
    /// 4: the VMCS link pointer.
    LinkPointer,
    /// A value that the SDM does not use.
    Unknown(u64),
}

impl EntryFailure {
    /// Decodes the VMCS fields exit reason and exit qualification; `None` when
    /// bit 31 of the reason is clear, so that this was an exit of a guest that ran.
    pub const fn decode(exit_reason: u32, qualification: u64) -> Option<Self> {
        if exit_reason >> 31 == 0 {
            return None;
        }
        Some(match exit_reason as u16 {
            33 => Self::GuestState(match qualification {
                0 => GuestStateFailure::Field,
                2 => GuestStateFailure::Pdptes,
                3 => GuestStateFailure::NmiWhileBlockingBySti,
                4 => GuestStateFailure::LinkPointer,
                other => GuestStateFailure::Unknown(other),
            }),
            34 => Self::MsrLoading {
                entry: qualification,
            },
            41 => Self::MachineCheck,
            reason => Self::Unknown { reason },
        })
    }
}

impl fmt::Display for EntryFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VM entry failed: ")?;
        match self {
            Self::GuestState(failure) => {
                f.write_str("invalid guest state: ")?;
                match failure {
                    GuestStateFailure::Field => f.write_str("a field of the guest-state area"),
                    GuestStateFailure::Pdptes => f.write_str("the PDPTEs could not be loaded"),
                    GuestStateFailure::NmiWhileBlockingBySti => {
                        f.write_str("an NMI was to be injected while STI blocks events")
                    }
                    GuestStateFailure::LinkPointer => f.write_str("the VMCS link pointer"),
                    GuestStateFailure::Unknown(qualification) => {
                        write!(f, "exit qualification {qualification:#x}")
                    }
                }
            }
            Self::MsrLoading { entry } => {
                write!(f, "entry {entry} of the VM-entry MSR-load area was refused")
            }
            Self::MachineCheck => f.write_str("a machine check during the entry"),
            Self::Unknown { reason } => write!(f, "exit reason {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_errors_have_the_names_of_the_manual() {
        let text = |number| VmInstructionError(number).to_string();
        assert_eq!(
            text(7),
            "VM-instruction error 7: VM entry with invalid control field(s)"
        );
        assert_eq!(
            text(26),
            "VM-instruction error 26: VM entry with events blocked by MOV SS"
        );
        assert_eq!(text(14), "VM-instruction error 14: not listed in the SDM");
        let unlisted: Vec<u32> = (0..30)
            .filter(|number| VmInstructionError(*number).name().is_none())
            .collect();
        assert_eq!(unlisted, [0, 14, 21, 27, 29]);
    }

    #[test]
    fn entry_failures_are_told_from_exits() {
        assert_eq!(EntryFailure::decode(33, 0), None);
        for (reason, qualification, expected) in [
            (
                33,
                0,
                "VM entry failed: invalid guest state: a field of the guest-state area",
            ),
            (
                33,
                2,
                "VM entry failed: invalid guest state: the PDPTEs could not be loaded",
            ),
            (
                33,
                3,
                "VM entry failed: invalid guest state: an NMI was to be injected while STI blocks events",
            ),
            (
                33,
                4,
                "VM entry failed: invalid guest state: the VMCS link pointer",
            ),
            (
                33,
                5,
                "VM entry failed: invalid guest state: exit qualification 0x5",
            ),
            (
                34,
                3,
                "VM entry failed: entry 3 of the VM-entry MSR-load area was refused",
            ),
            (41, 0, "VM entry failed: a machine check during the entry"),
            (12, 0, "VM entry failed: exit reason 12"),
        ] {
            let failure = EntryFailure::decode(1 << 31 | reason, qualification).unwrap();
            assert_eq!(failure.to_string(), expected);
        }
    }
}
