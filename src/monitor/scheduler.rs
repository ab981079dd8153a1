//! Which vCPU has a CPU, and when: fixed priorities, and turns among equals.
//!
//! Each CPU has a scheduler and vCPUs of its own, which never move; a CPU that one guest has
//! for itself is one with a single vCPU. The vCPU of the highest priority that has something to
//! do has the CPU until it waits, until its slice is over where an equal is ready too, or until
//! one that is not below it has something to do again: by mail
//! ([`crate::vm::mailbox`]), or because a moment has come. A moment ends the turn through
//! the guest's preemption timer, so that nothing else interrupts a guest that has the CPU alone.
//! Short turns with short waits between them count as a slice when they add up to one ([`Share`]).
//!
//! A vCPU that has waited finds its registers where it left them, if no other has had the CPU
//! meanwhile: they are saved when another comes, not when it goes.

use super::guests::{self, Living};
use super::processors::Processor;
use crate::arch::cpu;
use crate::host::time;
use crate::vcpu::{End, Turn, Vcpu};
use crate::vmx::entry::Entry;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;

/// Something that a CPU does between the turns of its vCPUs. It must not wait.
pub type Job = Box<dyn FnOnce(&mut Scheduler) + Send>;

/// What the time-stamp counter does not come to.
const NEVER: u64 = u64::MAX;

/// The scheduler of one CPU, used by that alone.
pub struct Scheduler {
    processor: &'static Processor,
    tasks: Vec<Task>,
    /// Whose VMCS and registers the CPU holds, or [`NOBODY`].
    owner: usize,
    /// The places before all equals and behind them that were given out last.
    front: u64,
    back: u64,
    /// What is to be done when the time-stamp counter has come there.
    later: Vec<(u64, Job)>,
    /// When the first of that is, or earlier.
    due: u64,
}

/// A vCPU on its CPU.
pub struct Task {
    vcpu: Vcpu,
    entry: Entry<Vcpu>,
    living: Arc<Living>,
    rank: Rank,
    /// When it has something to do if it has no mail: [`READY`] at once, or [`NEVER`].
    wakes_at: u64,
    /// When the slice that it has begun is over; [`NEVER`] where it has begun none.
    slice_ends: u64,
    /// Ticks of a turn while equals are ready.
    slice: u64,
    share: Share,
}

const READY: u64 = 0;
/// The number of no task.
const NOBODY: usize = usize::MAX;

/// Who goes first: the greatest of those that are ready. The priority is the highest byte, what is
/// below is a place among equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(u64);

impl Rank {
    /// Below all.
    const NOBODY: Self = Self(0);
    const PLACES: u32 = 56;
    /// Before and behind it is room for the turns of all time.
    const MIDDLE: u64 = 1 << (Self::PLACES - 1);

    const fn new(priority: u8, place: u64) -> Self {
        Self((priority as u64) << Self::PLACES | place)
    }

    const fn priority(self) -> u8 {
        (self.0 >> Self::PLACES) as u8
    }
}

/// What a vCPU takes of its CPU that waits again and again: it goes before its equals when it wakes
/// up only while it waits for longer than it works. Else one that wakes up without end would leave
/// them nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// Ticks that it has worked since it went behind its equals last, less those that it has waited.
    worked: u64,
    /// When it began to wait; 0 where it did not.
    waits_since: u64,
}

impl Share {
    /// It goes on.
    fn begin(&mut self, now: u64) {
        if self.waits_since != 0 {
            let waited = now.saturating_sub(mem::take(&mut self.waits_since));
            self.worked = self.worked.saturating_sub(waited);
        }
    }

    /// It waits from `now` on, and has worked since `began`; whether that is a whole slice by now.
    fn wait(&mut self, began: u64, now: u64, slice: u64) -> bool {
        self.waits_since = now;
        self.worked += now.saturating_sub(began);
        let all = self.worked >= slice;
        if all {
            self.worked = 0;
        }
        all
    }
}

