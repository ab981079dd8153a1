//! Access to guest memory.
//!
//! The guest may change its memory at any time, so nothing here makes a
//! reference to it: bytes are copied in and out. This is the one place above
//! `vmx` with `unsafe` code.

use super::slots::{SlotKind, Slots};
use crate::addr::Gpa;
use crate::devices::fw_cfg;
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The guest has no memory at this address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfSlot {
    pub gpa: Gpa,
}

impl fmt::Display for OutOfSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest has no memory at {}", self.gpa)
    }
}

impl core::error::Error for OutOfSlot {}

impl fw_cfg::Memory for GuestMemory {
    fn read(&self, from: Gpa, bytes: &mut [u8]) -> bool {
        self.read(from, bytes).is_ok()
    }

    /// As the guest writes: not ROM.
    fn write(&self, to: Gpa, bytes: &[u8]) -> bool {
        let is_ram = |gpa: Gpa| {
            self.slots
                .find(gpa)
                .is_none_or(|slot| slot.kind == SlotKind::Ram)
        };
        let last = to.wrapping_add((bytes.len() as u64).saturating_sub(1));
        is_ram(to) && is_ram(last) && self.write(to, bytes).is_ok()
    }
}

/// The memory of one guest, as the hypervisor reaches it.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    slots: Slots,
    /// Host virtual minus host physical address.
    offset: u64,
}

impl GuestMemory {
    /// Memory whose host pages are mapped at their physical address plus `offset`.
    pub fn new(slots: Slots, offset: u64) -> Self {
        Self { slots, offset }
    }

    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Splits a range into pieces that are contiguous in the host.
    fn pieces(
        &self,
        gpa: Gpa,
        len: u64,
        mut piece: impl FnMut(*mut u8, u64, usize),
    ) -> Result<(), OutOfSlot> {
        let mut done = 0;
        while done < len {
            let here = gpa.checked_add(done).ok_or(OutOfSlot { gpa })?;
            let slot = self.slots.find(here).ok_or(OutOfSlot { gpa: here })?;
            let inside = here.0 - slot.start.0;
            let count = (slot.len - inside).min(len - done);
            let host = slot
                .backing
                .0
                .wrapping_add(inside)
                .wrapping_add(self.offset);
            piece(host as *mut u8, done, count as usize);
            done += count;
        }
        Ok(())
    }

