//! The guest's registers that stay in the hardware: neither a VM entry nor a VM
//! exit switches them (SDM 3, "VM Entries" and "VM Exits"), and the hypervisor
//! touches none. They are switched where another vCPU gets the CPU, and only as far as the two
//! differ: to write most of them costs more than to compare.

use crate::arch::{cpu, msr};
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::arch::asm;

/// IA32_STAR, IA32_LSTAR, IA32_CSTAR, IA32_FMASK, IA32_KERNEL_GS_BASE, IA32_TSC_AUX,
/// IA32_SPEC_CTRL: 0 after power-on (SDM 3, table 11-1).
pub const MSRS: [u32; 7] = [
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
    0x48,
];

const DR6_RESET: u64 = 0xffff_0ff0;
const DR7_RESET: u64 = 0x400;
/// XCR0 at reset: x87 state alone.
const XCR0_RESET: u64 = 1;

const FCW: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;
/// Bytes of an FXSAVE image and an XSAVE header.
const LEAST_IMAGE: usize = 576;

/// A part of an image for XSAVE or FXSAVE.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// What these registers hold, of a vCPU that does not have the CPU.
pub struct LiveState {
    /// Those that the CPU has, a bit for each.
    present: u8,
    msrs: [u64; MSRS.len()],
    cr2: u64,
    /// DR0 to DR3.
    breakpoints: [u64; 4],
    dr6: u64,
    xcr0: u64,
    /// What XCR0 may hold; 0 where the CPU has no XSAVE.
    supported: u64,
    /// For XSAVE with all that is supported, else for FXSAVE.
    vectors: Vec<Line>,
}

impl LiveState {
    /// At reset. `supported` is what XCR0 may hold on this CPU, 0 where it has no XSAVE;
    /// CR4.OSXSAVE and CR4.OSFXSR are set where there is.
    ///
    /// # Errors
    /// When no memory is left for an image of the vector registers.
    pub fn at_reset(supported: u64) -> Result<Self, TryReserveError> {
        // The size for all that the CPU has (SDM 1, 13.2): ECX of leaf 0xd.
        let size = if supported == 0 {
            LEAST_IMAGE
        } else {
            LEAST_IMAGE.max(cpu::leaf(0xd, 0)[2] as usize)
        };
        let mut vectors = Vec::new();
        vectors.try_reserve_exact(size.div_ceil(64))?;
        vectors.resize(size.div_ceil(64), Line([0; 64]));
        // Everything else in its initial state (SDM 1, 10.5 and 13.4): an empty header says so.
        if let Some(Line(first)) = vectors.first_mut() {
            let ([low, high], [a, b, c, d]) = (FCW.to_le_bytes(), MXCSR.to_le_bytes());
            [first[0], first[1]] = [low, high];
            [first[24], first[25], first[26], first[27]] = [a, b, c, d];
        }
        Ok(Self {
            present: (0..MSRS.len()).fold(0, |present, index| {
                present | u8::from(msr::try_read(MSRS[index]).is_some()) << index
            }),
            msrs: [0; MSRS.len()],
            cr2: 0,
            breakpoints: [0; 4],
            dr6: DR6_RESET,
            xcr0: XCR0_RESET,
            supported,
            vectors,
        })
    }

    /// Takes what the hardware holds.
    pub fn save(&mut self) {
        for (index, number) in MSRS.into_iter().enumerate() {
            if self.present & 1 << index != 0 {
                // SAFETY: it was there when this was made.
                self.msrs[index] = unsafe { msr::read(number) };
            }
        }
        self.cr2 = cpu::cr2();
        // SAFETY: reads; CR4.DE does not matter for these.
        unsafe {
            asm!(
                "mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", "mov {}, dr6",
                out(reg) self.breakpoints[0],
                out(reg) self.breakpoints[1],
                out(reg) self.breakpoints[2],
                out(reg) self.breakpoints[3],
                out(reg) self.dr6,
                options(nomem, nostack, preserves_flags)
            );
        }
        if self.supported != 0 {
            // SAFETY: where XCR0 may hold something there is XSAVE.
            self.xcr0 = unsafe { cpu::xcr0() };
            self.with_all_of_xcr0(self.xcr0);
        }
        save_vectors(&mut self.vectors, self.supported);
    }

