//! The guest's registers that stay in the hardware: neither a VM entry nor a VM
//! exit switches them (SDM 3, "VM Entries" and "VM Exits"), and the hypervisor
//! touches none. What they hold when a guest starts is the firmware's, or the
//! guest's before it.

use crate::arch::{cpu, msr};
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

/// An image for FXRSTOR, and an empty XSAVE header: everything in its initial state
/// (SDM 1, 10.5 and 13.4).
#[repr(C, align(64))]
struct Image([u8; 576]);

const FCW: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

static INITIAL: Image = {
    let mut bytes = [0; 576];
    [bytes[0], bytes[1]] = FCW.to_le_bytes();
    [bytes[24], bytes[25], bytes[26], bytes[27]] = MXCSR.to_le_bytes();
    Image(bytes)
};

/// Gives them their values at reset. `xcr0` is what XCR0 may hold on this CPU, 0
/// where it has no XSAVE; CR4.OSXSAVE and CR4.OSFXSR are set where there is.
pub fn reset(xcr0: u64) {
    for number in MSRS {
        // SAFETY: nothing of the hypervisor uses them. One that is not there stays so.
        unsafe { msr::try_write(number, 0) };
    }
    cpu::set_cr2(0);
    // SAFETY: the host sets no breakpoint.
    unsafe {
        asm!(
            "mov dr7, {dr7}",
            "mov dr0, {zero}",
            "mov dr1, {zero}",
            "mov dr2, {zero}",
            "mov dr3, {zero}",
            "mov dr6, {dr6}",
            zero = in(reg) 0u64,
            dr6 = in(reg) DR6_RESET,
            dr7 = in(reg) DR7_RESET,
            options(nomem, nostack, preserves_flags)
        );
    }
    if xcr0 == 0 {
        load_initial_vector_state(0);
        return;
    }
    // SAFETY: the caller's word for both: the CPU takes `xcr0`, and x87 alone is always valid.
    unsafe { cpu::set_xcr0(xcr0) };
    load_initial_vector_state(xcr0);
    // SAFETY: as above.
    unsafe { cpu::set_xcr0(XCR0_RESET) };
}

/// The components of `xcr0`; with 0 those that FXRSTOR knows.
#[inline(never)]
fn load_initial_vector_state(xcr0: u64) {
    let image = &raw const INITIAL;
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
