//! Moves between memory and the registers of MMX, SSE and AVX.

use super::fpu::Unit;
use super::{EmulateError, Intent, Machine, Result, Step, VectorRegister};
use crate::vcpu::fault::Exception;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Which bytes of the register are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The lowest ones; what is above becomes 0 in a load.
    All,
    /// The lower or the upper 8 of 16; the others stay.
    Low,
    High,
}

/// A move between memory and a vector register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    register: VectorRegister,
    store: bool,
    part: Part,
    /// Bytes in memory: 4, 8, 16 or 32.
    bytes: usize,
    /// The address must be a multiple of that.
    aligned: bool,
    vex: bool,
}

fn vector_register(register: Register) -> Option<VectorRegister> {
    let number = register.number() as u8;
    if register.is_mm() {
        Some(VectorRegister::Mmx(number))
    } else if register.is_xmm() {
        Some(VectorRegister::Xmm(number))
    } else if register.is_ymm() {
        Some(VectorRegister::Ymm(number))
    } else {
        None
    }
}

impl VectorRegister {
    fn bytes(self) -> usize {
        match self {
            Self::Mmx(_) => 8,
            Self::Xmm(_) => 16,
            Self::Ymm(_) => 32,
        }
    }
}

impl Transfer {
    /// What `instruction` moves, if it is one of these.
    pub fn of(instruction: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let (vex, aligned, part) = match instruction.mnemonic() {
            M::Movaps
            | M::Movapd
            | M::Movdqa
            | M::Movntps
            | M::Movntpd
            | M::Movntdq
            | M::Movntdqa => (false, true, Part::All),
            M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa => (true, true, Part::All),
            M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Movss
            | M::Movsd
            | M::Movd
            | M::Movq
            | M::Movntq => (false, false, Part::All),
            M::Vmovups
            | M::Vmovupd
            | M::Vmovdqu
            | M::Vlddqu
            | M::Vmovss
            | M::Vmovsd
            | M::Vmovd
            | M::Vmovq => (true, false, Part::All),
            M::Movlps | M::Movlpd => (false, false, Part::Low),
            M::Vmovlps | M::Vmovlpd => (true, false, Part::Low),
            M::Movhps | M::Movhpd => (false, false, Part::High),
            M::Vmovhps | M::Vmovhpd => (true, false, Part::High),
            _ => return None,
        };
        let store = instruction.op0_kind() == OpKind::Memory;
        let in_memory = store
            || (0..instruction.op_count())
                .any(|operand| instruction.op_kind(operand) == OpKind::Memory);
        let register = if store {
            instruction.op1_register()
        } else {
            instruction.op0_register()
        };
        let register = vector_register(register)?;
        let bytes = instruction.memory_size().size();
        (in_memory && matches!(bytes, 4 | 8 | 16 | 32) && bytes <= register.bytes()).then_some(
            Self {
                register,
                store,
                part,
                bytes,
                aligned,
                vex,
            },
        )
    }

    fn start(self) -> usize {
        if self.part == Part::High { 8 } else { 0 }
    }
}

impl<M: Machine> Step<'_, '_, M> {
    pub(super) fn transfer(&mut self, transfer: Transfer) -> Result<()> {
        let Transfer {
            register,
            store,
            part,
            bytes,
            aligned,
            vex,
        } = transfer;
        self.check_unit(match register {
            VectorRegister::Mmx(_) => Unit::Mmx,
            VectorRegister::Xmm(_) | VectorRegister::Ymm(_) if vex => Unit::Avx,
            VectorRegister::Xmm(_) | VectorRegister::Ymm(_) => Unit::Sse,
        })?;
        let (segment, offset) = self.address()?;
        let linear = self.linear(segment, offset, bytes as u64, store)?;
        if aligned && linear & (bytes as u64 - 1) != 0 {
            return Err(Exception::GeneralProtection.into());
        }
        let mut image = [0; 32];
        let moved = transfer.start()..transfer.start() + bytes;
        let all = ..register.bytes();
        if store {
            self.machine
                .vector(register, image.get_mut(all).unwrap_or_default());
            let bytes = image.get(moved).unwrap_or_default();
            return Ok(self.machine.store(linear, bytes)?);
        }
        if part != Part::All {
            let kept = if vex {
                vector_register(self.instruction.op1_register()).ok_or(EmulateError::Unsupported)?
            } else {
                register
            };
            self.machine
                .vector(kept, image.get_mut(all).unwrap_or_default());
        }
        let target = image.get_mut(moved).unwrap_or_default();
        self.machine.load(linear, target, Intent::Read)?;
        let all = image.get(all).unwrap_or_default();
        self.machine.set_vector(register, all, vex);
        Ok(())
    }
}
