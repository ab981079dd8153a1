//! What a guest is told by `fw_cfg` ([`crate::devices::fw_cfg`]): its memory and CPUs, its ACPI
//! tables with a script that puts them into its memory, and a kernel for its firmware.

use super::acpi::{Fix, Part, TABLES_ALIGN, Tables};
use super::boot::bzimage;
use super::memory_map::{FOUR_GIB, MemoryMap, RangeKind};
use crate::arch::kernel_rom::kernel_rom;
use crate::devices::fw_cfg::{FwCfg, key};
use crate::devices::pc;
use alloc::vec::Vec;
use vireo_handoff::image;

/// The files, by the names that firmware looks for.
const E820: &str = "etc/e820";
const TABLES: &str = "etc/acpi/tables";
const ROOT_POINTER: &str = "etc/acpi/rsdp";
const LOADER: &str = "etc/table-loader";
/// A ROM by which a BIOS boots the kernel, and what it is to boot first.
const KERNEL_ROM: &str = "genroms/kernel.bin";
const BOOT_ORDER: &str = "bootorder";
const BOOT_FIRST: &[u8] = b"/rom@genroms/kernel.bin\0";
/// SeaBIOS shows there what it has no screen for.
const CONSOLE: &str = "etc/sercon-port";

/// Bytes of a file's name in the script, and of each of its commands.
const NAME: usize = 56;
const COMMAND: usize = 128;
/// Bytes at the end of memory that a BIOS has for its tables.
const FIRMWARE: u64 = 1 << 20;
/// Where a loader that has no idea of its own puts a kernel's parts, as QEMU says it.
const SETUP_ADDRESS: u32 = 0x1_0000;
const CMDLINE_ADDRESS: u32 = 0x2_0000;
const KERNEL_ADDRESS: u32 = 0x10_0000;

/// A kernel for the guest's firmware.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub image: &'static [u8],
    pub initrd: Option<&'static [u8]>,
    pub cmdline: &'static str,
}

/// What a guest with this memory and so many CPUs is told.
pub fn describe(map: &MemoryMap, vcpus: u32, kernel: Option<&Kernel>) -> FwCfg {
    let mut told = FwCfg::default();
    let ram = map.ram_below_4g() + map.ram_above_4g();
    told.add(key::RAM_SIZE, ram.to_le_bytes().to_vec());
    told.add(key::IRQ0_OVERRIDE, [1].to_vec());
    told.add(key::NO_GRAPHICS, 1u16.to_le_bytes().to_vec());
    for key in [key::CPUS, key::MAX_CPUS] {
        told.add(key, (vcpus as u16).to_le_bytes().to_vec());
    }
    if let Some(kernel) = kernel {
        describe_kernel(&mut told, kernel, map);
    }
    let tables = Tables::new(vcpus);
    told.add_file(CONSOLE, pc::COM1.to_le_bytes().to_vec());
    told.add_file(ROOT_POINTER, tables.rsdp.clone());
    told.add_file(TABLES, tables.tables.clone());
    told.add_file(E820, e820(map));
    told.add_file(LOADER, script(&tables));
    told
}

/// RAM as it is, before firmware takes its part of it: base, length, type.
fn e820(map: &MemoryMap) -> Vec<u8> {
    let mut bytes = Vec::new();
    let above = (FOUR_GIB, map.ram_above_4g());
    for (start, len) in [(0, map.ram_below_4g()), above] {
        if len > 0 {
            bytes.extend(u64::to_le_bytes(start));
            bytes.extend(len.to_le_bytes());
            bytes.extend((RangeKind::Ram as u32).to_le_bytes());
        }
    }
    bytes
}

fn describe_kernel(told: &mut FwCfg, kernel: &Kernel, map: &MemoryMap) {
    // Of a bzImage, the real-mode code comes apart.
    let split = image::bzimage_payload(kernel.image).unwrap_or(0);
    let (setup, protected) = kernel.image.split_at_checked(split).unwrap_or_default();
    told.add_number(key::SETUP_ADDRESS, SETUP_ADDRESS);
    told.add_number(key::SETUP_SIZE, setup.len() as u32);
    told.add(key::SETUP_DATA, setup);
    told.add_number(key::KERNEL_ADDRESS, KERNEL_ADDRESS);
    told.add_number(key::KERNEL_ENTRY, KERNEL_ADDRESS);
    told.add_number(key::KERNEL_SIZE, protected.len() as u32);
    told.add(key::KERNEL_DATA, protected);
    if let Some(initrd) = kernel.initrd {
        // As high as the kernel allows, below what the firmware has at the end of memory.
        let end =
            bzimage::initrd_end(kernel.image).min(map.ram_below_4g().saturating_sub(FIRMWARE));
        let address = end.saturating_sub(initrd.len() as u64) as u32 & !0xfff;
        told.add_number(key::INITRD_ADDRESS, address);
        told.add_number(key::INITRD_SIZE, initrd.len() as u32);
        told.add(key::INITRD_DATA, initrd);
    }
    let mut cmdline = kernel.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    told.add_number(key::CMDLINE_ADDRESS, CMDLINE_ADDRESS);
    told.add_number(key::CMDLINE_SIZE, cmdline.len() as u32);
    told.add(key::CMDLINE_DATA, cmdline);
    if split != 0 {
        told.add_file(KERNEL_ROM, kernel_rom().to_vec());
        told.add_file(BOOT_ORDER, BOOT_FIRST);
    }
}

