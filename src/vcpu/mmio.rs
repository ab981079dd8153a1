//! EPT violations: memory that is mapped on first use, and device registers in memory.

use super::emulate::{self, Bus, Decoded, EmulateError, Mode, Move, Segment};
use super::events::{Exception, RFLAGS_RF};
use super::known_moves::Context;
use super::run::End;
use super::walk::{self, Operation, Paging, PhysicalRead, WalkError};
use super::{Attention, Vcpu};
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::arch::registers::GeneralRegisters;
use crate::devices::local_apic::{Action, Mode as ApicMode, register};
use crate::devices::{Width, pc};
use crate::vm::machine::Unmapped;
use crate::vm::memory::GuestMemory;
use crate::vmx::exit::EptViolation;
use crate::vmx::vmcs::guest;

/// The longest instruction (SDM 2, 2.3.11).
const INSTRUCTION_MAX: usize = 15;
const RIGHTS_LONG: u32 = 1 << 13;
const RIGHTS_DEFAULT_BIG: u32 = 1 << 14;
const EFER_LMA: u64 = 1 << 10;

impl PhysicalRead for GuestMemory {
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        GuestMemory::read_u64(self, gpa).ok()
    }

    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        GuestMemory::read_u32(self, gpa).ok()
    }
}

impl Vcpu {
    pub(super) fn ept_violation(
        &mut self,
        violation: EptViolation,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let delivering = self.keep_interrupted_event();
        if violation.unblocked_nmis && !delivering {
            self.block_nmis_again();
        }
        match self.vm.map_page(violation.gpa, violation.write) {
            Ok(()) => {}
            Err(Unmapped::NoSlot) if delivering => {
                self.end(End::NoMemoryForDelivery(violation.gpa));
            }
            Err(Unmapped::NoSlot) if violation.execute || !violation.final_access => {
                // Code or page tables where there is no memory.
                self.end(End::NoMemory(violation.gpa));
            }
            Err(Unmapped::NoSlot) => {
                let access = if violation.write {
                    emulate::Access::Write
                } else {
                    emulate::Access::Read
                };
                return self.device_access(violation.gpa, access, registers);
            }
            Err(Unmapped::Ept(error)) => self.end(End::Ept(error)),
        }
        Ok(())
    }

    /// The plain move that accesses a device, where it is known: what the rest of
    /// [`Vcpu::device_access`] would find.
    #[inline(always)]
    pub(super) fn known_move(&self) -> Option<Move> {
        self.moves.find(&self.vm.memory, self.context())
    }

    #[inline(always)]
    fn context(&self) -> Context {
        Context {
            rip: self.vmcs.read_basic(guest::RIP),
            cr3: self.vmcs.read_basic(guest::CR3),
            rights: self.vmcs.read_basic(guest::CS_ACCESS_RIGHTS),
        }
    }

    /// Keeps the plain move that `code` is, for [`Vcpu::known_move`].
    fn remember_move(&mut self, code: &[u8], plan: Move) {
        let (context, paging) = (self.context(), self.paging());
        self.moves
            .remember(&self.vm.memory, &paging, context, code, plan);
    }

    /// Ends an instruction of `length` bytes whose access has exited.
    #[inline(always)]
    pub(super) fn complete_access(&mut self, length: u8) {
        // Such an exit saves RF set (SDM 3, 28.3.3); a completed instruction clears it.
        let rflags = self.vmcs.read_basic(guest::RFLAGS);
        if rflags & RFLAGS_RF != 0 {
            self.vmcs.write(guest::RFLAGS, rflags & !RFLAGS_RF);
        }
        self.step_over(length.into());
        self.trap_single_step_of(rflags);
    }

    /// Emulates the instruction that accesses the device at `gpa`.
    pub(super) fn device_access(
        &mut self,
        gpa: Gpa,
        access: emulate::Access,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let mut bytes = [0; INSTRUCTION_MAX];
        let rip = self.vmcs.read(guest::RIP);
        let long = self.is_64_bit();
        let mode = if long {
            Mode::Bits64
        } else if self.vmcs.read(guest::CS_ACCESS_RIGHTS) & RIGHTS_DEFAULT_BIG != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        let start = if long {
            rip
        } else {
            self.vmcs.read(guest::CS_BASE).wrapping_add(rip) & 0xffff_ffff
        };
        let fetched = self.fetch(Gva(start), &mut bytes)?;
        registers.rsp = self.vmcs.read(guest::RSP);
        let mut rflags = self.vmcs.read(guest::RFLAGS);
        let mut bus = DeviceBus {
            gpa,
            long,
            fault: None,
            vcpu: self,
        };
        let code = bytes.get(..fetched).unwrap_or_default();
        let decoded = Decoded::new(code, mode);
        let outcome =
            decoded.and_then(|decoded| decoded.emulate(access, registers, &mut rflags, &mut bus));
        let fault = bus.fault.take();
        if long
            && let Ok(decoded) = decoded
            && let Some(plan) = decoded.plain_move()
        {
            self.remember_move(code, plan);
        }
        match outcome {
            Ok(outcome) => {
                // An EPT violation saves RF set (SDM 3, 28.3.3); a completed instruction clears it.
                if outcome.advance != 0 {
                    rflags &= !RFLAGS_RF;
                }
                self.vmcs.write(guest::RFLAGS, rflags);
                self.vmcs.write(guest::RSP, registers.rsp);
                if outcome.advance == 0 {
                    self.trap_single_step();
                } else {
                    self.advance_rip(outcome.advance.into());
                }
                Ok(())
            }
            Err(EmulateError::Memory) => Err(fault.unwrap_or(Exception::GeneralProtection)),
            Err(EmulateError::Undecodable | EmulateError::Unsupported) => {
                self.end(End::Instruction {
                    rip: Gva(start),
                    bytes,
                    gpa,
                });
                Ok(())
            }
        }
    }

