//! What of VT-x is used on this CPU, in a few lines of the log.

use crate::host::local_apic::{self, Mode};
use crate::vmx::apic::{ApicAccess, ApicTier};
use crate::vmx::controls::Controls;
use crate::vmx::ept::{EptVpidCapabilities, PageSize};
use crate::vmx::operation::Vmx;
use core::fmt;
use log::info;
use x86::vmx::vmcs::control::{
    PinbasedControls as Pin, PrimaryControls as Primary, SecondaryControls as Secondary,
};

/// Says what was chosen from what the CPU offers.
pub fn tell(vmx: &Vmx) {
    let features = Features::new(vmx);
    info!("VT-x: {}", features.list(Choice::Used));
    info!(
        "VT-x, offered and not used: {}",
        features.list(Choice::Unused)
    );
    info!("VT-x, not offered: {}", features.list(Choice::Absent));
    info!(
        "EPT: {}",
        Ept {
            capabilities: vmx.capabilities.ept_vpid,
            large_code: vmx.large_code,
        }
    );
    info!(
        "host: local APIC by {}, timer by {}",
        match local_apic::mode() {
            Mode::X2Apic => "x2APIC",
            Mode::XApic | Mode::Off => "xAPIC",
        },
        if local_apic::uses_deadline() {
            "TSC deadline"
        } else {
            "count-down"
        }
    );
}

/// What became of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Used,
    Unused,
    Absent,
}

impl Choice {
    fn of(bit: u32, used: u32, offered: u32) -> Self {
        if used & bit == bit {
            Self::Used
        } else if offered & bit == bit {
            Self::Unused
        } else {
            Self::Absent
        }
    }
}

/// What guests use of the CPU that ask for all: their APIC's mode decides which at a time.
fn all_controls(vmx: &Vmx) -> Controls {
    let tier = ApicTier::best(&vmx.capabilities);
    let of = |access| tier.controls(access, &vmx.controls, &vmx.capabilities);
    let (page, msrs) = (of(ApicAccess::Page), of(ApicAccess::Msrs));
    Controls {
        secondary: page.secondary | msrs.secondary,
        ..page
    }
}

const COUNT: usize = 18;

struct Features([(Choice, &'static str); COUNT]);

impl Features {
    fn new(vmx: &Vmx) -> Self {
        let capabilities = &vmx.capabilities;
        let controls = &all_controls(vmx);
        let pin = |bits: Pin| Choice::of(bits.bits(), controls.pin, capabilities.pin.may());
        let primary =
            |bits: Primary| Choice::of(bits.bits(), controls.primary, capabilities.primary.may());
        let secondary = |bits: Secondary| {
            Choice::of(
                bits.bits(),
                controls.secondary,
                capabilities.secondary.may(),
            )
        };
        Self([
            (secondary(Secondary::ENABLE_EPT), "EPT"),
            (
                secondary(Secondary::UNRESTRICTED_GUEST),
                "unrestricted guest",
            ),
            (secondary(Secondary::ENABLE_VPID), "VPID"),
            (pin(Pin::VMX_PREEMPTION_TIMER), "preemption timer"),
            (pin(Pin::VIRTUAL_NMIS), "virtual NMIs"),
            (primary(Primary::USE_TPR_SHADOW), "TPR shadow"),
            (secondary(Secondary::VIRTUALIZE_APIC), "APIC-access page"),
            (
                secondary(Secondary::VIRTUALIZE_APIC_REGISTER),
                "APIC-register virtualization",
            ),
            (
                secondary(Secondary::VIRTUAL_INTERRUPT_DELIVERY),
                "virtual-interrupt delivery",
            ),
            (
                secondary(Secondary::VIRTUALIZE_X2APIC),
                "x2APIC virtualization",
            ),
            (pin(Pin::POSTED_INTERRUPTS), "posted interrupts"),
            (secondary(Secondary::ENABLE_RDTSCP), "RDTSCP"),
            (secondary(Secondary::ENABLE_INVPCID), "INVPCID"),
            (secondary(Secondary::ENABLE_XSAVES_XRSTORS), "XSAVES"),
            (secondary(Secondary::WBINVD_EXITING), "WBINVD exiting"),
            (
                secondary(Secondary::PAUSE_LOOP_EXITING),
                "PAUSE-loop exiting",
            ),
            (
                secondary(Secondary::ENABLE_PML),
                "page-modification logging",
            ),
            (secondary(Secondary::USE_TSC_SCALING), "TSC scaling"),
        ])
    }

    fn list(&self, choice: Choice) -> List<'_> {
        List {
            features: self,
            choice,
        }
    }
}

/// The features of one choice, with commas.
struct List<'a> {
    features: &'a Features,
    choice: Choice,
}

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.features.0.iter();
        let names = names.filter(|(choice, _)| *choice == self.choice);
        let mut separator = "";
        for (_, name) in names {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        if separator.is_empty() {
            f.write_str("nothing")?;
        }
        Ok(())
    }
}

struct Ept {
    capabilities: EptVpidCapabilities,
    large_code: bool,
}

impl fmt::Display for Ept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("pages of 4 KiB")?;
        for (size, name) in [(PageSize::Size2M, "2 MiB"), (PageSize::Size1G, "1 GiB")] {
            if self.capabilities.page_size(size) {
                write!(f, ", {name}")?;
            }
        }
        // As `EptPointer::new` chooses.
        f.write_str(if self.capabilities.write_back_tables() {
            "; tables write-back"
        } else {
            "; tables uncacheable"
        })?;
        f.write_str(if self.large_code {
            ""
        } else {
            "; code in pages of 4 KiB (CVE-2018-12207)"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_used_unused_or_absent() {
        let choices = |used, offered| [1, 2, 4].map(|bit| Choice::of(bit, used, offered));
        assert_eq!(
            choices(1, 3),
            [Choice::Used, Choice::Unused, Choice::Absent]
        );
        let mut features = Features([(Choice::Absent, "a"); COUNT]);
        features.0[3] = (Choice::Used, "b");
        features.0[9] = (Choice::Used, "c");
        assert_eq!(features.list(Choice::Used).to_string(), "b, c");
        assert_eq!(features.list(Choice::Unused).to_string(), "nothing");
    }

    #[test]
    fn page_sizes_are_those_of_the_capability() {
        let text = |bits, large_code| {
            let capabilities = EptVpidCapabilities(bits);
            Ept {
                capabilities,
                large_code,
            }
            .to_string()
        };
        assert_eq!(
            text(0x0f01_0633_4141, true),
            "pages of 4 KiB, 2 MiB, 1 GiB; tables write-back"
        );
        assert_eq!(
            text(1 << 6 | 1 << 8 | 1 << 16, false),
            "pages of 4 KiB, 2 MiB; tables uncacheable; code in pages of 4 KiB (CVE-2018-12207)"
        );
    }
}
