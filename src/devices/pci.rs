//! PCI configuration mechanism 1 (PCI 3.0, 3.2.2.3.2): an address port and a
//! data window. The bus behind it is empty but for what firmware expects ([`super::i440fx`]),
//! where there is firmware: a read of nobody gives all ones.

use super::Width;
use super::i440fx::I440Fx;

/// What the address port selects: one register of one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigAddress {
    pub bus: u8,
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
    /// Byte offset in the function's 256 bytes of configuration space.
    pub offset: u8,
}

/// The host bridge's configuration ports.
#[derive(Clone, Debug, Default)]
pub struct ConfigPorts {
    address: u32,
    chips: Option<I440Fx>,
}

impl ConfigPorts {
    /// With what firmware expects on the bus.
    pub fn with_chips() -> Self {
        Self {
            chips: Some(I440Fx::default()),
            ..Self::default()
        }
    }

    /// Where the guest wants power management, if that is somewhere else than usual.
    pub fn pm_base(&self) -> Option<u16> {
        self.chips.as_ref()?.pm_base()
    }

    /// The address port, as a double word.
    pub const fn address(&self) -> u32 {
        self.address
    }

    /// Writes the address port, as a double word; bits 30..24 and 1..0 are wired to 0.
    pub const fn set_address(&mut self, value: u32) {
        self.address = value & 0x80ff_fffc;
    }

    /// What an access to byte `lane` (0 to 3) of the data window reaches; `None`
    /// while the address port's enable bit is clear.
    pub const fn target(&self, lane: u8) -> Option<ConfigAddress> {
        if self.address >> 31 == 0 {
            return None;
        }
        let [register, function, bus, _] = self.address.to_le_bytes();
        Some(ConfigAddress {
            bus,
            device: function >> 3,
            function: function & 7,
            offset: register | lane & 3,
        })
    }

    /// Reads the data window from byte `lane` on. An enabled access reaches the
    /// bus, where the lines float high if nobody answers; `None` when it does not
    /// get that far.
    pub fn read_data(&self, lane: u8, width: Width) -> Option<u32> {
        let target = self.target(lane)?;
        Some(match &self.chips {
            Some(chips) => chips.read(target, width),
            None => width.mask() as u32,
        })
    }

    /// Writes the data window; false when the access does not reach the bus.
    pub fn write_data(&mut self, lane: u8, width: Width, value: u32) -> bool {
        let target = self.target(lane);
        if let (Some(target), Some(chips)) = (target, &mut self.chips) {
            chips.write(target, width, value);
        }
        target.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_finds_mechanism_1() {
        let mut ports = ConfigPorts::default();
        ports.set_address(0x8000_0000);
        assert_eq!(ports.address(), 0x8000_0000);
        assert_eq!(ports.read_data(0, Width::Word), Some(0xffff));
        assert_eq!(ports.read_data(0, Width::Dword), Some(0xffff_ffff));
        ports.set_address(0);
        assert_eq!(ports.read_data(0, Width::Dword), None);
    }

    #[test]
    fn the_address_decodes() {
        let mut ports = ConfigPorts::default();
        assert_eq!(ports.target(0), None);
        ports.set_address(0x8003_fd11);
        assert_eq!(
            ports.target(2),
            Some(ConfigAddress {
                bus: 3,
                device: 31,
                function: 5,
                offset: 0x12
            })
        );
    }
}
