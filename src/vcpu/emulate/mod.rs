//! Emulation of the instructions with which a guest touches a device in memory.
//!
//! The CPU says that an access failed and where, not what was to be read or
//! written: the instruction does. One instruction is decoded, its one access
//! to the device goes to a [`Bus`], and registers and flags are left as the CPU
//! would leave them. Covered are the integer instructions that compilers and
//! kernels use on device registers; anything else is an error before anything
//! has changed. Nearly all are plain moves, which have a form of their own ([`Move`]).

mod alu;
mod moves;

#[cfg(test)]
mod tests;

use crate::arch::registers::GeneralRegisters;
use crate::devices::Width;
use alu::{Binary, Unary};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
pub use moves::Move;

/// The code segment's size: CS.L and CS.D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Bits16,
    Bits32,
    Bits64,
}

/// What the access that failed was going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// A segment of a memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// Why nothing was emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmulateError {
    /// The bytes are no instruction, or not all of one.
    Undecodable,
    /// An instruction that is not emulated.
    Unsupported,
    /// The instruction's other memory operand is not accessible. The bus knows
    /// why, and what the guest is to be given for it.
    Memory,
}

/// Where an instruction's accesses go.
pub trait Bus {
    /// Reads the device at the address that failed.
    fn read(&mut self, width: Width) -> u64;

    /// Writes to the device at the address that failed.
    fn write(&mut self, width: Width, value: u64);

    /// Reads the instruction's other memory operand.
    fn load(&mut self, segment: Segment, offset: u64, width: Width) -> Result<u64, EmulateError>;

    /// Writes the instruction's other memory operand.
    fn store(
        &mut self,
        segment: Segment,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Result<(), EmulateError>;
}

/// What was emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes to add to the instruction pointer: the instruction's length, or 0
    /// when it has a repeat prefix and is not done.
    pub advance: u8,
}

/// An instruction, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    instruction: Instruction,
    mode: Mode,
}

/// Makes the decoder's tables. It would do so at the first instruction, which then takes
/// five million of the CPU's: too long for an exit.
pub fn prepare() {
    // What it is does not matter.
    let _ = Decoded::new(&[], Mode::Bits64);
}

impl Decoded {
    /// Decodes the instruction that starts `bytes` (up to 15 of them).
    ///
    /// # Errors
    /// [`EmulateError::Undecodable`].
    pub fn new(bytes: &[u8], mode: Mode) -> Result<Self, EmulateError> {
        let bitness = match mode {
            Mode::Bits16 => 16,
            Mode::Bits32 => 32,
            Mode::Bits64 => 64,
        };
        let instruction = Decoder::new(bitness, bytes, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return Err(EmulateError::Undecodable);
        }
        Ok(Self { instruction, mode })
    }

    /// The plain move that it is, if it is one.
    pub fn plain_move(&self) -> Option<Move> {
        Move::of(&self.instruction)
    }

    /// Emulates it: its access of kind `access` failed.
    ///
    /// `registers` holds the guest's stack pointer too when the instruction may
    /// use the stack. A string instruction with a repeat prefix does one iteration.
    ///
    /// # Errors
    /// When it is not emulated, or its other operand is not there.
    pub fn emulate(
        &self,
        access: Access,
        registers: &mut GeneralRegisters,
        rflags: &mut u64,
        bus: &mut impl Bus,
    ) -> Result<Outcome, EmulateError> {
        let instruction = self.instruction;
        let mut step = Step {
            instruction,
            mode: self.mode,
            access,
            registers,
            rflags,
            bus,
        };
        let done = step.execute()?;
        Ok(Outcome {
            advance: if done { instruction.len() as u8 } else { 0 },
        })
    }
}

/// A general register, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gpr {
    index: u8,
    width: Width,
    /// AH, CH, DH or BH.
    high: bool,
}

impl Gpr {
    fn new(register: Register) -> Option<Self> {
        let number = register.number() as u8;
        let whole = |width| Gpr {
            index: number,
            width,
            high: false,
        };
        if register.is_gpr64() {
            Some(whole(Width::Qword))
        } else if register.is_gpr32() {
            Some(whole(Width::Dword))
        } else if register.is_gpr16() {
            Some(whole(Width::Word))
        } else if register.is_gpr8() {
            // Numbered AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, ...
            let high = (4..8).contains(&number);
            Some(Gpr {
                index: if number < 4 { number } else { number - 4 },
                width: Width::Byte,
                high,
            })
        } else {
            None
        }
    }
}

/// An operand: where its value comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Register(Gpr),
    /// The device, at the address that failed.
    Device(Width),
    Immediate(u64),
}

