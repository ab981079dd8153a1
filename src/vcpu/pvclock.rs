//! KVM's paravirtual clock, which every Linux knows how to read.
//!
//! The guest writes the address of a structure to an MSR and computes its time
//! as `system_time + ((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul / 2^32`,
//! in nanoseconds, without an exit. The caller writes the bytes made here into
//! guest memory. Layout: Linux, `Documentation/virt/kvm/x86/msr.rst`.

use super::msr::GeneralProtection;
use crate::addr::Gpa;
use crate::devices::clock::NANOS;

/// Size of `struct pvclock_vcpu_time_info`, in bytes.
pub const TIME_INFO_SIZE: usize = 32;
/// Size of `struct pvclock_wall_clock`, in bytes.
pub const WALL_CLOCK_SIZE: usize = 12;

/// PVCLOCK_TSC_STABLE_BIT: the counters of all vCPUs agree.
const FLAG_TSC_STABLE: u8 = 1;

/// What the guest asked for in MSR 0x4b56_4d01.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemTime {
    Disabled,
    /// Where this vCPU's structure is.
    At(Gpa),
}

impl SystemTime {
    /// Bit 0 enables; the address is a multiple of 4 that leaves bit 1 clear.
    pub fn from_msr(value: u64) -> Result<Self, GeneralProtection> {
        if value & 1 == 0 {
            return Ok(Self::Disabled);
        }
        if value & 2 != 0 {
            return Err(GeneralProtection);
        }
        Ok(Self::At(Gpa(value & !1)))
    }
}

/// Where MSR 0x4b56_4d00 asks for the wall clock, once: a multiple of 4.
pub fn wall_clock_address(value: u64) -> Result<Gpa, GeneralProtection> {
    if value & 3 == 0 {
        Ok(Gpa(value))
    } else {
        Err(GeneralProtection)
    }
}

/// The factor from ticks to nanoseconds, as the guest applies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Left shift of the ticks; a right shift when negative.
    pub shift: i8,
    /// Multiplied with the shifted ticks, in units of 2^-32.
    pub multiplier: u32,
}

impl Scale {
    /// For a counter of `tsc_hz` ticks a second; 0 is taken as 1.
    ///
    /// The multiplier is kept in its upper half, so the factor is right to one
    /// part in 2^31.
    pub fn new(tsc_hz: u64) -> Self {
        // Bring ticks per second into (10^9, 2 * 10^9], so that the factor is in [1/2, 1).
        let mut rate = u128::from(tsc_hz.max(1)) << 32;
        let one = u128::from(NANOS) << 32;
        let mut shift = 0i8;
        while rate > 2 * one {
            rate >>= 1;
            shift -= 1;
        }
        while rate <= one {
            rate <<= 1;
            shift += 1;
        }
        let multiplier = ((one << 32) + rate / 2) / rate;
        Self {
            shift,
            multiplier: u32::try_from(multiplier).unwrap_or(u32::MAX),
        }
    }

