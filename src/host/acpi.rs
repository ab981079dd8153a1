//! What the firmware's ACPI tables say about the machine, as far as the
//! hypervisor itself needs it: I/O APICs and interrupt overrides (MADT), the
//! power-management timer, reset register and sleep control (FADT), and the
//! type of S5 (DSDT).
//!
//! Nothing here trusts a table: an address may lead nowhere, a length may lie.
//! So the tables are copied out and parsed as bytes; a crate's typed mapping
//! of a physical address has no way to say that there is nothing. What is
//! missing or broken gives the defaults of the PC and a line in the log.
//! Clauses are those of ACPI 6.5.

use super::memory::paging;
use crate::addr::{Hpa, Hva, PAGE_SIZE};
use alloc::vec;
use alloc::vec::Vec;
use spin::Once;

/// No sane table is longer, in bytes.
const LONGEST: usize = 4 << 20;
/// Length of the header common to all tables (5.2.6), in bytes.
const HEADER: usize = 36;

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

/// The reset register: a byte to write to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetRegister {
    pub port: u16,
    pub value: u8,
}

/// What is known of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    pub io_apics: Vec<IoApicEntry>,
    /// The sixteen ISA interrupts.
    pub isa: [Route; 16],
    pub pm_timer: Option<PmTimer>,
    pub sleep: Option<SleepRegister>,
    pub reset: Option<ResetRegister>,
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
            reset: None,
        }
    }
}

/// Why tables were not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Unreadable,
    Signature,
    Length,
    Checksum,
}

static PLATFORM: Once<Platform> = Once::new();

/// Reads the tables below the root pointer at `rsdp`, once. Needs `memory::init`.
pub fn init(rsdp: Option<u64>) -> &'static Platform {
    PLATFORM.call_once(|| match rsdp {
        Some(rsdp) => parse(rsdp, &read_physical),
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

/// A little-endian number of `N` bytes at `offset`.
fn number(bytes: &[u8], offset: usize, len: usize) -> Option<u64> {
    let field = bytes.get(offset..offset.checked_add(len)?)?;
    Some(
        field
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)),
    )
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)) == 0
}

type Read<'a> = &'a dyn Fn(u64, usize) -> Option<Vec<u8>>;

/// The whole table at `address`, checked (5.2.6).
fn table(address: u64, read: Read) -> Result<Vec<u8>, Broken> {
    let header = read(address, HEADER).ok_or(Broken::Unreadable)?;
    let len = number(&header, 4, 4).ok_or(Broken::Unreadable)? as usize;
    if !(HEADER..=LONGEST).contains(&len) {
        return Err(Broken::Length);
    }
    let table = read(address, len).ok_or(Broken::Unreadable)?;
    if sums_to_zero(&table) {
        Ok(table)
    } else {
        Err(Broken::Checksum)
    }
}

/// The addresses in the root table (5.2.5, 5.2.7, 5.2.8).
fn root_entries(rsdp: u64, read: Read) -> Result<Vec<u64>, Broken> {
    let pointer = read(rsdp, 20).ok_or(Broken::Unreadable)?;
    if !pointer.starts_with(b"RSD PTR ") {
        return Err(Broken::Signature);
    }
    if !sums_to_zero(&pointer) {
        return Err(Broken::Checksum);
    }
    let extended = match pointer.get(15) {
        Some(2..) => read(rsdp, 36).filter(|pointer| sums_to_zero(pointer)),
        _ => None,
    };
    let xsdt = extended
        .and_then(|pointer| number(&pointer, 24, 8))
        .filter(|&address| address != 0);
    let (root, signature, width) = match xsdt {
        Some(address) => (table(address, read)?, b"XSDT", 8),
        None => (
            table(number(&pointer, 16, 4).ok_or(Broken::Unreadable)?, read)?,
            b"RSDT",
            4,
        ),
    };
    if !root.starts_with(signature) {
        return Err(Broken::Signature);
    }
    Ok((HEADER..root.len())
        .step_by(width)
        .filter_map(|offset| number(&root, offset, width))
        .collect())
}

