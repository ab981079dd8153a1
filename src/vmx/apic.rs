//! How much of a guest's local APIC the CPU is (SDM 3, chapter 30).
//!
//! Three tiers, each with all of the one below: nothing; FlexPriority, where the
//! CPU has the task priority and says which access of the APIC's page has exited;
//! APICv, where it has the registers and delivers interrupts.

use super::capability::Capabilities;
use super::controls::{Controls, Missing};
use core::fmt;
use x86::vmx::vmcs::control::{
    PinbasedControls as Pin, PrimaryControls as Primary, SecondaryControls as Secondary,
};

/// How much of the local APIC the CPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ApicTier {
    /// CR8 and MSR accesses exit, and accesses to the page are EPT violations.
    Emulated,
    /// TPR shadow and APIC-access page.
    FlexPriority,
    /// APIC-register virtualization and virtual-interrupt delivery too.
    Apicv,
}

/// How the guest reaches its APIC's registers now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicAccess {
    /// The APIC is disabled.
    None,
    /// By memory: xAPIC mode.
    Page,
    /// By MSRs: x2APIC mode.
    Msrs,
}

const CR8_EXITING: Primary = Primary::CR8_LOAD_EXITING.union(Primary::CR8_STORE_EXITING);

impl ApicTier {
    /// The highest that this CPU has.
    pub fn best(capabilities: &Capabilities) -> Self {
        [Self::Apicv, Self::FlexPriority]
            .into_iter()
            .find(|tier| tier.missing(capabilities).is_none())
            .unwrap_or(Self::Emulated)
    }

    /// What this CPU lacks for the tier.
    pub fn missing(self, capabilities: &Capabilities) -> Option<Missing> {
        let primary = [(Primary::USE_TPR_SHADOW.bits(), "use TPR shadow")];
        let flex_priority = [(
            Secondary::VIRTUALIZE_APIC.bits(),
            "virtualize APIC accesses",
        )];
        let apicv = [
            (
                Secondary::VIRTUALIZE_X2APIC.bits(),
                "virtualize x2APIC mode",
            ),
            (
                Secondary::VIRTUALIZE_APIC_REGISTER.bits(),
                "APIC-register virtualization",
            ),
            (
                Secondary::VIRTUAL_INTERRUPT_DELIVERY.bits(),
                "virtual-interrupt delivery",
            ),
        ];
        let (primary, flex_priority, apicv) = match self {
            Self::Emulated => (&primary[..0], &flex_priority[..0], &apicv[..0]),
            Self::FlexPriority => (&primary[..], &flex_priority[..], &apicv[..0]),
            Self::Apicv => (&primary[..], &flex_priority[..], &apicv[..]),
        };
        let lacking = |controls: &[(u32, &'static str)], offered: u32| {
            controls.iter().copied().find(|(bit, _)| offered & bit == 0)
        };
        let missing = |msr, (bit, feature): (u32, _)| Missing {
            feature,
            msr,
            bit: 32 + bit.trailing_zeros(),
        };
        let secondary = capabilities.secondary.may();
        lacking(primary, capabilities.primary.may())
            .map(|control| missing("IA32_VMX_PROCBASED_CTLS", control))
            .or_else(|| {
                lacking(flex_priority, secondary)
                    .or_else(|| lacking(apicv, secondary))
                    .map(|control| missing("IA32_VMX_PROCBASED_CTLS2", control))
            })
    }

    /// Whether the CPU has the task priority: CR8 does not exit.
    pub fn shadows_tpr(self) -> bool {
        self >= Self::FlexPriority
    }

    /// Whether the CPU delivers the APIC's interrupts.
    pub fn delivers(self) -> bool {
        self == Self::Apicv
    }

    /// The controls of this tier for a guest that reaches its registers by `access`, in
    /// place of those in `controls`. Of the two virtualizations of an access only one
    /// may be on (SDM 3, 27.2.1.1).
    pub fn controls(
        self,
        access: ApicAccess,
        controls: &Controls,
        capabilities: &Capabilities,
    ) -> Controls {
        let none = Secondary::VIRTUALIZE_APIC
            | Secondary::VIRTUALIZE_X2APIC
            | Secondary::VIRTUALIZE_APIC_REGISTER
            | Secondary::VIRTUAL_INTERRUPT_DELIVERY;
        let mut primary = controls.primary & !Primary::USE_TPR_SHADOW.bits();
        let mut secondary = controls.secondary & !none.bits();
        if self.shadows_tpr() {
            primary = primary & !CR8_EXITING.bits() | Primary::USE_TPR_SHADOW.bits();
            secondary |= match access {
                ApicAccess::None => 0,
                ApicAccess::Page => Secondary::VIRTUALIZE_APIC.bits(),
                ApicAccess::Msrs => {
                    Secondary::VIRTUALIZE_X2APIC.bits() & capabilities.secondary.may()
                }
            };
        } else {
            primary |= CR8_EXITING.bits();
        }
        let mut pin = controls.pin & !Pin::POSTED_INTERRUPTS.bits();
        if self.delivers() {
            secondary |= (Secondary::VIRTUALIZE_APIC_REGISTER
                | Secondary::VIRTUAL_INTERRUPT_DELIVERY)
                .bits();
            // They need that, and interrupts that are acknowledged on exit, as all are.
            pin |= Pin::POSTED_INTERRUPTS.bits() & capabilities.pin.may();
        }
        Controls {
            pin,
            primary,
            secondary,
            ..*controls
        }
    }
}

impl fmt::Display for ApicTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Emulated => "emulated",
            Self::FlexPriority => "FlexPriority",
            Self::Apicv => "APICv",
        })
    }
}

