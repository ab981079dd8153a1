//! Moves between devices and registers that were done before.
//!
//! A guest has few instructions that touch devices, and executes them again and
//! again. To learn what one does, the guest's page tables are walked, its code is
//! read and decoded, which takes longer than all the rest. The result depends on where the
//! guest executes ([`Context`]), on the page-table entries on the way, and on
//! the code. These are kept with it, and compared in place: while they are what
//! they were, so is the result, and nobody has to say that it has become wrong.

use super::emulate::Move;
use super::walk::{self, Access, Operation, Paging, PhysicalRead};
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::vm::memory::{GuestMemory, Sighting};
use arrayvec::ArrayVec;
use core::cell::RefCell;

/// Moves that are kept, a power of two.
const MOVES: usize = 64;
/// Entries that a walk reads at the most.
const ENTRIES: usize = 4;
/// Eight bytes each: the entries, and the code.
const SIGHTINGS: usize = ENTRIES + 2;

/// Where the guest executes 64-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub rip: u64,
    pub cr3: u64,
    /// The access rights of CS.
    pub rights: u32,
}

impl Context {
    /// Whether the code is executed at privilege level 3; `None` in a conforming
    /// segment, which does not say.
    fn is_user(&self) -> Option<bool> {
        const CONFORMING: u32 = 1 << 2;
        const PRIVILEGE: u32 = 3 << 5;
        (self.rights & CONFORMING == 0).then_some(self.rights & PRIVILEGE == PRIVILEGE)
    }

    /// Where a move in this context is kept: Fibonacci hashing.
    #[inline(always)]
    const fn place(&self) -> usize {
        const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
        let hash = (self.rip ^ self.cr3).wrapping_mul(MULTIPLIER);
        (hash >> (u64::BITS - MOVES.ilog2())) as usize
    }
}

#[derive(Clone, Copy, Debug)]
struct Known {
    context: Context,
    seen: [Sighting; SIGHTINGS],
    plan: Move,
}

/// Moves in 64-bit code, each in the place that its context says.
#[derive(Clone, Debug)]
pub(super) struct KnownMoves {
    moves: [Option<Known>; MOVES],
}

impl Default for KnownMoves {
    fn default() -> Self {
        Self {
            moves: [None; MOVES],
        }
    }
}

impl KnownMoves {
    /// Forgets all: what CS.L means has changed, or how many levels a walk has.
    pub(super) fn clear(&mut self) {
        self.moves.fill(None);
    }

    /// The move that the guest executes in `context`, if it is known.
    #[inline(always)]
    pub(super) fn find(&self, memory: &GuestMemory, context: Context) -> Option<Move> {
        let known = self.moves[context.place()].as_ref()?;
        let same = known.context == context && known.seen.iter().all(|seen| memory.still_has(seen));
        same.then_some(known.plan)
    }

    /// Keeps `plan`, which `code` in `context` is, if the walk is one that changes only with
    /// the entries it reads: whatever CR0, CR4 and EFER say, supervisor code is
    /// executed in supervisor pages and user code in user pages, where no entry forbids it.
    pub(super) fn remember(
        &mut self,
        memory: &GuestMemory,
        paging: &Paging,
        context: Context,
        code: &[u8],
        plan: Move,
    ) {
        let Some(user) = context.is_user() else {
            return;
        };
        let walked = Walked {
            memory,
            entries: RefCell::default(),
        };
        let operation = Operation::Execute;
        let access = Access { operation, user };
        let Ok(page) = walk::walk(&walked, paging, Gva(context.rip), access) else {
            return;
        };
        // The next page is another translation.
        let in_page = page.gpa.offset_in(PAGE_SIZE) <= PAGE_SIZE - 16;
        if page.user != user || !in_page {
            return;
        }
        let sighted = (
            memory.sight(page.gpa),
            memory.sight(page.gpa.wrapping_add(8)),
        );
        let (Some(low), Some(high)) = sighted else {
            return;
        };
        // Another CPU may have written it meanwhile.
        let words = [low.value(), high.value()].map(u64::to_le_bytes);
        if !words.as_flattened().starts_with(code) {
            return;
        }
        let mut seen = [low; SIGHTINGS];
        let sightings = walked.entries.into_inner().into_iter().chain([high]);
        for (place, sighting) in seen.iter_mut().skip(1).zip(sightings) {
            *place = sighting;
        }
        self.moves[context.place()] = Some(Known {
            context,
            seen,
            plan,
        });
    }
}

/// Guest memory, and what was read there.
struct Walked<'a> {
    memory: &'a GuestMemory,
    entries: RefCell<ArrayVec<Sighting, ENTRIES>>,
}

impl PhysicalRead for Walked<'_> {
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        let sighting = self.memory.sight(gpa)?;
        self.entries.borrow_mut().try_push(sighting).ok()?;
        Some(sighting.value())
    }

    /// Not in 64-bit code.
    fn read_u32(&self, _: Gpa) -> Option<u32> {
        None
    }
}

#[cfg(test)]
mod tests;
