//! x87, and what saves and restores its state and that of SSE and AVX. The CPU executes these
//! instructions itself, on a copy of their operand in memory: the registers that they use are the
//! guest's, and what is in memory and what is said of it is all that is emulated.

use super::operand::Gpr;
use super::{EmulateError, Intent, Machine, Mode, Result, Step};
use crate::arch::fpu::{FpuInstruction, Image};
use crate::devices::Width;
use crate::vcpu::fault::Exception;
use crate::vcpu::segmentation::Segment;
use core::ops::Range;
use iced_x86::{Instruction, Mnemonic};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const XCR0_SSE_AVX: u64 = 6;

/// Fields of an FXSAVE image (SDM 1, table 10-2), in bytes; the pointers as FXSAVE64 has them.
const CONTROL_WORD: usize = 0;
const STATUS_WORD: usize = 2;
const OPCODE: Range<usize> = 6..8;
const INSTRUCTION_POINTER: Range<usize> = 8..16;
const OPERAND_POINTER: Range<usize> = 16..24;
/// XMM8 to XMM15, which other code than 64-bit code has not.
const UPPER_XMM: Range<usize> = 288..416;
const FXSAVE_BYTES: usize = 512;
/// The XSAVE header behind it.
const XSTATE_BV: Range<usize> = 512..520;
const XCOMP_BV: Range<usize> = 520..528;
const HEADER_END: usize = 576;
const COMPACTED: u64 = 1 << 63;

/// What an instruction needs to be switched on (SDM 3, 2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    X87,
    Mmx,
    Sse,
    Avx,
    Xsave,
}

/// An x87 instruction with an operand in memory: its first byte, of which the lower three bits
/// count, and ModR/M.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Escape {
    first: u8,
    modrm: u8,
}

/// An instruction that saves or restores state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ldmxcsr,
    Stmxcsr,
    Fxsave,
    Fxrstor,
    Xsave,
    Xsavec,
    Xrstor,
    /// The one that takes no other than the compacted format.
    Xrstors,
}

/// Which of the forms of each first byte, by the middle bits of ModR/M.
type Forms = [u8; 8];

impl Escape {
    const STORES: Forms = [0, 0xcc, 0, 0x8e, 0, 0xce, 0, 0xce];
    /// FLDENV, FLDCW, FNSTENV, FNSTCW, FRSTOR, FNSAVE, FNSTSW: those that leave the pointers to the
    /// last instruction alone, or load them.
    const CONTROL: Forms = [0, 0xf0, 0, 0, 0, 0xd0, 0, 0];
    const NOT_WAITING: Forms = [0, 0xc0, 0, 0, 0, 0xc0, 0, 0];

    /// What `bytes` begins with, an instruction, if it is one.
    pub fn of(bytes: &[u8], mode: Mode) -> Option<Self> {
        let is_prefix = |byte: &u8| {
            matches!(
                byte,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
            ) || mode == Mode::Bits64 && matches!(byte, 0x40..=0x4f)
        };
        let mut opcode = bytes.iter().copied().skip_while(|byte| is_prefix(byte));
        let (first, modrm) = (opcode.next()?, opcode.next()?);
        (first & 0xf8 == 0xd8 && modrm < 0xc0).then_some(Self { first, modrm })
    }

    fn register(self) -> u8 {
        self.modrm >> 3 & 7
    }

    fn is(self, forms: &Forms) -> bool {
        let of_first = forms.get(usize::from(self.first & 7)).unwrap_or(&0);
        of_first >> self.register() & 1 != 0
    }

    /// What x87 keeps of it.
    fn opcode(self) -> [u8; 2] {
        [self.modrm, self.first & 7]
    }
}

impl State {
    /// What `instruction` is, if it is one of these. XSAVEOPT and XSAVES may leave out what has not
    /// changed since, but need not; a supervisor state that XSAVES would save there is not.
    pub fn of(instruction: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        Some(match instruction.mnemonic() {
            M::Ldmxcsr | M::Vldmxcsr => Self::Ldmxcsr,
            M::Stmxcsr | M::Vstmxcsr => Self::Stmxcsr,
            M::Fxsave | M::Fxsave64 => Self::Fxsave,
            M::Fxrstor | M::Fxrstor64 => Self::Fxrstor,
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => Self::Xsave,
            M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64 => Self::Xsavec,
            M::Xrstor | M::Xrstor64 => Self::Xrstor,
            M::Xrstors | M::Xrstors64 => Self::Xrstors,
            _ => return None,
        })
    }
}

