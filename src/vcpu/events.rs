//! Injection: what is delivered to the guest at the next entry, and in which
//! order (SDM 3, 7.9 and 27.6).

use super::{Attention, Vcpu};
use crate::devices::chipset::Chipset;
use crate::vmx::exit::InterruptionInfo;
use crate::vmx::vmcs::{control, guest, information};
use x86::vmx::vmcs::control::PrimaryControls;

pub use super::fault::Exception;
use super::fault::{self, Combined};

/// A fault that was raised, and by which instruction: where a guest stops for it,
/// that is what the operator wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    pub exception: Exception,
    /// The basic exit reason of the instruction.
    pub reason: u16,
    pub rip: u64,
}

/// Events that wait for the next entry.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// An event whose delivery an exit interrupted, with its error code and
    /// instruction length.
    interrupted: Option<(InterruptionInfo, u32, u32)>,
    exception: Option<Exception>,
    /// NMIs, up to [`Pending::most_nmis`].
    nmis: u32,
    /// The I/O APIC has passed the 8259s' INTR on.
    pub(super) extint: bool,
}

/// What an entry injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Nothing,
    /// The event whose delivery an exit interrupted.
    Again,
    Exception,
    Nmi,
    Interrupt,
}

const RFLAGS_IF: u64 = 1 << 9;
pub(super) const RFLAGS_RF: u64 = 1 << 16;
const BLOCKED_BY_STI: u32 = 1;
const BLOCKED_BY_MOV_SS: u32 = 1 << 1;
const BLOCKED_BY_NMI: u32 = 1 << 3;
/// The shadow of STI or MOV SS.
const SHADOW: u32 = BLOCKED_BY_STI | BLOCKED_BY_MOV_SS;

impl Pending {
    /// Whether nothing waits but what the interrupt controllers have.
    #[inline]
    const fn is_empty(&self) -> bool {
        self.interrupted.is_none() && self.exception.is_none() && self.nmis == 0 && !self.extint
    }

    /// How many NMIs may wait: one, while another is being handled, since a CPU remembers no more
    /// (SDM 3, 7.7.1). A CPU would have begun with the first of two by the time that the second
    /// comes, so two may where none is. Those that wait already are not lost.
    fn most_nmis(&self, interruptibility: u32) -> u32 {
        let delivered = |(info, ..): (InterruptionInfo, _, _)| info.is_nmi();
        let handled =
            interruptibility & BLOCKED_BY_NMI != 0 || self.interrupted.is_some_and(delivered);
        self.nmis.max(if handled { 1 } else { 2 })
    }

    /// First what was interrupted, then a fault of the instruction that exited; an NMI
    /// and an interrupt if the guest takes them now (SDM 3, 7.9 and 25.4.2).
    fn choose(&self, interrupt: bool, interruptibility: u32, rflags: u64) -> Choice {
        let shadow = interruptibility & SHADOW != 0;
        if self.interrupted.is_some() {
            Choice::Again
        } else if self.exception.is_some() {
            Choice::Exception
        } else if self.nmis != 0 && !shadow && interruptibility & BLOCKED_BY_NMI == 0 {
            Choice::Nmi
        } else if interrupt && !shadow && rflags & RFLAGS_IF != 0 {
            Choice::Interrupt
        } else {
            Choice::Nothing
        }
    }
}

impl Vcpu {
    /// So many NMIs more have come; those that are too many are lost.
    #[cold]
    pub(super) fn add_nmis(&mut self, count: u32) {
        let most = self
            .pending
            .most_nmis(self.vmcs.read(guest::INTERRUPTIBILITY));
        self.pending.nmis = self.pending.nmis.saturating_add(count).min(most);
    }

    /// Raises `exception` instead of completing the instruction that exited.
    #[cold]
    pub(super) fn raise(&mut self, exception: Exception) {
        let exception = match self.combined(exception) {
            Some(exception) => exception,
            None => return self.triple_fault(),
        };
        self.raised = Some(Raised {
            exception,
            reason: self.vmcs.read(information::EXIT_REASON) as u16,
            rip: self.vmcs.read(guest::RIP),
        });
        self.pending.exception = Some(exception);
        self.attend_to(Attention::EVENTS);
    }

    /// What comes of `exception` where the exit has interrupted the delivery of an event;
    /// `None` is a triple fault.
    fn combined(&mut self, exception: Exception) -> Option<Exception> {
        let event = InterruptionInfo(self.vmcs.read(information::IDT_VECTORING_INFO));
        if !event.is_valid() {
            return Some(exception);
        }
        // The event is not delivered: what is raised takes its place, as on the CPU.
        self.pending.interrupted = None;
        if !event.is_hardware_exception() {
            return Some(exception);
        }
        match fault::combine(event.vector(), exception.vector()) {
            Combined::Second => Some(exception),
            Combined::DoubleFault => Some(Exception::DoubleFault),
            Combined::TripleFault => None,
        }
    }

