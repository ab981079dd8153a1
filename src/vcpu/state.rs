//! A new vCPU: its VMCS from control words, host state, and what the boot
//! protocol wants the guest to start with.

use super::control_registers;
use super::cpuid::{self, CpuidTable};
use super::emulate;
use super::events::Pending;
use super::exceptions;
use super::lead::Lead;
use super::msr::number::{BIOS_SIGN_ID, MISC_ENABLE};
use super::msr::{self, MISC_ENABLE_FAST_STRINGS, Msrs};
use super::run::Activity;
use super::timer::{EntryTimer, NEVER};
use super::{Attention, Vcpu, virtual_apic};
use crate::addr::Hva;
use crate::arch::cpu;
use crate::arch::msr::try_read;
use crate::arch::registers::GeneralRegisters;
use crate::devices::local_apic::{self, LocalApic};
use crate::devices::pc;
use crate::host::memory::paging::{self, MapError};
use crate::vm::boot::{EntryMode, EntryState};
use crate::vm::machine::Vm;
use crate::vmx::apic::ApicTier;
use crate::vmx::bitmap::{IoBitmap, MsrAccess, MsrBitmap};
use crate::vmx::controls::Missing;
use crate::vmx::entry::Entry;
use crate::vmx::ept::EptError;
use crate::vmx::host_state;
use crate::vmx::live_state::LiveState;
use crate::vmx::operation::{self, Vmx, VmxError};
use crate::vmx::vmcs::{Vmcs, control, guest};
use crate::vmx::vpid::{InvalidationError, Invalidator, Vpid};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use x86::vmx::vmcs::control::{EntryControls, PrimaryControls, SecondaryControls};

/// The pages that the CPU consults at RDMSR, WRMSR, IN and OUT.
pub(super) struct Bitmaps {
    pub(super) msr: MsrBitmap,
    pub(super) io: IoBitmap,
}

/// Why a vCPU could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetupError {
    OutOfMemory,
    Stack(MapError),
    Ept(EptError),
    Vmx(VmxError),
    Invalidation(InvalidationError),
    /// The configuration asks for more of APIC virtualization than the CPU has.
    Apic(Missing),
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory => f.write_str("no memory is left for a virtual CPU"),
            Self::Stack(error) => write!(f, "no stack for a virtual CPU: {error:?}"),
            Self::Ept(error) => write!(f, "no extended page tables: {error:?}"),
            Self::Vmx(error) => write!(f, "the VMCS is refused: {error:?}"),
            Self::Apic(Missing { feature, msr, bit }) => write!(
                f,
                "`apic` in vireo.toml asks for what this CPU's VT-x lacks, \"{feature}\" ({msr} bit {bit}); use apic = \"auto\""
            ),
            Self::Invalidation(error) => {
                write!(f, "cached translations cannot be dropped: {error:?}")
            }
        }
    }
}

impl core::error::Error for SetupError {}

