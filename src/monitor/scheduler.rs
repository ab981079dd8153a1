//! Which vCPU has a CPU, and when: fixed priorities, and turns among equals.
//!
//! Each CPU has a scheduler and vCPUs of its own, which never move; a CPU that one guest has
//! for itself is one with a single vCPU. The vCPU of the highest priority that has something to
//! do has the CPU until it waits, until its slice is over where an equal is ready too, or until
//! one that is not below it has something to do again: by mail
//! ([`crate::vm::mailbox`]), or because a moment has come. A moment ends the turn through
//! the guest's preemption timer, so that nothing else interrupts a guest that has the CPU alone.
//!
//! A vCPU that has waited finds its registers where it left them, if no other has had the CPU
//! meanwhile: they are saved when another comes, not when it goes.

use super::guests::{self, Living};
use super::processors::Processor;
use crate::arch::cpu;
use crate::host::time;
use crate::vcpu::{End, Turn, Vcpu};
use crate::vmx::entry::Entry;
use crate::vmx::live_state::LiveState;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Something that a CPU does between the turns of its vCPUs. It must not wait.
pub type Job = Box<dyn FnOnce(&mut Scheduler) + Send>;

/// The scheduler of one CPU, used by that alone.
pub struct Scheduler {
    processor: &'static Processor,
    /// Equals in the order in which they get the CPU.
    #[expect(
        clippy::vec_box,
        reason = "the order changes often, and a task is large"
    )]
    tasks: Vec<Box<Task>>,
    /// The number of the one whose VMCS and registers the CPU holds.
    owner: Option<u64>,
    /// The number of the next one.
    number: u64,
    /// What is to be done when the time-stamp counter has come there.
    later: Vec<(u64, Job)>,
}

/// A vCPU on its CPU.
pub struct Task {
    number: u64,
    vcpu: Vcpu,
    entry: Entry<Vcpu>,
    registers: LiveState,
    living: Arc<Living>,
    /// The higher goes first.
    priority: u8,
    /// Ticks of a turn while equals are ready.
    slice: u64,
    /// When the slice that it has begun is over.
    slice_ends: Option<u64>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// It has something to do when it has mail, or at this time, if any.
    Waits(Option<u64>),
}

impl Task {
    /// One that is ready.
    pub fn new(vcpu: Vcpu, entry: Entry<Vcpu>, registers: LiveState, living: Arc<Living>) -> Self {
        let config = living.config();
        let slice = time::tsc_hz() / 1_000_000 * u64::from(config.slice_us);
        Self {
            number: 0,
            vcpu,
            entry,
            registers,
            priority: config.priority,
            slice: slice.max(1),
            slice_ends: None,
            state: State::Ready,
            living,
        }
    }

    fn is_ready(&self) -> bool {
        self.state == State::Ready
    }
}

impl Scheduler {
    /// Without any vCPU.
    pub fn new(processor: &'static Processor) -> Self {
        Self {
            processor,
            tasks: Vec::new(),
            owner: None,
            number: 0,
            later: Vec::new(),
        }
    }

