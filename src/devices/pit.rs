//! The 8254 interval timer (Intel 8254 datasheet, 231164).
//!
//! Nothing ticks. A channel remembers when it began to count; count, output
//! and edges are computed from the time of the access, in constant time
//! however long nobody looked. The channel itself is in [`counter`].

mod counter;

use super::{Clock, Line, Ticks};
use counter::Counter;

/// The input frequency of the three channels, in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Cycles of the input in half a period of the refresh toggle (port 0x61, bit 4),
/// about 15 microseconds.
const REFRESH_CYCLES: u64 = 18;

/// No more periodic interrupts than this many a second: a guest that programs
/// a shorter period gets them coalesced.
const MAX_PERIODIC_HZ: u64 = 50_000;

/// Cycle number of power-on. Not 0, so that the start of a phase can be
/// reckoned back before power-on.
const FIRST_CYCLE: u64 = 1 << 20;

/// The three channels. Channel 0 drives the interrupt line, channel 2's gate
/// and output belong to port 0x61; the gates of 0 and 1 are tied high.
#[derive(Clone, Debug)]
pub struct Pit {
    clock: Clock,
    power_on: Ticks,
    /// The cycle up to which edges were seen.
    cycle: u64,
    counters: [Counter; 3],
    line: Line,
    deadline: Option<Ticks>,
    /// When the next periodic interrupt may come at the earliest.
    holdoff: Ticks,
}

impl Pit {
    /// Three channels that nobody has programmed.
    pub fn new(clock: Clock, now: Ticks) -> Self {
        let mut line = Line::default();
        line.set(true);
        line.take_edge();
        Self {
            clock,
            power_on: now,
            cycle: FIRST_CYCLE,
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            line,
            deadline: None,
            holdoff: now,
        }
    }

    /// The output of channel 0.
    #[inline]
    pub fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    /// When the output of channel 0 rises next.
    #[inline]
    pub const fn deadline(&self) -> Option<Ticks> {
        self.deadline
    }

    /// Reads port `offset` (0 to 3). The control word cannot be read.
    pub fn read(&mut self, now: Ticks, offset: u8) -> u8 {
        self.advance(now);
        let cycle = self.cycle;
        match self.counters.get_mut(usize::from(offset)) {
            Some(counter) => counter.read(cycle),
            None => 0xff,
        }
    }

    /// Writes port `offset` (0 to 3).
    pub fn write(&mut self, now: Ticks, offset: u8, value: u8) {
        self.advance(now);
        let cycle = self.cycle;
        match self.counters.get_mut(usize::from(offset)) {
            Some(counter) => counter.write(cycle, value),
            None => self.control(value),
        }
        self.update(now);
    }

    /// The gate input of channel 2.
    pub fn set_gate2(&mut self, now: Ticks, level: bool) {
        self.advance(now);
        let cycle = self.cycle;
        let [_, _, channel2] = &mut self.counters;
        channel2.set_gate(cycle, level);
    }

    /// The output of channel 2.
    pub fn output2(&mut self, now: Ticks) -> bool {
        self.advance(now);
        let [_, _, channel2] = &self.counters;
        channel2.output(self.cycle)
    }

    /// The toggle that memory refresh makes visible in port 0x61.
    pub fn refresh_toggle(&self, now: Ticks) -> bool {
        !(self.cycle_at(now) / REFRESH_CYCLES).is_multiple_of(2)
    }

    /// Brings line and counters up to `now`.
    pub fn advance(&mut self, now: Ticks) {
        let (from, to) = (self.cycle, self.cycle_at(now).max(self.cycle));
        self.cycle = to;
        let [channel0, channel1, channel2] = &mut self.counters;
        let rose = channel0.advance(from, to);
        channel1.advance(from, to);
        channel2.advance(from, to);
        if rose {
            self.line.pulse();
            let pause = self.clock.hz() / MAX_PERIODIC_HZ;
            self.holdoff = Ticks(now.0.saturating_add(pause));
        }
        self.update(now);
    }

    /// The control word port: read-back, or a channel's latch or mode.
    fn control(&mut self, value: u8) {
        let cycle = self.cycle;
        if value >> 6 == 3 {
            for (index, counter) in self.counters.iter_mut().enumerate() {
                if value & (2 << index) != 0 {
                    counter.read_back(cycle, value & 0x20 == 0, value & 0x10 == 0);
                }
            }
        } else if let Some(counter) = self.counters.get_mut(usize::from(value >> 6)) {
            if value & 0x30 == 0 {
                counter.latch(cycle);
            } else {
                counter.program(value);
            }
        }
    }

    fn update(&mut self, now: Ticks) {
        let [channel0, ..] = &self.counters;
        self.line.set(channel0.output(self.cycle));
        self.deadline = channel0.next_event(self.cycle).map(|cycle| {
            let edge = self.ticks_at(cycle).max(Ticks(now.0.saturating_add(1)));
            if channel0.is_periodic() {
                edge.max(self.holdoff)
            } else {
                edge
            }
        });
    }

    fn cycle_at(&self, now: Ticks) -> u64 {
        let ticks = now.0.saturating_sub(self.power_on.0);
        self.clock.cycles(ticks, PIT_HZ).saturating_add(FIRST_CYCLE)
    }

    fn ticks_at(&self, cycle: u64) -> Ticks {
        let ticks = self.clock.ticks(cycle.saturating_sub(FIRST_CYCLE), PIT_HZ);
        Ticks(self.power_on.0.saturating_add(ticks))
    }
}

#[cfg(test)]
mod tests;
