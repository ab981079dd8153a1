//! The heap behind `alloc`: a fixed block of `.bss`, so that it exists before
//! anything about the machine's memory is known.
//!
//! Guests' memory never comes from here; what does is configuration, tables
//! and the state of virtual devices, whose size is known at start.

use crate::arch::cpu::without_interrupts;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};
use linked_list_allocator::Heap;
use spin::Mutex;

/// Bytes of the heap.
pub const SIZE: usize = 4 << 20;

#[repr(C, align(4096))]
struct Space(UnsafeCell<[u8; SIZE]>);

// SAFETY: only the allocator, behind its lock, touches the space.
unsafe impl Sync for Space {}

static SPACE: Space = Space(UnsafeCell::new([0; SIZE]));

/// The global allocator.
pub struct Allocator(Mutex<Heap>);

#[cfg_attr(feature = "bare", global_allocator)]
static ALLOCATOR: Allocator = Allocator(Mutex::new(Heap::empty()));

impl Allocator {
    fn with<R>(&self, f: impl FnOnce(&mut Heap) -> R) -> R {
        // An interrupt handler that allocates must not meet its own CPU's lock.
        without_interrupts(|| f(&mut self.0.lock()))
    }
}

// SAFETY: `Heap` hands out disjoint blocks of `SPACE` that fit the layout, and
// every access to it holds the lock.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.with(|heap| heap.allocate_first_fit(layout))
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller got the block from `alloc` with this layout.
            self.with(|heap| unsafe { heap.deallocate(block, layout) });
        }
    }
}

/// Makes `alloc` usable.
///
/// # Safety
/// Once, before the first allocation.
pub unsafe fn init() {
    // SAFETY: the space is static, nobody else uses it, and this happens once.
    ALLOCATOR.with(|heap| unsafe { heap.init(SPACE.0.get().cast(), SIZE) });
}

/// Bytes in use and bytes free.
pub fn usage() -> (usize, usize) {
    ALLOCATOR.with(|heap| (heap.used(), heap.free()))
}
