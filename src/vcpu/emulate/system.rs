//! Segment registers, descriptor-table registers, and jumps to other segments.

use super::operand::segment;
use super::{EmulateError, Intent, Machine, Mode, Result, Step, SystemSegment, Table};
use crate::devices::Width;
use crate::vcpu::fault::{Exception, SegmentFault};
use crate::vcpu::segmentation::{
    self, Addressing, Descriptor, Purpose, Rights, Segment, SegmentRegister, TableRegister, kind,
};
use iced_x86::{Mnemonic, OpKind};

/// Set in the type of a TSS.
const BUSY: u32 = 2;

impl<M: Machine> Step<'_, '_, M> {
    /// Executes it if it is one of these.
    pub(super) fn system(&mut self) -> Result<bool> {
        match self.instruction.mnemonic() {
            Mnemonic::Mov => return self.move_segment(),
            Mnemonic::Lds => self.load_far(Segment::Ds),
            Mnemonic::Les => self.load_far(Segment::Es),
            Mnemonic::Lfs => self.load_far(Segment::Fs),
            Mnemonic::Lgs => self.load_far(Segment::Gs),
            Mnemonic::Lss => self.load_far(Segment::Ss),
            Mnemonic::Lgdt => self.load_table(Table::Gdt),
            Mnemonic::Lidt => self.load_table(Table::Idt),
            Mnemonic::Sgdt => self.store_table(Table::Gdt),
            Mnemonic::Sidt => self.store_table(Table::Idt),
            Mnemonic::Lldt => self.load_system_segment(SystemSegment::Ldtr),
            Mnemonic::Ltr => self.load_system_segment(SystemSegment::Tr),
            Mnemonic::Sldt => self.store_system_segment(SystemSegment::Ldtr),
            Mnemonic::Str => self.store_system_segment(SystemSegment::Tr),
            Mnemonic::Smsw => self.store_msw(),
            Mnemonic::Lmsw => self.load_msw(),
            Mnemonic::Movdir64b => self.move_line(),
            _ => return Ok(false),
        }?;
        Ok(true)
    }

    /// Privileged instructions, where the code has become one since the CPU executed it.
    pub(super) fn check_privileged(&self) -> Result<()> {
        let level = match self.machine.addressing() {
            Addressing::Real => 0,
            _ => self.machine.cpl(),
        };
        if level == 0 {
            Ok(())
        } else {
            Err(Exception::GeneralProtection.into())
        }
    }

    /// MOV from or to a segment register.
    fn move_segment(&mut self) -> Result<bool> {
        let instruction = self.instruction;
        let register = |operand, kind| {
            let register = instruction.op_register(operand);
            (kind == OpKind::Register && register.is_segment_register()).then_some(register)
        };
        if let Some(register) = register(0, instruction.op0_kind()) {
            let from = self.word_place(1)?;
            let selector = self.read(from)? as u16;
            self.load_segment(segment(register)?, selector)?;
            return Ok(true);
        }
        let Some(register) = register(1, instruction.op1_kind()) else {
            return Ok(false);
        };
        let selector = self.machine.segment(segment(register)?).selector;
        let to = self.word_place(0)?;
        self.write(to, selector.into())?;
        Ok(true)
    }

    /// Loads a segment register other than CS.
    pub(super) fn load_segment(&mut self, segment: Segment, selector: u16) -> Result<()> {
        let register = self.segment_register(segment, selector)?;
        self.machine.set_segment(segment, register);
        if segment == Segment::Ss {
            self.machine.hold_interrupts();
        }
        Ok(())
    }

    fn segment_register(&mut self, segment: Segment, selector: u16) -> Result<SegmentRegister> {
        let addressing = self.machine.addressing();
        if segment == Segment::Cs {
            return Err(Exception::InvalidOpcode.into());
        }
        match addressing {
            Addressing::Virtual8086 | Addressing::Real => Ok(self.paragraph(segment, selector)),
            Addressing::Protected | Addressing::Long => {
                let long = addressing == Addressing::Long;
                let cpl = self.machine.cpl();
                let purpose = Purpose::Instruction;
                Ok(segmentation::load_data(
                    self.machine,
                    segment,
                    selector,
                    cpl,
                    long,
                    purpose,
                )?)
            }
        }
    }

