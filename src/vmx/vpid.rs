//! Virtual-processor identifiers, and the instructions that drop cached
//! translations: INVVPID and INVEPT (SDM vol. 3, 29.4 and ch. 31).

use core::arch::asm;

use super::ept::{EptPointer, EptVpidCapabilities};
use crate::addr::Gva;

/// A virtual-processor identifier, the value of the VMCS field VPID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Vpid(u16);

impl Vpid {
    /// The host's, and that of a guest on a CPU without VPIDs, where each entry
    /// and each exit drops all translations.
    pub const HOST: Self = Self(0);

    /// The field's bits.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

/// Hands out the VPIDs 1 to 65535. A VPID that was freed is handed out again
/// only after all others, and still may name cached translations: whoever gets
/// one invalidates its context on a CPU before the first entry there.
pub struct VpidAllocator {
    used: [u64; 1024],
    next: u16,
}

impl Default for VpidAllocator {
    fn default() -> Self {
        Self::new()
    }
}

impl VpidAllocator {
    /// All VPIDs are free, but 0.
    pub const fn new() -> Self {
        let mut used = [0; 1024];
        used[0] = 1;
        Self { used, next: 1 }
    }

    /// A VPID that nobody has, or `None` when all are taken.
    pub fn allocate(&mut self) -> Option<Vpid> {
        let start = usize::from(self.next / 64);
        // The first word comes up again at the end, for its bits below `next`.
        for step in 0..=self.used.len() {
            let index = (start + step) % self.used.len();
            let word = self.used.get_mut(index)?;
            let passed = if step == 0 {
                (1 << (self.next % 64)) - 1
            } else {
                0
            };
            let bit = (*word | passed).trailing_ones();
            if bit < 64 {
                *word |= 1 << bit;
                let vpid = (index * 64) as u16 + bit as u16;
                self.next = vpid.wrapping_add(1);
                return Some(Vpid(vpid));
            }
        }
        None
    }

    /// How many are handed out.
    pub fn in_use(&self) -> usize {
        let taken: u32 = self.used.iter().map(|word| word.count_ones()).sum();
        taken as usize - 1
    }

    /// Takes `vpid` back. VPID 0 stays taken.
    pub fn free(&mut self, vpid: Vpid) {
        if vpid == Vpid::HOST {
            return;
        }
        if let Some(word) = self.used.get_mut(usize::from(vpid.0 / 64)) {
            *word &= !(1 << (vpid.0 % 64));
        }
    }
}

/// Why nothing was invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidationError {
    /// The CPU has neither the instruction nor a type of it that is wide enough.
    Unsupported,
    /// The CPU refused the operand (VMfail).
    Refused,
}

/// The types of INVEPT (SDM vol. 3, ch. 31, INVEPT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum InveptType {
    SingleContext = 1,
    AllContexts = 2,
}

/// The types of INVVPID (SDM vol. 3, ch. 31, INVVPID) that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum InvvpidType {
    IndividualAddress = 0,
    SingleContext = 1,
    AllContexts = 2,
}

/// Drops cached translations on the CPU that it is called on, by the narrowest
/// type of the instruction that this CPU has.
#[derive(Clone, Copy, Debug)]
pub struct Invalidator {
    capabilities: EptVpidCapabilities,
}

impl Invalidator {
    /// For a CPU with these capabilities.
    pub const fn new(capabilities: EptVpidCapabilities) -> Self {
        Self { capabilities }
    }

    /// Drops what was cached from the tables of `pointer`.
    ///
    /// # Safety
    /// The CPU is in VMX root operation at CPL 0.
    pub unsafe fn ept(&self, pointer: EptPointer) -> Result<(), InvalidationError> {
        let kind = self.invept_type().ok_or(InvalidationError::Unsupported)?;
        // SAFETY: the caller's promise, and the CPU has this type of INVEPT.
        unsafe { invept(kind, pointer.bits()) }
    }

    /// Drops what was cached for `vpid`. Nothing needs dropping for VPID 0.
    ///
    /// # Safety
    /// The CPU is in VMX root operation at CPL 0.
    pub unsafe fn vpid(&self, vpid: Vpid) -> Result<(), InvalidationError> {
        if vpid == Vpid::HOST {
            return Ok(());
        }
        let kind = self
            .invvpid_context_type()
            .ok_or(InvalidationError::Unsupported)?;
        // SAFETY: the caller's promise, and the CPU has this type of INVVPID.
        unsafe { invvpid(kind, vpid, Gva(0)) }
    }

    /// Drops what was cached for the page of `address` under `vpid`.
    ///
    /// # Safety
    /// The CPU is in VMX root operation at CPL 0.
    pub unsafe fn address(&self, vpid: Vpid, address: Gva) -> Result<(), InvalidationError> {
        if vpid == Vpid::HOST {
            return Ok(());
        }
        let kind = self
            .invvpid_address_type(address)
            .ok_or(InvalidationError::Unsupported)?;
        // SAFETY: the caller's promise, and the CPU has this type of INVVPID.
        unsafe { invvpid(kind, vpid, address) }
    }

    const fn has(&self, bit: u32) -> bool {
        self.capabilities.0 >> bit & 1 != 0
    }

