//! Instructions that have touched devices before.
//!
//! A guest has few of them, and executes them again and again. To learn what one does, the
//! guest's page tables are walked, its code is read and decoded, which takes longer
//! than all the rest. The result depends on where the guest executes ([`Context`]), on
//! the page-table entries on the way, and on the code. These are kept with it, and
//! compared in place: while they are what they were, so is the result, and nobody has to say
//! that it has become wrong. Only what CR0, CR4 and EFER say is not compared: who changes
//! how a walk goes, or what CS.L means, has all forgotten.

use super::emulate::{Arithmetic, Decoded, Move};
use super::walk::{self, Access, Operation, Paging, PhysicalRead};
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::vm::memory::{GuestMemory, Sighting};
use arrayvec::ArrayVec;
use core::cell::RefCell;

/// Plain moves, arithmetic, and all other instructions that are kept, powers of two.
const MOVES: usize = 64;
const ARITHMETIC: usize = 32;
const OTHERS: usize = 32;
/// Entries that a walk reads at the most.
const ENTRIES: usize = 4;
/// Eight bytes each: the entries, and the code.
const SIGHTINGS: usize = ENTRIES + 2;

/// Where the guest executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Context {
    /// The linear address of the instruction.
    pub address: u64,
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

    /// Which of `PLACES` has what is known in this context: Fibonacci hashing.
    #[inline(always)]
    const fn place<const PLACES: usize>(&self) -> usize {
        const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
        let hash = (self.address ^ self.cr3).wrapping_mul(MULTIPLIER);
        (hash >> (u64::BITS - PLACES.ilog2())) as usize
    }
}

#[derive(Clone, Copy, Debug)]
struct Known<T> {
    context: Context,
    seen: [Sighting; SIGHTINGS],
    what: T,
}

/// What is known, each in the place that its context says.
#[derive(Clone, Debug)]
struct Places<T, const PLACES: usize>([Option<Known<T>>; PLACES]);

impl<T: Copy, const PLACES: usize> Places<T, PLACES> {
    const EMPTY: Self = Self([None; PLACES]);

    #[inline(always)]
    fn find(&self, memory: &GuestMemory, context: Context) -> Option<&T> {
        let known = self.0[context.place::<PLACES>()].as_ref()?;
        if known.context != context {
            return None;
        }
        for seen in &known.seen {
            if !memory.still_has(seen) {
                return None;
            }
        }
        Some(&known.what)
    }

    fn keep(&mut self, context: Context, seen: [Sighting; SIGHTINGS], what: T) {
        self.0[context.place::<PLACES>()] = Some(Known {
            context,
            seen,
            what,
        });
    }
}

/// Instructions that access devices.
#[derive(Clone, Debug)]
pub(super) struct KnownCode {
    moves: Places<Move, MOVES>,
    arithmetic: Places<Arithmetic, ARITHMETIC>,
    others: Places<Decoded, OTHERS>,
}

impl Default for KnownCode {
    fn default() -> Self {
        Self {
            moves: Places::EMPTY,
            arithmetic: Places::EMPTY,
            others: Places::EMPTY,
        }
    }
}

impl KnownCode {
    /// Forgets all: what CS.L means has changed, or how a walk goes.
    pub(super) fn clear(&mut self) {
        self.moves = Places::EMPTY;
        self.arithmetic = Places::EMPTY;
        self.others = Places::EMPTY;
    }

    /// The plain move that the guest executes in `context`, if it is known.
    #[inline(always)]
    pub(super) fn find_move(&self, memory: &GuestMemory, context: Context) -> Option<&Move> {
        self.moves.find(memory, context)
    }

    /// The arithmetic that the guest executes in `context`, if it is known.
    pub(super) fn find_arithmetic(
        &self,
        memory: &GuestMemory,
        context: Context,
    ) -> Option<&Arithmetic> {
        self.arithmetic.find(memory, context)
    }

    /// The instruction that the guest executes in `context`, if it is known and no plain move.
    pub(super) fn find(&self, memory: &GuestMemory, context: Context) -> Option<&Decoded> {
        self.others.find(memory, context)
    }

    /// Keeps what `code` in `context` is, if the walk is one that changes only with
    /// the entries it reads: whatever CR0, CR4 and EFER say, supervisor code is
    /// executed in supervisor pages and user code in user pages, where no entry forbids it.
    pub(super) fn remember(
        &mut self,
        memory: &GuestMemory,
        paging: &Paging,
        context: Context,
        code: &[u8],
        decoded: &Decoded,
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
        let Ok(page) = walk::walk(&walked, paging, Gva(context.address), access) else {
            return;
        };
        let entries = walked.entries.into_inner();
        // Without paging there are no rights.
        let own = entries.is_empty() || page.user == user;
        // The next page is another translation.
        let in_page = page.gpa.offset_in(PAGE_SIZE) <= PAGE_SIZE - 16;
        if !own || !in_page {
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
        let sightings = entries.into_iter().chain([high]);
        for (place, sighting) in seen.iter_mut().skip(1).zip(sightings) {
            *place = sighting;
        }
        match decoded.plain_move() {
            Some(plan) => self.moves.keep(context, seen, plan),
            None => {
                if let Some(plan) = decoded.arithmetic() {
                    self.arithmetic.keep(context, seen, plan);
                }
                self.others.keep(context, seen, *decoded);
            }
        }
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

    /// Sees the entry beside it, too.
    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        let both = self.read_u64(Gpa(gpa.0 & !7))?;
        Some((both >> (8 * (gpa.0 & 4))) as u32)
    }
}

#[cfg(test)]
mod tests;
