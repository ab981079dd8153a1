//! Light exits: the table that the exit stub asks first.
//!
//! Each handler answers by the same method as the `match` in [`super::exits`], which
//! knows every reason; here are those that a busy guest causes and that need
//! no more than RAX, RBX, RCX and RDX.

use super::Vcpu;
use super::events::Exception;
use crate::arch::registers::LightRegisters;
use crate::vmx::entry::{LightTable, Verdict};
use crate::vmx::exit::IoAccess;
use crate::vmx::exit_reason::{REASONS, number};
use crate::vmx::vmcs::information;

/// The light handlers by exit reason.
pub(super) static TABLE: LightTable<Vcpu> = {
    let mut table: LightTable<Vcpu> = [heavy; REASONS];
    table[number::CPUID] = cpuid;
    table[number::INVD] = skip;
    table[number::VMCALL] = vmcall;
    table[number::IO] = io;
    table[number::RDMSR] = rdmsr;
    table[number::WRMSR] = wrmsr;
    table[number::PAUSE] = skip;
    table[number::WBINVD] = skip;
    table
};

extern "C" fn heavy(_: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    Verdict::HEAVY
}

extern "C" fn skip(vcpu: &mut Vcpu, _: &mut LightRegisters) -> Verdict {
    vcpu.skip_instruction();
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
    vcpu.vmcall(registers);
    vcpu.verdict()
}

extern "C" fn rdmsr(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let result = vcpu.rdmsr(registers);
    vcpu.conclude(result)
}

extern "C" fn wrmsr(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let result = vcpu.wrmsr(registers);
    vcpu.conclude(result)
}

extern "C" fn io(vcpu: &mut Vcpu, registers: &mut LightRegisters) -> Verdict {
    let access = IoAccess::decode(vcpu.vmcs.read(information::EXIT_QUALIFICATION));
    if access.string {
        return Verdict::HEAVY;
    }
    let result = vcpu.port(access, registers);
    vcpu.conclude(result)
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
        self.count_light_exit();
        Verdict(self.attention.bits())
    }
}
