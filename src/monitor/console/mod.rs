//! The operator's console: one serial line for the log, the prompt and every guest's COM1.
//!
//! [`multiplexer`] says whose line it is, [`editor`] and [`commands`] are the prompt: logic
//! that knows no hardware. Here it is tied to the machine.
//!
//! The line is served in the UART's interrupt, and where a guest's CPU has something for an
//! idle line ([`console::attend`]). So commands are answered there too, between two looks
//! at the guest that runs on the UART's CPU: a command may read what it likes, but
//! must not wait. Nobody may log while the multiplexer is locked.

pub mod commands;
pub mod editor;
pub mod multiplexer;
mod text;

use super::statistics::Exits;
use super::{guests, registry};
use crate::arch::cpu::{self, without_interrupts};
use crate::host::memory::{self, heap};
use crate::host::{console, cpus, time};
use crate::vm::console::ConsolePort;
use crate::vmx::trace::Traced;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use commands::{Action, Cpu, Guest, Machine, Memory, Prompt, View};
use multiplexer::{Line, Multiplexer};
use spin::{Mutex, Once};
use vireo_handoff::BootInfo;
use vireo_handoff::config::{self, Serial};

pub use text::Text;

static MULTIPLEXER: Mutex<Multiplexer> = Mutex::new(Multiplexer::new());
/// Of the second serial port, which one guest has for itself.
static SECOND: Mutex<Multiplexer> = Mutex::new(Multiplexer::raw());
/// The firmware's list of CPUs, by their local APICs' identifiers.
static CPUS: Once<Vec<u32>> = Once::new();

/// Interrupts are off meanwhile, since the UART's takes the same lock.
fn with<R>(f: impl FnOnce(&mut Multiplexer) -> R) -> R {
    without_interrupts(|| f(&mut MULTIPLEXER.lock()))
}

/// From now on the serial line is the operator's. Once.
pub fn start(boot: &BootInfo) {
    CPUS.call_once(|| boot.cpus.iter().map(|cpu| cpu.apic_id).collect());
    console::on_moved(serve);
}

fn serve() {
    let commands = Prompt(&ThisMachine);
    with(|multiplexer| multiplexer.serve(&mut HostLine(&console::OPERATOR), &commands));
    if console::has_second() {
        with_second(|second| second.serve(&mut HostLine(&console::SECOND), &commands));
    }
}

/// As [`with`]. Never inside that one.
fn with_second<R>(f: impl FnOnce(&mut Multiplexer) -> R) -> R {
    without_interrupts(|| f(&mut SECOND.lock()))
}

/// Shows a line of the log, without its end; false where there is no room for all of it.
pub fn log(message: &str) -> bool {
    with(|multiplexer| multiplexer.log(message, &mut HostLine(&console::OPERATOR)))
}

/// Something has happened that the prompt may wait for.
pub fn attend() {
    console::attend();
}

/// A guest's console is to have a number: its index, one less than that.
pub fn add(config: &config::Vm, port: Arc<ConsolePort>) -> usize {
    let name = config.name.clone();
    match config.serial {
        Serial::Console => with(|multiplexer| multiplexer.add(name, Some(port))),
        Serial::Com2 => {
            with_second(|second| {
                second.add(name.clone(), Some(port));
                // For good: there is nobody else.
                second.started(0);
            });
            with(|multiplexer| multiplexer.add(name, None))
        }
    }
}

/// The guest with this index starts.
pub fn started(index: usize) {
    with(|multiplexer| multiplexer.started(index));
    console::attend();
}

/// The guest with this index has ended.
pub fn ended(index: usize) {
    with(|multiplexer| multiplexer.ended(index));
    console::attend();
}

/// Sends everything that is to be said. Waits for the line: before power-off only.
pub fn flush() {
    loop {
        serve();
        console::flush();
        if with(|multiplexer| multiplexer.is_said()) {
            return;
        }
    }
}

/// A serial port.
struct HostLine(&'static console::Line);

impl Line for HostLine {
    fn read(&mut self) -> Option<u8> {
        self.0.read()
    }

    fn queued(&self) -> usize {
        self.0.queued()
    }

    fn space(&self) -> usize {
        self.0.write_space()
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.write(bytes.iter().copied());
    }

    fn is_busy(&self) -> bool {
        self.0.is_draining()
    }

    fn hold(&mut self, on: bool) {
        self.0.hold(on);
    }

    fn take_break(&mut self) -> bool {
        self.0.take_break()
    }
}

/// What the commands are told.
struct ThisMachine;

impl Machine for ThisMachine {
    fn guests(&self) -> Vec<Guest> {
        registry::all().iter().map(|guest| guest.look()).collect()
    }

    fn cpus(&self) -> Vec<Cpu> {
        let listed = CPUS.get().into_iter().flatten().copied().enumerate();
        listed
            .map(|(number, apic_id)| Cpu {
                apic_id,
                answers: cpus::get(number).is_some(),
            })
            .collect()
    }

    fn memory(&self) -> Memory {
        let (total, free) = memory::counts();
        let (used, unused) = heap::usage();
        let guests = registry::memory();
        Memory {
            total: total * crate::addr::PAGE_SIZE,
            free: free * crate::addr::PAGE_SIZE,
            hypervisor: memory::usage().saturating_sub(guests),
            guests,
            heap: (used as u64, (used + unused) as u64),
            frames_free: free,
            vpids: guests::vpids_in_use(),
        }
    }

    fn ticks_per_second(&self) -> u64 {
        time::tsc_hz()
    }

    fn log(&self) -> String {
        super::log::lines()
    }

    fn steer(&self, guest: usize, action: Action) -> Result<(), &'static str> {
        let guests = registry::all();
        guests.get(guest).ok_or("it is gone")?.steer(action)
    }

    fn exits_of_each(&self, guest: usize) -> Vec<Exits> {
        let guests = registry::all();
        guests
            .get(guest)
            .map_or_else(Vec::new, |guest| guest.exits_of_each())
    }

    fn traces(&self, guest: usize) -> Vec<Vec<Traced>> {
        let guests = registry::all();
        guests
            .get(guest)
            .map_or_else(Vec::new, |guest| guest.traces())
    }

    fn ask_to_show(&self, guest: usize, view: View) -> Result<Option<String>, &'static str> {
        let guests = registry::all();
        guests.get(guest).ok_or("it is gone")?.ask_to_show(view)
    }

    fn shown(&self, guest: usize) -> Result<Option<Vec<String>>, &'static str> {
        let guests = registry::all();
        guests.get(guest).ok_or("it is gone")?.shown()
    }

    fn now(&self) -> u64 {
        cpu::rdtsc()
    }

    fn is_settled(&self, guest: usize) -> bool {
        let guests = registry::all();
        guests.get(guest).is_none_or(|guest| guest.is_settled())
    }
}
