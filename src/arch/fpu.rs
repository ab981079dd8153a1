//! Instructions of x87, and those that save and restore the state of x87, SSE and AVX, executed
//! on a copy of their operand in memory: the registers are the guest's all the time, so that they
//! do to them what they would have done there.

use core::arch::{asm, naked_asm};

/// A copy of an operand. As large as a page: no area of XSAVE that is shown to guests is larger.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Image(pub [u8; 4096]);

impl Image {
    pub const EMPTY: Self = Self([0; 4096]);
}

/// An instruction with an operand in memory, by its place in [`fpu_instructions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FpuInstruction(u16);

impl FpuInstruction {
    pub const LDMXCSR: Self = Self(128);
    pub const STMXCSR: Self = Self(129);
    const FXSAVE: u16 = 130;
    const FXRSTOR: u16 = 132;
    const XSAVE: u16 = 134;
    const XSAVEC: u16 = 136;
    const XRSTOR: u16 = 138;
    const COUNT: usize = 140;

    /// The x87 instruction with the lower three bits of the first byte and the middle three of
    /// ModR/M; `short` with an operand-size prefix.
    pub const fn x87(first: u8, register: u8, short: bool) -> Self {
        Self(short as u16 * 64 + (first & 7) as u16 * 8 + (register & 7) as u16)
    }

    /// FXSAVE, with `wide` pointers FXSAVE64.
    pub const fn fxsave(wide: bool) -> Self {
        Self(Self::FXSAVE + wide as u16)
    }

    pub const fn fxrstor(wide: bool) -> Self {
        Self(Self::FXRSTOR + wide as u16)
    }

    pub const fn xsave(wide: bool) -> Self {
        Self(Self::XSAVE + wide as u16)
    }

    pub const fn xsavec(wide: bool) -> Self {
        Self(Self::XSAVEC + wide as u16)
    }

    pub const fn xrstor(wide: bool) -> Self {
        Self(Self::XRSTOR + wide as u16)
    }

    /// Executes it on `image`, with `components` in EDX:EAX; false where the CPU answers #GP, or
    /// #UD where it has no such instruction, and nothing is done.
    ///
    /// # Safety
    /// The guest has x87 and what XCR0 governs switched on, and where the instruction waits for
    /// exceptions of x87 none is pending. Exceptions must be handled already.
    pub unsafe fn execute(self, image: &mut Image, components: u64) -> bool {
        let entry = fpu_instructions as *const () as usize + usize::from(self.0) * ENTRY;
        let done: u32;
        // SAFETY: the caller's word, and the image has room for what each of them writes.
        // Compiled code of the hypervisor uses none of the registers that it changes.
        unsafe {
            asm!(
                "call {}",
                in(reg) entry,
                in("rdi") image,
                in("eax") components as u32,
                in("edx") (components >> 32) as u32,
                inout("ecx") 1 => done,
            );
        }
        done != 0
    }
}

/// Bytes of one instruction and its RET.
const ENTRY: usize = 8;

/// All of [`FpuInstruction`] in the order of their numbers, each on the operand at RDI.
#[unsafe(naked)]
unsafe extern "C" fn fpu_instructions() {
    naked_asm!(
        // Operand sizes, first bytes, and ModR/M bytes.
        ".irp short, 0, 1",
        ".irp first, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
        ".irp modrm, 0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f",
        "2:",
        ".if \\short",
        ".byte 0x66",
        ".endif",
        ".byte \\first, \\modrm",
        "ret",
        ".skip {entry} - (. - 2b), 0xcc",
        ".endr",
        ".endr",
        ".endr",
        ".irp instruction, ldmxcsr, stmxcsr, fxsave, fxsave64, fxrstor, fxrstor64, xsave, \
            xsave64, xsavec, xsavec64, xrstor, xrstor64",
        "2:",
        "\\instruction [rdi]",
        "ret",
        ".skip {entry} - (. - 2b), 0xcc",
        ".endr",
        entry = const ENTRY,
    )
}

/// Where [`FpuInstruction::execute`] goes on behind an exception.
#[unsafe(naked)]
unsafe extern "C" fn refused() {
    naked_asm!("xor ecx, ecx", "ret")
}

/// Where execution resumes after an exception at `rip`, when that is one of these instructions.
pub fn recovery(rip: u64) -> Option<u64> {
    let offset = rip.wrapping_sub(fpu_instructions as *const () as u64);
    (offset < (ENTRY * FpuInstruction::COUNT) as u64).then_some(refused as *const () as u64)
}
