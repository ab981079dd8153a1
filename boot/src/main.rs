//! The UEFI loader: reads the configuration and the files that it names,
//! describes the machine, maps the kernel, leaves the firmware and jumps.
//!
//! Everything that can go wrong with what a user provides is reported before
//! boot services end, as one line that begins with `vireo: error:`.
#![no_std]
#![no_main]

extern crate alloc;

mod console;
mod files;
mod kernel;
mod machine;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::panic::PanicInfo;
use files::Volume;
use kernel::{Kernel, PAGE, pages};
use uefi::boot;
use uefi::mem::memory_map::MemoryMap;
use uefi::prelude::*;
use vireo_boot::regions::{self, Regions};
use vireo_freestanding as _;
use vireo_handoff::{BootInfo, Config, File, Handoff, MAGIC, MemoryKind, MemoryRegion, layout};

/// Room for memory regions: they are collected when nothing can be allocated any more.
const REGIONS: usize = 512;
/// The most that a serialized region needs: two numbers of ten bytes and a kind.
const REGION_BYTES: usize = 21;
/// Alignment of a guest's memory, in bytes.
const GUEST_ALIGN: u64 = 2 << 20;

#[entry]
fn main() -> Status {
    if uefi::helpers::init().is_err() {
        return Status::LOAD_ERROR;
    }
    // No reset while large files are read; a watchdog that cannot be stopped is left alone.
    let _ = boot::set_watchdog_timer(0, 0x1_0000, None);
    let Err(reason) = load();
    console::fail(format_args!("{reason}"))
}

fn load() -> Result<core::convert::Infallible, String> {
    let mut volume = Volume::open()?;
    let config = volume.config()?;
    let files = volume.files(&config)?;
    let kernel = Kernel::place()?;
    let memory = machine::memory().ok_or("the firmware gives no memory map")?;
    let space = kernel.map(&regions::ram(&memory))?;

    let mut kept: Vec<MemoryRegion> = files.iter().map(file_region).collect();
    for range in space.tables.iter().chain([&kernel.range]) {
        kept.push(MemoryRegion {
            start: range.start,
            len: range.end - range.start,
            kind: MemoryKind::Kernel,
        });
    }
    check_room(&config, &kept, &memory)?;
    let runtime = machine::runtime_memory();
    // Without knowing code from data they could be called only in pages that allow everything.
    let efi_reset_system = machine::reset_system().filter(|_| !runtime.is_empty());
    kept.extend(runtime);
    let mut regions = Regions::new(kept, REGIONS);
    let mut info = BootInfo {
        memory: Vec::new(),
        cpus: machine::cpus(),
        rsdp: machine::rsdp(),
        efi_reset_system,
        framebuffer: machine::framebuffer(),
        kernel_start: kernel.range.start,
        kernel_len: kernel.range.end - kernel.range.start,
        config,
        files,
    };
    let small = info.to_bytes().map_err(|error| error.to_string())?.len();
    let room = small + 10 + regions.capacity() * REGION_BYTES;
    let handoff_at =
        pages(room.div_ceil(PAGE as usize) + 1).ok_or("no memory is left for the handoff")?;
    let info_at = handoff_at + PAGE;
    console::say(format_args!("loader: starting the hypervisor"));

    // SAFETY: nothing of boot services is used from here on: no console, no allocation.
    let map = unsafe { boot::exit_boot_services(None) };
    for descriptor in map.entries() {
        regions.add(machine::region(descriptor));
    }
    info.memory = regions.finish();
    // SAFETY: allocated above, and nothing else refers to it.
    let room = unsafe { core::slice::from_raw_parts_mut(info_at as *mut u8, room) };
    let info_len = info.to_slice(room).map_or(0, |used| used.len() as u64);
    // SAFETY: as above; the kernel has what it needs.
    unsafe {
        (handoff_at as *mut Handoff).write(Handoff {
            magic: MAGIC,
            info: layout::DIRECT_MAP + info_at,
            info_len,
        });
        space.enter(handoff_at)
    }
}

fn file_region(file: &File) -> MemoryRegion {
    MemoryRegion {
        start: file.start,
        len: file.len.next_multiple_of(PAGE).max(PAGE),
        kind: MemoryKind::File,
    }
}

/// Whether the guests' memory will be there, which the hypervisor takes in
/// the order of the configuration.
fn check_room(
    config: &Config,
    kept: &[MemoryRegion],
    memory: &[MemoryRegion],
) -> Result<(), String> {
    let mut regions = Regions::new(kept.to_vec(), memory.len() + kept.len());
    memory.iter().for_each(|region| regions.add(*region));
    let sizes: Vec<u64> = config.vm.iter().map(|vm| vm.memory).collect();
    regions::fit(&regions.finish(), &sizes, GUEST_ALIGN).map_err(|(index, largest)| {
        let vm = &config.vm[index];
        format!(
            "vireo.toml: the vm {} needs {} MiB of contiguous memory, and this machine has {} MiB left for it; lower `memory` or add memory to the machine",
            vm.name,
            vm.memory >> 20,
            largest >> 20
        )
    })
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::fail(format_args!("the loader panicked: {info}"))
}

/// Named by the unwind tables of the prebuilt `core`; nothing unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
extern "C" fn _Unwind_Resume() -> ! {
    panic!("unwinding")
}
