//! Instructions that use the stack, and near jumps by way of memory.

use super::operand::{Gpr, Place, segment};
use super::{EmulateError, Machine, Result, Step};
use crate::devices::Width;
use crate::vcpu::fault::Exception;
use crate::vcpu::segmentation::{Addressing, Segment};
use iced_x86::{Code, Mnemonic, OpKind};

const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_TF_TO_OF: u64 = 0xf00;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_IOPL: u64 = 3 << 12;
pub(super) const RFLAGS_NT: u64 = 1 << 14;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_AC_ID: u64 = 1 << 18 | 1 << 21;
const RFLAGS_VIF_VIP: u64 = 3 << 19;
const STATUS: u64 = 0xd5;

/// The general registers in the order in which PUSHA pushes them.
const ALL: u8 = 8;

impl<M: Machine> Step<'_, '_, M> {
    /// Executes it if it is one of these.
    pub(super) fn stack(&mut self) -> Result<bool> {
        match self.instruction.mnemonic() {
            Mnemonic::Push => self.push_operand(),
            Mnemonic::Pop => self.pop_operand(),
            Mnemonic::Call => self.call(),
            Mnemonic::Jmp => self.jump_indirect(),
            Mnemonic::Ret => self.ret(),
            Mnemonic::Enter => self.enter(),
            Mnemonic::Leave => self.leave(),
            Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => self.push_flags(),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => self.pop_flags(),
            Mnemonic::Pusha | Mnemonic::Pushad => self.push_all(),
            Mnemonic::Popa | Mnemonic::Popad => self.pop_all(),
            _ => return Ok(false),
        }?;
        Ok(true)
    }

    /// RSP, ESP or SP, as SS says.
    pub(super) fn pointer(&self, index: u8) -> Gpr {
        let width = if self.machine.addressing() == Addressing::Long {
            Width::Qword
        } else if self.machine.segment(Segment::Ss).rights.is_big() {
            Width::Dword
        } else {
            Width::Word
        };
        Gpr::low(index, width)
    }

    /// The width of what a stack instruction moves.
    fn operand_width(&self) -> Result<Width> {
        let bytes = self.instruction.stack_pointer_increment().unsigned_abs();
        Width::from_bytes(bytes.into()).ok_or(EmulateError::Unsupported)
    }

    /// Pushes; RSP is as before where that fails.
    fn push(&mut self, value: u64, width: Width) -> Result<()> {
        let pointer = self.pointer(Gpr::RSP);
        let top = self.get(pointer).wrapping_sub(width.bytes()) & pointer.width.mask();
        self.store_stack(top, value, width)?;
        self.set(pointer, top);
        Ok(())
    }

    fn store_stack(&mut self, at: u64, value: u64, width: Width) -> Result<()> {
        let bytes = value.to_le_bytes();
        let part = bytes.get(..width.bytes() as usize).unwrap_or_default();
        self.store(Segment::Ss, at, part)
    }

