//! MSR and I/O bitmaps: which accesses exit (SDM vol. 3, 25.6.4 and 25.6.9).
//!
//! Both begin with every bit set: what nobody has thought of exits.

/// One page of bits for the CPU, by its physical address in the VMCS.
#[repr(C, align(4096))]
#[derive(Clone)]
struct BitmapPage([u8; 4096]);

impl BitmapPage {
    const ALL: Self = Self([0xff; 4096]);

    fn get(&self, bit: usize) -> bool {
        self.0
            .get(bit / 8)
            .is_none_or(|byte| byte >> (bit % 8) & 1 != 0)
    }

    fn set(&mut self, bit: usize, value: bool) {
        if let Some(byte) = self.0.get_mut(bit / 8) {
            let mask = 1 << (bit % 8);
            *byte = if value { *byte | mask } else { *byte & !mask };
        }
    }
}

/// Which instruction an [`MsrBitmap`] bit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrAccess {
    Read,
    Write,
}

/// The MSR has no bit: access to it always exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoBitmapBit {
    pub msr: u32,
}

/// The four 1-KiB bitmaps of MSR accesses: reads of low MSRs (0 to 1fffH),
/// reads of high ones (c0000000H to c0001fffH), writes of low, writes of high.
/// The VMCS takes the physical address of the whole, which is a multiple of 4096.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct MsrBitmap(BitmapPage);

impl MsrBitmap {
    /// Every access exits.
    pub const ALL: Self = Self(BitmapPage::ALL);

    fn bit(msr: u32, access: MsrAccess) -> Option<usize> {
        let bitmap = match access {
            MsrAccess::Read => 0,
            MsrAccess::Write => 0x4000,
        };
        match msr {
            0..=0x1fff => Some(bitmap + msr as usize),
            0xc000_0000..=0xc000_1fff => Some(bitmap + 0x2000 + (msr & 0x1fff) as usize),
            _ => None,
        }
    }

    /// Whether this access exits.
    pub fn intercepts(&self, msr: u32, access: MsrAccess) -> bool {
        Self::bit(msr, access).is_none_or(|bit| self.0.get(bit))
    }

    /// Makes this access exit, or go to the hardware.
    pub fn set(&mut self, msr: u32, access: MsrAccess, exits: bool) -> Result<(), NoBitmapBit> {
        let bit = Self::bit(msr, access).ok_or(NoBitmapBit { msr })?;
        self.0.set(bit, exits);
        Ok(())
    }

    /// Gives the guest the MSR itself, for reading and writing.
    pub fn pass_through(&mut self, msr: u32) -> Result<(), NoBitmapBit> {
        self.set(msr, MsrAccess::Read, false)?;
        self.set(msr, MsrAccess::Write, false)
    }

    /// Makes both accesses exit.
    pub fn intercept(&mut self, msr: u32) -> Result<(), NoBitmapBit> {
        self.set(msr, MsrAccess::Read, true)?;
        self.set(msr, MsrAccess::Write, true)
    }
}

/// The bitmaps of ports: A (ports 0 to 7fffH), then B (8000H to ffffH). The
/// VMCS takes two physical addresses, that of the whole and 4096 more, where
/// the memory is contiguous; else those of [`IoBitmap::a`] and [`IoBitmap::b`].
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct IoBitmap {
    a: BitmapPage,
    b: BitmapPage,
}

impl IoBitmap {
    /// Every access exits.
    pub const ALL: Self = Self {
        a: BitmapPage::ALL,
        b: BitmapPage::ALL,
    };

    /// Bitmap A, in memory order.
    pub const fn a(&self) -> &[u8; 4096] {
        &self.a.0
    }

    /// Bitmap B, in memory order.
    pub const fn b(&self) -> &[u8; 4096] {
        &self.b.0
    }

    /// Whether an access of `bytes` bytes at `port` exits: when a bit of any of
    /// its ports is set, or when it wraps around the port space.
    pub fn intercepts(&self, port: u16, bytes: u16) -> bool {
        (0..bytes).any(|offset| {
            port.checked_add(offset).is_none_or(|port| {
                let page = if port < 0x8000 { &self.a } else { &self.b };
                page.get(usize::from(port & 0x7fff))
            })
        })
    }

