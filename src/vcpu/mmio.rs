//! EPT violations: memory that is mapped on first use, and device registers in memory.

use super::emulate::{
    Alignment, Arithmetic, Decoded, EmulateError, Mode, Move, Progress, Registers,
};
use super::events::{Exception, RFLAGS_RF};
use super::execution::{Execution, Known};
use super::known_code::Context;
use super::run::End;
use super::segmentation::{Addressing, Descriptor, Rights};
use super::{Attention, Vcpu};
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::arch::registers::GeneralRegisters;
use crate::devices::local_apic::{Action, Mode as ApicMode, register};
use crate::devices::{Width, pc};
use crate::vm::machine::Unmapped;
use crate::vm::slots::SlotKind;
use crate::vmx::exit::EptViolation;
use crate::vmx::vmcs::{guest, information};
use alloc::sync::Arc;

/// The longest instruction (SDM 2, 2.3.11).
const INSTRUCTION_MAX: usize = 15;
/// Iterations of a string instruction that are emulated in one exit: between them the
/// guest could take interrupts.
pub(super) const ITERATIONS: u32 = 32;

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
        match self
            .vm
            .map_page(violation.gpa, violation.write, violation.execute)
        {
            Ok(()) => {}
            Err(Unmapped::NoSlot) if delivering => {
                if !self.mark_descriptor(violation.gpa) {
                    self.end(End::NoMemoryForDelivery(violation.gpa));
                }
            }
            Err(Unmapped::NoSlot) if violation.execute || !violation.final_access => {
                // Code or page tables where there is no memory.
                self.end(End::NoMemory(violation.gpa));
            }
            Err(Unmapped::NoSlot) => {
                let linear = Gva(self.vmcs.read(information::GUEST_LINEAR_ADDRESS));
                let known = Known {
                    page: linear.align_down(PAGE_SIZE),
                    frame: violation.gpa.align_down(PAGE_SIZE),
                    write: violation.write,
                };
                return self.device_access(violation.gpa, Some(known), registers);
            }
            Err(Unmapped::Ept(error)) => self.end(End::Ept(error)),
        }
        Ok(())
    }

    /// The plain move that accesses a device, where it is known: what the rest of
    /// [`Vcpu::device_access`] would find.
    #[inline(always)]
    pub(super) fn known_move(&self, registers: &GeneralRegisters) -> Option<&Move> {
        let context = self.context();
        let plan = self.known.find_move(&self.vm.memory, context)?;
        self.is_aligned(plan.alignment, plan.width, context, registers)
            .then_some(plan)
    }

    /// Whether one access reaches all of an operand of this width.
    #[inline(always)]
    fn is_aligned(
        &self,
        alignment: Alignment,
        width: Width,
        context: Context,
        registers: &GeneralRegisters,
    ) -> bool {
        let base_is_aligned = || self.segment_base(alignment.segment) & (width.bytes() - 1) == 0;
        alignment.is_given(registers) && (Rights(context.rights).is_long() || base_is_aligned())
    }

    #[inline(always)]
    fn context(&self) -> Context {
        let rip = self.vmcs.read_basic(guest::RIP);
        let rights = self.vmcs.read_basic(guest::CS_ACCESS_RIGHTS);
        Context {
            address: if Rights(rights).is_long() {
                rip
            } else {
                self.linear_of(rip)
            },
            cr3: self.vmcs.read_basic(guest::CR3),
            rights,
        }
    }

    /// Where the guest executes, outside 64-bit code.
    #[cold]
    #[inline(never)]
    fn linear_of(&self, rip: u64) -> u64 {
        self.vmcs.read_basic(guest::CS_BASE).wrapping_add(rip) & 0xffff_ffff
    }

    /// Does the arithmetic on the device at `gpa` that the guest executes, where it is known;
    /// false where it is not, and nothing is done.
    #[inline(never)]
    pub(super) fn known_arithmetic(&mut self, gpa: Gpa, registers: &mut GeneralRegisters) -> bool {
        let context = self.context();
        let known = self
            .known
            .find_arithmetic(&self.vm.memory, context)
            .copied();
        let Some(plan) = known else {
            return false;
        };
        // A page that the guest may not write is not written.
        let is_read = || !EptViolation::is_write(&self.vmcs);
        if !self.is_aligned(plan.alignment, plan.width, context, registers)
            || plan.stores && is_read()
        {
            return false;
        }
        if plan.locked {
            self.locked_arithmetic(&plan, gpa, registers);
        } else {
            self.arithmetic(&plan, gpa, registers);
        }
        true
    }

    #[inline(never)]
    fn locked_arithmetic(&mut self, plan: &Arithmetic, gpa: Gpa, registers: &mut GeneralRegisters) {
        let vm = Arc::clone(&self.vm);
        let _bus_lock = vm.bus_lock.lock();
        self.arithmetic(plan, gpa, registers);
    }

    #[inline(always)]
    fn arithmetic(&mut self, plan: &Arithmetic, gpa: Gpa, registers: &mut GeneralRegisters) {
        let rflags = self.vmcs.read_basic(guest::RFLAGS);
        let value = self.device_read(gpa, plan.width);
        let computed = plan.compute(registers, value, rflags);
        if let Some(value) = computed.stored {
            self.device_write(gpa, plan.width, value);
        }
        let new = computed.rflags & !RFLAGS_RF;
        if new != rflags {
            self.vmcs.write(guest::RFLAGS, new);
        }
        self.step_over(plan.length.into());
        self.trap_single_step_of(rflags);
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

    /// Emulates the instruction that accesses the device at `gpa`, the page of which is
    /// `known` where the exit has told.
    pub(super) fn device_access(
        &mut self,
        gpa: Gpa,
        known: Option<Known>,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let rip = self.vmcs.read(guest::RIP);
        let mut context = self.context();
        if Rights(context.rights).is_long() && !self.is_64_bit() {
            // L means nothing outside IA-32e mode (SDM 3, 3.4.5).
            context.address = self.linear_of(rip);
        }
        let known_code = self.known.find(&self.vm.memory, context);
        let decoded = match known_code.copied().filter(|known| known.is_at(rip)) {
            Some(known) => known,
            None => match self.decode(rip, context) {
                Ok(decoded) => decoded,
                Err(EmulateError::Fault(exception)) => return Err(exception),
                Err(_) => return self.not_emulated(gpa, context),
            },
        };
        let vm = decoded.is_locked().then(|| Arc::clone(&self.vm));
        let _bus_lock = vm.as_ref().map(|vm| vm.bus_lock.lock());
        registers.rsp = self.vmcs.read(guest::RSP);
        let before = (registers.rsp, self.vmcs.read(guest::RFLAGS));
        let mut state = Registers {
            general: registers,
            rip,
            rflags: before.1,
        };
        let breakpoints = self.data_breakpoints();
        let iterations = breakpoints.iterations();
        let mut execution = Execution::new(self, known, breakpoints);
        let result = decoded.emulate(&mut state, &mut execution, iterations);
        let shadow = execution.loaded_stack_segment;
        let met = execution.breakpoints.met();
        if let Err(EmulateError::Incomplete | EmulateError::Unsupported) = result {
            return self.not_emulated(gpa, context);
        }
        if result == Ok(Progress::Done) {
            // An EPT violation saves RF set (SDM 3, 28.3.3); a completed instruction clears it.
            if !decoded.loads_resume_flag() {
                state.rflags &= !RFLAGS_RF;
            }
            self.vmcs.write(guest::RIP, state.rip);
        }
        if result.is_ok() {
            self.end_shadow(shadow);
        }
        if state.rflags != before.1 {
            self.vmcs.write(guest::RFLAGS, state.rflags);
        }
        if state.general.rsp != before.0 {
            self.vmcs.write(guest::RSP, state.general.rsp);
        }
        match result {
            Err(EmulateError::Fault(exception)) => Err(exception),
            _ => {
                self.trap_single_step_of(before.1);
                self.trap_data_breakpoints(met);
                Ok(())
            }
        }
    }

    /// The instruction at `rip`, which is `context`'s.
    fn decode(&mut self, rip: u64, context: Context) -> Result<Decoded, EmulateError> {
        let mode = if self.is_64_bit() {
            Mode::Bits64
        } else if Rights(context.rights).is_big() {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        let mut code = [0; INSTRUCTION_MAX];
        let start = Gva(context.address);
        let mut fetched = self.fetch(start, &mut code)?;
        let mut decoded = Decoded::new(code.get(..fetched).unwrap_or_default(), mode, rip);
        if decoded.as_ref().err() == Some(&EmulateError::Incomplete) {
            let next = start.wrapping_add(fetched as u64);
            let rest = code.get_mut(fetched..).unwrap_or_default();
            fetched += self.fetch(next, rest)?;
            decoded = Decoded::new(code.get(..fetched).unwrap_or_default(), mode, rip);
        }
        let decoded = decoded?;
        let paging = self.paging();
        let code = code.get(..fetched).unwrap_or_default();
        let watched = self.data_breakpoints().is_armed();
        if !watched && Rights(context.rights).is_long() == (mode == Mode::Bits64) {
            self.known
                .remember(&self.vm.memory, &paging, context, code, &decoded);
        }
        Ok(decoded)
    }

    fn not_emulated(&mut self, gpa: Gpa, context: Context) -> Result<(), Exception> {
        if self.mark_descriptor(gpa) {
            return Ok(());
        }
        let rip = Gva(context.address);
        let mut bytes = [0; INSTRUCTION_MAX];
        // It was there just now; else the message shows zeros.
        let _ = self.fetch(rip, &mut bytes);
        self.end(End::Instruction { rip, bytes, gpa });
        Ok(())
    }

    /// The CPU was about to set the accessed bit of a descriptor in ROM at `gpa`, which silicon
    /// forgets. Sets it there, where nobody looks, so that the CPU need not: whatever it does can
    /// be done again. False where it was about something else.
    #[cold]
    fn mark_descriptor(&self, gpa: Gpa) -> bool {
        let memory = &self.vm.memory;
        let kind = memory.slots().find(gpa).map(|slot| slot.kind);
        let linear = self.vmcs.read(information::GUEST_LINEAR_ADDRESS);
        let tables = [
            (guest::GDTR_BASE, guest::GDTR_LIMIT),
            (guest::LDTR_BASE, guest::LDTR_LIMIT),
        ];
        let offset = tables.into_iter().find_map(|(base, limit)| {
            let offset = linear.wrapping_sub(self.vmcs.read(base));
            (offset <= self.vmcs.read(limit).into()).then_some(offset)
        });
        let (Some(SlotKind::Rom), Some(offset)) = (kind, offset) else {
            return false;
        };
        // A page has all of it where tables are aligned to 8 bytes, as they are in ROM.
        let descriptor = Gpa(gpa.0.wrapping_sub(offset % Descriptor::BYTES));
        let marked = memory
            .read_u64(descriptor)
            .map(|found| (found, Descriptor(found).accessed()));
        match marked {
            Ok((found, Some(marked))) if marked.0 != found => {
                memory.write(descriptor, &marked.0.to_le_bytes()).is_ok()
            }
            _ => false,
        }
    }

    /// Whether the guest executes 64-bit code.
    pub(super) fn is_64_bit(&self) -> bool {
        self.addressing() == Addressing::Long
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
        if self.tier.delivers() {
            self.write_interrupt_status();
        }
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
