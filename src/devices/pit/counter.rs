//! One channel of the 8254.
//!
//! Time is in cycles of the input clock. `elapsed` counts from the cycle in
//! which the counting element was loaded.

/// What a channel does with its count ("Mode Definitions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Mode 0: low until the count is over, then high.
    TerminalCount,
    /// Mode 1: low for the count after each rising gate.
    OneShot,
    /// Mode 2: low for the last cycle of each period.
    Rate,
    /// Mode 3: high for the first half of each period.
    Square,
    /// Mode 4: low for one cycle when the count is over.
    SoftwareStrobe,
    /// Mode 5: the same after each rising gate.
    HardwareStrobe,
}

/// Which bytes of the count a read or write of the port moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

/// A count that takes over at the end of the running (half) period.
#[derive(Clone, Copy, Debug)]
struct Successor {
    count: u64,
    /// The cycle in which it takes over.
    at: u64,
    /// The cycle from which its elapsed time is reckoned then.
    start: u64,
}

/// A channel.
#[derive(Clone, Debug)]
pub struct Counter {
    /// The six low bits of the control word, for the status byte.
    control: u8,
    mode: Mode,
    access: Access,
    bcd: bool,
    gate: bool,
    /// The count register, 1 to 65536 (10000 in BCD).
    register: Option<u64>,
    /// The count in the counting element.
    count: u64,
    /// When the counting element was loaded; `None` while it does not count.
    start: Option<u64>,
    /// Elapsed cycles at which a low gate stopped the counting.
    held: Option<u64>,
    successor: Option<Successor>,
    /// The low byte of a count whose high byte is still to come.
    written_low: Option<u8>,
    /// The next unlatched read gives the high byte.
    read_high: bool,
    latch: Option<u16>,
    status: Option<u8>,
}

impl Counter {
    /// An unprogrammed channel.
    pub const fn new(gate: bool) -> Self {
        Self {
            control: 0x36,
            mode: Mode::Square,
            access: Access::LowThenHigh,
            bcd: false,
            gate,
            register: None,
            count: 0x1_0000,
            start: None,
            held: None,
            successor: None,
            written_low: None,
            read_high: false,
            latch: None,
            status: None,
        }
    }

    /// Whether the output repeats without being programmed again.
    pub const fn is_periodic(&self) -> bool {
        matches!(self.mode, Mode::Rate | Mode::Square)
    }

    /// Takes a control word for this channel (its read/write bits are not 0).
    pub const fn program(&mut self, control: u8) {
        let gate = self.gate;
        *self = Self::new(gate);
        self.control = control & 0x3f;
        self.mode = match control >> 1 & 7 {
            0 => Mode::TerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::Rate,
            3 | 7 => Mode::Square,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        };
        self.access = match control >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        self.bcd = control & 1 != 0;
        self.count = self.modulus();
    }

    /// The count latch command; a latch that was not read yet stays.
    pub fn latch(&mut self, cycle: u64) {
        if self.latch.is_none() {
            self.latch = Some(self.value(cycle));
        }
    }

    /// The read-back command.
    pub fn read_back(&mut self, cycle: u64, count: bool, status: bool) {
        if count {
            self.latch(cycle);
        }
        if status && self.status.is_none() {
            self.status =
                Some((self.output(cycle) as u8) << 7 | (self.is_null() as u8) << 6 | self.control);
        }
    }

