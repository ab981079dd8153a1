//! The guest's exceptions that exit; all others stay in the guest.
//!
//! The delivery of #DB or #AC can raise the next one, without end: a breakpoint on the
//! stack that the delivery writes, a stack that is not aligned. A CPU in that loop takes
//! no interrupt at all (CVE-2015-8104, CVE-2015-5307), so each of them passes through
//! the hypervisor, which the host's interrupts can reach. #MC is the host's.

use super::Vcpu;
use super::run::End;
use crate::arch::cpu;
use crate::vmx::exit::InterruptionInfo;
use crate::vmx::vmcs::{guest, information};

const DEBUG: u8 = 1;
const ALIGNMENT_CHECK: u8 = 17;
const MACHINE_CHECK: u8 = 18;

/// The exception bitmap.
pub(super) const EXITING: u32 = 1 << DEBUG | 1 << ALIGNMENT_CHECK | 1 << MACHINE_CHECK;

/// B0 to B3, BD and BS of DR6: what the exit qualification has of it (SDM 3, 28.2.1).
const CONDITIONS: u64 = 0x600f;
const GENERAL_DETECT: u64 = 1 << 13;
const SINGLE_STEP: u64 = 1 << 14;
const BREAKPOINTS: u64 = 0xf;
const DR7_GENERAL_DETECT: u64 = 1 << 13;
const DEBUGCTL_BTF: u64 = 1 << 1;

impl Vcpu {
    /// An exception, of those in [`EXITING`], that the guest has raised.
    ///
    /// What it interrupted the delivery of is not gone on with: these are benign
    /// exceptions, which come first (SDM 3, table 7-5).
    pub(super) fn exception(&mut self, info: InterruptionInfo) {
        if info.unblocked_nmis() && !self.is_delivering() {
            self.block_nmis_again();
        }
        match info.vector() {
            DEBUG => self.note_debug_exception(info),
            ALIGNMENT_CHECK => {}
            MACHINE_CHECK => panic!("machine check while the guest {} ran", self.vm.name),
            _ => {
                self.end(End::Unsupported("an exception that was not asked for"));
                return;
            }
        }
        self.deliver_exception(info);
    }

    /// What the delivery of #DB changes, an exit does not, and an injection does not
    /// either (SDM 3, 28.1 and 27.6.1.1).
    fn note_debug_exception(&mut self, info: InterruptionInfo) {
        let conditions = self.vmcs.read(information::EXIT_QUALIFICATION);
        let conditions = conditions_of(conditions, info.is_software());
        cpu::set_dr6(dr6_after(cpu::dr6(), conditions));
        let dr7 = self.vmcs.read(guest::DR7);
        if dr7 & DR7_GENERAL_DETECT != 0 {
            self.vmcs.write(guest::DR7, dr7 & !DR7_GENERAL_DETECT);
        }
        let control = self.vmcs.read(guest::DEBUGCTL);
        if control & DEBUGCTL_BTF != 0 {
            self.vmcs.write(guest::DEBUGCTL, control & !DEBUGCTL_BTF);
        }
    }
}

/// Those of the exit qualification that are the exception's. INT1 meets none, and general
/// detect is a fault, before which a step has trapped, or never will behind MOV SS; Bochs
/// reports such a step with them.
const fn conditions_of(qualification: u64, is_software: bool) -> u64 {
    if is_software {
        0
    } else if qualification & GENERAL_DETECT != 0 {
        qualification & !SINGLE_STEP
    } else {
        qualification
    }
}

/// DR6 when these conditions are met: the breakpoints' bits are theirs alone, the
/// others are never cleared by the CPU (SDM 3, 18.2.3).
const fn dr6_after(dr6: u64, conditions: u64) -> u64 {
    dr6 & !BREAKPOINTS | conditions & CONDITIONS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_behind_mov_ss_is_no_condition_of_what_comes_then() {
        assert_eq!(conditions_of(SINGLE_STEP | 1, false), SINGLE_STEP | 1);
        assert_eq!(conditions_of(SINGLE_STEP, true), 0);
        let fault = GENERAL_DETECT | SINGLE_STEP;
        assert_eq!(conditions_of(fault, false), GENERAL_DETECT);
    }

    #[test]
    fn dr6_keeps_what_only_software_clears() {
        let reset = 0xffff_0ff0;
        assert_eq!(dr6_after(reset, 1 << 14), 0xffff_4ff0);
        assert_eq!(dr6_after(0xffff_4ff1, 2), 0xffff_4ff2);
        // Enabled or not, bit 12 of the qualification is no bit of DR6.
        assert_eq!(dr6_after(reset, 1 << 12 | 1), 0xffff_0ff1);
    }
}
