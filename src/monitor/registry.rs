//! The guests of the configuration, for everybody who asks about them, on any CPU.
//!
//! The locks are taken with interrupts off, and for moments only: the operator's commands
//! ask in an interrupt.

use super::console::commands::Action;
use super::console::{self, commands};
use super::guests;
use super::statistics::Exits;
use crate::arch::cpu::without_interrupts;
use crate::host::cpus::{self, Cpu};
use crate::host::local_apic;
use crate::vcpu::{End, Vcpu};
use crate::vm::console::ConsolePort;
use crate::vm::control::{Control, Request};
use crate::vmx::apic::ApicTier;
use crate::vmx::entry::Statistics;
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;
use vireo_handoff::config::{self, Policy};

/// In the order of the configuration, which is that of the consoles' numbers.
static GUESTS: Mutex<Vec<Arc<Guest>>> = Mutex::new(Vec::new());

/// A guest of the configuration.
pub struct Guest {
    config: &'static config::Vm,
    console: Arc<ConsolePort>,
    control: Arc<Control>,
    /// The operator has asked for the reset that ends it.
    reset: AtomicBool,
    /// It has ended, and its CPU starts it again in a moment.
    again: AtomicBool,
    /// In the multiplexer of consoles.
    index: usize,
    life: Mutex<Life>,
}

/// What has become of a guest.
enum Life {
    /// It is in memory, and has not started.
    Loaded,
    Running(Running),
    /// It has ended, and is to be started again by its CPU.
    Wanted,
    /// It runs no more, or never did. What it was is there where it ran.
    Ended {
        how: String,
        was: Option<(ApicTier, Box<Exits>)>,
    },
}

struct Running {
    tier: ApicTier,
    /// The local APIC identifier of its CPU.
    cpu: u32,
    statistics: Statistics<Vcpu>,
}

impl Running {
    fn exits(&self) -> Exits {
        Exits::new(&self.statistics.counts(), self.statistics.times())
    }
}

/// Adds a guest of the configuration, which is being loaded.
pub fn add(config: &'static config::Vm) -> Arc<Guest> {
    let port = Arc::new(ConsolePort::new());
    let index = console::add(config.name.clone(), Arc::clone(&port));
    let guest = Arc::new(Guest {
        config,
        console: port,
        control: Arc::default(),
        reset: AtomicBool::new(false),
        again: AtomicBool::new(false),
        index,
        life: Mutex::new(Life::Loaded),
    });
    without_interrupts(|| GUESTS.lock().push(Arc::clone(&guest)));
    guest
}

/// All guests, in the order of their numbers.
pub fn all() -> Vec<Arc<Guest>> {
    without_interrupts(|| GUESTS.lock().clone())
}

/// Bytes of memory of those that have not ended.
pub fn memory() -> u64 {
    let has_memory = |guest: &&Arc<Guest>| guest.with(|life| !matches!(life, Life::Ended { .. }));
    let guests = all();
    guests
        .iter()
        .filter(has_memory)
        .map(|guest| guest.config.memory)
        .sum()
}

/// The next guest that the bootstrap processor is to start again.
pub fn take_wanted() -> Option<Arc<Guest>> {
    let mut guests = all().into_iter();
    guests.find(|guest| guest.own_cpu().is_none() && guest.take_wanted())
}

impl Guest {
    fn with<R>(&self, f: impl FnOnce(&mut Life) -> R) -> R {
        without_interrupts(|| f(&mut self.life.lock()))
    }

