//! What the guest's RDMSR and WRMSR do.
//!
//! Every MSR is in exactly one class: *direct* ones are the guest's own in the
//! hardware and do not exit; *held* ones live in the vCPU (its VMCS, its APIC,
//! its clock), and the caller is told which and with what checked value;
//! *stored* and *constant* ones are answered here. All others fault, as on
//! silicon, and are counted. A held value has been checked for reserved bits,
//! not for what depends on the vCPU's state; [`Held`] says what is left to do.
//!
//! Numbers and layouts: SDM 4, chapter 2.

mod mtrr;

#[cfg(test)]
mod tests;

use super::cpuid::{self, CpuidTable};
use crate::vmx::live_state;
use core::ops::Range;
use mtrr::Mtrrs;

/// The access faults: the guest gets #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// MSR numbers that the vCPU needs by name.
pub mod number {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_EOI: u32 = 0x80b;
    pub const X2APIC_ICR: u32 = 0x830;
    pub const X2APIC_SELF_IPI: u32 = 0x83f;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const XSS: u32 = 0xda0;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

use number::*;

/// An MSR whose value the vCPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// One of [`live_state::WRITTEN`], which reads without an exit. On a write: the CPU is left to
    /// check the value.
    Live(u32),
    /// IA32_EFER. On a write: LMA stays as it is, and changing LME with paging on is #GP.
    Efer,
    /// IA32_PAT; memory types were checked.
    Pat,
    /// IA32_APIC_BASE. On a write: the transition between modes is left to check.
    ApicBase,
    /// IA32_TIME_STAMP_COUNTER.
    Tsc,
    /// IA32_TSC_ADJUST.
    TscAdjust,
    /// IA32_TSC_DEADLINE. Reads as 0, and ignores writes, in other timer modes.
    TscDeadline,
    /// IA32_DEBUGCTL; only BTF (bit 1) reaches the vCPU.
    DebugCtl,
    /// The register `0x800 + n`; #GP when the APIC is not in x2APIC mode.
    X2Apic(u8),
    /// KVM's wall clock: [`super::pvclock::wall_clock_address`].
    KvmWallClock,
    /// KVM's clock of this vCPU: [`super::pvclock::SystemTime::from_msr`].
    KvmSystemTime,
}

/// The answer to RDMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRead {
    Value(u64),
    Held(Held),
}

/// The answer to WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrWrite {
    Done,
    /// The vCPU takes this value.
    Held(Held, u64),
}

/// An MSR that the guest may access without an exit, for the MSR bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    pub msr: u32,
    pub read: bool,
    pub write: bool,
}

/// What the MSRs of a vCPU cannot learn from its CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The host's IA32_BIOS_SIGN_ID, with the microcode revision in the upper half.
    pub bios_sign_id: u64,
    /// See [`cpuid::Options::fast_strings`].
    pub fast_strings: bool,
}

/// How often the guest touched an MSR that it does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unknown {
    pub reads: u64,
    pub writes: u64,
    /// The last such MSR.
    pub last: u32,
}

/// IA32_MISC_ENABLE: branch-trace and precise-event storage unavailable (bits 11 and 12).
const MISC_ENABLE_RESET: u64 = 1 << 11 | 1 << 12;
/// IA32_MISC_ENABLE: fast strings, on which CPUID's ERMS and FSRM rely.
pub const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// IA32_MISC_ENABLE: what a guest may write. Behind fast strings these are switches that remember
/// and do nothing, for features that are not shown or stay as they are: thermal control, SpeedStep,
/// MONITOR, the limit of CPUID, xTPR messages, XD.
const MISC_ENABLE_WRITABLE: u64 =
    MISC_ENABLE_FAST_STRINGS | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
