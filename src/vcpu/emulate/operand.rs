//! Operands: where values come from and go to.

use super::{EmulateError, Intent, Machine, Mode, Result, Step};
use crate::arch::registers::GeneralRegisters;
use crate::devices::Width;
use crate::vcpu::fault::Exception;
use crate::vcpu::segmentation::{Addressing, Segment, SegmentRegister, is_canonical};
use iced_x86::{Instruction, OpKind, Register};

const RFLAGS_AC: u64 = 1 << 18;
const CR0_AM: u64 = 1 << 18;

/// A general register, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gpr {
    pub index: u8,
    pub width: Width,
    /// AH, CH, DH or BH.
    pub high: bool,
}

impl Gpr {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;

    /// The lowest part of a register.
    pub const fn low(index: u8, width: Width) -> Self {
        let high = false;
        Self { index, width, high }
    }

    pub fn new(register: Register) -> Option<Self> {
        let number = register.number() as u8;
        if register.is_gpr64() {
            Some(Self::low(number, Width::Qword))
        } else if register.is_gpr32() {
            Some(Self::low(number, Width::Dword))
        } else if register.is_gpr16() {
            Some(Self::low(number, Width::Word))
        } else if register.is_gpr8() {
            // Numbered AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, ...
            Some(Self {
                index: if number < 4 { number } else { number - 4 },
                width: Width::Byte,
                high: (4..8).contains(&number),
            })
        } else {
            None
        }
    }

    pub fn get(self, registers: &GeneralRegisters) -> u64 {
        let value = registers.get(self.index);
        (if self.high { value >> 8 } else { value }) & self.width.mask()
    }

    /// A 32-bit register's upper half becomes 0; narrower ones leave the rest of the
    /// register alone (SDM 1, 3.4.1.1).
    pub fn set(self, registers: &mut GeneralRegisters, value: u64) {
        let old = registers.get(self.index);
        let new = match self.width {
            Width::Qword => value,
            Width::Dword => value & Width::Dword.mask(),
            Width::Word => old & !0xffff | value & 0xffff,
            Width::Byte if self.high => old & !0xff00 | (value & 0xff) << 8,
            Width::Byte => old & !0xff | value & 0xff,
        };
        registers.set(self.index, new);
    }
}

/// An operand: where its value comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Register(Gpr),
    Memory(Memory),
    Immediate(u64),
}

/// An operand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    pub segment: Segment,
    pub offset: u64,
    pub width: Width,
}

/// The width of an address: of the registers that it is made of.
pub(super) fn address_width(instruction: &Instruction) -> Result<Width> {
    let base = instruction.memory_base();
    let register = if base == Register::None {
        instruction.memory_index()
    } else {
        base
    };
    let bytes = match register {
        Register::None => u64::from(instruction.memory_displ_size()),
        Register::RIP => 8,
        Register::EIP => 4,
        register => register.size() as u64,
    };
    match Width::from_bytes(bytes) {
        Some(Width::Byte) | None => Err(EmulateError::Unsupported),
        Some(width) => Ok(width),
    }
}

pub(super) fn segment(register: Register) -> Result<Segment> {
    Ok(match register {
        Register::ES => Segment::Es,
        Register::CS => Segment::Cs,
        Register::SS => Segment::Ss,
        Register::DS => Segment::Ds,
        Register::FS => Segment::Fs,
        Register::GS => Segment::Gs,
        _ => return Err(EmulateError::Unsupported),
    })
}

pub(super) fn sign_extend(value: u64, width: Width) -> u64 {
    let unused = 64 - 8 * width.bytes();
    ((value << unused) as i64 >> unused) as u64
}

impl<M: Machine> Step<'_, '_, M> {
    pub(super) fn get(&self, gpr: Gpr) -> u64 {
        gpr.get(self.registers.general)
    }

    pub(super) fn set(&mut self, gpr: Gpr, value: u64) {
        gpr.set(self.registers.general, value);
    }

    /// A register of the instruction as an address has it.
    fn component(&self, register: Register) -> Result<u64> {
        if register == Register::None {
            return Ok(0);
        }
        let gpr = Gpr::new(register).ok_or(EmulateError::Unsupported)?;
        Ok(self.get(gpr))
    }

    /// The effective address of the operand with a ModR/M byte, and its segment.
    pub(super) fn address(&self) -> Result<(Segment, u64)> {
        let instruction = self.instruction;
        let width = address_width(instruction)?;
        let displacement = instruction.memory_displacement64();
        let offset = if instruction.is_ip_rel_memory_operand() {
            displacement
        } else {
            let base = self.component(instruction.memory_base())?;
            let index = self.component(instruction.memory_index())?;
            let scale = u64::from(instruction.memory_index_scale());
            displacement
                .wrapping_add(base)
                .wrapping_add(index.wrapping_mul(scale))
        };
        let segment = segment(instruction.memory_segment())?;
        Ok((segment, offset & width.mask()))
    }

