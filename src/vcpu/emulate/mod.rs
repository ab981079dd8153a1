//! Emulation of the instructions with which a guest touches a device in memory.
//!
//! The CPU says that an access failed and where, not what was to be read or
//! written: the instruction does. It is decoded and executed here from the beginning, with
//! every access to memory by way of a [`Machine`], which knows what is behind an address:
//! an operand may be a device in part, or lie in two pages, and an instruction may
//! have several. Registers and flags are left as the CPU would leave them; where
//! the instruction faults, as they were.
//!
//! Covered are the integer instructions that have a memory operand, on the stack too, x87,
//! the moves of MMX, SSE and AVX, and what saves and restores their state. Vector arithmetic,
//! EVEX, call gates and task switches are not. Nearly all accesses to devices are plain moves, which have a
//! form of their own ([`Move`]), or [`Arithmetic`].
//!
//! | module | what it has |
//! | --- | --- |
//! | [`operand`] | registers, effective addresses, immediates |
//! | [`alu`], [`shift`], [`bits`], [`multiply`] | arithmetic and its flags, on numbers alone |
//! | [`integer`] | instructions that use it |
//! | [`fpu`], [`vector`] | x87, MMX, SSE and AVX |
//! | [`stack`], [`returns`], [`string`], [`system`] | the others |

mod alu;
mod arithmetic;
mod bits;
mod fpu;
mod integer;
mod moves;
mod multiply;
mod operand;
mod returns;
mod selectors;
mod shift;
mod stack;
mod string;
mod system;
mod vector;

#[cfg(test)]
mod tests;

use super::fault::Exception;
use super::segmentation::{Addressing, DescriptorTables, Segment, SegmentRegister, TableRegister};
use crate::arch::fpu::{FpuInstruction, Image};
use crate::arch::registers::GeneralRegisters;
pub use arithmetic::Arithmetic;
use fpu::Escape;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
pub use moves::{Alignment, Move};

/// The code segment's size: CS.L and CS.D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Bits16,
    Bits32,
    Bits64,
}

/// Why nothing was emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmulateError {
    /// The bytes are the beginning of an instruction.
    Incomplete,
    /// An instruction that is not emulated.
    Unsupported,
    /// What the guest is to be given instead. Bytes that are no instruction are #UD.
    Fault(Exception),
}

impl From<Exception> for EmulateError {
    fn from(exception: Exception) -> Self {
        Self::Fault(exception)
    }
}

type Result<T, E = EmulateError> = core::result::Result<T, E>;

/// What an operand in memory is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    Read,
    /// It is written afterwards, and must be writable.
    Modify,
}

/// A register that system instructions load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Gdt,
    Idt,
}

/// A system segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemSegment {
    Ldtr,
    Tr,
}

/// An MMX register, or the lower 16 or 32 bytes of a vector register, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorRegister {
    Mmx(u8),
    Xmm(u8),
    Ymm(u8),
}

/// What an instruction is executed on, beside general registers, RIP and RFLAGS.
pub trait Machine: DescriptorTables {
    /// Reads memory at a linear address with the guest's own rights. 1 to 4096 bytes.
    ///
    /// # Errors
    /// #PF.
    fn load(&mut self, linear: u64, bytes: &mut [u8], intent: Intent) -> Result<(), Exception>;

    /// Writes memory, all or nothing.
    ///
    /// # Errors
    /// #PF.
    fn store(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception>;

    /// Whether `bytes` bytes can be written there.
    ///
    /// # Errors
    /// #PF.
    fn check_store(&mut self, linear: u64, bytes: usize) -> Result<(), Exception>;

    fn addressing(&self) -> Addressing;
    /// EFER.LMA.
    fn is_ia32e(&self) -> bool;
    fn cpl(&self) -> u8;
    fn cr0(&self) -> u64;
    fn cr4(&self) -> u64;
    /// 0 where XSAVE is switched off.
    fn xcr0(&self) -> u64;
    fn segment(&self, segment: Segment) -> SegmentRegister;
    fn set_segment(&mut self, segment: Segment, register: SegmentRegister);
    fn system_segment(&self, segment: SystemSegment) -> SegmentRegister;
    fn set_system_segment(&mut self, segment: SystemSegment, register: SegmentRegister);
    fn table(&self, table: Table) -> TableRegister;
    fn set_table(&mut self, table: Table, value: TableRegister);

    /// LMSW.
    ///
    /// # Errors
    /// As of a MOV to CR0.
    fn load_msw(&mut self, value: u16) -> Result<(), Exception>;

    /// IRET ends the blocking of NMIs.
    fn unblock_nmis(&mut self);

    /// SS has been loaded: interrupts are held back behind the next instruction.
    fn hold_interrupts(&mut self);

    /// Reads the host's port [`pc::POST_CODE`](crate::devices::pc::POST_CODE), which is the guest's.
    fn post_code(&mut self) -> u8;

    /// Writes it.
    fn set_post_code(&mut self, code: u8);

    /// Reads as many bytes of a vector register as it has. The guest has it switched on.
    fn vector(&mut self, register: VectorRegister, bytes: &mut [u8]);

    /// Writes it. With `vex` the part above the bytes becomes 0; without, it stays.
    fn set_vector(&mut self, register: VectorRegister, bytes: &[u8], vex: bool);

    /// Whether the next instruction of x87 that waits raises #MF.
    fn x87_exception_is_pending(&self) -> bool;

    /// Executes an instruction on `image`, with `components` in EDX:EAX; false is #GP. The guest
    /// has it switched on, and it does not raise #MF.
    fn execute(&mut self, what: FpuInstruction, image: &mut Image, components: u64) -> bool;

    /// Bytes of an area of XSAVE with these components.
    fn xsave_size(&self, components: u64, compacted: bool) -> usize;
}

/// The registers that an instruction is executed on.
#[derive(Debug)]
pub struct Registers<'a> {
    /// With RSP.
    pub general: &'a mut GeneralRegisters,
    pub rip: u64,
    pub rflags: u64,
}

