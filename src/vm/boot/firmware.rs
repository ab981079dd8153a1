//! Firmware: an image that ends at 4 GiB, where the CPU's first instruction after a reset is,
//! 16 bytes below; its last 128 KiB also end at 1 MiB, as on every PC.

use super::{BootError, EntryState};
use crate::addr::Gpa;
use crate::vm::memory::GuestMemory;
use crate::vm::memory_map::{FOUR_GIB, HIGH_RAM, TABLES_START};
use vireo_handoff::image;

/// Puts `firmware` into its place, which is memory already.
///
/// # Errors
/// When its size is wrong.
pub fn load(firmware: &[u8], memory: &GuestMemory) -> Result<EntryState, BootError> {
    image::check_firmware(firmware)?;
    let len = firmware.len() as u64;
    memory.write(Gpa(FOUR_GIB - len), firmware)?;
    let low = (HIGH_RAM - TABLES_START).min(len);
    let first = (len - low) as usize;
    let end = firmware.get(first..).unwrap_or_default();
    memory.write(Gpa(HIGH_RAM - low), end)?;
    Ok(EntryState::RESET)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hpa;
    use crate::vm::boot::EntryMode;
    use crate::vm::memory_map::MemoryMap;
    use vireo_handoff::image::ImageError;

    fn guest(len: usize) -> (Result<EntryState, BootError>, Vec<u8>, Vec<u8>) {
        let (mut ram, mut rom) = (vec![0u8; 2 << 20], vec![0u8; len]);
        let firmware: Vec<u8> = (0..len).map(|at| (at >> 12) as u8).collect();
        let block = |bytes: &mut Vec<u8>| Hpa(bytes.as_mut_ptr() as u64);
        let map =
            MemoryMap::new(block(&mut ram), 2 << 20).with_firmware(block(&mut rom), len as u64);
        let memory = GuestMemory::new(map.slots(), 0);
        (load(&firmware, &memory), ram, rom)
    }

    #[test]
    fn an_image_ends_at_4_gib_and_at_1_mib() {
        let (entry, ram, rom) = guest(0x4_1000);
        let entry = entry.unwrap();
        assert_eq!(entry.rip, 0xfff0);
        assert_eq!(
            entry.mode,
            EntryMode::Real {
                code_base: 0xffff_0000
            }
        );
        assert_eq!((rom[0], rom[0x4_0fff]), (0, 0x40));
        assert_eq!(
            (ram[0xd_ffff], ram[0xe_0000], ram[0xf_ffff]),
            (0, 0x21, 0x40)
        );
        // A small one.
        let (_, ram, _) = guest(0x2000);
        assert_eq!((ram[0xf_dfff], ram[0xf_f000], ram[0x10_0000]), (0, 1, 0));
    }

    #[test]
    fn an_image_is_whole_pages_and_leaves_room_for_devices() {
        for len in [0, 1, 0x1800, (16 << 20) + 4096] {
            let wrong = BootError::Image(ImageError::FirmwareSize { len: len as u64 });
            assert_eq!(guest(len).0, Err(wrong));
        }
    }
}
