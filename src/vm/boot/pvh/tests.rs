use super::*;
use crate::addr::Hpa;
use crate::vm::boot::{self, Module};
use crate::vm::memory_map::MemoryMap;
use proptest::prelude::*;
use vireo_handoff::image::ImageError;

const RAM: usize = 8 << 20;
const CODE: [u8; 100] = [0xab; 100];
const KERNEL: u64 = 0x20_0000;

/// An ELF file of either class: a note, and `CODE` at `start`, `size` bytes in memory.
struct File {
    class_64: bool,
    start: u64,
    size: u64,
    note: (&'static [u8; 4], u32),
    /// The note's descriptor, one address long.
    entry: u64,
}

impl Default for File {
    fn default() -> Self {
        Self {
            class_64: true,
            start: KERNEL,
            size: 0x3000,
            note: (b"Xen\0", 18),
            entry: KERNEL + 0x10,
        }
    }
}

impl File {
    fn build(&self) -> Vec<u8> {
        const NOTE_AT: u64 = 0x100;
        const CODE_AT: u64 = 0x200;
        let address =
            |value: u64| value.to_le_bytes()[..if self.class_64 { 8 } else { 4 }].to_vec();
        let word = |value: u32| value.to_le_bytes().to_vec();
        let half = |value: u16| value.to_le_bytes().to_vec();

        let desc = address(self.entry);
        let note = [
            word(4),
            word(desc.len() as u32),
            word(self.note.1),
            self.note.0.to_vec(),
            desc,
        ]
        .concat();
        let program_header = |kind: u32, offset: u64, at: u64, file: u64, memory: u64| {
            let (flags, place) = (
                word(5),
                [
                    address(offset),
                    address(!at),
                    address(at),
                    address(file),
                    address(memory),
                ]
                .concat(),
            );
            // The flags stand elsewhere in the two classes.
            if self.class_64 {
                [word(kind), flags, place, address(4)].concat()
            } else {
                [word(kind), place, flags, address(4)].concat()
            }
        };
        let (header, entry_size) = if self.class_64 { (64, 56) } else { (52, 32) };
        let len = note.len() as u64;
        let mut file = [
            vec![0x7f, b'E', b'L', b'F', 1 + u8::from(self.class_64), 1, 1],
            vec![0; 9],
            half(2),
            half(if self.class_64 { 62 } else { 3 }),
            word(1),
            address(0xdead),
            address(header),
            address(0),
            word(0),
            half(header as u16),
            half(entry_size),
            half(2),
            half(0),
            half(0),
            half(0),
        ]
        .concat();
        assert_eq!(file.len() as u64, header);
        file.extend(program_header(4, NOTE_AT, 0, len, len));
        file.extend(program_header(
            1,
            CODE_AT,
            self.start,
            CODE.len() as u64,
            self.size,
        ));
        file.resize(NOTE_AT as usize, 0);
        file.extend(note);
        file.resize(CODE_AT as usize, 0);
        file.extend(CODE);
        file
    }
}

struct Guest(Vec<u8>, Vec<Module<'static>>);

impl Guest {
    /// Memory that is not zero, so that what must be cleared is seen.
    fn new() -> Self {
        Self(vec![0x55; RAM], Vec::new())
    }

    fn load(
        &mut self,
        image: &[u8],
        initrd: Option<&[u8]>,
        line: &str,
    ) -> Result<EntryState, BootError> {
        let map = MemoryMap::new(Hpa(self.0.as_mut_ptr() as u64), RAM as u64);
        let memory = GuestMemory::new(map.slots(), 0);
        let images = Images {
            initrd,
            cmdline: line,
            modules: self.1.clone(),
            ..Images::of(image)
        };
        let machine = Machine {
            memory: &memory,
            map: &map,
            rsdp: Gpa(0xe_0000),
        };
        boot::load(&images, &machine)
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.0[at as usize..][..4].try_into().unwrap())
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.0[at as usize..][..8].try_into().unwrap())
    }
}

#[test]
fn segments_are_loaded_and_cleared_in_both_classes() {
    for class_64 in [false, true] {
        let mut guest = Guest::new();
        let file = File {
            class_64,
            ..File::default()
        };
        let entry = guest.load(&file.build(), None, "").unwrap();
        assert_eq!(
            (entry.mode, entry.rip),
            (EntryMode::Protected32, file.entry)
        );
        let start = file.start as usize;
        assert_eq!(guest.0[start..][..100], CODE);
        assert!(
            guest.0[start + 100..start + 0x3000]
                .iter()
                .all(|byte| *byte == 0)
        );
        assert_eq!((guest.0[start - 1], guest.0[start + 0x3000]), (0x55, 0x55));
    }
}

#[test]
fn the_selectors_are_flat_32_bit_segments() {
    let mut guest = Guest::new();
    let entry = guest.load(&File::default().build(), None, "").unwrap();
    let descriptor = |selector: u16| {
        assert!(selector + 7 <= entry.segments.gdt_limit);
        guest.u64(entry.segments.gdt_base.0 + u64::from(selector))
    };
    assert_eq!(
        (entry.segments.code_selector, entry.segments.data_selector),
        (0x08, 0x10)
    );
    // Base 0, limit 4 GiB, present; D set and L clear; accessed code, accessed data.
    assert_eq!(
        descriptor(entry.segments.code_selector),
        0x00cf_9b00_0000_ffff
    );
    assert_eq!(
        descriptor(entry.segments.data_selector),
        0x00cf_9300_0000_ffff
    );
}

