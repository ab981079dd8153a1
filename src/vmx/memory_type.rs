//! Memory types, and what the MTRRs say of a range (SDM vol. 3, 13.11).
//!
//! EPT ignores the MTRRs, so whoever maps host memory puts the type that they
//! give it into the EPT entry. A large page has one type: [`Mtrrs::uniform`]
//! tells whether a range has one. Reading the MSRs is the caller's part, the
//! rest is arithmetic.

use arrayvec::ArrayVec;

use crate::addr::Hpa;

/// IA32_MTRRCAP.
const MTRRCAP: u32 = 0xfe;
/// IA32_MTRR_DEF_TYPE.
const DEF_TYPE: u32 = 0x2ff;
/// IA32_MTRR_PHYSBASE0; the mask is at the next number, and so on by pairs.
const PHYSBASE0: u32 = 0x200;
/// IA32_MTRR_FIX64K_00000, IA32_MTRR_FIX16K_80000 and its successor,
/// IA32_MTRR_FIX4K_C0000 and its successors: eight ranges of memory in each.
const FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
/// The fixed ranges cover the first MiB.
const FIXED_END: u64 = 0x10_0000;
/// As many variable ranges as any CPU has had room for in its MSR numbers (0x200 to 0x24f).
const VARIABLE: usize = 40;

/// A memory type, with its encoding in MTRRs, PAT and EPT (SDM vol. 3, table 13-8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MemoryType {
    Uncacheable = 0,
    WriteCombining = 1,
    WriteThrough = 4,
    WriteProtected = 5,
    WriteBack = 6,
}

impl MemoryType {
    /// The type with this encoding; `None` for a reserved one.
    pub const fn from_encoding(encoding: u64) -> Option<Self> {
        match encoding {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }

    /// Firmware cannot set a reserved type without a fault; where an emulator
    /// lets it, the safe reading is the one that caches nothing.
    const fn from_encoding_or_uncacheable(encoding: u64) -> Self {
        match Self::from_encoding(encoding) {
            Some(memory_type) => memory_type,
            None => Self::Uncacheable,
        }
    }

    /// The type where two variable ranges overlap (SDM vol. 3, 13.11.4.1). The
    /// SDM leaves all but two cases undefined; there too, nothing is cached.
    const fn overlap(self, other: Self) -> Self {
        use MemoryType::{Uncacheable, WriteBack, WriteThrough};
        match (self, other) {
            (WriteThrough, WriteBack) | (WriteBack, WriteThrough) => WriteThrough,
            _ if self as u8 == other as u8 => self,
            _ => Uncacheable,
        }
    }
}

/// One valid variable range.
#[derive(Clone, Copy, Debug)]
struct Variable {
    base: u64,
    mask: u64,
    /// The mask has no hole, so the range is one piece: from `base`, this many bytes.
    length: Option<u64>,
    memory_type: MemoryType,
}

impl Variable {
    const fn contains(&self, address: u64) -> bool {
        address & self.mask == self.base
    }

    /// The lowest address above `address` at which the range may begin or end.
    fn next_edge(&self, address: u64) -> Option<u64> {
        match self.length {
            Some(length) => [Some(self.base), self.base.checked_add(length)]
                .into_iter()
                .flatten()
                .find(|edge| *edge > address),
            // A mask with holes: pieces may begin at each multiple of its lowest bit.
            None => {
                let granule = 1u64 << self.mask.trailing_zeros().min(63);
                (address & !(granule - 1)).checked_add(granule)
            }
        }
    }
}

/// The MTRRs of a CPU. All CPUs of a machine have the same (SDM vol. 3, 13.11.8).
#[derive(Clone, Debug)]
pub struct Mtrrs {
    enabled: bool,
    default: MemoryType,
    fixed: Option<[u64; FIXED.len()]>,
    variable: ArrayVec<Variable, VARIABLE>,
}

impl Mtrrs {
    /// Reads all MTRRs by `rdmsr`, which is given numbers that exist on a CPU
    /// with MTRRs (CPUID.1:EDX\[12\]). `address_width` is the CPU's
    /// physical-address width in bits.
    pub fn read(address_width: u32, mut rdmsr: impl FnMut(u32) -> u64) -> Self {
        let capabilities = rdmsr(MTRRCAP);
        let control = rdmsr(DEF_TYPE);
        let fixed_enabled = capabilities >> 8 & 1 != 0 && control >> 10 & 1 != 0;
        let address = ((1u64 << address_width.min(52)) - 1) & !0xfff;
        let count = (capabilities & 0xff).min(VARIABLE as u64) as u32;
        let mut variable = ArrayVec::new();
        for number in 0..count {
            let base = rdmsr(PHYSBASE0 + 2 * number);
            let mask = rdmsr(PHYSBASE0 + 2 * number + 1);
            if mask >> 11 & 1 != 0 {
                let mask = mask & address;
                let length = 1u64 << mask.trailing_zeros().min(52);
                variable.push(Variable {
                    base: base & mask,
                    mask,
                    length: (mask == address & !(length - 1)).then_some(length),
                    memory_type: MemoryType::from_encoding_or_uncacheable(base & 0xff),
                });
            }
        }
        Self {
            enabled: control >> 11 & 1 != 0,
            default: MemoryType::from_encoding_or_uncacheable(control & 0xff),
            fixed: fixed_enabled.then(|| FIXED.map(&mut rdmsr)),
            variable,
        }
    }

