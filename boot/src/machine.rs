//! What only the firmware knows of the machine.

use crate::kernel::PAGE;
use alloc::vec::Vec;
use uefi::boot::{self, OpenProtocolAttributes, OpenProtocolParams};
use uefi::mem::memory_map::{MemoryDescriptor, MemoryMap};
use uefi::proto::console::gop::{GraphicsOutput, PixelFormat};
use uefi::proto::pi::mp::MpServices;
use uefi::table::cfg::ConfigTableEntry;
use vireo_handoff::{Cpu, Framebuffer, MemoryKind, MemoryRegion};

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
