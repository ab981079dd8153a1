//! One virtual CPU.
//!
//! [`Vcpu::run`] is the run loop; between its rounds the guest runs, and each
//! VM exit is answered in [`exits`] on the vCPU's own stack. What an exit may
//! lead to has a file each: [`mod@control_registers`], [`events`] (injection), [`io`],
//! [`mmio`], [`model_specific`], [`virtual_apic`]. Policy is plain logic that knows neither VT-x
//! nor the host: [`cpuid`], [`msr`], [`pvclock`], [`walk`], [`emulate`].

mod attention;
mod bochs;
mod breakpoints;
pub mod control_registers;
pub mod cpuid;
mod dump;
pub mod emulate;
pub mod events;
mod exceptions;
mod execution;
pub mod exits;
pub mod fault;
mod hypercall;
pub mod io;
mod known_code;
mod lead;
mod light;
mod mail;
pub mod mmio;
pub mod model_specific;
pub mod msr;
pub mod pvclock;
pub mod run;
pub mod segmentation;
pub mod state;
pub mod task_switch;
mod timer;
pub mod tsc;
mod virtual_apic;
pub mod walk;

use crate::devices::local_apic::LocalApic;
use crate::devices::{Clock, Ticks};
use crate::vm::machine::Vm;
use crate::vm::mailbox::Mailbox;
use crate::vmx::apic::ApicTier;
use crate::vmx::live_state::LiveState;
use crate::vmx::operation::Vmx;
use crate::vmx::vmcs::Vmcs;
use crate::vmx::vpid::Vpid;
use alloc::boxed::Box;
use alloc::sync::Arc;
use attention::Attention;
use cpuid::CpuidTable;
use events::{Pending, Raised};
use known_code::KnownCode;
use lead::Lead;
use msr::Msrs;

use run::Activity;

pub use run::{End, Turn};
pub use state::SetupError;

/// One virtual CPU, on the CPU that its VMCS is current on.
pub struct Vcpu {
    /// The local APIC's identifier, and its number in the guest.
    id: u32,
    /// All bits set but in the first vCPU, which looks after the chipset.
    not_first: u64,
    activity: Activity,
    /// Nothing but NMI, INIT and start-up interrupts can have it go on.
    deaf: bool,
    /// When it is to give way to others on its CPU.
    turn_ends: Ticks,
    /// How long its turns are while others are ready.
    slice: Ticks,
    /// COM1 may have output that has not been fetched.
    output_waits: bool,
    vm: Arc<Vm>,
    /// Its own of the VM's.
    mailbox: Arc<Mailbox>,
    vmx: Vmx,
    vmcs: Vmcs,
    live: LiveState,
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
    apic_page_is_mapped: bool,
    /// What the emulator needs ([`bochs`]).
    misses_interrupts: bool,
    holds_interrupts: bool,
    /// The selector of CS in real mode, likewise.
    paragraph: u16,
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
    known: Box<KnownCode>,
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
    /// The machine is suspended to RAM.
    Suspend,
    /// There is mail that is not for between two instructions.
    Mail,
    /// Its turn is over.
    Turn,
    /// It spins, waiting for another vCPU.
    Spin,
    End(End),
}

impl Vcpu {
    /// How much of the local APIC the CPU is.
    pub const fn apic_tier(&self) -> ApicTier {
        self.tier
    }

    /// The tag of its translations in the TLB.
    pub const fn vpid(&self) -> Vpid {
        self.vpid
    }

    /// Whether others have something for it.
    pub fn has_mail(&self) -> bool {
        self.mailbox().has_mail()
    }

    /// Gives it its CPU, whose VMCS and registers were those of `before`, or nobody's.
    pub fn take_cpu(&self, before: Option<&mut Self>) {
        self.vmcs.make_current();
        self.live.load(before.map(|before| {
            before.live.save();
            &before.live
        }));
    }

    /// Takes its registers from its CPU, which is about to have another VMCS.
    pub fn leave_cpu(&mut self) {
        self.live.save();
    }

    /// Ends the guest at the next look.
    fn end(&mut self, end: End) {
        self.leave(Leave::End(end));
    }

    /// Leaves for `leave` where nothing else is the reason.
    fn leave_for(&mut self, leave: Leave) {
        if self.leave.is_none() {
            self.leave(leave);
        }
    }

    fn leave(&mut self, leave: Leave) {
        self.leave = Some(leave);
        self.attend_to(Attention::LEAVE);
    }
}
