//! Extended page tables in the host's frames.

use super::ept::TableMemory;
use crate::addr::Hpa;
use crate::host::memory::frames::{ALIGN_4K, FrameRange};
use crate::host::memory::{self, paging};
use core::ptr;

/// The frame allocator and the direct map.
pub struct HostFrames;

impl TableMemory for HostFrames {
    fn allocate(&mut self) -> Option<Hpa> {
        let frame = memory::allocate(1, ALIGN_4K)?.start;
        // SAFETY: just allocated, and in the direct map.
        unsafe { ptr::write_bytes(paging::to_virt(frame).0 as *mut u8, 0, 4096) };
        Some(frame)
    }

    fn free(&mut self, frame: Hpa) {
        let range = FrameRange {
            start: frame,
            count: 1,
        };
        // SAFETY: `Ept` frees only what it allocated here, once it is out of the tables.
        let freed = unsafe { memory::free(range) };
        debug_assert!(freed.is_ok());
    }

    fn read(&self, entry: Hpa) -> u64 {
        // SAFETY: an entry of a table from `allocate`, which is in the direct map.
        unsafe { ptr::read_volatile(paging::to_virt(entry).0 as *const u64) }
    }

    fn write(&mut self, entry: Hpa, value: u64) {
        // SAFETY: as in `read`.
        unsafe { ptr::write_volatile(paging::to_virt(entry).0 as *mut u64, value) };
    }
}
