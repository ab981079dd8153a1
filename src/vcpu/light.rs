//! Light exits: the table that the exit stub asks first.
//!
//! Each handler answers by the same method as the `match` in [`super::exits`], which
//! knows every reason; here are those that a busy guest causes. Those that need more than RAX,
//! RBX, RCX and RDX have all registers stored first ([`with_all`]).

use super::events::Exception;
use super::msr::number::{TSC_ADJUST, TSC_DEADLINE, X2APIC_EOI, X2APIC_ICR, X2APIC_SELF_IPI};
use super::{Attention, Vcpu, hypercall};
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::devices::{Width, pc};
use crate::vmx::apic::ApicPageAccess;
use crate::vmx::entry::{LightTable, Next, Verdict, WithAll, with_all};
use crate::vmx::exit::{ControlRegisterAccess, EptViolation, InterruptionInfo, IoAccess};
use crate::vmx::exit_reason::{REASONS, number};
use crate::vmx::vmcs::information;

/// The light handlers by exit reason.
pub(super) static TABLE: LightTable<Vcpu> = {
    let mut table: LightTable<Vcpu> = [heavy; REASONS];
    table[number::EXTERNAL_INTERRUPT] = external_interrupt;
    table[number::INTERRUPT_WINDOW] = look_at_events;
    table[number::NMI_WINDOW] = look_at_events;
    table[number::CPUID] = cpuid;
    table[number::HLT] = hlt;
    table[number::INVD] = skip;
    table[number::VMCALL] = vmcall;
    table[number::CONTROL_REGISTER] = with_all::<Vcpu, ControlRegisters>;
    table[number::IO] = io;
    table[number::RDMSR] = rdmsr;
    table[number::WRMSR] = wrmsr;
    table[number::PAUSE] = pause;
    table[number::TPR_BELOW_THRESHOLD] = look_at_events;
    table[number::APIC_ACCESS] = with_all::<Vcpu, ApicAccesses>;
    table[number::VIRTUALIZED_EOI] = virtualized_eoi;
    table[number::EPT_VIOLATION] = with_all::<Vcpu, EptViolations>;
    table[number::PREEMPTION_TIMER] = preemption_timer;
    table[number::WBINVD] = skip;
    table[number::XSETBV] = xsetbv;
    table[number::APIC_WRITE] = apic_write;
    table
};

extern "C" fn heavy(_: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    Verdict::HEAVY
}

/// The same for an exit that is heavy but rarely: the verdict is not loaded ahead of the others'.
#[cold]
#[inline(never)]
fn rarely_heavy() -> Verdict {
    core::hint::black_box(Verdict::HEAVY)
}

extern "C" fn skip(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    vcpu.skip_instruction();
    vcpu.verdict()
}

extern "C" fn pause(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    vcpu.pause();
    vcpu.verdict()
}

extern "C" fn cpuid(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let (leaf, subleaf) = (registers.rax as u32, registers.rcx as u32);
    let Some(&row) = vcpu.cpuid.row(leaf, subleaf) else {
        return Verdict::HEAVY;
    };
    *registers = row.into();
    vcpu.skip_instruction();
    vcpu.verdict()
}

extern "C" fn vmcall(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    if hypercall::exists(registers) {
        return rarely_heavy();
    }
    vcpu.no_hypercall(registers);
    vcpu.verdict()
}

extern "C" fn rdmsr(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let result = vcpu.rdmsr(registers);
    vcpu.conclude(result)
}

extern "C" fn wrmsr(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    // What a busy guest writes has a way of its own.
    match registers.rcx as u32 {
        TSC_DEADLINE => wrmsr_tsc_deadline(vcpu, registers),
        TSC_ADJUST => wrmsr_tsc_adjust(vcpu, registers),
        X2APIC_EOI => wrmsr_eoi(vcpu, registers),
        X2APIC_ICR => wrmsr_icr(vcpu, registers),
        X2APIC_SELF_IPI => wrmsr_self_ipi(vcpu, registers),
        _ => wrmsr_other(vcpu, registers),
    }
}

