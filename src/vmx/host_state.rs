//! The host-state area: what the CPU loads at each VM exit (SDM 3, 25.5).

use super::vmcs::{Vmcs, host};
use crate::arch::msr;
use crate::host::descriptors::{self, CpuTables};
use x86_64::registers::control::{Cr0, Cr3, Cr4};

const IA32_PAT: u32 = 0x277;
const IA32_EFER: u32 = 0xc000_0080;

/// Writes the host state of this CPU, all but RSP and RIP.
///
/// The hypervisor does not use FS, GS, SYSENTER or an LDT: they become null.
pub fn write(vmcs: &mut Vmcs, tables: &CpuTables) {
    let data = descriptors::DATA.0;
    vmcs.write(host::CS_SELECTOR, descriptors::CODE.0);
    vmcs.write(host::SS_SELECTOR, data);
    vmcs.write(host::DS_SELECTOR, data);
    vmcs.write(host::ES_SELECTOR, data);
    vmcs.write(host::FS_SELECTOR, 0);
    vmcs.write(host::GS_SELECTOR, 0);
    vmcs.write(host::TR_SELECTOR, descriptors::TASK.0);
    vmcs.write(host::FS_BASE, 0);
    vmcs.write(host::GS_BASE, 0);
    vmcs.write(host::TR_BASE, tables.tss_base().0);
    vmcs.write(host::GDTR_BASE, tables.gdt_base().0);
    vmcs.write(host::IDTR_BASE, descriptors::idt_base().0);
    vmcs.write(host::SYSENTER_CS, 0);
    vmcs.write(host::SYSENTER_ESP, 0);
    vmcs.write(host::SYSENTER_EIP, 0);
    vmcs.write(host::CR0, Cr0::read_raw());
    let (root, flags) = Cr3::read_raw();
    vmcs.write(host::CR3, root.start_address().as_u64() | u64::from(flags));
    vmcs.write(host::CR4, Cr4::read_raw());
    // SAFETY: every CPU in long mode has both MSRs.
    unsafe {
        vmcs.write(host::PAT, msr::read(IA32_PAT));
        vmcs.write(host::EFER, msr::read(IA32_EFER));
    }
}