    /// The width of the offset in a far pointer in memory, the offset and the selector.
    fn far_pointer(&mut self) -> Result<(Width, u64, u16)> {
        let bytes = self.instruction.memory_size().size();
        let width = bytes
            .checked_sub(2)
            .and_then(|bytes| Width::from_bytes(bytes as u64))
            .ok_or(EmulateError::Unsupported)?;
        let (segment, offset) = self.address()?;
        let mut image = [0; 10];
        let part = image.get_mut(..bytes).unwrap_or_default();
        self.load(segment, offset, part)?;
        let value = u128::from_le_bytes({
            let mut wide = [0; 16];
            wide[..10].copy_from_slice(&image);
            wide
        });
        let selector = (value >> (8 * width.bytes())) as u16;
        Ok((width, value as u64 & width.mask(), selector))
    }

    /// LDS and others.
    fn load_far(&mut self, segment: Segment) -> Result<()> {
        let (_, offset, selector) = self.far_pointer()?;
        let to = self.place(0)?;
        self.load_segment(segment, selector)?;
        self.write(to, offset)
    }

    /// A far JMP or CALL that stays at its privilege level.
    pub(super) fn far_transfer(&mut self, call: bool) -> Result<()> {
        let (width, target, selector) = match self.instruction.op0_kind() {
            OpKind::Memory => self.far_pointer()?,
            OpKind::FarBranch16 => (
                Width::Word,
                self.instruction.far_branch16().into(),
                self.instruction.far_branch_selector(),
            ),
            OpKind::FarBranch32 => (
                Width::Dword,
                self.instruction.far_branch32().into(),
                self.instruction.far_branch_selector(),
            ),
            _ => return Err(EmulateError::Unsupported),
        };
        let back = (self.machine.segment(Segment::Cs).selector, self.next);
        let register = self.code_register(selector)?;
        let long = register.rights.is_long() && self.machine.is_ia32e();
        let inside = if long {
            segmentation::is_canonical(target)
        } else {
            target <= register.limit.into()
        };
        if !inside {
            return Err(Exception::GeneralProtection.into());
        }
        if call {
            self.push_pair(back.0.into(), back.1, width)?;
        }
        self.machine.set_segment(Segment::Cs, register);
        self.next = target;
        Ok(())
    }

    /// CS for a far transfer; call gates and task switches are not emulated.
    fn code_register(&mut self, selector: u16) -> Result<SegmentRegister> {
        match self.machine.addressing() {
            Addressing::Virtual8086 | Addressing::Real => Ok(self.paragraph(Segment::Cs, selector)),
            Addressing::Protected | Addressing::Long => {
                let fault = SegmentFault::GeneralProtection;
                let cpl = self.machine.cpl();
                let found = segmentation::descriptor(self.machine, selector, fault)?;
                let rights = found.1.rights();
                if rights.0 & 0x10 == 0 {
                    return Err(EmulateError::Unsupported);
                }
                let rpl = (selector & 3) as u8;
                let reachable = if rights.is_conforming() {
                    rights.dpl() <= cpl
                } else {
                    rights.dpl() == cpl && rpl <= cpl
                };
                // In IA-32e mode both sizes at once are reserved.
                let sized = !(self.machine.is_ia32e() && rights.is_long() && rights.is_big());
                if !rights.is_code() || !reachable || !sized {
                    return Err(fault.of(selector).into());
                }
                if !rights.is_present() {
                    return Err(SegmentFault::NotPresent.of(selector).into());
                }
                let selector = selector & !3 | u16::from(cpl);
                Ok(segmentation::accept(self.machine, found, selector)?)
            }
        }
    }

    /// LGDT, LIDT: a limit of two bytes, and a base.
    fn load_table(&mut self, table: Table) -> Result<()> {
        self.check_privileged()?;
        let (segment, offset) = self.address()?;
        let mut image = [0; 10];
        let bytes = if self.mode == Mode::Bits64 { 10 } else { 6 };
        self.load(segment, offset, image.get_mut(..bytes).unwrap_or_default())?;
        let [a, b, base @ ..] = image;
        let base = u64::from_le_bytes(base);
        let base = match self.mode {
            Mode::Bits64 if !segmentation::is_canonical(base) => {
                return Err(Exception::GeneralProtection.into());
            }
            // With a 16-bit operand the base has 24 bits.
            _ if self.has_short_base() => base & 0xff_ffff,
            _ => base,
        };
        let limit = u16::from_le_bytes([a, b]);
        self.machine.set_table(table, TableRegister { base, limit });
        Ok(())
    }

