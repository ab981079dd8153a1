//! The UEFI loader: reads the configuration and the files that it names,
//! describes the machine, maps the kernel, leaves the firmware and jumps.
//!
//! Everything that can go wrong with what a user provides is reported before
//! boot services end, as one line that begins with `vireo: error:`.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::arch::naked_asm;
use core::panic::PanicInfo;
use core::time::Duration;
use elf::ElfBytes;
use elf::abi::{PF_W, PF_X, PT_LOAD};
use elf::endian::LittleEndian;
use uefi::boot::{self, AllocateType};
use uefi::fs::{FileSystem, PathBuf};
use uefi::mem::memory_map::MemoryMap;
use uefi::prelude::*;
use uefi::proto::pi::mp::MpServices;
use uefi::runtime::{self, ResetType};
use uefi::table::cfg::ConfigTableEntry;
use uefi::{CString16, println};
use vireo_boot::paging::{Access, PageTables, TableMemory};
use vireo_freestanding as _;
use vireo_handoff::{
    BootInfo, Config, Cpu, File, Handoff, MAGIC, MemoryKind, MemoryRegion, layout,
};

/// The kernel, embedded: one file is flashed.
static KERNEL: &[u8] = include_bytes!(env!("VIREO_KERNEL"));

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
/// Room for the serialized boot information.
const INFO_PAGES: usize = 16;
/// Room for memory regions: they are collected when nothing can be allocated any more.
const REGIONS: usize = 512;

#[entry]
fn main() -> Status {
    if uefi::helpers::init().is_err() {
        return Status::LOAD_ERROR;
    }
    if let Err(reason) = load() {
        println!("vireo: error: {reason}");
        // Time to read it, and for a serial line to drain.
        boot::stall(Duration::from_secs(1));
        runtime::reset(ResetType::SHUTDOWN, Status::SUCCESS, None);
    }
    Status::LOAD_ERROR
}

fn load() -> Result<(), String> {
    let mut volume = boot::get_image_file_system(boot::image_handle())
        .map(FileSystem::new)
        .map_err(|error| format!("the boot volume cannot be read: {error}"))?;
    let text = read(&mut volume, "vireo.toml")?;
    let text = core::str::from_utf8(&text)
        .map_err(|_| "vireo.toml: is not text; expected TOML in UTF-8".to_string())?;
    let config = Config::parse("vireo.toml", text).map_err(|error| error.to_string())?;

    let mut files = Vec::new();
    for name in config.files() {
        let data = read(&mut volume, name)?;
        println!("vireo: loader: {name}, {} KiB", data.len().div_ceil(1024));
        let start = pages(data.len().div_ceil(PAGE as usize).max(1))
            .ok_or_else(|| format!("{name}: {} bytes do not fit into memory", data.len()))?;
        // SAFETY: the pages were just allocated, and are as long as the file.
        unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), start as *mut u8, data.len()) };
        files.push(File {
            name: name.to_string(),
            start,
            len: data.len() as u64,
        });
    }

    let (kernel_start, kernel_len, entry, segments) = place_kernel()?;
    let no_memory = |_| "no memory is left for page tables".to_string();
    let mut tables = PageTables::new(Frames).map_err(no_memory)?;
    for (virt, phys, len, access) in segments {
        tables.map(virt, phys, len, access).map_err(no_memory)?;
    }
    let hole = kernel_start..kernel_start + kernel_len;
    tables
        .map_direct(layout::DIRECT_MAP, memory_end(), hole)
        .map_err(no_memory)?;
    let gate = pages(1).ok_or("no memory is left for the way into the kernel")?;
    // SAFETY: the page is new, and the code is shorter than a page and independent of its place.
    unsafe { core::ptr::copy_nonoverlapping(trampoline as *const u8, gate as *mut u8, 64) };
    tables
        .map(gate, gate, PAGE, Access::ReadExecute)
        .map_err(no_memory)?;

    let info_at = pages(INFO_PAGES).ok_or("no memory is left for the boot information")?;
    let handoff_at = pages(1).ok_or("no memory is left for the handoff")?;
    let mut info = BootInfo {
        memory: Vec::with_capacity(REGIONS),
        cpus: cpus(),
        rsdp: rsdp(),
        efi_system_table: uefi::table::system_table_raw().map_or(0, |table| table.as_ptr() as u64),
        framebuffer: None,
        kernel_start,
        kernel_len,
        config,
        files,
    };
    println!("vireo: loader: starting the hypervisor");

    // SAFETY: nothing of boot services is used from here on: no console, no allocation.
    let map = unsafe { boot::exit_boot_services(None) };
    for descriptor in map.entries() {
        let region = MemoryRegion {
            start: descriptor.phys_start,
            len: descriptor.page_count * PAGE,
            kind: kind(descriptor.ty),
        };
        let room = info.memory.len() < REGIONS;
        match info.memory.last_mut() {
            Some(last) if last.kind == region.kind && last.start + last.len == region.start => {
                last.len += region.len;
            }
            _ if room => info.memory.push(region),
            // A map this fragmented loses its tail, which stays unused.
            _ => {}
        }
    }
    info.memory.sort_unstable_by_key(|region| region.start);
    // SAFETY: allocated above, and nothing else refers to it.
    let room =
        unsafe { core::slice::from_raw_parts_mut(info_at as *mut u8, INFO_PAGES * PAGE as usize) };
    let info_len = postcard::to_slice(&info, room).map_or(0, |used| used.len() as u64);
    // SAFETY: as above.
    unsafe {
        (handoff_at as *mut Handoff).write(Handoff {
            magic: MAGIC,
            info: layout::DIRECT_MAP + info_at,
            info_len,
        });
    }
    // SAFETY: the tables map the gate where it is, the kernel where it was linked, and the
    // handoff in the direct map; NXE comes before tables that use NX. Nothing is dropped: the
    // call does not return.
    unsafe {
        enable_protections();
        let gate: extern "sysv64" fn(u64, u64, u64) -> ! = core::mem::transmute(gate);
        gate(layout::DIRECT_MAP + handoff_at, tables.root(), entry)
    }
}

