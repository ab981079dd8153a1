//! `fw_cfg`: items by bytes, and transfers, good and bad.

use vireo_test_guests::memory::{read8, read32, write32, write64};
use vireo_test_guests::port::{in8, in32, out16, out32};
use vireo_test_guests::{check_detail, check_equal, start_info};

const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const DMA: u16 = 0x514;
const ERROR: u32 = 1;
const READ: u32 = 1 << 1;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;
const CPUS: u32 = 5;
const RAM: u32 = 3;
/// Memory that is nobody's.
const REQUEST: u64 = 0x180_0000;
const BUFFER: u64 = 0x181_0000;
const NOWHERE: u64 = 0xd000_0000;
const IO_APIC: u64 = 0xfec0_0000;

pub fn check_all() {
    let item = |key: u32| -> [u8; 8] {
        out16(SELECTOR, key as u16);
        core::array::from_fn(|_| in8(DATA))
    };
    check_equal("fw_cfg has its signature", item(0), *b"QEMU\0\0\0\0");
    check_equal("fw_cfg can do transfers", item(1)[0], 3);
    check_equal("fw_cfg counts CPUs", item(CPUS)[..2] != [0, 0], true);
    let ram: u64 = start_info::memory_map()
        .filter(|range| range.2 == 1)
        .map(|range| range.0 + range.1)
        .max()
        .unwrap_or(0);
    check_equal(
        "fw_cfg tells the memory",
        u64::from_le_bytes(item(RAM)),
        ram,
    );
    check_equal(
        "fw_cfg answers at its request port",
        in32(DMA),
        u32::from_le_bytes(*b"QEMU"),
    );

    // From the end of one page on, and longer than the item: the rest is zeros.
    let to = BUFFER + 0x1000 - 3;
    write32(to + 0x2_0000, 0xffff_ffff);
    check_equal("a transfer", transfer(READ | SELECT, 0x2_0001, to), 0);
    let bytes: [u8; 5] = core::array::from_fn(|at| read8(to + at as u64));
    check_equal("its bytes", bytes, *b"QEMU\0");
    check_equal("its end", read32(to + 0x2_0000), 0xffff_ff00);
    for (name, control, length, address) in [
        ("a transfer to nowhere", READ, 4, NOWHERE),
        ("a transfer to a device", READ, 4, IO_APIC),
        ("a transfer behind all addresses", READ, 16, u64::MAX - 4),
        ("a transfer of 4 GiB", READ, u32::MAX, BUFFER),
        ("a transfer from memory", WRITE, 4, BUFFER),
    ] {
        check_equal(name, transfer(control, length, address), ERROR);
    }
    check_equal(
        "a transfer onto its request",
        transfer(READ | SELECT, 16, REQUEST),
        0,
    );
    for nowhere in [NOWHERE, IO_APIC, u64::MAX - 8] {
        request(nowhere);
    }
    let after = transfer(READ | SELECT, 4, BUFFER);
    check_detail(
        "requests at no memory are nothing",
        after == 0 && read32(BUFFER) == u32::from_le_bytes(*b"QEMU"),
        format_args!("{after:#x}"),
    );
}

/// Makes a request for item 0 and gives its outcome.
fn transfer(control: u32, length: u32, address: u64) -> u32 {
    write32(REQUEST, control.swap_bytes());
    write32(REQUEST + 4, length.swap_bytes());
    write64(REQUEST + 8, address.swap_bytes());
    request(REQUEST);
    read32(REQUEST).swap_bytes()
}

fn request(at: u64) {
    out32(DMA, ((at >> 32) as u32).swap_bytes());
    out32(DMA + 4, (at as u32).swap_bytes());
}
