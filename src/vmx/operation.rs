//! Entering VMX operation: IA32_FEATURE_CONTROL, CR0 and CR4, VMXON (SDM 3, 24.7).

use super::capability::Capabilities;
use super::controls::{Controls, Missing};
use crate::addr::Hpa;
use crate::arch::{errata, msr};
use crate::host::descriptors::CpuTables;
use crate::host::memory::{self, frames::ALIGN_4K, paging};
use core::fmt;
use x86::vmx::VmFail;
use x86_64::registers::control::{Cr0, Cr4};

/// Why a VMX instruction failed (SDM 3, 31.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmxError {
    /// No current VMCS.
    Invalid,
    /// The VM-instruction error field of the current VMCS says why.
    Valid,
}

impl VmxError {
    /// From the result of the `x86` crate.
    pub fn check(result: x86::vmx::Result<()>) -> Result<(), Self> {
        result.map_err(|failure| match failure {
            VmFail::VmFailValid => Self::Valid,
            VmFail::VmFailInvalid => Self::Invalid,
        })
    }
}

/// Why this CPU cannot run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    NoVmx,
    LockedOff,
    Missing(Missing),
    OutOfMemory,
    Vmxon(VmxError),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVmx => f.write_str(
                "this CPU has no VT-x (CPUID.1:ECX bit 5); use an Intel CPU with VT-x, or the emulator (cargo xtask run --platform bochs)",
            ),
            Self::LockedOff => f.write_str(
                "the firmware has locked VT-x off (IA32_FEATURE_CONTROL); enable \"Virtualization Technology\" in the firmware's set-up",
            ),
            Self::Missing(missing) => missing.fmt(f),
            Self::OutOfMemory => f.write_str("no memory is left for the VMXON region"),
            Self::Vmxon(error) => write!(f, "VMXON failed: {error:?}"),
        }
    }
}

impl core::error::Error for Unusable {}

/// What VMXON needs of IA32_FEATURE_CONTROL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FeatureControl {
    /// Locked with VMX outside SMX on: nothing to do.
    Ready,
    /// Unlocked: this value is to be written.
    Write(u64),
    LockedOff,
}

const LOCK: u64 = 1;
const VMX_OUTSIDE_SMX: u64 = 1 << 2;

const fn feature_control(value: u64) -> FeatureControl {
    if value & LOCK == 0 {
        FeatureControl::Write(value | LOCK | VMX_OUTSIDE_SMX)
    } else if value & VMX_OUTSIDE_SMX == 0 {
        FeatureControl::LockedOff
    } else {
        FeatureControl::Ready
    }
}

/// This CPU's VT-x, switched on.
#[derive(Clone, Copy, Debug)]
pub struct Vmx {
    pub capabilities: Capabilities,
    pub controls: Controls,
    /// Large pages of a guest may hold code: see [`errata`](crate::arch::errata).
    pub large_code: bool,
    /// The tables of this CPU, which it comes back to at each VM exit.
    pub tables: &'static CpuTables,
}

/// Switches VMX operation on for this CPU, whose tables are `tables`.
///
/// # Errors
/// Why it cannot run guests; the CPU is then as it was, but for a lock of IA32_FEATURE_CONTROL.
///
/// # Safety
/// Called once on each CPU, at CPL 0, with interrupts off.
pub unsafe fn start(tables: &'static CpuTables) -> Result<Vmx, Unusable> {
    let has_vmx = crate::arch::cpu::cpuid()
        .get_feature_info()
        .is_some_and(|info| info.has_vmx());
    if !has_vmx {
        return Err(Unusable::NoVmx);
    }
    // SAFETY: a CPU with VMX has this MSR (SDM 4, table 2-2).
    match feature_control(unsafe { msr::read(x86::msr::IA32_FEATURE_CONTROL) }) {
        FeatureControl::Ready => {}
        FeatureControl::LockedOff => return Err(Unusable::LockedOff),
        // SAFETY: not locked, and the bits written exist on a CPU with VMX.
        FeatureControl::Write(value) => unsafe {
            msr::write(x86::msr::IA32_FEATURE_CONTROL, value);
        },
    }
    // SAFETY: `Capabilities::read` asks only for MSRs that the earlier ones announce.
    let capabilities = Capabilities::read(|number| unsafe { msr::read(number) });
    let controls = Controls::new(&capabilities).map_err(Unusable::Missing)?;

    let region = region(&capabilities).ok_or(Unusable::OutOfMemory)?;
    // SAFETY: the fixed bits are what VMX operation demands (A.7, A.8); PE, PG and NE, which they
    // name, are set or harmless here.
    unsafe {
        Cr0::write_raw((Cr0::read_raw() | capabilities.cr0_fixed0) & capabilities.cr0_fixed1);
        Cr4::write_raw(
            (Cr4::read_raw() | os_xsave() | capabilities.cr4_fixed0) & capabilities.cr4_fixed1,
        );
        VmxError::check(x86::bits64::vmx::vmxon(region.0)).map_err(Unusable::Vmxon)?;
    }
    Ok(Vmx {
        capabilities,
        controls,
        large_code: !errata::page_sizes_stop_it(),
        tables,
    })
}

/// CR4.OSXSAVE where the CPU has XSAVE: the guest's XSETBV is executed for it.
fn os_xsave() -> u64 {
    let has_xsave = crate::arch::cpu::cpuid()
        .get_feature_info()
        .is_some_and(|info| info.has_xsave());
    if has_xsave { 1 << 18 } else { 0 }
}

/// A zeroed page that begins with the revision identifier: a VMXON region or a VMCS.
pub fn region(capabilities: &Capabilities) -> Option<Hpa> {
    let frame = memory::allocate(1, ALIGN_4K)?;
    let page = paging::to_virt(frame.start).0 as *mut u32;
    // SAFETY: the frame was just allocated, so nothing else uses it, and it is in the direct map.
    unsafe {
        page.cast::<u8>().write_bytes(0, 4096);
        page.write(capabilities.revision());
    }
    Some(frame.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_control_in_every_state() {
        assert_eq!(feature_control(0), FeatureControl::Write(5));
        assert_eq!(
            feature_control(0x2),
            FeatureControl::Write(7),
            "SMX bit is kept"
        );
        assert_eq!(feature_control(1), FeatureControl::LockedOff);
        assert_eq!(
            feature_control(3),
            FeatureControl::LockedOff,
            "only inside SMX"
        );
        assert_eq!(feature_control(5), FeatureControl::Ready);
        assert_eq!(feature_control(0x10_0005), FeatureControl::Ready);
    }
}
