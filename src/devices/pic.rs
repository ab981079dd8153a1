//! The two cascaded 8259A interrupt controllers (Intel 8259A datasheet,
//! 231468), with the edge/level control registers of the ISA bridge
//! (PIIX, 290550) in place of the chip-wide LTIM bit.
//!
//! One deviation, on purpose: a rising edge stays latched when the line falls
//! before it was acknowledged. The devices here are looked at late, and a
//! pulse that is already over must not turn into a spurious interrupt.

/// The master's input that the slave's INT output drives.
const CASCADE: u8 = 1 << 2;

/// Inputs whose trigger cannot be set to level: 0, 1, 2, 8 and 13.
const ALWAYS_EDGE: [u8; 2] = [0x07, 0x21];

/// Which initialization command word the data port takes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Power-on: nothing was programmed, no interrupt comes out.
    Reset,
    Icw2,
    Icw3,
    Icw4,
    Ready,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Controller {
    /// Inputs that are level triggered.
    level_triggered: u8,
    /// Inputs that are high.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Bits 7..3 of the vectors.
    base: u8,
    /// The input that has the lowest priority, 7 unless rotated.
    lowest: u8,
    /// This chip's inputs that a slave drives.
    cascade: u8,
    step: Step,
    single: bool,
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Controller {
    const fn new(cascade: u8) -> Self {
        Self {
            level_triggered: 0,
            lines: 0,
            irr: 0,
            isr: 0,
            imr: 0,
            base: 0,
            lowest: 7,
            cascade,
            step: Step::Reset,
            single: false,
            wants_icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            read_isr: false,
            poll: false,
        }
    }

    /// How many inputs come before `input` in priority order.
    const fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest).wrapping_sub(1) & 7
    }

    /// The input of the highest priority in `set`.
    const fn highest(&self, set: u8) -> Option<u8> {
        if set == 0 {
            return None;
        }
        let first = (self.lowest + 1) & 7;
        let rank = set.rotate_right(first as u32).trailing_zeros() as u8;
        Some((rank + first) & 7)
    }

    /// In-service bits that hold back requests of the same and lower priority.
    const fn blocking(&self) -> u8 {
        let mut blocking = self.isr;
        if self.special_mask {
            blocking &= !self.imr;
        }
        if self.special_fully_nested {
            blocking &= !self.cascade;
        }
        blocking
    }

    /// The request that the INT output stands for.
    fn request(&self) -> Option<u8> {
        if self.step != Step::Ready {
            return None;
        }
        // In special mask mode an in-service input that is masked blocks nobody,
        // and being masked cannot request either.
        let wanted = self.highest(self.irr & !self.imr)?;
        match self.highest(self.blocking()) {
            Some(served) if self.rank(served) <= self.rank(wanted) => None,
            _ => Some(wanted),
        }
    }

    fn set_line(&mut self, bit: u8, level: bool, rose: bool) {
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.level_triggered & bit != 0 {
            self.irr = (self.irr & !bit) | (self.lines & bit);
        } else if rose {
            self.irr |= bit;
        }
    }

    /// The first INTA cycle (or a poll) for `input`.
    fn accept(&mut self, input: u8) {
        let bit = 1 << (input & 7);
        self.irr &= !bit | self.level_triggered;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    /// Takes the request, or tells that it is gone.
    fn acknowledge(&mut self) -> Option<u8> {
        let input = self.request()?;
        self.accept(input);
        Some(input)
    }

    const fn vector(&self, input: u8) -> u8 {
        self.base | input
    }

    fn poll(&mut self) -> u8 {
        self.poll = false;
        self.acknowledge().map_or(0, |input| 0x80 | input)
    }

    const fn read(&self, data_port: bool) -> u8 {
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            self.operate(value);
        } else {
            self.end(value);
        }
    }

    /// ICW1: the edge detectors, mask, priorities and read selection are reset.
    fn initialize(&mut self, icw1: u8) {
        let cascade = self.cascade;
        let level_triggered = self.level_triggered;
        let lines = self.lines;
        *self = Self {
            level_triggered,
            lines,
            irr: lines & level_triggered,
            step: Step::Icw2,
            single: icw1 & 0x02 != 0,
            wants_icw4: icw1 & 0x01 != 0,
            ..Self::new(cascade)
        };
    }

    /// OCW3: special mask mode, poll, read selection.
    fn operate(&mut self, ocw3: u8) {
        if ocw3 & 0x40 != 0 {
            self.special_mask = ocw3 & 0x20 != 0;
        }
        self.poll = ocw3 & 0x04 != 0;
        if ocw3 & 0x02 != 0 {
            self.read_isr = ocw3 & 0x01 != 0;
        }
    }

    /// OCW2: end of interrupt and rotation.
    fn end(&mut self, ocw2: u8) {
        let named = ocw2 & 7;
        let (rotate, specific, eoi) = (ocw2 & 0x80 != 0, ocw2 & 0x40 != 0, ocw2 & 0x20 != 0);
        match (eoi, specific) {
            (true, true) => {
                self.isr &= !(1 << named);
                if rotate {
                    self.lowest = named;
                }
            }
            (true, false) => {
                // In special mask mode a masked in-service bit is passed over.
                let served = if self.special_mask {
                    self.isr & !self.imr
                } else {
                    self.isr
                };
                if let Some(input) = self.highest(served) {
                    self.isr &= !(1 << input);
                    if rotate {
                        self.lowest = input;
                    }
                }
            }
            (false, true) => {
                if rotate {
                    self.lowest = named;
                }
            }
            (false, false) => self.rotate_on_auto_eoi = rotate,
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.step {
            Step::Reset | Step::Ready => self.imr = value,
            Step::Icw2 => {
                self.base = value & 0xf8;
                self.step = match (self.single, self.wants_icw4) {
                    (false, _) => Step::Icw3,
                    (true, true) => Step::Icw4,
                    (true, false) => Step::Ready,
                };
            }
            // The cascade is wired; what ICW3 says about it changes nothing.
            Step::Icw3 => {
                self.step = if self.wants_icw4 {
                    Step::Icw4
                } else {
                    Step::Ready
                };
            }
            Step::Icw4 => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.step = Step::Ready;
            }
        }
    }

    fn set_level_triggered(&mut self, inputs: u8) {
        let changed = self.level_triggered ^ inputs;
        self.level_triggered = inputs;
        self.irr = (self.irr & !changed) | (self.lines & inputs & changed);
    }
}

