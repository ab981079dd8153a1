//! The local APIC as far as the CPU virtualizes it (SDM 3, chapter 30).
//!
//! The registers are one page, [`LocalApic`]'s, whoever works on it: the CPU while
//! the guest runs, as far as the guest's [`ApicTier`] goes, and the hypervisor else.
//! What the CPU keeps beside the page is kept up to date here: the TPR threshold,
//! below which it reports that an interrupt has become deliverable (FlexPriority);
//! the highest requested vector and the vectors whose end concerns the I/O
//! APIC (APICv). Which accesses exit follows the guest from mode to mode.
//!
//! [`LocalApic`]: crate::devices::local_apic::LocalApic

use super::events::Exception;
use super::run::End;
use super::{Attention, Vcpu};
use crate::addr::{Gpa, Hva};
use crate::arch::registers::GeneralRegisters;
use crate::devices::local_apic::{Mode, register};
use crate::devices::pc;
use crate::host::interrupts;
use crate::host::memory::paging;
use crate::vmx::apic::{ApicAccess, ApicPageAccess, ApicPageAccessKind, ApicTier};
use crate::vmx::bitmap::MsrAccess;
use crate::vmx::vmcs::{control, guest};
use vireo_handoff::config::ApicMode;
use x86::vmx::vmcs::control::{PrimaryControls, SecondaryControls};

/// Registers that the CPU can read for a guest in x2APIC mode, first and last of a run, in
/// sixteenths of their offsets: those that exist and whose value is in the page. The
/// current count is not.
const READABLE: [(u8, u8); 9] = [
    (0x02, 0x03),
    (0x08, 0x08),
    (0x0a, 0x0a),
    (0x0d, 0x0d),
    (0x0f, 0x28),
    (0x30, 0x30),
    (0x32, 0x37),
    (0x38, 0x38),
    (0x3e, 0x3e),
];

const EOI_EXITS: [crate::vmx::vmcs::Field<u64>; 4] = [
    control::EOI_EXIT_0,
    control::EOI_EXIT_1,
    control::EOI_EXIT_2,
    control::EOI_EXIT_3,
];

const fn msr(offset: u16) -> u32 {
    super::msr::number::X2APIC_FIRST + (offset >> 4) as u32
}

/// The tier that the configuration asks for.
pub(super) fn tier(mode: ApicMode, best: ApicTier) -> ApicTier {
    match mode {
        ApicMode::Auto => best,
        ApicMode::Emulated => ApicTier::Emulated,
        ApicMode::FlexPriority => ApicTier::FlexPriority,
        ApicMode::ApicV => ApicTier::Apicv,
    }
}

impl Vcpu {
    /// Gives the CPU the page of registers, and what is posted. `None` where one of them has no
    /// physical address.
    pub(super) fn write_apic_addresses(&mut self) -> Option<()> {
        if self.tier.shadows_tpr() {
            let registers = Hva((&raw const *self.apic.page()) as u64);
            let access = self.vm.apic_access_page();
            self.vmcs
                .write(control::VIRTUAL_APIC, paging::to_phys(registers)?.0);
            self.vmcs
                .write(control::APIC_ACCESS, paging::to_phys(access)?.0);
            self.vmcs.write(control::TPR_THRESHOLD, 0);
        }
        let controls =
            self.tier
                .controls(ApicAccess::None, &self.vmx.controls, &self.vmx.capabilities);
        if controls.posts_interrupts() {
            let descriptor = Hva((&raw const *self.mailbox.descriptor()) as u64);
            self.vmcs
                .write(control::POSTED_INTERRUPT_VECTOR, interrupts::NOTIFY.into());
            self.vmcs.write(
                control::POSTED_INTERRUPT_DESCRIPTOR,
                paging::to_phys(descriptor)?.0,
            );
        }
        Some(())
    }

    /// Has the CPU virtualize the accesses of the mode that the APIC is in.
    pub(super) fn follow_apic_mode(&mut self) {
        let access = match self.apic.mode() {
            Mode::Disabled => ApicAccess::None,
            Mode::XApic => ApicAccess::Page,
            Mode::X2Apic => ApicAccess::Msrs,
        };
        let kept = (PrimaryControls::INTERRUPT_WINDOW_EXITING
            | PrimaryControls::NMI_WINDOW_EXITING
            | PrimaryControls::MOV_DR_EXITING)
            .bits();
        let controls = self
            .tier
            .controls(access, &self.vmx.controls, &self.vmx.capabilities);
        self.primary = controls.primary | self.primary & kept;
        self.vmx.controls = controls;
        self.vmcs.write(control::PIN, controls.pin);
        self.vmcs.write(control::PRIMARY, self.primary);
        self.vmcs.write(control::SECONDARY, controls.secondary);
        // What it was may be above a TPR that is 0 now (SDM 3, 27.2.1.1).
        self.set_threshold(0);
        self.attend_to(Attention::EVENTS);
        self.open_apic_msrs();
        self.map_apic_page(access);
        if self.tier.delivers() {
            self.write_interrupt_status();
        }
    }

