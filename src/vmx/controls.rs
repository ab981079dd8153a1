//! The control words of Vireo's VMCSs: what must be there, what is used where
//! it is offered, and a sentence for what is missing.

use super::capability::Capabilities;
use core::fmt;
use x86::vmx::vmcs::control::{
    EntryControls as Entry, ExitControls as Exit, PinbasedControls as Pin,
    PrimaryControls as Primary, SecondaryControls as Secondary,
};

/// The five control words, as written to a VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    pub pin: u32,
    pub primary: u32,
    pub secondary: u32,
    pub exit: u32,
    /// Without "IA-32e mode guest", which follows the guest's EFER.LMA.
    pub entry: u32,
}

/// A feature that Vireo cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Name in the SDM.
    pub feature: &'static str,
    /// The capability MSR that says so, and its bit.
    pub msr: &'static str,
    pub bit: u32,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "this CPU's VT-x lacks \"{}\" ({} bit {}); use a CPU that has it (Intel Westmere or later)",
            self.feature, self.msr, self.bit
        )
    }
}

impl core::error::Error for Missing {}

impl Controls {
    /// The control words for a CPU with these capabilities.
    ///
    /// # Errors
    /// The first required feature that is missing.
    pub fn new(capabilities: &Capabilities) -> Result<Self, Missing> {
        let word = |allowed: super::capability::Allowed,
                    required,
                    wanted,
                    msr,
                    names: &[(u32, &'static str)]| {
            allowed.control(required, wanted).map_err(|missing| {
                let bit = missing.trailing_zeros();
                let feature = names
                    .iter()
                    .find(|(mask, _)| missing & mask != 0)
                    .map_or("a required control", |(_, name)| *name);
                Missing {
                    feature,
                    msr,
                    bit: 32 + bit,
                }
            })
        };

        // A host interrupt leaves the guest; NMIs are the host's, and the guest's own are
        // tracked by the CPU where it can.
        let pin = word(
            capabilities.pin,
            (Pin::EXTERNAL_INTERRUPT_EXITING | Pin::NMI_EXITING).bits(),
            (Pin::VIRTUAL_NMIS | Pin::VMX_PREEMPTION_TIMER).bits(),
            "IA32_VMX_PINBASED_CTLS",
            &[
                (
                    Pin::EXTERNAL_INTERRUPT_EXITING.bits(),
                    "external-interrupt exiting",
                ),
                (Pin::NMI_EXITING.bits(), "NMI exiting"),
            ],
        )?;
        // CR3 loads and stores, INVLPG, RDTSC and MOV DR are the guest's own; their default-1
        // bits become 0 where the TRUE MSR allows it. CR8 exits until the TPR is shadowed
        // (`ApicTier::controls`).
        let primary = word(
            capabilities.primary,
            (Primary::HLT_EXITING
                | Primary::USE_TSC_OFFSETTING
                | Primary::CR8_LOAD_EXITING
                | Primary::CR8_STORE_EXITING
                | Primary::RDPMC_EXITING
                | Primary::MWAIT_EXITING
                | Primary::MONITOR_EXITING
                | Primary::USE_IO_BITMAPS
                | Primary::USE_MSR_BITMAPS
                | Primary::SECONDARY_CONTROLS)
                .bits(),
            0,
            "IA32_VMX_PROCBASED_CTLS",
            &[
                (
                    Primary::SECONDARY_CONTROLS.bits(),
                    "activate secondary controls",
                ),
                (Primary::USE_MSR_BITMAPS.bits(), "use MSR bitmaps"),
                (Primary::USE_IO_BITMAPS.bits(), "use I/O bitmaps"),
                (Primary::USE_TSC_OFFSETTING.bits(), "use TSC offsetting"),
            ],
        )?;
        // A VPID keeps translations across exits: without INVVPID nothing would drop them.
        let vpid = if capabilities.ept_vpid.drops_vpids() {
            Secondary::ENABLE_VPID
        } else {
            Secondary::empty()
        };
        let secondary = word(
            capabilities.secondary,
            (Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST).bits(),
            // Each of these lets an instruction run without an exit; without WBINVD exiting a
            // guest could stall the machine by emptying its caches in a loop.
            (Secondary::ENABLE_RDTSCP
                | vpid
                | Secondary::WBINVD_EXITING
                | Secondary::ENABLE_INVPCID
                | Secondary::ENABLE_XSAVES_XRSTORS)
                .bits(),
            "IA32_VMX_PROCBASED_CTLS2",
            &[
                (Secondary::ENABLE_EPT.bits(), "enable EPT"),
                (Secondary::UNRESTRICTED_GUEST.bits(), "unrestricted guest"),
            ],
        )?;
        // Saving the timer spares setting it at each exit; without the timer it must be 0
        // (SDM 3, 27.2.1.2).
        let timer = if pin & Pin::VMX_PREEMPTION_TIMER.bits() != 0 {
            Exit::SAVE_VMX_PREEMPTION_TIMER
        } else {
            Exit::empty()
        };
        let exit = word(
            capabilities.exit,
            (Exit::HOST_ADDRESS_SPACE_SIZE
                | Exit::ACK_INTERRUPT_ON_EXIT
                | Exit::SAVE_IA32_PAT
                | Exit::LOAD_IA32_PAT
                | Exit::SAVE_IA32_EFER
                | Exit::LOAD_IA32_EFER)
                .bits(),
            (Exit::SAVE_DEBUG_CONTROLS | timer).bits(),
            "IA32_VMX_EXIT_CTLS",
            &[
                (
                    Exit::SAVE_IA32_EFER.bits() | Exit::LOAD_IA32_EFER.bits(),
                    "save and load IA32_EFER",
                ),
                (
                    Exit::SAVE_IA32_PAT.bits() | Exit::LOAD_IA32_PAT.bits(),
                    "save and load IA32_PAT",
                ),
                (
                    Exit::ACK_INTERRUPT_ON_EXIT.bits(),
                    "acknowledge interrupt on exit",
                ),
            ],
        )?;
        let entry = word(
            capabilities.entry,
            (Entry::LOAD_IA32_PAT | Entry::LOAD_IA32_EFER).bits(),
            Entry::LOAD_DEBUG_CONTROLS.bits(),
            "IA32_VMX_ENTRY_CTLS",
            &[
                (Entry::LOAD_IA32_EFER.bits(), "load IA32_EFER"),
                (Entry::LOAD_IA32_PAT.bits(), "load IA32_PAT"),
            ],
        )?;
        if !capabilities.ept_vpid.four_levels() {
            return Err(Missing {
                feature: "EPT page-walk length 4",
                msr: "IA32_VMX_EPT_VPID_CAP",
                bit: 6,
            });
        }
        Ok(Self {
            pin,
            primary,
            secondary,
            exit,
            entry,
        })
    }

    /// The same for a guest that shares its CPU: it exits when it spins for long, where the CPU
    /// can tell.
    pub fn with_pause_loop_exiting(mut self, capabilities: &Capabilities) -> Self {
        let wanted = Secondary::PAUSE_LOOP_EXITING.bits();
        self.secondary |= wanted & capabilities.secondary.may();
        self
    }

    /// Whether a secondary control is on.
    pub const fn has(&self, control: Secondary) -> bool {
        self.secondary & control.bits() != 0
    }

    /// Whether the CPU processes posted interrupts.
    #[inline]
    pub const fn posts_interrupts(&self) -> bool {
        self.pin & Pin::POSTED_INTERRUPTS.bits() != 0
    }

    /// Whether the VMX-preemption timer is on.
    pub const fn has_preemption_timer(&self) -> bool {
        self.pin & Pin::VMX_PREEMPTION_TIMER.bits() != 0
    }

    /// Whether it goes on from where an exit has stopped it.
    pub const fn saves_preemption_timer(&self) -> bool {
        self.exit & Exit::SAVE_VMX_PREEMPTION_TIMER.bits() != 0
    }

    /// Whether the CPU tracks the guest's blocking by NMI.
    pub const fn has_virtual_nmis(&self) -> bool {
        self.pin & Pin::VIRTUAL_NMIS.bits() != 0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::vmx::capability::Allowed;
    use crate::vmx::ept::EptVpidCapabilities;

    /// The emulated PC's, as measured.
    pub fn emulator() -> Capabilities {
        Capabilities {
            basic: 0x00d8_1000_0000_0004,
            pin: Allowed(0x0000_007f_0000_0016),
            primary: Allowed(0xfff9_fffe_0400_6172),
            secondary: Allowed(0x0297_7fff_0000_0000),
            exit: Allowed(0x007f_ffff_0003_6dfb),
            entry: Allowed(0x0000_ffff_0000_11ff),
            misc: 0x6004_01e0,
            ept_vpid: EptVpidCapabilities(0x0f01_0633_4141),
            cr0_fixed0: 0x8000_0021,
            cr0_fixed1: 0xffff_ffff,
            cr4_fixed0: 0x2000,
            cr4_fixed1: 0x77_2fff,
        }
    }

    #[test]
    fn the_emulated_pc_offers_everything() {
        let controls = Controls::new(&emulator()).unwrap();
        assert!(controls.has(Secondary::ENABLE_VPID));
        assert!(controls.has_preemption_timer());
        assert_eq!(
            controls.primary & (Primary::CR3_LOAD_EXITING | Primary::CR3_STORE_EXITING).bits(),
            0
        );
    }

    #[test]
    fn no_vpid_without_invvpid() {
        let mut capabilities = emulator();
        capabilities.ept_vpid.0 &= !(1 << 32);
        let controls = Controls::new(&capabilities).unwrap();
        assert!(!controls.has(Secondary::ENABLE_VPID));
        assert!(controls.has(Secondary::ENABLE_EPT));
    }

    #[test]
    fn a_missing_feature_is_named_with_its_msr() {
        let mut capabilities = emulator();
        capabilities.secondary = Allowed(0x77 << 32);
        let missing = Controls::new(&capabilities).unwrap_err();
        assert_eq!(missing.feature, "unrestricted guest");
        assert_eq!(missing.msr, "IA32_VMX_PROCBASED_CTLS2");
        assert_eq!(missing.bit, 39);
        capabilities.secondary = Allowed(0);
        assert_eq!(
            Controls::new(&capabilities).unwrap_err().feature,
            "enable EPT"
        );
    }
}
