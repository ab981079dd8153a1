//! The run loop: into the guest, and whatever an exit could not answer on its
//! own: waiting, and the end.

use super::events::Raised;
use super::timer::NEVER;
use super::tsc::ticks_since;
use super::{Attention, Leave, Vcpu};
use crate::addr::{Gpa, Gva};
use crate::devices::chipset::Chipset;
use crate::devices::{Message, Ticks};
use crate::host::console;
use crate::vm::control::Request;
use crate::vmx::check::{self, FieldReader};
use crate::vmx::entry::{Entry, Left, Next};
use crate::vmx::ept::EptError;
use crate::vmx::error::{EntryFailure, VmInstructionError};
use crate::vmx::exit_reason;
use crate::vmx::vmcs::{Vmcs, guest, information};
use core::{fmt, mem};

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    PowerOff,
    Reset,
    /// By its own will, with this code ([`crate::devices::pc::DEBUG_EXIT`]).
    Exit(u32),
    /// By the operator.
    Stopped,
    /// An exception that could not be delivered; `raised` if it was the hypervisor's.
    TripleFault {
        rip: Gva,
        raised: Option<Raised>,
    },
    /// HLT with interrupts off, and nobody to wake it.
    HaltedForever,
    /// Code or page tables where the guest has no memory.
    NoMemory(Gpa),
    /// The IDT, the stack or another table that an interrupt or exception needs.
    NoMemoryForDelivery(Gpa),
    /// An instruction that touches a device and is not emulated.
    Instruction {
        rip: Gva,
        bytes: [u8; 15],
        gpa: Gpa,
    },
    /// Something that guests may do and this hypervisor cannot yet.
    Unsupported(&'static str),
    Ept(EptError),
    EptMisconfiguration(Gpa),
    EntryFailure {
        reason: u32,
        qualification: u64,
    },
    /// VMLAUNCH or VMRESUME failed; `None` without a current VMCS.
    EntryRefused(Option<VmInstructionError>),
    UnexpectedExit {
        reason: u32,
        qualification: u64,
    },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("powered off"),
            Self::Reset => f.write_str("reset"),
            Self::Exit(code) => write!(f, "ended with code {code}"),
            Self::Stopped => f.write_str("stopped by the operator"),
            Self::TripleFault { rip, raised } => {
                write!(f, "stopped: triple fault at {rip}")?;
                let Some(Raised {
                    exception, reason, ..
                }) = raised
                else {
                    return Ok(());
                };
                let name = exit_reason::name(usize::from(*reason));
                write!(
                    f,
                    ", where the guest has no handler for {exception} ({name})"
                )
            }
            Self::HaltedForever => f.write_str("stopped: halted with interrupts off"),
            Self::NoMemory(gpa) => {
                write!(
                    f,
                    "stopped: code or page tables at {gpa}, where it has no memory"
                )
            }
            Self::NoMemoryForDelivery(gpa) => write!(
                f,
                "stopped: an interrupt or exception was to be delivered by way of {gpa}, where it has no memory"
            ),
            Self::Instruction { rip, bytes, gpa } => {
                write!(
                    f,
                    "stopped: the instruction at {rip}, which accesses {gpa}, is not emulated:"
                )?;
                bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            Self::Unsupported(what) => write!(f, "stopped: {what} is not supported"),
            Self::Ept(error) => write!(f, "stopped: no extended page tables: {error:?}"),
            Self::EptMisconfiguration(gpa) => write!(f, "stopped: EPT misconfiguration at {gpa}"),
            Self::EntryFailure {
                reason,
                qualification,
            } => match EntryFailure::decode(*reason | 1 << 31, *qualification) {
                Some(failure) => write!(f, "stopped: {failure}"),
                None => write!(f, "stopped: VM entry failed with reason {reason}"),
            },
            Self::EntryRefused(Some(error)) => write!(f, "stopped: VM entry refused: {error}"),
            Self::EntryRefused(None) => f.write_str("stopped: VM entry without a current VMCS"),
            Self::UnexpectedExit {
                reason,
                qualification,
            } => write!(
                f,
                "stopped: unexpected VM exit {reason}, qualification {qualification:#x}"
            ),
        }
    }
}

/// What a vCPU does when it has the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    /// It executes the guest.
    Running,
    /// It is in HLT.
    Halted,
    /// The machine is suspended to RAM.
    Suspended,
    /// It waits for a start-up interrupt (SDM 3, 10.4): in software, since a hypervisor below
    /// may not have that activity state.
    AwaitsStartUp,
}

