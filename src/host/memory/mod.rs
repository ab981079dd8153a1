//! Physical frames, virtual mappings, stacks and the heap of the hypervisor.

pub mod frames;
pub mod heap;
pub mod paging;
pub mod stack;

use crate::addr::{Hpa, PAGE_SIZE};
use core::sync::atomic::{AtomicU64, Ordering};
use frames::{FrameAllocator, FrameError, FrameRange};
use spin::Mutex;
use vireo_handoff::{BootInfo, MemoryKind};

static FRAMES: Mutex<FrameAllocator> = Mutex::new(FrameAllocator::new());
/// Bytes that the loader has filled: the kernel's image, its tables, and files. A number for
/// people: relaxed.
static LOADED: AtomicU64 = AtomicU64::new(0);

/// Takes over the machine's free memory and the loader's page tables.
///
/// # Safety
/// Once, at boot; `info` must be what the loader handed over, so that its
/// usable memory is free and the direct map covers it.
pub unsafe fn init(info: &BootInfo) {
    *FRAMES.lock() = FrameAllocator::from_regions(&info.memory);
    let loaded = info
        .memory
        .iter()
        .filter(|region| matches!(region.kind, MemoryKind::Kernel | MemoryKind::File))
        .map(|region| region.len)
        .sum();
    LOADED.store(loaded, Ordering::Relaxed);
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

/// Bytes of the longest free run that is aligned to `align` bytes.
pub fn largest_free(align: u64) -> u64 {
    FRAMES.lock().largest(align)
}

/// Frames in all and frames free.
pub fn counts() -> (u64, u64) {
    let frames = FRAMES.lock();
    (frames.total(), frames.free_count())
}

/// Bytes of memory in use: what the loader has filled and is not free yet, and
/// the frames that are allocated, guests' memory among them.
pub fn usage() -> u64 {
    let (total, free) = counts();
    LOADED.load(Ordering::Relaxed) + (total - free) * PAGE_SIZE
}

/// Makes the memory of the loader's files free.
///
/// # Safety
/// Once, when nothing refers to what [`file`] gave any more.
pub unsafe fn release_files(info: &BootInfo) {
    for region in info.memory.iter().filter(|r| r.kind == MemoryKind::File) {
        let range = FrameRange {
            start: Hpa(region.start),
            count: region.len / PAGE_SIZE,
        };
        if FRAMES.lock().adopt(range).is_ok() {
            LOADED.fetch_sub(region.len, Ordering::Relaxed);
        }
    }
}

/// A file that the loader read; `None` when there is none of that name, or it
/// does not lie in memory that the loader calls a file's.
pub fn file<'a>(info: &'a BootInfo, name: &str) -> Option<&'a [u8]> {
    let file = info.file(name)?;
    let end = file.start.checked_add(file.len)?;
    let loaded = info.memory.iter().any(|region| {
        region.kind == MemoryKind::File
            && region.start <= file.start
            && end <= region.start.saturating_add(region.len)
    });
    // SAFETY: files are in the direct map, are not handed out before
    // `release_files`, whose caller has no use for them, and nobody writes them.
    loaded.then(|| unsafe {
        core::slice::from_raw_parts(
            paging::to_virt(Hpa(file.start)).0 as *const u8,
            file.len as usize,
        )
    })
}