    /// Delivers the guest's own exception, which has exited. That ends the shadow of
    /// STI and MOV SS, with which an entry would ask for a pending debug exception.
    pub(super) fn deliver_exception(&mut self, info: InterruptionInfo) {
        let error = self.vmcs.read(information::INTERRUPTION_ERROR_CODE);
        let length = self.vmcs.read(information::INSTRUCTION_LENGTH);
        self.pending.interrupted = Some((info, error, length));
        self.attend_to(Attention::EVENTS);
        let interruptibility = self.vmcs.read(guest::INTERRUPTIBILITY);
        self.vmcs
            .write(guest::INTERRUPTIBILITY, interruptibility & !SHADOW);
    }

    /// Whether the exit interrupted the delivery of an event.
    #[inline(always)]
    pub(super) fn is_delivering(&self) -> bool {
        InterruptionInfo(self.vmcs.read_basic(information::IDT_VECTORING_INFO)).is_valid()
    }

    /// Remembers an event whose delivery this exit interrupted (SDM 3, 25.9.3); false
    /// where there was none.
    pub(super) fn keep_interrupted_event(&mut self) -> bool {
        let info = InterruptionInfo(self.vmcs.read(information::IDT_VECTORING_INFO));
        if info.is_valid() {
            let error = self.vmcs.read(information::IDT_VECTORING_ERROR_CODE);
            let length = self.vmcs.read(information::INSTRUCTION_LENGTH);
            self.pending.interrupted = Some((info, error, length));
            self.attend_to(Attention::EVENTS);
        }
        info.is_valid()
    }

    /// The exit interrupted an IRET that had already ended the blocking of NMIs:
    /// the IRET is executed again, so they are blocked until then (SDM 3, 28.2.3).
    pub(super) fn block_nmis_again(&mut self) {
        let interruptibility = self.vmcs.read(guest::INTERRUPTIBILITY);
        self.vmcs
            .write(guest::INTERRUPTIBILITY, interruptibility | BLOCKED_BY_NMI);
    }

    /// Whether something would wake the guest from HLT: a debug trap too, for an HLT
    /// that was single-stepped.
    pub(super) fn has_wake_event(&mut self) -> bool {
        if self.tier.delivers() {
            self.apic.refresh();
        }
        let interrupt = self.apic.pending().is_some() || self.has_extint();
        let nmi =
            self.pending.nmis != 0 && self.vmcs.read(guest::INTERRUPTIBILITY) & BLOCKED_BY_NMI == 0;
        nmi || interrupt && self.vmcs.read(guest::RFLAGS) & RFLAGS_IF != 0
            || self.vmcs.read(guest::PENDING_DEBUG) != 0
    }

    /// Whether the guest waits for an interrupt that it has masked: forever.
    pub(super) fn interrupts_are_off(&self) -> bool {
        self.vmcs.read(guest::RFLAGS) & RFLAGS_IF == 0
    }

    pub(super) fn has_interrupt(&self) -> bool {
        !self.tier.delivers() && self.apic.pending().is_some() || self.has_extint()
    }

    fn has_extint(&self) -> bool {
        self.pending.extint || self.vm.signals.intr() && self.apic.lint0_takes_extint()
    }

    /// Injects what comes first. Asks for a window exit when something has to wait:
    /// it must not wait for an exit that may not come.
    #[inline]
    pub(super) fn inject(&mut self) {
        if self.tier.delivers() {
            self.inject_beside_cpu();
        } else if self.pending.is_empty() && !self.has_extint() {
            self.inject_from_apic();
        } else {
            self.inject_first();
        }
    }

    /// [`Vcpu::inject`] where the CPU delivers what the local APIC has.
    #[inline(never)]
    fn inject_beside_cpu(&mut self) {
        self.pass_requests();
        if self.pending.is_empty() && !self.has_extint() {
            self.set_window(false, false);
        } else {
            self.inject_first();
        }
    }

