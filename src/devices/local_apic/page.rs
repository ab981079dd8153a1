//! The registers in one page, at their architectural offsets.
//!
//! VT-x can virtualize this very page: its TPR, and with APIC-register
//! virtualization and virtual-interrupt delivery all of it (SDM 3, 30.1.1). So
//! this is not a copy of the state: it is the state.

/// Offsets of the registers in the page, in bytes (SDM 3, table 12-1). An x2APIC
/// register's MSR is 0x800 plus a sixteenth of it (table 12-6).
pub mod register {
    pub const ID: u16 = 0x020;
    pub const VERSION: u16 = 0x030;
    pub const TPR: u16 = 0x080;
    pub const APR: u16 = 0x090;
    pub const PPR: u16 = 0x0a0;
    pub const EOI: u16 = 0x0b0;
    pub const REMOTE_READ: u16 = 0x0c0;
    /// Logical destination.
    pub const LDR: u16 = 0x0d0;
    /// Destination format.
    pub const DFR: u16 = 0x0e0;
    /// Spurious-interrupt vector.
    pub const SVR: u16 = 0x0f0;
    /// First of the eight in-service registers.
    pub const ISR: u16 = 0x100;
    /// First of the eight trigger-mode registers.
    pub const TMR: u16 = 0x180;
    /// First of the eight interrupt-request registers.
    pub const IRR: u16 = 0x200;
    /// Error status.
    pub const ESR: u16 = 0x280;
    /// Interrupt command: all 64 bits in x2APIC mode, else the low half.
    pub const ICR: u16 = 0x300;
    /// Upper half of the interrupt command; not in x2APIC mode.
    pub const ICR_HIGH: u16 = 0x310;
    /// First of the entries of the local vector table.
    pub const LVT_TIMER: u16 = 0x320;
    pub const LVT_THERMAL: u16 = 0x330;
    pub const LVT_PERFORMANCE: u16 = 0x340;
    pub const LVT_LINT0: u16 = 0x350;
    pub const LVT_LINT1: u16 = 0x360;
    pub const LVT_ERROR: u16 = 0x370;
    /// The timer's initial count.
    pub const INITIAL_COUNT: u16 = 0x380;
    /// The timer's current count.
    pub const CURRENT_COUNT: u16 = 0x390;
    /// The timer's divide configuration.
    pub const DIVIDE: u16 = 0x3e0;
    /// Self IPI; only in x2APIC mode.
    pub const SELF_IPI: u16 = 0x3f0;

    /// Whether it belongs to [`crate::devices::local_apic::Address`].
    #[inline]
    pub const fn is_address(offset: u16) -> bool {
        matches!(offset, ID | LDR | DFR | SVR)
    }
}

/// From one register to the next.
pub const STRIDE: u16 = 0x10;

const WORDS: usize = 1024;

/// A virtual-APIC page: 4 KiB, aligned to its size.
#[derive(Clone, Debug)]
#[repr(C, align(4096))]
pub struct ApicPage([u32; WORDS]);

impl ApicPage {
    pub(super) const fn new() -> Self {
        Self([0; WORDS])
    }

    /// The 32 bits at `offset` (in bytes, rounded down to a multiple of 4, modulo the page).
    #[inline]
    pub const fn get(&self, offset: u16) -> u32 {
        self.0[offset as usize / 4 % WORDS]
    }

    #[inline]
    pub(super) const fn set(&mut self, offset: u16, value: u32) {
        self.0[offset as usize / 4 % WORDS] = value;
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }

    /// Whether `vector` is in the 256-bit register that starts at `base`.
    #[inline]
    pub const fn has_vector(&self, base: u16, vector: u8) -> bool {
        self.get(word_of(base, vector)) & bit_of(vector) != 0
    }

    #[inline]
    pub(super) const fn set_vector(&mut self, base: u16, vector: u8) {
        let word = word_of(base, vector);
        self.set(word, self.get(word) | bit_of(vector));
    }

    #[inline]
    pub(super) const fn clear_vector(&mut self, base: u16, vector: u8) {
        let word = word_of(base, vector);
        self.set(word, self.get(word) & !bit_of(vector));
    }
}

/// The 256-bit register at offset `BASE`, and beside it which of its eight words
/// hold a vector, so that the highest is found without a search.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vectors<const BASE: u16> {
    words: u8,
}

impl<const BASE: u16> Vectors<BASE> {
    #[inline]
    pub const fn insert(&mut self, page: &mut ApicPage, vector: u8) {
        page.set_vector(BASE, vector);
        self.words |= 1 << (vector >> 5);
    }

    #[inline]
    pub const fn remove(&mut self, page: &mut ApicPage, vector: u8) {
        page.clear_vector(BASE, vector);
        if page.get(word_of(BASE, vector)) == 0 {
            self.words &= !(1 << (vector >> 5));
        }
    }

    /// Counts on nothing being there any more, whatever the page says.
    #[inline]
    pub const fn forget(&mut self) {
        self.words = 0;
    }

    /// Whether it holds none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// The highest vector.
    #[inline]
    pub const fn highest(&self, page: &ApicPage) -> Option<u8> {
        let Some(word) = self.words.checked_ilog2() else {
            return None;
        };
        match page.get(BASE + STRIDE * word as u16).checked_ilog2() {
            Some(bit) => Some((word << 5 | bit) as u8),
            None => None,
        }
    }

    /// What `page` says.
    pub fn load(page: &ApicPage) -> Self {
        let words = (0..8)
            .filter(|&word| page.get(BASE + STRIDE * word) != 0)
            .fold(0, |words, word| words | 1 << word);
        Self { words }
    }
}

const fn word_of(base: u16, vector: u8) -> u16 {
    base + STRIDE * (vector >> 5) as u16
}

const fn bit_of(vector: u8) -> u32 {
    1 << (vector & 31)
}