/// The exit qualification of an access to the APIC's page (SDM 3, table 28-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicPageAccess {
    /// Bytes from the start of the page.
    pub offset: u16,
    pub kind: ApicPageAccessKind,
}

/// What did the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicPageAccessKind {
    /// An instruction's operand.
    Read,
    Write,
    /// A fetch, or a paging structure.
    Fetch,
    /// The delivery of an event.
    Delivery,
}

impl ApicPageAccess {
    /// From the exit qualification.
    #[inline]
    pub const fn decode(qualification: u64) -> Self {
        Self {
            offset: (qualification & 0xfff) as u16,
            kind: match qualification >> 12 & 0xf {
                0 => ApicPageAccessKind::Read,
                1 => ApicPageAccessKind::Write,
                3 | 10 => ApicPageAccessKind::Delivery,
                _ => ApicPageAccessKind::Fetch,
            },
        }
    }

    /// Whether an instruction's operand was accessed.
    #[inline]
    pub const fn is_operand(self) -> bool {
        matches!(
            self.kind,
            ApicPageAccessKind::Read | ApicPageAccessKind::Write
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::controls::tests::emulator;

    #[test]
    fn the_best_tier_is_what_the_capabilities_offer() {
        let mut capabilities = emulator();
        assert_eq!(ApicTier::best(&capabilities), ApicTier::Apicv);
        let without = |bit: Secondary| u64::from(bit.bits()) << 32;
        capabilities.secondary.0 &= !without(Secondary::VIRTUAL_INTERRUPT_DELIVERY);
        assert_eq!(ApicTier::best(&capabilities), ApicTier::FlexPriority);
        let missing = ApicTier::Apicv.missing(&capabilities).unwrap();
        assert_eq!(
            (missing.feature, missing.msr, missing.bit),
            ("virtual-interrupt delivery", "IA32_VMX_PROCBASED_CTLS2", 41)
        );
        capabilities.primary.0 &= !(u64::from(Primary::USE_TPR_SHADOW.bits()) << 32);
        assert_eq!(ApicTier::best(&capabilities), ApicTier::Emulated);
        assert_eq!(ApicTier::Emulated.missing(&capabilities), None);
    }

    /// The rules of SDM 3, 27.2.1.1 that an entry checks.
    #[test]
    fn controls_obey_the_checks_of_an_entry() {
        let capabilities = emulator();
        let base = Controls::new(&capabilities).unwrap();
        for tier in [ApicTier::Emulated, ApicTier::FlexPriority, ApicTier::Apicv] {
            for access in [ApicAccess::None, ApicAccess::Page, ApicAccess::Msrs] {
                // From any other state of the same guest.
                for before in [ApicAccess::None, ApicAccess::Page, ApicAccess::Msrs] {
                    let controls = tier.controls(before, &base, &capabilities);
                    let controls = tier.controls(access, &controls, &capabilities);
                    assert_eq!(controls, tier.controls(access, &base, &capabilities));
                    let has = |control| controls.has(control);
                    let shadow = controls.primary & Primary::USE_TPR_SHADOW.bits() != 0;
                    assert!(
                        !(has(Secondary::VIRTUALIZE_APIC) && has(Secondary::VIRTUALIZE_X2APIC))
                    );
                    assert!(
                        shadow
                            || !(has(Secondary::VIRTUALIZE_X2APIC)
                                || has(Secondary::VIRTUALIZE_APIC_REGISTER)
                                || has(Secondary::VIRTUAL_INTERRUPT_DELIVERY))
                    );
                    assert_eq!(shadow, controls.primary & CR8_EXITING.bits() == 0);
                    assert_eq!(controls.secondary & !capabilities.secondary.may(), 0);
                    assert_eq!(controls.primary & !capabilities.primary.may(), 0);
                    assert!(!controls.posts_interrupts(), "they are not offered");
                }
            }
        }
    }

    /// SDM 3, 27.2.1.1: they need virtual-interrupt delivery, whatever the guest makes of its APIC.
    #[test]
    fn interrupts_are_posted_where_the_cpu_delivers() {
        let mut capabilities = emulator();
        capabilities.pin.0 |= u64::from(Pin::POSTED_INTERRUPTS.bits()) << 32;
        let base = Controls::new(&capabilities).unwrap();
        assert!(!base.posts_interrupts());
        for tier in [ApicTier::Emulated, ApicTier::FlexPriority, ApicTier::Apicv] {
            for access in [ApicAccess::None, ApicAccess::Page, ApicAccess::Msrs] {
                let controls = tier.controls(access, &base, &capabilities);
                assert_eq!(controls.posts_interrupts(), tier.delivers());
                assert_eq!(
                    controls.posts_interrupts(),
                    controls.has(Secondary::VIRTUAL_INTERRUPT_DELIVERY)
                );
                assert_eq!(controls.pin & !capabilities.pin.may(), 0);
            }
        }
    }

    #[test]
    fn accesses_of_the_manual() {
        let access = ApicPageAccess::decode(0x1300);
        assert_eq!(
            (access.offset, access.kind),
            (0x300, ApicPageAccessKind::Write)
        );
        assert_eq!(ApicPageAccess::decode(0x80).kind, ApicPageAccessKind::Read);
        assert_eq!(
            ApicPageAccess::decode(0x2000).kind,
            ApicPageAccessKind::Fetch
        );
        assert_eq!(
            ApicPageAccess::decode(0xf000).kind,
            ApicPageAccessKind::Fetch
        );
        assert_eq!(
            ApicPageAccess::decode(0xa000).kind,
            ApicPageAccessKind::Delivery
        );
    }
}
