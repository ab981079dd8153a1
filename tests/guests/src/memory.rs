//! Registers of devices, and anything else at a fixed address.

macro_rules! width {
    ($read:ident $write:ident $type:ty, $size:literal) => {
        /// One read of this width, aligned or not.
        pub fn $read(address: u64) -> $type {
            let value;
            // SAFETY: every address of the flat map may be read.
            unsafe {
                core::arch::asm!(concat!("mov {:", $size, "}, [{}]"), out(reg) value, in(reg) address, options(nostack, preserves_flags));
            }
            value
        }

        /// One write of this width, aligned or not.
        pub fn $write(address: u64, value: $type) {
            // SAFETY: the check's own memory, or a device.
            unsafe {
                core::arch::asm!(concat!("mov [{}], {:", $size, "}"), in(reg) address, in(reg) value, options(nostack, preserves_flags));
            }
        }
    };
}

/// One read of a byte.
pub fn read8(address: u64) -> u8 {
    let value;
    // SAFETY: every address of the flat map may be read.
    unsafe {
        core::arch::asm!("mov {}, [{}]", out(reg_byte) value, in(reg) address, options(nostack, preserves_flags));
    }
    value
}

/// One write of a byte.
pub fn write8(address: u64, value: u8) {
    // SAFETY: the check's own memory, or a device.
    unsafe {
        core::arch::asm!("mov [{}], {}", in(reg) address, in(reg_byte) value, options(nostack, preserves_flags));
    }
}

width!(read16 write16 u16, "x");
width!(read32 write32 u32, "e");
width!(read64 write64 u64, "r");

/// Copies instructions to `address`.
pub fn write_code(address: u64, code: &[u8]) {
    for (at, &byte) in (address..).zip(code) {
        write8(at, byte);
    }
}