fn parse(rsdp: u64, read: Read) -> Platform {
    let mut platform = Platform::default();
    let entries = root_entries(rsdp, read).unwrap_or_else(|broken| {
        log::warn!("ACPI root table: {broken:?}; assuming a plain PC");
        Vec::new()
    });
    for address in entries {
        match table(address, read) {
            Ok(madt) if madt.starts_with(b"APIC") => parse_madt(&madt, &mut platform),
            Ok(fadt) if fadt.starts_with(b"FACP") => parse_fadt(&fadt, read, &mut platform),
            Ok(_) => {}
            Err(broken) => log::warn!("ACPI table at {address:#x}: {broken:?}; ignored"),
        }
    }
    platform
}

/// Interrupt controllers (5.2.12).
fn parse_madt(madt: &[u8], platform: &mut Platform) {
    let mut io_apics = Vec::new();
    let mut rest = madt.get(44..).unwrap_or(&[]);
    while let [kind, len, ..] = *rest {
        let Some((entry, behind)) = rest.split_at_checked(usize::from(len)).filter(|_| len >= 2)
        else {
            log::warn!("ACPI MADT: an entry of {len} bytes; the rest is ignored");
            break;
        };
        rest = behind;
        match kind {
            1 => {
                if let (Some(address), Some(base)) = (number(entry, 4, 4), number(entry, 8, 4)) {
                    io_apics.push(IoApicEntry {
                        address,
                        base: base as u32,
                    });
                }
            }
            2 => {
                let fields = (
                    number(entry, 3, 1),
                    number(entry, 4, 4),
                    number(entry, 8, 2),
                );
                if let (Some(irq), Some(gsi), Some(flags)) = fields
                    && let Some(route) = platform.isa.get_mut(irq as usize)
                {
                    // 5.2.12.5: 3 is low or level; 0 (as the bus) and 1 are high and edge for ISA.
                    *route = Route {
                        gsi: gsi as u32,
                        active_low: flags & 0b11 == 0b11,
                        level: flags >> 2 & 0b11 == 0b11,
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

/// The port in a register block: from the generic address at `extended`, when
/// it is one in I/O space (5.2.3.2), else the older field at `legacy`.
fn port(fadt: &[u8], extended: usize, legacy: usize) -> Option<u16> {
    let io_space = number(fadt, extended, 1) == Some(1);
    let address = number(fadt, extended + 4, 8).filter(|&address| io_space && address != 0);
    let address = address
        .or_else(|| number(fadt, legacy, 4))
        .filter(|&address| address != 0)?;
    u16::try_from(address).ok()
}

/// Fixed hardware (5.2.9).
fn parse_fadt(fadt: &[u8], read: Read, platform: &mut Platform) {
    let flags = number(fadt, 112, 4).unwrap_or(0);
    if number(fadt, 91, 1) == Some(4) {
        platform.pm_timer = port(fadt, 208, 76).map(|port| PmTimer {
            port,
            wide: flags & 1 << 8 != 0,
        });
    }
    if flags & 1 << 10 != 0 && number(fadt, 116, 1) == Some(1) {
        platform.reset = number(fadt, 120, 8)
            .and_then(|address| u16::try_from(address).ok())
            .zip(number(fadt, 128, 1))
            .map(|(port, value)| ResetRegister {
                port,
                value: value as u8,
            });
    }
    let dsdt = number(fadt, 140, 8)
        .filter(|&address| address != 0)
        .or_else(|| number(fadt, 40, 4));
    let types = match dsdt.map(|address| table(address, read)) {
        Some(Ok(dsdt)) => s5_types(&dsdt),
        Some(Err(broken)) => {
            log::warn!("ACPI DSDT: {broken:?}; no power-off by S5");
            None
        }
        None => None,
    };
    platform.sleep = port(fadt, 172, 64)
        .zip(types)
        .map(|(pm1a, (type_a, type_b))| SleepRegister {
            pm1a,
            pm1b: port(fadt, 184, 68),
            type_a,
            type_b,
            enable: number(fadt, 48, 4)
                .and_then(|command| u16::try_from(command).ok())
                .zip(number(fadt, 52, 1))
                .filter(|&(command, value)| command != 0 && value != 0)
                .map(|(command, value)| (command, value as u8)),
        });
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
    let value = number(aml, start, len)?;
    Some((u16::try_from(value).ok()?, &aml[start + len..]))
}

#[cfg(test)]
mod tests;