impl Task {
    /// One that is ready.
    pub fn new(vcpu: Vcpu, entry: Entry<Vcpu>, living: Arc<Living>) -> Self {
        let config = living.config();
        let slice = time::tsc_hz() / 1_000_000 * u64::from(config.slice_us);
        Self {
            vcpu,
            entry,
            rank: Rank::new(config.priority, Rank::MIDDLE),
            wakes_at: READY,
            slice_ends: NEVER,
            slice: slice.max(1),
            share: Share::default(),
            living,
        }
    }

    fn is_ready(&self) -> bool {
        self.wakes_at == READY
    }
}

impl Scheduler {
    /// Without any vCPU.
    pub fn new(processor: &'static Processor) -> Self {
        Self {
            processor,
            tasks: Vec::new(),
            owner: NOBODY,
            front: Rank::MIDDLE,
            back: Rank::MIDDLE,
            later: Vec::new(),
            due: NEVER,
        }
    }

    /// The CPU.
    pub fn processor(&self) -> &'static Processor {
        self.processor
    }

    /// Serves the CPU until `done`. Interrupts are off but while it has nothing to do, and between
    /// turns.
    pub fn run(&mut self, done: impl Fn() -> bool) {
        loop {
            // Those that wake up before they have waited neither enter a guest nor leave the CPU idle.
            cpu::interrupt_window();
            if self.processor.place.take_news() {
                while let Some(job) = self.processor.take_job() {
                    job(self);
                }
                if done() {
                    return;
                }
            }
            let now = cpu::rdtsc();
            if now >= self.due {
                self.do_what_is_due(now);
            }
            match self.first(now) {
                Some(index) => self.turn(index, now),
                None => self.idle(now),
            }
        }
    }

    /// Has `job` done when the time-stamp counter has come to `at`.
    pub fn do_later(&mut self, at: u64, job: Job) {
        self.later.push((at, job));
        self.due = self.due.min(at);
    }

    /// Makes the CPU free for another VMCS, which is to be the current one.
    pub fn make_room(&mut self) {
        let owner = mem::replace(&mut self.owner, NOBODY);
        if let Some(task) = self.tasks.get_mut(owner) {
            task.vcpu.leave_cpu();
        }
    }

    /// A vCPU that was made on this CPU after [`Scheduler::make_room`].
    pub fn add(&mut self, task: Task) {
        self.tasks.push(task);
        self.move_back(self.tasks.len() - 1);
    }

    #[cold]
    fn do_what_is_due(&mut self, now: u64) {
        while let Some(index) = self.later.iter().position(|(at, _)| *at <= now) {
            let (_, job) = self.later.swap_remove(index);
            job(self);
        }
        self.due = self.later.iter().map(|(at, _)| *at).min().unwrap_or(NEVER);
    }

    /// The first of the highest priority that is ready. Those that wait and have something to do
    /// become ready: nobody's turn it is meanwhile, as [`crate::vm::mailbox`] demands.
    fn first(&mut self, now: u64) -> Option<usize> {
        let mut first = 0;
        let mut highest = Rank::NOBODY;
        for (index, task) in self.tasks.iter_mut().enumerate() {
            if task.wakes_at > now && !task.vcpu.has_mail() {
                continue;
            }
            task.wakes_at = READY;
            if task.rank > highest {
                highest = task.rank;
                first = index;
            }
        }
        (highest != Rank::NOBODY).then_some(first)
    }

    fn turn(&mut self, index: usize, now: u64) {
        self.switch_to(index);
        let until = self.end_of_turn(index, now);
        let place = &self.processor.place;
        let Some(task) = self.tasks.get_mut(index) else {
            return;
        };
        task.share.begin(now);
        place.set_current(Some(task.vcpu.mailbox()));
        let turn = task.vcpu.turn(&mut task.entry, until, task.slice);
        place.set_current(None);
        match turn {
            Turn::Waits(until) => {
                task.wakes_at = until.unwrap_or(NEVER).max(READY + 1);
                task.slice_ends = NEVER;
                if task.share.wait(now, cpu::rdtsc(), task.slice) {
                    self.move_back(index);
                }
            }
            Turn::Yields if task.slice_ends > cpu::rdtsc() => {}
            Turn::Yields => self.move_back(index),
            Turn::Spins => self.let_siblings_go_first(index),
            Turn::Ends(end) => self.end(index, end),
        }
    }

    /// Gives the CPU to a vCPU, if it has it not.
    fn switch_to(&mut self, index: usize) {
        if self.owner == index {
            return;
        }
        let before = mem::replace(&mut self.owner, index);
        if let Ok([task, before]) = self.tasks.get_disjoint_mut([index, before]) {
            task.vcpu.take_cpu(Some(&mut before.vcpu));
        } else if let Some(task) = self.tasks.get(index) {
            task.vcpu.take_cpu(None);
        }
    }

    /// When the turn of the ready vCPU `index` ends at the latest: when something is due, its
    /// slice is over while an equal is ready, or one that is not below it wakes up.
    fn end_of_turn(&mut self, index: usize, now: u64) -> u64 {
        let Some(priority) = self.tasks.get(index).map(|task| task.rank.priority()) else {
            return NEVER;
        };
        let mut ends = self.due;
        let mut ready = 0;
        for task in &self.tasks {
            if task.rank.priority() < priority {
                continue;
            }
            if task.is_ready() {
                ready += 1;
            } else {
                ends = ends.min(task.wakes_at);
            }
        }
        let Some(task) = self.tasks.get_mut(index) else {
            return NEVER;
        };
        if ready == 1 {
            task.slice_ends = NEVER;
        } else if task.slice_ends == NEVER {
            task.slice_ends = now.saturating_add(task.slice);
        }
        ends.min(task.slice_ends)
    }

    /// Behind all equals.
    fn move_back(&mut self, index: usize) {
        self.back -= 1;
        self.move_to(index, self.back);
    }

    fn move_to(&mut self, index: usize, place: u64) {
        if let Some(task) = self.tasks.get_mut(index) {
            task.rank = Rank::new(task.rank.priority(), place);
            task.slice_ends = NEVER;
        }
    }

    /// A vCPU that spins waits for a lock, mostly, which a vCPU of its own guest holds.
    fn let_siblings_go_first(&mut self, index: usize) {
        self.move_back(index);
        let Some(spins) = self.tasks.get(index) else {
            return;
        };
        let sibling = (self.tasks.iter().enumerate())
            .filter(|(_, task)| task.is_ready() && Arc::ptr_eq(&task.living, &spins.living))
            .max_by_key(|(_, task)| task.rank);
        if let Some((sibling, _)) = sibling
            && sibling != index
        {
            self.front += 1;
            self.move_to(sibling, self.front);
        }
    }

    fn end(&mut self, index: usize, end: End) {
        let task = self.tasks.swap_remove(index);
        // The last has taken its place.
        if self.owner == index {
            self.owner = NOBODY;
        } else if self.owner == self.tasks.len() {
            self.owner = index;
        }
        guests::vcpu_ended(self, task.vcpu, task.living, end);
    }

    /// Nothing is to be done before the next moment, or an interrupt.
    fn idle(&mut self, now: u64) {
        let waits = self.tasks.iter().map(|task| task.wakes_at);
        let next = waits.fold(self.due, u64::min);
        if next != NEVER {
            time::arm(next.saturating_sub(now));
        }
        // Interrupts are off: news that comes from here on ends the halt.
        cpu::wait_for_interrupt();
    }
}

#[cfg(test)]
mod tests {
    use super::Share;

    #[test]
    fn who_works_more_than_it_waits_goes_back_after_a_slice() {
        let mut share = Share::default();
        let mut back = Vec::new();
        // 30 ticks of work, 20 of waiting: ten more each time.
        for round in 1..=20 {
            let now = round * 50;
            share.begin(now);
            if share.wait(now, now + 30, 100) {
                back.push(round);
            }
        }
        assert_eq!(back, [8, 16]);
    }

    #[test]
    fn who_waits_more_than_it_works_never_does() {
        let mut share = Share::default();
        for round in 1..=1000 {
            let now = round * 50;
            share.begin(now);
            assert!(!share.wait(now, now + 20, 100));
        }
    }
}
