//! The ACPI tables that a guest is shown (ACPI 6.5), all in the area below
//! 1 MiB that a kernel searches for the root pointer.
//!
//! FADT, MADT and SPCR are written field by field at the offsets of the
//! specification; the DSDT is AML from `acpi_tables`.

use super::memory::{GuestMemory, OutOfSlot};
use super::memory_map::TABLES_START;
use crate::addr::Gpa;
use crate::devices::pc;
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;

const OEM: [u8; 6] = *b"VIREO ";
const TABLE: [u8; 8] = *b"VIREOPC ";
const HEADER: u32 = 36;
/// How a generic address of 8 bits in I/O space begins.
const IO_BYTE: [u8; 4] = [1, 8, 0, 1];

/// All tables but the root pointer behind each other, with addresses that count from the first
/// one's, and the root pointer likewise; and what has to be done where they are put.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub tables: Vec<u8>,
    pub rsdp: Vec<u8>,
    pub fixes: Vec<Fix>,
}

/// Which part of [`Tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Tables,
    RootPointer,
}

/// What is to be done to a part, once the tables have their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Adds the address of the tables to the number of `size` bytes at `offset`.
    Pointer { part: Part, offset: u32, size: u8 },
    /// Makes the bytes add up to 0 by that at `offset`.
    Checksum {
        part: Part,
        offset: u32,
        start: u32,
        len: u32,
    },
}

/// The alignment of the tables, which is the FACS's.
pub const TABLES_ALIGN: u32 = 64;
/// Offset of the checksum in a table.
const CHECKSUM: usize = 9;

/// Writes the tables for `vcpus` processors; where the root pointer is.
///
/// # Errors
/// When the guest has no memory there.
pub fn write(memory: &GuestMemory, vcpus: u32) -> Result<Gpa, OutOfSlot> {
    let rsdp = Gpa(TABLES_START);
    let start = TABLES_START + u64::from(TABLES_ALIGN);
    let mut all = Tables::new(vcpus);
    for fix in core::mem::take(&mut all.fixes) {
        all.fix(fix, start);
    }
    memory.write(Gpa(start), &all.tables)?;
    memory.write(rsdp, &all.rsdp)?;
    Ok(rsdp)
}

/// The waking vector that the guest has written into the FACS of [`write`]; `None` where there
/// is none.
pub fn waking_vector(memory: &GuestMemory) -> Option<u32> {
    const VECTOR: u64 = 12;
    let facs = TABLES_START + u64::from(TABLES_ALIGN);
    let vector = memory.read_u32(Gpa(facs + VECTOR)).ok()?;
    (vector != 0).then_some(vector)
}

impl Tables {
    /// Those for `vcpus` processors.
    pub fn new(vcpus: u32) -> Self {
        let mut all = Self::default();
        let facs = all.put(&bytes(&FACS::new()));
        let table = dsdt();
        let dsdt = all.put(table.as_slice());
        let table = fadt(facs, dsdt);
        let fadt = all.put_table(&table, &[(36, 4), (40, 4), (140, 8)]);
        let madt = all.put(madt(vcpus).as_slice());
        let spcr = all.put(spcr().as_slice());

        let tables = [fadt, madt, spcr];
        // For kernels that know nothing later than ACPI 1.0.
        let rsdt = all.put_root(*b"RSDT", 4, &tables);
        let xsdt = all.put_root(*b"XSDT", 8, &tables);
        all.rsdp = bytes(&Rsdp::new(OEM, xsdt));
        let field = all.rsdp.iter_mut().skip(16);
        for (byte, value) in field.zip((rsdt as u32).to_le_bytes()) {
            *byte = value;
        }
        all.point(Part::RootPointer, 16, 4);
        all.point(Part::RootPointer, 24, 8);
        // The first revision's bytes, then all (5.2.5.3).
        for (offset, len) in [(8, 20), (32, 36)] {
            all.sum(Part::RootPointer, offset, 0, len);
        }
        all
    }

    /// Puts a table at the next boundary; where it is.
    fn put(&mut self, table: &[u8]) -> u64 {
        let start = self.tables.len().next_multiple_of(TABLES_ALIGN as usize);
        self.tables.resize(start, 0);
        self.tables.extend_from_slice(table);
        start as u64
    }

