//! LAR, LSL, VERR and VERW: what a selector in memory would give (SDM 2).

use super::alu::ZF;
use super::{Machine, Result, Step};
use crate::vcpu::fault::Exception;
use crate::vcpu::segmentation::{self, Descriptor, Rights, kind};
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
        use kind::{BUSY_TSS, BUSY_TSS_16, CALL_GATE, CALL_GATE_16, LDT, TASK_GATE, TSS, TSS_16};
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
        let from = self.word_place(with_register.into())?;
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
        let Some((_, descriptor)) = segmentation::find_descriptor(self.machine, selector)? else {
            return Ok(None);
        };
        let rights = descriptor.rights();
        let level = self.machine.cpl().max((selector & 3) as u8);
        let reaches = rights.is_conforming() || level <= rights.dpl();
        let fits = question.fits(rights, self.machine.is_ia32e());
        Ok((reaches && fits).then_some(descriptor))
    }
}
