//! The Linux boot protocol (Linux, `Documentation/arch/x86/boot.rst`), past the kernel's
//! real-mode code: in 64-bit mode where the kernel has such an entry point, else in 32-bit
//! protected mode.

use super::placement::{self, CodeSegment, Initrd, Places, Selectors};
use super::{BootError, EntryMode, EntryState, Images, Machine};
use crate::addr::Gpa;
use crate::devices::vga::TextMode;
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::HIGH_RAM;
use vireo_handoff::image::{self, ImageError};

const PLACES: Places = Places::USUAL;
const PARAMETERS: Gpa = PLACES.parameters;

/// Offsets in the set-up header, the same in the image and in the boot parameters.
mod header {
    pub const JUMP_LENGTH: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOAD_FLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const HEAP_END: usize = 0x224;
    pub const COMMAND_LINE: usize = 0x228;
    pub const INITRD_MAX: usize = 0x22c;
    pub const COMMAND_LINE_SIZE: usize = 0x238;
    pub const PREFERRED_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
}

/// Offsets in the boot parameters outside the header.
mod parameters {
    /// BIOS mode of the screen, columns, and rows.
    pub const VIDEO_MODE: usize = 0x06;
    pub const VIDEO_COLUMNS: usize = 0x07;
    pub const VIDEO_LINES: usize = 0x0e;
    /// 1 for a VGA that shows text.
    pub const VIDEO_IS_VGA: usize = 0x0f;
    /// Scan lines of a row.
    pub const VIDEO_POINTS: usize = 0x10;
    pub const ACPI_RSDP: usize = 0x70;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const E820_TABLE: usize = 0x2d0;
    pub const E820_ENTRY: usize = 20;
}

/// A VGA in text mode 3.
const SCREEN: [(usize, u8); 5] = [
    (parameters::VIDEO_MODE, 3),
    (parameters::VIDEO_COLUMNS, TextMode::FIRST.columns as u8),
    (parameters::VIDEO_LINES, TextMode::FIRST.rows as u8),
    (parameters::VIDEO_IS_VGA, 1),
    (parameters::VIDEO_POINTS, 16),
];
const HEADER_START: usize = 0x1f1;
/// Longest header that fits between its start and the E820 table.
const HEADER_END_LIMIT: usize = 0x290;
/// The first version that says how long a command line may be.
const VERSION_2_06: u16 = 0x0206;
/// The first with a preferred address and a size in memory.
const VERSION_2_10: u16 = 0x020a;
const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 0x80;
const UNASSIGNED_LOADER: u8 = 0xff;
/// The entry points, from the start of the loaded kernel.
const ENTRY_32: u64 = 0;
const ENTRY_64: u64 = 0x200;
/// Where kernels are loaded that do not say where.
const LOW_LOAD: u64 = 0x1_0000;

fn bytes<const N: usize>(image: &[u8], offset: usize) -> Result<[u8; N], BootError> {
    image
        .get(offset..offset + N)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(BootError::Image(ImageError::Truncated {
            need: HEADER_END_LIMIT as u64,
            have: image.len() as u64,
        }))
}

fn word(image: &[u8], offset: usize) -> Result<u16, BootError> {
    bytes(image, offset).map(u16::from_le_bytes)
}

fn dword(image: &[u8], offset: usize) -> Result<u32, BootError> {
    bytes(image, offset).map(u32::from_le_bytes)
}

/// What of the header decides where things go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// First byte of the part that is loaded.
    payload: usize,
    /// One past the header in the image.
    end: usize,
    has_64_bit_entry: bool,
    preferred_address: u64,
    init_size: u64,
    initrd_max: u64,
    command_line_size: usize,
}

