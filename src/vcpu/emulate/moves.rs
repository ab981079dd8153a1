//! Plain moves between a device and a register, or from an immediate: what nearly
//! every access to a device is, worked out when the instruction is decoded.

use super::{Gpr, Place, places};
use crate::arch::registers::GeneralRegisters;
use crate::devices::Width;
use iced_x86::{Instruction, Mnemonic};

/// MOV between a device and a general register other than RSP, MOVZX from a device, or
/// MOV of an immediate to one.
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
}

impl Move {
    /// The move that `instruction` is, if it is one.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        if !matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx) {
            return None;
        }
        let none = Gpr {
            index: 0,
            width: Width::Qword,
            high: false,
        };
        let (store, width, gpr, kept, immediate) = match places(instruction).ok()? {
            (Place::Register(to), Place::Device(width)) => {
                // A 32-bit result clears the upper half (SDM 1, 3.4.1.1).
                let kept = match to.width {
                    Width::Byte if to.high => !0xff00,
                    Width::Byte | Width::Word => !to.width.mask(),
                    Width::Dword | Width::Qword => 0,
                };
                (false, width, to, kept, 0)
            }
            (Place::Device(width), Place::Register(from)) => {
                let moved = width.mask() << if from.high { 8 } else { 0 };
                (true, width, from, !moved, 0)
            }
            (Place::Device(width), Place::Immediate(value)) => {
                (true, width, none, u64::MAX, value & width.mask())
            }
            _ => return None,
        };
        const RSP: u8 = 4;
        (gpr.index != RSP).then_some(Self {
            store,
            width,
            length: instruction.len() as u8,
            register: gpr.index,
            shift: if gpr.high { 8 } else { 0 },
            kept,
            immediate,
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