#[test]
fn the_start_info_names_command_line_initrd_and_tables() {
    let mut guest = Guest::new();
    let initrd = vec![0xcd; 5000];
    let entry = guest
        .load(&File::default().build(), Some(&initrd), "quiet")
        .unwrap();
    let info = entry.rbx;
    assert_eq!((guest.u32(info), guest.u32(info + 4)), (0x336e_c578, 1));
    assert_eq!((guest.u32(info + 8), guest.u32(info + 12)), (0, 1));
    let module = guest.u64(info + 16);
    let (start, len) = (guest.u64(module) as usize, guest.u64(module + 8) as usize);
    assert_eq!((start % 4096, guest.u64(module + 16)), (0, 0));
    assert!(start as u64 >= KERNEL + 0x3000);
    assert_eq!(guest.0[start..start + len], initrd[..]);
    assert_eq!(guest.0[guest.u64(info + 24) as usize..][..6], *b"quiet\0");
    assert_eq!(guest.u64(info + 32), 0xe_0000);

    let ranges = MemoryMap::new(Hpa(0), RAM as u64).ranges();
    assert_eq!(guest.u32(info + 48) as usize, ranges.len());
    let table = guest.u64(info + 40);
    for (index, range) in ranges.iter().enumerate() {
        let at = table + 24 * index as u64;
        assert_eq!(
            (guest.u64(at), guest.u64(at + 8)),
            (range.start.0, range.len)
        );
        assert_eq!(guest.u64(at + 16), u64::from(range.kind as u32));
    }
}

#[test]
fn modules_follow_the_kernel_and_are_listed_behind_the_initrd() {
    let mut guest = Guest::new();
    guest.1 = [&[1u8; 5000][..], &[2; 10]]
        .map(|bytes| Module {
            bytes,
            cmdline: "name a b".into(),
        })
        .to_vec();
    let file = File::default().build();
    let entry = guest.load(&file, Some(&[3; 10]), "").unwrap();
    assert_eq!(guest.u32(entry.rbx + 12), 3);
    let list = guest.u64(entry.rbx + 16);
    assert_eq!(guest.u64(list + 16), 0);
    for (index, len, byte, start) in [(1, 5000, 1, KERNEL + 0x3000), (2, 10, 2, KERNEL + 0x5000)] {
        let at = list + 32 * index;
        assert_eq!((guest.u64(at), guest.u64(at + 8)), (start, len));
        assert_eq!(guest.0[start as usize], byte);
        assert_eq!(guest.0[guest.u64(at + 16) as usize..][..9], *b"name a b\0");
    }
    guest.1[0].bytes = vec![0; RAM - (KERNEL as usize) - 0x3000].leak();
    assert!(matches!(
        guest.load(&file, None, ""),
        Err(BootError::ModulesTooLarge { .. })
    ));
}

#[test]
fn without_an_initrd_there_is_no_module() {
    let mut guest = Guest::new();
    let entry = guest.load(&File::default().build(), None, "").unwrap();
    assert_eq!(
        (guest.u32(entry.rbx + 12), guest.u64(entry.rbx + 16)),
        (0, 0)
    );
}

#[test]
fn what_cannot_boot_is_named() {
    let error = |file: File| Guest::new().load(&file.build(), None, "").unwrap_err();
    let other = |note| File {
        note,
        ..File::default()
    };
    assert_eq!(error(other((b"Xen\0", 17))), BootError::NoEntry);
    assert_eq!(error(other((b"GNU\0", 18))), BootError::NoEntry);
    // Only the low 4 GiB can be reached without paging.
    let entry = KERNEL | 1 << 32;
    assert_eq!(
        error(File {
            entry,
            ..File::default()
        }),
        BootError::NoEntry
    );
    // Behind what the file fills, there is nothing to execute.
    let entry = KERNEL + 100;
    assert_eq!(
        error(File {
            entry,
            ..File::default()
        }),
        BootError::EntryNotLoaded { entry }
    );
    let start = 0x9_f000;
    assert_eq!(
        error(File {
            start,
            ..File::default()
        }),
        BootError::LoadsTooLow { start }
    );
    let have = RAM as u64;
    let size = have - KERNEL + 1;
    assert_eq!(
        error(File {
            size,
            ..File::default()
        }),
        BootError::TooLittleMemory {
            need: have + 1,
            have
        }
    );
    let start = u64::MAX - 1;
    assert_eq!(
        error(File {
            start,
            ..File::default()
        }),
        BootError::TooLittleMemory {
            need: u64::MAX,
            have
        }
    );
    let file = File::default().build();
    let cut = file.len() - 1;
    assert_eq!(
        Guest::new().load(&file[..cut], None, "").unwrap_err(),
        BootError::Image(ImageError::Truncated {
            need: file.len() as u64,
            have: cut as u64
        })
    );
    assert_eq!(
        Guest::new()
            .load(&file, None, &"x".repeat(2048))
            .unwrap_err(),
        BootError::CommandLineTooLong {
            len: 2048,
            limit: 2047
        }
    );
    let initrd = vec![0; RAM];
    assert!(matches!(
        Guest::new().load(&file, Some(&initrd), "").unwrap_err(),
        BootError::InitrdTooLarge { .. }
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The image is the user's: damage is an error, or an entry inside the guest's memory.
    #[test]
    fn a_damaged_file_is_no_disaster(
        class_64: bool, changes in prop::collection::vec((4..0x130usize, any::<u8>()), 1..6),
        len in 4..0x264usize,
    ) {
        let mut file = File { class_64, ..File::default() }.build();
        for (at, byte) in changes {
            file[at] = byte;
        }
        let mut guest = Guest::new();
        for image in [&file[..], &file[..len]] {
            if let Ok(entry) = guest.load(image, None, "") {
                prop_assert!((0x10_0000..RAM as u64).contains(&entry.rip));
            }
        }
    }
}
