//! Loops that do random things to what guests, images and operators reach: nothing of it may
//! panic, overflow, go on without end or leave the guest's memory.
//!
//! They are the same in every run. `VIREO_FUZZ_ROUNDS` is how many rounds each of them does instead
//! of its own number, `VIREO_FUZZ_SEED` has them do others.

mod config;
mod devices;
mod images;

/// Numbers that look random (SplitMix64: Steele, Lea, Flood, 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Numbers of which many are at some edge.
    pub fn number(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 63,
            u64::MAX,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => self.below(70),
            _ => self.next(),
        }
    }

    /// A number with any count of digits.
    pub fn magnitude(&mut self) -> u64 {
        self.next() >> self.below(64)
    }
}

/// Says which round it was that has panicked.
struct Told(&'static str, u64, u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: round {} of seed {}", self.0, self.1, self.2);
        }
    }
}

/// Does `one` as often as it is to be done, `rounds` times if nothing is said.
pub fn repeat(name: &'static str, rounds: u64, mut one: impl FnMut(&mut Random)) {
    let number = |name| std::env::var(name).ok()?.parse().ok();
    let seed = number("VIREO_FUZZ_SEED").unwrap_or(1);
    for round in 0..number("VIREO_FUZZ_ROUNDS").unwrap_or(rounds) {
        let _told = Told(name, round, seed);
        let start = Random(seed).next();
        one(&mut Random(start ^ round));
    }
}