    /// Whether the guest executes 64-bit code.
    pub(super) fn is_64_bit(&self) -> bool {
        self.vmcs.read(guest::EFER) & EFER_LMA != 0
            && self.vmcs.read(guest::CS_ACCESS_RIGHTS) & RIGHTS_LONG != 0
    }

    fn paging(&self) -> Paging {
        Paging {
            cr0: self.cr0(),
            cr3: self.vmcs.read(guest::CR3),
            cr4: self.cr4(),
            efer: self.vmcs.read(guest::EFER),
            rflags: self.vmcs.read(guest::RFLAGS),
            physical_bits: self.cpuid.physical_address_bits(),
        }
    }

    fn translate(&self, address: Gva, operation: Operation) -> Result<Gpa, Exception> {
        let access = walk::Access {
            operation,
            user: self.cpl() == 3,
        };
        match walk::walk(&self.vm.memory, &self.paging(), address, access) {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkError::PageFault(error_code)) => Err(Exception::PageFault {
                error_code,
                address: address.0,
            }),
            Err(WalkError::NonCanonical | WalkError::NoMemory(_)) => {
                Err(Exception::GeneralProtection)
            }
        }
    }

    /// Fetches up to 15 bytes of code; fewer where the next page has none.
    fn fetch(&self, address: Gva, bytes: &mut [u8; INSTRUCTION_MAX]) -> Result<usize, Exception> {
        let mut done = 0;
        while done < INSTRUCTION_MAX {
            let at = address.wrapping_add(done as u64);
            let gpa = match self.translate(at, Operation::Execute) {
                Ok(gpa) => gpa,
                Err(_) if done > 0 => break,
                Err(exception) => return Err(exception),
            };
            let in_page = (PAGE_SIZE - at.offset_in(PAGE_SIZE)) as usize;
            let end = INSTRUCTION_MAX.min(done + in_page);
            let Some(part) = bytes.get_mut(done..end) else {
                break;
            };
            if self.vm.memory.read(gpa, part).is_err() {
                break;
            }
            done = end;
        }
        Ok(done)
    }

    /// Reads at a linear address, with the guest's own rights.
    pub(super) fn read_linear(&self, address: Gva, bytes: &mut [u8]) -> Result<(), Exception> {
        // Byte by byte: such operands are at most eight bytes and may straddle pages.
        for (offset, byte) in (0..).zip(bytes) {
            let gpa = self.translate(address.wrapping_add(offset), Operation::Read)?;
            let mut one = [0];
            // Where there is no memory the bus reads all ones.
            *byte = self.vm.memory.read(gpa, &mut one).map_or(0xff, |()| one[0]);
        }
        Ok(())
    }

    /// Writes at a linear address, with the guest's own rights.
    pub(super) fn write_linear(&self, address: Gva, bytes: &[u8]) -> Result<(), Exception> {
        for offset in 0..bytes.len() as u64 {
            self.translate(address.wrapping_add(offset), Operation::Write)?;
        }
        for (offset, byte) in (0..).zip(bytes) {
            let gpa = self.translate(address.wrapping_add(offset), Operation::Write)?;
            // Where there is no memory the write vanishes.
            let _ = self.vm.memory.write(gpa, &[*byte]);
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn device_read(&mut self, gpa: Gpa, width: Width) -> u64 {
        let offset = gpa.offset_in(PAGE_SIZE);
        match self.device_at(gpa) {
            Device::LocalApic => self.local_apic_read(offset, width),
            Device::IoApic => self.with_chipset(|chipset| chipset.io_apic_read(offset, width)),
            Device::Other => self.other_read(gpa, width),
        }
    }

    #[inline(always)]
    pub(super) fn device_write(&mut self, gpa: Gpa, width: Width, value: u64) {
        let offset = gpa.offset_in(PAGE_SIZE);
        match self.device_at(gpa) {
            Device::LocalApic => self.local_apic_write(offset, width, value),
            Device::IoApic => {
                self.with_chipset(|chipset| chipset.io_apic_write(offset, width, value));
            }
            Device::Other => self.other_write(gpa, width, value),
        }
    }

    #[cold]
    fn other_read(&mut self, gpa: Gpa, width: Width) -> u64 {
        self.with_chipset(|chipset| chipset.memory_read(gpa, width))
    }

    #[cold]
    fn other_write(&mut self, gpa: Gpa, width: Width, value: u64) {
        self.with_chipset(|chipset| chipset.memory_write(gpa, width, value));
    }

    #[inline(always)]
    fn device_at(&self, gpa: Gpa) -> Device {
        let page = gpa.align_down(PAGE_SIZE).0;
        if self.apic.mode() == ApicMode::XApic && page == self.apic.address() {
            Device::LocalApic
        } else if page == pc::IO_APIC_BASE {
            Device::IoApic
        } else {
            Device::Other
        }
    }

    pub(super) fn local_apic_read(&mut self, offset: u64, width: Width) -> u64 {
        self.apic.mmio_read(self.now(), offset, width)
    }

    /// Writes the local APIC's page. What a busy guest writes there has a way of its own.
    #[inline(always)]
    pub(super) fn local_apic_write(&mut self, offset: u64, width: Width, value: u64) {
        const EOI: u64 = register::EOI as u64;
        const ICR: u64 = register::ICR as u64;
        match (offset, width) {
            (EOI, Width::Dword) if !self.tier.delivers() => self.eoi(),
            (ICR, Width::Dword) if self.apic.xapic_self_ipi(value as u32) => {
                self.attend_to(Attention::EVENTS);
            }
            _ => self.local_apic_write_other(offset, width, value),
        }
    }

    #[inline(never)]
    fn local_apic_write_other(&mut self, offset: u64, width: Width, value: u64) {
        let action = self.apic.mmio_write(self.now(), offset, width, value);
        if register::is_address(offset as u16) {
            self.publish_address();
        }
        self.act(action);
    }

    /// The guest ends an interrupt.
    #[inline]
    pub(super) fn eoi(&mut self) {
        if let Some(vector) = self.apic.eoi() {
            self.broadcast_eoi(vector);
        }
        if self.apic.has_requests() {
            self.attend_to(Attention::EVENTS);
        }
    }

    #[inline(never)]
    pub(super) fn broadcast_eoi(&mut self, vector: u8) {
        self.with_chipset(|chipset| chipset.eoi(vector));
    }

    /// What the local APIC asks for after a register write.
    pub(super) fn act(&mut self, action: Option<Action>) {
        match action {
            None => {}
            Some(Action::Send(message)) => self.deliver(message, true),
            Some(Action::BroadcastEoi(vector)) => self.broadcast_eoi(vector),
        }
        self.look_at_apic();
    }
}

enum Device {
    LocalApic,
    IoApic,
    /// Seldom there, or nobody.
    Other,
}

/// The access of one instruction: the device at `gpa`, and the guest's memory.
struct DeviceBus<'a> {
    vcpu: &'a mut Vcpu,
    gpa: Gpa,
    long: bool,
    fault: Option<Exception>,
}