    /// The memory type at `hpa` (SDM vol. 3, 13.11.4.1).
    pub fn memory_type(&self, hpa: Hpa) -> MemoryType {
        if !self.enabled {
            return MemoryType::Uncacheable;
        }
        if let Some(fixed) = self.fixed_type(hpa.0) {
            return fixed;
        }
        self.variable
            .iter()
            .filter(|range| range.contains(hpa.0))
            .map(|range| range.memory_type)
            .reduce(MemoryType::overlap)
            .unwrap_or(self.default)
    }

    /// The one memory type of the `bytes` bytes from `start` on; `None` when
    /// there are several, or when the range is empty or passes 2^64.
    pub fn uniform(&self, start: Hpa, bytes: u64) -> Option<MemoryType> {
        let last = start.0.checked_add(bytes.checked_sub(1)?)?;
        let memory_type = self.memory_type(start);
        let mut at = start.0;
        while let Some(next) = self.next_boundary(at).filter(|next| *next <= last) {
            if self.memory_type(Hpa(next)) != memory_type {
                return None;
            }
            at = next;
        }
        Some(memory_type)
    }

    fn fixed_type(&self, address: u64) -> Option<MemoryType> {
        let fixed = self.fixed.as_ref().filter(|_| address < FIXED_END)?;
        let (register, range) = match address {
            0..0x8_0000 => (0, address >> 16),
            0x8_0000..0xc_0000 => (1 + ((address - 0x8_0000) >> 17), address >> 14),
            _ => (3 + ((address - 0xc_0000) >> 15), address >> 12),
        };
        let register = fixed.get(register as usize)?;
        Some(MemoryType::from_encoding_or_uncacheable(
            register >> (8 * (range & 7)) & 0xff,
        ))
    }

