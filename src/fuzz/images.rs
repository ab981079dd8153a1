//! Kernels, firmware and modules that are nearly right, or not at all.

use super::{Random, repeat};
use crate::addr::{Gpa, Hpa};
use crate::vm::boot::{self, EntryMode, Images, Machine, Module};
use crate::vm::memory::GuestMemory;
use crate::vm::memory_map::MemoryMap;
use std::borrow::Cow;
use vireo_handoff::config::Protocol;
use vireo_handoff::image;

const RAM: usize = 4 << 20;
/// Bytes before and behind the guest's memory that nobody may touch.
const GUARD: usize = 4096;
const UNTOUCHED: u8 = 0xa5;

/// Something like a kernel, of which most bytes are right.
fn file(random: &mut Random) -> Vec<u8> {
    let mut file = vec![0x90; 2048];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let kernel = random.pick(&[0x10_0000u64, 0x20_0000, 0x3f_f000, 0x9_0000, 0xffff_f000]);
    match random.below(4) {
        0 => {
            // A bzImage: setup sectors, size, magic numbers, version, flags.
            put(0x1f1, &[1]);
            put(0x1f4, &64u32.to_le_bytes());
            put(0x1fe, &[0x55, 0xaa]);
            put(0x201, &[0x6a]);
            put(0x202, b"HdrS");
            put(0x206, &0x20fu16.to_le_bytes());
            put(0x211, &[0x81]);
            put(0x22c, &0x7fff_ffffu32.to_le_bytes());
            put(0x236, &[random.below(2) as u8, 0]);
            put(0x238, &2047u32.to_le_bytes());
            put(0x258, &kernel.to_le_bytes());
            put(0x260, &(random.magnitude() as u32).to_le_bytes());
        }
        kind @ (1 | 2) => {
            // An ELF file with segments, one of them the note of PVH; or a header of multiboot.
            put(0, b"\x7fELF\x01\x01\x01");
            put(16, &[2, 0, 3, 0, 1]);
            put(24, &(kernel as u32).to_le_bytes());
            put(28, &52u32.to_le_bytes());
            put(40, &[52, 0, 32, 0, 3]);
            let numbers = |kind: u32, offset: u32, at: u32, size: u32| {
                [kind, offset, at, at, size, size, 7, 4].map(u32::to_le_bytes)
            };
            let size = 0x100 << random.below(4);
            put(52, numbers(1, 0x200, kernel as u32, size).as_flattened());
            let second = kernel as u32 ^ (1 << random.below(32));
            put(84, numbers(1, 0x400, second, size).as_flattened());
            if kind == 1 {
                put(116, numbers(4, 0x180, 0, 20).as_flattened());
                let note = [4, 4, 18, 0x006e_6558, kernel as u32].map(u32::to_le_bytes);
                put(0x180, note.as_flattened());
            } else {
                multiboot(random, kernel as u32, &mut put);
            }
        }
        _ => multiboot(random, kernel as u32, &mut put),
    }
    file
}

fn multiboot(random: &mut Random, kernel: u32, put: &mut impl FnMut(usize, &[u8])) {
    const MAGIC: u32 = 0x1bad_b002;
    let flags = (random.next() & random.next()) as u32 & 0x1_ffff;
    let sum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    let any = random.number() as u32;
    let header = [MAGIC, flags, sum, kernel + 0x200, kernel, any, any, kernel];
    put(0x200, header.map(u32::to_le_bytes).as_flattened());
}

/// Some bytes become others.
fn spoil(random: &mut Random, file: &mut Vec<u8>) {
    for _ in 0..random.below(8) {
        let at = random.below(0x300) as usize;
        let value = random.number().to_le_bytes();
        let count = 1 << random.below(4);
        for (place, byte) in file.iter_mut().skip(at).zip(value).take(count) {
            *place = byte;
        }
    }
    if random.once_in(8) {
        file.truncate(random.below(2048) as usize);
    }
}

/// A guest's memory between two guards.
struct Memory(Vec<u8>);

impl Memory {
    fn new(bytes: usize) -> Self {
        Self(vec![UNTOUCHED; bytes + 2 * GUARD])
    }

    fn start(&mut self) -> Hpa {
        Hpa(self.0.as_mut_ptr() as u64 + GUARD as u64)
    }

    fn check(&self) {
        let end = self.0.len() - GUARD;
        let guards = self.0[..GUARD].iter().chain(&self.0[end..]);
        assert!(guards.copied().all(|byte| byte == UNTOUCHED));
    }
}

#[test]
fn no_kernel_makes_a_boot_protocol_panic() {
    const PROTOCOLS: [Protocol; 4] = [
        Protocol::Auto,
        Protocol::Linux,
        Protocol::Multiboot,
        Protocol::Pvh,
    ];
    let long = "x".repeat(4096);
    let mut own = Memory::new(RAM);
    let mut loaded = 0;
    repeat("kernels", 3000, |random| {
        let mut kernel = file(random);
        spoil(random, &mut kernel);
        let size = random.magnitude() & 0x1f_ffff;
        let large = vec![0u8; size as usize];
        let modules = (0..random.below(3)).map(|_| Module {
            bytes: &large,
            cmdline: Cow::Borrowed("m a=b"),
        });
        let images = Images {
            name: "kernel",
            initrd: random.once_in(3).then_some(&large),
            modules: modules.collect(),
            cmdline: random.pick(&["", "console=ttyS0", &long]),
            protocol: random.pick(&PROTOCOLS),
            ..Images::of(&kernel)
        };
        let map = MemoryMap::new(own.start(), RAM as u64);
        let memory = GuestMemory::new(map.slots(), 0);
        let machine = Machine {
            memory: &memory,
            map: &map,
            rsdp: Gpa(0xe_0000),
        };
        // What the loader and xtask ask about files.
        let _ = image::check(&kernel, images.protocol);
        let _ = (image::is_32_bit_linux(&kernel), image::is_64_bit(&kernel));
        match boot::load(&images, &machine) {
            Ok(entry) => {
                loaded += 1;
                let is_in_memory = memory.slots().find(Gpa(entry.rip)).is_some();
                assert!(is_in_memory || entry.mode != EntryMode::Protected32);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        own.check();
    });
    assert!(loaded > 0);
}

#[test]
fn no_firmware_makes_its_loader_panic() {
    let (mut ram, mut rom) = (Memory::new(RAM), Memory::new(1 << 20));
    repeat("firmware", 300, |random| {
        let len = match random.below(3) {
            0 => random.below(1 << 20),
            _ => 4096 * (1 + random.below(256)),
        };
        let room = len.next_multiple_of(4096);
        let map = MemoryMap::new(ram.start(), RAM as u64).with_firmware(rom.start(), room);
        let memory = GuestMemory::new(map.slots(), 0);
        let image = vec![random.next() as u8; len as usize];
        let entry = boot::firmware::load(&image, &memory);
        assert_eq!(entry.is_ok(), len > 0 && len % 4096 == 0);
        ram.check();
        rom.check();
    });
}
