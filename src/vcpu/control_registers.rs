//! CR0, CR4 and XCR0: which bits are the guest's own, and what a write to the
//! others does (SDM 3, 2.5, 5.1 and 27.3.1.1).

use super::Vcpu;
use super::cpuid;
use super::events::Exception;
use super::segmentation::{Rights, kind};
use crate::addr::Gpa;
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::vmx::capability::Capabilities;
use crate::vmx::exit::ControlRegisterAccess;
use crate::vmx::vmcs::{control, guest};
use x86::vmx::vmcs::control::EntryControls;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR0_DEFINED: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | CR0_TS
    | CR0_ET
    | CR0_NE
    | CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;

/// Bits of CR0 whose change exits. The rest, among them TS and WP, are the guest's own.
pub const CR0_OWNED: u64 = !(CR0_MP | CR0_EM | CR0_TS | CR0_WP | CR0_AM);

const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_MCE: u64 = 1 << 6;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_SMEP: u64 = 1 << 20;

/// Bits of CR4 whose change exits: those that the guest does not have, those that
/// change paging or CPUID, and MCE, without which a machine check shuts the CPU down.
pub const fn cr4_owned(allowed: u64) -> u64 {
    !allowed | CR4_PSE | CR4_PAE | CR4_MCE | CR4_LA57 | CR4_VMXE | CR4_PCIDE | CR4_OSXSAVE
}

/// Bits of CR4 that are set whatever the guest writes: VMX operation demands them, or
/// the host.
pub const fn cr4_required(capabilities: &Capabilities) -> u64 {
    capabilities.cr4_fixed0 | CR4_MCE & capabilities.cr4_fixed1
}

const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// L bit of the code segment's access rights.
const RIGHTS_LONG: u32 = 1 << 13;

impl Vcpu {
    /// CR0 as the guest sees it.
    pub(super) fn cr0(&self) -> u64 {
        let own = self.vmcs.read(guest::CR0) & !CR0_OWNED;
        own | self.vmcs.read(control::CR0_SHADOW) & CR0_OWNED
    }

    /// CR4 as the guest sees it.
    pub(super) fn cr4(&self) -> u64 {
        let owned = cr4_owned(self.cr4_allowed);
        self.vmcs.read(guest::CR4) & !owned | self.vmcs.read(control::CR4_SHADOW) & owned
    }

    pub(super) fn control_register(
        &mut self,
        access: ControlRegisterAccess,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        match access {
            ControlRegisterAccess::Write { register, source } => {
                let mut value = self.general(registers, source);
                if value >> 32 != 0 && !self.is_64_bit() {
                    // There the register has 32 bits.
                    value &= 0xffff_ffff;
                }
                match register {
                    0 => self.write_cr0(value)?,
                    3 => self.write_cr3(value)?,
                    4 => self.write_cr4(value)?,
                    8 => self.write_cr8(value)?,
                    _ => return Err(Exception::InvalidOpcode),
                }
            }
            ControlRegisterAccess::Read {
                register: 8,
                destination,
            } => {
                let value = self.apic.cr8().into();
                self.set_general(registers, destination, value);
            }
            ControlRegisterAccess::Read {
                register: 3,
                destination,
            } => {
                let value = self.vmcs.read(guest::CR3);
                self.set_general(registers, destination, value);
            }
            // The others are read without an exit.
            ControlRegisterAccess::Read { .. } => return Err(Exception::InvalidOpcode),
            ControlRegisterAccess::Clts => {
                let value = self.cr0() & !CR0_TS;
                self.write_cr0(value)?;
            }
            ControlRegisterAccess::Lmsw(word) => self.load_msw(word)?,
        }
        self.skip_instruction();
        Ok(())
    }

    /// LMSW, which changes the low four bits and cannot clear PE (SDM 2, LMSW).
    pub(super) fn load_msw(&mut self, word: u16) -> Result<(), Exception> {
        let old = self.cr0();
        self.write_cr0(old & !0xe | u64::from(word) & 0xf | old & CR0_PE)
    }

    /// A general register, RSP included.
    pub(super) fn general(&self, registers: &GeneralRegisters, index: u8) -> u64 {
        if index == 4 {
            self.vmcs.read(guest::RSP)
        } else {
            registers.get(index)
        }
    }

    pub(super) fn set_general(&mut self, registers: &mut GeneralRegisters, index: u8, value: u64) {
        if index == 4 {
            self.vmcs.write(guest::RSP, value);
        } else {
            registers.set(index, value);
        }
    }

    fn write_cr8(&mut self, value: u64) -> Result<(), Exception> {
        if value > 15 {
            return Err(Exception::GeneralProtection);
        }
        self.apic.set_cr8(value as u8);
        self.look_at_apic();
        Ok(())
    }

