//! Port I/O.

use super::breakpoints::DataBreakpoints;
use super::emulate::{Intent, Machine};
use super::events::Exception;
use super::execution::Execution;
use super::run::End;
use super::segmentation::Segment;
use super::{Attention, Leave, Vcpu};
use crate::addr::Gpa;
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::devices::fw_cfg::Progress;
use crate::devices::{Width, chipset::Request, pc};
use crate::host::console;
use crate::vmx::exit::IoAccess;
use crate::vmx::vmcs::{guest, information};
use alloc::sync::Arc;

const RFLAGS_DF: u64 = 1 << 10;

const RFLAGS_TF: u64 = 1 << 8;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// Address size and segment of INS or OUTS (SDM 3, 28.2.5).
fn string_operand(information: u32, input: bool) -> (Width, Segment) {
    let address = match information >> 7 & 7 {
        0 => Width::Word,
        1 => Width::Dword,
        _ => Width::Qword,
    };
    let segment = match information >> 15 & 7 {
        _ if input => Segment::Es,
        0 => Segment::Es,
        1 => Segment::Cs,
        2 => Segment::Ss,
        4 => Segment::Fs,
        5 => Segment::Gs,
        _ => Segment::Ds,
    };
    (address, segment)
}

/// What an index register is after its part as wide as an address has become `new`.
fn partly(old: u64, new: u64, address: Width) -> u64 {
    match address {
        Width::Word => old & !0xffff | new & 0xffff,
        _ => new & address.mask(),
    }
}

fn width(access: IoAccess) -> Result<Width, Exception> {
    Width::from_bytes(access.bytes.into()).ok_or(Exception::GeneralProtection)
}

impl Vcpu {
    #[inline]
    pub(super) fn port(
        &mut self,
        access: IoAccess,
        registers: &mut LightRegisters,
    ) -> Result<(), Exception> {
        let width = width(access)?;
        if access.input {
            let value = u64::from(self.port_in(access.port, width));
            // A 32-bit result clears the upper half; smaller ones leave the rest (SDM 1, 3.4.1.1).
            registers.rax = if width == Width::Dword {
                value
            } else {
                registers.rax & !width.mask() | value & width.mask()
            };
        } else if !self.port_out(access.port, width, registers.rax as u32) {
            return Ok(());
        }
        self.skip_instruction();
        Ok(())
    }

    /// INS or OUTS. With a repeat prefix it is executed again after some elements, so that
    /// interrupts come in between.
    pub(super) fn string_port(
        &mut self,
        access: IoAccess,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let width = width(access)?;
        let information = self.vmcs.read(information::INSTRUCTION_INFO);
        let (address, segment) = string_operand(information, access.input);
        let rflags = self.vmcs.read(guest::RFLAGS);
        let step = if rflags & RFLAGS_DF == 0 {
            width.bytes()
        } else {
            width.bytes().wrapping_neg()
        };
        let (mask, index) = (address.mask(), if access.input { RDI } else { RSI });
        let breakpoints = self.data_breakpoints();
        let elements = if !access.repeated || rflags & RFLAGS_TF != 0 {
            1
        } else {
            breakpoints.iterations()
        };
        for _ in 0..elements {
            if access.repeated && registers.rcx & mask == 0 {
                break;
            }
            let at = registers.get(index);
            let operand = (segment, at & mask);
            let Some(met) = self.string_element(access, operand, width, breakpoints)? else {
                return Ok(());
            };
            self.trap_data_breakpoints(met);
            registers.set(index, partly(at, at.wrapping_add(step), address));
            if access.repeated {
                let left = registers.rcx.wrapping_sub(1);
                registers.rcx = partly(registers.rcx, left, address);
            }
            if self.leave.is_some() {
                break;
            }
        }
        if access.repeated && registers.rcx & mask != 0 {
            self.end_shadow(false);
            self.trap_single_step_of(rflags);
        } else {
            self.skip_instruction();
        }
        Ok(())
    }

