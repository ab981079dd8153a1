//! One virtual CPU.
//!
//! Policy comes first, as plain logic that knows neither VT-x nor the host:
//! what the guest's CPUID and MSRs say, its clock, its page tables, and the
//! emulation of instructions that touch devices.

pub mod cpuid;
pub mod emulate;
pub mod msr;
pub mod pvclock;
pub mod walk;
