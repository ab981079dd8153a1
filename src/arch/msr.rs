//! Model-specific registers. Their numbers are `x86::msr`'s constants.

use core::arch::{asm, global_asm};

/// Reads an MSR.
///
/// # Safety
/// The MSR must exist, else #GP. See [`try_read`] where that is not known.
#[inline]
pub unsafe fn read(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller knows that the MSR exists.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The MSR must exist and accept `value`, and what it changes must be sound.
#[inline]
pub unsafe fn write(msr: u32, value: u64) {
    // SAFETY: the caller answers for the MSR and its effect.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

global_asm!(
    // u64 out: *mut u64 in rsi; returns 1 when the access went through. The
    // general-protection handler resumes at the landing (see `recovery`).
    ".global vireo_rdmsr_try, vireo_rdmsr_try_access, vireo_wrmsr_try, vireo_wrmsr_try_access, vireo_msr_try_failed",
    "vireo_rdmsr_try:",
    "mov ecx, edi",
    "vireo_rdmsr_try_access:",
    "rdmsr",
    "mov [rsi], eax",
    "mov [rsi + 4], edx",
    "mov eax, 1",
    "ret",
    "vireo_wrmsr_try:",
    "mov ecx, edi",
    "mov eax, esi",
    "mov rdx, rsi",
    "shr rdx, 32",
    "vireo_wrmsr_try_access:",
    "wrmsr",
    "mov eax, 1",
    "ret",
    "vireo_msr_try_failed:",
    "xor eax, eax",
    "ret",
);

unsafe extern "C" {
    fn vireo_rdmsr_try(msr: u32, value: *mut u64) -> u32;
    fn vireo_wrmsr_try(msr: u32, value: u64) -> u32;
    fn vireo_rdmsr_try_access();
    fn vireo_wrmsr_try_access();
    fn vireo_msr_try_failed();
}

/// Reads an MSR that may not exist; `None` where the CPU answers #GP.
/// Exceptions must be handled already (`host::descriptors::init`).
pub fn try_read(msr: u32) -> Option<u64> {
    let mut value = 0;
    // SAFETY: a #GP at the access resumes at the landing, which returns 0;
    // reading an MSR changes nothing that Rust knows of.
    let done = unsafe { vireo_rdmsr_try(msr, &mut value) };
    (done != 0).then_some(value)
}

/// Writes an MSR that may not exist or may refuse the value; whether it was taken.
///
/// # Safety
/// What the MSR changes must be sound. Exceptions must be handled already.
pub unsafe fn try_write(msr: u32, value: u64) -> bool {
    // SAFETY: a #GP at the access resumes at the landing; the caller answers
    // for the effect.
    unsafe { vireo_wrmsr_try(msr, value) != 0 }
}

/// Where execution resumes after a #GP at `rip`, when that is the access of
/// [`try_read`] or [`try_write`].
pub fn recovery(rip: u64) -> Option<u64> {
    let accesses = [
        vireo_rdmsr_try_access as *const () as u64,
        vireo_wrmsr_try_access as *const () as u64,
    ];
    accesses
        .contains(&rip)
        .then_some(vireo_msr_try_failed as *const () as u64)
}
