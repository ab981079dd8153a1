//! The registers at their architectural offsets, in a page of their own: what
//! APIC virtualization lets the CPU read and write by itself (SDM 3, 12.4.1 and 30.1).

/// Offsets of the registers (SDM 3, table 12-1).
pub mod register {
    pub const ID: u16 = 0x20;
    pub const VERSION: u16 = 0x30;
    pub const TPR: u16 = 0x80;
    pub const PPR: u16 = 0xa0;
    pub const EOI: u16 = 0xb0;
    pub const LDR: u16 = 0xd0;
    pub const DFR: u16 = 0xe0;
    pub const SVR: u16 = 0xf0;
    pub const ISR: u16 = 0x100;
    pub const TMR: u16 = 0x180;
    pub const IRR: u16 = 0x200;
    pub const ESR: u16 = 0x280;
    pub const ICR: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const LVT_TIMER: u16 = 0x320;
    pub const LVT_LINT0: u16 = 0x350;
    pub const LVT_LINT1: u16 = 0x360;
    pub const LVT_ERROR: u16 = 0x370;
    pub const TIMER_INITIAL: u16 = 0x380;
    pub const TIMER_CURRENT: u16 = 0x390;
    pub const TIMER_DIVIDE: u16 = 0x3e0;
    pub const SELF_IPI: u16 = 0x3f0;
}

/// The page; registers are 16 bytes apart, 32 bits each.
#[repr(C, align(4096))]
pub struct ApicPage([u32; 1024]);

impl ApicPage {
    /// All zero.
    pub const fn new() -> Self {
        Self([0; 1024])
    }

    #[inline]
    pub fn get(&self, register: u16) -> u32 {
        self.0[usize::from(register >> 2) & 1023]
    }

    #[inline]
    pub fn set(&mut self, register: u16, value: u32) {
        self.0[usize::from(register >> 2) & 1023] = value;
    }

    /// Sets or clears the bit of `vector` in the 256-bit register at `base`.
    #[inline]
    pub fn set_vector(&mut self, base: u16, vector: u8, on: bool) {
        let register = base + u16::from(vector >> 5) * 16;
        let bit = 1 << (vector & 31);
        let old = self.get(register);
        self.set(register, if on { old | bit } else { old & !bit });
    }

    #[inline]
    pub fn has_vector(&self, base: u16, vector: u8) -> bool {
        self.get(base + u16::from(vector >> 5) * 16) >> (vector & 31) & 1 != 0
    }

    /// The highest vector in the 256-bit register at `base`.
    #[inline]
    pub fn highest(&self, base: u16) -> Option<u8> {
        (0..8u16).rev().find_map(|word| {
            let bits = self.get(base + word * 16);
            (bits != 0).then(|| (word * 32) as u8 + (31 - bits.leading_zeros()) as u8)
        })
    }
}

impl Default for ApicPage {
    fn default() -> Self {
        Self::new()
    }
}