fn read(volume: &mut FileSystem, name: &str) -> Result<Vec<u8>, String> {
    let path = format!("\\vireo\\{}", name.replace('/', "\\"));
    let path = CString16::try_from(path.as_str())
        .map_err(|_| format!("{name}: is no name for a file on the boot volume"))?;
    volume.read(PathBuf::from(path)).map_err(|_| {
        format!("{name}: cannot be read from \\vireo on the boot volume; put the file there")
    })
}

/// Whole pages of the loader's own; their physical address.
fn pages(count: usize) -> Option<u64> {
    boot::allocate_pages(AllocateType::AnyPages, boot::MemoryType::LOADER_CODE, count)
        .ok()
        .map(|start| start.as_ptr() as u64)
}

type Segment = (u64, u64, u64, Access);

/// Loads the kernel's segments into contiguous memory: its start, length and
/// entry, and what is to be mapped.
fn place_kernel() -> Result<(u64, u64, u64, Vec<Segment>), String> {
    let broken = |_| "the embedded kernel is no ELF file".to_string();
    let elf = ElfBytes::<LittleEndian>::minimal_parse(KERNEL).map_err(broken)?;
    let loads: Vec<_> = elf
        .segments()
        .into_iter()
        .flatten()
        .filter(|segment| segment.p_type == PT_LOAD && segment.p_memsz > 0)
        .collect();
    let end = loads
        .iter()
        .map(|segment| segment.p_vaddr + segment.p_memsz)
        .max()
        .ok_or("the embedded kernel is empty")?;
    let len = (end - layout::KERNEL).next_multiple_of(PAGE);
    let block = pages(((len + LARGE_PAGE) / PAGE) as usize)
        .ok_or("no memory is left for the hypervisor")?
        .next_multiple_of(LARGE_PAGE);
    // SAFETY: the block is inside the pages just allocated.
    unsafe { core::ptr::write_bytes(block as *mut u8, 0, len as usize) };
    let mut segments = Vec::new();
    for segment in loads {
        let data = elf.segment_data(&segment).map_err(broken)?;
        let phys = block + (segment.p_vaddr - layout::KERNEL);
        // SAFETY: the segment lies inside the block, whose length was taken from the last one.
        unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), phys as *mut u8, data.len()) };
        let access = match (segment.p_flags & PF_W != 0, segment.p_flags & PF_X != 0) {
            (true, true) => return Err("the kernel has a writable and executable segment".into()),
            (true, false) => Access::ReadWrite,
            (false, true) => Access::ReadExecute,
            (false, false) => Access::Read,
        };
        segments.push((
            segment.p_vaddr,
            phys,
            segment.p_memsz.next_multiple_of(PAGE),
            access,
        ));
    }
    Ok((block, len, elf.ehdr.e_entry, segments))
}