/// IA32_FEATURE_CONTROL: locked, with VMX off in and outside SMX.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// IA32_DEBUGCTL: single-step on branches. LBR (bit 0) has no records to show and is dropped.
const DEBUGCTL_BTF: u64 = 1 << 1;
const DEBUGCTL_LBR: u64 = 1;
/// IA32_APIC_BASE: BSP, x2APIC, global enable; the address above bit 12.
const APIC_BASE_FLAGS: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// The MSRs of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Msrs {
    options: Options,
    direct: [Option<Direct>; 15],
    efer_allowed: u64,
    /// Address bits that a register may hold, below MAXPHYADDR.
    physical_mask: u64,
    xsaves: bool,
    misc_enable: u64,
    mtrrs: Mtrrs,
    unknown: Unknown,
}

impl Msrs {
    /// The state after a reset, for a vCPU with this CPUID.
    pub fn new(table: &CpuidTable, options: Options) -> Self {
        let physical_mask = (1 << table.physical_address_bits().min(52)) - 1;
        let both = |msr| {
            Some(Direct {
                msr,
                read: true,
                write: true,
            })
        };
        let read = |msr| {
            Some(Direct {
                msr,
                read: true,
                write: false,
            })
        };
        let only_if = |present: bool, direct: Option<Direct>| direct.filter(|_| present);
        let command = |msr| {
            Some(Direct {
                msr,
                read: false,
                write: true,
            })
        };
        Self {
            options,
            direct: [
                // Reading the counter adds the VM's offset in hardware; writing changes that offset.
                read(TSC),
                both(SYSENTER_CS),
                both(SYSENTER_ESP),
                both(SYSENTER_EIP),
                read(STAR),
                read(LSTAR),
                read(CSTAR),
                read(FMASK),
                both(FS_BASE),
                both(GS_BASE),
                both(KERNEL_GS_BASE),
                only_if(table.has_rdtscp(), read(TSC_AUX)),
                only_if(table.has_spec_ctrl(), both(SPEC_CTRL)),
                only_if(table.has_pred_cmd(), command(PRED_CMD)),
                only_if(table.has_flush_cmd(), command(FLUSH_CMD)),
            ],
            efer_allowed: cpuid::efer_allowed(table),
            physical_mask,
            xsaves: table.has_xsaves(),
            misc_enable: MISC_ENABLE_RESET | u64::from(options.fast_strings),
            mtrrs: Mtrrs::default(),
            unknown: Unknown::default(),
        }
    }

    /// Sets the MTRRs as firmware leaves them: write-back everywhere but in the
    /// VGA window and in `mmio`, a range that ends at a power of two, as the
    /// hole below 4 GiB does.
    pub fn set_firmware_mtrrs(&mut self, mmio: Range<u64>) {
        self.mtrrs = Mtrrs::firmware(mmio, self.physical_mask);
    }

