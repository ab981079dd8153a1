//! Port I/O.

use super::events::Exception;
use super::run::End;
use super::{Attention, Vcpu};
use crate::addr::{Gpa, Gva};
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::devices::fw_cfg::Progress;
use crate::devices::{Width, chipset::Request, pc};
use crate::host::console;
use crate::vmx::exit::IoAccess;
use crate::vmx::vmcs::{guest, information};
use alloc::sync::Arc;

const RFLAGS_DF: u64 = 1 << 10;

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

    /// One element of INS or OUTS; with a repeat prefix the instruction is
    /// executed again for the next, so that interrupts come in between.
    pub(super) fn string_port(
        &mut self,
        access: IoAccess,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let width = width(access)?;
        // Address size: bits 9:7 of the instruction information (SDM 3, 28.2.5).
        let size = self.vmcs.read(information::INSTRUCTION_INFO) >> 7 & 7;
        let mask = match size {
            0 => 0xffff,
            1 => 0xffff_ffff,
            _ => u64::MAX,
        };
        if access.repeated && registers.rcx & mask == 0 {
            self.skip_instruction();
            return Ok(());
        }
        let linear = Gva(self.vmcs.read(information::GUEST_LINEAR_ADDRESS));
        if access.input {
            let value = self.port_in(access.port, width).to_le_bytes();
            let bytes = value.get(..width.bytes() as usize).unwrap_or_default();
            self.write_linear(linear, bytes)?;
        } else {
            let mut value = [0; 4];
            let bytes = value.get_mut(..width.bytes() as usize).unwrap_or_default();
            self.read_linear(linear, bytes)?;
            if !self.port_out(access.port, width, u32::from_le_bytes(value)) {
                return Ok(());
            }
        }
        let step = if self.vmcs.read(guest::RFLAGS) & RFLAGS_DF == 0 {
            width.bytes()
        } else {
            width.bytes().wrapping_neg()
        };
        let index = if access.input {
            &mut registers.rdi
        } else {
            &mut registers.rsi
        };
        *index = *index & !mask | index.wrapping_add(step) & mask;
        if access.repeated {
            let left = registers.rcx.wrapping_sub(1) & mask;
            registers.rcx = registers.rcx & !mask | left;
            if left != 0 {
                self.trap_single_step();
                return Ok(());
            }
        }
        self.skip_instruction();
        Ok(())
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