/// What operand number `operand` is.
fn place(instruction: &Instruction, operand: u32) -> Result<Place, EmulateError> {
    match instruction.op_kind(operand) {
        OpKind::Register => Gpr::new(instruction.op_register(operand))
            .map(Place::Register)
            .ok_or(EmulateError::Unsupported),
        OpKind::Memory => Width::from_bytes(instruction.memory_size().size() as u64)
            .map(Place::Device)
            .ok_or(EmulateError::Unsupported),
        _ => instruction
            .try_immediate(operand)
            .map(Place::Immediate)
            .map_err(|_| EmulateError::Unsupported),
    }
}

/// The first two operands, of which exactly one is the device.
fn places(instruction: &Instruction) -> Result<(Place, Place), EmulateError> {
    let places = (place(instruction, 0)?, place(instruction, 1)?);
    match places {
        (Place::Device(_), Place::Device(_)) => Err(EmulateError::Unsupported),
        (Place::Device(_), _) | (_, Place::Device(_)) => Ok(places),
        _ => Err(EmulateError::Unsupported),
    }
}

/// One instruction on its way.
struct Step<'a, B> {
    instruction: Instruction,
    mode: Mode,
    access: Access,
    registers: &'a mut GeneralRegisters,
    rflags: &'a mut u64,
    bus: &'a mut B,
}

