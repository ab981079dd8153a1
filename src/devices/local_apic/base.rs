//! IA32_APIC_BASE: where the registers are, the mode, and the ways from one
//! mode to another (SDM 3, 12.4.4 and 12.12.5).

use super::{Fault, LocalApic, Mode};
use crate::devices::Ticks;
use crate::devices::pc::LOCAL_APIC_BASE;

const BOOTSTRAP: u64 = 1 << 8;
const X2APIC: u64 = 1 << 10;
const ENABLED: u64 = 1 << 11;

/// Address and bootstrap flag at power-on.
pub const fn at_power_on(bootstrap: bool) -> u64 {
    LOCAL_APIC_BASE | if bootstrap { BOOTSTRAP } else { 0 }
}

impl LocalApic {
    /// IA32_APIC_BASE.
    #[inline]
    pub const fn base_msr(&self) -> u64 {
        self.base
            | match self.mode {
                Mode::Disabled => 0,
                Mode::XApic => ENABLED,
                Mode::X2Apic => ENABLED | X2APIC,
            }
    }

    /// Whether this is the bootstrap processor's.
    #[inline]
    pub const fn is_bootstrap(&self) -> bool {
        self.base & BOOTSTRAP != 0
    }

    /// Guest physical address of the registers in xAPIC mode, a multiple of 4096.
    #[inline]
    pub const fn address(&self) -> u64 {
        self.base & !0xfff
    }

    /// Writes IA32_APIC_BASE. The caller compares [`LocalApic::mode`] and
    /// [`LocalApic::address`] with what they were: the guest may have moved the registers.
    ///
    /// Disabling resets the APIC; x2APIC mode is entered from xAPIC mode only and
    /// left for the disabled state only.
    ///
    /// # Errors
    /// A reserved bit, an address beyond the guest's physical addresses, or a
    /// transition that does not exist.
    pub fn set_base_msr(&mut self, now: Ticks, value: u64) -> Result<(), Fault> {
        let address_bits = u32::from(self.config.physical_address_bits).clamp(12, 52);
        let address = ((1 << address_bits) - 1) & !0xfff;
        if value & !(address | BOOTSTRAP | X2APIC | ENABLED) != 0 {
            return Err(Fault);
        }
        let mode = match (value & ENABLED != 0, value & X2APIC != 0) {
            (_, true) if !self.config.x2apic => return Err(Fault),
            (false, false) => Mode::Disabled,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
            (false, true) => return Err(Fault),
        };
        match (self.mode, mode) {
            (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => return Err(Fault),
            _ => {}
        }
        self.advance(now);
        self.base = value & (address | BOOTSTRAP);
        if mode != self.mode {
            self.mode = mode;
            match mode {
                Mode::X2Apic => self.enter_x2apic(),
                // Nothing survives being disabled (SDM 3, 12.4.3).
                Mode::Disabled | Mode::XApic => self.reset(),
            }
        }
        Ok(())
    }
}
