//! Shifts and rotations with their flags (SDM 2, RCL and following, SAL and following).

use super::alu::{AF, CF, OF, PF, SF, ZF, logic, sign_bit};
use super::operand::sign_extend;
use crate::devices::Width;

/// An operation on an operand and a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// The count as far as the CPU looks at it.
const fn masked(count: u64, width: Width) -> u32 {
    let mask = if matches!(width, Width::Qword) {
        0x3f
    } else {
        0x1f
    };
    count as u32 & mask
}

const fn bits(width: Width) -> u32 {
    8 * width.bytes() as u32
}

fn flag(flag: u64, on: bool) -> u64 {
    if on { flag } else { 0 }
}

impl Shift {
    /// The result and the new flags register. Where the manual leaves OF undefined, it is as
    /// for a count of 1.
    pub(super) fn compute(self, a: u64, count: u64, width: Width, rflags: u64) -> (u64, u64) {
        let count = masked(count, width);
        let a = a & width.mask();
        if count == 0 {
            return (a, rflags);
        }
        match self {
            Self::Rol | Self::Ror | Self::Rcl | Self::Rcr => self.rotate(a, count, width, rflags),
            Self::Shl | Self::Shr | Self::Sar => self.shift(a, count, width, rflags),
        }
    }

    fn rotate(self, a: u64, count: u32, width: Width, rflags: u64) -> (u64, u64) {
        let bits = bits(width);
        let top = |value| value & sign_bit(width) != 0;
        let next = |value| value & sign_bit(width) >> 1 != 0;
        let through = rflags & CF != 0;
        let (value, carry, overflow) = match self {
            Self::Rol | Self::Ror => {
                let left = match self {
                    Self::Rol => count % bits,
                    _ => (bits - count % bits) % bits,
                };
                let wide = u128::from(a) << left;
                let value = (wide | wide >> bits) as u64 & width.mask();
                if self == Self::Rol {
                    let carry = value & 1 != 0;
                    (value, carry, top(value) != carry)
                } else {
                    (value, top(value), top(value) != next(value))
                }
            }
            _ => {
                // CF is the bit above the highest one.
                let all = bits + 1;
                let left = match self {
                    Self::Rcl => count % all,
                    _ => (all - count % all) % all,
                };
                let whole = u128::from(a) | u128::from(through) << bits;
                let wide = whole << left;
                let turned = if left == 0 {
                    whole
                } else {
                    wide | whole >> (all - left)
                };
                let value = turned as u64 & width.mask();
                let carry = turned >> bits & 1 != 0;
                let overflow = if self == Self::Rcl {
                    top(value) != carry
                } else {
                    top(value) != next(value)
                };
                (value, carry, overflow)
            }
        };
        let status = flag(CF, carry) | flag(OF, overflow);
        (value, rflags & !(CF | OF) | status)
    }

    fn shift(self, a: u64, count: u32, width: Width, rflags: u64) -> (u64, u64) {
        let (value, carry, overflow) = match self {
            Self::Shl => {
                let wide = u128::from(a) << count;
                let carry = wide >> bits(width) & 1 != 0;
                let value = wide as u64 & width.mask();
                (value, carry, (value & sign_bit(width) != 0) != carry)
            }
            Self::Shr => {
                let wide = u128::from(a) << 1 >> count;
                ((wide >> 1) as u64, wide & 1 != 0, a & sign_bit(width) != 0)
            }
            _ => {
                let wide = i128::from(sign_extend(a, width) as i64) << 1 >> count;
                ((wide >> 1) as u64 & width.mask(), wide & 1 != 0, false)
            }
        };
        let (value, status) = logic(value, width);
        let changed = CF | OF | SF | ZF | PF | AF;
        let status = status | flag(CF, carry) | flag(OF, overflow);
        (value, rflags & !changed | status)
    }
}

/// SHLD of `a` with the bits of `b` behind it, or SHRD with `right`.
pub(super) fn double(
    a: u64,
    b: u64,
    count: u64,
    right: bool,
    width: Width,
    rflags: u64,
) -> (u64, u64) {
    let count = masked(count, width);
    let (a, b) = (a & width.mask(), b & width.mask());
    if count == 0 {
        return (a, rflags);
    }
    let bits = bits(width);
    // With 16 bits a count of more than that is undefined: the first operand comes in again.
    let (value, carry) = if right {
        let whole = u128::from(a) | u128::from(b) << bits;
        let whole = if bits == 16 {
            whole | u128::from(a) << 32
        } else {
            whole
        };
        let wide = whole << 1 >> count;
        ((wide >> 1) as u64 & width.mask(), wide & 1 != 0)
    } else {
        let whole = u128::from(a) << bits | u128::from(b);
        let (whole, bits) = if bits == 16 {
            (whole << 16 | u128::from(a), 32)
        } else {
            (whole, bits)
        };
        let lost = bits + 8 * width.bytes() as u32 - count;
        let value = (whole >> (bits - count.min(bits))) as u64 & width.mask();
        (value, whole >> lost & 1 != 0)
    };
    let (value, status) = logic(value, width);
    let sign_changed = (value ^ a) & sign_bit(width) != 0;
    let changed = CF | OF | SF | ZF | PF | AF;
    let status = status | flag(CF, carry) | flag(OF, sign_changed);
    (value, rflags & !changed | status)
}