    /// [`Vcpu::inject`] where at most the local APIC has something: mostly.
    #[inline(never)]
    fn inject_from_apic(&mut self) {
        let Some(vector) = self.apic.pending() else {
            self.set_threshold(self.apic.threshold());
            return self.set_window(false, false);
        };
        // The TPR holds nothing back that could come before this one.
        self.set_threshold(0);
        let interruptibility = self.vmcs.read_basic(guest::INTERRUPTIBILITY);
        let rflags = self.vmcs.read_basic(guest::RFLAGS);
        let trap = self.vmcs.read_basic(guest::PENDING_DEBUG);
        if interruptibility & SHADOW != 0 || rflags & RFLAGS_IF == 0 || trap != 0 {
            return self.set_window(true, false);
        }
        self.apic.take_into_service(vector);
        self.inject_event(InterruptionInfo::interrupt(vector), 0);
        // What else the APIC has comes after this one.
        self.set_window(false, false);
    }

    #[inline(never)]
    fn inject_first(&mut self) {
        let interrupt = self.has_interrupt();
        let interruptibility = self.vmcs.read(guest::INTERRUPTIBILITY);
        let rflags = self.vmcs.read(guest::RFLAGS);
        let mut choice = self.pending.choose(interrupt, interruptibility, rflags);
        if matches!(choice, Choice::Nmi | Choice::Interrupt)
            && self.vmcs.read(guest::PENDING_DEBUG) != 0
        {
            // A debug trap comes first, and an injection would have the CPU forget it (SDM 3, 27.7.3).
            choice = Choice::Nothing;
        }
        let nothing = matches!(choice, Choice::Nothing);
        match choice {
            Choice::Again => {
                if let Some((info, error, length)) = self.pending.interrupted.take() {
                    self.inject_again(info, error, length);
                }
            }
            Choice::Exception => {
                if let Some(exception) = self.pending.exception.take() {
                    self.inject_exception(exception);
                }
            }
            Choice::Nmi => {
                self.pending.nmis -= 1;
                self.inject_event(InterruptionInfo::NMI, 0);
            }
            Choice::Interrupt => {
                if let Some(vector) = self.take_interrupt() {
                    self.inject_event(InterruptionInfo::interrupt(vector), 0);
                }
            }
            Choice::Nothing => {}
        }
        // Behind STI a CPU may say that an NMI can be taken (SDM 3, 26.2), where none is injected:
        // that would have no end. It says nothing there of interrupts, which are on.
        let behind_sti = nothing && interruptibility & BLOCKED_BY_STI != 0;
        let nmi = self.pending.nmis != 0;
        let nmi_window = nmi && !behind_sti && self.vmx.controls.has_virtual_nmis();
        let interrupt = self.has_interrupt();
        self.set_window(interrupt || nmi && behind_sti, nmi_window);
        let threshold = if self.tier.delivers() {
            0
        } else {
            self.apic.threshold()
        };
        self.set_threshold(threshold);
        if nmi && !nmi_window {
            // No window says when it can be taken: every exit is a chance.
            self.attend_to(Attention::EVENTS);
        }
    }

    /// Goes on with a delivery that an exit interrupted.
    fn inject_again(&mut self, info: InterruptionInfo, error: u32, length: u32) {
        let info = info_again(info, self.cr0() & 1 != 0);
        self.inject_event(info, error);
        if info.is_software() {
            self.vmcs.write(control::ENTRY_INSTRUCTION_LENGTH, length);
        }
        if info.is_nmi() {
            // An NMI blocks NMIs when it is delivered, and is not injected while they are
            // blocked (SDM 3, 27.3.1.5).
            let interruptibility = self.vmcs.read(guest::INTERRUPTIBILITY);
            self.vmcs
                .write(guest::INTERRUPTIBILITY, interruptibility & !BLOCKED_BY_NMI);
        }
    }

    /// The interrupt that the CPU would acknowledge now. The 8259's, through LINT0 or
    /// the I/O APIC, comes first: it has no priority against the local APIC's.
    fn take_interrupt(&mut self) -> Option<u8> {
        if self.has_extint() {
            self.pending.extint = false;
            return Some(self.with_chipset(Chipset::acknowledge_pic));
        }
        self.apic.acknowledge()
    }

    fn inject_exception(&mut self, exception: Exception) {
        // A fault pushes RF set, so that its instruction's breakpoint is not met twice; an
        // injection pushes what is there (SDM 3, 18.3.1.1 and 27.6.1.1).
        if exception != Exception::Debug {
            let rflags = self.vmcs.read(guest::RFLAGS);
            self.vmcs.write(guest::RFLAGS, rflags | RFLAGS_RF);
        }
        if let Exception::PageFault { address, .. } = exception {
            crate::arch::cpu::set_cr2(address);
        }
        // Real mode pushes no error code (SDM 3, 27.2.1.3).
        let error_code = exception.error_code().filter(|_| self.cr0() & 1 != 0);
        let info = InterruptionInfo::exception(exception.vector(), error_code.is_some());
        self.inject_event(info, error_code.unwrap_or(0));
    }

