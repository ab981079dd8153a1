//! Bit tests, scans, counts and fields, and CRC-32 (SDM 2, BSF, BEXTR, PDEP and others).

use super::alu::{CF, OF, PF, SF, STATUS, ZF, logic};
use crate::devices::Width;

/// What a bit test does to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitTest {
    Bt,
    Bts,
    Btr,
    Btc,
}

impl BitTest {
    pub(super) fn stores(self) -> bool {
        self != Self::Bt
    }

    /// The result and the new flags register, of which CF is the old bit and the others stay.
    pub(super) fn compute(self, a: u64, bit: u32, rflags: u64) -> (u64, u64) {
        let mask = 1u64.wrapping_shl(bit);
        let carry = if a & mask != 0 { CF } else { 0 };
        let value = match self {
            Self::Bt => a,
            Self::Bts => a | mask,
            Self::Btr => a & !mask,
            Self::Btc => a ^ mask,
        };
        (value, rflags & !CF | carry)
    }
}

/// An operation on one operand whose result is counted or found in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    Bsf,
    Bsr,
    Tzcnt,
    Lzcnt,
    Popcnt,
}

impl Scan {
    /// The result, `None` where there is none and the destination stays as it is, and the
    /// new flags register.
    pub(super) fn compute(self, a: u64, width: Width, rflags: u64) -> (Option<u64>, u64) {
        let a = a & width.mask();
        let bits = 8 * width.bytes() as u32;
        let zero = |is_zero| if is_zero { ZF } else { 0 };
        let first = if a == 0 { bits } else { a.trailing_zeros() };
        let leading = a.leading_zeros() - (64 - bits);
        let (result, status) = match self {
            Self::Bsf => ((a != 0).then_some(first), zero(a == 0)),
            Self::Bsr => (
                (a != 0).then(|| bits.saturating_sub(1 + leading)),
                zero(a == 0),
            ),
            Self::Tzcnt | Self::Lzcnt => {
                let count = if self == Self::Tzcnt { first } else { leading };
                let carry = if a == 0 { CF } else { 0 };
                (Some(count), zero(count == 0) | carry)
            }
            Self::Popcnt => (Some(a.count_ones()), zero(a == 0)),
        };
        let changed = match self {
            Self::Bsf | Self::Bsr => ZF,
            Self::Tzcnt | Self::Lzcnt => ZF | CF,
            Self::Popcnt => STATUS,
        };
        (result.map(u64::from), rflags & !changed | status)
    }
}

/// BMI1 and BMI2: operations on an operand from memory, with a register or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Bextr,
    Blsi,
    Blsmsk,
    Blsr,
    Bzhi,
    Pdep,
    Pext,
}

impl Field {
    /// The result and the new flags register; `control` is the register operand.
    pub(super) fn compute(self, a: u64, control: u64, width: Width, rflags: u64) -> (u64, u64) {
        let bits = 8 * width.bytes() as u32;
        let a = a & width.mask();
        let (value, carry) = match self {
            Self::Bextr => {
                let (start, length) = (control as u32 & 0xff, control as u32 >> 8 & 0xff);
                let value = a.checked_shr(start).unwrap_or(0);
                (value & low(length), false)
            }
            Self::Blsi => (a & a.wrapping_neg(), a != 0),
            Self::Blsmsk => (a ^ a.wrapping_sub(1), a == 0),
            Self::Blsr => (a & a.wrapping_sub(1), a == 0),
            Self::Bzhi => {
                let index = control as u32 & 0xff;
                (a & low(index), index > bits - 1)
            }
            // The mask is in memory, the source is the register.
            Self::Pdep => return (deposit(control, a), rflags),
            Self::Pext => return (extract(control & width.mask(), a), rflags),
        };
        let (value, status) = logic(value, width);
        let changed = CF | OF | ZF | SF;
        let carry = if carry { CF } else { 0 };
        (value, rflags & !changed | status & !PF | carry)
    }
}

/// The lowest `count` bits.
fn low(count: u32) -> u64 {
    1u64.checked_shl(count).map_or(u64::MAX, |bit| bit - 1)
}

fn deposit(mut source: u64, mut mask: u64) -> u64 {
    let mut value = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & 1 != 0 {
            value |= lowest;
        }
        source >>= 1;
        mask ^= lowest;
    }
    value
}

fn extract(source: u64, mut mask: u64) -> u64 {
    let (mut value, mut bit) = (0, 1u64);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & lowest != 0 {
            value |= bit;
        }
        bit = bit.wrapping_shl(1);
        mask ^= lowest;
    }
    value
}

/// CRC-32C of `data`, as many bytes as it is wide, behind what `crc` is of.
pub(super) fn crc32(crc: u32, data: u64, width: Width) -> u32 {
    /// The polynomial 0x11EDC6F41, reflected.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let bytes = data.to_le_bytes();
    let mut crc = crc;
    for byte in bytes.iter().take(width.bytes() as usize) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1 != 0;
            crc >>= 1;
            if carry {
                crc ^= POLYNOMIAL;
            }
        }
    }
    crc
}
