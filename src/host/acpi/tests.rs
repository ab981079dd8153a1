use super::copy::HEADER;
use super::*;
use proptest::prelude::*;

/// Physical memory with tables in it, from address 0.
struct Memory(Vec<u8>);

impl Memory {
    fn read(&self, start: u64, len: usize) -> Option<Vec<u8>> {
        let start = usize::try_from(start).ok()?;
        self.0
            .get(start..start.checked_add(len)?)
            .map(<[u8]>::to_vec)
    }

    fn parse(&self) -> Platform {
        parse(0, |start, len| self.read(start, len))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

fn seal(table: &mut [u8], checksum: usize) {
    table[checksum] = 0;
    table[checksum] = table.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
}

fn sdt(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut table = vec![0; HEADER];
    table[..4].copy_from_slice(signature);
    table.extend_from_slice(body);
    let len = table.len() as u32;
    table[4..8].copy_from_slice(&len.to_le_bytes());
    seal(&mut table, 9);
    table
}

fn madt() -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend_from_slice(&[0, 8, 0, 0, 1, 0, 0, 0]); // a local APIC
    body.extend_from_slice(&[1, 12, 2, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    body.extend_from_slice(&[1, 12, 3, 0, 0, 0x10, 0xc0, 0xfe, 24, 0, 0, 0]);
    body.extend_from_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]); // IRQ 0 is input 2
    body.extend_from_slice(&[2, 10, 0, 9, 9, 0, 0, 0, 0x0f, 0]); // IRQ 9: low, level
    sdt(b"APIC", &body)
}

fn fadt(dsdt: u32) -> Vec<u8> {
    let mut body = vec![0; 244 - HEADER];
    let mut put = |at: usize, bytes: &[u8]| {
        body[at - HEADER..at - HEADER + bytes.len()].copy_from_slice(bytes)
    };
    put(40, &dsdt.to_le_bytes());
    put(48, &[0xb2, 0, 0, 0, 0xf1]);
    put(64, &[0x04, 0xb0]);
    put(76, &[0x08, 0xb0]);
    put(91, &[4]);
    put(112, &(1u32 << 8 | 1 << 10).to_le_bytes());
    put(116, &[1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6]);
    put(208, &[1, 32, 0, 3, 0x08, 0x06]);
    let mut fadt = sdt(b"FACP", &body);
    fadt[8] = 3; // the revision that brought generic addresses
    seal(&mut fadt, 9);
    fadt
}

const S5: &[u8] = b"\x10\x05\x08_S5_\x12\x07\x04\x0a\x05\x01\x00\x00";

fn machine() -> Memory {
    let mut memory = Memory(vec![0; 0x2000]);
    let mut rsdp = [0; 36];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[15] = 2;
    rsdp[20] = 36;
    rsdp[24..32].copy_from_slice(&0x100u64.to_le_bytes());
    seal(&mut rsdp[..20], 8);
    seal(&mut rsdp, 32);
    memory.put(0, &rsdp);
    let addresses: Vec<u8> = [0x200u64, 0x400, 0x9000_0000]
        .iter()
        .flat_map(|a| a.to_le_bytes())
        .collect();
    memory.put(0x100, &sdt(b"XSDT", &addresses));
    memory.put(0x200, &madt());
    memory.put(0x400, &fadt(0x800));
    memory.put(0x800, &sdt(b"DSDT", S5));
    memory
}

#[test]
fn reads_what_the_tables_say_and_survives_a_pointer_to_nowhere() {
    let platform = machine().parse();
    let io_apic = |address, base| IoApicEntry { address, base };
    assert_eq!(
        platform.io_apics,
        [io_apic(0xfec0_0000, 0), io_apic(0xfec0_1000, 24)]
    );
    assert_eq!(
        platform.isa[0],
        Route {
            gsi: 2,
            active_low: false,
            level: false
        }
    );
    assert_eq!(
        platform.isa[4],
        Route {
            gsi: 4,
            active_low: false,
            level: false
        }
    );
    assert_eq!(
        platform.isa[9],
        Route {
            gsi: 9,
            active_low: true,
            level: true
        }
    );
    // The generic address wins over the older field.
    assert_eq!(
        platform.pm_timer,
        Some(PmTimer {
            port: 0x608,
            wide: true
        })
    );
    assert_eq!(
        platform.sleep,
        Some(SleepRegister {
            pm1a: 0xb004,
            pm1b: None,
            type_a: 5,
            type_b: 1,
            enable: Some((0xb2, 0xf1))
        })
    );
}

#[test]
fn a_broken_checksum_costs_that_table_only() {
    let mut memory = machine();
    memory.0[0x210] ^= 1;
    let platform = memory.parse();
    assert_eq!(platform.io_apics, Platform::default().io_apics);
    assert!(platform.sleep.is_some());
    memory.0[0x800 + HEADER] ^= 1;
    assert_eq!(memory.parse().sleep, None);
    memory.0[0] = b'X';
    assert_eq!(memory.parse(), Platform::default());
}

#[test]
fn a_madt_with_an_entry_that_leaves_it_is_not_used() {
    let io_apic = [1, 12, 2, 0, 0, 0, 0xc1, 0xfe, 0, 0, 0, 0];
    for (tail, used) in [
        (&[][..], true),
        (&[1, 0], false),
        (&[1, 0, 0, 0], false),
        (&[1, 4, 0, 0], false),
        (&[9, 40], false),
        (&[0x7f, 4, 0, 0], true),
    ] {
        let mut memory = machine();
        let body = [&[0; 8][..], &io_apic, tail].concat();
        memory.put(0x200, &sdt(b"APIC", &body));
        let address = memory.parse().io_apics[0].address;
        assert_eq!(address == 0xfec1_0000, used, "{tail:?}");
    }
}

#[test]
fn tables_shorter_than_their_header_are_not_used() {
    for (at, len) in [(0x100, 8u32), (0x200, 40), (0x400, 35), (0x800, 0)] {
        let mut memory = machine();
        memory.put(at + 4, &len.to_le_bytes());
        memory.parse();
    }
    let mut memory = machine();
    memory.put(20, &u32::MAX.to_le_bytes());
    assert_eq!(memory.parse(), Platform::default());
}

#[test]
fn s5_is_found_in_its_usual_forms_and_not_in_others() {
    assert_eq!(s5_types(S5), Some((5, 1)));
    assert_eq!(
        s5_types(b"\x08\\_S5_\x12\x06\x04\x00\x00\x00\x00"),
        Some((0, 0))
    );
    // A package length of two bytes, a word constant.
    assert_eq!(
        s5_types(b"\x08_S5_\x12\x40\x01\x04\x0b\x07\x00\x0a\x07"),
        Some((7, 7))
    );
    assert_eq!(s5_types(b"\x14_S5_\x12\x06\x04\x00\x00"), None, "a method");
    assert_eq!(
        s5_types(b"\x08_S5_\x12\x06\x04\x0a\x40\x00"),
        None,
        "no sleep type"
    );
    assert_eq!(s5_types(b"\x08_S5_\x12\x06"), None);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(offset in 0usize..0x1000, noise in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut memory = machine();
        memory.put(offset, &noise);
        memory.parse();
        // Again with checksums that are right.
        for (table, most) in [(0x100, 0x100), (0x200, 0x200), (0x400, 0x400), (0x800, 0x200)] {
            let len = u32::from_le_bytes(memory.0[table + 4..table + 8].try_into().unwrap());
            if let Some(bytes) = memory.0.get_mut(table..table + (len as usize).clamp(10, most)) {
                seal(bytes, 9);
            }
        }
        memory.parse();
        s5_types(&noise);
    }

    #[test]
    fn s5_with_any_tail_does_not_panic(tail in prop::collection::vec(any::<u8>(), 0..12)) {
        let mut aml = b"\x08_S5_\x12".to_vec();
        aml.extend(tail);
        s5_types(&aml);
    }
}
