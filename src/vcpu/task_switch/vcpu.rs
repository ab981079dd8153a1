//! The task switch of a vCPU that has exited for one.

use super::{Beginning, Source, Task, TaskMachine};
use crate::addr::Gpa;
use crate::arch::cpu;
use crate::arch::registers::GeneralRegisters;
use crate::vcpu::Vcpu;
use crate::vcpu::breakpoints::DataBreakpoints;
use crate::vcpu::emulate::SystemSegment;
use crate::vcpu::execution::Execution;
use crate::vcpu::fault::{Exception, SegmentFault};
use crate::vcpu::segmentation::{Segment, SegmentRegister};
use crate::vmx::exit::{InterruptionInfo, TaskSwitch, TaskSwitchSource};
use crate::vmx::vmcs::{guest, information};

const SEGMENTS: [Segment; 6] = [
    Segment::Es,
    Segment::Cs,
    Segment::Ss,
    Segment::Ds,
    Segment::Fs,
    Segment::Gs,
];
const CR0_TS: u64 = 1 << 3;
/// BT of DR6.
const DR6_TASK: u64 = 1 << 15;
/// The event is no instruction's.
const EXTERNAL: u16 = 1;

impl TaskMachine for Execution<'_> {
    fn set_ldtr(&mut self, ldtr: SegmentRegister) {
        self.vcpu.set_system_segment(SystemSegment::Ldtr, ldtr);
    }

    fn set_cr3(&mut self, cr3: u32) {
        self.vcpu.load_cr3(Gpa(cr3.into()));
    }

    fn store_stack(&mut self, linear: u64, bytes: &[u8], cpl: u8) -> Result<(), Exception> {
        self.store_at_level(linear, bytes, cpl)
    }
}

impl Vcpu {
    /// Does the task switch that the guest has exited for.
    pub(in crate::vcpu) fn task_switch(
        &mut self,
        switch: TaskSwitch,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let event = InterruptionInfo(self.vmcs.read(information::IDT_VECTORING_INFO));
        let by_event = switch.source == TaskSwitchSource::Gate && event.is_valid();
        let source = match switch.source {
            TaskSwitchSource::Call => Source::Call,
            TaskSwitchSource::Iret => Source::Iret,
            TaskSwitchSource::Jump => Source::Jump,
            TaskSwitchSource::Gate => Source::Gate(
                (by_event && event.has_error_code())
                    .then(|| self.vmcs.read(information::IDT_VECTORING_ERROR_CODE)),
            ),
        };
        let external = by_event && !event.is_software();
        // An instruction is behind it when the task comes back to it; a fault is in front of it.
        let length = if external {
            0
        } else {
            self.vmcs.read(information::INSTRUCTION_LENGTH)
        };
        let before = self.task(registers);
        let mut task = Task {
            rip: before.rip.wrapping_add(length.into()) & 0xffff_ffff,
            ..before
        };
        let mut execution = Execution::new(self, None, DataBreakpoints::NONE);
        let left = super::leave(&task, &mut execution, switch.selector, source);
        let result = match left {
            Err(exception) => Err(exception),
            Ok(entering) => {
                let result = entering.enter(&mut task, &mut execution);
                self.set_task(&task, registers);
                self.end_shadow(false);
                if by_event && event.is_nmi() {
                    self.block_nmis_again();
                } else if source == Source::Iret {
                    self.unblock_nmis();
                }
                result
            }
        };
        match result {
            Ok(Beginning::Plain) => Ok(()),
            Ok(Beginning::Trap) => {
                cpu::set_dr6(cpu::dr6() | DR6_TASK);
                Err(Exception::Debug)
            }
            // In the old task the event was being delivered.
            Err(Exception::Segment(fault, code)) if external => Err(fault.with(code | EXTERNAL)),
            Err(Exception::GeneralProtection) if external => {
                Err(SegmentFault::GeneralProtection.with(EXTERNAL))
            }
            Err(exception) => Err(exception),
        }
    }

    fn task(&self, registers: &GeneralRegisters) -> Task {
        Task {
            general: GeneralRegisters {
                rsp: self.vmcs.read(guest::RSP),
                ..*registers
            },
            rip: self.vmcs.read(guest::RIP),
            rflags: self.vmcs.read(guest::RFLAGS),
            segments: SEGMENTS.map(|segment| self.segment(segment)),
            tr: self.system_segment(SystemSegment::Tr),
            cr0: self.cr0(),
            dr7: self.vmcs.read(guest::DR7),
        }
    }

    fn set_task(&mut self, task: &Task, registers: &mut GeneralRegisters) {
        *registers = task.general;
        self.vmcs.write(guest::RSP, task.general.rsp);
        self.vmcs.write(guest::RIP, task.rip);
        self.vmcs.write(guest::RFLAGS, task.rflags);
        for (segment, register) in SEGMENTS.into_iter().zip(task.segments) {
            self.set_segment(segment, register);
        }
        self.set_system_segment(SystemSegment::Tr, task.tr);
        // TS is the guest's own bit.
        let cr0 = self.vmcs.read(guest::CR0);
        self.vmcs.write(guest::CR0, cr0 | task.cr0 & CR0_TS);
        self.vmcs.write(guest::DR7, task.dr7);
    }
}