#[inline(never)]
extern "C" fn wrmsr_tsc_deadline(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    if !vcpu.arm_tsc_deadline(registers.edx_eax()) {
        return wrmsr_any_tsc_deadline(vcpu, registers);
    }
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn wrmsr_any_tsc_deadline(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    vcpu.set_tsc_deadline(vcpu.now(), registers.edx_eax());
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn wrmsr_tsc_adjust(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    vcpu.set_tsc_adjust(registers.edx_eax());
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn wrmsr_eoi(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let valid = vcpu.apic.is_x2apic() && registers.edx_eax() == 0;
    if !valid {
        return wrmsr_other(vcpu, registers);
    }
    vcpu.eoi();
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn wrmsr_icr(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    if !vcpu.apic.x2apic_self_ipi(registers.edx_eax()) {
        return wrmsr_other(vcpu, registers);
    }
    vcpu.attend_to(Attention::EVENTS);
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn wrmsr_self_ipi(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let vector = registers.edx_eax();
    if !vcpu.apic.is_x2apic() || vector > 0xff {
        return wrmsr_other(vcpu, registers);
    }
    vcpu.apic.send_to_itself(vector as u8);
    vcpu.attend_to(Attention::EVENTS);
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn wrmsr_other(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let result = vcpu.wrmsr(registers);
    vcpu.conclude(result)
}

extern "C" fn xsetbv(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let result = vcpu.xsetbv(registers);
    vcpu.conclude(result)
}

extern "C" fn hlt(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    vcpu.hlt();
    vcpu.verdict()
}

extern "C" fn look_at_events(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    vcpu.attend_to(Attention::EVENTS);
    vcpu.verdict()
}

extern "C" fn virtualized_eoi(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    let vector = vcpu.vmcs.read_basic(information::EXIT_QUALIFICATION);
    vcpu.virtualized_eoi(vector as u8);
    vcpu.verdict()
}

extern "C" fn apic_write(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    let offset = vcpu.vmcs.read_basic(information::EXIT_QUALIFICATION);
    vcpu.apic_write(offset as u16 & 0xfff);
    vcpu.verdict()
}

extern "C" fn external_interrupt(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    let info = InterruptionInfo(vcpu.vmcs.read(information::INTERRUPTION_INFO));
    vcpu.external_interrupt(info.vector());
    vcpu.verdict()
}

extern "C" fn preemption_timer(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    vcpu.preemption_timer();
    vcpu.verdict()
}

extern "C" fn io(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let qualification = vcpu.vmcs.read_basic(information::EXIT_QUALIFICATION);
    let access = IoAccess::decode(qualification);
    if access.string {
        return Verdict::HEAVY;
    }
    match (access.bytes, access.input) {
        (1, true) if pc::is_pic(access.port) => pic_read(vcpu, registers, access.port),
        (1, false) if pc::is_pic(access.port) => pic_write(vcpu, access.port, registers.rax as u8),
        (1, true) => input_byte(vcpu, registers, access.port),
        (1, false) => output_byte(vcpu, registers, access.port),
        _ => io_wide(vcpu, registers),
    }
}

#[inline(never)]
extern "C" fn pic_read(vcpu: &mut Vcpu, registers: &mut LightRegisters, port: u16) -> Verdict {
    let value = vcpu.with_chipset(|chipset| chipset.pic_read(port));
    registers.set_al(value);
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn pic_write(vcpu: &mut Vcpu, port: u16, value: u8) -> Verdict {
    vcpu.with_chipset(|chipset| chipset.pic_write(port, value));
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn input_byte(vcpu: &mut Vcpu, registers: &mut LightRegisters, port: u16) -> Verdict {
    let value = vcpu.port_in(port, Width::Byte);
    registers.set_al(value as u8);
    vcpu.skip_instruction();
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn output_byte(vcpu: &mut Vcpu, registers: &mut LightRegisters, port: u16) -> Verdict {
    if vcpu.port_out(port, Width::Byte, registers.rax as u32) {
        vcpu.skip_instruction();
    }
    vcpu.verdict()
}

#[inline(never)]
extern "C" fn io_wide(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let access = IoAccess::decode(vcpu.vmcs.read_basic(information::EXIT_QUALIFICATION));
    let result = vcpu.port(access, registers);
    vcpu.conclude(result)
}

/// Memory that is mapped on first use, and devices in memory.
struct EptViolations;

impl WithAll<Vcpu> for EptViolations {
    extern "C" fn answer(vcpu: &mut Vcpu, registers: &mut GeneralRegisters) -> Verdict {
        let violation = EptViolation::decode(&vcpu.vmcs);
        let gpa = violation.gpa;
        if violation.unblocked_nmis || vcpu.is_delivering() {
            return Verdict::HEAVY;
        }
        if !pc::is_interrupt_controller(gpa.0) {
            return if vcpu.vm.fill_page(gpa, violation.write) {
                vcpu.verdict()
            } else {
                Verdict::HEAVY
            };
        }
        if violation.execute || !violation.final_access {
            return Verdict::HEAVY;
        }
        let Some(plan) = vcpu.known_move(registers) else {
            return if vcpu.known_arithmetic(gpa, registers) {
                vcpu.verdict()
            } else {
                Verdict::HEAVY
            };
        };
        let (width, length) = (plan.width, plan.length);
        if plan.store {
            let value = plan.stored(registers);
            vcpu.device_write(gpa, width, value);
        } else {
            let plan = *plan;
            let value = vcpu.device_read(gpa, width);
            plan.load(registers, value);
        }
        vcpu.complete_access(length);
        vcpu.verdict()
    }
}

/// The local APIC's page, without register virtualization.
struct ApicAccesses;

impl WithAll<Vcpu> for ApicAccesses {
    extern "C" fn answer(vcpu: &mut Vcpu, registers: &mut GeneralRegisters) -> Verdict {
        let qualification = vcpu.vmcs.read_basic(information::EXIT_QUALIFICATION);
        let access = ApicPageAccess::decode(qualification);
        if !access.is_operand() || vcpu.tier.delivers() {
            return Verdict::HEAVY;
        }
        let Some(plan) = vcpu.known_move(registers) else {
            return Verdict::HEAVY;
        };
        let offset = access.offset.into();
        let (width, length) = (plan.width, plan.length);
        if plan.store {
            let value = plan.stored(registers);
            vcpu.local_apic_write(offset, width, value);
        } else {
            let plan = *plan;
            let value = vcpu.local_apic_read(offset, width);
            plan.load(registers, value);
        }
        vcpu.complete_access(length);
        vcpu.verdict()
    }
}

/// CR0, CR3, CR4 and CR8, as far as the guest does not own them.
struct ControlRegisters;

impl WithAll<Vcpu> for ControlRegisters {
    extern "C" fn answer(vcpu: &mut Vcpu, registers: &mut GeneralRegisters) -> Verdict {
        let qualification = vcpu.vmcs.read_basic(information::EXIT_QUALIFICATION);
        let access = ControlRegisterAccess::decode(qualification);
        let result = vcpu.control_register(access, registers);
        vcpu.conclude(result)
    }
}

impl Vcpu {
    /// What is left to do after an answer that may fault.
    #[inline(always)]
    fn conclude(&mut self, result: Result<(), Exception>) -> Verdict {
        if let Err(exception) = result {
            self.raise(exception);
        }
        self.verdict()
    }

    /// What is left to do after an answer.
    #[inline(always)]
    fn verdict(&mut self) -> Verdict {
        if self.timer.count_light_exit() {
            self.settle()
        } else {
            Verdict::RESUME
        }
    }

    /// Does what is left to do, but for leaving the run.
    #[inline(never)]
    fn settle(&mut self) -> Verdict {
        if self.attention.is_empty() {
            // Nothing but that many exits have left the timer alone.
            self.write_timer(self.now());
        } else if self.attention == Attention::EVENTS {
            self.attention = Attention::empty();
            self.inject();
            self.correct_timer();
        } else if self.attention.contains(Attention::LEAVE) || self.look_around() == Next::Leave {
            return Verdict(self.attention.bits());
        }
        Verdict::RESUME
    }
}