    /// Nanoseconds in `ticks`, by the guest's own arithmetic.
    pub fn nanos(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 {
            ticks >> self.shift.unsigned_abs()
        } else {
            ticks << self.shift
        };
        ((u128::from(shifted) * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// The structure of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeInfo {
    /// Odd while the structure is being written; even and different afterwards.
    pub version: u32,
    /// The guest's counter when `system_time` was right.
    pub tsc_timestamp: u64,
    /// Nanoseconds since the VM started.
    pub system_time: u64,
    pub scale: Scale,
}

impl TimeInfo {
    /// The structure as it lies in guest memory.
    ///
    /// A vCPU that reads while it is replaced must see an odd version: write
    /// the version with [`TimeInfo::version_while_writing`] first, then bytes 4
    /// and up, then the version. While the vCPU is in its exit, one write will do.
    pub fn to_bytes(&self) -> [u8; TIME_INFO_SIZE] {
        let mut bytes = [0; TIME_INFO_SIZE];
        bytes[0..4].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.system_time.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.scale.multiplier.to_le_bytes());
        bytes[28] = self.scale.shift as u8;
        bytes[29] = FLAG_TSC_STABLE;
        bytes
    }

    /// The version that marks this one as being written.
    pub fn version_while_writing(&self) -> u32 {
        self.version.wrapping_sub(1)
    }
}

/// The even version that follows `previous`, for both structures.
pub fn next_version(previous: u32) -> u32 {
    (previous & !1).wrapping_add(2)
}

/// `struct pvclock_wall_clock`: the time since 1970 at which the VM started, in nanoseconds.
pub fn wall_clock_bytes(version: u32, nanos_since_1970: u64) -> [u8; WALL_CLOCK_SIZE] {
    let seconds = (nanos_since_1970 / NANOS) as u32;
    let nanos = (nanos_since_1970 % NANOS) as u32;
    let mut bytes = [0; WALL_CLOCK_SIZE];
    bytes[0..4].copy_from_slice(&version.to_le_bytes());
    bytes[4..8].copy_from_slice(&seconds.to_le_bytes());
    bytes[8..12].copy_from_slice(&nanos.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The formula as the guest computes it from the bytes.
    fn guest_reads(bytes: &[u8; TIME_INFO_SIZE], tsc: u64) -> u64 {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let multiplier = u32::from_le_bytes(bytes[24..28].try_into().unwrap());
        let delta = tsc - u64_at(8);
        let delta = match bytes[28] as i8 {
            shift if shift < 0 => delta >> -shift,
            shift => delta << shift,
        };
        u64_at(16) + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64
    }

    proptest! {
        #[test]
        fn time_is_right_to_a_part_in_a_thousand_million(
            hz in 1_000_000..8_000_000_000u64,
            start in 0..1u64 << 50,
            seconds in 0..100_000u64,
            part in 0..1_000_000u64,
            system_time in 0..1u64 << 60,
        ) {
            let ticks = seconds * hz + part;
            let info = TimeInfo { version: 2, tsc_timestamp: start, system_time, scale: Scale::new(hz) };
            let elapsed = guest_reads(&info.to_bytes(), start + ticks) - system_time;
            let exact = (u128::from(ticks) * u128::from(NANOS) / u128::from(hz)) as u64;
            prop_assert!(elapsed.abs_diff(exact) <= 2 + exact / 1_000_000_000,
                "{elapsed} for {exact} at {hz} Hz");
            prop_assert_eq!(elapsed, info.scale.nanos(ticks));
        }
    }

    #[test]
    fn a_nanosecond_per_tick() {
        assert_eq!(
            Scale::new(NANOS),
            Scale {
                shift: 1,
                multiplier: 1 << 31
            }
        );
        assert_eq!(
            Scale::new(2 * NANOS),
            Scale {
                shift: 0,
                multiplier: 1 << 31
            }
        );
        assert_eq!(Scale::new(0).nanos(1), NANOS);
    }

    #[test]
    fn versions_are_even_and_differ() {
        assert_eq!(next_version(0), 2);
        assert_eq!(next_version(3), 4);
        assert_eq!(next_version(u32::MAX), 0);
        let info = TimeInfo {
            version: 4,
            tsc_timestamp: 0,
            system_time: 0,
            scale: Scale::new(NANOS),
        };
        assert_eq!(info.version_while_writing() & 1, 1);
    }

    #[test]
    fn msr_values() {
        assert_eq!(SystemTime::from_msr(0x1000), Ok(SystemTime::Disabled));
        assert_eq!(
            SystemTime::from_msr(0x1005),
            Ok(SystemTime::At(Gpa(0x1004)))
        );
        assert_eq!(SystemTime::from_msr(0x1003), Err(GeneralProtection));
        assert_eq!(wall_clock_address(0x1004), Ok(Gpa(0x1004)));
        assert_eq!(wall_clock_address(0x1001), Err(GeneralProtection));
    }

    #[test]
    fn wall_clock_layout() {
        assert_eq!(
            wall_clock_bytes(2, 1_700_000_000 * NANOS + 5),
            [2, 0, 0, 0, 0x00, 0xf1, 0x53, 0x65, 5, 0, 0, 0]
        );
    }
}
