//! The guests of the configuration, for everybody who asks about them, on any CPU.
//!
//! The locks are taken with interrupts off, and for moments only: the operator's commands
//! ask in an interrupt.

use super::console::commands::{Action, View};
use super::console::{self, commands};
use super::guests::{self, Loaded};
use super::processors::Processor;
use super::statistics::Exits;
use crate::arch::cpu::without_interrupts;
use crate::vcpu::{End, Vcpu};
use crate::vm::console::ConsolePort;
use crate::vm::control::{Control, Request};
use crate::vm::machine::Vm;
use crate::vm::mailbox::{Events, Mailbox};
use crate::vmx::apic::ApicTier;
use crate::vmx::entry::Statistics;
use crate::vmx::trace::Traced;
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use core::{fmt, mem};
use spin::Mutex;
use vireo_handoff::config::{self, Policy};

/// In the order of the configuration, which is that of the consoles' numbers.
static GUESTS: Mutex<Vec<Arc<Guest>>> = Mutex::new(Vec::new());

/// A guest of the configuration.
pub struct Guest {
    config: &'static config::Vm,
    console: Arc<ConsolePort>,
    control: Arc<Control>,
    /// It has ended, and its CPU starts it again in a moment. No other memory is read because of
    /// it.
    again: AtomicBool,
    /// It starts when another one has ended. No other memory is read because of it.
    follower: AtomicBool,
    /// The CPUs of its vCPUs; empty where it has no place.
    processors: Vec<&'static Processor>,
    /// In the multiplexer of consoles.
    index: usize,
    life: Mutex<Life>,
}

/// What has become of a guest.
enum Life {
    /// Nothing but its section of the configuration is there.
    Absent,
    /// It is in memory, and is not to start yet.
    Created(Box<Loaded>),
    /// Its CPU is to do that next.
    Wanted(Wanted),
    /// Its CPU is doing that.
    Loading,
    Running(Running),
    /// It runs no more, or never did. What it was is there where it ran.
    Ended {
        how: String,
        was: Option<Box<Past>>,
    },
}

/// What is remembered of a guest that ran.
struct Past {
    tier: ApicTier,
    exits: Exits,
    /// Of each vCPU, as the traces.
    each: Vec<Exits>,
    traces: Vec<Vec<Traced>>,
    screen: String,
}

/// What a guest's CPU is to do.
pub struct Wanted {
    /// What has been loaded already.
    pub loaded: Option<Box<Loaded>>,
    /// To start the guest, and not only to load it.
    pub start: bool,
}

/// What follows the end of a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follows {
    Nothing,
    /// It is started again, as the operator has asked.
    Start,
    /// It is started again, by its policy.
    StartLater,
}

/// What the operator has asked for, to be seen to at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Nothing.
    AsConfigured,
    Stop,
    Reset,
    Destroy,
}

struct Running {
    mailboxes: Arc<[Arc<Mailbox>]>,
    /// Since its first vCPU is there.
    tier: Option<ApicTier>,
    /// Of the vCPUs that are there.
    statistics: Vec<Statistics<Vcpu>>,
    then: Then,
    /// What its screen has shown last, when it has ended.
    screen: String,
}

impl Life {
    /// Why it cannot be loaded, or started.
    const fn why_not_wanted(&self, start: bool) -> &'static str {
        match self {
            Self::Absent | Self::Ended { .. } => guests::NOT_KEPT,
            Self::Created(_) => "it is created already",
            _ if start => "it has not ended",
            _ => "it is there already",
        }
    }

    /// Why what is for guests that run cannot be.
    const fn why_not_steered(&self) -> &'static str {
        match self {
            Self::Absent => "it is not created",
            Self::Loading => "it is being loaded",
            _ => "it does not run",
        }
    }
}

impl Running {
    fn exits(&self) -> Exits {
        let counts: Vec<_> = self.statistics.iter().map(Statistics::counts).collect();
        let times = self.statistics.iter().map(Statistics::times);
        let vcpus: Vec<_> = counts.iter().map(|counts| &counts[..]).zip(times).collect();
        Exits::sum(&vcpus)
    }

    /// `None` where none of its vCPUs is there.
    fn past(&mut self) -> Option<Past> {
        Some(Past {
            tier: self.tier?,
            exits: self.exits(),
            each: self.exits_of_each(),
            traces: self.traces(),
            screen: mem::take(&mut self.screen),
        })
    }

