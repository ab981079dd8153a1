//! What firmware for virtual PCs expects on the PCI bus: the host bridge of the 440FX, and the
//! functions of the PIIX that lead to ISA and to power management (Intel 290549, 290550, 290562;
//! device 7113 is that of the PIIX4).
//!
//! They are registers that remember. Memory from 0xc0000 to 1 MiB is RAM whatever the host bridge
//! is told about it; where power management answers is [`I440Fx::pm_base`].

use super::Width;
use super::pci::ConfigAddress;

/// Bytes of a function's configuration space.
const LENGTH: usize = 256;
const INTEL: u16 = 0x8086;
/// By this firmware knows that it has `fw_cfg`: Red Hat's vendor identifier, QEMU's subsystem.
const SUBSYSTEM: [u8; 4] = [0xf4, 0x1a, 0x00, 0x11];

/// Offsets in configuration space (PCI 3.0, 6.1).
mod offset {
    pub const COMMAND: usize = 0x04;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x0a;
    pub const HEADER: usize = 0x0e;
    pub const SUBSYSTEM: usize = 0x2c;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    /// The device's own registers begin.
    pub const OWN: usize = 0x40;
    /// PIIX: where the four PCI interrupts go; bit 7 is nowhere.
    pub const ROUTES: usize = 0x60;
    /// PIIX4: base of the power-management ports; bit 0 is wired to 1.
    pub const PM_BASE: usize = 0x40;
    /// PIIX4: bit 1 is bit 25 of DEVACTB, which enables SMIs by the port 0xb2. It is set as on
    /// machines that have no SMM, so that firmware leaves that alone.
    pub const SMI_ENABLE: usize = 0x5b;
    /// PIIX4: bit 0 enables these ports.
    pub const PM_ENABLE: usize = 0x80;
}

/// A function with writable bytes from [`offset::OWN`] on.
#[derive(Clone, Debug)]
struct Function {
    registers: [u8; LENGTH],
}

impl Function {
    fn new(device: u16, class: [u8; 2], revision: u8) -> Self {
        let mut new = Self {
            registers: [0; LENGTH],
        };
        let [vendor_low, vendor_high] = INTEL.to_le_bytes();
        let [device_low, device_high] = device.to_le_bytes();
        for (at, byte) in (0..).zip([vendor_low, vendor_high, device_low, device_high]) {
            new.set(at, byte);
        }
        new.set(offset::REVISION, revision);
        let [base, sub] = class;
        new.set(offset::CLASS, sub);
        new.set(offset::CLASS + 1, base);
        for (at, byte) in (offset::SUBSYSTEM..).zip(SUBSYSTEM) {
            new.set(at, byte);
        }
        new
    }

    fn get(&self, at: usize) -> u8 {
        self.registers.get(at).copied().unwrap_or(0xff)
    }

    fn set(&mut self, at: usize, value: u8) {
        if let Some(byte) = self.registers.get_mut(at) {
            *byte = value;
        }
    }

    /// Writes a byte, as far as it can be written.
    fn write(&mut self, at: usize, value: u8) {
        match at {
            // I/O, memory and bus mastering.
            offset::COMMAND => self.set(at, value & 0x07),
            offset::INTERRUPT_LINE | offset::OWN.. => self.set(at, value),
            _ => {}
        }
    }
}

/// The functions 00:00.0, 00:01.0 and 00:01.3.
#[derive(Clone, Debug)]
pub struct I440Fx {
    host: Function,
    isa: Function,
    pm: Function,
}

impl Default for I440Fx {
    fn default() -> Self {
        let mut isa = Function::new(0x7000, [0x06, 0x01], 0);
        // There are other functions.
        isa.set(offset::HEADER, 0x80);
        for route in 0..4 {
            isa.set(offset::ROUTES + route, 0x80);
        }
        let mut pm = Function::new(0x7113, [0x06, 0x80], 3);
        pm.set(offset::PM_BASE, 1);
        pm.set(offset::SMI_ENABLE, 2);
        pm.set(offset::INTERRUPT_PIN, 1);
        Self {
            host: Function::new(0x1237, [0x06, 0x00], 2),
            isa,
            pm,
        }
    }
}

impl I440Fx {
    fn function(&self, target: ConfigAddress) -> Option<&Function> {
        match (target.bus, target.device, target.function) {
            (0, 0, 0) => Some(&self.host),
            (0, 1, 0) => Some(&self.isa),
            (0, 1, 3) => Some(&self.pm),
            _ => None,
        }
    }

