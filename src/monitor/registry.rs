//! The guests of the configuration, for everybody who asks about them, on any CPU.
//!
//! The locks are taken with interrupts off, and for moments only: the operator's commands
//! ask in an interrupt.

use super::console::{self, commands};
use super::statistics::Exits;
use crate::arch::cpu::without_interrupts;
use crate::host::local_apic;
use crate::vcpu::Vcpu;
use crate::vm::console::ConsolePort;
use crate::vmx::apic::ApicTier;
use crate::vmx::entry::Statistics;
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use spin::Mutex;
use vireo_handoff::config;

/// In the order of the configuration, which is that of the consoles' numbers.
static GUESTS: Mutex<Vec<Arc<Guest>>> = Mutex::new(Vec::new());

/// A guest of the configuration.
pub struct Guest {
    name: String,
    /// Bytes.
    memory: u64,
    vcpus: u32,
    console: Arc<ConsolePort>,
    /// In the multiplexer of consoles.
    index: usize,
    life: Mutex<Life>,
}

/// What has become of a guest.
enum Life {
    /// It is in memory, and has not started.
    Loaded,
    Running(Running),
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
pub fn add(config: &config::Vm) -> Arc<Guest> {
    let port = Arc::new(ConsolePort::new());
    let index = console::add(config.name.clone(), Arc::clone(&port));
    let guest = Arc::new(Guest {
        name: config.name.clone(),
        memory: config.memory,
        vcpus: config.vcpus,
        console: port,
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
        .map(|guest| guest.memory)
        .sum()
}

impl Guest {
    fn with<R>(&self, f: impl FnOnce(&mut Life) -> R) -> R {
        without_interrupts(|| f(&mut self.life.lock()))
    }

    /// As in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its console.
    pub fn console(&self) -> Arc<ConsolePort> {
        Arc::clone(&self.console)
    }

    /// It starts, on the calling CPU.
    pub fn started(&self, tier: ApicTier, statistics: Statistics<Vcpu>) {
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
            Life::Running(running) => (
                "running".into(),
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
            name: self.name.clone(),
            state,
            memory: self.memory,
            vcpus: self.vcpus,
            apic: tier.map(|tier| tier.to_string()),
            cpu,
            exits,
        }
    }
}