    fn has_short_base(&self) -> bool {
        use iced_x86::Code;
        matches!(
            self.instruction.code(),
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
        )
    }

    fn store_table(&mut self, table: Table) -> Result<()> {
        let TableRegister { base, limit } = self.machine.table(table);
        let mut image = [0; 10];
        let [a, b] = limit.to_le_bytes();
        [image[0], image[1]] = [a, b];
        image[2..].copy_from_slice(&base.to_le_bytes());
        let bytes = if self.mode == Mode::Bits64 { 10 } else { 6 };
        let (segment, offset) = self.address()?;
        self.store(segment, offset, image.get(..bytes).unwrap_or_default())
    }

    /// LLDT, LTR.
    fn load_system_segment(&mut self, which: SystemSegment) -> Result<()> {
        if self.machine.addressing().has_paragraphs() {
            return Err(Exception::InvalidOpcode.into());
        }
        self.check_privileged()?;
        let from = self.word_place(0)?;
        let selector = self.read(from)? as u16;
        let fault = SegmentFault::GeneralProtection;
        if segmentation::is_null(selector) && which == SystemSegment::Ldtr {
            self.machine
                .set_system_segment(which, SegmentRegister::null(selector));
            return Ok(());
        }
        const LOCAL: u16 = 4;
        if selector & LOCAL != 0 {
            return Err(fault.of(selector).into());
        }
        let (address, descriptor) = segmentation::descriptor(self.machine, selector, fault)?;
        let rights = descriptor.rights();
        let long = self.machine.addressing() == Addressing::Long;
        let fits = match which {
            SystemSegment::Ldtr => rights.kind() == kind::LDT,
            SystemSegment::Tr => match rights.kind() {
                kind::TSS => true,
                kind::TSS_16 => !self.machine.is_ia32e(),
                _ => false,
            },
        };
        if !fits {
            return Err(fault.of(selector).into());
        }
        if !rights.is_present() {
            return Err(SegmentFault::NotPresent.of(selector).into());
        }
        let mut register = descriptor.register(selector);
        if long {
            // The descriptor has 16 bytes.
            let mut upper = [0; 4];
            self.machine
                .load_system(address.wrapping_add(8), &mut upper)?;
            register.base |= u64::from(u32::from_le_bytes(upper)) << 32;
            if !segmentation::is_canonical(register.base) {
                return Err(fault.of(selector).into());
            }
        }
        if which == SystemSegment::Tr {
            register.rights = Rights(register.rights.0 | BUSY);
            let busy = Descriptor(descriptor.0 | u64::from(BUSY) << 40);
            let [.., rights, _, _] = busy.0.to_le_bytes();
            self.machine
                .store_system(address.wrapping_add(5), &[rights])?;
        }
        self.machine.set_system_segment(which, register);
        Ok(())
    }

    fn store_system_segment(&mut self, which: SystemSegment) -> Result<()> {
        if self.machine.addressing().has_paragraphs() {
            return Err(Exception::InvalidOpcode.into());
        }
        let selector = self.machine.system_segment(which).selector;
        let to = self.word_place(0)?;
        self.write(to, selector.into())
    }

    fn store_msw(&mut self) -> Result<()> {
        let to = self.word_place(0)?;
        self.write(to, self.machine.cr0())
    }

    fn load_msw(&mut self) -> Result<()> {
        self.check_privileged()?;
        let from = self.word_place(0)?;
        let value = self.read(from)? as u16;
        Ok(self.machine.load_msw(value)?)
    }

    /// MOVDIR64B: 64 bytes from memory to an address in a register, in ES.
    fn move_line(&mut self) -> Result<()> {
        let to = self.place(0)?;
        let offset = self.read(to)?;
        let (segment, from) = self.address()?;
        let linear = self.linear(Segment::Es, offset, 64, true)?;
        if linear & 63 != 0 {
            return Err(Exception::GeneralProtection.into());
        }
        let source = self.linear(segment, from, 64, false)?;
        let mut line = [0; 64];
        self.machine.load(source, &mut line, Intent::Read)?;
        Ok(self.machine.store(linear, &line)?)
    }
}
