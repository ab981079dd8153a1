//! What only the firmware knows of the machine.

use crate::kernel::PAGE;
use alloc::vec::Vec;
use uefi::boot::{self, OpenProtocolAttributes, OpenProtocolParams};
use uefi::mem::memory_map::{MemoryAttribute, MemoryDescriptor, MemoryMap};
use uefi::proto::console::gop::{GraphicsOutput, PixelFormat};
use uefi::proto::pi::mp::MpServices;
use uefi::table::cfg::ConfigTableEntry;
use uefi::{Guid, guid};
use vireo_handoff::{Cpu, Framebuffer, MemoryKind, MemoryRegion};

/// EFI_MEMORY_ATTRIBUTES_TABLE_GUID.
const MEMORY_ATTRIBUTES_TABLE: Guid = guid!("dcfa911d-26eb-469f-a220-38b7dc461220");
/// More entries are not looked at.
const MOST_ATTRIBUTES: u32 = 256;

/// The memory as it is now.
pub fn memory() -> Option<Vec<MemoryRegion>> {
    let map = boot::memory_map(boot::MemoryType::LOADER_DATA).ok()?;
    Some(map.entries().map(region).collect())
}

/// One line of the firmware's memory map.
pub fn region(descriptor: &MemoryDescriptor) -> MemoryRegion {
    MemoryRegion {
        start: descriptor.phys_start,
        len: descriptor.page_count.saturating_mul(PAGE),
        kind: kind(descriptor.ty),
    }
}

fn kind(ty: boot::MemoryType) -> MemoryKind {
    use boot::MemoryType as Efi;
    match ty {
        Efi::CONVENTIONAL
        | Efi::BOOT_SERVICES_CODE
        | Efi::BOOT_SERVICES_DATA
        | Efi::LOADER_CODE
        | Efi::LOADER_DATA => MemoryKind::Usable,
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
pub fn cpus() -> Vec<Cpu> {
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

/// Physical address of the ACPI root pointer.
pub fn rsdp() -> Option<u64> {
    uefi::system::with_config_table(|entries| {
        [ConfigTableEntry::ACPI2_GUID, ConfigTableEntry::ACPI_GUID]
            .iter()
            .find_map(|guid| entries.iter().find(|entry| entry.guid == *guid))
            .map(|entry| entry.address as u64)
    })
}

/// Physical address of the runtime service ResetSystem.
pub fn reset_system() -> Option<u64> {
    let table = uefi::table::system_table_raw()?;
    // SAFETY: the firmware's tables live as long as the loader.
    unsafe {
        let services = table.as_ref().runtime_services.as_ref()?;
        Some(services.reset_system as usize as u64)
    }
}

/// The memory of the runtime services, code apart from data, as the firmware
/// tells it (UEFI 2.10, 4.6.4); nothing where it does not, or where some of it
/// is to be written and executed.
pub fn runtime_memory() -> Vec<MemoryRegion> {
    let table = uefi::system::with_config_table(|entries| {
        entries
            .iter()
            .find(|entry| entry.guid == MEMORY_ATTRIBUTES_TABLE)
            .map(|entry| entry.address.cast::<u32>())
    });
    let Some(table) = table else {
        return Vec::new();
    };
    // SAFETY: the firmware's table: version, number of entries, bytes of an entry, flags, and
    // then the entries, each at least a memory descriptor.
    let (count, size) = unsafe { (table.add(1).read(), table.add(2).read()) };
    let mut regions = Vec::new();
    for index in 0..count.min(MOST_ATTRIBUTES) {
        let offset = 16 + index as usize * size as usize;
        // SAFETY: as above.
        let entry = unsafe {
            table
                .byte_add(offset)
                .cast::<MemoryDescriptor>()
                .read_unaligned()
        };
        let kind = if entry.att.contains(MemoryAttribute::EXECUTE_PROTECT) {
            MemoryKind::RuntimeData
        } else if entry.att.contains(MemoryAttribute::READ_ONLY) {
            MemoryKind::RuntimeCode
        } else {
            return Vec::new();
        };
        regions.push(MemoryRegion {
            start: entry.phys_start,
            len: entry.page_count.saturating_mul(PAGE),
            kind,
        });
    }
    regions
}

/// The framebuffer in the mode that the firmware has chosen, if its pixels are
/// of one of the two usual formats.
pub fn framebuffer() -> Option<Framebuffer> {
    let params = OpenProtocolParams {
        handle: boot::get_handle_for_protocol::<GraphicsOutput>().ok()?,
        agent: boot::image_handle(),
        controller: None,
    };
    // SAFETY: only looked at, while nothing else runs that could remove it. Opening it
    // exclusively would take the screen from the firmware's console.
    let mut screen = unsafe {
        boot::open_protocol::<GraphicsOutput>(params, OpenProtocolAttributes::GetProtocol)
    }
    .ok()?;
    let mode = screen.current_mode_info();
    let bgr = match mode.pixel_format() {
        PixelFormat::Rgb => false,
        PixelFormat::Bgr => true,
        PixelFormat::Bitmask | PixelFormat::BltOnly => return None,
    };
    let (width, height) = mode.resolution();
    let mut pixels = screen.frame_buffer();
    Some(Framebuffer {
        start: pixels.as_mut_ptr() as u64,
        len: pixels.size() as u64,
        width: u32::try_from(width).ok()?,
        height: u32::try_from(height).ok()?,
        stride: u32::try_from(mode.stride()).ok()?,
        bgr,
    })
}
