//! Data breakpoints on accesses that are made here and not by the CPU (SDM 3, 18.2).
//!
//! Who looks for them and finds none has MOV to and from debug registers exit, so that nobody has
//! to look again before that. Accesses by a known way ([`super::known_code`]) do not look at all:
//! nothing is kept while a breakpoint is on, and that exit has all forgotten.

use super::Vcpu;
use super::mmio::ITERATIONS;
use crate::arch::cpu;
use crate::vmx::vmcs::{control, guest};
use x86::vmx::vmcs::control::PrimaryControls;

const MOV_DR_EXITING: u32 = PrimaryControls::MOV_DR_EXITING.bits();
/// Of the pending debug exceptions: an enabled breakpoint was met.
const ENABLED_BREAKPOINT: u64 = 1 << 12;

/// The guest's data breakpoints, while an instruction is executed.
#[derive(Clone, Copy)]
pub(super) struct DataBreakpoints {
    /// DR7, 0 where none is on.
    dr7: u64,
    /// Those that were met, as DR6 has them.
    met: u64,
}

impl DataBreakpoints {
    pub const NONE: Self = Self { dr7: 0, met: 0 };

    pub fn is_armed(&self) -> bool {
        self.dr7 != 0
    }

    /// An access has been made.
    #[inline(always)]
    pub fn note(&mut self, linear: u64, bytes: usize, write: bool) {
        if self.is_armed() {
            self.met |= met(self.dr7, cpu::breakpoints(), linear, bytes as u64, write);
        }
    }

    /// Iterations of a string instruction that may be done at once: each of them may trap.
    pub fn iterations(&self) -> u32 {
        if self.is_armed() { 1 } else { ITERATIONS }
    }

    pub fn met(&self) -> u64 {
        self.met
    }
}

/// Whether breakpoint `index` is on, and for data: for writes, or both.
const fn watches(dr7: u64, index: usize) -> bool {
    let enabled = dr7 >> (2 * index) & 3 != 0;
    // 0 is for execution, 2 for ports.
    enabled && dr7 >> (16 + 4 * index) & 1 != 0
}

const fn has_data_breakpoints(dr7: u64) -> bool {
    watches(dr7, 0) || watches(dr7, 1) || watches(dr7, 2) || watches(dr7, 3)
}

/// Which breakpoints an access to `bytes` bytes meets.
fn met(dr7: u64, addresses: [u64; 4], linear: u64, bytes: u64, write: bool) -> u64 {
    let mut met = 0;
    for (index, address) in addresses.into_iter().enumerate() {
        let condition = dr7 >> (16 + 4 * index);
        let length = match condition >> 2 & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let start = address & !(length - 1);
        let reads_too = condition & 2 != 0;
        // Each is where the other is, or begins there.
        let overlaps = linear.wrapping_sub(start) < length || start.wrapping_sub(linear) < bytes;
        if watches(dr7, index) && (write || reads_too) && overlaps {
            met |= 1 << index;
        }
    }
    met
}

impl Vcpu {
    /// The data breakpoints that are on.
    pub(super) fn data_breakpoints(&mut self) -> DataBreakpoints {
        if self.primary & MOV_DR_EXITING != 0 {
            return DataBreakpoints::NONE;
        }
        let dr7 = self.vmcs.read(guest::DR7);
        if has_data_breakpoints(dr7) {
            return DataBreakpoints { dr7, met: 0 };
        }
        self.set_primary(self.primary | MOV_DR_EXITING);
        DataBreakpoints::NONE
    }

    /// MOV to or from a debug register: the guest executes it again.
    #[cold]
    pub(super) fn debug_register(&mut self) {
        self.known.clear();
        self.set_primary(self.primary & !MOV_DR_EXITING);
    }

    fn set_primary(&mut self, primary: u32) {
        self.primary = primary;
        self.vmcs.write(control::PRIMARY, primary);
    }

    /// The trap behind an instruction that has met these breakpoints.
    #[inline(always)]
    pub(super) fn trap_data_breakpoints(&mut self, met: u64) {
        if met != 0 {
            let pending = self.vmcs.read(guest::PENDING_DEBUG);
            self.vmcs
                .write(guest::PENDING_DEBUG, pending | ENABLED_BREAKPOINT | met);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: u64 = 1;
    const BOTH: u64 = 3;
    const FOUR: u64 = 3;
    const EIGHT: u64 = 2;

    /// DR7 with breakpoint `index`.
    const fn dr7(index: u32, condition: u64, length: u64) -> u64 {
        (length << 2 | condition) << (16 + 4 * index) | 1 << (2 * index)
    }

    #[test]
    fn a_breakpoint_is_met_by_each_of_its_bytes() {
        let addresses = [0x1002, 0, 0, 0x2000];
        let both = dr7(0, BOTH, FOUR) | dr7(3, WRITE, EIGHT);
        // The address is aligned to the length.
        for (linear, bytes, expected) in [
            (0xfff, 1, 0),
            (0xffc, 8, 1),
            (0x1003, 1, 1),
            (0x1004, 4, 0),
            (0x1ff8, 8, 0),
            (0x1ff9, 8, 8),
            (0x2007, 2, 8),
            (0x1000, 0x1001, 9),
        ] {
            assert_eq!(met(both, addresses, linear, bytes, true), expected);
            let read = met(both, addresses, linear, bytes, false);
            assert_eq!(read, expected & 1, "{linear:x}");
        }
    }

    #[test]
    fn those_for_code_and_ports_are_none() {
        const PORT: u64 = 2;
        assert!(!has_data_breakpoints(dr7(1, 0, 0) | dr7(2, PORT, 0)));
        assert!(!has_data_breakpoints(dr7(1, BOTH, FOUR) & !0xff));
        assert!(has_data_breakpoints(dr7(1, BOTH, FOUR)));
        assert_eq!(met(dr7(0, 0, 0), [0; 4], 0, 8, true), 0);
    }
}