/// Access rights of flat segments (SDM 3, 25.4.1): type, S, P, and L, D/B, G.
mod rights {
    pub const CODE_64: u32 = 0xa09b;
    pub const CODE_32: u32 = 0xc09b;
    pub const DATA: u32 = 0xc093;
    /// In real mode (SDM 3, table 10-1): of 64 KiB, in bytes.
    pub const CODE_16: u32 = 0x9b;
    pub const DATA_16: u32 = 0x93;
    pub const LDT: u32 = 0x82;
    pub const BUSY_TSS: u32 = 0x8b;
    pub const UNUSABLE: u32 = 0x1_0000;
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// Power-on value of IA32_PAT.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const RFLAGS_RESET: u64 = 2;
const DR7_RESET: u64 = 0x400;

/// A loop executes PAUSE with less than so many ticks between (SDM 3, 26.1.3) ...
const PLE_GAP: u32 = 128;
/// ... and spins when it has done so for more than this: longer than most locks are held.
const PLE_WINDOW: u32 = 4096;

/// Where guest-physical address space is not RAM, for the guest's MTRRs.
const MMIO: core::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;

impl Vcpu {
    /// vCPU `id` of `vm`, current on this CPU, and its stack. It starts as `entry` says, or
    /// waits for a start-up interrupt where there is none. Where it shares its CPU, it gives way while
    /// the guest spins.
    ///
    /// # Errors
    /// When memory runs out or the CPU refuses the VMCS.
    pub fn new(
        vm: Arc<Vm>,
        id: u32,
        vmx: Vmx,
        vpid: Vpid,
        entry: Option<&EntryState>,
        shares_cpu: bool,
    ) -> Result<(Self, Entry<Self>), SetupError> {
        let tier = virtual_apic::tier(vm.apic, ApicTier::best(&vmx.capabilities));
        if let Some(missing) = tier.missing(&vmx.capabilities) {
            return Err(SetupError::Apic(missing));
        }
        emulate::prepare();
        let mut vmx = vmx;
        if shares_cpu {
            vmx.controls = vmx.controls.with_pause_loop_exiting(&vmx.capabilities);
        }
        let controls = vmx.controls;
        let vpid = if controls.has(SecondaryControls::ENABLE_VPID) {
            vpid
        } else {
            Vpid::HOST
        };
        let tsc_khz = u32::try_from(vm.clock.hz() / 1000).unwrap_or(u32::MAX);
        let fast_strings =
            try_read(MISC_ENABLE).is_none_or(|value| value & MISC_ENABLE_FAST_STRINGS != 0);
        let options = cpuid::Options {
            vcpus: vm.vcpus(),
            tsc_khz,
            x2apic: vm.x2apic,
            apic_bus_khz: (local_apic::input_hz(vm.clock) / 1000) as u32,
            rdtscp: controls.has(SecondaryControls::ENABLE_RDTSCP),
            invpcid: controls.has(SecondaryControls::ENABLE_INVPCID),
            xsaves: controls.has(SecondaryControls::ENABLE_XSAVES_XRSTORS),
            fast_strings,
        };
        let mut table = CpuidTable::new(cpu::leaf, &options, id);
        table.set_apic_enabled(true);
        let mut msrs = Msrs::new(
            &table,
            msr::Options {
                bios_sign_id: try_read(BIOS_SIGN_ID).unwrap_or(0),
                fast_strings,
            },
        );
        msrs.set_firmware_mtrrs(MMIO);

        let region = operation::region(&vmx.capabilities).ok_or(SetupError::OutOfMemory)?;
        // SAFETY: VMX operation is on (`vmx` says so), the page is new, and a CPU has one vCPU
        // at a time.
        let mut vmcs = unsafe { Vmcs::load(region) }.map_err(SetupError::Vmx)?;
        host_state::write(&mut vmcs, vmx.tables);
        let mut stack = Entry::new(&mut vmcs).map_err(SetupError::Stack)?;

        let live =
            LiveState::at_reset(table.xcr0_supported()).map_err(|_| SetupError::OutOfMemory)?;
        let mut bitmaps = Box::new(Bitmaps {
            msr: MsrBitmap::ALL,
            io: IoBitmap::ALL,
        });
        for direct in msrs.direct() {
            for (allowed, access) in [
                (direct.read, MsrAccess::Read),
                (direct.write, MsrAccess::Write),
            ] {
                if allowed {
                    // An MSR without a bit goes on exiting, which is only slower.
                    let _ = bitmaps.msr.set(direct.msr, access, false);
                }
            }
        }
        bitmaps.io.pass_through(pc::POST_CODE);

        let mut vcpu = Self {
            id,
            not_first: if id == 0 { 0 } else { u64::MAX },
            activity: match entry {
                Some(_) => Activity::Running,
                None => Activity::AwaitsStartUp,
            },
            deaf: false,
            turn_ends: NEVER,
            slice: NEVER,
            output_waits: false,
            apic: LocalApic::new(id, id == 0, vm.clock)
                .with_config(local_apic::Config {
                    x2apic: vm.x2apic,
                    ..local_apic::Config::default()
                })
                .delivered_by_cpu(tier.delivers()),
            tier,
            threshold: 0,
            apic_page_is_mapped: false,
            misses_interrupts: false,
            holds_interrupts: false,
            paragraph: 0,
            cr4_allowed: cpuid::cr4_allowed(&table) & vmx.capabilities.cr4_fixed1,
            cpuid: table,
            known: Box::default(),
            msrs,
            clock: vm.clock,
            pending: Pending::default(),
            raised: None,
            tsc_adjust: 0,
            primary: controls.primary,
            system_time: 0,
            wall_clock: 0,
            system_time_version: 0,
            attention: Attention::CONSOLE,
            timer: EntryTimer::new(vm.clock),
            halt_lead: Lead::new(vm.clock),
            leave: None,
            live,
            mailbox: Arc::clone(vm.mailbox(id)),
            vm,
            vmx,
            vmcs,
            vpid,
            bitmaps,
        };
        vcpu.write_controls()?;
        vcpu.write_apic_addresses().ok_or(SetupError::OutOfMemory)?;
        vcpu.forget_translations()?;
        vcpu.follow_apic_mode();
        vcpu.prepare_for_bochs()?;
        vcpu.write_power_on_state();
        let first = entry.unwrap_or(&EntryState::RESET);
        vcpu.write_guest_state(first);
        *stack.registers() = vcpu.entry_registers(first);
        vcpu.publish_address();
        Ok((vcpu, stack))
    }