    /// The same with one that has `pointers` (offset and size) to others.
    fn put_table(&mut self, table: &Sdt, pointers: &[(u32, u8)]) -> u64 {
        let start = self.put(table.as_slice());
        for &(offset, size) in pointers {
            self.point(Part::Tables, start as u32 + offset, size);
        }
        let len = table.as_slice().len() as u32;
        self.sum(
            Part::Tables,
            start as u32 + CHECKSUM as u32,
            start as u32,
            len,
        );
        start
    }

    /// The same with a list of addresses of `size` bytes each.
    fn put_root(&mut self, signature: [u8; 4], size: u8, tables: &[u64]) -> u64 {
        let mut root = Sdt::new(signature, HEADER, 1, OEM, TABLE, 1);
        let mut pointers = Vec::new();
        for table in tables {
            pointers.push((root.len() as u32, size));
            let bytes = table.to_le_bytes();
            root.append_slice(bytes.get(..usize::from(size)).unwrap_or(&bytes));
        }
        self.put_table(&root, &pointers)
    }

    fn point(&mut self, part: Part, offset: u32, size: u8) {
        self.fixes.push(Fix::Pointer { part, offset, size });
    }

    /// Whoever makes the sum may expect that there is none.
    fn sum(&mut self, part: Part, offset: u32, start: u32, len: u32) {
        self.fixes.push(Fix::Checksum {
            part,
            offset,
            start,
            len,
        });
        if let Some(byte) = self.part(part).get_mut(offset as usize) {
            *byte = 0;
        }
    }

    const fn part(&mut self, part: Part) -> &mut Vec<u8> {
        match part {
            Part::Tables => &mut self.tables,
            Part::RootPointer => &mut self.rsdp,
        }
    }

