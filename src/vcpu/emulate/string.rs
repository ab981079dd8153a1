//! MOVS, STOS, LODS, CMPS and SCAS, with their repeat prefixes; INS and OUTS of the one port that
//! the guest accesses without an exit.

use super::alu::{Binary, DF, ZF};
use super::operand::{Gpr, Memory, Place, segment};
use super::{EmulateError, Machine, Progress, Result, Step};
use crate::devices::{Width, pc};
use crate::vcpu::segmentation::Segment;
use iced_x86::{Code, OpKind};

const RFLAGS_TF: u64 = 1 << 8;

/// A string instruction with one or two memory operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum String {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    Input,
    Output,
}

impl String {
    pub fn of(code: Code) -> Option<(Self, Width)> {
        // By code, since the mnemonics MOVSD and CMPSD are SSE's too.
        Some(match code {
            Code::Movsb_m8_m8 => (Self::Move, Width::Byte),
            Code::Movsw_m16_m16 => (Self::Move, Width::Word),
            Code::Movsd_m32_m32 => (Self::Move, Width::Dword),
            Code::Movsq_m64_m64 => (Self::Move, Width::Qword),
            Code::Stosb_m8_AL => (Self::Store, Width::Byte),
            Code::Stosw_m16_AX => (Self::Store, Width::Word),
            Code::Stosd_m32_EAX => (Self::Store, Width::Dword),
            Code::Stosq_m64_RAX => (Self::Store, Width::Qword),
            Code::Lodsb_AL_m8 => (Self::Load, Width::Byte),
            Code::Lodsw_AX_m16 => (Self::Load, Width::Word),
            Code::Lodsd_EAX_m32 => (Self::Load, Width::Dword),
            Code::Lodsq_RAX_m64 => (Self::Load, Width::Qword),
            Code::Cmpsb_m8_m8 => (Self::Compare, Width::Byte),
            Code::Cmpsw_m16_m16 => (Self::Compare, Width::Word),
            Code::Cmpsd_m32_m32 => (Self::Compare, Width::Dword),
            Code::Cmpsq_m64_m64 => (Self::Compare, Width::Qword),
            Code::Scasb_AL_m8 => (Self::Scan, Width::Byte),
            Code::Scasw_AX_m16 => (Self::Scan, Width::Word),
            Code::Scasd_EAX_m32 => (Self::Scan, Width::Dword),
            Code::Scasq_RAX_m64 => (Self::Scan, Width::Qword),
            Code::Insb_m8_DX => (Self::Input, Width::Byte),
            Code::Outsb_DX_m8 => (Self::Output, Width::Byte),
            _ => return None,
        })
    }

    fn has_source(self) -> bool {
        matches!(self, Self::Move | Self::Load | Self::Compare | Self::Output)
    }

    fn has_destination(self) -> bool {
        !matches!(self, Self::Load | Self::Output)
    }

    fn compares(self) -> bool {
        matches!(self, Self::Compare | Self::Scan)
    }
}

impl<M: Machine> Step<'_, '_, M> {
    pub(super) fn string(
        &mut self,
        string: String,
        width: Width,
        iterations: u32,
    ) -> Result<Progress> {
        let instruction = self.instruction;
        // REPNE acts as REP does, but on CMPS and SCAS.
        let until_equal = instruction.has_repne_prefix();
        let address = self.string_address_width();
        let count = Gpr::low(Gpr::RCX, address);
        if !until_equal && !instruction.has_rep_prefix() {
            self.iterate(string, width, address)?;
            self.registers.rip = self.next;
            return Ok(Progress::Done);
        }
        // A debugger sees each iteration.
        let iterations = if self.registers.rflags & RFLAGS_TF != 0 {
            1
        } else {
            iterations
        };
        for _ in 0..iterations {
            let left = self.get(count);
            if left == 0 {
                break;
            }
            self.iterate(string, width, address)?;
            self.set(count, left.wrapping_sub(1));
            let equal = self.registers.rflags & ZF != 0;
            if left == 1 || string.compares() && equal == until_equal {
                self.registers.rip = self.next;
                return Ok(Progress::Done);
            }
        }
        if self.get(count) == 0 {
            self.registers.rip = self.next;
            return Ok(Progress::Done);
        }
        Ok(Progress::Repeats)
    }

    /// One iteration: all of it, or nothing.
    fn iterate(&mut self, string: String, width: Width, address: Width) -> Result<()> {
        let (from, to) = (Gpr::low(Gpr::RSI, address), Gpr::low(Gpr::RDI, address));
        let source = if string.has_source() {
            Place::Memory(Memory {
                segment: segment(self.instruction.memory_segment())?,
                offset: self.get(from),
                width,
            })
        } else {
            Place::Register(Gpr::low(Gpr::RAX, width))
        };
        let destination = if string.has_destination() {
            Place::Memory(Memory {
                segment: Segment::Es,
                offset: self.get(to),
                width,
            })
        } else {
            Place::Register(Gpr::low(Gpr::RAX, width))
        };
        let value = if string == String::Input {
            self.input(destination)?
        } else {
            self.read(source)?
        };
        if string.compares() {
            let other = self.read(destination)?;
            let rflags = self.registers.rflags;
            (_, self.registers.rflags) = Binary::Cmp.compute(value, other, width, rflags);
        } else if string == String::Output {
            self.check_port()?;
            self.machine.set_post_code(value as u8);
        } else {
            self.write(destination, value)?;
        }
        let step = if self.registers.rflags & DF != 0 {
            width.bytes().wrapping_neg()
        } else {
            width.bytes()
        };
        if string.has_source() {
            self.set(from, self.get(from).wrapping_add(step));
        }
        if string.has_destination() {
            self.set(to, self.get(to).wrapping_add(step));
        }
        Ok(())
    }

    /// Reads the port, when it is known that the destination can be written.
    fn input(&mut self, destination: Place) -> Result<u64> {
        self.check_port()?;
        if let Place::Memory(memory) = destination {
            let bytes = memory.width.bytes();
            let linear = self.linear(memory.segment, memory.offset, bytes, true)?;
            self.machine.check_store(linear, bytes as usize)?;
        }
        Ok(self.machine.post_code().into())
    }

    /// Another port's INS or OUTS is another one than has exited here.
    fn check_port(&self) -> Result<()> {
        if self.get(Gpr::low(Gpr::RDX, Width::Word)) == pc::POST_CODE.into() {
            Ok(())
        } else {
            Err(EmulateError::Unsupported)
        }
    }

    /// The width of the index registers and the count.
    fn string_address_width(&self) -> Width {
        let kinds = [self.instruction.op0_kind(), self.instruction.op1_kind()];
        for kind in kinds {
            match kind {
                OpKind::MemorySegSI | OpKind::MemoryESDI => return Width::Word,
                OpKind::MemorySegESI | OpKind::MemoryESEDI => return Width::Dword,
                _ => {}
            }
        }
        Width::Qword
    }
}
