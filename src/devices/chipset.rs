//! The PC's wiring: which device answers at which port, and where its
//! interrupt goes.
//!
//! Port accesses are on the light path of a VM exit: devices are concrete
//! types, found by one `match`; after an access only the touched device's line
//! is looked at.
//!
//! Interrupt request line n goes to input n of the 8259s and to pin n of the
//! I/O APIC, except that the 8254 is on pin 2. INTR, the 8259s' output, goes to
//! the boot processor's LINT0 (whoever holds the chipset looks at
//! [`Chipset::intr`]) and to pin 0.

mod interrupts;

pub use super::Request;
use super::fw_cfg::{self, FwCfg, Progress};
use super::i8042::I8042;
use super::pci::ConfigPorts;
use super::pit::Pit;
use super::pm::PowerManagement;
use super::rtc::{MemorySize, Rtc};
use super::system::SystemPorts;
use super::test::TestDevice;
use super::uart::{Output, Uart};
use super::vga::{TextMode, Vga};
use super::{Clock, Message, Ticks, Width, ioapic, pc};
use crate::addr::Gpa;
use interrupts::Interrupts;

const PIC_MASTER_DATA: u16 = pc::PIC_MASTER + 1;
const PIC_SLAVE_DATA: u16 = pc::PIC_SLAVE + 1;
const ELCR_SLAVE: u16 = pc::ELCR + 1;
const PIT_LAST: u16 = pc::PIT + 3;
const RTC_DATA: u16 = pc::RTC + 1;
const COM1_LAST: u16 = pc::COM1 + 7;
const SMI_STATUS: u16 = pc::SMI_COMMAND + 1;
const PM_LAST: u16 = pc::PM_BASE + pc::PM_LENGTH - 1;
const PCI_DATA_LAST: u16 = pc::PCI_DATA + 3;
const FW_CFG_DMA_LOW: u16 = pc::FW_CFG_DMA + 4;
const FW_CFG_DMA_LAST: u16 = pc::FW_CFG_DMA + 7;
const DEBUG_EXIT_LAST: u16 = pc::DEBUG_EXIT + 3;
const TEST_ECHO_LAST: u16 = pc::TEST_ECHO + 3;
const TEST_LINES_LAST: u16 = pc::TEST_LINES + ioapic::PINS as u16 - 1;

/// What a BIOS writes to interrupt controllers and timer: vectors 0x08 and 0x70, the timer
/// alone unmasked, 18.2 times a second.
const BIOS_WRITES: [(u16, u8); 13] = [
    (pc::PIC_MASTER, 0x11),
    (PIC_MASTER_DATA, 0x08),
    (PIC_MASTER_DATA, 0x04),
    (PIC_MASTER_DATA, 0x01),
    (PIC_MASTER_DATA, 0xfa),
    (pc::PIC_SLAVE, 0x11),
    (PIC_SLAVE_DATA, 0x70),
    (PIC_SLAVE_DATA, 0x02),
    (PIC_SLAVE_DATA, 0x01),
    (PIC_SLAVE_DATA, 0xff),
    (PIT_LAST, 0x34),
    (pc::PIT, 0),
    (pc::PIT, 0),
];

/// What differs from PC to PC.
#[derive(Clone, Debug, Default)]
pub struct ChipsetConfig {
    /// What the real-time clock shows at first: seconds since 1970, UTC.
    pub wall_clock: u64,
    /// Bytes of RAM below 4 GiB, for the CMOS memory.
    pub ram_below_4g: u64,
    /// Bytes of RAM from 4 GiB up, for the CMOS memory.
    pub ram_above_4g: u64,
    /// The I/O APIC's identifier at reset.
    pub io_apic_id: u8,
    /// It has the device of [`super::test`].
    pub test_device: bool,
    /// It has firmware, which expects a chipset on the PCI bus ([`super::i440fx`]).
    pub firmware: bool,
    /// Interrupt controllers and timer are as a BIOS leaves them.
    pub as_by_bios: bool,
    /// What it can ask for.
    pub fw_cfg: FwCfg,
}

