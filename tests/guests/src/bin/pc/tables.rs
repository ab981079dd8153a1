//! What the guest was told: start info, memory map, ACPI tables.

use vireo_test_guests::memory::{read8, read16, read32, read64};
use vireo_test_guests::{
    acpi, apic, check, check_detail, check_equal, io_apic, report, start_info,
};

pub fn check_all() {
    check_equal(
        "PVH start info has its magic",
        start_info::magic(),
        start_info::MAGIC,
    );
    let ram: u64 = start_info::memory_map()
        .filter(|range| range.2 == 1)
        .map(|range| range.1)
        .sum();
    check_detail(
        "PVH memory map has the guest's memory",
        ram > 60 << 20,
        format_args!("{ram:#x} bytes"),
    );
    let mut end = 0;
    let sorted = start_info::memory_map().all(|(start, length, _)| {
        let ok = start >= end;
        end = start + length;
        ok
    });
    check("PVH memory map is sorted", sorted);

    let rsdp = start_info::rsdp();
    check_equal(
        "RSDP signature",
        read64(rsdp),
        u64::from_le_bytes(*b"RSD PTR "),
    );
    check(
        "RSDP checksums are right",
        acpi::checksum_is_right(rsdp, 20) && acpi::checksum_is_right(rsdp, read32(rsdp + 20)),
    );
    let xsdt = acpi::xsdt(rsdp);
    check_equal("XSDT signature", acpi::signature(xsdt), *b"XSDT");
    check(
        "XSDT checksum is right",
        acpi::checksum_is_right(xsdt, acpi::length(xsdt)),
    );
    let rsdt = acpi::rsdt(rsdp);
    check_equal("RSDT signature", acpi::signature(rsdt), *b"RSDT");
    check(
        "RSDT and its checksum are right",
        acpi::checksum_is_right(rsdt, acpi::length(rsdt))
            && acpi::rsdt_tables(rsdt).eq(acpi::tables(xsdt)),
    );
    check(
        "all tables' checksums are right",
        acpi::tables(xsdt).all(|table| acpi::checksum_is_right(table, acpi::length(table))),
    );
    fadt(xsdt);
    madt(xsdt);
}

fn fadt(xsdt: u64) {
    let Some(fadt) = acpi::find(xsdt, b"FACP") else {
        check("FADT is there", false);
        return;
    };
    check("FADT is there", true);
    let dsdt = match read64(fadt + 140) {
        0 => u64::from(read32(fadt + 40)),
        address => address,
    };
    check_equal("DSDT signature", acpi::signature(dsdt), *b"DSDT");
    check(
        "DSDT checksum is right",
        acpi::checksum_is_right(dsdt, acpi::length(dsdt)),
    );
    check_equal(
        "FADT names the PM1a control block",
        read32(fadt + 64),
        report::PM1A_CONTROL.into(),
    );
    check_equal("FADT names the PM timer", read32(fadt + 76), 0x608);
    check_equal("FADT names the SCI", read16(fadt + 46), 9);
    check_equal("FADT names the century", read8(fadt + 108), 0x32);
    check(
        "FADT says that the reset register works",
        read32(fadt + 112) & 1 << 10 != 0,
    );
}

fn madt(xsdt: u64) {
    let Some(madt) = acpi::find(xsdt, b"APIC") else {
        check("MADT is there", false);
        return;
    };
    check("MADT is there", true);
    check_equal(
        "MADT names the local APIC's page",
        u64::from(read32(madt + 36)),
        apic::BASE,
    );
    let (mut cpus, mut io_apics, mut timer_pin) = (0, 0, 0);
    let mut at = madt + 44;
    while at < madt + u64::from(acpi::length(madt)) {
        match read8(at) {
            0 => cpus += read32(at + 4) & 1,
            1 => io_apics += u32::from(u64::from(read32(at + 4)) == io_apic::BASE),
            2 if read8(at + 3) == 0 => timer_pin = read32(at + 4),
            _ => {}
        }
        at += u64::from(read8(at + 1).max(2));
    }
    check_equal(
        "MADT has one CPU, one I/O APIC, and the 8254 on pin 2",
        (cpus, io_apics, timer_pin),
        (1, 1, 2),
    );
}
