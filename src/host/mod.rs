//! The machine below: what the hypervisor itself runs on.
//!
//! The order in which `main` brings it up; each line may use those before it:
//!
//! | call | what it gives |
//! | --- | --- |
//! | [`serial::init`] | a console that polls |
//! | [`descriptors::init`] | GDT, TSS, IDT: exceptions are reported instead of resetting the machine |
//! | [`memory::heap::init`] | `alloc` |
//! | [`memory::init`] | frames, mappings; needs the boot information, which needs the heap |
//! | [`framebuffer::init`] | the log on the screen, where there is one |
//! | [`descriptors::guard_stacks`] | guard pages below the interrupt stacks |
//! | [`acpi::init`] | what the firmware's tables say, or the PC's defaults |
//! | [`power::init`] | the way off, which a dying machine takes too |
//! | [`local_apic::init`], [`io_apic::init`] | interrupts |
//! | [`time::init`], [`time::init_timer`] | the frequency of the time-stamp counter, the local APIC's timer |
//! | [`console::start`] | the console by interrupt instead of polling |

pub mod acpi;
pub mod console;
pub mod cpus;
pub mod descriptors;
pub mod framebuffer;
pub mod interrupts;
pub mod io_apic;
pub mod local_apic;
pub mod memory;
pub mod panic;
pub mod power;
#[cfg(feature = "selftest")]
pub mod selftest;
pub mod serial;
pub mod time;