    /// Copies `bytes.len()` bytes out of the guest.
    ///
    /// # Errors
    /// The first address that is not memory; `bytes` may be filled in part.
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), OutOfSlot> {
        let target = bytes.as_mut_ptr();
        self.pieces(gpa, bytes.len() as u64, |host, done, count| {
            // SAFETY: `pieces` stays inside a slot, whose backing is mapped and belongs to the
            // guest alone, and inside `bytes`; the two cannot overlap.
            unsafe { ptr::copy_nonoverlapping(host, target.add(done as usize), count) }
        })
    }

    /// Copies `bytes` into the guest; ROM too, which only the guest cannot write.
    ///
    /// # Errors
    /// The first address that is not memory; what precedes it is written.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), OutOfSlot> {
        let source = bytes.as_ptr();
        self.pieces(gpa, bytes.len() as u64, |host, done, count| {
            // SAFETY: as in `read`.
            unsafe { ptr::copy_nonoverlapping(source.add(done as usize), host, count) }
        })
    }

    /// Sets `len` bytes to `byte`.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    pub fn fill(&self, gpa: Gpa, len: u64, byte: u8) -> Result<(), OutOfSlot> {
        self.pieces(gpa, len, |host, _, count| {
            // SAFETY: as in `read`.
            unsafe { ptr::write_bytes(host, byte, count) }
        })
    }

    /// Four bytes, little endian.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    pub fn read_u32(&self, gpa: Gpa) -> Result<u32, OutOfSlot> {
        if let Some(host) = self.aligned::<u32>(gpa) {
            // SAFETY: `aligned` gives aligned addresses inside a slot, whose backing is mapped.
            return Ok(u32::from_le(unsafe { host.read_volatile() }));
        }
        let mut bytes = [0; 4];
        self.read(gpa, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Eight bytes, little endian.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    pub fn read_u64(&self, gpa: Gpa) -> Result<u64, OutOfSlot> {
        if let Some(host) = self.aligned::<u64>(gpa) {
            // SAFETY: as in `read_u32`.
            return Ok(u64::from_le(unsafe { host.read_volatile() }));
        }
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Replaces the aligned 4 or 8 bytes at `gpa` in one step if they are `old`; false, and
    /// nothing done, where they are not, or are not all there.
    pub fn replace(&self, gpa: Gpa, bytes: usize, old: u64, new: u64) -> bool {
        const ORDER: Ordering = Ordering::SeqCst;
        match bytes {
            4 => self.aligned::<u32>(gpa).is_some_and(|host| {
                // SAFETY: `aligned` gives aligned addresses inside a slot, whose backing is mapped.
                let entry = unsafe { AtomicU32::from_ptr(host.cast_mut()) };
                let (old, new) = ((old as u32).to_le(), (new as u32).to_le());
                entry.compare_exchange(old, new, ORDER, ORDER).is_ok()
            }),
            8 => self.aligned::<u64>(gpa).is_some_and(|host| {
                // SAFETY: as above.
                let entry = unsafe { AtomicU64::from_ptr(host.cast_mut()) };
                entry
                    .compare_exchange(old.to_le(), new.to_le(), ORDER, ORDER)
                    .is_ok()
            }),
            _ => false,
        }
    }

    /// Reads what one instruction reads: 2, 4 or 8 aligned bytes in one step, which
    /// another CPU may be writing.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    pub fn load(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), OutOfSlot> {
        match bytes {
            [a, b] => match self.aligned::<u16>(gpa) {
                // SAFETY: `aligned` gives aligned addresses inside a slot, whose backing is mapped.
                Some(host) => [*a, *b] = unsafe { host.read_volatile() }.to_ne_bytes(),
                None => return self.read(gpa, bytes),
            },
            [a, b, c, d] => match self.aligned::<u32>(gpa) {
                // SAFETY: as above.
                Some(host) => [*a, *b, *c, *d] = unsafe { host.read_volatile() }.to_ne_bytes(),
                None => return self.read(gpa, bytes),
            },
            [_, _, _, _, _, _, _, _] => match self.aligned::<u64>(gpa) {
                // SAFETY: as above.
                Some(host) => bytes.copy_from_slice(&unsafe { host.read_volatile() }.to_ne_bytes()),
                None => return self.read(gpa, bytes),
            },
            _ => return self.read(gpa, bytes),
        }
        Ok(())
    }

    /// Writes what one instruction writes, in the same way.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    pub fn store(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), OutOfSlot> {
        if let Ok(word) = <[u8; 2]>::try_from(bytes)
            && let Some(host) = self.aligned::<u16>(gpa)
        {
            // SAFETY: `aligned` gives aligned addresses inside a slot, whose backing is mapped.
            unsafe { host.cast_mut().write_volatile(u16::from_ne_bytes(word)) };
        } else if let Ok(word) = <[u8; 4]>::try_from(bytes)
            && let Some(host) = self.aligned::<u32>(gpa)
        {
            // SAFETY: as above.
            unsafe { host.cast_mut().write_volatile(u32::from_ne_bytes(word)) };
        } else if let Ok(word) = <[u8; 8]>::try_from(bytes)
            && let Some(host) = self.aligned::<u64>(gpa)
        {
            // SAFETY: as above.
            unsafe { host.cast_mut().write_volatile(u64::from_ne_bytes(word)) };
        } else {
            return self.write(gpa, bytes);
        }
        Ok(())
    }

    /// Where a `T` is in the host; `None` where it is not in one slot.
    fn locate<T>(&self, gpa: Gpa) -> Option<*const T> {
        let slot = self.slots.find(gpa)?;
        let inside = gpa.0 - slot.start.0;
        let host = slot.backing.wrapping_add(inside).wrapping_add(self.offset);
        (slot.len - inside >= size_of::<T>() as u64).then_some(host.0 as *const T)
    }

    /// Where an aligned `T` is in the host, to be read by one load: another
    /// vCPU may change a page-table entry at any time, and half of the old one
    /// with half of the new one is an entry that never was.
    fn aligned<T>(&self, gpa: Gpa) -> Option<*const T> {
        self.locate::<T>(gpa).filter(|host| host.is_aligned())
    }

    /// Eight bytes, little endian, to be looked at again later; `None` where they are not
    /// in one slot.
    pub fn sight(&self, gpa: Gpa) -> Option<Sighting> {
        let host = self.locate::<u64>(gpa)?;
        // SAFETY: `locate` gives addresses inside a slot, whose backing is mapped.
        let value = u64::from_le(unsafe { host.read_unaligned() });
        Some(Sighting {
            host: NonNull::new(host.cast_mut())?,
            value,
        })
    }

    /// Whether `seen`, of this memory, is what is there now.
    #[inline(always)]
    pub fn still_has(&self, seen: &Sighting) -> bool {
        debug_assert!(self.slots.iter().any(|slot| {
            let start = slot.backing.wrapping_add(self.offset).0;
            (seen.host.as_ptr() as u64).wrapping_sub(start) <= slot.len - 8
        }));
        // SAFETY: as in `sight`; the slots never change.
        u64::from_le(unsafe { seen.host.as_ptr().read_unaligned() }) == seen.value
    }
}

