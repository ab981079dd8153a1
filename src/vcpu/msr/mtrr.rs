//! Memory-type range registers (SDM 3, 13.11): eight variable ranges, the
//! fixed ones, and write combining.
//!
//! They are kept for the guest to read and write. The memory types that count
//! are those of its EPT, so a change here needs nothing else.

use super::number::{MTRR_CAP, MTRR_DEF_TYPE};
use core::ops::Range;

const VARIABLE: usize = 8;
/// VCNT, fixed ranges (bit 8), write combining (bit 10).
const CAPABILITIES: u64 = VARIABLE as u64 | 1 << 8 | 1 << 10;

const FIRST_VARIABLE: u32 = 0x200;
const LAST_VARIABLE: u32 = FIRST_VARIABLE + 2 * VARIABLE as u32 - 1;
/// MTRRfix64K_00000, fix16K_80000 and A0000, fix4K_C0000 to F8000.
const FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

const ENABLE: u64 = 1 << 11;
const FIXED_ENABLE: u64 = 1 << 10;
/// PHYSMASK: this range counts.
const VALID: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;
const ALL_WRITE_BACK: u64 = 0x0606_0606_0606_0606;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mtrrs {
    /// PHYSBASE and PHYSMASK in turn.
    variable: [u64; 2 * VARIABLE],
    fixed: [u64; FIXED.len()],
    default_type: u64,
}

impl Mtrrs {
    pub(super) fn firmware(mmio: Range<u64>, physical_mask: u64) -> Self {
        let mut mtrrs = Self {
            variable: [0; 2 * VARIABLE],
            fixed: [ALL_WRITE_BACK; FIXED.len()],
            default_type: ENABLE | FIXED_ENABLE | WRITE_BACK,
        };
        mtrrs.fixed[2] = 0; // 0xa0000 to 0xbffff: the VGA window
        let mut start = mmio.start & !0xfff;
        for range in mtrrs.variable.chunks_exact_mut(2) {
            if start >= mmio.end {
                break;
            }
            // The largest naturally aligned power of two that starts here and fits.
            let fits = 1 << (mmio.end - start).ilog2();
            let size = if start == 0 {
                fits
            } else {
                fits.min(1 << start.trailing_zeros())
            };
            range[0] = start & physical_mask;
            range[1] = !(size - 1) & physical_mask & !0xfff | VALID;
            start += size;
        }
        mtrrs
    }

    pub(super) fn read(&self, msr: u32) -> Option<u64> {
        match msr {
            MTRR_CAP => Some(CAPABILITIES),
            MTRR_DEF_TYPE => Some(self.default_type),
            FIRST_VARIABLE..=LAST_VARIABLE => {
                self.variable.get((msr - FIRST_VARIABLE) as usize).copied()
            }
            _ => {
                let at = FIXED.iter().position(|&fixed| fixed == msr)?;
                self.fixed.get(at).copied()
            }
        }
    }

    /// Whether the value was accepted; `None` when this is no MTRR.
    pub(super) fn write(&mut self, msr: u32, value: u64, physical_mask: u64) -> Option<bool> {
        let (register, valid) = match msr {
            MTRR_DEF_TYPE => (
                &mut self.default_type,
                value & !(0xff | ENABLE | FIXED_ENABLE) == 0 && is_type(value as u8),
            ),
            FIRST_VARIABLE..=LAST_VARIABLE => {
                let is_mask = msr & 1 != 0;
                let low = if is_mask { VALID } else { 0xff };
                let valid = value & !(physical_mask & !0xfff | low) == 0
                    && (is_mask || is_type(value as u8));
                let register = self.variable.get_mut((msr - FIRST_VARIABLE) as usize)?;
                (register, valid)
            }
            _ => {
                let at = FIXED.iter().position(|&fixed| fixed == msr)?;
                let valid = value.to_le_bytes().iter().all(|&t| is_type(t));
                (self.fixed.get_mut(at)?, valid)
            }
        };
        if valid {
            *register = value;
        }
        Some(valid)
    }
}

/// UC, WC, WT, WP, WB.
fn is_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}
