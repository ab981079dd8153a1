//! Small guests that the integration tests boot.
//!
//! A guest is a program in `src/bin` that asks the machine questions and says
//! on COM1 what it thinks of the answers; this library is what they share. One
//! boot runs many checks:
//!
//! ```text
//! check: NAME: ok
//! check: NAME: failed: DETAIL
//! checks: N passed, M failed
//! ```
//!
//! Then the guest powers the machine off. Without the last line it has crashed
//! or hangs.
//!
//! A guest owns its machine, and what it does to the machine can only break
//! itself. So the wrappers of instructions are safe functions, though they could
//! pull the ground from under Rust's feet: a check that does is a bad check.
//! What is `unsafe` stays in this library and in the macro [`execute!`].
//!
//! | module | what it is |
//! | --- | --- |
//! | [`entry`] | from the PVH entry point to a Rust function in 64-bit mode |
//! | [`report`] | checks and their results, the end |
//! | [`serial`], [`port`], [`cpu`], [`memory`] | COM1, port I/O, instructions, registers in memory |
//! | [`exceptions`] | IDT, exceptions caught, interrupts counted |
//! | [`paging`] | pages with other rights than the flat map's |
//! | [`apic`], [`io_apic`], [`pic`], [`pit`] | interrupt controllers and a timer |
//! | [`processors`] | the CPUs beside the first |
//! | [`start_info`], [`acpi`] | what the guest was told about its machine |
#![no_std]
// [`execute!`]: the operands of `asm!` cannot be evaluated before it.
#![allow(clippy::macro_metavars_in_unsafe)]

pub mod acpi;
pub mod apic;
mod cell;
pub mod cpu;
pub mod descriptors;
pub mod entry;
pub mod exceptions;
pub mod io_apic;
pub mod memory;
pub mod paging;
pub mod pic;
pub mod pit;
pub mod port;
pub mod processors;
pub mod report;
pub mod serial;
pub mod start_info;
pub mod time;

pub use cell::Shared;
pub use report::{check, check_detail, check_equal};

// Its functions are called by compiled code only.
use vireo_freestanding as _;

/// Names the function that a guest starts with.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() {
            $main()
        }
    };
}

/// Executes instructions, with operands as `core::arch::asm!` has them, and
/// returns the exception that they raised. What they must leave alone is what
/// any `asm!` must.
#[macro_export]
macro_rules! execute {
    ($($asm:tt)*) => {
        $crate::exceptions::catch(|| {
            // SAFETY: the guest's own machine, and the operands say what is changed.
            unsafe { core::arch::asm!($($asm)*) }
        })
    };
}

#[cfg(feature = "bare")]
#[panic_handler]
fn on_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    report::abort(format_args!("{info}"))
}