/// Commands of the script (QEMU, `hw/acpi/bios-linker-loader.c`), each by its number.
mod command {
    /// File, alignment, and zone.
    pub const ALLOCATE: u32 = 1;
    /// File with the pointer, file that it points to, offset, and size.
    pub const ADD_POINTER: u32 = 2;
    /// File, offset of the sum, start, and length.
    pub const ADD_CHECKSUM: u32 = 3;
    /// Anywhere below 4 GiB, and where a kernel looks for the root pointer.
    pub const HIGH: u8 = 1;
    pub const FSEG: u8 = 2;
}

/// How firmware puts the tables into memory.
fn script(tables: &Tables) -> Vec<u8> {
    let mut script = Vec::new();
    let mut add = |number: u32, fields: &[&[u8]]| {
        let end = script.len() + COMMAND;
        script.extend(number.to_le_bytes());
        fields
            .iter()
            .for_each(|field| script.extend_from_slice(field));
        script.resize(end, 0);
    };
    for (part, align, zone) in [
        (Part::RootPointer, 16, command::FSEG),
        (Part::Tables, TABLES_ALIGN, command::HIGH),
    ] {
        let align = u32::to_le_bytes(align);
        add(command::ALLOCATE, &[&name(part), &align, &[zone]]);
    }
    for fix in &tables.fixes {
        match *fix {
            Fix::Pointer { part, offset, size } => add(
                command::ADD_POINTER,
                &[
                    &name(part),
                    &name(Part::Tables),
                    &offset.to_le_bytes(),
                    &[size],
                ],
            ),
            Fix::Checksum {
                part,
                offset,
                start,
                len,
            } => add(
                command::ADD_CHECKSUM,
                &[
                    &name(part),
                    &offset.to_le_bytes(),
                    &start.to_le_bytes(),
                    &len.to_le_bytes(),
                ],
            ),
        }
    }
    script
}

