//! The general registers, as one block in memory.

use core::mem::offset_of;

/// The sixteen general registers in the order of their encoding.
///
/// The exit stub fills this block. The stack pointer's slot is only room there:
/// the caller that needs RSP fills it in, and takes it back after a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct GeneralRegisters {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

impl GeneralRegisters {
    /// The register with this encoding; of `index` the low four bits count.
    #[inline]
    pub fn get(&self, index: u8) -> u64 {
        // SAFETY: the struct is `repr(C)` with sixteen `u64` fields and nothing else, so every
        // offset up to the fifteenth `u64` from its start is a field, borrowed by `self`.
        unsafe {
            *(&raw const *self)
                .cast::<u64>()
                .add(usize::from(index & 15))
        }
    }

    /// Replaces the register with this encoding; of `index` the low four bits count.
    #[inline]
    pub fn set(&mut self, index: u8, value: u64) {
        // SAFETY: as in `get`; `self` is borrowed mutably.
        unsafe { *(&raw mut *self).cast::<u64>().add(usize::from(index & 15)) = value }
    }

    /// The first four.
    #[inline]
    pub fn light(&mut self) -> &mut LightRegisters {
        // SAFETY: both are `repr(C)`, and the fields of `LightRegisters` are the first of these
        // (asserted below).
        unsafe { &mut *(&raw mut *self).cast() }
    }
}

/// The first four general registers: all that the instructions of light exits use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LightRegisters {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
}

impl From<[u32; 4]> for LightRegisters {
    /// From EAX, EBX, ECX and EDX, the order in which CPUID is documented.
    #[inline(always)]
    fn from([eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self {
            rax: eax.into(),
            rcx: ecx.into(),
            rdx: edx.into(),
            rbx: ebx.into(),
        }
    }
}

impl LightRegisters {
    /// EDX:EAX, as RDMSR, WRMSR, XSETBV and RDTSC use them.
    #[inline]
    pub fn edx_eax(&self) -> u64 {
        self.rdx << 32 | self.rax & 0xffff_ffff
    }

    /// Loads EDX:EAX; the upper halves of both registers become 0.
    #[inline]
    pub fn set_edx_eax(&mut self, value: u64) {
        self.rax = value & 0xffff_ffff;
        self.rdx = value >> 32;
    }

    /// Loads AL and leaves the rest of RAX.
    #[inline(always)]
    pub const fn set_al(&mut self, value: u8) {
        self.rax = self.rax & !0xff | value as u64;
    }
}

const _: () = assert!(size_of::<GeneralRegisters>() == 16 * size_of::<u64>());
const _: () = {
    assert!(offset_of!(GeneralRegisters, rax) == offset_of!(LightRegisters, rax));
    assert!(offset_of!(GeneralRegisters, rcx) == offset_of!(LightRegisters, rcx));
    assert!(offset_of!(GeneralRegisters, rdx) == offset_of!(LightRegisters, rdx));
    assert!(offset_of!(GeneralRegisters, rbx) == offset_of!(LightRegisters, rbx));
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_found_by_their_encoding() {
        let mut registers = GeneralRegisters::default();
        for index in 0..16 {
            registers.set(index, 0x100 + u64::from(index));
        }
        assert_eq!(registers.rcx, 0x101);
        assert_eq!(registers.rbx, 0x103);
        assert_eq!(registers.rsp, 0x104);
        assert_eq!(registers.rdi, 0x107);
        assert_eq!(registers.r8, 0x108);
        assert_eq!(registers.r15, 0x10f);
        assert_eq!(registers.get(0x15), registers.rbp);
    }

    #[test]
    fn edx_eax() {
        let mut registers = GeneralRegisters {
            rax: u64::MAX,
            rdx: u64::MAX << 32 | 7,
            ..Default::default()
        };
        let registers = registers.light();
        assert_eq!(registers.edx_eax(), 7 << 32 | 0xffff_ffff);
        registers.set_edx_eax(0x1234_5678_9abc_def0);
        assert_eq!((registers.rdx, registers.rax), (0x1234_5678, 0x9abc_def0));
    }
}