    /// Gives it to the hardware, which holds what `before` took from it; anything where
    /// there is none.
    pub fn load(&self, before: Option<&Self>) {
        let known = before.map_or(&self.msrs, |before| &before.msrs);
        for (index, number) in MSRS.into_iter().enumerate() {
            let value = self.msrs[index];
            let differs = before.is_none() || known[index] != value;
            if differs && self.present & 1 << index != 0 {
                // SAFETY: it is there, nothing of the hypervisor uses it, and the value was the
                // guest's.
                unsafe { msr::write(number, value) };
            }
        }
        cpu::set_cr2(self.cr2);
        let same = |before: &Self| before.breakpoints == self.breakpoints && before.dr6 == self.dr6;
        if !before.is_some_and(same) {
            self.load_debug_registers();
        }
        if self.supported == 0 {
            return load_vectors(&self.vectors, 0);
        }
        self.with_all_of_xcr0(before.map_or(0, |_| self.supported));
        load_vectors(&self.vectors, self.supported);
        if self.xcr0 != self.supported {
            // SAFETY: the guest's own value, which was checked.
            unsafe { cpu::set_xcr0(self.xcr0) };
        }
    }

    /// Lets XSAVE and XRSTOR see all components: those that the guest has switched off keep
    /// their contents. `now` is what XCR0 holds.
    fn with_all_of_xcr0(&self, now: u64) {
        if now != self.supported {
            // SAFETY: the CPU takes it, and the hypervisor uses nothing that it governs.
            unsafe { cpu::set_xcr0(self.supported) };
        }
    }

    fn load_debug_registers(&self) {
        let [dr0, dr1, dr2, dr3] = self.breakpoints;
        // SAFETY: DR7 comes with each VM entry and is at its reset value in the host, so that none
        // of these is a breakpoint there.
        unsafe {
            asm!(
                "mov dr7, {dr7}",
                "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {}",
                in(reg) dr0,
                in(reg) dr1,
                in(reg) dr2,
                in(reg) dr3,
                in(reg) self.dr6,
                dr7 = in(reg) DR7_RESET,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// Stores the components of `xcr0`, all of which XCR0 has; with 0 those that FXSAVE knows.
#[inline(never)]
fn save_vectors(image: &mut [Line], xcr0: u64) {
    let image = image.as_mut_ptr();
    // SAFETY: the image has room for all that the CPU knows (`LiveState::at_reset`), and is aligned.
    unsafe {
        if xcr0 == 0 {
            asm!("fxsave64 [{}]", in(reg) image, options(nostack, preserves_flags));
        } else {
            asm!(
                "xsave64 [{}]",
                in(reg) image,
                in("eax") xcr0 as u32,
                in("edx") (xcr0 >> 32) as u32,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// Loads what [`save_vectors`] has stored.
#[inline(never)]
fn load_vectors(image: &[Line], xcr0: u64) {
    let image = image.as_ptr();
    // SAFETY: the image is aligned, valid, and only read; what it is loaded into is the guest's.
    unsafe {
        if xcr0 == 0 {
            asm!("fxrstor64 [{}]", in(reg) image, options(nostack, readonly, preserves_flags));
        } else {
            asm!(
                "xrstor64 [{}]",
                in(reg) image,
                in("eax") xcr0 as u32,
                in("edx") (xcr0 >> 32) as u32,
                options(nostack, readonly, preserves_flags)
            );
        }
    }
}

/// Gives the debug registers and CR2 their values at INIT, which leaves the others as they
/// are (SDM 3, table 10-1).
pub fn reset_debug_registers() {
    cpu::set_cr2(0);
    // SAFETY: the host sets no breakpoint.
    unsafe {
        asm!(
            "mov dr7, {dr7}", "mov dr0, {zero}", "mov dr1, {zero}", "mov dr2, {zero}", "mov dr3, {zero}",
            "mov dr6, {dr6}",
            zero = in(reg) 0u64,
            dr6 = in(reg) DR6_RESET,
            dr7 = in(reg) DR7_RESET,
            options(nomem, nostack, preserves_flags)
        );
    }
}