    /// Makes accesses to this port exit, or go to the hardware.
    pub fn set(&mut self, port: u16, exits: bool) {
        let page = if port < 0x8000 {
            &mut self.a
        } else {
            &mut self.b
        };
        page.set(usize::from(port & 0x7fff), exits);
    }

    /// Gives the guest this port itself.
    pub fn pass_through(&mut self, port: u16) {
        self.set(port, false);
    }

    /// Makes accesses to this port exit.
    pub fn intercept(&mut self, port: u16) {
        self.set(port, true);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The SDM's words: "read bitmap for low MSRs ... at the MSR-bitmap address",
    /// "high ... plus 1024", "write, low ... plus 2048", "write, high ... plus 3072".
    fn formula(msr: u32, access: MsrAccess) -> Option<(usize, u8)> {
        let (base, index) = match (access, msr) {
            (MsrAccess::Read, 0..=0x1fff) => (0, msr),
            (MsrAccess::Read, 0xc000_0000..=0xc000_1fff) => (1024, msr - 0xc000_0000),
            (MsrAccess::Write, 0..=0x1fff) => (2048, msr),
            (MsrAccess::Write, 0xc000_0000..=0xc000_1fff) => (3072, msr - 0xc000_0000),
            _ => return None,
        };
        Some((base + index as usize / 8, 1 << (index % 8)))
    }

    fn any_msr() -> impl Strategy<Value = u32> {
        prop_oneof![0u32..0x2100, 0xbfff_ff00u32..0xc000_2100, any::<u32>()]
    }

    proptest! {
        #[test]
        fn exactly_the_bit_of_the_formula_changes(msr in any_msr(), write: bool) {
            let access = if write { MsrAccess::Write } else { MsrAccess::Read };
            let mut bitmap = MsrBitmap::ALL;
            let outcome = bitmap.set(msr, access, false);
            let mut expected = [0xffu8; 4096];
            match formula(msr, access) {
                Some((byte, mask)) => {
                    expected[byte] &= !mask;
                    prop_assert_eq!(outcome, Ok(()));
                    prop_assert!(!bitmap.intercepts(msr, access));
                }
                None => {
                    prop_assert_eq!(outcome, Err(NoBitmapBit { msr }));
                    prop_assert!(bitmap.intercepts(msr, access));
                }
            }
            prop_assert!(bitmap.0.0 == expected);
            if outcome.is_ok() {
                bitmap.intercept(msr).unwrap();
                prop_assert!(bitmap.0.0 == [0xff; 4096]);
            }
        }

        #[test]
        fn a_port_changes_its_bit_in_its_page(port: u16) {
            let mut bitmap = IoBitmap::ALL;
            bitmap.pass_through(port);
            let mut expected = [0xffu8; 8192];
            expected[usize::from(port) / 8] &= !(1 << (port % 8));
            prop_assert!(bitmap.a()[..] == expected[..4096]);
            prop_assert!(bitmap.b()[..] == expected[4096..]);
            prop_assert!(!bitmap.intercepts(port, 1));
            prop_assert!(bitmap.intercepts(port, 2));
            bitmap.intercept(port);
            prop_assert!(bitmap.intercepts(port, 1));
        }
    }

    #[test]
    fn an_access_that_wraps_around_the_port_space_exits() {
        let mut bitmap = IoBitmap::ALL;
        bitmap.pass_through(0xffff);
        bitmap.pass_through(0);
        assert!(!bitmap.intercepts(0xffff, 1));
        assert!(bitmap.intercepts(0xffff, 2));
    }

    #[test]
    fn the_cpu_is_given_whole_pages() {
        assert_eq!(
            (size_of::<MsrBitmap>(), align_of::<MsrBitmap>()),
            (4096, 4096)
        );
        assert_eq!(
            (size_of::<IoBitmap>(), align_of::<IoBitmap>()),
            (8192, 4096)
        );
    }
}
