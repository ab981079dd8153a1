//! Thin, typed wrappers of the x86 instructions that Rust has no name for.
//!
//! Everything here is one instruction or a handful; what is done with them is
//! decided on the floors above. On the development host the module compiles
//! and its privileged parts are simply never called.

pub mod cpu;
pub mod errata;
pub mod fpu;
pub mod kernel_rom;
pub mod msr;
pub mod port;
pub mod registers;
pub mod vector;
