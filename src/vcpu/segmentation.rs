//! Segment registers, their limits and types, and the descriptors that they are
//! loaded from (SDM 3, chapters 3 and 6).

use super::fault::{Exception, SegmentFault};

/// The segment registers in the order of their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// How the CPU makes linear addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// Real mode: limits, but no types.
    Real,
    /// Virtual-8086 mode: the same at privilege level 3.
    Virtual8086,
    /// Protected and compatibility mode.
    Protected,
    /// 64-bit mode: no limits, bases of FS and GS alone.
    Long,
}

impl Addressing {
    /// Whether a selector is a paragraph and not an index.
    pub const fn has_paragraphs(self) -> bool {
        matches!(self, Self::Real | Self::Virtual8086)
    }
}

/// Kinds of system descriptors (SDM 3, table 3-2), as [`Rights::kind`] says them; a TSS or gate without
/// a number has 32 or 64 bits.
pub mod kind {
    pub const TSS_16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const BUSY_TSS_16: u32 = 3;
    pub const CALL_GATE_16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const TSS: u32 = 9;
    pub const BUSY_TSS: u32 = 11;
    pub const CALL_GATE: u32 = 12;
}

/// Access rights in the format of a VMCS (SDM 3, 25.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(pub u32);

impl Rights {
    pub const UNUSABLE: Self = Self(1 << 16);
    /// Of a segment in virtual-8086 mode.
    pub const VIRTUAL_8086: Self = Self(0xf3);

    pub const ACCESSED: u32 = 1;
    pub const WRITABLE_OR_READABLE: u32 = 1 << 1;
    const EXPAND_DOWN_OR_CONFORMING: u32 = 1 << 2;
    const CODE: u32 = 1 << 3;
    const NOT_SYSTEM: u32 = 1 << 4;
    const PRESENT: u32 = 1 << 7;
    const LONG: u32 = 1 << 13;
    const BIG: u32 = 1 << 14;

