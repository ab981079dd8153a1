//! LAR, LSL, VERR and VERW: what a selector in memory would give (SDM 2).

use super::alu::ZF;
use super::operand::Place;
use super::{Machine, Result, Step};
use crate::devices::Width;
use crate::vcpu::fault::Exception;
use crate::vcpu::segmentation::{self, Descriptor, Rights};
use iced_x86::{Instruction, Mnemonic};

/// What is asked of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    Rights,
    Limit,
    Readable,
    Writable,
}

impl Question {
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        Some(match instruction.mnemonic() {
            Mnemonic::Lar => Self::Rights,
            Mnemonic::Lsl => Self::Limit,
            Mnemonic::Verr => Self::Readable,
            Mnemonic::Verw => Self::Writable,
            _ => return None,
        })
    }

    /// Whether it has an answer for a descriptor of this kind.
    fn fits(self, rights: Rights, ia32e: bool) -> bool {
        const TSS_16: u32 = 1;
        const LDT: u32 = 2;
        const BUSY_TSS_16: u32 = 3;
        const CALL_GATE_16: u32 = 4;
        const TASK_GATE: u32 = 5;
        const TSS: u32 = 9;
        const BUSY_TSS: u32 = 11;
        const CALL_GATE: u32 = 12;

        let kind = rights.kind();
        let is_segment = rights.is_code() || rights.is_data();
        match self {
            Self::Readable => rights.is_readable(),
            Self::Writable => rights.is_writable(),
            Self::Rights | Self::Limit if is_segment => true,
            Self::Rights if matches!(kind, CALL_GATE_16 | TASK_GATE) => !ia32e,
            Self::Rights if kind == CALL_GATE => true,
            Self::Rights | Self::Limit => match kind {
                LDT | TSS | BUSY_TSS => true,
                TSS_16 | BUSY_TSS_16 => !ia32e,
                _ => false,
            },
        }
    }

    const fn answer(self, descriptor: Descriptor) -> u32 {
        match self {
            Self::Limit => descriptor.limit(),
            _ => (descriptor.0 >> 32) as u32 & 0x00ff_ff00,
        }
    }
}

impl<M: Machine> Step<'_, '_, M> {
    /// Answers in ZF, and in the register where the question has one.
    pub(super) fn question(&mut self, question: Question) -> Result<()> {
        if self.machine.addressing().has_paragraphs() {
            return Err(Exception::InvalidOpcode.into());
        }
        let with_register = matches!(question, Question::Rights | Question::Limit);
        let operand = u32::from(with_register);
        let from = if self.is_memory(operand) {
            Place::Memory(self.memory(Width::Word)?)
        } else {
            self.place(operand)?
        };
        let selector = self.read(from)? as u16;
        let descriptor = self.visible(question, selector)?;
        if let Some(descriptor) = descriptor {
            self.registers.rflags |= ZF;
            if with_register {
                let to = self.place(0)?;
                self.write(to, question.answer(descriptor).into())?;
            }
        } else {
            self.registers.rflags &= !ZF;
        }
        Ok(())
    }

    /// The descriptor of `selector`, where the question may be asked of it.
    fn visible(&mut self, question: Question, selector: u16) -> Result<Option<Descriptor>> {
        let Some(address) = segmentation::descriptor_address(self.machine, selector) else {
            return Ok(None);
        };
        let mut bytes = [0; 8];
        self.machine.load_system(address, &mut bytes)?;
        let descriptor = Descriptor(u64::from_le_bytes(bytes));
        let rights = descriptor.rights();
        let level = self.machine.cpl().max((selector & 3) as u8);
        let reaches = rights.is_conforming() || level <= rights.dpl();
        let fits = question.fits(rights, self.machine.is_ia32e());
        Ok((reaches && fits).then_some(descriptor))
    }
}
