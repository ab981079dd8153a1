//! Files that are kernels as far as the loader looks at them.

/// An ELF file for x86-64 that has no segment.
pub fn empty_elf() -> Vec<u8> {
    let mut file = vec![0; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[16] = 2; // executable
    file[18] = 62; // x86-64
    file[20] = 1; // version
    file[52] = 64; // size of this header
    file[54] = 56; // size of a program header
    file
}

/// A bzImage, by its header, with so many bytes behind the set-up code.
pub fn bzimage(payload: u32) -> Vec<u8> {
    let payload = payload.next_multiple_of(16);
    let mut file = vec![0; 1024 + payload as usize];
    file[0x1f1] = 1; // sectors of set-up code behind the first
    file[0x1f4..0x1f8].copy_from_slice(&(payload / 16).to_le_bytes());
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file
}