    /// Reads a register; all ones where there is no such function.
    pub fn read(&self, target: ConfigAddress, width: Width) -> u32 {
        let Some(function) = self.function(target) else {
            return width.mask() as u32;
        };
        let first = usize::from(target.offset);
        let byte = |at: usize| function.get(first + at);
        u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]) & width.mask() as u32
    }

    /// Writes a register.
    pub fn write(&mut self, target: ConfigAddress, width: Width, value: u32) {
        let function = match (target.bus, target.device, target.function) {
            (0, 0, 0) => &mut self.host,
            (0, 1, 0) => &mut self.isa,
            (0, 1, 3) => &mut self.pm,
            _ => return,
        };
        let bytes = value.to_le_bytes();
        let places = usize::from(target.offset)..LENGTH;
        for (at, byte) in places.zip(bytes).take(width.bytes() as usize) {
            function.write(at, byte);
        }
        let low = self.pm.get(offset::PM_BASE);
        self.pm.set(offset::PM_BASE, low & 0xc0 | 1);
    }

    /// Where power management answers, if it does.
    pub fn pm_base(&self) -> Option<u16> {
        let base = u16::from_le_bytes([
            self.pm.get(offset::PM_BASE),
            self.pm.get(offset::PM_BASE + 1),
        ]);
        (self.pm.get(offset::PM_ENABLE) & 1 != 0).then_some(base & !0x3f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn at(device: u8, function: u8, offset: u8) -> ConfigAddress {
        ConfigAddress {
            bus: 0,
            device,
            function,
            offset,
        }
    }

    #[test]
    fn firmware_finds_its_chipset() {
        let chips = I440Fx::default();
        let read =
            |device, function, offset| chips.read(at(device, function, offset), Width::Dword);
        assert_eq!(read(0, 0, 0), 0x1237_8086);
        assert_eq!(read(0, 0, 8), 0x0600_0002);
        assert_eq!(read(0, 0, 0x2c), 0x1100_1af4);
        assert_eq!((read(1, 0, 0), read(1, 0, 8)), (0x7000_8086, 0x0601_0000));
        assert_eq!(read(1, 0, 0xc) >> 16 & 0xff, 0x80);
        assert_eq!((read(1, 3, 0), read(1, 3, 8)), (0x7113_8086, 0x0680_0003));
        assert_eq!((read(1, 1, 0), read(2, 0, 0)), (u32::MAX, u32::MAX));
    }

    #[test]
    fn power_management_goes_where_it_is_told() {
        let mut chips = I440Fx::default();
        assert_eq!(chips.pm_base(), None);
        chips.write(at(1, 3, 0x40), Width::Dword, 0xb03f);
        chips.write(at(1, 3, 0x80), Width::Byte, 1);
        assert_eq!(chips.pm_base(), Some(0xb000));
        assert_eq!(chips.read(at(1, 3, 0x40), Width::Dword), 0xb001);
        chips.write(at(1, 3, 0x80), Width::Byte, 0);
        assert_eq!(chips.pm_base(), None);
    }

    #[test]
    fn shadow_registers_remember_and_identifiers_do_not_change() {
        let mut chips = I440Fx::default();
        chips.write(at(0, 0, 0x59), Width::Byte, 0x30);
        assert_eq!(chips.read(at(0, 0, 0x58), Width::Word), 0x3000);
        chips.write(at(0, 0, 0), Width::Dword, 0);
        chips.write(at(0, 0, 0x10), Width::Dword, u32::MAX);
        assert_eq!(chips.read(at(0, 0, 0), Width::Dword), 0x1237_8086);
        assert_eq!(chips.read(at(0, 0, 0x10), Width::Dword), 0);
    }

    proptest! {
        #[test]
        fn nothing_a_guest_does_goes_wrong(
            steps in prop::collection::vec((0..3u8, 0..8u8, any::<u8>(), 0..3u32, any::<u32>()), 0..100),
        ) {
            let mut chips = I440Fx::default();
            for (device, function, offset, width, value) in steps {
                let width = Width::from_bytes(1 << width).unwrap();
                let target = at(device, function, offset);
                chips.write(target, width, value);
                prop_assert!(u64::from(chips.read(target, width)) <= width.mask());
                prop_assert!(chips.pm_base().is_none_or(|base| base % 64 == 0));
            }
        }
    }
}