/// The pair of 8259As of a PC: master at ports 0x20 and 0x21, slave at 0xa0
/// and 0xa1, edge/level control at 0x4d0 and 0x4d1.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Controller,
    slave: Controller,
    /// The master's INT output, kept up to date so that looking at it is free.
    intr: bool,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// Both chips at power-on: nothing comes out until they are programmed.
    pub const fn new() -> Self {
        Self {
            master: Controller::new(CASCADE),
            slave: Controller::new(0),
            intr: false,
        }
    }

    /// Interrupt request line `irq` (0 to 15, 2 is the cascade and ignored) has
    /// this level, and `rose` since the last call.
    pub fn set_line(&mut self, irq: u8, level: bool, rose: bool) {
        let bit = 1 << (irq & 7);
        match irq {
            2 => return,
            0..=7 => self.master.set_line(bit, level, rose),
            8..=15 => self.slave.set_line(bit, level, rose),
            _ => return,
        }
        self.update();
    }

    /// The INTR output: an interrupt waits to be acknowledged.
    #[inline]
    pub const fn pending(&self) -> bool {
        self.intr
    }

    /// The INTA cycle: the vector of the interrupt with the highest priority, now
    /// in service. When the request went away meanwhile it is the spurious vector:
    /// input 7 of the chip that was asked, without an in-service bit.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.acknowledge() {
            None => self.master.vector(7),
            Some(2) => match self.slave.acknowledge() {
                Some(input) => self.slave.vector(input),
                None => self.slave.vector(7),
            },
            Some(input) => self.master.vector(input),
        };
        self.update();
        vector
    }

    /// Reads a port; `None` if it is none of the pair's.
    #[inline]
    pub fn read(&mut self, port: u16) -> Option<u8> {
        let chip = match port {
            0x20 | 0x21 => &self.master,
            0xa0 | 0xa1 => &self.slave,
            0x4d0 => return Some(self.master.level_triggered),
            0x4d1 => return Some(self.slave.level_triggered),
            _ => return None,
        };
        if !chip.poll {
            return Some(chip.read(port & 1 != 0));
        }
        Some(self.poll(port))
    }

    /// A poll is an acknowledge cycle.
    #[cold]
    fn poll(&mut self, port: u16) -> u8 {
        let chip = if port & 0x80 == 0 {
            &mut self.master
        } else {
            &mut self.slave
        };
        let value = chip.poll();
        self.update();
        value
    }

    /// Writes a port; false if it is none of the pair's.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        let [master_edge, slave_edge] = ALWAYS_EDGE;
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.set_level_triggered(value & !master_edge),
            0x4d1 => self.slave.set_level_triggered(value & !slave_edge),
            _ => return false,
        }
        self.update();
        true
    }

    /// Lets the slave's output through the cascade to the master's. The cascade
    /// input follows the slave: it needs no edge of its own.
    #[inline]
    fn update(&mut self) {
        let slave = self.slave.irr & !self.slave.imr;
        let master = self.master.irr & !self.master.imr & !CASCADE;
        if slave | master == 0 {
            // Mostly nobody asks.
            self.master.irr &= !CASCADE;
            self.intr = false;
        } else {
            self.choose();
        }
    }

    #[inline(never)]
    fn choose(&mut self) {
        let cascade = match self.slave.request() {
            Some(_) if !self.master.single => CASCADE,
            _ => 0,
        };
        self.master.irr = (self.master.irr & !CASCADE) | cascade;
        self.intr = self.master.request().is_some();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As Linux's init_8259A does it, vectors 0x30 and 0x38.
    fn programmed(icw4: u8) -> Pic {
        let mut pic = Pic::new();
        for (port, value) in [
            (0x21, 0xff),
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, icw4),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0x00),
            (0xa1, 0x00),
        ] {
            assert!(pic.write(port, value));
        }
        pic
    }

    fn edge(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, false, false);
        pic.set_line(irq, true, true);
    }

    #[test]
    fn linux_finds_the_controller() {
        let mut pic = Pic::new();
        pic.write(0xa1, 0xff);
        pic.write(0x21, 0xfb);
        assert_eq!(pic.read(0x21), Some(0xfb));
    }

    #[test]
    fn nothing_comes_out_before_initialization() {
        let mut pic = Pic::new();
        edge(&mut pic, 0);
        assert!(!pic.pending());
    }

    #[test]
    fn an_edge_is_served_once_and_ended() {
        let mut pic = programmed(0x01);
        edge(&mut pic, 4);
        assert!(pic.pending());
        assert_eq!(pic.acknowledge(), 0x34);
        assert!(!pic.pending());
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), Some(0x10));
        pic.write(0x20, 0x20);
        assert_eq!(pic.read(0x20), Some(0));
        assert!(!pic.pending());
    }

    #[test]
    fn lower_priority_waits_and_higher_interrupts() {
        let mut pic = programmed(0x01);
        edge(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        edge(&mut pic, 5);
        assert!(!pic.pending());
        edge(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(0x20, 0x20);
        assert!(!pic.pending());
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn a_slave_interrupt_needs_both_ends() {
        let mut pic = programmed(0x01);
        edge(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x38);
        edge(&mut pic, 12);
        pic.write(0xa0, 0x20);
        assert!(!pic.pending(), "the master still serves input 2");
        pic.write(0x20, 0x62);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    #[test]
    fn special_fully_nested_lets_a_higher_slave_input_through() {
        let mut pic = programmed(0x11);
        edge(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x3c);
        edge(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x38);
    }

    #[test]
    fn a_request_that_went_away_is_spurious_and_not_in_service() {
        let mut pic = programmed(0x01);
        edge(&mut pic, 3);
        pic.write(0x21, 0x08);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), Some(0));
        // A slave's request that falls takes the cascade with it.
        pic.write(0x21, 0x00);
        pic.acknowledge();
        pic.write(0x20, 0x20);
        pic.write(0x4d1, 0x04);
        pic.set_line(10, true, true);
        assert!(pic.pending());
        pic.set_line(10, false, false);
        assert_eq!(pic.acknowledge(), 0x37);
    }

    #[test]
    fn a_level_input_asks_until_it_falls() {
        let mut pic = programmed(0x01);
        pic.write(0x4d1, 0xff);
        assert_eq!(pic.read(0x4d1), Some(0xde));
        pic.set_line(9, true, true);
        assert_eq!(pic.acknowledge(), 0x39);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert!(pic.pending());
        pic.set_line(9, false, false);
        assert!(!pic.pending());
    }

    #[test]
    fn automatic_end_leaves_nothing_in_service_and_rotates() {
        let mut pic = programmed(0x03);
        pic.write(0x20, 0x80);
        edge(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        // Input 1 now has the lowest priority, 2 the highest.
        edge(&mut pic, 0);
        edge(&mut pic, 1);
        edge(&mut pic, 7);
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(pic.acknowledge(), 0x30);
        assert_eq!(pic.acknowledge(), 0x31);
    }

    #[test]
    fn rotation_by_command() {
        let mut pic = programmed(0x01);
        pic.write(0x20, 0xc3);
        edge(&mut pic, 0);
        edge(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        // Rotate on non-specific end: 4 becomes the lowest.
        pic.write(0x20, 0xa0);
        edge(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x30);
        pic.write(0x20, 0xe0);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn special_mask_mode_opens_the_lower_priorities() {
        let mut pic = programmed(0x01);
        edge(&mut pic, 3);
        pic.acknowledge();
        edge(&mut pic, 6);
        assert!(!pic.pending());
        pic.write(0x21, 0x08);
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x36);
        // The end meets input 6, not the masked input 3.
        pic.write(0x20, 0x20);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), Some(0x08));
    }

    #[test]
    fn poll_acknowledges() {
        let mut pic = programmed(0x01);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), Some(0));
        edge(&mut pic, 5);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), Some(0x85));
        assert!(!pic.pending());
        assert_eq!(pic.read(0x20), Some(0));
    }

    proptest! {
        #[test]
        fn what_is_pending_is_never_spurious(steps in prop::collection::vec((0..4u8, 0..16u8, any::<u8>()), 0..200)) {
            let ports = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x20, 0x21];
            let mut pic = programmed(0x01);
            for (kind, irq, value) in steps {
                match kind {
                    0 => { pic.write(ports[usize::from(irq & 7)], value); }
                    1 => { pic.read(ports[usize::from(irq & 7)]); }
                    2 => pic.set_line(irq, value & 1 != 0, value & 2 != 0),
                    _ => {
                        let (pending, before) = (pic.pending(), pic.clone());
                        pic.acknowledge();
                        if pending && !before.master.auto_eoi && !before.slave.auto_eoi {
                            prop_assert_ne!((pic.master.isr, pic.slave.isr), (before.master.isr, before.slave.isr));
                        } else if !pending {
                            prop_assert_eq!((pic.master.isr, pic.slave.isr), (before.master.isr, before.slave.isr));
                        }
                    }
                }
            }
        }
    }
}
