//! `fw_cfg`: by which a guest asks its hypervisor for what firmware has to know, and test
//! kernels, too (QEMU, `docs/specs/fw_cfg.rst`).
//!
//! A guest selects an item by its key and reads it byte by byte, or names the place of a
//! request in its memory, which is a transfer:
//!
//! | offset | bytes | what, all of it big endian |
//! | --- | --- | --- |
//! | 0 | 4 | what to do, and the key in the upper half; behind it 0, or bit 0 for an error |
//! | 4 | 4 | how many bytes |
//! | 8 | 8 | where in memory |
//!
//! A transfer is as long as the guest likes, so it is done in pieces ([`PIECE`]): as long as it is
//! not done, the guest's instruction is executed again, with interrupts in between.

use crate::addr::Gpa;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::fmt;

/// The well-known keys.
pub mod key {
    pub const SIGNATURE: u16 = 0x00;
    pub const ID: u16 = 0x01;
    pub const RAM_SIZE: u16 = 0x03;
    pub const NO_GRAPHICS: u16 = 0x04;
    pub const CPUS: u16 = 0x05;
    pub const KERNEL_ADDRESS: u16 = 0x07;
    pub const KERNEL_SIZE: u16 = 0x08;
    pub const INITRD_ADDRESS: u16 = 0x0a;
    pub const INITRD_SIZE: u16 = 0x0b;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const KERNEL_ENTRY: u16 = 0x10;
    pub const KERNEL_DATA: u16 = 0x11;
    pub const INITRD_DATA: u16 = 0x12;
    pub const CMDLINE_ADDRESS: u16 = 0x13;
    pub const CMDLINE_SIZE: u16 = 0x14;
    pub const CMDLINE_DATA: u16 = 0x15;
    pub const SETUP_ADDRESS: u16 = 0x16;
    pub const SETUP_SIZE: u16 = 0x17;
    pub const SETUP_DATA: u16 = 0x18;
    pub const DIRECTORY: u16 = 0x19;
    /// The first file; each has the next.
    pub const FIRST_FILE: u16 = 0x20;
    /// Whether IRQ 0 is at the I/O APIC's pin 2; for SeaBIOS' tables.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
    /// A guest may set this bit, which has no meaning any more.
    pub(super) const WRITE: u16 = 0x4000;
}

const SIGNATURE: &[u8] = b"QEMU";
/// What the transfer address reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// There are byte-wise reads, and there are transfers.
const ID: u32 = 0b11;
/// Bytes of a file's name in the directory, with its zero.
const NAME: usize = 56;

/// Bits of a request's first field.
mod control {
    pub const ERROR: u32 = 1 << 0;
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}

/// Bytes of a transfer that are done at a time.
pub const PIECE: usize = 16 * 1024;

/// The guest's memory, as a transfer needs it.
pub trait Memory {
    /// False where some of it is no memory.
    fn read(&self, from: Gpa, bytes: &mut [u8]) -> bool;
    /// Likewise.
    fn write(&self, to: Gpa, bytes: &[u8]) -> bool;
}

/// The device.
#[derive(Clone)]
pub struct FwCfg {
    /// By their keys, in rising order.
    items: Vec<(u16, Cow<'static, [u8]>)>,
    /// Names and lengths of the files, in the order of their keys.
    files: Vec<([u8; NAME], u32)>,
    selected: u16,
    /// Of the next byte in the selected item.
    offset: u32,
    /// Where the request is, as far as it is written.
    request_high: u32,
    transfer: Option<Transfer>,
}

/// What is left of a transfer.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    request: Gpa,
    address: Gpa,
    length: u32,
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FwCfg")
            .field("selected", &self.selected)
            .field("offset", &self.offset)
            .field("transfer", &self.transfer)
            .finish_non_exhaustive()
    }
}

impl Default for FwCfg {
    fn default() -> Self {
        let mut new = Self {
            items: Vec::new(),
            files: Vec::new(),
            selected: key::SIGNATURE,
            offset: 0,
            request_high: 0,
            transfer: None,
        };
        new.add(key::SIGNATURE, SIGNATURE);
        new.add_number(key::ID, ID);
        new.write_directory();
        new
    }
}

/// What is to be done next for a guest that has written the address of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing.
    Done,
    /// The same again.
    More,
}