/// Whether it has REX.W, and so 64-bit pointers.
fn is_wide(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fxsave64
            | M::Fxrstor64
            | M::Xsave64
            | M::Xsaveopt64
            | M::Xsavec64
            | M::Xsaves64
            | M::Xrstor64
            | M::Xrstors64
    )
}

impl Image {
    fn part(&self, range: Range<usize>) -> &[u8] {
        self.0.get(range).unwrap_or_default()
    }

    fn part_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.0.get_mut(range).unwrap_or_default()
    }

    fn word(&self, at: usize) -> u16 {
        self.number(at..at + 2) as u16
    }

    fn number(&self, range: Range<usize>) -> u64 {
        let bytes = self.part(range).iter().rev();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn set(&mut self, range: Range<usize>, value: u64) {
        for (to, from) in self.part_mut(range).iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }
}

impl<M: Machine> Step<'_, '_, M> {
    /// Whether the guest may use it, as the instruction would have found out.
    pub(super) fn check_unit(&self, unit: Unit) -> Result<(), Exception> {
        let (cr0, cr4) = (self.machine.cr0(), self.machine.cr4());
        let is_there = match unit {
            Unit::X87 if cr0 & CR0_EM != 0 => return Err(Exception::DeviceNotAvailable),
            Unit::X87 => true,
            Unit::Mmx => cr0 & CR0_EM == 0,
            Unit::Sse => cr0 & CR0_EM == 0 && cr4 & CR4_OSFXSR != 0,
            Unit::Avx => self.machine.xcr0() & XCR0_SSE_AVX == XCR0_SSE_AVX,
            Unit::Xsave => cr4 & CR4_OSXSAVE != 0,
        };
        if !is_there {
            return Err(Exception::InvalidOpcode);
        }
        if cr0 & CR0_TS != 0 {
            return Err(Exception::DeviceNotAvailable);
        }
        if unit == Unit::Mmx {
            self.check_waiting()?;
        }
        Ok(())
    }

    fn check_waiting(&self) -> Result<(), Exception> {
        if self.machine.x87_exception_is_pending() {
            return Err(Exception::FloatingPoint);
        }
        Ok(())
    }

    #[inline(never)]
    pub(super) fn x87(&mut self, escape: Escape) -> Result<()> {
        self.check_unit(Unit::X87)?;
        if !escape.is(&Escape::NOT_WAITING) {
            self.check_waiting()?;
        }
        let (store, control) = (escape.is(&Escape::STORES), escape.is(&Escape::CONTROL));
        let bytes = self.instruction.memory_size().size();
        // Environments and states have 14 and 94 bytes with 16-bit operands, 28 and 108 with others.
        let environment = control && bytes > 2;
        if environment && self.machine.addressing().has_paragraphs() {
            // In a format of their own.
            return Err(EmulateError::Unsupported);
        }
        let (segment, offset) = self.address()?;
        let linear = self.linear(segment, offset, bytes as u64, store)?;
        let mut image = Image::EMPTY;
        if store {
            self.machine.check_store(linear, bytes)?;
        } else {
            let operand = image.part_mut(0..bytes);
            self.machine.load(linear, operand, Intent::Read)?;
        }
        let short = environment && matches!(bytes, 14 | 94);
        let instruction = FpuInstruction::x87(escape.first, escape.register(), short);
        let stores = if control {
            self.machine.execute(instruction, &mut image, 0);
            store
        } else {
            let status = self.compute(escape, instruction, &mut image, (segment, offset));
            store && !status
        };
        if stores {
            self.machine.store(linear, image.part(0..bytes))?;
        }
        Ok(())
    }

