//! Numbers that look random and are the same for the same seed.

/// A generator (SplitMix64: Steele, Lea, Flood, 2014).
pub struct Random(u64);

impl Random {
    /// The numbers of one round.
    pub const fn new(seed: u64, round: u64) -> Self {
        let mut new = Self(seed);
        let mixed = new.next();
        Self(mixed ^ round)
    }

    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Less than `limit`, which is not 0.
    pub const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in so many times.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number of any size: as many small ones as large ones, with few bits set or clear, or at
    /// a limit.
    pub const fn number(&mut self) -> u64 {
        let bits = self.below(64);
        match self.below(5) {
            0 => self.next(),
            1 => self.next() >> bits,
            2 => 1 << bits | 1 << self.below(64),
            3 => (1u64 << bits).wrapping_sub(self.below(3)),
            _ => !0 << bits,
        }
    }
}