    fn write_cr0(&mut self, value: u64) -> Result<(), Exception> {
        let paging = value & CR0_PG != 0;
        if value >> 32 != 0
            || paging && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
        {
            return Err(Exception::GeneralProtection);
        }
        let value = value & CR0_DEFINED | CR0_ET;
        let old = self.cr0();
        let efer = self.vmcs.read(guest::EFER);
        let pointers = if (value ^ old) & (CR0_PG | CR0_CD | CR0_NW) != 0 {
            self.pdptes(value, self.cr4(), self.vmcs.read(guest::CR3))?
        } else {
            None
        };
        if (value ^ old) & CR0_PG != 0 && efer & EFER_LME != 0 {
            self.switch_long_mode(paging, efer)?;
        }
        // Caches stay on, whatever the guest asks: the host's memory types rule (EPT).
        self.vmcs
            .write(guest::CR0, value & !(CR0_CD | CR0_NW) | CR0_NE);
        self.vmcs.write(control::CR0_SHADOW, value);
        self.load_pdptes(pointers);
        if (value ^ old) & CR0_PE != 0 {
            self.correct_code_selector(value & CR0_PE != 0);
        }
        if (value ^ old) & (CR0_PG | CR0_PE) != 0 {
            self.known.clear();
        }
        if (value ^ old) & (CR0_PG | CR0_PE | CR0_WP) != 0 {
            self.flush_tlb();
        }
        Ok(())
    }

    /// Reached only where the CPU cannot do without CR3-load exiting (SDM 3, A.3.2).
    fn write_cr3(&mut self, value: u64) -> Result<(), Exception> {
        let pcide = self.cr4() & CR4_PCIDE != 0;
        let (cr3, keep) = cr3_written(value, pcide, self.cpuid.physical_address_bits())
            .ok_or(Exception::GeneralProtection)?;
        let pointers = self.pdptes(self.cr0(), self.cr4(), cr3)?;
        self.vmcs.write(guest::CR3, cr3);
        self.load_pdptes(pointers);
        if !keep {
            self.flush_tlb();
        }
        Ok(())
    }

    /// The page tables of a task outside long mode.
    pub(super) fn load_cr3(&mut self, table: Gpa) {
        self.vmcs.write(guest::CR3, table.0);
        let pointers = self.pdptes(self.cr0(), self.cr4(), table.0);
        self.load_pdptes(pointers.unwrap_or(Some([0; 4])));
        self.flush_tlb();
    }

    /// Paging goes on or off with EFER.LME set.
    fn switch_long_mode(&mut self, paging: bool, efer: u64) -> Result<(), Exception> {
        let long_code = self.vmcs.read(guest::CS_ACCESS_RIGHTS) & RIGHTS_LONG != 0;
        if paging {
            // SDM 3, 11.8.5: nor is there a TSS of 16 bits in that mode.
            let task = Rights(self.vmcs.read(guest::TR_ACCESS_RIGHTS));
            if self.cr4() & CR4_PAE == 0 || long_code || task.kind() == kind::BUSY_TSS_16 {
                return Err(Exception::GeneralProtection);
            }
            self.set_long_mode(true, efer);
        } else {
            // Paging cannot be switched off in 64-bit mode, nor with PCIDE set.
            if long_code || self.cr4() & CR4_PCIDE != 0 {
                return Err(Exception::GeneralProtection);
            }
            self.set_long_mode(false, efer);
        }
        Ok(())
    }

    fn set_long_mode(&mut self, on: bool, efer: u64) {
        let entry = self.vmx.controls.entry;
        if on {
            self.vmcs.write(guest::EFER, efer | EFER_LMA);
            self.vmcs.write(
                control::ENTRY,
                entry | EntryControls::IA32E_MODE_GUEST.bits(),
            );
        } else {
            self.vmcs.write(guest::EFER, efer & !EFER_LMA);
            self.vmcs.write(control::ENTRY, entry);
        }
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.cr4();
        let long = self.vmcs.read(guest::EFER) & EFER_LMA != 0;
        let pcide_on = value & !old & CR4_PCIDE != 0;
        if value & !self.cr4_allowed != 0
            || long && (value & CR4_PAE == 0 || (value ^ old) & CR4_LA57 != 0)
            || value & CR4_PCIDE != 0 && !long
            || pcide_on && self.vmcs.read(guest::CR3) & 0xfff != 0
        {
            return Err(Exception::GeneralProtection);
        }
        let pointers = if (value ^ old) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0 {
            self.pdptes(self.cr0(), value, self.vmcs.read(guest::CR3))?
        } else {
            None
        };
        self.vmcs
            .write(guest::CR4, value | cr4_required(&self.vmx.capabilities));
        self.vmcs.write(control::CR4_SHADOW, value);
        if (value ^ old) & (CR4_PSE | CR4_PAE | CR4_LA57) != 0 {
            self.known.clear();
        }
        if (value ^ old) & CR4_OSXSAVE != 0 {
            self.cpuid.set_osxsave(value & CR4_OSXSAVE != 0);
        }
        self.load_pdptes(pointers);
        self.flush_tlb();
        Ok(())
    }