impl DeviceBus<'_> {
    fn linear(&self, segment: Segment, offset: u64) -> Gva {
        let vmcs = &self.vcpu.vmcs;
        let base = match segment {
            Segment::Fs => vmcs.read(guest::FS_BASE),
            Segment::Gs => vmcs.read(guest::GS_BASE),
            _ if self.long => 0,
            Segment::Es => vmcs.read(guest::ES_BASE),
            Segment::Cs => vmcs.read(guest::CS_BASE),
            Segment::Ss => vmcs.read(guest::SS_BASE),
            Segment::Ds => vmcs.read(guest::DS_BASE),
        };
        let linear = base.wrapping_add(offset);
        Gva(if self.long {
            linear
        } else {
            linear & 0xffff_ffff
        })
    }

    fn note<T>(&mut self, result: Result<T, Exception>) -> Result<T, EmulateError> {
        result.map_err(|exception| {
            self.fault = Some(exception);
            EmulateError::Memory
        })
    }
}

impl Bus for DeviceBus<'_> {
    fn read(&mut self, width: Width) -> u64 {
        self.vcpu.device_read(self.gpa, width)
    }

    fn write(&mut self, width: Width, value: u64) {
        self.vcpu.device_write(self.gpa, width, value);
    }

    fn load(&mut self, segment: Segment, offset: u64, width: Width) -> Result<u64, EmulateError> {
        let mut bytes = [0; 8];
        let part = bytes.get_mut(..width.bytes() as usize).unwrap_or_default();
        let result = self.vcpu.read_linear(self.linear(segment, offset), part);
        self.note(result)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(
        &mut self,
        segment: Segment,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Result<(), EmulateError> {
        let bytes = value.to_le_bytes();
        let part = bytes.get(..width.bytes() as usize).unwrap_or_default();
        let result = self.vcpu.write_linear(self.linear(segment, offset), part);
        self.note(result)
    }
}