    const fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }

    pub const fn is_usable(self) -> bool {
        !self.has(Self::UNUSABLE.0)
    }

    pub const fn is_present(self) -> bool {
        self.has(Self::PRESENT)
    }

    /// The descriptor's privilege level; of SS, the current one.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }

    /// Type, and S above it: what says which kind of descriptor it is.
    pub const fn kind(self) -> u32 {
        self.0 & 0x1f
    }

    /// Usable, and data that is neither writable nor accessed.
    pub const fn has_no_type(self) -> bool {
        self.is_usable() && self.kind() == Self::NOT_SYSTEM
    }

    pub const fn is_code(self) -> bool {
        self.has(Self::NOT_SYSTEM | Self::CODE)
    }

    pub const fn is_data(self) -> bool {
        self.has(Self::NOT_SYSTEM) && !self.has(Self::CODE)
    }

    pub const fn is_conforming(self) -> bool {
        self.is_code() && self.has(Self::EXPAND_DOWN_OR_CONFORMING)
    }

    pub const fn is_writable(self) -> bool {
        self.is_data() && self.has(Self::WRITABLE_OR_READABLE)
    }

    pub const fn is_readable(self) -> bool {
        self.is_data() || self.is_code() && self.has(Self::WRITABLE_OR_READABLE)
    }

    const fn expands_down(self) -> bool {
        self.is_data() && self.has(Self::EXPAND_DOWN_OR_CONFORMING)
    }

    /// D/B: offsets and operands have 32 bits.
    pub const fn is_big(self) -> bool {
        self.has(Self::BIG)
    }

    /// L: 64-bit code.
    pub const fn is_long(self) -> bool {
        self.has(Self::LONG)
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRegister {
    pub selector: u16,
    pub base: u64,
    /// The last offset, in bytes.
    pub limit: u32,
    pub rights: Rights,
}

impl SegmentRegister {
    /// A null selector loaded.
    pub const fn null(selector: u16) -> Self {
        Self {
            selector,
            base: 0,
            limit: 0,
            rights: Rights::UNUSABLE,
        }
    }

    /// A segment of virtual-8086 mode.
    pub const fn paragraph(selector: u16) -> Self {
        Self {
            selector,
            base: (selector as u64) << 4,
            limit: 0xffff,
            rights: Rights::VIRTUAL_8086,
        }
    }

    /// The linear address of the `bytes` bytes (at least one) at `offset` of this
    /// register, `segment`.
    ///
    /// # Errors
    /// #GP(0), for the stack #SS(0), where the segment does not have them, or not for that.
    pub fn linear(
        &self,
        segment: Segment,
        addressing: Addressing,
        offset: u64,
        bytes: u64,
        write: bool,
    ) -> Result<u64, Exception> {
        let fault = match segment {
            Segment::Ss => Exception::STACK,
            _ => Exception::GeneralProtection,
        };
        if addressing == Addressing::Long {
            let base = match segment {
                Segment::Fs | Segment::Gs => self.base,
                _ => 0,
            };
            let first = base.wrapping_add(offset);
            let last = first.wrapping_add(bytes - 1);
            return if is_canonical(first) && is_canonical(last) {
                Ok(first)
            } else {
                Err(fault)
            };
        }
        let rights = self.rights;
        let of_this_type = addressing.has_paragraphs()
            || rights.is_usable()
                && if write {
                    rights.is_writable()
                } else {
                    rights.is_readable()
                };
        let (limit, last) = (self.limit.into(), offset.saturating_add(bytes - 1));
        let inside = if rights.expands_down() && addressing == Addressing::Protected {
            let top = if rights.is_big() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            // At the end of 4 GiB an access wraps, or faults: that is up to the CPU (SDM 3, 6.3).
            last <= limit || limit == 0xffff_ffff
        };
        if of_this_type && inside {
            Ok(self.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(fault)
        }
    }
}

/// Whether `address` can be a linear address in 64-bit mode, with 48 bits.
pub const fn is_canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

/// A descriptor of 8 bytes, or the first half of one of 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Of one in a table, in bytes.
    pub const BYTES: u64 = 8;

    /// The same, of code or data, with the accessed bit.
    pub const fn accessed(self) -> Option<Self> {
        const NOT_SYSTEM: u64 = 1 << 44;
        const ACCESSED: u64 = 1 << 40;
        if self.0 & NOT_SYSTEM == 0 {
            return None;
        }
        Some(Self(self.0 | ACCESSED))
    }

    pub const fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }

    /// In bytes, whatever the granularity.
    pub const fn limit(self) -> u32 {
        const GRANULAR: u64 = 1 << 55;
        let limit = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.0 & GRANULAR != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    pub const fn rights(self) -> Rights {
        Rights((self.0 >> 40) as u32 & 0xf0ff)
    }

    /// The register that is loaded with it.
    pub const fn register(self, selector: u16) -> SegmentRegister {
        SegmentRegister {
            selector,
            base: self.base(),
            limit: self.limit(),
            rights: self.rights(),
        }
    }
}

/// What GDTR and IDTR hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u16,
}

/// Descriptor tables in the guest's memory, as the CPU itself accesses them: with
/// supervisor rights.
pub trait DescriptorTables {
    fn gdtr(&self) -> TableRegister;
    fn ldtr(&self) -> SegmentRegister;

    /// Reads memory.
    ///
    /// # Errors
    /// What the guest is to be given.
    fn load_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Exception>;

    /// Writes memory.
    ///
    /// # Errors
    /// What the guest is to be given.
    fn store_system(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception>;
}

/// Where the descriptor of `selector` is; `None` beyond the table's end, or for null.
fn descriptor_address(tables: &impl DescriptorTables, selector: u16) -> Option<u64> {
    const LOCAL: u16 = 1 << 2;
    if is_null(selector) {
        return None;
    }
    let index = selector & !7;
    let (base, limit) = if selector & LOCAL == 0 {
        let gdtr = tables.gdtr();
        (gdtr.base, gdtr.limit.into())
    } else {
        let ldtr = tables.ldtr();
        if !ldtr.rights.is_usable() {
            return None;
        }
        (ldtr.base, ldtr.limit)
    };
    (u32::from(index) + 7 <= limit).then(|| base.wrapping_add(index.into()))
}

pub const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Why a segment register is loaded: which exception says that it cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Instruction,
    TaskSwitch,
}