    /// Drops what this CPU may have cached under the VPID and the EPT pointer when
    /// they were another guest's, or another hypervisor's (SDM 3, 29.4.3.3 and 29.4.3.4).
    pub(super) fn forget_translations(&self) -> Result<(), SetupError> {
        let pointer = self.vm.ept_pointer().map_err(SetupError::Ept)?;
        let invalidator = Invalidator::new(self.vmx.capabilities.ept_vpid);
        // SAFETY: a vCPU exists only in VMX root operation.
        unsafe {
            invalidator
                .ept(pointer)
                .and_then(|()| invalidator.vpid(self.vpid))
                .map_err(SetupError::Invalidation)
        }
    }

    fn write_controls(&mut self) -> Result<(), SetupError> {
        let controls = self.vmx.controls;
        let tsc_offset = self.tsc_offset();
        let eptp = self.vm.ept_pointer().map_err(SetupError::Ept)?;
        let physical = |address: *const u8| paging::to_phys(Hva(address as u64));
        let msr = physical((&raw const self.bitmaps.msr).cast()).ok_or(SetupError::OutOfMemory)?;
        let a = physical(self.bitmaps.io.a().as_ptr()).ok_or(SetupError::OutOfMemory)?;
        let b = physical(self.bitmaps.io.b().as_ptr()).ok_or(SetupError::OutOfMemory)?;

        let vmcs = &mut self.vmcs;
        vmcs.write(control::PIN, controls.pin);
        vmcs.write(control::PRIMARY, controls.primary);
        vmcs.write(control::SECONDARY, controls.secondary);
        vmcs.write(control::EXIT, controls.exit);
        vmcs.write(control::ENTRY, controls.entry);
        vmcs.write(control::EXCEPTION_BITMAP, exceptions::EXITING);
        vmcs.write(control::PAGE_FAULT_MASK, 0);
        vmcs.write(control::PAGE_FAULT_MATCH, 0);
        vmcs.write(control::CR3_TARGET_COUNT, 0);
        vmcs.write(control::EXIT_MSR_STORE_COUNT, 0);
        vmcs.write(control::EXIT_MSR_LOAD_COUNT, 0);
        vmcs.write(control::ENTRY_MSR_LOAD_COUNT, 0);
        vmcs.write(control::ENTRY_INTERRUPTION_INFO, 0);
        vmcs.write(control::IO_BITMAP_A, a.0);
        vmcs.write(control::IO_BITMAP_B, b.0);
        vmcs.write(control::MSR_BITMAP, msr.0);
        vmcs.write(control::TSC_OFFSET, tsc_offset);
        vmcs.write(control::EPT_POINTER, eptp.bits());
        if controls.has(SecondaryControls::ENABLE_VPID) {
            vmcs.write(control::VPID, self.vpid.bits());
        }
        if controls.has(SecondaryControls::ENABLE_XSAVES_XRSTORS) {
            vmcs.write(control::XSS_EXITING, 0);
        }
        if controls.has(SecondaryControls::PAUSE_LOOP_EXITING) {
            vmcs.write(control::PLE_GAP, PLE_GAP);
            vmcs.write(control::PLE_WINDOW, PLE_WINDOW);
        }
        vmcs.write(control::CR0_MASK, control_registers::CR0_OWNED);
        vmcs.write(
            control::CR4_MASK,
            control_registers::cr4_owned(self.cr4_allowed),
        );
        debug_assert_ne!(
            controls.primary & PrimaryControls::USE_MSR_BITMAPS.bits(),
            0
        );
        Ok(())
    }

