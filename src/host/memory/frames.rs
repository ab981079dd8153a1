//! Which physical memory is free.
//!
//! A sorted list of free runs: a hypervisor allocates rarely, in large pieces,
//! and wants contiguous, aligned ones. The smallest run that fits is used, so
//! that large runs stay whole for large pages.

use crate::addr::{Hpa, PAGE_SIZE};
use alloc::vec::Vec;
use vireo_handoff::{MemoryKind, MemoryRegion};

/// Alignment of a 4 KiB page, in bytes.
pub const ALIGN_4K: u64 = 1 << 12;
/// Alignment of a 2 MiB page, in bytes.
pub const ALIGN_2M: u64 = 1 << 21;
/// Alignment of a 1 GiB page, in bytes.
pub const ALIGN_1G: u64 = 1 << 30;

/// Memory below this belongs to firmware data, trampolines and legacy devices.
const LOWEST: u64 = 1 << 20;

/// Contiguous frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRange {
    /// The first byte, 4 KiB aligned.
    pub start: Hpa,
    /// Number of 4 KiB frames.
    pub count: u64,
}

impl FrameRange {
    /// Length in bytes.
    pub const fn len_bytes(self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// The first byte behind.
    pub const fn end(self) -> Hpa {
        Hpa(self.start.0 + self.len_bytes())
    }
}

/// Why frames were not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Some of it is no usable memory, or it is unaligned or empty.
    NotUsable,
    /// Some of it is free already.
    AlreadyFree,
}

/// A run of bytes, whole frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u64,
    end: u64,
}

/// The allocator.
#[derive(Debug, Default)]
pub struct FrameAllocator {
    /// All that was ever ours; sorted, disjoint, no two adjacent.
    usable: Vec<Run>,
    /// What is free of it; sorted, disjoint, no two adjacent.
    free: Vec<Run>,
}

impl FrameAllocator {
    /// An allocator that has nothing.
    pub const fn new() -> Self {
        Self {
            usable: Vec::new(),
            free: Vec::new(),
        }
    }

    /// An allocator of the usable regions, as far as they lie above 1 MiB. What
    /// any other region claims as well is left out.
    pub fn from_regions(regions: &[MemoryRegion]) -> Self {
        let mut usable: Vec<Run> = Vec::new();
        for region in regions
            .iter()
            .filter(|region| region.kind == MemoryKind::Usable)
        {
            if let Some(run) = run_of(
                region.start.max(LOWEST),
                region.start.saturating_add(region.len),
            ) {
                usable.push(run);
            }
        }
        for other in regions
            .iter()
            .filter(|region| region.kind != MemoryKind::Usable)
        {
            let start = other.start & !(PAGE_SIZE - 1);
            let end = other.start.saturating_add(other.len);
            usable = usable
                .iter()
                .flat_map(|run| {
                    [
                        run_of(run.start, run.end.min(start)),
                        run_of(run.start.max(end), run.end),
                    ]
                })
                .flatten()
                .collect();
        }
        usable.sort_unstable_by_key(|run| run.start);
        let mut merged: Vec<Run> = Vec::new();
        for run in usable {
            match merged.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => merged.push(run),
            }
        }
        Self {
            free: merged.clone(),
            usable: merged,
        }
    }

    /// `count` contiguous frames at a multiple of `align` bytes. `None` when
    /// there are none, `count` is 0, or `align` is no power of two.
    pub fn allocate(&mut self, count: u64, align: u64) -> Option<FrameRange> {
        let len = count.checked_mul(PAGE_SIZE).filter(|&len| len > 0)?;
        if !align.is_power_of_two() {
            return None;
        }
        let align = align.max(PAGE_SIZE);
        let fit = |run: &Run| {
            let start = run.start.checked_next_multiple_of(align)?;
            (start.checked_add(len)? <= run.end).then_some(start)
        };
        let (index, start) = self
            .free
            .iter()
            .enumerate()
            .filter_map(|(index, run)| Some((run.end - run.start, index, fit(run)?)))
            .min()
            .map(|(_, index, start)| (index, start))?;
        let run = self.free[index];
        let rest = [run_of(run.start, start), run_of(start + len, run.end)];
        self.free.splice(index..=index, rest.into_iter().flatten());
        Some(FrameRange {
            start: Hpa(start),
            count,
        })
    }

    /// Takes frames back, whole ranges as they were allocated or parts of them.
    ///
    /// # Errors
    /// When part of the range is free or was never usable; then nothing changes.
    pub fn free(&mut self, range: FrameRange) -> Result<(), FrameError> {
        let len = range
            .count
            .checked_mul(PAGE_SIZE)
            .ok_or(FrameError::NotUsable)?;
        let end = range
            .start
            .0
            .checked_add(len)
            .ok_or(FrameError::NotUsable)?;
        let run = run_of(range.start.0, end).ok_or(FrameError::NotUsable)?;
        if run.start != range.start.0
            || !self
                .usable
                .iter()
                .any(|u| u.start <= run.start && run.end <= u.end)
        {
            return Err(FrameError::NotUsable);
        }
        Self::insert(&mut self.free, run)
    }

    /// Takes over memory that was somebody else's until now.
    ///
    /// # Errors
    /// When part of it is this allocator's already; then nothing changes.
    pub fn adopt(&mut self, range: FrameRange) -> Result<(), FrameError> {
        let len = range
            .count
            .checked_mul(PAGE_SIZE)
            .ok_or(FrameError::NotUsable)?;
        let end = range.start.checked_add(len).ok_or(FrameError::NotUsable)?;
        let run = run_of(range.start.0, end.0).ok_or(FrameError::NotUsable)?;
        Self::insert(&mut self.usable, run)?;
        Self::insert(&mut self.free, run)
    }

    /// Adds `run` to a sorted list of disjoint runs, joined with its neighbours.
    fn insert(runs: &mut Vec<Run>, run: Run) -> Result<(), FrameError> {
        let index = runs.partition_point(|other| other.end <= run.start);
        if runs.get(index).is_some_and(|next| next.start < run.end) {
            return Err(FrameError::AlreadyFree);
        }
        let joins_below = index > 0 && runs[index - 1].end == run.start;
        let joins_above = runs.get(index).is_some_and(|next| next.start == run.end);
        match (joins_below, joins_above) {
            (true, true) => {
                runs[index - 1].end = runs[index].end;
                runs.remove(index);
            }
            (true, false) => runs[index - 1].end = run.end,
            (false, true) => runs[index].start = run.start,
            (false, false) => runs.insert(index, run),
        }
        Ok(())
    }

    /// Bytes of the longest free run from a multiple of `align` bytes (a power of two) on.
    pub fn largest(&self, align: u64) -> u64 {
        let room = |run: &Run| {
            let start = run.start.checked_next_multiple_of(align)?;
            run.end.checked_sub(start)
        };
        self.free.iter().filter_map(room).max().unwrap_or(0)
    }

    /// Frames in all.
    pub fn total(&self) -> u64 {
        frames(&self.usable)
    }

    /// Frames that are free.
    pub fn free_count(&self) -> u64 {
        frames(&self.free)
    }
}

fn frames(runs: &[Run]) -> u64 {
    runs.iter()
        .map(|run| (run.end - run.start) / PAGE_SIZE)
        .sum()
}

/// The whole frames within `start..end`, if there are any.
fn run_of(start: u64, end: u64) -> Option<Run> {
    let start = start.checked_next_multiple_of(PAGE_SIZE)?;
    let end = end & !(PAGE_SIZE - 1);
    (start < end).then_some(Run { start, end })
}

#[cfg(test)]
mod tests;