impl Purpose {
    const fn fault(self) -> SegmentFault {
        match self {
            Self::Instruction => SegmentFault::GeneralProtection,
            Self::TaskSwitch => SegmentFault::InvalidTss,
        }
    }
}

/// The descriptor of `selector` and where it is; `None` beyond the table's end, or for null.
///
/// # Errors
/// Where it cannot be read.
pub fn find_descriptor(
    tables: &mut impl DescriptorTables,
    selector: u16,
) -> Result<Option<(u64, Descriptor)>, Exception> {
    let Some(address) = descriptor_address(tables, selector) else {
        return Ok(None);
    };
    let mut bytes = [0; 8];
    tables.load_system(address, &mut bytes)?;
    Ok(Some((address, Descriptor(u64::from_le_bytes(bytes)))))
}

/// The same of one that is to be there.
///
/// # Errors
/// `fault` of the selector where it is not.
pub fn descriptor(
    tables: &mut impl DescriptorTables,
    selector: u16,
    fault: SegmentFault,
) -> Result<(u64, Descriptor), Exception> {
    find_descriptor(tables, selector)?.ok_or(fault.of(selector))
}

/// The register of a code or data segment whose descriptor was accepted; marks it as
/// accessed where it is not.
///
/// # Errors
/// Where it cannot be written.
pub fn accept(
    tables: &mut impl DescriptorTables,
    (address, descriptor): (u64, Descriptor),
    selector: u16,
) -> Result<SegmentRegister, Exception> {
    let accessed = descriptor.accessed().unwrap_or(descriptor);
    if accessed != descriptor {
        let [.., rights, _, _] = accessed.0.to_le_bytes();
        tables.store_system(address.wrapping_add(5), &[rights])?;
    }
    Ok(accessed.register(selector))
}

/// What ES, SS, DS, FS or GS is loaded with in protected mode (SDM 2, MOV; SDM 3, 9.3);
/// `long` in 64-bit mode.
///
/// # Errors
/// As `purpose` says.
pub fn load_data(
    tables: &mut impl DescriptorTables,
    segment: Segment,
    selector: u16,
    cpl: u8,
    long: bool,
    purpose: Purpose,
) -> Result<SegmentRegister, Exception> {
    let fault = purpose.fault();
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        let stack_needs_one = segment == Segment::Ss && !(long && cpl < 3 && rpl == cpl);
        return if stack_needs_one {
            Err(fault.of(selector))
        } else {
            let mut register = SegmentRegister::null(selector);
            // The current privilege level stays where it is looked up.
            register.rights.0 |= u32::from(cpl) << 5;
            Ok(register)
        };
    }
    let found @ (_, descriptor) = descriptor(tables, selector, fault)?;
    let rights = descriptor.rights();
    let dpl = rights.dpl();
    if segment == Segment::Ss {
        if rpl != cpl || dpl != cpl || !rights.is_writable() {
            return Err(fault.of(selector));
        }
        if !rights.is_present() {
            return Err(SegmentFault::Stack.of(selector));
        }
    } else {
        let reachable = rights.is_conforming() || rpl <= dpl && cpl <= dpl;
        if !rights.is_readable() || !reachable {
            return Err(fault.of(selector));
        }
        if !rights.is_present() {
            return Err(SegmentFault::NotPresent.of(selector));
        }
    }
    accept(tables, found, selector)
}

