//! What the UEFI loader hands to the hypervisor, and how.
//!
//! The loader enters the kernel with the [`Handoff`] in `RDI`: the location of a
//! [`BootInfo`], serialized by `postcard`, in the direct map. Both sides are
//! built from one tree, so the encoding needs no compatibility, only the
//! [`MAGIC`] that tells a kernel that was not started by its loader.
//!
//! The address space at entry, which the loader builds and [`layout`] names:
//! the kernel's segments at their link addresses with their own permissions,
//! all RAM at [`layout::DIRECT_MAP`] (writable, never executable, without the
//! kernel's own pages and without anything that is no RAM), and the loader's
//! trampoline page at its physical address. No page is writable and executable.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod config;
pub mod image;

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

pub use config::Config;

/// First word of a valid [`Handoff`]: "VIREO" and the version of this interface.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VIREO\0\0\x01");

/// The virtual address space at entry.
pub mod layout {
    /// All RAM of the memory map, at this offset, read-write, not executable.
    pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
    /// Where the hypervisor maps what is not RAM (devices, stacks with guard pages).
    pub const DYNAMIC: u64 = 0xffff_c000_0000_0000;
    /// Where `linker.ld` puts the kernel.
    pub const KERNEL: u64 = 0xffff_ffff_8000_0000;
}

/// What `RDI` points at when the kernel is entered (System V calling
/// convention, interrupts off, on the kernel's own boot stack).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Handoff {
    /// [`MAGIC`].
    pub magic: u64,
    /// Virtual address (in the direct map) of the serialized [`BootInfo`].
    pub info: u64,
    /// Its length in bytes.
    pub info_len: u64,
}

/// Everything that only the firmware knew.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BootInfo {
    /// Physical memory, sorted by start, disjoint, in whole 4 KiB pages.
    pub memory: Vec<MemoryRegion>,
    /// The machine's CPUs, the bootstrap processor first.
    pub cpus: Vec<Cpu>,
    /// Physical address of the ACPI root pointer, where the firmware has one.
    pub rsdp: Option<u64>,
    /// Physical address of the EFI runtime service ResetSystem, where the regions
    /// of kind RuntimeCode and RuntimeData are all that it executes and writes.
    pub efi_reset_system: Option<u64>,
    /// The linear framebuffer, where there is one.
    pub framebuffer: Option<Framebuffer>,
    /// Physical address of the kernel's first page; the kernel is contiguous
    /// and starts at [`layout::KERNEL`] virtually.
    pub kernel_start: u64,
    /// Length of the loaded kernel in bytes, `.bss` included, whole pages.
    pub kernel_len: u64,
    /// The parsed and checked `\vireo\vireo.toml`.
    pub config: Config,
    /// The files that the configuration names, once each.
    pub files: Vec<File>,
}

/// A run of physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// First byte, 4 KiB aligned.
    pub start: u64,
    /// Length in bytes, a multiple of 4 KiB.
    pub len: u64,
    pub kind: MemoryKind,
}

/// What a run of memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryKind {
    /// Free RAM, the memory of boot services, of the loader and of the
    /// handoff itself included: it is to be copied before anything is allocated.
    Usable,
    /// The kernel's image and its first page tables.
    Kernel,
    /// One of [`BootInfo::files`].
    File,
    /// Tables that the firmware keeps: ACPI reclaimable.
    AcpiReclaim,
    /// ACPI non-volatile storage.
    AcpiNvs,
    /// Code of the EFI runtime services.
    RuntimeCode,
    /// Data of the EFI runtime services.
    RuntimeData,
    /// Device memory that the firmware uses.
    Mmio,
    /// Anything else that is not ours to use.
    Reserved,
}

/// One CPU, from the MP services protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Local APIC identifier (x2APIC width).
    pub apic_id: u32,
    /// The firmware calls it enabled and healthy.
    pub usable: bool,
}

/// A linear framebuffer, 32 bits a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Framebuffer {
    /// Physical address of the first pixel.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Pixels from one row to the next.
    pub stride: u32,
    /// Blue in the lowest byte (else red).
    pub bgr: bool,
}

/// A file that was read from the boot volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// The name as the configuration writes it.
    pub name: String,
    /// Physical address, 4 KiB aligned, contiguous.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl BootInfo {
    /// The file that the configuration calls `name`.
    pub fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|file| file.name == name)
    }

    /// Serialized, as [`Handoff::info`] points at it.
    ///
    /// # Errors
    /// Only when memory runs out.
    pub fn to_bytes(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_allocvec(self)
    }

    /// [`BootInfo::to_bytes`] without an allocation; the part of `room` that is used.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn to_slice<'a>(&self, room: &'a mut [u8]) -> Result<&'a mut [u8], postcard::Error> {
        postcard::to_slice(self, room)
    }

    /// The inverse of [`BootInfo::to_bytes`].
    ///
    /// # Errors
    /// When the bytes are not a boot information of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }
}