/// What the result of an access to one byte-wide port is.
enum Write {
    Done,
    Asks(Request),
    Unclaimed,
}

/// The devices of one PC.
#[derive(Clone, Debug)]
pub struct Chipset {
    interrupts: Interrupts,
    pit: Pit,
    rtc: Rtc,
    com1: Uart,
    pm: PowerManagement,
    i8042: I8042,
    system: SystemPorts,
    pci: ConfigPorts,
    fw_cfg: FwCfg,
    vga: Vga,
    test: Option<TestDevice>,
    /// The earliest of its devices.
    deadline: Ticks,
    unclaimed: u64,
}

impl Chipset {
    /// The PC at power-on. It has no firmware, so what every firmware does and
    /// kernels count on is done: the SCI's input is level triggered.
    pub fn new(clock: Clock, now: Ticks, config: &ChipsetConfig) -> Self {
        let ram = MemorySize {
            below_4g: config.ram_below_4g,
            above_4g: config.ram_above_4g,
        };
        let mut interrupts = Interrupts::new(config.io_apic_id);
        interrupts.write_pic(ELCR_SLAVE, 1 << (pc::SCI_IRQ - 8));
        let mut new = Self {
            interrupts,
            pit: Pit::new(clock, now),
            rtc: Rtc::new(clock, now, config.wall_clock, ram),
            com1: Uart::new(clock),
            pm: PowerManagement::new(clock, now),
            i8042: I8042::default(),
            system: SystemPorts::default(),
            pci: if config.firmware {
                ConfigPorts::with_chips()
            } else {
                ConfigPorts::default()
            },
            fw_cfg: config.fw_cfg.clone(),
            vga: Vga::default(),
            test: config.test_device.then(TestDevice::default),
            deadline: Ticks(u64::MAX),
            unclaimed: 0,
        };
        if config.as_by_bios {
            for (port, value) in BIOS_WRITES {
                new.write_byte(now, port, value);
            }
        }
        new
    }

    /// Reads `width` (up to 4) bytes from `port`. Where nobody answers the
    /// value is all ones, and that is counted.
    #[inline(always)]
    pub fn port_read(&mut self, now: Ticks, port: u16, width: Width) -> u32 {
        let value = match width {
            Width::Byte => self.read_byte(now, port).map(u32::from),
            _ => self.read_wide(now, port, width),
        };
        value.unwrap_or_else(|| {
            self.count_unclaimed();
            width.mask() as u32
        })
    }

    /// Writes the low `width` (up to 4) bytes of `value` to `port`. Where nobody
    /// takes it, it vanishes, and that is counted.
    #[inline(always)]
    pub fn port_write(
        &mut self,
        now: Ticks,
        port: u16,
        width: Width,
        value: u32,
    ) -> Option<Request> {
        let outcome = match width {
            Width::Byte => self.write_byte(now, port, value as u8),
            _ => self.write_wide(now, port, width, value),
        };
        match outcome {
            Write::Done => None,
            Write::Asks(request) => Some(request),
            Write::Unclaimed => {
                self.count_unclaimed();
                None
            }
        }
    }

    /// [`Chipset::port_read`] of a byte of the 8259s ([`pc::is_pic`]): of all devices those that
    /// an interrupt's handler touches, and they need no time.
    #[inline(always)]
    pub fn pic_read(&mut self, port: u16) -> u8 {
        self.interrupts.read_pic(port).unwrap_or(0xff)
    }

    /// [`Chipset::port_write`], likewise.
    #[inline(always)]
    pub fn pic_write(&mut self, port: u16, value: u8) {
        self.interrupts.write_pic(port, value);
    }

    #[cold]
    fn count_unclaimed(&mut self) {
        self.unclaimed = self.unclaimed.saturating_add(1);
    }

    #[inline(never)]
    fn read_wide(&mut self, now: Ticks, port: u16, width: Width) -> Option<u32> {
        match (port, width) {
            (pc::PM_TIMER, Width::Dword) => Some(self.pm.timer(now)),
            (pc::PM_BASE..=PM_LAST, _) => Some(self.read_pm(now, port, width)),
            (pc::PCI_ADDRESS, Width::Dword) => Some(self.pci.address()),
            (pc::PCI_DATA..=PCI_DATA_LAST, _) => {
                self.pci.read_data((port - pc::PCI_DATA) as u8, width)
            }
            _ => match self.moved(port) {
                Some(port) => self.read_wide(now, port, width),
                None => self.read_bytes(now, port, width),
            },
        }
    }