    /// One element at an offset of its segment: which of the breakpoints it has met, or `None` where
    /// it is to be tried again.
    fn string_element(
        &mut self,
        access: IoAccess,
        (segment, offset): (Segment, u64),
        width: Width,
        breakpoints: DataBreakpoints,
    ) -> Result<Option<u64>, Exception> {
        let bytes = width.bytes() as usize;
        let register = self.segment(segment);
        let addressing = self.addressing();
        let linear = register.linear(segment, addressing, offset, width.bytes(), access.input)?;
        let mut value = [0; 4];
        let part = value.get_mut(..bytes).unwrap_or_default();
        let mut execution = Execution::new(self, None, breakpoints);
        if access.input {
            // That it can be written is to be known before the device is read.
            execution.check_store(linear, bytes)?;
            let value = execution.vcpu.port_in(access.port, width).to_le_bytes();
            execution.store(linear, value.get(..bytes).unwrap_or_default())?;
            Ok(Some(execution.breakpoints.met()))
        } else {
            execution.load(linear, part, Intent::Read)?;
            let met = execution.breakpoints.met();
            let is_done = self.port_out(access.port, width, u32::from_le_bytes(value));
            Ok(is_done.then_some(met))
        }
    }

    #[inline(always)]
    pub(super) fn port_in(&mut self, port: u16, width: Width) -> u32 {
        let now = self.now();
        let value = self.with_chipset(|chipset| chipset.port_read(now, port, width));
        if port == pc::COM1 && self.vm.console.has_input() {
            // The receiver has room again.
            self.attend_to(Attention::CONSOLE);
        }
        value
    }

    /// False where the instruction is to be executed again.
    #[inline(always)]
    pub(super) fn port_out(&mut self, port: u16, width: Width, value: u32) -> bool {
        let now = self.now();
        let (request, is_full) = self.with_chipset(|chipset| {
            let request = chipset.port_write(now, port, width, value);
            (request, port == pc::COM1 && chipset.serial_output_waits())
        });
        if let Some(request) = request {
            return self.obey_device(request);
        }
        if !(pc::COM1..pc::COM1 + 8).contains(&port) {
            return true;
        }
        self.output_waits = true;
        let sent = port == pc::COM1 && (is_full || !self.vm.console.is_busy());
        if sent || self.vm.console.has_input() {
            self.attend_to(Attention::CONSOLE);
        }
        true
    }

    /// Does what a device asks for; false where its register is to be written again.
    #[cold]
    #[inline(never)]
    fn obey_device(&mut self, request: Request) -> bool {
        match request {
            Request::PowerOff => self.end(End::PowerOff),
            // It is the bootstrap processor's to do (ACPI 6.5, 16.1.1).
            Request::Suspend if self.apic.is_bootstrap() => self.leave_for(Leave::Suspend),
            Request::Suspend => {}
            Request::Reset => self.end(End::Reset),
            Request::Exit(code) => self.end(End::Exit(code)),
            Request::Console { taken } => {
                self.attend_to(Attention::CONSOLE);
                return taken;
            }
            Request::Transfer(request) => {
                let vm = Arc::clone(&self.vm);
                let progress = self.with_chipset(|chipset| chipset.transfer(request, &vm.memory));
                return progress == Progress::Done;
            }
            Request::Unmap(gpa) => self.unmap_page(gpa),
        }
        true
    }

    /// Has the next access to the page of `gpa` exit, where the guest has memory.
    fn unmap_page(&mut self, gpa: Gpa) {
        if let Err(error) = self.vm.unmap_page(gpa) {
            self.end(End::Ept(error));
        } else if self.forget_translations().is_err() {
            self.end(End::Unsupported("dropping cached translations"));
        }
    }

    /// Moves bytes between the guest's COM1 and its console, as many as both sides take.
    pub(super) fn pump_console(&mut self) {
        self.output_waits = false;
        let now = self.now();
        let port = Arc::clone(&self.vm.console);
        let unknown = self.with_chipset(|chipset| {
            let read = port.receive(|byte| chipset.serial_input(now, byte));
            chipset.serial_output(|output| port.send(output)) | read
        });
        if unknown {
            console::attend();
        }
    }
}
