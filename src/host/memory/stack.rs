//! Stacks that fault instead of running into something else.

use super::frames::{ALIGN_4K, FrameRange};
use super::paging::{self, MapError};
use crate::addr::{Hva, PAGE_SIZE};
use core::mem;

/// A mapped stack with an unmapped page below. Unmapped when dropped.
#[derive(Debug)]
pub struct Stack {
    bottom: Hva,
    frames: FrameRange,
}

impl Stack {
    /// A stack of `pages` 4 KiB pages, zeroed.
    ///
    /// # Errors
    /// When memory or address space runs out.
    pub fn new(pages: u64) -> Result<Self, MapError> {
        let frames = super::allocate(pages, ALIGN_4K).ok_or(MapError::OutOfMemory)?;
        match paging::map_memory(frames) {
            Ok(bottom) => {
                // SAFETY: just mapped writable, and nobody else knows of it.
                unsafe {
                    core::ptr::write_bytes(bottom.0 as *mut u8, 0, frames.len_bytes() as usize)
                };
                Ok(Self { bottom, frames })
            }
            Err(error) => {
                // SAFETY: allocated above and not in use; `free` refuses only what was not allocated.
                let _ = unsafe { super::free(frames) };
                Err(error)
            }
        }
    }

    /// The first byte above the stack, 4 KiB aligned: the initial stack pointer.
    pub fn top(&self) -> Hva {
        Hva(self.bottom.0 + self.frames.len_bytes())
    }

    /// The lowest byte; the page below is the guard.
    pub fn bottom(&self) -> Hva {
        self.bottom
    }

    /// Makes the stack permanent; its top.
    pub fn leak(self) -> Hva {
        let top = self.top();
        mem::forget(self);
        top
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let mapped = (0..self.frames.count).all(|page| {
            // SAFETY: the owner gives the stack up, so no CPU runs on it.
            unsafe { paging::unmap(Hva(self.bottom.0 + page * PAGE_SIZE)) }.is_some()
        });
        if mapped {
            // SAFETY: no longer mapped here; the direct map's user was only us.
            let _ = unsafe { super::free(self.frames) };
        }
    }
}