    #[inline(never)]
    fn write_wide(&mut self, now: Ticks, port: u16, width: Width, value: u32) -> Write {
        match (port, width) {
            (pc::PM_BASE..=PM_LAST, _) => self.write_pm(now, port, width, value),
            (pc::PCI_ADDRESS, Width::Dword) => {
                self.pci.set_address(value);
                Write::Done
            }
            (pc::PCI_DATA..=PCI_DATA_LAST, _) => claimed(self.pci.write_data(
                (port - pc::PCI_DATA) as u8,
                width,
                value,
            )),
            (pc::FW_CFG_SELECTOR, Width::Word) => {
                self.fw_cfg.select(value as u16);
                Write::Done
            }
            (pc::FW_CFG_DMA, Width::Dword) => {
                self.fw_cfg.set_request_high(value);
                Write::Done
            }
            (FW_CFG_DMA_LOW, Width::Dword) => {
                Write::Asks(Request::Transfer(self.fw_cfg.request(value)))
            }
            (pc::DEBUG_EXIT..=DEBUG_EXIT_LAST, _) => Write::Asks(Request::Exit(value)),
            (pc::TEST_UNMAP, Width::Dword) if self.test.is_some() => {
                Write::Asks(Request::Unmap(Gpa(value.into())))
            }
            _ => match self.moved(port) {
                Some(port) => self.write_wide(now, port, width, value),
                None => self.write_bytes(now, port, width, value),
            },
        }
    }

    /// Reads the I/O APIC's page.
    #[inline]
    pub fn io_apic_read(&self, offset: u64, width: Width) -> u64 {
        self.interrupts.read_io_apic(offset, width)
    }

    /// Writes the I/O APIC's page.
    #[inline]
    pub fn io_apic_write(&mut self, offset: u64, width: Width, value: u64) {
        self.interrupts.write_io_apic(offset, width, value);
    }

    /// Does a piece of what [`Request::Transfer`] asks for.
    pub fn transfer(&mut self, request: Gpa, memory: &impl fw_cfg::Memory) -> Progress {
        self.fw_cfg.transfer(request, memory)
    }

    /// Reads memory of the guest's bus that a device here has.
    pub fn memory_read(&self, gpa: Gpa, width: Width) -> u64 {
        let test = self.test.as_ref().zip(test_memory(gpa));
        test.map_or(width.mask(), |(test, offset)| test.read(offset, width))
    }

    /// Writes it.
    pub fn memory_write(&mut self, gpa: Gpa, width: Width, value: u64) {
        if let Some((test, offset)) = self.test.as_mut().zip(test_memory(gpa)) {
            test.write(offset, width, value);
        }
    }

    /// Brings every timed device up to `now` and its line to the interrupt controllers.
    pub fn advance(&mut self, now: Ticks) {
        self.pit.advance(now);
        self.rtc.advance(now);
        self.com1.advance(now);
        self.pm.advance(now);
        self.wire_pit();
        self.wire_rtc();
        self.wire_com1();
        self.wire_pm();
    }

    /// When [`Chipset::advance`] has to be called at the latest.
    pub const fn deadline(&self) -> Option<Ticks> {
        if self.deadline.0 == u64::MAX {
            None
        } else {
            Some(self.deadline)
        }
    }

    /// When somebody has to look after the chipset: at tick 0 while it has a message,
    /// at its deadline, or, where it waits for nothing, at the end of time.
    #[inline]
    pub const fn due(&self) -> Ticks {
        if self.has_message() {
            Ticks(0)
        } else {
            self.deadline
        }
    }

    /// The next message of the I/O APIC to the local APICs.
    #[inline]
    pub fn take_message(&mut self) -> Option<Message> {
        self.interrupts.take_message()
    }