    /// What it was made from.
    pub const fn config(&self) -> &'static config::Vm {
        self.config
    }

    /// The CPU that it has for itself; none where that is the bootstrap processor, which
    /// others share.
    pub fn own_cpu(&self) -> Option<&'static Cpu> {
        let number = *self.config.cpus.first()? as usize;
        cpus::get(number).filter(|cpu| cpu.number != cpus::BOOTSTRAP)
    }

    /// What is asked of it while it runs.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// Whether it has ended, and nobody wants it again.
    pub fn has_ended(&self) -> bool {
        self.with(|life| matches!(life, Life::Ended { .. }))
    }

    /// Marks one that has ended as wanted.
    pub fn want(&self) {
        self.with(|life| {
            if matches!(life, Life::Ended { .. }) {
                *life = Life::Wanted;
            }
        });
    }

    /// Whether it is wanted; whoever gets true is to start it.
    pub fn take_wanted(&self) -> bool {
        self.with(|life| {
            let wanted = matches!(life, Life::Wanted);
            if wanted {
                *life = Life::Loaded;
            }
            wanted
        })
    }

    /// What follows this end of it.
    pub fn follows(&self, end: &End) -> Policy {
        match end {
            End::Reset if self.reset.swap(false, Ordering::Relaxed) => Policy::Restart,
            End::Reset => self.config.on_reboot,
            End::PowerOff | End::Exit(_) | End::Stopped => Policy::Stop,
            _ => self.config.on_crash,
        }
    }

    /// Its CPU is going to start it again, if that is still wanted in the end
    /// ([`Guest::take_again`]).
    pub fn set_again(&self) {
        self.again.store(true, Ordering::Relaxed);
    }

    /// Whether it is to be started again; if so, whoever gets true does that.
    pub fn take_again(&self) -> bool {
        self.again.swap(false, Ordering::Relaxed)
    }

    /// Asks it for what the operator wants, and has its CPU look.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn steer(self: &Arc<Self>, action: Action) -> Result<(), &'static str> {
        if action == Action::Start {
            return guests::start_again(self);
        }
        let cpu = self.with(|life| match life {
            Life::Running(running) => Some(running.cpu),
            _ => None,
        });
        let Some(cpu) = cpu else {
            // One that is about to be started again is not, then.
            return if action == Action::Stop && self.take_again() {
                Ok(())
            } else {
                Err("it does not run")
            };
        };
        let pauses = self.control.asked().contains(Request::PAUSE);
        match action {
            Action::Start => {}
            Action::Stop => self.control.ask(Request::STOP),
            Action::Reset if !guests::may_start_again() => return Err(guests::NOT_KEPT),
            Action::Reset => {
                self.reset.store(true, Ordering::Relaxed);
                self.control.ask(Request::RESET);
            }
            Action::Pause if pauses => return Err("it pauses already"),
            Action::Pause => self.control.ask(Request::PAUSE),
            Action::Resume if !pauses => return Err("it does not pause"),
            Action::Resume => self.control.withdraw(Request::PAUSE),
        }
        local_apic::kick(cpu);
        Ok(())
    }

    /// Its console.
    pub fn console(&self) -> Arc<ConsolePort> {
        Arc::clone(&self.console)
    }

    /// It starts, on the calling CPU. What was asked of it before is forgotten.
    pub fn started(&self, tier: ApicTier, statistics: Statistics<Vcpu>) {
        self.control.withdraw(Request::all());
        let running = Life::Running(Running {
            tier,
            cpu: local_apic::id(),
            statistics,
        });
        self.with(|life| *life = running);
        console::started(self.index);
    }

    /// It has ended, or could not start.
    pub fn ended(&self, how: &impl ToString) {
        let ended = |was| Life::Ended {
            how: how.to_string(),
            was,
        };
        let before = self.with(|life| mem::replace(life, ended(None)));
        if let Life::Running(running) = before {
            let was = (running.tier, Box::new(running.exits()));
            self.with(|life| *life = ended(Some(was)));
        }
        console::ended(self.index);
    }

    /// As it is now.
    pub fn look(&self) -> commands::Guest {
        let (state, tier, cpu, exits) = self.with(|life| match life {
            Life::Loaded => ("loaded".into(), None, None, None),
            Life::Wanted => ("to be started".into(), None, None, None),
            Life::Running(running) => (
                if self.control.asked().contains(Request::PAUSE) {
                    "pausing".into()
                } else {
                    "running".into()
                },
                Some(running.tier),
                Some(running.cpu),
                Some(running.exits()),
            ),
            Life::Ended { how, was } => {
                let (tier, exits) = was.clone().unzip();
                (how.clone(), tier, None, exits.map(|exits| *exits))
            }
        });
        commands::Guest {
            name: self.config.name.clone(),
            state,
            memory: self.config.memory,
            vcpus: self.config.vcpus,
            apic: tier.map(|tier| tier.to_string()),
            cpu,
            exits,
        }
    }
}
