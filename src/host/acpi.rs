//! What the firmware's ACPI tables say about the machine, as far as the
//! hypervisor itself needs it: I/O APICs and interrupt overrides (MADT), the
//! power-management timer and sleep control (FADT), and the type of S5 (DSDT).
//!
//! The crate `acpi` reads the tables. It trusts them, so it is given checked
//! copies ([`copy`]): an address may lead nowhere, a length may lie. What is
//! missing or broken gives the defaults of the PC. Clauses are those of ACPI 6.5.

mod copy;

use super::memory::paging;
use crate::addr::{Hpa, Hva, PAGE_SIZE};
use acpi::address::{AddressSpace, GenericAddress};
use acpi::fadt::Fadt;
use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiError, AcpiTables};
use alloc::vec;
use alloc::vec::Vec;
use copy::{Copies, ReadPhysical};
use spin::Once;

/// An I/O APIC of the MADT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicEntry {
    /// Physical address of its registers.
    pub address: u64,
    /// The global system interrupt of its first input.
    pub base: u32,
}

/// Where an ISA interrupt comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The global system interrupt.
    pub gsi: u32,
    pub active_low: bool,
    pub level: bool,
}

/// The power-management timer: 3.579545 MHz.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmTimer {
    pub port: u16,
    /// 32 bits instead of 24.
    pub wide: bool,
}

/// How the machine is put into S5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SleepRegister {
    /// Port of PM1a control.
    pub pm1a: u16,
    /// Port of PM1b control, where there is one.
    pub pm1b: Option<u16>,
    /// SLP_TYPa of S5.
    pub type_a: u16,
    /// SLP_TYPb of S5.
    pub type_b: u16,
    /// Port and value that turn ACPI mode on, where the firmware wants that.
    pub enable: Option<(u16, u8)>,
}

/// What is known of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    pub io_apics: Vec<IoApicEntry>,
    /// The sixteen ISA interrupts.
    pub isa: [Route; 16],
    pub pm_timer: Option<PmTimer>,
    pub sleep: Option<SleepRegister>,
}

impl Default for Platform {
    /// A PC without tables: one I/O APIC at the usual place, ISA interrupts straight through.
    fn default() -> Self {
        Self {
            io_apics: vec![IoApicEntry {
                address: 0xfec0_0000,
                base: 0,
            }],
            isa: core::array::from_fn(|irq| Route {
                gsi: irq as u32,
                active_low: false,
                level: false,
            }),
            pm_timer: None,
            sleep: None,
        }
    }
}

static PLATFORM: Once<Platform> = Once::new();

/// Reads the tables below the root pointer at `rsdp`, once. Needs `memory::init`.
pub fn init(rsdp: Option<u64>) -> &'static Platform {
    PLATFORM.call_once(|| match rsdp {
        Some(rsdp) => parse(rsdp, read_physical),
        None => {
            log::info!("no ACPI tables: assuming a plain PC");
            Platform::default()
        }
    })
}

/// How to reach S5, once [`init`] has found out.
pub fn sleep_register() -> Option<SleepRegister> {
    PLATFORM.get()?.sleep
}

/// Copies physical memory; `None` for what cannot be memory.
fn read_physical(start: u64, len: usize) -> Option<Vec<u8>> {
    let end = start
        .checked_add(len as u64)
        .filter(|&end| end <= 1 << 46)?;
    let first = Hpa(start).align_down(PAGE_SIZE).0;
    let direct = (first..end)
        .step_by(PAGE_SIZE as usize)
        .all(|page| paging::translate(paging::to_virt(Hpa(page))).is_some());
    // Tables in memory that the map calls reserved are not in the direct map.
    let base = if direct {
        paging::to_virt(Hpa(start))
    } else {
        paging::map_device(Hpa(start), len as u64).ok()?
    };
    let copy = (0..len)
        // SAFETY: mapped, and only bytes are read; nobody writes firmware tables now.
        .map(|offset| unsafe { ((base.0 + offset as u64) as *const u8).read_volatile() })
        .collect();
    if !direct {
        for page in (0..end - first).step_by(PAGE_SIZE as usize) {
            // SAFETY: this function's own mapping, no longer used.
            unsafe { paging::unmap(Hva(base.align_down(PAGE_SIZE).0 + page)) };
        }
    }
    Some(copy)
}

/// What the tables below the root pointer at `rsdp` say.
fn parse<R: ReadPhysical>(rsdp: u64, read: R) -> Platform {
    let mut platform = Platform::default();
    let copies = Copies(read);
    // SAFETY: `Copies` gives the crate memory that it may read whatever it holds.
    let tables = match unsafe { AcpiTables::from_rsdp(copies.clone(), rsdp as usize) } {
        Ok(tables) => tables,
        Err(error) => {
            log::warn!("ACPI root table: {error:?}; assuming a plain PC");
            return platform;
        }
    };
    match tables.find_table::<Madt>() {
        Ok(madt) => parse_madt(madt.get().entries(), &mut platform),
        Err(error) => log::warn!("ACPI MADT: {error:?}; assuming one I/O APIC"),
    }
    match tables.find_table::<Fadt>() {
        Ok(fadt) => {
            let s5 = s5_of(&tables, &copies);
            parse_fadt(&fadt, s5, &mut platform);
        }
        Err(error) => log::warn!("ACPI FADT: {error:?}; no power-off by S5"),
    }
    platform
}