    /// The linear address of an operand of `bytes` bytes.
    pub(super) fn linear(
        &self,
        segment: Segment,
        offset: u64,
        bytes: u64,
        write: bool,
    ) -> Result<u64, Exception> {
        let addressing = self.machine.addressing();
        let based = matches!(segment, Segment::Fs | Segment::Gs);
        let register = if addressing == Addressing::Long && !based {
            SegmentRegister::null(0)
        } else {
            self.machine.segment(segment)
        };
        let linear = register.linear(segment, addressing, offset, bytes, write)?;
        let aligned = !bytes.is_power_of_two() || linear & (bytes - 1) == 0;
        if !aligned
            && self.registers.rflags & RFLAGS_AC != 0
            && self.machine.cr0() & CR0_AM != 0
            && self.machine.cpl() == 3
        {
            return Err(Exception::AlignmentCheck);
        }
        Ok(linear)
    }

    /// Reads `bytes.len()` bytes at an offset of a segment.
    pub(super) fn load(&mut self, segment: Segment, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let linear = self.linear(segment, offset, bytes.len() as u64, false)?;
        Ok(self.machine.load(linear, bytes, Intent::Read)?)
    }

    /// Writes there.
    pub(super) fn store(&mut self, segment: Segment, offset: u64, bytes: &[u8]) -> Result<()> {
        let linear = self.linear(segment, offset, bytes.len() as u64, true)?;
        Ok(self.machine.store(linear, bytes)?)
    }

    fn load_operand(&mut self, memory: Memory, intent: Intent) -> Result<u64> {
        let Memory {
            segment,
            offset,
            width,
        } = memory;
        let write = intent == Intent::Modify;
        let linear = self.linear(segment, offset, width.bytes(), write)?;
        let mut bytes = [0; 8];
        let part = bytes.get_mut(..width.bytes() as usize).unwrap_or_default();
        self.machine.load(linear, part, intent)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// What operand number `operand` is.
    pub(super) fn place(&self, operand: u32) -> Result<Place> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => Gpr::new(self.instruction.op_register(operand))
                .map(Place::Register)
                .ok_or(EmulateError::Unsupported),
            OpKind::Memory => {
                let bytes = self.instruction.memory_size().size() as u64;
                let width = Width::from_bytes(bytes).ok_or(EmulateError::Unsupported)?;
                self.memory(width).map(Place::Memory)
            }
            _ => self
                .instruction
                .try_immediate(operand)
                .map(Place::Immediate)
                .map_err(|_| EmulateError::Unsupported),
        }
    }

    /// The operand in memory, `width` wide.
    pub(super) fn memory(&self, width: Width) -> Result<Memory> {
        let (segment, offset) = self.address()?;
        Ok(Memory {
            segment,
            offset,
            width,
        })
    }

    pub(super) fn read(&mut self, place: Place) -> Result<u64> {
        self.read_for(place, Intent::Read)
    }

    pub(super) fn read_for(&mut self, place: Place, intent: Intent) -> Result<u64> {
        match place {
            Place::Register(gpr) => Ok(self.get(gpr)),
            Place::Memory(memory) => self.load_operand(memory, intent),
            Place::Immediate(value) => Ok(value),
        }
    }

    /// Writes as wide as the place is.
    pub(super) fn write(&mut self, place: Place, value: u64) -> Result<()> {
        match place {
            Place::Register(gpr) => self.set(gpr, value),
            Place::Memory(memory) => {
                let bytes = value.to_le_bytes();
                let part = bytes
                    .get(..memory.width.bytes() as usize)
                    .unwrap_or_default();
                self.store(memory.segment, memory.offset, part)?;
            }
            Place::Immediate(_) => return Err(EmulateError::Unsupported),
        }
        Ok(())
    }

    /// The width of an operand; an immediate's is the other one's.
    pub(super) fn width(place: Place, other: Place) -> Width {
        match (place, other) {
            (Place::Register(gpr), _) | (Place::Immediate(_), Place::Register(gpr)) => gpr.width,
            (Place::Memory(memory), _) | (Place::Immediate(_), Place::Memory(memory)) => {
                memory.width
            }
            (Place::Immediate(_), Place::Immediate(_)) => Width::Qword,
        }
    }

    /// Has the instruction end in a jump to `target`, if that is in the code segment.
    pub(super) fn jump(&mut self, target: u64) -> Result<()> {
        let inside = match self.mode {
            Mode::Bits64 => is_canonical(target),
            Mode::Bits32 | Mode::Bits16 => target <= self.machine.segment(Segment::Cs).limit.into(),
        };
        if !inside {
            return Err(Exception::GeneralProtection.into());
        }
        self.next = target;
        Ok(())
    }
}