/// The name of a part's file, as long as the script has it.
fn name(part: Part) -> [u8; NAME] {
    let mut name = [0; NAME];
    let file = match part {
        Part::Tables => TABLES,
        Part::RootPointer => ROOT_POINTER,
    };
    for (to, from) in name.iter_mut().zip(file.bytes()) {
        *to = from;
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hpa;

    fn read(device: &mut FwCfg, len: usize) -> Vec<u8> {
        (0..len).map(|_| device.read()).collect()
    }

    fn item(device: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
        device.select(key);
        read(device, len)
    }

    /// The files by name, from the directory.
    fn files(device: &mut FwCfg) -> Vec<(String, Vec<u8>)> {
        let count = u32::from_be_bytes(item(device, key::DIRECTORY, 4).try_into().unwrap());
        let entries: Vec<Vec<u8>> = (0..count).map(|_| read(device, 64)).collect();
        entries
            .into_iter()
            .map(|entry| {
                let len = u32::from_be_bytes(entry[..4].try_into().unwrap());
                let key = u16::from_be_bytes(entry[4..6].try_into().unwrap());
                let name = String::from_utf8(entry[8..].to_vec()).unwrap();
                let name = name.trim_end_matches('\0').to_owned();
                (name, item(device, key, len as usize))
            })
            .collect()
    }

    /// What firmware does with the script, for files at these addresses.
    fn run(script: &[u8], rsdp: &mut [u8], tables: &mut [u8], address: u64) {
        let word = |command: &[u8], at: usize| {
            u32::from_le_bytes(command[at..at + 4].try_into().unwrap()) as usize
        };
        for command in script.chunks(128) {
            let is_tables = command[4..].starts_with(b"etc/acpi/tables\0");
            assert!(is_tables || command[4..].starts_with(b"etc/acpi/rsdp\0"));
            let file: &mut [u8] = if is_tables { tables } else { rsdp };
            match word(command, 0) {
                1 => {
                    let zone = command[64];
                    assert_eq!(
                        (word(command, 60), zone),
                        if is_tables { (64, 1) } else { (16, 2) }
                    );
                }
                2 => {
                    assert!(command[60..].starts_with(b"etc/acpi/tables\0"));
                    let (at, size) = (word(command, 116), usize::from(command[120]));
                    let mut number = [0; 8];
                    number[..size].copy_from_slice(&file[at..at + size]);
                    let number = u64::from_le_bytes(number) + address;
                    file[at..at + size].copy_from_slice(&number.to_le_bytes()[..size]);
                }
                3 => {
                    let (at, start, len) =
                        (word(command, 60), word(command, 64), word(command, 68));
                    assert_eq!(file[at], 0);
                    let sum = file[start..start + len]
                        .iter()
                        .fold(0u8, |a, b| a.wrapping_add(*b));
                    file[at] = 0u8.wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
    }

    #[test]
    fn memory_and_cpus_are_told() {
        let map = MemoryMap::new(Hpa(0), 5 << 30);
        let mut told = describe(&map, 3, None);
        assert_eq!(
            item(&mut told, key::RAM_SIZE, 8),
            (5u64 << 30).to_le_bytes()
        );
        assert_eq!(item(&mut told, key::CPUS, 2), [3, 0]);
        assert_eq!(item(&mut told, key::MAX_CPUS, 2), [3, 0]);
        let files = files(&mut told);
        let e820 = &files.iter().find(|file| file.0 == "etc/e820").unwrap().1;
        let expected: Vec<u8> = [(0, 3u64 << 30), (1 << 32, 2 << 30)]
            .iter()
            .flat_map(|(start, len): &(u64, u64)| {
                [&start.to_le_bytes()[..], &len.to_le_bytes(), &[1, 0, 0, 0]].concat()
            })
            .collect();
        assert_eq!(*e820, expected);
    }

    #[test]
    fn the_script_makes_the_tables_that_other_guests_find() {
        let mut ram = vec![0u8; 2 << 20];
        let map = MemoryMap::new(Hpa(ram.as_mut_ptr() as u64), 2 << 20);
        let memory = crate::vm::memory::GuestMemory::new(map.slots(), 0);
        let rsdp_at = crate::vm::acpi::write(&memory, 2).unwrap().0 as usize;
        let files = files(&mut describe(&map, 2, None));
        let file = |name: &str| files.iter().find(|file| file.0 == name).unwrap().1.clone();
        let (mut rsdp, mut tables) = (file("etc/acpi/rsdp"), file("etc/acpi/tables"));
        run(
            &file("etc/table-loader"),
            &mut rsdp,
            &mut tables,
            rsdp_at as u64 + 64,
        );
        assert_eq!(ram[rsdp_at..rsdp_at + rsdp.len()], rsdp);
        assert_eq!(ram[rsdp_at + 64..][..tables.len()], tables);
    }

    #[test]
    fn a_kernel_comes_in_its_two_parts() {
        let mut image = vec![0; 512 * 3 + 64];
        image[image::SETUP_SECTORS] = 2;
        image[image::SYSTEM_SIZE] = 4;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x22c..0x230].copy_from_slice(&0x37ff_ffffu32.to_le_bytes());
        image[512 * 3..].fill(0xab);
        let kernel = Kernel {
            image: image.leak(),
            initrd: Some(b"initrd"),
            cmdline: "quiet",
        };
        let map = MemoryMap::new(Hpa(0), 64 << 20);
        let mut told = describe(&map, 1, Some(&kernel));
        let mut number = |key| u32::from_le_bytes(item(&mut told, key, 4).try_into().unwrap());
        assert_eq!(
            (number(key::SETUP_SIZE), number(key::KERNEL_SIZE)),
            (1536, 64)
        );
        assert_eq!(
            (number(key::INITRD_SIZE), number(key::CMDLINE_SIZE)),
            (6, 6)
        );
        assert_eq!(number(key::INITRD_ADDRESS), (63 << 20) - 0x1000);
        assert_eq!(
            item(&mut told, key::KERNEL_DATA, 65),
            [&[0xab; 64][..], &[0]].concat()
        );
        assert_eq!(item(&mut told, key::INITRD_DATA, 6), b"initrd");
        assert_eq!(item(&mut told, key::CMDLINE_DATA, 6), b"quiet\0");
        assert_eq!(item(&mut told, key::IRQ0_OVERRIDE, 1), [1]);
        // A BIOS boots it first.
        let files = files(&mut told);
        let file = |name: &str| &files.iter().find(|file| file.0 == name).unwrap().1;
        assert_eq!(file("bootorder"), b"/rom@genroms/kernel.bin\0");
        assert_eq!(file("genroms/kernel.bin")[..2], [0x55, 0xaa]);
    }
}