/// What CS is loaded with by a return or a task switch in protected mode, or IA-32e mode: the RPL
/// of `selector` is the new privilege level (SDM 2, RET).
///
/// # Errors
/// As `purpose` says.
pub fn load_code(
    tables: &mut impl DescriptorTables,
    selector: u16,
    ia32e: bool,
    purpose: Purpose,
) -> Result<SegmentRegister, Exception> {
    let fault = purpose.fault();
    let found @ (_, descriptor) = descriptor(tables, selector, fault)?;
    let rights = descriptor.rights();
    let rpl = (selector & 3) as u8;
    let allowed = if rights.is_conforming() {
        rights.dpl() <= rpl
    } else {
        rights.dpl() == rpl
    };
    // In IA-32e mode both sizes at once are reserved.
    let sized = !(ia32e && rights.is_long() && rights.is_big());
    if !rights.is_code() || !allowed || !sized {
        return Err(fault.of(selector));
    }
    if !rights.is_present() {
        return Err(SegmentFault::NotPresent.of(selector));
    }
    accept(tables, found, selector)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAT: SegmentRegister = SegmentRegister {
        selector: 0x10,
        base: 0,
        limit: 0xffff_ffff,
        rights: Rights(0xc093),
    };

    fn offset(
        register: SegmentRegister,
        segment: Segment,
        at: u64,
        write: bool,
    ) -> Result<u64, Exception> {
        register.linear(segment, Addressing::Protected, at, 4, write)
    }

    #[test]
    fn limits() {
        let small = SegmentRegister {
            base: 0xffff_f000,
            limit: 0xfff,
            ..FLAT
        };
        assert_eq!(offset(small, Segment::Ds, 0xffc, true), Ok(0xffff_fffc));
        assert_eq!(
            offset(small, Segment::Ds, 0xffd, true),
            Err(Exception::GeneralProtection)
        );
        assert_eq!(
            offset(small, Segment::Ss, 0xffd, false),
            Err(Exception::STACK)
        );
        let down = SegmentRegister {
            rights: Rights(0x97),
            ..small
        };
        assert_eq!(offset(down, Segment::Ss, 0x1000, true), Ok(0));
        assert_eq!(
            offset(down, Segment::Ss, 0xfff, true),
            Err(Exception::STACK)
        );
        assert_eq!(
            offset(down, Segment::Ss, 0xfffd, true),
            Err(Exception::STACK)
        );
        let wide = SegmentRegister {
            rights: Rights(0x4097),
            ..small
        };
        assert_eq!(offset(wide, Segment::Ss, 0xfffd, true), Ok(0xeffd));
    }

    #[test]
    fn types() {
        let with = |rights| SegmentRegister {
            rights: Rights(rights),
            ..FLAT
        };
        for (rights, read, write) in [
            (0xc093, true, true),
            (0xc091, true, false),
            (0xc09b, true, false),
            (0xc099, false, false),
            (0x1_0000, false, false),
        ] {
            let linear = |write| offset(with(rights), Segment::Ds, 0, write);
            assert_eq!(linear(false).is_ok(), read, "{rights:x}");
            assert_eq!(linear(true).is_ok(), write, "{rights:x}");
            // Real mode writes to its code segment.
            let real = with(rights).linear(Segment::Cs, Addressing::Real, 0, 1, true);
            assert!(real.is_ok());
        }
    }

    #[test]
    fn sixty_four_bits() {
        let gs = SegmentRegister {
            base: 0xffff_8000_0000_0000,
            ..FLAT
        };
        let long = |segment, at, bytes| gs.linear(segment, Addressing::Long, at, bytes, true);
        assert_eq!(long(Segment::Gs, 8, 8), Ok(0xffff_8000_0000_0008));
        assert_eq!(long(Segment::Ds, 8, 8), Ok(8));
        assert_eq!(long(Segment::Ds, 0x7fff_ffff_fff8, 8), Ok(0x7fff_ffff_fff8));
        assert_eq!(
            long(Segment::Ds, 0x7fff_ffff_fff9, 8),
            Err(Exception::GeneralProtection)
        );
        assert_eq!(long(Segment::Ss, 1 << 47, 1), Err(Exception::STACK));
    }

    #[test]
    fn descriptors() {
        let descriptor = Descriptor(0x12cf_9b34_5678_ffff);
        assert_eq!(descriptor.base(), 0x1234_5678);
        assert_eq!(descriptor.limit(), 0xffff_ffff);
        assert_eq!(descriptor.rights(), Rights(0xc09b));
        assert_eq!(Descriptor(0x0003_8900_0000_abcd).limit(), 0x3_abcd);
        let fresh = Descriptor(0x12cf_9a34_5678_ffff);
        assert_eq!(fresh.accessed(), Some(descriptor));
        assert_eq!(Descriptor(0x0003_8900_0000_abcd).accessed(), None);
    }
}
