//! `memcpy` and its kin, which compiled code calls and no C library provides.
//!
//! String instructions, eight bytes at a time: short code, and the emulator
//! counts an instruction for each iteration.
#![no_std]

use core::arch::asm;

/// Copies `count` bytes upwards.
///
/// # Safety
/// Both ranges are valid, and they do not overlap, or `to` is below `from`.
#[cfg_attr(feature = "bare", unsafe(no_mangle))]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear (System V ABI).
    unsafe {
        asm!(
            "rep movsq",
            "mov rcx, {rest}",
            "rep movsb",
            rest = in(reg) count & 7,
            inout("rcx") count >> 3 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Copies `count` bytes, whether or not the ranges overlap.
///
/// # Safety
/// Both ranges are valid.
#[cfg_attr(feature = "bare", unsafe(no_mangle))]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: `to` does not lie inside the source, so copying upwards is right.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's promise; downwards from the last byte, and the flag is clear again after.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    to
}

/// Sets `count` bytes to the low byte of `value`.
///
/// # Safety
/// The range is valid.
#[cfg_attr(feature = "bare", unsafe(no_mangle))]
pub unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    let pattern = u64::from(value as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller's promise; the direction flag is clear.
    unsafe {
        asm!(
            "rep stosq",
            "mov rcx, {rest}",
            "rep stosb",
            rest = in(reg) count & 7,
            inout("rcx") count >> 3 => _,
            inout("rdi") to => _,
            in("rax") pattern,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// The difference of the first bytes that differ, or 0.
///
/// # Safety
/// Both ranges are valid.
#[cfg_attr(feature = "bare", unsafe(no_mangle))]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    let mut index = 0;
    while index < count {
        // SAFETY: inside both ranges.
        let (a, b) = unsafe { (a.add(index).read(), b.add(index).read()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
        index += 1;
    }
    0
}

/// Not 0 when the ranges differ.
///
/// # Safety
/// Both ranges are valid.
#[cfg_attr(feature = "bare", unsafe(no_mangle))]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, count) }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn as_slices_do_it() {
        let source: Vec<u8> = (0..100).collect();
        for (from, to, count) in [
            (0, 50, 37),
            (10, 13, 40),
            (13, 10, 40),
            (5, 5, 9),
            (3, 4, 0),
        ] {
            let mut expected = source.clone();
            expected.copy_within(from..from + count, to);
            let mut bytes = source.clone();
            let base = bytes.as_mut_ptr();
            // SAFETY: both ranges lie inside `bytes`.
            unsafe { memmove(base.add(to), base.add(from), count) };
            assert_eq!(bytes, expected, "{from} {to} {count}");
            // SAFETY: as above.
            unsafe { memset(base.add(to), 0x1a5, count) };
            assert!(bytes[to..to + count].iter().all(|byte| *byte == 0xa5));
        }
        let (a, b) = ([1u8, 2, 3], [1u8, 2, 9]);
        // SAFETY: three bytes each.
        unsafe {
            assert!(memcmp(a.as_ptr(), b.as_ptr(), 3) < 0);
            assert_eq!(bcmp(a.as_ptr(), b.as_ptr(), 2), 0);
        }
    }
}