    /// Whether there is one.
    #[inline]
    pub const fn has_message(&self) -> bool {
        self.interrupts.has_message()
    }

    /// Whether the I/O APIC may send what interrupts a CPU that has interrupts off.
    pub fn sends_unmaskable(&self) -> bool {
        self.interrupts.sends_unmaskable()
    }

    /// INTR: the 8259s have an interrupt.
    #[inline]
    pub const fn intr(&self) -> bool {
        self.interrupts.intr()
    }

    /// The INTA cycle, which gives the 8259s' vector.
    pub fn acknowledge_pic(&mut self) -> u8 {
        self.interrupts.acknowledge_pic()
    }

    /// A local APIC broadcasts the end of a level-triggered interrupt.
    pub fn eoi(&mut self, vector: u8) {
        self.interrupts.eoi(vector);
    }

    /// Offers a byte to COM1's receiver; false when it has to be offered again later.
    pub fn serial_input(&mut self, now: Ticks, byte: u8) -> bool {
        let accepted = self.com1.receive(now, byte);
        self.wire_com1();
        accepted
    }

    /// Offers what the guest has sent to COM1 to `sink`, which takes as much of it as it likes.
    pub fn serial_output<R>(&mut self, sink: impl FnOnce(Output<'_>) -> R) -> R {
        let result = sink(self.com1.output());
        self.wire_com1();
        result
    }

    /// Whether COM1 waits for its output to be fetched.
    pub const fn serial_output_waits(&self) -> bool {
        self.com1.output_waits()
    }

    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.pm.press_power_button();
        self.wire_pm();
    }

    /// Whether the machine is to end its suspend; firmware is told that it does.
    pub fn take_wake(&mut self) -> bool {
        let wakes = self.pm.wakes(self.rtc.line().level());
        if wakes {
            self.rtc.show_resume();
            self.wire_pm();
        }
        wakes
    }

    /// How its screen shows text; `None` while it shows graphics.
    pub fn text_mode(&self) -> Option<TextMode> {
        self.vga.text_mode()
    }

    /// Whether the guest masks the NMI (bit 7 of port 0x70).
    pub const fn nmi_masked(&self) -> bool {
        self.rtc.nmi_masked()
    }

    /// How many accesses went to ports where nobody is.
    pub const fn unclaimed(&self) -> u64 {
        self.unclaimed
    }

    /// Reads a byte-wide port; `None` where nobody is.
    #[inline(always)]
    fn read_byte(&mut self, now: Ticks, port: u16) -> Option<u8> {
        match port {
            pc::PIC_MASTER
            | PIC_MASTER_DATA
            | pc::PIC_SLAVE
            | PIC_SLAVE_DATA
            | pc::ELCR
            | ELCR_SLAVE => self.interrupts.read_pic(port),
            _ => self.read_device(now, port),
        }
    }

    #[inline(never)]
    fn read_device(&mut self, now: Ticks, port: u16) -> Option<u8> {
        Some(match port {
            pc::COM1..=COM1_LAST => {
                let value = self.com1.read(now, (port - pc::COM1) as u8);
                self.wire_com1();
                value
            }
            pc::PCI_DATA..=PCI_DATA_LAST => {
                let offset = (port - pc::PCI_DATA) as u8;
                return self
                    .pci
                    .read_data(offset, Width::Byte)
                    .map(|value| value as u8);
            }
            pc::PIT..=PIT_LAST => {
                let value = self.pit.read(now, (port - pc::PIT) as u8);
                self.wire_pit();
                value
            }
            pc::SYSTEM_CONTROL => {
                let output = self.pit.output2(now);
                self.wire_pit();
                self.system.control(self.pit.refresh_toggle(now), output)
            }
            // The index port cannot be read.
            pc::RTC => 0xff,
            RTC_DATA => {
                let value = self.rtc.read(now);
                self.wire_rtc();
                value
            }
            pc::KEYBOARD_DATA => {
                let value = self.i8042.read_data();
                self.wire_keyboard();
                value
            }
            pc::KEYBOARD_COMMAND => self.i8042.status(),
            pc::POST_CODE => self.system.post_code(),
            pc::FAST_A20 => self.system.fast_a20(),
            pc::RESET_CONTROL => self.system.reset_control(),
            pc::SMI_COMMAND => 0,
            SMI_STATUS => self.pm.smi_status(),
            pc::PM_BASE..=PM_LAST => self.read_pm(now, port, Width::Byte) as u8,
            // By this a guest tells that it is there.
            pc::DEBUG_CONSOLE => pc::DEBUG_CONSOLE as u8,
            pc::FW_CFG_DATA => self.fw_cfg.read(),
            pc::FW_CFG_DMA..=FW_CFG_DMA_LAST => FwCfg::signature(port - pc::FW_CFG_DMA),
            pc::TEST_ECHO..=TEST_ECHO_LAST => *self.test.as_mut()?.echo(port - pc::TEST_ECHO),
            _ => {
                return match self.moved(port) {
                    Some(port) => self.read_device(now, port),
                    None => self.vga.read(port),
                };
            }
        })
    }

