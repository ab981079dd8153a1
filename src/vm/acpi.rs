//! The ACPI tables that a guest is shown (ACPI 6.5), all in the area below
//! 1 MiB that a kernel searches for the root pointer.
//!
//! FADT and MADT are written field by field at the offsets of the
//! specification; the DSDT is AML from `acpi_tables`.

use super::memory::{GuestMemory, OutOfSlot};
use super::memory_map::TABLES_START;
use crate::addr::Gpa;
use crate::devices::pc;
use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate, Scope};
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;

const OEM: [u8; 6] = *b"VIREO ";
const TABLE: [u8; 8] = *b"VIREOPC ";
const LOCAL_APIC: u32 = 0xfee0_0000;
const HEADER: u32 = 36;

/// Writes the tables for `vcpus` processors; where the root pointer is.
///
/// # Errors
/// When the guest has no memory there.
pub fn write(memory: &GuestMemory, vcpus: u32) -> Result<Gpa, OutOfSlot> {
    let rsdp = Gpa(TABLES_START);
    let mut writer = Writer {
        memory,
        next: TABLES_START + 64,
    };
    let facs = writer.put(&bytes(&FACS::new()))?;
    let dsdt = writer.put(dsdt().as_slice())?;
    let fadt = writer.put(fadt(facs, dsdt).as_slice())?;
    let madt = writer.put(madt(vcpus).as_slice())?;

    let mut xsdt = Sdt::new(*b"XSDT", HEADER, 1, OEM, TABLE, 1);
    xsdt.append(fadt);
    xsdt.append(madt);
    let xsdt = writer.put(xsdt.as_slice())?;
    memory.write(rsdp, &bytes(&Rsdp::new(OEM, xsdt)))?;
    Ok(rsdp)
}

struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    /// Puts a table at the next 64-byte boundary, as the FACS needs it.
    fn put(&mut self, table: &[u8]) -> Result<u64, OutOfSlot> {
        let start = self.next;
        self.memory.write(Gpa(start), table)?;
        self.next = (start + table.len() as u64).next_multiple_of(64);
        Ok(start)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Table 5.9.
fn fadt(facs: u64, dsdt: u64) -> Sdt {
    const LENGTH: u32 = 276;
    /// WBINVD, and power and sleep buttons that are not fixed hardware's (bit 5:
    /// no sleep button); RTC wake is not in fixed registers; 32-bit timer; reset register.
    const FLAGS: u32 = 1 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10;
    /// Legacy devices; no VGA; the PC has no CMOS-RTC flag set. Bit 1, the 8042, is clear.
    const BOOT_FLAGS: u16 = 1 | 1 << 2;
    /// A generic address of 8-bit access in I/O space.
    const IO_BYTE: [u8; 4] = [1, 8, 0, 1];

    let mut table = Sdt::new(*b"FACP", LENGTH, 6, OEM, TABLE, 1);
    table.write_u32(36, facs as u32);
    table.write_u32(40, dsdt as u32);
    table.write_u16(46, pc::SCI_IRQ.into());
    table.write_u32(48, pc::SMI_COMMAND.into());
    table.write_u8(52, pc::ACPI_ENABLE);
    table.write_u8(53, pc::ACPI_DISABLE);
    table.write_u32(56, pc::PM1A_EVENT.into());
    table.write_u32(64, pc::PM1A_CONTROL.into());
    table.write_u32(76, pc::PM_TIMER.into());
    table.write_u8(88, 4); // PM1_EVT_LEN
    table.write_u8(89, 2); // PM1_CNT_LEN
    table.write_u8(91, 4); // PM_TMR_LEN
    table.write_u16(96, 0xfff); // no C2
    table.write_u16(98, 0xfff); // no C3
    table.write_u8(108, pc::RTC_CENTURY);
    table.write_u16(109, BOOT_FLAGS);
    table.write_u32(112, FLAGS);
    table.write_bytes(116, &IO_BYTE);
    table.write_u64(120, pc::RESET_CONTROL.into());
    table.write_u8(128, pc::RESET_VALUE);
    table.write_u64(140, dsdt);
    table.update_checksum();
    table
}

/// Section 5.2.12.
fn madt(vcpus: u32) -> Sdt {
    const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
    const ENABLED: u32 = 1;
    /// Identifiers from here on only an x2APIC can have.
    const FIRST_X2APIC_ID: u32 = 255;

    let mut table = Sdt::new(*b"APIC", HEADER, 5, OEM, TABLE, 1);
    table.append(LOCAL_APIC);
    table.append(1u32); // PC-AT compatible: the 8259s are there
    for id in 0..vcpus {
        if id < FIRST_X2APIC_ID {
            table.append_slice(&[0, 8, id as u8, id as u8]);
            table.append(ENABLED);
        } else {
            table.append_slice(&[9, 16, 0, 0]);
            table.append(id);
            table.append(ENABLED);
            table.append(id);
        }
    }
    table.append_slice(&[1, 12, vcpus as u8, 0]);
    table.append(pc::IO_APIC_BASE as u32);
    table.append(0u32);
    // IRQ 0, the timer, is on another pin; the SCI is level triggered.
    table.append_slice(&[2, 10, 0, pc::PIT_IRQ]);
    table.append(u32::from(pc::PIT_PIN));
    table.append(0u16);
    table.append_slice(&[2, 10, 0, pc::SCI_IRQ]);
    table.append(u32::from(pc::SCI_IRQ));
    table.append(ACTIVE_HIGH_LEVEL);
    // NMI on LINT1 of every processor.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    table
}

fn dsdt() -> Sdt {
    let mut aml = Vec::new();
    let sleep = pc::S5_SLEEP_TYPE;
    Name::new(
        "_S5_".into(),
        &Package::new(alloc::vec![&sleep, &sleep, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut aml);
    let ports = |first: u16, count: u8| IO::new(first, first, 1, count);
    // Consumed by the device, edge triggered, active high, not shared.
    let interrupt = |irq: u8| Interrupt::new(true, true, false, false, irq.into());
    let (com1_ports, com1_irq) = (ports(pc::COM1, 8), interrupt(pc::COM1_IRQ));
    let (rtc_ports, rtc_irq) = (ports(pc::RTC, 2), interrupt(pc::RTC_IRQ));
    let serial = ResourceTemplate::new(alloc::vec![&com1_ports, &com1_irq]);
    let clock = ResourceTemplate::new(alloc::vec![&rtc_ports, &rtc_irq]);
    Scope::new(
        "_SB_".into(),
        alloc::vec![
            &Device::new(
                "COM1".into(),
                alloc::vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &1u8),
                    &Name::new("_CRS".into(), &serial),
                ],
            ),
            &Device::new(
                "RTC_".into(),
                alloc::vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                    &Name::new("_CRS".into(), &clock),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    let mut table = Sdt::new(*b"DSDT", HEADER, 2, OEM, TABLE, 1);
    table.append_slice(&aml);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hpa;
    use crate::vm::memory_map::MemoryMap;

    struct Tables {
        ram: Vec<u8>,
        rsdp: usize,
    }

    impl Tables {
        fn new(vcpus: u32) -> Self {
            let mut ram = vec![0; 2 << 20];
            let map = MemoryMap::new(Hpa(ram.as_mut_ptr() as u64), 2 << 20);
            let rsdp = write(&GuestMemory::new(map.slots(), 0), vcpus).unwrap().0 as usize;
            Self { ram, rsdp }
        }

        fn u32(&self, at: usize) -> u32 {
            u32::from_le_bytes(self.ram[at..at + 4].try_into().unwrap())
        }

        fn u64(&self, at: usize) -> u64 {
            u64::from_le_bytes(self.ram[at..at + 8].try_into().unwrap())
        }

        /// The table at `at`, whose checksum is right.
        fn table(&self, at: usize, signature: &[u8; 4]) -> &[u8] {
            let table = &self.ram[at..at + self.u32(at + 4) as usize];
            assert_eq!(&table[..4], signature);
            let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "checksum of {signature:?}");
            table
        }

        fn found_in_xsdt(&self, index: usize) -> usize {
            let xsdt = self.u64(self.rsdp + 24) as usize;
            self.table(xsdt, b"XSDT");
            self.u64(xsdt + 36 + 8 * index) as usize
        }
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let tables = Tables::new(1);
        assert_eq!(&tables.ram[tables.rsdp..][..8], b"RSD PTR ");
        let sum = tables.ram[tables.rsdp..][..36]
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        let fadt = tables.found_in_xsdt(0);
        tables.table(fadt, b"FACP");
        assert_eq!(u64::from(tables.u32(fadt + 40)), tables.u64(fadt + 140));
        tables.table(tables.u32(fadt + 40) as usize, b"DSDT");
        let facs = tables.u32(fadt + 36) as usize;
        assert_eq!((&tables.ram[facs..][..4], facs % 64), (&b"FACS"[..], 0));
    }

    #[test]
    fn the_processors_are_counted() {
        for vcpus in [1, 4, 300] {
            let tables = Tables::new(vcpus);
            let madt = tables.table(tables.found_in_xsdt(1), b"APIC");
            let mut at = 44;
            let mut kinds = [0u32; 10];
            while at < madt.len() {
                kinds[usize::from(madt[at])] += 1;
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            assert_eq!(kinds[0] + kinds[9], vcpus);
            assert_eq!((kinds[1], kinds[2], kinds[4]), (1, 2, 1));
        }
    }

    #[test]
    fn power_off_is_announced_with_the_sleep_type_of_the_chipset() {
        let dsdt = dsdt();
        let aml = dsdt.as_slice();
        let at = aml.windows(4).position(|name| name == b"_S5_").unwrap();
        // PackageOp, length, four elements, BytePrefix, type.
        assert_eq!(aml[at + 4], 0x12);
        assert_eq!(aml[at + 6..at + 9], [4, 0x0a, pc::S5_SLEEP_TYPE]);
    }
}
