//! RDMSR and WRMSR: what [`super::msr`] leaves to the vCPU.

use super::Vcpu;
use super::events::Exception;
use super::msr::number::X2APIC_FIRST;
use super::msr::{GeneralProtection, Held, MsrRead, MsrWrite};
use super::pvclock::{self, SystemTime};
use crate::arch::registers::LightRegisters;
use crate::devices::local_apic::{Fault, Mode, register};
use crate::vmx::vmcs::guest;

const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const CR0_PG: u64 = 1 << 31;

impl From<GeneralProtection> for Exception {
    fn from(_: GeneralProtection) -> Self {
        Self::GeneralProtection
    }
}

impl From<Fault> for Exception {
    fn from(_: Fault) -> Self {
        Self::GeneralProtection
    }
}

impl Vcpu {
    pub(super) fn rdmsr(&mut self, registers: &mut LightRegisters) -> Result<(), Exception> {
        let value = match self.msrs.read(registers.rcx as u32)? {
            MsrRead::Value(value) => value,
            MsrRead::Held(held) => self.read_held(held)?,
        };
        registers.set_edx_eax(value);
        self.skip_instruction();
        Ok(())
    }

    pub(super) fn wrmsr(&mut self, registers: &mut LightRegisters) -> Result<(), Exception> {
        let (msr, value) = (registers.rcx as u32, registers.edx_eax());
        match self.msrs.write(msr, value)? {
            MsrWrite::Done => {}
            MsrWrite::Held(held, value) => self.write_held(held, value)?,
        }
        self.skip_instruction();
        Ok(())
    }

    fn read_held(&mut self, held: Held) -> Result<u64, Exception> {
        let now = self.now();
        Ok(match held {
            // Its reads do not exit.
            Held::Live(_) => return Err(Exception::GeneralProtection),
            Held::Efer => self.vmcs.read(guest::EFER),
            Held::Pat => self.vmcs.read(guest::PAT),
            Held::ApicBase => self.apic.base_msr(),
            Held::Tsc => self.tsc(now),
            Held::TscAdjust => self.tsc_adjust,
            Held::TscDeadline => self.tsc_deadline(now),
            Held::DebugCtl => self.vmcs.read(guest::DEBUGCTL),
            Held::X2Apic(register) => self
                .apic
                .msr_read(now, X2APIC_FIRST + u32::from(register))?,
            Held::KvmWallClock => self.wall_clock,
            Held::KvmSystemTime => self.system_time,
        })
    }

    fn write_held(&mut self, held: Held, value: u64) -> Result<(), Exception> {
        let now = self.now();
        match held {
            Held::Live(msr) => {
                if !self.live.write(msr, value) {
                    return Err(Exception::GeneralProtection);
                }
            }
            Held::Efer => self.write_efer(value)?,
            Held::Pat => self.vmcs.write(guest::PAT, value),
            Held::ApicBase => {
                self.apic.set_base_msr(now, value)?;
                self.cpuid
                    .set_apic_enabled(self.apic.mode() != Mode::Disabled);
                self.follow_apic_mode();
                self.publish_address();
                self.look_at_apic();
            }
            Held::Tsc => self.shift_tsc(now, value.wrapping_sub(self.tsc(now))),
            Held::TscAdjust => self.set_tsc_adjust(value),
            Held::TscDeadline => self.set_tsc_deadline(now, value),
            Held::DebugCtl => self.vmcs.write(guest::DEBUGCTL, value),
            Held::X2Apic(number) => {
                let msr = X2APIC_FIRST + u32::from(number);
                let action = self.apic.msr_write(now, msr, value)?;
                if register::is_address(u16::from(number) << 4) {
                    self.publish_address();
                }
                self.act(action);
            }
            Held::KvmWallClock => {
                let address = pvclock::wall_clock_address(value)?;
                self.wall_clock = value;
                let version = pvclock::next_version(self.vm.memory.read_u32(address).unwrap_or(0));
                let bytes = pvclock::wall_clock_bytes(version, self.vm.wall_clock);
                // An address without memory is the guest's mistake and gets nothing.
                let _ = self.vm.memory.write(address, &bytes);
            }
            Held::KvmSystemTime => {
                let system_time = SystemTime::from_msr(value)?;
                self.system_time = value;
                if let SystemTime::At(_) = system_time {
                    self.write_system_time(now);
                }
            }
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.vmcs.read(guest::EFER);
        if (value ^ old) & EFER_LME != 0 && self.cr0() & CR0_PG != 0 {
            return Err(Exception::GeneralProtection);
        }
        self.vmcs
            .write(guest::EFER, value & !EFER_LMA | old & EFER_LMA);
        Ok(())
    }
}