    /// Writes a byte-wide port.
    #[inline(always)]
    fn write_byte(&mut self, now: Ticks, port: u16, value: u8) -> Write {
        match port {
            pc::PIC_MASTER
            | PIC_MASTER_DATA
            | pc::PIC_SLAVE
            | PIC_SLAVE_DATA
            | pc::ELCR
            | ELCR_SLAVE => claimed(self.interrupts.write_pic(port, value)),
            _ => self.write_device(now, port, value),
        }
    }

    #[inline(never)]
    fn write_device(&mut self, now: Ticks, port: u16, value: u8) -> Write {
        let request = match port {
            pc::COM1..=COM1_LAST => {
                self.com1.write(now, (port - pc::COM1) as u8, value);
                self.wire_com1();
                None
            }
            pc::PCI_DATA..=PCI_DATA_LAST => {
                let lane = (port - pc::PCI_DATA) as u8;
                return claimed(self.pci.write_data(lane, Width::Byte, value.into()));
            }
            pc::PIT..=PIT_LAST => {
                self.pit.write(now, (port - pc::PIT) as u8, value);
                self.wire_pit();
                None
            }
            pc::SYSTEM_CONTROL => {
                let gate = self.system.set_control(value);
                self.pit.set_gate2(now, gate);
                self.wire_pit();
                None
            }
            pc::RTC => {
                self.rtc.select(value);
                None
            }
            RTC_DATA => {
                self.rtc.write(now, value);
                self.wire_rtc();
                None
            }
            pc::KEYBOARD_DATA => {
                let request = self.i8042.write_data(value);
                self.wire_keyboard();
                request
            }
            pc::KEYBOARD_COMMAND => {
                let request = self.i8042.command(value);
                self.wire_keyboard();
                request
            }
            pc::POST_CODE => {
                self.system.set_post_code(value);
                None
            }
            pc::FAST_A20 => self.system.set_fast_a20(value),
            pc::RESET_CONTROL => self.system.set_reset_control(value),
            pc::SMI_COMMAND => {
                self.pm.smi_command(now, value);
                self.wire_pm();
                None
            }
            SMI_STATUS => {
                self.pm.set_smi_status(value);
                None
            }
            pc::PM_BASE..=PM_LAST => {
                return self.write_pm(now, port, Width::Byte, u32::from(value));
            }
            pc::DEBUG_EXIT..=DEBUG_EXIT_LAST => Some(Request::Exit(value.into())),
            pc::DEBUG_CONSOLE => Some(Request::Console {
                taken: self.com1.print(value),
            }),
            pc::TEST_ECHO..=TEST_ECHO_LAST | pc::TEST_LINES..=TEST_LINES_LAST => {
                return claimed(self.write_test(port, value));
            }
            _ => {
                return match self.moved(port) {
                    Some(port) => self.write_device(now, port, value),
                    None => claimed(self.vga.write(port, value)),
                };
            }
        };
        request.map_or(Write::Done, Write::Asks)
    }