    /// Reads the channel's port: latched status, then latched count, then the running count.
    pub fn read(&mut self, cycle: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latch.unwrap_or(self.value(cycle)).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::LowThenHigh => {
                self.read_high = !self.read_high;
                if self.read_high {
                    (low, false)
                } else {
                    (high, true)
                }
            }
        };
        if last {
            self.latch = None;
        }
        byte
    }

    /// Writes the channel's port: a byte of the count.
    pub fn write(&mut self, cycle: u64, byte: u8) {
        match self.access {
            Access::Low => self.load(cycle, u16::from(byte)),
            Access::High => self.load(cycle, u16::from(byte) << 8),
            Access::LowThenHigh => match self.written_low.take() {
                Some(low) => self.load(cycle, u16::from_le_bytes([low, byte])),
                None => {
                    self.written_low = Some(byte);
                    // The first byte stops the counting of mode 0.
                    if self.mode == Mode::TerminalCount {
                        self.start = None;
                        self.held = None;
                    }
                }
            },
        }
    }

    /// The gate input.
    pub fn set_gate(&mut self, cycle: u64, level: bool) {
        if level == self.gate {
            return;
        }
        self.gate = level;
        match self.mode {
            Mode::TerminalCount | Mode::SoftwareStrobe => {
                if level {
                    if let Some(elapsed) = self.held.take() {
                        self.start = Some(cycle.saturating_sub(elapsed));
                    }
                } else {
                    self.hold(cycle);
                }
            }
            Mode::Rate | Mode::Square => {
                if level {
                    self.trigger(cycle);
                } else {
                    self.hold(cycle);
                }
            }
            Mode::OneShot | Mode::HardwareStrobe => {
                if level {
                    self.trigger(cycle);
                }
            }
        }
    }

    /// The output pin.
    pub fn output(&self, cycle: u64) -> bool {
        let Some(elapsed) = self.elapsed(cycle) else {
            return self.mode != Mode::TerminalCount;
        };
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => elapsed >= self.count,
            Mode::Rate => !self.gate || self.count < 2 || elapsed % self.count != self.count - 1,
            Mode::Square => !self.gate || elapsed % self.count < self.high(),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != self.count,
        }
    }

    /// Passes the time from cycle `from` to cycle `to`; whether the output rose on the way.
    pub fn advance(&mut self, from: u64, to: u64) -> bool {
        let Some(successor) = self.successor else {
            return self.rises(to) != self.rises(from);
        };
        if to < successor.at {
            return self.rises(to) != self.rises(from);
        }
        let before = self.rises(successor.at) != self.rises(from);
        self.successor = None;
        self.count = successor.count;
        self.start = Some(successor.start);
        before || self.rises(to) != self.rises(successor.at)
    }

    /// The next cycle after `cycle` in which the output may rise.
    pub fn next_event(&self, cycle: u64) -> Option<u64> {
        let start = self.start?;
        if self.held.is_some() {
            return None;
        }
        if let Some(successor) = self.successor {
            return Some(successor.at);
        }
        let elapsed = cycle.saturating_sub(start);
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => {
                (elapsed < self.count).then(|| start.saturating_add(self.count))
            }
            Mode::SoftwareStrobe | Mode::HardwareStrobe => {
                (elapsed <= self.count).then(|| start.saturating_add(self.count + 1))
            }
            // A count of 1 is illegal here and makes no edges.
            Mode::Rate | Mode::Square => (self.count >= 2).then(|| {
                start.saturating_add((elapsed / self.count + 1).saturating_mul(self.count))
            }),
        }
    }

    /// How often the output has risen since the counting element was loaded.
    fn rises(&self, cycle: u64) -> u64 {
        let Some(elapsed) = self.elapsed(cycle) else {
            return 0;
        };
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => u64::from(elapsed >= self.count),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => u64::from(elapsed > self.count),
            Mode::Rate | Mode::Square if self.count < 2 => 0,
            Mode::Rate | Mode::Square => elapsed / self.count,
        }
    }

    /// A complete count was written.
    fn load(&mut self, cycle: u64, raw: u16) {
        let count = self.decode(raw);
        self.register = Some(count);
        match self.mode {
            Mode::TerminalCount | Mode::SoftwareStrobe => {
                self.begin(cycle, count);
                if !self.gate {
                    self.held = Some(0);
                }
            }
            // These wait for the gate.
            Mode::OneShot | Mode::HardwareStrobe => {}
            Mode::Rate | Mode::Square => match self.start {
                None if self.gate => self.begin(cycle, count),
                Some(start) if self.held.is_none() => {
                    self.successor = Some(self.succeed(start, cycle, count));
                }
                // Stopped by the gate, whose rise loads the register.
                _ => {}
            },
        }
    }

    /// A rising gate: the register is loaded into the counting element.
    fn trigger(&mut self, cycle: u64) {
        if let Some(count) = self.register {
            self.begin(cycle, count);
        }
    }

    /// The counting element is loaded on the next cycle.
    const fn begin(&mut self, cycle: u64, count: u64) {
        self.count = count;
        self.start = Some(cycle.saturating_add(1));
        self.held = None;
        self.successor = None;
    }

    fn hold(&mut self, cycle: u64) {
        self.held = self.elapsed(cycle);
        self.successor = None;
    }

    /// When and how a count that is written while another one runs takes over.
    fn succeed(&self, start: u64, cycle: u64, count: u64) -> Successor {
        let elapsed = cycle.saturating_sub(start);
        let position = elapsed % self.count;
        let period = start.saturating_add(elapsed - position);
        if self.mode == Mode::Square && position < self.high() && self.count >= 2 {
            // At the end of the high half: the new count's low half follows.
            let at = period.saturating_add(self.high());
            let start = at.saturating_sub(count.div_ceil(2));
            Successor { count, at, start }
        } else {
            let at = period.saturating_add(self.count);
            Successor {
                count,
                at,
                start: at,
            }
        }
    }

    const fn elapsed(&self, cycle: u64) -> Option<u64> {
        match (self.start, self.held) {
            (None, _) => None,
            (Some(_), Some(held)) => Some(held),
            (Some(start), None) => Some(cycle.saturating_sub(start)),
        }
    }

    /// Cycles of the high half of a square wave.
    const fn high(&self) -> u64 {
        self.count.div_ceil(2)
    }

    /// Whether the last count written has not reached the counting element.
    fn is_null(&self) -> bool {
        self.start.is_none() || self.register != Some(self.count)
    }

    const fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The counting element, as it is read.
    fn value(&self, cycle: u64) -> u16 {
        let modulus = self.modulus();
        let Some(elapsed) = self.elapsed(cycle) else {
            return self.encode(self.register.unwrap_or(self.count) % modulus);
        };
        let value = match self.mode {
            Mode::Rate => self.count - elapsed % self.count,
            Mode::Square => {
                // Counts down by two, twice in a period; an odd count starts one lower.
                let position = elapsed % self.count;
                let half = if position < self.high() {
                    position
                } else {
                    position - self.high()
                };
                (self.count & !1).saturating_sub(2 * half)
            }
            // Goes on past zero.
            _ => self.count + modulus - elapsed % modulus,
        };
        self.encode(value % modulus)
    }

    /// The count that the register's 16 bits mean; 0 is the largest.
    fn decode(&self, raw: u16) -> u64 {
        let value = if self.bcd {
            let digit = |shift: u32| (raw >> shift & 15) as u64;
            digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0)
        } else {
            raw as u64
        };
        match value % self.modulus() {
            0 => self.modulus(),
            value => value,
        }
    }

    fn encode(&self, value: u64) -> u16 {
        if self.bcd {
            let digit = |unit, shift: u32| (value / unit % 10) << shift;
            (digit(1, 0) | digit(10, 4) | digit(100, 8) | digit(1000, 12)) as u16
        } else {
            value as u16
        }
    }
}