    fn inject_event(&mut self, info: InterruptionInfo, error: u32) {
        self.vmcs
            .write(control::ENTRY_INTERRUPTION_INFO, info.as_entry());
        if info.has_error_code() {
            self.vmcs.write(control::ENTRY_ERROR_CODE, error);
        }
    }

    fn set_window(&mut self, interrupt: bool, nmi: bool) {
        let interrupt_window = PrimaryControls::INTERRUPT_WINDOW_EXITING.bits();
        let nmi_window = PrimaryControls::NMI_WINDOW_EXITING.bits();
        let mut primary = self.primary & !(interrupt_window | nmi_window);
        if interrupt {
            primary |= interrupt_window;
        }
        if nmi {
            primary |= nmi_window;
        }
        if primary != self.primary {
            self.primary = primary;
            self.vmcs.write(control::PRIMARY, primary);
        }
    }

    /// An IRET ends the blocking of NMIs.
    pub(super) fn unblock_nmis(&mut self) {
        let interruptibility = self.vmcs.read(guest::INTERRUPTIBILITY);
        self.vmcs
            .write(guest::INTERRUPTIBILITY, interruptibility & !BLOCKED_BY_NMI);
    }

    /// Moves past the instruction that exited, as completing it would: its
    /// shadow of STI and MOV SS ends, and single-stepping traps (SDM 3, 27.7.3).
    #[inline(always)]
    pub(super) fn skip_instruction(&mut self) {
        let length = self.vmcs.read_basic(information::INSTRUCTION_LENGTH);
        self.advance_rip(length);
    }

    #[inline(always)]
    pub(super) fn advance_rip(&mut self, length: u32) {
        self.step_over(length);
        self.trap_single_step();
    }

    /// The same without the trap.
    #[inline(always)]
    pub(super) fn step_over(&mut self, length: u32) {
        let rip = self.vmcs.read_basic(guest::RIP);
        // Where EIP wraps the entry fails: see `wrap_instruction_pointer`.
        self.vmcs
            .write(guest::RIP, rip.wrapping_add(u64::from(length)));
        self.end_shadow(false);
    }

    /// Ends the shadow of STI and MOV SS behind an instruction, which may have been another
    /// MOV SS (`again`).
    #[inline(always)]
    pub(super) fn end_shadow(&mut self, again: bool) {
        let interruptibility = self.vmcs.read_basic(guest::INTERRUPTIBILITY);
        let shadow = if again { BLOCKED_BY_MOV_SS } else { 0 };
        if interruptibility & SHADOW != shadow {
            self.vmcs
                .write(guest::INTERRUPTIBILITY, interruptibility & !SHADOW | shadow);
        }
    }

    /// Outside 64-bit code an instruction pointer beyond 32 bits wraps, and an entry
    /// refuses it (SDM 3, 27.3.1.4). This is so rare that the refusal is waited for;
    /// false where it had another reason.
    #[cold]
    pub(super) fn wrap_instruction_pointer(&mut self) -> bool {
        let rip = self.vmcs.read(guest::RIP);
        let wraps = rip >> 32 != 0 && !self.is_64_bit();
        if wraps {
            self.vmcs.write(guest::RIP, rip & 0xffff_ffff);
        }
        wraps
    }

    /// The trap after an instruction, or an iteration of one, that the hypervisor has
    /// completed.
    #[inline(always)]
    pub(super) fn trap_single_step(&mut self) {
        self.trap_single_step_of(self.vmcs.read_basic(guest::RFLAGS));
    }

    /// The same, where RFLAGS is at hand.
    #[inline(always)]
    pub(super) fn trap_single_step_of(&mut self, rflags: u64) {
        const RFLAGS_TF: u64 = 1 << 8;
        if rflags & RFLAGS_TF != 0 {
            self.set_single_step_trap();
        }
    }

    #[cold]
    fn set_single_step_trap(&mut self) {
        const SINGLE_STEP: u64 = 1 << 14;
        const DEBUGCTL_BTF: u64 = 1 << 1;
        // With BTF only branches trap, and nothing that exits branches (SDM 3, 18.4.3).
        if self.vmcs.read(guest::DEBUGCTL) & DEBUGCTL_BTF == 0 {
            let pending = self.vmcs.read(guest::PENDING_DEBUG);
            self.vmcs.write(guest::PENDING_DEBUG, pending | SINGLE_STEP);
        }
    }
}

/// What an entry is told of an event whose delivery was interrupted, in `protected` mode or not.
const fn info_again(info: InterruptionInfo, protected: bool) -> InterruptionInfo {
    if protected { info } else { info.in_real_mode() }
}

#[cfg(test)]
mod tests;
