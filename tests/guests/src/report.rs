//! Checks and their results.

use crate::cell::Shared;
use crate::serial::{self, Serial};
use crate::{cpu, port};
use core::arch::asm;
use core::fmt::{self, Write};

static PASSED: Shared<u32> = Shared::new(0);
static FAILED: Shared<u32> = Shared::new(0);

/// PM1a control (`pc::PM1A_CONTROL` of the hypervisor, and the FADT's).
pub const PM1A_CONTROL: u16 = 0x604;
/// SLP_TYP of soft-off, and SLP_EN.
const SOFT_OFF: u16 = 5 << 10 | 1 << 13;

/// Writes a line that is no result.
pub fn say(text: fmt::Arguments<'_>) {
    let _ = writeln!(Serial, "{text}");
}

/// A check without more to say.
pub fn check(name: &str, ok: bool) {
    check_detail(name, ok, format_args!("it is not so"));
}

/// A check that two values are the same.
pub fn check_equal<T: PartialEq + fmt::Debug>(name: &str, actual: T, expected: T) {
    let ok = actual == expected;
    check_detail(
        name,
        ok,
        format_args!("{actual:x?} instead of {expected:x?}"),
    );
}

/// A check; `detail` says what was found where it fails.
pub fn check_detail(name: &str, ok: bool, detail: fmt::Arguments<'_>) {
    check_named(format_args!("{name}"), ok, detail);
}

/// The same with a name that is put together.
pub fn check_named(name: fmt::Arguments<'_>, ok: bool, detail: fmt::Arguments<'_>) {
    if ok {
        PASSED.set(PASSED.get() + 1);
        say(format_args!("check: {name}: ok"));
    } else {
        FAILED.set(FAILED.get() + 1);
        say(format_args!("check: {name}: failed: {detail}"));
    }
}

/// The end of a guest that has done all its checks.
pub fn finish() -> ! {
    say(format_args!(
        "checks: {} passed, {} failed",
        PASSED.get(),
        FAILED.get()
    ));
    power_off()
}

/// The end of a guest that cannot go on.
pub fn abort(reason: fmt::Arguments<'_>) -> ! {
    check_detail("the guest runs to its end", false, reason);
    finish()
}

/// Soft-off by ACPI.
pub fn power_off() -> ! {
    serial::flush();
    port::out16(PM1A_CONTROL, SOFT_OFF);
    stop()
}

/// Halts for good.
pub fn stop() -> ! {
    loop {
        cpu::disable_interrupts();
        // SAFETY: waits.
        unsafe { asm!("hlt") };
    }
}
