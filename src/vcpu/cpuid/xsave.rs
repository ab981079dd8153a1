//! The layout of the XSAVE area (SDM 1, 13.4), and whether the host's leaf 0xD
//! can be believed.
//!
//! The emulated PC names components without a size, and kernels then warn
//! at length or turn XSAVE off: what does not add up is not shown.

use super::{EAX, EBX, ECX, Registers};

pub(super) const X87: u64 = 1;
pub(super) const SSE: u64 = 1 << 1;
pub(super) const AVX: u64 = 1 << 2;
/// Opmask, upper halves of ZMM0..15, ZMM16..31.
pub(super) const AVX512: u64 = 7 << 5;

/// Components with a place in the table: x87 (0) to ZMM16..31 (7).
pub(super) const COMPONENTS: u32 = 8;
/// The legacy region and the XSAVE header.
const FIXED_SIZE: u32 = 512 + 64;

/// Sizes that the architecture gives to the components that are shown, in bytes; 0 for those that are not.
const SIZES: [u32; COMPONENTS as usize] = [0, 0, 256, 0, 0, 64, 512, 1024];

/// Where one component lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    offset: u32,
    size: u32,
    /// In the compacted format it starts at a multiple of 64.
    aligned: bool,
}

/// The XSAVE area as the guest is shown it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct XsaveArea {
    /// The bits that XCR0 may hold; 0 without XSAVE.
    pub(super) supported: u64,
    /// XSAVEC, hence the compacted format.
    pub(super) compaction: bool,
    /// Leaf 0xD.1 EAX.
    instructions: u32,
    components: [Component; COMPONENTS as usize],
}

impl XsaveArea {
    pub(super) fn from_host(host: &impl Fn(u32, u32) -> Registers, xsaves: bool) -> Self {
        let has_xsave = host(0, 0)[EAX] >= 0xd && host(1, 0)[ECX] & 1 << 26 != 0;
        let [low, _, total, _] = if has_xsave { host(0xd, 0) } else { [0; 4] };
        if u64::from(low) & (X87 | SSE) != X87 | SSE || total < FIXED_SIZE {
            return Self::default();
        }
        let mut area = Self {
            supported: X87 | SSE,
            ..Self::default()
        };
        let mut found = 0;
        let mut believable = true;
        let mut end = FIXED_SIZE;
        for i in 2..32u32 {
            if low & 1 << i == 0 {
                continue;
            }
            let [size, offset, flags, _] = host(0xd, i);
            let Some(past) = offset.checked_add(size) else {
                believable = false;
                continue;
            };
            let expected = SIZES.get(i as usize).copied().unwrap_or(0);
            let fits =
                size != 0 && past <= total && (expected == 0 || size == expected && offset >= end);
            believable &= fits;
            if !fits || expected == 0 {
                continue;
            }
            end = past;
            if let Some(component) = area.components.get_mut(i as usize) {
                found |= 1 << i;
                *component = Component {
                    offset,
                    size,
                    aligned: flags & 2 != 0,
                };
            }
        }
        if found & AVX != 0 {
            area.supported |= AVX;
            if found & AVX512 == AVX512 {
                area.supported |= AVX512;
            }
        }
        // XSAVEOPT (0), XSAVEC (1), XGETBV with ECX = 1 (2), XSAVES (3). A CPU whose sizes are
        // wrong is not believed about the compacted format, which rests on them.
        let offered = host(0xd, 1)[EAX];
        area.compaction = believable && offered & 1 << 1 != 0;
        area.instructions = offered & (1 << 0 | 1 << 2);
        if area.compaction {
            area.instructions |= 1 << 1;
            area.instructions |= if xsaves { offered & 1 << 3 } else { 0 };
        }
        area
    }

    pub(super) fn avx(&self) -> bool {
        self.supported & AVX != 0
    }

    pub(super) fn avx512(&self) -> bool {
        self.supported & AVX512 == AVX512
    }

    fn shown(&self, mask: u64) -> impl Iterator<Item = &Component> {
        let mask = mask & self.supported;
        self.components
            .iter()
            .enumerate()
            .filter(move |(i, c)| mask & 1 << i != 0 && c.size != 0)
            .map(|(_, c)| c)
    }

    /// Bytes of the standard format for these components.
    pub(super) fn standard_size(&self, mask: u64) -> u32 {
        self.shown(mask)
            .fold(FIXED_SIZE, |size, c| size.max(c.offset + c.size))
    }

    /// Bytes of the compacted format for these components.
    pub(super) fn compacted_size(&self, mask: u64) -> u32 {
        self.shown(mask).fold(FIXED_SIZE, |size, c| {
            let start = if c.aligned {
                size.next_multiple_of(64)
            } else {
                size
            };
            start + c.size
        })
    }

    /// Leaf 0xD, sub-leaf `i`; the sizes for the current XCR0 are left at 0.
    pub(super) fn leaf(&self, i: u32) -> Registers {
        match i {
            0 => [
                self.supported as u32,
                0,
                self.standard_size(u64::MAX),
                (self.supported >> 32) as u32,
            ],
            1 => [self.instructions, 0, 0, 0],
            _ => {
                let mut row = [0; 4];
                if let Some(c) = self.shown(1 << i).next() {
                    row[EAX] = c.size;
                    row[EBX] = c.offset;
                    row[ECX] = u32::from(c.aligned) << 1;
                }
                row
            }
        }
    }
}