impl<B: Bus> Step<'_, B> {
    /// Whether the instruction is done; a repeated one may not be.
    fn execute(&mut self) -> Result<bool, EmulateError> {
        if let Some((string, width)) = String::of(self.instruction.code()) {
            return self.string(string, width);
        }
        match self.instruction.mnemonic() {
            Mnemonic::Mov => self.copy(|value, _| value),
            Mnemonic::Movzx => self.copy(|value, _| value),
            Mnemonic::Movsx | Mnemonic::Movsxd => self.copy(sign_extend),
            Mnemonic::Movbe => {
                self.copy(|value, from| value.swap_bytes() >> (64 - 8 * from.bytes()))
            }
            Mnemonic::Xchg => self.exchange(),
            Mnemonic::Add => self.binary(Binary::Add),
            Mnemonic::Adc => self.binary(Binary::Adc),
            Mnemonic::Sub => self.binary(Binary::Sub),
            Mnemonic::Sbb => self.binary(Binary::Sbb),
            Mnemonic::And => self.binary(Binary::And),
            Mnemonic::Or => self.binary(Binary::Or),
            Mnemonic::Xor => self.binary(Binary::Xor),
            Mnemonic::Cmp => self.binary(Binary::Cmp),
            Mnemonic::Test => self.binary(Binary::Test),
            Mnemonic::Inc => self.unary(Unary::Inc),
            Mnemonic::Dec => self.unary(Unary::Dec),
            Mnemonic::Neg => self.unary(Unary::Neg),
            Mnemonic::Not => self.unary(Unary::Not),
            Mnemonic::Push => self.push(),
            Mnemonic::Pop => self.pop(),
            _ => Err(EmulateError::Unsupported),
        }?;
        Ok(true)
    }

    fn read(&mut self, place: Place) -> u64 {
        match place {
            Place::Register(gpr) => {
                let value = self.registers.get(gpr.index);
                (if gpr.high { value >> 8 } else { value }) & gpr.width.mask()
            }
            Place::Device(width) => self.bus.read(width) & width.mask(),
            Place::Immediate(value) => value,
        }
    }

    /// Writes as wide as the place is. A 32-bit register's upper half becomes 0;
    /// narrower ones leave the rest of the register alone.
    fn write(&mut self, place: Place, value: u64) {
        match place {
            Place::Register(gpr) => {
                let old = self.registers.get(gpr.index);
                let new = match gpr.width {
                    Width::Qword => value,
                    Width::Dword => value & Width::Dword.mask(),
                    Width::Word => old & !0xffff | value & 0xffff,
                    Width::Byte if gpr.high => old & !0xff00 | (value & 0xff) << 8,
                    Width::Byte => old & !0xff | value & 0xff,
                };
                self.registers.set(gpr.index, new);
            }
            Place::Device(width) => self.bus.write(width, value & width.mask()),
            Place::Immediate(_) => {}
        }
    }

    fn width(&self, place: Place, other: Place) -> Width {
        match (place, other) {
            (Place::Register(gpr), _) | (Place::Immediate(_), Place::Register(gpr)) => gpr.width,
            (Place::Device(width), _) | (Place::Immediate(_), Place::Device(width)) => width,
            (Place::Immediate(_), Place::Immediate(_)) => Width::Qword,
        }
    }

    /// The second operand to the first, through `change`, which is told the second's width.
    fn copy(&mut self, change: impl Fn(u64, Width) -> u64) -> Result<(), EmulateError> {
        let (to, from) = places(&self.instruction)?;
        let value = self.read(from);
        let value = change(value, self.width(from, to));
        self.write(to, value);
        Ok(())
    }

    fn exchange(&mut self) -> Result<(), EmulateError> {
        let (first, second) = places(&self.instruction)?;
        let (a, b) = (self.read(first), self.read(second));
        self.write(first, b);
        self.write(second, a);
        Ok(())
    }

    fn binary(&mut self, operation: Binary) -> Result<(), EmulateError> {
        let (to, from) = places(&self.instruction)?;
        let width = self.width(to, from);
        let (a, b) = (self.read(to), self.read(from));
        let (value, flags) = operation.compute(a, b, width, *self.rflags);
        if operation.stores() {
            self.write(to, value);
        }
        *self.rflags = flags;
        Ok(())
    }

    fn unary(&mut self, operation: Unary) -> Result<(), EmulateError> {
        let place @ Place::Device(width) = place(&self.instruction, 0)? else {
            return Err(EmulateError::Unsupported);
        };
        let value = self.read(place);
        let (value, flags) = operation.compute(value, width, *self.rflags);
        self.write(place, value);
        *self.rflags = flags;
        Ok(())
    }

    /// The stack's width in 64-bit mode; elsewhere SS decides, which is not known here.
    fn stack_operand(&self, access: Access) -> Result<Width, EmulateError> {
        match place(&self.instruction, 0)? {
            Place::Device(width) if self.access == access && self.mode == Mode::Bits64 => Ok(width),
            _ => Err(EmulateError::Unsupported),
        }
    }

    /// PUSH from the device.
    fn push(&mut self) -> Result<(), EmulateError> {
        let width = self.stack_operand(Access::Read)?;
        let value = self.bus.read(width);
        let top = self.registers.rsp.wrapping_sub(width.bytes());
        self.bus.store(Segment::Ss, top, width, value)?;
        self.registers.rsp = top;
        Ok(())
    }

    /// POP to the device.
    fn pop(&mut self) -> Result<(), EmulateError> {
        let width = self.stack_operand(Access::Write)?;
        let top = self.registers.rsp;
        let value = self.bus.load(Segment::Ss, top, width)?;
        self.bus.write(width, value);
        self.registers.rsp = top.wrapping_add(width.bytes());
        Ok(())
    }

    /// One iteration of MOVS, STOS or LODS.
    fn string(&mut self, string: String, width: Width) -> Result<bool, EmulateError> {
        // The prefix REPNE acts on these as REP does.
        let repeats = self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix();
        let address = self.address_width();
        if repeats && self.registers.rcx & address.mask() == 0 {
            return Ok(true);
        }
        let (source, destination) = (
            self.registers.rsi & address.mask(),
            self.registers.rdi & address.mask(),
        );
        let accumulator = Place::Register(Gpr {
            index: 0,
            width,
            high: false,
        });
        match (string, self.access) {
            (String::Store, Access::Write) => {
                let value = self.read(accumulator);
                self.bus.write(width, value);
            }
            (String::Load, Access::Read) => {
                let value = self.bus.read(width);
                self.write(accumulator, value);
            }
            (String::Move, Access::Read) => {
                let value = self.bus.read(width) & width.mask();
                self.bus.store(Segment::Es, destination, width, value)?;
            }
            (String::Move, Access::Write) => {
                let segment = segment(self.instruction.memory_segment())?;
                let value = self.bus.load(segment, source, width)?;
                self.bus.write(width, value & width.mask());
            }
            (String::Store, Access::Read) | (String::Load, Access::Write) => {
                return Err(EmulateError::Unsupported);
            }
        }
        let backward = *self.rflags & alu::DF != 0;
        if string != String::Store {
            self.step_index(6, width, address, backward);
        }
        if string != String::Load {
            self.step_index(7, width, address, backward);
        }
        if !repeats {
            return Ok(true);
        }
        let left = self.registers.rcx.wrapping_sub(1);
        self.set_address_register(1, left, address);
        Ok(left & address.mask() == 0)
    }

    fn step_index(&mut self, index: u8, width: Width, address: Width, backward: bool) {
        let old = self.registers.get(index);
        let new = if backward {
            old.wrapping_sub(width.bytes())
        } else {
            old.wrapping_add(width.bytes())
        };
        self.set_address_register(index, new, address);
    }

    fn set_address_register(&mut self, index: u8, value: u64, width: Width) {
        let high = false;
        self.write(Place::Register(Gpr { index, width, high }), value);
    }

    /// The width of the string's index registers and count.
    fn address_width(&self) -> Width {
        let kinds = [self.instruction.op_kind(0), self.instruction.op_kind(1)];
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

/// A string instruction with one or two memory operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum String {
    Move,
    Store,
    Load,
}

impl String {
    fn of(code: Code) -> Option<(Self, Width)> {
        // By code, since the mnemonic MOVSD is SSE's too.
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
            _ => return None,
        })
    }
}

fn segment(register: Register) -> Result<Segment, EmulateError> {
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

fn sign_extend(value: u64, width: Width) -> u64 {
    let unused = 64 - 8 * width.bytes();
    ((value << unused) as i64 >> unused) as u64
}
