//! One virtual CPU.
//!
//! [`Vcpu::run`] is the run loop; between its rounds the guest runs, and each
//! VM exit is answered in [`exits`] on the vCPU's own stack. What an exit may
//! lead to has a file each: [`mod@control_registers`], [`events`] (injection), [`io`],
//! [`mmio`], [`model_specific`], [`virtual_apic`]. Policy is plain logic that knows neither VT-x
//! nor the host: [`cpuid`], [`msr`], [`pvclock`], [`walk`], [`emulate`].

mod attention;
mod bochs;
pub mod control_registers;
pub mod cpuid;
pub mod emulate;
pub mod events;
mod exceptions;
pub mod exits;
pub mod io;
mod known_moves;
mod lead;
mod light;
pub mod mmio;
pub mod model_specific;
pub mod msr;
pub mod pvclock;
pub mod run;
pub mod state;
mod timer;
pub mod tsc;
mod virtual_apic;
pub mod walk;

use crate::addr::Gpa;
use crate::devices::Clock;
use crate::devices::local_apic::LocalApic;
use crate::vm::machine::Vm;
use crate::vmx::apic::ApicTier;
use crate::vmx::operation::Vmx;
use crate::vmx::vmcs::Vmcs;
use crate::vmx::vpid::Vpid;
use alloc::boxed::Box;
use alloc::sync::Arc;
use attention::Attention;
use cpuid::CpuidTable;
use events::{Pending, Raised};
use known_moves::KnownMoves;
use lead::Lead;
use msr::Msrs;

pub use run::End;
pub use state::SetupError;

/// One virtual CPU, on the CPU that its VMCS is current on.
pub struct Vcpu {
    vm: Arc<Vm>,
    vmx: Vmx,
    vmcs: Vmcs,
    vpid: Vpid,
    /// Read by the CPU while the guest runs.
    bitmaps: Box<state::Bitmaps>,
    cpuid: CpuidTable,
    msrs: Msrs,
    apic: LocalApic,
    /// How much of it the CPU is.
    tier: ApicTier,
    /// The TPR threshold as it is in the VMCS.
    threshold: u8,
    /// Where the APIC-access page is mapped.
    apic_page: Option<Gpa>,
    /// What the emulator needs ([`bochs`]).
    misses_interrupts: bool,
    holds_interrupts: bool,
    pending: Pending,
    /// The last fault that the hypervisor raised.
    raised: Option<Raised>,
    clock: Clock,
    /// IA32_TSC_ADJUST, see [`tsc`].
    tsc_adjust: u64,
    /// The primary controls as they are in the VMCS.
    primary: u32,
    /// MSRs of the paravirtual clock as the guest wrote them.
    system_time: u64,
    wall_clock: u64,
    system_time_version: u32,
    /// CR4 bits that the guest may set.
    cr4_allowed: u64,
    /// Instructions that have touched devices.
    moves: Box<KnownMoves>,
    attention: Attention,
    timer: timer::EntryTimer,
    halt_lead: Lead,
    /// Why the guest is to be left.
    leave: Option<Leave>,
}

/// Why the run loop has to do something.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Leave {
    Halt,
    /// Something is asked of the guest ([`crate::vm::control`]).
    Request,
    End(End),
}

impl Vcpu {
    /// How much of the local APIC the CPU is.
    pub const fn apic_tier(&self) -> ApicTier {
        self.tier
    }

    /// Ends the guest at the next look.
    fn end(&mut self, end: End) {
        self.leave(Leave::End(end));
    }

    fn leave(&mut self, leave: Leave) {
        self.leave = Some(leave);
        self.attend_to(Attention::LEAVE);
    }
}
