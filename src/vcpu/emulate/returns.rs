//! RETF and IRET: returns to another code segment, at the same privilege level, an outer one, or
//! in virtual-8086 mode (SDM 2, RET and IRET).

use super::operand::Gpr;
use super::stack::RFLAGS_NT;
use super::{EmulateError, Machine, Mode, Result, Step};
use crate::devices::Width;
use crate::vcpu::fault::{Exception, SegmentFault};
use crate::vcpu::segmentation::{self, Addressing, Purpose, Segment, SegmentRegister};
use iced_x86::Code;

const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_VIF_VIP: u64 = 3 << 19;
/// All that a return to virtual-8086 mode loads.
const RFLAGS_ALL: u64 = 0x3f_7fd5;

/// Where a return goes.
struct Target {
    offset: u64,
    code: SegmentRegister,
    /// It is 64-bit code.
    long: bool,
    /// To an outer privilege level.
    outer: bool,
}

impl<M: Machine> Step<'_, '_, M> {
    /// Executes it if it is one of these.
    pub(super) fn far_return(&mut self) -> Result<bool> {
        match self.instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => self.retf(Width::Word),
            Code::Retfd | Code::Retfd_imm16 => self.retf(Width::Dword),
            Code::Retfq | Code::Retfq_imm16 => self.retf(Width::Qword),
            Code::Iretw => self.iret(Width::Word),
            Code::Iretd => self.iret(Width::Dword),
            Code::Iretq => self.iret(Width::Qword),
            _ => return Ok(false),
        }?;
        Ok(true)
    }

    /// What is on the stack, `skipped` bytes below its top.
    fn entries<const COUNT: usize>(&mut self, skipped: u64, width: Width) -> Result<[u64; COUNT]> {
        let pointer = self.pointer(Gpr::RSP);
        let mut at = self.get(pointer).wrapping_add(skipped);
        let mut entries = [0; COUNT];
        for entry in &mut entries {
            *entry = self.load_stack(at & pointer.width.mask(), width)?;
            at = at.wrapping_add(width.bytes());
        }
        Ok(entries)
    }

    fn retf(&mut self, width: Width) -> Result<()> {
        let [offset, selector] = self.entries(0, width)?;
        let target = self.target_of_return(offset, selector as u16)?;
        let (released, frame) = (self.released(), 2 * width.bytes());
        let stack = if target.outer {
            Some(self.outer_stack(&target, frame + released, width)?)
        } else {
            None
        };
        self.check_target(&target)?;
        self.complete_return(&target, stack, frame, released);
        Ok(())
    }

    fn iret(&mut self, width: Width) -> Result<()> {
        // Even where it faults (SDM 3, 7.7.1).
        self.machine.unblock_nmis();
        let protected = !self.machine.addressing().has_paragraphs();
        self.check_flags_allowed()?;
        if protected && self.registers.rflags & RFLAGS_NT != 0 {
            return Err(if self.machine.is_ia32e() {
                Exception::GeneralProtection.into()
            } else {
                // To another task.
                EmulateError::Unsupported
            });
        }
        let [offset, selector, flags] = self.entries(0, width)?;
        let frame = 3 * width.bytes();
        let old = self.registers.rflags;
        let to_virtual_8086 = protected
            && width == Width::Dword
            && flags & RFLAGS_VM != 0
            && self.machine.cpl() == 0
            && !self.machine.is_ia32e();
        if to_virtual_8086 {
            self.return_to_virtual_8086(offset, selector as u16)?;
            self.registers.rflags = flags & RFLAGS_ALL | RFLAGS_FIXED;
            return Ok(());
        }
        let mut writable = self.writable_flags(width);
        if width != Width::Word {
            writable |= RFLAGS_RF;
            if protected && self.machine.cpl() == 0 {
                writable |= RFLAGS_VIF_VIP;
            }
        }
        let target = self.target_of_return(offset, selector as u16)?;
        let stack = if target.outer || self.mode == Mode::Bits64 {
            Some(self.outer_stack(&target, frame, width)?)
        } else {
            None
        };
        self.check_target(&target)?;
        self.complete_return(&target, stack, frame, 0);
        self.registers.rflags = old & !writable | flags & writable | RFLAGS_FIXED;
        Ok(())
    }

    /// The code segment that a return goes to.
    fn target_of_return(&mut self, offset: u64, selector: u16) -> Result<Target> {
        if self.machine.addressing().has_paragraphs() {
            return Ok(Target {
                offset,
                code: self.paragraph(Segment::Cs, selector),
                long: false,
                outer: false,
            });
        }
        let (cpl, level) = (self.machine.cpl(), (selector & 3) as u8);
        if level < cpl && !segmentation::is_null(selector) {
            return Err(SegmentFault::GeneralProtection.of(selector).into());
        }
        let ia32e = self.machine.is_ia32e();
        let code = segmentation::load_code(self.machine, selector, ia32e, Purpose::Instruction)?;
        Ok(Target {
            offset,
            code,
            long: ia32e && code.rights.is_long(),
            outer: level > cpl,
        })
    }

    fn check_target(&self, target: &Target) -> Result<()> {
        let inside = if target.long {
            segmentation::is_canonical(target.offset)
        } else {
            target.offset <= target.code.limit.into()
        };
        if inside {
            Ok(())
        } else {
            Err(Exception::GeneralProtection.into())
        }
    }

    /// The stack that is on the stack, `skipped` bytes below its top: pointer and segment.
    fn outer_stack(
        &mut self,
        target: &Target,
        skipped: u64,
        width: Width,
    ) -> Result<(u64, SegmentRegister)> {
        let [pointer, selector] = self.entries(skipped, width)?;
        let level = (target.code.selector & 3) as u8;
        let register = segmentation::load_data(
            self.machine,
            Segment::Ss,
            selector as u16,
            level,
            target.long,
            Purpose::Instruction,
        )?;
        Ok((pointer, register))
    }

    /// Goes there, with another stack where there is one, or with this one without the
    /// frame; `released` bytes are dropped from either.
    fn complete_return(
        &mut self,
        target: &Target,
        stack: Option<(u64, SegmentRegister)>,
        frame: u64,
        released: u64,
    ) {
        let pointer = self.pointer(Gpr::RSP);
        match stack {
            None => {
                let top = self.get(pointer).wrapping_add(frame + released);
                self.set(pointer, top);
            }
            Some((top, register)) => {
                let width = match register.rights.is_big() {
                    _ if target.long => Width::Qword,
                    true => Width::Dword,
                    false => Width::Word,
                };
                self.set(Gpr::low(Gpr::RSP, width), top.wrapping_add(released));
                self.machine.set_segment(Segment::Ss, register);
            }
        }
        self.machine.set_segment(Segment::Cs, target.code);
        self.next = target.offset;
        if target.outer {
            self.forget_inner_segments((target.code.selector & 3) as u8);
        }
    }

    /// What an outer privilege level must not use becomes null.
    fn forget_inner_segments(&mut self, level: u8) {
        for segment in [Segment::Es, Segment::Ds, Segment::Fs, Segment::Gs] {
            let rights = self.machine.segment(segment).rights;
            if rights.is_usable() && !rights.is_conforming() && rights.dpl() < level {
                self.machine.set_segment(segment, SegmentRegister::null(0));
            }
        }
    }

    /// IRET with VM set on the stack.
    fn return_to_virtual_8086(&mut self, offset: u64, selector: u16) -> Result<()> {
        const SEGMENTS: [Segment; 5] = [
            Segment::Ss,
            Segment::Es,
            Segment::Ds,
            Segment::Fs,
            Segment::Gs,
        ];
        let width = Width::Dword;
        let [rsp, selectors @ ..] = self.entries::<6>(3 * width.bytes(), width)?;
        if offset > 0xffff {
            return Err(Exception::GeneralProtection.into());
        }
        for (segment, selector) in SEGMENTS.into_iter().zip(selectors) {
            let register = SegmentRegister::paragraph(selector as u16);
            self.machine.set_segment(segment, register);
        }
        self.machine
            .set_segment(Segment::Cs, SegmentRegister::paragraph(selector));
        self.set(Gpr::low(Gpr::RSP, width), rsp);
        self.next = offset;
        Ok(())
    }

    /// A segment register in real or virtual-8086 mode.
    pub(super) fn paragraph(&self, segment: Segment, selector: u16) -> SegmentRegister {
        if self.machine.addressing() == Addressing::Virtual8086 {
            return SegmentRegister::paragraph(selector);
        }
        // Limit and rights are what they were (SDM 3, 21.1.4).
        SegmentRegister {
            selector,
            base: u64::from(selector) << 4,
            ..self.machine.segment(segment)
        }
    }
}