    /// The CPU.
    pub fn processor(&self) -> &'static Processor {
        self.processor
    }

    /// Serves the CPU until `done`. Interrupts are off but while it has nothing to do.
    pub fn run(&mut self, done: impl Fn() -> bool) {
        loop {
            if self.processor.place.take_news() {
                while let Some(job) = self.processor.take_job() {
                    job(self);
                }
                if done() {
                    return;
                }
            }
            let now = cpu::rdtsc();
            self.do_what_is_due(now);
            match self.first(now) {
                Some(index) => self.turn(index, now),
                None => self.idle(now),
            }
        }
    }

    /// Has `job` done when the time-stamp counter has come to `at`.
    pub fn do_later(&mut self, at: u64, job: Job) {
        self.later.push((at, job));
    }

    /// Makes the CPU free for another VMCS, which is to be the current one.
    pub fn make_room(&mut self) {
        if let Some(owner) = self.owner.take()
            && let Some(task) = self.tasks.iter_mut().find(|task| task.number == owner)
        {
            task.registers.save();
        }
    }

    /// A vCPU that was made on this CPU after [`Scheduler::make_room`].
    pub fn add(&mut self, mut task: Task) {
        self.number += 1;
        task.number = self.number;
        self.tasks.push(Box::new(task));
    }

    fn do_what_is_due(&mut self, now: u64) {
        while let Some(index) = self.later.iter().position(|(at, _)| *at <= now) {
            let (_, job) = self.later.swap_remove(index);
            job(self);
        }
    }

    /// The first of the highest priority that is ready. Those that wait and have something to do
    /// become ready: nobody's turn it is meanwhile, as [`crate::vm::mailbox`] demands.
    fn first(&mut self, now: u64) -> Option<usize> {
        let mut best = None;
        let mut highest = None;
        for (index, task) in self.tasks.iter_mut().enumerate() {
            if let State::Waits(until) = task.state {
                if until.is_none_or(|until| until > now) && !task.vcpu.has_mail() {
                    continue;
                }
                task.state = State::Ready;
            }
            if highest.is_none_or(|highest| task.priority > highest) {
                highest = Some(task.priority);
                best = Some(index);
            }
        }
        best
    }

    fn turn(&mut self, index: usize, now: u64) {
        self.switch_to(index);
        let until = self.end_of_turn(index, now);
        let place = &self.processor.place;
        let Some(task) = self.tasks.get_mut(index) else {
            return;
        };
        place.set_current(Some(task.vcpu.mailbox()));
        let turn = task.vcpu.turn(&mut task.entry, until, task.slice);
        place.set_current(None);
        match turn {
            Turn::Waits(until) => {
                task.state = State::Waits(until);
                task.slice_ends = None;
            }
            Turn::Yields if task.slice_ends.is_none_or(|end| end > cpu::rdtsc()) => {}
            Turn::Yields => self.move_back(index),
            Turn::Spins => self.let_siblings_go_first(index),
            Turn::Ends(end) => self.end(index, end),
        }
    }

    /// Gives the CPU to a vCPU, if it has it not.
    fn switch_to(&mut self, index: usize) {
        let Some(number) = self.tasks.get(index).map(|task| task.number) else {
            return;
        };
        if self.owner == Some(number) {
            return;
        }
        let before = self.owner.replace(number);
        let before = self
            .tasks
            .iter()
            .position(|task| before == Some(task.number));
        if let Some(before) = before.and_then(|before| self.tasks.get_mut(before)) {
            before.registers.save();
        }
        let before = before.and_then(|before| self.tasks.get(before));
        if let Some(task) = self.tasks.get(index) {
            task.vcpu.make_current();
            task.registers.load(before.map(|before| &before.registers));
        }
    }

    /// When the turn of the ready vCPU `index` ends at the latest: when something is due, its
    /// slice is over while an equal is ready, or one that is not below it wakes up.
    fn end_of_turn(&mut self, index: usize, now: u64) -> Option<u64> {
        let mut ends = self.later.iter().map(|(at, _)| *at).min();
        let (before, rest) = self.tasks.split_at_mut(index);
        let (task, behind) = rest.split_first_mut()?;
        let mut equal = false;
        for other in before.iter().chain(behind.iter()) {
            if other.priority < task.priority {
                continue;
            }
            match other.state {
                State::Ready => equal = true,
                State::Waits(Some(until)) => {
                    ends = Some(ends.map_or(until, |ends| ends.min(until)));
                }
                State::Waits(None) => {}
            }
        }
        if !equal {
            task.slice_ends = None;
            return ends;
        }
        let slice_ends = task.slice_ends.unwrap_or(now + task.slice);
        task.slice_ends = Some(slice_ends);
        Some(ends.map_or(slice_ends, |ends| ends.min(slice_ends)))
    }

    /// Behind all others.
    fn move_back(&mut self, index: usize) {
        if let Some(rest) = self.tasks.get_mut(index..) {
            rest.rotate_left(1);
        }
        if let Some(task) = self.tasks.last_mut() {
            task.slice_ends = None;
        }
    }

    /// A vCPU that spins waits for a lock, mostly, which a vCPU of its own guest holds.
    fn let_siblings_go_first(&mut self, index: usize) {
        let Some(living) = self.tasks.get(index).map(|task| Arc::clone(&task.living)) else {
            return;
        };
        self.move_back(index);
        let others = self
            .tasks
            .split_last()
            .map_or(&[][..], |(_, others)| others);
        let sibling = others
            .iter()
            .position(|task| task.is_ready() && Arc::ptr_eq(&task.living, &living));
        if let Some(first) = sibling.and_then(|sibling| self.tasks.get_mut(..=sibling)) {
            first.rotate_right(1);
        }
    }

    fn end(&mut self, index: usize, end: End) {
        let task = *self.tasks.remove(index);
        if self.owner == Some(task.number) {
            self.owner = None;
        }
        guests::vcpu_ended(self, task.vcpu, task.living, end);
    }

    /// Nothing is to be done before the next moment, or an interrupt.
    fn idle(&mut self, now: u64) {
        let waits = self.tasks.iter().filter_map(|task| match task.state {
            State::Waits(until) => until,
            State::Ready => None,
        });
        let due = self.later.iter().map(|(at, _)| *at);
        if let Some(next) = waits.chain(due).min() {
            time::arm(next.saturating_sub(now));
        }
        // Interrupts are off: news that comes from here on ends the halt.
        cpu::wait_for_interrupt();
    }
}
