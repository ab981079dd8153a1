//! Which vCPU has a CPU, and when: fixed priorities, and turns among equals.
//!
//! Each CPU has a scheduler and vCPUs of its own, which never move; a CPU that one guest has
//! for itself is one with a single vCPU. The vCPU of the highest priority that has something to
//! do has the CPU until it waits, until its slice is over where an equal is ready too, or until
//! one that is not below it has something to do again: by mail
//! ([`crate::vm::mailbox`]), or because a moment has come. A moment ends the turn through
//! the guest's preemption timer, so that nothing else interrupts a guest that has the CPU alone.
//! Its slice is what it works itself, over several turns where it waits in between ([`Share`]).
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
    /// The place behind all equals that was given out last.
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
    /// Ticks that it works while equals are ready, before it goes behind them.
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
    /// Bits of the place: room for the turns of all time.
    const PLACES: u32 = 56;

    const fn new(priority: u8, place: u64) -> Self {
        Self((priority as u64) << Self::PLACES | place)
    }

    const fn priority(self) -> u8 {
        (self.0 >> Self::PLACES) as u8
    }
}

/// How long a vCPU may work until it goes behind its equals. While it waits it wins some of that
/// back, and so goes before them when it wakes up, as long as it works no more than its share
/// beside all on its CPU: else those that work by turns would leave another one nothing.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// Ticks.
    left: u64,
    /// When it last began to wait.
    waits_since: u64,
}

impl Share {
    const fn new(slice: u64) -> Self {
        Self {
            left: slice,
            waits_since: 0,
        }
    }

    /// It has waited until now, as one of so many `others`.
    fn win_back(&mut self, now: u64, slice: u64, others: u64) {
        let waited = now.saturating_sub(self.waits_since);
        let won = waited / others.max(1);
        self.left = self.left.saturating_add(won).min(slice);
    }

    /// It has worked for so long; whether nothing was left then.
    fn work(&mut self, ticks: u64, slice: u64) -> bool {
        self.left = self.left.saturating_sub(ticks);
        let over = self.left == 0;
        if over {
            self.left = slice;
        }
        over
    }
}

impl Task {
    /// One that is ready.
    pub fn new(vcpu: Vcpu, entry: Entry<Vcpu>, living: Arc<Living>) -> Self {
        let config = living.config();
        let slice = (time::tsc_hz() / 1_000_000 * u64::from(config.slice_us)).max(1);
        Self {
            vcpu,
            entry,
            rank: Rank::new(config.priority, 0),
            wakes_at: READY,
            slice,
            share: Share::new(slice),
            living,
        }
    }

    fn is_ready(&self) -> bool {
        self.wakes_at == READY
    }

    /// It has something to do, as one of so many.
    #[cold]
    #[inline(never)]
    fn wake_up(&mut self, now: u64, count: usize) {
        self.wakes_at = READY;
        let others = (count as u64).saturating_sub(1);
        self.share.win_back(now, self.slice, others);
    }
}

impl Scheduler {
    /// Without any vCPU.
    pub fn new(processor: &'static Processor) -> Self {
        Self {
            processor,
            tasks: Vec::new(),
            owner: NOBODY,
            back: 1 << Rank::PLACES,
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
        let count = self.tasks.len();
        for (index, task) in self.tasks.iter_mut().enumerate() {
            if task.wakes_at > now && !task.vcpu.has_mail() {
                continue;
            }
            if !task.is_ready() {
                task.wake_up(now, count);
            }
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
        place.set_current(Some(task.vcpu.mailbox()));
        let turn = task.vcpu.turn(&mut task.entry, until, task.slice);
        place.set_current(None);
        let then = cpu::rdtsc();
        let over = task.share.work(then - now, task.slice);
        match turn {
            Turn::Waits(until) => {
                task.wakes_at = until.unwrap_or(NEVER).max(READY + 1);
                task.share.waits_since = then;
            }
            Turn::Spins if !over => return self.let_siblings_go_first(index),
            Turn::Yields | Turn::Spins => {}
            Turn::Ends(end) => return self.end(index, end),
        }
        if over {
            self.move_back(index);
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
    fn end_of_turn(&self, index: usize, now: u64) -> u64 {
        let Some(task) = self.tasks.get(index) else {
            return NEVER;
        };
        let (priority, left) = (task.rank.priority(), task.share.left);
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
        if ready > 1 {
            ends = ends.min(now + left);
        }
        ends
    }

    /// Behind all equals.
    fn move_back(&mut self, index: usize) {
        self.back -= 1;
        if let Some(task) = self.tasks.get_mut(index) {
            task.rank = Rank::new(task.rank.priority(), self.back);
        }
    }

    /// A vCPU that spins waits for a lock, mostly, which a vCPU of its own guest holds: that has
    /// its place. Neither has more of its slice than before.
    fn let_siblings_go_first(&mut self, index: usize) {
        let Some(spins) = self.tasks.get(index) else {
            return;
        };
        let (rank, living) = (spins.rank, Arc::clone(&spins.living));
        self.move_back(index);
        let siblings = (self.tasks.iter_mut().enumerate())
            .filter(|(other, task)| *other != index && Arc::ptr_eq(&task.living, &living));
        if let Some((_, sibling)) = siblings
            .filter(|(_, task)| task.is_ready())
            .max_by_key(|(_, task)| task.rank)
        {
            sibling.rank = rank;
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

    /// Works and waits in turn; whether nothing is left of a slice of 100 in a thousand rounds, and
    /// after how many.
    fn runs_out(work: u64, wait: u64, others: u64) -> Option<u64> {
        let mut share = Share::new(100);
        (1..=1000).find(|round| {
            let now = (round - 1) * (work + wait);
            share.win_back(now, 100, others);
            share.waits_since = now + work;
            share.work(work, 100)
        })
    }

    #[test]
    fn who_works_more_than_its_share_goes_back_after_a_slice_of_more() {
        // Beside one other: ten more each time.
        assert_eq!(runs_out(30, 20, 1), Some(8));
        // Two that fill the CPU go back, where there is a third.
        assert_eq!(runs_out(40, 40, 2), Some(4));
        assert_eq!(runs_out(100, 1_000_000, 1), Some(1));
    }

    #[test]
    fn who_works_no_more_never_does() {
        for others in 1..10 {
            assert_eq!(runs_out(10, 10 * others, others), None);
        }
        assert_eq!(runs_out(20, 30, 1), None);
    }

    #[test]
    fn a_slice_is_given_anew() {
        let mut share = Share::new(100);
        let over = [60, 60, 60, 40].map(|ticks| share.work(ticks, 100));
        assert_eq!(over, [false, true, false, true]);
    }
}