/// How far an instruction has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Done,
    /// It has a repeat prefix and is not done: RIP is still its own.
    Repeats,
}

/// An instruction, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    instruction: Instruction,
    mode: Mode,
    escape: Option<Escape>,
}

/// Makes the decoder's tables. It would do so at the first instruction, which then takes
/// five million of the CPU's: too long for an exit.
pub fn prepare() {
    // What it is does not matter.
    let _ = Decoded::new(&[], Mode::Bits64, 0);
}

/// Whether an instruction has a prefix that the decoder does not know: AVX-512.
fn has_evex(bytes: &[u8], mode: Mode) -> bool {
    const EVEX: u8 = 0x62;
    const SEGMENTS_AND_ADDRESS_SIZE: [u8; 7] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x67];
    let mut others = bytes
        .iter()
        .filter(|byte| !SEGMENTS_AND_ADDRESS_SIZE.contains(byte));
    // Elsewhere it may be BOUND, which the decoder knows.
    others.next() == Some(&EVEX) && (mode == Mode::Bits64 || others.next() >= Some(&0xc0))
}

impl Decoded {
    /// Decodes the instruction at `rip` that starts `bytes` (up to 15 of them).
    ///
    /// # Errors
    /// [`EmulateError::Incomplete`], or #UD.
    pub fn new(bytes: &[u8], mode: Mode, rip: u64) -> Result<Self> {
        let bitness = match mode {
            Mode::Bits16 => 16,
            Mode::Bits32 => 32,
            Mode::Bits64 => 64,
        };
        let mut decoder = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => Ok(Self {
                instruction,
                mode,
                escape: Escape::of(bytes, mode),
            }),
            DecoderError::NoMoreBytes if bytes.len() < 15 => Err(EmulateError::Incomplete),
            _ if has_evex(bytes, mode) => Err(EmulateError::Unsupported),
            _ => Err(Exception::InvalidOpcode.into()),
        }
    }

    /// The plain move that it is, if it is one.
    pub fn plain_move(&self) -> Option<Move> {
        Move::of(&self.instruction)
    }

    /// The arithmetic on a device that it is, if it is that.
    pub fn arithmetic(&self) -> Option<Arithmetic> {
        Arithmetic::of(&self.instruction)
    }

    /// Whether it was decoded for this address.
    pub const fn is_at(&self, rip: u64) -> bool {
        self.instruction.ip() == rip
    }

    /// Whether RF is what it loads.
    pub fn loads_resume_flag(&self) -> bool {
        use iced_x86::Mnemonic::{Iret, Iretd, Iretq};
        matches!(self.instruction.mnemonic(), Iret | Iretd | Iretq)
    }

    /// Whether it is to be atomic.
    pub fn is_locked(&self) -> bool {
        let exchange = self.instruction.mnemonic() == iced_x86::Mnemonic::Xchg;
        self.instruction.has_lock_prefix() || exchange
    }

    /// Emulates it. A string instruction with a repeat prefix does some iterations,
    /// `iterations` at the most.
    ///
    /// # Errors
    /// A fault, or that it is not emulated; registers are as they were then, but for those
    /// that complete iterations have changed.
    pub fn emulate(
        &self,
        registers: &mut Registers<'_>,
        machine: &mut impl Machine,
        iterations: u32,
    ) -> Result<Progress> {
        let next = registers.rip.wrapping_add(self.instruction.len() as u64);
        let mut step = Step {
            instruction: &self.instruction,
            mode: self.mode,
            escape: self.escape,
            next: match self.mode {
                Mode::Bits64 => next,
                Mode::Bits32 | Mode::Bits16 => next & 0xffff_ffff,
            },
            registers,
            machine,
        };
        step.execute(iterations)
    }
}

/// One instruction on its way.
struct Step<'a, 'b, M> {
    instruction: &'a Instruction,
    mode: Mode,
    escape: Option<Escape>,
    /// Where the next instruction is.
    next: u64,
    registers: &'a mut Registers<'b>,
    machine: &'a mut M,
}

impl<M: Machine> Step<'_, '_, M> {
    fn execute(&mut self, iterations: u32) -> Result<Progress> {
        if let Some((string, width)) = string::String::of(self.instruction.code()) {
            return self.string(string, width, iterations);
        }
        if let Some(transfer) = vector::Transfer::of(self.instruction) {
            self.transfer(transfer)?;
        } else if let Some(escape) = self.escape {
            self.x87(escape)?;
        } else if let Some(state) = fpu::State::of(self.instruction) {
            self.state(state)?;
        } else if let Some(question) = selectors::Question::of(self.instruction) {
            self.question(question)?;
        } else if !self.stack()? && !self.far_return()? && !self.system()? {
            self.integer()?;
        }
        self.registers.rip = self.next;
        Ok(Progress::Done)
    }
}
