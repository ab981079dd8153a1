//! The option ROM by which a BIOS starts a Linux kernel that its hypervisor has, through `fw_cfg`
//! (QEMU, `docs/specs/fw_cfg.rst`). It is code for a guest: nothing here runs in the hypervisor.
//!
//! The BIOS finds it as a boot device (BIOS Boot Specification 1.01, 4.7). It has the parts of
//! the kernel transferred into memory, says in the set-up header what a loader has to say (Linux,
//! `Documentation/arch/x86/boot.rst`), and jumps to the kernel's real-mode code.

use core::arch::global_asm;

/// Bytes; a BIOS counts in blocks of 512.
const LENGTH: usize = 512;
/// Where the checksums are: of all, and of the header with `$PnP`.
const CHECKSUM: usize = 6;
const HEADER: core::ops::Range<usize> = 0x20..0x40;
const HEADER_CHECKSUM: usize = HEADER.start + 9;

/// Where the real-mode code is, as a segment; its stack and its heap end there.
const SETUP_SEGMENT: u16 = 0x1000;
const STACK: u16 = 0xe000;
const CMDLINE: u32 = 0x2_0000;
/// The request of a transfer, and what is read in between; the stack ends there.
const REQUEST: u16 = 0x7c00;

global_asm!(
    ".pushsection .rodata.kernel_rom, \"a\"",
    ".code16",
    ".global vireo_kernel_rom",
    "vireo_kernel_rom:",
    ".byte 0x55, 0xaa, {length} / 512",
    // Initialization: nothing. RETF.
    ".byte 0xcb",
    ".org vireo_kernel_rom + 0x1a",
    ".word {header}",
    ".org vireo_kernel_rom + {header}",
    ".ascii \"$PnP\"",
    // Revision, blocks of 16 bytes.
    ".byte 1, 2",
    ".org vireo_kernel_rom + {header} + 0x10",
    ".word 5f - vireo_kernel_rom",
    // A boot device, which is wanted only if it is booted from.
    ".byte 0, 0, 0, 0x14",
    ".word 0, 0, 6f - vireo_kernel_rom, 0, 0",
    "5:",
    ".asciz \"Linux kernel\"",
    "6:",
    "cli",
    "cld",
    "xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov sp, {request}",
    // Each part, by the keys of its address, of its size, and of itself.
    "mov bx, 0x16",
    "mov cx, 0x17",
    "mov si, 0x18",
    "call 2f",
    "mov bx, 0x13",
    "mov cx, 0x14",
    "mov si, 0x15",
    "call 2f",
    "mov bx, 0x07",
    "mov cx, 0x08",
    "mov si, 0x11",
    "call 2f",
    "mov bx, 0x0a",
    "mov cx, 0x0b",
    "mov si, 0x12",
    "call 2f",
    // The initrd's address and size are left from that, big endian.
    "mov ecx, dword ptr [{request} + 4]",
    "mov edx, dword ptr [{request} + 12]",
    "bswap ecx",
    "bswap edx",
    "mov ax, {setup}",
    "mov ds, ax",
    "mov es, ax",
    "mov fs, ax",
    "mov gs, ax",
    "mov ss, ax",
    "mov sp, {stack}",
    // An unknown loader; the heap may be used; command line and initrd.
    "mov byte ptr [0x210], 0xff",
    "or byte ptr [0x211], 0x80",
    "mov word ptr [0x224], {stack} - 0x200",
    "mov dword ptr [0x228], {cmdline}",
    "mov dword ptr [0x218], edx",
    "mov dword ptr [0x21c], ecx",
    // JMP ptr16:16
    ".byte 0xea",
    ".word 0, {setup} + 0x20",
    // Transfers a part.
    "2:",
    "mov ax, bx",
    "call 3f",
    "mov dword ptr [{request} + 12], eax",
    "mov ax, cx",
    "call 3f",
    "mov dword ptr [{request} + 4], eax",
    "xor eax, eax",
    "mov dword ptr [{request} + 8], eax",
    // Selects and reads.
    "mov ax, si",
    "shl eax, 16",
    "mov al, 0x0a",
    "bswap eax",
    "mov dword ptr [{request}], eax",
    "xor eax, eax",
    "mov dx, 0x514",
    "out dx, eax",
    "mov dx, 0x518",
    "mov eax, {request}",
    "bswap eax",
    "out dx, eax",
    "ret",
    // Reads the number with the key AX into EAX, as big endian.
    "3:",
    "push cx",
    "mov dx, 0x510",
    "out dx, ax",
    "inc dx",
    "mov cx, 4",
    "4:",
    "shl eax, 8",
    "in al, dx",
    "loop 4b",
    "pop cx",
    "ret",
    ".org vireo_kernel_rom + {length}",
    ".code64",
    ".popsection",
    length = const LENGTH,
    header = const HEADER.start,
    setup = const SETUP_SEGMENT,
    stack = const STACK,
    cmdline = const CMDLINE,
    request = const REQUEST,
);

unsafe extern "C" {
    static vireo_kernel_rom: [u8; LENGTH];
}

/// The ROM, with its checksums.
pub fn kernel_rom() -> [u8; LENGTH] {
    // SAFETY: so many bytes are there, and nobody writes them.
    let mut rom = unsafe { vireo_kernel_rom };
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    rom[HEADER_CHECKSUM] = sum(&rom[HEADER]).wrapping_neg();
    rom[CHECKSUM] = sum(&rom).wrapping_neg();
    rom
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bios_takes_it() {
        let rom = kernel_rom();
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(rom[..4], [0x55, 0xaa, 1, 0xcb]);
        let header = usize::from(rom[0x1a]);
        let header = &rom[header..header + 32];
        assert_eq!(header[..6], *b"$PnP\x01\x02");
        assert_eq!((sum(&rom), sum(header)), (0, 0));
        // Its entry: CLI, CLD.
        let entry = usize::from(u16::from_le_bytes([header[0x1a], header[0x1b]]));
        assert_eq!(rom[entry..entry + 2], [0xfa, 0xfc]);
        let name = usize::from(header[0x10]);
        assert!(rom[name..].starts_with(b"Linux kernel\0"));
    }
}
