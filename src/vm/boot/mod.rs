//! Boot protocols: from an image to the state in which the first vCPU starts.

mod bios_data;
pub mod bzimage;
mod elf;
pub mod firmware;
pub mod multiboot;
mod placement;
pub mod pvh;

use super::memory::{GuestMemory, OutOfSlot};
use super::memory_map::MemoryMap;
use crate::addr::Gpa;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::fmt;
use vireo_handoff::config::Protocol;
use vireo_handoff::image::multiboot::HeaderError;
use vireo_handoff::image::{self, ImageError, Kind};

/// The CPU mode that a protocol starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 64-bit mode with these page tables.
    Long64 { cr3: Gpa },
    /// 32-bit protected mode without paging.
    Protected32,
    /// Real mode, with the code segment based here.
    Real { code_base: u32 },
}

/// What a vCPU starts with; segments are flat but in real mode, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    pub mode: EntryMode,
    pub rip: u64,
    pub rsp: u64,
    pub rax: u64,
    pub rsi: u64,
    pub rbx: u64,
    pub segments: Segments,
    /// The rest of the machine is as a BIOS leaves it.
    pub as_by_bios: bool,
}

/// The GDT, and the selectors of the code and the data segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    pub gdt_base: Gpa,
    pub gdt_limit: u16,
    pub code_selector: u16,
    pub data_selector: u16,
}

impl EntryState {
    /// After INIT, at the reset vector 16 bytes below 4 GiB (SDM 3, table 10-1).
    pub const RESET: Self = Self::real(0xf000, 0xffff_0000, 0xfff0);

    /// After a start-up interrupt with this page (SDM 3, 10.4.4): at its first byte.
    pub const fn start_up(page: u8) -> Self {
        Self::real((page as u16) << 8, (page as u32) << 12, 0)
    }

    /// At a waking vector in real mode (ACPI 6.5, 16.3.1).
    pub const fn waking(vector: u32) -> Self {
        let selector = (vector >> 4) as u16;
        Self::real(selector, (selector as u32) << 4, (vector & 0xf) as u64)
    }

    const fn real(code_selector: u16, code_base: u32, rip: u64) -> Self {
        Self {
            mode: EntryMode::Real { code_base },
            rip,
            rsp: 0,
            rax: 0,
            rsi: 0,
            rbx: 0,
            segments: Segments {
                gdt_base: Gpa(0),
                gdt_limit: 0xffff,
                code_selector,
                data_selector: 0,
            },
            as_by_bios: false,
        }
    }
}

/// Why an image cannot be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootError {
    Image(ImageError),
    OldProtocol {
        version: u16,
    },
    NoPvhEntry,
    /// An ELF file of neither protocol.
    NoEntry,
    /// The entry point is not in what the file loads.
    EntryNotLoaded {
        entry: u64,
    },
    /// A segment belongs below 1 MiB, where the parameters are.
    LoadsTooLow {
        start: u64,
    },
    /// Two segments of an ELF file have bytes in common.
    OverlappingSegments {
        first: u64,
        end: u64,
        second: u64,
    },
    /// The address fields of a multiboot header contradict each other or the file.
    MultibootAddresses {
        reason: &'static str,
    },
    /// Linux's protocol has none.
    NoModules,
    TooManyModules {
        count: usize,
        limit: usize,
    },
    ModulesTooLarge {
        size: u64,
        room: u64,
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
                "the kernel speaks boot protocol {}.{:02}, and 2.06 or later is needed",
                version >> 8,
                version & 0xff
            ),
            Self::NoPvhEntry => f.write_str(
                "the kernel is an ELF file without a 32-bit PVH entry point (note \"Xen\", type 18); use its bzImage, or build it with CONFIG_PVH",
            ),
            Self::NoEntry => f.write_str(
                "the kernel is an ELF file without a 32-bit PVH entry point (note \"Xen\", type 18) and without a multiboot header; use its bzImage, or build it with CONFIG_PVH",
            ),
            Self::EntryNotLoaded { entry } => write!(
                f,
                "the kernel's entry point {entry:#x} is in none of the segments that its file fills; build it again"
            ),
            Self::LoadsTooLow { start } => write!(
                f,
                "the kernel has a segment at {start:#x}, where its parameters, firmware or devices are; link it at 0x100000 or higher"
            ),
            Self::OverlappingSegments { first, end, second } => write!(
                f,
                "the kernel has a segment at {first:#x} that ends at {end:#x}, behind the start of another at {second:#x}; link it again"
            ),
            Self::MultibootAddresses { reason } => write!(
                f,
                "the address fields of the kernel's multiboot header are wrong: {reason}; link it again"
            ),
            Self::NoModules => f.write_str(
                "the kernel is a Linux bzImage, whose boot protocol has no modules; use `initrd`",
            ),
            Self::TooManyModules { count, limit } => {
                write!(f, "the guest has {count} modules, and there is room for {limit}")
            }
            Self::ModulesTooLarge { size, room } => write!(
                f,
                "the modules have {size} bytes, and the guest has room for {room} behind the kernel; raise `memory`"
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

/// What is booted, and what belongs to it.
#[derive(Clone, Debug)]
pub struct Images<'a> {
    pub kernel: &'a [u8],
    /// The kernel's name, for protocols that have it before the command line.
    pub name: &'a str,
    pub initrd: Option<&'a [u8]>,
    pub modules: Vec<Module<'a>>,
    pub cmdline: &'a str,
    pub protocol: Protocol,
}

/// A file beside the kernel.
#[derive(Clone, Debug)]
pub struct Module<'a> {
    pub bytes: &'a [u8],
    pub cmdline: Cow<'a, str>,
}

impl<'a> Images<'a> {
    /// A kernel, and nothing that belongs to it.
    pub const fn of(kernel: &'a [u8]) -> Self {
        Self {
            kernel,
            name: "",
            initrd: None,
            modules: Vec::new(),
            cmdline: "",
            protocol: Protocol::Auto,
        }
    }
}

/// Where it is booted.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    pub memory: &'a GuestMemory,
    pub map: &'a MemoryMap,
    /// The ACPI tables' root pointer.
    pub rsdp: Gpa,
}

/// Puts the kernel and what belongs to it into the guest's memory.
///
/// # Errors
/// Why the image cannot be booted in this guest.
pub fn load(images: &Images, machine: &Machine) -> Result<EntryState, BootError> {
    let kind = image::kind(images.kernel, images.protocol)?;
    bios_data::write(machine.memory)?;
    match kind {
        Kind::BzImage => bzimage::load(images, machine),
        Kind::Multiboot(header) => multiboot::load(&header, images, machine),
        Kind::Elf => {
            let kernel = elf::read(images.kernel)?;
            if kernel.pvh_entry.is_some() || images.protocol == Protocol::Pvh {
                return pvh::load(kernel, images, machine);
            }
            match image::multiboot::find(images.kernel) {
                Ok(header) => multiboot::load(&header, images, machine),
                Err(HeaderError::Missing) => Err(BootError::NoEntry),
                Err(error) => Err(ImageError::Multiboot(error).into()),
            }
        }
    }
}