    /// The lowest address above `address` at which another type may begin.
    fn next_boundary(&self, address: u64) -> Option<u64> {
        if !self.enabled {
            return None;
        }
        let fixed = (self.fixed.is_some() && address < FIXED_END).then_some(match address {
            0..0x8_0000 => (address | 0xffff) + 1,
            0x8_0000..0xc_0000 => (address | 0x3fff) + 1,
            _ => (address | 0xfff) + 1,
        });
        let variable = self
            .variable
            .iter()
            .filter_map(|range| range.next_edge(address));
        variable.chain(fixed).min()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use MemoryType::*;

    const WIDTH: u32 = 36;
    const DEFAULT: u64 = 6;

    /// MTRRs with fixed ranges from `fixed` and variable ones from (base, mask) pairs.
    fn mtrrs(control: u64, fixed: u64, variable: &[(u64, u64)]) -> Mtrrs {
        Mtrrs::read(WIDTH, |msr| match msr {
            MTRRCAP => 0x500 | variable.len() as u64,
            DEF_TYPE => control,
            0x200..0x250 => {
                let (base, mask) = variable[(msr - 0x200) as usize / 2];
                if msr % 2 == 0 { base } else { mask }
            }
            _ => fixed,
        })
    }

    /// The mask register of a valid range of `bytes` bytes.
    fn mask(bytes: u64) -> u64 {
        ((1 << WIDTH) - 1) & !(bytes - 1) | 0x800
    }

    #[test]
    fn disabled_mtrrs_make_everything_uncacheable() {
        let mtrrs = mtrrs(
            0x400 | DEFAULT,
            0x0606_0606_0606_0606,
            &[(6, mask(1 << 30))],
        );
        assert_eq!(mtrrs.uniform(Hpa(0), 1 << 36), Some(Uncacheable));
    }

    #[test]
    fn fixed_ranges_go_before_variable_ones_in_the_first_mebibyte() {
        let types = 0x0605_0401_0006_0504;
        let mtrrs = mtrrs(0xc00 | DEFAULT, types, &[(0, mask(1 << 21))]);
        for (address, expected) in [
            (0x0_0000, WriteThrough),
            (0x1_ffff, WriteProtected),
            (0x7_0000, WriteBack),
            (0x8_0000, WriteThrough),
            (0x8_4000, WriteProtected),
            (0xa_0000, WriteThrough),
            (0xb_c000, WriteBack),
            (0xc_0000, WriteThrough),
            (0xc_7fff, WriteBack),
            (0xc_8000, WriteThrough),
            (0xf_ffff, WriteBack),
            (0x10_0000, Uncacheable),
            (0x20_0000, WriteBack),
        ] {
            assert_eq!(mtrrs.memory_type(Hpa(address)), expected, "{address:#x}");
        }
        assert_eq!(mtrrs.uniform(Hpa(0), 0x20_0000), None);
        assert_eq!(mtrrs.uniform(Hpa(0x8_0000), 0x4000), Some(WriteThrough));
    }

    #[test]
    fn fixed_ranges_that_are_off_leave_the_first_mebibyte_to_the_others() {
        let mtrrs = mtrrs(0x800 | DEFAULT, 0, &[(5, mask(1 << 16))]);
        assert_eq!(mtrrs.memory_type(Hpa(0xffff)), WriteProtected);
        assert_eq!(mtrrs.memory_type(Hpa(0x1_0000)), WriteBack);
    }

    #[test]
    fn overlaps_follow_the_manual() {
        let overlap = |a: MemoryType, b: MemoryType| {
            let ranges = [(a as u64, mask(1 << 30)), (b as u64, mask(1 << 30))];
            mtrrs(0x800 | DEFAULT, 0, &ranges).memory_type(Hpa(0))
        };
        let all = [
            Uncacheable,
            WriteCombining,
            WriteThrough,
            WriteProtected,
            WriteBack,
        ];
        for a in all {
            assert_eq!(overlap(a, a), a);
            assert_eq!(overlap(a, Uncacheable), Uncacheable);
            assert_eq!(overlap(Uncacheable, a), Uncacheable);
        }
        assert_eq!(overlap(WriteBack, WriteThrough), WriteThrough);
        assert_eq!(overlap(WriteThrough, WriteBack), WriteThrough);
    }

    #[test]
    fn an_invalid_range_does_not_count() {
        let mtrrs = mtrrs(0x800 | DEFAULT, 0, &[(0, mask(1 << 30) & !0x800)]);
        assert_eq!(mtrrs.memory_type(Hpa(0)), WriteBack);
    }

    #[test]
    fn a_range_that_a_hole_cuts_is_not_uniform() {
        let hole = (0xc000_0000, mask(1 << 30));
        let mtrrs = mtrrs(0x800 | DEFAULT, 0, &[hole]);
        assert_eq!(mtrrs.uniform(Hpa(0x8000_0000), 1 << 30), Some(WriteBack));
        assert_eq!(mtrrs.uniform(Hpa(0x8000_0000), (1 << 30) + 1), None);
        assert_eq!(mtrrs.uniform(Hpa(0), 1 << 36), None);
        assert_eq!(mtrrs.uniform(Hpa(0xc000_0000), 1 << 30), Some(Uncacheable));
        assert_eq!(mtrrs.uniform(Hpa(0), 0), None);
        assert_eq!(mtrrs.uniform(Hpa(u64::MAX), 2), None);
    }

    fn any_range() -> impl Strategy<Value = (u64, u64)> {
        let types = prop::sample::select(vec![0u64, 1, 4, 5, 6]);
        // Sizes from 4 KiB to 128 KiB within 1 MiB; sometimes a mask with a hole.
        (types, 0u64..256, 12u32..18, prop::option::of(13u32..20)).prop_map(
            |(kind, page, shift, hole)| {
                let hole = hole.map_or(0, |bit| 1 << bit);
                (page << 12 | kind, mask(1 << shift) & !hole)
            },
        )
    }

    proptest! {
        #[test]
        fn uniform_says_what_a_look_at_each_page_says(
            ranges in prop::collection::vec(any_range(), 0..5),
            fixed: bool,
            first in 0u64..300,
            pages in 1u64..64,
        ) {
            let control = 0x800 | DEFAULT | u64::from(fixed) << 10;
            let mtrrs = mtrrs(control, 0x0606_0006_0606_0606, &ranges);
            let mut types = (first..first + pages).map(|page| mtrrs.memory_type(Hpa(page << 12)));
            let head = types.next().unwrap();
            let expected = types.all(|other| other == head).then_some(head);
            prop_assert_eq!(mtrrs.uniform(Hpa(first << 12), pages << 12), expected);
        }
    }
}
