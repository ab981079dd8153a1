//! Plain moves between a device and a register, or from an immediate: what nearly
//! every access to a device is, worked out when the instruction is decoded.

use super::operand::{Gpr, segment};
use crate::arch::registers::GeneralRegisters;
use crate::devices::Width;
use crate::vcpu::segmentation::Segment;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// MOV between a device and a general register other than RSP, MOVZX from a device, or
/// MOV of an immediate to one, where one register tells whether the address is aligned: an
/// aligned access does not go on in another page, which may be something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The device is written.
    pub store: bool,
    /// Bytes that the device is accessed with.
    pub width: Width,
    /// The instruction's length.
    pub length: u8,
    register: u8,
    /// 8 for AH, CH, DH and BH, 0 for the others.
    shift: u8,
    /// Bits of the register that are not moved: a load leaves them alone.
    kept: u64,
    immediate: u64,
    pub alignment: Alignment,
}

/// On what it depends whether an operand is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// The register that tells.
    register: u8,
    /// Its bits that must be 0.
    mask: u8,
    /// The operand's segment, whose base must be aligned too; in 64-bit code it is.
    pub segment: Segment,
}

impl Alignment {
    /// That of the operand of `width`; `None` where it depends on more.
    pub(super) fn of(instruction: &Instruction, width: Width) -> Option<Self> {
        let mask = width.bytes() - 1;
        if matches!(instruction.segment_prefix(), Register::FS | Register::GS)
            || instruction.memory_displacement64() & mask != 0
        {
            return None;
        }
        let segment = segment(instruction.memory_segment()).ok()?;
        let always = Self {
            register: 0,
            mask: 0,
            segment,
        };
        let scale = u64::from(instruction.memory_index_scale());
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let register = match (base, index) {
            (Register::None | Register::RIP | Register::EIP, Register::None) => {
                return Some(always);
            }
            (Register::None, _) if scale & mask == 0 => return Some(always),
            (Register::None, index) if scale == 1 => index,
            (base, Register::None) => base,
            (base, _) if scale & mask == 0 => base,
            _ => return None,
        };
        let gpr = Gpr::new(register)?;
        (gpr.index != Gpr::RSP).then_some(Self {
            register: gpr.index,
            mask: mask as u8,
            segment,
        })
    }

    /// Whether the operand is where one access reaches all of it, if its segment's base is aligned.
    #[inline(always)]
    pub fn is_given(self, registers: &GeneralRegisters) -> bool {
        registers.get(self.register) as u8 & self.mask == 0
    }
}

impl Move {
    /// The move that `instruction` is, if it is one.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        use OpKind::{Memory, Register};
        if !matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx) {
            return None;
        }
        let width = || Width::from_bytes(instruction.memory_size().size() as u64);
        let (store, width, gpr, kept, immediate) =
            match (instruction.op0_kind(), instruction.op1_kind()) {
                (Register, Memory) => {
                    let to = Gpr::new(instruction.op0_register())?;
                    // A 32-bit result clears the upper half (SDM 1, 3.4.1.1).
                    let kept = match to.width {
                        Width::Byte if to.high => !0xff00,
                        Width::Byte | Width::Word => !to.width.mask(),
                        Width::Dword | Width::Qword => 0,
                    };
                    (false, width()?, to, kept, 0)
                }
                (Memory, Register) => {
                    let from = Gpr::new(instruction.op1_register())?;
                    let width = width()?;
                    let moved = width.mask() << if from.high { 8 } else { 0 };
                    (true, width, from, !moved, 0)
                }
                (Memory, _) => {
                    let width = width()?;
                    let value = instruction.try_immediate(1).ok()?;
                    let none = Gpr::low(Gpr::RAX, Width::Qword);
                    (true, width, none, u64::MAX, value & width.mask())
                }
                _ => return None,
            };
        let alignment = Alignment::of(instruction, width)?;
        (gpr.index != Gpr::RSP).then_some(Self {
            store,
            width,
            length: instruction.len() as u8,
            register: gpr.index,
            shift: if gpr.high { 8 } else { 0 },
            kept,
            immediate,
            alignment,
        })
    }

    /// What a store writes, in its width.
    #[inline(always)]
    pub fn stored(&self, registers: &GeneralRegisters) -> u64 {
        let value = registers.get(self.register) & !self.kept;
        value >> self.shift | self.immediate
    }

    /// Ends a load: `value`, which the device has returned in this width, goes to the register.
    #[inline(always)]
    pub fn load(&self, registers: &mut GeneralRegisters, value: u64) {
        let kept = registers.get(self.register) & self.kept;
        registers.set(self.register, kept | value << self.shift);
    }
}