/// How a turn of a vCPU on its CPU has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing is to be done but when there is mail, or this time has come, if any: of the
    /// host's time-stamp counter.
    Waits(Option<u64>),
    /// The time for it is over, or another vCPU may want the CPU.
    Yields,
    /// It spins until another vCPU has done something.
    Spins,
    Ends(End),
}

impl Vcpu {
    /// Runs the guest on the vCPU's CPU, at most until the host's time-stamp counter has come
    /// to `until`, or for `slice` ticks when it has had another one on this CPU wake up. The VMCS
    /// is current, and the guest's registers are in the hardware.
    pub fn turn(&mut self, entry: &mut Entry<Self>, until: u64, slice: u64) -> Turn {
        self.slice = Ticks(slice);
        self.turn_ends = if until == u64::MAX {
            NEVER
        } else {
            Ticks(until.saturating_sub(self.vm.started))
        };
        self.hold_interrupts(true);
        let turn = self.run(entry);
        self.hold_interrupts(false);
        turn
    }

    fn run(&mut self, entry: &mut Entry<Self>) -> Turn {
        let mut woken = None;
        loop {
            self.hear();
            self.open_all(entry);
            let asked = self.vm.control.asked();
            if asked.contains(Request::STOP) {
                return Turn::Ends(End::Stopped);
            }
            if asked.contains(Request::RESET) {
                return Turn::Ends(End::Reset);
            }
            if asked.intersects(Request::SHOW) {
                let show = || match asked.contains(Request::SCREEN) {
                    true => self.vm.screen(),
                    false => self.dump(entry.registers()),
                };
                if self.vm.control.show(self.id, show) {
                    console::attend();
                }
            }
            if asked.contains(Request::PAUSE) {
                return Turn::Waits(None);
            }
            if self.activity != Activity::Running {
                if self.output_waits || self.attention.contains(Attention::CONSOLE) {
                    self.pump_console();
                }
                match self.look_for_reason_to_wake() {
                    Some(due) => {
                        woken = due;
                        self.attend_to(Attention::EVENTS);
                        if self.activity == Activity::Suspended && !self.resume(entry) {
                            return self.failed(End::Reset);
                        }
                        self.activity = Activity::Running;
                    }
                    None => return self.wait(),
                }
            }
            // What a wait, or the start, has changed.
            self.attend_to(Attention::DEVICES);
            let left = if self.look_around() == Next::Leave {
                Left::Handler
            } else {
                if let Some(due) = woken.take() {
                    let started = self.vm.started;
                    self.halt_lead.wait(due, || ticks_since(started));
                }
                entry.run(self)
            };
            match left {
                Left::Handler => {}
                Left::FailInvalid => return self.failed(End::EntryRefused(None)),
                Left::FailValid => {
                    let error = self.vmcs.read(information::INSTRUCTION_ERROR);
                    return self.failed(End::EntryRefused(Some(VmInstructionError(error))));
                }
            }
            match self.leave.take() {
                None | Some(Leave::Mail) => {}
                Some(Leave::Halt) => {
                    self.activity = Activity::Halted;
                    // Nothing has come since HLT was answered, but what the console may bring.
                    if !self.output_waits && !self.attention.contains(Attention::CONSOLE) {
                        return self.wait();
                    }
                }
                Some(Leave::Suspend) => self.activity = Activity::Suspended,
                Some(Leave::Turn) => return Turn::Yields,
                Some(Leave::Spin) => return Turn::Spins,
                Some(Leave::End(end)) => return self.failed(end),
            }
        }
    }

    /// Everything that has to be right before the guest runs on: devices brought
    /// up to now, their interrupts delivered, one event chosen, the timer set.
    pub(super) fn look_around(&mut self) -> Next {
        let attention = mem::replace(&mut self.attention, Attention::empty());
        if attention.contains(Attention::LEAVE) {
            self.attention = attention - Attention::LEAVE;
            return Next::Leave;
        }
        if attention.contains(Attention::CONSOLE) {
            self.pump_console();
        }
        let timed = attention.intersects(Attention::DEVICES | Attention::CONSOLE);
        if timed {
            let now = self.now();
            if now >= self.turn_ends {
                // For the next turn, which looks at devices by itself, but at nothing else.
                self.attention |= attention;
                self.leave(Leave::Turn);
                return Next::Leave;
            }
            if self.next_deadline() <= now {
                self.advance(now);
                self.attend_to(Attention::EVENTS);
            }
            self.set_timer(now);
        }
        // What devices have delivered is injected now too; what else has come meanwhile is for
        // the next exit.
        let delivered = self.attention & (Attention::EVENTS | Attention::DEVICES);
        self.attention -= delivered;
        if (attention | delivered).contains(Attention::EVENTS) {
            self.inject();
        }
        if !timed {
            self.correct_timer();
        }
        Next::Resume
    }