    fn exits_of_each(&self) -> Vec<Exits> {
        let exits = |vcpu: &Statistics<Vcpu>| Exits::new(&vcpu.counts(), vcpu.times());
        self.statistics.iter().map(exits).collect()
    }

    /// Of each vCPU.
    fn traces(&self) -> Vec<Vec<Traced>> {
        self.statistics.iter().map(Statistics::trace).collect()
    }
}

/// Adds a guest of the configuration, which is to run on `processors`.
pub fn add(config: &'static config::Vm, processors: Vec<&'static Processor>) -> Arc<Guest> {
    let port = Arc::new(ConsolePort::new());
    let index = console::add(config, Arc::clone(&port));
    let guest = Arc::new(Guest {
        config,
        console: port,
        control: Arc::default(),
        again: AtomicBool::new(false),
        follower: AtomicBool::new(false),
        processors,
        index,
        life: Mutex::new(Life::Absent),
    });
    without_interrupts(|| GUESTS.lock().push(Arc::clone(&guest)));
    guest
}

/// All guests, in the order of their numbers.
pub fn all() -> Vec<Arc<Guest>> {
    without_interrupts(|| GUESTS.lock().clone())
}

/// Bytes of memory of those that have some.
pub fn memory() -> u64 {
    let guests = all();
    let with_memory = guests.iter().filter(|guest| guest.has_memory());
    with_memory.map(|guest| guest.config.memory).sum()
}

/// Whether a guest is loaded and waits to be started by the operator.
pub fn any_created() -> bool {
    all().iter().any(|guest| guest.is_created())
}

impl Guest {
    fn with<R>(&self, f: impl FnOnce(&mut Life) -> R) -> R {
        without_interrupts(|| f(&mut self.life.lock()))
    }

