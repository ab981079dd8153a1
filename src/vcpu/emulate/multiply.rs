//! Multiplication and division (SDM 2, MUL, IMUL, DIV, IDIV).

use super::alu::{CF, OF, STATUS, logic};
use super::operand::sign_extend;
use crate::arch::cpu;
use crate::devices::Width;
use crate::vcpu::fault::Exception;

/// From two factors, their width, and flags: the lower and the upper half of the product,
/// and the new flags register.
pub(super) type Product = fn(u64, u64, Width, u64) -> ((u64, u64), u64);

fn halves(value: u128, width: Width) -> (u64, u64) {
    let bits = 8 * width.bytes() as u32;
    (
        value as u64 & width.mask(),
        (value >> bits) as u64 & width.mask(),
    )
}

fn flags(low: u64, overflow: bool, width: Width, rflags: u64) -> u64 {
    let (_, status) = logic(low, width);
    let overflow = if overflow { CF | OF } else { 0 };
    rflags & !STATUS | status | overflow
}

/// The [`Product`] of unsigned factors.
pub(super) fn unsigned(a: u64, b: u64, width: Width, rflags: u64) -> ((u64, u64), u64) {
    let product = u128::from(a & width.mask()) * u128::from(b & width.mask());
    let (low, high) = halves(product, width);
    ((low, high), flags(low, high != 0, width, rflags))
}

/// That of signed ones.
pub(super) fn signed(a: u64, b: u64, width: Width, rflags: u64) -> ((u64, u64), u64) {
    let extend = |value| i128::from(sign_extend(value, width) as i64);
    let product = extend(a) * extend(b);
    let (low, high) = halves(product as u128, width);
    let overflow = product != extend(low);
    ((low, high), flags(low, overflow, width, rflags))
}

/// Quotient and remainder of a dividend of twice the width, `high` above `low`.
///
/// # Errors
/// #DE by 0, or where the quotient is too large.
pub(super) fn divide(
    (low, high): (u64, u64),
    divisor: u64,
    is_signed: bool,
    width: Width,
) -> Result<(u64, u64), Exception> {
    let bits = 8 * width.bytes() as u32;
    let unused = 128 - 2 * bits;
    let dividend = u128::from(high & width.mask()) << bits | u128::from(low & width.mask());
    if !is_signed {
        let (quotient, remainder) = divide_unsigned(dividend, divisor & width.mask())?;
        return if quotient <= width.mask() {
            Ok((quotient, remainder))
        } else {
            Err(Exception::DivideError)
        };
    }
    let dividend = (dividend << unused) as i128 >> unused;
    let divisor = sign_extend(divisor, width) as i64;
    let (quotient, remainder) = divide_unsigned(dividend.unsigned_abs(), divisor.unsigned_abs())?;
    let negative = (dividend < 0) != (divisor < 0);
    // The most negative quotient is one further from 0 than the most positive.
    let largest = (width.mask() >> 1) + u64::from(negative);
    if quotient > largest {
        return Err(Exception::DivideError);
    }
    let signed = |value: u64, negative| {
        let value = if negative {
            value.wrapping_neg()
        } else {
            value
        };
        value & width.mask()
    };
    Ok((signed(quotient, negative), signed(remainder, dividend < 0)))
}

fn divide_unsigned(dividend: u128, divisor: u64) -> Result<(u64, u64), Exception> {
    let (low, high) = (dividend as u64, (dividend >> 64) as u64);
    cpu::divide(high, low, divisor).ok_or(Exception::DivideError)
}
