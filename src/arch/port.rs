//! Port input and output.
//!
//! # Safety
//! Every function has the same contract: the access must be one that the
//! device behind the port defines, because a device may do anything with it,
//! writing to memory included.

use core::arch::asm;

macro_rules! port_access {
    ($read:ident, $write:ident, $type:ty, $register:tt) => {
        /// Reads from `port`.
        ///
        /// # Safety
        /// See the module.
        #[inline]
        pub unsafe fn $read(port: u16) -> $type {
            let value: $type;
            // SAFETY: the caller answers for what the device does.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port, options(nostack, preserves_flags));
            }
            value
        }

        /// Writes `value` to `port`.
        ///
        /// # Safety
        /// See the module.
        #[inline]
        pub unsafe fn $write(port: u16, value: $type) {
            // SAFETY: the caller answers for what the device does.
            unsafe {
                asm!(concat!("out dx, ", $register), in("dx") port, in($register) value, options(nostack, preserves_flags));
            }
        }
    };
}

port_access!(inb, outb, u8, "al");
port_access!(inw, outw, u16, "ax");
port_access!(inl, outl, u32, "eax");
