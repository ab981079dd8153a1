//! The guest's registers that stay in the hardware: neither a VM entry nor a VM
//! exit switches them (SDM 3, "VM Entries" and "VM Exits"), and the hypervisor
//! touches none. They are switched where another vCPU gets the CPU, and only as far as the two
//! differ: to write most of them costs more than to compare.

use crate::arch::{cpu, msr};
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::arch::asm;

/// IA32_STAR, IA32_LSTAR, IA32_CSTAR, IA32_FMASK, IA32_TSC_AUX: 0 after power-on (SDM 3, table
/// 11-1). An operating system writes them once, and so each write exits and is kept here: nobody
/// reads them when another vCPU comes.
pub const WRITTEN: [u32; 5] = [
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0103,
];
/// IA32_KERNEL_GS_BASE, IA32_SPEC_CTRL: the same, but they change often, without an exit.
pub const FREE: [u32; 2] = [0xc000_0102, 0x48];

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
    /// [`WRITTEN`] as they are now; 0 where the CPU has none.
    written: [u64; WRITTEN.len()],
    /// [`FREE`] as they were when another vCPU came.
    free: [u64; FREE.len()],
    /// Those of [`FREE`] that the CPU has.
    present: [bool; FREE.len()],
    cr2: u64,
    /// DR0 to DR3.
    breakpoints: [u64; 4],
    dr6: u64,
    /// As it is now; 0 where the CPU has no XSAVE.
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
            written: [0; WRITTEN.len()],
            free: [0; FREE.len()],
            present: FREE.map(|number| msr::try_read(number).is_some()),
            cr2: 0,
            breakpoints: [0; 4],
            dr6: DR6_RESET,
            xcr0: if supported == 0 { 0 } else { XCR0_RESET },
            supported,
            vectors,
        })
    }

    /// Writes one of [`WRITTEN`] for the vCPU that has the CPU; false where that would fault.
    pub fn write(&mut self, number: u32, value: u64) -> bool {
        let index = WRITTEN.iter().position(|known| *known == number);
        let Some(place) = index.and_then(|index| self.written.get_mut(index)) else {
            return false;
        };
        // SAFETY: nothing of the hypervisor uses these.
        let taken = unsafe { msr::try_write(number, value) };
        if taken {
            *place = value;
        }
        taken
    }

    /// Writes XCR0 for the vCPU that has the CPU, with a value that this may hold.
    pub fn set_xcr0(&mut self, value: u64) {
        // SAFETY: the caller has checked the value, and the hypervisor uses no state that XCR0
        // governs.
        unsafe { cpu::set_xcr0(value) };
        self.xcr0 = value;
    }

    /// Takes what the hardware holds.
    pub fn save(&mut self) {
        for (index, number) in FREE.into_iter().enumerate() {
            if self.present[index] {
                // SAFETY: it was there when this was made.
                self.free[index] = unsafe { msr::read(number) };
            }
        }
        self.cr2 = cpu::cr2();
        self.breakpoints = cpu::breakpoints();
        self.dr6 = cpu::dr6();
        self.with_all_of_xcr0(self.xcr0);
        save_vectors(&mut self.vectors, self.supported);
    }

    /// Gives it to the hardware, which holds what `before` took from it; anything where
    /// there is none.
    pub fn load(&self, before: Option<&Self>) {
        let differs = |own: u64, before: Option<u64>| before != Some(own);
        for (index, number) in WRITTEN.into_iter().enumerate() {
            let value = self.written[index];
            if differs(value, before.map(|before| before.written[index])) {
                // SAFETY: nothing of the hypervisor uses it. The CPU has taken the value before, or
                // lacks the MSR.
                let _ = unsafe { msr::try_write(number, value) };
            }
        }
        for (index, number) in FREE.into_iter().enumerate() {
            let value = self.free[index];
            if differs(value, before.map(|before| before.free[index])) && self.present[index] {
                // SAFETY: it is there, nothing of the hypervisor uses it, and the value was the
                // guest's.
                unsafe { msr::write(number, value) };
            }
        }
        cpu::set_cr2(self.cr2);
        if !before.is_some_and(|before| self.has_debug_registers_of(before)) {
            self.load_debug_registers();
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

    fn has_debug_registers_of(&self, other: &Self) -> bool {
        // Arrays are compared byte by byte where there are no vectors.
        let breakpoints = self.breakpoints.iter().zip(&other.breakpoints);
        let differs = breakpoints.fold(self.dr6 ^ other.dr6, |differs, (a, b)| differs | a ^ b);
        differs == 0
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