impl Header {
    fn read(image: &[u8]) -> Result<Self, BootError> {
        let payload = image::bzimage_payload(image)?;
        let version = word(image, image::PROTOCOL_VERSION)?;
        if version < VERSION_2_06 {
            return Err(BootError::OldProtocol { version });
        }
        let [flags] = bytes(image, header::LOAD_FLAGS)?;
        let (preferred_address, init_size) = if version >= VERSION_2_10 {
            (
                u64::from_le_bytes(bytes(image, header::PREFERRED_ADDRESS)?),
                dword(image, header::INIT_SIZE)?.into(),
            )
        } else if flags & LOADED_HIGH != 0 {
            (HIGH_RAM, 0)
        } else {
            (LOW_LOAD, 0)
        };
        let [length] = bytes(image, header::JUMP_LENGTH)?;
        Ok(Self {
            payload,
            end: (header::MAGIC + usize::from(length)).min(HEADER_END_LIMIT),
            has_64_bit_entry: !image::is_32_bit_linux(image),
            preferred_address,
            init_size,
            initrd_max: dword(image, header::INITRD_MAX)?.into(),
            command_line_size: dword(image, header::COMMAND_LINE_SIZE)? as usize,
        })
    }
}

/// Where an initrd is to end at the latest, as far as the kernel cares.
pub fn initrd_end(image: &[u8]) -> u64 {
    dword(image, header::INITRD_MAX).map_or(u64::MAX, |last| u64::from(last) + 1)
}

/// Loads a bzImage.
///
/// # Errors
/// Why the image cannot be booted in this guest.
pub fn load(images: &Images, machine: &Machine) -> Result<EntryState, BootError> {
    if !images.modules.is_empty() {
        return Err(BootError::NoModules);
    }
    let (image, memory) = (images.kernel, machine.memory);
    let header = Header::read(image)?;
    let ram_end = machine.map.ram_below_4g();
    let payload = image.get(header.payload..).unwrap_or_default();

    if header.preferred_address < HIGH_RAM {
        return Err(BootError::LoadsTooLow {
            start: header.preferred_address,
        });
    }
    // Not lower than preferred, though a kernel may be relocatable: Linux would move itself up to
    // its preferred address all the same.
    let start = Gpa(header.preferred_address);
    // The kernel unpacks itself in `init_size` bytes from where it runs.
    let room = header.init_size.max(payload.len() as u64);
    let kernel_end = start.checked_add(room).unwrap_or(Gpa(u64::MAX)).0;
    if kernel_end > ram_end {
        return Err(BootError::TooLittleMemory {
            need: kernel_end,
            have: ram_end,
        });
    }
    memory.write(start, payload)?;

    placement::write_command_line(memory, &PLACES, images.cmdline, header.command_line_size)?;
    let initrd = match images.initrd {
        None => None,
        Some(initrd) => {
            let end = ram_end.min(header.initrd_max.saturating_add(1));
            Some(placement::write_initrd(memory, initrd, kernel_end, end)?)
        }
    };
    write_parameters(image, &header, initrd, machine)?;
    let (mode, code, entry) = if header.has_64_bit_entry {
        let cr3 = write_identity_map(memory)?;
        (EntryMode::Long64 { cr3 }, CodeSegment::Bits64, ENTRY_64)
    } else {
        (EntryMode::Protected32, CodeSegment::Bits32, ENTRY_32)
    };
    Ok(EntryState {
        mode,
        rip: start.0 + entry,
        rsp: PLACES.stack(),
        rax: 0,
        rsi: PARAMETERS.0,
        rbx: 0,
        segments: placement::write_gdt(memory, &PLACES, Selectors::LINUX, code)?,
        as_by_bios: false,
    })
}

fn write_parameters(
    image: &[u8],
    header: &Header,
    initrd: Option<Initrd>,
    machine: &Machine,
) -> Result<(), BootError> {
    let memory = machine.memory;
    let at = |offset: usize| Gpa(PARAMETERS.0 + offset as u64);
    memory.fill(PARAMETERS, 4096, 0)?;
    let own = image.get(HEADER_START..header.end).unwrap_or_default();
    memory.write(at(HEADER_START), own)?;
    memory.write(at(header::TYPE_OF_LOADER), &[UNASSIGNED_LOADER])?;
    let [flags] = bytes(image, header::LOAD_FLAGS)?;
    memory.write(at(header::LOAD_FLAGS), &[flags & !CAN_USE_HEAP])?;
    memory.write(at(header::HEAP_END), &[0; 2])?;
    memory.write(
        at(header::COMMAND_LINE),
        &(PLACES.command_line.start as u32).to_le_bytes(),
    )?;
    if let Some(initrd) = initrd {
        memory.write(at(header::RAMDISK_IMAGE), &initrd.start.to_le_bytes())?;
        memory.write(at(header::RAMDISK_SIZE), &initrd.len.to_le_bytes())?;
    }
    for (offset, value) in SCREEN {
        memory.write(at(offset), &[value])?;
    }
    memory.write(at(parameters::ACPI_RSDP), &machine.rsdp.0.to_le_bytes())?;
    let ranges = machine.map.ranges();
    memory.write(at(parameters::E820_ENTRIES), &[ranges.len() as u8])?;
    for (index, range) in ranges.iter().enumerate() {
        let entry = parameters::E820_TABLE + index * parameters::E820_ENTRY;
        memory.write(at(entry), &range.start.0.to_le_bytes())?;
        memory.write(at(entry + 8), &range.len.to_le_bytes())?;
        memory.write(at(entry + 16), &(range.kind as u32).to_le_bytes())?;
    }
    Ok(())
}

