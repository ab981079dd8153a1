//! Stacks that fault instead of running into something else.
//!
//! A stack that is given up stays mapped, for the next one of its size: an address of the
//! dynamic area is never used for something else ([`paging`]), so that page tables for
//! ever new ones would be lost bit by bit.

use super::frames::ALIGN_4K;
use super::paging::{self, MapError};
use crate::addr::{Hva, PAGE_SIZE};
use crate::arch::cpu::without_interrupts;
use alloc::vec::Vec;
use core::mem;
use spin::Mutex;

/// Those that nobody uses. With interrupts off, as the last owner may be in an interrupt.
static SPARE: Mutex<Vec<Mapping>> = Mutex::new(Vec::new());

/// Mapped memory with an unmapped page on each side.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    bottom: Hva,
    bytes: u64,
}

/// A mapped stack with an unmapped page below. Given up when dropped.
#[derive(Debug)]
pub struct Stack(Mapping);

impl Stack {
    /// A stack of `pages` 4 KiB pages, zeroed.
    ///
    /// # Errors
    /// When memory or address space runs out.
    pub fn new(pages: u64) -> Result<Self, MapError> {
        let mapping = match spare(pages) {
            Some(mapping) => mapping,
            None => map(pages)?,
        };
        // SAFETY: mapped writable, and nobody else knows of it.
        unsafe { core::ptr::write_bytes(mapping.bottom.0 as *mut u8, 0, mapping.bytes as usize) };
        Ok(Self(mapping))
    }

    /// The first byte above the stack, 4 KiB aligned: the initial stack pointer.
    pub fn top(&self) -> Hva {
        Hva(self.0.bottom.0 + self.0.bytes)
    }

    /// The lowest byte; the page below is the guard.
    pub fn bottom(&self) -> Hva {
        self.0.bottom
    }

    /// Makes the stack permanent; its top.
    pub fn leak(self) -> Hva {
        let top = self.top();
        mem::forget(self);
        top
    }
}

/// One of those that nobody uses.
fn spare(pages: u64) -> Option<Mapping> {
    without_interrupts(|| {
        let mut spare = SPARE.lock();
        let fits = |mapping: &Mapping| mapping.bytes == pages * PAGE_SIZE;
        let index = spare.iter().position(fits)?;
        Some(spare.swap_remove(index))
    })
}

fn map(pages: u64) -> Result<Mapping, MapError> {
    let frames = super::allocate(pages, ALIGN_4K).ok_or(MapError::OutOfMemory)?;
    match paging::map_memory(frames) {
        Ok(bottom) => Ok(Mapping {
            bottom,
            bytes: frames.len_bytes(),
        }),
        Err(error) => {
            // SAFETY: allocated above and not in use; `free` refuses only what was not allocated.
            let _ = unsafe { super::free(frames) };
            Err(error)
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        without_interrupts(|| SPARE.lock().push(self.0));
    }
}