    /// Has the CPU execute an instruction that computes, and x87 point at the guest's instruction
    /// and operand. True where it has raised an exception that is not masked, before it
    /// stores anything (SDM 1, 8.5).
    fn compute(
        &mut self,
        escape: Escape,
        instruction: FpuInstruction,
        operand: &mut Image,
        (segment, offset): (Segment, u64),
    ) -> bool {
        /// Invalid operation to underflow: but for a rounded result, which is stored.
        const WITHOUT_RESULT: u16 = 0x1f;
        let wide = self.mode == Mode::Bits64;
        let (save, restore) = (FpuInstruction::fxsave(wide), FpuInstruction::fxrstor(wide));
        let (mut before, mut after) = (Image::EMPTY, Image::EMPTY);
        self.machine.execute(save, &mut before, 0);
        // Nothing that the CPU executes here has these, which tells whether it has kept others.
        after.clone_from(&before);
        for field in [INSTRUCTION_POINTER, OPERAND_POINTER, OPCODE] {
            after.set(field, 0);
        }
        self.machine.execute(restore, &mut after, 0);
        self.machine.execute(instruction, operand, 0);
        self.machine.execute(save, &mut after, 0);
        // Whether it keeps selectors, too, is up to the CPU.
        let has_selectors = !wide && after.word(INSTRUCTION_POINTER.start + 4) != 0;
        let pointer = |machine: &M, segment: Segment, offset: u64| {
            let selector = u64::from(machine.segment(segment).selector);
            match wide {
                true => offset,
                false if has_selectors => selector << 32 | offset & 0xffff_ffff,
                false => offset & 0xffff_ffff,
            }
        };
        let instruction = pointer(self.machine, Segment::Cs, self.registers.rip);
        let data = pointer(self.machine, segment, offset);
        let opcode = u16::from_le_bytes(escape.opcode());
        for (field, own) in [
            (INSTRUCTION_POINTER, instruction),
            (OPERAND_POINTER, data),
            (OPCODE, opcode.into()),
        ] {
            let kept = after.number(field.clone()) != 0;
            let old = before.number(field.clone());
            after.set(field, if kept { own } else { old });
        }
        self.machine.execute(restore, &mut after, 0);
        after.word(STATUS_WORD) & !after.word(CONTROL_WORD) & WITHOUT_RESULT != 0
    }

    #[inline(never)]
    pub(super) fn state(&mut self, state: State) -> Result<()> {
        match state {
            State::Ldmxcsr | State::Stmxcsr => self.control_word(state),
            State::Fxsave | State::Fxrstor => self.fxsave(state),
            State::Xsave | State::Xsavec | State::Xrstor | State::Xrstors => self.xsave(state),
        }
    }

    fn control_word(&mut self, state: State) -> Result<()> {
        let is_vex = matches!(
            self.instruction.mnemonic(),
            Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
        );
        self.check_unit(if is_vex { Unit::Avx } else { Unit::Sse })?;
        let store = state == State::Stmxcsr;
        let (segment, offset) = self.address()?;
        let linear = self.linear(segment, offset, 4, store)?;
        let mut image = Image::EMPTY;
        if store {
            self.machine.execute(FpuInstruction::STMXCSR, &mut image, 0);
            return Ok(self.machine.store(linear, image.part(0..4))?);
        }
        self.machine
            .load(linear, image.part_mut(0..4), Intent::Read)?;
        self.execute_or_fault(FpuInstruction::LDMXCSR, &mut image, 0)
    }

    fn execute_or_fault(
        &mut self,
        instruction: FpuInstruction,
        image: &mut Image,
        components: u64,
    ) -> Result<()> {
        if self.machine.execute(instruction, image, components) {
            Ok(())
        } else {
            Err(Exception::GeneralProtection.into())
        }
    }

    /// Where an operand of `bytes` bytes is that must be aligned to `alignment`.
    fn aligned(&self, bytes: usize, alignment: u64, write: bool) -> Result<u64> {
        let (segment, offset) = self.address()?;
        let linear = self.linear(segment, offset, bytes as u64, write)?;
        if linear & (alignment - 1) != 0 {
            return Err(Exception::GeneralProtection.into());
        }
        Ok(linear)
    }