    /// Has the vCPU begin as `entry` says, with everything else as after INIT (SDM 3,
    /// table 10-1).
    pub(super) fn write_guest_state(&mut self, entry: &EntryState) {
        let mode = Mode::of(entry.mode);
        let vmcs = &mut self.vmcs;
        macro_rules! segment {
            ($selector:ident $base:ident $limit:ident $rights:ident = $value:expr, $bases:expr, $limits:expr, $access:expr) => {
                vmcs.write(guest::$selector, $value);
                vmcs.write(guest::$base, $bases);
                vmcs.write(guest::$limit, $limits);
                vmcs.write(guest::$rights, $access);
            };
        }
        let (data, limit, access) = (entry.segments.data_selector, mode.limit, mode.data);
        let (ldt_limit, ldt) = mode.ldt;
        segment!(CS_SELECTOR CS_BASE CS_LIMIT CS_ACCESS_RIGHTS = entry.segments.code_selector, mode.code_base, limit, mode.code);
        segment!(DS_SELECTOR DS_BASE DS_LIMIT DS_ACCESS_RIGHTS = data, 0, limit, access);
        segment!(ES_SELECTOR ES_BASE ES_LIMIT ES_ACCESS_RIGHTS = data, 0, limit, access);
        segment!(SS_SELECTOR SS_BASE SS_LIMIT SS_ACCESS_RIGHTS = data, 0, limit, access);
        segment!(FS_SELECTOR FS_BASE FS_LIMIT FS_ACCESS_RIGHTS = data, 0, limit, access);
        segment!(GS_SELECTOR GS_BASE GS_LIMIT GS_ACCESS_RIGHTS = data, 0, limit, access);
        segment!(LDTR_SELECTOR LDTR_BASE LDTR_LIMIT LDTR_ACCESS_RIGHTS = 0, 0, ldt_limit, ldt);
        segment!(TR_SELECTOR TR_BASE TR_LIMIT TR_ACCESS_RIGHTS = 0, 0, mode.task_limit, rights::BUSY_TSS);
        vmcs.write(guest::GDTR_BASE, entry.segments.gdt_base.0);
        vmcs.write(guest::GDTR_LIMIT, u32::from(entry.segments.gdt_limit));
        vmcs.write(guest::IDTR_BASE, 0);
        vmcs.write(guest::IDTR_LIMIT, mode.idt_limit);

        let required = self.vmx.capabilities.cr0_fixed0 & !(CR0_PE | CR0_PG) | CR0_ET | CR0_NE;
        vmcs.write(guest::CR0, mode.cr0 & !(CR0_CD | CR0_NW) | required);
        vmcs.write(control::CR0_SHADOW, mode.cr0);
        vmcs.write(guest::CR3, mode.cr3);
        vmcs.write(
            guest::CR4,
            mode.cr4 | control_registers::cr4_required(&self.vmx.capabilities),
        );
        vmcs.write(control::CR4_SHADOW, mode.cr4);
        vmcs.write(guest::EFER, mode.efer);
        let ia32e = if mode.efer != 0 {
            EntryControls::IA32E_MODE_GUEST.bits()
        } else {
            0
        };
        vmcs.write(control::ENTRY, self.vmx.controls.entry | ia32e);

        vmcs.write(guest::RIP, entry.rip);
        vmcs.write(guest::RSP, entry.rsp);
        vmcs.write(guest::RFLAGS, RFLAGS_RESET);
        vmcs.write(guest::DR7, DR7_RESET);
        vmcs.write(guest::DEBUGCTL, 0);
        vmcs.write(guest::INTERRUPTIBILITY, 0);
        vmcs.write(guest::ACTIVITY, 0);
        vmcs.write(guest::PENDING_DEBUG, 0);
        vmcs.write(control::ENTRY_INTERRUPTION_INFO, 0);
    }

    /// What is 0 or fixed at power-on, and stays as it is at INIT.
    fn write_power_on_state(&mut self) {
        let vmcs = &mut self.vmcs;
        vmcs.write(guest::PAT, PAT_RESET);
        vmcs.write(guest::SYSENTER_CS, 0);
        vmcs.write(guest::SYSENTER_ESP, 0);
        vmcs.write(guest::SYSENTER_EIP, 0);
        vmcs.write(guest::LINK_POINTER, u64::MAX);
    }

    /// The general registers at entry.
    pub fn entry_registers(&self, entry: &EntryState) -> GeneralRegisters {
        // Real mode is where a reset leads, which leaves the processor's signature in EDX.
        let rdx = match entry.mode {
            EntryMode::Real { .. } => self.cpuid.signature().into(),
            _ => 0,
        };
        GeneralRegisters {
            rax: entry.rax,
            rsi: entry.rsi,
            rbx: entry.rbx,
            rdx,
            ..GeneralRegisters::default()
        }
    }
}

/// What is different in the modes that a vCPU may start in.
struct Mode {
    code_base: u64,
    code: u32,
    data: u32,
    limit: u32,
    ldt: (u32, u32),
    task_limit: u32,
    idt_limit: u32,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

impl Mode {
    const fn of(entry: EntryMode) -> Self {
        let flat = Self {
            code_base: 0,
            code: rights::CODE_32,
            data: rights::DATA,
            limit: u32::MAX,
            ldt: (0, rights::UNUSABLE),
            task_limit: 0x67,
            idt_limit: 0,
            cr0: CR0_PE | CR0_ET | CR0_NE,
            cr3: 0,
            cr4: 0,
            efer: 0,
        };
        match entry {
            EntryMode::Protected32 => flat,
            EntryMode::Long64 { cr3 } => Self {
                code: rights::CODE_64,
                cr0: CR0_PG | flat.cr0,
                cr3: cr3.0,
                cr4: CR4_PAE,
                efer: EFER_LONG_MODE,
                ..flat
            },
            EntryMode::Real { code_base } => Self {
                code_base: code_base as u64,
                code: rights::CODE_16,
                data: rights::DATA_16,
                limit: 0xffff,
                ldt: (0xffff, rights::LDT),
                task_limit: 0xffff,
                idt_limit: 0xffff,
                cr0: CR0_CD | CR0_NW | CR0_ET,
                ..flat
            },
        }
    }
}