impl FwCfg {
    /// Adds an item, or replaces it.
    pub fn add(&mut self, key: u16, contents: impl Into<Cow<'static, [u8]>>) {
        let contents = contents.into();
        match self.items.binary_search_by_key(&key, |item| item.0) {
            Ok(at) => {
                if let Some(item) = self.items.get_mut(at) {
                    item.1 = contents;
                }
            }
            Err(at) => self.items.insert(at, (key, contents)),
        }
    }

    /// Adds a number of 32 bits.
    pub fn add_number(&mut self, key: u16, value: u32) {
        self.add(key, value.to_le_bytes().to_vec());
    }

    /// Adds a file. Of a name that is too long the end is lost.
    pub fn add_file(&mut self, name: &str, contents: impl Into<Cow<'static, [u8]>>) {
        let contents = contents.into();
        let mut bytes = [0; NAME];
        for (to, from) in bytes.iter_mut().take(NAME - 1).zip(name.bytes()) {
            *to = from;
        }
        let key = key::FIRST_FILE.saturating_add(self.files.len() as u16);
        self.files.push((bytes, contents.len() as u32));
        self.add(key, contents);
        self.write_directory();
    }

    fn write_directory(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, (name, len)) in (key::FIRST_FILE..).zip(&self.files) {
            directory.extend(len.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name);
        }
        self.add(key::DIRECTORY, directory);
    }

    /// Selects the item with this key, from its first byte on.
    pub fn select(&mut self, key: u16) {
        self.selected = key & !key::WRITE;
        self.offset = 0;
    }

    /// What is left of the selected item.
    fn rest(&self) -> &[u8] {
        self.items
            .binary_search_by_key(&self.selected, |item| item.0)
            .ok()
            .and_then(|at| self.items.get(at)?.1.get(self.offset as usize..))
            .unwrap_or_default()
    }

    /// The next byte of the selected item; 0 behind its end.
    pub fn read(&mut self) -> u8 {
        let byte = self.rest().first().copied().unwrap_or(0);
        self.offset = self.offset.saturating_add(1);
        byte
    }

    /// Byte `offset` (0 to 7) of the address of requests, when it is read.
    pub fn signature(offset: u16) -> u8 {
        DMA_SIGNATURE
            .get(usize::from(offset))
            .copied()
            .unwrap_or(0xff)
    }

    /// Writes the upper half of the address of a request, as the guest has it in a register.
    pub const fn set_request_high(&mut self, value: u32) {
        self.request_high = value.swap_bytes();
    }

    /// Where the request is whose lower half is written.
    pub fn request(&self, low: u32) -> Gpa {
        Gpa(u64::from(self.request_high) << 32 | u64::from(low.swap_bytes()))
    }

    /// Does the next piece of the transfer that the request asks for.
    pub fn transfer(&mut self, request: Gpa, memory: &impl Memory) -> Progress {
        let going_on = self.transfer.take().filter(|left| left.request == request);
        let transfer = match going_on {
            Some(transfer) => transfer,
            None => match self.begin(request, memory) {
                Some(transfer) => transfer,
                None => return Progress::Done,
            },
        };
        let count = transfer.length.min(PIECE as u32);
        let data = self.rest();
        let data = data.get(..count as usize).unwrap_or(data);
        let filled = data.len() as u64;
        let zeros = [0; 256];
        let mut good = memory.write(transfer.address, data);
        // Behind the item's end there are zeros.
        let mut at = filled;
        while good && at < u64::from(count) {
            let len = (u64::from(count) - at).min(zeros.len() as u64);
            let part = zeros.get(..len as usize).unwrap_or_default();
            good = match transfer.address.checked_add(at) {
                Some(to) => memory.write(to, part),
                None => false,
            };
            at += len;
        }
        self.offset = self.offset.saturating_add(count);
        let left = transfer.length - count;
        let next = transfer.address.checked_add(count.into());
        match next {
            Some(address) if good && left > 0 => {
                self.transfer = Some(Transfer {
                    request,
                    address,
                    length: left,
                });
                Progress::More
            }
            _ => {
                let good = good && left == 0;
                self.report(request, if good { 0 } else { control::ERROR }, memory);
                Progress::Done
            }
        }
    }

    /// Reads a request and does all of it but moving bytes; what is to be moved.
    fn begin(&mut self, request: Gpa, memory: &impl Memory) -> Option<Transfer> {
        let mut bytes = [0; 16];
        if request.checked_add(15).is_none() || !memory.read(request, &mut bytes) {
            // There is nobody to tell.
            return None;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, address @ ..] = bytes;
        let asked = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let address = Gpa(u64::from_be_bytes(address));
        if asked & control::SELECT != 0 {
            self.select((asked >> 16) as u16);
        }
        if asked & control::READ != 0 && length > 0 {
            return Some(Transfer {
                request,
                address,
                length,
            });
        }
        let mut outcome = 0;
        if asked & (control::READ | control::SKIP) != 0 {
            self.offset = self.offset.saturating_add(length);
        } else if asked & control::WRITE != 0 {
            // No item can be written.
            outcome = control::ERROR;
        }
        self.report(request, outcome, memory);
        None
    }

    fn report(&self, request: Gpa, outcome: u32, memory: &impl Memory) {
        // Where that is no memory there is nobody to tell.
        let _ = memory.write(request, &outcome.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use proptest::prelude::*;

    /// Memory from 0 to its end.
    struct Ram(RefCell<Vec<u8>>);

    impl Ram {
        fn new(len: usize) -> Self {
            Self(RefCell::new(vec![0x55; len]))
        }

        fn request(&self, at: usize, control: u32, length: u32, address: u64) {
            let mut bytes = control.to_be_bytes().to_vec();
            bytes.extend(length.to_be_bytes());
            bytes.extend(address.to_be_bytes());
            self.0.borrow_mut()[at..at + 16].copy_from_slice(&bytes);
        }

        fn outcome(&self, at: usize) -> u32 {
            u32::from_be_bytes(self.0.borrow()[at..at + 4].try_into().unwrap())
        }
    }

    impl Memory for Ram {
        fn read(&self, from: Gpa, bytes: &mut [u8]) -> bool {
            let ram = self.0.borrow();
            let end = from.0.checked_add(bytes.len() as u64);
            let Some(part) = end.and_then(|end| ram.get(from.0 as usize..end as usize)) else {
                return false;
            };
            bytes.copy_from_slice(part);
            true
        }

        fn write(&self, to: Gpa, bytes: &[u8]) -> bool {
            let mut ram = self.0.borrow_mut();
            let end = to.0.checked_add(bytes.len() as u64);
            let Some(part) = end.and_then(|end| ram.get_mut(to.0 as usize..end as usize)) else {
                return false;
            };
            part.copy_from_slice(bytes);
            true
        }
    }

    fn read<const N: usize>(device: &mut FwCfg) -> [u8; N] {
        core::array::from_fn(|_| device.read())
    }

    fn run(device: &mut FwCfg, request: u64, memory: &Ram) -> usize {
        let low = (request as u32).swap_bytes();
        device.set_request_high(((request >> 32) as u32).swap_bytes());
        let request = device.request(low);
        (1..)
            .find(|_| device.transfer(request, memory) == Progress::Done)
            .unwrap()
    }

    #[test]
    fn items_are_read_byte_by_byte_and_end_in_zeros() {
        let mut device = FwCfg::default();
        device.add(key::CPUS, 3u16.to_le_bytes().to_vec());
        device.select(key::SIGNATURE);
        assert_eq!(read(&mut device), *b"QEMU\0\0");
        device.select(key::ID);
        assert_eq!(read(&mut device), [3, 0, 0, 0]);
        device.select(key::CPUS | 0x4000);
        assert_eq!(read(&mut device), [3, 0, 0]);
        device.select(0x7777);
        assert_eq!(read(&mut device), [0, 0]);
    }

    #[test]
    fn the_directory_names_the_files() {
        let mut device = FwCfg::default();
        device.add_file("etc/e820", vec![1, 2, 3]);
        device.add_file("etc/more", &b"abcd"[..]);
        device.select(key::DIRECTORY);
        assert_eq!(read(&mut device), [0, 0, 0, 2]);
        for (index, name, len) in [(0, b"etc/e820\0", 3), (1, b"etc/more\0", 4)] {
            assert_eq!(read(&mut device), [0, 0, 0, len, 0, 0x20 + index, 0, 0]);
            let field: [u8; NAME] = read(&mut device);
            assert_eq!(field[..9], *name);
            assert_eq!(field[9..], [0; NAME - 9]);
        }
        device.select(0x21);
        assert_eq!(read(&mut device), *b"abcd");
    }

    #[test]
    fn a_transfer_selects_reads_and_goes_on() {
        let mut device = FwCfg::default();
        let data: Vec<u8> = (0..3 * PIECE as u32).map(|n| (n / 7) as u8).collect();
        device.add_file("data", data.clone());
        let memory = Ram::new(4 * PIECE);
        memory.request(16, 0x20 << 16 | control::SELECT | control::SKIP, 5, 0);
        assert_eq!(run(&mut device, 16, &memory), 1);
        assert_eq!(memory.outcome(16), 0);
        let length = 2 * PIECE as u32 + 1;
        memory.request(16, control::READ, length, 100);
        assert_eq!(run(&mut device, 16, &memory), 3);
        assert_eq!(memory.outcome(16), 0);
        assert!(memory.0.borrow()[100..][..length as usize] == data[5..5 + length as usize]);
        assert_eq!(memory.0.borrow()[100 + length as usize], 0x55);
        assert_eq!(device.read(), data[5 + length as usize]);
        // Behind the end.
        memory.request(16, control::READ, PIECE as u32, 100);
        run(&mut device, 16, &memory);
        let left = data.len() - 6 - length as usize;
        assert_eq!(memory.0.borrow()[100..][..left], data[data.len() - left..]);
        assert!(
            memory.0.borrow()[100 + left..100 + PIECE]
                .iter()
                .all(|byte| *byte == 0)
        );
    }

    #[test]
    fn the_address_of_requests_shows_who_is_there() {
        let bytes: [u8; 8] = core::array::from_fn(|at| FwCfg::signature(at as u16));
        assert_eq!(u64::from_be_bytes(bytes), 0x5145_4d55_2043_4647);
    }

    #[test]
    fn bad_requests_are_errors_or_nothing() {
        let mut device = FwCfg::default();
        let memory = Ram::new(4096);
        for nowhere in [4096, 4081, u64::MAX, u64::MAX - 14] {
            assert_eq!(run(&mut device, nowhere, &memory), 1);
        }
        assert!(memory.0.borrow().iter().all(|byte| *byte == 0x55));
        for (asked, length, address) in [
            (control::READ, 10, 0xfec0_0000),
            (control::READ, 10, 4090),
            (control::READ, 10, u64::MAX - 5),
            (control::READ, u32::MAX, 0),
            (control::WRITE, 10, 0),
            (control::WRITE | control::SELECT, 0, 0),
        ] {
            memory.request(64, asked, length, address);
            let pieces = run(&mut device, 64, &memory);
            assert!(pieces <= 4096 / PIECE + 1);
            assert_eq!(memory.outcome(64), control::ERROR);
        }
        // Onto itself: the outcome is what remains.
        memory.request(64, 0x01 << 16 | control::SELECT | control::READ, 16, 64);
        assert_eq!(run(&mut device, 64, &memory), 1);
        assert_eq!(memory.outcome(64), 0);
    }

    #[test]
    fn another_request_ends_one_that_is_not_done() {
        let mut device = FwCfg::default();
        let memory = Ram::new(8 * PIECE);
        memory.request(0, control::READ, 4 * PIECE as u32, 1024);
        assert_eq!(device.transfer(Gpa(0), &memory), Progress::More);
        memory.request(16, control::SELECT | control::READ, 4, 512);
        assert_eq!(device.transfer(Gpa(16), &memory), Progress::Done);
        assert_eq!(memory.0.borrow()[512..516], *b"QEMU");
        // The first has to begin again.
        assert_eq!(device.transfer(Gpa(0), &memory), Progress::More);
        assert_eq!(memory.0.borrow()[1024..1028], [0; 4]);
    }

    proptest! {
        #[test]
        fn whatever_is_asked_ends(
            asked: u32, length in prop_oneof![0..100u32, any::<u32>()],
            address in prop_oneof![0..70_000u64, any::<u64>()], request in 0..70_000u64,
        ) {
            let mut device = FwCfg::default();
            let memory = Ram::new(65_536);
            if request <= 65_520 {
                memory.request(request as usize, asked, length, address);
            }
            prop_assert!(run(&mut device, request, &memory) <= 65_536 / PIECE + 1);
        }
    }
}
