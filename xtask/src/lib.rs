//! Builds Vireo, makes its disk image, and starts machines that boot it.
//!
//! The command line is `main.rs`; the integration tests use the same pieces.

#![forbid(unsafe_code)]

pub mod bench;
pub mod build;
pub mod conformance;
pub mod cpio;
pub mod exit_times;
pub mod figures;
pub mod framing;
pub mod fuzz;
pub mod guest;
pub mod image;
pub mod inspect;
pub mod machine;
pub mod paths;
pub mod pe;
pub mod progress;
pub mod provision;
pub mod run;
pub mod session;
pub mod symbols;
pub mod terminal;
pub mod test;
pub mod uki;
pub mod verdict;
pub mod volume;
