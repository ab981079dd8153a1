//! Integer arithmetic with its flags (SDM 1, 3.4.3.1).

use crate::devices::Width;

pub(super) const CF: u64 = 1;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const DF: u64 = 1 << 10;
pub(super) const OF: u64 = 1 << 11;
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// An operation on two operands of one width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Adc,
    Sub,
    Sbb,
    And,
    Or,
    Xor,
    /// SUB without the result.
    Cmp,
    /// AND without the result.
    Test,
}

impl Binary {
    pub(super) fn stores(self) -> bool {
        !matches!(self, Self::Cmp | Self::Test)
    }

    /// The result and the new flags register.
    pub(super) fn compute(self, a: u64, b: u64, width: Width, rflags: u64) -> (u64, u64) {
        let carry_in = rflags & CF;
        let (value, status) = match self {
            Self::Add => add(a, b, 0, width),
            Self::Adc => add(a, b, carry_in, width),
            Self::Sub | Self::Cmp => subtract(a, b, 0, width),
            Self::Sbb => subtract(a, b, carry_in, width),
            // CF and OF are cleared; AF is undefined, and cleared by the CPUs we know.
            Self::And | Self::Test => logic(a & b, width),
            Self::Or => logic(a | b, width),
            Self::Xor => logic(a ^ b, width),
        };
        (value, rflags & !STATUS | status)
    }
}

/// An operation on one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unary {
    Inc,
    Dec,
    Neg,
    /// No flags.
    Not,
}

impl Unary {
    /// The result and the new flags register.
    pub(super) fn compute(self, a: u64, width: Width, rflags: u64) -> (u64, u64) {
        let (value, status, changed) = match self {
            Self::Inc => {
                let (value, status) = add(a, 1, 0, width);
                (value, status, STATUS & !CF)
            }
            Self::Dec => {
                let (value, status) = subtract(a, 1, 0, width);
                (value, status, STATUS & !CF)
            }
            Self::Neg => {
                let (value, status) = subtract(0, a, 0, width);
                (value, status, STATUS)
            }
            Self::Not => (!a & width.mask(), 0, 0),
        };
        (value, rflags & !changed | status & changed)
    }
}

pub(super) fn sign_bit(width: Width) -> u64 {
    width.mask() ^ width.mask() >> 1
}

/// `value` in this width, with SF, ZF and PF of it.
pub(super) fn logic(value: u64, width: Width) -> (u64, u64) {
    let value = value & width.mask();
    let mut status = 0;
    if value == 0 {
        status |= ZF;
    }
    if value & sign_bit(width) != 0 {
        status |= SF;
    }
    if (value as u8).count_ones() & 1 == 0 {
        status |= PF;
    }
    (value, status)
}

fn add(a: u64, b: u64, carry: u64, width: Width) -> (u64, u64) {
    let (a, b) = (a & width.mask(), b & width.mask());
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let (value, mut status) = logic(wide as u64, width);
    if wide > u128::from(width.mask()) {
        status |= CF;
    }
    if (a ^ value) & (b ^ value) & sign_bit(width) != 0 {
        status |= OF;
    }
    (value, status | (a ^ b ^ value) & AF)
}

fn subtract(a: u64, b: u64, borrow: u64, width: Width) -> (u64, u64) {
    let (a, b) = (a & width.mask(), b & width.mask());
    let (value, mut status) = logic(a.wrapping_sub(b).wrapping_sub(borrow), width);
    if u128::from(a) < u128::from(b) + u128::from(borrow) {
        status |= CF;
    }
    if (a ^ b) & (a ^ value) & sign_bit(width) != 0 {
        status |= OF;
    }
    (value, status | (a ^ b ^ value) & AF)
}
