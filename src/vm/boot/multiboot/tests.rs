use super::*;
use crate::addr::Hpa;
use crate::vm::boot::{self, Module};
use crate::vm::memory_map::MemoryMap;
use proptest::prelude::*;
use vireo_handoff::config::Protocol;
use vireo_handoff::image::multiboot::HeaderError;

const RAM: usize = 8 << 20;
const KERNEL: u32 = 0x20_0000;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A header with these flags, and with `addresses` behind it.
fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let mut bytes = words(&[0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags)]);
    bytes.extend(words(addresses));
    bytes
}

/// A 32-bit ELF file: segments of (address, bytes in the file, bytes in memory), all filled
/// with their number from 1 up; the first begins with a header.
fn elf(entry: u32, segments: &[(u32, u32, u32)]) -> Vec<u8> {
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    file.extend(words(&[1, entry, 52, 0, 0]));
    for half in [52u16, 32, segments.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 52 + 32 * segments.len() as u32;
    for &(start, filled, size) in segments {
        file.extend(words(&[1, offset, start, start, filled, size, 7, 4]));
        offset += filled;
    }
    for (number, &(_, filled, _)) in (1u8..).zip(segments) {
        let from = file.len();
        file.resize(from + filled as usize, number);
        if number == 1 && filled >= 12 {
            file[from..from + 12].copy_from_slice(&header(0, &[]));
        }
    }
    file
}

/// A flat file of 256 bytes whose header, at 0x10, says where it belongs.
fn flat(addresses: [u32; 5]) -> Vec<u8> {
    let mut file = vec![0xcc; 16];
    file.extend(header(1 << 16, &addresses));
    file.resize(256, 0xcd);
    file
}

/// The address fields of [`flat`] at [`KERNEL`].
const PLACED: [u32; 5] = [KERNEL + 0x10, KERNEL, 0, 0, KERNEL + 0x30];

struct Guest {
    ram: Vec<u8>,
    modules: Vec<Module<'static>>,
    protocol: Protocol,
}

impl Guest {
    fn new() -> Self {
        Self {
            ram: vec![0x55; RAM],
            modules: Vec::new(),
            protocol: Protocol::Auto,
        }
    }

    fn load(&mut self, image: &[u8], line: &str) -> Result<EntryState, BootError> {
        let map = MemoryMap::new(Hpa(self.ram.as_mut_ptr() as u64), RAM as u64);
        let memory = crate::vm::memory::GuestMemory::new(map.slots(), 0);
        let images = Images {
            name: "kernel",
            cmdline: line,
            modules: self.modules.clone(),
            protocol: self.protocol,
            ..Images::of(image)
        };
        let machine = Machine {
            memory: &memory,
            map: &map,
            rsdp: Gpa(0xe_0000),
        };
        boot::load(&images, &machine)
    }

    fn u32(&self, at: u32) -> u32 {
        u32::from_le_bytes(self.ram[at as usize..][..4].try_into().unwrap())
    }

    fn text(&self, at: u32) -> &str {
        let bytes = &self.ram[at as usize..];
        let end = bytes.iter().position(|byte| *byte == 0).unwrap();
        core::str::from_utf8(&bytes[..end]).unwrap()
    }
}

fn error(image: &[u8]) -> BootError {
    Guest::new().load(image, "").unwrap_err()
}

#[test]
fn an_elf_file_is_loaded_and_started_with_the_magic_number() {
    let mut guest = Guest::new();
    let image = elf(
        KERNEL + 12,
        &[(KERNEL, 0x40, 0x1000), (KERNEL + 0x1000, 4, 4)],
    );
    let entry = guest.load(&image, "").unwrap();
    assert_eq!(
        (entry.mode, entry.rip, entry.rax),
        (EntryMode::Protected32, u64::from(KERNEL) + 12, 0x2bad_b002)
    );
    let start = KERNEL as usize;
    assert_eq!(guest.ram[start + 12..start + 0x40], [1; 0x34]);
    assert_eq!(guest.ram[start + 0x40..start + 0x1000], [0; 0xfc0]);
    assert_eq!(guest.ram[start + 0x1000..][..5], [2, 2, 2, 2, 0x55]);
}

#[test]
fn the_entry_is_where_the_segment_of_its_linked_address_is() {
    let mut image = elf(0xc000_000c, &[(KERNEL, 0x40, 0x40)]);
    // p_vaddr.
    image[52 + 8..52 + 12].copy_from_slice(&0xc000_0000_u32.to_le_bytes());
    assert_eq!(
        Guest::new().load(&image, "").unwrap().rip,
        u64::from(KERNEL) + 12
    );
}

#[test]
fn a_file_of_any_kind_goes_where_its_header_says() {
    let mut guest = Guest::new();
    let entry = guest.load(&flat(PLACED), "").unwrap();
    assert_eq!(entry.rip, u64::from(KERNEL) + 0x30);
    let start = KERNEL as usize;
    assert_eq!(guest.ram[start..][..256], flat(PLACED)[..]);
    assert_eq!(guest.ram[start + 256], 0x55);

    // Only a part of the file, and a page behind it cleared; as an ELF file, too.
    let [header, _, _, _, entry] = PLACED;
    let part = [header, KERNEL + 8, KERNEL + 0x40, KERNEL + 0x1000, entry];
    for magic in [[0xcc; 4], *b"\x7fELF"] {
        let mut guest = Guest::new();
        let mut image = flat(part);
        image[..4].copy_from_slice(&magic);
        guest.protocol = Protocol::Multiboot;
        guest.load(&image, "").unwrap();
        assert_eq!(guest.ram[start + 8..start + 0x40], image[8..0x40]);
        assert_eq!(guest.ram[start + 7], 0x55);
        assert_eq!(guest.ram[start + 0x40..start + 0x1000], [0; 0xfc0]);
    }
}

#[test]
fn the_boot_information_tells_of_memory_command_line_modules_loader_and_screen() {
    let mut guest = Guest::new();
    guest.modules = [&[1u8; 5000][..], &[2; 10]]
        .map(|bytes| Module {
            bytes,
            cmdline: "m a".into(),
        })
        .to_vec();
    let entry = guest
        .load(&elf(KERNEL, &[(KERNEL, 0x40, 0x1001)]), "quiet x")
        .unwrap();
    let info = entry.rbx as u32;
    let told = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 12;
    assert_eq!(guest.u32(info), told);
    assert_eq!((guest.u32(info + 4), guest.u32(info + 8)), (640, 7 * 1024));
    assert_eq!(guest.text(guest.u32(info + 16)), "kernel quiet x");
    assert_eq!(guest.text(guest.u32(info + 64)), "Vireo");
    let screen = [88, 92, 96, 100, 104, 108].map(|at| guest.u32(info + at));
    assert_eq!(screen, [0xb_8000, 0, 160, 80, 25, 0x0210]);
    assert_eq!(guest.u32(info + 20), 2);
    let list = guest.u32(info + 24);
    for (at, start, len, byte) in [
        (list, KERNEL + 0x2000, 5000, 1),
        (list + 16, KERNEL + 0x4000, 10, 2),
    ] {
        assert_eq!((guest.u32(at), guest.u32(at + 4)), (start, start + len));
        assert_eq!(
            guest.ram[start as usize..][..len as usize],
            vec![byte; len as usize]
        );
        assert_eq!(
            (guest.text(guest.u32(at + 8)), guest.u32(at + 12)),
            ("m a", 0)
        );
    }
    let (len, map) = (guest.u32(info + 44), guest.u32(info + 48));
    let told: Vec<[u32; 6]> = (map..map + len)
        .step_by(24)
        .map(|at| core::array::from_fn(|word| guest.u32(at + 4 * word as u32)))
        .collect();
    assert_eq!(
        told,
        [
            [20, 0, 0, 0xa_0000, 0, 1],
            [20, 0xe_0000, 0, 0x2_0000, 0, 2],
            [20, 0x10_0000, 0, 0x70_0000, 0, 1]
        ]
    );
}

#[test]
fn who_wishes_for_graphics_is_told_of_no_screen() {
    let mut guest = Guest::new();
    let [addresses @ .., entry] = PLACED;
    let mut file = vec![0xcc; 16];
    file.extend(header(1 << 16 | 1 << 2, &addresses));
    file.extend(words(&[entry, 0, 1024, 768, 32]));
    file.resize(256, 0xcd);
    let info = guest.load(&file, "").unwrap().rbx as u32;
    assert_eq!(guest.u32(info) & 1 << 12, 0);
    assert!((88..112).step_by(4).all(|at| guest.u32(info + at) == 0));
}

#[test]
fn interrupts_in_real_mode_end_at_once() {
    let mut guest = Guest::new();
    let entry = guest.load(&flat(PLACED), "").unwrap();
    assert!(entry.as_by_bios);
    for vector in [0, 7, 9, 0x10, 0x73, 0xff] {
        let place = guest.u32(4 * vector);
        let at = (place >> 16 << 4) + (place & 0xffff);
        assert_eq!(guest.ram[at as usize], 0xcf);
    }
    let timer = guest.u32(4 * 8);
    let at = ((timer >> 16 << 4) + (timer & 0xffff)) as usize;
    assert_eq!(guest.ram[at + 3..at + 7], [0xe6, 0x20, 0x58, 0xcf]);
}

#[test]
fn command_lines_begin_with_a_name() {
    assert_eq!(with_name("a", "b c"), "a b c");
    assert_eq!(with_name("a", ""), "a");
    assert_eq!(with_name("", "b"), "b");
}

#[test]
fn a_kernel_may_be_below_1_mib() {
    let mut guest = Guest::new();
    guest.modules = vec![Module {
        bytes: b"module",
        cmdline: "m".into(),
    }];
    let entry = guest
        .load(&elf(0x8010, &[(0x8000, 64, 0x8_6000)]), "")
        .unwrap();
    assert_eq!(guest.ram[0x8010], 1);
    assert_eq!(guest.ram[0x8_dfff], 0);
    let info = entry.rbx as u32;
    assert!(info >= 0x8_e000 && entry.rsp > 0x8_e000);
    assert_eq!(guest.u32(guest.u32(info + 24)), 0x10_0000);
}

#[test]
fn what_cannot_boot_is_named() {
    let have = RAM as u64;
    let start = u64::from(KERNEL);
    for (image, expected) in [
        // Overlapping segments, and one inside another.
        (
            elf(KERNEL, &[(KERNEL, 64, 64), (KERNEL + 63, 4, 4)]),
            BootError::OverlappingSegments {
                first: start,
                end: start + 64,
                second: start + 63,
            },
        ),
        (
            elf(KERNEL, &[(KERNEL, 64, 0x2000), (KERNEL + 8, 4, 4)]),
            BootError::OverlappingSegments {
                first: start,
                end: start + 0x2000,
                second: start + 8,
            },
        ),
        // Of 4 GiB, and wrapping round.
        (
            elf(KERNEL, &[(KERNEL, 64, u32::MAX)]),
            BootError::TooLittleMemory {
                need: start + u64::from(u32::MAX),
                have,
            },
        ),
        (
            elf(KERNEL, &[(KERNEL, 64, 64), (u32::MAX, 4, 4)]),
            BootError::TooLittleMemory {
                need: u64::from(u32::MAX) + 4,
                have,
            },
        ),
        (
            elf(KERNEL, &[(0x9_f000, 64, 64)]),
            BootError::LoadsTooLow { start: 0x9_f000 },
        ),
        (
            elf(KERNEL, &[(0x8_0000, 64, 0x8_0001)]),
            BootError::LoadsTooLow { start: 0x8_0000 },
        ),
        // Behind what the file fills, and far away.
        (
            elf(KERNEL + 64, &[(KERNEL, 64, 0x1000)]),
            BootError::EntryNotLoaded { entry: start + 64 },
        ),
        (
            elf(0x1000, &[(KERNEL, 64, 0x1000)]),
            BootError::EntryNotLoaded { entry: 0x1000 },
        ),
        (
            flat([KERNEL + 0x10, KERNEL, 0, 0, KERNEL + 256]),
            BootError::EntryNotLoaded { entry: start + 256 },
        ),
        (
            flat([KERNEL + 0x10, KERNEL, KERNEL + 257, 0, KERNEL]),
            BootError::Image(ImageError::Truncated {
                need: 257,
                have: 256,
            }),
        ),
        (
            flat([u32::MAX, u32::MAX - 16, 0, 0, KERNEL]),
            BootError::TooLittleMemory {
                need: u64::from(u32::MAX) - 16 + 256,
                have,
            },
        ),
        (
            flat([KERNEL + 0x10, KERNEL, 0, u32::MAX, KERNEL]),
            BootError::TooLittleMemory {
                need: u32::MAX.into(),
                have,
            },
        ),
        (
            words(&[
                0x1bad_b002,
                1 << 15,
                0u32.wrapping_sub(0x1bad_b002 + (1 << 15)),
            ]),
            BootError::Image(ImageError::Multiboot(HeaderError::Flags {
                unknown: 1 << 15,
            })),
        ),
        (
            header(0, &[]),
            BootError::Image(ImageError::NotOf(
                Protocol::Auto,
                Content::of(&header(0, &[])),
            )),
        ),
    ] {
        assert_eq!(error(&image), expected);
    }
    for wrong in [
        [KERNEL, KERNEL + 4, 0, 0, KERNEL],
        [KERNEL + 0x11, KERNEL, 0, 0, KERNEL],
        [KERNEL + 0x10, KERNEL, KERNEL - 1, 0, KERNEL],
        [KERNEL + 0x10, KERNEL, 0, KERNEL + 255, KERNEL],
    ] {
        assert!(matches!(
            error(&flat(wrong)),
            BootError::MultibootAddresses { .. }
        ));
    }
    let mut guest = Guest::new();
    assert!(matches!(
        guest.load(&flat(PLACED), &"x".repeat(4096)),
        Err(BootError::CommandLineTooLong { .. })
    ));
}

#[test]
fn modules_need_room() {
    let mut guest = Guest::new();
    let module = |len: usize, line: usize| Module {
        bytes: vec![7; len].leak(),
        cmdline: "x".repeat(line).into(),
    };
    let room = RAM - KERNEL as usize - 256;
    guest.modules = vec![module(room - 3840, 0), module(1, 0)];
    assert_eq!(
        guest.load(&flat(PLACED), ""),
        Err(BootError::ModulesTooLarge {
            size: room as u64 - 3839,
            room: room as u64
        })
    );
    guest.modules.pop();
    assert!(guest.load(&flat(PLACED), "").is_ok());
    assert_eq!(guest.ram[RAM - 1], 7);
    guest.modules = vec![module(0, 0); 5000];
    assert!(matches!(
        guest.load(&flat(PLACED), ""),
        Err(BootError::TooManyModules { count: 5000, .. })
    ));
    guest.modules = vec![module(0, 300_000), module(0, 300_000)];
    assert!(matches!(
        guest.load(&flat(PLACED), ""),
        Err(BootError::CommandLineTooLong { len: 600_000, .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The image is the user's: damage is an error, or an entry inside what was loaded, and
    /// nothing is written below 1 MiB but what the guest is told.
    #[test]
    fn a_damaged_file_is_no_disaster(
        is_elf: bool, changes in prop::collection::vec((0..160usize, any::<u8>()), 0..6),
        addresses in prop::array::uniform5(prop_oneof![
            any::<u32>(), KERNEL - 32..KERNEL + 300, Just(0),
        ]),
        len in 0..256usize,
    ) {
        let mut file = if is_elf {
            elf(addresses[0], &[(KERNEL, 64, addresses[1]), (addresses[2], 4, addresses[3])])
        } else {
            flat(addresses)
        };
        for (at, byte) in changes {
            let last = file.len() - 1;
            file[at.min(last)] = byte;
        }
        let mut guest = Guest::new();
        guest.protocol = Protocol::Multiboot;
        for image in [&file[..], &file[..len.min(file.len())]] {
            if let Ok(entry) = guest.load(image, "") {
                prop_assert!((0x1000..RAM as u64).contains(&entry.rip));
            }
            prop_assert!(guest.ram[0xe_0000..0xf_f000].iter().all(|byte| *byte == 0x55));
        }
    }
}
