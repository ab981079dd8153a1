//! The registers of MMX, SSE and AVX, one at a time: they are the guest's all the time,
//! and only what its instructions would do is done to them.

use core::arch::asm;

/// Expands to a `match` on the register's number: one instruction for each.
macro_rules! by_number {
    ($number:expr, $address:expr, $before:literal, $after:literal, $($register:literal)*) => {
        match $number {
            $($register => asm!(
                concat!($before, $register, $after),
                at = in(reg) $address,
                options(nostack, preserves_flags)
            ),)*
            _ => {}
        }
    };
}

/// A move between memory and registers, numbered from 0; numbers beyond the last do nothing.
macro_rules! moves {
    ($($(#[$doc:meta])* $name:ident($pointer:ty) = $before:literal $after:literal: $registers:tt;)*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        /// The guest has switched these registers on, so that the instruction does not
        /// fault, and `at` points at as many bytes as they have.
        #[inline(never)]
        pub unsafe fn $name(number: u8, at: $pointer) {
            // SAFETY: the caller's word. Compiled code of the hypervisor uses none of these
            // registers.
            unsafe { moves!(@ number, at, $before, $after, $registers) }
        }
    )* };
    (@ $number:ident, $at:ident, $before:literal, $after:literal, (8)) => {
        by_number!($number, $at, $before, $after, 0 1 2 3 4 5 6 7)
    };
    (@ $number:ident, $at:ident, $before:literal, $after:literal, (16)) => {
        by_number!($number, $at, $before, $after, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
}

moves! {
    /// Stores an MMX register.
    store_mmx_register(*mut u8) = "movq [{at}], mm" "": (8);
    /// Loads an MMX register.
    load_mmx_register(*const u8) = "movq mm" ", [{at}]": (8);
    /// Stores an XMM register.
    store_xmm_register(*mut u8) = "movdqu [{at}], xmm" "": (16);
    /// Loads an XMM register and leaves the vector register above it.
    load_xmm_register(*const u8) = "movdqu xmm" ", [{at}]": (16);
    /// Loads an XMM register and clears the vector register above it.
    load_xmm_register_by_vex(*const u8) = "vmovdqu xmm" ", [{at}]": (16);
    /// Stores a YMM register.
    store_ymm_register(*mut u8) = "vmovdqu [{at}], ymm" "": (16);
    /// Loads a YMM register and clears the vector register above it.
    load_ymm_register(*const u8) = "vmovdqu ymm" ", [{at}]": (16);
}

/// Whether an x87 exception is pending: the next MMX instruction would raise #MF.
#[inline(never)]
pub fn x87_exception_is_pending() -> bool {
    const ERROR_SUMMARY: u16 = 1 << 7;
    let status: u16;
    // SAFETY: reads the x87 status word, without a check for exceptions.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status & ERROR_SUMMARY != 0
}