    pub(super) fn load_stack(&mut self, at: u64, width: Width) -> Result<u64> {
        let mut bytes = [0; 8];
        let part = bytes.get_mut(..width.bytes() as usize).unwrap_or_default();
        self.load(Segment::Ss, at, part)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// What is on the top of the stack, and where that is then.
    fn peek(&mut self, width: Width) -> Result<(u64, u64)> {
        let pointer = self.pointer(Gpr::RSP);
        let top = self.get(pointer);
        let value = self.load_stack(top, width)?;
        Ok((value, top.wrapping_add(width.bytes())))
    }

    fn push_operand(&mut self) -> Result<()> {
        let width = self.operand_width()?;
        let kind = self.instruction.op0_kind();
        let register = self.instruction.op0_register();
        let value = if kind == OpKind::Register && register.is_segment_register() {
            let selector = self.machine.segment(segment(register)?).selector;
            if width == Width::Dword {
                // The upper half is left as it is (SDM 2, PUSH).
                let pointer = self.pointer(Gpr::RSP);
                let top = self.get(pointer).wrapping_sub(4) & pointer.width.mask();
                self.store_stack(top, selector.into(), Width::Word)?;
                self.set(pointer, top);
                return Ok(());
            }
            selector.into()
        } else {
            let place = self.place(0)?;
            self.read(place)?
        };
        self.push(value, width)
    }

    fn pop_operand(&mut self) -> Result<()> {
        let width = self.operand_width()?;
        let kind = self.instruction.op0_kind();
        let register = self.instruction.op0_register();
        let pointer = self.pointer(Gpr::RSP);
        let (value, top) = self.peek(width)?;
        if kind == OpKind::Register && register.is_segment_register() {
            self.load_segment(segment(register)?, value as u16)?;
            self.set(pointer, top);
            return Ok(());
        }
        let old = self.registers.general.rsp;
        self.set(pointer, top);
        // An address made with RSP has it incremented, and POP RSP loads it.
        let done = self.place(0).and_then(|place| self.write(place, value));
        if done.is_err() {
            self.registers.general.rsp = old;
        }
        done
    }

    /// The target of a near branch, as wide as the operand.
    fn target(&mut self) -> Result<u64> {
        match self.instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                Ok(self.instruction.near_branch_target())
            }
            OpKind::Register | OpKind::Memory => {
                let place = self.place(0)?;
                self.read(place)
            }
            _ => Err(EmulateError::Unsupported),
        }
    }

    fn call(&mut self) -> Result<()> {
        if self.is_far() {
            return self.far_transfer(true);
        }
        let (target, back) = (self.target()?, self.next);
        self.jump(target)?;
        let width = self.operand_width()?;
        self.push(back, width)
    }

    fn jump_indirect(&mut self) -> Result<()> {
        if self.is_far() {
            return self.far_transfer(false);
        }
        let target = self.target()?;
        self.jump(target)
    }

    fn is_far(&self) -> bool {
        let instruction = self.instruction;
        instruction.is_call_far()
            || instruction.is_call_far_indirect()
            || instruction.is_jmp_far()
            || instruction.is_jmp_far_indirect()
    }

    fn ret(&mut self) -> Result<()> {
        let width = match self.instruction.code() {
            Code::Retnw | Code::Retnw_imm16 => Width::Word,
            Code::Retnd | Code::Retnd_imm16 => Width::Dword,
            _ => Width::Qword,
        };
        let (target, top) = self.peek(width)?;
        self.jump(target)?;
        self.set(self.pointer(Gpr::RSP), top.wrapping_add(self.released()));
        Ok(())
    }

    /// Bytes that a return drops from the stack, beside what it uses.
    pub(super) fn released(&self) -> u64 {
        if self.instruction.op_count() == 1 {
            self.instruction.immediate16().into()
        } else {
            0
        }
    }

    fn enter(&mut self) -> Result<()> {
        let width = match self.instruction.code() {
            Code::Enterw_imm16_imm8 => Width::Word,
            Code::Enterd_imm16_imm8 => Width::Dword,
            _ => Width::Qword,
        };
        let size = u64::from(self.instruction.immediate16());
        let level = self.instruction.immediate8_2nd() & 31;
        let (stack, frame) = (self.pointer(Gpr::RSP), self.pointer(Gpr::RBP));
        let mask = stack.width.mask();
        let mut top = self.get(stack).wrapping_sub(width.bytes()) & mask;
        self.store_stack(top, self.registers.general.rbp, width)?;
        let base = top;
        let mut outer = self.get(frame);
        for _ in 1..level {
            outer = outer.wrapping_sub(width.bytes()) & mask;
            let value = self.load_stack(outer, width)?;
            top = top.wrapping_sub(width.bytes()) & mask;
            self.store_stack(top, value, width)?;
        }
        if level > 0 {
            top = top.wrapping_sub(width.bytes()) & mask;
            self.store_stack(top, base, width)?;
        }
        top = top.wrapping_sub(size) & mask;
        // The new top must be writable, though nothing is written there.
        let linear = self.linear(Segment::Ss, top, width.bytes(), true)?;
        self.machine.check_store(linear, width.bytes() as usize)?;
        self.set(Gpr::low(Gpr::RBP, width), base);
        self.set(stack, top);
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        let width = match self.instruction.code() {
            Code::Leavew => Width::Word,
            Code::Leaved => Width::Dword,
            _ => Width::Qword,
        };
        let stack = self.pointer(Gpr::RSP);
        let base = self.get(self.pointer(Gpr::RBP));
        let value = self.load_stack(base, width)?;
        self.set(stack, base.wrapping_add(width.bytes()));
        self.set(Gpr::low(Gpr::RBP, width), value);
        Ok(())
    }

    /// Whether virtual-8086 mode forbids PUSHF, POPF and IRET.
    pub(super) fn check_flags_allowed(&self) -> Result<()> {
        let virtual_8086 = self.machine.addressing() == Addressing::Virtual8086;
        if virtual_8086 && self.registers.rflags & RFLAGS_IOPL != RFLAGS_IOPL {
            // With CR4.VME it would not fault, but that is nothing for a stack in a device.
            return Err(Exception::GeneralProtection.into());
        }
        Ok(())
    }

    fn push_flags(&mut self) -> Result<()> {
        self.check_flags_allowed()?;
        let width = self.operand_width()?;
        self.push(self.registers.rflags & !(RFLAGS_RF | RFLAGS_VM), width)
    }

    fn pop_flags(&mut self) -> Result<()> {
        self.check_flags_allowed()?;
        let width = self.operand_width()?;
        let (value, top) = self.peek(width)?;
        let old = self.registers.rflags;
        let changed = self.writable_flags(width);
        let cleared = if width == Width::Word || self.machine.addressing() == Addressing::Real {
            RFLAGS_RF
        } else {
            RFLAGS_RF | RFLAGS_VIF_VIP
        };
        self.set(self.pointer(Gpr::RSP), top);
        self.registers.rflags = old & !changed & !cleared | value & changed | RFLAGS_FIXED;
        Ok(())
    }

    /// Flags that POPF and IRET of this width change at the current privilege level.
    pub(super) fn writable_flags(&self, width: Width) -> u64 {
        let cpl = match self.machine.addressing() {
            Addressing::Real => 0,
            _ => u64::from(self.machine.cpl()),
        };
        let mut writable = STATUS | RFLAGS_TF_TO_OF & !RFLAGS_IF | RFLAGS_NT;
        if width != Width::Word {
            writable |= RFLAGS_AC_ID;
        }
        if cpl <= (self.registers.rflags & RFLAGS_IOPL) >> 12 {
            writable |= RFLAGS_IF;
        }
        if cpl == 0 {
            writable |= RFLAGS_IOPL;
        }
        writable
    }

    fn push_all(&mut self) -> Result<()> {
        let width = match self.instruction.mnemonic() {
            Mnemonic::Pusha => Width::Word,
            _ => Width::Dword,
        };
        let pointer = self.pointer(Gpr::RSP);
        let bytes = width.bytes() as usize;
        let mut image = [0; 32];
        // The last one, RDI, is on the top.
        for (index, part) in (0..ALL).rev().zip(image.chunks_exact_mut(bytes)) {
            let value = self.registers.general.get(index).to_le_bytes();
            part.copy_from_slice(value.get(..bytes).unwrap_or_default());
        }
        let size = u64::from(ALL) * width.bytes();
        let top = self.get(pointer).wrapping_sub(size) & pointer.width.mask();
        self.store(
            Segment::Ss,
            top,
            image.get(..size as usize).unwrap_or_default(),
        )?;
        self.set(pointer, top);
        Ok(())
    }

    fn pop_all(&mut self) -> Result<()> {
        let width = match self.instruction.mnemonic() {
            Mnemonic::Popa => Width::Word,
            _ => Width::Dword,
        };
        let pointer = self.pointer(Gpr::RSP);
        let bytes = width.bytes() as usize;
        let mut image = [0; 32];
        let size = u64::from(ALL) * width.bytes();
        let top = self.get(pointer);
        let part = image.get_mut(..size as usize).unwrap_or_default();
        self.load(Segment::Ss, top, part)?;
        for (index, part) in (0..ALL).rev().zip(image.chunks_exact(bytes)) {
            let mut value = [0; 8];
            value
                .get_mut(..bytes)
                .unwrap_or_default()
                .copy_from_slice(part);
            if index != Gpr::RSP {
                self.set(Gpr::low(index, width), u64::from_le_bytes(value));
            }
        }
        self.set(pointer, top.wrapping_add(size));
        Ok(())
    }

    /// Two values on the stack, the first one above: CALL of a far target.
    pub(super) fn push_pair(&mut self, first: u64, second: u64, width: Width) -> Result<()> {
        let pointer = self.pointer(Gpr::RSP);
        let mask = pointer.width.mask();
        let old = self.get(pointer);
        let upper = old.wrapping_sub(width.bytes()) & mask;
        let lower = upper.wrapping_sub(width.bytes()) & mask;
        self.store_stack(upper, first, width)?;
        self.store_stack(lower, second, width)?;
        self.set(pointer, lower);
        Ok(())
    }

    /// A place of an operand that must be in memory.
    pub(super) fn is_memory(&self, operand: u32) -> bool {
        self.instruction.op_count() > operand && self.instruction.op_kind(operand) == OpKind::Memory
    }

    /// Where a word of a system register goes: memory, or a register of any width.
    pub(super) fn word_place(&self, operand: u32) -> Result<Place> {
        if self.is_memory(operand) {
            self.memory(Width::Word).map(Place::Memory)
        } else {
            self.place(operand)
        }
    }
}
