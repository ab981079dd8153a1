//! The PVH boot protocol (Xen, `docs/misc/pvh.pandoc` and
//! `xen/include/public/arch-x86/hvm/start_info.h`).
//!
//! An ELF file with a note that names a 32-bit entry point. An uncompressed
//! Linux kernel (`vmlinux`) is one, which saves the guest from unpacking
//! itself; so are several unikernels and the BSDs.
//!
//! ```text
//! 0x2000     hvm_start_info, whose address is in EBX
//! 0x2080     hvm_memmap_table_entry: the memory map
//! 0x3000     hvm_modlist_entry: the initrd, then the modules
//! ```

use super::placement::{self, CodeSegment, PlacedModule, Places, Selectors};
use super::{BootError, EntryMode, EntryState, Images, Machine, elf};
use crate::addr::Gpa;
use crate::vm::memory::GuestMemory;
use alloc::vec::Vec;

const PLACES: Places = Places::USUAL;
const PARAMETERS: Gpa = PLACES.parameters;
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Version 1 is the first with a memory map.
const START_INFO_VERSION: u32 = 1;
const MEMORY_MAP: Gpa = Gpa(PARAMETERS.0 + 0x80);
const MEMORY_MAP_ENTRY: u64 = 24;
const MODULES: Gpa = Gpa(PLACES.tables.start);
const MODULE_ENTRY: u64 = 32;
/// The protocol sets no limit; this is Linux's COMMAND_LINE_SIZE less its zero.
const COMMAND_LINE_LIMIT: usize = 2047;

/// Loads an ELF file with a PVH entry point.
///
/// # Errors
/// Why the image cannot be booted in this guest.
pub(super) fn load(
    kernel: elf::Kernel,
    images: &Images,
    machine: &Machine,
) -> Result<EntryState, BootError> {
    let memory = machine.memory;
    let ram_end = machine.map.ram_below_4g();
    let entry = kernel.pvh_entry.ok_or(BootError::NoPvhEntry)?;
    let end = kernel
        .segments
        .load(entry, memory, &PLACES.kernel, ram_end)?;
    placement::write_command_line(memory, &PLACES, images.cmdline, COMMAND_LINE_LIMIT)?;
    let mut modules = Vec::new();
    if let Some(initrd) = images.initrd {
        let initrd = placement::write_initrd(memory, initrd, end, ram_end)?;
        modules.push(PlacedModule {
            start: initrd.start,
            len: initrd.len,
            cmdline: 0,
        });
    }
    let below = modules
        .first()
        .map_or(ram_end, |initrd| initrd.start.into());
    modules.extend(placement::write_modules(
        memory,
        &PLACES,
        &images.modules,
        end..below,
        MODULE_ENTRY,
    )?);
    write_start_info(&modules, machine)?;
    Ok(EntryState {
        mode: EntryMode::Protected32,
        rip: entry,
        rsp: PLACES.stack(),
        rax: 0,
        rsi: 0,
        rbx: PARAMETERS.0,
        segments: placement::write_gdt(memory, &PLACES, Selectors::FIRST, CodeSegment::Bits32)?,
        as_by_bios: false,
    })
}

fn write_start_info(modules: &[PlacedModule], machine: &Machine) -> Result<(), BootError> {
    let memory: &GuestMemory = machine.memory;
    let ranges = machine.map.ranges();
    let table = if modules.is_empty() { 0 } else { MODULES.0 };
    let mut at = PARAMETERS;
    let mut put = |field: &[u8]| {
        let here = at;
        at = at.wrapping_add(field.len() as u64);
        memory.write(here, field)
    };
    put(&START_INFO_MAGIC.to_le_bytes())?;
    put(&START_INFO_VERSION.to_le_bytes())?;
    put(&0u32.to_le_bytes())?; // flags: neither privileged nor the initial domain
    put(&(modules.len() as u32).to_le_bytes())?;
    put(&table.to_le_bytes())?;
    put(&PLACES.command_line.start.to_le_bytes())?;
    put(&machine.rsdp.0.to_le_bytes())?;
    put(&MEMORY_MAP.0.to_le_bytes())?;
    put(&(ranges.len() as u32).to_le_bytes())?;
    put(&0u32.to_le_bytes())?;

    for (at, module) in (MODULES.0..).step_by(MODULE_ENTRY as usize).zip(modules) {
        let fields = [module.start, module.len, module.cmdline, 0];
        for (gpa, field) in (at..).step_by(8).zip(fields) {
            memory.write(Gpa(gpa), &u64::from(field).to_le_bytes())?;
        }
    }
    for (gpa, range) in (MEMORY_MAP.0..)
        .step_by(MEMORY_MAP_ENTRY as usize)
        .zip(&ranges)
    {
        memory.write(Gpa(gpa), &range.start.0.to_le_bytes())?;
        memory.write(Gpa(gpa + 8), &range.len.to_le_bytes())?;
        // The type, and a reserved word.
        memory.write(Gpa(gpa + 16), &u64::from(range.kind as u32).to_le_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