    fn fix(&mut self, fix: Fix, address: u64) {
        match fix {
            Fix::Pointer { part, offset, size } => {
                let field = self.part(part).iter_mut().skip(offset as usize);
                let mut carry = 0;
                for (byte, add) in field.zip(address.to_le_bytes()).take(size.into()) {
                    let sum = u16::from(*byte) + u16::from(add) + carry;
                    *byte = sum as u8;
                    carry = sum >> 8;
                }
            }
            Fix::Checksum {
                part,
                offset,
                start,
                len,
            } => {
                let part = self.part(part);
                let range = part.iter().skip(start as usize).take(len as usize);
                let sum = range.fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                if let Some(byte) = part.get_mut(offset as usize) {
                    *byte = byte.wrapping_sub(sum);
                }
            }
        }
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
    /// WBINVD works.
    const WBINVD: u32 = 1 << 0;
    /// C1, which is HLT, works on every processor.
    const PROC_C1: u32 = 1 << 2;
    /// There is no sleep button. The power button is fixed hardware (bit 4 is clear).
    const NO_FIXED_SLEEP_BUTTON: u32 = 1 << 5;
    /// The real-time clock's alarm does not wake through the PM1 block.
    const FIX_RTC: u32 = 1 << 6;
    const TIMER_32_BIT: u32 = (pc::PM_TIMER_32_BIT as u32) << 8;
    const RESET_REGISTER: u32 = 1 << 10;
    const FLAGS: u32 =
        WBINVD | PROC_C1 | NO_FIXED_SLEEP_BUTTON | FIX_RTC | TIMER_32_BIT | RESET_REGISTER;
    /// Legacy devices. Clear: bit 1, there is no keyboard behind the 8042; bit 2, there is a VGA;
    /// bit 5, there is a real-time clock.
    const BOOT_FLAGS: u16 = 1;

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
    table.append(pc::LOCAL_APIC_BASE as u32);
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

/// The table of the serial console, revision 2 (Microsoft's "Serial Port Console Redirection
/// Table"): COM1, by which kernels find it that look for no device.
fn spcr() -> Sdt {
    const LENGTH: u32 = 80;
    /// By the 8259s and by the I/O APIC.
    const BOTH: u8 = 0b11;
    const BAUD_115200: u8 = 7;
    const ANSI: u8 = 3;

    let mut table = Sdt::new(*b"SPCR", LENGTH, 2, OEM, TABLE, 1);
    // Interface type 0: a 16550.
    table.write_bytes(40, &IO_BYTE);
    table.write_u64(44, pc::COM1.into());
    table.write_u8(52, BOTH);
    table.write_u8(53, pc::COM1_IRQ);
    table.write_u32(54, pc::COM1_IRQ.into());
    table.write_u8(58, BAUD_115200);
    table.write_u8(60, 1); // stop bit
    table.write_u8(62, ANSI);
    table.write_u32(64, u32::MAX); // on no PCI bus
    table.update_checksum();
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
    // Without a host bridge Linux looks for no PCI bus. It has no windows: nothing on the bus
    // decodes any.
    let (buses, config_ports) = (
        AddressSpace::new_bus_number(0u16, 0xff),
        ports(pc::PCI_ADDRESS, 8),
    );
    let bridge = ResourceTemplate::new(alloc::vec![&buses, &config_ports]);
    Scope::new(
        "_SB_".into(),
        alloc::vec![
            &Device::new(
                "PCI0".into(),
                alloc::vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
                    &Name::new("_UID".into(), &0u8),
                    &Name::new("_CRS".into(), &bridge),
                ],
            ),
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

    struct Placed {
        ram: Vec<u8>,
        rsdp: usize,
    }

    impl Placed {
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
        let tables = Placed::new(1);
        assert_eq!(&tables.ram[tables.rsdp..][..8], b"RSD PTR ");
        let sum = tables.ram[tables.rsdp..][..36]
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        let rsdt = tables.u32(tables.rsdp + 16) as usize;
        assert_eq!(tables.table(rsdt, b"RSDT").len(), 36 + 3 * 4);
        for (index, signature) in [b"FACP", b"APIC", b"SPCR"].into_iter().enumerate() {
            let table = tables.found_in_xsdt(index);
            tables.table(table, signature);
            assert_eq!(tables.u32(rsdt + 36 + 4 * index) as usize, table);
        }
        let fadt = tables.found_in_xsdt(0);
        assert_eq!(u64::from(tables.u32(fadt + 40)), tables.u64(fadt + 140));
        tables.table(tables.u32(fadt + 40) as usize, b"DSDT");
        let facs = tables.u32(fadt + 36) as usize;
        assert_eq!((&tables.ram[facs..][..4], facs % 64), (&b"FACS"[..], 0));
    }

    #[test]
    fn the_waking_vector_is_where_the_fadt_says() {
        let mut tables = Placed::new(1);
        let fadt = tables.found_in_xsdt(0);
        let facs = tables.u32(fadt + 36) as usize;
        let read = |ram: &mut Vec<u8>| {
            let map = MemoryMap::new(Hpa(ram.as_mut_ptr() as u64), 2 << 20);
            waking_vector(&GuestMemory::new(map.slots(), 0))
        };
        assert_eq!(read(&mut tables.ram), None);
        tables.ram[facs + 12..facs + 16].copy_from_slice(&0x1234_u32.to_le_bytes());
        assert_eq!(read(&mut tables.ram), Some(0x1234));
    }

    #[test]
    fn the_processors_are_counted() {
        for vcpus in [1, 4, 300] {
            let tables = Placed::new(vcpus);
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

    #[test]
    fn the_fadt_names_the_ports_that_the_devices_answer() {
        let tables = Placed::new(1);
        let fadt = tables.table(tables.found_in_xsdt(0), b"FACP");
        let number = |offset: usize, len: usize| {
            (0..len)
                .rev()
                .fold(0u64, |sum, byte| sum << 8 | u64::from(fadt[offset + byte]))
        };
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        assert_eq!(number(46, 2), u64::from(pc::SCI_IRQ));
        // SMI_CMD, ACPI_ENABLE, ACPI_DISABLE.
        assert_eq!((number(48, 4), fadt[52], fadt[53]), (0xb2, 0xf1, 0xf0));
        let end = u64::from(pc::PM_BASE + pc::PM_LENGTH);
        for (block, len, base) in [
            (56, 88, pc::PM1A_EVENT),
            (64, 89, pc::PM1A_CONTROL),
            (76, 91, pc::PM_TIMER),
        ] {
            assert_eq!(number(block, 4), u64::from(base));
            assert!(number(block, 4) + number(len, 1) <= end);
        }
        // No PM1b, PM2, GPE blocks, and no 64-bit forms that would override these.
        for offset in [60, 68, 72, 80, 84] {
            assert_eq!(number(offset, 4), 0);
        }
        assert!(
            fadt[132..140]
                .iter()
                .chain(&fadt[148..])
                .all(|byte| *byte == 0)
        );
        // Boot flags: legacy devices, no 8042, VGA, a CMOS clock.
        assert_eq!(number(109, 2), 0b001);
        let flags = number(112, 4);
        assert_eq!(flags >> 8 & 1 == 1, pc::PM_TIMER_32_BIT);
        // FIX_RTC, reset register; neither hardware-reduced nor with a control-method power button.
        assert_eq!(
            (
                flags >> 6 & 1,
                flags >> 10 & 1,
                flags >> 20 & 1,
                flags >> 4 & 1
            ),
            (1, 1, 0, 0)
        );
        // The reset register: I/O space, 8 bits, at 0xcf9.
        assert_eq!(fadt[116..120], [1, 8, 0, 1]);
        assert_eq!((number(120, 8), fadt[128]), (0xcf9, 0x06));
    }

    #[test]
    fn the_madt_routes_timer_sci_and_nmi() {
        let tables = Placed::new(2);
        let madt = tables.table(tables.found_in_xsdt(1), b"APIC");
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while let Some(len) = rest.get(1) {
            let (entry, others) = rest.split_at(usize::from(*len));
            entries.push(entry);
            rest = others;
        }
        // The local APICs' address; the 8259s are there.
        assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
        let expected: [&[u8]; 6] = [
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[0, 8, 1, 1, 1, 0, 0, 0],
            &[1, 12, 2, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
            // IRQ 9: active high, level triggered.
            &[2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0],
            &[4, 6, 0xff, 0, 0, 1],
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn the_serial_port_is_found_by_its_identifier() {
        let dsdt = dsdt();
        let aml = dsdt.as_slice();
        let has = |bytes: &[u8]| aml.windows(bytes.len()).any(|window| window == bytes);
        // EISAID("PNP0501"), EISAID("PNP0B00").
        assert!(has(&[0x0c, 0x41, 0xd0, 0x05, 0x01]));
        assert!(has(&[0x0c, 0x41, 0xd0, 0x0b, 0x00]));
        // I/O ports 0x3f8, eight; then an edge-triggered, active-high, exclusive interrupt 4.
        assert!(has(&[
            0x47, 1, 0xf8, 0x03, 0xf8, 0x03, 1, 8, 0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0,
        ]));
    }

    #[test]
    fn the_console_is_the_port_that_the_devices_answer() {
        let tables = Placed::new(1);
        let spcr = tables.table(tables.found_in_xsdt(2), b"SPCR");
        assert_eq!(spcr.len(), 80);
        // A 16550 in I/O space, at 0x3f8; line 4, of both controllers.
        assert_eq!(
            spcr[36..58],
            [
                0, 0, 0, 0, 1, 8, 0, 1, 0xf8, 3, 0, 0, 0, 0, 0, 0, 3, 4, 4, 0, 0, 0
            ]
        );
        // 115200 baud, no parity, one stop bit, no flow control, ANSI; no PCI device.
        assert_eq!(spcr[58..68], [7, 0, 1, 0, 3, 0, 0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn the_host_bridge_has_buses_and_ports_and_no_windows() {
        let dsdt = dsdt();
        let aml = dsdt.as_slice();
        // Word address space: bus numbers 0 to 255, consumed and produced nowhere else; then the
        // eight ports of mechanism 1, and the end tag.
        let resources: &[u8] = &[
            0x88, 13, 0, 2, 0x0c, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 1, //
            0x47, 1, 0xf8, 0x0c, 0xf8, 0x0c, 1, 8, 0x79,
        ];
        let at = |bytes: &[u8]| {
            aml.windows(bytes.len())
                .position(|window| window == bytes)
                .unwrap()
        };
        let identifier = at(&[0x0c, 0x41, 0xd0, 0x0a, 0x03]);
        assert!((identifier..at(b"COM1")).contains(&at(resources)));
    }

    #[test]
    fn the_tables_stay_in_the_reserved_area() {
        for vcpus in [1, 255, 1024] {
            let ram = Placed::new(vcpus).ram;
            assert!(
                ram[..0xe_0000]
                    .iter()
                    .chain(&ram[0x10_0000..])
                    .all(|byte| *byte == 0)
            );
        }
    }
}