    /// Lets those x2APIC registers through that the CPU virtualizes.
    fn open_apic_msrs(&mut self) {
        let virtualized = self.vmx.controls.has(SecondaryControls::VIRTUALIZE_X2APIC);
        let delivers = virtualized && self.tier.delivers();
        let bitmap = &mut self.bitmaps.msr;
        // Each of these has a bit, so that nothing fails here.
        let mut open = |msr, access, opened: bool| {
            let _ = bitmap.set(msr, access, !opened);
        };
        for (first, last) in READABLE {
            for register in first..=last {
                open(msr(u16::from(register) << 4), MsrAccess::Read, delivers);
            }
        }
        open(msr(register::TPR), MsrAccess::Read, virtualized);
        open(msr(register::TPR), MsrAccess::Write, virtualized);
        open(msr(register::EOI), MsrAccess::Write, delivers);
        open(msr(register::SELF_IPI), MsrAccess::Write, delivers);
    }

    /// Where the guest has its APIC in memory, accesses there are to be told from others. Where it
    /// has moved it, each is an EPT violation.
    fn map_apic_page(&mut self, access: ApicAccess) {
        let wanted = access == ApicAccess::Page
            && self.tier.shadows_tpr()
            && self.apic.address() == pc::LOCAL_APIC_BASE;
        if self.apic_page_is_mapped == wanted {
            return;
        }
        self.apic_page_is_mapped = wanted && self.vm.map_apic_access();
        if !wanted {
            self.vm.unmap_apic_access();
        }
        // The CPU may have cached what the address was (SDM 3, 30.4.5 and 29.4.3.3).
        let forgotten = self.forget_translations();
        debug_assert!(forgotten.is_ok());
    }

    /// What the CPU keeps beside the page, from the page.
    pub(super) fn write_interrupt_status(&mut self) {
        self.apic.refresh();
        let _ = self.apic.take_requests();
        self.vmcs
            .write(guest::INTERRUPT_STATUS, self.apic.interrupt_status());
        self.write_eoi_exits();
    }

    #[cold]
    #[inline(never)]
    fn write_eoi_exits(&mut self) {
        let level = self.apic.take_level_vectors();
        for (field, vectors) in EOI_EXITS.into_iter().zip(level) {
            self.vmcs.write(field, vectors);
        }
    }

    /// Tells the CPU what was requested since the last time; it delivers that by itself.
    #[inline]
    pub(super) fn pass_requests(&mut self) {
        let Some(vector) = self.apic.take_requests() else {
            return;
        };
        if self.apic.has_new_trigger() {
            self.write_eoi_exits();
        }
        let status = self.vmcs.read_basic(guest::INTERRUPT_STATUS);
        if vector > status as u8 {
            self.vmcs
                .write(guest::INTERRUPT_STATUS, status & 0xff00 | u16::from(vector));
        }
    }

    /// Has the guest exit when it lowers its TPR below the class `threshold`. That must not
    /// be above the TPR's own at an entry (SDM 3, 27.2.1.1), so each injection sets it.
    #[inline]
    pub(super) fn set_threshold(&mut self, threshold: u8) {
        if threshold != self.threshold && self.tier.shadows_tpr() {
            self.threshold = threshold;
            self.vmcs.write(control::TPR_THRESHOLD, threshold.into());
        }
    }

    /// Where the register at `offset` of the APIC's page is.
    #[inline]
    pub(super) fn apic_register(&self, offset: u16) -> Gpa {
        Gpa(self.apic.address() | u64::from(offset))
    }

    /// An access to the APIC's page that the CPU leaves to us.
    pub(super) fn apic_page(
        &mut self,
        access: ApicPageAccess,
        registers: &mut GeneralRegisters,
    ) -> Result<(), Exception> {
        let gpa = self.apic_register(access.offset);
        match access.kind {
            ApicPageAccessKind::Read | ApicPageAccessKind::Write => {}
            ApicPageAccessKind::Fetch => {
                self.end(End::NoMemory(gpa));
                return Ok(());
            }
            ApicPageAccessKind::Delivery => {
                self.end(End::NoMemoryForDelivery(gpa));
                return Ok(());
            }
        }
        self.device_access(gpa, None, registers)
    }

    /// The guest has written a register, and the CPU has put it into the page.
    #[inline]
    pub(super) fn apic_write(&mut self, offset: u16) {
        let action = self.apic.written(self.now(), offset);
        if register::is_address(offset) {
            self.publish_address();
        }
        self.act(action);
    }

    /// The CPU has ended a level-triggered interrupt.
    #[inline]
    pub(super) fn virtualized_eoi(&mut self, vector: u8) {
        if self.apic.end_level(vector) {
            self.broadcast_eoi(vector);
        }
        if self.apic.has_requests() {
            self.attend_to(Attention::EVENTS);
        }
    }
}
