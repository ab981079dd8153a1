//! Port I/O.

use core::arch::asm;

macro_rules! width {
    ($input:ident $output:ident $type:ty = $register:tt) => {
        pub fn $input(port: u16) -> $type {
            let value;
            // SAFETY: the guest's own machine; no device of it writes memory.
            unsafe { asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value, options(nomem, nostack)) };
            value
        }

        pub fn $output(port: u16, value: $type) {
            // SAFETY: as above.
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value, options(nomem, nostack)) };
        }
    };
}

width!(in8 out8 u8 = "al");
width!(in16 out16 u16 = "ax");
width!(in32 out32 u32 = "eax");
