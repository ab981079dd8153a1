//! The interrupt controllers and the lines to them.

use crate::devices::ioapic::IoApic;
use crate::devices::pic::Pic;
use crate::devices::{Line, Message, Width, pc};

/// 8259s and I/O APIC, fed by the same lines.
#[derive(Clone, Debug)]
pub struct Interrupts {
    pic: Pic,
    io_apic: IoApic,
    /// Levels that the controllers have been told, by interrupt request number.
    levels: u16,
    /// INTR as the I/O APIC has been told.
    intr: bool,
}

impl Interrupts {
    /// Both at power-on, all lines low.
    pub fn new(io_apic_id: u8) -> Self {
        Self {
            pic: Pic::new(),
            io_apic: IoApic::new(io_apic_id),
            levels: 0,
            intr: false,
        }
    }

    /// Brings a device's line to input `irq` of the 8259s and to `pin` of the I/O APIC.
    #[inline]
    pub fn connect(&mut self, irq: u8, pin: u8, line: &mut Line) {
        let (level, rose) = (line.level(), line.take_edge());
        let bit = 1u16 << (irq & 15);
        if !rose && level == (self.levels & bit != 0) {
            return;
        }
        self.levels = if level {
            self.levels | bit
        } else {
            self.levels & !bit
        };
        self.pic.set_line(irq, level, rose);
        self.io_apic.set_line(pin, level, rose);
        self.forward_intr();
    }

    /// Brings `line` to where interrupt `number` goes on the bus: up to 15 to both, from there
    /// on to the I/O APIC alone.
    pub fn connect_any(&mut self, number: u8, line: &mut Line) {
        match number {
            pc::PIT_IRQ => self.connect(pc::PIT_IRQ, pc::PIT_PIN, line),
            1..16 => self.connect(number, number, line),
            _ => {
                let rose = line.take_edge();
                self.io_apic.set_line(number, line.level(), rose);
            }
        }
    }

    /// Reads a port of the 8259s.
    #[inline]
    pub fn read_pic(&mut self, port: u16) -> Option<u8> {
        let value = self.pic.read(port);
        self.forward_intr();
        value
    }

    /// Writes a port of the 8259s; false if it is none of theirs.
    #[inline]
    pub fn write_pic(&mut self, port: u16, value: u8) -> bool {
        let taken = self.pic.write(port, value);
        self.forward_intr();
        taken
    }

    /// Reads the I/O APIC's page.
    #[inline]
    pub fn read_io_apic(&self, offset: u64, width: Width) -> u64 {
        self.io_apic.read(offset, width)
    }

    /// Writes the I/O APIC's page.
    #[inline]
    pub fn write_io_apic(&mut self, offset: u64, width: Width, value: u64) {
        self.io_apic.write(offset, width, value);
    }

    /// The next message of the I/O APIC.
    #[inline]
    pub fn take_message(&mut self) -> Option<Message> {
        self.io_apic.take_message()
    }

    /// Whether there is one.
    #[inline]
    pub const fn has_message(&self) -> bool {
        self.io_apic.has_message()
    }

    /// Whether the I/O APIC may send what interrupts a CPU that has interrupts off.
    pub fn sends_unmaskable(&self) -> bool {
        self.io_apic.sends_unmaskable()
    }

    /// The end of a level-triggered interrupt, from a local APIC.
    pub fn eoi(&mut self, vector: u8) {
        self.io_apic.eoi(vector);
    }

    /// The 8259s' output.
    #[inline]
    pub const fn intr(&self) -> bool {
        self.pic.pending()
    }

    /// The INTA cycle. It takes INTR down, so that another interrupt that waits makes
    /// a new edge.
    pub fn acknowledge_pic(&mut self) -> u8 {
        let vector = self.pic.acknowledge();
        if self.intr {
            self.intr = false;
            self.io_apic.set_line(pc::EXTINT_PIN, false, false);
        }
        self.forward_intr();
        vector
    }

    #[inline]
    fn forward_intr(&mut self) {
        if self.pic.pending() != self.intr {
            self.change_intr();
        }
    }

    #[inline(never)]
    fn change_intr(&mut self) {
        self.intr = self.pic.pending();
        self.io_apic.set_line(pc::EXTINT_PIN, self.intr, self.intr);
    }
}