/// One past the highest byte of RAM.
fn memory_end() -> u64 {
    boot::memory_map(boot::MemoryType::LOADER_DATA)
        .map(|map| {
            map.entries()
                .filter(|entry| !matches!(kind(entry.ty), MemoryKind::Mmio | MemoryKind::Reserved))
                .map(|entry| entry.phys_start + entry.page_count * PAGE)
                .max()
                .unwrap_or(0)
        })
        .unwrap_or(0)
        .next_multiple_of(LARGE_PAGE)
}

fn kind(ty: boot::MemoryType) -> MemoryKind {
    use boot::MemoryType as Efi;
    match ty {
        Efi::CONVENTIONAL | Efi::BOOT_SERVICES_CODE | Efi::BOOT_SERVICES_DATA => MemoryKind::Usable,
        Efi::LOADER_CODE | Efi::LOADER_DATA => MemoryKind::Loader,
        Efi::ACPI_RECLAIM => MemoryKind::AcpiReclaim,
        Efi::ACPI_NON_VOLATILE => MemoryKind::AcpiNvs,
        Efi::RUNTIME_SERVICES_CODE => MemoryKind::RuntimeCode,
        Efi::RUNTIME_SERVICES_DATA => MemoryKind::RuntimeData,
        Efi::MMIO | Efi::MMIO_PORT_SPACE => MemoryKind::Mmio,
        _ => MemoryKind::Reserved,
    }
}

/// The CPUs, the bootstrap processor first; only that one where the firmware
/// has no MP services.
fn cpus() -> Vec<Cpu> {
    let mut cpus = Vec::new();
    if let Ok(handle) = boot::get_handle_for_protocol::<MpServices>()
        && let Ok(services) = boot::open_protocol_exclusive::<MpServices>(handle)
        && let Ok(count) = services.get_number_of_processors()
    {
        for index in 0..count.total {
            let Ok(cpu) = services.get_processor_info(index) else {
                continue;
            };
            let position = if cpu.is_bsp() { 0 } else { cpus.len() };
            cpus.insert(
                position,
                Cpu {
                    apic_id: cpu.processor_id as u32,
                    usable: cpu.is_enabled() && cpu.is_healthy(),
                },
            );
        }
    }
    if cpus.is_empty() {
        let apic_id = core::arch::x86_64::__cpuid(1).ebx >> 24;
        cpus.push(Cpu {
            apic_id,
            usable: true,
        });
    }
    cpus
}

fn rsdp() -> Option<u64> {
    uefi::system::with_config_table(|entries| {
        [ConfigTableEntry::ACPI2_GUID, ConfigTableEntry::ACPI_GUID]
            .iter()
            .find_map(|guid| entries.iter().find(|entry| entry.guid == *guid))
            .map(|entry| entry.address as u64)
    })
}

struct Frames;

impl TableMemory for Frames {
    fn allocate(&mut self) -> Option<u64> {
        let frame = pages(1)?;
        // SAFETY: just allocated; the firmware maps memory where it is.
        unsafe { core::ptr::write_bytes(frame as *mut u8, 0, PAGE as usize) };
        Some(frame)
    }

    fn read(&self, address: u64) -> u64 {
        // SAFETY: inside a frame from `allocate`.
        unsafe { (address as *const u64).read() }
    }

    fn write(&mut self, address: u64, value: u64) {
        // SAFETY: inside a frame from `allocate`.
        unsafe { (address as *mut u64).write(value) }
    }
}

/// EFER.NXE and CR0.WP, with interrupts off.
///
/// # Safety
/// At CPL 0, when the firmware is no longer needed.
unsafe fn enable_protections() {
    // SAFETY: every CPU with 64-bit mode that runs this has NX; the firmware's tables have no
    // reserved bit set.
    unsafe {
        core::arch::asm!(
            "cli",
            "mov ecx, 0xc0000080",
            "rdmsr",
            "or eax, 0x800",
            "wrmsr",
            "mov rax, cr0",
            "or rax, 0x10000",
            "mov cr0, rax",
            out("rax") _, out("rcx") _, out("rdx") _,
            options(nostack),
        );
    }
}

/// Switches to the tables in RSI and enters the kernel at RDX with RDI.
#[unsafe(naked)]
unsafe extern "sysv64" fn trampoline() {
    naked_asm!("mov cr3, rsi", "jmp rdx")
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("vireo: error: the loader panicked: {info}");
    runtime::reset(ResetType::SHUTDOWN, Status::ABORTED, None)
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
