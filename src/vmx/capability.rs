//! What this CPU's VT-x can do: the capability MSRs (SDM 3, appendix A), read
//! once, and the one function that derives control words from them.

use super::ept::EptVpidCapabilities;
use x86::msr;

/// The capability MSRs of one CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// Pin-based controls, the true ones where there are.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub primary: Allowed,
    /// Secondary processor-based controls; nothing allowed where there are none.
    pub secondary: Allowed,
    pub exit: Allowed,
    pub entry: Allowed,
    /// IA32_VMX_MISC.
    pub misc: u64,
    pub ept_vpid: EptVpidCapabilities,
    /// Bits of CR0 that must be 1 in VMX operation (A.7).
    pub cr0_fixed0: u64,
    /// Bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    pub cr4_fixed0: u64,
    pub cr4_fixed1: u64,
}

/// A control word's capability MSR: bits that must be 1 in the low half, bits
/// that may be 1 in the high half (A.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed(pub u64);

impl Allowed {
    /// Bits that must be 1.
    #[inline]
    pub const fn must(self) -> u32 {
        self.0 as u32
    }

    /// Bits that may be 1.
    #[inline]
    pub const fn may(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether all of `bits` may be 1.
    #[inline]
    pub const fn offers(self, bits: u32) -> bool {
        self.may() & bits == bits
    }

    /// The control word with `required` and as much of `wanted` as the CPU
    /// offers; the one place where a control word is made.
    ///
    /// # Errors
    /// The bits of `required` that the CPU does not offer.
    pub const fn control(self, required: u32, wanted: u32) -> Result<u32, u32> {
        let missing = required & !self.may();
        if missing != 0 {
            return Err(missing);
        }
        Ok((required | wanted) & self.may() | self.must())
    }
}

impl Capabilities {
    /// Asks the CPU through `rdmsr`, reading only MSRs that exist.
    pub fn read(rdmsr: impl Fn(u32) -> u64) -> Self {
        let basic = rdmsr(msr::IA32_VMX_BASIC);
        // Bit 55: the TRUE MSRs exist, which also tell which default-1 bits may be 0 (A.1).
        let exact = basic >> 55 & 1 == 1;
        let word = |plain, precise| Allowed(rdmsr(if exact { precise } else { plain }));
        let primary = word(
            msr::IA32_VMX_PROCBASED_CTLS,
            msr::IA32_VMX_TRUE_PROCBASED_CTLS,
        );
        let secondary = Allowed(if primary.offers(1 << 31) {
            rdmsr(msr::IA32_VMX_PROCBASED_CTLS2)
        } else {
            0
        });
        // EPT (bit 1) or VPID (bit 5) brings IA32_VMX_EPT_VPID_CAP (A.10).
        let ept_vpid = if secondary.may() & (1 << 1 | 1 << 5) != 0 {
            rdmsr(msr::IA32_VMX_EPT_VPID_CAP)
        } else {
            0
        };
        Self {
            basic,
            pin: word(
                msr::IA32_VMX_PINBASED_CTLS,
                msr::IA32_VMX_TRUE_PINBASED_CTLS,
            ),
            primary,
            secondary,
            exit: word(msr::IA32_VMX_EXIT_CTLS, msr::IA32_VMX_TRUE_EXIT_CTLS),
            entry: word(msr::IA32_VMX_ENTRY_CTLS, msr::IA32_VMX_TRUE_ENTRY_CTLS),
            misc: rdmsr(msr::IA32_VMX_MISC),
            ept_vpid: EptVpidCapabilities(ept_vpid),
            cr0_fixed0: rdmsr(msr::IA32_VMX_CR0_FIXED0),
            cr0_fixed1: rdmsr(msr::IA32_VMX_CR0_FIXED1),
            cr4_fixed0: rdmsr(msr::IA32_VMX_CR4_FIXED0),
            cr4_fixed1: rdmsr(msr::IA32_VMX_CR4_FIXED1),
        }
    }

    /// The revision identifier that VMXON region and VMCS begin with.
    pub const fn revision(&self) -> u32 {
        self.basic as u32 & 0x7fff_ffff
    }

    /// The VMX-preemption timer counts down when this bit of the TSC changes (A.6).
    pub const fn preemption_timer_shift(&self) -> u32 {
        self.misc as u32 & 0x1f
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_control_word_obeys_its_capability(must: u32, extra: u32, required: u32, wanted: u32) {
            let may = must | extra;
            let allowed = Allowed(u64::from(may) << 32 | u64::from(must));
            match allowed.control(required, wanted) {
                Ok(word) => {
                    prop_assert_eq!(word & !may, 0, "a bit that must be 0");
                    prop_assert_eq!(must & !word, 0, "a bit that must be 1");
                    prop_assert_eq!(word & required, required);
                    prop_assert_eq!(word & wanted & may, wanted & may);
                    prop_assert_eq!(word & !(must | required | wanted), 0, "nothing else");
                }
                Err(missing) => {
                    prop_assert_ne!(missing, 0);
                    prop_assert_eq!(missing, required & !may);
                }
            }
        }
    }

    #[test]
    fn a_cpu_without_secondary_controls_is_not_asked_for_them() {
        let capabilities = Capabilities::read(|msr| match msr {
            msr::IA32_VMX_PROCBASED_CTLS2
            | msr::IA32_VMX_EPT_VPID_CAP
            | msr::IA32_VMX_TRUE_PROCBASED_CTLS => panic!("#GP"),
            _ => 0,
        });
        assert_eq!(capabilities.secondary, Allowed(0));
    }
}