/// Interrupt controllers (5.2.12).
fn parse_madt<'a>(entries: impl Iterator<Item = MadtEntry<'a>>, platform: &mut Platform) {
    let mut io_apics = Vec::new();
    for entry in entries {
        match entry {
            MadtEntry::IoApic(entry) => io_apics.push(IoApicEntry {
                address: entry.io_apic_address.into(),
                base: entry.global_system_interrupt_base,
            }),
            MadtEntry::InterruptSourceOverride(entry) => {
                if let Some(route) = platform.isa.get_mut(usize::from(entry.irq)) {
                    // 5.2.12.5: 3 is low or level; 0 (as the bus) and 1 are high and edge for ISA.
                    *route = Route {
                        gsi: entry.global_system_interrupt,
                        active_low: entry.flags & 0b11 == 0b11,
                        level: entry.flags >> 2 & 0b11 == 0b11,
                    };
                }
            }
            _ => {}
        }
    }
    if !io_apics.is_empty() {
        platform.io_apics = io_apics;
    }
}

/// The port of a register block, when it is one in I/O space.
fn port(address: GenericAddress) -> Option<u16> {
    let io_space = address.address_space == AddressSpace::SystemIo && address.address != 0;
    u16::try_from(address.address).ok().filter(|_| io_space)
}

/// Fixed hardware (5.2.9); `s5` are the sleep types.
fn parse_fadt(fadt: &Fadt, s5: Option<(u16, u16)>, platform: &mut Platform) {
    let optional =
        |block: Result<Option<GenericAddress>, AcpiError>| block.ok().flatten().and_then(port);
    platform.pm_timer = optional(fadt.pm_timer_block()).map(|port| PmTimer {
        port,
        wide: { fadt.flags }.pm_timer_is_32_bit(),
    });
    platform.sleep =
        fadt.pm1a_control_block()
            .ok()
            .and_then(port)
            .zip(s5)
            .map(|(pm1a, (type_a, type_b))| SleepRegister {
                pm1a,
                pm1b: optional(fadt.pm1b_control_block()),
                type_a,
                type_b,
                enable: u16::try_from(fadt.smi_cmd_port)
                    .ok()
                    .filter(|&command| command != 0 && fadt.acpi_enable != 0)
                    .map(|command| (command, fadt.acpi_enable)),
            });
}

fn s5_of<R: ReadPhysical>(
    tables: &AcpiTables<Copies<R>>,
    copies: &Copies<R>,
) -> Option<(u16, u16)> {
    match tables.dsdt() {
        Ok(dsdt) => s5_types(&(copies.0)(dsdt.address as u64, dsdt.length as usize)?),
        Err(error) => {
            log::warn!("ACPI DSDT: {error:?}; no power-off by S5");
            None
        }
    }
}

/// SLP_TYPa and SLP_TYPb of `\_S5`, without an AML interpreter: firmware
/// declares it as `Name (_S5, Package () {a, b, ...})` with constants, which
/// is the byte NameOp, the name, PackageOp, its length, the count, and then
/// the integers (20.2.5.1, 20.2.5.4). A definition of another form is not found.
fn s5_types(dsdt: &[u8]) -> Option<(u16, u16)> {
    const NAME_OP: u8 = 0x08;
    const PACKAGE_OP: u8 = 0x12;
    let mut places = dsdt
        .windows(4)
        .enumerate()
        .filter(|(_, name)| *name == b"_S5_");
    places.find_map(|(place, _)| {
        let before = dsdt.get(..place)?;
        if !matches!(before, [.., NAME_OP] | [.., NAME_OP, b'\\']) {
            return None;
        }
        let package = dsdt.get(place + 4..)?.strip_prefix(&[PACKAGE_OP])?;
        let length_bytes = 1 + usize::from(package.first()? >> 6);
        let elements = package.get(length_bytes + 1..)?;
        let (type_a, rest) = aml_integer(elements)?;
        let (type_b, _) = aml_integer(rest).unwrap_or((0, rest));
        (type_a < 8 && type_b < 8).then_some((type_a, type_b))
    })
}

/// A constant (20.2.3) and what follows it.
fn aml_integer(aml: &[u8]) -> Option<(u16, &[u8])> {
    let (len, start) = match aml.first()? {
        0x00 => return Some((0, &aml[1..])),
        0x01 => return Some((1, &aml[1..])),
        0x0a => (1, 1),
        0x0b => (2, 1),
        0x0c => (4, 1),
        _ => return None,
    };
    let (value, rest) = aml.get(start..)?.split_at_checked(len)?;
    let value = value
        .iter()
        .rev()
        .fold(0u32, |value, &byte| value << 8 | u32::from(byte));
    Some((u16::try_from(value).ok()?, rest))
}

#[cfg(test)]
mod tests;