    fn advance(&mut self, now: Ticks) {
        if self.apic.deadline().is_some_and(|deadline| deadline <= now) {
            self.apic.advance(now);
        }
        if self.chipset_deadline() > now {
            return;
        }
        self.with_chipset(|chipset| {
            if chipset.deadline().is_some_and(|deadline| deadline <= now) {
                chipset.advance(now);
            }
        });
        self.pass_messages();
    }

    /// Sends on what the I/O APIC has for the local APICs.
    pub(super) fn pass_messages(&mut self) {
        // A pin has one at most, and nothing makes more while the guest does not run.
        while let Some(message) = self.take_message() {
            self.deliver(message, false);
        }
    }

    fn take_message(&mut self) -> Option<Message> {
        let mut chipset = self.vm.chipset.lock();
        let message = chipset.take_message();
        self.vm.signals.publish(&chipset);
        message
    }

    /// Whether a vCPU that waits has a reason to go on, and what is due then: the expiry of
    /// the local APIC's timer, for which it wakes up a little early.
    fn look_for_reason_to_wake(&mut self) -> Option<Option<Ticks>> {
        // What the mail has brought.
        if self.activity == Activity::Halted && self.has_wake_event() {
            return Some(None);
        }
        let now = self.now();
        let mut woken = None;
        let due = self.next_deadline();
        if self.apic.expires_by(due) && self.halt_lead.has_come(due, now) {
            self.apic.advance(due);
            woken = Some(due);
        }
        self.advance(now);
        let wakes = match self.activity {
            Activity::Halted => self.has_wake_event(),
            Activity::Suspended => self.with_chipset(Chipset::take_wake),
            Activity::Running | Activity::AwaitsStartUp => false,
        };
        wakes.then_some(woken)
    }

    /// The end of a turn in which the guest has nothing to do.
    fn wait(&mut self) -> Turn {
        let hears_nothing = match self.activity {
            Activity::Suspended => false,
            Activity::AwaitsStartUp => true,
            Activity::Running | Activity::Halted => self.interrupts_are_off(),
        };
        if hears_nothing {
            self.deaf = true;
            if self.vm.is_still() {
                return self.failed(End::HaltedForever);
            }
        }
        let deadline = self.next_deadline();
        Turn::Waits((deadline != NEVER).then(|| {
            let asked = self.ask_before(deadline, self.halt_lead);
            self.vm.started.saturating_add(asked.0)
        }))
    }

    /// It may have mail, and is no longer [deaf](crate::vm::stillness) before it takes that.
    fn hear(&mut self) {
        if mem::take(&mut self.deaf) {
            self.vm.stillness.remove();
        }
    }

    /// Reports what was wrong with the state when an entry failed.
    fn failed(&self, end: End) -> Turn {
        match end {
            End::PowerOff | End::Reset | End::Exit(_) | End::Stopped => {}
            End::EntryFailure { .. } | End::EntryRefused(_) => {
                for violation in check::check(&Fields(&self.vmcs), &self.check_capabilities()) {
                    log::error!("vm {}: {violation}", self.vm.name);
                }
            }
            _ => self.report_registers(),
        }
        Turn::Ends(end)
    }

    fn report_registers(&self) {
        let read = |field| self.vmcs.read(field);
        log::info!(
            "vm {}: rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            self.vm.name,
            read(guest::RIP),
            read(guest::RSP),
            read(guest::RFLAGS),
            self.cr0(),
            read(guest::CR3),
            self.cr4(),
            read(guest::EFER)
        );
    }

    fn check_capabilities(&self) -> check::Capabilities {
        let own = &self.vmx.capabilities;
        check::Capabilities {
            basic: own.basic,
            pin_based: own.pin.0,
            primary: own.primary.0,
            secondary: own.secondary.0,
            exit: own.exit.0,
            entry: own.entry.0,
            misc: own.misc,
            cr0_fixed0: own.cr0_fixed0,
            cr0_fixed1: own.cr0_fixed1,
            cr4_fixed0: own.cr4_fixed0,
            cr4_fixed1: own.cr4_fixed1,
            ept_vpid: own.ept_vpid,
            vm_functions: 0,
            physical_address_width: self.cpuid.physical_address_bits(),
            linear_address_width: 48,
        }
    }
}

struct Fields<'a>(&'a Vmcs);

impl FieldReader for Fields<'_> {
    fn read(&self, encoding: u32) -> u64 {
        self.0.read_raw(encoding)
    }
}
