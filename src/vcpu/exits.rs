//! VM exits, answered: one `match`, one line for each reason. What is frequent has a
//! short cut in [`super::light`].

use super::events::Exception;
use super::run::End;
use super::{Attention, Leave, Vcpu, light};
use crate::addr::Gva;
use crate::arch::cpu;
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::host::interrupts;
use crate::vmx::entry::{Guest, LightTable, Next};
use crate::vmx::exit::{Exit, InterruptionInfo};
use crate::vmx::vmcs::{Vmcs, guest, information};

impl Guest for Vcpu {
    const LIGHT: &'static LightTable<Self> = &light::TABLE;

    fn exit(&mut self, registers: &mut GeneralRegisters) -> Next {
        let reason = self.vmcs.read(information::EXIT_REASON);
        if let Err(exception) = self.answer(Exit::decode(reason, &self.vmcs), registers) {
            self.raise(exception);
        }
        self.attend()
    }

    fn attend(&mut self) -> Next {
        self.look_around()
    }

    fn vmcs(&self) -> &Vmcs {
        &self.vmcs
    }
}

impl Vcpu {
    #[inline(always)]
    fn answer(&mut self, exit: Exit, registers: &mut GeneralRegisters) -> Result<(), Exception> {
        match exit {
            Exit::Cpuid => self.answer_cpuid(registers.light()),
            Exit::Rdmsr => self.rdmsr(registers.light())?,
            Exit::Wrmsr => self.wrmsr(registers.light())?,
            Exit::Io(access) if access.string => self.string_port(access, registers)?,
            Exit::Io(access) => self.port(access, registers.light())?,
            Exit::ControlRegister(access) => self.control_register(access, registers)?,
            Exit::EptViolation(violation) => self.ept_violation(violation, registers)?,
            Exit::Hlt => self.hlt(),
            Exit::Xsetbv => self.xsetbv(registers.light())?,
            Exit::Vmcall => self.hypercall(registers),
            Exit::ExternalInterrupt(vector) => self.external_interrupt(vector),
            Exit::ExceptionOrNmi(info) => self.exception_or_nmi(info),
            Exit::PreemptionTimer => self.preemption_timer(),
            Exit::InterruptWindow | Exit::NmiWindow | Exit::TprBelowThreshold => {
                self.attend_to(Attention::EVENTS);
            }
            Exit::ApicPage(access) => self.apic_page(access, registers)?,
            Exit::VirtualizedEoi(vector) => self.virtualized_eoi(vector),
            Exit::ApicWrite(offset) => self.apic_write(offset),
            // Caches are the host's: no device of the guest reads memory behind them.
            Exit::CacheInvalidation | Exit::Invlpg => self.skip_instruction(),
            Exit::Pause => self.pause(),
            // The guest has no performance counters.
            Exit::Rdpmc => return Err(Exception::GeneralProtection),
            Exit::DebugRegister => self.debug_register(),
            Exit::VmxInstruction | Exit::Mwait | Exit::Monitor => {
                return Err(Exception::InvalidOpcode);
            }
            Exit::TripleFault => self.triple_fault(),
            Exit::TaskSwitch(switch) => self.task_switch(switch, registers)?,
            // The host's CPUs get neither while a guest runs on them.
            Exit::Init => self.end(End::Unsupported("an INIT signal")),
            Exit::StartUp => self.end(End::Unsupported("a start-up IPI")),
            Exit::EptMisconfiguration(gpa) => self.end(End::EptMisconfiguration(gpa)),
            Exit::EntryFailure { .. }
                if self.wrap_instruction_pointer() || self.give_segments_a_type() => {}
            Exit::EntryFailure {
                reason,
                qualification,
            } => self.end(End::EntryFailure {
                reason,
                qualification,
            }),
            Exit::Unexpected {
                reason,
                qualification,
            } => self.end(End::UnexpectedExit {
                reason,
                qualification,
            }),
        }
        Ok(())
    }

    /// The guest has raised an exception that cannot be delivered.
    pub(super) fn triple_fault(&mut self) {
        let rip = self.vmcs.read(guest::RIP);
        self.end(End::TripleFault {
            rip: Gva(rip),
            raised: self.raised.filter(|raised| raised.rip == rip),
        });
    }

    fn answer_cpuid(&mut self, registers: &mut LightRegisters) {
        let (leaf, subleaf) = (registers.rax as u32, registers.rcx as u32);
        *registers = self.cpuid.lookup(leaf, subleaf).into();
        self.skip_instruction();
    }

    #[inline]
    pub(super) fn hlt(&mut self) {
        self.skip_instruction();
        if self.has_wake_event() {
            self.attend_to(Attention::EVENTS);
        } else {
            self.leave(Leave::Halt);
        }
    }

    #[inline]
    pub(super) fn external_interrupt(&mut self, vector: u8) {
        interrupts::dispatch(vector);
        self.look_at_mail();
        self.attend_to(Attention::DEVICES);
    }

    /// The guest spins for so long that it waits for another vCPU.
    pub(super) fn pause(&mut self) {
        self.skip_instruction();
        self.leave_for(Leave::Spin);
    }

    #[inline]
    pub(super) fn preemption_timer(&mut self) {
        if !self.deliver_timer() {
            self.attend_to(Attention::DEVICES);
        }
    }

    fn exception_or_nmi(&mut self, info: InterruptionInfo) {
        if info.is_nmi() {
            self.keep_interrupted_event();
            interrupts::nmi();
            cpu::unblock_nmis();
            // It may be a kick, see `bochs`.
            self.look_at_mail();
        } else {
            self.exception(info);
        }
    }
}