    /// What it was made from.
    pub const fn config(&self) -> &'static config::Vm {
        self.config
    }

    /// The CPUs of its vCPUs, by their numbers; none where it has no place.
    pub fn processors(&self) -> &[&'static Processor] {
        &self.processors
    }

    /// These CPUs, as the operator knows them.
    pub fn places(&self) -> impl fmt::Display {
        Places(self.processors.iter().map(|own| own.cpu.number).collect())
    }

    /// Whether it is in memory, and is not to start yet.
    pub fn is_created(&self) -> bool {
        self.with(|life| matches!(life, Life::Created(_)))
    }

    /// It is to start when the guest has ended that its configuration names.
    pub fn set_follower(&self) {
        self.follower.store(true, Ordering::Relaxed);
    }

    /// Whether it is; whoever gets true is to see to it.
    pub fn take_follower(&self) -> bool {
        self.follower.swap(false, Ordering::Relaxed)
    }

    /// What is asked of it while it runs.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    fn has_memory(&self) -> bool {
        self.with(|life| match life {
            Life::Absent | Life::Ended { .. } => false,
            Life::Wanted(wanted) => wanted.loaded.is_some(),
            Life::Created(_) | Life::Loading | Life::Running(_) => true,
        })
    }

    /// Takes what is wanted of it; whoever gets it is to see to it.
    pub fn take_wanted(&self) -> Option<Wanted> {
        self.with(|life| match mem::replace(life, Life::Loading) {
            Life::Wanted(wanted) => Some(wanted),
            other => {
                *life = other;
                None
            }
        })
    }

    /// It is in memory.
    pub fn created(&self, loaded: Loaded) {
        self.with(|life| *life = Life::Created(Box::new(loaded)));
        console::attend();
    }

    /// Wants one that was created to start; false where it was not.
    pub fn want_to_start(&self) -> bool {
        self.want(true).is_ok()
    }

    /// Wants it to be in memory, and to `start`.
    fn want(&self, start: bool) -> Result<(), &'static str> {
        if self.processors.is_empty() {
            return Err("it has no CPU; log says why");
        }
        let kept = guests::may_start_again();
        self.with(|life| {
            let loaded = match mem::replace(life, Life::Absent) {
                Life::Created(loaded) if start => Some(loaded),
                Life::Absent | Life::Ended { .. } if kept => None,
                other => {
                    *life = other;
                    return Err(life.why_not_wanted(start));
                }
            };
            *life = Life::Wanted(Wanted { loaded, start });
            Ok(())
        })
    }

    /// What follows this end of it. What the operator has asked for goes before how it came to that.
    pub fn follows(&self, end: End) -> (End, Follows) {
        let then = self.with(|life| match life {
            Life::Running(running) => running.then,
            _ => Then::AsConfigured,
        });
        let policy = match (&end, then) {
            (_, Then::Stop | Then::Destroy) => return (End::Stopped, Follows::Nothing),
            (_, Then::Reset) => return (End::Reset, Follows::Start),
            (End::Reset, _) => self.config.on_reboot,
            (End::PowerOff | End::Exit(_) | End::Stopped, _) => Policy::Stop,
            _ => self.config.on_crash,
        };
        let follows = match policy {
            Policy::Stop => Follows::Nothing,
            Policy::Restart => Follows::StartLater,
        };
        (end, follows)
    }

    /// Its CPU is going to start it again, if that is still wanted in the end
    /// ([`Guest::want_again`]).
    pub fn set_again(&self) {
        self.again.store(true, Ordering::Relaxed);
    }

    /// Whether it is to be started again, and so is wanted.
    pub fn want_again(&self) -> bool {
        self.take_again() && self.want(true).is_ok()
    }

    fn take_again(&self) -> bool {
        self.again.swap(false, Ordering::Relaxed)
    }

    /// Asks it for what the operator wants, and has its CPU look.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn steer(self: &Arc<Self>, action: Action) -> Result<(), &'static str> {
        match action {
            Action::Create | Action::Start => {
                // The operator's start is the one that counts.
                self.take_again();
                self.want(action == Action::Start)?;
                guests::hand_over(self);
                Ok(())
            }
            Action::Stop if self.take_again() => Ok(()),
            Action::Destroy if self.drop_idle() => Ok(()),
            _ => self.steer_running(action),
        }
    }

    /// Gives back all that one has that does not run; false where it runs or is being loaded, or
    /// has nothing.
    fn drop_idle(&self) -> bool {
        let dropped = self.with(|life| match life {
            Life::Absent | Life::Loading | Life::Running(_) => None,
            Life::Created(_) | Life::Wanted(_) | Life::Ended { .. } => {
                Some(mem::replace(life, Life::Absent))
            }
        });
        self.take_again();
        guests::tell_bootstrap();
        dropped.is_some()
    }

    fn steer_running(&self, action: Action) -> Result<(), &'static str> {
        let pauses = self.control.asked().contains(Request::PAUSE);
        let request = match action {
            Action::Reset => Request::RESET,
            Action::Pause | Action::Resume => Request::PAUSE,
            Action::Create | Action::Start | Action::Stop | Action::Destroy => Request::STOP,
        };
        self.with(|life| {
            let Life::Running(running) = life else {
                return Err(life.why_not_steered());
            };
            match action {
                Action::Pause if pauses => return Err("it pauses already"),
                Action::Resume if !pauses => return Err("it does not pause"),
                Action::Reset if !guests::may_start_again() => return Err(guests::NOT_KEPT),
                Action::Stop => running.then = Then::Stop,
                Action::Destroy => running.then = Then::Destroy,
                Action::Reset => running.then = Then::Reset,
                _ => {}
            }
            if action == Action::Resume {
                self.control.withdraw(request);
            } else {
                self.control.ask(request);
            }
            Mailbox::post_to_all(&running.mailboxes, Events::REQUEST);
            Ok(())
        })
    }

    /// Whether what was asked of it last is done: it has ended, started or is created.
    pub fn is_settled(&self) -> bool {
        let asked = self.control.asked();
        self.with(|life| match life {
            Life::Absent | Life::Created(_) => true,
            Life::Wanted(_) | Life::Loading => false,
            Life::Running(running) => {
                let is_whole = running.statistics.len() == self.processors.len();
                is_whole && !asked.intersects(Request::STOP | Request::RESET)
            }
            Life::Ended { .. } => !self.again.load(Ordering::Relaxed),
        })
    }

    /// Its console.
    pub fn console(&self) -> Arc<ConsolePort> {
        Arc::clone(&self.console)
    }

    /// It starts. What was asked of it before is forgotten.
    pub fn started(&self, vm: &Vm) {
        self.control.withdraw(Request::all());
        let running = Life::Running(Running {
            mailboxes: vm.mailboxes(),
            tier: None,
            statistics: Vec::new(),
            then: Then::AsConfigured,
            screen: String::new(),
        });
        self.with(|life| *life = running);
        self.console.attach(Some(vm.mailboxes()));
        console::started(self.index);
    }

    /// One of its vCPUs is there.
    pub fn joined(&self, tier: ApicTier, statistics: Statistics<Vcpu>) {
        self.with(|life| {
            if let Life::Running(running) = life {
                running.tier = Some(tier);
                running.statistics.push(statistics);
            }
        });
    }

    /// Its exits, while it runs.
    pub fn exits(&self) -> Exits {
        self.with(|life| match life {
            Life::Running(running) => running.exits(),
            _ => Exits::sum(&[]),
        })
    }

    /// It is going to end, and its screen shows this.
    pub fn keep_screen(&self, screen: String) {
        self.with(|life| {
            if let Life::Running(running) = life {
                running.screen = screen;
            }
        });
    }

    /// It has ended, or could not start.
    pub fn ended(&self, how: &impl ToString) {
        let how = how.to_string();
        self.console.attach(None);
        let before = self.with(|life| {
            let (was, destroyed) = match life {
                Life::Running(running) => {
                    (running.past().map(Box::new), running.then == Then::Destroy)
                }
                _ => (None, false),
            };
            let after = if destroyed {
                Life::Absent
            } else {
                Life::Ended { how, was }
            };
            mem::replace(life, after)
        });
        drop(before);
        console::ended(self.index);
    }

    /// Asks for what the operator wants to see; `Some` where that is there already.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn ask_to_show(&self, view: View) -> Result<Option<String>, &'static str> {
        self.with(|life| {
            let running = match (life, view) {
                (Life::Running(running), _) => running,
                (Life::Ended { was: Some(was), .. }, View::Screen) => {
                    return Ok(Some(was.screen.clone()));
                }
                (other, _) => return Err(other.why_not_steered()),
            };
            let (what, vcpus) = match view {
                View::State => (Request::DUMP, running.mailboxes.len()),
                View::Screen => (Request::SCREEN, 1),
            };
            self.control.ask_to_show(what, vcpus);
            Mailbox::post_to_all(&running.mailboxes, Events::REQUEST);
            Ok(None)
        })
    }

    /// What was asked for, of each vCPU that was asked, once they all have shown it.
    ///
    /// # Errors
    /// They have not, and it does not run any more.
    pub fn shown(&self) -> Result<Option<Vec<String>>, &'static str> {
        let shown = self.control.take_shown();
        let runs = self.with(|life| matches!(life, Life::Running(_)));
        if shown.is_none() && !runs {
            return Err("it has ended");
        }
        Ok(shown)
    }

    /// The exits of each of its vCPUs that are there.
    pub fn exits_of_each(&self) -> Vec<Exits> {
        self.with(|life| match life {
            Life::Running(running) => running.exits_of_each(),
            Life::Ended { was: Some(was), .. } => was.each.clone(),
            _ => Vec::new(),
        })
    }

    /// The last exits of each of its vCPUs that are there, the oldest first.
    pub fn traces(&self) -> Vec<Vec<Traced>> {
        self.with(|life| match life {
            Life::Running(running) => running.traces(),
            Life::Ended { was: Some(was), .. } => was.traces.clone(),
            _ => Vec::new(),
        })
    }

    /// As it is now.
    pub fn look(&self) -> commands::Guest {
        let (state, tier, exits) = self.with(|life| match life {
            Life::Absent => ("not created".into(), None, None),
            Life::Created(_) => ("created".into(), None, None),
            Life::Wanted(Wanted { start: true, .. }) => ("to be started".into(), None, None),
            Life::Wanted(_) => ("to be created".into(), None, None),
            Life::Loading => ("being loaded".into(), None, None),
            Life::Running(running) => (
                if self.control.asked().contains(Request::PAUSE) {
                    "pausing".into()
                } else {
                    "running".into()
                },
                running.tier,
                Some(running.exits()),
            ),
            Life::Ended { how, was } => {
                let was = was.as_ref();
                let exits = was.map(|was| was.exits.clone());
                (how.clone(), was.map(|was| was.tier), exits)
            }
        });
        let runs = self.with(|life| matches!(life, Life::Running(_)));
        let cpus = self.processors.iter().filter(|_| runs);
        commands::Guest {
            name: self.config.name.clone(),
            state,
            memory: self.config.memory,
            vcpus: self.config.vcpus,
            apic: tier.map(|tier| tier.to_string()),
            cpus: cpus.map(|own| own.cpu.number).collect(),
            exits,
        }
    }
}

/// Numbers of CPUs, as in "CPU 0" and "CPUs 1, 2".
struct Places(Vec<usize>);

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.len() == 1 { "CPU " } else { "CPUs " })?;
        let mut separator = "";
        self.0.iter().try_for_each(|cpu| {
            write!(f, "{separator}{cpu}")?;
            separator = ", ";
            Ok(())
        })
    }
}