    /// FXSAVE, FXRSTOR. What they leave alone, in memory or of the registers, is in the image
    /// before.
    fn fxsave(&mut self, state: State) -> Result<()> {
        self.check_unit(Unit::X87)?;
        let (store, wide) = (state == State::Fxsave, is_wide(self.instruction));
        let linear = self.aligned(FXSAVE_BYTES, 16, store)?;
        let all = 0..FXSAVE_BYTES;
        let intent = if store { Intent::Modify } else { Intent::Read };
        let (mut memory, mut registers) = (Image::EMPTY, Image::EMPTY);
        self.machine
            .load(linear, memory.part_mut(all.clone()), intent)?;
        if store {
            registers.clone_from(&memory);
        }
        self.machine
            .execute(FpuInstruction::fxsave(wide), &mut registers, 0);
        let (from, to) = if store {
            (&memory, &mut registers)
        } else {
            (&registers, &mut memory)
        };
        if self.mode != Mode::Bits64 {
            to.part_mut(UPPER_XMM).copy_from_slice(from.part(UPPER_XMM));
        }
        if store {
            return Ok(self.machine.store(linear, registers.part(all))?);
        }
        self.execute_or_fault(FpuInstruction::fxrstor(wide), &mut memory, 0)
    }

    /// XSAVE and its kind, in 64-bit code alone: elsewhere they leave half of the registers alone.
    fn xsave(&mut self, state: State) -> Result<()> {
        const ALIGNMENT: u64 = 64;
        self.check_unit(Unit::Xsave)?;
        let supervisor = matches!(
            self.instruction.mnemonic(),
            Mnemonic::Xsaves | Mnemonic::Xsaves64 | Mnemonic::Xrstors | Mnemonic::Xrstors64
        );
        if supervisor {
            self.check_privileged()?;
        }
        if self.mode != Mode::Bits64 {
            return Err(EmulateError::Unsupported);
        }
        let wide = is_wide(self.instruction);
        let low = self.get(Gpr::low(Gpr::RAX, Width::Dword));
        let high = self.get(Gpr::low(Gpr::RDX, Width::Dword));
        let (components, xcr0) = (high << 32 | low, self.machine.xcr0());
        let mut image = Image::EMPTY;
        if matches!(state, State::Xsave | State::Xsavec) {
            let compacted = state == State::Xsavec;
            let bytes = self.machine.xsave_size(components & xcr0, compacted);
            if bytes > image.0.len() {
                return Err(EmulateError::Unsupported);
            }
            let linear = self.aligned(bytes, ALIGNMENT, true)?;
            // What is not written stays as it is.
            let old = image.part_mut(0..bytes);
            self.machine.load(linear, old, Intent::Modify)?;
            let instruction = if compacted {
                FpuInstruction::xsavec(wide)
            } else {
                FpuInstruction::xsave(wide)
            };
            self.execute_or_fault(instruction, &mut image, components)?;
            return Ok(self.machine.store(linear, image.part(0..bytes))?);
        }
        let linear = self.aligned(HEADER_END, ALIGNMENT, false)?;
        let header = image.part_mut(0..HEADER_END);
        self.machine.load(linear, header, Intent::Read)?;
        let (present, format) = (image.number(XSTATE_BV), image.number(XCOMP_BV));
        let compacted = format & COMPACTED != 0;
        if state == State::Xrstors && !compacted {
            return Err(Exception::GeneralProtection.into());
        }
        let there = if compacted {
            format
        } else {
            present & components
        };
        let bytes = self.machine.xsave_size(there & xcr0, compacted);
        if bytes > image.0.len() {
            return Err(EmulateError::Unsupported);
        }
        let linear = self.aligned(bytes, ALIGNMENT, false)?;
        if bytes > HEADER_END {
            let rest = image.part_mut(HEADER_END..bytes);
            let at = linear.wrapping_add(HEADER_END as u64);
            self.machine.load(at, rest, Intent::Read)?;
        }
        self.execute_or_fault(FpuInstruction::xrstor(wide), &mut image, components)
    }
}
