//! Hypercalls, with KVM's numbers: RAX is the number and then the result, RBX, RCX, RDX and RSI
//! are the arguments. Outside 64-bit code only the lower halves count. Linux,
//! `Documentation/virt/kvm/x86/hypercalls.rst`.

use super::Vcpu;
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::devices::Message;
use crate::devices::local_apic::Command;

/// KVM_HC_SEND_IPI: RSI is the lower half of an interrupt command, for those local APICs whose bits
/// are set in RBX and RCX, of which the first is the one with the identifier RDX. The result is how
/// many there are. CPUID does not name it: a write of the ICR reaches as many by a lighter exit.
const SEND_IPI: u64 = 10;

/// -KVM_ENOSYS: there is no such hypercall.
const NO_SUCH_HYPERCALL: u64 = -1000i64 as u64;
/// -KVM_EPERM: it is not for CPL 3.
const NOT_PERMITTED: u64 = -1i64 as u64;
/// -KVM_EINVAL: an argument is wrong.
const INVALID: u64 = -22i64 as u64;

/// Logical destinations in an interrupt command (SDM 3, figure 12-12) ...
const LOGICAL: u32 = 1 << 11;
/// ... and the shorthand.
const SHORTHAND: u32 = 3 << 18;

/// Whether there may be such a hypercall.
#[inline(always)]
pub(super) const fn exists(registers: &LightRegisters) -> bool {
    registers.rax as u32 == SEND_IPI as u32
}

impl Vcpu {
    /// Answers VMCALL.
    pub(super) fn hypercall(&mut self, registers: &mut GeneralRegisters) {
        let is_long = self.is_64_bit();
        let argument = |value: u64| if is_long { value } else { value & 0xffff_ffff };
        if argument(registers.rax) != SEND_IPI {
            return self.no_hypercall(registers.light());
        }
        let bits = if is_long { 64 } else { 32 };
        let targets =
            u128::from(argument(registers.rcx)) << bits | u128::from(argument(registers.rbx));
        registers.rax = if self.cpl() == 0 {
            match command(registers.rsi as u32) {
                Command::Send(message) => self.send_to(targets, registers.rdx as u32, message),
                // No local APIC sends it.
                Command::IllegalVector => 0,
                Command::Invalid => INVALID,
            }
        } else {
            NOT_PERMITTED
        };
        self.skip_instruction();
    }

    /// Answers one that does not exist.
    #[inline(always)]
    pub(super) fn no_hypercall(&mut self, registers: &mut LightRegisters) {
        #[cfg(feature = "count-vmcs")]
        if registers.rax == crate::vmx::count::HYPERCALL {
            [registers.rax, registers.rcx, registers.rdx] = crate::vmx::count::sums();
            return self.skip_instruction();
        }
        registers.rax = NO_SUCH_HYPERCALL;
        self.skip_instruction();
    }

    /// Sends a message to the vCPUs whose bits are set; bit 0 is vCPU `first`. How many there are.
    fn send_to(&mut self, targets: u128, first: u32, message: Message) -> u64 {
        let mut count = 0;
        for id in first..self.vm.vcpus() {
            if targets
                .checked_shr(id - first)
                .is_some_and(|rest| rest & 1 != 0)
            {
                self.deliver_to(id, message);
                count += 1;
            }
        }
        count
    }
}

/// What the lower half of an interrupt command asks for, but for whom.
fn command(low: u32) -> Command {
    if low & LOGICAL != 0 {
        return Command::Invalid;
    }
    Command::decode(low & !SHORTHAND, 0, u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::DeliveryMode;

    #[test]
    fn commands_are_as_the_icr_has_them() {
        let mode = |low| match command(low) {
            Command::Send(message) => Some((message.mode, message.vector)),
            _ => None,
        };
        assert_eq!(mode(0x41), Some((DeliveryMode::Fixed, 0x41)));
        assert_eq!(mode(0x41 | SHORTHAND), Some((DeliveryMode::Fixed, 0x41)));
        assert_eq!(mode(4 << 8), Some((DeliveryMode::Nmi, 0)));
        assert_eq!(command(0x41 | LOGICAL), Command::Invalid);
        assert_eq!(command(0xf), Command::IllegalVector);
    }
}