/// Page tables that map the first 4 GiB to themselves; their root.
fn write_identity_map(memory: &GuestMemory) -> Result<Gpa, OutOfSlot> {
    const TABLE: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let root = Gpa(PLACES.tables.start);
    let pointers = Gpa(root.0 + TABLE);
    memory.fill(root, 2 * TABLE, 0)?;
    memory.write(root, &(pointers.0 | PRESENT_WRITABLE).to_le_bytes())?;
    for gigabyte in 0..4 {
        let directory = pointers.0 + TABLE * (1 + gigabyte);
        memory.write(
            Gpa(pointers.0 + 8 * gigabyte),
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        for page in 0..512 {
            let address = gigabyte << 30 | page << 21;
            memory.write(
                Gpa(directory + 8 * page),
                &(address | PRESENT_WRITABLE | LARGE).to_le_bytes(),
            )?;
        }
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hpa;
    use crate::vm::memory_map::MemoryMap;
    use proptest::prelude::*;

    const RAM: usize = 8 << 20;

    fn image() -> Vec<u8> {
        let mut image = vec![0u8; 512 * 3 + 64];
        image[image::SETUP_SECTORS] = 2;
        image[image::SYSTEM_SIZE..][..4].copy_from_slice(&4u32.to_le_bytes());
        image[0x1fe..][..2].copy_from_slice(&[0x55, 0xaa]);
        image[header::JUMP_LENGTH] = 0x6a;
        image[header::MAGIC..][..4].copy_from_slice(b"HdrS");
        image[image::PROTOCOL_VERSION..][..2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[image::XLOADFLAGS] = 1;
        image[header::LOAD_FLAGS] = 0x81;
        image[header::INITRD_MAX..][..4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[header::COMMAND_LINE_SIZE..][..4].copy_from_slice(&2047u32.to_le_bytes());
        image[header::PREFERRED_ADDRESS..][..8].copy_from_slice(&0x10_0000u64.to_le_bytes());
        image[header::INIT_SIZE..][..4].copy_from_slice(&0x20_0000u32.to_le_bytes());
        image[512 * 3..].fill(0xab);
        image
    }

    struct Guest {
        ram: Vec<u8>,
    }

    impl Guest {
        fn load(
            &mut self,
            image: &[u8],
            initrd: Option<&[u8]>,
            cmdline: &str,
        ) -> Result<EntryState, BootError> {
            let block = self.ram.as_mut_ptr() as u64;
            let map = MemoryMap::new(Hpa(block), self.ram.len() as u64);
            let memory = GuestMemory::new(map.slots(), 0);
            let images = Images {
                initrd,
                cmdline,
                ..Images::of(image)
            };
            let machine = Machine {
                memory: &memory,
                map: &map,
                rsdp: Gpa(0xe_0000),
            };
            load(&images, &machine)
        }

        fn at<const N: usize>(&self, gpa: usize) -> [u8; N] {
            self.ram[gpa..gpa + N].try_into().unwrap()
        }
    }

    fn guest() -> Guest {
        Guest { ram: vec![0; RAM] }
    }

    #[test]
    fn kernel_initrd_and_parameters_are_where_the_protocol_says() {
        let mut guest = guest();
        let initrd = vec![0xcd; 5000];
        let entry = guest.load(&image(), Some(&initrd), "quiet").unwrap();
        assert_eq!(entry.rip, 0x10_0200);
        assert_eq!(guest.at(0x10_0000), [0xab; 64]);
        let zero = entry.rsi as usize;
        assert_eq!(guest.at(zero + header::MAGIC), *b"HdrS");
        assert_eq!(guest.at(zero + header::TYPE_OF_LOADER), [0xff, 0x01]);
        let line = u32::from_le_bytes(guest.at(zero + header::COMMAND_LINE)) as usize;
        assert_eq!(guest.at(line), *b"quiet\0");
        let at = u32::from_le_bytes(guest.at(zero + header::RAMDISK_IMAGE)) as usize;
        assert_eq!(at % 4096, 0);
        assert!(at + 5000 <= RAM && at >= 0x30_0000);
        assert_eq!(guest.ram[at..at + 5000], initrd[..]);
        // Text mode 3 of a VGA: 80 by 25, 16 scan lines a row.
        assert_eq!(guest.at(zero + 6), [3, 80]);
        assert_eq!(guest.at(zero + 14), [25, 1, 16, 0]);
        assert_eq!(u64::from_le_bytes(guest.at(zero + 0x70)), 0xe_0000);
    }

    #[test]
    fn the_parameters_hold_the_memory_map_and_the_header_of_the_image() {
        let mut guest = guest();
        let image = image();
        // What was in memory before must not reach the kernel as a parameter.
        guest.ram.fill(0x55);
        let zero = guest.load(&image, None, "").unwrap().rsi as usize;
        let number = |at: usize| u64::from_le_bytes(guest.at(zero + at));
        assert_eq!(guest.ram[zero + 0x1e8], 3);
        let told: Vec<_> = (0..3)
            .map(|index| 0x2d0 + 20 * index)
            .map(|at| (number(at), number(at + 8), guest.ram[zero + at + 16]))
            .collect();
        let high = RAM as u64 - 0x10_0000;
        assert_eq!(
            told,
            [
                (0, 0xa_0000, 1),
                (0xe_0000, 0x2_0000, 2),
                (0x10_0000, high, 1)
            ]
        );
        let header_end = 0x202 + 0x6a;
        assert_eq!(
            guest.ram[zero + 0x22c..zero + header_end],
            image[0x22c..header_end]
        );
        assert_eq!(guest.at(zero + header::RAMDISK_IMAGE), [0; 8]);
        assert!(
            guest.ram[zero + header_end..zero + 0x2d0]
                .iter()
                .all(|byte| *byte == 0)
        );
    }

    #[test]
    fn the_selectors_are_those_of_the_protocol() {
        let mut guest = guest();
        let entry = guest.load(&image(), None, "").unwrap();
        assert_eq!(
            (entry.segments.code_selector, entry.segments.data_selector),
            (0x10, 0x18)
        );
        let gdt = entry.segments.gdt_base.0 as usize;
        assert_eq!(entry.segments.gdt_limit, 0x1f);
        // Present, accessed; the code segment has L set and D clear.
        assert_eq!(
            u64::from_le_bytes(guest.at(gdt + 0x10)),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            u64::from_le_bytes(guest.at(gdt + 0x18)),
            0x00cf_9300_0000_ffff
        );
    }

    #[test]
    fn a_32_bit_kernel_starts_at_its_first_byte_without_paging() {
        let mut narrow = image();
        narrow[image::XLOADFLAGS] = 0;
        // An older protocol has neither the flags nor the addresses.
        let mut old = image();
        old[image::PROTOCOL_VERSION] = 0x06;
        old[header::PREFERRED_ADDRESS..][..12].fill(0xff);
        for image in [narrow, old] {
            let mut guest = guest();
            let entry = guest.load(&image, Some(&[1; 10]), "quiet").unwrap();
            assert_eq!(
                (entry.mode, entry.rip, entry.rsi),
                (EntryMode::Protected32, 0x10_0000, PARAMETERS.0)
            );
            assert_eq!((entry.rbx, entry.segments.code_selector), (0, 0x10));
            let gdt = entry.segments.gdt_base.0 as usize;
            assert_eq!(
                u64::from_le_bytes(guest.at(gdt + 0x10)),
                0x00cf_9b00_0000_ffff
            );
            assert_eq!(guest.at(0x10_0000), [0xab; 64]);
        }
    }

    #[test]
    fn the_initrd_ends_below_the_limit_of_the_kernel() {
        let mut guest = guest();
        let mut image = image();
        let limit = 0x4f_ffffu32;
        image[header::INITRD_MAX..][..4].copy_from_slice(&limit.to_le_bytes());
        let initrd = vec![0xcd; 0x20_0000];
        let zero = guest.load(&image, Some(&initrd), "").unwrap().rsi as usize;
        // The kernel ends at 3 MiB: just enough room.
        assert_eq!(
            u32::from_le_bytes(guest.at(zero + header::RAMDISK_IMAGE)),
            0x30_0000
        );
        assert_eq!(
            guest.load(&image, Some(&[0; 0x20_0001]), ""),
            Err(BootError::InitrdTooLarge {
                size: 0x20_0001,
                room: 0x20_0000
            })
        );
    }

    #[test]
    fn the_page_tables_map_four_gigabytes_to_themselves() {
        let mut guest = guest();
        let EntryMode::Long64 { cr3 } = guest.load(&image(), None, "").unwrap().mode else {
            panic!("not long mode");
        };
        let entry =
            |table: u64, index: usize| u64::from_le_bytes(guest.at(table as usize + 8 * index));
        let pointers = entry(cr3.0, 0) & !0xfff;
        for (gigabyte, page) in [(0, 0), (1, 511), (3, 511)] {
            let directory = entry(pointers, gigabyte) & !0xfff;
            let expected = (gigabyte as u64) << 30 | (page as u64) << 21;
            assert_eq!(entry(directory, page), expected | 0x83);
        }
    }

    #[test]
    fn what_cannot_boot_is_named() {
        let mut guest = guest();
        let mut load = |image: &[u8], initrd: Option<&[u8]>, line: &str| {
            guest.load(image, initrd, line).unwrap_err()
        };
        assert_eq!(
            load(b"#!/bin/sh", None, ""),
            BootError::Image(ImageError::NotAKernel(image::Content::Text))
        );
        let good = image();
        // Cut off inside the header.
        assert_eq!(
            load(&good[..520], None, ""),
            BootError::Image(ImageError::Truncated {
                need: 1600,
                have: 520
            })
        );
        assert_eq!(
            load(&good[..512 * 3 + 10], None, ""),
            BootError::Image(ImageError::Truncated {
                need: 1600,
                have: 1546
            })
        );
        let mut old = good.clone();
        old[image::PROTOCOL_VERSION] = 0x05;
        assert_eq!(
            load(&old, None, ""),
            BootError::OldProtocol { version: 0x205 }
        );
        old[image::PROTOCOL_VERSION] = 0x06;
        old[header::LOAD_FLAGS] = 0;
        assert_eq!(
            load(&old, None, ""),
            BootError::LoadsTooLow { start: 0x1_0000 }
        );
        let mut low = good.clone();
        low[header::PREFERRED_ADDRESS + 2] = 0;
        assert_eq!(load(&low, None, ""), BootError::LoadsTooLow { start: 0 });
        let mut large = good.clone();
        large[header::INIT_SIZE + 3] = 1;
        assert!(matches!(
            load(&large, None, ""),
            BootError::TooLittleMemory { .. }
        ));
        let initrd = vec![0; 6 << 20];
        assert_eq!(
            load(&good, Some(&initrd), ""),
            BootError::InitrdTooLarge {
                size: 6 << 20,
                room: 5 << 20
            }
        );
        let line = "x".repeat(2048);
        assert!(matches!(
            load(&good, None, &line),
            BootError::CommandLineTooLong { len: 2048, .. }
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// The image is the user's: damage is an error, or an entry inside the guest's memory.
        #[test]
        fn a_damaged_file_is_no_disaster(
            changes in prop::collection::vec((0x1f1..0x290usize, any::<u8>()), 0..8),
            len in 0..1700usize, initrd in 0..0x60_0000usize,
        ) {
            let mut image = image();
            for (at, byte) in changes {
                image[at] = byte;
            }
            image[header::MAGIC..][..4].copy_from_slice(b"HdrS");
            let mut guest = guest();
            for image in [&image[..], &image[..len.min(image.len())]] {
                if let Ok(entry) = guest.load(image, Some(&vec![1; initrd]), "") {
                    prop_assert!((0x10_0000..RAM as u64).contains(&entry.rip));
                }
            }
        }
    }
}
