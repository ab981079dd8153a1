//! Physical frames, virtual mappings, stacks and the heap of the hypervisor.

pub mod frames;
pub mod heap;
pub mod paging;
pub mod stack;

use crate::addr::Hpa;
use frames::{FrameAllocator, FrameError, FrameRange};
use spin::Mutex;
use vireo_handoff::{BootInfo, MemoryKind};

static FRAMES: Mutex<FrameAllocator> = Mutex::new(FrameAllocator::new());

/// Takes over the machine's free memory and the loader's page tables.
///
/// # Safety
/// Once, at boot; `info` must be what the loader handed over, so that its
/// usable memory is free and the direct map covers it.
pub unsafe fn init(info: &BootInfo) {
    *FRAMES.lock() = FrameAllocator::from_regions(&info.memory);
    // SAFETY: the page tables that are live now are the loader's.
    unsafe { paging::init(Hpa(info.kernel_start), info.kernel_len) };
}

/// `count` contiguous frames whose first is aligned to `align` bytes (a power
/// of two of at least 4 KiB). Their contents are whatever was there.
pub fn allocate(count: u64, align: u64) -> Option<FrameRange> {
    FRAMES.lock().allocate(count, align)
}

/// Gives frames back.
///
/// # Errors
/// When they are not allocated, or never were this allocator's.
///
/// # Safety
/// Nothing may refer to them any more: no mapping, no device, no guest.
pub unsafe fn free(range: FrameRange) -> Result<(), FrameError> {
    FRAMES.lock().free(range)
}

/// Frames in all and frames free.
pub fn counts() -> (u64, u64) {
    let frames = FRAMES.lock();
    (frames.total(), frames.free_count())
}

/// A file that the loader read; `None` when there is none of that name, or it
/// does not lie in the loader's memory.
pub fn file<'a>(info: &'a BootInfo, name: &str) -> Option<&'a [u8]> {
    let file = info.file(name)?;
    let end = file.start.checked_add(file.len)?;
    let loaded = info.memory.iter().any(|region| {
        region.kind == MemoryKind::Loader
            && region.start <= file.start
            && end <= region.start.saturating_add(region.len)
    });
    // SAFETY: memory of the loader is in the direct map, is never handed out
    // (`FrameAllocator::from_regions`), and nobody writes it any more.
    loaded.then(|| unsafe {
        core::slice::from_raw_parts(
            paging::to_virt(Hpa(file.start)).0 as *const u8,
            file.len as usize,
        )
    })
}