    /// The four page-directory-pointer entries that the CPU loads with PAE paging (SDM 3, 5.4.1);
    /// `None` where it is another paging.
    ///
    /// # Errors
    /// #GP, where one that is present has a reserved bit set.
    fn pdptes(&self, cr0: u64, cr4: u64, cr3: u64) -> Result<Option<[u64; 4]>, Exception> {
        const PRESENT: u64 = 1;
        let is_long = self.vmcs.read(guest::EFER) & EFER_LME != 0;
        if cr0 & CR0_PG == 0 || cr4 & CR4_PAE == 0 || is_long {
            return Ok(None);
        }
        let reserved = !0 << self.cpuid.physical_address_bits() | 0x1e6;
        let table = cr3 & 0xffff_ffe0;
        let mut entries = [0; 4];
        for (index, entry) in (0..).zip(&mut entries) {
            // A table outside memory reads as not present: the guest's next access faults.
            *entry = self.vm.memory.read_u64(Gpa(table + 8 * index)).unwrap_or(0);
            if *entry & PRESENT != 0 && *entry & reserved != 0 {
                return Err(Exception::GeneralProtection);
            }
        }
        Ok(Some(entries))
    }

    /// Has VM entry load them (SDM 3, 27.3.2.4), where there are any.
    fn load_pdptes(&mut self, entries: Option<[u64; 4]>) {
        let fields = [guest::PDPTE0, guest::PDPTE1, guest::PDPTE2, guest::PDPTE3];
        for (field, entry) in fields.into_iter().zip(entries.into_iter().flatten()) {
            self.vmcs.write(field, entry);
        }
    }

    /// What MOV to CR0 and CR4 invalidate. With VPID the entry does not.
    pub(super) fn flush_tlb(&mut self) {
        let invalidator = crate::vmx::vpid::Invalidator::new(self.vmx.capabilities.ept_vpid);
        // SAFETY: a vCPU exists only in VMX root operation.
        let flushed = unsafe { invalidator.vpid(self.vpid) };
        debug_assert!(flushed.is_ok());
    }

    pub(super) fn xsetbv(&mut self, registers: &LightRegisters) -> Result<(), Exception> {
        let value = registers.edx_eax();
        let index = registers.rcx & 0xffff_ffff;
        if index != 0 || self.cpl() != 0 || !cpuid::xcr0_valid(value, &self.cpuid) {
            return Err(Exception::GeneralProtection);
        }
        // `xcr0_valid` admits only what the CPU supports.
        self.live.set_xcr0(value);
        self.cpuid.set_xcr0(value);
        self.skip_instruction();
        Ok(())
    }

    /// The current privilege level: DPL of SS (SDM 3, 25.4.1).
    pub(super) fn cpl(&self) -> u8 {
        (self.vmcs.read(guest::SS_ACCESS_RIGHTS) >> 5 & 3) as u8
    }
}

/// What a MOV to CR3 leaves in the register, and whether it keeps the TLB;
/// `None` is #GP (SDM 2, MOV to and from control registers, and SDM 3, 5.10.4.1).
fn cr3_written(value: u64, pcide: bool, physical_address_bits: u32) -> Option<(u64, bool)> {
    const KEEP: u64 = 1 << 63;
    let keep = pcide && value & KEEP != 0;
    let cr3 = if keep { value & !KEEP } else { value };
    let reserved = u64::MAX.checked_shl(physical_address_bits).unwrap_or(0);
    (cr3 & reserved == 0).then_some((cr3, keep))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_63_of_cr3_is_a_wish_with_process_contexts_and_a_fault_without() {
        let table = 0x1234_5000;
        let wish = 1 << 63 | table | 7;
        assert_eq!(cr3_written(wish, true, 39), Some((table | 7, true)));
        assert_eq!(cr3_written(wish, false, 39), None);
        assert_eq!(cr3_written(table | 7, true, 39), Some((table | 7, false)));
        assert_eq!(cr3_written(1 << 38, false, 39), Some((1 << 38, false)));
        assert_eq!(cr3_written(1 << 39, true, 39), None);
    }

    #[test]
    fn ts_and_wp_do_not_exit_and_what_the_guest_lacks_does() {
        assert_eq!(CR0_OWNED & (CR0_TS | CR0_MP | CR0_WP), 0);
        assert_eq!(
            CR0_OWNED & (CR0_PG | CR0_PE | CR0_CD),
            CR0_PG | CR0_PE | CR0_CD
        );
        let allowed = CR4_PAE | 1 << 7;
        let owned = cr4_owned(allowed);
        assert_eq!(owned & 1 << 7, 0, "PGE is the guest's");
        assert_ne!(owned & CR4_PAE, 0);
        assert_ne!(owned & 1 << 22, 0, "a bit that is not allowed");
    }
}