    /// What the MSR bitmap opens. An MSR of these that exits all the same
    /// (there is no bitmap) is unknown to [`Msrs::read`] and [`Msrs::write`].
    pub fn direct(&self) -> impl Iterator<Item = Direct> + '_ {
        self.direct.iter().flatten().copied()
    }

    /// Accesses to MSRs that the guest does not have.
    pub fn unknown(&self) -> Unknown {
        self.unknown
    }

    /// RDMSR.
    pub fn read(&mut self, msr: u32) -> Result<MsrRead, GeneralProtection> {
        if let Some(held) = held(msr) {
            return Ok(MsrRead::Held(held));
        }
        let value = match msr {
            // P5_MC_ADDR, P5_MC_TYPE, IA32_PLATFORM_ID, EBL_CR_POWERON: read unasked by
            // drivers of old CPUs; nothing to report.
            0x0 | 0x1 | 0x17 | 0x2a => Some(0),
            FEATURE_CONTROL => Some(FEATURE_CONTROL_LOCKED),
            BIOS_SIGN_ID => Some(self.options.bios_sign_id),
            // No ratio of the TSC to a bus clock, whose frequency is another with each model: who
            // finds none measures, or asks CPUID.
            PLATFORM_INFO => Some(0),
            // No machine-check banks.
            MCG_CAP | MCG_STATUS => Some(0),
            MISC_ENABLE => Some(self.misc_enable),
            XSS if self.xsaves => Some(0),
            _ => self.mtrrs.read(msr),
        };
        value.map(MsrRead::Value).ok_or_else(|| {
            self.unknown.reads = self.unknown.reads.wrapping_add(1);
            self.unknown.last = msr;
            GeneralProtection
        })
    }

    /// WRMSR.
    pub fn write(&mut self, msr: u32, value: u64) -> Result<MsrWrite, GeneralProtection> {
        if live_state::WRITTEN.contains(&msr) && self.direct().any(|direct| direct.msr == msr) {
            return Ok(MsrWrite::Held(Held::Live(msr), value));
        }
        if let Some(held) = held(msr) {
            let value = self.check_held(held, value).ok_or(GeneralProtection)?;
            return Ok(MsrWrite::Held(held, value));
        }
        let accepted = match msr {
            // Linux writes 0 before CPUID, which loads the revision: here it is always loaded.
            BIOS_SIGN_ID => true,
            MISC_ENABLE => {
                let accepted = (value ^ self.misc_enable) & !MISC_ENABLE_WRITABLE == 0;
                if accepted {
                    self.misc_enable = value;
                }
                accepted
            }
            // Only 0 may be written (SDM 3, 16.3.1.2). XSS: leaf 0xD shows no supervisor component.
            MCG_STATUS => value == 0,
            XSS if self.xsaves => value == 0,
            0x0 | 0x1 => true,
            0x17 | 0x2a | FEATURE_CONTROL | PLATFORM_INFO | MCG_CAP | MTRR_CAP => false,
            _ => match self.mtrrs.write(msr, value, self.physical_mask) {
                Some(accepted) => accepted,
                None => {
                    self.unknown.writes = self.unknown.writes.wrapping_add(1);
                    self.unknown.last = msr;
                    false
                }
            },
        };
        if accepted {
            Ok(MsrWrite::Done)
        } else {
            Err(GeneralProtection)
        }
    }

    /// The value as the vCPU takes it, or `None` when a reserved bit is set.
    fn check_held(&self, held: Held, value: u64) -> Option<u64> {
        let valid = match held {
            Held::Efer => value & !self.efer_allowed == 0,
            Held::Pat => value.to_le_bytes().iter().all(|&t| is_pat_type(t)),
            Held::ApicBase => value & !(self.physical_mask & !0xfff | APIC_BASE_FLAGS) == 0,
            Held::DebugCtl => {
                return (value & !(DEBUGCTL_BTF | DEBUGCTL_LBR) == 0)
                    .then_some(value & DEBUGCTL_BTF);
            }
            Held::Tsc | Held::TscAdjust | Held::TscDeadline | Held::Live(_) => true,
            // 32-bit registers but for the interrupt command register (SDM 3, 12.12.1.2).
            Held::X2Apic(register) => register == 0x30 || value >> 32 == 0,
            Held::KvmWallClock => super::pvclock::wall_clock_address(value).is_ok(),
            Held::KvmSystemTime => super::pvclock::SystemTime::from_msr(value).is_ok(),
        };
        valid.then_some(value)
    }
}

fn held(msr: u32) -> Option<Held> {
    Some(match msr {
        TSC => Held::Tsc,
        APIC_BASE => Held::ApicBase,
        TSC_ADJUST => Held::TscAdjust,
        DEBUGCTL => Held::DebugCtl,
        PAT => Held::Pat,
        TSC_DEADLINE => Held::TscDeadline,
        X2APIC_FIRST..=X2APIC_LAST => Held::X2Apic((msr - X2APIC_FIRST) as u8),
        KVM_WALL_CLOCK => Held::KvmWallClock,
        KVM_SYSTEM_TIME => Held::KvmSystemTime,
        EFER => Held::Efer,
        _ => return None,
    })
}

/// Memory types of the PAT (SDM 3, 13.12.2): UC, WC, WT, WP, WB, UC-.
fn is_pat_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4..=7)
}