    /// SDM vol. 3, A.10: bit 20 is the instruction, 25 and 26 its types.
    const fn invept_type(&self) -> Option<InveptType> {
        match (self.has(20), self.has(25), self.has(26)) {
            (true, true, _) => Some(InveptType::SingleContext),
            (true, false, true) => Some(InveptType::AllContexts),
            _ => None,
        }
    }

    /// SDM vol. 3, A.10: bit 32 is the instruction, 40 to 43 its types.
    const fn invvpid_context_type(&self) -> Option<InvvpidType> {
        match (self.has(32), self.has(41), self.has(42)) {
            (true, true, _) => Some(InvvpidType::SingleContext),
            (true, false, true) => Some(InvvpidType::AllContexts),
            _ => None,
        }
    }

    /// An address that is not canonical would be refused: the context then.
    const fn invvpid_address_type(&self, address: Gva) -> Option<InvvpidType> {
        let canonical = (address.0 as i64) << 16 >> 16 == address.0 as i64;
        if self.has(32) && self.has(40) && canonical {
            Some(InvvpidType::IndividualAddress)
        } else {
            self.invvpid_context_type()
        }
    }
}

/// # Safety
/// VMX root operation, CPL 0, and the CPU has INVEPT of type `kind`.
unsafe fn invept(kind: InveptType, pointer: u64) -> Result<(), InvalidationError> {
    let descriptor = [pointer, 0];
    let failed: u8;
    // SAFETY: reads sixteen bytes of `descriptor`; writes nothing but flags and `failed`.
    unsafe {
        asm!(
            "invept {kind}, [{descriptor}]",
            "setna {failed}",
            kind = in(reg) kind as u64,
            descriptor = in(reg) descriptor.as_ptr(),
            failed = lateout(reg_byte) failed,
            options(nostack),
        );
    }
    if failed == 0 {
        Ok(())
    } else {
        Err(InvalidationError::Refused)
    }
}

/// # Safety
/// VMX root operation, CPL 0, and the CPU has INVVPID of type `kind`.
unsafe fn invvpid(kind: InvvpidType, vpid: Vpid, address: Gva) -> Result<(), InvalidationError> {
    let descriptor = [u64::from(vpid.0), address.0];
    let failed: u8;
    // SAFETY: reads sixteen bytes of `descriptor`; writes nothing but flags and `failed`.
    unsafe {
        asm!(
            "invvpid {kind}, [{descriptor}]",
            "setna {failed}",
            kind = in(reg) kind as u64,
            descriptor = in(reg) descriptor.as_ptr(),
            failed = lateout(reg_byte) failed,
            options(nostack),
        );
    }
    if failed == 0 {
        Ok(())
    } else {
        Err(InvalidationError::Refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_zero_are_handed_out_once() {
        let mut allocator = VpidAllocator::new();
        let mut seen = vec![false; 65536];
        while let Some(vpid) = allocator.allocate() {
            assert!(!std::mem::replace(
                &mut seen[usize::from(vpid.bits())],
                true
            ));
        }
        assert!(!seen[0]);
        assert_eq!(seen.iter().filter(|seen| **seen).count(), 65535);
        assert_eq!(allocator.in_use(), 65535);
        allocator.free(Vpid::HOST);
        assert_eq!(allocator.allocate(), None);
        allocator.free(Vpid(0x1234));
        assert_eq!(allocator.allocate(), Some(Vpid(0x1234)));
        assert_eq!(allocator.allocate(), None);
    }

    #[test]
    fn a_freed_vpid_rests_while_others_are_left() {
        let mut allocator = VpidAllocator::new();
        let first = allocator.allocate().unwrap();
        assert_eq!(allocator.in_use(), 1);
        allocator.free(first);
        assert_eq!(allocator.in_use(), 0);
        for _ in 1..65535 {
            assert_ne!(allocator.allocate(), Some(first));
        }
        assert_eq!(allocator.allocate(), Some(first));
    }

    #[test]
    fn the_narrowest_type_that_the_cpu_has_is_chosen() {
        let invalidator = |bits| Invalidator::new(EptVpidCapabilities(bits));
        let bochs = invalidator(0x0f01_0633_4141);
        assert_eq!(bochs.invept_type(), Some(InveptType::SingleContext));
        assert_eq!(
            bochs.invvpid_context_type(),
            Some(InvvpidType::SingleContext)
        );
        assert_eq!(
            bochs.invvpid_address_type(Gva(0xffff_8000_0000_0000)),
            Some(InvvpidType::IndividualAddress)
        );
        assert_eq!(
            bochs.invvpid_address_type(Gva(0x8000_0000_0000)),
            Some(InvvpidType::SingleContext)
        );
        let global = invalidator(1 << 20 | 1 << 26 | 1 << 32 | 1 << 42);
        assert_eq!(global.invept_type(), Some(InveptType::AllContexts));
        assert_eq!(
            global.invvpid_address_type(Gva(0)),
            Some(InvvpidType::AllContexts)
        );
        let types_without_instructions = invalidator(3 << 25 | 0xf << 40);
        assert_eq!(types_without_instructions.invept_type(), None);
        assert_eq!(types_without_instructions.invvpid_context_type(), None);
    }
}
