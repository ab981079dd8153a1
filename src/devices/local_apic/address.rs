//! Who a message is for: what a sender has to know of each local APIC.
//!
//! That is little enough to be one word, which others may read while the APIC's own CPU
//! goes on.

use super::{LocalApic, Mode, register, registers};
use crate::devices::Destination;

/// By what a local APIC recognizes messages (SDM 3, 12.6.2 and 12.12.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    mode: Mode,
    /// Enabled by software: it takes interrupts.
    enabled: bool,
    /// The model of its logical address: bits 31 to 28 of the DFR.
    model: u8,
    /// The logical address that software has given it in xAPIC mode.
    logical: u8,
    /// The identifier in xAPIC mode.
    xapic_id: u8,
    /// The x2APIC identifier.
    id: u32,
}

impl Address {
    /// Whether a message from another APIC for `destination` is for this one; from itself
    /// where `from_self`.
    #[inline]
    pub fn is_named_by(self, destination: Destination, from_self: bool) -> bool {
        if self.mode == Mode::Disabled {
            return false;
        }
        match destination {
            Destination::Itself => from_self,
            Destination::All => true,
            Destination::Others => !from_self,
            Destination::Physical(id) if self.mode == Mode::X2Apic => id == self.id,
            Destination::Physical(id) => id == u32::from(self.xapic_id),
            Destination::Logical(address) => self.is_logical_destination(address),
        }
    }

    /// Whether it takes interrupts that have a vector.
    #[inline]
    pub const fn is_enabled(self) -> bool {
        self.enabled
    }

    fn is_logical_destination(self, address: u32) -> bool {
        if self.mode == Mode::X2Apic {
            let own = x2apic_logical(self.id);
            return address == u32::MAX
                || address >> 16 == own >> 16 && address & own & 0xffff != 0;
        }
        // An address of an x2APIC cluster is not for an xAPIC.
        let Ok(address) = u8::try_from(address) else {
            return false;
        };
        let own = self.logical;
        let is_in = match u32::from(self.model) {
            registers::DFR_FLAT => address & own != 0,
            registers::DFR_CLUSTER => address >> 4 == own >> 4 && address & own & 0xf != 0,
            _ => return false,
        };
        // All ones are for everybody, with a logical identifier or without.
        is_in || address == 0xff
    }

    /// All of it but the x2APIC identifier, which never changes, in one word.
    pub const fn to_word(self) -> u32 {
        let mode = match self.mode {
            Mode::Disabled => 0,
            Mode::XApic => 1,
            Mode::X2Apic => 2,
        };
        mode | (self.enabled as u32) << 2
            | (self.model as u32 & 0xf) << 4
            | (self.logical as u32) << 8
            | (self.xapic_id as u32) << 16
    }

    /// From that word, of the APIC with the identifier `id`.
    #[inline]
    pub const fn from_word(word: u32, id: u32) -> Self {
        Self {
            mode: match word & 3 {
                0 => Mode::Disabled,
                1 => Mode::XApic,
                _ => Mode::X2Apic,
            },
            enabled: word & 1 << 2 != 0,
            model: (word >> 4) as u8 & 0xf,
            logical: (word >> 8) as u8,
            xapic_id: (word >> 16) as u8,
            id,
        }
    }
}

/// The logical identifier in x2APIC mode (SDM 3, 12.12.10.2): the cluster is the identifier
/// without its low four bits, which number the APICs in it.
pub(super) const fn x2apic_logical(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

impl LocalApic {
    /// By what messages name it now.
    pub fn own_address(&self) -> Address {
        Address {
            mode: self.mode(),
            enabled: self.is_enabled(),
            model: (self.page().get(register::DFR) >> 28) as u8,
            logical: (self.page().get(register::LDR) >> 24) as u8,
            xapic_id: (self.page().get(register::ID) >> 24) as u8,
            id: self.id(),
        }
    }

    /// Whether a message for `destination` is for this APIC.
    pub fn is_destination(&self, destination: Destination, sender_is_self: bool) -> bool {
        self.own_address().is_named_by(destination, sender_is_self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_address() -> impl Strategy<Value = Address> {
        let mode = prop_oneof![Just(Mode::Disabled), Just(Mode::XApic), Just(Mode::X2Apic)];
        (
            mode,
            any::<bool>(),
            0u8..16,
            any::<u8>(),
            any::<u8>(),
            0u32..300,
        )
            .prop_map(|(mode, enabled, model, logical, xapic_id, id)| Address {
                mode,
                enabled,
                model,
                logical,
                xapic_id,
                id,
            })
    }

    proptest! {
        #[test]
        fn a_word_keeps_all(address in any_address()) {
            prop_assert_eq!(Address::from_word(address.to_word(), address.id), address);
        }

        #[test]
        fn an_x2apic_is_named_by_its_own_logical_address_alone(id in 0u32..1 << 20, other in 0u32..1 << 20) {
            let address = Address { mode: Mode::X2Apic, enabled: true, model: 0, logical: 0, xapic_id: 0, id };
            let named = |id| address.is_named_by(Destination::Logical(x2apic_logical(id)), false);
            prop_assert!(named(id));
            prop_assert_eq!(named(other), id == other);
        }
    }
}