    /// A wider read of byte-wide ports is one read of each, lowest first, as the
    /// ISA bridge does it. `None` when nobody is at any of them.
    fn read_bytes(&mut self, now: Ticks, port: u16, width: Width) -> Option<u32> {
        let mut claimed = false;
        let mut bytes = [0xff; 4];
        for (byte, port) in bytes
            .iter_mut()
            .zip(port..=u16::MAX)
            .take(width.bytes() as usize)
        {
            if let Some(value) = self.read_byte(now, port) {
                *byte = value;
                claimed = true;
            }
        }
        claimed.then(|| u32::from_le_bytes(bytes) & width.mask() as u32)
    }

    /// A wider write of byte-wide ports is one write of each, lowest first.
    fn write_bytes(&mut self, now: Ticks, port: u16, width: Width, value: u32) -> Write {
        let mut outcome = Write::Unclaimed;
        let bytes = value.to_le_bytes();
        for (byte, port) in bytes
            .into_iter()
            .zip(port..=u16::MAX)
            .take(width.bytes() as usize)
        {
            match self.write_byte(now, port, byte) {
                Write::Unclaimed => {}
                Write::Asks(request) => return Write::Asks(request),
                Write::Done => outcome = Write::Done,
            }
        }
        outcome
    }

    fn read_pm(&mut self, now: Ticks, port: u16, width: Width) -> u32 {
        let value = self.pm.read(now, port - pc::PM_BASE, width);
        self.wire_pm();
        value
    }

    fn write_pm(&mut self, now: Ticks, port: u16, width: Width, value: u32) -> Write {
        let request = self.pm.write(now, port - pc::PM_BASE, width, value);
        self.wire_pm();
        request.map_or(Write::Done, Write::Asks)
    }

    /// The usual port of power management for one where the guest has moved it.
    #[cold]
    fn moved(&self, port: u16) -> Option<u16> {
        let offset = port.checked_sub(self.pci.pm_base()?)?;
        let usual = offset < pc::PM_LENGTH && !(pc::PM_BASE..=PM_LAST).contains(&port);
        usual.then_some(pc::PM_BASE + offset)
    }

    /// Writes a port of the test device; false where there is none.
    fn write_test(&mut self, port: u16, value: u8) -> bool {
        let Some(test) = &mut self.test else {
            return false;
        };
        let Some(number) = port.checked_sub(pc::TEST_LINES) else {
            *test.echo(port - pc::TEST_ECHO) = value;
            return true;
        };
        let number = number as u8;
        if let Some(line) = test.drive(number, value != 0) {
            self.interrupts.connect_any(number, line);
        }
        true
    }

    fn wire_pit(&mut self) {
        self.interrupts
            .connect(pc::PIT_IRQ, pc::PIT_PIN, self.pit.line());
        self.reschedule();
    }

    fn wire_rtc(&mut self) {
        self.interrupts
            .connect(pc::RTC_IRQ, pc::RTC_IRQ, self.rtc.line());
        self.reschedule();
    }

    fn wire_com1(&mut self) {
        self.interrupts
            .connect(pc::COM1_IRQ, pc::COM1_IRQ, self.com1.line());
        self.reschedule();
    }

    fn wire_pm(&mut self) {
        self.interrupts
            .connect(pc::SCI_IRQ, pc::SCI_IRQ, self.pm.line());
        self.reschedule();
    }

    fn wire_keyboard(&mut self) {
        self.interrupts
            .connect(pc::KEYBOARD_IRQ, pc::KEYBOARD_IRQ, self.i8042.line());
    }

    /// Keeps the earliest deadline at hand.
    fn reschedule(&mut self) {
        self.deadline = [
            self.pit.deadline(),
            self.rtc.deadline(),
            self.com1.deadline(),
            self.pm.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(Ticks(u64::MAX));
    }
}

/// The offset of `gpa` in the test device's memory.
fn test_memory(gpa: Gpa) -> Option<u64> {
    let offset = gpa.0.checked_sub(pc::TEST_MEMORY)?;
    (offset < pc::TEST_MEMORY_LENGTH).then_some(offset)
}

const fn claimed(taken: bool) -> Write {
    if taken { Write::Done } else { Write::Unclaimed }
}

#[cfg(test)]
mod tests;
