//! Boot protocols: from an image to the state in which the first vCPU starts.

pub mod bzimage;
mod placement;
pub mod pvh;

use super::memory::{GuestMemory, OutOfSlot};
use super::memory_map::MemoryMap;
use crate::addr::Gpa;
use core::fmt;
use vireo_handoff::image::{Content, ImageError};

/// The CPU mode that a protocol starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 64-bit mode with these page tables.
    Long64 { cr3: Gpa },
    /// 32-bit protected mode without paging.
    Protected32,
}

/// What the first vCPU starts with; segments are flat, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    pub mode: EntryMode,
    pub rip: u64,
    pub rsp: u64,
    pub rsi: u64,
    pub rbx: u64,
    pub gdt_base: Gpa,
    pub gdt_limit: u16,
    pub code_selector: u16,
    pub data_selector: u16,
}

/// Why an image cannot be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootError {
    Image(ImageError),
    OldProtocol {
        version: u16,
    },
    Only32Bit,
    NoPvhEntry,
    /// The PVH entry point is not in what the ELF file loads.
    EntryNotLoaded {
        entry: u64,
    },
    /// A segment belongs below 1 MiB, where the parameters are.
    LoadsTooLow {
        start: u64,
    },
    TooLittleMemory {
        need: u64,
        have: u64,
    },
    InitrdTooLarge {
        size: u64,
        room: u64,
    },
    CommandLineTooLong {
        len: usize,
        limit: usize,
    },
    Memory(OutOfSlot),
}

impl From<OutOfSlot> for BootError {
    fn from(error: OutOfSlot) -> Self {
        Self::Memory(error)
    }
}

impl From<ImageError> for BootError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<object::read::Error> for BootError {
    fn from(error: object::read::Error) -> Self {
        Self::Image(ImageError::DamagedElf(error))
    }
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Image(error) => error.fmt(f),
            Self::OldProtocol { version } => write!(
                f,
                "the kernel speaks boot protocol {}.{:02}, and 2.12 or later is needed",
                version >> 8,
                version & 0xff
            ),
            Self::Only32Bit => f.write_str(
                "the kernel has no 64-bit entry point (xloadflags bit 0); use a 64-bit kernel",
            ),
            Self::NoPvhEntry => f.write_str(
                "the kernel is an ELF file without a 32-bit PVH entry point (note \"Xen\", type 18); use its bzImage, or build it with CONFIG_PVH",
            ),
            Self::EntryNotLoaded { entry } => write!(
                f,
                "the kernel's PVH entry point {entry:#x} is in none of the segments that its file fills; build it again"
            ),
            Self::LoadsTooLow { start } => write!(
                f,
                "the kernel has a segment at {start:#x}, and the first 1 MiB is for its parameters; link it at 0x100000 or higher"
            ),
            Self::TooLittleMemory { need, have } => write!(
                f,
                "the kernel needs memory up to {} MiB, and the guest has {} MiB; raise `memory`",
                need.div_ceil(1 << 20),
                have >> 20
            ),
            Self::InitrdTooLarge { size, room } => write!(
                f,
                "the initrd has {size} bytes, and the guest has room for {room} beside the kernel; raise `memory`"
            ),
            Self::CommandLineTooLong { len, limit } => write!(
                f,
                "the command line has {len} bytes, and the kernel takes {limit}"
            ),
            Self::Memory(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for BootError {}

/// Puts `kernel` and what belongs to it into the guest's memory, by the
/// protocol that the image's content asks for: PVH if it is an ELF file, else
/// Linux's.
///
/// # Errors
/// Why the image cannot be booted in this guest.
pub fn load(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    memory: &GuestMemory,
    map: &MemoryMap,
    rsdp: Gpa,
) -> Result<EntryState, BootError> {
    let load = match Content::of(kernel) {
        Content::BzImage => bzimage::load,
        Content::Elf => pvh::load,
        other => return Err(ImageError::NotAKernel(other).into()),
    };
    load(kernel, initrd, cmdline, memory, map, rsdp)
}