/// Eight bytes of a guest's memory, as they were once.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    host: NonNull<u64>,
    value: u64,
}

impl Sighting {
    /// What they were, little endian.
    pub const fn value(&self) -> u64 {
        self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hpa;
    use crate::vm::slots::{Slot, SlotKind};
    use proptest::prelude::*;

    #[test]
    fn an_access_may_cross_adjacent_slots_but_not_a_hole() {
        let mut a = vec![0u8; 4096];
        let mut b = vec![0u8; 4096];
        let slot = |start, bytes: &mut Vec<u8>| Slot {
            start: Gpa(start),
            len: 4096,
            backing: Hpa(bytes.as_mut_ptr() as u64),
            kind: SlotKind::Ram,
        };
        let slots = Slots::new(vec![slot(0x1000, &mut a), slot(0x2000, &mut b)]).unwrap();
        let memory = GuestMemory::new(slots, 0);
        memory
            .write(Gpa(0x1ffc), &[1, 2, 3, 4, 5, 6, 7, 8])
            .unwrap();
        assert_eq!(memory.read_u64(Gpa(0x1ffc)), Ok(0x0807_0605_0403_0201));
        let missing = OutOfSlot { gpa: Gpa(0x3000) };
        assert_eq!(memory.read_u32(Gpa(0x2ffe)), Err(missing));
        assert!(memory.fill(Gpa(u64::MAX - 1), 4, 0).is_err());
        drop(memory);
        assert_eq!(
            (&a[0xffc..], &b[..4]),
            (&[1, 2, 3, 4][..], &[5, 6, 7, 8][..])
        );
    }

    #[test]
    fn rom_is_written_by_the_hypervisor() {
        let mut bytes = vec![0u8; 4096];
        let rom = Slot {
            start: Gpa(0xf_f000),
            len: 4096,
            backing: Hpa(bytes.as_mut_ptr() as u64),
            kind: SlotKind::Rom,
        };
        let memory = GuestMemory::new(Slots::new(vec![rom]).unwrap(), 0);
        memory.fill(Gpa(0xf_fff0), 16, 0xf4).unwrap();
        assert_eq!(memory.read_u32(Gpa(0xf_fffc)), Ok(0xf4f4_f4f4));
    }

    proptest! {
        /// Two slots side by side, their backing apart and in the other order,
        /// and a direct map that is not the identity.
        #[test]
        fn numbers_are_read_alike_at_every_address(
            at in 0..8192u64, value: u64, offset: u64,
        ) {
            let mut host = vec![0u8; 3 * 4096];
            let base = Hpa((host.as_mut_ptr() as u64).wrapping_sub(offset));
            let slot = |start, backing| Slot {
                start: Gpa(start),
                len: 4096,
                backing,
                kind: SlotKind::Ram,
            };
            // A host physical address does not wrap.
            prop_assume!(base.0 < u64::MAX - 3 * 4096);
            let slots = Slots::new(vec![slot(0, Hpa(base.0 + 8192)), slot(4096, base)]).unwrap();
            let memory = GuestMemory::new(slots, offset);
            let written = memory.write(Gpa(at), &value.to_le_bytes());
            prop_assert_eq!(written.is_ok(), at <= 8184);
            if written.is_ok() {
                prop_assert_eq!(memory.read_u64(Gpa(at)), Ok(value));
                prop_assert_eq!(memory.read_u32(Gpa(at)), Ok(value as u32));
                let mut bytes = [0; 8];
                memory.read(Gpa(at), &mut bytes).unwrap();
                prop_assert_eq!(bytes, value.to_le_bytes());
                let seen = memory.sight(Gpa(at));
                prop_assert_eq!(seen.is_some(), at % 4096 <= 4088);
                if let Some(seen) = seen {
                    prop_assert_eq!(seen.value(), value);
                    prop_assert!(memory.still_has(&seen));
                    memory.write(Gpa(at), &[!value as u8]).unwrap();
                    prop_assert!(!memory.still_has(&seen));
                }
            } else {
                prop_assert_eq!(memory.read_u64(Gpa(at)), Err(OutOfSlot { gpa: Gpa(8192) }));
            }
            drop(memory);
            prop_assert!(host[4096..8192].iter().all(|byte| *byte == 0));
        }
    }
}
